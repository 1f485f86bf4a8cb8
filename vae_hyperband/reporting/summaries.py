"""What a command says at its end: short tables, and the pictures of a run."""

import math
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.process import EXIT_STOPPED
from vae_hyperband.data.splits import CLASS_NAMES, as_trained, load_split
from vae_hyperband.data.synthetic import KINDS
from vae_hyperband.evaluation.latents import encode_images
from vae_hyperband.model.checkpoint import load_model
from vae_hyperband.reporting import figures
from vae_hyperband.search.config import METRICS
from vae_hyperband.search.trials import SearchResult, describe
from vae_hyperband.training.loop import FitResult
from vae_hyperband.training.tracker import most_in_sprite, write_projector

#: What the labels of a data set are called.
LABEL_NAMES = {"fashion-mnist": CLASS_NAMES, "drawn": KINDS}


def program(name: str) -> str:
    """How to call a program of this environment: by its name, or by its path if it is not found."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def say(text: str) -> None:
    """Tell who waits what is being done; stdout is for what comes of it."""
    print(text, file=sys.stderr, flush=True)


def stopped(command: str, argv: list[str]) -> int:
    """Say how to go on; the exit status of a command that was told to stop."""
    again = [command, *(argument for argument in argv if argument != "--fresh")]
    print(f"stopped and saved; go on with: {program('vae-hyperband')} {shlex.join(again)}")
    return EXIT_STOPPED


def say_trained(trained: FitResult, where: RunOptions) -> None:
    """The end of a training: its best checkpoint and its pictures."""
    best = trained.state.best
    chosen = ""
    if not math.isclose(best["total_loss"], best["bound"]):
        chosen = f"by the run's own validation loss, {best['total_loss']:.2f} nats/image; "
    print(
        f"best after epoch {best['epoch']}, {chosen}validation bound {best['bound']:.2f} "
        f"nats/image (beta = 1): {trained.best}"
    )
    print(f"SHA-256 of the final weights: {trained.weights}")
    for path in draw_run(trained, trained.state.config, where.data_dir):
        print(f"picture: {path}")
    print(f"look at the run: {look_at(where.logs_dir)}")


def look_at(logs_dir: Path) -> str:
    """The command that opens TensorBoard over the logs, on loopback."""
    return shlex.join([program("tensorboard"), "--logdir", str(logs_dir), "--host", "127.0.0.1"])


def summary_of(found: SearchResult) -> str:
    """The end of a search in a few sentences."""
    config, failed = found.config, found.with_outcome("failed")
    full = config.total_trials * config.max_epochs
    lines = [
        f"{found.winner.name} won with {found.best_score:.2f} ({METRICS[config.metric]}): "
        f"{describe(found.winner.hyperparameters)}.",
        f"{len(found.with_outcome('stopped'))} of {len(found.trials)} trials were stopped early, "
        f"{len(failed)} failed; {found.epochs_spent} epochs were trained, {found.epochs_saved} "
        f"saved (all to the end: {full}).",
    ]
    lines += [trial.summary for trial in failed]
    if found.importance:
        shares = sorted(found.importance.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        lines.append(f"What mattered (share of the variance): {words}.")
    return "\n".join(lines)


class Table(NamedTuple):
    """Rows of cells, each row named by its first cell; a head, if the columns have names."""

    title: str
    head: list[str]
    rows: list[list[str]]


def table_of(report: dict[str, Any]) -> str:
    """An evaluation as lines of text."""
    lines = [headline(report)]
    for title, head, rows in tables_of(report):
        lines += ["", title]
        if head:
            widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
            lines += [
                f"  {row[0]:18} " + "  ".join(map(str.rjust, row[1:], widths[1:]))
                for row in [head, *rows]
            ]
        else:
            lines += [f"  {name:18} {value}" for name, value in rows]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    return f"{report['split']} split, {report['num_images']:,} images; mean +- standard error"


def tables_of(report: dict[str, Any]) -> list[Table]:
    """An evaluation as up to three tables."""
    tables = []
    if "bound" in report:
        rows = _likelihood_rows(report)
        tables.append(Table(f"likelihood: {report['unit']}", [], _pairs(rows)))
    if "latents" in report:
        title = "latent space"
        if "linear_probe" in report["latents"]:
            title += ": accuracy of probes on the posterior means"
        tables.append(Table(title, [], _pairs(_latent_rows(report["latents"]))))
    if "images" in report:
        tables.append(_image_table(report["images"]))
    return tables


def _pairs(rows: dict[str, str]) -> list[list[str]]:
    return [[name, value] for name, value in rows.items()]


def _likelihood_rows(report: dict[str, Any]) -> dict[str, str]:
    rows = {
        "bound": with_error(report["bound"]),
        "  reconstruction": with_error(report["recon_loss"]),
        "  KL divergence": with_error(report["KL_divergence"]),
    }
    if iwae := report.get("iwae"):
        gain = with_error(iwae["gain_on_these_images"])
        rows[f"IWAE-{iwae['num_samples']} bound"] = (
            f"{with_error(iwae)}  (the bound less {gain}, from {iwae['num_images']:,} images)"
        )
    if "entropy_floor" in report:
        rows |= {
            "entropy floor": f"{abs(report['entropy_floor']):.2f}",  # of black and white it is -0
            "bound above floor": f"{report['nats_above_floor']:.2f}",
            "mean image": f"{report['mean_image']:.2f}  (the bound closes "
            f"{report['share_of_gap']:.1%} of the gap from here to the floor)",
        }
    return rows


def _latent_rows(latents: dict[str, Any]) -> dict[str, str]:
    rows = {
        "active units": f"{latents['active_units']} of {latents['latent_dim']}"
        + ("  COLLAPSED: z says nothing about the image" if latents["collapsed"] else ""),
        "mutual information": f"{with_error(latents['mutual_information'])} nats",
    }
    for probe, name in (("linear_probe", "linear probe"), ("knn_probe", "kNN probe")):
        if probe in latents:  # there is none of images of a single class
            of_pixels = _three(latents["raw_pixels"][probe])
            rows[name] = f"{_three(latents[probe])}  (raw pixels {of_pixels})"
    if factors := latents.get("factors"):
        dci = factors["dci"]
        rows |= {
            "MIG": f"{factors['mig']:.3f}",
            "FactorVAE score": f"{factors['factor_vae_score']:.3f}",
            "DCI": f"disentanglement {dci['disentanglement']:.3f}, completeness "
            f"{dci['completeness']:.3f}, informativeness {dci['informativeness']:.3f}",
        }
    return rows


def _image_table(images: dict[str, Any]) -> Table:
    """A column for each kind of images; a dash where a measure does not apply."""
    measures = {
        "fid": "FID", "precision": "precision", "recall": "recall", "density": "density",
        "coverage": "coverage", "closer_than_held_out": "copying",
    }  # fmt: skip
    if "inception_fid" in images["real"]:
        measures["inception_fid"] = "Inception FID"
    kinds = {name: kind for name, kind in images.items() if isinstance(kind, dict)}
    rows = [["images", *(f"{kind['num_images']:,}" for kind in kinds.values())]]
    for key, title in measures.items():
        digits = 2 if "fid" in key else 3
        cells = (with_error(kind[key], digits) if key in kind else "-" for kind in kinds.values())
        rows.append([title, *cells])
    title = "images against the split's, as a classifier of Fashion-MNIST sees them"
    return Table(title, ["", *kinds], rows)


def _three(value: dict[str, float]) -> str:
    return with_error(value, 3)


def with_error(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['mean']:.{digits}f} +- {value['standard_error']:.{digits}f}"


def draw_run(trained: FitResult, config: TrainConfig, data_dir: Path | None) -> list[Path]:
    """The pictures of a trained run, beside its logs; made from validation images."""
    folder, model = trained.log_folder, load_model(trained.best)
    split = as_trained(load_split("validation", data_dir, config.dataset), config)
    images = split.pixels(slice(1000))
    draw: dict[str, Callable[[Path], Path]] = {
        "curves.png": lambda path: figures.curves(folder, path),
        "reconstructions.png": lambda path: figures.reconstructions(model, images[:36], path),
        "samples.png": lambda path: figures.samples(model, path),
        "traversal.png": lambda path: figures.traversal(model, images, path),
    }
    shown = split.pixels(slice(most_in_sprite(*split.image_shape[1:])))
    write_projector(
        folder,
        encode_images(model, shown).mu_NZ,
        shown,
        split.labels_N[: len(shown)],
        LABEL_NAMES.get(config.dataset, ()),
    )
    return [function(folder / name) for name, function in draw.items()]
