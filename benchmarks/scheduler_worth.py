"""Is the scheduler worth it? Best validation bound against epochs spent, by method.

Each search is the real one (the same board, schedulers and suggestions), on real learning curves:
those of benchmarks/learning_curves.json, which have every configuration of a grid trained to its
end. A trial is a function of its configuration and seed, so looking its curve up is running it, and
many searches cost nothing. One worker; configurations are taken from the grid without repetition,
TPE's are moved to the nearest one.

Ray's own schedulers and the ASHA paper's promotion (benchmarks/other_schedulers.py) get the same
configurations in the same order: after equal epochs, with one worker and with four, and as whole
searches of a number of trials. Since the grid has only 36 configurations, so do searches of a
continuous space, whose curves are interpolated between the grid's learning rates.

    python benchmarks/scheduler_worth.py       # about ten minutes

Writes benchmarks/scheduler_worth.json and docs/scheduler_worth.png.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from other_schedulers import RAY, Promotion, RayRule, Rule, run

from vae_hyperband.reporting.figures import save_figure, styled
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.decisions import Board
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import num_random, suggest_tpe
from vae_hyperband.search.trials import TrialRecord

FOLDER = Path(__file__).parent
NUM_SEARCHES = 200
BUDGET = 108  # epochs: 12 trials trained to their end
BUDGETS = (9, 18, 36, 54, 81, 108)
CLOSE = 0.5  # nats: a search has arrived when its best is this close to the grid's
NUM_TRIALS = (6, 8, 9, 12, 15, 18, 24, 36)  # of whole searches

METHODS = {  # name: (algorithm, scheduler, colour)
    "random": ("random", "none", "#909090"),
    "TPE": ("tpe", "none", "#009E73"),
    "median stopping": ("random", "median", "#CC79A7"),
    "HyperBand": ("random", "hyperband", "#0072B2"),
    "ASHA": ("random", "asha", "#D55E00"),
    "TPE + ASHA": ("tpe", "asha", "#E69F00"),
}

PROMOTION = "ASHA with promotion"
#: Every rule of the comparison with Ray's, and the rule of this package that it differs from.
COUNTERPARTS = {
    "ASHA": "ASHA",
    "Ray's ASHA": "ASHA",
    PROMOTION: "ASHA",
    "HyperBand": "HyperBand",
    "Ray's HyperBand": "HyperBand",
    "median stopping": "median stopping",
    "Ray's median stopping": "median stopping",
}
#: Those in the picture.
ASHAS = {
    "ASHA": ("#D55E00", "o", "ASHA (this package)"),
    "Ray's ASHA": ("#56B4E9", "s", "Ray's ASHA"),
    PROMOTION: ("#000000", "^", "promotion"),
}


class Memory:
    """A decision log that is not kept."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def append(self, event: dict[str, Any]) -> None:
        self.events.append(event)


class Curve(NamedTuple):
    bounds: list[float]  # after each epoch
    kls: list[float]


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
        self.by_configuration = {
            Hyperparameters(**row["drawn"]): Curve(row["bounds"], row["kls"]) for row in self.curves
        }
        self.max_trials = len(self.curves)

    def _count(self, rate: float) -> int:
        return sum(row["drawn"]["learning_rate"] == rate for row in self.curves)

    def configurations(self, seed: int) -> list[Hyperparameters]:
        """All of the grid in an order of its own for every seed."""
        all_of_them = list(self.by_configuration)
        return [all_of_them[p] for p in np.random.default_rng(seed).permutation(len(all_of_them))]

    def nearest(self, suggested: Hyperparameters) -> Hyperparameters:
        rate = min(self.rates, key=lambda r: abs(math.log(r / suggested["learning_rate"])))
        return suggested.replace(learning_rate=rate)

    def curve(self, hyperparameters: Hyperparameters) -> Curve:
        return self.by_configuration[hyperparameters]

    def row(self, hyperparameters: Hyperparameters, epoch: int) -> dict[str, Any]:
        curve = self.curve(hyperparameters)
        bound, kl = curve.bounds[epoch - 1], curve.kls[epoch - 1]
        # beta is 1 in the whole grid, so the bound is the loss; an epoch has over 200 steps
        row = {"epoch": epoch, "step": 200 * epoch, "total_loss": bound}
        return {**row, "bound": bound, "KL_divergence": kl}


