"""--config: options from a TOML or JSON file, in every command that has settings."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from vae_hyperband import train_vae
from vae_hyperband.beta_vae_tsb import BetaArgs
from vae_hyperband.commands import data, evaluate, export, look, run, sample, search, study, train
from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.search.space import Choice

ARGS = {
    "run": run.MainJob, "search": search.SearchArgs, "train": train.TrainArgs,
    "evaluate": evaluate.EvaluateArgs, "sample": sample.SampleArgs, "export": export.ExportArgs,
    "report": look.ReportArgs, "compare": look.CompareArgs, "animate": look.AnimateArgs,
    "study": study.StudyArgs, "data": data.DataArgs, "encode": evaluate.EncodeArgs,
    "reconstruct": evaluate.ReconstructArgs, "nearest": evaluate.NearestArgs,
    "score": evaluate.ScoreArgs,
}  # fmt: skip


@pytest.fixture
def parsed(tmp_path):
    """``parsed(command, text, *words)``: the options of a command with a file of that text."""

    def parse(command: str, text: str, *words: str, name: str = "run.toml"):
        (tmp_path / name).write_text(text)
        argv = [*words, "--config", str(tmp_path / name)]
        return parse_options(ARGS[command], argv, f"vae-hyperband {command}")

    return parse


def test_every_command_with_settings_has_the_option():
    assert set(ARGS) == set(train_vae.COMMANDS) - {"completion", "slurm"}
    for kind in (*ARGS.values(), BetaArgs):
        assert issubclass(kind, ConfigFile)


def test_options_come_from_the_command_line_then_the_file_then_the_defaults(parsed):
    text = 'latent-dim = 8\nepochs = 3\nlearning_rate = 1e-3\nrun = "mine"\ntensorboard = false\n'
    found = parsed("train", text, "--epochs", "5")
    expected = TrainConfig(latent_dim=8, epochs=5, learning_rate=1e-3)
    assert found.training == expected
    assert found.execution.run == "mine"
    assert not found.execution.tensorboard
    text = '{"latent_dim": 8, "epochs": 5, "learning-rate": 1e-3, "beta": null}'
    again = parsed("train", text, name="no-ending")
    assert again.training == expected


#: A file for each command, what else is given, and a value that has to arrive.
FILES = {
    "run": ("num_trials = 3\nparts = ['latents']", [], lambda a: (a.num_trials, a.parts)),
    "search": ("betas = [1, 4]\nmax_failures = 0", [],
               lambda a: (a.space.betas, a.execution.max_failures)),
    "evaluate": ("run = 'mine'\nsplit = 'test'\nknn = 3", [], lambda a: (a.run, a.split)),
    "sample": ("num-samples = 9\ncomponents = 3", ["mine"],
               lambda a: (a.num_samples, a.fitting.components)),
    "export": ("format = 'onnx'\nout = 'there'", ["mine"], lambda a: (a.format, str(a.out))),
    "report": ("out = 'a.html'", ["mine"], lambda a: (a.run, str(a.out))),
    "compare": ("runs = ['a', 'b']\njson = true", [], lambda a: (a.runs, a.json)),
    "animate": ("kind = 'training'\nseed = 7", ["mine"], lambda a: (a.kind, a.seed)),
    "study": ("betas = [1, 4]\nprior = 'vamp'\nparts = ['latents']", [],
              lambda a: (a.betas, a.shared.prior, a.evaluation.parts)),
    "data": ("dataset = 'drawn'\ninstall = true", [], lambda a: (a.dataset, a.install)),
}  # fmt: skip
ARRIVES = {
    "run": (3, ("latents",)), "search": ((1.0, 4.0), 0), "evaluate": ("mine", "test"),
    "sample": (9, 3), "export": ("onnx", "there"), "report": ("mine", "a.html"),
    "compare": (("a", "b"), True), "animate": ("training", 7),
    "study": ((1.0, 4.0), "vamp", ("latents",)), "data": ("drawn", True),
}  # fmt: skip


@pytest.mark.parametrize("command", FILES)
def test_a_file_has_the_options_of_any_command(command, parsed):
    text, words, seen = FILES[command]
    text = text.replace("\nknn = 3", "")
    assert seen(parsed(command, text, *words)) == ARRIVES[command]


WRONG = {
    "unknown key": ("train", "epoch = 3", [], "has epoch, which is no option of vae-hyperband tr"
                    r"ain \(perhaps you meant epochs\)"),
    "key of another command": ("evaluate", "latent_dim = 3", ["a"], "no option of vae-hyperband e"),
    "its own name": ("train", "config = 'a'", [], "has config, which is no option"),
    "a table": ("train", "[train]\nepochs = 3", [], "has train, which is no option"),
    "twice": ("train", "latent_dim = 3\nlatent-dim = 4", [], "has latent_dim twice"),
    "wrong type": ("train", "epochs = 'many'", [], "toml: epochs is 'many', but must be of type"),
    "no list": ("study", "betas = 1", [], "run.toml: betas is 1, but must be a list"),
    "no truth": ("train", "tensorboard = 1", [], "run.toml: tensorboard is 1, but must be of type"),
    "no such choice": ("train", "prior = 'x'", [], "run.toml: --prior is 'x', but must be one of"),
    "impossible": ("train", "latent_dim = 0", [], "run.toml: --latent-dim is 0, but must be bet"),
    "impossible together": ("train", "kl_cycles = 2", ["--kl-warmup-epochs", "1"],
                            "run.toml: --kl-cycles and --kl-warmup-epochs both set"),
    "syntax": ("train", "epochs = 3\nbeta 4", [], r"run.toml is not valid TOML: .*line 2"),
    "space": ("search", "space = {beta = {choice = []}}", [], "toml: .* choice of beta is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_gets_one_sentence_that_names_it(name, parsed):
    command, text, words, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(command, text, *words)
    assert "run.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_the_options_is_not_blamed_on_the_file(parsed):
    with pytest.raises(ConfigError, match=r"^--latent-dim is 0"):
        parsed("train", "epochs = 3", "--latent-dim", "0")
    with pytest.raises(ConfigError, match=r"^Unrecognized options: --latent-dum"):
        parsed("train", "epochs = 3", "--latent-dum", "0")


def test_an_option_may_make_the_file_s_possible(parsed):
    found = parsed("train", "free_bits = 0.3", "--objective", "free-bits")
    assert found.training.free_bits == 0.3
    assert parsed("train", "latent_dim = 0", "--latent-dim", "3").training.latent_dim == 3


def test_json_that_is_none_says_where(parsed):
    with pytest.raises(ConfigError, match=r"run\.json is not valid JSON: .*line 2"):
        parsed("train", '{\n"epochs": }', name="run.json")
    with pytest.raises(ConfigError, match="does not hold a JSON object"):
        parsed("train", "[3]", name="run.json")


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_a_best_config_of_an_earlier_version_is_read(parsed, version):
    settings = dataclasses.asdict(TrainConfig(dataset="custom", latent_dim=8, epochs=9))
    settings["free_bits"] = 0.7  # 0.1 wrote settings of objectives that were not chosen
    if version == "0.1":
        del settings["holdout"]
    best = {
        "config": settings, "device": "cpu", "num_threads": 1, "metric": {"value": 3.5}, "seed": 4,
        "trial": "trial_003", "environment": {"torch": "2"},
    }  # fmt: skip
    found = parsed("train", json.dumps(best), "--epochs", "10", name="best_config.json")
    holdout = "last" if version == "0.1" else "content"
    assert found.training == TrainConfig(dataset="custom", latent_dim=8, epochs=10, holdout=holdout)
    assert (found.execution.device, found.execution.num_threads) == ("cpu", 1)


def test_a_file_may_hold_or_name_the_space_of_a_search(parsed, tmp_path):
    text = "space = {latent_dim = {choice = [2, 4]}}"
    assert parsed("search", text).space.domains["latent_dim"] == Choice((2, 4))
    (tmp_path / "space.toml").write_text("latent_dim = {choice = [2, 4]}")
    named = parsed("search", f"space = '{tmp_path}/space.toml'")
    assert named.space == parsed("search", text).space
    given = parse_options(search.SearchArgs, ["--space", f"{tmp_path}/space.toml"], "search")
    assert given.space == named.space


def test_python_m_beta_vae_tsb_takes_it_too(tmp_path):
    (tmp_path / "run.toml").write_text("betas = [2, 3]\nserve = false")
    argv = ["--config", str(tmp_path / "run.toml"), "--epochs", "1"]
    found = parse_options(BetaArgs, argv, "beta_vae_tsb")
    assert (found.betas, found.serve, found.epochs) == ((2.0, 3.0), False, 1)


def test_the_file_in_the_guide_is_one(parsed):
    text = (Path(__file__).parents[2] / "docs/training.md").read_text()
    [example] = re.findall(r"```toml\n# run\.toml\n(.*?)```", text, flags=re.DOTALL)
    found = parsed("train", example)
    assert found.training != TrainConfig()
    assert found.execution.run != "vae"


def test_a_preset_is_a_configuration_whose_settings_give_way_to_options(
    monkeypatch, tmp_path, small_data, capsys
):
    monkeypatch.chdir(tmp_path)
    data = ["--data-dir", str(small_data), "--dataset", "custom", "--device", "cpu"]
    argv = ["train", "--preset", "images", "--epochs", "3", "--batch-size", "16", *data]
    argv.append("--dry-run")
    assert train_vae.main(argv) == 0
    said = capsys.readouterr().out
    for line in ('"latent_dim": 64,', '"beta": 0.02,', '"epochs": 3,', '"batch_size": 16,'):
        assert line in said
    assert train_vae.main(["train", "--preset", "best", *data]) == 2
    assert "'best' for argument '--preset'" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text("epochs = 1\n")
    assert train_vae.main(["train", "--preset", "quick", "--config", "run.toml"]) == 2
    assert "--config and --preset both name a configuration" in capsys.readouterr().err
    (tmp_path / "preset.toml").write_text('preset = "quick"\n')
    assert train_vae.main(["train", "--config", "preset.toml", "--dry-run"]) == 2
    assert "preset cannot be a setting of a file" in capsys.readouterr().err
    assert train_vae.main(["train", "--preset", "quick", "--resume-ckpt", "x.pt"]) == 2
    assert "--resume_ckpt and --preset both name a configuration" in capsys.readouterr().err
