"""The report of a run or a search: one HTML file that loads nothing."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from vae_hyperband.common.checks import read_json, require
from vae_hyperband.common.config import Places, in_effect, network_option
from vae_hyperband.common.files import check_place, make_folder, write_text
from vae_hyperband.data.splits import as_trained
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.reporting import figures
from vae_hyperband.reporting.animations import logged_samples
from vae_hyperband.reporting.page import WEB, Data, Picture, render
from vae_hyperband.reporting.runs import best_ckpt
from vae_hyperband.reporting.search_report import environment_of, search_report
from vae_hyperband.reporting.tables import LOSS_NAMES, evaluation_tables, headline
from vae_hyperband.search.decisions import read_search
from vae_hyperband.search.trials import DECISIONS, RESULT
from vae_hyperband.training.loop import train_command

#: Seconds between two looks at the decision log of a search that is being followed.
LOOK_AGAIN = 1.0


def report(place: Places) -> str:
    """The report of a search, finished or not, or of a run with a best checkpoint, of that name."""
    if _is_search(place):
        return search_report(read_search(place.ckpt_folder), place.run)
    return run_report(place)


def _is_search(place: Places) -> bool:
    return any((place.ckpt_folder / name).exists() for name in (RESULT, DECISIONS))


def write_report(place: Places, out: Path | None = None) -> Path:
    """The report as a file: ``out``, or report.html in the log folder."""
    if out:
        check_place(out, ".html", ".htm")  # fail before the work
    text = report(place)
    out = out or place.log_folder / "report.html"
    make_folder(out.resolve().parent)
    write_text(out, text)
    return out


def follow_search(place: Places, out: Path | None = None) -> Iterator[Path]:
    """Write the report of a search whenever it has gone on, until it has finished.

    Yields the file after each writing; an open page reloads itself. Raises :class:`ConfigError` for
    what is not a search that has begun.
    """
    require(
        _is_search(place),
        f"{place.ckpt_folder} holds no search that has begun: --watch follows a search, and "
        "TensorBoard shows a run while it trains.",
    )
    finished, seen = False, -1
    while not finished:
        # before reading: what is written from here on is seen at the next look
        finished = (place.ckpt_folder / RESULT).exists()
        # a finished search needs no log: someone may have kept its result alone
        size = -1 if finished else (place.ckpt_folder / DECISIONS).stat().st_size
        if finished or size != seen:
            yield write_report(place, out)
            seen = size
        else:
            time.sleep(LOOK_AGAIN)


def run_report(place: Places) -> str:
    """Configuration, curves, samples over training, traversals, metrics, environment of a run.

    Raises :class:`CheckpointError` if it has no best.pt, :class:`DataError` without its data.
    """
    checkpoint = load_ckpt(best_ckpt(place))
    config, best = checkpoint.config, checkpoint.best
    head = (
        f"{config.dataset}, latent dimension {config.latent_dim}, beta {config.beta:g}. "
        f"Best after epoch {best['epoch']}: validation bound {best['bound']:.2f} nats/image "
        "(beta = 1; lower is better)."
    )
    has_losses = bool(figures.logged_losses(place.log_folder))
    values = {
        "title": f"Run {place.run}",
        "head": [head],
        **_metrics(checkpoint, place),
        "log_folder": place.log_folder,
        "curves": Picture.drawn(
            lambda path: figures.curves(place.log_folder, path), "Losses over training"
        ) if has_losses else None,
        "over_training": [
            Picture.of(picture, "Samples of the same noise", f"after step {step:,}")
            for step, picture in logged_samples(place.log_folder, most=4).items()
        ],
        "pictures": _pictures(checkpoint, place),
        "configuration": {
            "command": train_command(config, place.run, checkpoint.data.path),
            **in_effect(config.to_dict()),
        },
        "environment": environment_of(checkpoint),
    }  # fmt: skip
    script = (WEB / "report.js").read_text(encoding="utf-8")
    return render(WEB / "run.html.jinja", values, WEB / "report.css", [script])


def _pictures(checkpoint: Checkpoint, place: Places) -> dict[str, Picture]:
    """What the model makes of validation images, by the heading above it."""
    model = checkpoint.model()
    split = as_trained(checkpoint.split("validation", place), checkpoint.config)
    images = split.pixels(slice(1000))
    return {
        "Reconstructions": Picture.drawn(
            lambda path: figures.reconstructions(model, images[:36], path),
            "Validation images and what the model makes of them",
        ),
        "Samples": Picture.drawn(
            lambda path: figures.samples(model, path), "Decoded samples of the prior"
        ),
        "Latent traversals": Picture.drawn(
            lambda path: figures.traversal(model, images, path),
            "One dimension of z per row, the most informative first",
        ),
    }


#: Names of evaluations beside the logs: of ``run`` and the README, and of ``study``.
EVALUATIONS = ("evaluation.json", "evaluation-validation.json", "evaluation-test.json")


def _metrics(checkpoint: Checkpoint, place: Places) -> Data:
    """The evaluations of this checkpoint beside the logs; without any, the last validation."""
    found, stale = [], ""
    for path in (place.log_folder / name for name in EVALUATIONS):
        if path.exists():
            evaluation = Evaluation.from_dict(read_json(path), str(path))
            if evaluation.checkpoint_digest == checkpoint.digest:
                found.append((headline(evaluation), evaluation_tables(evaluation)))
            else:
                stale += f"{path} is of other weights. "
    words = ["vae-hyperband", "evaluate", str(checkpoint.path)]
    words += ["--json", str(place.log_folder / EVALUATIONS[0])]
    words += network_option(checkpoint.config.network)
    if place.data_dir:
        words += ["--data-dir", str(place.data_dir)]
    losses = checkpoint.own_losses
    return {
        "evaluations": found,
        "stale": stale,
        "losses": {title: f"{losses[name]:.2f}" for name, title in LOSS_NAMES.items()},
        "evaluate_command": shlex.join(words),
    }