class ContinuousTable(Table):
    """Any learning rate: curves are interpolated, linearly in its logarithm.

    An interpolated curve is never better than the grid's best, to which regrets remain relative.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.max_trials = BUDGET  # more than a search can begin
        self._interpolated: dict[Hyperparameters, Curve] = {}

    def configurations(self, seed: int) -> list[Hyperparameters]:
        random = np.random.default_rng(seed)
        latent_dims, batch_sizes = (
            sorted({getattr(known, name) for known in self.by_configuration})
            for name in ("latent_dim", "batch_size")
        )
        low, high = np.log(self.rates[0]), np.log(self.rates[-1])
        return [
            Hyperparameters(
                latent_dim=int(random.choice(latent_dims)),
                batch_size=int(random.choice(batch_sizes)),
                learning_rate=float(np.exp(random.uniform(low, high))),
                beta=1.0,
            )
            for _ in range(self.max_trials)
        ]

    def curve(self, hyperparameters: Hyperparameters) -> Curve:
        if hyperparameters not in self._interpolated:
            at_rates = [
                self.by_configuration[hyperparameters.replace(learning_rate=rate)]
                for rate in self.rates
            ]
            place, known = np.log(hyperparameters["learning_rate"]), np.log(self.rates)
            bounds, kls = (
                [float(np.interp(place, known, values)) for values in zip(*column, strict=True)]
                for column in zip(*at_rates, strict=True)
            )
            self._interpolated[hyperparameters] = Curve(bounds, kls)
        return self._interpolated[hyperparameters]


class BoardRule:
    """This package's search: its board decides, and the earliest trial that may run does."""

    def __init__(
        self, table: Table, algorithm: str, scheduler: str, seed: int, num_trials: int
    ) -> None:
        self._table, self._busy = table, set[int]()
        config = SearchConfig(
            num_trials=num_trials,
            max_epochs=table.epochs,
            scheduler=scheduler,
            algorithm=algorithm,
            learning_rates=(table.rates[0], table.rates[-1]),
            seed=seed,
        )
        configurations = table.configurations(seed)

        def suggest(number: int, trials: list[TrialRecord]) -> Hyperparameters:
            if algorithm == "tpe" and number >= num_random(config):
                return table.nearest(suggest_tpe(config, number, trials))
            return configurations[number]

        self._board = Board(config, Memory(), suggest)  # type: ignore[arg-type]

    def value(self, number: int, epoch: int) -> float:
        hyperparameters = self._board.trials[number].hyperparameters
        return self._table.curve(hyperparameters).bounds[epoch - 1]

    def next_trial(self) -> int | None:
        ready = [number for number in self._board.runnable() if number not in self._busy]
        if not ready:
            trial = self._board.suggest_next()
            if trial is None:
                return None
            ready = [trial.number]
        self._busy.add(ready[0])
        return ready[0]

    def reported(self, number: int, epoch: int) -> None:
        self._busy.remove(number)
        trial = self._board.trials[number]
        self._board.reported(number, self._table.row(trial.hyperparameters, epoch))  # type: ignore[arg-type]


def make_rule(table: Table, name: str, seed: int, num_trials: int) -> Rule:
    """A rule of :data:`COUNTERPARTS` on the configurations of a seed."""
    if name in METHODS:
        return BoardRule(table, "random", METHODS[name][1], seed, num_trials)
    curves = [table.curve(c) for c in table.configurations(seed)[:num_trials]]

    def value(number: int, epoch: int) -> float:
        return curves[number].bounds[epoch - 1]

    if name == PROMOTION:
        return Promotion(value, num_trials, table.epochs)
    return RayRule(RAY[name](table.epochs), value, num_trials, table.epochs)


