"""Quality of generated images: FID, precision, recall and more, in features of a small classifier.

Inception, which papers on natural images use, was trained on 299x299 photographs; a 28x28 garment
blown up to that size lies far from anything it has seen. So the features here are those of a small
classifier of Fashion-MNIST itself, trained on the training split alone and shipped with its digest.
These FIDs can be compared with each other, never with FIDs in Inception's features. With a file of
Inception's weights those can be measured as well (:func:`inception_features`).

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, F features.
"""

import functools
import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, per_split
from vae_hyperband.evaluation.results import Estimate, mean_and_error

WEIGHTS = Path(__file__).with_name("feature_net.safetensors")

#: SHA-256 of :data:`WEIGHTS`; benchmarks/RECORDS.md says how they were made.
WEIGHTS_SHA256 = "a63a061b13e6b955be60f2566cd7dd3da4f13a0f2d65b71736f76568245d8bef"

NUM_FEATURES = 128
BATCH_SIZE = 100  # on a CPU twice as fast as 1000: activations stay in the cache

# about the mean and standard deviation of the training split's pixels, 0.2855 and 0.3528
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3527


class FeatureNet(nn.Module):
    """Five 3x3 convolutions, each with batch normalisation and ReLU; mean over places; ten logits.

    Takes any image size from 4x4 on: the features are means over places.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 128, NUM_FEATURES)
        strides = (1, 2, 2, 1, 1)  # 28x28, 14x14, 7x7, 7x7, 7x7
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(widths[i + 1]),
                    nn.ReLU(),
                )
                for i, stride in enumerate(strides)
            )
        )
        self.classify = nn.Linear(NUM_FEATURES, 10)
        #: Makes the variance of the training images' features 1 on average over features.
        self.register_buffer("scale", torch.ones(()))

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> what the last layer classifies by, scaled, shape (B, F)."""
        return self._pooled(x_BCHW) * self.scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classify(self._pooled(x_BCHW))

    def _pooled(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks((x_BCHW - PIXEL_MEAN) / PIXEL_STD).mean(dim=(2, 3))


@functools.cache
def load_feature_net(device: torch.device | str = "cpu") -> FeatureNet:
    """The shipped network, in eval mode. Raises :class:`CheckpointError` if its file differs."""
    from safetensors.torch import load_file  # training does not need it

    found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if WEIGHTS.is_file() else "no file"
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{WEIGHTS} has SHA-256 {found}, expected {WEIGHTS_SHA256}: install the package again."
        )
    net = FeatureNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def image_features(x_NCHW: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Features of images, as bytes or as floats in [0, 1]: float32 on the CPU, shape (N, F)."""
    if x_NCHW.shape[1] != 1:
        raise ConfigError(
            f"The feature network takes grey images, these have {x_NCHW.shape[1]} channels."
        )
    net = load_feature_net(device)
    parts = []
    for x_BCHW in x_NCHW.split(BATCH_SIZE):
        x_BCHW = x_BCHW.to(device)
        parts.append(net.features(x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW).cpu())
    return torch.cat(parts)


@per_split
def split_features(split: Split, device: torch.device | str = "cpu") -> Tensor:
    """Features of a whole split, kept for the next evaluation."""
    return image_features(split.images_NCHW, device)


@torch.no_grad()
def inception_features(
    images_NCHW: Tensor, weights: Path, device: torch.device | str = "cpu"
) -> Tensor:
    """Inception's 2048 features of images as bytes: float32 on the CPU, shape (N, F).

    ``weights`` is the TorchScript translation of the network of Heusel et al. 2017 that
    StyleGAN2-ADA published as inception-2015-12-05.pt and clean-fid uses: called with bytes
    (B, 3, H, W) and ``return_features=True``, it resizes to 299x299 itself. Any other
    network with this interface works. Raises :class:`CheckpointError` for any other file.
    """
    with warnings.catch_warnings():
        # torch.jit is deprecated, but the file that everyone compares with is in its format
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            net = torch.jit.load(weights, map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{weights} is not a TorchScript file: {why}") from error
    parts = []
    for x_BCHW in images_NCHW.split(BATCH_SIZE):
        rgb_BCHW = x_BCHW.expand(-1, 3, -1, -1).contiguous().to(device)
        try:
            features_BF = net(rgb_BCHW, return_features=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} cannot be called with bytes (B, 3, H, W) and return_features=True, as "
                "inception-2015-12-05.pt can."
            ) from error
        parts.append(features_BF.float().cpu())
    return torch.cat(parts)


# ---- Distances between sets of images, in any space of features.

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
