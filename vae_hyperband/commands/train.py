"""The command ``train``: one run, from its start or from where it is."""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import RunOptions, TrainConfig, check_run_name, read_json
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.process import stop_flag
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting.summaries import print_resume_hint, print_training_summary
from vae_hyperband.training.dry_run import NOTHING_WRITTEN, dry_run
from vae_hyperband.training.loop import fit


@dataclass(frozen=True)
class TrainArgs:
    """Train one VAE, or go on training it.

    vae-hyperband train --run mine --latent-dim 16 --epochs 5

    Giving the same command again goes on where it stopped. --resume_ckpt goes on from any
    checkpoint, with its configuration; more --epochs may be given.
    """

    recipe: tyro.conf.OmitArgPrefixes[TrainConfig]
    where: tyro.conf.OmitArgPrefixes[RunOptions]
    config: Path | None = None
    """Take the configuration from this JSON file, such as a search's best_config.json."""
    dry_run: bool = False
    """Print the configuration, where it would be computed and how long it would take; then end."""


def train(argv: list[str]) -> int:
    args = parse_options(TrainArgs, argv, "vae-hyperband train", default=_train_default(argv))
    if args.dry_run:
        print(dry_run(args.recipe, args.where), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        trained = fit(args.recipe, args.where, should_stop=should_stop)
    if not trained.finished:
        return print_resume_hint("train", argv)
    print_training_summary(trained, args.where)
    return 0


def _train_default(argv: list[str]) -> TrainArgs:
    """What ``train`` starts from before its options are read: defaults, a file, or a checkpoint."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--config", type=Path)
    scan.add_argument("--resume_ckpt", "--resume-ckpt", type=Path)
    try:
        given, _ = scan.parse_known_args(argv)
    except argparse.ArgumentError:  # an option without its value: the real parser says so
        return TrainArgs(TrainConfig(), RunOptions())
    if given.config and given.resume_ckpt:
        raise ConfigError("--config and --resume_ckpt both name a configuration: give one.")
    if given.config:
        content = read_json(given.config)
        recipe = TrainConfig.from_dict(content.get("config", content), str(given.config))
        where = {name: content[name] for name in ("device", "num_threads") if name in content}
        return TrainArgs(recipe, RunOptions(**where))
    if given.resume_ckpt:
        recipe = load_ckpt(given.resume_ckpt).config
        with contextlib.suppress(ConfigError):  # a folder whose name cannot name a run
            run_name = given.resume_ckpt.resolve().parent.name
            check_run_name(run_name)
            return TrainArgs(recipe, RunOptions(run=run_name))
        return TrainArgs(recipe, RunOptions())
    return TrainArgs(TrainConfig(), RunOptions())
