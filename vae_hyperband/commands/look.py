"""The commands that look at runs: ``report``, ``compare`` and ``animate``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import Places, require
from vae_hyperband.common.files import check_place
from vae_hyperband.data.splits import as_trained
from vae_hyperband.evaluation.bounds import eval_dataloader
from vae_hyperband.evaluation.latents import encode_split
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting import animations, figures, runs
from vae_hyperband.reporting.report import write_report
from vae_hyperband.reporting.runs import best_ckpt
from vae_hyperband.reporting.summaries import print_progress


@dataclass(frozen=True)
class CompareArgs:
    """Runs side by side: what differs in their configuration, and what came of it.

    vae-hyperband compare betas-beta-1 betas-beta-4 --out compare.png
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Names of runs: folders below checkpoints/ and logs/."""
    out: Path | None = None
    """Also draw their validation curves over each other, into this .png, .svg or .pdf."""
    json: bool = False
    """Print JSON instead of a table."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder that holds one folder of checkpoints per run."""
    logs_dir: Path = Path("logs")
    """Folder that holds one folder of logs per run."""


@dataclass(frozen=True)
class AnimateArgs:
    """A moving picture of a run, as .gif or .webp.

    vae-hyperband animate mine --kind walk --out walk.gif
    """

    run: tyro.conf.Positional[str]
    """Name of the run: its folder below checkpoints/ and logs/."""
    kind: Literal["walk", "training"] = "walk"
    """walk: from garment to garment through the latent space; training: samples of the same noise
    after each validation."""
    out: Path | None = None
    """The file to write; its ending says which format (default: walk.gif or training.gif)."""
    seed: int = 0
    """Decides which validation images a walk goes through."""
    data_dir: Path | None = None
    """A folder with the four IDX files, plain or gzipped."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder that holds one folder of checkpoints per run."""
    logs_dir: Path = Path("logs")
    """Folder that holds one folder of logs per run."""


@dataclass(frozen=True)
class ReportArgs:
    """Write what there is to see of a run or a search into one HTML file, which needs no network.

    vae-hyperband report mine
    """

    run: tyro.conf.Positional[str]
    """Name of the run or search: its folder below checkpoints/ and logs/."""
    out: Path | None = None
    """The file to write (default: report.html in the run's folder below logs/)."""
    data_dir: Path | None = None
    """A folder with the four IDX files, plain or gzipped."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder that holds one folder of checkpoints per run."""
    logs_dir: Path = Path("logs")
    """Folder that holds one folder of logs per run."""


def report(argv: list[str]) -> int:
    args = parse_options(ReportArgs, argv, "vae-hyperband report")
    place = Places(
        run=args.run,
        data_dir=args.data_dir,
        checkpoints_dir=args.checkpoints_dir,
        logs_dir=args.logs_dir,
    )
    print(write_report(place, args.out))
    return 0


def compare(argv: list[str]) -> int:
    args = parse_options(CompareArgs, argv, "vae-hyperband compare")
    places = Places(checkpoints_dir=args.checkpoints_dir, logs_dir=args.logs_dir)
    if args.out:
        check_place(args.out, ".png", ".svg", ".pdf")
    chosen = [runs.read_run(name, places) for name in args.runs]
    table = runs.table(chosen)
    if args.out:
        without = [
            run.name for run in chosen if not any(r["split"] == "validation" for r in run.rows)
        ]
        none = f"{args.logs_dir} has no metrics.jsonl of {', '.join(without)}"
        require(len(without) < len(chosen), f"{none}: there are no curves to draw.")
        if without:
            print_progress(f"{none}: drawn without")
    print(json.dumps(runs.as_data(chosen), indent=2) if args.json else table)
    if args.out:
        rows = {run.name: run.rows for run in chosen}
        figures.overlaid(rows, args.out, runs.incomparable(chosen))
        print_progress(str(args.out))  # stdout may be read by a program
    return 0


def animate(argv: list[str]) -> int:
    args = parse_options(AnimateArgs, argv, "vae-hyperband animate")
    out = args.out or Path(f"{args.kind}.gif")
    check_place(out, *animations.FORMATS)
    place = Places(run=args.run, checkpoints_dir=args.checkpoints_dir, logs_dir=args.logs_dir)
    if args.kind == "training":
        animations.over_training(place.log_folder, out)
    else:
        checkpoint = load_ckpt(best_ckpt(place))
        model = checkpoint.model()
        split = as_trained(checkpoint.split("validation", args.data_dir), checkpoint.config)
        posteriors = encode_split(model, eval_dataloader(split))
        animations.latent_walk(model, posteriors, out, args.seed)
    print(out)
    return 0
