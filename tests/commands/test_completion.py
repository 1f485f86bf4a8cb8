"""The completion script in a real shell."""

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import time

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
        "complete -p vae-hyperband > /dev/null || exit 1; _vae_hyperband; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout != "\n" else []


SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}


def shown(shell, script, folder, text, line):
    """Whether a person who types that, with tabs, into a shell in that folder sees that line."""
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(folder), "PS1": "$ "}
        os.execvpe(SHELLS[shell][0], SHELLS[shell], environment)
    said = b""

    def until(end, seconds=30.0):
        nonlocal said
        deadline = time.monotonic() + seconds
        while end not in said and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    said += os.read(terminal, 1 << 16)
        return end in said

    try:
        os.write(terminal, f"source {script}; echo rea''dy\n".encode())
        assert until(b"ready\r\n")
        said = b""
        os.write(terminal, text.encode())
        return until(line.encode())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vae-hyperband da\t", "vae-hyperband data "),  # and not the folder
        ("vae-hyperband evaluate che\t", "vae-hyperband evaluate checkpoints/"),
        ("vae-hyperband evaluate my\t", "vae-hyperband evaluate my\\ model.pt "),
        ("vae-hyperband train --latent-d\t", "vae-hyperband train --latent-dim "),
        ("vae-hyperband export --format saf\t", "vae-hyperband export --format safetensors "),
        ("vae-hyperband report be\t", "vae-hyperband report betas-1 "),
        ("vae-hyperband train --run be\t", "vae-hyperband train --run betas-1 "),
        ("vae-hyperband compare betas-1 mi\t", "vae-hyperband compare betas-1 mine "),
        (
            "vae-hyperband report betas-1 --out my\t",
            "vae-hyperband report betas-1 --out my\\ model.pt ",
        ),
    ],
)
def test_a_tab_completes_what_a_person_means(shell, text, line, scripts, tmp_path):
    for folder in ("data", "checkpoints/betas-1", "logs/betas-1", "logs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "my model.pt").touch()
    assert shown(shell, scripts / shell, tmp_path, text, line)


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
    (tmp_path / "my model.pt").touch()
    assert completed(scripts, "evaluate", "be") == ["best.pt"]
    assert completed(scripts, "evaluate", "my") == ["my model.pt"]
    assert completed(scripts, "export", "--format", "") == ["web", "onnx", "safetensors"]
    assert completed(scripts, "evaluate", "--parts", "la") == ["latents"]
