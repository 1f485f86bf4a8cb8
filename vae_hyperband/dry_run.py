"""What a training would do, without doing it: nothing is written."""

import json
import math
import time

import torch

from vae_hyperband.config import RunOptions, TrainConfig
from vae_hyperband.data import Split, as_trained, get_dataloader, load_split
from vae_hyperband.keeping import newest_good
from vae_hyperband.process import cpu_threads, pick_device
from vae_hyperband.state import TrainState, new_state
from vae_hyperband.training import train_command, train_epoch

TRIAL_SECONDS = 2.0  # of training, on a model that is thrown away


def dry_run(config: TrainConfig, options: RunOptions) -> str:
    """The configuration, where it would be computed, and how long it would take, as text.

    Raises what :func:`~vae_hyperband.training.fit` would raise for the configuration, the device,
    the data and damaged checkpoints.
    """
    device = pick_device(options.device)
    with cpu_threads(options.num_threads):
        train = as_trained(load_split("train", options.data_dir, config.dataset), config.to_dict())
        num_steps = config.epochs * math.ceil(len(train) / config.batch_size)
        found = newest_good(options.ckpt_folder)
        done = found[1]["step"] if found else 0
        seconds = _seconds_per_step(config, train, device)
        left = max(num_steps - done, 0)
        lines = [
            json.dumps(config.to_dict(), indent=2),
            f"command      {train_command(config, options.run)}",
            f"device       {device}, {torch.get_num_threads()} CPU threads",
            f"data         {len(train):,} training images {train.image_shape}",
            f"checkpoints  {options.ckpt_folder}, logs {options.log_folder}",
            f"steps        {num_steps:,}"
            + (f", of which {done:,} are done: it would go on" if done else ""),
            f"training     about {left * seconds:,.0f} s, {config.batch_size / seconds:,.0f} "
            "images/s; validation and pictures on top",
            "Nothing was written.",
        ]
    return "\n".join(lines)


def _seconds_per_step(config: TrainConfig, train: Split, device: torch.device) -> float:
    """Of training, by trying it on a new model."""
    state = new_state(config, train.image_shape, len(train), device)
    loader = get_dataloader(train, config.batch_size, seed=config.seed, shuffle=True, device=device)
    times = [time.monotonic()]

    def on_step(_: TrainState) -> bool:
        times.append(time.monotonic())
        return times[-1] - times[0] > TRIAL_SECONDS or len(times) > 200

    train_epoch(state, loader, on_step)
    float(state.sums.sum())  # a GPU is asked for what it has been given
    steady = times[len(times) // 3 :] if len(times) > 5 else times  # the first ones are slower
    return (time.monotonic() - steady[0]) / max(len(steady) - 1, 1)
