"""The command ``vae-hyperband search``: the search, its summary and picture, its winner in full."""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import RunOptions, changed_options, require_number
from vae_hyperband.common.process import stop_flag
from vae_hyperband.reporting import figures
from vae_hyperband.reporting.summaries import (
    executable,
    print_resume_hint,
    print_training_summary,
    summary_of,
)
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.trials import SearchResult
from vae_hyperband.training.dry_run import NOTHING_WRITTEN
from vae_hyperband.training.loop import FitResult, fit
from vae_hyperband.tune.driver import STOPPING, search
from vae_hyperband.tune.dry_run import search_dry_run, winner_dry_run


@dataclass(frozen=True)
class SearchArgs:
    """Search the hyperparameters with Ray Tune; stop the worse trials early.

    vae-hyperband search --run sweep --num-trials 20 --max-epochs 9

    Trials are compared on the validation bound at beta = 1. Giving the same command again goes on
    where it stopped, however it stopped.
    """

    space: tyro.conf.OmitArgPrefixes[SearchConfig]
    where: tyro.conf.OmitArgPrefixes[SearchOptions]
    final_epochs: int = 0
    """Then train the best configuration for this many epochs, as run <run>-best; 0: do not."""
    dry_run: bool = False
    """Print the space, the first trials, where they would run and how long it would take; then
    end."""

    def winner(self) -> RunOptions:
        where = self.where
        return RunOptions(run=f"{where.run}-best", device=where.device, **_places(where))


def search_command(argv: list[str]) -> int:
    args = parse_options(SearchArgs, argv, "vae-hyperband search")
    require_number("final_epochs", args.final_epochs, 0)
    final = args.winner() if args.final_epochs else None  # a mistake before the work
    if args.dry_run:
        print(search_dry_run(args.space, args.where))
        if final:
            print(winner_dry_run(args.space, args.where, args.final_epochs, final))
        print(NOTHING_WRITTEN)
        return 0
    with stop_flag(STOPPING) as should_stop:
        return _search_and_train(args, argv, should_stop)


def _search_and_train(args: SearchArgs, argv: list[str], should_stop: Callable[[], bool]) -> int:
    where = args.where
    found = search(args.space, where, should_stop)
    if found is None:
        return print_resume_hint("search", argv)
    print(summary_of(found))
    picture = figures.best_config(found, where.log_folder / "best_config.png")
    print(f"every trial's curve: {picture}", flush=True)
    if not args.final_epochs:
        print(f"train it in full: {_train_command(where)}")
        return 0
    trained = train_winner(found, args.final_epochs, args.winner(), should_stop)
    if not trained.finished:
        return print_resume_hint("search", argv)
    print_training_summary(trained, args.winner())
    return 0


def train_winner(
    found: SearchResult, epochs: int, options: RunOptions, should_stop: Callable[[], bool]
) -> FitResult:
    """Train the best configuration in full, from where its folder says it is."""
    config = dataclasses.replace(found.best_config, epochs=epochs)
    return fit(config, options, should_stop=should_stop)


def _places(where: SearchOptions) -> dict[str, Any]:
    return {
        "data_dir": where.data_dir,
        "checkpoints_dir": where.checkpoints_dir,
        "logs_dir": where.logs_dir,
    }


def _train_command(where: SearchOptions) -> str:
    """The command that trains the best configuration in full."""
    config = where.ckpt_folder / "best_config.json"
    words = ["train", "--run", f"{where.run}-best", "--config", str(config), "--epochs", "10"]
    words += changed_options(_places(where), _places(SearchOptions()))
    return f"{executable('vae-hyperband')} {shlex.join(words)}"
