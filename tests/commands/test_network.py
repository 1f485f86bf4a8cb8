"""A network of the user's own, as the guide teaches it, in every command; and the refusals."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_idx_folder

import vae_hyperband
from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError, NetworkError
from vae_hyperband.data.splits import load_split
from vae_hyperband.model import networks
from vae_hyperband.model.checkpoint import load_ckpt, load_model
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit
from vae_hyperband.training.study import train_side_by_side

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/network.md").read_text()
[EXAMPLE] = re.findall(r"```python\n(# the module my_network\n.*?)```", GUIDE, re.DOTALL)
OWN = ["--network", "my_network:dense"]


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory):
    """Images of 9x9, which no number of stages halves."""
    return write_idx_folder(tmp_path_factory.mktemp("odd"), 600, 30, size=9, num_classes=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with my_network.py, which leaves a mark wherever it is imported."""
    monkeypatch.chdir(tmp_path)
    mark = f"import os\nos.makedirs({str(tmp_path / 'imported')!r}, exist_ok=True)\n"
    (tmp_path / "my_network.py").write_text(mark + EXAMPLE)
    yield tmp_path
    sys.modules.pop("my_network", None)


@pytest.fixture
def call(place, odd_data, monkeypatch, capsys):
    """A command, as in a new process: its status, its errors, whether the module was imported."""

    def run(*argv):
        monkeypatch.setattr(networks, "_allowed", {})
        sys.modules.pop("my_network", None)
        if (place / "imported").exists():
            (place / "imported").rmdir()
        status = main([*map(str, argv)])
        return status, capsys.readouterr().err, (place / "imported").exists()

    return run


@pytest.fixture
def train(odd_data):
    return [
        "train", "--run", "mine", "--dataset", "custom", "--data-dir", odd_data, "--epochs", 1,
        "--batch-size", 32, "--latent-dim", 3, "--device", "cpu", "--num-threads", 1,
    ]  # fmt: skip


def test_the_guide_s_network_goes_through_every_command(call, train, odd_data, place):
    data = ["--data-dir", odd_data]
    loading = {
        "evaluate": ["evaluate", "mine", *data, "--parts", "likelihood", "--device", "cpu"],
        "sample": ["sample", "mine", "--out", "s.npy", "--num-samples", 5, "--device", "cpu"],
        "export": ["export", "mine", "--format", "safetensors", "--out", "hub"],
        "onnx": ["export", "mine", "--format", "onnx", "--out", "onnx"],
        "report": ["report", "mine", *data],
        "animate": ["animate", "mine", *data, "--out", "walk.gif"],
        "resume": ["train", "--resume_ckpt", "checkpoints/mine/best.pt", *data, "--epochs", 2],
    }
    assert call(*train, *OWN) == (0, "", True)
    for command in loading.values():
        status, said, imported = call(*command)
        assert (status, imported) == (2, False), command
        assert "add --network my_network:dense to the command" in said
        assert said.count("\n") == 1
    for name, command in loading.items():
        status, said, imported = call(*command, *OWN)
        assert (status, imported) == (0, True), (name, said)
    # what only reads settings needs no code
    assert call("compare", "mine", "checkpoints/mine/latest.pt")[2] is False
    assert load_ckpt(place / "checkpoints/mine/best.pt").config.network == "my_network:dense"


def test_a_configuration_in_a_file_runs_no_code(call, train, place):
    config = {"dataset": "custom", "network": "my_network:dense", "latent_dim": 3}
    (place / "best_config.json").write_text(json.dumps({"config": config}))
    (place / "plain.json").write_text(json.dumps(config))
    for file in ("best_config.json", "plain.json"):
        for dry in ([], ["--dry-run"]):
            again = [word for word in train if word not in ("--dataset", "custom")]
            status, said, imported = call(*again, "--config", file, *dry)
            assert (status, imported) == (2, False)
            assert "add --network my_network:dense to the command" in said
    assert call(*again, "--config", "plain.json", "--network=my_network:dense")[0] == 0


def test_the_folder_of_an_export_runs_no_code(call, train, place, monkeypatch):
    call(*train, *OWN)
    call("export", "mine", "--format", "safetensors", "--out", "hub", *OWN)
    card = (place / "hub/README.md").read_text()
    assert "load_model(\"path/to/this/folder\", network='my_network:dense')" in card
    assert "images of 9x9x1" in card
    for file in ("hub", "checkpoints/mine/best.pt"):
        monkeypatch.setattr(networks, "_allowed", {})
        sys.modules.pop("my_network", None)
        (place / "imported").rmdir()
        with pytest.raises(NetworkError, match=r"vae_hyperband\.allow_network\('my_network:dense"):
            load_model(file)
        assert not (place / "imported").exists()
        model = load_model(file, network="my_network:dense")
        assert (place / "imported").exists()
        assert model.sample(2).shape == (2, 1, 9, 9)


def test_a_network_that_is_no_name_is_refused_before_anything(call):
    for wrong in ("resnet", "a b:c", "x.py"):
        status, said, _ = call("evaluate", "mine", "--network", wrong)
        assert status == 2
        assert "package.module:function" in said


