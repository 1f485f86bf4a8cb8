"""Who computes the steps of a run: the loop one by one, or a pack, on this device or elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vae_hyperband.bounds import Losses, eval_epoch
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import EpochOrder, Split
from vae_hyperband.packed import Pack
from vae_hyperband.state import TrainState
from vae_hyperband.steps import averages, count_step, take_step

Advance = Callable[[TrainState, int], Tensor]

NUM_KEPT = 4  # packs that later runs of the same shape find captured already
_kept: dict[tuple[object, ...], Pack] = {}


@dataclass(frozen=True)
class Engine:
    """Takes the arguments of :func:`~vae_hyperband.training.train_epoch` and
    :func:`~vae_hyperband.bounds.eval_epoch`; ``environment`` is that of another process, if one
    computes."""

    train_epoch: Callable[..., Losses | None]
    eval_epoch: Callable[..., Losses] = eval_epoch
    environment: dict[str, Any] | None = None


def graph_engine(
    config: TrainConfig, train: Split, device: torch.device, stride: int = 100
) -> Engine:
    """A run alone in a pack: on a GPU its step is captured once, and replayed.

    The host waits for the GPU where the number of steps is a multiple of ``stride``. A later run
    that differs in learning rate, beta, seed or epochs alone takes the captured step over. On a CPU
    it is the loop by other means, to the same bits.
    """
    shape = (config.batch_size, config.latent_dim, *config.common().values())
    precision = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    key = (*shape, *precision, train.content_digest(), str(device))
    if key not in _kept:
        while len(_kept) >= NUM_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = Pack(config, train, device=device)
    pack = _kept[key]

    def advance(state: TrainState, num_steps: int) -> Tensor:
        return pack.run([state], num_steps)[0]

    return Engine(functools.partial(train_epoch_by, advance, stride))


def train_epoch_by(
    advance: Advance,
    stride: int,
    state: TrainState,
    loader: DataLoader,
    on_step: Callable[[TrainState], bool] = lambda state: False,
    on_losses: Callable[[TrainState], None] = lambda state: None,
) -> Losses | None:
    """:func:`~vae_hyperband.training.train_epoch` where a pack takes the steps.

    ``advance(state, num_steps)`` is :meth:`Pack.run` for one member, wherever the pack is.
    ``on_step`` is called where the number of steps is a multiple of ``stride``, and in the end.
    """
    state.sums = state.sums.cpu()  # where the losses arrive
    while True:
        left = state.steps_per_epoch - state.step % state.steps_per_epoch
        num_steps = min(left, stride - state.step % stride)
        losses_K4 = advance(state, num_steps)
        for losses in losses_K4:
            count_step(state, losses)
            on_losses(state)
        if len(losses_K4) < num_steps:
            _step_alone(state, loader)
            on_losses(state)
        stop = on_step(state)
        if state.ends_epoch:
            return averages(state.sums[0])
        if stop:
            return None


def _step_alone(state: TrainState, loader: DataLoader) -> None:
    """The step that a pack found not finite: it raises, and says what is wrong."""
    order = cast(EpochOrder, loader.sampler)
    order.start_at(state.epoch, batch=state.step % state.steps_per_epoch)
    take_step(state, next(iter(loader))[0], order)
