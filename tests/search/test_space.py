"""--space: what a file may say, what is refused, and that each algorithm stays in the space."""

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.search import config as search_config
from vae_hyperband.search import suggest as suggestions
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import (
    Choice,
    Hyperparameters,
    LogRange,
    Range,
    Space,
    describe,
    read_space,
)
from vae_hyperband.search.suggest import grid, importance, random_search, suggest
from vae_hyperband.search.trials import SearchResult, TrialRecord, read_result, write_result

TEXT = """
latent_dim = {log_range = [4, 64]}
learning_rate = {log_range = [5e-4, 1e-2]}
free_bits = {range = [0.05, 0.5]}
objective = "free-bits"
kl_cycles = {range = [0, 3]}
schedule = {choice = ["one-cycle", "constant"]}
"""


def space(text: str, kind: type[TrainConfig] = TrainConfig) -> Space:
    return Space.from_dict(tomllib.loads(text), kind=kind)


def searched(config: SearchConfig, num_trials: int) -> list[TrialRecord]:
    """Trials as a search would have run them: a lower learning rate is better."""
    trials: list[TrialRecord] = []
    for number in range(num_trials):
        tried = suggest(config, number, trials)
        value = 240 + math.log(tried["learning_rate"] / 5e-4)
        row = {"epoch": 1, "step": 1, "bound": value, "total_loss": value}
        trials.append(TrialRecord(number, tried, [row], "finished"))
    return trials


def test_a_file_is_read_and_kept_as_json(tmp_path):
    (tmp_path / "space.toml").write_text(TEXT)
    found = read_space(tmp_path / "space.toml")
    assert dict(found) == {
        "free_bits": Range(0.05, 0.5),
        "kl_cycles": Range(0, 3),
        "latent_dim": LogRange(4, 64),
        "learning_rate": LogRange(5e-4, 1e-2),
        "objective": Choice(("free-bits",)),
        "schedule": Choice(("one-cycle", "constant")),
    }
    assert Space.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    # the order of lines decides nothing: else a file with two lines swapped would be another search
    (tmp_path / "space.toml").write_text("\n".join(reversed(TEXT.splitlines())))
    assert list(read_space(tmp_path / "space.toml")) == list(found) == sorted(found)


def test_a_float_s_ends_may_be_written_as_integers():
    assert space("beta = {range = [1, 4]}")["beta"] == Range(1.0, 4.0)
    assert not space("beta = {range = [1, 4]}")["beta"].integer
    assert space("latent-dim = {range = [2, 4]}")["latent_dim"].integer


