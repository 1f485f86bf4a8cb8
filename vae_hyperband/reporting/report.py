"""The report of a run or a search: one HTML file that loads nothing."""

import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from vae_hyperband.common.checks import read_json
from vae_hyperband.common.config import Places, changed_options, in_effect, network_option
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import check_place, make_folder, write_text
from vae_hyperband.data.splits import as_trained
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.reporting import figures, search_figure
from vae_hyperband.reporting.animations import logged_samples
from vae_hyperband.reporting.page import (
    facts,
    facts_section,
    figure,
    inline_figure,
    page,
    png,
    quiet,
    section,
    table,
    wide,
)
from vae_hyperband.reporting.runs import best_ckpt
from vae_hyperband.reporting.summaries import summary_of
from vae_hyperband.reporting.tables import LOSS_NAMES, evaluation_tables, headline
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import shown
from vae_hyperband.search.trials import (
    RESULT,
    WINNER,
    Column,
    SearchResult,
    TrialRecord,
    read_result,
)
from vae_hyperband.training.loop import train_command


def report(place: Places) -> str:
    """The report of a finished search, or of a run with a best checkpoint, of that name."""
    if (place.ckpt_folder / RESULT).exists():
        return search_report(read_result(place.ckpt_folder), place.run)
    return run_report(place)


def write_report(place: Places, out: Path | None = None) -> Path:
    """The report as a file: ``out``, or report.html in the log folder."""
    if out:
        check_place(out, ".html", ".htm")  # fail before the work
    text = report(place)
    out = out or place.log_folder / "report.html"
    make_folder(out.resolve().parent)
    write_text(out, text)
    return out


def run_report(place: Places) -> str:
    """Configuration, curves, samples over training, traversals, metrics, environment of a run.

    Raises :class:`CheckpointError` if it has no best.pt, :class:`DataError` without its data.
    """
    checkpoint = load_ckpt(best_ckpt(place))
    config, model = checkpoint.config, checkpoint.model()
    split = as_trained(checkpoint.split("validation", place), config)
    images = split.pixels(slice(1000))
    best = checkpoint.best
    head = (
        f"{config.dataset}, latent dimension {config.latent_dim}, beta {config.beta:g}. "
        f"Best after epoch {best['epoch']}: validation bound {best['bound']:.2f} nats/image "
        "(beta = 1; lower is better)."
    )
    parts = [
        section("Metrics", _metrics(checkpoint, place)),
        section("Curves", _curves(place.log_folder)),
        section("Samples over training", _over_training(place.log_folder)),
        section(
            "Reconstructions",
            inline_figure(
                lambda path: figures.reconstructions(model, images[:36], path),
                "Validation images and what the model makes of them",
            ),
        ),
        section(
            "Samples",
            inline_figure(
                lambda path: figures.samples(model, path),
                "Decoded samples of the prior",
            ),
        ),
        section(
            "Latent traversals",
            inline_figure(
                lambda path: figures.traversal(model, images, path),
                "One dimension of z per row, the most informative first",
            ),
        ),
        facts_section(
            "Configuration",
            {
                "command": train_command(config, place.run, checkpoint.data.path),
                **in_effect(config.to_dict()),
            },
        ),
        facts_section("Environment", _environment(checkpoint)),
    ]
    return page(f"Run {place.run}", head, parts)


def _environment(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        **checkpoint.environment,
        "data (SHA-256)": checkpoint.data.digest,
        "weights (SHA-256)": checkpoint.weights_digest,
    }


#: Names of evaluations beside the logs: of ``run`` and the README, and of ``study``.
EVALUATIONS = ("evaluation.json", "evaluation-validation.json", "evaluation-test.json")


def _metrics(checkpoint: Checkpoint, place: Places) -> str:
    """The evaluations of this checkpoint beside the logs; without any, the last validation."""
    found, stale = [], ""
    for path in (place.log_folder / name for name in EVALUATIONS):
        if path.exists():
            evaluation = Evaluation.from_dict(read_json(path), str(path))
            if evaluation.checkpoint_digest == checkpoint.digest:
                found.append(_evaluation(evaluation))
            else:
                stale += f"{path} is of other weights. "
    if found:
        return "".join(found)
    losses = checkpoint.own_losses
    words = ["vae-hyperband", "evaluate", str(checkpoint.path)]
    words += ["--json", str(place.log_folder / EVALUATIONS[0])]
    words += network_option(checkpoint.config.network)
    if place.data_dir:
        words += ["--data-dir", str(place.data_dir)]
    note = (
        f'<p class="quiet">Validation split, nats per image. {escape(stale)}With standard errors, '
        f'FID and probes, after this command: <span class="code">{escape(shlex.join(words))}'
        "</span></p>"
    )
    rows = {title: f"{losses[name]:.2f}" for name, title in LOSS_NAMES.items()}
    return facts("Losses", rows) + note


