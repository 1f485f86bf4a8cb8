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


def help_of(command: str, columns: int = 100) -> str:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
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


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_is_wider_than_the_terminal(command, columns):
    assert [line for line in help_of(command, columns).splitlines() if len(line) > columns] == []


def test_wrapping_changes_no_word():
    for command in COMMANDS:
        wide, narrow = help_of(command, 300), help_of(command, 60)
        narrow = "".join(narrow.replace("\\\n", "").split())
        # tyro itself fits what is in frames
        above = re.split(r"^ (?:options|positional arguments) ", wide, flags=re.MULTILINE)[0]
        for line in above.splitlines():
            assert "".join(line.split()) in narrow


def test_an_example_that_is_wrapped_can_be_pasted_to_a_shell():
    example = "vae-hyperband sample mine --sampler flow --label sneaker --out samples.png"
    assert f"\n{example}\n" in help_of("sample", 80)
    said = help_of("sample", 60)
    assert example not in said
    code = "vae-hyperband() { echo vae-hyperband $@; }\n" + said.split("\n\n")[2]
    assert subprocess.check_output(["bash", "-c", code], text=True).strip() == example


def test_help_on_a_coloured_terminal_is_wrapped_too():
    said = on_terminal("search", "--help", NO_COLOR="", COLUMNS="60").decode()
    lines = re.sub(r"\x1b\[[\d;]*m", "", said).splitlines()
    assert max(map(len, lines)) == 60  # the frames fill it
    assert said.count("\x1b") > 100


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
