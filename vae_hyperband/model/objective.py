"""The loss. Nats per image: sums over pixels and latent dimensions.

    bound = reconstruction + KL          what models are compared by (the negative ELBO, beta = 1)
    total = reconstruction + beta * KL   what is minimised (Higgins et al. 2017, equation 4)

A mean over pixels instead of the sum would silently divide the reconstruction by 784 and so
multiply beta by 784; that is the most common bug of VAE code, and the reason for this file.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.model.likelihoods import reconstruction_nats
from vae_hyperband.model.priors import log_normal, reparameterize
from vae_hyperband.model.schedules import StepSettings
from vae_hyperband.model.vae import VAE


class Nats(NamedTuple):
    """The two parts of the bound, in nats, one value per image, shape (B,) each."""

    recon_B: Tensor
    kl_B: Tensor


class Pass(NamedTuple):
    """One pass of images through a model, and all that an objective may need of it."""

    nats: Nats
    mu_BZ: Tensor
    logvar_BZ: Tensor
    z_BZ: Tensor


def forward_pass(model: VAE, x_BCHW: Tensor, noise_BZ: Tensor) -> Pass:
    """The two terms of the negative ELBO, one z per image (Kingma & Welling 2014, equation 7).

    The KL is exact for the standard normal prior (appendix B). The VampPrior's has no closed form:
    there it is log q(z|x) - log p(z) at the sampled z, which is right on average.
    """
    logits_BCHW, mu_BZ, logvar_BZ, z_BZ = model(x_BCHW, noise_BZ)
    recon_B = reconstruction_nats(
        logits_BCHW, x_BCHW, model.likelihood, model.log_scale, model.sigma
    )
    # a sum over latent dimensions, as recon_B is over pixels: with beta = 1 this is the ELBO
    if model.vamp is None:
        kl_B = kl_to_standard_normal(mu_BZ, logvar_BZ)
    else:
        kl_B = log_normal(z_BZ, mu_BZ, logvar_BZ) - model.log_prior(z_BZ)
    return Pass(Nats(recon_B, kl_B), mu_BZ, logvar_BZ, z_BZ)


def nats_per_image(model: VAE, x_BCHW: Tensor, noise_BZ: Tensor) -> Nats:
    """The bound's two parts with one posterior sample per image, made with the given noise."""
    return forward_pass(model, x_BCHW, noise_BZ).nats


