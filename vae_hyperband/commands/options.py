"""Command-line options as dataclasses, with one-line errors; runs by their name or path."""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from vae_hyperband.commands import wrapped
from vae_hyperband.common.checks import perhaps, read_settings, require, typed
from vae_hyperband.common.config import NETWORKS, Folders, Places, former_holdout, in_effect
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.search.space import Space, read_space

Args = TypeVar("Args")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """The option ``--config``, which every command with settings has."""

    config: Path | None = None
    """TOML or JSON file of options, such as epochs = 5; those on the command line win over it."""


#: How tyro reads and shows what is not a plain value.
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _space_file(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Space] | None:
    """A search space is the content of the file that its option names."""
    if info.type is not Space:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda words: read_space(Path(words[0])),
        is_instance=lambda value: isinstance(value, Space),
        str_from_instance=lambda space: [" ".join(space)],  # the settings that it has
    )


def parse_options(
    args_type: type[Args], argv: list[str] | None, prog: str, default: Args | None = None
) -> Args:
    """The options of a command, as an instance of the dataclass that declares them.

    What is not given is that of the file that ``--config`` names, else of ``default``, else usual.
    The network that ``--network`` names may be imported from here on. Raises :class:`ConfigError`
    with one line for an invalid option. ``--help`` prints and exits.
    """
    words = sys.argv[1:] if argv is None else argv
    # from the command line itself: after parsing, the name may be that of a checkpoint or a file
    network = option_value(words, "--network")
    if network is not None and network not in NETWORKS:
        from vae_hyperband.model.networks import allow_network  # PyTorch takes a second

        allow_network(network)
    file = option_value(words, "--config") if issubclass(args_type, ConfigFile) else None
    if file is None:
        return _parsed(args_type, words, prog, default)
    path = Path(file)
    of_file = with_settings(args_type, file_options(path), f"{path}", prog)
    try:
        return _parsed(args_type, words, prog, of_file)
    except ConfigError as error:
        # the file is at fault, or goes not with the options, where these alone say something else
        try:
            _parsed(args_type, words, prog, default)
        except ConfigError as alone:
            if str(alone) == str(error):
                raise error from None
        raise ConfigError(f"{path}: {error}") from None


def _parsed(args_type: type[Args], argv: list[str], prog: str, default: Args | None) -> Args:
    def parse() -> Args:
        if default is None:
            return tyro.cli(args_type, args=argv, prog=prog, registry=REGISTRY)
        return tyro.cli(args_type, args=argv, prog=prog, registry=REGISTRY, default=default)

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


#: What best_config.json has beside the settings of the run: where, and on what it was computed.
WHERE_BEST = ("device", "num_threads", "data")


def file_options(path: Path) -> Mapping[str, object]:
    """The options in a file that ``--config`` names, by name, those of best_config.json too."""
    content = read_settings(path)
    best = content.get("config")
    if isinstance(best, dict):  # a best_config.json, maybe of 0.1: its settings, and where they ran
        options = {name: content[name] for name in WHERE_BEST if name in content}
        return {"holdout": former_holdout(best.get("dataset")), **in_effect(best), **options}
    options = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        require(name not in options, f"{path} has {name} twice.")
        options[name] = value
    return options


def with_settings(
    args_type: type[Args], settings: Mapping[str, object], source: str, prog: str
) -> Args:
    """Options as defaults for tyro: those in ``settings``, and the usual ones.

    Raises :class:`ConfigError` for an unknown name or a wrong type. What goes with what is not
    checked, since options on the command line may still change it.
    """
    names = set(_option_names(args_type)) - {"config"}
    for name in settings:
        require(
            name in names,
            f"{source} has {name}, which is no option of {prog}{perhaps(name, names)}: "
            f"{prog} --help lists them.",
        )
    try:
        return _unchecked(args_type, settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _option_names(kind: Any) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(hints[field.name])
        yield from _option_names(hints[field.name]) if nested else (field.name,)


def _unchecked(kind: Any, settings: Mapping[str, object]) -> Any:
    """A dataclass of options without the checks that its constructor makes."""
    made = object.__new__(kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value: Any = tyro.MISSING
        if dataclasses.is_dataclass(hints[field.name]):
            value = _unchecked(hints[field.name], settings)
        elif settings.get(field.name) is not None:
            given = settings[field.name]
            if field.name == "space" and isinstance(given, str):
                value = read_space(Path(given))
            elif field.name == "space" and isinstance(given, Mapping):
                value = Space.from_dict(given)
            else:
                value = typed(kind, field.name, given)
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        object.__setattr__(made, field.name, value)
    return made


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


NETWORK_HELP = (
    "Needed for a run that was trained with a network of your own: package.module:function, the "
    "code that this command may import."
)
#: Of the commands that load a model; those that train have it among the settings of the run.
NetworkOption = Annotated[str | None, tyro.conf.arg(help=NETWORK_HELP)]


# ---- A run, by its name or by a path: the same in every command that takes one

RUN_HELP = (
    "Name of a run (its folder below --checkpoints-dir), or path of its folder or of a checkpoint. "
    "An existing .pt file, or a folder with a best.pt, is preferred to a run of that name. "
    "pretrained:images and pretrained:bound come with the package."
)
RunArg = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
RunArgs = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="RUN RUN [RUN ...]", help=f"Two or more runs. {RUN_HELP}"),
]


def find_ckpt(run: str, folders: Folders) -> Path:
    """The checkpoint at a path, the best one of a run, or that of a model in the package.

    Raises :class:`CheckpointError`, which lists the runs there are, and :class:`ConfigError` for
    what cannot be a name. A path that could not be a run is returned as it is, for ``load_ckpt``
    to read or to refuse.
    """
    from vae_hyperband.export.pretrained import PREFIX, pretrained_ckpt
    from vae_hyperband.reporting.runs import best_ckpt

    if run.startswith(PREFIX):
        return pretrained_ckpt(run.removeprefix(PREFIX))
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
    from vae_hyperband.export.pretrained import PREFIX
    from vae_hyperband.model.checkpoint import BEST

    require(
        not run.startswith(PREFIX),
        f"{run} is a model of the package, without logs: train --preset "
        f"{run.removeprefix(PREFIX)} makes a run like it.",
    )
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
