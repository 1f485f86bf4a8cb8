"""Synthetic garments with known factors, against which a latent space can be measured.

Small pictures like those of Fashion-MNIST: a top, a dress or a coat of some width, length, sleeve,
shade and position, each factor independent of the others. They need no download, and are always the
same.

Shape suffixes: N images, F factors, H height, W width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_hyperband.common.randomness import generator

SIZE = 28
SLOPE = 0.5**0.5
KINDS = ("top", "dress", "coat")
#: Images of the splits train, validation, test.
NUM_SYNTHETIC = {"train": 10_000, "validation": 2_000, "test": 2_000}

#: Each split's share of the 23,328 combinations of factors, in this order.
NUM_COMBINATIONS = [16_328, 3_500, 3_500]


class Factor(NamedTuple):
    """A factor with evenly spaced levels between two values, in pixels or in grey from 0 to 1."""

    name: str
    lowest: float
    highest: float
    levels: int


FACTORS = (
    Factor("kind", 0, 2, len(KINDS)),
    Factor("width", 3.0, 6.0, 6),
    Factor("length", 9.0, 17.0, 6),
    Factor("sleeve", 0.0, 7.5, 6),
    Factor("shade", 0.35, 1.0, 6),
    Factor("position", -2.0, 2.0, 6),
)


def sample_factors(split: str, num: int) -> Tensor:
    """Levels of the factors of a split's images, int64, shape (N, F).

    Every combination of levels belongs to one split only, in a shuffled order, so that no held-out
    image is a training image. The first images do not depend on ``num``; beyond the combinations of
    a split, they repeat.
    """
    sizes = [factor.levels for factor in FACTORS]
    # the name "drawn" decides the order, and so which images a split has
    order = torch.randperm(math.prod(sizes), generator=generator(0, "drawn"))
    shares = dict(zip(NUM_SYNTHETIC, order.split(NUM_COMBINATIONS), strict=True))
    combination_N = shares[split][torch.arange(num) % len(shares[split])]
    return torch.stack(torch.unravel_index(combination_N, sizes), dim=1)


def render_garments(levels_NF: Tensor) -> Tensor:
    """The images of factor levels (N, F), uint8, shape (N, 1, H, W)."""
    return torch.cat([_render(part) for part in levels_NF.split(500)])


def _render(levels_NF: Tensor) -> Tensor:
    values = [
        (f.lowest + (f.highest - f.lowest) * level_N.float() / (f.levels - 1))[:, None, None]
        for f, level_N in zip(FACTORS, levels_NF.unbind(dim=1), strict=True)
    ]
    kind, width, length, sleeve, shade, position = values
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    x = (x - SIZE / 2 - position).abs()  # garments are symmetric
    y = y - 5  # from the shoulders down

    flare = torch.where(kind == 1, 0.2, 0.0)
    torso = torch.maximum(x - width - flare * y.clamp(min=0), (y - length / 2).abs() - length / 2)
    # a sleeve hangs from the shoulder at 45 degrees: the distance to a segment, minus its radius
    across, down = x - width + 1, y - 1.8
    along = ((across + down) * SLOPE).clamp(min=0).minimum(sleeve)
    away = torch.hypot(across - SLOPE * along, down - SLOPE * along)
    neck = torch.hypot(x, y) - 1.8
    body = torch.minimum(torso, away - 1.8).maximum(-neck)
    coverage = (0.5 - body).clamp(0, 1)  # of a pixel, by its distance from the edge
    gap = torch.where(kind == 2, (1.2 - x).clamp(0, 1), 0.0)  # a coat is open in front
    return (255 * shade * coverage * (1 - 0.8 * gap)).round().to(torch.uint8)[:, None]
