"""A model on its way to the Hugging Face hub and back, by the hub's own package."""

import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from conftest import command_line

from vae_hyperband.training.loop import fit

LOAD = """
import sys, torch
from vae_hyperband import load_model
from vae_hyperband.common.errors import VAEHyperbandError
try:
    model = load_model(sys.argv[1])
except VAEHyperbandError as error:
    sys.exit(f"{type(error).__name__}: {error}")
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.fixture
def hub():
    with hub_server.running() as (hub, address):
        yield hub, address


@pytest.fixture
def run_with(hub, tmp_path):
    """``run_with(*command)``, with the settings that the hub's package reads when imported."""
    _, address = hub
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip

    def run(*command: object, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, env={**os.environ, **settings, **changes},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


def test_a_model_is_pushed_and_loaded_back(hub, run_with, options, small_config, tmp_path):
    import torch

    hub, address = hub
    trained = fit(small_config, options(), quiet=True)
    push = command_line("export", trained.best, "--format", "safetensors", "--out", "shared",
                        "--push", "org/name")  # fmt: skip
    done = run_with(*push)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {address}/org/name/commit/" in done.stdout
    [_, files] = hub.repositories["org/name"]
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    for name, content in files.items():
        assert (tmp_path / "shared" / name).read_bytes() == content
    assert b"secret" not in b"".join(files.values())

    def check(name: str) -> None:
        done = run_with(sys.executable, "-c", LOAD, name, tmp_path / "x.pt")
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "x.pt")
        for key, tensor in trained.state.model.state_dict().items():
            assert torch.equal(found[key], tensor)

    check("hf:org/name")
    hub.repositories["org/name"].append({"README.md": b""})  # somebody removes the weights
    check(f"hf:org/name@{hub.oid('org/name', 1)}")
    done = run_with(sys.executable, "-c", LOAD, "hf:org/name", tmp_path / "x.pt")
    assert "holds no model that can be read" in done.stderr
    assert run_with(*push).returncode == 0  # a repository that is there gets another commit
    check("hf:org/name")
    assert not any("README" in path for path in hub.asked if path.startswith("GET"))


def test_what_the_hub_refuses_is_one_sentence(hub, run_with, options, small_config, tmp_path):
    trained = fit(small_config, options(), quiet=True)
    done = run_with(sys.executable, "-c", LOAD, "hf:org/none", tmp_path / "x.pt")
    assert done.returncode == 1
    assert done.stderr.startswith("CheckpointError: hf:org/none cannot be had from the hub: ")
    done = run_with(sys.executable, "-c", LOAD, "hf:no such name", tmp_path / "x.pt")
    assert done.stderr.startswith("CheckpointError: hf:no such name cannot be had from the hub: ")
    push = command_line("export", trained.best, "--format", "safetensors", "--out", "shared")
    done = run_with(*push, "--push", "org/name", "--license", "our-own")
    assert done.returncode == 2
    assert '"license" must be one of [' in done.stderr  # the server's words
    assert done.stderr.count("\n") == 1
    for name, changes in (("org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}), ("a b", {})):
        done = run_with(*push, "--push", name, **changes)
        assert done.returncode == 2
        assert done.stderr.startswith(f"vae-hyperband: --push {name} failed: ")
        assert done.stderr.count("\n") == 1
        assert Path(tmp_path / "shared/model.safetensors").exists()


def test_only_safetensors_are_pushed(run_with, options, small_config):
    trained = fit(small_config, options(), quiet=True)
    done = run_with(*command_line("export", trained.best, "--format", "onnx", "--out", "x",
                                  "--push", "org/name"))  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "vae-hyperband: --push needs --format safetensors: remove it.\n"
