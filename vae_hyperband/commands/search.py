"""The commands ``search`` (with its summary, figure, and the winner's training) and ``slurm``."""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.checks import require_number
from vae_hyperband.common.config import Folders, RunOptions, changed_options, network_option
from vae_hyperband.common.process import stop_flag
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.trials import WINNER, SearchResult

if TYPE_CHECKING:
    from vae_hyperband.training.loop import FitResult


@dataclass(frozen=True)
class SearchArgs(ConfigFile):
    """Search hyperparameters with Ray Tune; stop the worse trials early.

    vae-hyperband search --run sweep --num-trials 20 --max-epochs 9

    Trials are compared on the validation bound at beta = 1. The same command continues a search
    that stopped, for whatever reason.
    """

    space: tyro.conf.OmitArgPrefixes[SearchConfig]
    execution: tyro.conf.OmitArgPrefixes[SearchOptions]
    final_epochs: int = 0
    """Then train the best configuration for this many epochs, as run <run>-best; 0 disables it."""
    dry_run: bool = False
    """Print the space, the first trials, where they would run and for how long, then exit."""

    def winner(self) -> RunOptions:
        return RunOptions(**self.execution.options(f"{self.execution.run}-best"))


def search_command(argv: list[str]) -> int:
    args = parse_options(SearchArgs, argv, "vae-hyperband search")
    require_number("final_epochs", args.final_epochs, 0)
    final = args.winner() if args.final_epochs else None  # checks it
    # here, so that --help and completion need neither PyTorch nor Ray, which is an extra
    from vae_hyperband.training.dry_run import NOTHING_WRITTEN
    from vae_hyperband.tune import driver, dry_run

    if args.dry_run:
        print(dry_run.search_dry_run(args.space, args.execution))
        if final:
            print(dry_run.winner_dry_run(args.space, args.execution, args.final_epochs, final))
        print(NOTHING_WRITTEN)
        return 0
    with stop_flag(driver.STOPPING) as should_stop:
        return _search_and_train(args, argv, should_stop)


def _search_and_train(args: SearchArgs, argv: list[str], should_stop: Callable[[], bool]) -> int:
    from vae_hyperband.reporting.summaries import print_resume_hint, print_training_summary

    result = search_and_plot(args.space, args.execution, should_stop)
    if result is None:
        return print_resume_hint("search", argv)
    found, figure = result
    print(f"curves of all trials: {figure}", flush=True)
    if not args.final_epochs:
        print(f"train it in full: {_train_command(args.execution, found.config.network)}")
        return 0
    trained = train_winner(found, args.final_epochs, args.winner(), should_stop)
    if not trained.finished:
        return print_resume_hint("search", argv)
    print_training_summary(trained, args.winner())
    return 0


@dataclass(frozen=True)
class SlurmArgs:
    """Print the script that runs the search on a Slurm cluster; its head explains it.

    vae-hyperband slurm > slurm_job.sh
    """


def slurm_command(argv: list[str]) -> int:
    parse_options(SlurmArgs, argv, "vae-hyperband slurm")
    script = resources.files("vae_hyperband") / "slurm_job.sh"
    print(script.read_text(encoding="utf-8"), end="")
    return 0


def search_and_plot(
    config: SearchConfig, options: SearchOptions, should_stop: Callable[[], bool]
) -> tuple[SearchResult, Path] | None:
    """Search, print the summary and plot every trial's curve; None if told to stop."""
    from vae_hyperband.tune import driver

    found = driver.search(config, options, should_stop)
    if found is None:
        return None
    from vae_hyperband.reporting import search_figure  # a second of imports: this line only
    from vae_hyperband.reporting.summaries import summary_of

    print(summary_of(found), flush=True)
    return found, search_figure.best_config(found, options.log_folder / "best_config.png")


def train_winner(
    found: SearchResult, epochs: int, options: RunOptions, should_stop: Callable[[], bool]
) -> "FitResult":
    """Train the best configuration in full; a run that was begun is continued."""
    from vae_hyperband.model.checkpoint import load_ckpt
    from vae_hyperband.training.loop import fit

    config = dataclasses.replace(found.best_config, epochs=epochs)
    if config.dataset == "images" and options.data is None:  # a search that was resumed without it
        path = load_ckpt(found.folder / WINNER).data.path
        options = dataclasses.replace(options, data=Path(path) if path else None)
    return fit(config, options, should_stop=should_stop)


def _train_command(options: SearchOptions, network: str) -> str:
    """The command that trains the best configuration in full."""
    from vae_hyperband.reporting.summaries import executable

    config = options.ckpt_folder / "best_config.json"
    words = ["train", "--run", f"{options.run}-best", "--config", str(config), "--epochs", "10"]
    words += network_option(network)
    words += changed_options(options.folders(), Folders().folders())
    return f"{executable('vae-hyperband')} {shlex.join(words)}"
