"""Command-line options as dataclasses, with one-line errors; runs by their name or path."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from vae_hyperband.commands import wrapped
from vae_hyperband.common.config import NETWORKS, Folders, Places
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.model.checkpoint import BEST
from vae_hyperband.model.networks import allow_network
from vae_hyperband.reporting.runs import best_ckpt

Args = TypeVar("Args")


def parse_options(
    args_type: type[Args], argv: list[str] | None, prog: str, default: Args | None = None
) -> Args:
    """The options of a command, as an instance of the dataclass that declares them.

    The network that ``--network`` names may be imported from here on. Raises :class:`ConfigError`
    with one line for an invalid option. ``--help`` prints and exits.
    """
    # from the command line itself: after parsing, the name may be that of a checkpoint or a file
    network = option_value(sys.argv[1:] if argv is None else argv, "--network")
    if network is not None and network not in NETWORKS:
        allow_network(network)
    optional: dict[str, Any] = {} if default is None else {"default": default}

    def parse() -> Args:
        return tyro.cli(args_type, args=argv, prog=prog, **optional)

    said = io.StringIO()
    # tyro adapts its output to stdout: with this one it prints UTF-8 without colours
    plain = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(plain):
            return parse()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ConfigError(_one_line(said.getvalue(), prog)) from None
    help_text = _AsOnStdout()
    try:
        with _respecting_no_color(), contextlib.redirect_stdout(help_text):
            return parse()  # --help, which exits
    finally:
        print(wrapped(help_text.getvalue()), end="", flush=True)


class _AsOnStdout(io.StringIO):
    """Collects what tyro prints, with the colours and frames that suit the standard output."""

    def __init__(self) -> None:
        super().__init__()
        self._stdout = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stdout.encoding

    def isatty(self) -> bool:
        return self._stdout.isatty()


@contextlib.contextmanager
def _respecting_no_color() -> Iterator[None]:
    """Turn colours off if NO_COLOR is set (no-color.org), which tyro ignores."""
    terminal = os.environ.get("TERM")
    if os.environ.get("NO_COLOR") and terminal is not None:
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if terminal is not None:
            os.environ["TERM"] = terminal


def _one_line(box: str, prog: str) -> str:
    """The message and the suggestion from tyro's framed error text."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    message = " ".join(lines[: next((i for i, x in enumerate(lines) if x.startswith("──")), None)])
    sentence = message.rstrip(".")
    if "Perhaps you meant:" in lines:
        sentence += f" (perhaps you meant {lines[lines.index('Perhaps you meant:') + 1]})"
    return f"{sentence}; see {prog} --help."


def option_value(argv: list[str], option: str) -> str | None:
    """The value of an option, read before tyro reads them all, which needs the defaults.

    None if it is not given, or if its value is missing, for which tyro has the error message.
    """
    found = None
    for word, following in itertools.pairwise([*argv, "-"]):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            value = value if equals else following
            found = None if value.startswith("-") else value
    return found


NETWORK_HELP = (
    "Needed for a run that was trained with a network of your own: package.module:function, the "
    "code that this command may import."
)
#: Of the commands that load a model; those that train have it among the settings of the run.
NetworkOption = Annotated[str | None, tyro.conf.arg(help=NETWORK_HELP)]


# ---- A run, by its name or by a path: the same in every command that takes one

RUN_HELP = (
    "Name of a run (its folder below --checkpoints-dir), or path of its folder or of a checkpoint. "
    "An existing .pt file, or a folder with a best.pt, is preferred to a run of that name."
)
RunArg = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
RunArgs = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="RUN RUN [RUN ...]", help=f"Two or more runs. {RUN_HELP}"),
]


def find_ckpt(run: str, folders: Folders) -> Path:
    """The checkpoint at a path, else the best one of a run.

    Raises :class:`CheckpointError`, which lists the runs there are, and :class:`ConfigError` for
    what cannot be a name. A path that could not be a run is returned as it is, for ``load_ckpt``
    to read or to refuse.
    """
    path = Path(run)
    if _is_ckpt(path):
        return path
    is_file_name = os.path.isfile(path) or path.suffix == ".pt"
    if is_file_name and not os.path.isdir(folders.checkpoints_dir / path):
        return path
    return best_ckpt(find_run(run, folders))


def find_run(run: str, folders: Folders) -> Places:
    """The places of a run or search, which need not exist. A checkpoint's path means its run.

    Raises :class:`ConfigError` for what cannot be a name.
    """
    path = Path(run)
    if _is_ckpt(path):
        path = path.parent
    elif len(path.parts) <= 1 and not (run and os.path.isfile(path / BEST)):
        return Places(run=run, **folders.folders())
    if path.name in ("", ".."):  # "." and "..", whose names are elsewhere
        path = path.resolve()
    return Places(run=path.name, **folders.folders() | {"checkpoints_dir": path.parent})


def _is_ckpt(path: Path) -> bool:
    return path.suffix == ".pt" and os.path.isfile(path)


@dataclass(frozen=True)
class CompletionArgs:
    """Print a shell-completion script for commands, options and their values.

    vae-hyperband completion bash > ~/.vae-hyperband.bash
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """The shell. Then add "source ~/.vae-hyperband.bash" to ~/.bashrc (zsh: ~/.zshrc)."""
