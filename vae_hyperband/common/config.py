"""Every setting of a run, declared once. Command line, JSON files and checkpoints derive from here.

``TrainConfig`` decides what a run computes: on one class of machine, equal configurations give
equal weights. ``CommonConfig`` is the part of it that searches and studies share. ``RunOptions``
says where and how a run is computed, which changes rounding (and on a GPU the noise) only.
"""

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from vae_hyperband.common.checks import (
    check_run_name,
    check_types,
    flag,
    parse_size,
    require,
    require_number,
)

Dataset = Literal["fashion-mnist", "custom", "drawn", "images"]
Holdout = Literal["content", "last"]
Fit = Literal["crop", "pad", "stretch"]
Likelihood = Literal[
    "bernoulli",
    "continuous-bernoulli",
    "gaussian",
    "learned-gaussian",
    "laplace",
    "discretized-logistic",
]
Widths = tuple[int, ...] | Literal["auto"]

#: The networks of this package; every other one is the user's own, "package.module:function".
NETWORKS = ("conv", "residual")

#: Settings that a resumed run may change; every other difference is refused.
RESUME_MAY_CHANGE = frozenset({"epochs", "val_interval", "iwae_samples", "fid_samples"})

#: Settings that have an effect only with one choice of another setting.
ONLY_WITH = {
    "holdout": ("dataset", "custom"),
    "image_size": ("dataset", "images"),
    "fit": ("dataset", "images"),
    "channels": ("dataset", "images"),
    "free_bits": ("objective", "free-bits"),
    "capacity": ("objective", "capacity"),
    "train_samples": ("objective", "iwae"),
    "pseudo_inputs": ("prior", "vamp"),
    "sigma": ("likelihood", "gaussian"),
}


