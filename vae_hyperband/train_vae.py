"""The main entry: ``vae-hyperband train``, or ``python -m vae_hyperband.train_vae train``.

Exit status: 0 done; 2 a user's mistake, told in one sentence; 3 training diverged, or every trial
of a search failed; 70 Ray broke down; 75 stopped on request and saved; 128 + n ended at once by
signal n. After the last three the same command goes on.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tyro

from vae_hyperband.bounds import eval_epoch
from vae_hyperband.checkpoint import load_ckpt, save_ckpt
from vae_hyperband.ckpt_commands import evaluate_ckpt, sample
from vae_hyperband.completion import completion
from vae_hyperband.config import (
    Dataset,
    RunOptions,
    TrainConfig,
    check_run_name,
    read_json,
)
from vae_hyperband.data import SplitName, get_dataloader, load_split
from vae_hyperband.download import ensure_data
from vae_hyperband.dry_run import NOTHING_WRITTEN, dry_run
from vae_hyperband.errors import ConfigError, VAEHyperbandError
from vae_hyperband.export_command import export
from vae_hyperband.options import parse_options
from vae_hyperband.process import keep_freed_memory, lossy_output, stop_flag
from vae_hyperband.report import say_trained, stopped
from vae_hyperband.run_commands import animate, compare, report
from vae_hyperband.study_command import study_command
from vae_hyperband.training import fit, train_epoch

__all__ = ["eval_epoch", "get_dataloader", "main", "save_ckpt", "train_epoch"]


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


@dataclass(frozen=True)
class DataArgs:
    """Find or fetch Fashion-MNIST and check it.

    vae-hyperband data
    """

    data_dir: Path | None = None
    """Check the four files in this folder instead of fetching any."""
    dataset: Dataset = "fashion-mnist"
    """custom: other data in the same format, in --data-dir; drawn: garments made here."""
    install: bool = False
    """Where no mirror can be reached, install the system's package if this user may."""


def train(argv: list[str]) -> int:
    args = parse_options(TrainArgs, argv, "vae-hyperband train", default=_train_default(argv))
    if args.dry_run:
        print(dry_run(args.recipe, args.where), NOTHING_WRITTEN, sep="\n")
        return 0
    with stop_flag() as should_stop:
        trained = fit(args.recipe, args.where, should_stop=should_stop)
    if not trained.finished:
        return stopped("train", argv)
    say_trained(trained, args.where)
    return 0


def search(argv: list[str]) -> int:
    # Ray takes seconds to import, and only this command and "run" need it
    from vae_hyperband.search_command import search_command

    return search_command(argv)


def data(argv: list[str]) -> int:
    args = parse_options(DataArgs, argv, "vae-hyperband data")
    if args.data_dir is None and args.dataset == "fashion-mnist":
        ensure_data(args.install)
    names: tuple[SplitName, ...] = ("train", "validation", "test")
    for name in names:
        split = load_split(name, args.data_dir, args.dataset)
        print(f"{name:10} {len(split):6,} images {split.image_shape}, file {split.digest[:12]}...")
    return 0


def run(argv: list[str]) -> int:
    from vae_hyperband.main_job import MainJob, main_job_dry_run, run_main_job

    job = parse_options(MainJob, argv, "vae-hyperband run")
    if job.dry_run:
        print(main_job_dry_run(job), NOTHING_WRITTEN, sep="\n")
        return 0
    return 0 if run_main_job(job) else stopped("run", argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "search": search,
    "train": train,
    "evaluate": evaluate_ckpt,
    "sample": sample,
    "export": export,
    "report": report,
    "compare": compare,
    "animate": animate,
    "study": study_command,
    "data": data,
    "completion": lambda argv: completion(argv, COMMANDS),
}

USAGE = """usage: vae-hyperband COMMAND [OPTIONS]

  run       the whole job: data, search, train the winner, evaluate, figures
  search    search hyperparameters with Ray Tune (ASHA, HyperBand)
  train     train one VAE or beta-VAE, or go on training it
  evaluate  what a checkpoint is worth: bounds, latent space, FID ..., with standard errors
  sample    draw images from a checkpoint
  export    a checkpoint as ONNX, as safetensors with a card, or as a page that runs in a browser
  report    a run or a search as one HTML file to keep and hand on
  compare   runs side by side: what differs, what came of it, their curves
  animate   a moving picture: samples over training, or a walk through the latent space
  study     a grid of betas and latent sizes, trained and judged: the rate-distortion picture
  data      find or fetch Fashion-MNIST and check it
  completion  print what a shell completes commands and options by

"vae-hyperband COMMAND --help" explains each. Hyphens and underscores in options are the same.
Exit status: 0 done, 2 a mistake in the command or its files, 3 training diverged or every trial of
a search failed, 70 Ray broke down, 75 stopped on request (SIGINT, SIGTERM, SIGUSR1), 128 + n ended
at once by signal n. After 70, 75, 128 + n and a kill the same command goes on.
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()  # evaluation and sampling, too; ``fit`` does so for those who call it
    with lossy_output():
        return _status_of(argv)


def _status_of(argv: list[str]) -> int:
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="", flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(metadata.version("vae-hyperband"))
            return 0
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r} is no command: use one of {', '.join(COMMANDS)}.")
        return COMMANDS[argv[0]](argv[1:])
    except VAEHyperbandError as error:
        print(f"vae-hyperband: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # as in "--help | head": who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # outside of training and search, which end in order
        print("vae-hyperband: interrupted; the same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT


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
        recipe = TrainConfig.from_dict(load_ckpt(given.resume_ckpt)["config"], "the checkpoint")
        with contextlib.suppress(ConfigError):  # a folder whose name cannot name a run
            run_name = given.resume_ckpt.resolve().parent.name
            check_run_name(run_name)
            return TrainArgs(recipe, RunOptions(run=run_name))
        return TrainArgs(recipe, RunOptions())
    return TrainArgs(TrainConfig(), RunOptions())


if __name__ == "__main__":
    sys.exit(main())
