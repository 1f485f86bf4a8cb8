"""One checkpoint format: a ``.pt`` of tensors and plain values that carries its own digest.

``torch.load(path, weights_only=True)`` opens it, so nothing executes because it was loaded. That
function does not notice a flipped bit in a tensor, though, so the digest over every name, type,
shape, value and byte is checked before anything is used.
"""

import dataclasses
import hashlib
import inspect
import io
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vae_hyperband.common.config import (
    Folders,
    TrainConfig,
    former_holdout,
    is_own_network,
    model_settings,
)
from vae_hyperband.common.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    NetworkError,
    RunFolderError,
    first_line,
    optional_packages,
)
from vae_hyperband.common.files import write_bytes
from vae_hyperband.common.process import Environment
from vae_hyperband.data.splits import CLASS_NAMES, Split, SplitName, split_for
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.networks import allow_network, require_allowed
from vae_hyperband.model.vae import VAE

FORMAT = "vae-hyperband checkpoint"
LATEST, BEST = "latest.pt", "best.pt"

HEAD = ("format", "version", "digest")  # the digest is of all the rest
Keys = dict[int, frozenset[str]]  # what a file of each version of a format holds
Content = dict[str, Any]  # tensors and plain values by these names

_KEYS_1 = frozenset(
    {"config", "model", "optimizer", "schedule", "epoch", "step", "sums"}
    | {"best", "metrics", "data", "environment", "resumed_from"}
)
#: What every checkpoint holds, besides "format", "version" and "digest"; the last version is
#: written, all are read. "weights" came with version 2: the SHA-256 of the model's tensors.
KEYS: Keys = {1: _KEYS_1, 2: _KEYS_1 | {"weights"}}


