"""The schedulers that benchmarks/scheduler_worth.py compares ours with, and how Ray's differ.

What docs/search.md says of Ray's schedulers is tested on the installed Ray: if a new version
changes one, the page has to change, too.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def scripts():
    """scheduler_worth.py and other_schedulers.py, which lie outside of the package."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import other_schedulers
    import scheduler_worth

    yield SimpleNamespace(worth=scheduler_worth, other=other_schedulers)
    sys.path.remove(folder)


def find(scripts, name, levels, max_epochs=9, seed=0, workers=1):
    """A search in which trial n reports ``levels[n]`` after every epoch."""
    curves = [
        {
            "drawn": {
                "latent_dim": 32, "learning_rate": 1e-3 * 2**n, "batch_size": 128, "beta": 1.0
            },
            "bounds": [level] * max_epochs,
            "kls": [1.0] * max_epochs,
        }
        for n, level in enumerate(levels)
    ]  # fmt: skip
    table = scripts.worth.Table({"epochs": max_epochs, "curves": curves})
    table.configurations = lambda seed: list(table.by_configuration)  # in the order of ``levels``
    rule = scripts.worth.make_rule(table, name, seed, len(levels))
    return scripts.worth.search(rule, len(levels), 10**6, seed, workers).last_epochs


def test_promotion_resumes_a_trial_that_has_turned_out_to_be_among_the_best(scripts):
    levels = [1.0, 2.0, 3.0]
    rule = scripts.other.Promotion(lambda number, epoch: levels[number], 3, max_epochs=9)
    # nobody is promoted before three have arrived: trial 0 waits
    assert list(scripts.other.run(rule, [1.0] * 3)) == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]


def test_promotion_comes_before_new_trials(scripts):
    levels = [5.0, 4.0, 3.0, 2.0, 1.0]
    rule = scripts.other.Promotion(lambda number, epoch: levels[number], 5, max_epochs=9)
    assert list(scripts.other.run(rule, [1.0] * 5)) == [
        *((0, 1), (1, 1)),
        *((2, 1), (2, 2), (2, 3)),
        *((3, 1), (3, 2), (3, 3)),
        *((4, epoch) for epoch in range(1, 10)),  # the third at rung 3, and the best
    ]


def test_of_two_promotions_the_one_from_the_higher_rung_comes_first(scripts):
    rule = scripts.other.Promotion(lambda number, epoch: float(number), 12, max_epochs=9)
    assert [rule.next_trial() for _ in range(12)] == list(range(12))
    for number in range(12):  # twelve workers: four trials may go on
        rule.reported(number, 1)
    assert [rule.next_trial() for _ in range(3)] == [0, 1, 2]
    for number in range(3):
        rule.reported(number, 2)
        assert rule.next_trial() == number
        rule.reported(number, 3)
    assert [rule.next_trial() for _ in range(3)] == [0, 3, None]


def test_workers_train_side_by_side(scripts):
    rule = scripts.other.Promotion(lambda number, epoch: 0.0, 2, max_epochs=9)
    assert list(scripts.other.run(rule, [2.0, 1.0], workers=2)) == [(1, 1), (0, 1)]


def test_ray_s_asha_compares_with_a_percentile_of_the_others(scripts):
    # ours: the best third of the three is one trial. Ray: at least as good as the value one third
    # of the way from the best to the worst of the other two, 1 + (3 - 1) / 3
    assert find(scripts, "ASHA", [1.0, 3.0, 1.6]) == [9, 1, 1]
    assert find(scripts, "Ray's ASHA", [1.0, 3.0, 1.6]) == [9, 1, 3]
    assert find(scripts, "Ray's ASHA", [1.0, 3.0, 1.7]) == [9, 1, 1]
    # the paper's: one of three at the first rung, none at the second
    assert find(scripts, "ASHA with promotion", [1.0, 3.0, 1.6]) == [3, 1, 1]


def test_only_our_asha_stops_the_same_trials_with_any_number_of_workers(scripts):
    levels = [3.0, 1.0, 2.0, 5.0, 0.0, 4.0]

    def same(name: str) -> list[bool]:
        alone = find(scripts, name, levels)
        return [find(scripts, name, levels, seed=n, workers=4) == alone for n in range(10)]

    assert all(same("ASHA"))
    assert not all(same("Ray's ASHA"))


def test_ray_s_hyperband_fills_small_brackets_first_and_rounds_up(scripts):
    levels = [float(n) for n in range(12)]
    # 3 trials without a comparison; 5, of which ceil(5/3) continue; 4 in a bracket for 9, of which
    # ceil(9/3) continue, then one
    assert find(scripts, "Ray's HyperBand", levels) == [9, 9, 9, 9, 9, 3, 3, 3, 9, 3, 3, 1]
    # 9 trials, of which 3 continue, then one; 3 in a bracket for 5, of which one continues
    assert find(scripts, "HyperBand", levels) == [9, 3, 3, 1, 1, 1, 1, 1, 1, 9, 3, 3]


def test_ray_s_hyperband_ends_brackets_early_unless_epochs_are_a_power(scripts):
    levels = [float(n) for n in range(17)]
    ends = find(scripts, "Ray's HyperBand", levels, max_epochs=10)
    assert ends[:3] == [10, 10, 10]  # the bracket without a comparison
    assert max(ends[3:]) == 9
    assert max(find(scripts, "HyperBand", levels, max_epochs=10)[:9]) == 10


def test_ray_s_hyperband_rounds_the_number_of_brackets_to_the_nearest(scripts):
    # log_3(20) = 2.7: sizes are those of four brackets, 4 trials in the smallest instead of 3
    levels = [float(-n) for n in range(10)]
    found = find(scripts, "Ray's HyperBand", levels, max_epochs=20)
    assert found == [20, 20, 20, 20, 6, 6, 6, 6, 18, 18]


def test_ray_s_median_stopping_interleaves_and_averages_from_the_grace_period_on(scripts):
    def value(number: int, epoch: int) -> float:
        return 10.0 if number == 3 else 100.0 if epoch < 3 else 1.0

    def reports(grace_period: int) -> list[tuple[int, int]]:
        scheduler = scripts.other.MedianStoppingRule(
            **scripts.other.COMMON, grace_period=grace_period, min_samples_required=3
        )
        rule = scripts.other.RayRule(scheduler, value, 4, 9)
        return list(scripts.other.run(rule, [1.0] * 4))

    # without three others to compare with, a trial is paused for those that have not started
    assert reports(1)[:4] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    # averages of the others up to epoch 3: 67 over all epochs, 1 from the grace period on
    assert max(epoch for number, epoch in reports(3) if number == 3) == 3
    assert max(epoch for number, epoch in reports(1) if number == 3) > 3


def test_ray_s_median_stopping_counts_the_last_value_of_an_ended_trial_twice(scripts):
    scheduler = scripts.other.RAY["Ray's median stopping"](2)
    rule = scripts.other.RayRule(scheduler, lambda number, epoch: {1: 1.0, 2: 4.0}[epoch], 1, 2)
    assert list(scripts.other.run(rule, [1.0])) == [(0, 1), (0, 2)]
    assert scheduler._running_mean(rule.get_trials()[0], 2) == 3.0  # of 1, 4 and 4
