"""What a search says beforehand is what it then does, and saying it changes nothing."""

import json
import re
import shutil

import pytest
from conftest import written

from vae_hyperband import train_vae
from vae_hyperband.commands import run
from vae_hyperband.commands.run import MainJob
from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import DataError
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.suggest import random_search
from vae_hyperband.search.trials import (
    SearchResult,
    TrialRecord,
    describe,
    read_result,
    write_result,
)


@pytest.fixture
def command(searched):
    """The command of the search that is there, as a dry run."""
    folder, _ = searched
    asked = json.loads((folder / "checkpoints/s/search.json").read_text())
    config = {name: value for name, value in asked.items() if name not in ("id", "storage", "data")}
    usual, argv = SearchConfig().to_dict(), ["search", "--run", "s", "--dry-run"]
    for name, value in config.items():
        if value != json.loads(json.dumps(usual[name])):
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return [*argv, "--data-dir", str(folder / "data"), "--device", "cpu"]


def test_a_new_search_is_foretold_and_nothing_is_written(
    command, tmp_path, searched, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_vae.main(command) == 0
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    there = json.loads(said[: said.index("}") + 1])
    result = read_result(searched[0] / "checkpoints/s")
    assert there == json.loads(json.dumps(result.config.in_effect()))
    for trial in result.trials:  # which the real search tried
        assert f"{trial.number:>3}        {describe(trial.hyperparameters)}\n" in said
    assert "scheduler    asha: at most 81 epochs, fewer with early stopping\n" in said
    assert re.search(r"cpu, \d+ trials? in parallel, CPU threads of each: 1\n", said)
    assert re.search(r"training     [\d.]+ s an epoch, measured", said)
    assert "state" not in said


def test_a_search_that_is_there_is_said_and_left_as_it_is(
    command, searched, tmp_path, monkeypatch, capsys
):
    shutil.copytree(searched[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = written(tmp_path)
    assert train_vae.main(command) == 0
    said = capsys.readouterr().out
    assert "state        finished: its result would be shown\n" in said
    assert "training" not in said.partition("state")[2]
    assert train_vae.main([*command, "--fresh"]) == 0
    assert "state        the existing folder would be moved aside\n" in capsys.readouterr().out
    assert train_vae.main([*command, "--seed", "1"]) == 2
    assert "other settings (seed: 0 -> 1)" in capsys.readouterr().err
    assert written(tmp_path) == before

    folder = tmp_path / "copy/checkpoints/s"
    settings = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name != "holdout"})
    )  # as 0.1 wrote it
    assert train_vae.main(command) == 2
    assert "other settings (holdout: 'last' -> 'content')" in capsys.readouterr().err
    assert train_vae.main([*command, "--holdout", "last"]) == 0
    capsys.readouterr()
    (folder / "search.json").write_text(json.dumps(settings))
    (folder / "trials.json").unlink()
    lines = (folder / "decisions.jsonl").read_bytes().splitlines(keepends=True)
    results = [i for i, line in enumerate(lines) if json.loads(line)["event"] == "result"]
    (folder / "decisions.jsonl").write_bytes(b"".join(lines[: results[4] + 1]))
    ended = sum(json.loads(line)["event"] == "end" for line in lines[: results[4] + 1])
    before = written(tmp_path)
    assert train_vae.main(command) == 0
    said = capsys.readouterr().out
    assert f"it would resume with {plural(ended, 'trial')} ended and 5 epochs trained\n" in said
    assert "s an epoch, measured" in said
    assert written(tmp_path) == before