class Search(NamedTuple):
    best: list[float]  # bound so far, after each epoch that was spent
    last_epochs: list[int]  # of each trial


def search(rule: Rule, num_trials: int, budget: int, seed: int, workers: int = 1) -> Search:
    """Run a rule until it has spent the budget, or all trials have ended."""
    # with several workers, trials are up to twice as fast as others: reports overtake each other
    durations = np.random.default_rng([seed, 1]).uniform(1, 2, num_trials).tolist()
    found = Search([], [0] * num_trials)
    for number, epoch in run(rule, durations, workers):
        found.best.append(min([rule.value(number, epoch), *found.best[-1:]]))
        found.last_epochs[number] = epoch
        if len(found.best) == budget:
            break
    return found


def regrets_of(
    table: Table, make: Callable[[int], Rule], workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Regrets, (searches, epochs), and how many epochs each search spent before it ended."""
    found = [
        search(make(seed), table.max_trials, BUDGET, seed, workers).best
        for seed in range(NUM_SEARCHES)
    ]
    padded = [best + [best[-1]] * (BUDGET - len(best)) for best in found]
    return np.array(padded) - table.best, np.array([len(best) for best in found])


def mean_and_interval(values: np.ndarray) -> dict[str, float]:
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return {"mean": float(values.mean()), "half_interval": float(half)}


def at_budgets(regrets: np.ndarray) -> dict[str, Any]:
    return {str(budget): mean_and_interval(regrets[:, budget - 1]) for budget in BUDGETS}


def summary(regrets: np.ndarray) -> dict[str, Any]:
    """Mean regret with its 95% interval at each budget; regrets are (searches, epochs)."""
    arrived = [int(np.argmax(r <= CLOSE)) + 1 if (r <= CLOSE).any() else None for r in regrets]
    there = [epochs for epochs in arrived if epochs is not None]
    return {
        "regret": at_budgets(regrets),
        "median_epochs_to_within_0.5": statistics.median(
            [epochs if epochs is not None else math.inf for epochs in arrived]
        ),
        "share_within_0.5": len(there) / len(arrived),
    }


def compare_rules(table: Table, workers: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Each rule at equal epochs: its regret, and the paired difference to this package's."""
    regrets, spent = {}, {}
    for name in COUNTERPARTS:
        regrets[name], spent[name] = regrets_of(
            table, lambda seed: make_rule(table, name, seed, table.max_trials), workers  # noqa: B023
        )  # fmt: skip
    rows = {}
    for name, ours in COUNTERPARTS.items():
        rows[name] = {"regret": at_budgets(regrets[name]), "mean_epochs": spent[name].mean()}
        if name != ours:
            rows[name] |= {"minus": ours, "difference": at_budgets(regrets[name] - regrets[ours])}
        print(workers, name, rows[name], flush=True)
    return rows, regrets


def whole_searches(table: Table, name: str, num_trials: int) -> dict[str, Any]:
    """Searches of so many trials until they end, one worker."""
    spent, regrets, best_stopped, none_full = [], [], [], []
    for seed in range(NUM_SEARCHES):
        rule = make_rule(table, name, seed, num_trials)
        found = search(rule, num_trials, num_trials * table.epochs, seed)
        spent.append(len(found.best))
        regrets.append(found.best[-1] - table.best)
        ends = [table.curve(c).bounds[-1] for c in table.configurations(seed)[:num_trials]]
        best_stopped.append(found.last_epochs[int(np.argmin(ends))] < table.epochs)
        none_full.append(max(found.last_epochs) < table.epochs)
    return {
        "epochs": mean_and_interval(np.array(spent)),
        "regret": mean_and_interval(np.array(regrets)),
        "searches_that_stopped_their_best_trial": sum(best_stopped),
        "searches_without_a_fully_trained_trial": sum(none_full),
    }


def draw_methods(axes: Axes, regrets: dict[str, np.ndarray]) -> None:
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


def draw_differences(axes: Axes, regrets: dict[str, np.ndarray]) -> None:
    epochs = np.arange(1, BUDGET + 1)
    for name, (color, _, label) in ASHAS.items():
        difference = regrets[name] - regrets["ASHA"]
        mean = difference.mean(axis=0)
        half = 1.96 * difference.std(axis=0, ddof=1) / math.sqrt(len(difference))
        axes.plot(epochs, mean, color=color, label=label, linewidth=1.6)
        axes.fill_between(epochs, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    axes.set_ylim(-0.6, 0.6)
    axes.set_xlim(1, BUDGET)
    axes.set_xticks(BUDGETS)
    axes.set(
        xlabel="epochs spent",
        ylabel="nats/image, relative to ASHA",
        title="ASHA's rules, paired difference",
    )


def draw_whole_searches(axes: Axes, rows: dict[str, Any]) -> None:
    for name, (color, marker, label) in ASHAS.items():
        points = [rows[name][str(number)] for number in NUM_TRIALS]
        x, y = ([point[key]["mean"] for point in points] for key in ("epochs", "regret"))
        axes.plot(x, y, color=color, marker=marker, markersize=4, label=label, linewidth=1.2)
    # a search that never trains a trial to its end is far off the scale
    axes.set_ylim(-0.03, 0.7)
    axes.set_xlim(0, BUDGET + 4)
    axes.set_xticks([0, *BUDGETS[1:]])
    axes.set(
        xlabel="mean epochs of a search",
        ylabel="nats/image above the grid's best",
        title=f"Whole searches of {NUM_TRIALS[0]} to {NUM_TRIALS[-1]} trials",
    )
    axes.legend()


@styled
def draw_picture(
    methods: dict[str, np.ndarray], rules: dict[str, np.ndarray], whole: dict[str, Any], path: Path
) -> Path:
    figure = Figure(figsize=(7, 6.8))
    axes = figure.subplot_mosaic([["methods", "methods"], ["rules", "whole"]], height_ratios=[4, 3])
    draw_methods(axes["methods"], methods)
    draw_differences(axes["rules"], rules)
    draw_whole_searches(axes["whole"], whole)
    return save_figure(figure, path)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    content = json.loads((FOLDER / "learning_curves.json").read_text())
    tables = {"grid": Table(content), "continuous": ContinuousTable(content)}
    table = tables["grid"]
    methods: dict[str, np.ndarray] = {}
    for name, (algorithm, scheduler, _) in METHODS.items():
        methods[name], _ = regrets_of(
            table, lambda seed: BoardRule(table, algorithm, scheduler, seed, table.max_trials)  # noqa: B023
        )  # fmt: skip
        print(name, summary(methods[name]), flush=True)
    rules: dict[str, Any] = {}
    for space in tables:
        for workers in (1, 4):
            rows, regrets = compare_rules(tables[space], workers)
            rules.setdefault(space, {})[str(workers)] = rows
            if (space, workers) == ("grid", 1):
                drawn = regrets
    whole = {
        space: {
            name: {str(n): whole_searches(tables[space], name, n) for n in NUM_TRIALS}
            for name in COUNTERPARTS
            if "median" not in name
        }
        for space in tables
    }
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = {
        "num_searches": NUM_SEARCHES,
        "num_configurations": len(table.curves),
        "best_of_grid": table.best,
        "methods": {name: summary(values) for name, values in methods.items()},
        "rules_by_space_and_workers": rules,
        "whole_searches_by_space": whole,
        "curves": {"commit": content["environment"]["commit"]},
        "environment": {"ray": ray.__version__, "python": platform.python_version()},
        "commit": git.stdout.strip(),
    }
    (FOLDER / "scheduler_worth.json").write_text(json.dumps(result, indent=1) + "\n")
    print(draw_picture(methods, drawn, whole["grid"], FOLDER.parent / "docs/scheduler_worth.png"))


if __name__ == "__main__":
    main()
