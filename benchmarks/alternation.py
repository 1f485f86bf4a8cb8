"""How benchmarks compare: every contender in a process of its own, taking turns, so that a noisy
machine is noisy for all of them alike; ratios within a round, medians over rounds.

The others measure with it: ``with Contenders(["ours", "reference"], threads=2) as contenders``.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

FOLDER = Path(__file__).parent
Rates = dict[str, list[float]]  # of each contender: what it did per second in each round


class Contenders:
    """Processes that run benchmarks/contenders.py, each asleep until it is its turn."""

    def __init__(self, names: list[str], threads: int) -> None:
        self.names, self.threads = names, threads

    def __enter__(self) -> Self:
        self.processes = {
            name: subprocess.Popen(
                [sys.executable, FOLDER / "contenders.py", name, str(self.threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )
            for name in self.names
        }  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def turn(self, name: str) -> float:
        """One turn of a contender: what it did per second."""
        process = self.processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} ended with status {process.wait()}")
        done = json.loads(answer)
        return done["count"] / done["seconds"]

    def rounds(self, num: int) -> Rates:
        """Everyone's turn, ``num`` times, after one round to warm up."""
        rates: Rates = {name: [] for name in self.names}
        for number in range(num + 1):
            for name in self.names:
                rate = self.turn(name)
                if number > 0:
                    rates[name].append(rate)
        return rates


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high, "n": len(values)}


def ratio(rates: Rates, of: str, to: str) -> dict[str, float]:
    """How many times as much per second as another contender, of the rounds' ratios."""
    return summary([a / b for a, b in zip(rates[of], rates[to], strict=True)])


def machine() -> dict[str, Any]:
    """What a measurement was made on."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(names),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Keep a result beside its script, and show it."""
    text = json.dumps(result | {"machine": machine()}, indent=1)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(text)
