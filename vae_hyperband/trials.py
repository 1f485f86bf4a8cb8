"""What a search found: ``trials.json``, one record per trial. Reading it needs no Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_hyperband.config import SearchConfig, TrainConfig, read_json

METRIC = "bound"  # validation, beta = 1, nats per image; lower is better


@dataclass(frozen=True)
class TrialRecord:
    """What one trial did: the hyperparameters drawn for it, and its validation after each epoch."""

    name: str
    drawn: dict[str, Any]
    epochs: list[int]
    bounds: list[float]  # nats per image, one per epoch; empty if the trial never got that far
    kls: list[float]
    error: str | None  # why it failed, or None

    @property
    def best_bound(self) -> float:
        return min(self.bounds, default=float("inf")) if self.error is None else float("inf")

    @property
    def num_epochs(self) -> int:
        return max(self.epochs, default=0)


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in the order they were drawn, and the configuration that won."""

    config: SearchConfig
    trials: list[TrialRecord]
    winner: TrialRecord
    folder: Path

    @property
    def best_config(self) -> TrainConfig:
        return self.config.trial_config(self.winner.drawn)

    @property
    def num_failed(self) -> int:
        return sum(trial.error is not None for trial in self.trials)

    @property
    def num_stopped(self) -> int:
        max_epochs = self.config.max_epochs
        return sum(t.error is None and t.num_epochs < max_epochs for t in self.trials)

    @property
    def epochs_spent(self) -> int:
        return sum(trial.num_epochs for trial in self.trials)

    @property
    def epochs_saved(self) -> int:
        """Epochs that running the stopped trials to their end would have cost on top."""
        max_epochs = self.config.max_epochs
        return sum(max_epochs - t.num_epochs for t in self.trials if t.error is None)


def read_result(folder: Path) -> SearchResult:
    """The result of a finished search, from its ``trials.json``."""
    content = read_json(folder / "trials.json")
    config = SearchConfig(**content["search"])
    trials = [TrialRecord(**record) for record in content["trials"]]
    winner = min(trials, key=lambda trial: trial.best_bound)  # the first one where two are equal
    return SearchResult(config, trials, winner, folder)


def describe(drawn: dict[str, Any]) -> str:
    """Hyperparameters in a few words."""
    return (
        f"latent {drawn['latent_dim']}, lr {drawn['learning_rate']:.2g}, "
        f"batch {drawn['batch_size']}, beta {drawn['beta']:g}"
    )