# ---- What is computed


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images: the same for all commands that take them."""

    dataset: Dataset = "fashion-mnist"
    """fashion-mnist; images: those of --data, which implies it; drawn: synthetic garments with
    known factors; custom: IDX files in --data-dir."""
    image_size: str | None = None
    """--data: resize images to N or HxW, height first (default: their size, if all have one)."""
    fit: Fit = "crop"
    """--data: resize by cropping both sides, by padding, or by stretching."""
    channels: Literal[1, 3] | None = None
    """--data: 1: grey, 3: red, green, blue (default: 1 if every image is grey, else 3)."""
    holdout: Holdout = "content"
    """custom: the sixth of the training file that validates, chosen by a hash of each image, or
    its end."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.image_size is not None:
            parse_size(self.image_size)
        _check_chosen(self, DataConfig)

    def data_settings(self) -> dict[str, Any]:
        """These settings alone, as keyword arguments of another configuration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(DataConfig)}


def _check_chosen(config: DataConfig, declared: type) -> None:
    """Refuse settings of a class that have no effect with what is chosen in :data:`ONLY_WITH`."""
    names = {field.name for field in dataclasses.fields(declared)}
    for name, (chooser, choice) in ONLY_WITH.items():
        if name not in names:
            continue
        # --data, which a data set of "images" comes from, is not a part of the configuration
        if (choice, config.dataset) == ("images", "fashion-mnist"):
            continue
        needed = "--data" if choice == "images" else f"--{chooser} {choice}"
        require(
            getattr(config, chooser) == choice or getattr(config, name) == getattr(declared, name),
            f"{flag(name)} needs {needed}: add that option, or remove {flag(name)}.",
        )


@dataclass(frozen=True, kw_only=True)
class CommonConfig(DataConfig):
    """Data, objective and model: the same for all runs of a search or a study."""

    binarize: Literal["none", "dynamic"] = "none"
    """dynamic: sample every pixel as black or white at each step, as likelihood papers do."""
    objective: Literal["elbo", "free-bits", "capacity", "beta-tc", "iwae"] = "elbo"
    """What is minimised: the beta-weighted bound, or a variant of it (docs/objectives.md)."""
    free_bits: float = 0.1
    """free-bits: nats of KL per latent dimension that cost nothing."""
    capacity: float = 25.0
    """capacity: target KL, in nats, at the end of training."""
    train_samples: int = 5
    """iwae: importance samples per image and step."""
    kl_warmup_epochs: float = 0.0
    """Raise the KL weight linearly from 0 to beta over this many epochs."""
    kl_cycles: int = 0
    """Instead raise the KL weight from 0 to beta this many times during training; 0 disables it."""
    prior: Literal["normal", "vamp"] = "normal"
    """p(z): standard normal, or the VampPrior of Tomczak & Welling 2018."""
    pseudo_inputs: int = 100
    """vamp: learned images whose posteriors are the prior's components."""
    likelihood: Likelihood = "bernoulli"
    """p(x|z) of a pixel (docs/choosing.md); bounds of different likelihoods cannot be compared."""
    sigma: float = 0.1
    """gaussian: standard deviation of a pixel, whose values lie in [0, 1]."""
    network: str = "conv"
    """conv, residual (slower, better), or your own package.module:function (docs/network.md)."""
    widths: Widths = (32, 64)
    """Channels of each stage, which halves the image; auto: stages until a side is at most 8."""
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """Learning rate: one-cycle warms up, then anneals to nearly 0 at the last epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("kl_warmup_epochs", self.kl_warmup_epochs, 0)
        require_number("kl_cycles", self.kl_cycles, 0)
        require_number("free_bits", self.free_bits, 0)
        require_number("capacity", self.capacity, 0)
        require_number("train_samples", self.train_samples, 1)
        require_number("pseudo_inputs", self.pseudo_inputs, 1)
        require_number("sigma", self.sigma, 1e-3, 10)  # a quarter of a level; far beyond white
        require(
            self.network in NETWORKS or is_own_network(self.network),
            f"--network is {self.network!r}, but must be conv, residual or "
            "package.module:function.",
        )
        if self.widths != "auto":
            for width in self.widths or (0,):
                require_number("widths", width, 1, 8192)
        require(
            self.network in NETWORKS or self.widths == CommonConfig.widths,
            f"--network {self.network} has layers of its own: remove --widths.",
        )
        _check_chosen(self, CommonConfig)
        require(
            not (self.kl_cycles and self.kl_warmup_epochs),
            "--kl-cycles and --kl-warmup-epochs both set how the KL weight rises: give only one.",
        )
        require(
            self.binarize == "none" or self.likelihood == "bernoulli",
            f"--likelihood {self.likelihood} needs grey pixels: remove --binarize.",
        )
        require(
            self.objective not in ("free-bits", "beta-tc") or self.prior == "normal",
            f"--objective {self.objective} splits the KL by dimension and so needs --prior normal.",
        )

    def common(self) -> dict[str, Any]:
        """These settings alone, as keyword arguments of another configuration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(CommonConfig)}

    def to_dict(self) -> dict[str, Any]:
        """The settings by their names, as JSON has them: lists, not tuples."""
        # so that what was written and read again is equal to what was not
        found = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """Model, objective and optimiser. Losses are in nats/image: sums over pixels and dimensions."""

    latent_dim: int = 32
    """Number of latent dimensions of z."""
    beta: float = 1.0
    """Weight of the KL term: 1 is the VAE, above 1 the beta-VAE of Higgins et al. 2017."""
    learning_rate: float = 8e-3
    """Peak learning rate of AdamW; half of it is enough with --schedule constant."""
    batch_size: int = 128
    """Images per step; the last batch of an epoch may be smaller."""
    epochs: int = 10
    """Passes over the training split."""
    val_interval: int = 1
    """Validate and save every this many epochs, and after the last one."""
    iwae_samples: int = 0
    """Importance samples per image for the IWAE bound at each validation; 0 disables it."""
    fid_samples: int = 0
    """Images sampled from the prior to measure FID at each validation; 0 disables it."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and all noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("latent_dim", self.latent_dim, 1, 4096)
        require_number("beta", self.beta, 0)
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"--learning-rate is {self.learning_rate!r}, but must be greater than 0.",
        )
        require_number("batch_size", self.batch_size, 1)
        require_number("epochs", self.epochs, 1)
        require_number("val_interval", self.val_interval, 1)
        require_number("iwae_samples", self.iwae_samples, 0)
        require_number("seed", self.seed, 0, 2**63 - 1)
        require(
            self.fid_samples == 0 or self.fid_samples >= 2,
            f"--fid-samples is {self.fid_samples}, but must be 0 or at least 2.",
        )
        require(
            not self.fid_samples or self.binarize == "none",
            "FID compares grey images: remove --fid-samples or --binarize.",
        )
        require(
            self.objective != "beta-tc" or self.beta != 1,
            "--objective beta-tc with a beta of 1 is the ELBO: give another --beta (or --betas).",
        )
        weight_given = self.beta != 1 or self.kl_cycles or self.kl_warmup_epochs
        require(
            self.objective != "iwae" or not weight_given,
            "--objective iwae has no KL term to weight: remove --beta, --kl-cycles and "
            "--kl-warmup-epochs.",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> Self:
        """The configuration in ``values``, defaults for the rest; an unknown key is an error.

        Settings without an effect are dropped: checkpoints of earlier versions may have some.
        """
        require(isinstance(values, dict), f"{source} is not a JSON object of settings.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        require(
            not unknown, f"{source} has settings that this version lacks: {', '.join(unknown)}."
        )
        return cls(**in_effect(values))


# ---- Where and how it is computed


@dataclass(frozen=True, kw_only=True)
class RunName:
    """Which run, on which device; a class of its own so that --help lists these two first."""

    run: str = "vae"
    """Name of the run: its folder under checkpoints/ and logs/."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where data are read, and where runs keep their checkpoints and logs."""

    data: Path | None = None
    """Your own images: a folder (labels are its folders), .zip, .tar, .npy, .npz or .parquet."""
    data_dir: Path | None = None
    """Fashion-MNIST, custom: folder with the four IDX files (default: cache, then system's)."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder that holds one folder of checkpoints per run."""
    logs_dir: Path = Path("logs")
    """Folder that holds one folder of TensorBoard logs and metrics.jsonl per run."""

    def folders(self) -> dict[str, Any]:
        """These settings alone, as keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Folders)}


TrackerName = Literal["none", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True, kw_only=True)
class Places(Folders, RunName):
    """Where a run or a search computes, reads and writes."""

    track: TrackerName = "none"
    """Copy scalars, images and settings to W&B, MLflow or Trackio: local files, no network."""

    def __post_init__(self) -> None:
        check_types(self)
        check_run_name(self.run)
        if self.track != "none":
            found = importlib.util.find_spec(self.track)
            # no origin: a mere folder of that name, as W&B makes them
            require(
                found is not None and found.origin is not None,
                f"--track {self.track} needs the package {self.track}: pip install "
                "'vae-hyperband[track]'.",
            )
        # realpath, since Path.resolve raises for a loop of links
        same = os.path.realpath(self.checkpoints_dir) == os.path.realpath(self.logs_dir)
        require(not same, "--checkpoints-dir and --logs-dir are the same folder: give two folders.")

    def options(self, run: str) -> dict[str, Any]:
        """The same places for the run of another name, as keyword arguments."""
        return {**self.folders(), "device": self.device, "run": run, "track": self.track}

    @property
    def ckpt_folder(self) -> Path:
        return self.checkpoints_dir / self.run

    @property
    def log_folder(self) -> Path:
        return self.logs_dir / self.run


@dataclass(frozen=True, kw_only=True)
class RunOptions(Places):
    """Where and how one run is computed, which changes rounding (and on a GPU the noise) only."""

    num_threads: int | None = None
    """CPU threads (default: PyTorch's own choice)."""
    resume_ckpt: Path | None = None
    """Checkpoint to continue from; not needed if the same --run is given again."""
    log_interval: int = 100
    """Write training losses every this many steps."""
    ckpt_seconds: float = 60.0
    """Seconds between saves within an epoch: the most work that a kill can cost."""
    keep_ckpts: int = 1
    """Earlier checkpoints to keep beside latest.pt and best.pt, in case those get damaged."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    track_group: str = ""
    """Group of the run in the tracker that --track names; searches and studies are groups."""
    compile: bool = False
    """Hand the losses of a step to torch.compile (mode "reduce-overhead": CUDA graphs on a GPU)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("log_interval", self.log_interval, 1)
        require_number("ckpt_seconds", self.ckpt_seconds, 0)
        require_number("keep_ckpts", self.keep_ckpts, 0, 1000)
        if self.num_threads is not None:
            require_number("num_threads", self.num_threads, 1, 1024)


# ---- Configurations as data: in effect, compared, as a command line, from a file


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of :class:`~vae_hyperband.model.vae.VAE` for a configuration."""
    return {
        "latent_dim": config.latent_dim,
        "likelihood": config.likelihood,
        "pseudo_inputs": config.pseudo_inputs if config.prior == "vamp" else 0,
        "sigma": config.sigma,
        "widths": config.widths,
        "network": config.network,
    }


def is_own_network(name: str) -> bool:
    """Whether a network's name is that of a function of the user's: package.module:function."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


def network_option(network: str) -> list[str]:
    """The option that lets a command run the code of a network; empty for this package's own."""
    return ["--network", network] if is_own_network(network) else []


def in_effect(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that have an effect: without those of objectives and priors not chosen."""
    return {
        name: value
        for name, value in config.items()
        if name not in ONLY_WITH or config.get(ONLY_WITH[name][0]) == ONLY_WITH[name][1]
    }


Config = TypeVar("Config", bound="DataConfig")


def with_data(config: Config, data: Path | None) -> Config:
    """The configuration for the images of ``--data``, which name the data set.

    Raises :class:`ConfigError` if the two contradict each other.
    """
    if data is not None and config.dataset == "fashion-mnist":
        config = dataclasses.replace(config, dataset="images")
    is_images = config.dataset == "images"
    require(
        data is None or is_images,
        f"--data and --dataset {config.dataset} both say which images: give only one of them.",
    )
    require(
        data is not None or not is_images,
        "--dataset images needs --data, the folder or file of the images.",
    )
    for name in ("image_size", "fit", "channels"):
        require(
            is_images or getattr(config, name) == getattr(type(config), name),
            f"{flag(name)} needs --data, the folder or file of the images.",
        )
    return config


def same_images(config: Config, settings: dict[str, Any]) -> Config:
    """A configuration that names no data set, for the images of stored settings."""
    given = {
        name: value
        for name, value in config.data_settings().items()
        if value != getattr(DataConfig, name)
    }
    return dataclasses.replace(config, **{**settings, **given})


def former_holdout(dataset: object) -> Holdout:
    """The holdout of settings that do not name one: version 0.1 wrote them."""
    # the default of today would validate runs of 0.1 on images that they were trained on
    return "last" if dataset == "custom" else "content"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings whose values differ, each as ``name: old -> new``."""
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def changed_options(settings: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The command-line options for the settings that differ from the usual ones."""
    words: list[str] = []
    for name, value in settings.items():
        if value != usual[name]:
            if isinstance(value, bool):
                words.append(flag(name if value else f"no_{name}"))
                continue
            values = value if isinstance(value, tuple | list) else (value,)
            words += [flag(name), *map(str, values)]
    return words
