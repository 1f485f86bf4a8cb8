"""Claims about a GPU, all in one script that needs torch, numpy and Pillow, but no Ray:

1. An epoch of 50,000 images at batch 128 takes 0.1 s or less with the step captured, and less than
   a twentieth of the tutorials' loop with 8 loader workers.
2. 64 trials of up to 20 epochs in packs, with ASHA, take a fiftieth of the time of one after the
   other with the tutorials' loop. Extrapolated: the epochs that the decisions on the measured
   curves cost, times what an epoch took; who is not stopped after 3 epochs counts with all 20;
   validation is counted, checkpoints are not.
3. What is fast is right: the captured step and the pack agree with the plain loop.

    python benchmarks/gpu.py                    # writes benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --images 1000 --trials 4     # does it run?

Every pair takes turns, ratios are within a round, medians over rounds. TF32 is measured beside
float32: a row each for speed and for the bound after the same epochs.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from alternation import write
from reference_loop import Reference

from vae_hyperband.bounds import eval_dataloader, eval_epoch
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, get_dataloader, load_split
from vae_hyperband.engines import graph_engine
from vae_hyperband.packed import Pack
from vae_hyperband.rules import Curve, asha
from vae_hyperband.state import TrainState, new_state
from vae_hyperband.training import train_epoch

EPOCHS, MAX_EPOCHS, RUNGS = 3, 20, (1, 3, 9)


def synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


class Machine:
    """The data on a device, and ways to train on it."""

    def __init__(self, device: torch.device, train: Split, held_out: Split) -> None:
        self.device, self.train = device, train
        self.validation = eval_dataloader(held_out, device)

    def state(self, seed: int = 0, **changes: Any) -> TrainState:
        config = TrainConfig(seed=seed, epochs=MAX_EPOCHS, **changes)
        return new_state(config, self.train.image_shape, len(self.train), self.device)

    def bound(self, state: TrainState) -> float:
        return eval_epoch(state.model, self.validation)["bound"]

    def looping(self, state: TrainState) -> Callable[[], object]:
        """The plain loop's next epoch."""
        loader = get_dataloader(
            self.train, state.config.batch_size, seed=state.config.seed, shuffle=True,
            device=self.device,
        )  # fmt: skip
        return lambda: train_epoch(state, loader)

    def captured(self, state: TrainState) -> Callable[[], object]:
        """The same epoch with the step captured."""
        engine = graph_engine(state.config, self.train, self.device)
        loader = get_dataloader(self.train, state.config.batch_size)
        return lambda: engine.train_epoch(state, loader)

    def packed(self, states: list[TrainState]) -> Callable[[], object]:
        """An epoch of all."""
        widest = max(state.config.latent_dim for state in states)
        pack = Pack(states[0].config, self.train, len(states), widest, self.device)

        def epoch() -> None:
            pack.run(states, states[0].steps_per_epoch)
            for state in states:
                state.step += state.steps_per_epoch

        return epoch

    def seconds(self, work: Callable[[], object]) -> float:
        synchronized(self.device)
        started = time.perf_counter()
        work()
        synchronized(self.device)
        return time.perf_counter() - started

    def rounds(self, named: dict[str, Callable[[], object]], num: int) -> dict[str, list[float]]:
        """Seconds of each in each round, by turns; the first round is not counted."""
        for work in named.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in named}
        for _ in range(num):
            for name, work in named.items():
                seconds[name].append(self.seconds(work))
        return seconds


def one_run(machine: Machine, workers: int, num_rounds: int) -> dict[str, Any]:
    """Claim 1."""
    reference = Reference(len(machine.train), workers, device=machine.device)
    seconds = machine.rounds(
        {
            "captured": machine.captured(machine.state()),
            "loop": machine.looping(machine.state()),
            "reference": reference.epoch,
        },
        num_rounds,
    )
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(seconds[name], seconds["captured"], strict=True)
        )
        for name in ("loop", "reference")
    }
    return {"epoch_seconds": seconds, "times_as_fast_as": ratios, "loader_workers": workers}


def agreement(machine: Machine) -> dict[str, Any]:
    """Claim 3: bounds after some epochs; the loop with another seed shows what chance makes."""
    ways = {"loop": machine.looping, "captured": machine.captured}
    found: dict[str, Any] = {}
    for precise in (True, False):
        with tf32(not precise):
            for name, way in ways.items():
                bounds = []
                for seed in (0, 1):
                    state = machine.state(seed)
                    epoch = way(state)
                    for _ in range(EPOCHS):
                        epoch()
                    bounds.append(machine.bound(state))
                found[f"{name}, {'float32' if precise else 'TF32'}"] = bounds
    states = [machine.state(0, latent_dim=dim) for dim in (32, 64)]
    epoch = machine.packed(states)
    for _ in range(EPOCHS):
        epoch()
    found["pack, 32 of 64 dimensions"] = [machine.bound(states[0])]
    return {"epochs": EPOCHS, "bounds_of_seeds_0_and_1": found}


def search(machine: Machine, num: int, sizes: list[int]) -> dict[str, Any]:
    """Claim 2."""
    rates = torch.logspace(-3.3, -2, num).tolist()
    dims = [(16, 32, 64)[n % 3] for n in range(num)]
    states = [
        machine.state(0, learning_rate=rate, latent_dim=dim)
        for rate, dim in zip(rates, dims, strict=True)
    ]
    size = max(size for size in sizes if size <= num)
    curves = [Curve() for _ in states]
    parts = [states[start : start + size] for start in range(0, num, size)]
    epochs = [machine.packed(part) for part in parts if len(part) == size]
    for after in range(1, EPOCHS + 1):
        for epoch in epochs:
            epoch()
        for state, curve in zip(states, curves, strict=True):
            curve.values[after] = machine.bound(state)
    verdicts = asha(curves, [rung for rung in RUNGS if rung <= EPOCHS], 3)
    trained = sum(v.rung if v.action == "stop" else MAX_EPOCHS for v in verdicts)
    speeds = {}
    for size in sizes:
        if size <= num:
            epoch = machine.packed(states[:size])
            epoch()
            speeds[size] = statistics.median(machine.seconds(epoch) for _ in range(3)) / size
    validation = machine.seconds(lambda: machine.bound(states[0]))
    return {
        "trials": num,
        "epochs_after_asha": trained,
        "epoch_seconds_per_trial_by_pack_size": speeds,
        "validation_seconds_per_trial": validation,
        "extrapolated_seconds": trained * (min(speeds.values()) + validation),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, help="of the training split; default: all")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    train, held_out = load_split("train"), load_split("validation")
    if args.images:
        train = train.subset(torch.arange(args.images))
        held_out = held_out.subset(torch.arange(min(args.images, len(held_out))))
    machine = Machine(device, train, held_out)
    alone = {}
    for name, on in (("float32", False), ("TF32", True)):
        with tf32(on):
            alone[name] = one_run(machine, args.workers, args.rounds)
    reference = statistics.median(alone["float32"]["epoch_seconds"]["reference"])
    found = search(machine, args.trials, [1, 4, 16, 64])
    validation = found["validation_seconds_per_trial"]
    one_by_one = found["epochs_after_asha"] * (reference + validation)
    found["share_of_one_by_one_with_the_reference"] = found["extrapolated_seconds"] / one_by_one
    result = {"one_run": alone, "agreement": agreement(machine), "search": found}
    if args.images or device.type != "cuda":
        print(json.dumps(result, indent=1))  # a try
    else:
        write("gpu", result)


if __name__ == "__main__":
    main()