def _evaluation(evaluation: Evaluation) -> str:
    return quiet(headline(evaluation)) + "".join(
        f"<h3>{escape(part.title)}</h3>{table(part)}" for part in evaluation_tables(evaluation)
    )


def _curves(log_folder: Path) -> str:
    if not figures.logged_losses(log_folder):
        return quiet(f"There are none in {log_folder}: metrics.jsonl is missing or damaged.")
    return inline_figure(lambda path: figures.curves(log_folder, path), "Losses over training")


def _over_training(log_folder: Path) -> str:
    pictures = logged_samples(log_folder, most=4)
    if not pictures:
        return quiet(f"There are none in {log_folder}: TensorBoard's files are missing or damaged.")
    shown = [
        figure(png(picture), f"after step {step:,}", "Samples of the same noise")
        for step, picture in pictures.items()
    ]
    note = quiet("The same noise, decoded after the first and last validation and some in between.")
    return f'{note}<div class="row">{"".join(shown)}</div>'


def search_report(found: SearchResult, name: str) -> str:
    """Curves, hyperparameters against score, all trials and the settings of a finished search."""
    if not found.winner.best_row:
        raise ConfigError(f"No trial of {found.folder} has a result to report.")
    config = found.config
    parts = [
        section(
            "All trials",
            inline_figure(
                lambda path: search_figure.best_config(found, path),
                "Curves of all trials, stopped ones in grey; each hyperparameter against the "
                "score; rate against distortion if the space has several betas",
            ),
        ),
        section("Table of trials", _trials(found)),
        facts_section(
            "Settings",
            {"command": _search_command(config, name), **config.in_effect()},
        ),
    ]
    if (found.folder / WINNER).exists():
        winner = load_ckpt(found.folder / WINNER)
        parts.append(facts_section("Environment of the winner", _environment(winner)))
    return page(f"Search {name}", summary_of(found), parts)


def _search_command(config: SearchConfig, name: str) -> str:
    """The command that repeats the search, without its data and folders."""
    # the row "space" below the command is what the file has to hold
    space = {"space": "space.json"} if config.space else {}
    settings = {k: v for k, v in config.to_dict().items() if k not in (config.space or ())}
    changed = changed_options(settings | space, SearchConfig().to_dict())
    return shlex.join(["vae-hyperband", "search", "--run", name, *changed])


def _chosen(name: str) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.hyperparameters[name]


def _best(loss: Column) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.best_row[loss] if trial.best_row else ""


_COLUMNS: dict[str, Callable[[TrialRecord], Any]] = {
    "trial": lambda trial: trial.number,
    "outcome": lambda trial: trial.outcome or "",
    "epochs": lambda trial: trial.num_epochs,
}
_RESULTS: dict[str, Callable[[TrialRecord], Any]] = {
    "bound": _best("bound"),
    "recon_loss": _best("recon_loss"),
    "KL_divergence": _best("KL_divergence"),
    "why": lambda trial: trial.why,
}


def _trials(found: SearchResult) -> str:
    chosen = {name: _chosen(name) for name in found.config.domains}
    columns = _COLUMNS | chosen | _RESULTS
    metric = found.config.metric
    if metric not in columns:
        columns[metric] = _best(metric)
    sorted_by: dict[str, str] = {metric: ' aria-sort="ascending"'}
    head = "".join(
        f'<th scope="col"{sorted_by.get(name, "")}>'
        f"<button>{escape(name.replace('_', ' '))}</button></th>"
        for name in columns
    )
    rows = []
    for trial in sorted(found.trials, key=lambda trial: trial.score(metric)):
        values = [value(trial) for value in columns.values()]
        cells = "".join(
            f'<td data-value="{escape(str(value))}"{_number(value)}>{escape(_short(value))}</td>'
            for value in values
        )
        kind = ' class="winner"' if trial is found.winner else ""
        rows.append(f"<tr{kind}>{cells}</tr>")
    ranked = f"Ranked by {found.config.metric_name}."
    note = f"Losses in nats per image, of each trial's best epoch. {ranked}"
    trials = wide("Trials", f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")
    return quiet(note) + trials


def _number(value: Any) -> str:
    return ' class="number"' if isinstance(value, int | float) else ""


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else shown(value)
