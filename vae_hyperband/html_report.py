"""A run or a search as one HTML file that needs no network: to be looked at, kept and handed on."""

import base64
import hashlib
import io
import json
import shlex
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vae_hyperband import figures, search_figures
from vae_hyperband.animations import logged_samples
from vae_hyperband.checkpoint import load_ckpt, model_from_ckpt
from vae_hyperband.config import Places, in_effect, read_json
from vae_hyperband.data import as_trained
from vae_hyperband.errors import ConfigError
from vae_hyperband.report import Table, headline, summary_of, tables_of
from vae_hyperband.search_config import METRICS
from vae_hyperband.trained import LOSSES, best_ckpt, own_losses, split_of
from vae_hyperband.trials import RESULT, SearchResult, TrialRecord, read_result

WEB = Path(__file__).with_name("web")


def report(place: Places) -> str:
    """The report of whatever has that name, a finished search or a run with a best checkpoint."""
    if (place.ckpt_folder / RESULT).exists():
        return search_report(read_result(place.ckpt_folder), place.run)
    return run_report(place)


def run_report(place: Places) -> str:
    """Configuration, curves, samples over training, traversals, metrics, environment of a run.

    Raises :class:`CheckpointError` if it has no best.pt, :class:`DataError` without its data.
    """
    ckpt = best_ckpt(place)
    content = load_ckpt(ckpt)
    config, model = content["config"], model_from_ckpt(content, ckpt).eval()
    split = as_trained(split_of(content, ckpt, "validation", place.data_dir), config)
    images = split.pixels(slice(1000))
    best = content["best"]
    head = (
        f"{config['dataset']}, latent dimension {config['latent_dim']}, beta {config['beta']:g}. "
        f"Best after epoch {best['epoch']}: validation bound {best['bound']:.2f} nats/image "
        "(beta = 1; lower is better)."
    )
    parts = [
        _section("Metrics", _metrics(content, ckpt, place.log_folder / "evaluation.json")),
        _section(
            "Curves",
            _drawn(lambda path: figures.curves(place.log_folder, path), "Losses over training"),
        ),
        _section("Samples over training", _over_training(place.log_folder)),
        _section(
            "Reconstructions",
            _drawn(
                lambda path: figures.reconstructions(model, images[:36], path),
                "Validation images and what the model makes of them",
            ),
        ),
        _section(
            "Samples",
            _drawn(lambda path: figures.samples(model, path), "Decoded draws of the prior"),
        ),
        _section(
            "Latent traversals",
            _drawn(
                lambda path: figures.traversal(model, images, path),
                "One dimension of z a row, those that say most first",
            ),
        ),
        _section("Configuration", _facts(in_effect(config))),
        _section(
            "Environment",
            _facts(
                {
                    **content["environment"],
                    "data (SHA-256)": content["data"]["digest"],
                    "weights (SHA-256)": content["weights"],
                }
            ),
        ),
    ]
    return _page(f"Run {place.run}", head, parts)


def _metrics(content: dict[str, Any], ckpt: Path, path: Path) -> str:
    """The evaluation beside the logs, if it is of this checkpoint; else the last validation."""
    stale = ""
    if path.exists():
        evaluation = read_json(path)
        if evaluation.get("checkpoint_digest") == content["digest"]:
            return f'<p class="quiet">{escape(headline(evaluation))}</p>' + "".join(
                f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in tables_of(evaluation)
            )
        stale = f"{path} is of other weights. "
    losses = own_losses(content)
    command = shlex.join(["vae-hyperband", "evaluate", str(ckpt), "--json", str(path)])
    note = (
        f'<p class="quiet">Validation split, nats per image. {escape(stale)}With standard errors, '
        f'FID and probes, after this command: <span class="code">{escape(command)}</span></p>'
    )
    return _facts({title: f"{losses[name]:.2f}" for name, title in LOSSES.items()}) + note


