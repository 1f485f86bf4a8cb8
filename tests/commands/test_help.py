"""The help of every command: kept in docs/help.txt, with an example that its own parser takes.

After a change: python tests/commands/test_help.py
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vae_hyperband import train_vae

PATH = Path(__file__).parents[2] / "docs" / "help.txt"
COMMANDS = ["", *train_vae.COMMANDS]


def help_of(command: str) -> str:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            train_vae.main([*command.split(), "--help"])
    return said.getvalue()


def golden() -> str:
    return "\n".join(
        f"$ vae-hyperband {command} --help".replace("  ", " ") + "\n" + help_of(command)
        for command in COMMANDS
    )


def test_the_help_is_the_one_of_the_documentation():
    assert PATH.read_text() == golden()


@pytest.mark.parametrize("command", train_vae.COMMANDS)
def test_every_command_teaches_with_an_example(command):
    parts = PATH.read_text().split(f"$ vae-hyperband {command} --help\n")
    assert len(parts) == 2
    text = parts[1].split("\n$ vae-hyperband ")[0]
    assert re.search(rf"vae-hyperband {command}\b", text[text.index("]") :]), text[:500]


def test_no_colours_where_nobody_sees_them_or_nobody_wants_them():
    assert "\x1b" not in PATH.read_text()
    said = on_terminal("train", "--help", NO_COLOR="1")
    assert b"--latent-dim" in said
    assert b"\x1b" not in said
    assert b"\x1b" in on_terminal("train", "--help", NO_COLOR="")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_a_sentence_on_a_terminal_too(encoding):
    said = on_terminal("train", "--latent-dims", "3", NO_COLOR="", PYTHONIOENCODING=encoding)
    assert said.startswith(b"vae-hyperband: Unrecognized options: --latent-dims, 3 (perhaps")
    assert b"\x1b" not in said


def on_terminal(*argv, **environment):
    """What a command says on a terminal of colours."""
    words = [sys.executable, "-m", "vae_hyperband.train_vae", *argv]
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(words, stdout=slave, stderr=slave, env=environment):
        os.close(slave)
        said = b""
        with contextlib.suppress(OSError):  # its end
            while part := os.read(master, 1 << 16):
                said += part
    os.close(master)
    return said


if __name__ == "__main__":
    PATH.write_text(golden())
