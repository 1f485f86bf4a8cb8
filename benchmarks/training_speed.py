"""Claim: training at batch 128 on a CPU is limited by its matrix products: our loop does more than
half as many images per second as the step's matrix products alone allow, about twice as many as the
loop that tutorials teach and 1.8 times as many as pythae's trainer; it spends less than 3% of a
step on anything that is not arithmetic. Validation after every epoch, whose arithmetic alone is a
fifteenth of an epoch's, takes, with checkpoints, logs and pictures, 6% of a run.

    make bench            # or: python benchmarks/training_speed.py; 15 minutes on 2 cores

Contenders take turns of 130 steps, each in its own process; ratios are taken within a round.
Writes benchmarks/training_speed.json.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from alternation import Contenders, ratio, summary, write

from vae_hyperband import RunOptions, TrainConfig
from vae_hyperband.training import loop

OTHERS = ["reference", "pythae", "matrix products"]
VARIANTS = [
    "reference, 2 workers", "ours, bare step", "ours, plain layers", "ours, memory given back",
    "ours, plain layers, memory given back",
]  # fmt: skip


def measured(threads: int, names: list[str], rounds: int) -> dict[str, Any]:
    with Contenders(["ours", *names], threads) as contenders:
        rates = contenders.rounds(rounds)
    return {
        "threads": threads,
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "ours_to": {name: ratio(rates, "ours", name) for name in names},
        "rounds": rates,
    }


def share_not_training(epochs: int) -> float:
    """Of a run's time from its first step on: validation, checkpoints, logs and pictures."""
    spent, first = [], []
    train_epoch = loop.train_epoch

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        first.append(started)
        losses = train_epoch(*args)
        spent.append(time.perf_counter() - started)
        return losses

    loop.train_epoch = timed
    with tempfile.TemporaryDirectory() as folder:
        places = RunOptions(
            run="speed", device="cpu",
            checkpoints_dir=Path(folder) / "checkpoints", logs_dir=Path(folder) / "logs",
        )  # fmt: skip
        loop.fit(TrainConfig(epochs=epochs), places, quiet=True)
        total = time.perf_counter() - first[0]
    loop.train_epoch = train_epoch
    return 1 - sum(spent) / total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    threads = torch.get_num_threads()
    result = {
        "all_threads": measured(threads, OTHERS + VARIANTS, rounds),
        "one_thread": measured(1, OTHERS, rounds),
        "share_of_a_run_that_is_not_training": summary([share_not_training(3) for _ in range(5)]),
    }
    write("training_speed", result)


if __name__ == "__main__":
    main()
