"""The trials of a search in a storage of Optuna's, read back by Optuna."""

import math

import optuna
import pytest

from vae_hyperband.common.errors import RunFolderError, SearchError
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.optuna_study import OptunaStudy
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import TrialRecord

CONFIG = SearchConfig(num_trials=5, max_epochs=3)


def trial(number: int, bounds: list[float], outcome: str | None, why: str = "") -> TrialRecord:
    rows = [
        {"step": 10 * n, "epoch": n, "total_loss": bound, "bound": bound}
        for n, bound in enumerate(bounds, start=1)
    ]
    values = {"latent_dim": 16, "learning_rate": 1e-3, "batch_size": 64, "beta": 1.0}
    return TrialRecord(number, Hyperparameters(**values), rows, outcome, why)


TRIALS = [
    trial(0, [9.0, 8.0, 7.0], "finished"),
    trial(1, [9.5], "stopped", "number 2 of 2"),
    trial(2, [9.9, math.nan], "failed", "bound was nan"),
    trial(3, [], "failed", "diverged"),
    trial(4, [9.1], None),
]


@pytest.fixture
def storage(tmp_path):
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def test_every_trial_that_ended_is_there_once_whatever_was_repeated(storage):
    study = OptunaStudy(storage, "s", "abc", CONFIG)
    study.add(TRIALS[:1])
    study.add(TRIALS[:2])
    again = OptunaStudy(storage, "s", "abc", CONFIG)  # as after a kill
    again.add(TRIALS)
    again.add(TRIALS)
    found = optuna.load_study(study_name="s", storage=storage)
    assert [one.user_attrs["number"] for one in found.trials] == [0, 1, 2, 3]
    assert [one.state.name for one in found.trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert [one.value for one in found.trials] == [7.0, 9.5, None, None]
    assert found.trials[0].intermediate_values == {1: 9.0, 2: 8.0, 3: 7.0}
    assert math.isnan(found.trials[2].intermediate_values[2])
    assert found.trials[3].user_attrs["why"] == "diverged"
    assert found.best_trial.params == TRIALS[0].hyperparameters.to_dict()
    ended = trial(4, [9.1, 6.0, 5.0], "finished")
    again.add([ended])
    assert optuna.load_study(study_name="s", storage=storage).best_value == 5.0


def test_a_study_of_another_search_or_of_other_trials_is_refused(storage):
    OptunaStudy(storage, "s", "abc", CONFIG)
    OptunaStudy(storage, "t", "def", CONFIG)  # beside it
    with pytest.raises(SearchError, match=r"has a study s of another search: .*delete-study"):
        OptunaStudy(storage, "s", "other", CONFIG)
    optuna.create_study(storage=storage, study_name="mine").optimize(lambda t: 1.0, n_trials=1)
    with pytest.raises(SearchError, match="of another search"):
        OptunaStudy(storage, "mine", "abc", CONFIG)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all.db", "oracle://here"])
def test_a_storage_that_cannot_be_used_is_one_sentence(url):
    with pytest.raises(SearchError) as caught:
        OptunaStudy(url, "s", "abc", CONFIG)
    assert str(caught.value).startswith(f"--optuna {url} cannot be used: ")
    assert "\n" not in str(caught.value)


def test_a_storage_that_is_lost_later_is_an_error_of_the_package(storage, tmp_path):
    study = OptunaStudy(storage, "s", "abc", CONFIG)
    (tmp_path / "optuna.db").unlink()
    with pytest.raises(RunFolderError, match="cannot be written"):
        study.add(TRIALS)
