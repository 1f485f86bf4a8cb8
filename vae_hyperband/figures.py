"""Every picture of a run. Colours are Okabe & Ito's, which the colour-blind can tell apart."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vae_hyperband.files import make_folder, write_bytes
from vae_hyperband.latents import encode_images
from vae_hyperband.model import VAE
from vae_hyperband.objective import aggregate, nats_by_dimension
from vae_hyperband.randomness import generator
from vae_hyperband.tracking import image_grid, read_rows

ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#B0B0B0"
CYCLE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOSSES = {
    "bound": "bound = reconstruction + KL",
    "recon_loss": "reconstruction",
    "KL_divergence": "KL divergence",
}
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


def save_figure(figure: Figure, path: Path) -> Path:
    make_folder(path.resolve().parent)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:])
    write_bytes(path.resolve(), drawn.getvalue())
    return path


def logged_losses(log_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that can be drawn."""
    return read_rows(log_folder / "metrics.jsonl", ("split", *LOSSES))


@styled
def curves(log_folder: Path, path: Path) -> Path:
    """Training and validation losses of a run, from its metrics.jsonl."""
    rows = logged_losses(log_folder)
    figure = Figure(figsize=(10, 3))
    axes = figure.subplots(1, 3)
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
        for split, color in (("train", GREY), ("validation", BLUE)):
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            if points:
                marker = "o" if split == "validation" else None
                axis.plot(*zip(*points, strict=True), color=color, label=split, marker=marker, ms=3)
        first = min((row["step"] for row in rows if row["split"] == "validation"), default=0)
        # what comes before is many times higher and would hide all the rest
        shown = [row[name] for row in rows if row["step"] >= first]
        if shown:
            low, high = min(shown), max(shown)
            room = max(high - low, 0.5)
            axis.set_ylim(low - 0.1 * room, high + 0.3 * room)
        axis.set(xlabel="step", ylabel="nats/image", title=title)
    axes[0].legend()
    return save_figure(figure, path)


@styled
def overlaid(runs: dict[str, list[dict[str, Any]]], path: Path, note: str = "") -> Path:
    """The validation losses of several runs over each other, from the rows of metrics.jsonl.

    ``note`` stands above them.
    """
    figure = Figure(figsize=(10, 3.2))
    for axis, (name, title) in zip(figure.subplots(1, 3), LOSSES.items(), strict=True):
        for i, (run, rows) in enumerate(runs.items()):
            points = [(row["step"], row[name]) for row in rows if row["split"] == "validation"]
            if points:
                color, line = CYCLE[i % len(CYCLE)], ("-", "--", ":")[i // len(CYCLE) % 3]
                axis.plot(
                    *zip(*points, strict=True), line, color=color, label=run, marker="o", ms=3
                )
        axis.set(xlabel="step", ylabel="nats/image", title=title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 5))
    if note:
        figure.suptitle(note)
    return save_figure(figure, path)


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
    return save_figure(figure, path)


@styled
def images(images_NCHW: Tensor, title: str, path: Path) -> Path:
    """A grid of images in [0, 1]."""
    columns = max(1, min(16, round(len(images_NCHW) ** 0.5)))
    rows = -(-len(images_NCHW) // columns)
    figure = Figure(figsize=(0.7 * columns, 0.7 * rows + 0.3))
    axes = figure.subplots()
    _show(axes, images_NCHW, columns)
    axes.set_title(title)
    return save_figure(figure, path)


def samples(model: VAE, path: Path, num_samples: int = 64, seed: int = 0) -> Path:
    """A grid of images decoded from draws of the prior."""
    drawn_NCHW = model.sample(num_samples, generator(seed, "sample")).cpu()
    return images(drawn_NCHW, f"{num_samples} samples, z from the prior, seed {seed}", path)


@styled
@torch.no_grad()
def traversal(model: VAE, images_NCHW: Tensor, path: Path, num_dims: int = 8) -> Path:
    """The first image's latent, one dimension at a time over the range that the images have.

    That is three standard deviations of their z to each side of its mean, which for a dimension
    that the standard normal prior fits is -3 to 3. The most used dimensions come first.
    """
    posteriors = encode_images(model, images_NCHW)
    nats_Z = nats_by_dimension(model, *posteriors)
    dims = nats_Z.argsort(descending=True)[:num_dims].tolist()
    mean_Z, variance_Z = aggregate(*posteriors)
    steps = torch.linspace(-3, 3, 11)
    device = next(model.parameters()).device
    figure = Figure(figsize=(8, 0.62 * len(dims) + 0.6))
    axes = figure.subplots()
    z_BZ = posteriors.mu_NZ[:1].repeat(len(dims) * len(steps), 1)
    for row, dim in enumerate(dims):
        values = mean_Z[dim] + steps * variance_Z[dim].sqrt()
        z_BZ[row * len(steps) : (row + 1) * len(steps), dim] = values
    _show(axes, model.decode_images(z_BZ.to(device)).cpu(), columns=len(steps))
    pitch = images_NCHW.shape[-1] + 2
    for row, dim in enumerate(dims):
        label = f"z[{dim}]  {nats_Z[dim]:.2f} nats"
        axes.text(-4, row * pitch + pitch / 2, label, ha="right", va="center")
    axes.set_title(
        "one z[i] over its mean +- 3 standard deviations, the others as the image has them"
    )
    return save_figure(figure, path)
