"""The state of a run: what changes during training, and how a checkpoint stores and restores it.

A run is a pure function of its configuration and its data, so a state that was loaded continues
exactly as if it had never been saved.
"""

import contextlib
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vae_hyperband.common.config import (
    RESUME_MAY_CHANGE,
    RunOptions,
    TrainConfig,
    differences,
    model_settings,
    same_images,
    with_data,
)
from vae_hyperband.common.errors import CheckpointError, ResumeError
from vae_hyperband.common.process import Environment, own_modes
from vae_hyperband.data.splits import Split
from vae_hyperband.model.checkpoint import (
    BEST,
    Checkpoint,
    DataFacts,
    Metrics,
    copy_ckpt,
    load_ckpt,
)
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.vae import VAE
from vae_hyperband.training.keeper import newest_good, restore

ADAM_BETAS = (0.9, 0.99)  # 0.99, not 0.999: under 4,000 steps a longer memory lags the schedule

NO_BEST = {"total_loss": math.inf, "bound": math.inf, "step": 0, "epoch": 0}


@dataclass
class TrainState:
    """Everything that changes during training; a checkpoint stores it."""

    config: TrainConfig
    model: VAE
    optimizer: torch.optim.Optimizer
    num_images: int  # of the training split
    step: int = 0
    #: Running sums of (reconstruction, KL, total, images): row 0 since the epoch began, row 1 since
    #: the last row of the log. float64, on the model's device.
    sums: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2, 4, dtype=torch.float64))
    best: Metrics = dataclasses.field(default_factory=lambda: dict(NO_BEST))
    metrics: Metrics = dataclasses.field(default_factory=dict)  # of the last validation
    resumed_from: str | None = None  # digest of the checkpoint given by --resume_ckpt

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_images / self.config.batch_size)

    @property
    def epoch(self) -> int:
        """Epochs completed; the epoch under way has this number, counted from 0."""
        return self.step // self.steps_per_epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step was the last one of its epoch."""
        return self.step % self.steps_per_epoch == 0

    @property
    def num_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch


@own_modes()
def new_state(
    config: TrainConfig,
    image_shape: tuple[int, int, int],
    num_images: int,
    device: torch.device | str = "cpu",
) -> TrainState:
    """The state before the first step: weights sampled from the seed, AdamW without memory.

    ``image_shape`` is (C, H, W); ``num_images``, those of the training split, gives the number of
    steps of an epoch.
    """
    model = initialized_vae(
        image_size=image_shape[1:],
        channels=image_shape[0],
        seed=config.seed,
        **model_settings(config),
    ).to(device)
    return _state_of(config, model, num_images)


def _state_of(config: TrainConfig, model: VAE, num_images: int) -> TrainState:
    # fused: one kernel updates all parameters
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=ADAM_BETAS, fused=True
    )
    state = TrainState(config, model, optimizer, num_images)
    # on the model's device, so that adding to them does not wait for it
    state.sums = state.sums.to(next(model.parameters()).device)
    return state


def snapshot(state: TrainState, data: DataFacts, environment: Environment) -> Checkpoint:
    """The checkpoint of a state; ``environment`` is the one that computes the run."""
    config = state.config
    return Checkpoint(
        config=config,
        model_state=state.model.state_dict(),
        optimizer_state=state.optimizer.state_dict(),
        schedule={"name": config.schedule, "num_steps": state.num_steps},
        epoch=state.epoch,
        step=state.step,
        sums=state.sums,
        best=state.best,
        metrics=state.metrics,
        data=data,
        environment=environment,
        resumed_from=state.resumed_from,
    )


def _named(facts: DataFacts) -> dict[str, object]:
    """What makes the data the same, as a message says it."""
    return {f"data's {name}": value for name, value in facts.identity.items()}


def with_known_data(config: TrainConfig, options: RunOptions) -> tuple[TrainConfig, RunOptions]:
    """The run's settings with its images: those of ``--data``, else those that it began with.

    Raises :class:`ConfigError` if they contradict the configuration.
    """
    # "fashion-mnist" is also what a command has that names no images
    if options.data is None and config.dataset in ("fashion-mnist", "images"):
        found, _ = _ckpt_found(options)
        if found and found.config.dataset == "images" and found.data.path:
            if not os.path.exists(found.data.path):
                raise CheckpointError(
                    f"The images that {found.path} was trained on are no longer at "
                    f"{found.data.path}: give --data, their folder or file."
                )
            options = dataclasses.replace(options, data=Path(found.data.path))
            config = same_images(config, found.config.data_settings())
    return with_data(config, options.data), options


