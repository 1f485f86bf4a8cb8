"""Quality of generated images: FID, KID, precision, recall and more, in any space of features.

Which features, :mod:`~vae_hyperband.evaluation.features` says: distances in different ones cannot
be compared.

Shape suffixes: B images of a batch, N images of a split, M generated images, P training images, C
channels, H height, W width, F features, G blocks of images.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split
from vae_hyperband.evaluation.features import Features, split_features
from vae_hyperband.evaluation.results import Estimate, ImageQuality, mean_and_error

# ---- Distances between sets of vectors

NUM_BOOTSTRAPS = 50
NEAREST = 5  # neighbours that span a set's manifold, as in Naeem et al. 2020
DISTANCE_ROWS = 100  # rows of a distance matrix at a time: they stay in the cache


class Moments(NamedTuple):
    """Mean and covariance of a set of vectors, float64."""

    mean_F: Tensor
    covariance_FF: Tensor


def moments(features_NF: Tensor) -> Moments:
    features_NF = features_NF.double()
    return Moments(features_NF.mean(dim=0), features_NF.T.cov())


def frechet(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    FID, where the vectors are features of images (Heusel et al. 2017, equation 6). The trace of the
    root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no
    root of a general matrix, with its imaginary rounding errors, is needed.
    """
    values_F, vectors_FF = torch.linalg.eigh(one.covariance_FF)
    root_FF = (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
    roots_F = torch.linalg.eigvalsh(root_FF @ other.covariance_FF @ root_FF).clamp(min=0).sqrt()
    traces = one.covariance_FF.trace() + other.covariance_FF.trace() - 2 * roots_F.sum()
    return ((one.mean_F - other.mean_F).square().sum() + traces).clamp(min=0).item()


def frechet_distance(reference_NF: Tensor, generated_MF: Tensor, seed: int = 0) -> Estimate:
    """FID of the two sets, with a bootstrap standard error.

    Both sets are resampled with replacement 50 times; the error is the standard deviation of the
    distances. Their mean is biased: fewer distinct images make the distance larger. For the same
    reason FIDs of different numbers of images cannot be compared.
    """
    mean = frechet(moments(reference_NF), moments(generated_MF))
    again = []
    for number in range(NUM_BOOTSTRAPS):
        stream = generator(seed, "bootstrap", number)
        sets = (
            moments(x[torch.randint(len(x), (len(x),), generator=stream)])
            for x in (reference_NF, generated_MF)
        )
        again.append(frechet(*sets))
    return Estimate(mean, torch.tensor(again).std().item())


NUM_BLOCKS = 20  # of images, for the jackknife
KERNEL_ROWS = 1000  # of a matrix of kernels at a time


def kernel_distance(reference_NF: Tensor, generated_MF: Tensor) -> Estimate | None:
    """KID of the two sets (Binkowski et al. 2018): the squared maximum mean discrepancy with the
    kernel (x.y / F + 1)^3, estimated without bias, which FID is not.

    So its mean does not depend on the number of images, and around 0 it may be negative. All pairs
    of images count, not those of the paper's random subsets. The error is a jackknife's: both sets
    are cut into 20 blocks, and each block is left out once. Where the sets have one distribution it
    is too large, by up to the root of 2 (Efron & Stein 1981). None for sets of fewer than 4 images.
    """
    num_blocks = min(NUM_BLOCKS, len(reference_NF) // 2, len(generated_MF) // 2)
    if num_blocks < 2:
        return None
    sets = [  # every 20th image: files are often sorted, and the blocks should be alike
        [x[start::num_blocks].double() for start in range(num_blocks)]
        for x in (reference_NF, generated_MF)
    ]
    sizes = [torch.tensor([len(block) for block in blocks]) for blocks in sets]
    real, fake = sets
    sums = [_kernel_sums(one, other) for one, other in ((real, real), (fake, fake), (real, fake))]

    def without(block: int | None) -> float:
        keep_G = torch.arange(num_blocks) != (-1 if block is None else block)
        n, m = (int(size_G[keep_G].sum()) for size_G in sizes)
        same_N, same_M, between = (float(sums_GG[keep_G][:, keep_G].sum()) for sums_GG in sums)
        return same_N / (n * (n - 1)) + same_M / (m * (m - 1)) - 2 * between / (n * m)

    again_G = torch.tensor([without(block) for block in range(num_blocks)], dtype=torch.float64)
    spread = (again_G - again_G.mean()).square().sum() * (num_blocks - 1) / num_blocks
    return Estimate(without(None), spread.sqrt().item())


def _kernel_sums(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Sums of kernels between blocks of vectors, shape (G, G); no vector is paired with itself."""
    every_MF, num_features = torch.cat(other), one[0].shape[1]
    ends_G = torch.tensor([len(block) for block in other]).cumsum(0)
    sums_GG = torch.zeros(len(one), len(other), dtype=torch.float64)
    for number, block_BF in enumerate(one):
        for rows_BF in block_BF.split(KERNEL_ROWS):
            column_M = ((rows_BF @ every_MF.T / num_features + 1) ** 3).sum(dim=0)
            parts = column_M.tensor_split(ends_G[:-1])
            sums_GG[number] += torch.stack([part.sum() for part in parts])
        if one is other:
            sums_GG[number, number] -= (
                (block_BF.square().sum(dim=1) / num_features + 1) ** 3
            ).sum()
    return sums_GG


def _on_one_grid(one_NF: Tensor, other_MF: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64, rounded to one grid so coarse that squared distances are exact.

    |x|^2 + |y|^2 - 2xy needs only a matrix product, which is several times faster than differences.
    But it cancels: if sums are rounded, equal vectors are not 0 apart. Here each value is a whole
    number of steps, at most 2^b, so squared distances are at most F 2^(2b + 2) squared steps. Up
    to 2^53 float64 has every whole number, so no sum is rounded, in whatever order. For 128
    features b is 22; the 24 bits of a float32 are hardly more.
    """
    bits = (51 - math.ceil(math.log2(one_NF.shape[1]))) // 2
    largest = max(one_NF.abs().max().item(), other_MF.abs().max().item())
    mantissa, exponent = math.frexp(largest)
    # of 2^e itself the exponent is e + 1, but rounding may give 2^e, which has to stay on the grid
    step = 2.0 ** (exponent - (mantissa == 0.5) - bits)
    one, other = (
        x.to(torch.float64, copy=True).div_(step).round_().mul_(step) for x in (one_NF, other_MF)
    )
    return one, other


def _squared_distances(from_NF: Tensor, to_MF: Tensor) -> Iterator[Tensor]:
    """Squared Euclidean distances, some rows of the (N, M) matrix at a time."""
    from_NF, to_MF = _on_one_grid(from_NF, to_MF)  # changes nothing if they are on a grid already
    squares_N, squares_M = (x.square().sum(dim=1, keepdim=True) for x in (from_NF, to_MF))
    # (x, |x|^2, 1) . (-2y, 1, |y|^2): the whole sum in one product
    left_NG = torch.cat((from_NF, squares_N, torch.ones_like(squares_N)), dim=1)
    right_MG = torch.cat((to_MF.mul_(-2), torch.ones_like(squares_M), squares_M), dim=1)
    for left_BG in left_NG.split(DISTANCE_ROWS):
        yield left_BG @ right_MG.T


def _nearest_squares(from_NF: Tensor, to_MF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, len(to_MF))
    found = [rows.topk(k, largest=False) for rows in _squared_distances(from_NF, to_MF)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def nearest(from_NF: Tensor, to_MF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each vector's k nearest of the others, nearest first: distances and indices, (N, k) each."""
    squares_NK, index_NK = _nearest_squares(from_NF, to_MF, k)
    return squares_NK.sqrt(), index_NK


def manifold_measures(reference_NF: Tensor, generated_MF: Tensor) -> dict[str, Estimate | None]:
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its vectors, each up to its 5th nearest neighbour
    in the set. precision: share of generated vectors in the reference's manifold. recall: share of
    reference vectors in the generated manifold. density: how many reference balls a generated
    vector lies in, over 5. coverage: share of reference balls with a generated vector in them.
    Each error is over the images averaged, with the other set fixed. All are None where each
    reference vector equals its 5 nearest ones: such a set spans no manifold.
    """
    # one grid for all three matrices: a vector in both sets has the same distances in each; the
    # radii are squared, too
    reference_NF, generated_MF = _on_one_grid(reference_NF, generated_MF)
    # the nearest of a set's own vectors is itself, or one equal to it
    radius_N = _nearest_squares(reference_NF, reference_NF, NEAREST + 1)[0][:, -1]
    if not radius_N.any():
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    radius_M = _nearest_squares(generated_MF, generated_MF, NEAREST + 1)[0][:, -1]
    balls_M = []
    recalled_N, covered_N = torch.zeros(2, len(reference_NF), dtype=torch.bool)
    for squares_BN, radius_B in zip(
        _squared_distances(generated_MF, reference_NF), radius_M.split(DISTANCE_ROWS), strict=True
    ):
        inside_BN = squares_BN < radius_N
        balls_M.append(inside_BN.sum(dim=1))
        covered_N |= inside_BN.any(dim=0)
        recalled_N |= (squares_BN < radius_B[:, None]).any(dim=0)
    balls = torch.cat(balls_M)
    return {
        "precision": mean_and_error(balls > 0),
        "recall": mean_and_error(recalled_N),
        "density": mean_and_error(balls.double() / NEAREST),
        "coverage": mean_and_error(covered_N),
    }


def copying(generated_M: Tensor, held_out_N: Tensor) -> dict[str, Estimate]:
    """Whether generated images lie closer to training images than unseen real images do.

    Takes the distance of each image to its nearest training image. ``closer_than_held_out`` is the
    probability that a generated image's distance is smaller than a held-out image's: 0.5 if the
    model generalises, towards 1 if it copies (or makes only typical garments), after Meehan et al.
    2020. Its error is that of the Mann-Whitney statistic (Hanley & McNeil 1982 with placement
    values, DeLong et al. 1988).
    """
    return {
        "nearest_training_image": mean_and_error(generated_M),
        "nearest_training_image_of_held_out": mean_and_error(held_out_N),
        "closer_than_held_out": _probability_less(generated_M, held_out_N),
    }


def _probability_less(one_M: Tensor, other_N: Tensor) -> Estimate:
    """P(one < other), ties counting one half, from placement values."""
    one_M, other_N = one_M.sort().values, other_N.sort().values

    def share_above(x: Tensor, y: Tensor) -> Tensor:  # of y above each of x
        left, right = torch.searchsorted(y, x), torch.searchsorted(y, x, right=True)
        return 1 - (left + right).double() / (2 * len(y))

    above_M, below_N = share_above(one_M, other_N), 1 - share_above(other_N, one_M)
    variance = above_M.var() / len(one_M) + below_N.var() / len(other_N)
    return Estimate(above_M.mean().item(), variance.sqrt().item())


# ---- A kind of images against a split


class ImageMetrics:
    """Measures sets of images, as bytes, against the real ones of a split."""

    def __init__(
        self,
        features: Features,
        inception: Features | None,
        train: Split,
        held_out: Split,
        seed: int,
    ) -> None:
        self.features, self.inception, self.held_out, self.seed = (
            features, inception, held_out, seed,
        )  # fmt: skip
        self.real_NF, self.train_PF = (split_features(x, features) for x in (held_out, train))
        self.nearest_N = self._nearest_training_image(self.real_NF)

    def of_training_images(self, images_MCHW: Tensor, index_M: Tensor) -> ImageQuality:
        """The quality of some of the training images, as the best that a model could do."""
        return self._quality(images_MCHW, self.train_PF[index_M], {})

    def of_generated(self, images_MCHW: Tensor) -> ImageQuality:
        """The quality of generated images; with it, whether they are copies."""
        features_MF = self.features(images_MCHW)
        copies = copying(self._nearest_training_image(features_MF), self.nearest_N)
        return self._quality(images_MCHW, features_MF, copies)

    def _quality(
        self, images_MCHW: Tensor, features_MF: Tensor, copies: dict[str, Estimate]
    ) -> ImageQuality:
        inception_fid = None
        if self.inception:
            sets = split_features(self.held_out, self.inception), self.inception(images_MCHW)
            inception_fid = frechet_distance(*sets, self.seed)
        return ImageQuality(
            num_images=len(images_MCHW),
            fid=frechet_distance(self.real_NF, features_MF, self.seed),
            kid=kernel_distance(self.real_NF, features_MF),
            **manifold_measures(self.real_NF, features_MF),
            inception_fid=inception_fid,
            **copies,
        )

    def _nearest_training_image(self, features_MF: Tensor) -> Tensor:
        """Distance to it, shape (M,)."""
        return nearest(features_MF, self.train_PF, 1)[0][:, 0]
