"""The bound of a model on images, its parts, and the tighter IWAE bound.

They bound the negative log-likelihood, in nats per image: lower is better. The noise is a function
of the seed and of an image's place in its split alone: the same for every batch size, every epoch,
and every model of the same latent size.

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, Z latents,
K importance samples.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vae_hyperband.common.config import Likelihood
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.process import own_modes
from vae_hyperband.common.randomness import generator, standard_normal
from vae_hyperband.data.batches import Batches, EpochOrder, SplitBatches, get_dataloader
from vae_hyperband.data.splits import Split
from vae_hyperband.evaluation.features import Features, split_features
from vae_hyperband.evaluation.image_quality import frechet, moments
from vae_hyperband.evaluation.results import Estimate
from vae_hyperband.model.likelihoods import LEVELS
from vae_hyperband.model.objective import Nats, log_weights, nats_per_image
from vae_hyperband.model.vae import VAE

#: At most so many images in a batch, and so many values in them: 10 images of 256x256 in RGB.
EVAL_BATCH_SIZE, EVAL_BATCH_VALUES = 500, 2_000_000

Losses = dict[str, float]  # recon_loss, KL_divergence, total_loss, bound, (iwae): nats per image


def eval_dataloader(split: Split, device: torch.device | str = "cpu") -> DataLoader:
    """Batches of a split in file order, for :func:`eval_epoch`."""
    size = min(eval_batch_size(split.image_shape), len(split))
    return get_dataloader(split, size, shuffle=False, device=device)


def eval_batch_size(image_shape: tuple[int, int, int]) -> int:
    """How many images are evaluated at once: no estimate depends on it, memory does."""
    return max(1, min(EVAL_BATCH_SIZE, EVAL_BATCH_VALUES // math.prod(image_shape)))


def batch_images(model: VAE, batch: Any) -> Tensor:
    """The images of a batch (images, labels), on the model's device.

    Raises :class:`ConfigError` if they are no batch of the model's images.
    """
    images, found = None, type(batch).__name__
    if isinstance(batch, tuple | list) and len(batch) == 2:
        images, found = batch[0], type(batch[0]).__name__
    if isinstance(images, Tensor):
        found = f"images of shape {tuple(images.shape)} and type {images.dtype}"
        # one image without its batch would be computed, too: its channels as so many images
        fits = len(images) > 0 and images.dim() == 4 and images.shape[1:] == model.image_shape
        if fits and images.is_floating_point():
            return images.to(next(model.parameters()).device, torch.float32)
    raise ConfigError(
        "A loader must give batches (images, labels) with floats in [0, 1] of shape (B, "
        f"{', '.join(map(str, model.image_shape))}), but it gives {found}."
    )


def _again_and_again(model: VAE, loader: Iterable[Any]) -> Iterable[Any]:
    """Batches that can be gone through several times: the loader, or a list of what it gave.

    Raises :class:`ConfigError` for a loader that is empty, or of other images than the model's.
    """
    # a list: an iterator gives its batches once, and the length of a data set need not be the
    # number of images in them (a subset, the last batch dropped, a data set of whole batches)
    if split := _split_of(loader):
        order = cast(EpochOrder, cast(Batches, loader).sampler)
        if not order.shuffle:
            return loader
        # a shuffled loader has another order each time
        device = split.labels_N.device
        return get_dataloader(split, order.batch_size, shuffle=False, device=device)
    batches = [(batch_images(model, batch), batch[1]) for batch in loader]
    if not batches:
        raise ConfigError("The loader has no batches: an iterator gives its batches only once.")
    return batches


def _split_of(loader: Iterable[Any]) -> Split | None:
    """The split that a loader of :func:`get_dataloader` goes through."""
    images, order = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    whole = isinstance(images, SplitBatches) and isinstance(order, EpochOrder)
    return cast(SplitBatches, images).split if whole else None


@torch.no_grad()
def split_nats(model: VAE, loader: Iterable[Any], seed: int) -> Nats:
    """The bound's parts for every image of a split, float64 on the CPU, shape (N,) each.

    One posterior sample per image.
    """
    training = model.training
    model.eval()
    loader = _again_and_again(model, loader)
    num_images, device = _num_images(loader), next(model.parameters()).device
    noise_NZ = standard_normal(seed, "evaluation", 0, num_images, model.latent_dim, device)
    # filled in place: a small tensor kept of each batch would lie between the large ones that are
    # freed, the next batch would not fit there, and memory would grow by a batch each time
    nats_2N = torch.empty(2, num_images, dtype=torch.float64)
    for rows, x_BCHW in _with_rows(model, loader):
        nats_2N[:, rows] = torch.stack(nats_per_image(model, x_BCHW, noise_NZ[rows])).double().cpu()
    model.train(training)
    return Nats(*nats_2N)


@torch.no_grad()
def iwae_nats(model: VAE, loader: Iterable[Any], seed: int, num_samples: int) -> Tensor:
    """The IWAE bound of every image, -log(1/K sum_k p(x, z_k) / q(z_k|x)), float64, shape (N,).

    Burda, Grosse & Salakhutdinov 2016, equation 8, with the sign of a loss. K = 1 is the bound of
    :func:`split_nats` but for the KL, which is sampled here; more samples make it tighter.
    """
    training = model.training
    model.eval()
    loader = _again_and_again(model, loader)
    num_images, device = _num_images(loader), next(model.parameters()).device
    posteriors_2NZ = torch.empty(2, num_images, model.latent_dim, device=device)
    for rows, x_BCHW in _with_rows(model, loader):
        posteriors_2NZ[:, rows] = torch.stack(model.encode(x_BCHW))
    log_sum_N = torch.full((num_images,), -math.inf, dtype=torch.float64)
    for sample in range(num_samples):
        noise_NZ = standard_normal(seed, "iwae", sample, num_images, model.latent_dim, device)
        for rows, x_BCHW in _with_rows(model, loader):
            mu_BZ, logvar_BZ = posteriors_2NZ[:, rows]
            weights_1B, _ = log_weights(model, x_BCHW, mu_BZ, logvar_BZ, noise_NZ[None, rows])
            log_sum_N[rows] = torch.logaddexp(log_sum_N[rows], weights_1B[0].double().cpu())
    model.train(training)
    return math.log(num_samples) - log_sum_N


def _num_images(loader: Iterable[Any]) -> int:
    split = _split_of(loader)
    return len(split) if split else sum(len(x_BCHW) for x_BCHW, _ in loader)


def _with_rows(model: VAE, loader: Iterable[Any]) -> Iterator[tuple[slice, Tensor]]:
    """Each batch of images with the places of its images in the split."""
    start = 0
    for batch in loader:
        x_BCHW = batch_images(model, batch)
        yield slice(start, start + len(x_BCHW)), x_BCHW
        start += len(x_BCHW)


def prior_fid(
    model: VAE, loader: Iterable[Any], seed: int, num_samples: int, features: Features
) -> float:
    """FID, in these features, of images decoded from samples of the prior.

    Against the loader's images.
    """
    if split := _split_of(loader):
        real_NF = split_features(split, features)
    else:
        real_NF = features(torch.cat([x_BCHW for x_BCHW, _ in loader]))
    generated_NCHW = model.sample(num_samples, generator(seed, "fid"))
    return frechet(moments(real_NF), moments(features(generated_NCHW)))


@own_modes()
def eval_epoch(
    model: VAE,
    loader: Iterable[Any],
    seed: int = 0,
    beta: float = 1.0,
    iwae_samples: int = 0,
    fid_samples: int = 0,
    capacity: float = 0.0,
    features: Features | None = None,
) -> Losses:
    """Average losses of a split in nats per image, exact per image whatever the batch size.

    ``loader`` is a :func:`vae_hyperband.get_dataloader`, which is gone through in the split's
    order, or any other iterable of batches, whose images are then held in memory; in another order
    each image gets the noise of another, and the estimate is as good but not the same. "bound" is
    reconstruction + KL, which models are compared by; "total_loss" weighs the KL's distance from
    ``capacity`` by ``beta``; "iwae" and "fid" (of samples of the prior) are added if
    ``iwae_samples`` and ``fid_samples`` are above 0; "fid" is in ``features``
    (:func:`~vae_hyperband.evaluation.features.features_for`).
    Raises :class:`ConfigError` for a loader without batches, or with images of another shape, and
    for ``fid_samples`` without features.
    """
    if fid_samples and features is None:
        raise ConfigError(
            "eval_epoch was given fid_samples, but not the features to compare images in: give "
            "features=, such as evaluation.features.features_for(config.dataset, training_split)."
        )
    loader = _again_and_again(model, loader)
    nats = split_nats(model, loader, seed)
    recon, kl = nats.recon_B.mean().item(), nats.kl_B.mean().item()
    losses = {
        "recon_loss": recon,
        "KL_divergence": kl,
        "total_loss": recon + beta * abs(kl - capacity) if capacity else recon + beta * kl,
        "bound": recon + kl,
    }
    if iwae_samples:
        losses["iwae"] = iwae_nats(model, loader, seed, iwae_samples).mean().item()
    if features and fid_samples:
        losses["fid"] = prior_fid(model, loader, seed, fid_samples, features)
    return losses


def of_whole_split(bound_N: Tensor, iwae_n: Tensor) -> Estimate:
    """The split's IWAE bound, from the bound of all images and what the first n gain on it.

    The gain varies much less over images than the bounds do, so few images suffice for it. The
    variance of the sum of the two means is var(b)/N + var(d)/n + 2 cov(b, d)/N, d = iwae - b.
    """
    total, n = len(bound_N), len(iwae_n)
    pair_2n = torch.stack((bound_N[:n], iwae_n - bound_N[:n])).double()
    covariance_22 = pair_2n.cov() if n > 1 else torch.full((2, 2), math.nan)
    spread = bound_N.double().var() if total > 1 else torch.tensor(math.nan)
    variance = spread / total + covariance_22[1, 1] / n + 2 * covariance_22[0, 1] / total
    mean = bound_N.double().mean() + pair_2n[1].mean()
    return Estimate(mean.item(), variance.clamp(min=0).sqrt().item())


def bits_are_of(likelihood: Likelihood, grey: bool) -> str:
    """What a model's bits per dimension measure; empty if its nats are of no distribution."""
    if likelihood == "bernoulli":
        return "" if grey else "the probability of a pixel's bit"
    if likelihood == "discretized-logistic":
        return "the probability of a pixel's level"
    return "the density of a pixel's value on the scale 0 to 255, not dequantized"


