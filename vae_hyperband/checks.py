"""Settings that are refused: the wrong type, a number out of range, what does not go together."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal

from vae_hyperband.errors import ConfigError


def require(ok: bool, sentence: str) -> None:
    if not ok:
        raise ConfigError(sentence)


def counted(number: int, noun: str) -> str:
    """As a sentence has it: "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def flag(name: str) -> str:
    """The option that gives a setting."""
    return "--" + name.replace("_", "-")


def require_values(name: str, values: tuple[Any, ...]) -> None:
    require(len(values) > 0, f"{flag(name)} names no value to choose from.")
    require(len(set(values)) == len(values), f"{flag(name)} names a value twice: {values}.")


def require_number(name: str, value: float, lowest: float, highest: float = math.inf) -> None:
    require(math.isfinite(value), f"{flag(name)} is {value!r}, but must be a finite number.")
    limit = f"at least {lowest:g}" if highest == math.inf else f"between {lowest:g} and {highest:g}"
    require(
        lowest <= value <= highest,
        f"{flag(name)} is {value!r}, but must be {limit}.",
    )


def check_types(config: Any) -> None:
    """Values of the declared types: JSON and Python callers are not checked by a parser."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _of_type(field.name, getattr(config, field.name), hints[field.name])
        object.__setattr__(config, field.name, value)


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type that a field declares: ints for floats, strings for paths are fine."""
    if type(None) in typing.get_args(hint):  # X | None
        if value is None:
            return None
        [hint] = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{flag(name)} is {value!r}, but must be one of {choices}.")
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
    wanted = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    ok = isinstance(value, wanted) and (hint is bool or not isinstance(value, bool))
    require(ok, f"{name} is {value!r}, but must be of type {hint.__name__}.")
    if dataclasses.is_dataclass(hint):  # checked when it was made
        return value
    try:
        return hint(value)
    except OverflowError:
        raise ConfigError(f"{name} is {value!r}, which is too large.") from None
