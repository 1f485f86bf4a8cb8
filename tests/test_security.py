"""Nothing runs because it was loaded, nobody outside is listened to, no run leaves its folder."""

import contextlib
import os
import re
import socket
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import command_line
from killing import descendants

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


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which those processes wait for TCP connections or UDP packets."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(handle))
            except OSError:
                continue
            inodes |= {found[1]} if found else set()
    addresses = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6), ("udp", 2)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            waits = fields[3] == "0A" or table == "udp"
            if waits and fields[9] in inodes:
                address, port = fields[1].split(":")
                raw = bytes.fromhex(address)
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                addresses.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return addresses


def test_every_listening_socket_of_a_search_is_on_loopback(tmp_path, small_data):
    command = command_line(
        "search", "--run", "s", "--data-dir", small_data, "--device", "cpu", "--dataset", "custom",
        "--batch-sizes", 32, "--num-trials", 2, "--max-epochs", 9, "--scheduler", "none",
    )  # fmt: skip
    seen: set[tuple[str, int]] = set()
    titles: set[str] = set()
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if "epoch" in line:  # the driver, Ray's servers and the workers are all there
                pids = descendants(process.pid)
                seen |= set(listening(pids))
                for pid in pids:
                    with contextlib.suppress(OSError):
                        titles.add(Path(f"/proc/{pid}/cmdline").read_text())
    assert process.returncode == 0
    assert seen
    assert any("raylet" in title for title in titles)
    assert {address for address, _ in seen} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert 8265 not in {port for _, port in seen}  # Ray's dashboard


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
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[a-zA-Z0-9-]+", requirement)[0].lower() for requirement in asked}
    assert len(names) > 15
    assert names <= {name.lower() for name in pins}
