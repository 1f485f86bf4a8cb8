"""What a command says at its end: short tables, and the pictures of a run."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_hyperband import figures
from vae_hyperband.checkpoint import load_model
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import load_split
from vae_hyperband.training import FitResult
from vae_hyperband.trials import SearchResult, describe


def program(name: str) -> str:
    """How to call a program of this environment: by its name, or by its path if it is not found."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def look_at(logs_dir: Path) -> str:
    """The command that opens TensorBoard over the logs, on loopback."""
    return f"{program('tensorboard')} --logdir {logs_dir} --host 127.0.0.1"


def summary_of(found: SearchResult) -> str:
    """The end of a search in three sentences."""
    return (
        f"{found.winner.name} won with {found.winner.best_bound:.2f} nats/image (validation, "
        f"beta = 1): {describe(found.winner.drawn)}.\n"
        f"{found.num_stopped} of {len(found.trials)} trials were stopped early, {found.num_failed} "
        f"failed; {found.epochs_spent} epochs were trained, {found.epochs_saved} saved."
    )


def table_of(report: dict[str, Any]) -> str:
    """An evaluation as lines of text."""
    rows = {
        "bound": with_error(report["bound"]),
        "  reconstruction": with_error(report["recon_loss"]),
        "  KL divergence": with_error(report["KL_divergence"]),
        "entropy floor": f"{report['entropy_floor']:.2f}",
        "bound above floor": f"{report['nats_above_floor']:.2f}",
    }
    head = f"{report['split']} split, {report['num_images']:,} images, {report['unit']}"
    return "\n".join([head, *(f"  {name:18} {value}" for name, value in rows.items())])


def with_error(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} +- {value['standard_error']:.2f}"


def draw_run(trained: FitResult, config: TrainConfig, data_dir: Path | None) -> list[Path]:
    """The pictures of a trained run, beside its logs; made from validation images."""
    folder, model = trained.log_folder, load_model(trained.best)
    images = load_split("validation", data_dir, config.dataset).pixels(slice(1000))
    draw: dict[str, Callable[[Path], Path]] = {
        "curves.png": lambda path: figures.curves(folder, path),
        "reconstructions.png": lambda path: figures.reconstructions(model, images[:36], path),
        "samples.png": lambda path: figures.samples(model, path),
        "traversal.png": lambda path: figures.traversal(model, images, path),
    }
    return [function(folder / name) for name, function in draw.items()]
