"""The schedulers against the papers' algorithms, written down as they are printed there."""

import functools
import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from from_scratch import Curve, asha, hyperband, median_stopping

from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.schedulers import (
    ASHA,
    HyperBand,
    MedianStopping,
    Scheduler,
    Verdict,
    brackets,
    scheduler_for,
)

Stream = dict[int, float]  # what a trial would report, by epoch; it fails where that is NaN


def asha_reference(streams: list[Stream], rungs: list[int], eta: int) -> list[int]:
    """Li et al. 2020, as one worker runs it: trial after trial, each until it is not in top_k."""
    reached: dict[int, list[float]] = {rung: [] for rung in rungs}
    last_epochs = []
    for stream in streams:
        todo, last = list(rungs), 0
        for epoch, value in stream.items():
            if math.isnan(value):
                break
            last = epoch
            stop = False
            while todo and todo[0] <= epoch and not stop:
                rung = reached[todo.pop(0)]
                rung.append(value)
                top_k = sorted(rung)[: max(1, len(rung) // eta)]
                stop = value > top_k[-1]
            if stop:
                break
        last_epochs.append(last)
    return last_epochs


def hyperband_reference(streams: list[Stream], max_epochs: int, eta: int) -> list[int]:
    """Li et al. 2018, algorithm 1, on the trials in order, until there are none left."""

    def value_at(trial: int, epochs: int) -> float:
        for epoch, value in streams[trial].items():
            if math.isnan(value):
                return value
            if epoch >= epochs:
                return value
        raise AssertionError

    def last_at(trial: int, epochs: int) -> int:
        last = 0
        for epoch, value in streams[trial].items():
            if math.isnan(value):
                return last
            last = epoch
            if epoch >= epochs:
                return last
        return last

    s_max = int(math.log(max_epochs) / math.log(eta) + 1e-9)
    trials, last_epochs = list(range(len(streams))), [0] * len(streams)
    while trials:
        for s in range(s_max, -1, -1):
            n = math.ceil((s_max + 1) / (s + 1) * eta**s - 1e-9)
            bracket, trials = trials[:n], trials[n:]
            for i in range(s + 1):
                r_i = int(max_epochs * eta ** (i - s) + 1e-9)
                for trial in bracket:
                    last_epochs[trial] = last_at(trial, r_i)
                alive = [t for t in bracket if not math.isnan(value_at(t, r_i))]
                alive.sort(key=lambda t: (value_at(t, r_i), t))
                bracket = sorted(alive[: max(1, len(alive) // eta)])
    return last_epochs


def median_reference(streams: list[Stream], grace: int, max_epochs: int) -> list[int]:
    """Golovin et al. 2017: best so far against the median of earlier trials' running averages."""
    averages: list[dict[int, float]] = []
    last_epochs = []
    for stream in streams:
        values, mine, last = [], {}, 0
        for epoch, value in stream.items():
            if math.isnan(value):
                break
            values.append(value)
            mine[epoch], last = statistics.fmean(values), epoch
            others = [average[epoch] for average in averages if epoch in average]
            decides = grace <= epoch < max_epochs and len(others) >= 3
            if decides and min(values) > statistics.median(others):
                break
        averages.append(mine)
        last_epochs.append(last)
    return last_epochs


def random_streams(random: np.random.Generator, max_epochs: int, gaps: bool) -> list[Stream]:
    """Falling curves with noise; many ties, some failures, with ``gaps`` some reports missing."""
    streams = []
    for _ in range(random.integers(1, 15)):
        level, failing = random.integers(0, 6), random.random() < 0.15
        fails_at = random.integers(1, max_epochs + 1) if failing else 0
        stream: Stream = {}
        for epoch in range(1, max_epochs + 1):
            if epoch == fails_at:
                stream[epoch] = math.nan
            elif not gaps or epoch == max_epochs or random.random() < 0.7:
                stream[epoch] = float(level + random.integers(0, 4) + 6 // epoch)
        streams.append(stream)
    return streams


def run_in_any_order(
    random: np.random.Generator,
    streams: list[Stream],
    scheduler: Scheduler,
    from_scratch: Callable[[list[Curve]], list[Verdict]],
) -> list[int]:
    """Let trials report in random order where the scheduler lets them; last epoch of each.

    After every report its verdicts must be those from scratch, and it must have named each that
    changed.
    """
    curves = [Curve() for _ in streams]
    left = [list(stream.items()) for stream in streams]
    while True:
        # a trial that ended at its last epoch has nothing left
        runnable = [
            n
            for n, verdict in enumerate(scheduler.verdicts)
            if verdict.action == "continue" and left[n] and not curves[n].failed
        ]
        if not runnable:
            break
        n = random.choice(runnable)
        epoch, value = left[n].pop(0)
        before = list(scheduler.verdicts)
        if math.isnan(value):
            curves[n].failed = True
            changed = scheduler.fail(n)
        else:
            curves[n].values[epoch] = value
            changed = scheduler.report(n, epoch, value)
        assert scheduler.verdicts == from_scratch(curves)
        assert changed >= {n for n, was in enumerate(before) if was != scheduler.verdicts[n]} | {n}
    for verdict, curve, rest in zip(scheduler.verdicts, curves, left, strict=True):
        assert verdict.action != "pause"  # no trial waits for ever
        assert verdict.action == "stop" or not rest or curve.failed
    return [max(curve.values, default=0) for curve in curves]


@pytest.mark.parametrize("gaps", [False, True], ids=["every epoch", "missing reports"])
def test_asha_in_any_order_decides_as_the_paper_does_in_order(gaps):
    random = np.random.default_rng(0)
    for _ in range(1000):
        eta, grace, max_epochs = (int(random.integers(*r)) for r in ((2, 5), (1, 3), (4, 28)))
        rungs = SearchConfig(
            max_epochs=max_epochs, grace_period=grace, reduction_factor=eta
        ).rungs  # fmt: skip
        streams = random_streams(random, max_epochs, gaps)
        found = run_in_any_order(
            random,
            streams,
            ASHA(len(streams), rungs, eta),
            functools.partial(asha, rungs=rungs, reduction_factor=eta),
        )
        assert found == asha_reference(streams, rungs, eta)


@pytest.mark.parametrize("gaps", [False, True], ids=["every epoch", "missing reports"])
def test_hyperband_in_any_order_decides_as_the_paper_does(gaps):
    random = np.random.default_rng(1)
    for _ in range(1000):
        eta, max_epochs = int(random.integers(2, 5)), int(random.integers(4, 28))
        streams = random_streams(random, max_epochs, gaps)
        found = run_in_any_order(
            random,
            streams,
            HyperBand(len(streams), max_epochs, eta),
            functools.partial(hyperband, max_epochs=max_epochs, reduction_factor=eta),
        )
        assert found == hyperband_reference(streams, max_epochs, eta)


@pytest.mark.parametrize("gaps", [False, True], ids=["every epoch", "missing reports"])
def test_median_stopping_in_any_order_decides_as_the_paper_does_in_order(gaps):
    random = np.random.default_rng(2)
    for _ in range(1000):
        grace, max_epochs = int(random.integers(1, 4)), int(random.integers(4, 12))
        streams = random_streams(random, max_epochs, gaps)
        found = run_in_any_order(
            random,
            streams,
            MedianStopping(len(streams), grace, max_epochs),
            functools.partial(median_stopping, grace_period=grace, max_epochs=max_epochs),
        )
        # the paper does not say what a missing report means
        assert gaps or found == median_reference(streams, grace, max_epochs)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_reports_against_the_verdicts_change_nothing_for_the_others(name):
    """As after a kill: a trial reports although it is paused, or fails while it waits."""
    random, config = np.random.default_rng(4), SearchConfig(num_trials=13, scheduler=name)
    from_scratch = {
        "asha": functools.partial(asha, rungs=config.rungs, reduction_factor=3),
        "hyperband": functools.partial(hyperband, max_epochs=9, reduction_factor=3),
        "median": functools.partial(median_stopping, grace_period=1, max_epochs=9),
    }[name]
    for _ in range(200):
        scheduler, curves = scheduler_for(config), [Curve() for _ in range(13)]
        while active := [
            n for n in range(13) if not curves[n].failed and len(curves[n].values) < 9
        ]:
            n, value = int(random.choice(active)), float(random.integers(0, 9))
            if random.random() < 0.02:
                curves[n].failed = True
                scheduler.fail(n)
            else:
                curves[n].values[len(curves[n].values) + 1] = value
                scheduler.report(n, len(curves[n].values), value)
            assert scheduler.verdicts == from_scratch(curves)


def test_the_brackets_are_those_of_the_hyperband_paper():
    found = brackets(num_trials=206, max_epochs=81, reduction_factor=3)
    table = [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]  # Li et al. 2018, table 1: n_0, r_0
    assert [(len(b.members), b.rungs[0]) for b in found[:5]] == table
    assert all(b.rungs[-1] == 81 for b in found)
    # and around again with those that are left
    assert sum(n for n, _ in table) == 143
    assert [len(b.members) for b in found[5:]] == [63]
    assert found[5].rungs == (1, 3, 9, 27, 81)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "none"])
def test_a_verdict_to_stop_is_final(scheduler):
    random = np.random.default_rng(3)
    config = SearchConfig(num_trials=12, max_epochs=9, scheduler=scheduler)
    for _ in range(50):
        board, stopped, num_epochs = scheduler_for(config), set(), [0] * 12
        while True:
            found = board.verdicts
            now = {n for n, verdict in enumerate(found) if verdict.action == "stop"}
            assert stopped <= now
            stopped = now
            active = [
                n
                for n, verdict in enumerate(found)
                if verdict.action == "continue" and num_epochs[n] < 9
            ]
            if not active:
                break
            n = random.choice(active)
            num_epochs[n] += 1
            board.report(n, num_epochs[n], float(random.integers(0, 9)))
        assert (scheduler == "none") == (not stopped)
