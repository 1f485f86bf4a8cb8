"""Hyperparameter search: :func:`search`, from its folder's state to its result.

A trial is :func:`vae_hyperband.training.loop.fit` in a process of its own, nothing else; so what
the search reports for a configuration is what training it alone gives. Trials are compared on the
validation split at beta = 1, never on the training loss, and the test split is never opened.

A search is a folder, ``checkpoints/<run>/``: ``search.json`` (its settings), ``decisions.jsonl``
(what happened: all that it resumes from), ``trials/`` (a run each), and at the end ``trials.json``
(every curve), ``best_config.json`` and ``winner.pt``.
"""

import dataclasses
import functools
import json
import os
import platform
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_hyperband.common.checks import plural, read_json
from vae_hyperband.common.config import (
    DataConfig,
    Places,
    differences,
    former_holdout,
    model_settings,
    same_images,
    with_data,
)
from vae_hyperband.common.errors import SearchError, SearchFailedError
from vae_hyperband.common.files import make_folder, refuse_foreign, write_text
from vae_hyperband.common.process import only_writer, stop_flag
from vae_hyperband.data.splits import Split, load_training_splits
from vae_hyperband.evaluation.features import check_features, features_for
from vae_hyperband.model.checkpoint import BEST, LATEST, Checkpoint, copy_ckpt, load_ckpt
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.console import Console
from vae_hyperband.search.decisions import Board, Journal, TrialEvent, read_events
from vae_hyperband.search.optuna_study import OptunaStudy
from vae_hyperband.search.suggest import importance, suggest
from vae_hyperband.search.trials import (
    DECISIONS,
    RESULT,
    SETTINGS_FILE,
    WINNER,
    SearchResult,
    TrialRecord,
    read_result,
    write_result,
)
from vae_hyperband.tune.logs import SearchLogs
from vae_hyperband.tune.session import check_resources, nodes, ray_for, with_gpus
from vae_hyperband.tune.storage import TrialStore, store_for
from vae_hyperband.tune.tuner import run_trials

STOPPING = "stopping; finished work is kept"


