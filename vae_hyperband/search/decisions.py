"""The decision log of a search: an append-only file of JSON lines, the one thing it knows.

What is in it happened; what is not did not. Each line is on disk before anything follows from it,
and carries a check of its own, so that a line torn by a kill or a power cut is told from a damaged
file: the former can only be the last one, and is taken back.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from vae_hyperband.common.errors import RunFolderError, SearchError
from vae_hyperband.common.files import fsync_folder, no_link
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.schedulers import Curve, Verdict, brackets, verdicts
from vae_hyperband.search.trials import Outcome, Row, TrialRecord

Event = dict[str, Any]


class Journal:
    """The events of the log so far, and a pen at its end. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = read_events(path)
        self._file: io.FileIO | None = None

    def __enter__(self) -> Self:
        try:
            self._file = file = open(self.path, "ab", buffering=0, opener=no_link)
            fsync_folder(self.path.parent)
            whole = sum(len(_line(event)) for event in self.events)
            if file.tell() > whole:  # a torn line
                file.truncate(whole)
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}.") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, event: str, **facts: Any) -> Event:
        """Write one event; it is on disk when this returns. Raises :class:`RunFolderError`."""
        assert self._file is not None
        written: Event = {"event": event, **facts}
        start = self._file.seek(0, os.SEEK_END)
        try:
            line = _line(written)
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise RunFolderError(
                f"{self.path} cannot be written ({error.strerror}): make room, then the same "
                "command goes on."
            ) from error
        self.events.append(written)
        return written


def read_events(path: Path) -> list[Event]:
    """The events of a log, a torn last line left out; none if there is no file.

    Raises :class:`SearchError` for a log that is damaged elsewhere.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    events = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or torn
        event = _event(line)
        if event is None:
            if number == len(lines) - 1 and lines[-1] == b"":
                break  # a power cut may leave the length of a line, but not its content
            raise SearchError(
                f"Line {number} of {path} is damaged, so the search cannot go on from it: start "
                "anew with --fresh, or with another --run."
            )
        events.append(event)
    return events


def _line(event: Event) -> bytes:
    text = json.dumps(event)
    return f'{text[:-1]}, "check": "{_check(text)}"}}\n'.encode()


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        check = event.pop("check")
        return event if check == _check(json.dumps(event)) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# ---- The state of a search: its trials, what they reported, and what the scheduler makes of it.

#: Below this KL, in nats per image, no latent unit is active: one whose mean varies by more than
#: 0.01 over images (Burda et al. 2016, section 2.3) costs at least half of that.
COLLAPSED_NATS = 0.005
#: Before so many steps, a code that says little may be one that has not been trained yet.
COLLAPSED_STEPS = 100

Draw = Callable[[int, list[TrialRecord]], dict[str, Any]]


class Board:
    """What is known of each trial, and the verdict on it.

    ``draw`` gives the hyperparameters of the trial with a number, knowing the trials so far;
    ``watch`` sees every event that is new.
    """

    def __init__(
        self,
        config: SearchConfig,
        journal: Journal,
        draw: Draw,
        watch: Callable[["Board", Event], None] = lambda board, event: None,
    ) -> None:
        self.config, self.trials = config, list[TrialRecord]()
        self._journal, self._draw, self._watch = journal, draw, watch
        self._curves = [Curve() for _ in range(config.total_trials)]
        for event in journal.events:
            self._apply(event)
        self._decide()  # a kill may have come between a report and what follows from it

    @property
    def finished(self) -> bool:
        drawn_all = len(self.trials) == self.config.total_trials
        return drawn_all and all(trial.outcome for trial in self.trials)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial so far."""
        scored = [trial for trial in self.trials if trial.best_row]
        return min(scored, key=lambda t: t.score(self.config.metric), default=None)

    def verdict(self, number: int) -> Verdict:
        if self.trials[number].outcome:
            return Verdict("stop", why=self.trials[number].why)
        return self._verdicts[number]

    def runnable(self) -> list[int]:
        """Numbers of the trials drawn so far that have to be trained on."""
        return [t.number for t in self.trials if self.verdict(t.number).action == "go on"]

    def draw_next(self) -> TrialRecord | None:
        """Draw one more trial; None if there is none left to draw."""
        number = len(self.trials)
        if number == self.config.total_trials:
            return None
        self._happened("draw", trial=number, drawn=self._draw(number, self.trials))
        return self.trials[number]

    def reported(self, number: int, row: Row) -> None:
        """A trial validated. What was reported before, ahead of a kill, changes nothing."""
        trial = self.trials[number]
        if trial.outcome or row["epoch"] <= trial.num_epochs:
            return
        if why := self._trouble(trial, row):
            self.failed(number, why)
            return
        self._happened("result", trial=number, row=row)
        self._decide()

    def failed(self, number: int, why: str) -> None:
        """A trial cannot be used: it ranks last, and the others are judged without it."""
        if not self.trials[number].outcome:
            self._end(number, "failed", why)
            self._decide()

    def died(self, number: int, why: str) -> None:
        """A trial's process died; for the record only."""
        self._happened("died", trial=number, why=why)

    def _trouble(self, trial: TrialRecord, row: Row) -> str:
        """Why a validation disqualifies its trial, or nothing."""
        if row["epoch"] != trial.num_epochs + 1:
            return (
                f"its checkpoint is at epoch {row['epoch']}, but the decision log at "
                f"{trial.num_epochs}: they are not of one search"
            )
        value = row.get(self.config.metric, math.nan)
        if not math.isfinite(value):
            return f"{self.config.metric} was {value} after epoch {row['epoch']}"
        trained = row["epoch"] >= self._first_rung(trial.number) and row["step"] >= COLLAPSED_STEPS
        if trained and row["KL_divergence"] < COLLAPSED_NATS:
            return (
                f"collapsed: KL {row['KL_divergence']:.1e} nats/image after epoch {row['epoch']}, "
                "no active unit"
            )
        return ""

    def _first_rung(self, number: int) -> int:
        if self.config.scheduler != "hyperband":
            return self.config.grace_period
        config = self.config
        found = brackets(config.total_trials, config.max_epochs, config.reduction_factor)
        return next(bracket.rungs[0] for bracket in found if number in bracket.members)

    def _decide(self) -> None:
        self._verdicts = verdicts(self.config, self._curves)
        for trial in self.trials:
            verdict = self._verdicts[trial.number]
            if trial.outcome:
                continue
            if trial.num_epochs >= self.config.max_epochs:
                self._end(trial.number, "finished")
            elif verdict.action == "stop":
                self._end(trial.number, "stopped", verdict.why)

    def _end(self, number: int, outcome: Outcome, why: str = "") -> None:
        self._happened("end", trial=number, outcome=outcome, why=why)

    def _happened(self, event: str, **facts: Any) -> None:
        written = self._journal.append(event, **facts)
        self._apply(written)
        self._watch(self, written)

    def _apply(self, event: Event) -> None:
        match event["event"]:
            case "draw":
                self.trials.append(TrialRecord(event["trial"], event["drawn"]))
            case "result":
                row = event["row"]
                self.trials[event["trial"]].rows.append(row)
                self._curves[event["trial"]].values[row["epoch"]] = row[self.config.metric]
            case "end":
                trial = self.trials[event["trial"]]
                trial.outcome, trial.why = event["outcome"], event["why"]
                self._curves[event["trial"]].failed = trial.outcome == "failed"
