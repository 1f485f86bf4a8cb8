"""The schedulers' verdicts from scratch: every trial is judged anew, from all that was reported.

The slow way to what vae_hyperband.search.schedulers keeps up to date; tests compare the two.
"""

import bisect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vae_hyperband.search.schedulers import CONTINUE, MIN_EARLIER, Verdict, brackets


@dataclass
class Curve:
    """What one trial has reported so far: its value after each epoch, and whether it failed.

    A failed trial counts at the rungs that it reached; beyond, it is as if it did not exist.
    """

    values: dict[int, float] = field(default_factory=dict)  # epoch -> value
    failed: bool = False

    def at(self, rung: int) -> float | None:
        """The value with which the trial arrives at a rung: its first one at that epoch or later.

        None if it is not there yet.
        """
        epoch = min((epoch for epoch in self.values if epoch >= rung), default=None)
        return None if epoch is None else self.values[epoch]


def asha(curves: Sequence[Curve], rungs: Sequence[int], reduction_factor: int) -> list[Verdict]:
    """Asynchronous successive halving, Li et al. 2020 (arXiv 1810.05934), as a stopping rule.

    A trial passes a rung if it is among the best 1/reduction_factor (algorithm 2, ``top_k``; at
    least one) of itself and the earlier trials that got there. This is what a single worker would
    do, one trial after the other; so the first trial always runs to its end.
    """
    # The paper pauses a trial that is not in top_k, since it may be promoted when later ones turn
    # out worse. Stopping it instead needs no pool of paused trials, and is what Ray's ASHA does.

    def passes(value: float, earlier: list[float]) -> bool:
        num_promoted = max(1, (len(earlier) + 1) // reduction_factor)
        # bisect_left counts the strictly better ones: a tie is no reason to stop
        return bisect.bisect_left(earlier, value) < num_promoted

    def score(curve: Curve, rung: int) -> tuple[float, float] | None:
        value = curve.at(rung)
        return None if value is None else (value, value)

    return _in_order(curves, rungs, score, passes, f"the best 1/{reduction_factor}")


def median_stopping(
    curves: Sequence[Curve], grace_period: int, max_epochs: int, min_earlier: int = MIN_EARLIER
) -> list[Verdict]:
    """The median stopping rule of Vizier, Golovin et al. 2017, section 3.2.1.

    After each epoch, a trial is stopped if its best value so far is worse than the median of the
    earlier trials' running averages up to that epoch.
    """

    def passes(best: float, averages: list[float]) -> bool:
        return len(averages) < min_earlier or best <= statistics.median(averages)

    def score(curve: Curve, rung: int) -> tuple[float, float] | None:
        if curve.at(rung) is None:
            return None
        so_far = [value for epoch, value in curve.values.items() if epoch <= rung]
        # a trial that has reported only later epochs is judged by the first of them
        so_far = so_far or [value for value in (curve.at(rung),) if value is not None]
        return min(so_far), sum(so_far) / len(so_far)

    # every epoch is a rung, except the last: nothing is saved by stopping a finished trial
    rungs = range(grace_period, max_epochs)
    return _in_order(curves, rungs, score, passes, "the median of earlier averages")


def _in_order(
    curves: Sequence[Curve],
    rungs: Sequence[int],
    score: Callable[[Curve, int], tuple[float, float] | None],
    passes: Callable[[float, list[float]], bool],
    hurdle: str,
) -> list[Verdict]:
    """Judge the trials of each rung in order; a trial waits until all earlier ones have arrived.

    ``score`` gives the value that a trial is judged by and the one that later trials are compared
    with; ``passes`` compares the former with a sorted list of the latter.
    """
    result = [CONTINUE] * len(curves)
    for rung in rungs:
        earlier: list[float] = []  # values of this rung that later trials are compared with, sorted
        complete = True  # whether all earlier trials that will reach this rung have reached it
        for number, curve in enumerate(curves):
            # stopped at a lower rung: it will never get here, so nobody waits for it
            if result[number].action == "stop":
                continue
            scores = score(curve, rung)
            # one that is paused below may still come, and so may one that is being trained
            if result[number].action == "pause" or (scores is None and not curve.failed):
                complete = False
            elif scores is None:  # failed on its way here
                continue
            elif not complete:
                result[number] = Verdict("pause", rung)
            else:
                value, remembered = scores
                if not passes(value, earlier):
                    place = f"{bisect.bisect_left(earlier, value) + 1} of {len(earlier) + 1}"
                    why = f"{value:.2f} after epoch {rung} was number {place}: not {hurdle}"
                    result[number] = Verdict("stop", rung, why)
                # stopped or not, it has been at this rung, as in the papers
                bisect.insort(earlier, remembered)
    return result


def hyperband(curves: Sequence[Curve], max_epochs: int, reduction_factor: int) -> list[Verdict]:
    """HyperBand: successive halving in each bracket; trials pause at a rung until all are there.

    Of the trials at a rung the best 1/reduction_factor continue (rounded down, at least one); of
    equal ones, the one with the lower number.
    """
    result = [CONTINUE] * len(curves)
    for bracket in brackets(len(curves), max_epochs, reduction_factor):
        members = list(bracket.members)
        for rung in bracket.rungs[:-1]:
            arrived = [(value, n) for n in members if (value := curves[n].at(rung)) is not None]
            there = {n for _, n in arrived}
            # only a failed trial is not waited for: it will never come
            if any(n not in there and not curves[n].failed for n in members):
                for n in there:
                    result[n] = Verdict("pause", rung)
                break  # higher rungs have nobody yet
            arrived.sort()
            # a share of those that arrived: failed trials are as if never in the bracket
            keep = max(1, len(arrived) // reduction_factor)
            for place, (value, n) in enumerate(arrived[keep:], start=keep + 1):
                why = (
                    f"{value:.2f} after epoch {rung} was number {place} of {len(arrived)} in its "
                    f"bracket: not the best 1/{reduction_factor}"
                )
                result[n] = Verdict("stop", rung, why)
            members = sorted(n for _, n in arrived[:keep])
    return result
