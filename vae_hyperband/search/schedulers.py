"""Which trials continue, pause or stop: ASHA, HyperBand and median stopping.

A scheduler is told what each trial reports and keeps a verdict on each. It compares trials in the
order of their numbers, not in the order in which their reports arrive: whatever that order is, the
same reports give the same verdicts. So a search that is killed and told its log again has lost
nothing, and timing (a slow disk, a second worker, a restart) decides nothing. The price is that a
trial may have to pause at a rung for an earlier one; another trial gets its worker meanwhile.

Values are losses: lower is better.
"""

# Ray's own schedulers decide when a report arrives, and keep what has arrived in memory: two runs
# of a search on two workers stop different trials, and a restored one has forgotten its rungs.

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vae_hyperband.search.config import SearchConfig

#: Median stopping needs at least this many earlier trials; the median of one or two is noise.
MIN_EARLIER = 3


@dataclass(frozen=True)
class Verdict:
    """What happens to a trial, the rung at which that was decided, and why."""

    action: Literal["continue", "pause", "stop"]
    rung: int = 0
    why: str = ""


CONTINUE = Verdict("continue")


class Scheduler:
    """Verdicts on the trials of one search. This one lets all of them run to their end.

    A trial reports in the order of its epochs. One that fails counts at the rungs that it reached;
    beyond, it is as if it did not exist. A verdict of "stop" never changes again.
    """

    def __init__(self, num_trials: int) -> None:
        #: On every trial of the search, in the order of their numbers, also those to come.
        self.verdicts = [CONTINUE] * num_trials
        self._failed: set[int] = set()

    def first_rung(self, number: int) -> int:
        """The epoch after which the scheduler first decides on the trial."""
        return 1

    def report(self, number: int, epoch: int, value: float) -> set[int]:
        """A trial reports a value; the trials that it may change the verdicts on."""
        return {number}

    def fail(self, number: int) -> set[int]:
        """A trial will report nothing more; the trials that it may change the verdicts on."""
        self._failed.add(number)
        return {number}


def scheduler_for(config: SearchConfig) -> Scheduler:
    """The scheduler of a search that has not begun."""
    num_trials, max_epochs = config.total_trials, config.max_epochs
    match config.scheduler:
        case "asha":
            return ASHA(num_trials, config.rungs, config.reduction_factor)
        case "hyperband":
            return HyperBand(num_trials, max_epochs, config.reduction_factor)
        case "median":
            return MedianStopping(num_trials, config.grace_period, max_epochs)
        case "none":
            return Scheduler(num_trials)


@dataclass
class Rung:
    """An epoch after which trials are judged, one after the other in the order of numbers."""

    epoch: int
    next: int = 0  # the first trial whose way here is not known to its end; all before it are
    #: What the trials that were here are compared by, in increasing order.
    earlier: list[float] = field(default_factory=list)


