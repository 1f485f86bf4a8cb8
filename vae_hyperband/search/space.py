"""The space of a search: settings of a run by name, each a choice, a range or a log range.

``space.toml`` has a line for each setting; docs/search.md explains it::

    latent_dim = {choice = [16, 32, 64]}
    learning_rate = {log_range = [5e-4, 1e-2]}
    objective = "free-bits"
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from vae_hyperband.common.checks import flag, perhaps, read_settings, require, typed
from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError

#: What a setting of a run can be.
Value = str | int | float | bool | tuple["Value", ...]

#: Settings that are not searched, and why.
_SAME_IMAGES = "all trials have the same images, those of {flag}"
NOT_SEARCHED = {
    "dataset": _SAME_IMAGES,
    "holdout": _SAME_IMAGES,
    "image_size": _SAME_IMAGES,
    "fit": _SAME_IMAGES,
    "channels": _SAME_IMAGES,
    "epochs": "--max-epochs has the epochs of a trial",
    "seed": "all trials have the seed of the search, --seed",
    "val_interval": "trials validate after every epoch",
    "iwae_samples": "--metric iwae decides it",
    "fid_samples": "--metric fid decides it",
}


# ---- Domains: the values that a setting may take


@dataclass(frozen=True)
class Choice:
    """One of a few values, each as likely as the others."""

    values: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.values

    def nearest(self, value: object) -> Value:
        """``value``, or the first one if it is not in the domain."""
        return next((each for each in self.values if each == value), self.values[0])

    def sample(self, random: np.random.RandomState) -> Value:
        # this call and those below are part of the result: tests/golden/suggestions.json
        return self.values[int(random.choice(len(self.values), size=1)[0])]

    def grid(self, num: int) -> tuple[Value, ...]:
        """The values that a grid has."""
        return self.values

    def to_dict(self) -> dict[str, object]:
        """As space.toml has it."""
        return {"choice": _as_lists(self.values)}


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, both included, uniformly; integers if the ends are."""

    low: float
    high: float

    @property
    def integer(self) -> bool:
        return isinstance(self.low, int)

    @property
    def ends(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def nearest(self, value: object) -> Value:
        """``value``, or the end that is nearer; the lower end for what is no number."""
        return self._within(value) if isinstance(value, int | float) else self.low

    def sample(self, random: np.random.RandomState) -> Value:
        # numpy leaves the upper end out
        if self.integer:
            return int(random.randint(int(self.low), int(self.high) + 1))
        return self._within(random.uniform(self.low, self.high, size=1)[0])

    def grid(self, num: int) -> tuple[Value, ...]:
        """That many values, evenly spaced from end to end; fewer if there are fewer integers."""
        return self._distinct(np.linspace(self.low, self.high, num))

    def to_dict(self) -> dict[str, object]:
        """As space.toml has it."""
        return {"range": [self.low, self.high]}

    def _within(self, value: float) -> float:
        """Cut off at the ends, which rounding may miss by a bit."""
        cut = min(max(value, self.low), self.high)
        return round(cut) if self.integer else float(cut)

    def _distinct(self, points: np.ndarray) -> tuple[Value, ...]:
        # integers that are rounded may be equal; a grid tries each once
        return tuple(dict.fromkeys(self._within(point) for point in points.tolist()))


@dataclass(frozen=True)
class LogRange(Range):
    """Numbers between two ends above 0, log-uniformly: 1 to 2 is as likely as 2 to 4."""

    def sample(self, random: np.random.RandomState) -> Value:
        # integers: half a step beyond each end, so that rounding makes no end rarer
        margin = 0.5 if self.integer else 0
        low, high = np.log(self.low - margin), np.log(self.high + margin)
        return self._within(float(np.exp(random.uniform(low, high, size=1))[0]))

    def grid(self, num: int) -> tuple[Value, ...]:
        """That many values, evenly spaced on the log scale; fewer if there are fewer integers."""
        return self._distinct(np.geomspace(self.low, self.high, num))

    def to_dict(self) -> dict[str, object]:
        """As space.toml has it."""
        return {"log_range": [self.low, self.high]}


Domain = Choice | Range | LogRange
_KINDS = ("choice", "range", "log_range")


# ---- A space, and a point in it


Item = TypeVar("Item")


class Named(Mapping[str, Item]):
    """Values by name, in order, that do not change and can be hashed."""

    def __init__(self, items: Mapping[str, Item]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> Item:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))  # two of another order are equal

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


