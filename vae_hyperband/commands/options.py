"""Reading command lines: dataclasses in, one sentence out where a user mistyped."""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro

from vae_hyperband.common.errors import ConfigError

Args = TypeVar("Args")


def parse_options(
    args_type: type[Args], argv: list[str] | None, prog: str, default: Args | None = None
) -> Args:
    """The options of a command, as the dataclass that declares them.

    Raises :class:`ConfigError` with one sentence for a wrong one. ``--help`` prints and exits.
    """
    optional: dict[str, Any] = {} if default is None else {"default": default}

    def parse() -> Args:
        return tyro.cli(args_type, args=argv, prog=prog, **optional)

    said = io.StringIO()
    # what tyro says depends on stdout: like this, its frames are lines of UTF-8 without colours
    plain = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(plain):
            return parse()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ConfigError(_one_sentence(said.getvalue(), prog)) from None
    with _colours_as_wanted():
        return parse()  # --help, which exits


@contextlib.contextmanager
def _colours_as_wanted() -> Iterator[None]:
    """None where NO_COLOR is set (no-color.org), which tyro does not look at."""
    terminal = os.environ.get("TERM")
    if os.environ.get("NO_COLOR") and terminal is not None:
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if terminal is not None:
            os.environ["TERM"] = terminal


def _one_sentence(box: str, prog: str) -> str:
    """The message and the suggestion out of tyro's framed error text."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = " ".join(lines[: next((i for i, x in enumerate(lines) if x.startswith("──")), None)])
    sentence = message.rstrip(".")
    if "Perhaps you meant:" in lines:
        sentence += f" (perhaps you meant {lines[lines.index('Perhaps you meant:') + 1]})"
    return f"{sentence}; see {prog} --help."


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script that completes commands, options and their values in a shell.

    vae-hyperband completion bash > ~/.vae-hyperband.bash
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """Whose script; "source ~/.vae-hyperband.bash" then goes into ~/.bashrc (zsh: ~/.zshrc)."""