class InOrder(Scheduler):
    """At each rung a trial is compared with the earlier trials that got there.

    It pauses there until each of those has arrived, failed or been stopped at a lower rung.
    """

    # A trial is judged at a rung once, when the rung's pointer gets to it. So the work of a whole
    # search is one step per trial and rung, and a report costs the same at any number of trials.

    def __init__(self, num_trials: int, rungs: Sequence[int], hurdle: str) -> None:
        super().__init__(num_trials)
        self._rungs, self._hurdle = [Rung(epoch) for epoch in rungs], hurdle
        self._values = [list[float]() for _ in range(num_trials)]
        # of each trial, at each rung that it has reached: what it is judged by there, and what
        # later trials are compared with
        self._reached = [list[tuple[float, float]]() for _ in range(num_trials)]

    def scores(self, so_far: list[float], value: float) -> tuple[float, float]:
        """The value that a trial is judged by at a rung, and the one that later trials meet.

        ``value`` is the trial's first one at that epoch or later, ``so_far`` those up to the epoch.
        """
        raise NotImplementedError

    def passes(self, value: float, earlier: list[float]) -> bool:
        """Whether a trial with that value continues beyond a rung; ``earlier`` is sorted."""
        raise NotImplementedError

    def first_rung(self, number: int) -> int:
        return self._rungs[0].epoch

    def report(self, number: int, epoch: int, value: float) -> set[int]:
        values, reached = self._values[number], self._reached[number]
        for rung in self._rungs[len(reached) :]:
            if rung.epoch > epoch:
                break
            # a trial that has reported only later epochs is judged by the first of them
            in_time = rung.epoch == epoch or not values
            reached.append(self.scores([*values, value] if in_time else values, value))
            if self.verdicts[number] is CONTINUE:
                self.verdicts[number] = Verdict("pause", rung.epoch)
        values.append(value)
        return {number, *self._advance()}

    def fail(self, number: int) -> set[int]:
        return super().fail(number) | self._advance()

    def _advance(self) -> set[int]:
        """Judge the trials that need not wait any more; those that were."""
        judged = set()
        # whoever is not through the rung below is not through this one either
        limit = len(self.verdicts)
        for index, rung in enumerate(self._rungs):
            while rung.next < limit and self._judge(index, rung.next):
                judged.add(rung.next)
                rung.next += 1
            limit = rung.next
        return judged

    def _judge(self, index: int, number: int) -> bool:
        """Judge a trial at a rung, if it got there; False if it may still come."""
        if self.verdicts[number].action == "stop":  # at a lower rung: it will never get here
            return True
        reached, rung = self._reached[number], self._rungs[index]
        if len(reached) <= index:
            return number in self._failed  # on its way here
        value, remembered = reached[index]
        if not self.passes(value, rung.earlier):
            place = f"{bisect.bisect_left(rung.earlier, value) + 1} of {len(rung.earlier) + 1}"
            why = f"{value:.2f} after epoch {rung.epoch} was number {place}: not {self._hurdle}"
            self.verdicts[number] = Verdict("stop", rung.epoch, why)
        elif len(reached) > index + 1:
            self.verdicts[number] = Verdict("pause", self._rungs[index + 1].epoch)
        else:
            self.verdicts[number] = CONTINUE
        # stopped or not, it has been at this rung, as in the papers
        bisect.insort(rung.earlier, remembered)
        return True