class Hyperparameters(Named[Value]):
    """What a search chooses for one trial, by name; all other settings are the same in all."""

    def __init__(self, **values: Value) -> None:
        super().__init__(values)

    def to_dict(self) -> dict[str, object]:
        """As JSON files and Ray have them: lists in place of tuples."""
        return {name: _as_lists(value) for name, value in self.items()}

    def replace(self, **changes: Value) -> Self:
        """The same with some values changed."""
        return type(self)(**{**self, **changes})


class Space(Named[Domain]):
    """The domains of the settings that ``--space`` names.

    Their order is that of the names: it decides which random number a setting gets, and neither
    the order of lines in a file nor a later version's settings may change that.
    """

    def __init__(self, items: Mapping[str, Domain]) -> None:
        super().__init__({name: items[name] for name in sorted(items)})

    @classmethod
    def from_dict(
        cls,
        content: Mapping[str, object],
        source: str = "The space",
        kind: type[TrainConfig] = TrainConfig,
    ) -> Self:
        """The space that a TOML file or a search's settings hold.

        Raises :class:`ConfigError`, which begins with ``source``, for a name that is no setting of
        ``kind``, a setting that is not searched, or values that are not of its type.
        """
        names = [field.name for field in dataclasses.fields(kind)]
        domains = {}
        for key, value in content.items():
            name = key.replace("-", "_")
            require(
                name in names,
                f"{source} has {key}, which is no setting of a run{perhaps(name, names)}: "
                "vae-hyperband train --help lists them.",
            )
            require(name not in domains, f"{source} has {name} twice.")
            why = NOT_SEARCHED.get(name, "").format(flag=flag(name))
            require(not why, f"{source} has {name}, which is not searched: {why}.")
            try:
                domains[name] = _domain(kind, name, value)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
        return cls(domains)

    def to_dict(self) -> dict[str, object]:
        """The inverse of :meth:`from_dict`."""
        return {name: domain.to_dict() for name, domain in self.items()}


def read_space(path: Path) -> Space:
    """The space in a TOML (or JSON) file. Raises :class:`ConfigError`."""
    content = read_settings(path)
    require(len(content) > 0, f"{path} is empty, but must name at least one setting.")
    return Space.from_dict(content, str(path))


def _domain(kind: type[TrainConfig], name: str, content: object) -> Domain:
    """The domain that a line of space.toml describes; a plain value is the only choice."""
    if not isinstance(content, Mapping):
        return Choice((typed(kind, name, content),))
    require(
        len(content) == 1 and set(content) <= set(_KINDS),
        f"{name} is {content!r}, but must be a value, or have one of {', '.join(_KINDS)}.",
    )
    [(word, given)] = content.items()
    require(isinstance(given, list | tuple), f"{word} of {name} is {given!r}, but must be a list.")
    values = tuple(typed(kind, name, each) for each in given)
    if word == "choice":
        require(len(values) > 0, f"The choice of {name} is empty, but needs at least one value.")
        require(len(set(values)) == len(values), f"The choice of {name} has a value twice.")
        return Choice(values)
    # a bool is an int to Python, but has no values between its two
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    require(numbers, f"{name} is no number and has no {word}: give it a choice.")
    # a NaN is refused, too: it compares as false
    require(
        len(values) == 2 and -np.inf < values[0] < values[1] < np.inf,
        f"The {word} of {name} is {list(given)}, but must be two numbers, lowest < highest.",
    )
    if word == "range":
        return Range(*values)
    require(
        values[0] > 0,
        f"The log_range of {name} begins at {values[0]}, but must be above 0: give it a range.",
    )
    return LogRange(*values)


def _as_lists(value: object) -> object:
    return [_as_lists(each) for each in value] if isinstance(value, tuple) else value


def shown(value: object) -> str:
    """A setting's value as tables and figures show it: numbers in full if short, else 4 digits."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else f"{value:.4g}"
    return str(value)


_SHORT = {"latent_dim": "latent", "learning_rate": "lr", "batch_size": "batch"}


def describe(hyperparameters: Hyperparameters) -> str:
    """The hyperparameters in a few words."""
    return ", ".join(
        f"{_SHORT.get(name, name)} {shown(value)}" for name, value in hyperparameters.items()
    )
