"""Who goes on, who waits, who is stopped: ASHA, HyperBand and median stopping as functions.

A rule sees what every trial has reported and says what becomes of each. It keeps nothing in
between, so there is nothing to lose when a search is killed: the same reports give the same
verdicts. And it takes trials in the order in which they were drawn, not in which their reports
arrive, so that chance (a slow disk, a second worker, a restart) decides nothing either. The price
is that a trial may have to wait at a rung for an earlier one; it gives up its place meanwhile.

Values are losses: lower is better.
"""

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vae_hyperband.search.config import SearchConfig

#: Median stopping compares with at least this many earlier trials.
MIN_EARLIER = 3


@dataclass
class Curve:
    """What one trial has reported so far: its value after each epoch, and whether it failed.

    A failed trial takes part in the rungs that it has reached; beyond, it is as if it were absent.
    """

    values: dict[int, float] = field(default_factory=dict)  # epoch -> value
    failed: bool = False

    def at(self, rung: int) -> float | None:
        """The value with which the trial arrives at a rung: its first one at that epoch or later.

        None if it is not there yet.
        """
        epoch = min((epoch for epoch in self.values if epoch >= rung), default=None)
        return None if epoch is None else self.values[epoch]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a trial, from which rung on, and why."""

    action: Literal["go on", "wait", "stop"]
    rung: int = 0
    why: str = ""


GO_ON = Verdict("go on")


def verdicts(config: SearchConfig, curves: Sequence[Curve]) -> list[Verdict]:
    """The verdict on each trial, in the order in which they were drawn.

    Trials that have not started have an empty curve. A verdict of "stop" never changes again.
    """
    if config.scheduler == "asha":
        return asha(curves, config.rungs, config.reduction_factor)
    if config.scheduler == "hyperband":
        return hyperband(curves, config.max_epochs, config.reduction_factor)
    if config.scheduler == "median":
        return median_stopping(curves, config.grace_period, config.max_epochs)
    return [GO_ON] * len(curves)


def asha(curves: Sequence[Curve], rungs: Sequence[int], reduction_factor: int) -> list[Verdict]:
    """Asynchronous successive halving, Li et al. 2020 (arXiv 1810.05934), as a stopping rule.

    A trial passes a rung if it is among the best 1/reduction_factor (algorithm 2, ``top_k``; at
    least one) of itself and the trials drawn before it that got there. This is the run that one
    worker would make, one trial after the other; the first trial always goes on.
    """

    def passes(value: float, earlier: list[float]) -> bool:
        num_going_on = max(1, (len(earlier) + 1) // reduction_factor)
        return bisect.bisect_left(earlier, value) < num_going_on  # so many are strictly better

    def score(curve: Curve, rung: int) -> tuple[float, float] | None:
        value = curve.at(rung)
        return None if value is None else (value, value)

    return _in_order(curves, rungs, score, passes, f"the best 1/{reduction_factor}")


def median_stopping(
    curves: Sequence[Curve], grace_period: int, max_epochs: int, min_earlier: int = MIN_EARLIER
) -> list[Verdict]:
    """The median stopping rule of Vizier, Golovin et al. 2017, section 3.2.1.

    After each epoch, a trial is stopped whose best value so far is worse than the median of the
    running averages, up to that epoch, of the trials drawn before it.
    """

    def passes(best: float, averages: list[float]) -> bool:
        return len(averages) < min_earlier or best <= statistics.median(averages)

    def score(curve: Curve, rung: int) -> tuple[float, float] | None:
        if curve.at(rung) is None:
            return None
        so_far = [value for epoch, value in curve.values.items() if epoch <= rung]
        so_far = so_far or [value for value in (curve.at(rung),) if value is not None]
        return min(so_far), sum(so_far) / len(so_far)

    rungs = range(grace_period, max_epochs)
    return _in_order(curves, rungs, score, passes, "the median of earlier averages")


def _in_order(
    curves: Sequence[Curve],
    rungs: Sequence[int],
    score: Callable[[Curve, int], tuple[float, float] | None],
    passes: Callable[[float, list[float]], bool],
    hurdle: str,
) -> list[Verdict]:
    """Take the trials of each rung in order; who comes after one that is still on its way waits.

    ``score`` gives the value that a trial is judged by and the one that it is remembered with.
    """
    result = [GO_ON] * len(curves)
    for rung in rungs:
        earlier: list[float] = []  # what is remembered of this rung, sorted
        complete = True  # whether all that will be remembered of earlier trials is known
        for number, curve in enumerate(curves):
            if result[number].action == "stop":
                continue
            scores = score(curve, rung)
            if result[number].action == "wait" or (scores is None and not curve.failed):
                complete = False
            elif scores is None:
                continue
            elif not complete:
                result[number] = Verdict("wait", rung)
            else:
                judged, remembered = scores
                if not passes(judged, earlier):
                    place = f"{bisect.bisect_left(earlier, judged) + 1} of {len(earlier) + 1}"
                    why = f"{judged:.2f} after epoch {rung} was number {place}: not {hurdle}"
                    result[number] = Verdict("stop", rung, why)
                bisect.insort(earlier, remembered)
    return result


@dataclass(frozen=True)
class Bracket:
    """One run of successive halving: its trials, and the epochs after which it decides."""

    members: range  # numbers of trials
    rungs: tuple[int, ...]  # the last one is the end of training


def brackets(num_trials: int, max_epochs: int, reduction_factor: int) -> list[Bracket]:
    """HyperBand's brackets, Li et al. 2018 (arXiv 1603.06560), algorithm 1, filled in order.

    From the most to the least aggressive, then around again until no trial is left; the last one
    may be smaller than the paper's. Rungs are whole epochs, rounded down.
    """
    s_max = 0
    while reduction_factor ** (s_max + 1) <= max_epochs:
        s_max += 1
    result: list[Bracket] = []
    first = 0
    while first < num_trials:
        s = s_max - len(result) % (s_max + 1)
        size = math.ceil((s_max + 1) * reduction_factor**s / (s + 1))
        members = range(first, min(first + size, num_trials))
        rungs = [max_epochs // reduction_factor ** (s - i) for i in range(s + 1)]
        result.append(Bracket(members, tuple(rungs)))
        first = members.stop
    return result


def hyperband(curves: Sequence[Curve], max_epochs: int, reduction_factor: int) -> list[Verdict]:
    """HyperBand: successive halving in each bracket, and every trial of a rung waits for the rest.

    Of the trials at a rung the best 1/reduction_factor (rounded down, at least one) go on; where
    two are equal, the one drawn first.
    """
    result = [GO_ON] * len(curves)
    for bracket in brackets(len(curves), max_epochs, reduction_factor):
        members = list(bracket.members)
        for rung in bracket.rungs[:-1]:
            arrived = [(value, n) for n in members if (value := curves[n].at(rung)) is not None]
            there = {n for _, n in arrived}
            if any(n not in there and not curves[n].failed for n in members):
                for n in there:
                    result[n] = Verdict("wait", rung)
                break
            arrived.sort()
            keep = max(1, len(arrived) // reduction_factor)
            for place, (value, n) in enumerate(arrived[keep:], start=keep + 1):
                why = (
                    f"{value:.2f} after epoch {rung} was number {place} of {len(arrived)} in its "
                    f"bracket: not the best 1/{reduction_factor}"
                )
                result[n] = Verdict("stop", rung, why)
            members = sorted(n for _, n in arrived[:keep])
    return result
