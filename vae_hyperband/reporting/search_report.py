"""The report of a search: charts that filter one another, and a table of all trials."""

import math
import shlex
import time
from collections.abc import Callable
from typing import Any

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import changed_options
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.reporting import search_figure
from vae_hyperband.reporting.page import WEB, Data, Picture, render
from vae_hyperband.reporting.summaries import summary_of
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Choice, LogRange, describe, shown
from vae_hyperband.search.trials import WINNER, Column, SearchResult, TrialRecord


def search_report(found: SearchResult, name: str) -> str:
    """Charts of all trials, their table, and the settings of a search, which may be running.

    Raises :class:`ConfigError` for a finished search without any result.
    """
    has_result = any(trial.best_row for trial in found.trials)
    if found.finished and not has_result:
        raise ConfigError(f"No trial of {found.folder} has a result to report.")
    winner = found.folder / WINNER
    values = {
        "title": f"Search {name}",
        "head": _head(found),
        "live": not found.finished,
        "charts": _charts(found) if has_result else None,
        "picture": _picture(found) if has_result else None,
        "importance": sorted((_importance(found) or {}).items(), key=lambda item: -item[1]),
        **_table(found),
        "settings": {"command": _command(found.config, name), **found.config.in_effect()},
        "environment": environment_of(load_ckpt(winner)) if winner.exists() else None,
    }
    names = ("d3.min.js", "report.js", "search.js") if has_result else ("report.js",)
    scripts = [(WEB / name).read_text(encoding="utf-8") for name in names]
    return render(WEB / "search.html.jinja", values, WEB / "report.css", scripts)


def environment_of(checkpoint: Checkpoint) -> dict[str, object]:
    """Where a model was trained, on what, and the digest of its weights."""
    return {
        **checkpoint.environment,
        "data (SHA-256)": checkpoint.data.digest,
        "weights (SHA-256)": checkpoint.weights_digest,
    }


def _head(found: SearchResult) -> list[str]:
    lines = []
    if not found.finished:
        under_way = sum(trial.outcome is None for trial in found.trials)
        ended = len(found.trials) - under_way
        lines.append(
            f"Not finished at {time.strftime('%Y-%m-%d %H:%M:%S')}: {ended} of "
            f"{plural(found.config.total_trials, 'trial')} ended, {under_way} under way, "
            f"{plural(found.epochs_spent, 'epoch')} trained."
        )
    if any(trial.best_row for trial in found.trials):
        lines += summary_of(found).splitlines()
    return lines


def _picture(found: SearchResult) -> Picture:
    """What the page shows where no script may run."""
    return Picture.drawn(
        lambda path: search_figure.best_config(found, path),
        "Curves of all trials, stopped ones in grey; each hyperparameter against the score; rate "
        "against distortion if the space has several betas",
    )


def _importance(found: SearchResult) -> dict[str, float] | None:
    """As the search found it at its end, or of the trials that have ended so far."""
    if found.finished:
        return found.importance
    # Optuna is in an extra: only who runs a search has it
    from vae_hyperband.search.suggest import importance

    return importance(found.config, found.trials)


def _command(config: SearchConfig, name: str) -> str:
    """The command that repeats the search, without its data and folders."""
    # the row "space" below the command is what the file has to hold
    space = {"space": "space.json"} if config.space else {}
    settings = {k: v for k, v in config.to_dict().items() if k not in (config.space or ())}
    changed = changed_options(settings | space, SearchConfig().to_dict())
    return shlex.join(["vae-hyperband", "search", "--run", name, *changed])


# ---- The charts' data


def _charts(found: SearchResult) -> Data:
    """What search.js draws: axes, and the trials with a value for each of them."""
    config = found.config
    searched = [name for name, domain in config.domains.items() if len(domain.ends) > 1]
    axes = [_axis(found, name) for name in searched]
    return {
        "axes": axes,
        "metric": config.metric_name,
        "short": config.metric,
        "maxEpochs": config.max_epochs,
        "winner": found.winner.number,
        "trials": [
            {
                "number": trial.number,
                "text": f"{trial.summary} ({describe(trial.hyperparameters)})",
                "outcome": trial.outcome,
                "values": [_place(trial, axis) for axis in axes],
                "epochs": trial.num_epochs,
                "curve": [_rounded(value) for value in trial.curve(config.metric)],
                "score": _rounded(trial.score(config.metric)),
                "rate": trial.best_row and _rounded(trial.best_row["KL_divergence"]),
                "distortion": trial.best_row and _rounded(trial.best_row["recon_loss"]),
            }
            for trial in found.trials
        ],
    }


def _axis(found: SearchResult, name: str) -> Data:
    domain = found.config.domains[name]
    if isinstance(domain, Choice):
        values = search_figure.tried(domain.values, name, found)
        return {"name": name, "values": values, "labels": [shown(value) for value in values]}
    return {"name": name, "log": isinstance(domain, LogRange), "ends": domain.ends}


def _place(trial: TrialRecord, axis: Data) -> float:
    """Where on an axis a trial is: the number of its choice, or its value."""
    value: Any = trial.hyperparameters[axis["name"]]
    return axis["values"].index(value) if "values" in axis else value


def _rounded(value: float) -> float | None:
    """Six digits, enough for a screen; JSON has no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---- The table of trials


def _best(loss: Column) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.best_row[loss] if trial.best_row else ""


def _chosen(name: str) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.hyperparameters[name]


_COLUMNS: dict[str, Callable[[TrialRecord], Any]] = {
    "trial": lambda trial: trial.number,
    "outcome": lambda trial: trial.outcome or "under way",
    "epochs": lambda trial: trial.num_epochs,
}
_RESULTS: dict[str, Callable[[TrialRecord], Any]] = {
    "bound": _best("bound"),
    "recon_loss": _best("recon_loss"),
    "KL_divergence": _best("KL_divergence"),
    "why": lambda trial: trial.why,
}


def _table(found: SearchResult) -> Data:
    """The trials, best first: for each cell what it is sorted by and what it shows."""
    metric = found.config.metric
    columns = _COLUMNS | {name: _chosen(name) for name in found.config.domains} | _RESULTS
    if metric not in columns:
        columns[metric] = _best(metric)
    return {
        "metric": metric,
        "metric_name": found.config.metric_name,
        "columns": list(columns),
        "winner": found.winner if found.trials else None,
        "rows": [
            (trial, [(value, _text(value)) for value in (get(trial) for get in columns.values())])
            for trial in sorted(found.trials, key=lambda trial: trial.score(metric))
        ],
    }


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else shown(value)
