"""A second, stronger network: residual blocks, and upsampling without checkerboards.

    x -> (Conv, stride 2 -> block) per width -> norm, SiLU -> flatten -> FC -> mu, log sigma^2
    z -> FC -> reshape -> (block -> nearest upsampling -> Conv) per width -> norm, SiLU -> Conv

All convolutions are 3x3. A transposed convolution with stride 2 adds overlapping patches up, which
leaves a checkerboard in the images; upsampling and then convolving does not (Odena et al. 2016).
The normalisation is of each image by itself (group normalisation, Wu & He 2018): what a model says
of an image must not depend on the other images of its batch.

Shape suffixes: B images, C channels, H height, W width, Z latent dimensions.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vae_hyperband.model.fast_layers import Conv2d

CHANNELS_PER_GROUP = 8  # of the normalisation, where the width allows


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, max(1, width // CHANNELS_PER_GROUP)), width)


class Block(nn.Module):
    """x + scale * f(x), where f is norm, SiLU, convolution, twice (He et al. 2016b, figure 4e)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = _norm(width), Conv2d(width, width, 3, padding=1)
        self.scale = scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # the norm comes first, so the path from x to the result is free of any layer
        h: Tensor = self.conv1(silu(self.norm1(x_BCHW)))
        h = self.conv2(silu(self.norm2(h)))
        return x_BCHW + self.scale * h


class ResidualEncoder(nn.Module):
    """q(z|x): the mean and log variance of a diagonal Gaussian per image."""

    def __init__(
        self, latent_dim: int, image_shape: tuple[int, int, int], widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        # N branches that are added up, each 1/sqrt(N) as large: the sum does not grow with N
        scale = len(widths) ** -0.5
        stages: list[nn.Module] = []
        for before, after in pairwise((channels, *widths)):
            stages += [Conv2d(before, after, 3, stride=2, padding=1), Block(after, scale)]
        self.stages = nn.Sequential(*stages)
        # the sum of the branches is not normalised yet: the linear layers want it to be
        self.norm = _norm(widths[-1])
        num_features = widths[-1] * (height >> len(widths)) * (width >> len(widths))
        self.fc_mu = nn.Linear(num_features, latent_dim)
        self.fc_logvar = nn.Linear(num_features, latent_dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        h = silu(self.norm(self.stages(x_BCHW))).flatten(1)
        return self.fc_mu(h), self.fc_logvar(h)


class ResidualDecoder(nn.Module):
    """p(x|z): one logit per pixel."""

    def __init__(
        self, latent_dim: int, image_shape: tuple[int, int, int], widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        scale = len(widths) ** -0.5
        self.small = (widths[-1], height >> len(widths), width >> len(widths))
        self.fc = nn.Linear(latent_dim, math.prod(self.small))
        # at the full size half of the first width: that convolution costs the most
        full = max(1, widths[0] // 2)
        stages: list[nn.Module] = []
        for before, after in pairwise((*reversed(widths), full)):
            stages += [
                # before the upsampling, where a block costs a quarter
                Block(before, scale),
                nn.Upsample(scale_factor=2, mode="nearest"),
                Conv2d(before, after, 3, padding=1),
            ]
        self.stages = nn.Sequential(*stages)
        self.norm = _norm(full)
        self.conv = Conv2d(full, channels, 3, padding=1)

    def forward(self, z_BZ: Tensor) -> Tensor:
        h = self.fc(z_BZ).unflatten(1, self.small)
        # channels last, which a CPU's convolutions are faster with; every layer keeps that layout
        h = self.stages(h.contiguous(memory_format=torch.channels_last))
        logits_BCHW: Tensor = self.conv(silu(self.norm(h)))
        return logits_BCHW
