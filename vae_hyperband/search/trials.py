"""What each trial of a search did, and ``trials.json``, which keeps it. Reading it needs no Ray."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict

from vae_hyperband.common.checks import read_json
from vae_hyperband.common.config import TrainConfig, former_holdout
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import write_text
from vae_hyperband.search.config import Metric, SearchConfig
from vae_hyperband.search.space import Hyperparameters, describe

# Files of a search's folder: its settings, its decision log, its result, and the best trial's best
# checkpoint.
SETTINGS_FILE, DECISIONS = "search.json", "decisions.jsonl"
RESULT, WINNER = "trials.json", "winner.pt"


class ValidationRow(TypedDict):
    """What a trial reports after an epoch: losses in nats per image, means over the split."""

    step: int
    epoch: int
    recon_loss: float
    KL_divergence: float
    total_loss: float  # what the trial minimises, with its own beta
    bound: float  # at beta = 1
    iwae: NotRequired[float]  # if it is the metric
    fid: NotRequired[float]


Column = Literal[
    "step", "epoch", "recon_loss", "KL_divergence", "total_loss", "bound", "iwae", "fid"
]
Outcome = Literal["finished", "stopped", "failed"]


class TrialDict(TypedDict):
    """A trial in ``trials.json``. The keys are those of version 0.1, "drawn" among them."""

    number: int
    drawn: Mapping[str, object]
    rows: list[ValidationRow]
    outcome: Outcome | None
    why: str


def trial_name(number: int) -> str:
    """The trial's folder under ``trials/`` and under the search's logs."""
    return f"trial_{number:03d}"


@dataclass
class TrialRecord:
    """One trial: its hyperparameters, its validations, how it ended and why."""

    number: int
    hyperparameters: Hyperparameters
    rows: list[ValidationRow] = field(default_factory=list)  # one per epoch, from the first on
    outcome: Outcome | None = None  # None: not ended yet
    why: str = ""

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def num_epochs(self) -> int:
        """Epochs trained and reported so far."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def summary(self) -> str:
        """How far the trial got, how it ended and why, in one line."""
        if self.outcome == "failed":  # "why" says when; what was tried helps to avoid it
            return f"{self.name} failed: {self.why} ({describe(self.hyperparameters)})"
        why = f": {self.why}" if self.why else ""
        return f"{self.name} {self.outcome or 'is'} at epoch {self.num_epochs}{why}"

    def curve(self, column: Column) -> list[float]:
        """One value per epoch."""
        return [row[column] for row in self.rows]

    @property
    def best_row(self) -> ValidationRow | None:
        """The validation with the lowest total_loss: what the trial's best.pt holds."""
        if self.outcome == "failed" or not self.rows:
            return None
        return min(self.rows, key=lambda row: row["total_loss"])

    def score(self, metric: Metric) -> float:
        """What the trial is ranked by, lower is better; infinity if it failed."""
        # of the best checkpoint, not the lowest of the curve: with a beta other than 1 these may be
        # different epochs, and only the checkpoint can be evaluated and used
        return self.best_row[metric] if self.best_row else math.inf

    def to_dict(self) -> TrialDict:
        """The trial as ``trials.json`` holds it."""
        return {
            "number": self.number,
            "drawn": self.hyperparameters.to_dict(),
            "rows": self.rows,
            "outcome": self.outcome,
            "why": self.why,
        }

    @classmethod
    def from_dict(cls, record: TrialDict, config: SearchConfig) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises :class:`KeyError` if something is missing, :class:`ValueError` for hyperparameters of
        another search.
        """
        return cls(
            record["number"],
            config.hyperparameters(record["drawn"]),
            record["rows"],
            record["outcome"],
            record["why"],
        )


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search so far, in the order of their numbers, and which of them won."""

    config: SearchConfig
    trials: list[TrialRecord]
    folder: Path
    importance: dict[str, float] | None = None  # of each hyperparameter, adding up to 1

    @property
    def finished(self) -> bool:
        """Whether all trials were suggested and have ended."""
        ended = sum(trial.outcome is not None for trial in self.trials)
        return ended == self.config.total_trials

    @functools.cached_property
    def winner(self) -> TrialRecord:
        """The trial with the lowest score; the first one of equals."""
        # min() keeps the first of equals, so the order of arrival decides nothing
        return min(self.trials, key=lambda trial: trial.score(self.config.metric))

    @property
    def best_score(self) -> float:
        return self.winner.score(self.config.metric)

    @property
    def best_config(self) -> TrainConfig:
        """The winner's full configuration, with the epochs of the search."""
        return self.config.trial_config(self.winner.hyperparameters)

    def with_outcome(self, outcome: Outcome) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.outcome == outcome]

    @property
    def epochs_spent(self) -> int:
        return sum(trial.num_epochs for trial in self.trials)

    @property
    def epochs_saved(self) -> int:
        """Epochs that running the stopped trials to their end would have cost on top."""
        # failed trials are left out: they did not stop early, they could not go any further
        max_epochs = self.config.max_epochs
        return sum(max_epochs - trial.num_epochs for trial in self.with_outcome("stopped"))


def write_result(result: SearchResult) -> None:
    """Write ``trials.json``; its existence is what says that a search has finished."""
    content = {
        "search": result.config.to_dict(),
        "trials": [trial.to_dict() for trial in result.trials],
        "importance": result.importance,
    }
    write_text(result.folder / RESULT, json.dumps(content, indent=1) + "\n")


def config_of(settings: Mapping[str, Any]) -> SearchConfig:
    """The configuration of a search from its settings as search.json or trials.json has them.

    Raises what a dictionary of another kind leads to: :class:`TypeError`, :class:`ConfigError`.
    """
    settings = {k: v for k, v in settings.items() if k not in ("id", "data", "storage")}
    return SearchConfig(**{"holdout": former_holdout(settings.get("dataset")), **settings})


def read_result(folder: Path) -> SearchResult:
    """The result of a finished search. Raises :class:`ConfigError` if there is none."""
    content = read_json(folder / RESULT)
    try:
        config = config_of(content["search"])
        trials = [TrialRecord.from_dict(record, config) for record in content["trials"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / RESULT} is damaged: it holds no result of a search."
        ) from error
    return SearchResult(config, trials, folder, content.get("importance"))
