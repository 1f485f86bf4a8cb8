"""Claim: what keeps a run safe is nearly free: saving its checkpoints at the default interval takes
half a hundredth of the time of loop, looking for values that are not finite one and a half
hundredths of a step.

    make bench            # or: python benchmarks/safety_cost.py; 3 minutes on 2 cores

The first is the time within Keeper.save (logs flushed, written, fsynced, read back, digests and
all) as a share of a run of real Fashion-MNIST; the second the share of a step's time within the
check, and, against the clock's own error, the time of turns of 130 steps with and without it, by
turns. Writes benchmarks/safety_cost.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alternation import summary, write

from vae_hyperband import RunOptions, TrainConfig
from vae_hyperband.common.process import keep_freed_memory
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import load_split
from vae_hyperband.training import keeper, loop, step
from vae_hyperband.training.state import new_state

STEPS = 130


class Stopwatch:
    """Seconds spent in a function, which is replaced by one that measures them."""

    def __init__(self, place: Any, name: str) -> None:
        self.seconds, self.count = 0.0, 0
        self.place, self.name, self.real = place, name, getattr(place, name)

    def __enter__(self) -> "Stopwatch":
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return self.real(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
                self.count += 1

        setattr(self.place, self.name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.place, self.name, self.real)


def share_of_saving(epochs: int) -> tuple[float, float]:
    """Of loop, and of the whole run; from the first step on."""
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,  # on a disk, which /tmp may not be
        Stopwatch(keeper.Keeper, "save") as saving,
        Stopwatch(loop, "train_epoch") as trained,
    ):
        places = RunOptions(
            run="safety", device="cpu",
            checkpoints_dir=Path(folder) / "checkpoints", logs_dir=Path(folder) / "logs",
        )  # fmt: skip
        started = time.perf_counter()
        loop.fit(TrainConfig(epochs=epochs), places, quiet=True)
        whole = time.perf_counter() - started
    assert saving.count == epochs
    return saving.seconds / trained.seconds, saving.seconds / whole


def check_cost(rounds: int) -> dict[str, Any]:
    keep_freed_memory()
    train = load_split("train")
    state = new_state(TrainConfig(epochs=1000), train.image_shape, len(train))
    loader = get_dataloader(train, 128)

    def turn() -> float:
        end = (state.step // STEPS + 1) * STEPS
        started = time.perf_counter()
        while state.step < end:
            loop.train_epoch(state, loader, lambda state: state.step == end)
        return time.perf_counter() - started

    turn()
    with Stopwatch(step, "_refuse_non_finite") as check:
        whole = sum(turn() for _ in range(rounds))
    share = check.seconds / whole

    def without() -> float:
        real = step._refuse_non_finite
        step._refuse_non_finite = lambda *_: None
        try:
            return turn()
        finally:
            step._refuse_non_finite = real

    ratios: list[float] = []
    for number in range(rounds):
        order: list[Callable[[], float]] = [turn, without] if number % 2 else [without, turn]
        seconds = {act: act() for act in order}
        ratios.append(seconds[turn] / seconds[without])
    return {
        "share_of_a_step": share,
        "time_with_to_without": summary(ratios),
        "steps_per_turn": STEPS,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    runs = [share_of_saving(args.epochs) for _ in range(args.runs)]
    result = {
        "saving": {
            "share_of_training": summary([run[0] for run in runs]),
            "share_of_the_run": summary([run[1] for run in runs]),
            "epochs": args.epochs,
        },
        "non_finite_check": check_cost(args.rounds),
    }
    write("safety_cost", result)
