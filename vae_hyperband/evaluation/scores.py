"""What a model says of each single image: its code, its bound, how well scores tell sets apart.

Shape suffixes: N images, M others, Z latent dimensions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.data.splits import Split, as_trained
from vae_hyperband.evaluation.bounds import eval_dataloader, iwae_nats, split_nats
from vae_hyperband.evaluation.latents import encode_split
from vae_hyperband.model.vae import VAE

Z_95 = 1.959964  # the standard normal's 97.5% quantile
LEAST_FOR_VARIANCE = 20  # images in either set


class Encoded(NamedTuple):
    """Images as a model encodes them; nats are per image, of one sample of z each."""

    mu_NZ: Tensor
    logvar_NZ: Tensor
    reconstruction_N: Tensor  # -log p(x|z)
    kl_N: Tensor  # KL(q(z|x) || p(z))

    @property
    def bound_N(self) -> Tensor:
        """Their sum, an upper bound on -log p(x)."""
        return self.reconstruction_N + self.kl_N


def encode(model: VAE, split: Split, config: TrainConfig) -> Encoded:
    """The code and the bound of each image of a split, on the CPU."""
    loader = eval_dataloader(as_trained(split, config), next(model.parameters()).device)
    with torch.no_grad():
        codes = encode_split(model, loader)
    nats = split_nats(model, loader, config.seed)
    return Encoded(codes.mu_NZ, codes.logvar_NZ, nats.recon_B, nats.kl_B)


def scores(model: VAE, split: Split, config: TrainConfig, iwae_samples: int = 0) -> Tensor:
    """How unlike the training images each image is, in nats, float64, shape (N,).

    An upper bound on -log p(x), with ``iwae_samples`` above 0 the IWAE bound of that many samples,
    which is tighter. For the Bernoulli likelihood of grey pixels less the pixels' own entropy: that
    bound is a cross-entropy, of which an image with many grey pixels has much under any model.
    """
    seen = as_trained(split, config)
    loader = eval_dataloader(seen, next(model.parameters()).device)
    if iwae_samples:
        bound_N = iwae_nats(model, loader, config.seed, iwae_samples)
    else:
        nats = split_nats(model, loader, config.seed)
        bound_N = nats.recon_B + nats.kl_B
    if above_entropy(config):
        bound_N -= torch.cat([pixel_entropy(x_BCHW) for x_BCHW, _ in loader])
    return bound_N


def above_entropy(config: TrainConfig) -> bool:
    """Whether scores are bounds less the entropy of the pixels."""
    return config.likelihood == "bernoulli" and config.binarize == "none"


def pixel_entropy(x_BCHW: Tensor) -> Tensor:
    """The sum of the entropies of Bernoulli pixels with these means, in nats, float64, (B,)."""
    x = x_BCHW.double().cpu().flatten(1)
    return -(torch.special.xlogy(x, x) + torch.special.xlogy(1 - x, 1 - x)).sum(dim=1)


class Auroc(NamedTuple):
    """The area under the ROC curve, with a 95% interval."""

    value: float
    low: float
    high: float


def auroc(anomalies_N: Tensor, ordinary_M: Tensor) -> Auroc:
    """How often an anomaly has the higher score of a pair with an ordinary image; ties count half.

    The variance is that of DeLong et al. 1988, and the interval that of the logit of the area,
    which stays within 0 and 1. For fewer than 20 images in a set, where that variance is too
    uncertain, and where all pairs agree, it is Wilson's interval for a share of as many images as
    the smaller set has: no set of scores has a higher variance than that share.
    """
    one, other = anomalies_N.double(), ordinary_M.double()
    num, num_other = len(one), len(other)
    # for each score of one set, the share of the other set that it is above or below
    above_N = _share_below(other, one)
    below_M = 1 - _share_below(one, other)
    value = above_N.mean().item()
    variance = sum(part.var().item() / len(part) for part in (above_N, below_M) if len(part) > 1)
    least = min(num, num_other)
    if least < LEAST_FOR_VARIANCE or variance == 0:
        square = Z_95**2 / least
        centre = (value + square / 2) / (1 + square)
        wilson = Z_95 * math.sqrt(value * (1 - value) / least + square / (4 * least)) / (1 + square)
        # rounding is not to leave the value outside of its own interval
        return Auroc(
            value, min(value, max(0.0, centre - wilson)), max(value, min(1.0, centre + wilson))
        )
    half = Z_95 * math.sqrt(variance) / (value * (1 - value))
    logit = math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(-(logit + side * half))) for side in (-1, 1))
    return Auroc(value, low, high)


def _share_below(values: Tensor, at: Tensor) -> Tensor:
    """For each of ``at`` the share of ``values`` below it, equal ones counted half."""
    ordered = values.sort().values
    less = torch.searchsorted(ordered, at, right=False)
    at_most = torch.searchsorted(ordered, at, right=True)
    return (less + at_most).double() / (2 * len(values))


def nearest_codes(mu_Z: Tensor, mu_NZ: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances from one code to the nearest others, and their numbers, nearest first."""
    distance_N = torch.linalg.vector_norm(mu_NZ.double() - mu_Z.double(), dim=1)
    found = distance_N.topk(min(num, len(distance_N)), largest=False)
    return found.values, found.indices
