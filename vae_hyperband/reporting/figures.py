"""Figures of runs and studies, in Okabe & Ito's colours for colour-blind readers."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from vae_hyperband.common.checks import plural
from vae_hyperband.common.files import make_folder, write_bytes
from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation.latents import aggregate, encode_images, information_per_dimension
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting.tables import LOSS_NAMES
from vae_hyperband.training.study import Row, grouped, over_seeds, value_of
from vae_hyperband.training.tracker import MARGIN, LogRow, image_grid, is_ink, read_rows

LEAST_WIDTH = 4.0  # inches: a title is no shorter for few images

ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#B0B0B0"
CYCLE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    """Draw with :data:`STYLE`, without changing the caller's matplotlib settings."""

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


def logged_losses(log_folder: Path) -> list[LogRow]:
    """The rows of a run's metrics.jsonl that have all losses."""
    return read_rows(log_folder / "metrics.jsonl", ("split", *LOSS_NAMES))


@styled
def curves(log_folder: Path, path: Path) -> Path:
    """Training and validation losses of a run, from its metrics.jsonl."""
    rows = logged_losses(log_folder)
    figure = Figure(figsize=(10, 3))
    axes = figure.subplots(1, 3)
    for axis, (name, title) in zip(axes, LOSS_NAMES.items(), strict=True):
        for split, color in (("train", GREY), ("validation", BLUE)):
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            if points:
                marker = "o" if split == "validation" else None
                axis.plot(*zip(*points, strict=True), color=color, label=split, marker=marker, ms=3)
        first = min((row["step"] for row in rows if row["split"] == "validation"), default=0)
        # losses before the first validation are many times higher and would hide the rest
        shown = [row[name] for row in rows if row["step"] >= first]
        if shown:
            low, high = min(shown), max(shown)
            room = max(high - low, 0.5)
            axis.set_ylim(low - 0.1 * room, high + 0.3 * room)
        axis.set(xlabel="step", ylabel="nats/image", title=title)
    axes[0].legend()
    return save_figure(figure, path)