WRONG = {
    "unknown name": ("latent_dims = 3", r"no setting of a run \(perhaps you meant latent_dim\)"),
    "not a setting": ("num_trials = 3", "has num_trials, which is no setting of a run"),
    "twice": ("latent_dim = 3\nlatent-dim = 4", "has latent_dim twice"),
    "epochs": ("epochs = {choice = [1, 2]}", "epochs, which is not searched: --max-epochs"),
    "seed": ("seed = 1", "not searched: all trials have the seed of the search"),
    "dataset": ('dataset = "drawn"', "not searched: all trials have the same images, .* --dataset"),
    "unknown kind": ("beta = {chioce = [1]}", "must be a value, or have one of choice, range"),
    "two kinds": ("beta = {choice = [1], range = [1, 2]}", "or have one of choice, range"),
    "no list": ("beta = {choice = 1}", "choice of beta is 1, but must be a list"),
    "empty choice": ("beta = {choice = []}", "choice of beta is empty"),
    "a value twice": ("beta = {choice = [1, 1.0]}", "choice of beta has a value twice"),
    "wrong type": ('latent_dim = {choice = [16, "32"]}', "'32', but must be of type int"),
    "half a dimension": ("latent_dim = {range = [1, 2.5]}", "2.5, but must be of type int"),
    "no such choice": ('objective = "elob"', "'elob', but must be one of"),
    "low above high": ("beta = {range = [2, 1]}", r"of beta is \[2, 1\], .* lowest < highest"),
    "no width": ("beta = {range = [1, 1]}", "lowest < highest"),
    "three ends": ("beta = {range = [1, 2, 3]}", "must be two numbers"),
    "infinite": ("beta = {range = [1, inf]}", "lowest < highest"),
    "nan": ("beta = {range = [nan, 1]}", "lowest < highest"),
    "log from 0": ("beta = {log_range = [0, 1]}", "begins at 0.0, but must be above 0: give it"),
    "range of names": ('prior = {range = ["normal", "vamp"]}', "no number and has no range"),
    "impossible plain value": ("latent_dim = 0", r"refused \(latent 0\): --latent-dim is 0"),
    "impossible choice": ("batch_size = {choice = [64, 0]}", r"\(batch 0\): --batch-size is 0"),
    "impossible end": ("latent_dim = {range = [1, 9999]}", r"\(latent 9999\): --latent-dim is 99"),
    "impossible pair": (
        "kl_cycles = {choice = [0, 2]}\nkl_warmup_epochs = {range = [0, 1]}",
        r"refused \(kl_cycles 2, kl_warmup_epochs 1\): --kl-cycles and --kl-warmup-epochs both",
    ),
    "pair of which one is the default": (
        'objective = {choice = ["elbo", "iwae"]}\nbeta = {choice = [1, 2]}',
        r"refused \(beta 2, objective iwae\): --objective iwae has no KL term",
    ),
    "trial 0": (
        'objective = "beta-tc"\nbeta = {range = [0.5, 4]}',  # the default beta is 1
        r"refused \(beta 1\): --objective beta-tc with a beta of 1 is the ELBO",
    ),
    "without effect": ("free_bits = {range = [0.1, 1]}", "--free-bits needs --objective free-bits"),
    "likelihoods": (
        'likelihood = {choice = ["bernoulli", "continuous-bernoulli"]}',
        "several values of likelihood, whose bounds cannot be compared",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_gets_one_sentence(name):
    text, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        SearchConfig(space=space(text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_files_that_are_none_get_one_sentence(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text("latent_dim = 3\nbeta 3\n")
    with pytest.raises(ConfigError, match=r"space\.toml is not valid TOML: .*line 2"):
        read_space(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty, but must name at least one setting"):
        read_space(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_space(path)


def test_an_option_and_the_space_may_not_both_set_something():
    for text, options in (
        ("latent_dim = {choice = [2, 4]}", {"latent_dims": (8, 16)}),
        ('objective = {choice = ["elbo", "capacity"]}', {"objective": "capacity"}),
        ('prior = "normal"\nkl_cycles = 1', {"kl_cycles": 2}),
    ):
        with pytest.raises(ConfigError, match=r"and --space both set .*: give only one"):
            SearchConfig(space=space(text), **options)


def test_a_plain_value_is_that_of_all_trials():
    config = SearchConfig(space=space(TEXT))
    assert config.objective == "free-bits"  # as if the option had been given
    assert list(config.domains) == [
        "latent_dim", "learning_rate", "batch_size", "beta", "free_bits", "kl_cycles", "schedule",
    ]  # fmt: skip
    assert config.domains["batch_size"] == Choice((64, 128, 256))  # not in the file
    for tried in random_search(config):
        trained = config.trial_config(tried)
        assert trained.objective == "free-bits"
        assert trained.to_dict().items() >= dict(tried).items()
    assert "objective" not in random_search(config)[0]


def test_likelihoods_can_be_compared_by_fid():
    text = 'likelihood = {choice = ["bernoulli", "continuous-bernoulli"]}'
    assert len(SearchConfig(space=space(text), metric="fid").domains) == 5
    one = SearchConfig(space=space('likelihood = "continuous-bernoulli"'))
    assert one.likelihood == "continuous-bernoulli"


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_suggestions_lie_in_the_space_and_are_a_function_of_the_seed(algorithm):
    config = SearchConfig(space=space(TEXT), num_trials=40, algorithm=algorithm)
    found = [trial.hyperparameters for trial in searched(config, 40)]
    assert found == [trial.hyperparameters for trial in searched(config, 40)]
    other = dataclasses.replace(config, seed=1)
    assert found[1:] != [trial.hyperparameters for trial in searched(other, 40)][1:]
    default = TrainConfig().to_dict()
    for name, value in found[0].items():
        assert value == default[name]
    for tried in found:
        assert 0.05 <= tried["free_bits"] <= 0.5
        assert 5e-4 <= tried["learning_rate"] <= 1e-2
        assert type(tried["latent_dim"]) is int
        assert 4 <= tried["latent_dim"] <= 64
        assert type(tried["kl_cycles"]) is int
        config.trial_config(tried)
    assert {tried["kl_cycles"] for tried in found} == {0, 1, 2, 3}
    assert {tried["schedule"] for tried in found} == {"one-cycle", "constant"}


def test_log_ranges_are_log_uniform_and_ranges_uniform():
    config = SearchConfig(space=space(TEXT), num_trials=2000)
    found = random_search(config)[1:]
    # the middle of each: half of the samples, +- 5 standard deviations of 0.011
    below = sum(tried["latent_dim"] < 16 for tried in found) / len(found)
    assert below == pytest.approx(0.5 - math.log(16 / 15.5) / math.log(64.5 / 3.5), abs=0.056)
    lowest = sum(tried["latent_dim"] == 4 for tried in found) / len(found)  # no rarer for its place
    assert lowest == pytest.approx(math.log(4.5 / 3.5) / math.log(64.5 / 3.5), abs=0.032)
    assert sum(tried["free_bits"] < 0.275 for tried in found) / len(found) == pytest.approx(
        0.5, abs=0.056
    )
    assert sum(tried["kl_cycles"] == 3 for tried in found) / len(found) == pytest.approx(
        0.25, abs=0.049
    )


def test_a_grid_has_points_of_each_range_and_every_choice():
    text = 'free_bits = {range = [0.1, 0.3]}\nobjective = "free-bits"\nlatent_dim = 8\n'
    text += "kl_cycles = {range = [0, 1]}\nlearning_rate = {log_range = [1e-3, 4e-3]}"
    config = SearchConfig(space=space(text), algorithm="grid", grid_points=3, batch_sizes=(64,))
    cells = grid(config)
    assert len(cells) == len(set(cells)) == config.total_trials == 3 * 2 * 3
    values = {name: sorted({cell[name] for cell in cells}) for name in cells[0]}
    assert values == {
        "latent_dim": [8],
        "learning_rate": pytest.approx([1e-3, 2e-3, 4e-3]),
        "batch_size": [64],
        "beta": [1.0],
        "free_bits": pytest.approx([0.1, 0.2, 0.3]),
        "kl_cycles": [0, 1],  # there are no three integers
    }
    with pytest.raises(ConfigError, match="grid of this space has 102,400 trials, more than"):
        dataclasses.replace(config, grid_points=160, batch_sizes=(64, 128))


def test_a_search_without_the_option_has_what_it_always_had():
    config = SearchConfig()
    assert config.domains == {
        "latent_dim": Choice((16, 32, 64)),
        "learning_rate": LogRange(5e-4, 1e-2),
        "batch_size": Choice((64, 128, 256)),
        "beta": Choice((1.0,)),
    }
    assert config.to_dict()["space"] is None
    assert "space" not in config.in_effect()
    shown = SearchConfig(space=space(TEXT)).in_effect()
    assert not {"latent_dims", "learning_rates", "free_bits", "schedule"} & set(shown)
    assert tuple(shown["batch_sizes"]) == (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class ListConfig(TrainConfig):
    """A run with a setting that is a list."""

    sizes: tuple[int, ...] = (32, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 13 in self.sizes:
            raise ConfigError("--sizes has a 13.")


def test_a_choice_may_be_of_lists(monkeypatch, tmp_path):
    for module in (search_config, suggestions):
        monkeypatch.setattr(module, "TrainConfig", ListConfig)
    found = space("sizes = {choice = [[32, 64], [32, 64, 128], [8]]}", ListConfig)
    for algorithm in ("random", "grid", "tpe"):
        config = SearchConfig(space=found, num_trials=20, algorithm=algorithm, grid_points=2)
        trials = searched(config, 20)
        tried = {trial.hyperparameters["sizes"] for trial in trials}
        assert tried == {(32, 64), (32, 64, 128), (8,)}
        assert config.trial_config(trials[0].hyperparameters).sizes in tried
        assert "sizes 32 64" in {describe(t.hyperparameters).split(", ")[4] for t in trials}
        shares = importance(config, trials)
        assert shares is not None
        assert max(shares, key=shares.__getitem__) == "learning_rate"
    # JSON has lists; what comes back is what was suggested
    again = config.hyperparameters(json.loads(json.dumps(trials[0].hyperparameters.to_dict())))
    assert again == trials[0].hyperparameters
    with pytest.raises(ConfigError, match=r"refused \(sizes 13\): --sizes has a 13"):
        SearchConfig(space=space("sizes = {choice = [[1], [13]]}", ListConfig))


def test_a_result_is_written_and_read(tmp_path):
    config = SearchConfig(space=space(TEXT), num_trials=5, kl_warmup_epochs=0)
    result = SearchResult(config, searched(config, 5), tmp_path)
    write_result(result)
    again = read_result(tmp_path)
    assert again.config == config
    assert hash(again.config) == hash(config)
    assert again.trials == result.trials
    content = json.loads((tmp_path / "trials.json").read_text())
    del content["trials"][1]["drawn"]["free_bits"]  # of another space
    (tmp_path / "trials.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"trials\.json is damaged"):
        read_result(tmp_path)


def test_hyperparameters_are_equal_by_name_and_cannot_change():
    one = Hyperparameters(beta=1.0, latent_dim=2)
    assert one == Hyperparameters(latent_dim=2, beta=1.0)
    assert hash(one) == hash(Hyperparameters(latent_dim=2, beta=1.0))
    assert one.replace(beta=2.0) == Hyperparameters(beta=2.0, latent_dim=2) != one
    with pytest.raises(TypeError):
        one["beta"] = 3.0


def test_the_file_in_the_documentation_is_a_space():
    text = (Path(__file__).parents[2] / "docs/search.md").read_text()
    [example] = re.findall(r"```toml\n# space\.toml\n(.*?)```", text, flags=re.DOTALL)
    config = SearchConfig(space=space(example), num_trials=20)
    kinds = {type(domain) for domain in config.space.values()}
    assert kinds == {Choice, Range, LogRange}
    for tried in random_search(config):
        config.trial_config(tried)
