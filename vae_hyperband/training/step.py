"""One training step, and the sums of its losses that the logs are made of.

Shape suffixes: B images of a batch, C channels, H height, W width, S samples of z in a batch.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import DeviceError, DivergedError, first_line
from vae_hyperband.common.process import lacks_memory
from vae_hyperband.common.randomness import generator, standard_normal
from vae_hyperband.data.batches import EpochOrder
from vae_hyperband.evaluation.bounds import Losses
from vae_hyperband.model.objective import Nats, batch_losses, noise_per_image
from vae_hyperband.model.schedules import StepSettings, settings_at
from vae_hyperband.model.vae import VAE
from vae_hyperband.training.state import TrainState

HUGE_BETA = 1e4  # of no published model; the default learning rate diverges far above it

#: What :func:`~vae_hyperband.model.objective.batch_losses` is, compiled or not.
BatchLosses = Callable[..., tuple[Nats, Tensor]]


def take_step(
    state: TrainState,
    x_BCHW: Tensor,
    order: EpochOrder | None = None,
    losses: BatchLosses = batch_losses,
) -> None:
    """Train on one batch, or raise :class:`DivergedError` with the state as it was.

    ``order`` is where the batch comes from, so that the error can name its images.
    """
    config, model, optimizer = state.config, state.model, state.optimizer
    settings = settings_at(config, state.step, state.steps_per_epoch)
    # set in every step instead of by a scheduler object, whose state would have to be saved
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate

    x_BCHW = _as_trained(config, x_BCHW, state.step)
    num_samples = len(x_BCHW) * noise_per_image(config)
    # the noise of this step depends on (seed, step) alone, so a resumed run sees the same
    noise_SZ = standard_normal(
        config.seed, "noise", state.step, num_samples, model.latent_dim, x_BCHW.device
    )
    nats, total = losses(config, model, x_BCHW, noise_SZ, settings, state.num_images)

    # to None, not to zeros: the backward pass then writes gradients instead of adding them
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    # before the weights change: afterwards nothing could be saved
    _refuse_non_finite(state, total, nats, order)
    optimizer.step()
    _count_step(state, nats, total.detach(), settings.beta)


def _as_trained(config: TrainConfig, x_BCHW: Tensor, step: int) -> Tensor:
    """The images as this step sees them: grey, or binarized with this step's random numbers."""
    if config.binarize == "none":
        return x_BCHW
    return torch.bernoulli(x_BCHW, generator=generator(config.seed, "bits", step, x_BCHW.device))


def _count_step(state: TrainState, nats: Nats, total: Tensor, beta: float) -> None:
    """Add the batch's losses to the sums, which are float64 and stay on the model's device.

    Nothing here asks a GPU for a value: the host would wait for it in every step.
    """
    recon, kl = (part.detach().sum(dtype=torch.float64) for part in nats)
    count = torch.full_like(recon, len(nats.kl_B))
    # the plain objective again, in float64: a mean of float32 times a count would round it
    objective = recon + beta * kl if state.config.objective == "elbo" else total * count
    if state.step % state.steps_per_epoch == 0:
        state.sums[0] = 0
    state.sums += torch.stack((recon, kl, objective, count))
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


def compiled_losses(device: torch.device) -> BatchLosses:
    """:func:`batch_losses` under torch.compile in mode "reduce-overhead" (CUDA graphs on a GPU).

    Raises :class:`DeviceError` if that does not work here, such as without a C++ compiler.
    """
    try:
        probe = torch.compile(lambda x: x * 2, mode="reduce-overhead")
        probe(torch.ones(2, device=device))
    # torch.compile raises whatever its back ends do: a missing compiler, Triton or header
    except Exception as error:
        why = first_line(error)
        raise DeviceError(
            f"--compile cannot be used on {device} here ({why}): leave it out."
        ) from error
    compiled = torch.compile(batch_losses, mode="reduce-overhead", dynamic=False)

    def losses(
        config: TrainConfig,
        model: VAE,
        x_BCHW: Tensor,
        noise_SZ: Tensor,
        settings: StepSettings,
        num_images: int,
    ) -> tuple[Nats, Tensor]:
        # as tensors: a Python number that changes would be compiled again in every step
        values: Any = [torch.tensor(value, device=device) for value in settings]
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(config, model, x_BCHW, noise_SZ, StepSettings(*values), num_images)

    return losses


def batch_size_that_fits(
    state: TrainState, image_shape: tuple[int, int, int], device: torch.device
) -> int:
    """The largest half, quarter ... of the run's batch size whose step fits in memory; 0 if none.

    Tried on the state of a run that has failed: its gradients are overwritten.
    """
    config, size = state.config, state.config.batch_size // 2
    settings = StepSettings(0.0, 1.0, 0.0)
    while size:
        # the error's traceback holds the tensors of the step that failed
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        noise = torch.zeros(size * noise_per_image(config), state.model.latent_dim, device=device)
        try:
            x_BCHW = torch.zeros(size, *image_shape, device=device)
            batch_losses(config, state.model, x_BCHW, noise, settings, size)[1].backward()
            return size
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
        size //= 2
    return 0


def _refuse_non_finite(
    state: TrainState, total: Tensor, nats: Nats, order: EpochOrder | None
) -> None:
    """Raise :class:`DivergedError` instead of letting a NaN or infinity into the weights."""
    # a norm is finite only if all squares are, of which Adam keeps an average
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    if math.isfinite(sum(norms, start=total.detach())):
        return
    # name the images: a damaged one is the usual cause
    bad = (~torch.isfinite(nats.recon_B + nats.kl_B)).nonzero()[:, 0].cpu()
    whose = "of the batch "
    if order is not None:
        start = state.step % state.steps_per_epoch * order.batch_size
        bad, whose = order.order(state.epoch)[start : start + order.batch_size][bad], ""
    where = f"images {whose}{bad[:10].tolist()}" if len(bad) else "the gradient"
    raise DivergedError(
        f"Training diverged at step {state.step}: {where} gave a value that is not finite "
        f"(reconstruction {nats.recon_B.mean():.4g}, KL {nats.kl_B.mean():.4g} nats/image); the "
        f"step was not applied. Use a lower {_remedy(state.config)}."
    )


def _remedy(config: TrainConfig) -> str:
    """The option that is the likely cause of a divergence."""
    # a KL has some tens of nats: beyond this weight its gradient alone is out of all proportion
    return "--beta" if config.beta > HUGE_BETA else "--learning-rate"
