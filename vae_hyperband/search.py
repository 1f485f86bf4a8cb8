"""Hyperparameter search: Ray Tune runs the trials, ASHA or HyperBand stops the worse ones early.

A trial is :func:`vae_hyperband.training.fit` with one CPU thread, nothing else; so what the search
reports for a configuration is what training it alone gives. Trials are compared on the validation
bound at beta = 1, never on the training loss, and the test split is never opened.

A search is a folder, ``checkpoints/<run>/``: ``search.json`` (what was asked for), ``trials/``
(Ray's own state), and at the end ``trials.json`` (every curve), ``best_config.json`` and
``winner.pt``.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read by Ray when it is imported: no usage report, no duplicate logs, no advice between our lines.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    TrialScheduler,
)

from vae_hyperband.checkpoint import BEST, LATEST, copy_ckpt, write_text
from vae_hyperband.config import (
    RunOptions,
    SearchConfig,
    SearchOptions,
    TrainConfig,
    differences,
    read_json,
)
from vae_hyperband.data import load_split
from vae_hyperband.errors import SearchError
from vae_hyperband.process import environment, make_folder, only_writer, pick_device
from vae_hyperband.training import TrainState, fit
from vae_hyperband.trials import METRIC, SearchResult, TrialRecord, describe, read_result


def space(config: SearchConfig) -> dict[str, Any]:
    """The search space in Ray Tune's terms."""
    return {
        "latent_dim": tune.choice(list(config.latent_dims)),
        "learning_rate": tune.loguniform(*config.learning_rates),
        "batch_size": tune.choice(list(config.batch_sizes)),
        "beta": tune.choice(list(config.betas)),
    }


def draw_trials(config: SearchConfig) -> list[dict[str, Any]]:
    """The hyperparameters of every trial, a function of the space and the seed alone.

    Trial 0 is the default configuration, so that a search never ends below it; its values are taken
    from the space where the space does not contain them.
    """
    random = np.random.RandomState(config.seed)
    default, domains = TrainConfig(), space(config)
    low, high = config.learning_rates
    first = {
        "latent_dim": _default_or_first(default.latent_dim, config.latent_dims),
        "learning_rate": min(max(default.learning_rate, low), high),
        "batch_size": _default_or_first(default.batch_size, config.batch_sizes),
        "beta": _default_or_first(default.beta, config.betas),
    }
    drawn = [
        {name: domain.sample(random_state=random) for name, domain in domains.items()}
        for _ in range(config.num_trials - 1)
    ]
    return [first, *drawn]


def _default_or_first(default: Any, choices: tuple[Any, ...]) -> Any:
    return default if default in choices else choices[0]


def train_trial(
    trial: dict[str, Any], *, config: SearchConfig, options: SearchOptions, device: str
) -> None:
    """One trial, in a process of Ray's: train, report each validation with its checkpoint."""
    name = tune.get_context().get_trial_name()
    with tempfile.TemporaryDirectory() as scratch:
        run = RunOptions(
            run=name,
            device=device,
            data_dir=options.data_dir,
            checkpoints_dir=Path(scratch),
            logs_dir=options.log_folder,
            num_threads=options.cpus_per_trial,
        )
        make_folder(run.ckpt_folder)
        if started := tune.get_checkpoint():
            with started.as_directory() as folder:
                for file in (LATEST, BEST):
                    copy_ckpt(Path(folder) / file, run.ckpt_folder / file)

        def report(state: TrainState) -> None:
            tune.report(dict(state.metrics), checkpoint=tune.Checkpoint(str(run.ckpt_folder)))

        fit(config.trial_config(trial["drawn"]), run, on_validation=report, quiet=True)


def search(config: SearchConfig, options: SearchOptions | None = None) -> SearchResult | None:
    """Run a search to its end, from where its folder says it is; None if it was told to stop.

    The same call goes on after a stop. Raises :class:`SearchError` and the data's errors.
    """
    options = _absolute(options or SearchOptions())
    folder = options.ckpt_folder
    with only_writer(folder):
        _check_same_search(config, folder)
        if not (folder / "trials.json").exists():
            # a user's mistake about the data must be one sentence here, not one per trial
            num_images = len(load_split("train", options.data_dir, config.dataset))
            if max(config.batch_sizes) > num_images:
                raise SearchError(f"--batch-sizes has more than the {num_images} training images.")
            with _ray(options):
                grid = _tuner(config, options).fit()
            if _unfinished(folder / "trials", config):
                return None
            _write_result(config, options, grid)
        return read_result(folder)


