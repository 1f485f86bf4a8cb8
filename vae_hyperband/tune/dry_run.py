"""What a search would do, without doing it: nothing is written, and Ray is not started."""

import collections
import dataclasses
import math
import os
import statistics

import torch

from vae_hyperband.common.config import RunOptions, in_effect
from vae_hyperband.common.files import refuse_foreign
from vae_hyperband.common.process import cpu_threads, pick_device
from vae_hyperband.data.splits import Split
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.decisions import read_events
from vae_hyperband.search.suggest import num_random, suggest
from vae_hyperband.search.trials import RESULT, describe, read_result
from vae_hyperband.training.dry_run import a_line_each, busy, dry_run, seconds_per_step
from vae_hyperband.tune.driver import DECISIONS, load_splits, search_there
from vae_hyperband.tune.session import (
    Resources,
    check_resources,
    num_places,
    trial_device,
    with_gpus,
)

NUM_SHOWN = 12  # trials


def search_dry_run(config: SearchConfig, options: SearchOptions) -> str:
    """The space, the first trials, the places they would run in, and the time, as text.

    Raises what :func:`~vae_hyperband.tune.driver.search` would raise for the data, and for what its
    folder holds; not what only a cluster knows.
    """
    shown, options = options, options.absolute()
    folder = options.ckpt_folder
    if folder.exists():
        refuse_foreign(folder)
    goes_on = not options.fresh and search_there(config, options) is not None
    train, _ = load_splits(config, options)
    most = config.total_trials * config.max_epochs
    lines = [
        a_line_each(in_effect(config.to_dict())),
        *_trials(config),
        f"scheduler    {config.scheduler}: at most {most} epochs, fewer by what it stops early",
        f"data         {len(train):,} training images {train.image_shape}",
        f"checkpoints  {shown.ckpt_folder}, logs {shown.log_folder}",
    ]
    finished = (folder / RESULT).exists() and goes_on
    if finished:
        lines.append("state        finished: its result would be shown")
    elif goes_on:
        happened = collections.Counter(event["event"] for event in read_events(folder / DECISIONS))
        lines.append(
            f"state        begun: it would go on with {happened['end']} trials ended and "
            f"{happened['result']} epochs trained"
        )
    elif options.fresh and folder.exists() and any(folder.iterdir()):
        lines.append("state        what is in the folder would be moved aside")
    if not finished:
        lines += _time(config, options, train)
    return "\n".join(lines)


def winner_dry_run(
    config: SearchConfig, options: SearchOptions, epochs: int, where: RunOptions
) -> str:
    """What training the winner in full would do; of a search that has not ended, trial 0's."""
    folder = options.ckpt_folder
    if search_there(config, options) and (folder / RESULT).exists():
        which, best = "the winner", read_result(folder).best_config
    else:
        which, best = "the winner; if it is trial 0", config.trial_config(suggest(config, 0, []))
    what = dry_run(dataclasses.replace(best, epochs=epochs), where, advise=False)
    return f"== then train {which}, as {where.run}\n{what}"


def _trials(config: SearchConfig) -> list[str]:
    """The first trials; TPE draws the later ones when it has seen how these do."""
    known = num_random(config) if config.algorithm == "tpe" else config.total_trials
    lines = [f"trials       {config.total_trials}, drawn by {config.algorithm}"]
    for number in range(min(known, NUM_SHOWN, config.total_trials)):
        lines.append(f"  {number:>3}        {describe(suggest(config, number, []))}")
    if config.total_trials > min(known, NUM_SHOWN):
        lines.append("  ...")
    return lines


def _time(config: SearchConfig, options: SearchOptions, train: Split) -> list[str]:
    """Where the trials would run, and how long an epoch takes there."""
    if options.address:
        return [f"device       what the cluster at {options.address} has; it was not asked"]
    cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    machines: list[Resources] = [{"CPU": cpus, "GPU": gpus}]
    options = with_gpus(options, machines)
    check_resources(machines, options)
    device, threads = pick_device(trial_device(options)), options.cpus_per_trial
    places = min(num_places(machines, options), config.total_trials)
    where = f"device       {device}, {places} trials side by side, CPU threads of each: {threads}"
    first, before = suggest(config, 0, []), busy()
    with cpu_threads(threads):
        an_epoch = statistics.mean(
            math.ceil(len(train) / size)
            * seconds_per_step(config.trial_config(first | {"batch_size": size}), train, device)
            for size in config.batch_sizes
        )
    return [
        where,
        f"training     {an_epoch:.1f} s an epoch, measured on one trial by itself; validation, and "
        "what trials side by side cost each other, on top",
        *before,
    ]
