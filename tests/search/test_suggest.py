"""Which configurations are tried: a function of the space, the seed and what has ended."""

import dataclasses
import itertools
import math

import pytest

from vae_hyperband.config import TrainConfig
from vae_hyperband.draws import (
    MIN_FOR_IMPORTANCE,
    draw,
    draw_grid,
    draw_trials,
    importance,
    num_random,
)
from vae_hyperband.search_config import SearchConfig
from vae_hyperband.trials import TrialRecord

TPE = SearchConfig(num_trials=30, algorithm="tpe")


def bound(drawn: dict) -> float:
    """A valley along the learning rate; the rest matters little."""
    return 240 + 10 * abs(math.log(drawn["learning_rate"] / 2e-3)) + drawn["latent_dim"] / 1000


def searched(config: SearchConfig, num_trials: int) -> list[TrialRecord]:
    """Trials as a search would have drawn and run them, every other one stopped after 2 epochs."""
    trials: list[TrialRecord] = []
    for number in range(num_trials):
        drawn = draw(config, number, trials)
        epochs = 2 if number % 2 else config.max_epochs
        rows = [
            {"epoch": epoch, "bound": value, "total_loss": value}
            for epoch in range(1, epochs + 1)
            for value in [bound(drawn) + 9 - epoch]
        ]
        trials.append(TrialRecord(number, drawn, rows, "stopped" if number % 2 else "finished"))
    return trials


def test_random_draws_are_a_function_of_the_seed():
    config = SearchConfig(num_trials=40)
    drawn = draw_trials(config)
    assert drawn == draw_trials(dataclasses.replace(config, max_epochs=3))
    assert drawn[1:] != draw_trials(dataclasses.replace(config, seed=1))[1:]
    assert drawn[:10] == draw_trials(dataclasses.replace(config, num_trials=10))
    assert {trial["latent_dim"] for trial in drawn} == {16, 32, 64}
    assert {trial["batch_size"] for trial in drawn} == {64, 128, 256}
    assert all(5e-4 <= trial["learning_rate"] <= 1e-2 for trial in drawn)
    default = TrainConfig()
    assert drawn[0] == {name: getattr(default, name) for name in drawn[0]}
    for trial in drawn:
        config.trial_config(trial)


def test_a_grid_has_every_combination_once_in_an_order_of_the_seed():
    config = SearchConfig(algorithm="grid", grid_points=3, betas=(0.5, 1.0))
    cells = draw_grid(config)
    assert len(cells) == config.total_trials == 3 * 3 * 3 * 2
    rates = sorted({cell["learning_rate"] for cell in cells})
    assert rates == pytest.approx([5e-4, math.sqrt(5e-4 * 1e-2), 1e-2])
    found = {tuple(cell.values()) for cell in cells}
    assert found == set(itertools.product((16, 32, 64), rates, (64, 128, 256), (0.5, 1.0)))
    assert cells == draw_grid(dataclasses.replace(config, max_epochs=3))
    assert cells != draw_grid(dataclasses.replace(config, seed=1))
    assert cells != sorted(cells, key=lambda cell: tuple(cell.values()))


def test_tpe_is_a_function_of_the_seed_the_number_and_what_has_ended():
    trials = searched(TPE, 16)
    assert searched(TPE, 16) == trials
    again = draw(TPE, 16, trials)
    assert again == draw(TPE, 16, trials)  # as after a restart
    assert again != draw(TPE, 17, trials)
    assert again != draw(dataclasses.replace(TPE, seed=1), 16, trials)
    still_running = dataclasses.replace(trials[3], outcome=None)
    assert draw(TPE, 16, [*trials, still_running]) == again
    TPE.trial_config(again)


def test_tpe_learns_where_the_valley_is():
    """Closer to it than chance: the median over all that it drew after its random beginning."""

    def distance(drawn: dict) -> float:
        return abs(math.log(drawn["learning_rate"] / 2e-3))

    found, chance = [], []
    for seed in range(5):
        config = dataclasses.replace(TPE, seed=seed)
        trials = searched(config, 30)
        found += [distance(trial.drawn) for trial in trials[num_random(config) :]]
        chance += [distance(drawn) for drawn in draw_trials(config)[num_random(config) :]]
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