def kl_to_standard_normal(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, one value per image, shape (B,)."""
    return kl_per_dimension(mu_BZ, logvar_BZ).sum(dim=1)


def kl_per_dimension(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension in nats, shape (B, Z).

    Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mu_BZ.square() + logvar_BZ.exp() - 1 - logvar_BZ)


def batch_losses(
    config: TrainConfig,
    model: VAE,
    x_BCHW: Tensor,
    noise_SZ: Tensor,
    settings: StepSettings,
    num_images: int,
) -> tuple[Nats, Tensor]:
    """A training batch's nats per image, and what the step minimises.

    ``noise_SZ`` has a row for each image and sample of it, all images of the first sample first.
    ``num_images`` is the size of the training split.
    """
    if config.objective == "iwae":
        return _iwae_losses(model, x_BCHW, noise_SZ)
    passed = forward_pass(model, x_BCHW, noise_SZ)
    return passed.nats, training_total(config, passed, settings, num_images)


# ---- variants of the objective (docs/objectives.md)


def training_total(
    config: TrainConfig, passed: Pass, settings: StepSettings, num_images: int
) -> Tensor:
    """What is minimised, in nats, mean over the batch, by ``config.objective``.

    - elbo: reconstruction + beta * KL (Higgins et al. 2017, equation 4).
    - free-bits: each dimension's KL counts as at least ``free_bits`` (Kingma et al. 2016, equation
      15, with the batch's mean).
    - capacity: reconstruction + beta * |KL - C| with this step's C (Burgess et al. 2018, eq. 8).
    - beta-tc: reconstruction + KL + (beta - 1) * total correlation (Chen et al. 2018, equation 5
      with alpha = gamma = 1).
    """
    (recon_B, kl_B), beta = passed.nats, settings.beta
    if config.objective == "free-bits":
        # the batch's mean first: a free nat per image would let single images ignore z
        kl_Z = kl_per_dimension(passed.mu_BZ, passed.logvar_BZ).mean(dim=0)
        return recon_B.mean() + beta * kl_Z.clamp(min=config.free_bits).sum()
    # an absolute value: a KL below C is pulled up as one above it is pushed down
    if config.objective == "capacity":
        return recon_B.mean() + beta * (kl_B.mean() - settings.capacity).abs()
    if config.objective == "beta-tc":
        # the KL has the total correlation in it once, so beta - 1 of it is added
        correlation = total_correlation(passed, num_images)
        return (recon_B + kl_B).mean() + (beta - 1) * correlation
    # the mean over images alone: a mean over pixels, too, would multiply beta by their number
    return (recon_B + beta * kl_B).mean()


def total_correlation(passed: Pass, num_images: int) -> Tensor:
    """KL(q(z) || prod_d q(z_d)) of the aggregate posterior in nats, estimated from one batch.

    Chen et al. 2018, equation 2; q(z) by minibatch stratified sampling (appendix C.2): the image
    that z came from counts 1/N, the rest of the batch stands for the other N - 1 images.
    """
    num = len(passed.z_BZ)
    # each image's z under each image's posterior: row of z, column of posterior
    log_q_BBZ = -0.5 * (
        (passed.z_BZ[:, None] - passed.mu_BZ).square() * torch.exp(-passed.logvar_BZ)
        + passed.logvar_BZ
        + math.log(2 * math.pi)
    )
    # max(..., 1): a batch or a split of one image has no others
    others = max(num_images - 1, 1) / (num_images * max(num - 1, 1))
    kind, device = log_q_BBZ.dtype, log_q_BBZ.device
    log_share_BB = torch.full((num, num), math.log(others), dtype=kind, device=device)
    # the diagonal is each z under the image that it came from
    log_share_BB.fill_diagonal_(-math.log(num_images))
    # log q(z) and the product of log q(z_d), both as mixtures over the batch's posteriors
    joint_B = (log_q_BBZ.sum(dim=2) + log_share_BB).logsumexp(dim=1)
    marginals_BZ = (log_q_BBZ + log_share_BB[:, :, None]).logsumexp(dim=1)
    return (joint_B - marginals_BZ.sum(dim=1)).mean()


def _iwae_losses(model: VAE, x_BCHW: Tensor, noise_SZ: Tensor) -> tuple[Nats, Tensor]:
    """The IWAE bound, with the sign of a loss (Burda et al. 2016, equation 8)."""
    noise_KBZ = noise_SZ.unflatten(0, (-1, len(x_BCHW)))
    # in logarithms throughout: weights differ by hundreds of nats, and exp() would overflow
    log_weights_KB, passed = log_weights(model, x_BCHW, *model.encode(x_BCHW), noise_KBZ)
    return passed.nats, math.log(len(noise_KBZ)) - log_weights_KB.logsumexp(dim=0).mean()


def log_weights(
    model: VAE, x_BCHW: Tensor, mu_BZ: Tensor, logvar_BZ: Tensor, noise_KBZ: Tensor
) -> tuple[Tensor, Pass]:
    """log p(x, z) - log q(z|x) for K samples of z per image, shape (K, B), and the pass.

    Burda, Grosse & Salakhutdinov 2016, section 3: the importance weights. ``mu_BZ`` and
    ``logvar_BZ`` are the images' posteriors, which every sample shares.
    """
    z_KBZ = reparameterize(mu_BZ, logvar_BZ, noise_KBZ)
    # all samples in one batch of K * B images
    logits = model.decode(z_KBZ.flatten(0, 1))
    x = x_BCHW.repeat(len(noise_KBZ), 1, 1, 1)
    recon = reconstruction_nats(logits, x, model.likelihood, model.log_scale, model.sigma)
    recon_KB = recon.view(len(noise_KBZ), -1)
    log_prior_KB = model.log_prior(z_KBZ.flatten(0, 1)).view_as(recon_KB)
    # at the samples, also for a normal prior: the weights need each sample's own value
    kl_KB = log_normal(z_KBZ, mu_BZ, logvar_BZ) - log_prior_KB
    nats = Nats(recon_KB.mean(dim=0), kl_KB.mean(dim=0))
    return -recon_KB - kl_KB, Pass(nats, mu_BZ, logvar_BZ, z_KBZ[0])


def noise_per_image(config: TrainConfig) -> int:
    """How many samples of z a training step takes per image."""
    return config.train_samples if config.objective == "iwae" else 1


def held_out_weights(config: TrainConfig) -> tuple[float, float]:
    """beta and C of reconstruction + beta * |KL - C|, by which a run's checkpoints are compared.

    The objective at its end, as far as the bound's two parts say it: for beta-tc without the total
    correlation, for iwae with one sample, for free-bits with nothing free.
    """
    # the total correlation needs a batch's pairs, which an average per image does not have
    if config.objective == "beta-tc":
        return 1.0, 0.0
    return config.beta, config.capacity if config.objective == "capacity" else 0.0
