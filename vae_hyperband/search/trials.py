"""What each trial of a search did, and ``trials.json``, which keeps it. Reading it needs no Ray."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vae_hyperband.common.config import TrainConfig, read_json
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import write_text
from vae_hyperband.search.config import SearchConfig

ASKED, RESULT, WINNER = "search.json", "trials.json", "winner.pt"  # files of a search

Row = dict[str, Any]  # of one validation: epoch, step, and losses in nats per image
Outcome = Literal["finished", "stopped", "failed"]


def trial_name(number: int) -> str:
    return f"trial_{number:03d}"


@dataclass
class TrialRecord:
    """One trial: the hyperparameters drawn for it, its validations, how it ended and why."""

    number: int
    drawn: dict[str, Any]
    rows: list[Row] = field(default_factory=list)  # one per epoch, from the first on
    outcome: Outcome | None = None  # None: not ended yet
    why: str = ""

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def num_epochs(self) -> int:
        return self.rows[-1]["epoch"] if self.rows else 0

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]

    @property
    def best_row(self) -> Row | None:
        """The validation with the lowest total_loss: what the trial's best.pt holds."""
        if self.outcome == "failed" or not self.rows:
            return None
        return min(self.rows, key=lambda row: row["total_loss"])

    def score(self, metric: str) -> float:
        """What the trial is ranked by, lower is better; infinity if it failed."""
        return self.best_row[metric] if self.best_row else math.inf


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in the order they were drawn, and the configuration that won."""

    config: SearchConfig
    trials: list[TrialRecord]
    folder: Path
    importance: dict[str, float] | None = None  # of each hyperparameter, adding up to 1

    @property
    def winner(self) -> TrialRecord:
        # the first one where two are equal
        return min(self.trials, key=lambda trial: trial.score(self.config.metric))

    @property
    def best_score(self) -> float:
        return self.winner.score(self.config.metric)

    @property
    def best_config(self) -> TrainConfig:
        return self.config.trial_config(self.winner.drawn)

    def with_outcome(self, outcome: Outcome) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.outcome == outcome]

    @property
    def epochs_spent(self) -> int:
        return sum(trial.num_epochs for trial in self.trials)

    @property
    def epochs_saved(self) -> int:
        """Epochs that running the stopped trials to their end would have cost on top."""
        max_epochs = self.config.max_epochs
        return sum(max_epochs - trial.num_epochs for trial in self.with_outcome("stopped"))


def write_result(result: SearchResult) -> None:
    content = {
        "search": result.config.to_dict(),
        "trials": [dataclasses.asdict(trial) for trial in result.trials],
        "importance": result.importance,
    }
    write_text(result.folder / RESULT, json.dumps(content, indent=1) + "\n")


def read_result(folder: Path) -> SearchResult:
    """The result of a finished search. Raises :class:`ConfigError` if there is none."""
    content = read_json(folder / RESULT)
    try:
        trials = [TrialRecord(**record) for record in content["trials"]]
        config = SearchConfig(**content["search"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / RESULT} is damaged: it holds no result of a search."
        ) from error
    return SearchResult(config, trials, folder, content.get("importance"))


def describe(drawn: dict[str, Any]) -> str:
    """Hyperparameters in a few words."""
    return (
        f"latent {drawn['latent_dim']}, lr {drawn['learning_rate']:.2g}, "
        f"batch {drawn['batch_size']}, beta {drawn['beta']:g}"
    )
