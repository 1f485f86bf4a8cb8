"""Settings in general: how they are named, read from files and checked; every message one sentence.

The settings themselves are in :mod:`~vae_hyperband.common.config`.
"""

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from vae_hyperband.common.errors import ConfigError


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def plural(number: int, noun: str) -> str:
    """A count with its noun: "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def perhaps(name: str, names: Iterable[str]) -> str:
    """ " (perhaps you meant ...)" with the nearest of some names; empty if none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (perhaps you meant {near[0]})" if near else ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises :class:`ConfigError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    require(isinstance(content, dict), f"{path} does not hold a JSON object.")
    return content


def read_settings(path: Path) -> dict[str, object]:
    """The settings in a TOML or JSON file. Raises :class:`ConfigError` if there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read: {why}.") from error
    # by its content where its name does not say: a JSON object begins with a brace, no TOML does
    is_json = path.suffix == ".json" or (path.suffix != ".toml" and text.lstrip().startswith("{"))
    try:
        content = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:  # both say the line
        raise ConfigError(
            f"{path} is not valid {'JSON' if is_json else 'TOML'}: {error}."
        ) from error
    require(isinstance(content, dict), f"{path} does not hold a JSON object of settings.")
    return content


def require(ok: bool, message: str) -> None:
    """Raise :class:`ConfigError` unless ``ok``."""
    if not ok:
        raise ConfigError(message)


def require_values(name: str, values: tuple[Any, ...]) -> None:
    """Require at least one value, and none twice."""
    require(len(values) > 0, f"{flag(name)} is empty, but needs at least one value.")
    require(len(set(values)) == len(values), f"{flag(name)} has a value twice: {values}.")


def require_number(name: str, value: float, lowest: float, highest: float = math.inf) -> None:
    """Require a finite number within limits, both inclusive."""
    require(math.isfinite(value), f"{flag(name)} is {value!r}, but must be a finite number.")
    limit = f"at least {lowest:g}" if highest == math.inf else f"between {lowest:g} and {highest:g}"
    require(
        lowest <= value <= highest,
        f"{flag(name)} is {value!r}, but must be {limit}.",
    )


#: Names of devices on Windows, with any ending.
DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in range(10)
}


def check_run_name(name: str) -> None:
    """Refuse names that would leave their folder: separators, "..", NUL, a leading dot or dash.

    Also those that Windows does not have, so that every folder of a run can be copied there.
    """
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=")
    require(
        0 < len(name) <= 100 and set(name) <= allowed and name[0] not in ".-",
        f"The run is called {name!r}, but needs a plain name: at most 100 letters, digits and "
        ". _ - + =, not starting with a dot or a dash.",
    )
    require(
        name[-1] != "." and name.partition(".")[0].lower() not in DEVICES,
        f"The run is called {name!r}, which is no name of a folder on Windows: choose another "
        "--run.",
    )


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from "64" or "48x32". Raises :class:`ConfigError`."""
    sides = text.lower().split("x")
    sizes = tuple(int(side) for side in sides if side.isascii() and side.isdecimal())
    require(
        len(sizes) == len(sides) <= 2 and all(1 <= size <= 4096 for size in sizes),
        f"--image-size is {text!r}, but must be a side such as 64, or height and width such as "
        "48x32.",
    )
    return sizes[0], sizes[-1]


def check_types(config: Any) -> None:
    """Require values of the declared types: no parser has checked those from JSON or Python."""
    for field in dataclasses.fields(config):
        value = typed(type(config), field.name, getattr(config, field.name))
        object.__setattr__(config, field.name, value)


def typed(kind: type, name: str, value: object) -> Any:
    """``value`` as a field of the dataclass ``kind`` has it. Raises :class:`ConfigError`."""
    return _of_type(name, value, _hints(kind)[name])


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields: finding them takes longer than checking the values."""
    return typing.get_type_hints(kind)


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """``value`` as a field's declared type.

    Taken for it: integers for floats, strings for paths, and numpy's numbers for Python's.
    """
    several = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):  # X | None
            return None
        choices = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(choices) > 1:  # a list, or one of some words
            word = several = isinstance(value, str)
            choices = [kind for kind in choices if (typing.get_origin(kind) is Literal) == word]
        [hint] = choices
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        others = " (or a list)" if several else ""
        require(value in words, f"{flag(name)} is {value!r}, but must be one of {words}{others}.")
        return value
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        require(isinstance(value, tuple | list), f"{name} is {value!r}, but must be a list.")
        if Ellipsis in kinds:
            kinds = (kinds[0],) * len(value)
        require(
            len(value) == len(kinds), f"{name} is {value!r}, but must have {len(kinds)} values."
        )
        return tuple(_of_type(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if hint is str and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = str(value)  # as --image-size 32 in a file, or from Python
    wanted = {float: numbers.Real, int: numbers.Integral, Path: (str, os.PathLike)}.get(hint, hint)
    if hint is bool and type(value).__name__ in (
        "bool",
        "bool_",
    ):  # numpy's is no subclass of Python's
        wanted = type(value)
    ok = isinstance(value, cast(Any, wanted)) and (hint is bool or not isinstance(value, bool))
    require(ok, f"{name} is {value!r}, but must be of type {hint.__name__}.")
    if dataclasses.is_dataclass(hint):  # its own __post_init__ has checked it
        return value
    try:
        return hint(value)
    except OverflowError:
        raise ConfigError(f"{name} is {value!r}, which is too large.") from None