def _over_training(log_folder: Path) -> str:
    pictures = logged_samples(log_folder, most=4)
    if not pictures:
        return '<p class="quiet">None were logged: the run was trained without TensorBoard.</p>'
    shown = [
        _figure(_png(picture), f"after step {step:,}", "Samples of the same noise")
        for step, picture in pictures.items()
    ]
    return f'<div class="row">{"".join(shown)}</div>'


def search_report(found: SearchResult, name: str) -> str:
    """Curves, relations, the table of all trials and what was saved, of a finished search."""
    if not found.winner.best_row:
        raise ConfigError(f"No trial of {found.folder} has a result to report.")
    parts = [
        _section(
            "Every trial",
            _drawn(
                lambda path: search_figures.best_config(found, path),
                "Curves of all trials, the stopped ones grey; each hyperparameter against the "
                "score; rate against distortion where there are several betas",
            ),
        ),
        _section("Table of trials", _trials(found)),
        _section("What was searched", _facts(in_effect(found.config.to_dict()))),
    ]
    return _page(f"Search {name}", summary_of(found), parts)


def _best(loss: str) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.best_row[loss] if trial.best_row else ""


_COLUMNS: dict[str, Callable[[TrialRecord], Any]] = {
    "trial": lambda trial: trial.number,
    "outcome": lambda trial: trial.outcome or "",
    "epochs": lambda trial: trial.num_epochs,
    "latent_dim": lambda trial: trial.drawn["latent_dim"],
    "learning_rate": lambda trial: trial.drawn["learning_rate"],
    "batch_size": lambda trial: trial.drawn["batch_size"],
    "beta": lambda trial: trial.drawn["beta"],
    **{loss: _best(loss) for loss in ("bound", "recon_loss", "KL_divergence")},
    "why": lambda trial: trial.why,
}


def _trials(found: SearchResult) -> str:
    columns = dict(_COLUMNS)
    metric = found.config.metric
    if metric not in columns:
        columns[metric] = _best(metric)
    head = "".join(
        f'<th scope="col"><button>{escape(name.replace("_", " "))}</button></th>'
        for name in columns
    )
    rows = []
    for trial in found.trials:
        values = [value(trial) for value in columns.values()]
        cells = "".join(
            f'<td data-value="{escape(str(value))}"{_number(value)}>{escape(_short(value))}</td>'
            for value in values
        )
        kind = ' class="winner"' if trial is found.winner else ""
        rows.append(f"<tr{kind}>{cells}</tr>")
    note = f"Losses in nats per image, of each trial's best epoch. Ranked by {METRICS[metric]}."
    return (
        f'<p class="quiet">{escape(note)}</p><div class="wide"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(value: Any) -> str:
    return "" if isinstance(value, str) else ' class="number"'


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _facts(facts: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        f'<td class="code">{escape(value if isinstance(value, str) else json.dumps(value))}</td>'
        "</tr>"
        for name, value in facts.items()
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in table.head)
    kind = ' class="number"' if table.head else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    return (
        f'<div class="wide"><table>{f"<thead><tr>{head}</tr></thead>" if head else ""}'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _drawn(draw: Callable[[Path], Path], about: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _figure(draw(Path(folder) / "picture.png").read_bytes(), "", about)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _figure(png: bytes, caption: str, about: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(f"{about}, {caption}" if caption else about)
    return f'<figure><img src="{source}" alt="{alt}">{below}</figure>'


def _page(title: str, head: str, sections: list[str]) -> str:
    css, script = style("report.css"), (WEB / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {csp_digest(css)}; script-src {csp_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in head.splitlines())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>{lines}\n<main>\n{chr(10).join(sections)}\n</main>\n"
        f"<footer>Made by vae-hyperband.</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def style(name: str) -> str:
    """A page's style sheet: what all pages have, then its own."""
    return "".join((WEB / file).read_text(encoding="utf-8") for file in ("base.css", name))


def csp_digest(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
