"""Quality of generated images: FID, KID, precision, recall and more, in any space of features.

Which features, :mod:`~vae_hyperband.evaluation.features` says: distances in different ones cannot
be compared.

Shape suffixes: B images of a batch, N images of a split, M generated images, P training images, C
channels, H height, W width, F features, G blocks of images.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split
from vae_hyperband.evaluation.features import Features, split_features
from vae_hyperband.evaluation.results import Estimate, ImageQuality, mean_and_error

# ---- Distances between sets of vectors

NUM_BOOTSTRAPS = 50
NEAREST = 5  # neighbours that span a set's manifold, as in Naeem et al. 2020
DISTANCE_ROWS = 100  # rows of a distance matrix at a time: they stay in the cache
SPARE = 4  # candidates beyond those wanted: rounding to float32 may change their order
GROUP = 64  # columns whose least value is looked at first


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
KERNEL_ROWS = 50  # of a matrix of kernels at a time: they stay in the cache


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
    real, fake = (_blocks(x, num_blocks) for x in (reference_NF, generated_MF))
    sizes = [torch.tensor([len(block) for block in blocks]) for blocks in (real, fake)]
    sums = (
        _sums_within(reference_NF, num_blocks),
        _kernel_sums(fake, fake),
        _kernel_sums(real, fake),
    )

    def without(block: int | None) -> float:
        keep_G = torch.arange(num_blocks) != (-1 if block is None else block)
        n, m = (int(size_G[keep_G].sum()) for size_G in sizes)
        same_N, same_M, between = (float(sums_GG[keep_G][:, keep_G].sum()) for sums_GG in sums)
        return same_N / (n * (n - 1)) + same_M / (m * (m - 1)) - 2 * between / (n * m)

    again_G = torch.tensor([without(block) for block in range(num_blocks)], dtype=torch.float64)
    spread = (again_G - again_G.mean()).square().sum() * (num_blocks - 1) / num_blocks
    return Estimate(without(None), spread.sqrt().item())


def _blocks(x_NF: Tensor, num: int) -> list[Tensor]:
    """Every 20th image: files are often sorted, and the blocks should be alike."""
    return [x_NF[start::num].double() for start in range(num)]


@functools.lru_cache(maxsize=2)
def _sums_within(reference_NF: Tensor, num_blocks: int) -> Tensor:
    """Those of the real images, which all kinds of images are compared with."""
    blocks = _blocks(reference_NF, num_blocks)
    return _kernel_sums(blocks, blocks)


def _kernel_sums(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Sums of kernels between blocks of vectors, shape (G, G); no vector is paired with itself."""
    num_features = one[0].shape[1]
    every_MF = torch.cat(other) / num_features
    ends_G = torch.tensor([len(block) for block in other]).cumsum(0)
    sums_GG = torch.zeros(len(one), len(other), dtype=torch.float64)
    for number, block_BF in enumerate(one):
        for rows_BF in block_BF.split(KERNEL_ROWS):
            kernel_BM = (rows_BF @ every_MF.T).add_(1)
            column_M = kernel_BM.square().mul_(kernel_BM).sum(dim=0)
            parts = column_M.tensor_split(ends_G[:-1])
            sums_GG[number] += torch.stack([part.sum() for part in parts])
        if one is other:
            sums_GG[number, number] -= (
                (block_BF.square().sum(dim=1) / num_features + 1) ** 3
            ).sum()
    return sums_GG


def _grid_step(one_NF: Tensor, other_MF: Tensor) -> float:
    """The step of a grid for both sets, so coarse that squared distances on it are exact.

    |x|^2 + |y|^2 - 2xy needs only a matrix product, which is several times faster than differences.
    But it cancels: if sums are rounded, equal vectors are not 0 apart. On the grid each value is a
    whole number of steps, at most 2^b, so squared distances are at most F 2^(2b + 2) squared steps.
    Up to 2^53 float64 has every whole number, so no sum is rounded, in whatever order. For 128
    features b is 22; the 24 bits of a float32 are hardly more.
    """
    bits = (51 - math.ceil(math.log2(one_NF.shape[1]))) // 2
    largest = max(one_NF.abs().max().item(), other_MF.abs().max().item())
    mantissa, exponent = math.frexp(largest)
    # of 2^e itself the exponent is e + 1, but rounding may give 2^e, which has to stay on the grid
    return 2.0 ** (exponent - (mantissa == 0.5) - bits)


