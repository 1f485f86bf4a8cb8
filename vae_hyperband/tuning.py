"""What Ray Tune sees of a search: the space, a trial, a scheduler, a Tuner, lines of progress."""

import functools
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    TrialScheduler,
)

from vae_hyperband.checkpoint import BEST, LATEST, copy_ckpt
from vae_hyperband.cluster import trial_device
from vae_hyperband.config import (
    RunOptions,
    SearchConfig,
    SearchOptions,
    TrainConfig,
)
from vae_hyperband.errors import SearchError
from vae_hyperband.process import make_folder
from vae_hyperband.training import TrainState, fit
from vae_hyperband.trials import METRIC, describe

ENDED = "ended.txt"  # in the search's folder: one trial's name a line


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


def tuner_for(config: SearchConfig, options: SearchOptions) -> tune.Tuner:
    """A new Tuner, or the one that was stopped."""
    device = trial_device(options)
    trainable = tune.with_resources(
        functools.partial(train_trial, config=config, options=options, device=device),
        {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial or 0},
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
            callbacks=[JsonLoggerCallback(), ProgressLines(config, options.ckpt_folder / ENDED)],
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


def trial_name(trial_id: str) -> str:
    """Ray counts trials in the end of their id; its own folder names would hold rounded floats."""
    return f"trial_{int(trial_id.rsplit('_', 1)[1]):03d}"


def _trial_name(trial: Trial) -> str:
    return trial_name(trial.trial_id)


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
    """One line per validation of a trial and per trial that ends.

    The names of the trials that ended also go to a file, since Ray's own record calls a trial that
    HyperBand stopped while it was paused "PAUSED" for ever.
    """

    def __init__(self, config: SearchConfig, ended: Path) -> None:
        self._config, self._ended = config, ended

    def setup(self, *_: Any, **__: Any) -> None:  # when a search starts, and when it is restored
        self._started = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        bound = result[METRIC]
        # Ray takes this result into its statistics after this call
        seen = [t.metric_analysis[METRIC]["min"] for t in trials if METRIC in t.metric_analysis]
        seen.append(bound)
        self._say(
            f"{_trial_name(trial)} epoch {result['epoch']}/{self._config.max_epochs}: "
            f"bound {bound:.2f} (best so far {min(seen):.2f}) "
            f"{describe(trial.config['drawn'])}"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        epochs = trial.last_result.get("epoch", 0)
        how = "stopped early" if epochs < self._config.max_epochs else "finished"
        self._end(trial, f"{how} after epoch {epochs}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._end(trial, "failed")

    def _end(self, trial: Trial, how: str) -> None:
        with self._ended.open("a", encoding="utf-8") as file:
            file.write(_trial_name(trial) + "\n")
        num_ended = len(ended_trials(self._ended))
        self._say(f"{_trial_name(trial)} {how}; {num_ended} of {self._config.num_trials} done")

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:4.0f} s] {line}", flush=True)


def ended_trials(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
