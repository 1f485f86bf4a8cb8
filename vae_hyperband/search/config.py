"""Every knob of a search, once. ``SearchConfig`` decides what is tried and what wins;
``SearchOptions`` says where and on what it is computed, and never changes the result.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vae_hyperband.common.config import (
    CommonConfig,
    Places,
    TrainConfig,
    require,
    require_number,
    require_values,
)

#: Importance samples of a trial's IWAE bound where that is the metric.
IWAE_SAMPLES = 10

#: Draws of the prior for a trial's FID where that is the metric.
FID_SAMPLES = 5000

#: What a search may decide by, as a reader is told; lower is better.
METRICS = {
    "bound": "validation bound at beta = 1, nats/image",
    "iwae": "validation IWAE bound, nats/image",
    "fid": "validation FID, z from the prior",
}


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CommonConfig):
    """The space that is searched, how, and what all its trials share. Trial 0 has the default
    configuration's values, where the space has them (a grid: none has to)."""

    num_trials: int = 12
    """Configurations to try (a grid tries all of its own)."""
    max_epochs: int = 9
    """Epochs of a trial that is never stopped."""
    algorithm: Literal["random", "grid", "tpe"] = "random"
    """random, grid (every combination), or tpe (Optuna's; learns from the trials that ended)."""
    scheduler: Literal["asha", "hyperband", "median", "none"] = "asha"
    """asha (Li et al. 2020), hyperband (Li et al. 2018), median (Golovin et al. 2017) or none."""
    metric: Literal["bound", "iwae", "fid"] = "bound"
    """What decides: the validation bound at beta = 1, the tighter IWAE bound, or FID."""
    grace_period: int = 1
    """asha, median: epochs before a trial may be stopped."""
    reduction_factor: int = 3
    """asha, hyperband: one in this many trials goes on at each rung."""
    latent_dims: tuple[int, ...] = (16, 32, 64)
    """Latent dimensions to choose from."""
    learning_rates: tuple[float, float] = (5e-4, 1e-2)
    """Lowest and highest peak learning rate; drawn log-uniformly."""
    grid_points: int = 4
    """grid: learning rates to try, evenly spaced on the log scale."""
    batch_sizes: tuple[int, ...] = (64, 128, 256)
    """Batch sizes to choose from."""
    betas: tuple[float, ...] = (1.0,)
    """KL weights to choose from; trials are always compared at beta = 1."""
    seed: int = 0
    """Decides the configurations drawn, and the seed that every trial trains with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_trials", "max_epochs", "grace_period"):
            require_number(name, getattr(self, name), 1)
        require_number("reduction_factor", self.reduction_factor, 2)
        require_number("grid_points", self.grid_points, 2)
        require_number("seed", self.seed, 0, 2**32 - 1)  # numpy's RandomState takes 32 bits
        for name in ("latent_dims", "batch_sizes", "betas"):
            require_values(name, getattr(self, name))
        low, high = self.learning_rates
        require(
            0 < low < high < math.inf,
            f"--learning-rates is {low!r} {high!r}, but must be two numbers, 0 < lowest < highest.",
        )
        self._check_scheduler()
        for trial in self._corner_trials():  # every value must be one that a trial can train with
            self.trial_config(trial)

    def _check_scheduler(self) -> None:
        """Refuse settings with which the scheduler would never stop a trial."""
        instead = "(or use --scheduler none)"
        require(
            self.scheduler not in ("asha", "median") or self.grace_period < self.max_epochs,
            f"--grace-period {self.grace_period} leaves nothing to stop: it must be below "
            f"--max-epochs {self.max_epochs} {instead}.",
        )
        require(
            self.scheduler != "hyperband" or self.max_epochs >= self.reduction_factor,
            f"--max-epochs {self.max_epochs} leaves hyperband no rung: it must be at least "
            f"--reduction-factor {self.reduction_factor} {instead}.",
        )
        require(
            self.scheduler == "none" or self.total_trials > 1,
            f"--scheduler {self.scheduler} compares trials, and one has nothing to be compared "
            f"with: raise --num-trials {instead}.",
        )

    @property
    def total_trials(self) -> int:
        if self.algorithm != "grid":
            return self.num_trials
        lists = (self.latent_dims, self.batch_sizes, self.betas)
        return math.prod(map(len, lists)) * self.grid_points

    @property
    def rungs(self) -> list[int]:
        """The epochs at which asha decides; hyperband's lie at the same ratio, by bracket."""
        counts = itertools.takewhile(
            lambda epochs: epochs < self.max_epochs,
            (self.grace_period * self.reduction_factor**k for k in itertools.count()),
        )
        return list(counts)

    def _corner_trials(self) -> list[dict[str, Any]]:
        """One trial per listed value, the others at their first: what validation has to see."""
        lists = {"latent_dim": self.latent_dims, "batch_size": self.batch_sizes, "beta": self.betas}
        first = {name: values[0] for name, values in lists.items()}
        first["learning_rate"] = self.learning_rates[0]
        return [first | {name: value} for name, values in lists.items() for value in values]

    def trial_config(self, drawn: dict[str, Any]) -> TrainConfig:
        """The full configuration of the trial whose hyperparameters were ``drawn``."""
        return TrainConfig(
            **self.common(),
            **drawn,
            epochs=self.max_epochs,
            seed=self.seed,
            val_interval=1,
            iwae_samples=IWAE_SAMPLES if self.metric == "iwae" else 0,
            fid_samples=FID_SAMPLES if self.metric == "fid" else 0,
        )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Places):
    """Where and on what a search runs. Nothing here changes which configurations are tried."""

    run: str = "search"
    """Name of the search: its folder under checkpoints/ and logs/."""
    fresh: bool = False
    """Move an existing search of that name aside and start anew."""
    address: str | None = None
    """Join the Ray cluster at this address (host:port); default: a local one, started for this."""
    storage: str | None = None
    """Keep the trials' files here, a folder or URL such as s3://bucket/folder that all nodes reach
    (default: with the search's own, which is enough where the nodes share a file system)."""
    cpus_per_trial: int = 1
    """CPU cores, and threads, of each trial; as many trials run side by side as there is room."""
    gpus_per_trial: float | None = None
    """GPUs of each trial, fractions allowed (default: 1 if there is one and --device allows)."""
    max_concurrent: int | None = None
    """Run at most this many trials side by side (default: as many as there is room for)."""
    max_failures: int = 2
    """Try a trial again this many times in a row when it fails without having got further."""
    trial_timeout: float = 1800.0
    """Seconds after which a trial that has not finished an epoch counts as hanging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("cpus_per_trial", self.cpus_per_trial, 1, 1024)
        require_number("max_failures", self.max_failures, 0)
        require_number("trial_timeout", self.trial_timeout, 1, 1e6)
        if self.max_concurrent is not None:
            require_number("max_concurrent", self.max_concurrent, 1)
        if self.gpus_per_trial is not None:
            require_number("gpus_per_trial", self.gpus_per_trial, 0)
            require(
                self.gpus_per_trial <= 1 or self.gpus_per_trial.is_integer(),
                f"--gpus-per-trial is {self.gpus_per_trial}, but must be a fraction of one GPU or "
                "a whole number of them.",
            )
        gpus = self.gpus_per_trial
        require(
            self.device in ("auto", "cpu", "cuda"),
            f"--device is {self.device!r}, but must be auto, cpu or cuda for a search.",
        )
        require(
            not (self.device == "cpu" and gpus) and not (self.device == "cuda" and gpus == 0),
            f"--device {self.device} and --gpus-per-trial {gpus} contradict each other.",
        )

    def absolute(self) -> "SearchOptions":
        """The same places whatever the working folder: trials run in other processes."""
        local = self.storage is not None and "://" not in self.storage
        return dataclasses.replace(
            self,
            checkpoints_dir=self.checkpoints_dir.resolve(),
            logs_dir=self.logs_dir.resolve(),
            data_dir=self.data_dir.resolve() if self.data_dir else None,
            storage=str(Path(self.storage).resolve()) if local and self.storage else self.storage,
        )