def tree_digest(tree: Any) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values, order of keys included."""
    digest = hashlib.sha256()

    def add(node: Any) -> None:
        # type and shape as well as bytes: other shapes can have the same bytes
        if isinstance(node, Tensor):
            digest.update(f"tensor {node.dtype} {tuple(node.shape)};".encode())
            digest.update(node.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(node, dict):
            # its length first: without it, two lists and one of both would be the same bytes
            digest.update(f"dict {len(node)};".encode())
            for key, value in node.items():
                add(key)
                add(value)
        elif isinstance(node, list | tuple):
            digest.update(f"list {len(node)};".encode())
            for value in node:
                add(value)
        else:
            digest.update(f"{type(node).__name__} {json.dumps(node)};".encode())

    add(tree)
    return digest.hexdigest()


#: The losses of a validation in nats per image, with its step and epoch.
Metrics = dict[str, float]


class DataFacts(NamedTuple):
    """Which images a run was trained on."""

    digest: str  # SHA-256 of the decompressed image file, or of the decoded images
    num_images: int
    image_shape: tuple[int, int, int]  # channels, height, width
    path: str | None = None  # of --data, where the images were
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, train: Split, path: Path | None = None) -> Self:
        where = None if path is None else os.path.abspath(path)
        return cls(train.digest, len(train), train.image_shape, where, train.class_names)

    @property
    def identity(self) -> dict[str, object]:
        """What is the same for the same images, wherever they are."""
        return {name: getattr(self, name) for name in ("digest", "num_images", "image_shape")}


@dataclass(frozen=True)
class Checkpoint:
    """A run at one step: all that it needs to continue, and where that was computed.

    :func:`load_ckpt` verifies it once; it is then handed on. Loaded tensors lie on the CPU.
    """

    config: TrainConfig
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    schedule: dict[str, str | int]  # name and number of steps, for the reader
    epoch: int  # completed
    step: int
    sums: Tensor  # of the losses since the epoch began and since the last row of the log
    best: Metrics  # step, epoch, total_loss and bound of the best validation so far
    metrics: Metrics  # step, epoch and losses of the last validation; empty before it
    data: DataFacts
    environment: Environment  # what bit-exactness depends on
    resumed_from: str | None  # digest of the checkpoint that --resume_ckpt named
    path: Path = Path("the checkpoint")  # where it was loaded from
    digest: str = ""  # SHA-256 over all of the file's content; empty before it is saved

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the model's tensors: two runs with equal weights have equal ones."""
        return tree_digest(self.model_state)

    @property
    def own_losses(self) -> Metrics:
        """The losses of these weights on the validation split.

        Empty if the checkpoint was written after further steps: ``metrics`` is of earlier weights.
        """
        return self.metrics if self.metrics and self.metrics["step"] == self.step else {}

    def model(self, device: torch.device | str = "cpu") -> VAE:
        """The model, in eval mode.

        Raises :class:`CheckpointError` if the tensors do not fit it, and :class:`NetworkError` if
        it has a network of somebody's own that :func:`allow_network` was not called for.
        """
        channels, height, width = self.data.image_shape
        settings = {"image_size": (height, width), "channels": channels}
        model = _model(settings | model_settings(self.config), self.model_state, self.path)
        return model.to(device).eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1 ...; empty if they have no names."""
        return self.data.class_names or CLASS_NAMES.get(self.config.dataset, ())

    def split(self, name: SplitName, folders: Folders | Path | None = None) -> Split:
        """A split of the data that the run was trained on.

        Images of ``--data`` are looked for where they were, if ``folders`` do not say. Test images
        may be others of the same size; the training and validation images have to be the same.
        Raises :class:`CheckpointError` if they are not, and what :func:`split_for` raises.
        """
        if not isinstance(folders, Folders):  # in 0.1 a folder of IDX files
            folders = Folders(data_dir=folders)
        is_images = self.config.dataset == "images"
        option = "--data" if is_images else "--data-dir"
        if is_images and folders.data is None:
            if self.data.path is None or not os.path.exists(self.data.path):
                was = (
                    f"are no longer at {self.data.path}"
                    if self.data.path
                    else "came from Python (there give evaluate the same ones)"
                )
                raise CheckpointError(
                    f"The images that {self.path} was trained on {was}: give --data, their folder "
                    "or file."
                )
            folders = dataclasses.replace(folders, data=Path(self.data.path))
        split = split_for(self.config, folders, name)
        if split.image_shape != self.data.image_shape:
            raise CheckpointError(
                f"{self.path} was trained on images of shape {self.data.image_shape}, but the "
                f"{name} split has {split.image_shape}: give the {option} it was trained on."
            )
        # the test images are in another file, whose digest the run has never seen
        from_file = self.config.dataset != "drawn"  # synthetic garments have no file
        if name != "test" and from_file and split.digest != self.data.digest:
            raise CheckpointError(
                f"{self.path} was trained on other images than these: give the {option} it was "
                "trained on."
            )
        return split


def save_ckpt(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: whole and on disk when this returns, or not at all.

    Raises :class:`RunFolderError`, and then a file that was there before is as it was.
    """
    content = {
        "config": checkpoint.config.to_dict(),
        "model": checkpoint.model_state,
        "optimizer": checkpoint.optimizer_state,
        "schedule": checkpoint.schedule,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "sums": checkpoint.sums,
        "best": checkpoint.best,
        "metrics": checkpoint.metrics,
        "data": json.loads(json.dumps(checkpoint.data._asdict())),  # tuples as lists
        "environment": checkpoint.environment,
        "resumed_from": checkpoint.resumed_from,
        "weights": checkpoint.weights_digest,
    }
    save_pt(Path(path), content, FORMAT, KEYS)


def save_pt(path: Path, content: Content, kind: str, keys: Keys) -> None:
    """Write a file so that the path holds either the old or the new one, whatever happens.

    See :func:`vae_hyperband.common.files.write_bytes`.
    """
    # always the newest version; older ones are only read
    version = max(keys)
    assert set(content) == keys[version], set(content) ^ keys[version]
    head = {"format": kind, "version": version, "digest": tree_digest(content)}
    # into memory first: what is written is compared byte for byte with what is read back
    buffer = io.BytesIO()
    torch.save({**head, **content}, buffer)
    write_bytes(path, buffer.getvalue())


