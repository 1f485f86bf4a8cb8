"""The command ``train``: train one run, or continue it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from vae_hyperband.commands.options import option_value, parse_options
from vae_hyperband.common.config import RunOptions, TrainConfig, former_holdout, read_json
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.process import stop_flag
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting.summaries import print_resume_hint, print_training_summary
from vae_hyperband.training.dry_run import NOTHING_WRITTEN, dry_run
from vae_hyperband.training.loop import fit


@dataclass(frozen=True)
class TrainArgs:
    """Train a VAE or beta-VAE, or continue its training.

    vae-hyperband train --run mine --latent-dim 16 --epochs 5

    The same command continues a run that stopped. --resume_ckpt continues from any checkpoint,
    with its configuration; --epochs may be raised.
    """

    training: tyro.conf.OmitArgPrefixes[TrainConfig]
    execution: tyro.conf.OmitArgPrefixes[RunOptions]
    config: Path | None = None
    """JSON file to read the configuration from, such as a search's best_config.json."""
    dry_run: bool = False
    """Print the configuration, where it would be computed and how long it would take, then exit."""


def train(argv: list[str]) -> int:
    args = parse_options(TrainArgs, argv, "vae-hyperband train", default=_defaults(argv))
    if args.dry_run:
        print(dry_run(args.training, args.execution), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        trained = fit(args.training, args.execution, should_stop=should_stop)
    if not trained.finished:
        return print_resume_hint("train", argv)
    print_training_summary(trained, args.execution)
    return 0


def _defaults(argv: list[str]) -> TrainArgs:
    """The values of the options that are not given: from --config, --resume_ckpt, or the usual."""
    config, resume_ckpt = option_value(argv, "--config"), option_value(argv, "--resume-ckpt")
    if config is not None and resume_ckpt is not None:
        raise ConfigError("--config and --resume_ckpt both name a configuration: give only one.")
    if config is not None:
        content = read_json(Path(config))
        settings = content.get("config", content)
        if settings is not content:  # a best_config.json, maybe of 0.1
            settings = {"holdout": former_holdout(settings.get("dataset")), **settings}
        training = TrainConfig.from_dict(settings, config)
        execution = {
            name: content[name] for name in ("device", "num_threads", "data") if name in content
        }
        return TrainArgs(training, RunOptions(**execution))
    if resume_ckpt is not None:
        training = load_ckpt(resume_ckpt).config
        with contextlib.suppress(ConfigError):  # a folder whose name cannot name a run
            return TrainArgs(training, RunOptions(run=Path(resume_ckpt).resolve().parent.name))
        return TrainArgs(training, RunOptions())
    return TrainArgs(TrainConfig(), RunOptions())
