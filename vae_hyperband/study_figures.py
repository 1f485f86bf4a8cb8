"""The picture of a study: what beta buys, and what it costs."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from vae_hyperband.figures import BLUE, GREEN, GREY, ORANGE, save_figure, styled
from vae_hyperband.study import Row, grouped, over_seeds, value_of

SOURCES = {
    "prior": (BLUE, "z from the prior"),
    "mixture": (ORANGE, "z from the mixture"),
    "flow": (GREEN, "z from the flow"),
    "reconstructions": (GREY, "reconstructions"),
}


LINES = ("-", "--", ":", "-.")  # of latent sizes
Family = tuple[str, list[list[Row]]]  # a kind of line, and groups of seeds by beta


@styled
def rate_distortion(rows: list[Row], path: Path) -> Path:
    """Rate against distortion, and against beta what else was measured.

    FID, probes, disentanglement, active units. A line per latent size. Bars are 95% intervals over
    seeds, where there are several.
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
    """Logarithmic, with a place for 0 left of the smallest beta above it."""
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
    axes.set(title="FID of images (lower is better)", yscale="log")
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
    """The rows by latent size, from the smallest on; in each by beta."""
    groups = sorted(grouped(rows), key=lambda group: group[0]["config"]["beta"])
    sizes = sorted({group[0]["config"]["latent_dim"] for group in groups})
    return [
        (LINES[i % len(LINES)], [g for g in groups if g[0]["config"]["latent_dim"] == size])
        for i, size in enumerate(sizes)
    ]


def plane(axes: Axes, families: list[Family]) -> None:
    """One point per configuration: what z costs, and what is lost with it."""
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
    """Means over seeds; the first family names the colour."""
    for line, groups in families:
        there = [g for g in groups if measure in g[0]]
        if not there:
            continue
        found = [over_seeds(group, measure) for group in there]
        axes.errorbar(
            [group[0]["config"]["beta"] for group in there],
            [value["mean"] for value in found],
            yerr=[value["half_interval"] if value["n"] > 1 else 0.0 for value in found],
            color=color, label=label if line == LINES[0] else None, linestyle=line, marker="o",
            markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