def _absolute(options: SearchOptions) -> SearchOptions:
    """Trials run in other processes with other working folders."""
    return dataclasses.replace(
        options,
        checkpoints_dir=options.checkpoints_dir.resolve(),
        logs_dir=options.logs_dir.resolve(),
        data_dir=options.data_dir.resolve() if options.data_dir else None,
    )


def _check_same_search(config: SearchConfig, folder: Path) -> None:
    """Note what is searched in an empty folder; refuse a folder of another search."""
    path, asked = folder / "search.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        if changed := differences(read_json(path), asked):
            raise SearchError(
                f"{folder} holds a search with other settings ({'; '.join(changed)}): give the "
                "same ones to go on, or choose another --run."
            )
    elif (folder / LATEST).exists():
        raise SearchError(f"{folder} holds a training run: choose another --run for the search.")
    else:
        write_text(path, json.dumps(asked, indent=2) + "\n")


@contextmanager
def _ray(options: SearchOptions) -> Iterator[None]:
    """A connection to the cluster at --address, or a Ray of our own on loopback, then stopped."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = signal.getsignal(signal.SIGTERM)
    if options.address:
        _join(options.address, quiet)
    else:
        ray.init(
            address="local",
            num_cpus=max(len(os.sched_getaffinity(0)), options.cpus_per_trial),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    # Tune stops in order on SIGINT and SIGUSR1, but schedulers of jobs send SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        _check_resources(options)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _join(address: str, quiet: dict[str, Any]) -> None:
    """Join a running cluster; without this look at the port, Ray would knock for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise SearchError(
            f"No Ray cluster can be joined at {address} ({str(error).strip().splitlines()[0]}): "
            "start one with ray start --head, or leave out --address."
        ) from error


def _gpus_per_trial(options: SearchOptions) -> float:
    if options.gpus_per_trial is not None:
        return options.gpus_per_trial
    return 1.0 if options.device.startswith("cuda") else 0.0


def _check_resources(options: SearchOptions) -> None:
    """Without this, Ray would wait for resources that never come."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": options.cpus_per_trial, "GPU": _gpus_per_trial(options)}
    for kind, amount in asked.items():
        most = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        if amount > most:
            raise SearchError(
                f"A trial asks for {amount:g} {kind}, but no machine of the cluster has more than "
                f"{most:g}: lower --{kind.lower()}s-per-trial."
            )


def _tuner(config: SearchConfig, options: SearchOptions) -> tune.Tuner:
    """A new Tuner, or the one that was stopped."""
    gpus = _gpus_per_trial(options)
    device = "cuda" if gpus else "cpu"
    trainable = tune.with_resources(
        functools.partial(train_trial, config=config, options=options, device=device),
        {"cpu": options.cpus_per_trial, "gpu": gpus},
    )
    ray_folder = options.ckpt_folder / "trials"
    if _has_state(ray_folder):
        _refuse_foreign(ray_folder)
        if config.scheduler == "hyperband":
            raise SearchError(
                f"{ray_folder} holds a HyperBand search that was stopped, and Ray Tune cannot "
                "restore HyperBand's brackets: start again with another --run."
            )
        print(f"going on with the search in {options.ckpt_folder}", flush=True)
        return tune.Tuner.restore(str(ray_folder), trainable, resume_unfinished=True)
    shutil.rmtree(ray_folder, ignore_errors=True)  # stopped before anything was recorded
    return tune.Tuner(
        trainable,
        param_space={"drawn": tune.grid_search(draw_trials(config))},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            scheduler=_scheduler(config),
            reuse_actors=True,  # a new process costs 3 s and more, most of it importing torch
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=ray_folder.name,
            storage_path=str(ray_folder.parent),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[JsonLoggerCallback(), ProgressLines(config)],
            verbose=0,
        ),
    )


def _has_state(ray_folder: Path) -> bool:
    # Tuner.can_restore is content with tuner.pkl alone, then restore fails
    return bool(list(ray_folder.glob("experiment_state-*.json"))) and tune.Tuner.can_restore(
        str(ray_folder)
    )


def _refuse_foreign(ray_folder: Path) -> None:
    """Ray unpickles its state when it restores, which may run code: only from the user's own."""
    facts = ray_folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o002:
        raise SearchError(
            f"{ray_folder} belongs to another user or can be written by everyone, and restoring a "
            "search runs code from it: start again with another --run."
        )


