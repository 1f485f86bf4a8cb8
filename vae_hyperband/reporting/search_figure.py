"""The figure of a search: the trials' curves, the winner, and the score by hyperparameter."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

from vae_hyperband.common.checks import plural
from vae_hyperband.reporting.figures import BLUE, GREY, ORANGE, save_figure, styled
from vae_hyperband.search.space import Choice, LogRange, Value, shown
from vae_hyperband.search.trials import SearchResult, TrialRecord

#: Of more trials, the figure of a search draws thin lines and small points.
MANY_TRIALS = 100

#: Letters of all choices of a panel that fit below it.
MOST_LETTERS = 24

#: Of more panels, the figure has two columns.
MOST_IN_COLUMN = 4


@styled
def best_config(result: SearchResult, path: Path) -> Path:
    """Curves and winner on the left; each hyperparameter, and rate and distortion, on the right.

    Rate (KL) against distortion (reconstruction) is drawn if the space has several betas.
    """
    names = [name for name, domain in result.config.domains.items() if len(domain.ends) > 1]
    num_panels = len(names) + ("beta" in names)
    columns = 1 if num_panels <= MOST_IN_COLUMN else 2
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(7 + 3 * columns, 2 + 1.6 * max(rows, 2)))
    ratios = (1.7, 1 if columns == 1 else 1.9)
    left, right = figure.subfigures(1, 2, width_ratios=ratios, squeeze=False)[0]
    above, below = left.subplots(2, 1, height_ratios=(4, 1))
    _draw_trials(above, result)
    _write_winner(below, result)
    if names:
        panels = list(right.subplots(rows, columns, squeeze=False).T.flat)
        for axes, name in zip(panels, names, strict=False):
            _draw_relation(axes, result, name)
        if "beta" in names:
            _draw_rate_distortion(panels[len(names)], result)
        for empty in panels[num_panels:]:
            empty.axis("off")
        panels[0].set_title("open: stopped early", fontsize=8, color="#606060", loc="right")
    return save_figure(figure, path)


def tried(values: tuple[Value, ...], name: str, result: SearchResult) -> list[Value]:
    """The values of a choice that a trial has, numbers in their order."""
    tried = {trial.hyperparameters[name] for trial in result.trials}
    numbers = [value for value in values if isinstance(value, int | float)]
    return [v for v in (sorted(numbers) if len(numbers) == len(values) else values) if v in tried]


def _usable(result: SearchResult) -> list[TrialRecord]:
    return [trial for trial in result.trials if trial.best_row]


def _groups(result: SearchResult) -> list[tuple[str, list[TrialRecord]]]:
    """The trials that have a result, by what a picture shows them as; the winner comes last."""
    # as a few groups, not one by one: matplotlib takes milliseconds for each call
    others = [trial for trial in _usable(result) if trial is not result.winner]
    return [
        (GREY, [trial for trial in others if trial.outcome != "finished"]),
        (BLUE, [trial for trial in others if trial.outcome == "finished"]),
        (ORANGE, [result.winner]),
    ]


def _draw_trials(axes: Axes, result: SearchResult) -> None:
    config, winner = result.config, result.winner
    many = len(result.trials) > MANY_TRIALS
    for color, trials in _groups(result):
        wins = color == ORANGE
        epochs, values = list[float](), list[float]()
        for trial in trials:
            # what is not a number separates the curves of a group
            epochs += [*trial.curve("epoch"), math.nan]
            values += [*trial.curve(config.metric), math.nan]
        axes.plot(
            epochs,
            values,
            color=color,
            linewidth=2.2 if wins else (0.4 if many else 1.1),
            marker="o",
            markersize=4 if wins else (1.2 if many else 3),
            zorder=3 if wins else 2,
        )
    num_others = sum(trial is not winner for trial in result.with_outcome("finished"))
    for label, color in (
        (f"winner, {winner.name.replace('_', ' ')}", ORANGE),
        (f"others trained to the end ({num_others})", BLUE),
        (f"stopped early ({len(result.with_outcome('stopped'))})", GREY),
    ):
        axes.plot([], [], color=color, marker="o", markersize=4, label=label)
    axes.set(
        xlabel="epoch",
        ylabel=config.metric_name,
        title=f"{plural(len(result.trials), 'trial')}, {config.algorithm}, "
        f"{config.scheduler.upper()}; lower is better",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _write_winner(axes: Axes, result: SearchResult) -> None:
    config, best = result.config, result.winner.hyperparameters
    words = [*(f"{name} {shown(value)}" for name, value in best.items()), f"seed {config.seed}"]
    lines = [
        # a name stays with its value
        *textwrap.wrap("    ".join(word.replace(" ", "\xa0") for word in words), width=78),
        f"{plural(result.epochs_spent, 'epoch')} trained, {result.epochs_saved:,} saved by "
        "stopping early",
    ]
    if failed := result.with_outcome("failed"):
        lines.append(f"failed: {', '.join(trial.name.replace('_', ' ') for trial in failed[:8])}")
    axes.axis("off")
    axes.text(
        0,
        0.9,
        f"Best configuration: {result.best_score:.2f} ({config.metric_name})",
        color=ORANGE,
        weight="bold",
        va="top",
    )
    axes.text(0, 0.65, "\n".join(lines), va="top", linespacing=1.6)


def _mark(
    axes: Axes, result: SearchResult, place: Callable[[TrialRecord], tuple[float, float]]
) -> None:
    """Every trial at its place: open if it was stopped, a star for the winner."""
    many = len(result.trials) > MANY_TRIALS
    for color, trials in _groups(result):
        wins = color == ORANGE
        if trials:
            x, y = zip(*map(place, trials), strict=True)
            axes.scatter(
                x,
                y,
                s=110 if wins else (6 if many else 26),
                linewidths=0.5 if many and not wins else None,
                marker="*" if wins else "o",
                facecolors="none" if color == GREY else color,
                edgecolors=color,
                zorder=3 if wins else 2,
            )


def _draw_relation(axes: Axes, result: SearchResult, name: str) -> None:
    """The trials' scores against one hyperparameter."""
    domain = result.config.domains[name]
    choices = tried(domain.values, name, result) if isinstance(domain, Choice) else []

    def place(trial: TrialRecord) -> tuple[float, float]:
        value: Any = trial.hyperparameters[name]
        return choices.index(value) if choices else value, trial.score(result.config.metric)

    _mark(axes, result, place)
    if choices:
        names = list(map(shown, choices))
        size = 9 if sum(map(len, names)) <= MOST_LETTERS else 6.5
        axes.set_xticks(range(len(choices)), names, fontsize=size)
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif isinstance(domain, LogRange):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_log_ticks(*axes.get_xlim())))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=name, ylabel="nats/image")
    if result.importance and name in result.importance:
        axes.set_title(f"importance {result.importance[name]:.0%}", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; evenly spaced ones where fewer than two of those fit."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    within = [tick for tick in ticks if low <= tick <= high]
    return within if len(within) > 1 else list(MaxNLocator(3).tick_values(low, high))


def _draw_rate_distortion(axes: Axes, result: SearchResult) -> None:
    """One point per trial; a line of slope -1 joins models of the same bound."""

    def place(trial: TrialRecord) -> tuple[float, float]:
        assert trial.best_row is not None
        return trial.best_row["KL_divergence"], trial.best_row["recon_loss"]

    _mark(axes, result, place)
    if len(result.trials) <= MANY_TRIALS:  # of more, numbers would hide the points
        digits = "g" if isinstance(result.config.domains["beta"], Choice) else ".2g"
        for trial in _usable(result):
            axes.annotate(
                f"{trial.hyperparameters['beta']:{digits}}", place(trial), (4, 3),
                textcoords="offset points", fontsize=6, color="#606060",
            )  # fmt: skip
    axes.set(xlabel="rate: KL (nats/image)", ylabel="distortion (nats)")
    if len(result.trials) <= MANY_TRIALS:
        axes.set_title("numbers: beta", fontsize=8, color="#606060")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
