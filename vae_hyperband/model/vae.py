"""The variational autoencoder: two convolutions down to a Gaussian over z, two back up.

    x -> Conv 1->32 -> ReLU -> Conv 32->64 -> ReLU -> flatten -> FC -> mu, log sigma^2
    z -> FC -> reshape -> ConvT 64->32 -> ReLU -> ConvT 32->1 -> sigmoid

All (transposed) convolutions are 3x3 with stride 2, so 28x28 becomes 14x14, then 7x7, and back.

Shape suffixes: B images, C channels, H height, W width, Z latent dimensions.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.model.fast_layers import (
    Conv,
    ConvTranspose,
    linear_from_images,
    linear_to_images,
)
from vae_hyperband.model.likelihoods import LIKELIHOODS, Likelihood, pixel_means
from vae_hyperband.model.priors import VampPrior

#: log sigma^2 is kept within +-20 (sigma between 4.5e-5 and 2.2e4), so that exp() stays finite.
LOGVAR_LIMIT = 20.0

#: The discretised logistic's scale at first: 0.1 of the way from black to white.
FIRST_LOG_SCALE = math.log(0.1)

Module = TypeVar("Module", bound=nn.Module)


class Encoder(nn.Module):
    """q(z|x): the mean and log variance of a diagonal Gaussian per image."""

    def __init__(self, latent_dim: int, image_size: int, channels: int) -> None:
        super().__init__()
        small = image_size // 4
        self.conv1 = Conv(channels, 32)
        self.conv2 = Conv(32, 64)
        self.fc_mu = nn.Linear(64 * small * small, latent_dim)
        self.fc_logvar = nn.Linear(64 * small * small, latent_dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv1(x_BCHW)  # (B, 32, H/2, W/2), ReLU included
        h = self.conv2(h)  # (B, 64, H/4, W/4), ReLU included
        # both layers in one matrix product
        weight = torch.cat((self.fc_mu.weight, self.fc_logvar.weight))
        bias = torch.cat((self.fc_mu.bias, self.fc_logvar.bias))
        mu_BZ, logvar_BZ = linear_from_images(h, weight, bias).chunk(2, dim=1)
        return mu_BZ, logvar_BZ.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)


class Decoder(nn.Module):
    """p(x|z): one logit per pixel."""

    def __init__(self, latent_dim: int, image_size: int, channels: int) -> None:
        super().__init__()
        self.small = image_size // 4
        self.fc = nn.Linear(latent_dim, 64 * self.small * self.small)
        self.conv_t1 = ConvTranspose(64, 32)
        self.conv_t2 = ConvTranspose(32, channels, relu=False)

    def forward(self, z_BZ: Tensor) -> Tensor:
        shape = (64, self.small, self.small)
        h = linear_to_images(z_BZ, self.fc.weight, self.fc.bias, shape)  # (B, 64, H/4, W/4)
        h = self.conv_t1(h)  # (B, 32, H/2, W/2), ReLU included
        return self.conv_t2(h)  # (B, C, H, W)


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2014).

    ``pseudo_inputs`` is how many the VampPrior has; 0: the prior on z is standard normal.
    """

    def __init__(
        self,
        latent_dim: int = 32,
        image_size: int = 28,
        channels: int = 1,
        likelihood: Likelihood = "bernoulli",
        pseudo_inputs: int = 0,
    ) -> None:
        super().__init__()
        if latent_dim < 1 or channels < 1 or image_size < 4 or image_size % 4 or pseudo_inputs < 0:
            raise ConfigError(
                f"A VAE with latent_dim {latent_dim}, image_size {image_size}, channels {channels} "
                f"and {pseudo_inputs} pseudo-inputs cannot be built: none may be negative, and the "
                "image size must be a multiple of 4."
            )
        if likelihood not in LIKELIHOODS:
            raise ConfigError(f"A VAE's likelihood is one of {', '.join(LIKELIHOODS)}.")
        self.latent_dim, self.image_size, self.channels = latent_dim, image_size, channels
        self.likelihood = likelihood
        self.encoder = Encoder(latent_dim, image_size, channels)
        self.decoder = Decoder(latent_dim, image_size, channels)
        self.vamp = VampPrior(pseudo_inputs, image_size, channels) if pseudo_inputs else None
        if likelihood == "discretized-logistic":  # one scale for all pixels, learned
            self.log_scale: Tensor | None = nn.Parameter(torch.full((), FIRST_LOG_SCALE))
        else:
            self.log_scale = None

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] -> ``(mu_BZ, logvar_BZ)`` of q(z|x)."""
        return self.encoder(x_BCHW)

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Latents -> logits, shape (B, C, H, W)."""
        return self.decoder(z_BZ)

    def decode_images(self, z_BZ: Tensor) -> Tensor:
        """Latents -> the mean of each pixel: images in [0, 1], shape (B, C, H, W)."""
        return pixel_means(self.decode(z_BZ), self.likelihood)

    def forward(self, x_BCHW: Tensor, noise_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw z with the given standard normal noise, decode.

        Returns ``(logits_BCHW, mu_BZ, logvar_BZ)``.
        """
        mu_BZ, logvar_BZ = self.encode(x_BCHW)
        return self.decode(reparameterize(mu_BZ, logvar_BZ, noise_BZ)), mu_BZ, logvar_BZ

    def log_prior(self, z_BZ: Tensor) -> Tensor:
        """log p(z) in nats, shape (B,)."""
        if self.vamp is None:
            return log_normal(z_BZ, torch.zeros_like(z_BZ), torch.zeros_like(z_BZ))
        mu_KZ, logvar_KZ = self.encode(self.vamp.images_KCHW)
        log_BK = log_normal(z_BZ[:, None], mu_KZ, logvar_KZ)
        return log_BK.logsumexp(dim=1) - math.log(len(mu_KZ))

    @torch.no_grad()
    def draw_prior(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of p(z), shape (N, Z), on the generator's device."""
        device = generator.device if generator is not None else torch.device("cpu")
        noise_NZ = torch.randn(num, self.latent_dim, generator=generator, device=device)
        if self.vamp is None:
            return noise_NZ
        mu_KZ, logvar_KZ = (x.to(device) for x in self.encode(self.vamp.images_KCHW))
        chosen_N = torch.randint(len(mu_KZ), (num,), generator=generator, device=device)
        return reparameterize(mu_KZ[chosen_N], logvar_KZ[chosen_N], noise_NZ)

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Decode ``num_samples`` draws of the prior: images in [0, 1], shape (N, C, H, W).

        The same generator state gives the same images, whatever the device of the model.
        """
        z_NZ = self.draw_prior(num_samples, generator)
        return self.decode_images(z_NZ.to(self.decoder.fc.weight.device))

    @torch.no_grad()
    def reconstruct(self, x_BCHW: Tensor) -> Tensor:
        """Decode the posterior means of the images: images in [0, 1], shape (B, C, H, W)."""
        mu_BZ, _ = self.encode(x_BCHW)
        return self.decode_images(mu_BZ)


def reparameterize(mu_BZ: Tensor, logvar_BZ: Tensor, noise_BZ: Tensor) -> Tensor:
    """z = mu + sigma * noise, differentiable in both. Kingma & Welling 2014, section 2.4."""
    return mu_BZ + torch.exp(0.5 * logvar_BZ) * noise_BZ


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp(logvar)) in nats, summed over the last dimension."""
    squares = (z - mu).square() * torch.exp(-logvar)
    return -0.5 * (squares + logvar + math.log(2 * math.pi)).sum(dim=-1)


def initialized_vae(
    latent_dim: int,
    image_size: int,
    channels: int,
    seed: int,
    likelihood: Likelihood = "bernoulli",
    pseudo_inputs: int = 0,
) -> VAE:
    """A VAE whose initial weights are a function of the seed alone.

    Weights and biases are uniform in +-1/sqrt(fan_in), as PyTorch's own layers draw them, but from
    our generator; the meta device keeps the constructors from drawing from the global one.
    """
    with torch.device("meta"):
        model = VAE(latent_dim, image_size, channels, likelihood, pseudo_inputs)
    return draw_weights(model, generator(seed, "init"))


def draw_weights(model: Module, stream: torch.Generator) -> Module:
    """Give a model that was built on the meta device its first weights, on the CPU."""
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # (out, in, 3, 3), for a transposed convolution (in, out, 3, 3): PyTorch counts dim 1
            fan_in = layer.weight[0].numel()
            assert layer.bias is not None
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=stream)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()  # ones and zeros
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, generator=stream)
        elif isinstance(layer, VampPrior):
            nn.init.normal_(layer.logits_KCHW, generator=stream)
        elif isinstance(layer, VAE) and layer.log_scale is not None:
            nn.init.constant_(layer.log_scale, FIRST_LOG_SCALE)
    return model
