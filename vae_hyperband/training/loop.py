"""The one training loop. The command line, the search, the notebook and the tests all call it.

Every random number is a function of (seed, purpose, position), so a run is a pure function of its
configuration and its data; a checkpoint stores where it is, and going on from there gives the same
bytes as never having stopped.

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, Z latents.
"""

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import DataLoader

from vae_hyperband.common.config import RunOptions, TrainConfig, changed_options, in_effect, plural
from vae_hyperband.common.errors import DivergedError, OutOfMemoryError, RunFolderError
from vae_hyperband.common.process import (
    cpu_threads,
    environment,
    keep_freed_memory,
    lacks_memory,
    only_writer,
    pick_device,
)
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.batches import EpochOrder, SplitBatches, get_dataloader
from vae_hyperband.data.splits import Split, as_trained, load_split
from vae_hyperband.evaluation.bounds import Losses, eval_dataloader, eval_epoch
from vae_hyperband.model.checkpoint import tree_digest
from vae_hyperband.model.objective import held_out_weights, nats_by_dimension
from vae_hyperband.model.schedules import knobs_at
from vae_hyperband.training.keeper import Keeper
from vae_hyperband.training.state import NO_BEST, TrainState, first_state, snapshot
from vae_hyperband.training.step import averages, batch_size_that_fits, take_step
from vae_hyperband.training.tracker import Progress, Tracker

NUM_PICTURES = 32  # held-out images whose reconstructions TensorBoard shows


def train_epoch(
    state: TrainState,
    loader: DataLoader,
    on_step: Callable[[TrainState], bool] = lambda state: False,
    on_losses: Callable[[TrainState], None] = lambda state: None,
) -> Losses | None:
    """Train to the end of the epoch that ``state`` is in, wherever in it that is.

    ``state`` comes from :func:`vae_hyperband.new_state`, ``loader`` from
    :func:`vae_hyperband.get_dataloader`. Returns the epoch's training losses, averaged per image,
    in nats. ``on_losses`` is called for every step, with its losses in ``state.sums``; ``on_step``
    where the state may be saved: if it returns True within the epoch, training stops there and None
    is returned. Raises :class:`DivergedError`, with the state as it was before the step that is not
    finite.
    """
    state.model.train()
    order = cast(EpochOrder, loader.sampler)
    order.start_at(state.epoch, batch=state.step % state.steps_per_epoch)
    for x_BCHW, _ in loader:
        take_step(state, x_BCHW, order)
        on_losses(state)
        stop = on_step(state)
        if state.step % state.steps_per_epoch == 0:
            break
        if stop:
            return None
    return averages(state.sums[0])


@dataclass(frozen=True)
class FitResult:
    """How a call of :func:`fit` ended."""

    finished: bool  # False: stopped on request; the same call goes on
    state: TrainState
    latest: Path
    best: Path  # the checkpoint with the lowest validation total_loss
    log_folder: Path

    @property
    def weights(self) -> str:
        """SHA-256 of the weights as they are now, which ``latest`` holds as "weights"."""
        return tree_digest(self.state.model.state_dict())


