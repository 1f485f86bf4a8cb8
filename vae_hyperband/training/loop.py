"""The one training loop. The command line, the search, the notebook and the tests all call it.

Every random number is a function of (seed, purpose, position), so a run is a pure function of its
configuration and its data. A checkpoint stores how far it is, and continuing from there gives the
same bytes as a run that was never stopped.

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, Z latents.
"""

import contextlib
import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import RunOptions, TrainConfig, changed_options, in_effect
from vae_hyperband.common.errors import (
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryError,
    RunFolderError,
)
from vae_hyperband.common.process import (
    Environment,
    cpu_threads,
    environment,
    keep_freed_memory,
    lacks_memory,
    only_writer,
    own_modes,
    pick_device,
)
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.batches import Batches, EpochOrder, SplitBatches, get_dataloader
from vae_hyperband.data.splits import Images, Split, as_split, as_trained, load_training_splits
from vae_hyperband.evaluation.bounds import Losses, batch_images, eval_dataloader, eval_epoch
from vae_hyperband.evaluation.features import Features, features_for
from vae_hyperband.evaluation.latents import Posteriors, information_per_dimension
from vae_hyperband.model.checkpoint import DataFacts, tree_digest
from vae_hyperband.model.objective import batch_losses, held_out_weights
from vae_hyperband.model.schedules import settings_at
from vae_hyperband.training.keeper import Keeper
from vae_hyperband.training.state import (
    NO_BEST,
    TrainState,
    first_state,
    snapshot,
    with_known_data,
)
from vae_hyperband.training.step import (
    BatchLosses,
    averages,
    batch_size_that_fits,
    compiled_losses,
    take_step,
)
from vae_hyperband.training.tracker import Progress, Tracker
from vae_hyperband.training.tracking import Mirror

NUM_PICTURES = 32  # held-out images whose reconstructions TensorBoard shows


@dataclass(frozen=True)
class FitResult:
    """How a call of :func:`fit` ended."""

    finished: bool  # False: stopped on request; the same call continues
    state: TrainState
    latest: Path
    best: Path  # the checkpoint with the lowest validation total_loss
    log_folder: Path

    @property
    def weights(self) -> str:
        """SHA-256 of the weights as they are now, which ``latest`` holds as "weights"."""
        return tree_digest(self.state.model.state_dict())


@own_modes()
def train_epoch(
    state: TrainState,
    loader: Iterable[Any],
    after_step: Callable[[TrainState], bool] = lambda state: False,
    losses: BatchLosses = batch_losses,
) -> Losses | None:
    """Train to the end of the epoch that ``state`` is in, wherever in it that is.

    ``state`` comes from :func:`vae_hyperband.new_state`, ``loader`` from
    :func:`vae_hyperband.get_dataloader`, or is any other iterable of an epoch's batches (images in
    [0, 1], shape (B, C, H, W); labels). Returns the epoch's training losses, averaged per image, in
    nats. ``after_step`` is called after every step: if it returns True within the epoch, training
    stops there and None is returned. Raises :class:`DivergedError`, with the state as it was before
    the step that is not finite, and :class:`ConfigError` for a loader of another number of batches
    than the state's epochs have steps, or of other images than the model's.
    """
    state.model.train()
    sampler = getattr(loader, "sampler", None)
    order = sampler if isinstance(sampler, EpochOrder) else None
    _check_loader(state, loader, order)
    # a resumed run starts in the middle of its epoch
    first = state.step % state.steps_per_epoch
    if order is not None:
        order.start_at(state.epoch, batch=first)
    batches = loader if order is not None else _rest(loader, first, state.steps_per_epoch)
    for batch in batches:
        take_step(state, batch_images(state.model, batch), order, losses)
        stop = after_step(state)
        # in this order: a stop at an epoch's last step comes after its validation
        if state.ends_epoch:
            break
        if stop:
            return None
    return averages(state.sums[0])


