"""What a search would do, without doing it: nothing is written, and Ray is not started."""

import collections
import dataclasses
import math
import os
import statistics

import numpy as np
import torch

from vae_hyperband.cluster import (
    Resources,
    check_resources,
    num_places,
    trial_device,
    with_gpus,
)
from vae_hyperband.config import RunOptions, in_effect
from vae_hyperband.data import Split
from vae_hyperband.draws import draw, num_random
from vae_hyperband.dry_run import a_line_each, busy, dry_run, seconds_per_step
from vae_hyperband.files import refuse_foreign
from vae_hyperband.journal import read_events
from vae_hyperband.process import cpu_threads, pick_device
from vae_hyperband.rules import Curve, verdicts
from vae_hyperband.search import DECISIONS, load_splits, search_there
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.trials import RESULT, describe, read_result

NUM_SHOWN = 12  # trials
NUM_IMAGINED = 20  # orders of the trials, over which the expected epochs are averaged


def search_dry_run(config: SearchConfig, options: SearchOptions) -> str:
    """The space, the first trials, the places they would run in, and the time, as text.

    Raises what :func:`~vae_hyperband.search.search` would raise for the data, and for what its
    folder holds; not what only a cluster knows.
    """
    shown, options = options, options.absolute()
    folder = options.ckpt_folder
    if folder.exists():
        refuse_foreign(folder)
    goes_on = not options.fresh and search_there(config, options) is not None
    train, _ = load_splits(config, options)
    usual = statistics.mean(expected_epochs(config, seed) for seed in range(NUM_IMAGINED))
    lines = [
        a_line_each(in_effect(config.to_dict())),
        *_trials(config),
        f"scheduler    {config.scheduler}: about {usual:.0f} epochs of the "
        f"{config.total_trials * config.max_epochs} that all trials to their ends would take",
        f"data         {len(train):,} training images {train.image_shape}",
        f"checkpoints  {shown.ckpt_folder}, logs {shown.log_folder}",
    ]
    done = 0
    if (folder / RESULT).exists() and goes_on:
        lines.append("state        finished: its result would be shown")
        done = config.total_trials * config.max_epochs
    elif goes_on:
        happened = collections.Counter(event["event"] for event in read_events(folder / DECISIONS))
        done = happened["result"]
        lines.append(
            f"state        begun: it would go on with {happened['end']} trials ended and {done} "
            "epochs trained"
        )
    elif options.fresh and folder.exists() and any(folder.iterdir()):
        lines.append("state        what is in the folder would be moved aside")
    if usual > done:
        lines += _time(config, options, train, usual - done)
    return "\n".join(lines)


def winner_dry_run(
    config: SearchConfig, options: SearchOptions, epochs: int, where: RunOptions
) -> str:
    """What training the winner in full would do; of a search that has not ended, trial 0's."""
    folder = options.ckpt_folder
    if search_there(config, options) and (folder / RESULT).exists():
        which, best = "the winner", read_result(folder).best_config
    else:
        which, best = "the winner; if it is trial 0", config.trial_config(draw(config, 0, []))
    what = dry_run(dataclasses.replace(best, epochs=epochs), where, advise=False)
    return f"== then train {which}, as {where.run}\n{what}"


def expected_epochs(config: SearchConfig, seed: int) -> int:
    """Epochs that a search trains if who is better at one rung is better at all of them.

    A function of (config, seed): the seed decides the order of the trials, from best to worst.
    """
    value_of = np.random.default_rng(seed).permutation(config.total_trials)
    curves = [Curve() for _ in range(config.total_trials)]
    while True:
        decided = verdicts(config, curves)
        going = [
            number
            for number, curve in enumerate(curves)
            if decided[number].action == "go on" and len(curve.values) < config.max_epochs
        ]
        if not going:
            return sum(len(curve.values) for curve in curves)
        for number in going:
            values = curves[number].values
            values[len(values) + 1] = float(value_of[number])


def _trials(config: SearchConfig) -> list[str]:
    """The first trials; TPE draws the later ones when it has seen how these do."""
    known = num_random(config) if config.algorithm == "tpe" else config.total_trials
    lines = [f"trials       {config.total_trials}, drawn by {config.algorithm}"]
    for number in range(min(known, NUM_SHOWN, config.total_trials)):
        lines.append(f"  {number:>3}        {describe(draw(config, number, []))}")
    if config.total_trials > min(known, NUM_SHOWN):
        lines.append("  ...")
    return lines


def _time(config: SearchConfig, options: SearchOptions, train: Split, epochs: float) -> list[str]:
    """Where the trials would run, and how long ``epochs`` of them take there."""
    if options.address:
        return [f"device       what the cluster at {options.address} has; it was not asked"]
    cpus, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    machines: list[Resources] = [{"CPU": cpus, "GPU": gpus}]
    options = with_gpus(options, machines)
    check_resources(machines, options)
    device, threads = pick_device(trial_device(options)), options.cpus_per_trial
    places = min(num_places(machines, options), config.total_trials)
    where = f"device       {device}, {places} trials side by side, CPU threads of each: {threads}"
    if options.engine == "packed":
        return [where, "training     no guess for --engine packed"]
    first, before = draw(config, 0, []), busy()
    with cpu_threads(threads):
        an_epoch = statistics.mean(
            math.ceil(len(train) / size)
            * seconds_per_step(config.trial_config(first | {"batch_size": size}), train, device)
            for size in config.batch_sizes
        )
    return [
        where,
        f"training     about {epochs * an_epoch / places:,.0f} s, {an_epoch:.1f} s an epoch; "
        "validation, and what trials side by side cost each other, on top",
        *before,
    ]
