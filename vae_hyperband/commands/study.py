"""The command ``study``: a grid of configurations, trained, evaluated and plotted."""

import itertools
from dataclasses import dataclass, field
from typing import Literal

import tyro

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.checks import require, require_number, require_values
from vae_hyperband.common.config import CommonConfig, Places, TrainConfig
from vae_hyperband.common.process import stop_flag
from vae_hyperband.evaluation.evaluate import EvaluateOptions
from vae_hyperband.reporting import figures
from vae_hyperband.reporting.summaries import print_progress, print_resume_hint
from vae_hyperband.reporting.tables import MEASURE_NAMES, Table
from vae_hyperband.training.dry_run import NOTHING_WRITTEN
from vae_hyperband.training.study import (
    MEASURES,
    Row,
    grouped,
    over_seeds,
    run_study,
    study_dry_run,
    train_side_by_side,
)


@dataclass(frozen=True, kw_only=True)
class StudyArgs(ConfigFile, Places):
    """Train and evaluate a grid of betas, latent sizes and seeds; plot rate against distortion.

    vae-hyperband study --run rd --betas 0.03 0.1 0.3 1 2 4 8 --epochs 10

    The same command continues after a stop; nothing is trained or evaluated a second time.
    """

    run: str = "study"
    """Name of the study; its runs are called <run>-z32-b1-s0 and so on."""
    betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0)
    """Weights of the KL term."""
    latent_dims: tuple[int, ...] = (32,)
    """Numbers of latent dimensions."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; with several, the table shows means and 95% intervals over them."""
    epochs: int = 10
    """Passes over the training split, per run."""
    jobs: int = 1
    """Runs to train at a time; above 1, each in its own process with one thread."""
    split: Literal["validation", "test"] = "validation"
    """The images to evaluate on: choose between models on validation, publish numbers on test."""
    dry_run: bool = False
    """Print the runs, where they would be computed and how long that would take, then exit."""
    shared: tyro.conf.OmitArgPrefixes[CommonConfig] = field(default_factory=CommonConfig)
    evaluation: tyro.conf.OmitArgPrefixes[EvaluateOptions] = field(default_factory=EvaluateOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("betas", "latent_dims", "seeds"):
            require_values(name, getattr(self, name))
        require_number("jobs", self.jobs, 1, 1024)
        num = len(self.betas) * len(self.latent_dims) * len(self.seeds)
        require(len(self.configs()) == num, "--betas has two values that give runs the same name.")

    def configs(self) -> dict[str, TrainConfig]:
        """The configurations of the grid, by the names of their runs without ``run``."""
        return {
            f"z{latent_dim}-b{beta:g}-s{seed}": TrainConfig(
                **self.shared.common(),
                latent_dim=latent_dim,
                beta=beta,
                seed=seed,
                epochs=self.epochs,
            )
            for latent_dim, beta, seed in itertools.product(
                self.latent_dims, self.betas, self.seeds
            )
        }


def study_command(argv: list[str]) -> int:
    args = parse_options(StudyArgs, argv, "vae-hyperband study")
    if args.dry_run:
        print(study_dry_run(args.configs(), args, args.split, args.jobs), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        if args.jobs > 1 and not train_side_by_side(
            args.configs(),
            args,
            args.jobs,
            should_stop,
            lambda name, _: print_progress(f"trained: {name}"),
        ):
            return print_resume_hint("study", argv)
        rows = run_study(
            args.configs(), args, args.split, args.evaluation, should_stop, print_progress
        )
    if rows is None:
        return print_resume_hint("study", argv)
    if not any(measure in row for row in rows for measure in MEASURES):
        parts = " ".join(args.evaluation.parts)
        print(f"nothing was measured: the {args.split} split is too small for --parts {parts}")
        return 0
    print(table(rows))
    print(figures.rate_distortion(rows, args.log_folder / "rate_distortion.png"))
    return 0


#: Measures that are shown, and their digits.
COLUMNS = {
    "bound": 2, "KL_divergence": 1, "linear_probe": 3, "active_units": 1, "fid_reconstructions": 2,
    "fid_prior": 2, "fid_mixture": 2, "fid_flow": 2, "mig": 3,
}  # fmt: skip


def table(rows: list[Row]) -> str:
    """One line per configuration: means over seeds, +- half of the 95% interval if several."""
    shown = {name: digits for name, digits in COLUMNS.items() if name in rows[0]}
    lines = []
    for group in grouped(rows):
        config = group[0]["config"]
        cells = [_cell(group, name, digits) for name, digits in shown.items()]
        lines.append([str(config["latent_dim"]), f"{config['beta']:g}", str(len(group)), *cells])
    head = ["latent", "beta", "n", *map(_column_name, shown)]
    about = ["n: seeds", *sorted({row["fid_name"] for row in rows if "fid_name" in row})]
    if len(rows) > len(lines):
        about.append("+-: half of the 95% interval over seeds")
    return "\n".join([Table("study", lines, head).text(), "; ".join(about)])


def _column_name(measure: str) -> str:
    if measure.startswith("fid_"):
        return f"FID {measure.removeprefix('fid_')}"
    return {"bound": "bound", "KL_divergence": "KL", **MEASURE_NAMES}[measure]


def _cell(group: list[Row], measure: str, digits: int) -> str:
    found = over_seeds(group, measure)
    half = f" +- {found['half_interval']:.{digits}f}" if found["n"] > 1 else ""
    return f"{found['mean']:.{digits}f}{half}"
