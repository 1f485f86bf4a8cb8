"""The decision log of a search, and the state that follows from it.

:class:`Journal` is an append-only file of JSON lines, and all that a search remembers: each line is
on disk before anything follows from it. :class:`Board` replays it; so a search that was killed
anywhere continues as if it had not been.
"""

import bisect
import hashlib
import heapq
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypedDict

from vae_hyperband.common.checks import read_json
from vae_hyperband.common.errors import ConfigError, RunFolderError, SearchError, first_line
from vae_hyperband.common.files import fsync_folder, no_link
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.schedulers import Verdict, scheduler_for
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import (
    DECISIONS,
    RESULT,
    SETTINGS_FILE,
    Outcome,
    SearchResult,
    TrialRecord,
    ValidationRow,
    config_of,
    read_result,
)

# The lines of the log. Keys and their order are those of version 0.1, whose searches can resume.


class StartEvent(TypedDict):
    """A driver connected to Ray: what it ran on, and the digests of the data it trains on."""

    event: Literal["start"]
    host: str
    process: int
    ray: str
    python: str
    data: dict[str, str]


class SuggestEvent(TypedDict):
    """A new trial got its hyperparameters."""

    event: Literal["draw"]
    trial: int
    drawn: Mapping[str, object]


class ResultEvent(TypedDict):
    """A trial validated after an epoch."""

    event: Literal["result"]
    trial: int
    row: ValidationRow


class EndEvent(TypedDict):
    """A trial will not be trained any further."""

    event: Literal["end"]
    trial: int
    outcome: Outcome
    why: str


class DiedEvent(TypedDict):
    """The process of a trial died; the trial itself continues in another one."""

    event: Literal["died"]
    trial: int
    why: str


TrialEvent = SuggestEvent | ResultEvent | EndEvent | DiedEvent
Event = StartEvent | TrialEvent


