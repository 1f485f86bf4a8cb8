"""Hyperparameter search: Ray Tune runs the trials, ASHA or HyperBand stops the worse ones early.

A trial is :func:`vae_hyperband.training.fit` with one CPU thread, nothing else; so what the search
reports for a configuration is what training it alone gives. Trials are compared on the validation
bound at beta = 1, never on the training loss, and the test split is never opened.

A search is a folder, ``checkpoints/<run>/``: ``search.json`` (what was asked for), ``trials/``
(Ray's own state), and at the end ``trials.json`` (every curve), ``best_config.json`` and
``winner.pt``.
"""

import dataclasses
import json
from pathlib import Path

import ray
from ray import tune
from ray.tune.experiment import Trial

from vae_hyperband.checkpoint import BEST, LATEST, copy_ckpt, load_ckpt, write_text
from vae_hyperband.cluster import check_resources, ray_for, trial_device, with_gpus
from vae_hyperband.config import (
    SearchConfig,
    SearchOptions,
    differences,
    read_json,
)
from vae_hyperband.data import load_split
from vae_hyperband.errors import SearchError
from vae_hyperband.process import only_writer
from vae_hyperband.trials import METRIC, SearchResult, TrialRecord, read_result
from vae_hyperband.tuning import ENDED, ended_trials, trial_name, tuner_for


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
            with ray_for(options):
                options = with_gpus(options)
                check_resources(options)
                grid = tuner_for(config, options).fit()
            if _unfinished(folder, config):
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


def _unfinished(folder: Path, config: SearchConfig) -> bool:
    """Whether trials are left to run; Tuner.fit returns normally after a signal, too."""
    # after fit() the trials in memory all say "terminated"; the record was written before that
    newest = max((folder / "trials").glob("experiment_state-*.json"))  # named by its start time
    trials = [json.loads(state) for state, _ in read_json(newest)["trial_data"]]
    ended = {
        trial_name(trial["trial_id"])
        for trial in trials
        if trial["status"] in (Trial.TERMINATED, Trial.ERROR)
    }
    return len(ended | ended_trials(folder / ENDED)) < config.num_trials


def _write_result(config: SearchConfig, options: SearchOptions, grid: tune.ResultGrid) -> None:
    by_name = {
        Path(result.path).name: result for result in map(grid.__getitem__, range(len(grid)))
    }  # its order is not stable
    records = [_record(name, by_name[name]) for name in sorted(by_name)]
    winner = min(records, key=lambda trial: trial.best_bound)
    if winner.best_bound == float("inf"):
        raise SearchError(
            f"Every trial failed ({winner.error}): change the space and start again with another "
            "--run."
        )
    folder, checkpoint = options.ckpt_folder, by_name[winner.name].checkpoint
    assert checkpoint is not None  # every report carries one
    with checkpoint.as_directory() as trial_folder:
        copy_ckpt(Path(trial_folder) / BEST, folder / "winner.pt")
    # of the machine that trained it, which need not be this one
    where = load_ckpt(folder / "winner.pt")["environment"]
    best = {
        "config": config.trial_config(winner.drawn).to_dict(),
        "device": trial_device(options),
        "num_threads": options.cpus_per_trial,
        "metric": {
            "name": "validation bound at beta = 1, nats/image, lower is better",
            "value": winner.best_bound,
            "epoch": winner.epochs[winner.bounds.index(winner.best_bound)],
        },
        "seed": config.seed,
        "trial": winner.name,
        "environment": where | {"ray": ray.__version__},
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
