"""Claim: what a search spends on one report or one trial does not grow with the number of trials.

    python benchmarks/search_growth.py               # about 15 minutes on 2 cores
    python benchmarks/search_growth.py --ray-trials 0   # the first two parts, 1 minute

Decisions: simulated reports of 16 workers (no training, 27 epochs), the real board, schedulers and
log; milliseconds per report without the log's fsync, which is the disk's. Reading: the log that the
largest of these left. Trials: a search of 1,000 real trials through Ray, of up to 3 epochs, whose
training function returns at once; seconds from the start of a trial to the start of the next, and
how many of these our own code took, by hundreds. Growth is the median of the last three hundreds
over that of the second to the fourth (the first has the start of Ray's workers in it).
Writes benchmarks/search_growth.json.
"""

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alternation import write
from ray import tune

from vae_hyperband.data.splits import Split
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.console import Console
from vae_hyperband.search.decisions import Board, Journal, TrialEvent
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import suggest
from vae_hyperband.search.trials import TrialRecord, ValidationRow
from vae_hyperband.tune import tuner
from vae_hyperband.tune.logs import SearchLogs
from vae_hyperband.tune.session import ray_for
from vae_hyperband.tune.storage import TrialStore

WORKERS, MAX_EPOCHS = 16, 27
SIZES = (100, 300, 1_000, 3_000, 10_000)
SCHEDULERS = ("asha", "hyperband", "median")
RAY_TRIALS, RAY_EPOCHS = 1_000, 3


def row(number: int, epoch: int) -> ValidationRow:
    """What a trial reports: a falling curve, its own, with noise; a function of both numbers."""
    noise = random.Random(number * 1000 + epoch).random()
    level = 20 * random.Random(number).random()
    bound = 240.0 + level + 20 / epoch + noise
    return {
        "step": 200 * epoch, "epoch": epoch, "recon_loss": bound - 12.0, "KL_divergence": 12.0,
        "total_loss": bound, "bound": bound,
    }  # fmt: skip


def first_configuration(number: int, trials: list[TrialRecord]) -> Hyperparameters:
    return Hyperparameters(latent_dim=16, learning_rate=1e-3, batch_size=64, beta=1.0)


def decide(scheduler: str, num_trials: int, path: Path) -> dict[str, Any]:
    """All reports of a search by simulated workers; the time that the board takes for them."""
    config = SearchConfig(num_trials=num_trials, max_epochs=MAX_EPOCHS, scheduler=scheduler)
    order = random.Random(0)
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        with Journal(path) as journal:
            board = Board(config, journal, first_configuration)
            num_reports, begun = 0, time.perf_counter()
            while not board.finished:
                waiting = board.runnable()[:WORKERS]
                while len(waiting) < WORKERS and (trial := board.suggest_next()):
                    waiting.append(trial.number)
                number = order.choice(waiting)
                board.reported(number, row(number, board.trials[number].num_epochs + 1))
                num_reports += 1
            seconds = time.perf_counter() - begun
    finally:
        os.fsync = fsync
    return {
        "trials": num_trials, "reports": num_reports, "ms_per_report": 1e3 * seconds / num_reports,
    }  # fmt: skip


def reading(path: Path, num_trials: int) -> dict[str, Any]:
    """Reading a log and replaying it: seconds and megabytes."""
    config = SearchConfig(num_trials=num_trials, max_epochs=MAX_EPOCHS, scheduler="asha")
    begun = time.perf_counter()
    Board(config, Journal(path), first_configuration)
    seconds = time.perf_counter() - begun
    tracemalloc.start()
    kept = Board(config, Journal(path), first_configuration)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept.finished
    return {
        "trials": num_trials, "seconds": seconds, "log_megabytes": path.stat().st_size / 1e6,
        "memory_megabytes": memory / 1e6,
    }  # fmt: skip


def at_once(trial: dict[str, Any], *, job: object) -> None:
    """A trial that only reports."""
    for epoch in range(1, RAY_EPOCHS + 1):
        tune.report(dict(row(trial["number"], epoch)))


def through_ray(folder: Path, num_trials: int) -> dict[str, Any]:
    """A search of real trials that do nothing: when each of them began, and what the driver did."""
    # few epochs: so each hundred has the same mixture of trials that stop and that finish
    config = SearchConfig(num_trials=num_trials, max_epochs=RAY_EPOCHS, scheduler="asha")
    options = SearchOptions(
        run="growth", checkpoints_dir=folder / "c", logs_dir=folder / "l", device="cpu"
    ).absolute()
    options.ckpt_folder.mkdir(parents=True)
    starts: list[float] = []
    ours = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                ours[0] += time.perf_counter() - begun

        return wrapper

    tuner.train_trial = at_once
    scheduler = tuner.BoardScheduler
    for name in ("on_trial_result", "choose_trial_to_run"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    tuner.BoardSearcher.suggest = timed(tuner.BoardSearcher.suggest)
    spent: list[float] = []
    with Journal(options.ckpt_folder / "decisions.jsonl") as journal, ray_for(options):
        console, logs = Console(), SearchLogs(options)

        def on_event(board: Board, event: TrialEvent) -> None:
            console(board, event)
            logs(board, event)
            if event["event"] == "draw":
                starts.append(time.monotonic())
                spent.append(ours[0])

        board = Board(config, journal, lambda n, t: suggest(config, n, t), on_event)
        store = TrialStore(str(options.ckpt_folder / "trials"))
        tuner.run_trials(board, options, store, _small_splits(), lambda: False)
    assert board.finished
    hundreds = list(itertools.pairwise([*range(0, num_trials, 100), num_trials - 1]))
    rates = [(starts[b] - starts[a]) / (b - a) for a, b in hundreds]
    own = [(spent[b] - spent[a]) / (b - a) for a, b in hundreds]
    return {
        "trials": num_trials,
        "epochs": board.totals.epochs,
        "seconds_per_trial_by_hundred": rates,
        "of_these_in_our_own_code": own,
        "growth": statistics.median(rates[-3:]) / statistics.median(rates[1:4]),
        "growth_of_our_own_code": statistics.median(own[-3:]) / statistics.median(own[1:4]),
    }


def _small_splits() -> tuple[Split, Split]:
    split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), "none")
    return split, split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ray-trials", type=int, default=RAY_TRIALS, help="0: not through Ray")
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for scheduler in SCHEDULERS:
            measured[scheduler] = []
            for size in SIZES:
                measured[scheduler].append(decide(scheduler, size, folder / f"{scheduler}-{size}"))
                print(scheduler, measured[scheduler][-1], flush=True)
        measured["reading"] = reading(folder / f"asha-{SIZES[-1]}", SIZES[-1])
        print(measured["reading"], flush=True)
        if arguments.ray_trials:
            measured["through_ray"] = through_ray(folder, arguments.ray_trials)
            print(measured["through_ray"])
    write("search_growth", measured)


if __name__ == "__main__":
    main()