def bits_per_dimension(
    nats: Estimate, likelihood: Likelihood, image_shape: tuple[int, int, int]
) -> Estimate:
    """Nats per image in bits per dimension: per pixel and channel.

    A density on [0, 1] is divided by 255, which makes it one on the scale of the levels: its values
    are then those of the probabilities of levels that a smooth density gives. On levels without
    uniform noise it bounds no probability (Theis, van den Oord & Bethge 2016, section 3.1).
    """
    # log2 of 255, not of 256: stored levels lie 1/255 apart
    density = likelihood not in ("bernoulli", "discretized-logistic")
    per_nat = 1 / (math.log(2) * math.prod(image_shape))
    offset = math.log2(LEVELS) if density else 0.0
    return Estimate(nats.mean * per_nat + offset, nats.standard_error * per_nat)


def entropy_floor(x_NCHW: Tensor) -> float:
    """Mean entropy of the images' pixels as Bernoulli parameters, in nats per image.

    No model's reconstruction term can be lower on these images, since cross-entropy is entropy
    plus a KL divergence that is never negative. Computed in float64.
    """
    p = x_NCHW.double()
    return float(-(torch.special.xlogy(p, p) + torch.special.xlog1py(1 - p, -p)).sum() / len(p))


#: Nats from the mean image to the floor below which images have nothing for a model to learn.
LEAST_GAP = 1.0


def mean_image_nats(train_PCHW: Tensor, x_NCHW: Tensor) -> float:
    """Nats per image if every image is predicted by the mean of the training images.

    A model that ignores z reaches this. One white and one black image are added to the mean, so
    that no pixel has probability 0 or 1. Computed in float64.
    """
    p = (train_PCHW.sum(dim=0, dtype=torch.float64) + 1) / (len(train_PCHW) + 2)
    mean_x = x_NCHW.mean(dim=0, dtype=torch.float64)  # the cross-entropy is linear in x
    return float(-(mean_x * p.log() + (1 - mean_x) * (1 - p).log()).sum())