def _rest(loader: Iterable[Any], first: int, num: int) -> Iterator[Any]:
    """The batches of an epoch from ``first`` on.

    Raises :class:`ConfigError` if the epoch has fewer than ``num`` batches or, before the last of
    them, if it has more.
    """
    batches, nothing = itertools.islice(loader, first, None), object()
    for number in range(first, num):
        batch = next(batches, nothing)
        if batch is nothing:
            raise ConfigError(
                f"The loader ended after {plural(number, 'step')}, but an epoch of the state has "
                f"{plural(num, 'step')}."
            )
        if number == num - 1 and next(batches, nothing) is not nothing:
            raise ConfigError(
                f"The loader goes on after {plural(num, 'step')}, which an epoch of the state has: "
                "make both with the same numbers."
            )
        yield batch


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader has, if it tells."""
    try:
        return len(cast(Sized, loader))
    except TypeError:  # an iterator, or the loader of a data set that is one
        return None


def _check_loader(state: TrainState, loader: Iterable[Any], order: EpochOrder | None) -> None:
    """Raise :class:`ConfigError` if one epoch of the loader is not one of the state."""
    wanted, found = (state.num_images, state.config.batch_size), None
    if order is not None:
        found = (order.num_images, order.batch_size)
    if found not in (None, wanted):
        raise ConfigError(
            f"The loader gives {plural(found[0], 'image')} in batches of {found[1]}, but the state "
            f"is for {wanted[0]:,} in batches of {wanted[1]}: make both with the same numbers."
        )
    num_batches = _length(loader) if order is None else None
    if num_batches not in (None, state.steps_per_epoch):
        raise ConfigError(
            f"The loader gives {plural(num_batches, 'step')}, but an epoch of the state has "
            f"{plural(state.steps_per_epoch, 'step')}: make both with the same numbers."
        )


@own_modes()
def fit(
    config: TrainConfig,
    options: RunOptions | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_validation: Callable[[TrainState], None] | None = None,
    splits: tuple[Images, Images] | None = None,
    quiet: bool = False,
) -> FitResult:
    """Train a run to its end, from where its folder (or ``options.resume_ckpt``) says it is.

    ``should_stop`` is called after every step: if it returns True, the state is saved and the call
    returns. ``on_validation`` is called after each validation, when its checkpoint is on disk;
    without it, training continues if a save fails, as long as it is not the last one.
    ``splits`` are the training and the validation images, if they are in memory already, as
    :func:`~vae_hyperband.data.splits.as_split` takes them. Raises the package's own errors for
    invalid options or files, :class:`DivergedError` for a loss that is not finite; the last
    checkpoint is good in each case.
    """
    options = options or RunOptions()
    device = pick_device(options.device)
    keep_freed_memory()
    with (
        cpu_threads(options.num_threads),
        only_writer(options.ckpt_folder),
        only_writer(options.log_folder),
    ):
        config, options, train, held_out = _with_images(config, options, splits, should_stop)
        features = _features(config, train, device, quiet)
        losses = compiled_losses(device) if options.compile else batch_losses
        # a checkpoint tells on what it was computed: elsewhere the last bits may differ
        where = environment(device) | ({"compiled": True} if options.compile else {})
        state = first_state(config, options, train, device, where, quiet)
        # the images stay on the device as bytes: a batch is one gather, not a copy from the host
        train_loader = get_dataloader(
            train, config.batch_size, seed=config.seed, shuffle=True, device=device
        )
        validation_loader = eval_dataloader(held_out, device)
        with Trainer(state, options, train, where, quiet, features) as trainer:
            trainer.begin(held_out)
            while state.step < state.num_steps:
                train_losses = train_epoch(
                    state, train_loader, lambda _: trainer.after_step(should_stop), losses
                )
                finished = state.step == state.num_steps
                # None: stopped within the epoch, whose validation would be of other weights
                if train_losses and (finished or state.epoch % config.val_interval == 0):
                    # a search relies on the checkpoint of what it was told, so it has to be there
                    required = finished or on_validation is not None
                    with trainer.progress.pause():
                        trainer.validate(validation_loader, required)
                        if on_validation:
                            on_validation(state)
                    trainer.progress.validated(
                        state.step, state.epoch, config.epochs, train_losses, state.metrics
                    )
                if should_stop() and not finished:  # the signal may come while it validates
                    trainer.save(required=True)
                    break
    return trainer.result()


def _with_images(
    config: TrainConfig,
    options: RunOptions,
    splits: tuple[Images, Images] | None,
    should_stop: Callable[[], bool],
) -> tuple[TrainConfig, RunOptions, Split, Split]:
    """The settings of a run with its images, and these: the training and the validation split."""
    if splits is None:
        config, options = with_known_data(config, options)
        train, held_out = load_training_splits(config, options, should_stop)
        return config, options, train, as_trained(held_out, config)
    # arrays are nobody's Fashion-MNIST; a split says itself what it is of
    if not all(isinstance(split, Split) for split in splits):
        config = dataclasses.replace(config, dataset="images")
    train, held_out = map(as_split, splits)
    if train.image_shape != held_out.image_shape:
        raise DataError(
            f"The training images have the shape {train.image_shape}, but those for validation "
            f"{held_out.image_shape}."
        )
    return config, options, train, as_trained(held_out, config)


def _features(
    config: TrainConfig, train: Split, device: torch.device, quiet: bool
) -> Features | None:
    """What validations measure FID in, if they do. Raises :class:`ConfigError` if nothing is."""

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    return features_for(config.dataset, train, device, say) if config.fid_samples else None


class Trainer:
    """What :func:`fit` does beside the steps: saving, validating, logging, showing progress."""

    def __init__(
        self,
        state: TrainState,
        options: RunOptions,
        train: Split,
        environment: Environment,
        quiet: bool,
        features: Features | None = None,
    ) -> None:
        self.state, self._options, self._train = state, options, train
        self._environment, self._quiet, self._features = environment, quiet, features

    def __enter__(self) -> Self:
        state, options = self.state, self._options
        with contextlib.ExitStack() as stack:
            # innermost last: logs and bar are closed when an error becomes a sentence
            self.tracker = stack.enter_context(
                Tracker(options.log_folder, state.step, options.tensorboard, self._mirror())
            )
            self.progress = stack.enter_context(Progress(state.step, state.num_steps, self._quiet))
            stack.enter_context(_memory_explained(state, self._train))
            self.keeper = Keeper(
                options.ckpt_folder, options.keep_ckpts, options.resume_ckpt, self.tracker.flush
            )
            # everything is open; from here on it is for __exit__ to close
            self._stack = stack.pop_all()
        # a kill may have come between the checkpoint and the tracker that --track names
        if state.step > 0:
            self.tracker.saved(state.step, state.best["step"])
        self._last_saved = time.monotonic()
        return self

    def _mirror(self) -> Mirror | None:
        state, options = self.state, self._options
        if options.track == "none":
            return None
        return Mirror(options, self._settings(), state.step, state.num_steps)

    def _settings(self) -> dict[str, object]:
        """What the run is, for people to read."""
        settings = in_effect(self.state.config.to_dict())
        if self._features:
            settings["FID"] = f"{self._features.name}: {self._features.protocol()}"
        return settings

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def begin(self, held_out: Split) -> None:
        """Say what is trained; log what a new run starts from."""
        config, options = self.state.config, self._options
        if not self._quiet:
            print(
                f"training {options.run} for {plural(config.epochs, 'epoch')} on "
                f"{plural(len(self._train), 'image')}, "
                f"{plural(torch.get_num_threads(), 'thread')}, {_device_of(self.state)}",
                flush=True,
            )
        if self.state.step == 0:
            self.tracker.pictures(0, input=held_out.pixels(slice(NUM_PICTURES)))
            command = train_command(config, options.run, options.data)
            self.tracker.configuration(command, self._settings())

    def after_step(self, should_stop: Callable[[], bool]) -> bool:
        """Log, save if it is time to; whether the run was asked to stop."""
        state = self.state
        self.progress.step(state.config.batch_size)
        if state.ends_epoch or state.step % self._options.log_interval == 0:
            self._log_training()
            # the log has waited for the steps so far, so the time of now is theirs
            if (images_per_second := self.progress.speed()) is not None:
                self.tracker.speed(state.step, images_per_second)
        # at the end of an epoch the validation comes first, and its checkpoint holds the losses
        due = time.monotonic() - self._last_saved >= self._options.ckpt_seconds
        if due and not state.ends_epoch:
            with self.progress.pause():
                self.save()
        return should_stop()

    def save(self, improved: bool = False, required: bool = False) -> None:
        """Save the state. If that fails, say so and continue, unless it is ``required``."""
        try:
            data = DataFacts.of(self._train, self._options.data)
            self.keeper.save(snapshot(self.state, data, self._environment), improved)
            self.tracker.saved(self.state.step, self.state.best["step"])
        except RunFolderError as error:
            if required:
                raise
            print(f"warning: {error} Training continues, unsaved.", file=sys.stderr, flush=True)
        self._last_saved = time.monotonic()

    def validate(self, loader: Batches, required: bool) -> None:
        """Evaluate, log and save.

        The best model is the one with the lowest total_loss, which for beta = 1 is the bound. With
        a low beta the bound would choose a model that has not learned to reconstruct yet, since
        learning to do so costs KL.
        """
        state, config = self.state, self.state.config
        # those of the end of training: the epochs are compared by one and the same objective
        beta, capacity = held_out_weights(config)
        losses = eval_epoch(
            state.model,
            loader,
            config.seed,
            beta,
            config.iwae_samples,
            config.fid_samples,
            capacity,
            self._features,
        )
        # finite steps do not imply it: validation sees images on which the weights may overflow
        if not math.isfinite(losses["bound"]):
            raise DivergedError(
                f"The validation bound after epoch {state.epoch} is {losses['bound']}: use a lower "
                "--learning-rate."
            )
        state.metrics = {"step": state.step, "epoch": state.epoch, **losses}
        improved = losses["total_loss"] < state.best["total_loss"]
        if improved:
            state.best = {name: state.metrics[name] for name in NO_BEST}
        self._log_validation(losses, loader)
        if state.step == state.num_steps:
            self._log_hyperparameters()
        self.save(improved, required)

    def result(self) -> FitResult:
        return FitResult(
            finished=self.state.step >= self.state.num_steps,
            state=self.state,
            latest=self.keeper.latest,
            best=self.keeper.best,
            log_folder=self._options.log_folder,
        )

    def _log_training(self) -> None:
        """A row of training losses, averaged over the steps since the last such row."""
        state = self.state
        losses = averages(state.sums[1])
        state.sums[1] = 0
        # of the step just taken: state.step is already the number of the next one
        last_step = state.step - 1
        rate = settings_at(state.config, last_step, state.steps_per_epoch).learning_rate
        epoch = math.ceil(state.step / state.steps_per_epoch)
        self.tracker.scalars("train", state.step, epoch, losses | {"learning_rate": rate})
        self.progress.logged(losses["bound"])

    def _log_validation(self, losses: Losses, loader: Batches) -> None:
        state, tracker = self.state, self.tracker
        tracker.scalars("validation", state.step, state.epoch, losses)
        images_BCHW = cast(SplitBatches, loader.dataset).split.pixels(slice(NUM_PICTURES))
        tracker.pictures(
            state.step,
            reconstruction=state.model.reconstruct(images_BCHW),
            # the same noise each time, so that one sees the same garments become clearer
            random_samples=state.model.sample(64, generator(state.config.seed, "pictures")),
        )
        # of the pictures only: a histogram does not need the whole split encoded once more
        with torch.no_grad():
            posteriors = Posteriors(*state.model.encode(images_BCHW))
        nats_Z = information_per_dimension(state.model, posteriors)
        tracker.kl_per_dimension(state.step, nats_Z)

    def _log_hyperparameters(self) -> None:
        state = self.state
        bounds = {"best_bound": state.best["bound"], "final_bound": state.metrics["bound"]}
        self.tracker.hyperparameters(state.config.to_dict(), bounds, state.step)


_WITH_DATA = {**TrainConfig().to_dict(), "dataset": "images"}


def train_command(config: TrainConfig, run: str, data: Path | str | None = None) -> str:
    """The command that trains such a run, other folders apart."""
    # only what differs from the defaults: a person is to read it
    changed = changed_options(config.to_dict(), TrainConfig().to_dict())
    if data is not None:  # which implies the data set
        changed = ["--data", str(data), *changed_options(config.to_dict(), _WITH_DATA)]
    return shlex.join(["vae-hyperband", "train", "--run", run, *changed])


def _device_of(state: TrainState) -> torch.device:
    return next(state.model.parameters()).device


@contextlib.contextmanager
def _memory_explained(state: TrainState, train: Split) -> Iterator[None]:
    """Turn an out-of-memory error into one that names a batch size that fits."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        device = _device_of(state)
        # tried, not computed: what a step needs depends on the device and its allocator
        size = batch_size_that_fits(state, train.image_shape, device)
        raise OutOfMemoryError(
            f"There is not enough memory on {device} for batches of {state.config.batch_size} "
            + (f"images: --batch-size {size} fits." if size else "images, nor for any smaller one.")
        ) from error