@styled
def overlaid(runs: dict[str, list[LogRow]], path: Path, note: str = "") -> Path:
    """The validation losses of several runs in the same axes, from the rows of metrics.jsonl.

    ``note`` is the title of the figure.
    """
    figure = Figure(figsize=(10, 3.2))
    for axis, (name, title) in zip(figure.subplots(1, 3), LOSS_NAMES.items(), strict=True):
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
    ink = is_ink(images_NCHW)
    grid_CHW = image_grid(images_NCHW, columns, background=0.0 if ink else 1.0)
    # garments and digits as ink on paper: 0 is white
    if ink:
        axes.imshow(grid_CHW[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    else:
        shown_HWC = grid_CHW.expand(3, -1, -1).permute(1, 2, 0)
        axes.imshow(shown_HWC.numpy(), interpolation="nearest")
    axes.axis("off")


@styled
def contact_sheet(classes: dict[str, Tensor], path: Path) -> Path:
    """A row of images (N, C, H, W), as bytes, of each class, under its name."""
    height, width = next(iter(classes.values())).shape[2:]
    figure = Figure(figsize=(8, len(classes) * (0.25 + 0.66 * height / width) + 0.2))
    rows = figure.subplots(len(classes), 1, squeeze=False)[:, 0]
    for axes, (name, images_NCHW) in zip(rows, classes.items(), strict=True):
        grid_CHW = image_grid(images_NCHW / 255, columns=12, background=1.0)
        # as they are: nobody knows yet which of them is ink
        shown = grid_CHW.expand(3, -1, -1).permute(1, 2, 0)
        axes.imshow(shown.numpy(), interpolation="nearest")
        axes.set_title(name if len(classes) > 1 else "", fontsize=8)
        axes.axis("off")
    return save_figure(figure, path)


@styled
def reconstructions(
    model: VAE, images_NCHW: Tensor, path: Path, shown: str = "images the model has not seen"
) -> Path:
    """Images in one row, their reconstructions in the next; ``shown`` says which images."""
    columns = min(12, len(images_NCHW))
    inputs, outputs = images_NCHW, model.reconstruct(images_NCHW)
    blocks = [
        block
        for start in range(0, len(inputs), columns)
        for block in (inputs[start : start + columns], outputs[start : start + columns].cpu())
    ]
    height, width = images_NCHW.shape[2:]
    tall = 0.66 * len(blocks) * height / width + 0.4
    figure = Figure(figsize=(max(0.67 * columns, 2 * LEAST_WIDTH), tall))
    axes = figure.subplots()
    _show(axes, torch.cat(blocks), columns)
    axes.set_title(f"upper rows: {shown}; lower rows: their reconstructions")
    return save_figure(figure, path)


@styled
def images(images_NCHW: Tensor, title: str, path: Path) -> Path:
    """A grid of images in [0, 1]."""
    columns = max(1, min(16, round(len(images_NCHW) ** 0.5)))
    rows = -(-len(images_NCHW) // columns)
    height, width = images_NCHW.shape[2:]
    size = (max(0.7 * columns, LEAST_WIDTH), 0.7 * rows * height / width + 0.3)
    figure = Figure(figsize=size)
    axes = figure.subplots()
    _show(axes, images_NCHW, columns)
    axes.set_title(title)
    return save_figure(figure, path)


def samples(model: VAE, path: Path, num_samples: int = 64, seed: int = 0) -> Path:
    """A grid of images decoded from samples of the prior."""
    drawn_NCHW = model.sample(num_samples, generator(seed, "sample")).cpu()
    return images(
        drawn_NCHW, f"{plural(num_samples, 'sample')}, z from the prior, seed {seed}", path
    )


@styled
@torch.no_grad()
def traversal(model: VAE, images_NCHW: Tensor, path: Path, num_dims: int = 8) -> Path:
    """The first image's latent with one dimension at a time varied over the images' range.

    The range is the mean of their z +- 3 standard deviations, which is -3 to 3 for a dimension that
    fits the standard normal prior. The most informative dimensions come first.
    """
    posteriors = encode_images(model, images_NCHW)
    nats_Z = information_per_dimension(model, posteriors)
    dims = nats_Z.argsort(descending=True)[:num_dims].tolist()
    mean_Z, variance_Z = aggregate(posteriors)
    steps = torch.linspace(-3, 3, 11)
    device = next(model.parameters()).device
    height, width = images_NCHW.shape[-2:]
    figure = Figure(figsize=(8, 0.62 * height / width * len(dims) + 0.6))
    axes = figure.subplots()
    z_BZ = posteriors.mu_NZ[:1].repeat(len(dims) * len(steps), 1)
    for row, dim in enumerate(dims):
        values = mean_Z[dim] + steps * variance_Z[dim].sqrt()
        z_BZ[row * len(steps) : (row + 1) * len(steps), dim] = values
    _show(axes, model.decode_images(z_BZ.to(device)).cpu(), columns=len(steps))
    pitch = height + MARGIN  # from row to row
    for row, dim in enumerate(dims):
        label = f"z[{dim}]  {nats_Z[dim]:.2f} nats"
        axes.text(-4, row * pitch + pitch / 2, label, ha="right", va="center")
    axes.set_title(
        "one z[i] over its mean +- 3 standard deviations, the others as the image has them"
    )
    return save_figure(figure, path)


# ---- The figure of a study: its measures against beta.

SOURCES = {
    "prior": (BLUE, "z from the prior"),
    "mixture": (ORANGE, "z from the mixture"),
    "flow": (GREEN, "z from the flow"),
    "reconstructions": (GREY, "reconstructions"),
}


FAMILY_LINES = ("-", "--", ":", "-.")  # of latent sizes
Family = tuple[str, list[list[Row]]]  # a kind of line, and groups of seeds by beta


@styled
def rate_distortion(rows: list[Row], path: Path) -> Path:
    """Rate against distortion; and FID, probes, disentanglement, active units against beta.

    Measures that the rows lack are left out. One line per latent size. Bars are 95% intervals over
    seeds, if there are several.
    """
    families = families_of(rows)
    by_measure: dict[str, Callable[[Axes, list[Family]], None]] = {
        "recon_loss": plane, "fid_reconstructions": _images, "linear_probe": _probes,
        "mig": _disentanglement, "active_units": _active_units,
    }  # fmt: skip
    panels = [panel for name, panel in by_measure.items() if name in rows[0]]
    height, width = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(5 * width, 3.2 * height))
    all_axes = figure.subplots(height, width, squeeze=False).flatten()
    for axes, panel in zip(all_axes, panels, strict=False):
        panel(axes, families)
        if panel is not plane:
            _beta_axis(axes, sorted({row["config"]["beta"] for row in rows}))
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    return save_figure(figure, path)


def _beta_axis(axes: Axes, betas: list[float]) -> None:
    """Logarithmic, with room for beta = 0 at the left."""
    if betas[0] > 0:
        axes.set_xscale("log")
    elif len(betas) > 1:
        axes.set_xscale("symlog", linthresh=betas[1], linscale=0.5)
        axes.set_xlim(-betas[1] / 5, betas[-1] * 1.2)
    axes.set_xlabel("beta")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.xaxis.set_minor_locator(NullLocator())


def _images(axes: Axes, families: list[Family]) -> None:
    for source, (color, label) in SOURCES.items():
        _against_beta(axes, families, f"fid_{source}", color, label)
    row = families[0][1][0][0]  # the rows of a study that 0.1 made do not name the features
    axes.set(title=f"{row.get('fid_name', 'FID')} of images (lower is better)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend()


def _probes(axes: Axes, families: list[Family]) -> None:
    _against_beta(axes, families, "linear_probe", BLUE, "linear")
    _against_beta(axes, families, "knn_probe", ORANGE, "10 nearest neighbours")
    for measure, color in (("raw_linear_probe", BLUE), ("raw_knn_probe", ORANGE)):
        level = value_of(families[0][1][0][0], measure)
        axes.axhline(level, color=color, linestyle=":", linewidth=1)
    axes.set(title="probe accuracy (dotted: on raw pixels)")
    axes.legend()


def _disentanglement(axes: Axes, families: list[Family]) -> None:
    _against_beta(axes, families, "mig", BLUE, "MIG")
    _against_beta(axes, families, "dci", ORANGE, "DCI disentanglement")
    axes.set(title="disentanglement")
    axes.legend()


def _active_units(axes: Axes, families: list[Family]) -> None:
    _against_beta(axes, families, "active_units", BLUE, "active units")
    axes.set(title="active units", ylim=(0, None))


def families_of(rows: list[Row]) -> list[Family]:
    """The rows by latent size, the smallest first; within a size by beta."""
    groups = sorted(grouped(rows), key=lambda group: group[0]["config"]["beta"])
    sizes = sorted({group[0]["config"]["latent_dim"] for group in groups})
    return [
        (
            FAMILY_LINES[i % len(FAMILY_LINES)],
            [g for g in groups if g[0]["config"]["latent_dim"] == size],
        )
        for i, size in enumerate(sizes)
    ]


def plane(axes: Axes, families: list[Family]) -> None:
    """One point per configuration: KL against reconstruction."""
    for line, groups in families:
        points = [
            tuple(over_seeds(group, name)["mean"] for name in ("KL_divergence", "recon_loss"))
            for group in groups
        ]
        axes.plot(
            *zip(*points, strict=True), color=GREY, linewidth=1, linestyle=line, marker="o",
            markersize=5, markerfacecolor=BLUE, markeredgecolor=BLUE,
            label=f"latent {groups[0][0]['config']['latent_dim']}",
        )  # fmt: skip
        for group, point in zip(groups, points, strict=True):
            axes.annotate(
                f"{group[0]['config']['beta']:g}", (point[0], point[1]), xytext=(4, 4),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
    if len(families) > 1:
        axes.legend()
    axes.set(
        title="rate and distortion, labelled with beta",
        xlabel="rate: KL (nats/image)",
        ylabel="distortion: reconstruction (nats/image)",
    )


def _against_beta(axes: Axes, families: list[Family], measure: str, color: str, label: str) -> None:
    """Means over seeds; the legend shows the colour of the first family."""
    for line, groups in families:
        there = [g for g in groups if measure in g[0]]
        if not there:
            continue
        found = [over_seeds(group, measure) for group in there]
        axes.errorbar(
            [group[0]["config"]["beta"] for group in there],
            [value["mean"] for value in found],
            yerr=[value["half_interval"] if value["n"] > 1 else 0.0 for value in found],
            color=color, label=label if line == FAMILY_LINES[0] else None, linestyle=line,
            marker="o",
            markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
