"""What a command prints at its end, and the figures of a run."""

import math
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import Folders, RunOptions
from vae_hyperband.common.process import EXIT_STOPPED
from vae_hyperband.data.splits import as_trained
from vae_hyperband.evaluation.latents import encode_images
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.search.space import describe
from vae_hyperband.search.trials import SearchResult
from vae_hyperband.training.loop import FitResult
from vae_hyperband.training.tracker import most_in_sprite, write_projector

#: Names of the labels of a data set.


def executable(name: str) -> str:
    """How to call a program of this environment: by its name if PATH has it, else by its path."""
    if shutil.which(name):
        return name
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_progress(text: str) -> None:
    """To stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def print_resume_hint(command: str, argv: list[str]) -> int:
    """Print the command that resumes, and return the exit status of a command that was stopped."""
    again = [command, *(argument for argument in argv if argument != "--fresh")]
    print(f"stopped and saved; resume with: {executable('vae-hyperband')} {shlex.join(again)}")
    return EXIT_STOPPED


def print_training_summary(trained: FitResult, where: RunOptions) -> None:
    """Print a run's best checkpoint, and draw its figures and print where they are."""
    best = trained.state.best
    chosen = ""
    if not math.isclose(best["total_loss"], best["bound"]):
        chosen = f"by the run's own validation loss, {best['total_loss']:.2f} nats/image; "
    print(
        f"best after epoch {best['epoch']}, {chosen}validation bound {best['bound']:.2f} "
        f"nats/image (beta = 1): {trained.best}"
    )
    print(f"SHA-256 of the final weights: {trained.weights}")
    for path in draw_run_figures(trained, where):
        print(f"figure: {path}")
    print(f"TensorBoard: {tensorboard_command(where.logs_dir)}")


def tensorboard_command(logs_dir: Path) -> str:
    """The command that opens TensorBoard over the logs, on loopback."""
    return shlex.join([executable("tensorboard"), "--logdir", str(logs_dir), "--host", "127.0.0.1"])


def summary_of(found: SearchResult) -> str:
    """The result of a search in a few sentences."""
    config, failed = found.config, found.with_outcome("failed")
    full = config.total_trials * config.max_epochs
    verb = "won" if found.finished else "leads"
    lines = [
        f"{found.winner.name} {verb} with {found.best_score:.2f} ({config.metric_name}): "
        f"{describe(found.winner.hyperparameters)}.",
        f"{len(found.with_outcome('stopped'))} of {plural(len(found.trials), 'trial')} stopped "
        f"early, {len(failed)} failed; {plural(found.epochs_spent, 'epoch')} trained, "
        f"{found.epochs_saved:,} saved (without early stopping: {full:,}).",
    ]
    lines += [trial.summary for trial in failed]
    if found.importance:
        shares = sorted(found.importance.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        lines.append(f"Importance (share of the variance): {words}.")
    return "\n".join(lines)


def draw_run_figures(trained: FitResult, folders: Folders) -> list[Path]:
    """The figures of a run, written beside its logs; those of images take validation images."""
    # not at the top: matplotlib takes a second, which a run need not wait for before it trains
    from vae_hyperband.reporting import figures

    folder, checkpoint = trained.log_folder, load_ckpt(trained.best)
    model = checkpoint.model()
    split = as_trained(checkpoint.split("validation", folders), checkpoint.config)
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
        checkpoint.class_names,
    )
    return [function(folder / name) for name, function in draw.items()]
