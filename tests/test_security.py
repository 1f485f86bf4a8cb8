"""Nothing runs because it was loaded, nobody outside is listened to, no run leaves its folder."""

import errno
import fcntl
import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vae_hyperband import train_vae
from vae_hyperband.common.checks import check_run_name
from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.errors import ConfigError, RunFolderError
from vae_hyperband.common.files import check_place, write_bytes
from vae_hyperband.common.process import only_writer
from vae_hyperband.training.loop import fit

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


@pytest.mark.parametrize("name", ["con", "NUL", "aux.2", "Com1.x", "lpt9", "a."])
def test_a_run_name_that_windows_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match="no name of a folder on Windows"):
        RunOptions(run=name)
    check_run_name(f"a{name}2")


def test_a_run_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="symbolic link"), only_writer(tmp_path / "run"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("place", ["checkpoints/.a.lock", "logs/a/metrics.jsonl", "logs/.a.lock"])
def test_a_link_in_the_place_of_a_file_of_a_run_leads_nowhere(
    tmp_path, options, small_config, place
):
    """Where a folder is shared, another user may have put one there."""
    precious = tmp_path / "precious.txt"
    precious.write_text("years of work\n")
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(precious)
    if "lock" in place:
        with pytest.raises(RunFolderError, match="cannot be written"):
            fit(small_config, options(), quiet=True)
    else:
        fit(small_config, options(), quiet=True)
    assert precious.read_text() == "years of work\n"


def test_a_lock_that_the_file_system_does_not_have_is_not_somebody_else(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunFolderError, match="No locks available"), only_writer(tmp_path / "run"):
        pass


def test_checkpoints_and_logs_in_one_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the same folder"):
        RunOptions(checkpoints_dir=tmp_path, logs_dir=tmp_path / "x" / "..")


def test_a_file_that_cannot_be_replaced_leaves_no_other(tmp_path):
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(RunFolderError):
        write_bytes(tmp_path / "x.npy", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    with pytest.raises(RunFolderError, match="is a folder"):
        check_place(tmp_path / "x.npy")


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
    installed = ("export", "hub", "search", "track")
    assert extras["dev"][0] == f"vae-hyperband[{','.join(installed)}]"
    asked = [*project["dependencies"], *extras["dev"][1:]]
    asked += [requirement for extra in installed for requirement in extras[extra]]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in asked}
    assert len(names) > 15
    assert names <= {name.lower() for name in pins}