def fit(
    config: TrainConfig,
    options: RunOptions | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_validation: Callable[[TrainState], None] | None = None,
    splits: tuple[Split, Split] | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train a run to its end, from where its folder (or ``options.resume_ckpt``) says it is.

    ``should_stop`` is asked after every step: if it says so, the state is saved and the call
    returns. ``on_validation`` is called after each validation, when its checkpoint is on disk;
    without it, training goes on where a save fails, as long as it is not the last one.
    ``splits`` are the training and the validation split, where they are in memory already.
    Raises the package's own errors for a user's mistakes, :class:`DivergedError` for a loss that is
    not finite; the last checkpoint is good in each case.
    """
    options = options or RunOptions()
    device = pick_device(options.device)
    keep_freed_memory()
    with (
        cpu_threads(options.num_threads),
        only_writer(options.ckpt_folder),
        only_writer(options.log_folder),
    ):
        train, held_out = splits or (
            load_split("train", options.data_dir, config.dataset),
            load_split("validation", options.data_dir, config.dataset),
        )
        train_loader = get_dataloader(
            train, config.batch_size, seed=config.seed, shuffle=True, device=device
        )
        held_out = as_trained(held_out, config)
        validation_loader = eval_dataloader(held_out, device)
        where = environment(device)
        state = first_state(config, options, train, device, where, quiet)
        last_saved = time.monotonic()

        def save(improved: bool = False, required: bool = False) -> None:
            nonlocal last_saved
            try:
                keeper.save(snapshot(state, train, where), improved)
            except RunFolderError as error:
                if required:
                    raise
                print(f"warning: {error} Training goes on, unsaved.", file=sys.stderr, flush=True)
            last_saved = time.monotonic()

        def on_losses(state: TrainState) -> None:
            progress.step(config.batch_size)
            if state.ends_epoch or state.step % options.log_interval == 0:
                _log_training(state, tracker, progress)

        def on_step(state: TrainState) -> bool:
            if (images_per_second := progress.speed()) is not None:
                tracker.speed(state.step, images_per_second)
            # at the end of an epoch the validation comes first
            if not state.ends_epoch and time.monotonic() - last_saved >= options.ckpt_seconds:
                with progress.pause():
                    save()
            return should_stop()

        with (
            Tracker(options.log_folder, state.step, options.tensorboard) as tracker,
            Progress(state.step, state.num_steps, quiet) as progress,
            _memory_explained(state, train, device),
        ):
            keeper = Keeper(
                options.ckpt_folder, options.keep_ckpts, options.resume_ckpt, tracker.flush
            )
            if not quiet:
                print(
                    f"training {options.run} for {plural(config.epochs, 'epoch')} on "
                    f"{len(train):,} images, {plural(torch.get_num_threads(), 'thread')}, "
                    f"{device}",
                    flush=True,
                )
            if state.step == 0:
                tracker.pictures(0, input=held_out.pixels(slice(NUM_PICTURES)))
                what = in_effect(config.to_dict())
                tracker.configuration(train_command(config, options.run), what)
            while state.step < state.num_steps:
                losses = train_epoch(state, train_loader, on_step, on_losses)
                finished = state.step == state.num_steps
                if losses and (state.epoch % config.val_interval == 0 or finished):
                    with progress.pause():
                        improved = _validate(state, validation_loader, tracker)
                        if finished:
                            _log_hyperparameters(state, tracker)
                        save(improved, required=finished or on_validation is not None)
                        if on_validation:
                            on_validation(state)
                    progress.validated(
                        state.step, state.epoch, config.epochs, losses, state.metrics
                    )
                if should_stop() and not finished:
                    save(required=True)
                    break
    return FitResult(
        finished=state.step >= state.num_steps,
        state=state,
        latest=keeper.latest,
        best=keeper.best,
        log_folder=options.log_folder,
    )


@contextlib.contextmanager
def _memory_explained(state: TrainState, train: Split, device: torch.device) -> Iterator[None]:
    """Turn an error for lack of memory into one that says with which batch size there is enough."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        size = batch_size_that_fits(state, train.image_shape, device)
        raise OutOfMemoryError(
            f"There is not enough memory on {device} for batches of {state.config.batch_size} "
            + (f"images: --batch-size {size} fits." if size else "images, nor for any smaller one.")
        ) from error


def train_command(config: TrainConfig, run: str) -> str:
    """The command that trains such a run, data and folders apart."""
    changed = changed_options(config.to_dict(), TrainConfig().to_dict())
    return shlex.join(["vae-hyperband", "train", "--run", run, *changed])


def _validate(state: TrainState, loader: DataLoader, tracker: Tracker) -> bool:
    """Evaluate, log and remember; whether this is the best model so far.

    The best is the one with the lowest total_loss, which for beta = 1 is the bound. With a low beta
    the bound would choose a model that has not learned to reconstruct yet, since learning to do so
    costs KL.
    """
    config = state.config
    beta, capacity = held_out_weights(config)
    losses = eval_epoch(
        state.model, loader, config.seed, beta, config.iwae_samples, config.fid_samples, capacity
    )
    if not math.isfinite(losses["bound"]):
        raise DivergedError(
            f"The validation bound after epoch {state.epoch} is {losses['bound']}: use a lower "
            "--learning-rate."
        )
    state.metrics = {"step": state.step, "epoch": state.epoch, **losses}
    improved = losses["total_loss"] < state.best["total_loss"]
    if improved:
        state.best = {name: state.metrics[name] for name in NO_BEST}
    tracker.scalars("validation", state.step, state.epoch, losses)
    images_BCHW = cast(SplitBatches, loader.dataset).split.pixels(slice(NUM_PICTURES))
    tracker.pictures(
        state.step,
        reconstruction=state.model.reconstruct(images_BCHW),
        # the same noise each time, so that one sees the same garments become clearer
        random_samples=state.model.sample(64, generator(config.seed, "pictures")),
    )
    with torch.no_grad():
        nats_Z = nats_by_dimension(state.model, *state.model.encode(images_BCHW))
    tracker.kl_per_dimension(state.step, nats_Z)
    return improved


def _log_training(state: TrainState, tracker: Tracker, progress: Progress) -> None:
    """A row of training losses, averaged over the steps since the last such row."""
    losses = averages(state.sums[1])
    state.sums[1] = 0
    last_step = state.step - 1
    rate = knobs_at(state.config, last_step, state.steps_per_epoch).learning_rate
    epoch = math.ceil(state.step / state.steps_per_epoch)
    tracker.scalars("train", state.step, epoch, losses | {"learning_rate": rate})
    progress.logged(losses["bound"])


def _log_hyperparameters(state: TrainState, tracker: Tracker) -> None:
    tracker.hyperparameters(
        state.config.to_dict(),
        {"best_bound": state.best["bound"], "final_bound": state.metrics["bound"]},
        state.step,
    )
