"""Claim: on a CPU a pack of batches of 16 images or fewer is faster than its members one after the
other, and one of larger batches a few percent slower; ``vmap`` over PyTorch's own layers, which
makes grouped convolutions of them, is slower than that in every case.

    python benchmarks/packed_step.py       # 4 minutes

Steps of N networks: by the plain loop in turn, by a pack, and by the naive pack. All take turns in
one process with one thread; ratios within a round, medians over rounds. Writes
benchmarks/packed_step.json.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from alternation import summary, write

from vae_hyperband import packed
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, get_dataloader, load_split
from vae_hyperband.layers import Conv, ConvTranspose
from vae_hyperband.packed import Pack
from vae_hyperband.process import keep_freed_memory
from vae_hyperband.state import new_state
from vae_hyperband.training import train_epoch

CASES = [(128, 1), (128, 8), (64, 8), (32, 8), (16, 16), (8, 32)]  # batch size, networks
IMAGES = 4_000  # of all networks together in one turn


class Runs:
    """N networks, and ways to take the same few steps with all of them."""

    def __init__(self, train: Split, batch_size: int, num: int) -> None:
        self.num_steps = max(2, IMAGES // (batch_size * num))
        config = TrainConfig(batch_size=batch_size)
        self.states = [new_state(config, train.image_shape, len(train)) for _ in range(num)]
        self.loader = get_dataloader(train, batch_size, shuffle=True)
        self.pack = Pack(config, train, num)

    def alone(self) -> None:
        for state in self.states:
            state.step = 0
            train_epoch(state, self.loader, lambda state: state.step == self.num_steps)

    def packed(self) -> None:
        self._pack(packed.FEW_IMAGES)

    def side_by_side(self) -> None:
        """As small batches are, whatever the batch."""
        self._pack(10**9)

    def naive(self) -> None:
        """With PyTorch's own layers."""
        fast = {kind: kind.forward for kind in (Conv, ConvTranspose)}
        for kind in fast:
            kind.forward = kind.plain  # type: ignore[method-assign]
        self._pack(10**9)
        for kind, forward in fast.items():
            kind.forward = forward  # type: ignore[method-assign]

    def _pack(self, few_images: int) -> None:
        before, packed.FEW_IMAGES = packed.FEW_IMAGES, few_images
        for state in self.states:
            state.step = 0
        self.pack.run(self.states, self.num_steps)
        packed.FEW_IMAGES = before


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(train: Split, batch_size: int, num: int, rounds: int) -> dict[str, Any]:
    runs = Runs(train, batch_size, num)
    ways: dict[str, Callable[[], None]] = {"packed": runs.packed, "naive": runs.naive}
    if num > 1:
        ways["side_by_side"] = runs.side_by_side
    taken: dict[str, list[float]] = {"alone": [], **{name: [] for name in ways}}
    for number in range(rounds + 1):
        for name, way in {"alone": runs.alone, **ways}.items():
            spent = seconds(way)
            if number:
                taken[name].append(spent)
    speedups = {
        name: summary([a / b for a, b in zip(taken["alone"], taken[name], strict=True)])
        for name in ways
    }
    return {"batch_size": batch_size, "networks": num, "times_as_fast": speedups, "seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    torch.set_num_threads(1)
    train = load_split("train")
    write("packed_step", {"threads": 1, "cases": [measure(train, *c, rounds) for c in CASES]})


if __name__ == "__main__":
    main()
