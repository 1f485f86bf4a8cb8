"""The loss and its schedules. Nats per image: sums over pixels and latent dimensions.

    bound = reconstruction + KL          what models are compared by (the negative ELBO, beta = 1)
    total = reconstruction + beta * KL   what is minimised (Higgins et al. 2017, equation 4)

A mean over pixels instead of the sum would silently divide the reconstruction by 784 and so
multiply beta by 784; that is the most common bug of VAE code, and the reason for this file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vae_hyperband.model import VAE

WARMUP_SHARE = 0.15  # of a one-cycle schedule


class Nats(NamedTuple):
    """The two parts of the bound, in nats, one value per image, shape (B,) each."""

    recon_B: Tensor
    kl_B: Tensor


def reconstruction_nats(logits_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """-log p(x|z) with one Bernoulli per pixel, in nats, shape (B,).

    Kingma & Welling 2014, appendix C.1. For grey x in [0, 1] this is a cross-entropy, not a
    likelihood: its least possible value is the pixels' entropy (:func:`entropy_floor`), not 0.
    Taken from logits, where it is finite for every finite input.
    """
    nats_BCHW = F.binary_cross_entropy_with_logits(logits_BCHW, x_BCHW, reduction="none")
    return nats_BCHW.flatten(start_dim=1).sum(dim=1)


def kl_per_dimension(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension in nats, shape (B, Z).

    Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mu_BZ.square() + logvar_BZ.exp() - 1 - logvar_BZ)


def kl_to_standard_normal(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, one value per image, shape (B,)."""
    return kl_per_dimension(mu_BZ, logvar_BZ).sum(dim=1)


def nats_per_image(model: VAE, x_BCHW: Tensor, noise_BZ: Tensor) -> Nats:
    """The bound's two parts with one posterior sample per image, drawn with the given noise."""
    logits_BCHW, mu_BZ, logvar_BZ = model(x_BCHW, noise_BZ)
    return Nats(reconstruction_nats(logits_BCHW, x_BCHW), kl_to_standard_normal(mu_BZ, logvar_BZ))


def beta_at(step: int, beta: float, warmup_steps: float) -> float:
    """The KL weight of a step: linear from 0 to beta over the warm-up (Bowman et al. 2016)."""
    return beta * min(1.0, step / warmup_steps) if warmup_steps > 0 else beta


def entropy_floor(x_NCHW: Tensor) -> float:
    """Mean entropy of the images' pixels as Bernoulli parameters, in nats per image.

    No model's reconstruction term can be lower on these images, since cross-entropy is entropy
    plus a KL divergence that is never negative. Computed in float64.
    """
    p = x_NCHW.double()
    return float(-(torch.special.xlogy(p, p) + torch.special.xlog1py(1 - p, -p)).sum() / len(p))


def mean_image_nats(train_PCHW: Tensor, x_NCHW: Tensor) -> float:
    """Nats per image of images predicted by the training images' mean, whatever z is.

    What a model gives that has learned nothing of single images. Every pixel's mean is taken with
    one white and one black image more, so that none is certain. Computed in float64.
    """
    p = (train_PCHW.sum(dim=0, dtype=torch.float64) + 1) / (len(train_PCHW) + 2)
    mean_x = x_NCHW.mean(dim=0, dtype=torch.float64)  # the cross-entropy is linear in x
    return float(-(mean_x * p.log() + (1 - mean_x) * (1 - p).log()).sum())


def learning_rate_at(step: int, num_steps: int, peak: float, schedule: str) -> float:
    """One-cycle: cosine from peak/25 up over the first 15% of steps, then cosine down to
    peak/250,000 (Smith & Topin 2018). "constant" is the peak throughout."""
    if schedule == "constant":
        return peak
    warmup = max(1.0, WARMUP_SHARE * num_steps - 1)
    if step <= warmup:
        low, high, share = peak / 25, peak, step / warmup
    else:
        low, high = peak / 25e4, peak
        share = 1 - (step - warmup) / max(1.0, num_steps - 1 - warmup)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2
