"""Who runs when: what Ray is told of trials that are ahead of others."""

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.decisions import Board, Journal
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.tune import tuner
from vae_hyperband.tune.tuner import BoardScheduler, BoardSearcher

TRIED = Hyperparameters(latent_dim=2, learning_rate=1e-3, batch_size=8, beta=1.0)


class Search:
    """A board, and Ray's trials for the numbers that it was asked for, without a Ray."""

    def __init__(self, journal, **settings):
        config = SearchConfig(num_trials=9, max_epochs=9, **settings)
        self.board = Board(config, journal, lambda number, trials: TRIED)
        options = SearchOptions()
        self.searcher = BoardSearcher(self.board, options, lambda: False)
        self.scheduler = BoardScheduler(self.board, self.searcher, options)
        self.trials = []

    def suggest(self):
        given = self.searcher.suggest(f"id {len(self.trials)}")
        if given is None:
            return None
        trial = Trial("train", config=given, stub=True)
        trial.set_status(Trial.PENDING)
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)
        return trial

    def report(self, number, epoch, bound):
        names = ("recon_loss", "KL_divergence", "total_loss", "bound")
        row = dict.fromkeys(names, bound) | {"epoch": epoch, "step": 1000 * epoch}
        return self.scheduler.on_trial_result(self, self.trials[number], row)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Makes a search with that many workers."""
    with Journal(tmp_path / "decisions.jsonl") as journal:

        def make(num_workers=2, **settings):
            monkeypatch.setattr(tuner, "num_concurrent", lambda *_: num_workers)
            monkeypatch.setattr(tuner, "nodes", lambda: [])
            return Search(journal, **settings)

        yield make


def run(trial):
    trial.set_status(Trial.RUNNING)


def test_a_trial_two_epochs_ahead_is_paused_for_one_that_waits(search):
    asha = search()
    run(asha.suggest()), run(asha.suggest())
    assert asha.suggest() is None  # both workers are taken by trials at their beginning
    assert asha.report(0, 1, 250.0) == TrialScheduler.CONTINUE
    assert asha.report(0, 2, 245.0) == TrialScheduler.CONTINUE  # nobody is waiting
    third = asha.suggest()
    assert third.config["number"] == 2
    assert asha.report(0, 3, 244.0) == TrialScheduler.PAUSE
    asha.trials[0].set_status(Trial.PAUSED)
    assert asha.scheduler.choose_trial_to_run(asha) is third
    run(third)
    assert asha.scheduler.choose_trial_to_run(asha) is asha.trials[0]  # still to be trained on
    assert asha.report(1, 1, 249.0) == TrialScheduler.CONTINUE  # behind trial 0, not ahead of it


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_workers": 1}, id="one worker"),
        pytest.param({"algorithm": "tpe"}, id="tpe"),
        pytest.param({"scheduler": "none"}, id="none"),
        pytest.param({"scheduler": "median"}, id="median"),
    ],
)
def test_others_run_on(search, settings):
    depth_first = search(**settings)
    run(depth_first.suggest())
    if settings.get("num_workers") != 1:
        run(depth_first.suggest())
    for epoch in range(1, 5):
        assert depth_first.report(0, epoch, 250.0 - epoch) == TrialScheduler.CONTINUE
        assert depth_first.suggest() is None


def test_a_free_worker_goes_to_the_trial_furthest_behind_then_to_the_lowest_number(search):
    asha = search(num_workers=3)
    trials = [asha.suggest() for _ in range(3)]
    asha.report(0, 1, 250.0)
    assert asha.scheduler.choose_trial_to_run(asha) is trials[1]
    assert asha.report(0, 2, 240.0) == TrialScheduler.PAUSE