def _on_grid(x_NF: Tensor, step: float) -> Tensor:
    return x_NF.to(torch.float64, copy=True).div_(step).round_().mul_(step)


def _squared_distances(from_NF: Tensor, to_MF: Tensor) -> Iterator[Tensor]:
    """Squared Euclidean distances of vectors on a grid, some rows of the matrix at a time."""
    squares_N, squares_M = (x.square().sum(dim=1, keepdim=True) for x in (from_NF, to_MF))
    # (x, |x|^2, 1) . (-2y, 1, |y|^2): the whole sum in one product
    left_NG = torch.cat((from_NF, squares_N, torch.ones_like(squares_N)), dim=1)
    right_MG = torch.cat((-2 * to_MF, torch.ones_like(squares_M), squares_M), dim=1)
    for left_BG in left_NG.split(DISTANCE_ROWS):
        yield left_BG @ right_MG.T


def _squared_radii(grid_NF: Tensor) -> Tensor:
    """Squared distance of each vector to its 5th nearest other one, shape (N,)."""
    # the nearest of a set's own vectors is itself, or one equal to it
    k = min(NEAREST + 1, len(grid_NF))
    rows = _squared_distances(grid_NF, grid_NF)
    return torch.cat([squares_BN.topk(k, largest=False).values[:, -1] for squares_BN in rows])


@functools.lru_cache(maxsize=2)
def _radii_of_real(reference_NF: Tensor, step: float) -> Tensor:
    """Those of the real images, which all kinds of images are compared with."""
    return _squared_radii(_on_grid(reference_NF, step))


def nearest(from_NF: Tensor, to_MF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each vector's k nearest of the others, nearest first: distances and indices, (N, k) each.

    A product in float32 finds some more than k candidates; their distances are of the differences,
    in float64, so that equal vectors are exactly 0 apart.
    """
    k = min(k, len(to_MF))
    centre_F = to_MF.mean(dim=0)  # large values cancel worse
    left_NF, right_MF = ((x - centre_F).float() for x in (from_NF, to_MF))
    # |y|^2 - 2xy by one product; the |x|^2 of a row changes no order
    left_NG = F.pad(left_NF, (0, 1), value=1)
    right_MG = torch.cat((-2 * right_MF, right_MF.square().sum(dim=1, keepdim=True)), dim=1)
    found = []
    for x_BF, left_BG in zip(
        from_NF.split(DISTANCE_ROWS), left_NG.split(DISTANCE_ROWS), strict=True
    ):
        candidates_BK = _least(left_BG @ right_MG.T, k + SPARE)
        apart_BKF = to_MF[candidates_BK].double() - x_BF[:, None].double()
        squares_BK = apart_BKF.square().sum(dim=2)
        values_Bk, order_Bk = squares_BK.topk(k, largest=False)
        found.append((values_Bk.sqrt(), candidates_BK.gather(1, order_Bk)))
    distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
    return distances, indices


def _least(values_BM: Tensor, num: int) -> Tensor:
    """Where each row's least values are, shape (B, num), or all of them if it has not so many.

    By the groups of columns with the least minima, which takes a third of the time of topk.
    """
    num_columns = values_BM.shape[1]
    if num * GROUP >= num_columns:
        return values_BM.topk(min(num, num_columns), largest=False).indices
    padded = F.pad(values_BM, (0, -num_columns % GROUP), value=math.inf)
    grouped_BQG = padded.view(len(padded), -1, GROUP)
    groups_Bn = grouped_BQG.amin(dim=2).topk(num, largest=False).indices
    chosen = grouped_BQG.gather(1, groups_Bn[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    place_Bn = chosen.topk(num, largest=False).indices
    return groups_Bn.gather(1, place_Bn // GROUP) * GROUP + place_Bn % GROUP


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
    step = _grid_step(reference_NF, generated_MF)
    radius_N = _radii_of_real(reference_NF, step)
    if not radius_N.any():
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    reference_NF, generated_MF = (_on_grid(x, step) for x in (reference_NF, generated_MF))
    radius_M = _squared_radii(generated_MF)
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
