"""The decision log of a search, and the state that follows from it.

:class:`Journal` is an append-only file of JSON lines, and all that a search remembers: each line is
on disk before anything follows from it. :class:`Board` replays it; so a search that was killed
anywhere continues as if it had not been.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, TypedDict

from vae_hyperband.common.errors import RunFolderError, SearchError
from vae_hyperband.common.files import fsync_folder, no_link
from vae_hyperband.search.config import Hyperparameters, SearchConfig
from vae_hyperband.search.schedulers import Curve, Verdict, brackets, verdicts
from vae_hyperband.search.trials import Outcome, TrialRecord, ValidationRow

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
    drawn: dict[str, float]


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
        self.events = read_events(path)
        self._file: io.FileIO | None = None

    def __enter__(self) -> Self:
        try:
            # unbuffered: what append has written is the kernel's when it returns, and no line
            # lingers in this process to be written twice, or half
            self._file = file = open(self.path, "ab", buffering=0, opener=no_link)
            fsync_folder(self.path.parent)  # else a power cut may lose the name of a new file
            whole = sum(len(_line(event)) for event in self.events)
            if file.tell() > whole:  # a torn last line: what it said has had no consequences
                file.truncate(whole)
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
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    events = []
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
    return events


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


# ---- The state of a search: its trials, what they reported, and what the scheduler decided.

#: Below this KL, in nats per image, no latent unit is active: one whose mean varies by more than
#: 0.01 over images (Burda et al. 2016, section 2.3) costs at least half of that.
COLLAPSED_NATS = 0.005
#: Optimiser steps before a KL is judged: a low KL this early may only mean an untrained encoder.
COLLAPSED_STEPS = 100

#: Gives the hyperparameters of the trial with a number, knowing the trials so far.
Suggest = Callable[[int, list[TrialRecord]], Hyperparameters]


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
        # one per trial that there will be, also of those to come: HyperBand's brackets depend on
        # how many trials there are, and a trial at a rung has to wait for its bracket's later ones
        self._curves = [Curve() for _ in range(config.total_trials)]
        for event in journal.events:
            self._apply(event)
        self._decide()  # a kill may have come between a result and the decisions it leads to

    @property
    def finished(self) -> bool:
        """Whether all trials were suggested and have ended."""
        suggested_all = len(self.trials) == self.config.total_trials
        return suggested_all and all(trial.outcome for trial in self.trials)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial so far."""
        scored = [trial for trial in self.trials if trial.best_row]
        return min(scored, key=lambda t: t.score(self.config.metric), default=None)

    def verdict(self, number: int) -> Verdict:
        """Whether the trial with that number continues, pauses or stops."""
        if self.trials[number].outcome:
            return Verdict("stop", why=self.trials[number].why)
        return self._verdicts[number]

    def runnable(self) -> list[int]:
        """Numbers of the trials, among those suggested so far, that are to be trained further."""
        return [t.number for t in self.trials if self.verdict(t.number).action == "continue"]

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
        trained = row["epoch"] >= self._first_rung(trial.number) and row["step"] >= COLLAPSED_STEPS
        if trained and row["KL_divergence"] < COLLAPSED_NATS:
            return (
                f"collapsed: KL {row['KL_divergence']:.1e} nats/image after epoch {row['epoch']}, "
                "no active unit"
            )
        return ""

    def _first_rung(self, number: int) -> int:
        """The epoch after which the scheduler first decides on the trial."""
        config = self.config
        if config.scheduler != "hyperband":
            return config.grace_period
        found = brackets(config.total_trials, config.max_epochs, config.reduction_factor)
        return next(bracket.rungs[0] for bracket in found if number in bracket.members)

    def _decide(self) -> None:
        """Ask the scheduler, and end the trials that it stops or that have finished."""
        self._verdicts = verdicts(self.config, self._curves)
        for trial in self.trials:
            # an outcome is final: it is in the log, and was told
            verdict = self._verdicts[trial.number]
            if trial.outcome:
                continue
            if trial.num_epochs >= self.config.max_epochs:
                self._end(trial.number, "finished")
            elif verdict.action == "stop":
                self._end(trial.number, "stopped", verdict.why)

    def _end(self, number: int, outcome: Outcome, why: str = "") -> None:
        self._record({"event": "end", "trial": number, "outcome": outcome, "why": why})

    def _record(self, event: TrialEvent) -> None:
        # in this order: if the log cannot be written, nothing has changed and nobody was told
        self._journal.append(event)
        self._apply(event)
        self._on_event(self, event)

    def _apply(self, event: Event) -> None:
        """Change the state as an event says, whether it is new or read from the log."""
        match event["event"]:
            case "draw":
                hyperparameters = Hyperparameters.from_dict(event["drawn"])
                self.trials.append(TrialRecord(event["trial"], hyperparameters))
            case "result":
                row = event["row"]
                self.trials[event["trial"]].rows.append(row)
                self._curves[event["trial"]].values[row["epoch"]] = row[self.config.metric]
            case "end":
                trial = self.trials[event["trial"]]
                trial.outcome, trial.why = event["outcome"], event["why"]
                self._curves[event["trial"]].failed = trial.outcome == "failed"
