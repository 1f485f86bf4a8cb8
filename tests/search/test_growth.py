"""What a search spends on a report does not grow with its trials: counted, not timed."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from vae_hyperband.reporting import search_figure
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.console import Console
from vae_hyperband.search.decisions import Board, Journal
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import SearchResult, TrialRecord


def num_calls(function: Callable[[], object]) -> int:
    """How many functions, Python's own among them, are called until it returns."""
    count = 0

    def calls(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(calls)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def hyperparameters(number: int, trials: list[TrialRecord]) -> Hyperparameters:
    return Hyperparameters(latent_dim=16, learning_rate=1e-3 + 1e-6 * number, batch_size=64, beta=1)


def row(number: int, epoch: int) -> dict:
    bound = 240 + 20 * np.random.default_rng(number).random() + 20 / epoch
    return {
        "step": 200 * epoch, "epoch": epoch, "recon_loss": bound - 12, "KL_divergence": 12.0,
        "total_loss": bound, "bound": bound,
    }  # fmt: skip


def search(board: Board) -> int:
    """Report for up to 16 trials at a time, as workers would; the number of reports."""
    random, num_reports = np.random.default_rng(0), 0
    while not board.finished:
        waiting = board.runnable()[:16]
        while len(waiting) < 16 and (trial := board.suggest_next()):
            waiting.append(trial.number)
        trial = board.trials[random.choice(waiting)]
        board.reported(trial.number, row(trial.number, trial.num_epochs + 1))
        num_reports += 1
    return num_reports


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "none"])
def test_a_report_costs_the_same_in_a_small_and_in_a_large_search(tmp_path, scheduler):
    costs = []
    for num_trials in (100, 800):
        config = SearchConfig(num_trials=num_trials, max_epochs=9, scheduler=scheduler)
        with Journal(tmp_path / f"log-{num_trials}") as journal:
            board = Board(config, journal, hyperparameters, Console())
            num_reports = 0

            def whole_search(board=board):
                nonlocal num_reports
                num_reports = search(board)

            costs.append(num_calls(whole_search) / num_reports)
        assert board.best is min(board.trials, key=lambda trial: trial.score("bound"))
    assert costs[1] < 1.3 * costs[0]


def test_a_log_is_read_in_steps_of_its_length(tmp_path):
    costs = []
    for num_trials in (100, 800):
        config = SearchConfig(num_trials=num_trials, max_epochs=9)
        path = tmp_path / f"log-{num_trials}"
        with Journal(path) as journal:
            search(Board(config, journal, hyperparameters))
            num_events = len(journal.events)
        reading = num_calls(lambda: Board(config, Journal(path), hyperparameters))  # noqa: B023
        costs.append(reading / num_events)
    assert costs[1] < 1.3 * costs[0]


def test_the_figure_of_many_trials_has_as_many_parts_as_that_of_a_few(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(search_figure, "save_figure", lambda figure, path: figures.append(figure))
    costs = []
    for num_trials in (50, 400):
        config = SearchConfig(num_trials=num_trials, max_epochs=9)
        with Journal(tmp_path / f"log-{num_trials}") as journal:
            search(board := Board(config, journal, hyperparameters))
        result = SearchResult(config, board.trials, Path())
        drawing = num_calls(lambda: search_figure.best_config(result, Path("figure.png")))  # noqa: B023
        costs.append(drawing / num_trials)
    few, many = (sum(len(axes.collections + axes.lines) for axes in f.axes) for f in figures)
    assert few == many
    assert costs[1] < costs[0]  # a quadratic one would have eight times as much
