"""Initial weights as a function of the seed alone.

PyTorch's constructors sample from the global generator, whose state depends on what else has run.
Here a model is built on the meta device, where nothing is sampled, and then filled from a generator
of its own.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from vae_hyperband.common.randomness import generator, seeded
from vae_hyperband.model.likelihoods import FIRST_LOG_SCALE
from vae_hyperband.model.priors import VampPrior
from vae_hyperband.model.vae import VAE

Module = TypeVar("Module", bound=nn.Module)


def initialized_vae(
    latent_dim: int,
    image_size: int | tuple[int, int],
    channels: int,
    seed: int,
    **settings: Any,
) -> VAE:
    """A VAE on the CPU whose weights depend on the arguments alone.

    ``settings`` are further arguments of :class:`~vae_hyperband.model.vae.VAE`.
    """
    # the user's own network samples its weights itself, from the generator that it finds
    with seeded(seed, "init"), torch.device("meta"):
        model = VAE(latent_dim, image_size, channels, **settings)
    return initialize(model, generator(seed, "init"))


def initialize(model: Module, stream: torch.Generator) -> Module:
    """Give what was built on the meta device its first weights, on the CPU.

    Weights and biases are uniform in +-1/sqrt(fan_in), as those of PyTorch's own layers are.
    """
    for layer in model.modules():
        if not any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
            continue  # it has none, or those of the user's own network
        # on the CPU whatever the device, so that a GPU starts from the same weights
        layer.to_empty(device="cpu", recurse=False)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # (out, in, 3, 3), for a transposed convolution (in, out, 3, 3): PyTorch counts dim 1
            fan_in = layer.weight[0].numel()
            assert layer.bias is not None
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=stream)
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            layer.reset_parameters()  # ones and zeros
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, generator=stream)
        elif isinstance(layer, VampPrior):
            nn.init.normal_(layer.logits_KCHW, generator=stream)
        elif isinstance(layer, VAE) and layer.log_scale is not None:
            nn.init.constant_(layer.log_scale, FIRST_LOG_SCALE)
    return model
