"""The commands that show runs: ``report``, ``compare`` and ``animate``."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from vae_hyperband.commands.options import (
    ConfigFile,
    NetworkOption,
    RunArg,
    RunArgs,
    find_ckpt,
    find_run,
    parse_options,
)
from vae_hyperband.common.checks import require
from vae_hyperband.common.config import Folders
from vae_hyperband.common.files import check_place
from vae_hyperband.data.splits import as_trained
from vae_hyperband.evaluation.bounds import eval_dataloader
from vae_hyperband.evaluation.latents import encode_split
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting import animations, figures, runs
from vae_hyperband.reporting.report import follow_search, write_report
from vae_hyperband.reporting.summaries import print_progress


@dataclass(frozen=True)
class CompareArgs(ConfigFile):
    """Compare runs: what differs in their configurations, and their results.

    vae-hyperband compare betas-beta-1 betas-beta-4 --out compare.png
    """

    runs: RunArgs
    out: Path | None = None
    """Also plot their validation curves into this .png, .svg or .pdf file."""
    json: bool = False
    """Print JSON instead of a table."""
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


@dataclass(frozen=True)
class AnimateArgs(ConfigFile):
    """Write an animation of a run, as .gif or .webp.

    vae-hyperband animate mine --kind walk --out walk.gif
    """

    run: RunArg
    kind: Literal["walk", "training"] = "walk"
    """walk: from image to image through the latent space; training: samples per validation."""
    out: Path | None = None
    """File to write, .gif or .webp (default: walk.gif or training.gif)."""
    seed: int = 0
    """walk: seed of the choice of validation images."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


@dataclass(frozen=True)
class ReportArgs(ConfigFile):
    """Write a report of a run or a search: one HTML file that needs no network.

    vae-hyperband report mine
    """

    run: RunArg
    out: Path | None = None
    """File to write (default: report.html in the run's folder below --logs-dir)."""
    watch: bool = False
    """Follow a search until it has finished: rewrite the file, which an open page reloads."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


def report(argv: list[str]) -> int:
    args = parse_options(ReportArgs, argv, "vae-hyperband report")
    place = find_run(args.run, args.folders)
    if not args.watch:
        print(write_report(place, args.out))
        return 0
    for number, path in enumerate(follow_search(place, args.out)):
        if number == 0:
            print(path, flush=True)
    return 0


def compare(argv: list[str]) -> int:
    args = parse_options(CompareArgs, argv, "vae-hyperband compare")
    if args.out:
        check_place(args.out, ".png", ".svg", ".pdf")
    places = [find_run(run, args.folders) for run in args.runs]
    chosen = [runs.read_run(place.run, place) for place in places]
    table = runs.table(chosen)
    if args.out:
        without = [
            run.name for run in chosen if not any(r["split"] == "validation" for r in run.rows)
        ]
        none = f"{args.folders.logs_dir} has no metrics.jsonl of {', '.join(without)}"
        require(len(without) < len(chosen), f"{none}: there are no curves to plot.")
        if without:
            print_progress(f"{none}: plotted without them")
    print(json.dumps(runs.as_data(chosen), indent=2) if args.json else table)
    if args.out:
        rows = {run.name: run.rows for run in chosen}
        figures.overlaid(rows, args.out, runs.incomparable(chosen))
        print_progress(str(args.out))  # to stderr: a program may be reading stdout
    return 0


def animate(argv: list[str]) -> int:
    args = parse_options(AnimateArgs, argv, "vae-hyperband animate")
    out = args.out or Path(f"{args.kind}.gif")
    check_place(out, *animations.FORMATS)
    if args.kind == "training":
        animations.over_training(find_run(args.run, args.folders).log_folder, out)
    else:
        checkpoint = load_ckpt(find_ckpt(args.run, args.folders))
        model = checkpoint.model()
        split = as_trained(checkpoint.split("validation", args.folders), checkpoint.config)
        posteriors = encode_split(model, eval_dataloader(split))
        animations.latent_walk(model, posteriors, out, args.seed)
    print(out)
    return 0
