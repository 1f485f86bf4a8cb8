"""What a search would do, as text: nothing is written, and Ray is not started."""

import collections
import dataclasses
import math
import statistics

import torch

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.files import refuse_foreign
from vae_hyperband.common.process import cpu_threads, pick_device
from vae_hyperband.data.splits import Split
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.decisions import read_events
from vae_hyperband.search.space import describe
from vae_hyperband.search.suggest import num_random, suggest
from vae_hyperband.search.trials import DECISIONS, RESULT, read_result
from vae_hyperband.training.dry_run import a_line_each, busy, dry_run, seconds_per_step
from vae_hyperband.tune.driver import existing_search, load_splits, with_known_data
from vae_hyperband.tune.session import (
    Resources,
    check_resources,
    local_cpus,
    num_concurrent,
    quota_note,
    trial_device,
    with_gpus,
)

NUM_SHOWN = 12  # trials: enough to see the space, and it fits on a screen


def search_dry_run(config: SearchConfig, options: SearchOptions) -> str:
    """The space, the first trials, where they would run, and for how long, as text.

    Raises what :func:`~vae_hyperband.tune.driver.search` would raise for the data and for the
    content of its folder, but not what only a running cluster can tell.
    """
    shown, options = options, options.absolute()
    folder = options.ckpt_folder
    if folder.exists():
        refuse_foreign(folder)
    config, options = with_known_data(config, options)
    resumes = _resumes(config, options)
    train, _ = load_splits(config, options)
    most = plural(config.total_trials * config.max_epochs, "epoch")
    fewer = "" if config.scheduler == "none" else ", fewer with early stopping"
    lines = [
        a_line_each(config.in_effect()),
        *_trials(config),
        f"scheduler    {config.scheduler}: at most {most}{fewer}",
        f"data         {len(train):,} training images {train.image_shape}",
        # as given: relative paths are shorter, and what the user will look for
        f"checkpoints  {shown.ckpt_folder}, logs {shown.log_folder}",
        *_state(options, resumes),
    ]
    # measuring takes seconds, and a finished search would train nothing
    if not (resumes and (folder / RESULT).exists()):
        lines += _time(config, options, train)
    return "\n".join(lines)


def _resumes(config: SearchConfig, options: SearchOptions) -> bool:
    return not options.fresh and existing_search(config, options) is not None


def _state(options: SearchOptions, resumes: bool) -> list[str]:
    """What would happen to what the search's folder holds; no line for an empty one."""
    folder = options.ckpt_folder
    if resumes and (folder / RESULT).exists():
        return ["state        finished: its result would be shown"]
    if resumes:
        counts = collections.Counter(event["event"] for event in read_events(folder / DECISIONS))
        return [
            f"state        begun: it would resume with {plural(counts['end'], 'trial')} ended and "
            f"{plural(counts['result'], 'epoch')} trained"
        ]
    if options.fresh and folder.exists() and any(folder.iterdir()):
        return ["state        the existing folder would be moved aside"]
    return []


def winner_dry_run(
    config: SearchConfig, options: SearchOptions, epochs: int, where: RunOptions
) -> str:
    """What training the winner in full would do; before it is known, as if trial 0 had won."""
    folder = options.ckpt_folder
    if _resumes(config, options) and (folder / RESULT).exists():
        which, best = "the winner", read_result(folder).best_config
    else:
        which, best = "the winner; if it is trial 0", config.trial_config(suggest(config, 0, []))
    if options.fresh and where.ckpt_folder.exists():
        what = "state        the existing folder would be moved aside"
    else:
        what = dry_run(dataclasses.replace(best, epochs=epochs), where, advise=False)
    return f"== then train {which}, as {where.run}\n{what}"


def _trials(config: SearchConfig) -> list[str]:
    """The first trials, as far as they are known now."""
    # TPE suggests the later ones when it has seen the results of these
    known = num_random(config) if config.algorithm == "tpe" else config.total_trials
    lines = [f"trials       {config.total_trials}, suggested by {config.algorithm}"]
    for number in range(min(known, NUM_SHOWN, config.total_trials)):
        lines.append(f"  {number:>3}        {describe(suggest(config, number, []))}")
    if config.total_trials > min(known, NUM_SHOWN):
        lines.append("  ...")
    return lines


def _time(config: SearchConfig, options: SearchOptions, train: Split) -> list[str]:
    """Where the trials would run, and how long an epoch takes there, measured on a few steps."""
    if options.address:
        return [
            f"device       what the cluster at {options.address} provides; it was not contacted"
        ]
    cpus, gpus = local_cpus(options), torch.cuda.device_count()
    machines: list[Resources] = [{"CPU": cpus, "GPU": gpus}]
    options = with_gpus(options, machines)
    check_resources(machines, options)
    device, threads = pick_device(trial_device(options)), options.cpus_per_trial
    parallel = min(num_concurrent(machines, options), config.total_trials)
    trials = plural(parallel, "trial")
    where = f"device       {device}, {trials} in parallel, CPU threads of each: {threads}"
    first, before = suggest(config, 0, []), busy()
    # the mean over batch sizes, which decide how many steps an epoch has; of a range, its ends
    with cpu_threads(threads):
        an_epoch = statistics.mean(
            math.ceil(len(train) / trial.batch_size) * seconds_per_step(trial, train, device)
            for size in config.batch_sizes_tried
            for trial in [config.trial_config(first.replace(batch_size=size))]
        )
    return [
        where,
        *(f"note         {note}" for note in quota_note(options)),
        f"training     {an_epoch:.1f} s an epoch, measured on one trial alone, without validation "
        "and the slowdown of parallel trials",
        *before,
    ]
