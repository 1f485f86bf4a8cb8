"""The logs of a whole search: its trials in Ray Tune's format, and in TensorBoard's HParams table.

In the search's log folder each trial gets ``result.json`` (a line per validation), ``progress.csv``
and ``params.json``; beside them lies ``experiment_state-search.json``, with which
``ray.tune.ExperimentAnalysis`` opens the whole search. A trial that did not get to its end gets its
row of the HParams table here; one that did wrote it itself. With ``--optuna`` the trials that have
ended go to a storage of Optuna's, too.

Ray's own callbacks would write what arrived, with a row twice where a killed trial computed it
again. These files follow from the decision log alone: they are the same whatever was killed.
"""

import contextlib
import copy
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ray.train._internal.storage import StorageContext
from ray.tune.execution.placement_groups import resource_dict_to_pg_factory
from ray.tune.experiment import Trial
from ray.tune.utils.util import flatten_dict

from vae_hyperband.common.errors import RunFolderError
from vae_hyperband.common.files import make_folder, write_text
from vae_hyperband.common.process import TimeShare
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.search.decisions import Board, TrialEvent
from vae_hyperband.search.optuna_study import OptunaStudy
from vae_hyperband.search.trials import TrialRecord
from vae_hyperband.training.tracker import write_hyperparameters
from vae_hyperband.tune.session import trial_resources

RESULTS, PROGRESS, PARAMS = "result.json", "progress.csv", "params.json"
STATE, ERROR = "experiment_state-search.json", "error.txt"

STORAGE_MARKER = ".validate_storage_marker"

#: The state holds every trial: writing it may take this share of a search's time.
STATE_SHARE = 0.02


