"""The command ``evaluate``: measure a trained model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from vae_hyperband.commands.options import (
    ConfigFile,
    NetworkOption,
    RunArg,
    find_ckpt,
    parse_options,
)
from vae_hyperband.common.config import Folders, RunOptions
from vae_hyperband.common.files import check_place, write_text
from vae_hyperband.common.process import cpu_threads
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.reporting.summaries import print_progress
from vae_hyperband.reporting.tables import evaluation_text


@dataclass(frozen=True)
class EvaluateArgs(ConfigFile):
    """Measure a trained model: bounds, latent space, generated images, with standard errors.

    vae-hyperband evaluate mine --split test --json mine.json

    A mixture or flow is fitted on first use and saved beside the checkpoint.
    """

    run: RunArg
    evaluation: tyro.conf.OmitArgPrefixes[EvaluateOptions]
    split: Literal["train", "validation", "test"] = "validation"
    """The images to measure on: choose between models on validation, publish numbers on test."""
    json: Path | None = None
    """Also write the result with its protocol to this .json file; - prints it, without tables."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    num_threads: int | None = None
    """CPU threads (default: PyTorch's own choice)."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


def evaluate_command(argv: list[str]) -> int:
    args = parse_options(EvaluateArgs, argv, "vae-hyperband evaluate")
    RunOptions(num_threads=args.num_threads)  # checks it
    stdout = args.json == Path("-")
    if args.json and not stdout:
        check_place(args.json, ".json", option="--json")  # fail before the work
    with cpu_threads(args.num_threads):
        ckpt = find_ckpt(args.run, args.folders)
        found = evaluate(
            ckpt, args.split, args.folders, args.device, args.evaluation, print_progress
        )
    if args.json and not stdout:
        write_text(args.json, found.to_json())
    print(found.to_json(), end="") if stdout else print(evaluation_text(found))
    return 0
