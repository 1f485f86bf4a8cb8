"""Every picture. Colours are Okabe & Ito's, which the colour-blind can tell apart."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from vae_hyperband.errors import RunFolderError
from vae_hyperband.model import VAE
from vae_hyperband.objective import kl_per_dimension
from vae_hyperband.process import make_folder
from vae_hyperband.randomness import generator
from vae_hyperband.tracking import image_grid, read_rows
from vae_hyperband.trials import SearchResult, TrialRecord

ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#B0B0B0"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
}


P = ParamSpec("P")


def styled(draw: Callable[P, Path]) -> Callable[P, Path]:
    """Draw with :data:`STYLE`, and leave the caller's own matplotlib settings as they were."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Path:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def _save(figure: Figure, path: Path) -> Path:
    make_folder(path.parent)
    try:
        figure.savefig(path)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
    return path


@styled
def best_config(result: SearchResult, path: Path) -> Path:
    """The picture of a search: every trial's curve, who was stopped, who won, and what mattered."""
    names = [name for name, values in _choices(result).items() if len(values) > 1]
    figure = Figure(figsize=(10, 2 + 1.6 * max(len(names), 2)))
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1), squeeze=False)[0]
    above, below = left.subplots(2, 1, height_ratios=(4, 1))
    _draw_curves(above, result)
    _write_winner(below, result)
    if names:
        for axes, name in zip(
            right.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True
        ):
            _draw_relation(axes, result, name)
        right.axes[0].set_title("open: stopped early", fontsize=8, color="#606060")
    return _save(figure, path)


def _choices(result: SearchResult) -> dict[str, tuple[Any, ...]]:
    config = result.config
    return {
        "latent_dim": config.latent_dims,
        "learning_rate": config.learning_rates,
        "batch_size": config.batch_sizes,
        "beta": config.betas,
    }


def _color(result: SearchResult, trial: TrialRecord) -> str:
    if trial is result.winner:
        return ORANGE
    return BLUE if trial.num_epochs == result.config.max_epochs else GREY


def _draw_curves(axes: Axes, result: SearchResult) -> None:
    usable = [trial for trial in result.trials if trial.bounds and trial.error is None]
    for trial in sorted(usable, key=lambda t: (t is result.winner, t.num_epochs)):
        wins, color = trial is result.winner, _color(result, trial)
        axes.plot(
            trial.epochs,
            trial.bounds,
            color=color,
            linewidth=2.2 if wins else 1.1,
            marker="o",
            markersize=4 if wins else 3,
            zorder=3 if wins else 2,
        )
    complete = [t for t in usable if t.num_epochs == result.config.max_epochs]
    num_others = sum(trial is not result.winner for trial in complete)
    for label, color in (
        (f"winner, {result.winner.name.replace('_', ' ')}", ORANGE),
        (f"others trained to the end ({num_others})", BLUE),
        (f"stopped early ({result.num_stopped})", GREY),
    ):
        axes.plot([], [], color=color, marker="o", markersize=4, label=label)
    axes.set(
        xlabel="epoch",
        ylabel="validation bound (nats/image)",
        title=f"{len(result.trials)} trials, {result.config.scheduler.upper()}; lower is better",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _write_winner(axes: Axes, result: SearchResult) -> None:
    drawn, config = result.winner.drawn, result.config
    spent = f"{result.epochs_spent} epochs trained, {result.epochs_saved} saved by stopping early"
    axes.axis("off")
    axes.text(
        0,
        0.9,
        f"Best configuration: {result.winner.best_bound:.2f} nats/image (validation, beta = 1)",
        color=ORANGE,
        weight="bold",
        va="top",
    )
    axes.text(
        0,
        0.65,
        f"latent_dim {drawn['latent_dim']}    learning_rate {drawn['learning_rate']:.3g}    "
        f"batch_size {drawn['batch_size']}    beta {drawn['beta']:g}    seed {config.seed}\n{spent}"
        + (f", {result.num_failed} trials failed" if result.num_failed else ""),
        va="top",
        linespacing=1.6,
    )


def _draw_relation(axes: Axes, result: SearchResult, name: str) -> None:
    """The trials' best bounds against one hyperparameter; open circles had fewer epochs."""
    values = sorted({trial.drawn[name] for trial in result.trials})
    categorical = name != "learning_rate"
    for trial in result.trials:
        if trial.error is not None or not trial.bounds:
            continue
        x = values.index(trial.drawn[name]) if categorical else trial.drawn[name]
        color, wins = _color(result, trial), trial is result.winner
        complete = trial.num_epochs == result.config.max_epochs
        axes.scatter(
            x,
            trial.best_bound,
            s=110 if wins else 26,
            marker="*" if wins else "o",
            facecolors=color if complete or wins else "none",
            edgecolors=color,
            zorder=3 if wins else 2,
        )
    if categorical:
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=name, ylabel="best bound (nats)")
    axes.yaxis.set_major_locator(MaxNLocator(4))


