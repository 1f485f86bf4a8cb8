"""The command ``train``: train one run, or continue it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vae_hyperband.commands.options import ConfigFile, option_value, parse_options
from vae_hyperband.common.checks import require
from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.process import stop_flag

#: What --preset stands for: a first look, and the recipes of the models in the package.
PRESETS = {
    "quick": TrainConfig(epochs=2),
    "images": TrainConfig(latent_dim=64, beta=0.02, epochs=25, learning_rate=0.004),
    "bound": TrainConfig(prior="vamp", epochs=40, learning_rate=0.004),
}


@dataclass(frozen=True)
class TrainArgs(ConfigFile):
    """Train a VAE or beta-VAE, or continue its training.

    vae-hyperband train --run mine --latent-dim 16 --epochs 5

    The same command continues a run that stopped. --resume_ckpt continues from any checkpoint,
    with its configuration; --epochs may be raised.
    """

    training: tyro.conf.OmitArgPrefixes[TrainConfig]
    execution: tyro.conf.OmitArgPrefixes[RunOptions]
    preset: Literal["quick", "images", "bound"] | None = None
    """Settings of a recipe: 2 epochs; the best images (z from the mixture); the best bound. Options
    given beside it win."""
    dry_run: bool = False
    """Print the configuration, where it would be computed and how long it would take, then exit."""


def train(argv: list[str]) -> int:
    args = parse_options(TrainArgs, argv, "vae-hyperband train", default=_defaults(argv))
    require(
        args.preset is None or option_value(argv, "--preset") is not None,
        "preset cannot be a setting of a file: give --preset.",
    )
    # after the options: an invalid one is refused, and --help printed, without PyTorch
    from vae_hyperband.reporting.summaries import print_resume_hint, print_training_summary
    from vae_hyperband.training.dry_run import NOTHING_WRITTEN, dry_run
    from vae_hyperband.training.loop import fit

    if args.dry_run:
        print(dry_run(args.training, args.execution), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        trained = fit(args.training, args.execution, should_stop=should_stop)
    if not trained.finished:
        return print_resume_hint("train", argv)
    print_training_summary(trained, args.execution)
    return 0


def _defaults(argv: list[str]) -> TrainArgs | None:
    """The values of the options that are not given, where --resume_ckpt or --preset has them."""
    names = ("--config", "--resume-ckpt", "--preset")
    given = {name: value for name in names if (value := option_value(argv, name)) is not None}
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} both name a configuration: give only one.".replace(
                "--resume-ckpt", "--resume_ckpt"
            )
        )
    if (preset := given.get("--preset")) in PRESETS:
        return TrainArgs(PRESETS[preset], RunOptions())
    resume_ckpt = given.get("--resume-ckpt")
    if resume_ckpt is None:
        return None
    from vae_hyperband.model.checkpoint import load_ckpt

    training, where = load_ckpt(resume_ckpt).config, RunOptions()
    with contextlib.suppress(ConfigError):  # a folder whose name cannot name a run
        where = RunOptions(run=Path(resume_ckpt).resolve().parent.name)
    return TrainArgs(training, where)