def test_the_training_of_the_winner_is_foretold_too(
    command, tmp_path, searched, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_vae.main([*command, "--final-epochs", "2"]) == 0
    said = capsys.readouterr().out
    _, _, rest = said.partition("== then train the winner; if it is trial 0, as s-best\n")
    batch = random_search(read_result(searched[0] / "checkpoints/s").config)[0]["batch_size"]
    assert f"steps        {2 * -(-300 // batch)} in 2 epochs\n" in rest
    assert list(tmp_path.iterdir()) == []


def test_tpe_does_not_foretell_what_it_has_yet_to_learn(tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["search", "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--batch-sizes", "32", "--algorithm", "tpe", "--num-trials", "9", "--device", "cpu"]
    assert train_vae.main(argv) == 0
    said = capsys.readouterr().out
    found = random_search(SearchConfig(batch_sizes=(32,), num_trials=9))
    assert [describe(trial) in said for trial in found] == [True] * 4 + [False] * 5
    assert "  ...\n" in said


def test_what_a_refused_search_left_is_no_search(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/s").mkdir(parents=True)
    (tmp_path / "checkpoints/s/search.json").write_text("{}")
    assert train_vae.main(command) == 0
    assert "state" not in capsys.readouterr().out


def test_a_dry_run_refuses_what_the_search_would(tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["search", "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    for wrong, message in (
        (["--batch-sizes", "32", "--cpus-per-trial", "1000"], "needs 1000 CPU"),
        (["--batch-sizes", "64", "1000"], "more than the 300 training images"),
        (["--data-dir", str(tmp_path / "none")], "none"),
    ):
        assert train_vae.main([*argv, "--device", "cpu", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_more_threads_than_the_quota_says_so(
    tmp_path, small_data, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vae_hyperband.common.process.cpu_quotas", lambda: [0.5])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    argv = ["search", "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--batch-sizes", "32", "--device", "cpu", "--cpus-per-trial", "2"]
    assert train_vae.main(argv) == 0
    said = capsys.readouterr().out
    assert "cpu, 1 trial in parallel, CPU threads of each: 2\n" in said
    assert "note         the CPU quota here is 1 CPU" in said


def test_the_main_job_says_beforehand_what_it_would_do(tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["run", "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--device", "cpu", "--parts", "likelihood"]
    assert train_vae.main(argv) == 0
    search, _, rest = capsys.readouterr().out.partition(
        "== then train the winner; if it is trial 0, as"
    )
    assert search.startswith("== search, as fashion-search\n")
    assert "trials       8, suggested by random\n" in search
    line = _line(rest, "command")
    assert "train --run fashion-best --dataset custom --device cpu --data-dir" in line
    assert "steps        30 in 10 epochs\n" in rest
    assert "evaluate it on the test split (likelihood)" in rest
    assert rest.count("Nothing was written.") == 1
    assert list(tmp_path.iterdir()) == []

    config, options = MainJob(dataset="custom", device="cpu").search()
    folder = options.ckpt_folder
    folder.mkdir(parents=True)
    asked = {**config.to_dict(), "id": "0", "storage": None}
    (folder / "search.json").write_text(json.dumps(asked))
    tried = Hyperparameters(latent_dim=64, learning_rate=1e-3, batch_size=64, beta=1.0)
    row = {"epoch": 3, "step": 9, "bound": 90.0, "total_loss": 90.0}
    write_result(SearchResult(config, [TrialRecord(0, tried, [row], "finished")], folder))
    before = written(tmp_path)
    assert train_vae.main(argv) == 0
    said = capsys.readouterr().out
    assert "state        finished" in said
    _, _, rest = said.partition("== then train the winner, as fashion-best\n")
    assert "--latent-dim 64 --learning-rate 0.001 --batch-size 64" in _line(rest, "command")
    assert written(tmp_path) == before


def test_the_main_job_takes_the_network_and_a_space_of_its_own(
    tmp_path, small_data, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    space = tmp_path / "space.toml"
    space.write_text("batch_size = { choice = [8, 16] }\nlatent_dim = 4\nlikelihood = 'laplace'\n")
    argv = ["run", "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--device", "cpu", "--widths", "8", "12", "--space", str(space)]
    argv += ["--scheduler", "none"]
    assert train_vae.main(argv) == 0
    said = capsys.readouterr().out
    assert "batch 8, beta 1" in said
    assert "batch 16, beta 1" in said
    assert "batch 64" not in said
    assert "scheduler    none: at most 24 epochs\n" in said
    found = _line(said.partition("== then train the winner")[2], "command")
    for words in ("--widths 8 12", "--latent-dim 4", "--likelihood laplace"):
        assert words in found


def test_without_the_data_the_main_job_says_that_it_would_fetch_it(monkeypatch, tmp_path, capsys):
    def missing(*_):
        raise DataError("There is none.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "split_for", missing)
    assert train_vae.main(["run", "--dry-run", "--device", "cpu"]) == 0
    assert "== first get Fashion-MNIST" in capsys.readouterr().out
    assert train_vae.main(["run", "--dry-run", "--device", "cpu", "--data-dir", "x"]) == 2
    assert "There is none." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _line(text, name):
    return re.search(rf"^{name}.*\n", text, re.MULTILINE)[0]