def config_of(network, **more):
    return TrainConfig(
        dataset="custom", latent_dim=3, batch_size=32, epochs=2, seed=3, network=network, **more
    )


def places(folder, data, run):
    return RunOptions(
        run=run, device="cpu", num_threads=1, data_dir=data, tensorboard=False,
        checkpoints_dir=folder / "c", logs_dir=folder / "l",
    )  # fmt: skip


@pytest.mark.parametrize("network", ["conv", "residual", "my_network:dense"])
def test_training_continues_bit_for_bit_and_the_loss_goes_down(
    network, place, odd_data, monkeypatch
):
    monkeypatch.setattr(networks, "_allowed", {})
    if ":" in network:
        with pytest.raises(ConfigError, match="allow_network"):
            fit(config_of(network), places(place, odd_data, "a"), quiet=True)
        vae_hyperband.allow_network(network)
    rows = []
    straight = fit(
        config_of(network),
        places(place, odd_data, "a"),
        quiet=True,
        on_validation=lambda state: rows.append(state.metrics["bound"]),
    )
    assert rows[1] < rows[0]
    steps = iter(range(100))
    stopped = [
        fit(config_of(network), places(place, odd_data, "b"), quiet=True, should_stop=stop)
        for stop in (lambda: next(steps) >= 20, lambda: False)
    ]
    assert [run.finished for run in stopped] == [False, True]
    assert stopped[1].weights == straight.weights


def test_the_processes_of_a_study_may_import_what_its_command_line_named(
    place, odd_data, monkeypatch
):
    monkeypatch.setattr(networks, "_allowed", {})
    vae_hyperband.allow_network("my_network:dense")
    monkeypatch.chdir("/")  # what counts is where the command was given
    found = []
    assert train_side_by_side(
        {"x": config_of("my_network:dense")},
        places(place, odd_data, "s"),
        1,
        lambda: False,
        lambda name, losses: found.append((name, losses["bound"])),
    )
    assert found[0][0] == "x"


def test_a_trial_of_a_search_may_import_what_its_command_line_named(place, odd_data, monkeypatch):
    """The worker's function, as Ray's process calls it: elsewhere, and with nothing allowed."""
    from vae_hyperband.tune import worker
    from vae_hyperband.tune.storage import TrialStore

    config = SearchConfig(
        dataset="custom", num_trials=3, max_epochs=2, batch_sizes=(32,), network="my_network:dense"
    )
    splits = tuple(
        worker.SharedSplit.of(load_split(name, odd_data, "custom"))
        for name in ("train", "validation")
    )
    options = SearchOptions(
        run="s", checkpoints_dir=place / "c", logs_dir=place / "l", device="cpu"
    )
    reports = []
    monkeypatch.setattr(worker.tune, "report", reports.append)
    tried = {"latent_dim": 3, "learning_rate": 1e-3, "batch_size": 32, "beta": 1.0}
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    for number, allowed in enumerate(({}, {"my_network:dense": str(place)})):
        monkeypatch.setattr(networks, "_allowed", {})
        monkeypatch.chdir(elsewhere)
        job = worker.TrialJob(
            config, options, TrialStore(str(place / "t")), splits, "cpu", networks=allowed
        )
        worker.train_trial({"number": number, "hyperparameters": tried}, job=job)
    assert "add --network my_network:dense" in reports[0]["failed"]
    assert [row["epoch"] for row in reports[1:]] == [1, 2]


@pytest.mark.parametrize("network", ["conv", "residual"])
def test_the_other_commands_take_widths_and_odd_images(network, call, train, odd_data, place):
    data = ["--data-dir", odd_data]
    settings = ["--network", network, "--widths", 4, 6, 8, "--prior", "vamp", "--pseudo-inputs", 3]
    assert call(*train, *settings)[0] == 0
    config = load_ckpt(place / "checkpoints/mine/best.pt").config
    assert (config.widths, config.network) == ((4, 6, 8), network)
    for command in (
        ["evaluate", "mine", *data, "--device", "cpu", "--parts", "likelihood", "latents"],
        ["sample", "mine", "--sampler", "mixture", "--components", 1, *data, "--device", "cpu"],
        ["export", "mine", "--format", "safetensors", "--out", "hub"],
        ["report", "mine", *data],
    ):
        status, said, _ = call(*command)
        assert status == 0, said
    model = load_model("hub")
    x_BCHW = torch.rand(2, 1, 9, 9)
    assert torch.equal(
        model.reconstruct(x_BCHW),
        load_model(place / "checkpoints/mine/best.pt").reconstruct(x_BCHW),
    )
    card = (place / "hub/README.md").read_text()
    assert ("8 x 2 x 2" in card) == (network == "conv")  # of 16x16 after padding
    for form, file in (("onnx", "encoder.onnx"), ("web", "index.html")):
        argv = ["export", "mine", "--format", form, "--out", form]
        status, said, _ = call(*argv, *(data if form == "web" else []))
        assert status == 0, said
        assert (place / form / file).stat().st_size
