"""The figure of a search: the trials' curves, the winner, and the score by hyperparameter."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vae_hyperband.common.config import plural
from vae_hyperband.reporting.figures import BLUE, GREY, ORANGE, save_figure, styled
from vae_hyperband.search.trials import SearchResult, TrialRecord

#: Of more trials, the figure of a search draws thin lines and small points.
MANY_TRIALS = 100


@styled
def best_config(result: SearchResult, path: Path) -> Path:
    """Curves and winner on the left; each hyperparameter, and rate and distortion, on the right.

    Rate (KL) against distortion (reconstruction) is drawn if the space has several betas.
    """
    names = [name for name, values in _choices(result).items() if len(values) > 1]
    num_panels = len(names) + ("beta" in names)
    figure = Figure(figsize=(10, 2 + 1.6 * max(num_panels, 2)))
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1), squeeze=False)[0]
    above, below = left.subplots(2, 1, height_ratios=(4, 1))
    _draw_trials(above, result)
    _write_winner(below, result)
    if names:
        panels = list(right.subplots(num_panels, 1, squeeze=False)[:, 0])
        for axes, name in zip(panels, names, strict=False):
            _draw_relation(axes, result, name)
        if "beta" in names:
            _draw_rate_distortion(panels[-1], result)
        panels[0].set_title("open: stopped early", fontsize=8, color="#606060", loc="right")
    return save_figure(figure, path)


def _choices(result: SearchResult) -> dict[str, tuple[Any, ...]]:
    config = result.config
    return {
        "latent_dim": config.latent_dims,
        "learning_rate": config.learning_rates,
        "batch_size": config.batch_sizes,
        "beta": config.betas,
    }


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
    lines = [
        f"latent_dim {best.latent_dim}    learning_rate {best.learning_rate:.3g}    "
        f"batch_size {best.batch_size}    beta {best.beta:g}    seed {config.seed}",
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
    values = sorted({getattr(trial.hyperparameters, name) for trial in result.trials})
    categorical = name != "learning_rate"

    def place(trial: TrialRecord) -> tuple[float, float]:
        value = getattr(trial.hyperparameters, name)
        x = values.index(value) if categorical else value
        return x, trial.score(result.config.metric)

    _mark(axes, result, place)
    if categorical:
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=name, ylabel="nats/image")
    if result.importance and name in result.importance:
        axes.set_title(f"importance {result.importance[name]:.0%}", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _draw_rate_distortion(axes: Axes, result: SearchResult) -> None:
    """One point per trial; a line of slope -1 joins models of the same bound."""

    def place(trial: TrialRecord) -> tuple[float, float]:
        assert trial.best_row is not None
        return trial.best_row["KL_divergence"], trial.best_row["recon_loss"]

    _mark(axes, result, place)
    if len(result.trials) <= MANY_TRIALS:  # of more, numbers would hide the points
        for trial in _usable(result):
            axes.annotate(
                f"{trial.hyperparameters.beta:g}", place(trial), (4, 3),
                textcoords="offset points", fontsize=6, color="#606060",
            )  # fmt: skip
    axes.set(xlabel="rate: KL (nats/image)", ylabel="distortion (nats)")
    if len(result.trials) <= MANY_TRIALS:
        axes.set_title("numbers: beta", fontsize=8, color="#606060")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
