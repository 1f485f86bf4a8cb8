"""What a training would do, without doing it: nothing is written."""

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Mapping

import torch

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import RunOptions, TrainConfig, changed_options, in_effect
from vae_hyperband.common.process import cpu_threads, pick_device
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split, split_for
from vae_hyperband.evaluation.features import check_features
from vae_hyperband.training.loop import train_command, train_epoch
from vae_hyperband.training.state import (
    TrainState,
    ckpt_to_resume,
    new_state,
    with_known_data,
)

NOTHING_WRITTEN = "Nothing was written."
TRIAL_SECONDS = 2.0  # of training, on a model that is thrown away


def dry_run(config: TrainConfig, options: RunOptions, advise: bool = True) -> str:
    """The configuration, where it would be computed, and how long it would take, as text.

    ``advise``: suggest fewer threads when the machine is busy.

    Raises what :func:`~vae_hyperband.training.loop.fit` would raise for the configuration, the
    device, the data, and a run of that name with other settings.
    """
    device = pick_device(options.device)
    config, options = with_known_data(config, options)
    # looked at first: the measurement below is a load, too
    before = busy(advise and options.num_threads is None)
    with cpu_threads(options.num_threads):
        train = split_for(config, options, "train")
        if config.fid_samples:
            check_features(config.dataset, train)
        num_steps, done = steps_and_done(config, options, train)
        seconds = seconds_per_step(config, train, device)
        lines = [
            a_line_each(in_effect(config.to_dict())),
            f"command      {_command(config, options)}",
            f"device       {device}, {plural(torch.get_num_threads(), 'CPU thread')}",
            f"data         {plural(len(train), 'training image')} {train.image_shape}",
            f"checkpoints  {options.ckpt_folder}, logs {options.log_folder}",
            f"steps        {num_steps:,} in {plural(config.epochs, 'epoch')}"
            + _state(num_steps, done),
            f"training     about {(num_steps - done) * seconds:,.0f} s, "
            f"{config.batch_size / seconds:,.0f} images/s; validation and pictures on top",
            *before,
        ]
    return "\n".join(lines)


def steps_and_done(config: TrainConfig, options: RunOptions, train: Split) -> tuple[int, int]:
    """How many steps a run takes, and how many of them it has taken.

    Raises :class:`ResumeError` where a run of that name has other settings.
    """
    found, _ = ckpt_to_resume(config, options, train)
    num_steps = config.epochs * math.ceil(len(train) / config.batch_size)
    return num_steps, found.step if found else 0


def _command(config: TrainConfig, options: RunOptions) -> str:
    """The command that trains this, in this place."""
    given, usual = (dataclasses.asdict(which) for which in (options, RunOptions()))
    given["run"] = usual["run"]  # train_command has it
    given["data"] = None  # as it has the data
    command = train_command(config, options.run, options.data)
    return " ".join([command, *map(shlex.quote, changed_options(given, usual))])


def _state(num_steps: int, done: int) -> str:
    if done >= num_steps:
        return ", all of which are done: nothing would be trained"
    return f", {done:,} of them done: it would go on" if done else ""


def busy(advise: bool = False) -> list[str]:
    """A note where other programs use this machine's cores: what is measured is slower then."""
    if not hasattr(os, "getloadavg"):  # Windows
        return []
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load < cores / 2:
        return []
    note = f"note         the load of {plural(cores, 'core')} was {load:.1f} over the last minute"
    if advise:
        note += ": beside other programs, --num-threads 1 may be several times faster"
    return [note]


def a_line_each(settings: Mapping[str, object]) -> str:
    """JSON with one line for each setting."""
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in settings.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def seconds_per_step(config: TrainConfig, train: Split, device: torch.device) -> float:
    """Of training, by trying it on a new model."""
    # a model of its own: measuring must not train the run that it is about
    state = new_state(config, train.image_shape, len(train), device)
    loader = get_dataloader(train, config.batch_size, seed=config.seed, shuffle=True, device=device)
    times = [time.monotonic()]

    def on_step(_: TrainState) -> bool:
        times.append(time.monotonic())
        return times[-1] - times[0] > TRIAL_SECONDS or len(times) > 200

    # by the real loop: what it costs besides the step is a part of the time
    train_epoch(state, loader, on_step)
    float(state.sums.sum())  # a GPU is asked for what it has been given
    steady = times[len(times) // 3 :] if len(times) > 5 else times  # the first ones are slower
    return (time.monotonic() - steady[0]) / max(len(steady) - 1, 1)