class Journal:
    """The events of a decision log, open for more. One process writes at a time.

    Use it as a context manager to append. Raises :class:`SearchError` for a damaged log,
    :class:`RunFolderError` if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events, self._whole = _read(path)
        self._file: io.FileIO | None = None

    def __enter__(self) -> Self:
        try:
            # unbuffered: what append has written is the kernel's when it returns, and no line
            # lingers in this process to be written twice, or half
            self._file = file = open(self.path, "ab", buffering=0, opener=no_link)
            fsync_folder(self.path.parent)  # else a power cut may lose the name of a new file
            if file.tell() > self._whole:  # a torn last line: what it said had no consequences
                file.truncate(self._whole)
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}.") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, event: Event) -> None:
        """Write one event; it is on disk when this returns. Raises :class:`RunFolderError`."""
        assert self._file is not None
        start = self._file.seek(0, os.SEEK_END)
        try:
            line = _line(event)
            if self._file.write(line) != len(line):  # a full disk may take a part without an error
                raise OSError(0, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            # take the line back even if all of it was written: its event must not be found later,
            # since the caller is told that it was not recorded
            self._file.truncate(start)
            raise RunFolderError(
                f"{self.path} cannot be written ({error.strerror}): free some space, then the same "
                "command goes on."
            ) from error
        self.events.append(event)


def read_events(path: Path) -> list[Event]:
    """The events of a log without a torn last line; an empty list if there is no file.

    Raises :class:`SearchError` for a log that cannot be read or is damaged elsewhere.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Event], int]:
    """The events of a log, and the bytes that their lines take."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    events, size = [], 0
    # the last element follows the last newline: nothing, or a line torn by a kill
    for number, line in enumerate(lines[:-1], start=1):
        event = _event(line)
        if event is None:
            if number == len(lines) - 1 and lines[-1] == b"":
                break  # a power cut may leave the length of a line, but not its content
            # skipping it would decide differently from then on, without anyone noticing
            raise SearchError(
                f"Line {number} of {path} is damaged, so the search cannot go on from it: start "
                "over with --fresh, or choose another --run."
            )
        events.append(event)
        size += len(line) + 1
    return events, size


def _line(event: Event) -> bytes:
    """An event as a line: JSON whose last key is a check of what comes before it."""
    # the check tells a torn line, which is expected, from a damaged file, which is an error
    text = json.dumps(event)
    return f'{text[:-1]}, "check": "{_check(text)}"}}\n'.encode()


def _event(line: bytes) -> Event | None:
    """The inverse of :func:`_line`; None if the line is not one."""
    try:
        event: Event = json.loads(line)
        check = event.pop("check")  # type: ignore[typeddict-item]
        # Python's JSON is exact: floats are written so that reading gives the same bits
        return event if check == _check(json.dumps(event)) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _follow(event: Event, config: SearchConfig, trials: list[TrialRecord]) -> None:
    """Add to the trials what an event says of one of them."""
    match event["event"]:
        case "draw":
            hyperparameters = config.hyperparameters(event["drawn"])
            trials.append(TrialRecord(event["trial"], hyperparameters))
        case "result":
            trials[event["trial"]].rows.append(event["row"])
        case "end":
            trial = trials[event["trial"]]
            trial.outcome, trial.why = event["outcome"], event["why"]


def read_search(folder: Path) -> SearchResult:
    """The trials of a search so far, without changing anything, while it runs or after its end.

    Raises :class:`ConfigError` for a folder without a search that has begun, and
    :class:`SearchError` for a damaged log.
    """
    if (folder / RESULT).exists():
        return read_result(folder)
    settings, events = read_json(folder / SETTINGS_FILE), read_events(folder / DECISIONS)
    trials = list[TrialRecord]()
    try:
        config = config_of(settings)
        for event in events:
            _follow(event, config, trials)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"{folder} is damaged, or of another version: {first_line(error)}"
        ) from error
    return SearchResult(config, trials, folder)


# ---- The state of a search: its trials, what they reported, and what the scheduler decided.

#: Below this KL, in nats per image, no latent unit is active: one whose mean varies by more than
#: 0.01 over images (Burda et al. 2016, section 2.3) costs at least half of that.
COLLAPSED_NATS = 0.005
#: Optimiser steps before a KL is judged: a low KL this early may only mean an untrained encoder.
COLLAPSED_STEPS = 100

#: Gives the hyperparameters of the trial with a number, knowing the trials so far.
Suggest = Callable[[int, list[TrialRecord]], Hyperparameters]


@dataclass
class Totals:
    """Numbers of a search so far."""

    ended: int = 0  # trials that have an outcome
    failed: int = 0
    epochs: int = 0  # trained
    epochs_of_ended: int = 0  # of these, by trials that have ended
    epochs_saved: int = 0  # that running the stopped trials to their end would have cost

    def count(self, trial: TrialRecord, max_epochs: int) -> None:
        """Add a trial that has just ended."""
        self.ended += 1
        self.epochs_of_ended += trial.num_epochs
        self.failed += trial.outcome == "failed"
        if trial.outcome == "stopped":
            self.epochs_saved += max_epochs - trial.num_epochs


class Board:
    """All trials of a search, what each has reported, and the scheduler's verdict on it.

    Each method that changes it appends to ``journal`` first. ``suggest`` chooses hyperparameters;
    ``on_event`` is called with every new event, after it was recorded and applied.
    """

    def __init__(
        self,
        config: SearchConfig,
        journal: Journal,
        suggest: Suggest,
        on_event: Callable[["Board", TrialEvent], None] = lambda board, event: None,
    ) -> None:
        self.config, self.trials = config, list[TrialRecord]()
        self._journal, self._suggest, self._on_event = journal, suggest, on_event
        # whatever depends on all trials is kept up to date, not computed at each event: an event
        # of a search of thousands of trials costs what one of a small search costs
        self._scheduler = scheduler_for(config)
        self.totals = Totals()
        self.under_way: set[int] = set()  # numbers of the trials that have not ended
        self._ranking: list[tuple[float, int]] = []  # a heap of scores and numbers, old ones too
        self._runnable: list[int] = []
        self._undecided: set[int] = set()  # trials whose verdict may have changed
        for event in journal.events:
            self._apply(event)
        self._decide()  # a kill may have come between a result and the decisions it leads to

    @property
    def finished(self) -> bool:
        """Whether all trials were suggested and have ended."""
        return self.totals.ended == self.config.total_trials

    @property
    def best(self) -> TrialRecord | None:
        """The best trial so far; of equals, the one with the lowest number."""
        while self._ranking:
            score, number = self._ranking[0]
            trial = self.trials[number]
            if trial.best_row and trial.score(self.config.metric) == score:
                return trial
            heapq.heappop(self._ranking)  # it has another score by now, or has failed
        return None

    def verdict(self, number: int) -> Verdict:
        """Whether the trial with that number continues, pauses or stops."""
        if self.trials[number].outcome:
            return Verdict("stop", why=self.trials[number].why)
        return self._scheduler.verdicts[number]

    def runnable(self) -> list[int]:
        """Numbers of the trials, among those suggested so far, that are to be trained further."""
        return list(self._runnable)

    def suggest_next(self) -> TrialRecord | None:
        """Add one more trial; None if the search has all of them."""
        number = len(self.trials)
        if number == self.config.total_trials:
            return None
        hyperparameters = self._suggest(number, self.trials)
        # the suggestion is kept, not made again after a restart: TPE's depends on which trials had
        # ended when it was made
        self._record({"event": "draw", "trial": number, "drawn": hyperparameters.to_dict()})
        return self.trials[number]

    def reported(self, number: int, row: ValidationRow) -> None:
        """A trial validated. A row that was reported before, ahead of a kill, changes nothing."""
        trial = self.trials[number]
        if trial.outcome or row["epoch"] <= trial.num_epochs:
            return
        if why := self._disqualification(trial, row):
            self.failed(number, why)
            return
        self._record({"event": "result", "trial": number, "row": row})
        self._decide()

    def failed(self, number: int, why: str) -> None:
        """A trial cannot be used: it ranks last, and the others are judged without it."""
        if not self.trials[number].outcome:
            self._end(number, "failed", why)
            self._decide()  # a trial may have been waiting for this one

    def died(self, number: int, why: str) -> None:
        """A trial's process died. Recorded for the reader of the log; it decides nothing."""
        self._record({"event": "died", "trial": number, "why": why})

    def _disqualification(self, trial: TrialRecord, row: ValidationRow) -> str:
        """Why a validation disqualifies its trial, or an empty string."""
        # a gap means that another search trained in the trial's folder
        if row["epoch"] != trial.num_epochs + 1:
            return (
                f"its checkpoint is at epoch {row['epoch']}, but the decision log at "
                f"{trial.num_epochs}: they are not of one search"
            )
        # NaN compares as false with everything, so it would win or lose at random
        value = row.get(self.config.metric, math.nan)
        if not math.isfinite(value):
            return f"{self.config.metric} was {value} after epoch {row['epoch']}"
        # a model that ignores z may have the best bound at an early rung; Bowman et al. 2016
        # saw such models stay there
        first_rung = self._scheduler.first_rung(trial.number)
        trained = row["epoch"] >= first_rung and row["step"] >= COLLAPSED_STEPS
        if trained and row["KL_divergence"] < COLLAPSED_NATS:
            return (
                f"collapsed: KL {row['KL_divergence']:.1e} nats/image after epoch {row['epoch']}, "
                "no active unit"
            )
        return ""

    def _decide(self) -> None:
        """End the trials that the scheduler stops or that have finished."""
        undecided, self._undecided = self._undecided, set()
        for number in sorted(undecided):
            trial, verdict = self.trials[number], self.verdict(number)
            # an outcome is final: it is in the log, and was told
            if trial.outcome:
                continue
            if trial.num_epochs >= self.config.max_epochs:
                self._end(number, "finished")
            elif verdict.action == "stop":
                self._end(number, "stopped", verdict.why)

    def _end(self, number: int, outcome: Outcome, why: str = "") -> None:
        self._record({"event": "end", "trial": number, "outcome": outcome, "why": why})

    def _record(self, event: TrialEvent) -> None:
        # in this order: if the log cannot be written, nothing has changed and nobody was told
        self._journal.append(event)
        self._apply(event)
        self._on_event(self, event)

    def _apply(self, event: Event) -> None:
        """Change the state as an event says, whether it is new or read from the log."""
        _follow(event, self.config, self.trials)
        match event["event"]:
            case "draw":
                self.under_way.add(event["trial"])
                self._changed({event["trial"]})
            case "result":
                row, trial = event["row"], self.trials[event["trial"]]
                self.totals.epochs += 1
                score = trial.score(self.config.metric)
                heapq.heappush(self._ranking, (score, trial.number))
                value = row[self.config.metric]
                self._changed(self._scheduler.report(trial.number, row["epoch"], value))
            case "end":
                trial = self.trials[event["trial"]]
                self.under_way.discard(trial.number)
                self.totals.count(trial, self.config.max_epochs)
                failed = trial.outcome == "failed"
                self._changed(self._scheduler.fail(trial.number) if failed else {trial.number})

    def _changed(self, numbers: set[int]) -> None:
        """Take note of trials whose verdict may have changed."""
        self._undecided |= numbers
        for number in numbers:
            place = bisect.bisect_left(self._runnable, number)
            listed = self._runnable[place : place + 1] == [number]
            runs = self.verdict(number).action == "continue"
            if runs and not listed:
                self._runnable.insert(place, number)
            elif listed and not runs:
                del self._runnable[place]
