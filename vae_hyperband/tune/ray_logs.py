"""The logs of a search in Ray Tune's format, so that whatever reads those reads ours.

In the search's log folder each trial gets ``result.json`` (a line per validation), ``progress.csv``
and ``params.json``; beside them lies ``experiment_state-search.json``, with which
``ray.tune.ExperimentAnalysis`` opens the whole search.

Ray's own callbacks would write what arrived, with a row twice where a killed trial computed it
again. These files follow from the decision log alone: they are the same whatever was killed.
"""

import contextlib
import csv
import io
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

from ray.train._internal.storage import StorageContext
from ray.tune.execution.placement_groups import resource_dict_to_pg_factory
from ray.tune.experiment import Trial
from ray.tune.utils.util import flatten_dict

from vae_hyperband.common.errors import RunFolderError
from vae_hyperband.common.files import make_folder, write_text
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.search.decisions import Board, TrialEvent
from vae_hyperband.search.trials import TrialRecord
from vae_hyperband.tune.session import trial_resources

RESULTS, PROGRESS, PARAMS = "result.json", "progress.csv", "params.json"
STATE, ERROR = "experiment_state-search.json", "error.txt"

STORAGE_MARKER = ".validate_storage_marker"

#: The state holds every trial: writing it may take one part in this many of a search's time.
STATE_SHARE = 50


class RayLogs:
    """Keeps the logs of one search as its board changes: give it the board's events."""

    def __init__(self, options: SearchOptions) -> None:
        self._folder = options.log_folder
        self._resources = resource_dict_to_pg_factory(trial_resources(options))
        self._state_due, self._said = 0.0, False

    def __call__(self, board: Board, event: TrialEvent) -> None:
        trial = board.trials[event["trial"]]
        with self._no_reason_to_stop():
            match event["event"]:
                case "draw" | "end":
                    self._write_trial(board, trial)
                case "result":
                    self._append(board, trial)
            if time.monotonic() > self._state_due:
                self._write_state(board)

    def write(self, board: Board) -> None:
        """All files anew, as the board is now: rows that a kill has torn or lost are whole then."""
        with self._no_reason_to_stop():
            make_folder(self._folder)
            for trial in board.trials:
                self._write_trial(board, trial)
            self._write_state(board)

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
                print(f"note: Ray's logs are not written: {error}", file=sys.stderr, flush=True)

    def _write_state(self, board: Board) -> None:
        begun = time.monotonic()
        states = [self._state(board, trial) for trial in board.trials]
        content = {"trial_data": states, "runner_data": {}, "stats": {}}
        write_text(self._folder / STATE, json.dumps(content) + "\n")
        (self._folder / STORAGE_MARKER).unlink(missing_ok=True)  # StorageContext's
        now = time.monotonic()
        self._state_due = now + STATE_SHARE * (now - begun)

    def _write_trial(self, board: Board, trial: TrialRecord) -> None:
        folder = self._folder / trial.name
        make_folder(folder)
        results = [_result(board, trial, number) for number in range(len(trial.rows))]
        params = json.dumps(trial.hyperparameters.to_dict(), indent=2, sort_keys=True)
        write_text(folder / PARAMS, params)
        write_text(folder / RESULTS, "".join(json.dumps(result) + "\n" for result in results))
        write_text(folder / PROGRESS, _csv(results, with_head=True))
        if trial.outcome == "failed":
            write_text(folder / ERROR, trial.why + "\n")

    def _append(self, board: Board, trial: TrialRecord) -> None:
        """Append the trial's last validation; not durably, since the decision log has it."""
        folder, number = self._folder / trial.name, len(trial.rows) - 1
        result = _result(board, trial, number)
        with open(folder / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        with open(folder / PROGRESS, "a", encoding="utf-8") as file:
            file.write(_csv([result], with_head=number == 0))

    def _state(self, board: Board, trial: TrialRecord) -> tuple[str, str]:
        """A trial as Ray stores it: what it is, and how it has gone."""
        storage = StorageContext(
            storage_path=str(self._folder.parent),
            experiment_dir_name=self._folder.name,
            trial_dir_name=trial.name,
        )
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
        return state


def _result(board: Board, trial: TrialRecord, number: int) -> dict[str, Any]:
    """A validation as Ray's callbacks write it; without clocks, hosts and process ids."""
    row = trial.rows[number]
    return {
        **row,
        "training_iteration": row["epoch"],
        "done": row["epoch"] == board.config.max_epochs,
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
