"""The picture of a study: what beta buys, and what it costs."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vae_hyperband.figures import BLUE, GREEN, GREY, ORANGE, save_figure, styled
from vae_hyperband.study import Row, grouped, over_seeds, value_of

SOURCES = {
    "prior": (BLUE, "z from the prior"),
    "mixture": (ORANGE, "z from the mixture"),
    "flow": (GREEN, "z from the flow"),
    "reconstructions": (GREY, "reconstructions"),
}


@styled
def rate_distortion(rows: list[Row], path: Path) -> Path:
    """Rate against distortion, and FID, probes and active units (or MIG) against beta."""
    figure = Figure(figsize=(10, 6.4))
    (plane, images), (probes, units) = figure.subplots(2, 2)
    groups = sorted(grouped(rows), key=lambda group: group[0]["config"]["beta"])
    _plane(plane, groups)
    for source, (color, label) in SOURCES.items():
        _against_beta(images, groups, f"fid_{source}", color, label)
    images.set(title="FID of images (lower is better)", yscale="log")
    _against_beta(probes, groups, "linear_probe", BLUE, "linear")
    _against_beta(probes, groups, "knn_probe", ORANGE, "10 nearest neighbours")
    for measure, color in (("raw_linear_probe", BLUE), ("raw_knn_probe", ORANGE)):
        level = value_of(rows[0], measure)
        probes.axhline(level, color=color, linestyle=":", linewidth=1)
    probes.set(title="probe accuracy (dotted: on raw pixels)")
    if "mig" in rows[0]:
        _against_beta(units, groups, "mig", BLUE, "MIG")
        _against_beta(units, groups, "dci", ORANGE, "DCI disentanglement")
        units.set(title="disentanglement")
    else:
        _against_beta(units, groups, "active_units", BLUE, "active units")
        units.set(title="active units", ylim=(0, None))
    for axes in (images, probes, units):
        axes.set(xlabel="beta", xscale="log")
        if axes.get_legend_handles_labels()[0]:  # a study may leave a part out
            axes.legend()
    return save_figure(figure, path)


def _plane(axes: Axes, groups: list[list[Row]]) -> None:
    """One point per configuration: what z costs, and what is lost with it."""
    points = [
        [over_seeds(group, name)["mean"] for name in ("KL_divergence", "recon_loss")]
        for group in groups
    ]
    rates, distortions = zip(*points, strict=True)
    axes.plot(
        rates, distortions, color=GREY, linewidth=1, marker="o", markersize=5,
        markerfacecolor=BLUE, markeredgecolor=BLUE,
    )  # fmt: skip
    for group, (rate, distortion) in zip(groups, points, strict=True):
        beta = group[0]["config"]["beta"]
        axes.annotate(
            f"{beta:g}", (rate, distortion), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    axes.set(
        title="rate and distortion, labelled with beta",
        xlabel="rate: KL (nats/image)",
        ylabel="distortion: reconstruction (nats/image)",
    )


def _against_beta(
    axes: Axes, groups: list[list[Row]], measure: str, color: str, label: str
) -> None:
    """Means over seeds; bars are 95% intervals where there are several seeds."""
    there = [group for group in groups if measure in group[0] and group[0]["config"]["beta"] > 0]
    if not there:
        return
    found = [over_seeds(group, measure) for group in there]
    axes.errorbar(
        [group[0]["config"]["beta"] for group in there],
        [value["mean"] for value in found],
        yerr=[value["half_interval"] if value["n"] > 1 else 0.0 for value in found],
        color=color, label=label, marker="o", markersize=4, capsize=2, linewidth=1.2,
    )  # fmt: skip
