"""A study: many configurations, each trained and evaluated once, in one table.

The same call continues after a stop: nothing is trained or evaluated a second time. Choose between
configurations on the validation split; the test split is for the numbers that are published.
"""

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import Places, RunOptions, TrainConfig, in_effect
from vae_hyperband.common.errors import OutOfMemoryError
from vae_hyperband.common.files import make_folder, write_text
from vae_hyperband.common.process import (
    EXIT_STOPPED,
    available_cpus,
    cpu_threads,
    pick_device,
    stop_flag,
)
from vae_hyperband.data.splits import SplitName, split_for
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate_once
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.model.checkpoint import Metrics
from vae_hyperband.model.networks import allow_network, allowed_networks
from vae_hyperband.training.dry_run import a_line_each, busy, seconds_per_step, steps_and_done
from vae_hyperband.training.loop import fit

Row = dict[str, Any]  # of one run: its configuration, and measures by name, each with its error

#: Measures of an evaluation: their names in a row, and their keys in evaluation.json.
MEASURES: dict[str, tuple[str, ...]] = {
    "bound": ("bound",),
    "recon_loss": ("recon_loss",),
    "KL_divergence": ("KL_divergence",),
    "iwae": ("iwae",),
    "linear_probe": ("latents", "linear_probe"),
    "knn_probe": ("latents", "knn_probe"),
    "raw_linear_probe": ("latents", "raw_pixels", "linear_probe"),
    "raw_knn_probe": ("latents", "raw_pixels", "knn_probe"),
    "active_units": ("latents", "active_units"),
    "mig": ("latents", "factors", "mig"),
    "factor_vae_score": ("latents", "factors", "factor_vae_score"),
    "dci": ("latents", "factors", "dci", "disentanglement"),
    **{
        f"{measure}_{source}": ("images", source, measure)
        for measure in (
            "fid",
            "kid",
            "precision",
            "recall",
            "density",
            "coverage",
            "closer_than_held_out",
        )
        for source in ("real", "reconstructions", "prior", "mixture", "flow")
    },
}


def run_study(
    configs: dict[str, TrainConfig],
    places: Places,
    split: SplitName,
    options: EvaluateOptions,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row] | None:
    """Train and evaluate every configuration; None if told to stop (the same call continues).

    The run of a configuration is called ``places.run``, a hyphen, and its key in ``configs``.
    Writes study.json to the log folder after each run.
    """
    rows: list[Row] = []
    make_folder(places.log_folder)
    for number, (name, config) in enumerate(configs.items(), start=1):
        say(f"run {number} of {len(configs)}: {name}")
        where = _run_options(places, name)
        # a run that is trained returns at once, so a second call costs only its evaluation
        trained = fit(config, where, should_stop=should_stop, quiet=True)
        if not trained.finished or should_stop():
            return None
        evaluation = evaluate_once(
            trained.log_folder / f"evaluation-{split}.json",
            trained.best,
            split,
            places,
            options,
        )
        rows.append(row_of(name, evaluation))
        # after every run, so that a stopped study can be looked at
        write_rows(rows, split, places.log_folder / "study.json")
    return rows


def _run_options(places: Places, name: str) -> RunOptions:
    """Where the run of the configuration with that name is computed."""
    return RunOptions(**places.options(f"{places.run}-{name}"), track_group=places.run)