def search(
    config: SearchConfig,
    options: SearchOptions | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SearchResult | None:
    """Run a search to its end; None if it was stopped before, and the same call will resume it.

    It stops when ``should_stop()`` is true; without that argument, on SIGINT, SIGTERM, SIGHUP or
    SIGUSR1, in the main thread. A search that was stopped or killed resumes from its folder. Raises
    :class:`SearchError`, :class:`SearchFailedError` if every trial failed, and :class:`DataError`.
    """
    if should_stop is None:
        with stop_flag(STOPPING) as should_stop:
            return search(config, options, should_stop)
    options = (options or SearchOptions()).absolute()
    folder = options.ckpt_folder
    _make_private(folder)
    refuse_foreign(folder)
    # the lock first: what is read from here on stays true until the end
    with only_writer(folder):
        config, options = with_known_data(config, options)
        if options.fresh:
            _start_over(options)
        search_id = existing_search(config, options)
        if search_id is None:
            search_id = _begin(config, options)
        store, study = store_for(options, search_id), None
        if options.optuna:
            study = OptunaStudy(options.optuna, options.run, search_id, config)
        if (folder / RESULT).exists():
            result = read_result(folder)
            if study:  # which may be asked for after the search
                study.add(result.trials)
            return result
        logs = SearchLogs(options, study)
        return read_result(folder) if _run(config, options, store, logs, should_stop) else None


def _run(
    config: SearchConfig,
    options: SearchOptions,
    store: TrialStore,
    logs: SearchLogs,
    should_stop: Callable[[], bool],
) -> bool:
    """Run or resume a search; whether it finished, and its result was written."""
    folder = options.ckpt_folder
    store.check()
    with Journal(folder / DECISIONS) as journal:
        begun, console = bool(journal.events), Console()

        def on_event(board: Board, event: TrialEvent) -> None:
            console(board, event)
            logs(board, event)

        board = Board(config, journal, functools.partial(suggest, config), on_event)
        logs.write(board)  # a kill may have come between the decision log and these
        total = config.total_trials
        if config.num_trials not in (total, SearchConfig.num_trials):
            print(f"note: a grid has {total} combinations: --num-trials has no effect", flush=True)
        if begun:
            print(f"resuming the search in {folder}: {console.progress(board)}", flush=True)
        # a kill may have come between the last decision and the result
        if not board.finished:
            _train(board, journal, options, store, should_stop)
        logs.write_state(board)
        if board.finished:
            _write_result(board, options, store)
        return board.finished


def _make_private(folder: Path) -> None:
    """Make a folder, if it does not exist, that others cannot write to, whatever the umask."""
    # refuse_foreign would refuse it otherwise: who can write to it can change what is trained
    if not folder.exists():
        make_folder(folder)
        folder.chmod(folder.stat().st_mode & ~0o002)


def move_aside(place: Places) -> None:
    """Rename the folders of a search or run. The caller holds the lock of its checkpoints."""
    for old in (place.ckpt_folder, place.log_folder):
        if not old.exists() or not any(old.iterdir()):
            continue
        number = 1
        while (aside := old.with_name(f"{old.name}-before-{number}")).exists():
            number += 1
        old.rename(aside)
        print(f"moved {old} to {aside}", flush=True)


def _start_over(options: SearchOptions) -> None:
    """Move an existing search aside, and the training of its winner."""
    # the winner's too: its name follows from the search's, so the new winner would resume it
    best = dataclasses.replace(options, run=f"{options.run}-best")
    with only_writer(best.ckpt_folder):
        for place in (options, best):
            move_aside(place)
    _make_private(options.ckpt_folder)
    if best.ckpt_folder.exists():
        best.ckpt_folder.rmdir()  # the lock made it


def begun_settings(folder: Path) -> dict[str, object] | None:
    """The content of search.json, if a search in the folder has begun."""
    # settings alone are no search: a command that was refused, for its data say, leaves them
    begun = (folder / RESULT).exists() or read_events(folder / DECISIONS)
    if not begun or not (folder / SETTINGS_FILE).exists():
        return None
    there = read_json(folder / SETTINGS_FILE)
    # a search of an earlier version lacks the settings that came later: they had the defaults
    usual = json.loads(json.dumps(SearchConfig().to_dict()))
    return {**usual, "holdout": former_holdout(there.get("dataset")), **there}


def with_known_data(
    config: SearchConfig, options: SearchOptions
) -> tuple[SearchConfig, SearchOptions]:
    """The search's settings with its images: those of ``--data``, else those it began with.

    Raises :class:`ConfigError` if they contradict the configuration.
    """
    if options.data is None and config.dataset in ("fashion-mnist", "images") and not options.fresh:
        there = begun_settings(options.ckpt_folder) or {}
        if there.get("dataset") == "images" and isinstance(there.get("data"), str):
            options = dataclasses.replace(options, data=Path(str(there["data"])))
            names = DataConfig().data_settings()
            config = same_images(config, {name: there[name] for name in names})
    return with_data(config, options.data), options


def existing_search(config: SearchConfig, options: SearchOptions) -> str | None:
    """The id of the search in the folder; None if there is none. Changes nothing.

    Raises :class:`SearchError` if the folder holds a search with other settings, or something else.
    """
    folder = options.ckpt_folder
    there = begun_settings(folder)
    if there is not None:
        search_id = there.pop("id", "")
        there.pop("data", "")  # it may have moved: its digest is in the decision log
        if changed := differences(_flat(there), _flat(_settings(config, options))):
            raise SearchError(
                f"{folder} holds a search with other settings ({'; '.join(changed)}): give the "
                "same ones to resume it, --fresh to start over, or choose another --run."
            )
        return str(search_id)
    if (folder / LATEST).exists():
        raise SearchError(f"{folder} holds a training run: choose another --run for the search.")
    # hours of training may be in there, so it is not for this command to remove
    if any((folder / "trials").glob(f"*/{LATEST}")):
        raise SearchError(
            f"{folder} holds trials, but not the log of their search, {DECISIONS}: restore it, "
            "give --fresh to start over, or choose another --run."
        )
    return None


def _settings(config: SearchConfig, options: SearchOptions) -> dict[str, object]:
    """What makes two searches the same one, as search.json holds it."""
    # through JSON and back, so that tuples compare as the lists that the file has; the storage is
    # one of them, since a resumed search has to find its trials
    return {**json.loads(json.dumps(config.to_dict())), "storage": options.storage}


def _flat(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings with one entry for each that --space has, so that a difference names it."""
    space = settings.get("space")
    named = space.items() if isinstance(space, Mapping) else ()
    flat = {**settings, **{f"{name} in --space": domain for name, domain in named}}
    return {name: value for name, value in flat.items() if name != "space"}


def _begin(config: SearchConfig, options: SearchOptions) -> str:
    """Write the settings of a new search into its folder; its id."""
    folder = options.ckpt_folder
    shutil.rmtree(folder / "trials", ignore_errors=True)  # of a search that was refused
    search_id = secrets.token_hex(4)
    store_for(options, search_id).check()  # before a --storage that cannot be used is written down
    where = os.path.abspath(options.data) if options.data else None
    settings = {"id": search_id, "data": where, **_settings(config, options)}
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    return search_id


def load_splits(
    config: SearchConfig, options: SearchOptions, should_stop: Callable[[], bool] = lambda: False
) -> tuple[Split, Split]:
    """The training and the validation split. Raises :class:`DataError`, :class:`SearchError`, and
    :class:`ConfigError` if FID is to be measured on images without features."""
    # here and not in the trials: an invalid file or batch size is then one message, not one each
    train, held_out = load_training_splits(config, options, should_stop)
    # a search that has its result trains nothing more
    if not (options.ckpt_folder / RESULT).exists() and not options.fresh:
        _check_same_data(options, train, held_out)
    if max(config.batch_sizes_tried) > len(train):
        option = (
            "batch_size in --space" if "batch_size" in (config.space or ()) else "--batch-sizes"
        )
        raise SearchError(f"{option} has more than the {len(train)} training images.")
    _check_network(config, train)
    if config.metric == "fid":
        check_features(config.dataset, train)
    return train, held_out


def _check_network(config: SearchConfig, train: Split) -> None:
    """Raise :class:`ConfigError` if the trials' network does not fit their images."""
    # before Ray starts, and once: in the trials it would be one message each
    first = suggest(config, 0, [])
    channels, height, width = train.image_shape
    tried = [first] + [
        first.replace(**{name: value})
        for name in ("widths", "network")
        if name in config.domains
        for value in config.domains[name].ends
    ]
    for trial in tried:
        settings = model_settings(config.trial_config(trial))
        initialized_vae(image_size=(height, width), channels=channels, seed=config.seed, **settings)


def _check_same_data(options: SearchOptions, train: Split, held_out: Split) -> None:
    """Raise :class:`SearchError` if an earlier call trained on other data."""
    folder, option = options.ckpt_folder, "--data" if options.data else "--data-dir"
    # the losses of different images cannot be compared
    digests = _digests(train, held_out)
    for event in read_events(folder / DECISIONS):
        if event["event"] == "start" and event["data"] != digests:
            raise SearchError(
                f"{folder} was begun with other data: give the same {option} to resume it, "
                "--fresh to start over, or choose another --run."
            )


def _digests(train: Split, held_out: Split) -> dict[str, str]:
    return {"training": train.digest, "validation": held_out.digest}


def _train(
    board: Board,
    journal: Journal,
    options: SearchOptions,
    store: TrialStore,
    should_stop: Callable[[], bool],
) -> None:
    """Start or join Ray and train until the board is finished or ``should_stop`` is true."""
    config = board.config
    train, held_out = load_splits(config, options, should_stop)
    if config.metric == "fid":  # fitted once, here: the trials find the classifier in the cache
        features_for(config.dataset, train, say=functools.partial(print, flush=True))
    print(
        f"{plural(config.total_trials, 'trial')} of up to {plural(config.max_epochs, 'epoch')} "
        f"on {plural(len(train), 'image')}, algorithm {config.algorithm}, scheduler "
        f"{config.scheduler}; starting Ray",
        flush=True,
    )
    # only now, when settings and data are known to be good: Ray takes seconds to start
    with ray_for(options):
        options = with_gpus(options, nodes())
        check_resources(nodes(), options)
        check_shared(options, store)
        # after the checks: a search that could not start has not begun
        journal.append(
            {
                "event": "start",
                "host": socket.gethostname(),
                "process": os.getpid(),
                "ray": ray.__version__,
                "python": platform.python_version(),
                "data": _digests(train, held_out),
            }
        )
        run_trials(board, options, store, (train, held_out), should_stop)


def check_shared(options: SearchOptions, store: TrialStore) -> None:
    """Raise :class:`SearchError` if a node of the cluster cannot see the trials' folder."""
    # the trials there would start from nothing in a folder of the node's own, and be lost with it
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) == 1 or store.is_url:
        return
    # a random name: a folder with the same path on another disk has no such file
    token = Path(store.root) / f".seen-{secrets.token_hex(4)}"
    make_folder(token.parent)
    token.touch()
    sees = ray.remote(num_cpus=0)(os.path.exists)
    try:
        for node in alive:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(sees.options(scheduling_strategy=place).remote(str(token))):
                raise SearchError(
                    f"{node['NodeManagerHostname']} does not see {store.root}: start the search "
                    "on storage that all nodes share, or name such storage with --storage."
                )
    finally:
        token.unlink()


def _write_result(board: Board, options: SearchOptions, store: TrialStore) -> None:
    """Write best_config.json and winner.pt, then trials.json.

    Raises :class:`SearchFailedError` if every trial failed, :class:`SearchError` if the winner's
    checkpoint is not the model that was reported.
    """
    config, folder = board.config, options.ckpt_folder
    result = SearchResult(config, board.trials, folder, importance(config, board.trials))
    winner = result.winner
    if winner.best_row is None:
        raise SearchFailedError(
            f"Every trial failed ({winner.why}): change the space and start over with --fresh, or "
            "choose another --run."
        )
    best = _best_config(result, _fetch_winner(winner, folder, store))
    write_text(folder / "best_config.json", json.dumps(best, indent=2) + "\n")
    write_result(result)  # last: it says that the search has finished


def _fetch_winner(winner: TrialRecord, folder: Path, store: TrialStore) -> Checkpoint:
    """Copy the winner's best checkpoint to winner.pt; it must be the one that was reported."""
    assert winner.best_row is not None
    # through a temporary file: copy_ckpt is atomic and durable, a download is not
    store.fetch(winner.name, BEST, folder / "winner.tmp")
    copy_ckpt(folder / "winner.tmp", folder / WINNER)
    (folder / "winner.tmp").unlink()
    checkpoint = load_ckpt(folder / WINNER)
    # to the last bit: else the files in trials/ are not those of the decision log
    if checkpoint.metrics != winner.best_row:
        raise SearchError(
            f"{BEST} of {winner.name} is not the model that the decision log has (epoch "
            f"{checkpoint.metrics.get('epoch')}, not {winner.best_row['epoch']}): start over with "
            "--fresh, or choose another --run."
        )
    return checkpoint


def _best_config(result: SearchResult, checkpoint: Checkpoint) -> dict[str, object]:
    """The content of best_config.json: what ``train --config`` needs to repeat the winner."""
    config, winner = result.config, result.winner
    assert winner.best_row is not None
    # of the machine that trained it, which need not be this one
    environment = checkpoint.environment
    return {
        "config": result.best_config.to_dict(),
        "device": "cpu" if environment["device"] == "cpu" else "cuda",
        "num_threads": environment["num_threads"],
        "data": checkpoint.data.path,
        "metric": {
            "name": f"{config.metric_name}, lower is better",
            "value": result.best_score,
            "epoch": winner.best_row["epoch"],
        },
        "seed": config.seed,
        "trial": winner.name,
        "environment": environment | {"ray": ray.__version__},
    }