class ASHA(InOrder):
    """Asynchronous successive halving, Li et al. 2020 (arXiv 1810.05934), as a stopping rule.

    A trial passes a rung if it is among the best 1/reduction_factor (algorithm 2, ``top_k``; at
    least one) of itself and the earlier trials that got there. This is what a single worker would
    do, one trial after the other; so the first trial always runs to its end.
    """

    # The paper pauses a trial that is not in top_k, since it may be promoted when later ones turn
    # out worse. Stopping it instead needs no pool of paused trials, and is what Ray's ASHA does.

    def __init__(self, num_trials: int, rungs: Sequence[int], reduction_factor: int) -> None:
        super().__init__(num_trials, rungs, f"the best 1/{reduction_factor}")
        self._reduction_factor = reduction_factor

    def scores(self, so_far: list[float], value: float) -> tuple[float, float]:
        return value, value

    def passes(self, value: float, earlier: list[float]) -> bool:
        num_promoted = max(1, (len(earlier) + 1) // self._reduction_factor)
        # bisect_left counts the strictly better ones: a tie is no reason to stop
        return bisect.bisect_left(earlier, value) < num_promoted


class MedianStopping(InOrder):
    """The median stopping rule of Vizier, Golovin et al. 2017, section 3.2.1.

    After each epoch, a trial is stopped if its best value so far is worse than the median of the
    earlier trials' running averages up to that epoch.
    """

    def __init__(self, num_trials: int, grace_period: int, max_epochs: int) -> None:
        # every epoch is a rung, except the last: nothing is saved by stopping a finished trial
        rungs = range(grace_period, max_epochs)
        super().__init__(num_trials, rungs, "the median of earlier averages")

    def scores(self, so_far: list[float], value: float) -> tuple[float, float]:
        return min(so_far), sum(so_far) / len(so_far)

    def passes(self, value: float, earlier: list[float]) -> bool:
        # of an even number, the mean of the two in the middle
        low, high = (len(earlier) - 1) // 2, len(earlier) // 2
        return len(earlier) < MIN_EARLIER or value <= (earlier[low] + earlier[high]) / 2


@dataclass(frozen=True)
class Bracket:
    """One run of successive halving: its trials, and the epochs after which it decides."""

    members: range  # numbers of trials
    rungs: tuple[int, ...]  # the last one is the end of training


def brackets(num_trials: int, max_epochs: int, reduction_factor: int) -> list[Bracket]:
    """HyperBand's brackets, Li et al. 2018 (arXiv 1603.06560), algorithm 1, filled in order.

    From the most to the least aggressive, then again from the first until no trial is left; the
    last bracket may be smaller than the paper's. Rungs are whole epochs, rounded down.
    """
    # s_max = floor(log_eta(R)) in integers: math.log(243, 3) is 4.999..., one bracket too few
    s_max = 0
    while reduction_factor ** (s_max + 1) <= max_epochs:
        s_max += 1
    result: list[Bracket] = []
    first = 0
    while first < num_trials:
        # s counts the halvings of a bracket: with s_max most trials, each with the fewest epochs
        # at first; with 0 a few that are trained to the end without any comparison
        s = s_max - len(result) % (s_max + 1)
        size = math.ceil((s_max + 1) * reduction_factor**s / (s + 1))
        members = range(first, min(first + size, num_trials))
        rungs = [max_epochs // reduction_factor ** (s - i) for i in range(s + 1)]
        result.append(Bracket(members, tuple(rungs)))
        first = members.stop
    return result


@dataclass
class Halving:
    """How far a bracket is: the rung that decides next, and who of its trials it waits for."""

    bracket: Bracket
    members: list[int]  # those that are left, in the order of their numbers
    missing: set[int]  # of these, those that have not arrived, and may
    index: int = 0


class HyperBand(Scheduler):
    """HyperBand: successive halving in each bracket; trials pause at a rung until all are there.

    Of the trials at a rung the best 1/reduction_factor continue (rounded down, at least one); of
    equal ones, the one with the lower number.
    """

    def __init__(self, num_trials: int, max_epochs: int, reduction_factor: int) -> None:
        super().__init__(num_trials)
        self._reduction_factor = reduction_factor
        self._halvings: list[Halving] = []  # of each trial, that of its bracket
        for bracket in brackets(num_trials, max_epochs, reduction_factor):
            halving = Halving(bracket, list(bracket.members), set(bracket.members))
            self._halvings += [halving] * len(bracket.members)
        # of each trial, its value at each rung of its bracket that it has reached
        self._reached = [list[float]() for _ in range(num_trials)]

    def first_rung(self, number: int) -> int:
        return self._halvings[number].bracket.rungs[0]

    def report(self, number: int, epoch: int, value: float) -> set[int]:
        halving, reached = self._halvings[number], self._reached[number]
        for rung in halving.bracket.rungs[len(reached) : -1]:
            if rung <= epoch:
                reached.append(value)
        if number in halving.missing and len(reached) > halving.index:
            halving.missing.remove(number)
            self.verdicts[number] = Verdict("pause", halving.bracket.rungs[halving.index])
        return {number, *self._halve(halving)}

    def fail(self, number: int) -> set[int]:
        # only a failed trial is not waited for: it will never come
        halving = self._halvings[number]
        halving.missing.discard(number)
        return super().fail(number) | self._halve(halving)

    def _halve(self, halving: Halving) -> set[int]:
        """Decide at each rung that waits for nobody; the trials that it was decided on."""
        judged: set[int] = set()
        rungs = halving.bracket.rungs
        while not halving.missing and halving.index < len(rungs) - 1:
            rung, index = rungs[halving.index], halving.index
            # a share of those that arrived: failed trials are as if never in the bracket
            arrived = sorted(
                (self._reached[n][index], n)
                for n in halving.members
                if len(self._reached[n]) > index
            )
            keep = max(1, len(arrived) // self._reduction_factor)
            for place, (value, n) in enumerate(arrived[keep:], start=keep + 1):
                why = (
                    f"{value:.2f} after epoch {rung} was number {place} of {len(arrived)} in its "
                    f"bracket: not the best 1/{self._reduction_factor}"
                )
                self.verdicts[n] = Verdict("stop", rung, why)
            judged.update(n for _, n in arrived)
            self._promote(halving, sorted(n for _, n in arrived[:keep]))
        return judged

    def _promote(self, halving: Halving, members: list[int]) -> None:
        """Let those trials go on to the bracket's next rung."""
        halving.members, halving.index = members, halving.index + 1
        rungs, index = halving.bracket.rungs, halving.index
        there = {n for n in members if len(self._reached[n]) > index}
        halving.missing = set(members) - there - self._failed
        for n in members:
            self.verdicts[n] = Verdict("pause", rungs[index]) if n in there else CONTINUE