def copy_ckpt(source: Path, target: Path) -> None:
    """Make ``target`` the same checkpoint as ``source``, atomically and durably.

    Raises :class:`RunFolderError`.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{source} cannot be read: {error.strerror}.") from error
    write_bytes(target, content)


def load_ckpt(path: Path | str) -> Checkpoint:
    """The verified checkpoint in a file, tensors on the CPU.

    Raises :class:`CheckpointError`: missing, unreadable, or of a newer version; its subclass
    :class:`DamagedError`: damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    content = load_pt(path, FORMAT, KEYS)
    data = content["data"]
    return Checkpoint(
        # a checkpoint of an earlier version lacks the settings that came later: they had defaults
        config=TrainConfig.from_dict(
            {"holdout": former_holdout(content["config"].get("dataset")), **content["config"]},
            str(path),
        ),
        model_state=content["model"],
        optimizer_state=content["optimizer"],
        schedule=content["schedule"],
        epoch=content["epoch"],
        step=content["step"],
        sums=content["sums"],
        best=content["best"],
        metrics=content["metrics"],
        data=DataFacts(
            data["digest"],
            data["num_images"],
            tuple(data["image_shape"]),
            data.get("path"),  # checkpoints of 0.1 have neither
            tuple(data.get("class_names", ())),
        ),
        environment=content["environment"],
        resumed_from=content["resumed_from"],
        path=path,
        digest=content["digest"],
    )


def load_pt(path: Path, kind: str, keys: Keys) -> Content:
    """The verified content of a file of :func:`save_pt`, of any version of its format."""
    what = kind.removeprefix("vae-hyperband ")
    if not path.is_file():
        raise CheckpointError(f"No {what} at {path}: give a .pt file, as checkpoints/NAME/best.pt.")
    try:
        # read once: what is verified is what is used, even if the file is replaced meanwhile
        data = path.read_bytes()
    except OSError as error:  # which says nothing about the content: it is not "damaged"
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # whatever a damaged or foreign file makes the unpickler, the zip reader or torch raise
    except Exception as error:
        raise DamagedError(
            f"{path} is damaged or not a {what} of this project ({type(error).__name__}): "
            "give the path of a best.pt or latest.pt."
        ) from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise DamagedError(f"{path} is a PyTorch file, but not a {what} of this project.")
    version: Any = content.get("version")
    payload = {name: content[name] for name in content if name not in HEAD}
    try:
        # torch.load returns other numbers for a flipped bit without a word (389 of 400 tried)
        intact = tree_digest(payload) == content.get("digest")
    except TypeError:  # a value of a type that no checkpoint has
        intact = False
    if intact and (not isinstance(version, int) or version not in keys):
        raise CheckpointError(
            f"{path} has format version {version}, but this program reads versions up to "
            f"{max(keys)}: use a newer vae-hyperband."
        )
    if not intact or set(payload) != keys[version]:
        raise DamagedError(
            f"{path} is damaged: its content does not match its own digest; use another "
            "checkpoint, such as best.pt or latest.pt beside it."
        )
    return {**payload, "digest": content["digest"]}


def _model(settings: dict[str, Any], tensors: dict[str, Tensor], source: Path | str) -> VAE:
    # a network of the user's own is really built: its buffers, and what it ties or freezes, stay
    own = is_own_network(str(settings.get("network")))
    if own:
        model = initialized_vae(seed=0, **settings)
    else:
        # on the meta device nothing is allocated or sampled; assign=True takes the loaded tensors
        with torch.device("meta"):
            model = VAE(**settings)
    scale = tensors.get("log_scale")
    if scale is not None and scale.dim() == 0 and model.log_scale is not None:
        # older models of several channels have one scale for all of them, and keep it
        model.log_scale = torch.nn.Parameter(scale)
    try:
        model.load_state_dict(tensors, assign=not own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source} is of another model: {reason}") from error
    # assigned tensors come without it, and training may go on with this model
    return model if own else model.requires_grad_(True)


