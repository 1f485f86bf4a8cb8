"""What a command says at its end: short tables, and the pictures of a run."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_hyperband import figures
from vae_hyperband.checkpoint import load_model
from vae_hyperband.config import RunOptions, TrainConfig
from vae_hyperband.data import load_split
from vae_hyperband.process import EXIT_STOPPED
from vae_hyperband.training import FitResult
from vae_hyperband.trials import SearchResult, describe


def program(name: str) -> str:
    """How to call a program of this environment: by its name, or by its path if it is not found."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def stopped(command: str, argv: list[str]) -> int:
    """Say how to go on; the exit status of a command that was told to stop."""
    again = [command, *(argument for argument in argv if argument != "--fresh")]
    print(f"stopped and saved; go on with: {program('vae-hyperband')} {shlex.join(again)}")
    return EXIT_STOPPED


def say_trained(trained: FitResult, where: RunOptions) -> None:
    """The end of a training: its best checkpoint and its pictures."""
    best = trained.state.best
    print(
        f"best validation bound {best['bound']:.2f} nats/image (beta = 1) after epoch "
        f"{best['epoch']}: {trained.best}"
    )
    for path in draw_run(trained, trained.state.config, where.data_dir):
        print(f"picture: {path}")
    print(f"look at the run: {look_at(where.logs_dir)}")


def look_at(logs_dir: Path) -> str:
    """The command that opens TensorBoard over the logs, on loopback."""
    return f"{program('tensorboard')} --logdir {logs_dir} --host 127.0.0.1"


def summary_of(found: SearchResult) -> str:
    """The end of a search in a few sentences."""
    config, failed = found.config, found.with_outcome("failed")
    judged = {"bound": "validation bound, beta = 1", "iwae": "validation IWAE bound"}
    full = config.total_trials * config.max_epochs
    lines = [
        f"{found.winner.name} won with {found.best_score:.2f} nats/image "
        f"({judged[config.metric]}): {describe(found.winner.drawn)}.",
        f"{len(found.with_outcome('stopped'))} of {len(found.trials)} trials were stopped early, "
        f"{len(failed)} failed; {found.epochs_spent} epochs were trained, {found.epochs_saved} "
        f"saved (all to the end: {full}).",
    ]
    lines += [f"{trial.name} failed: {trial.why} ({describe(trial.drawn)})" for trial in failed]
    if found.importance:
        shares = sorted(found.importance.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        lines.append(f"What mattered (share of the variance): {words}.")
    return "\n".join(lines)


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
