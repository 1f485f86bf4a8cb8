"""trials.json: what version 0.1 wrote is read, and written again byte for byte."""

import json

import pytest

from vae_hyperband.common.errors import ConfigError
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import RESULT, read_result, write_result

ROW = {
    "step": 5, "epoch": 1, "recon_loss": 30.25, "KL_divergence": 1.5, "total_loss": 31.75,
    "bound": 31.75,
}  # fmt: skip
#: A trial of each outcome, as 0.1 wrote them.
TRIALS = [
    {
        "number": 0,
        "drawn": {"latent_dim": 32, "learning_rate": 0.008, "batch_size": 128, "beta": 1.0},
        "rows": [ROW, {**ROW, "step": 10, "epoch": 2, "total_loss": 29.5, "bound": 29.5}],
        "outcome": "finished",
        "why": "",
    },
    {
        "number": 1,
        "drawn": {"latent_dim": 16, "learning_rate": 0.001, "batch_size": 64, "beta": 1.0},
        "rows": [ROW],
        "outcome": "stopped",
        "why": "31.75 after epoch 1 was number 2 of 2: not the best 1/3",
    },
    {
        "number": 2,
        "drawn": {"latent_dim": 16, "learning_rate": 0.01, "batch_size": 64, "beta": 1.0},
        "rows": [],
        "outcome": "failed",
        "why": "its process died; tried 3 times",
    },
]


@pytest.fixture
def written_by_0_1(tmp_path):
    settings = SearchConfig(num_trials=3, max_epochs=2).to_dict()
    content = {"search": settings, "trials": TRIALS, "importance": None}
    (tmp_path / RESULT).write_text(json.dumps(content, indent=1) + "\n")
    return tmp_path


def test_a_result_of_0_1_is_read_and_written_again_byte_for_byte(written_by_0_1):
    before = (written_by_0_1 / RESULT).read_bytes()
    result = read_result(written_by_0_1)
    assert result.winner.hyperparameters == Hyperparameters(
        latent_dim=32, learning_rate=0.008, batch_size=128, beta=1.0
    )
    assert result.best_score == 29.5
    write_result(result)
    assert (written_by_0_1 / RESULT).read_bytes() == before


@pytest.mark.parametrize(("dataset", "holdout"), [("custom", "last"), ("drawn", "content")])
def test_a_search_of_0_1_keeps_its_holdout(written_by_0_1, dataset, holdout):
    content = json.loads((written_by_0_1 / RESULT).read_text())
    del content["search"]["holdout"]
    content["search"]["dataset"] = dataset
    (written_by_0_1 / RESULT).write_text(json.dumps(content))
    assert read_result(written_by_0_1).best_config.holdout == holdout


def test_a_trial_says_in_one_line_what_happened_to_it(written_by_0_1):
    assert [trial.summary for trial in read_result(written_by_0_1).trials] == [
        "trial_000 finished at epoch 2",
        "trial_001 stopped at epoch 1: 31.75 after epoch 1 was number 2 of 2: not the best 1/3",
        "trial_002 failed: its process died; tried 3 times (latent 16, lr 0.01, batch 64, beta 1)",
    ]


@pytest.mark.parametrize("drawn", [{}, {"latent_dim": "x"}, None, [1]])
def test_hyperparameters_that_are_none_are_one_line(written_by_0_1, drawn):
    content = json.loads((written_by_0_1 / RESULT).read_text())
    content["trials"][1]["drawn"] = drawn
    (written_by_0_1 / RESULT).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"trials\.json is damaged"):
        read_result(written_by_0_1)
