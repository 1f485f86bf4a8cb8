"""Hyperparameter search: Ray Tune runs the trials, our rules stop the worse ones early.

A trial is :func:`vae_hyperband.training.loop.fit` with one CPU thread, nothing else; so what the
search reports for a configuration is what training it alone gives. Trials are compared on held-out
bounds at beta = 1, never on the training loss, and the test split is never opened.

A search is a folder, ``checkpoints/<run>/``: ``search.json`` (what was asked for),
``decisions.jsonl`` (what happened: the one thing it goes on from), ``trials/`` (a run each), and at
the end ``trials.json`` (every curve), ``best_config.json`` and ``winner.pt``.
"""

import dataclasses
import functools
import json
import os
import platform
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_hyperband.common.config import differences, plural, read_json
from vae_hyperband.common.errors import SearchError, SearchFailedError
from vae_hyperband.common.files import make_folder, refuse_foreign, write_text
from vae_hyperband.common.process import only_writer, stop_flag
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.model.checkpoint import BEST, LATEST, copy_ckpt, load_ckpt
from vae_hyperband.search.config import METRICS, SearchConfig, SearchOptions
from vae_hyperband.search.console import Watch
from vae_hyperband.search.decisions import Board, Journal, read_events
from vae_hyperband.search.suggest import importance, suggest
from vae_hyperband.search.trials import (
    ASKED,
    RESULT,
    WINNER,
    SearchResult,
    read_result,
    write_result,
)
from vae_hyperband.tune.session import check_resources, nodes, ray_for, with_gpus
from vae_hyperband.tune.storage import TrialStore, store_for
from vae_hyperband.tune.tuner import run_trials

DECISIONS = "decisions.jsonl"
STOPPING = "stopping; what was done is kept"


