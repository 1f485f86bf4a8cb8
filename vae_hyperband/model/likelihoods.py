"""p(x|z): what one number per pixel says about that pixel. Nats per image: sums over pixels.

The decoder gives logits; each likelihood turns them into a distribution of a pixel in [0, 1], and
into its mean, which is what is shown.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

import math
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_hyperband.common.config import Likelihood

LIKELIHOODS: tuple[Likelihood, ...] = get_args(Likelihood)

LEVELS = 255  # a pixel is one of 256 levels, 1/255 apart

#: Likelihoods whose scale is learned.
LEARNED_SCALE = ("learned-gaussian", "laplace", "discretized-logistic")

#: A learned scale at first: 0.1 of the way from black to white.
FIRST_LOG_SCALE = math.log(0.1)

#: Added to the learned scale of a density: the standard deviation of rounding to levels. A density
#: of stored levels has no greatest value, so without it the scale of images that are reproduced
#: exactly (all black, say) would shrink, and the bound fall, without end.
LEAST_SCALE = 1 / (LEVELS * math.sqrt(12))


def learned_log_scale(likelihood: Likelihood, channels: int = 1) -> nn.Parameter | None:
    """The log scale of :data:`LEARNED_SCALE`, one for all pixels; the other likelihoods have none.

    The discretized logistic has one per channel, shape (C, 1, 1), if there are several; else the
    shape is ().
    """
    # One parameter, as the sigma-VAE of Rybkin, Daniilidis & Levine 2021 has it. Their "optimal
    # sigma-VAE" computes the scale from the errors of the batch instead: an image's bound would
    # then depend on the images beside it. Both end at the same scale.
    if likelihood not in LEARNED_SCALE:
        return None
    several = likelihood == "discretized-logistic" and channels > 1
    return nn.Parameter(torch.full((channels, 1, 1) if several else (), FIRST_LOG_SCALE))


def reconstruction_nats(
    logits_BCHW: Tensor,
    x_BCHW: Tensor,
    likelihood: Likelihood = "bernoulli",
    log_scale: Tensor | None = None,
    sigma: float = 0.1,
) -> Tensor:
    """-log p(x|z) in nats, shape (B,).

    ``bernoulli``: Kingma & Welling 2014, appendix C.1. For grey x in [0, 1] this is a
    cross-entropy, not a likelihood: its least possible value is the pixels' entropy
    (:func:`~vae_hyperband.evaluation.bounds.entropy_floor`), not 0. ``continuous-bernoulli``: the
    density on [0, 1] whose constant it lacks, Loaiza-Ganem & Cunningham 2019; it can be negative.

    The others lie around sigmoid(logit), since images lie in [0, 1]. ``gaussian``: a density with
    the standard deviation ``sigma``, Kingma & Welling 2014, appendix C.2. ``learned-gaussian`` and
    ``laplace``: with the standard deviation, or the scale, exp(``log_scale``) +
    :data:`LEAST_SCALE`, Rybkin et al. 2021. ``discretized-logistic``: the probability of one of 256
    levels, Salimans et al. 2017, equation 2, one component, with the scale exp(``log_scale``).
    """
    if likelihood == "bernoulli":
        # from logits, where it is finite for every finite input
        nats_BCHW = F.binary_cross_entropy_with_logits(logits_BCHW, x_BCHW, reduction="none")
    elif likelihood == "continuous-bernoulli":
        nats_BCHW = _continuous_nats(logits_BCHW, x_BCHW)
    elif likelihood == "gaussian":
        fixed = logits_BCHW.new_full((), sigma)
        nats_BCHW = _gaussian_nats(torch.sigmoid(logits_BCHW), x_BCHW, fixed)
    else:
        assert log_scale is not None
        mean_BCHW = torch.sigmoid(logits_BCHW)
        if likelihood == "discretized-logistic":
            nats_BCHW = _discretized_logistic(mean_BCHW, x_BCHW, log_scale)
        else:
            nats = _gaussian_nats if likelihood == "learned-gaussian" else _laplace_nats
            nats_BCHW = nats(mean_BCHW, x_BCHW, log_scale.exp() + LEAST_SCALE)
    # a sum over pixels, since log p(x|z) of independent pixels is one
    return nats_BCHW.flatten(start_dim=1).sum(dim=1)


def pixel_means(logits_BCHW: Tensor, likelihood: Likelihood = "bernoulli") -> Tensor:
    """E[x|z], in [0, 1]."""
    if likelihood != "continuous-bernoulli":
        return torch.sigmoid(logits_BCHW)
    # not the sigmoid: the mean of a continuous Bernoulli is nearer to 1/2 than its parameter
    return _continuous_mean(logits_BCHW)


#: Below this |logit| the continuous Bernoulli is computed by series: 1 / l cancels there, and is
#: infinite at 0. Above it, nothing loses more than a bit or two.
SERIES_BELOW = 1.0
#: The mean less 1/2 is l/12 - l^3/720 + ...: B_2k / (2k)!, Bernoulli's numbers. The next term is
#: 2e-8 at a logit of 1, less than the rounding of a float32.
MEAN_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600)
#: Of its integral, whose powers are 2, 4, 6, 8.
NATS_SERIES = tuple(c / power for c, power in zip(MEAN_SERIES, (2, 4, 6, 8), strict=True))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c0 + c1 x + c2 x^2 + ..., by Horner's rule."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _continuous_mean(logits: Tensor) -> Tensor:
    """1 / (1 - exp(-l)) - 1 / l, 1/2 at 0."""
    # torch.where computes both branches: each gets logits that it takes without inf or NaN, which
    # would spread to the gradient
    size = logits.abs()
    near, far = logits.clamp(-SERIES_BELOW, SERIES_BELOW), size.clamp(min=SERIES_BELOW)
    decay = torch.exp(-far)  # never overflows
    low = 1 / far - decay / (1 - decay)  # the mean at -|l|; at |l| it is 1 minus that
    mean = torch.where(logits > 0, 1 - low, low)
    series = 0.5 + near * _polynomial(near.square(), MEAN_SERIES)
    return torch.where(size < SERIES_BELOW, series, mean)


def _continuous_nats(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x) = A(l) - l x, where A(l) = log((e^l - 1) / l), whose derivative is the mean."""
    size = logits.abs()
    square = logits.clamp(-SERIES_BELOW, SERIES_BELOW).square()
    far = size.clamp(min=SERIES_BELOW)
    # A(l) = l/2 + the integral of the series = max(l, 0) - log(|l| / (1 - exp(-|l|)))
    series = logits * (0.5 - x) + square * _polynomial(square, NATS_SERIES)
    nats = size * torch.where(logits > 0, 1 - x, x) - torch.log(far / (1 - torch.exp(-far)))
    return torch.where(size < SERIES_BELOW, series, nats)


def _gaussian_nats(mean: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * ((x - mean) / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)


def _laplace_nats(mean: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return (x - mean).abs() / scale + scale.log() + math.log(2)


def _discretized_logistic(mean: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
    """-log of the logistic distribution's mass between the neighbouring levels' midpoints.

    The lowest and the highest level have all that lies beyond them.
    """
    # the scale is learned as a logarithm, which keeps it positive
    precision = (-log_scale).exp()
    upper = (x + 0.5 / LEVELS - mean) * precision
    lower = (x - 0.5 / LEVELS - mean) * precision
    # log(sigmoid(u) - sigmoid(l)) = logsigmoid(u) + logsigmoid(-l) + log(1 - exp(l - u))
    width = (1 / LEVELS) * precision
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
    log_mass = torch.where(x < 0.5 / LEVELS, F.logsigmoid(upper), inside)
    return -torch.where(x > 1 - 0.5 / LEVELS, F.logsigmoid(-lower), log_mass)
