"""Claim: a default search (12 trials of up to 9 epochs, ASHA) spends most of what the machine's
cores could do in training steps: Ray's start, new processes, reports, validations, checkpoints and
idle cores together are the rest.

    python benchmarks/search_overhead.py       # 3 minutes on 2 cores

A trial's training time is what its timing.jsonl says: images over images per second, pauses for
validation left out. Core-seconds are the command's wall time, from start to exit, times the cores.
Writes benchmarks/search_overhead.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alternation import write

from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.trials import read_result
from vae_hyperband.training.tracker import read_rows


def training_seconds(logs: Path, batch_size: int) -> float:
    """The time of one trial's steps."""
    seconds, before = 0.0, 0
    for row in read_rows(logs / "timing.jsonl"):
        seconds += (row["step"] - before) * batch_size / row["images_per_second"]
        before = row["step"]
    return seconds


def measure(folder: Path, *more: str) -> dict[str, Any]:
    """A search of the command line's defaults, and ``more``."""
    command = [sys.executable, "-m", "vae_hyperband.train_vae", "search", "--device", "cpu", *more]
    started = time.time()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall = time.time() - started
    result = read_result(folder / "checkpoints" / "search")
    trials = {
        trial.name: training_seconds(
            folder / "logs/search" / trial.name, trial.hyperparameters["batch_size"]
        )
        for trial in result.trials
    }
    cores = len(os.sched_getaffinity(0))
    # TensorBoard's files carry the second in which they were made in their names
    logs = (folder / "logs/search").glob("trial_*/events.out.tfevents.*")
    first_trial = min(int(path.name.split(".")[3]) for path in logs)
    return {
        "wall_seconds": wall,
        "cores": cores,
        "training_core_seconds": sum(trials.values()),
        "share_in_training_steps": sum(trials.values()) / (wall * cores),
        "seconds_to_first_trial": first_trial - started,
        "epochs": result.epochs_spent,
        "trials": trials,
    }


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    write("search_overhead", measured | {"config": SearchConfig().to_dict()})


if __name__ == "__main__":
    main()