def search(
    config: SearchConfig,
    options: SearchOptions | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SearchResult | None:
    """Run a search to its end, from where its folder says it is; None if it was told to stop.

    By ``should_stop``, or without it by SIGINT, SIGTERM or SIGUSR1. The same call goes on after a
    stop or a kill. Raises :class:`SearchError`, :class:`SearchFailedError` and the data's errors.
    """
    if should_stop is None:
        with stop_flag(STOPPING) as should_stop:
            return search(config, options, should_stop)
    options = (options or SearchOptions()).absolute()
    folder = options.ckpt_folder
    _make_private(folder)
    refuse_foreign(folder)
    with only_writer(folder):
        if options.fresh:
            _move_aside(options)
        found = search_there(config, options)
        store = store_for(options, _begin(config, options) if found is None else found)
        if not (folder / RESULT).exists():
            store.check()
            with Journal(folder / DECISIONS) as journal:
                begun, watch = bool(journal.events), Watch()
                board = Board(config, journal, functools.partial(suggest, config), watch)
                if begun:
                    print(f"going on with the search in {folder}: {watch.sum(board)}", flush=True)
                if not board.finished:
                    _train(board, journal, options, store, should_stop)
                if not board.finished:
                    return None
                _write_result(board, options, store)
        return read_result(folder)


def _make_private(folder: Path) -> None:
    """Make a folder, if it is not there, that others cannot write to, whatever the umask."""
    if not folder.exists():
        make_folder(folder)
        folder.chmod(folder.stat().st_mode & ~0o002)


def _move_aside(options: SearchOptions) -> None:
    """Make room for a new search; the old one is kept, and its winner's training, too."""
    best = dataclasses.replace(options, run=f"{options.run}-best")
    with only_writer(best.ckpt_folder):
        for where in (options, best):
            for old in (where.ckpt_folder, where.log_folder):
                if not old.exists() or not any(old.iterdir()):
                    continue
                number = 1
                while (aside := old.with_name(f"{old.name}-before-{number}")).exists():
                    number += 1
                old.rename(aside)
                print(f"moved {old} to {aside}", flush=True)
    _make_private(options.ckpt_folder)
    if best.ckpt_folder.exists():
        best.ckpt_folder.rmdir()  # the lock made it


def search_there(config: SearchConfig, options: SearchOptions) -> str | None:
    """The id of the search in the folder, which the same command goes on with; None if there is
    none. Changes nothing; raises :class:`SearchError` where the folder holds something else.
    """
    folder = options.ckpt_folder
    begun = (folder / RESULT).exists() or read_events(folder / DECISIONS)
    if begun and (folder / ASKED).exists():
        there = read_json(folder / ASKED)
        search_id = there.pop("id", "")
        if changed := differences(there, _asked(config, options)):
            raise SearchError(
                f"{folder} holds a search with other settings ({'; '.join(changed)}): give the "
                "same ones to go on, --fresh to start anew, or choose another --run."
            )
        return str(search_id)
    if (folder / LATEST).exists():
        raise SearchError(f"{folder} holds a training run: choose another --run for the search.")
    if any((folder / "trials").glob(f"*/{LATEST}")):  # what was trained is not for us to remove
        raise SearchError(
            f"{folder} holds trials, but not the log of their search, {DECISIONS}: bring it back, "
            "give --fresh to start anew, or choose another --run."
        )
    return None


def _asked(config: SearchConfig, options: SearchOptions) -> dict[str, Any]:
    """What a search is known by, as its search.json holds it."""
    return {**json.loads(json.dumps(config.to_dict())), "storage": options.storage}


def _begin(config: SearchConfig, options: SearchOptions) -> str:
    """Note what is searched in a folder without a search; the new search's id."""
    folder = options.ckpt_folder
    shutil.rmtree(folder / "trials", ignore_errors=True)  # of one that was refused
    search_id = secrets.token_hex(4)
    store_for(options, search_id).check()  # a mistake about it must not be noted as what was asked
    asked = {"id": search_id, **_asked(config, options)}
    write_text(folder / ASKED, json.dumps(asked, indent=2) + "\n")
    return search_id


def load_splits(config: SearchConfig, options: SearchOptions) -> tuple[Split, Split]:
    """The training and the validation split.

    A user's mistake about them must be one sentence here, not one per trial.
    """
    train = load_split("train", options.data_dir, config.dataset)
    held_out = load_split("validation", options.data_dir, config.dataset)
    if max(config.batch_sizes) > len(train):
        raise SearchError(f"--batch-sizes has more than the {len(train)} training images.")
    return train, held_out


def _check_same_data(journal: Journal, train: Split, held_out: Split) -> None:
    """Trials of two data sets would be compared with each other."""
    digests = {"training": train.digest, "validation": held_out.digest}
    for event in journal.events:
        if event["event"] == "start" and event["data"] != digests:
            raise SearchError(
                f"{journal.path.parent} was begun with other data: give the same --data-dir to go "
                "on, --fresh to start anew, or choose another --run."
            )


def _train(
    board: Board,
    journal: Journal,
    options: SearchOptions,
    store: TrialStore,
    should_stop: Callable[[], bool],
) -> None:
    """Start or join Ray and train until the board is finished, or a signal comes."""
    config = board.config
    train, held_out = load_splits(config, options)
    _check_same_data(journal, train, held_out)
    print(
        f"{plural(config.total_trials, 'trial')} of up to {plural(config.max_epochs, 'epoch')} "
        f"on {len(train):,} images, drawn by {config.algorithm}, scheduler {config.scheduler}; "
        "starting Ray",
        flush=True,
    )
    with ray_for(options):
        options = with_gpus(options, nodes())
        check_resources(nodes(), options)
        check_shared(options, store)
        journal.append(
            "start",
            host=socket.gethostname(),
            process=os.getpid(),
            ray=ray.__version__,
            python=platform.python_version(),
            data={"training": train.digest, "validation": held_out.digest},
        )
        run_trials(board, options, store, (train, held_out), should_stop)


def check_shared(options: SearchOptions, store: TrialStore) -> None:
    """Refuse a cluster some node of which cannot see the trials' folder."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 1 or store.is_url:
        return
    token = Path(store.root) / f".seen-{secrets.token_hex(4)}"  # another folder has no such file
    make_folder(token.parent)
    token.touch()
    sees = ray.remote(num_cpus=0)(os.path.exists)
    try:
        for node in alive:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(sees.options(scheduling_strategy=place).remote(str(token))):
                raise SearchError(
                    f"{node['NodeManagerHostname']} does not see {store.root}: start the search "
                    "on storage that all nodes share, or give some with --storage."
                )
    finally:
        token.unlink()


def _write_result(board: Board, options: SearchOptions, store: TrialStore) -> None:
    """best_config.json and winner.pt, then trials.json, which says that the search is over."""
    config, folder = board.config, options.ckpt_folder
    result = SearchResult(config, board.trials, folder, importance(config, board.trials))
    winner = result.winner
    if winner.best_row is None:
        raise SearchFailedError(
            f"Every trial failed ({winner.why}): change the space and start anew with --fresh, or "
            "with another --run."
        )
    store.fetch(winner.name, BEST, folder / "winner.tmp")
    copy_ckpt(folder / "winner.tmp", folder / WINNER)
    (folder / "winner.tmp").unlink()
    checkpoint = load_ckpt(folder / WINNER)
    if checkpoint.metrics != winner.best_row:
        raise SearchError(
            f"{BEST} of {winner.name} is not the model that the decision log has (epoch "
            f"{checkpoint.metrics.get('epoch')}, not {winner.best_row['epoch']}): start anew with "
            "--fresh."
        )
    where = checkpoint.environment  # of the machine that trained it, which need not be this one
    best = {
        "config": result.best_config.to_dict(),
        "device": "cpu" if where["device"] == "cpu" else "cuda",
        "num_threads": where["num_threads"],
        "metric": {
            "name": f"{METRICS[config.metric]}, lower is better",
            "value": result.best_score,
            "epoch": winner.best_row["epoch"],
        },
        "seed": config.seed,
        "trial": winner.name,
        "environment": where | {"ray": ray.__version__},
    }
    write_text(folder / "best_config.json", json.dumps(best, indent=2) + "\n")
    write_result(result)