def first_state(
    config: TrainConfig,
    options: RunOptions,
    train: Split,
    device: torch.device,
    where: Environment,
    quiet: bool,
) -> TrainState:
    """A new state, or the one in the checkpoint that this run continues from.

    ``where`` is the environment that computes the run.
    """
    found, given = ckpt_to_resume(config, options, train)
    if found is None:
        return new_state(config, train.image_shape, len(train), device)
    state = _state_of(config, found.model(device), len(train))
    state.optimizer.load_state_dict(found.optimizer_state)
    state.step, state.sums = found.step, found.sums.to(device)
    state.metrics = found.metrics
    # remembered, so that the same command a second time continues instead of starting over
    state.resumed_from = found.digest if given else found.resumed_from
    if given:
        _bring_best_along(found, options.ckpt_folder)
    state.best = NO_BEST | restore(options.ckpt_folder, found)
    if not quiet:
        print(
            f"resuming {options.run} at step {state.step} of {state.num_steps} "
            f"(epoch {state.step / state.steps_per_epoch:.2f}) from {found.path}",
            flush=True,
        )
        changed = differences(found.environment, where)
        if changed:
            print(
                "note: not the machine class it was started on, so the result is the same only "
                f"statistically, not bit for bit ({'; '.join(changed)})",
                file=sys.stderr,
            )
    return state


def ckpt_to_resume(
    config: TrainConfig, options: RunOptions, train: Split
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run continues from, and whether --resume_ckpt named it.

    Raises :class:`ResumeError` if it is of another run than this one, or of more epochs.
    """
    found, given = _ckpt_found(options)
    if found:
        _check_same_run(config, found, train)
        if not found.optimizer_state:
            raise ResumeError(
                f"{found.path} is a model of the package, without its optimizer's state, so it "
                "cannot be trained further: train its --preset instead."
            )
        # more epochs stretch the schedule; fewer would make steps that are taken undone
        epochs = found.step / math.ceil(len(train) / config.batch_size)
        if epochs > config.epochs:
            raise ResumeError(
                f"{found.path} was trained for {epochs:.2f} epochs already, more than --epochs "
                f"{config.epochs}: give more epochs, or choose another --run."
            )
    return found, given


def _ckpt_found(options: RunOptions) -> tuple[Checkpoint | None, bool]:
    given = options.resume_ckpt
    asked = load_ckpt(given) if given else None
    found = newest_good(options.ckpt_folder)
    if given is None or asked is None:
        return found, False
    if found:
        if found.resumed_from == asked.digest:
            return found, False  # the same command a second time: continue, do not start over
        if found.digest != asked.digest:
            raise ResumeError(
                f"{found.path} (step {found.step}) would be lost by going on from {given} (step "
                f"{asked.step}): choose another --run to keep both, or leave out --resume_ckpt "
                "to go on with the former."
            )
    return asked, True


def _check_same_run(config: TrainConfig, found: Checkpoint, train: Split) -> None:
    old = {**found.config.to_dict(), **_named(found.data)}
    new = {**config.to_dict(), **_named(DataFacts.of(train))}
    # these decide how far the run goes and what is looked at, not what a step computes
    for name in RESUME_MAY_CHANGE:
        old.pop(name), new.pop(name)
    if changed := differences(old, new):
        raise ResumeError(
            f"{found.path} was trained with other settings ({'; '.join(changed)}): give the same "
            "ones to continue, or choose another --run to start over."
        )


def _bring_best_along(given: Checkpoint, folder: Path) -> None:
    """A run continued in a new folder keeps its best checkpoint so far, if that can be found."""
    source = given.path.parent
    best, step = source / BEST, given.best.get("step", 0)
    # it is here already, there is none yet, or the given checkpoint is the best itself
    if source.resolve() == folder.resolve() or step in (0, given.step):
        return
    with contextlib.suppress(CheckpointError):
        if load_ckpt(best).step == step:
            copy_ckpt(best, folder / BEST)
            return
    print(
        f"note: the best checkpoint so far, of step {step}, is not at {best}; the best of this run "
        "will be one from here on.",
        file=sys.stderr,
        flush=True,
    )