def load_model(
    path: Path | str, device: torch.device | str = "cpu", network: str | None = None
) -> VAE:
    """The model of a checkpoint, or of a folder that ``export`` wrote, in eval mode.

    "hf:ORG/NAME", or "hf:ORG/NAME@REVISION", is such a folder in a repository of the Hugging Face
    hub, from which it is downloaded into the hub's own cache.
    ``network`` allows a network of your own to be imported, by the name that it was trained under
    (:func:`~vae_hyperband.allow_network`). Raises :class:`CheckpointError` and
    :class:`NetworkError`.
    """
    if network is not None:
        allow_network(network)
    if str(path).startswith(HUB):
        return load_shared(_from_hub(str(path).removeprefix(HUB))).to(device).eval()
    path = Path(path)
    if path.is_dir():
        return load_shared(path).to(device).eval()
    return load_ckpt(path).model(device)


# ---- a model to be handed on: weights alone, in a format that other libraries read, too

SHARED_FORMAT = "vae-hyperband model"
HUB = "hf:"  # before the name of a repository
SHARED_WEIGHTS, SHARED_CONFIG = "model.safetensors", "config.json"
#: The last version is written, all are read. In version 1 "model" held the model's arguments.
SHARED_VERSION = 2


def _from_hub(name: str) -> Path:
    """The folder of a model of the Hugging Face hub, which its own package keeps and verifies."""
    with optional_packages():
        import huggingface_hub
    repository, _, revision = name.partition("@")
    files = [SHARED_WEIGHTS, SHARED_CONFIG]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=files
            )
        )
    except Exception as error:  # of httpx, the hub, the cache: they have no common type
        raise CheckpointError(
            f"{HUB}{name} cannot be had from the hub: {first_line(error)}"
        ) from error


def load_shared(folder: Path) -> VAE:
    """The model in a folder with ``model.safetensors`` and ``config.json``.

    Raises :class:`CheckpointError`: missing, not ours, or not the weights that config.json is of.
    """
    import safetensors.torch  # not installed everywhere that trains

    path = folder / SHARED_WEIGHTS
    try:
        config = json.loads((folder / SHARED_CONFIG).read_text(encoding="utf-8"))
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack_from("<Q", content)
        about = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no model that can be read ({error}): give a folder that "
            "vae-hyperband export --format safetensors wrote, or a .pt file."
        ) from error
    if not isinstance(config, dict) or config.get("format") != SHARED_FORMAT:
        raise CheckpointError(f"{folder / SHARED_CONFIG} is not of a model of this project.")
    if config.get("version") not in (1, SHARED_VERSION):
        raise CheckpointError(
            f"{folder} has format version {config.get('version')}, but this program reads versions "
            f"up to {SHARED_VERSION}: use a newer vae-hyperband."
        )
    own = is_own_network(str(config.get("network")))
    require_allowed(str(config.get("network")))
    # the user's own may have counters, such as a batch norm's
    parts = [x.dtype for x in tensors.values() if x.is_floating_point() or not own]
    if other := {str(dtype) for dtype in parts if dtype != torch.float32}:
        raise CheckpointError(
            f"{path} holds {', '.join(other)}, but this package's models are float32."
        )
    names = inspect.signature(VAE).parameters
    flat = {name: value for name, value in config.items() if name in names}
    try:
        settings = config["model"] if config["version"] == 1 else flat
        model = _model(settings, tensors, path)
    except NetworkError:  # of the user's own network, not of the file
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{folder / SHARED_CONFIG} describes no model: {error}") from error
    # the weights repeat what config.json says of them: one of another export does not pass
    described = json.dumps(settings) == about.get("model")
    if not described or tree_digest(dict(model.state_dict())) != config.get("weights"):
        raise CheckpointError(f"{path} is damaged: {SHARED_CONFIG} is of other weights.")
    return model