def train_side_by_side(
    configs: dict[str, TrainConfig],
    places: Places,
    jobs: int,
    should_stop: Callable[[], bool],
    on_trained: Callable[[str, Metrics], None],
) -> bool:
    """Train the runs of a study, ``jobs`` of them at a time; False if told to stop.

    Each run has a process with one thread. ``on_trained`` is called with each name and the losses
    of its last validation, in the order of ``configs``. If told to stop, or if a run raises, the
    other runs save and stop; then the same call continues.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vae-hyperband-") as folder,
        # spawned, not forked: a fork of a process with PyTorch's threads may hang
        ProcessPoolExecutor(min(jobs, len(configs)), get_context("spawn")) as pool,
    ):
        # a file, not an Event: a spawned worker could hold an Event in a module global only
        stop_file = Path(folder) / "stop"
        try:
            runs = {
                name: pool.submit(
                    _train,
                    config,
                    # one thread each: bits depend on their number, and the runs share the cores
                    dataclasses.replace(_run_options(places, name), num_threads=1),
                    stop_file,
                    os.getpid(),
                    allowed_networks(),
                )
                for name, config in configs.items()
            }
            for name, run in runs.items():
                while not run.done():
                    wait([run], timeout=0.2)
                    if should_stop():
                        return False
                    # also those that are not waited for yet: one that failed stops the others
                    for ended in filter(Future.done, runs.values()):
                        ended.result()  # raises what ended it
                losses = run.result()
                if losses is None:
                    return False
                on_trained(name, losses)
            return True
        except BrokenExecutor as error:
            if should_stop():  # Ctrl-C reached a process before it could handle signals
                return False
            raise OutOfMemoryError(
                "A training process was killed, perhaps for lack of memory: the same command "
                "continues."
            ) from error
        finally:
            stop_file.touch()
            pool.shutdown(cancel_futures=True)  # waits for the runs that are saving


def _train(
    config: TrainConfig,
    options: RunOptions,
    stop_file: Path,
    parent: int,
    networks: dict[str, str],
) -> Metrics | None:
    """Train one run in a worker process: its last losses, or None if it was stopped.

    Ctrl-C in a terminal reaches every process, other signals only the parent, which then creates
    the stop file. If the parent was killed, the worker saves and ends: nobody waits for it.
    """
    for network, folder in networks.items():
        allow_network(network, folder)
    with stop_flag() as signalled:
        trained = fit(
            config,
            options,
            should_stop=lambda: signalled() or os.path.exists(stop_file) or os.getppid() != parent,
            quiet=True,
        )
    # the pool's own threads would wait for a parent that is gone
    if os.getppid() != parent:
        os._exit(EXIT_STOPPED)
    return dict(trained.state.metrics) if trained.finished else None


def study_dry_run(
    configs: dict[str, TrainConfig], places: Places, split: SplitName, jobs: int = 1
) -> str:
    """What :func:`run_study` would train, and how long that takes, as text; nothing is written.

    Raises what it would raise for the device, the data, and runs of other settings.
    """
    device, before = pick_device(places.device), busy()
    one = next(iter(configs.values()))
    train = split_for(one, places, "train")
    lines, seconds, speeds = [], 0.0, dict[int, float]()
    with cpu_threads(None if jobs == 1 else 1):  # as the runs have them
        threads = torch.get_num_threads()
        for name, config in configs.items():
            where = _run_options(places, name)
            num_steps, done = steps_and_done(config, where, train)
            # of the grid's settings only the latent dimension changes the cost of a step
            if done < num_steps and config.latent_dim not in speeds:
                speeds[config.latent_dim] = seconds_per_step(config, train, device)
            seconds += (num_steps - done) * speeds.get(config.latent_dim, 0)
            lines.append(f"  {where.run:24} {done:,} of {plural(num_steps, 'step')} done")
    jobs = min(jobs, len(configs))
    # more jobs than cores are no faster
    seconds /= min(jobs, available_cpus())
    shared = {
        setting: value
        for setting, value in in_effect(one.to_dict()).items()
        if all(getattr(config, setting) == value for config in configs.values())
    }
    order, each = ("one after the other", "") if jobs == 1 else (f"{jobs} side by side", " each")
    return "\n".join(
        [
            a_line_each(shared),
            f"runs         {len(configs)}, {order}, evaluated on the {split} split",
            *lines,
            f"device       {device}, {plural(threads, 'CPU thread') + each}",
            f"data         {plural(len(train), 'training image')} {train.image_shape}",
            f"logs         {places.log_folder}",
            f"training     about {seconds:,.0f} s; validation and evaluation on top",
            *before,
        ]
    )


def row_of(name: str, evaluation: Evaluation) -> Row:
    """The measures of an evaluation in one flat row; those that it lacks are left out."""
    content = evaluation.to_dict()
    row: Row = {"name": name, "config": evaluation.config}
    if evaluation.images:
        row["fid_name"] = evaluation.images.fid_name
    for measure, way in MEASURES.items():
        value: Any = content
        for step in way:
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, dict):  # an estimate with its error
            value = {part: value[part] for part in ("mean", "standard_error")}
        if value is not None:
            row[measure] = value
    return row


def write_rows(rows: list[Row], split: SplitName, path: Path) -> None:
    content = {"split": split, "rows": rows}
    write_text(path, json.dumps(content, indent=1) + "\n")


def value_of(row: Row, measure: str) -> float:
    """A measure's estimate; NaN where the row lacks it."""
    value = row.get(measure, math.nan)
    return float(value["mean"] if isinstance(value, dict) else value)


def over_seeds(rows: Iterable[Row], measure: str) -> dict[str, float]:
    """Mean over runs that differ in their seed, and half of its 95% interval (Student's t)."""
    from scipy.special import stdtrit  # half a second, which a search need not wait for

    values = [value_of(row, measure) for row in rows]
    # one seed has no spread: NaN, not a bar of length 0
    half = math.nan
    if len(values) > 1:
        # of Student's t: for three seeds the normal distribution's 1.96 would be less than half
        quantile = float(stdtrit(len(values) - 1, 0.975))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half_interval": half, "n": len(values)}


def grouped(rows: list[Row]) -> list[list[Row]]:
    """Runs that differ in their seed only, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        # equal but for the seed: what differs within a group is chance
        key = json.dumps({**row["config"], "seed": None}, sort_keys=True)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
