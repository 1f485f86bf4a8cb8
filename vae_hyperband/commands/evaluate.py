"""The command ``evaluate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.files import check_place, write_text
from vae_hyperband.common.process import cpu_threads
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.reporting.summaries import print_progress
from vae_hyperband.reporting.tables import evaluation_text


@dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a checkpoint: bounds, latent space, generated images, with standard errors.

    vae-hyperband evaluate checkpoints/mine/best.pt --split test --json mine.json

    If there is no mixture or flow yet, it is fitted first and saved beside the checkpoint.
    """

    ckpt: tyro.conf.Positional[Path]
    """The checkpoint."""
    evaluation: tyro.conf.OmitArgPrefixes[EvaluateOptions]
    split: Literal["train", "validation", "test"] = "validation"
    """The split to evaluate on: choose between models on validation, publish test."""
    json: Path | None = None
    """Also write the result, with its protocol and environment, to this .json file; with "-" print
    it instead of the tables."""
    data_dir: Path | None = None
    """A folder with the four IDX files, plain or gzipped."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    num_threads: int | None = None
    """CPU threads (default: PyTorch's own choice)."""


def evaluate_command(argv: list[str]) -> int:
    args = parse_options(EvaluateArgs, argv, "vae-hyperband evaluate")
    RunOptions(num_threads=args.num_threads)  # checks it
    stdout = args.json == Path("-")
    if args.json and not stdout:
        check_place(args.json, ".json", option="--json")  # fail before the work
    with cpu_threads(args.num_threads):
        found = evaluate(
            args.ckpt, args.split, args.data_dir, args.device, args.evaluation, print_progress
        )
    if args.json and not stdout:
        write_text(args.json, found.to_json())
    print(found.to_json(), end="") if stdout else print(evaluation_text(found))
    return 0
