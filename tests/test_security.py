"""Nothing runs because it was loaded, nobody outside is listened to, no run leaves its folder."""

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vae_hyperband import train_vae
from vae_hyperband.config import RunOptions, check_run_name
from vae_hyperband.errors import ConfigError, RunFolderError
from vae_hyperband.process import only_writer

ROOT = Path(__file__).parent.parent


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--resume_ckpt", "bomb.pt"],
        ["evaluate", "bomb.pt"],
        ["sample", "bomb.pt"],
        ["train", "--run", "a", "--dataset", "drawn"],
    ],
    ids=lambda command: command[0],
)
def test_a_malicious_checkpoint_runs_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {"format": "vae-hyperband checkpoint", "version": 2, "model": Bomb(tmp_path / "ran")}
    (tmp_path / "checkpoints/a").mkdir(parents=True)
    for path in ("bomb.pt", "checkpoints/a/latest.pt"):
        torch.save(content, tmp_path / path)
    assert train_vae.main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it was live


@pytest.mark.parametrize(
    "name", ["../x", "..", "/tmp/x", "a/b", "a\0b", "", ".x", "-x", "a\nb", "~", "x" * 101, "a\\b"]
)
def test_a_run_name_that_would_leave_its_folder_is_refused(name):
    with pytest.raises(ConfigError, match="plain name"):
        check_run_name(name)
    with pytest.raises(ConfigError, match="plain name"):
        RunOptions(run=name)


def test_a_run_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="symbolic link"), only_writer(tmp_path / "run"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_set_of_packages_is_pinned_and_new_enough():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert metadata.version("ray") == pins["ray"]
    for name, oldest in (("torch", (2, 10)), ("ray", (2, 54))):
        assert tuple(map(int, pins[name].split(".")[:2])) >= oldest
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["dev"][0] == "vae-hyperband[export]"
    asked = [*project["dependencies"], *extras["export"], *extras["dev"][1:]]
    names = {re.match(r"[a-zA-Z0-9-]+", requirement)[0].lower() for requirement in asked}
    assert len(names) > 15
    assert names <= {name.lower() for name in pins}
