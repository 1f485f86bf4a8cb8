"""Every knob of a run, once. Command line, JSON files, checkpoints and searches derive from here.

``TrainConfig`` decides what a run computes: two runs with equal ones end in equal weights (on one
machine class); what searches and studies share with it is ``CommonConfig``. ``RunOptions`` says
where and how a run is computed, and never changes the result.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from vae_hyperband.common.errors import ConfigError

Dataset = Literal["fashion-mnist", "custom", "drawn"]

#: Settings that a resumed run may change; every other difference is refused.
RESUME_MAY_CHANGE = frozenset({"epochs", "val_interval", "iwae_samples", "fid_samples"})

#: Settings that only one choice of another setting looks at.
ONLY_WITH = {
    "free_bits": ("objective", "free-bits"),
    "capacity": ("objective", "capacity"),
    "train_samples": ("objective", "iwae"),
    "pseudo_inputs": ("prior", "vamp"),
}


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What a run may be told, and all runs of a search or a study alike."""

    dataset: Dataset = "fashion-mnist"
    """fashion-mnist is checked by its digests; custom takes any IDX files in --data-dir; drawn
    makes garments of known factors."""
    binarize: Literal["none", "dynamic"] = "none"
    """dynamic draws every pixel black or white anew at each step, as papers on likelihoods do."""
    objective: Literal["elbo", "free-bits", "capacity", "beta-tc", "iwae"] = "elbo"
    """What is minimised: the beta-weighted bound, or a variant of it (docs/objectives.md)."""
    free_bits: float = 0.1
    """free-bits: nats of KL that each latent dimension has for free."""
    capacity: float = 25.0
    """capacity: nats of KL that are aimed at in the end."""
    train_samples: int = 5
    """iwae: importance samples per image and step."""
    kl_warmup_epochs: float = 0.0
    """Raise the KL weight linearly from 0 to beta over this many epochs."""
    kl_cycles: int = 0
    """Raise it this many times over the training instead, each time from 0; 0: do not."""
    prior: Literal["normal", "vamp"] = "normal"
    """p(z): standard normal, or the VampPrior of Tomczak & Welling 2018."""
    pseudo_inputs: int = 100
    """vamp: learned images whose posteriors are the prior's components."""
    likelihood: Literal["bernoulli", "continuous-bernoulli", "discretized-logistic"] = "bernoulli"
    """p(x|z) of a pixel; the bounds of different likelihoods cannot be compared."""
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """one-cycle warms up, then anneals to nearly 0 at the last epoch; constant stays."""

    def __post_init__(self) -> None:
        check_types(self)
        require_number("kl_warmup_epochs", self.kl_warmup_epochs, 0)
        require_number("kl_cycles", self.kl_cycles, 0)
        require_number("free_bits", self.free_bits, 0)
        require_number("capacity", self.capacity, 0)
        require_number("train_samples", self.train_samples, 1)
        require_number("pseudo_inputs", self.pseudo_inputs, 1)
        for name, (chooser, choice) in ONLY_WITH.items():
            require(
                getattr(self, chooser) == choice
                or getattr(self, name) == getattr(CommonConfig, name),
                f"{flag(name)} is for --{chooser} {choice}: give that, too, or leave out "
                f"{flag(name)}.",
            )
        require(
            not (self.kl_cycles and self.kl_warmup_epochs),
            "--kl-cycles and --kl-warmup-epochs both say how the KL weight rises: give one.",
        )
        require(
            self.binarize == "none" or self.likelihood == "bernoulli",
            f"--likelihood {self.likelihood} is of grey pixels: leave out --binarize.",
        )
        require(
            self.objective not in ("free-bits", "beta-tc") or self.prior == "normal",
            f"--objective {self.objective} splits the KL by dimension, which only --prior normal "
            "allows.",
        )

    def common(self) -> dict[str, Any]:
        """These settings alone, for a configuration that shares them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(CommonConfig)}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """What is trained. Losses are in nats per image: sums over pixels and latent dimensions."""

    latent_dim: int = 32
    """Number of latent dimensions of z."""
    beta: float = 1.0
    """Weight of the KL term; 1 is the VAE, more is the beta-VAE of Higgins et al. 2017."""
    learning_rate: float = 8e-3
    """Peak learning rate of AdamW; half of it is enough for --schedule constant."""
    batch_size: int = 128
    """Images per step; the last batch of an epoch may be smaller."""
    epochs: int = 10
    """Passes over the training split."""
    val_interval: int = 1
    """Validate and save every this many epochs, and after the last one."""
    iwae_samples: int = 0
    """At each validation estimate the IWAE bound, too, with this many samples; 0: do not."""
    fid_samples: int = 0
    """At each validation measure the FID, too, of this many draws of the prior; 0: do not."""
    seed: int = 0
    """Decides initialisation, order and noise."""

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
            "FID compares grey images: leave out --fid-samples, or --binarize.",
        )
        require(
            self.objective != "beta-tc" or self.beta != 1,
            "--objective beta-tc with a beta of 1 is the ELBO: give another --beta (a search: "
            "--betas).",
        )
        weight_given = self.beta != 1 or self.kl_cycles or self.kl_warmup_epochs
        require(
            self.objective != "iwae" or not weight_given,
            "--objective iwae has no KL term to weigh: leave out --beta, --kl-cycles and "
            "--kl-warmup-epochs.",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> Self:
        """The configuration in ``values``, defaults for the rest; an unknown key is an error.

        What has no effect is left out: a checkpoint of an earlier version may have such a setting.
        """
        require(isinstance(values, dict), f"{source} is no set of settings.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        require(
            not unknown, f"{source} has settings that this version lacks: {', '.join(unknown)}."
        )
        return cls(**in_effect(values))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run or a search computes, reads and writes. It changes no more than last bits."""

    run: str = "vae"
    """Name of the run: its folder under checkpoints/ and logs/."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    data_dir: Path | None = None
    """A folder with the four IDX files, plain or gzipped (default: cache, then system package)."""
    checkpoints_dir: Path = Path("checkpoints")
    """Folder that holds one folder of checkpoints per run."""
    logs_dir: Path = Path("logs")
    """Folder that holds one folder of TensorBoard logs and metrics.jsonl per run."""

    def __post_init__(self) -> None:
        check_types(self)
        check_run_name(self.run)
        same = self.checkpoints_dir.resolve() == self.logs_dir.resolve()
        require(not same, "--checkpoints-dir and --logs-dir are the same folder: give two.")

    @property
    def ckpt_folder(self) -> Path:
        return self.checkpoints_dir / self.run

    @property
    def log_folder(self) -> Path:
        return self.logs_dir / self.run


@dataclass(frozen=True, kw_only=True)
class RunOptions(Places):
    """Where and how one run is computed: device and threads change no more than last bits."""

    num_threads: int | None = None
    """CPU threads of the training process (default: PyTorch's own choice)."""
    resume_ckpt: Path | None = None
    """Go on from this checkpoint. Giving the same command again goes on by itself."""
    log_interval: int = 100
    """Write training losses every this many steps."""
    ckpt_seconds: float = 60.0
    """Within an epoch, save after this many seconds: the most work that a kill can cost."""
    keep_ckpts: int = 1
    """Keep this many earlier checkpoints beside latest.pt and best.pt, should those be damaged."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("log_interval", self.log_interval, 1)
        require_number("ckpt_seconds", self.ckpt_seconds, 0)
        require_number("keep_ckpts", self.keep_ckpts, 0, 1000)
        if self.num_threads is not None:
            require_number("num_threads", self.num_threads, 1, 1024)


def check_run_name(name: str) -> None:
    """Refuse names that would leave their folder: separators, "..", NUL, a leading dot or dash."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=")
    require(
        0 < len(name) <= 100 and set(name) <= allowed and name[0] not in ".-",
        f"The run is called {name!r}, but needs a plain name: at most 100 letters, digits and "
        ". _ - + =, not starting with a dot or a dash.",
    )


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """The arguments of the network that a configuration describes."""
    return {
        "latent_dim": config.latent_dim,
        "likelihood": config.likelihood,
        "pseudo_inputs": config.pseudo_inputs if config.prior == "vamp" else 0,
    }


def in_effect(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a configuration's choices look at, without the others."""
    return {
        name: value
        for name, value in config.items()
        if name not in ONLY_WITH or config.get(ONLY_WITH[name][0]) == ONLY_WITH[name][1]
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable list of settings whose values differ, ``name: old -> new``."""
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def changed_options(settings: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """The words of a command line that give the settings which differ from the usual ones."""
    words: list[str] = []
    for name, value in settings.items():
        if value != usual[name]:
            if isinstance(value, bool):
                words.append(flag(name if value else f"no_{name}"))
                continue
            values = value if isinstance(value, tuple | list) else (value,)
            words += [flag(name), *map(str, values)]
    return words


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; :class:`ConfigError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    require(isinstance(content, dict), f"{path} holds no JSON object.")
    return content


# ---- Settings that are refused: the wrong type, a number out of range, what does not go together.


def require(ok: bool, sentence: str) -> None:
    if not ok:
        raise ConfigError(sentence)


def plural(number: int, noun: str) -> str:
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
