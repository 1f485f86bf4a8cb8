"""Every setting of a search, once: :class:`SearchConfig` and :class:`SearchOptions`.

``SearchConfig`` decides which trials there are and which one wins. ``SearchOptions`` says where and
on which hardware they are computed, and never changes the result.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vae_hyperband.common.checks import (
    check_types,
    flag,
    require,
    require_number,
    require_values,
    typed,
)
from vae_hyperband.common.config import CommonConfig, Places, TrainConfig, in_effect
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import real
from vae_hyperband.search.space import (
    Choice,
    Domain,
    Hyperparameters,
    LogRange,
    Space,
    describe,
)

#: Importance samples per image of a trial's IWAE bound, if that is the metric. Each one costs a
#: pass through the decoder at every validation; ``evaluate`` takes 100 of the winner.
IWAE_SAMPLES = 10

#: Samples of the prior for a trial's FID, if that is the metric. A small sample biases FID upward
#: (Chong & Forsyth 2020): compare it with that of other trials, not with ``evaluate``'s.
FID_SAMPLES = 5000

Metric = Literal["bound", "iwae", "fid"]

#: What a search compares trials by, in words; lower is better.
METRICS: dict[Metric, str] = {
    "bound": "validation bound at beta = 1, nats/image",
    "iwae": "validation IWAE bound, nats/image",
    "fid": "validation FID ({features}), z from the prior",
}


#: Trials of a grid: more would take minutes to write down, and years to train.
MAX_GRID = 100_000

#: The options of a search that have the domain of a setting, unless --space has one.
DOMAIN_OPTIONS = {
    "latent_dim": "latent_dims",
    "learning_rate": "learning_rates",
    "batch_size": "batch_sizes",
    "beta": "betas",
}

#: Settings of which trials must have the same one: their bounds cannot be compared otherwise.
COMPARED_BY_FID_ONLY = ("likelihood", "binarize")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CommonConfig):
    """The search space, how it is searched, and the settings that all trials share.

    Trial 0 of a random or TPE search has the default configuration's values, where the space
    contains them.
    """

    num_trials: int = 12
    """Number of configurations to try (grid: all combinations, whatever this says)."""
    max_epochs: int = 9
    """Epochs of a trial that is never stopped early."""
    algorithm: Literal["random", "grid", "tpe"] = "random"
    """random, grid (every combination), or tpe (Optuna's; learns from the trials that ended)."""
    scheduler: Literal["asha", "hyperband", "median", "none"] = "asha"
    """asha (Li et al. 2020), hyperband (Li et al. 2018), median (Golovin et al. 2017) or none."""
    metric: Metric = "bound"
    """Compare trials by the validation bound at beta = 1, the tighter IWAE bound, or FID."""
    grace_period: int = 1
    """asha, median: epochs before a trial may be stopped."""
    reduction_factor: int = 3
    """asha, hyperband: one in this many trials continues at each rung."""
    latent_dims: tuple[int, ...] = (16, 32, 64)
    """Latent dimensions to choose from."""
    learning_rates: tuple[float, float] = (5e-4, 1e-2)
    """Lowest and highest peak learning rate; sampled log-uniformly."""
    grid_points: int = 4
    """grid: number of learning rates, evenly spaced on the log scale, and of any other range."""
    batch_sizes: tuple[int, ...] = (64, 128, 256)
    """Batch sizes to choose from."""
    betas: tuple[float, ...] = (1.0,)
    """KL weights to choose from; trials are always compared at beta = 1."""
    space: Space | None = None
    """TOML file of what to choose from, for any setting of a run (docs/search.md)."""
    seed: int = 0
    """Seed of the suggested configurations, and of every trial's training."""

    def __post_init__(self) -> None:
        if isinstance(self.space, Mapping) and not isinstance(self.space, Space):  # JSON's
            object.__setattr__(self, "space", Space.from_dict(self.space))
        check_types(self)
        if self.space:
            self._take_space(self.space)
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
        require(
            self.algorithm != "grid" or self.total_trials <= MAX_GRID,
            f"A grid of this space has {self.total_trials:,} trials, more than {MAX_GRID:,}: give "
            "fewer values, fewer --grid-points, or --algorithm random.",
        )
        self._check_scheduler()
        self._check_trials()

    def _take_space(self, space: Space) -> None:
        """Check that no option sets what the space does, and take its single values."""
        for name, domain in space.items():
            several, option = len(domain.ends) > 1, DOMAIN_OPTIONS.get(name, name)
            require(
                not several or name not in COMPARED_BY_FID_ONLY or self.metric == "fid",
                f"--space has several values of {name}, whose bounds cannot be compared: give one, "
                "or --metric fid.",
            )
            if not hasattr(self, option):  # a setting that only the space has
                continue
            usual = getattr(SearchConfig, option)
            # one value is the search's own, as if its option had been given
            value = usual if several or option != name else domain.ends[0]
            require(
                getattr(self, option) in (usual, value),
                f"{flag(option)} and --space both set {name}: give only one.",
            )
            object.__setattr__(self, option, value)

    def _check_scheduler(self) -> None:
        """Refuse settings with which the scheduler would never stop a trial."""
        instead = "(or use --scheduler none)"
        require(
            self.scheduler not in ("asha", "median") or self.grace_period < self.max_epochs,
            f"--grace-period {self.grace_period} leaves nothing to stop: it must be below "
            f"--max-epochs {self.max_epochs} {instead}.",
        )
        # fewer epochs than the factor: s_max of Li et al. 2018 is 0, a single bracket of full runs
        require(
            self.scheduler != "hyperband" or self.max_epochs >= self.reduction_factor,
            f"--max-epochs {self.max_epochs} leaves hyperband no rung: it must be at least "
            f"--reduction-factor {self.reduction_factor} {instead}.",
        )
        require(
            self.scheduler == "none" or self.total_trials > 1,
            f"--scheduler {self.scheduler} compares trials, and there is only one: raise "
            f"--num-trials {instead}.",
        )

    def in_effect(self) -> Mapping[str, object]:
        """The settings that have an effect, as JSON has them."""
        without = {"space"}
        if self.space:
            without = {DOMAIN_OPTIONS.get(n, n) for n in self.domains if n in self.space}
        return {k: v for k, v in in_effect(self.to_dict()).items() if k not in without}

    @property
    def total_trials(self) -> int:
        """Number of trials of a search that runs to its end."""
        if self.algorithm != "grid":
            return self.num_trials
        return math.prod(len(domain.grid(self.grid_points)) for domain in self.domains.values())

    @functools.cached_property
    def domains(self) -> Mapping[str, Domain]:
        """What is chosen for each trial: the four that have options, then others in --space."""
        return {
            "latent_dim": Choice(self.latent_dims),
            "learning_rate": LogRange(*self.learning_rates),
            "batch_size": Choice(self.batch_sizes),
            "beta": Choice(self.betas),
            **{
                name: domain
                for name, domain in (self.space.items() if self.space else ())
                if name in DOMAIN_OPTIONS or len(domain.ends) > 1 or not hasattr(self, name)
            },
        }

    @property
    def batch_sizes_tried(self) -> list[int]:
        """The batch sizes to choose from; of a range, its ends."""
        return [size for size in self.domains["batch_size"].ends if isinstance(size, int)]

    def hyperparameters(self, values: Mapping[str, object]) -> Hyperparameters:
        """The hyperparameters in a JSON file, whose types they need not have.

        Raises :class:`ValueError` for values that are not those of a trial of this search.
        """
        if set(values) != set(self.domains):
            raise ValueError(f"not the names of this search: {', '.join(values)}")
        try:
            return Hyperparameters(
                **{name: typed(TrainConfig, name, values[name]) for name in self.domains}
            )
        except ConfigError as error:
            raise ValueError(str(error)) from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return super().to_dict() | {"space": self.space.to_dict() if self.space else None}

    @property
    def metric_name(self) -> str:
        """What trials are compared by, in words."""
        from vae_hyperband.evaluation.features import features_name  # PyTorch takes a second

        return METRICS[self.metric].format(features=features_name(self.dataset))

    @property
    def rungs(self) -> list[int]:
        """The epochs after which ASHA decides: r * eta^k below R (Li et al. 2020, section 3).

        HyperBand's rungs differ by bracket: :func:`~vae_hyperband.search.schedulers.brackets`.
        """
        # max_epochs itself is no rung: a trial that gets there has finished
        counts = itertools.takewhile(
            lambda epochs: epochs < self.max_epochs,
            (self.grace_period * self.reduction_factor**k for k in itertools.count()),
        )
        return list(counts)

    def _check_trials(self) -> None:
        """Refuse values, and pairs of values, that no trial can have.

        TrainConfig knows what each value must be, and what does not go together: let it say so
        here, in one line, instead of once per trial on a worker. It refuses single values and
        pairs; so each value of a choice, both ends of a range, what trial 0 has and what a grid has
        are tried with each of another setting.
        """
        default = TrainConfig()
        tried = {
            name: [domain.nearest(getattr(default, name)), *domain.ends]
            + ([*domain.grid(self.grid_points)] if self.algorithm == "grid" else [])
            for name, domain in self.domains.items()
        }
        first = Hyperparameters(**{name: values[0] for name, values in tried.items()})
        single = [
            (name, value) for name, values in tried.items() for value in dict.fromkeys(values)
        ]
        # no combination of the four settings that have options is refused
        pairs = itertools.combinations(single, 2) if self.space else ((one, one) for one in single)
        for one, other in pairs:
            if one[0] != other[0] or one == other:
                self._check_trial(first.replace(**dict([one, other])))

    def _check_trial(self, hyperparameters: Hyperparameters) -> None:
        try:
            self.trial_config(hyperparameters)
        except ConfigError as error:
            if not self.space:
                raise
            # the message has the options that do not go together; of these, which are searched
            named = [name for name in hyperparameters if flag(name) in str(error)]
            trial = describe(
                Hyperparameters(**{name: hyperparameters[name] for name in named})
                if named
                else hyperparameters
            )
            raise ConfigError(f"--space has trials that are refused ({trial}): {error}") from None

    def trial_config(self, hyperparameters: Hyperparameters) -> TrainConfig:
        """The full configuration of a trial. Raises :class:`ConfigError` if it is impossible."""
        settings = {**self.common(), **hyperparameters}
        return TrainConfig(
            **settings,
            # the schedule of a trial that is stopped early is that of the full training: what it
            # has reached at a rung is what the winner had reached there
            epochs=self.max_epochs,
            # one seed for all: trials differ by their hyperparameters, not by their luck
            seed=self.seed,
            val_interval=1,  # every epoch may be a rung
            iwae_samples=IWAE_SAMPLES if self.metric == "iwae" else 0,
            fid_samples=FID_SAMPLES if self.metric == "fid" else 0,
        )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Places):
    """Where and on which hardware a search runs. Nothing here changes what is tried."""

    run: str = "search"
    """Name of the search: its folder under checkpoints/ and logs/."""
    fresh: bool = False
    """Move an existing search of that name aside and start from the beginning."""
    address: str | None = None
    """Join the Ray cluster at this address (host:port); default: start a local one."""
    storage: str | None = None
    """Keep the trials' files in this folder or URL (s3://bucket/...), which all nodes must reach
    (default: in the search's own folder; fine if the nodes share a file system)."""
    optuna: str | None = None
    """Also write the trials to this storage of Optuna's (sqlite:///FILE), for optuna-dashboard."""
    cpus_per_trial: int = 1
    """CPU cores, and threads, of each trial; trials run in parallel as far as cores allow."""
    gpus_per_trial: float | None = None
    """GPUs of each trial, fractions allowed (default: 1 if there is one and --device allows)."""
    max_concurrent: int | None = None
    """Run at most this many trials in parallel (default: as many as the hardware allows)."""
    max_failures: int = 2
    """Retry a trial this many times in a row when it fails without making progress."""
    trial_timeout: float = 1800.0
    """Seconds without a finished epoch after which a trial counts as hanging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("cpus_per_trial", self.cpus_per_trial, 1, 1024)
        require_number("max_failures", self.max_failures, 0)
        require_number("trial_timeout", self.trial_timeout, 1, 1e6)
        if self.max_concurrent is not None:
            require_number("max_concurrent", self.max_concurrent, 1)
        if self.gpus_per_trial is not None:
            require_number("gpus_per_trial", self.gpus_per_trial, 0)
            # Ray can share one GPU, but not 1.5 of them
            require(
                self.gpus_per_trial <= 1 or self.gpus_per_trial.is_integer(),
                f"--gpus-per-trial is {self.gpus_per_trial}, but must be a fraction of one GPU or "
                "a whole number of them.",
            )
        gpus = self.gpus_per_trial
        # "cuda:1" is refused: Ray shows a trial its own GPUs only, numbered from 0
        require(
            self.device in ("auto", "cpu", "cuda"),
            f"--device is {self.device!r}, but must be auto, cpu or cuda for a search.",
        )
        require(
            not (self.device == "cpu" and gpus) and not (self.device == "cuda" and gpus == 0),
            f"--device {self.device} and --gpus-per-trial {gpus} contradict each other.",
        )

    def absolute(self) -> "SearchOptions":
        """The same options with absolute paths."""
        # Ray's workers run in folders of their own, where a relative path means another place
        local = self.storage is not None and "://" not in self.storage
        return dataclasses.replace(
            self,
            checkpoints_dir=real(self.checkpoints_dir),
            logs_dir=real(self.logs_dir),
            data=real(self.data) if self.data else None,
            data_dir=real(self.data_dir) if self.data_dir else None,
            storage=os.path.realpath(self.storage) if local and self.storage else self.storage,
        )
