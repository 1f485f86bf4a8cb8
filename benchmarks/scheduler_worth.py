"""Is the scheduler worth it? Best validation bound against epochs spent, by method.

Each search is the real one (the same board, schedulers and suggestions), on real learning curves:
those of benchmarks/learning_curves.json, which have every configuration of a grid trained to its
end. A trial is a function of its configuration and seed, so looking its curve up is running it, and
many searches cost nothing. One worker; configurations are taken from the grid without repetition,
TPE's are moved to the nearest one.

    python benchmarks/scheduler_worth.py       # a few minutes

Writes benchmarks/scheduler_worth.json and docs/scheduler_worth.png.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vae_hyperband.reporting.figures import save_figure, styled
from vae_hyperband.search.config import Hyperparameters, SearchConfig
from vae_hyperband.search.decisions import Board
from vae_hyperband.search.suggest import num_random, suggest_tpe
from vae_hyperband.search.trials import TrialRecord

FOLDER = Path(__file__).parent
NUM_SEARCHES = 200
BUDGET = 108  # epochs: 12 trials trained to their end
BUDGETS = (9, 18, 36, 54, 81, 108)
CLOSE = 0.5  # nats: a search has arrived when its best is this close to the grid's

METHODS = {  # name: (algorithm, scheduler, colour)
    "random": ("random", "none", "#909090"),
    "TPE": ("tpe", "none", "#009E73"),
    "median stopping": ("random", "median", "#CC79A7"),
    "HyperBand": ("random", "hyperband", "#0072B2"),
    "ASHA": ("random", "asha", "#D55E00"),
    "TPE + ASHA": ("tpe", "asha", "#E69F00"),
}


class Memory:
    """A decision log that is not kept."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class Table:
    """The learning curves, by configuration."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.epochs: int = content["epochs"]
        self.curves = content["curves"]
        self.rates = sorted({row["drawn"]["learning_rate"] for row in self.curves})
        # a grid that was stopped on the way: only learning rates of which all is there
        full = max(self._count(rate) for rate in self.rates)
        self.rates = [rate for rate in self.rates if self._count(rate) == full]
        self.curves = [r for r in self.curves if r["drawn"]["learning_rate"] in self.rates]
        self.best = min(min(row["bounds"]) for row in self.curves)

    def _count(self, rate: float) -> int:
        return sum(row["drawn"]["learning_rate"] == rate for row in self.curves)

    def nearest(self, suggested: Hyperparameters) -> Hyperparameters:
        rate = min(self.rates, key=lambda r: abs(math.log(r / suggested.learning_rate)))
        return dataclasses.replace(suggested, learning_rate=rate)

    def row(self, hyperparameters: Hyperparameters, epoch: int) -> dict[str, Any]:
        wanted = hyperparameters.to_dict()
        [found] = [row for row in self.curves if row["drawn"] == wanted]
        bound, kl = found["bounds"][epoch - 1], found["kls"][epoch - 1]
        # beta is 1 in the whole grid, so the bound is the loss; an epoch has over 200 steps
        row = {"epoch": epoch, "step": 200 * epoch, "total_loss": bound}
        return {**row, "bound": bound, "KL_divergence": kl}


def search(table: Table, algorithm: str, scheduler: str, seed: int) -> list[float]:
    """The best bound so far after each epoch that the search spent."""
    config = SearchConfig(
        num_trials=len(table.curves),
        max_epochs=table.epochs,
        scheduler=scheduler,
        algorithm=algorithm,
        learning_rates=(table.rates[0], table.rates[-1]),
        seed=seed,
    )
    order = np.random.default_rng(seed).permutation(len(table.curves))

    def suggest(number: int, trials: list[TrialRecord]) -> Hyperparameters:
        if algorithm == "tpe" and number >= num_random(config):
            return table.nearest(suggest_tpe(config, number, trials))
        return Hyperparameters.from_dict(table.curves[order[number]]["drawn"])

    board = Board(config, Memory(), suggest)  # type: ignore[arg-type]
    best: list[float] = []
    while not board.finished and len(best) < BUDGET:
        runnable = board.runnable()
        trial = board.trials[runnable[0]] if runnable else board.suggest_next()
        assert trial is not None
        row = table.row(trial.hyperparameters, trial.num_epochs + 1)
        board.reported(trial.number, row)
        best.append(min([row["bound"], *best[-1:]]))
    return best + [best[-1]] * (BUDGET - len(best))


def summary(regrets: np.ndarray) -> dict[str, Any]:
    """Mean regret with its 95% interval at each budget; regrets are (searches, epochs)."""
    rows = {}
    for budget in BUDGETS:
        values = regrets[:, budget - 1]
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        rows[str(budget)] = {"mean": float(values.mean()), "half_interval": float(half)}
    arrived = [int(np.argmax(r <= CLOSE)) + 1 if (r <= CLOSE).any() else None for r in regrets]
    there = [epochs for epochs in arrived if epochs is not None]
    return {
        "regret": rows,
        "median_epochs_to_within_0.5": statistics.median(
            [epochs if epochs is not None else math.inf for epochs in arrived]
        ),
        "share_within_0.5": len(there) / len(arrived),
    }


@styled
def draw_picture(regrets: dict[str, np.ndarray], path: Path) -> Path:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    epochs = np.arange(1, BUDGET + 1)
    for name, values in regrets.items():
        color = METHODS[name][2]
        mean = values.mean(axis=0)
        half = 1.96 * values.std(axis=0, ddof=1) / math.sqrt(len(values))
        axes.plot(epochs, mean, color=color, label=name, linewidth=1.6)
        axes.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(0.05, 12)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(1, BUDGET)
    axes.set_xticks(BUDGETS)
    axes.set(
        xlabel="epochs spent",
        ylabel="nats/image above the grid's best",
        title=f"Best validation bound found, mean of {NUM_SEARCHES} searches and its 95% interval",
    )
    axes.legend(ncols=2)
    return save_figure(figure, path)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    content = json.loads((FOLDER / "learning_curves.json").read_text())
    table = Table(content)
    regrets: dict[str, np.ndarray] = {}
    for name, (algorithm, scheduler, _) in METHODS.items():
        found = [search(table, algorithm, scheduler, seed) for seed in range(NUM_SEARCHES)]
        regrets[name] = np.array(found) - table.best
        print(name, summary(regrets[name]), flush=True)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = {
        "num_searches": NUM_SEARCHES,
        "num_configurations": len(table.curves),
        "best_of_grid": table.best,
        "methods": {name: summary(values) for name, values in regrets.items()},
        "curves": {"commit": content["environment"]["commit"]},
        "commit": git.stdout.strip(),
    }
    (FOLDER / "scheduler_worth.json").write_text(json.dumps(result, indent=1) + "\n")
    print(draw_picture(regrets, FOLDER.parent / "docs/scheduler_worth.png"))


if __name__ == "__main__":
    main()
