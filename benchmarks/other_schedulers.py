"""Schedulers that benchmarks/scheduler_worth.py compares with this package's.

Ray's own ASHA, HyperBand and median stopping are Ray's objects, driven without a cluster: a
stand-in for Ray's controller gives them what they read of it. :class:`Promotion` is the ASHA
paper's algorithm 2 as printed: trials pause at a rung, and are promoted when they turn out to be
among the best.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

#: The loss of a trial after an epoch, looked up.
Value = Callable[[int, int], float]


class Rule(Protocol):
    """What decides which trial is trained for an epoch next; trials are known by their number."""

    value: Value

    def next_trial(self) -> int | None:
        """A trial that is not being trained now; None if a worker has to wait, or all is done."""

    def reported(self, number: int, epoch: int) -> None:
        """A trial was trained to the end of that epoch."""


def run(rule: Rule, durations: list[float], workers: int = 1) -> Iterator[tuple[int, int]]:
    """Number and epoch of each report, in order of arrival.

    ``durations`` says how long an epoch of each trial lasts.
    """
    epochs = [0] * len(durations)
    now, idle, training = 0.0, workers, list[tuple[float, int]]()  # (end of the epoch, number)
    while True:
        while idle and (number := rule.next_trial()) is not None:
            heapq.heappush(training, (now + durations[number], number))
            idle -= 1
        if not training:
            return
        now, number = heapq.heappop(training)
        idle += 1
        epochs[number] += 1
        rule.reported(number, epochs[number])
        yield number, epochs[number]


class Promotion:
    """Li et al. 2020 (arXiv 1810.05934), algorithm 2, with s = 0 and r = 1."""

    def __init__(self, value: Value, num_trials: int, max_epochs: int, eta: int = 3) -> None:
        self.value, self._num_trials, self._eta = value, num_trials, eta
        powers = itertools.takewhile(lambda r: r < max_epochs, (eta**k for k in itertools.count()))
        self._milestones = [*powers, max_epochs]
        self._rungs: list[list[tuple[float, int]]] = [[] for _ in self._milestones]
        self._promoted: list[set[int]] = [set() for _ in self._milestones]
        self._suggested = 0
        self._jobs: dict[int, int] = {}  # trial -> the rung that it is being trained to
        self._between: list[int] = []  # trials between two rungs, whose worker is free for them

    def next_trial(self) -> int | None:
        if self._between:  # a job trains a trial all the way to its rung
            return self._between.pop()
        job = self._get_job()
        if job is None:
            return None
        number, rung = job
        self._jobs[number] = rung
        return number

    def _get_job(self) -> tuple[int, int] | None:
        """The paper's get_job: a promotion, from the highest rung down, or else a new trial."""
        for k in reversed(range(len(self._rungs) - 1)):
            top = sorted(self._rungs[k])[: len(self._rungs[k]) // self._eta]
            promotable = [number for _, number in top if number not in self._promoted[k]]
            if promotable:
                self._promoted[k].add(promotable[0])
                return promotable[0], k + 1
        if self._suggested == self._num_trials:
            return None
        self._suggested += 1
        return self._suggested - 1, 0

    def reported(self, number: int, epoch: int) -> None:
        rung = self._jobs[number]
        if epoch < self._milestones[rung]:
            self._between.append(number)
        else:
            self._rungs[rung].append((self.value(number, epoch), number))


@dataclass(eq=False)
class RayTrial:
    """What Ray's schedulers read of a trial."""

    number: int
    status: str = Trial.PENDING
    is_saving: bool = False
    last_result: dict[str, Any] | None = None

    @property
    def trial_id(self) -> str:
        return f"{self.number:05}"


class RayRule:
    """One of Ray's schedulers, and the part of Ray's TuneController that it deals with."""

    def __init__(
        self,
        scheduler: TrialScheduler,
        value: Value,
        num_trials: int,
        max_epochs: int,
    ) -> None:
        self._scheduler, self.value, self._max_epochs = scheduler, value, max_epochs
        self._trials = [RayTrial(number) for number in range(num_trials)]
        self._busy: set[int] = set()
        for trial in self._trials:  # Ray adds up to 200 pending trials of a random search at once
            scheduler.on_trial_add(self, trial)

    def next_trial(self) -> int | None:
        # a trial that continues keeps its worker; else the scheduler chooses
        going_on = [
            trial
            for trial in self._trials
            if trial.status == Trial.RUNNING and trial.number not in self._busy
        ]
        trial = going_on[0] if going_on else self._scheduler.choose_trial_to_run(self)
        if trial is None:
            return None
        trial.status = Trial.RUNNING
        self._busy.add(trial.number)
        return trial.number

    def reported(self, number: int, epoch: int) -> None:
        trial = self._trials[number]
        self._busy.remove(number)
        # TuneController._process_trial_result, then _execute_action
        result = {"training_iteration": epoch, "bound": self.value(number, epoch)}
        action = self._scheduler.on_trial_result(self, trial, result)
        trial.last_result = result
        # a trainable that has returned is stopped, whatever its scheduler says; but HyperBand keeps
        # a trial paused at its last rung until its bracket is complete, so it has not returned yet
        if epoch == self._max_epochs and not isinstance(self._scheduler, HyperBandScheduler):
            action = TrialScheduler.STOP
        if action == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
        elif action == TrialScheduler.STOP:
            self.stop_trial(trial)

    # ---- what Ray's schedulers ask of a TuneController

    def get_trials(self) -> list[RayTrial]:
        return self._trials

    def get_live_trials(self) -> list[RayTrial]:
        return [trial for trial in self._trials if trial.status != Trial.TERMINATED]

    def stop_trial(self, trial: RayTrial) -> None:
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self._scheduler.on_trial_remove(self, trial)
        elif trial.status == Trial.RUNNING:
            self._scheduler.on_trial_complete(self, trial, trial.last_result)
        trial.status = Trial.TERMINATED


COMMON: Any = {"time_attr": "training_iteration", "metric": "bound", "mode": "min"}

#: Ray's schedulers with the settings of this package's, by name.
RAY: dict[str, Callable[[int], TrialScheduler]] = {
    "Ray's ASHA": lambda max_epochs: AsyncHyperBandScheduler(
        **COMMON, max_t=max_epochs, grace_period=1, reduction_factor=3
    ),
    "Ray's HyperBand": lambda max_epochs: HyperBandScheduler(
        **COMMON, max_t=max_epochs, reduction_factor=3
    ),
    "Ray's median stopping": lambda max_epochs: MedianStoppingRule(
        **COMMON, grace_period=1, min_samples_required=3
    ),
}
