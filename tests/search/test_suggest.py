"""Which configurations are tried: a function of the space, the seed and what has ended."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import (
    MIN_FOR_IMPORTANCE,
    grid,
    importance,
    num_random,
    random_search,
    suggest,
)
from vae_hyperband.search.trials import TrialRecord

TPE = SearchConfig(num_trials=30, algorithm="tpe")


def bound(tried: Hyperparameters) -> float:
    """A valley along the learning rate; the rest matters little."""
    return 240 + 10 * abs(math.log(tried["learning_rate"] / 2e-3)) + tried["latent_dim"] / 1000


def searched(config: SearchConfig, num_trials: int) -> list[TrialRecord]:
    """Trials as a search would have run them, every other one stopped after 2 epochs."""
    trials: list[TrialRecord] = []
    for number in range(num_trials):
        tried = suggest(config, number, trials)
        epochs = 2 if number % 2 else config.max_epochs
        rows = [
            {"epoch": epoch, "bound": value, "total_loss": value}
            for epoch in range(1, epochs + 1)
            for value in [bound(tried) + 9 - epoch]
        ]
        trials.append(TrialRecord(number, tried, rows, "stopped" if number % 2 else "finished"))
    return trials


def test_random_search_is_a_function_of_the_seed():
    config = SearchConfig(num_trials=40)
    found = random_search(config)
    assert found == random_search(dataclasses.replace(config, max_epochs=3))
    assert found[1:] != random_search(dataclasses.replace(config, seed=1))[1:]
    assert found[:10] == random_search(dataclasses.replace(config, num_trials=10))
    assert {each["latent_dim"] for each in found} == {16, 32, 64}
    assert {each["batch_size"] for each in found} == {64, 128, 256}
    assert all(5e-4 <= each["learning_rate"] <= 1e-2 for each in found)
    default = TrainConfig().to_dict()
    assert found[0].to_dict().items() <= default.items()
    for each in found:
        config.trial_config(each)


def test_a_grid_has_every_combination_once_in_an_order_of_the_seed():
    config = SearchConfig(algorithm="grid", grid_points=3, betas=(0.5, 1.0))
    cells = grid(config)
    assert len(cells) == config.total_trials == 3 * 3 * 3 * 2
    rates = sorted({cell["learning_rate"] for cell in cells})
    assert rates == pytest.approx([5e-4, math.sqrt(5e-4 * 1e-2), 1e-2])
    found = {tuple(cell.values()) for cell in cells}
    assert found == set(itertools.product((16, 32, 64), rates, (64, 128, 256), (0.5, 1.0)))
    assert cells == grid(dataclasses.replace(config, max_epochs=3))
    assert cells != grid(dataclasses.replace(config, seed=1))
    assert cells != sorted(cells, key=lambda cell: tuple(cell.values()))


def test_tpe_is_a_function_of_the_seed_the_number_and_what_has_ended():
    trials = searched(TPE, 16)
    assert searched(TPE, 16) == trials
    again = suggest(TPE, 16, trials)
    assert again == suggest(TPE, 16, trials)  # as after a restart
    assert again != suggest(TPE, 17, trials)
    assert again != suggest(dataclasses.replace(TPE, seed=1), 16, trials)
    still_running = dataclasses.replace(trials[3], outcome=None)
    assert suggest(TPE, 16, [*trials, still_running]) == again
    TPE.trial_config(again)


def test_tpe_learns_where_the_valley_is():
    """Closer to it than chance: the median over all that it suggested after the random ones."""

    def distance(tried: Hyperparameters) -> float:
        return abs(math.log(tried["learning_rate"] / 2e-3))

    found, chance = [], []
    for seed in range(5):
        config = dataclasses.replace(TPE, seed=seed)
        trials = searched(config, 30)
        found += [distance(trial.hyperparameters) for trial in trials[num_random(config) :]]
        chance += [distance(tried) for tried in random_search(config)[num_random(config) :]]
    assert sorted(found)[len(found) // 2] < 0.6 * sorted(chance)[len(chance) // 2]


def test_importance_names_what_mattered():
    config = SearchConfig(num_trials=40, betas=(1.0, 2.0))
    trials = searched(config, 40)
    found = importance(config, trials)
    assert found is not None
    assert set(found) == {"latent_dim", "learning_rate", "batch_size", "beta"}
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.__getitem__) == "learning_rate"
    assert importance(config, trials[: MIN_FOR_IMPORTANCE - 1]) is None
    # how far a trial got does not count: only values that all of them reached are compared
    shifted = [
        dataclasses.replace(trial, rows=trial.rows[:2], outcome="stopped") for trial in trials
    ]
    assert importance(config, shifted) == found


GOLDEN = json.loads((Path(__file__).parents[1] / "golden/suggestions.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["search"]))
def test_suggestions_are_those_of_version_0_1(golden):
    """0.1 took them from Ray's search domains and its adapter of Optuna."""
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in golden["search"].items()}
    config = SearchConfig(**changes)
    trials: list[TrialRecord] = []
    for number, expected in enumerate(golden["suggested"]):
        found = suggest(config, number, trials)
        assert found.to_dict() == pytest.approx(expected, rel=1e-9)
        value = 250 + 10 * abs(found["learning_rate"] - 4e-3) / 4e-3
        value += found["latent_dim"] / 16 + found["beta"]
        stopped = number % 3 == 2
        rows = [
            {
                "epoch": epoch,
                "step": epoch,
                "bound": value + 5 / epoch,
                "total_loss": value + 5 / epoch,
            }
            for epoch in range(1, 2 if stopped else 10)
        ]
        outcome = "stopped" if stopped else "failed" if number == 4 else "finished"
        trials.append(TrialRecord(number, found, rows, outcome))