class SearchLogs:
    """Keeps the logs of one search as its board changes: give it the board's events."""

    def __init__(self, options: SearchOptions, study: OptunaStudy | None = None) -> None:
        self._folder, self._study = options.log_folder, study
        self._resources = resource_dict_to_pg_factory(trial_resources(options))
        # where the trials' own logs go to the store, the driver's have a row of each
        self._has_all_rows = options.storage is not None and "://" in options.storage
        self._state_time, self._said = TimeShare(STATE_SHARE), False
        self._ended: dict[int, tuple[str, str]] = {}  # states of trials, which change no more

    def __call__(self, board: Board, event: TrialEvent) -> None:
        trial = board.trials[event["trial"]]
        with self._no_reason_to_stop():
            match event["event"]:
                case "draw":
                    self._write_trial(board, trial)
                case "result":
                    self._append(board, trial)
                case "end":
                    self._write_trial(board, trial)  # of one that was stopped, the last row is done
                    self._write_end(board, trial)
            if self._state_time.due:
                self._write_state(board)
        if event["event"] == "end":
            self._add_to_study([trial])

    def write(self, board: Board) -> None:
        """All files as the board is now: rows that a kill has torn or lost are whole then."""
        with self._no_reason_to_stop():
            make_folder(self._folder)
            for trial in board.trials:
                self._write_trial(board, trial)
                self._write_end(board, trial)
            self._write_state(board)
        self._add_to_study(board.trials)

    def _add_to_study(self, trials: list[TrialRecord]) -> None:
        if self._study:
            with self._no_reason_to_stop():
                self._study.add(trials)

    def write_state(self, board: Board) -> None:
        """``experiment_state-search.json``: all trials, how they ended and their best values."""
        with self._no_reason_to_stop():
            self._write_state(board)

    @contextlib.contextmanager
    def _no_reason_to_stop(self) -> Iterator[None]:
        """A full disk or a closed folder is said once; the decision log has all that counts."""
        try:
            yield
        except (OSError, RunFolderError) as error:
            if not self._said:
                self._said = True
                print(
                    f"note: the search's own logs are not written: {error}",
                    file=sys.stderr,
                    flush=True,
                )

    def _write_trial(self, board: Board, trial: TrialRecord) -> None:
        folder = self._folder / trial.name
        make_folder(folder)
        results = [_result(board, trial, number) for number in range(len(trial.rows))]
        params = json.dumps(trial.hyperparameters.to_dict(), indent=2, sort_keys=True)
        _write(folder / PARAMS, params)
        _write(folder / RESULTS, "".join(json.dumps(result) + "\n" for result in results))
        _write(folder / PROGRESS, _csv(results, with_head=True))

    def _append(self, board: Board, trial: TrialRecord) -> None:
        """Append the trial's last validation."""
        folder, number = self._folder / trial.name, len(trial.rows) - 1
        result = _result(board, trial, number)
        with open(folder / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        with open(folder / PROGRESS, "a", encoding="utf-8") as file:
            file.write(_csv([result], with_head=number == 0))

    def _write_end(self, board: Board, trial: TrialRecord) -> None:
        """What is known only when a trial has ended: why it failed, and its row of HParams."""
        folder = self._folder / trial.name
        if trial.outcome == "failed":
            _write(folder / ERROR, trial.why + "\n")
        if trial.outcome is None or (trial.outcome == "finished" and not self._has_all_rows):
            return
        bounds = {}
        if trial.rows:
            best = min(trial.rows, key=lambda row: row["total_loss"])
            bounds = {"best_bound": best["bound"], "final_bound": trial.rows[-1]["bound"]}
        config = board.config.trial_config(trial.hyperparameters).to_dict()
        step = trial.rows[-1]["step"] if trial.rows else 0
        write_hyperparameters(folder, config, bounds, step, trial.outcome)

    def _write_state(self, board: Board) -> None:
        with self._state_time:
            storage = StorageContext(
                storage_path=str(self._folder.parent), experiment_dir_name=self._folder.name
            )
            states = [self._state(board, trial, storage) for trial in board.trials]
            content = {"trial_data": states, "runner_data": {}, "stats": {}}
            write_text(self._folder / STATE, json.dumps(content) + "\n")
            (self._folder / STORAGE_MARKER).unlink(missing_ok=True)  # StorageContext's

    def _state(self, board: Board, trial: TrialRecord, storage: StorageContext) -> tuple[str, str]:
        """A trial as Ray stores it: what it is, and how it has gone."""
        if trial.number in self._ended:
            return self._ended[trial.number]
        storage = copy.copy(storage)
        storage.trial_dir_name = trial.name
        found = Trial(
            "train_trial",
            config=trial.hyperparameters.to_dict(),
            trial_id=trial.name,
            storage=storage,
            placement_group_factory=self._resources,
            stub=True,  # nothing will be run from it
        )
        found.create_placement_group_factory()  # Ray refuses a trial without
        for number in range(len(trial.rows)):
            found.update_last_result(_result(board, trial, number))
        if trial.outcome == "failed":
            found.run_metadata.error_filename = cast(Any, ERROR)  # Ray declares it as None
        ended = {None: Trial.PAUSED, "failed": Trial.ERROR}
        found.set_status(ended.get(trial.outcome, Trial.TERMINATED))
        state: tuple[str, str] = found.get_json_state()
        if trial.outcome:
            self._ended[trial.number] = state
        return state


def _write(path: Path, text: str) -> None:
    """Write a small file; not durably, since the decision log has what is in it."""
    # a search that resumes finds nearly all of thousands as they should be
    with contextlib.suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    path.write_text(text, encoding="utf-8")


def _result(board: Board, trial: TrialRecord, number: int) -> dict[str, Any]:
    """A validation as Ray's callbacks write it; without clocks, hosts and process ids."""
    row = trial.rows[number]
    return {
        **row,
        "training_iteration": row["epoch"],
        # as Ray has it: also of the last one before the scheduler stopped the trial
        "done": row["epoch"] == board.config.max_epochs
        or (trial.outcome == "stopped" and number == len(trial.rows) - 1),
        "trial_id": trial.name,
        "config": trial.hyperparameters.to_dict(),
    }


def _csv(results: list[dict[str, Any]], with_head: bool) -> str:
    """Rows of progress.csv, nested names joined by a slash."""
    flat = [flatten_dict(result, delimiter="/") for result in results]
    text = io.StringIO()
    if flat:
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        if with_head:
            writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()