@styled
def curves(log_folder: Path, path: Path) -> Path:
    """Training and validation losses of a run, from its metrics.jsonl."""
    rows = read_rows(log_folder / "metrics.jsonl")
    figure = Figure(figsize=(10, 3))
    axes = figure.subplots(1, 3)
    titles = {
        "bound": "bound = reconstruction + KL",
        "recon_loss": "reconstruction",
        "KL_divergence": "KL divergence",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for split, color in (("train", GREY), ("validation", BLUE)):
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            if points:
                marker = "o" if split == "validation" else None
                axis.plot(*zip(*points, strict=True), color=color, label=split, marker=marker, ms=3)
        held_out = [row[name] for row in rows if row["split"] == "validation"]
        if held_out:  # the first steps are many times higher and would hide all the rest
            low, high = min(held_out), max(held_out)
            room = max(high - low, 0.5)
            axis.set_ylim(low - 0.4 * room, high + 0.6 * room)
        axis.set(xlabel="step", ylabel="nats/image", title=title)
    axes[0].legend()
    return _save(figure, path)


def _show(axes: Axes, images_NCHW: Tensor, columns: int) -> None:
    grid_CHW = image_grid(images_NCHW, columns, background=0.0)
    # ink on paper: 0 is white
    if len(grid_CHW) == 1:
        axes.imshow(grid_CHW[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(grid_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.axis("off")


@styled
def reconstructions(model: VAE, images_NCHW: Tensor, path: Path) -> Path:
    """Images in one row, what the model makes of them in the next."""
    columns = 12
    inputs, outputs = images_NCHW, model.reconstruct(images_NCHW)
    blocks = [
        block
        for start in range(0, len(inputs), columns)
        for block in (inputs[start : start + columns], outputs[start : start + columns].cpu())
    ]
    figure = Figure(figsize=(8, 0.7 * len(blocks) + 0.4))
    axes = figure.subplots()
    _show(axes, torch.cat(blocks), columns)
    axes.set_title("upper rows: images the model has not seen; lower rows: their reconstructions")
    return _save(figure, path)


@styled
def samples(model: VAE, path: Path, num_samples: int = 64, seed: int = 0) -> Path:
    """A grid of images decoded from draws of the prior."""
    images_NCHW = model.sample(num_samples, generator(seed, "sample"))
    columns = max(1, min(16, round(num_samples**0.5)))
    rows = -(-num_samples // columns)
    figure = Figure(figsize=(0.7 * columns, 0.7 * rows + 0.3))
    axes = figure.subplots()
    _show(axes, images_NCHW, columns)
    axes.set_title(f"{num_samples} samples, z ~ N(0, I), seed {seed}")
    return _save(figure, path)


@styled
@torch.no_grad()
def traversal(model: VAE, images_NCHW: Tensor, path: Path, num_dims: int = 8) -> Path:
    """One image's latent, one dimension at a time from -3 to 3; the most used dimensions first."""
    device = next(model.parameters()).device
    kl_Z = kl_per_dimension(*model.encode(images_NCHW.to(device))).mean(dim=0).cpu()
    dims = kl_Z.argsort(descending=True)[:num_dims].tolist()
    steps = torch.linspace(-3, 3, 11)
    mu_1Z, _ = model.encode(images_NCHW[:1].to(device))
    figure = Figure(figsize=(8, 0.62 * len(dims) + 0.6))
    axes = figure.subplots()
    z_BZ = mu_1Z.repeat(len(dims) * len(steps), 1)
    for row, dim in enumerate(dims):
        z_BZ[row * len(steps) : (row + 1) * len(steps), dim] = steps.to(device)
    _show(axes, torch.sigmoid(model.decode(z_BZ)).cpu(), columns=len(steps))
    pitch = images_NCHW.shape[-1] + 2
    for row, dim in enumerate(dims):
        label = f"z[{dim}]  {kl_Z[dim]:.2f} nats"
        axes.text(-4, row * pitch + pitch / 2, label, ha="right", va="center")
    axes.set_title("from -3 (left) to +3 (right), other dimensions at the image's mean")
    return _save(figure, path)