def _trial_name(trial: Trial) -> str:
    return f"trial_{int(trial.trial_id.rsplit('_', 1)[1]):03d}"


def _scheduler(config: SearchConfig) -> TrialScheduler:
    if config.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            max_t=config.max_epochs,
            grace_period=config.grace_period,
            reduction_factor=config.reduction_factor,
        )
    if config.scheduler == "hyperband":
        return HyperBandScheduler(
            time_attr="epoch", max_t=config.max_epochs, reduction_factor=config.reduction_factor
        )
    return FIFOScheduler()


class ProgressLines(tune.Callback):
    """One line per validation of a trial and per trial that ends."""

    def __init__(self, config: SearchConfig) -> None:
        self._config = config
        self._best, self._ended, self._started = float("inf"), 0, time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        self._best = min(self._best, result[METRIC])
        self._say(
            f"{_trial_name(trial)} epoch {result['epoch']}/{self._config.max_epochs}: "
            f"bound {result[METRIC]:.2f} (best so far {self._best:.2f}) "
            f"{describe(trial.config['drawn'])}"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self._ended += 1
        epochs = trial.last_result.get("epoch", 0)
        early = " early" if epochs < self._config.max_epochs else ""
        self._say(
            f"{_trial_name(trial)} stopped{early} after epoch {epochs}; "
            f"{self._ended} of {self._config.num_trials} trials done"
        )

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._ended += 1
        self._say(f"{_trial_name(trial)} failed; {self._ended} of {self._config.num_trials} done")

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:4.0f} s] {line}", flush=True)


def _unfinished(ray_folder: Path, config: SearchConfig) -> bool:
    """Whether Ray's own record has trials left to run.

    Tuner.fit returns normally after a signal, too, and by then calls every trial terminated; the
    record was written before that.
    """
    newest = max(ray_folder.glob("experiment_state-*.json"))  # the name ends in its start time
    trials = [json.loads(state) for state, _ in read_json(newest)["trial_data"]]
    ended = [trial["status"] in (Trial.TERMINATED, Trial.ERROR) for trial in trials]
    return sum(ended) < config.num_trials


def _write_result(config: SearchConfig, options: SearchOptions, grid: tune.ResultGrid) -> None:
    by_name = {
        Path(result.path).name: result for result in map(grid.__getitem__, range(len(grid)))
    }  # its order is not stable
    records = [_record(name, by_name[name]) for name in sorted(by_name)]
    winner = min(records, key=lambda trial: trial.best_bound)
    if winner.best_bound == float("inf"):
        raise SearchError(f"Every trial failed; the first one says: {winner.error}")
    folder, checkpoint = options.ckpt_folder, by_name[winner.name].checkpoint
    assert checkpoint is not None  # every report carries one
    with checkpoint.as_directory() as trial_folder:
        copy_ckpt(Path(trial_folder) / BEST, folder / "winner.pt")
    best = {
        "config": config.trial_config(winner.drawn).to_dict(),
        "num_threads": options.cpus_per_trial,
        "metric": {
            "name": "validation bound at beta = 1, nats/image, lower is better",
            "value": winner.best_bound,
            "epoch": winner.epochs[winner.bounds.index(winner.best_bound)],
        },
        "seed": config.seed,
        "trial": winner.name,
        "environment": environment(pick_device("cuda" if _gpus_per_trial(options) else "cpu"))
        | {"num_threads": options.cpus_per_trial, "ray": ray.__version__},
    }
    write_text(folder / "best_config.json", json.dumps(best, indent=2) + "\n")
    everything = {
        "search": dataclasses.asdict(config),
        "trials": [dataclasses.asdict(record) for record in records],
    }
    write_text(folder / "trials.json", json.dumps(everything, indent=2) + "\n")


def _record(name: str, result: tune.Result) -> TrialRecord:
    assert result.config is not None
    frame, error = result.metrics_dataframe, None
    if result.error is not None:
        error = str(result.error).strip().splitlines()[-1]
    if frame is None or METRIC not in frame:
        return TrialRecord(name, result.config["drawn"], [], [], [], error or "no result")
    # a trial killed between report and record reports that epoch again, with the same values
    frame = frame.dropna(subset=[METRIC]).drop_duplicates("epoch", keep="last")
    return TrialRecord(
        name=name,
        drawn=result.config["drawn"],
        epochs=frame["epoch"].astype(int).tolist(),
        bounds=frame[METRIC].astype(float).tolist(),
        kls=frame["KL_divergence"].astype(float).tolist(),
        error=error,
    )
