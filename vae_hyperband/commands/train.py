"""The command ``train``: train one run, or continue it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from vae_hyperband.commands.options import ConfigFile, option_value, parse_options
from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.process import stop_flag
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting.summaries import print_resume_hint, print_training_summary
from vae_hyperband.training.dry_run import NOTHING_WRITTEN, dry_run
from vae_hyperband.training.loop import fit


@dataclass(frozen=True)
class TrainArgs(ConfigFile):
    """Train a VAE or beta-VAE, or continue its training.

    vae-hyperband train --run mine --latent-dim 16 --epochs 5

    The same command continues a run that stopped. --resume_ckpt continues from any checkpoint,
    with its configuration; --epochs may be raised.
    """

    training: tyro.conf.OmitArgPrefixes[TrainConfig]
    execution: tyro.conf.OmitArgPrefixes[RunOptions]
    dry_run: bool = False
    """Print the configuration, where it would be computed and how long it would take, then exit."""


def train(argv: list[str]) -> int:
    args = parse_options(TrainArgs, argv, "vae-hyperband train", default=_resumed(argv))
    if args.dry_run:
        print(dry_run(args.training, args.execution), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        trained = fit(args.training, args.execution, should_stop=should_stop)
    if not trained.finished:
        return print_resume_hint("train", argv)
    print_training_summary(trained, args.execution)
    return 0


def _resumed(argv: list[str]) -> TrainArgs | None:
    """The values of the options that are not given, where --resume_ckpt has a configuration."""
    resume_ckpt = option_value(argv, "--resume-ckpt")
    if resume_ckpt is None:
        return None
    if option_value(argv, "--config") is not None:
        raise ConfigError("--config and --resume_ckpt both name a configuration: give only one.")
    training, where = load_ckpt(resume_ckpt).config, RunOptions()
    with contextlib.suppress(ConfigError):  # a folder whose name cannot name a run
        where = RunOptions(run=Path(resume_ckpt).resolve().parent.name)
    return TrainArgs(training, where)
