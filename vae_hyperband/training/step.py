"""One training step of one run, and the sums of its losses that the logs are made of.

Shape suffixes: B images of a batch, C channels, H height, W width.
"""

import gc
import math

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import DivergedError
from vae_hyperband.common.process import lacks_memory
from vae_hyperband.common.randomness import generator, standard_normal
from vae_hyperband.data.batches import EpochOrder
from vae_hyperband.evaluation.bounds import Losses
from vae_hyperband.model.objective import Nats, batch_losses, noise_per_image
from vae_hyperband.model.schedules import knobs_at
from vae_hyperband.training.state import TrainState


def take_step(state: TrainState, x_BCHW: Tensor, order: EpochOrder) -> None:
    """Train on one batch, or raise :class:`DivergedError` with the state as it was."""
    config, model, optimizer = state.config, state.model, state.optimizer
    knobs = knobs_at(config, state.step, state.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = knobs.learning_rate
    x_BCHW = as_drawn(config, x_BCHW, state.step)
    num = len(x_BCHW) * noise_per_image(config)
    noise = standard_normal(config.seed, "noise", state.step, num, model.latent_dim, x_BCHW.device)
    nats, total = batch_losses(
        config, model, x_BCHW, noise, knobs.beta, knobs.capacity, order.num_images
    )
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    _refuse_non_finite(state, total, nats, order)
    optimizer.step()
    count_step(state, loss_sums(nats, total.detach()))


def as_drawn(config: TrainConfig, x_BCHW: Tensor, step: int) -> Tensor:
    """The images as the step sees them: grey, or the bits that it draws."""
    if config.binarize == "none":
        return x_BCHW
    stream = generator(config.seed, "bits", step, x_BCHW.device)
    return torch.bernoulli(x_BCHW, generator=stream)


def loss_sums(nats: Nats, total: Tensor) -> Tensor:
    """Sums over a batch: reconstruction, KL, what was minimised, images; float64."""
    recon, kl = (part.detach().sum(dtype=torch.float64) for part in nats)
    count = torch.full_like(recon, len(nats.kl_B))
    return torch.stack((recon, kl, total * count, count))


def count_step(state: TrainState, sums: Tensor) -> None:
    """Note that the step under way was taken, with those losses."""
    if state.config.objective == "elbo":  # the same as was minimised, but in float64
        beta = knobs_at(state.config, state.step, state.steps_per_epoch).beta
        recon, kl, _, count = sums
        sums = torch.stack((recon, kl, recon + beta * kl, count))
    if state.step % state.steps_per_epoch == 0:
        state.sums[0] = 0
    state.sums += sums.to(state.sums.device)
    state.step += 1


def averages(sums: Tensor) -> Losses:
    """Nats per image of one row of ``state.sums``."""
    recon, kl, total, count = sums.tolist()
    return {
        "recon_loss": recon / count,
        "KL_divergence": kl / count,
        "total_loss": total / count,
        "bound": (recon + kl) / count,
    }


def batch_size_that_fits(
    state: TrainState, image_shape: tuple[int, int, int], device: torch.device
) -> int:
    """The largest half, quarter ... of the run's batch size whose step fits in memory; 0 if none.

    Tried out on the state of a run that is lost: its gradients are overwritten.
    """
    config, size = state.config, state.config.batch_size // 2
    while size:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        noise = torch.zeros(size * noise_per_image(config), state.model.latent_dim, device=device)
        try:
            x_BCHW = torch.zeros(size, *image_shape, device=device)
            batch_losses(config, state.model, x_BCHW, noise, 1.0, 0.0, size)[1].backward()
            return size
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
        size //= 2
    return 0


def _refuse_non_finite(state: TrainState, total: Tensor, nats: Nats, order: EpochOrder) -> None:
    """Raise :class:`DivergedError` instead of letting a NaN or infinity into the weights."""
    # a norm is finite only if all squares are, of which Adam keeps an average
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    if math.isfinite(sum(norms, start=total.detach())):
        return
    start = state.step % state.steps_per_epoch * order.batch_size
    ids_B = order.order(state.epoch)[start : start + order.batch_size]
    bad = ids_B[~torch.isfinite(nats.recon_B + nats.kl_B).cpu()].tolist()
    where = f"images {bad[:10]}" if bad else "the gradient"
    raise DivergedError(
        f"Training diverged at step {state.step}: {where} gave a value that is not finite "
        f"(reconstruction {nats.recon_B.mean():.4g}, KL {nats.kl_B.mean():.4g} nats/image); the "
        "step was not applied. Use a lower --learning-rate."
    )
