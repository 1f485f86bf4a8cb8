"""For the record: what Ray Tune's own ASHA and HyperBand do when their driver is killed.

The same trials as in tests/tune/test_survival.py, with Ray's schedulers and Tuner.restore: the
driver is killed once with SIGKILL, early, in the middle or late, then restored, as Ray's
documentation says.

    python benchmarks/stock_ray_tune.py      # about 15 minutes

Writes benchmarks/stock_ray_tune.json.
"""

import argparse
import functools
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler

from vae_hyperband import RunOptions, SearchConfig, TrainConfig, fit
from vae_hyperband.model.checkpoint import BEST, LATEST, copy_ckpt
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import random_search

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import write_idx_folder

FOLDER = Path(__file__).parent
CONFIG = SearchConfig(
    num_trials=12, max_epochs=9, latent_dims=(2, 4), batch_sizes=(32, 64), dataset="custom"
)
KILL_AFTER = (None, 8, 14, 20)  # reports of epochs before the driver is killed; None: it is not
PATIENCE = 150  # seconds without any report after which a restored search counts as hanging
SCHEDULERS = {"asha": ASHAScheduler, "hyperband": HyperBandScheduler}


def train_trial(trial: dict[str, Any], data: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        options = RunOptions(
            run="trial", device="cpu", num_threads=1, data_dir=Path(data), tensorboard=False,
            checkpoints_dir=Path(scratch), logs_dir=Path(scratch) / "logs",
        )  # fmt: skip
        options.ckpt_folder.mkdir()
        if started := tune.get_checkpoint():
            with started.as_directory() as folder:
                for file in (LATEST, BEST):
                    copy_ckpt(Path(folder) / file, options.ckpt_folder / file)

        def report(state: Any) -> None:
            tune.report(dict(state.metrics), checkpoint=tune.Checkpoint(str(options.ckpt_folder)))

        config: TrainConfig = CONFIG.trial_config(Hyperparameters(**trial["drawn"]))
        fit(config, options, on_validation=report, quiet=True)


def drive(scheduler: str, folder: Path, data: str) -> None:
    """What a user's script would be."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    trainable = functools.partial(train_trial, data=data)
    path = folder / "trials"
    if tune.Tuner.can_restore(str(path)):
        tuner = tune.Tuner.restore(str(path), trainable, resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"drawn": tune.grid_search([h.to_dict() for h in random_search(CONFIG)])},
            tune_config=tune.TuneConfig(
                metric="bound", mode="min", reuse_actors=True,
                scheduler=SCHEDULERS[scheduler](time_attr="epoch", max_t=9, reduction_factor=3),
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(folder), verbose=0,
                failure_config=tune.FailureConfig(max_failures=2),
            ),
        )  # fmt: skip
    results = tuner.fit()
    (folder / "done").write_text(json.dumps([r.metrics.get("epoch") for r in results]))


def epochs_by_trial(folder: Path) -> list[list[int]]:
    """The epochs of every trial as Ray's result.json has them, in order of their reports."""
    found = []
    for path in sorted((folder / "trials").glob("*/result.json")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found.append([row["epoch"] for row in rows if "epoch" in row])
    return found


def one(scheduler: str, data: str, kill_after: int | None) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, __file__, "--drive", scheduler, str(folder), data]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if kill_after:
        with subprocess.Popen(command, **quiet) as process:
            while sum(map(len, epochs_by_trial(folder))) < kill_after:
                assert process.poll() is None, "the search ended before it was to be killed"
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
        time.sleep(3)
    began, last, seen = time.monotonic(), time.monotonic(), 0
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    while process.poll() is None and time.monotonic() - last < PATIENCE:
        time.sleep(0.5)
        now = sum(map(len, epochs_by_trial(folder)))
        last, seen = (time.monotonic(), now) if now != seen else (last, seen)
    hangs = process.poll() is None
    if hangs:
        os.killpg(process.pid, signal.SIGKILL)
    epochs = epochs_by_trial(folder)
    return {
        "scheduler": scheduler,
        "killed_after_reports": kill_after,
        "finished": not hangs and process.returncode == 0,
        "hangs": hangs,
        "seconds": round(time.monotonic() - began, 1),
        "last_epochs": [max(trial, default=0) for trial in epochs],  # by trial
        "off_rung": sorted(e for e in (max(t, default=0) for t in epochs) if e not in (1, 3, 9)),
        "epochs_reported_twice": sum(len(trial) - len(set(trial)) for trial in epochs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive[0], Path(arguments.drive[1]), arguments.drive[2])
        return
    data = str(write_idx_folder(Path(tempfile.mkdtemp()), num_train=12000, size=12))
    runs = []
    for scheduler in SCHEDULERS:
        for kill_after in KILL_AFTER:
            runs.append(one(scheduler, data, kill_after))
            calm = next(run for run in runs if run["scheduler"] == scheduler)
            runs[-1]["same_ends_as_undisturbed"] = runs[-1]["last_epochs"] == calm["last_epochs"]
            print(runs[-1], flush=True)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    content = {
        "patience_seconds": PATIENCE,
        "runs": runs,
        "environment": {"ray": ray.__version__, "python": platform.python_version()},
        "commit": git.stdout.strip(),
    }
    (FOLDER / "stock_ray_tune.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
