"""ONNX graphs against the model that they were written from, by ONNX Runtime."""

import onnxruntime
import torch

from vae_hyperband.errors import CheckpointError
from vae_hyperband.model import VAE
from vae_hyperband.randomness import generator

#: Of posterior means, log variances and pixels. float32 and another order of sums give 1e-6.
TOLERANCE = 1e-4


@torch.no_grad()
def largest_difference(model: VAE, encoder: bytes, decoder: bytes, num: int = 16) -> float:
    """Of anything that the graphs and the model compute from some random images and latents.

    Raises :class:`CheckpointError` if that is more than :data:`TOLERANCE`.
    """
    stream = generator(0, "sample")
    size = (num, model.channels, model.image_size, model.image_size)
    x_BCHW = torch.rand(size, generator=stream)
    z_BZ = torch.randn(num, model.latent_dim, generator=stream)
    codes = _run(encoder, ["mu", "logvar"], {"x": x_BCHW})
    (images,) = _run(decoder, ["image"], {"z": z_BZ})
    pairs = zip([*codes, images], [*model.encode(x_BCHW), model.decode_images(z_BZ)], strict=True)
    apart = max((found - expected).abs().max().item() for found, expected in pairs)
    if not apart <= TOLERANCE:
        raise CheckpointError(
            f"ONNX Runtime computes other values from this model than PyTorch does: {apart:.1e} "
            f"apart, at most {TOLERANCE:.0e} was expected; nothing was written."
        )
    return apart


def _run(graph: bytes, names: list[str], feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what is not one is of no use to who exports
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(array) for array in found]
