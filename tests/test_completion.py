"""The completion script in a real shell."""

import contextlib
import shutil
import subprocess

import pytest

from vae_hyperband.train_vae import COMMANDS, main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A file for each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        with open(folder / shell, "w") as file, contextlib.redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return folder


def completed(scripts, *words):
    """What bash offers for the last of the words."""
    asked = " ".join(f'"{word}"' for word in ("vae-hyperband", *words))
    code = (
        f"source {scripts / 'bash'}; COMP_WORDS=({asked}); COMP_CWORD={len(words)}; "
        'complete -p vae-hyperband > /dev/null || exit 1; _vae_hyperband; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_completed(scripts):
    assert completed(scripts, "") == list(COMMANDS)
    assert completed(scripts, "ev") == ["evaluate"]
    assert completed(scripts, "none") == []


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["train", "--lat"], ["--latent-dim"]),
        (["train", "--run", "a", "--resume"], ["--resume-ckpt"]),
        (["search", "--dry"], ["--dry-run"]),
        (["search", "--no-f"], ["--no-fresh"]),
        (["evaluate", "--spl"], ["--split"]),
        (["compare", "--jso"], ["--json"]),
        (["data", "--latent"], []),
    ],
)
def test_options_are_those_of_the_command(scripts, words, offered):
    assert completed(scripts, *words) == offered


def test_every_command_has_options_to_offer(scripts):
    for command in COMMANDS:
        offered = completed(scripts, command, "--")
        assert "--help" in offered
        assert all(option.startswith("--") for option in offered)


def test_files_are_completed(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").touch()
    assert completed(scripts, "evaluate", "be") == ["best.pt"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_takes_its_script(scripts):
    code = f"source {scripts / 'zsh'}; whence -w _vae_hyperband"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True)
    assert "function" in done.stdout
