"""p(x|z): what one number per pixel says about that pixel. Nats per image: sums over pixels.

The decoder gives logits; each likelihood turns them into a distribution of a pixel in [0, 1], and
into its mean, which is what is shown.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Likelihood = Literal["bernoulli", "continuous-bernoulli", "discretized-logistic"]
LIKELIHOODS: tuple[Likelihood, ...] = get_args(Likelihood)

LEVELS = 255  # a pixel is one of 256 levels, 1/255 apart

#: The discretized logistic's scale at first: 0.1 of the way from black to white.
FIRST_LOG_SCALE = math.log(0.1)


def learned_log_scale(likelihood: Likelihood) -> nn.Parameter | None:
    """The discretized logistic's log scale, one for all pixels; the others have none."""
    if likelihood != "discretized-logistic":
        return None
    return nn.Parameter(torch.full((), FIRST_LOG_SCALE))


def reconstruction_nats(
    logits_BCHW: Tensor,
    x_BCHW: Tensor,
    likelihood: Likelihood = "bernoulli",
    log_scale: Tensor | None = None,
) -> Tensor:
    """-log p(x|z) in nats, shape (B,).

    ``bernoulli``: Kingma & Welling 2014, appendix C.1. For grey x in [0, 1] this is a
    cross-entropy, not a likelihood: its least possible value is the pixels' entropy
    (:func:`~vae_hyperband.evaluation.bounds.entropy_floor`), not 0. ``continuous-bernoulli``: the
    density on [0, 1] whose constant it lacks, Loaiza-Ganem & Cunningham 2019; it can be negative.
    ``discretized-logistic``: the probability of one of 256 levels, Salimans et al. 2017, equation
    2, one component around sigmoid(logit), with the scale exp(``log_scale``).
    """
    if likelihood == "discretized-logistic":
        assert log_scale is not None
        nats_BCHW = _discretized_logistic(torch.sigmoid(logits_BCHW), x_BCHW, log_scale)
    else:
        # from logits, where it is finite for every finite input
        nats_BCHW = F.binary_cross_entropy_with_logits(logits_BCHW, x_BCHW, reduction="none")
        if likelihood == "continuous-bernoulli":
            nats_BCHW = nats_BCHW - _log_constant(logits_BCHW)
    # a sum over pixels, since log p(x|z) of independent pixels is one
    return nats_BCHW.flatten(start_dim=1).sum(dim=1)


def pixel_means(logits_BCHW: Tensor, likelihood: Likelihood = "bernoulli") -> Tensor:
    """E[x|z], in [0, 1]."""
    if likelihood != "continuous-bernoulli":
        return torch.sigmoid(logits_BCHW)
    # not the sigmoid: the mean of a continuous Bernoulli is nearer to 1/2 than its parameter
    near, far = _parted(logits_BCHW)
    size = far.abs()  # the mean at -l is 1 minus that at l, and exp(-|l|) never overflows
    mean = -1 / torch.expm1(-size) - 1 / size
    mean = torch.where(far > 0, mean, 1 - mean)
    return torch.where(logits_BCHW.abs() < NEAR_0, 0.5 + near / 12, mean)


NEAR_0 = 1e-2  # below this |logit| the first terms of a series are exact in float32


def _parted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits twice, with harmless ones for the branch that is not taken."""
    # torch.where computes both branches, and a NaN in the unused one's gradient would spread
    near = logits.abs() < NEAR_0
    return torch.where(near, logits, 0.0), torch.where(near, 1.0, logits)


def _log_constant(logits: Tensor) -> Tensor:
    """log C of the continuous Bernoulli: C = logit / tanh(logit / 2), 2 at 0."""
    near, far = _parted(logits)
    series = math.log(2) + near.square() / 12
    return torch.where(logits.abs() < NEAR_0, series, torch.log(far / torch.tanh(far / 2)))


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
