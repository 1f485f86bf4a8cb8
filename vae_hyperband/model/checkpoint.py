"""One checkpoint format: a ``.pt`` of tensors and plain values that carries its own digest.

``torch.load(path, weights_only=True)`` opens it, so nothing executes because it was loaded. That
function does not notice a flipped bit in a tensor, though, so the digest over every name, type,
shape, value and byte is checked before anything is used.
"""

import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.common.config import model_settings
from vae_hyperband.common.errors import CheckpointError, ConfigError, DamagedError, RunFolderError
from vae_hyperband.common.files import write_bytes
from vae_hyperband.data.splits import Split, SplitName, load_split
from vae_hyperband.model.vae import VAE

FORMAT = "vae-hyperband checkpoint"
LATEST, BEST = "latest.pt", "best.pt"

HEAD = ("format", "version", "digest")  # the digest is of all the rest
Keys = dict[int, frozenset[str]]  # what a file of each version of a format holds

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
        if isinstance(node, Tensor):
            digest.update(f"tensor {node.dtype} {tuple(node.shape)};".encode())
            digest.update(node.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(node, dict):
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


def save_ckpt(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. See :func:`save_pt`.

    ``content`` is all that the last version of :data:`KEYS` lists; "weights" is computed here.
    """
    save_pt(path, {**content, "weights": tree_digest(content["model"])}, FORMAT, KEYS)


def save_pt(path: Path, content: dict[str, Any], kind: str, keys: Keys) -> None:
    """Write a file so that the path holds either the old or the new one, whatever happens.

    See :func:`vae_hyperband.common.files.write_bytes`.
    """
    version = max(keys)
    assert set(content) == keys[version], set(content) ^ keys[version]
    head = {"format": kind, "version": version, "digest": tree_digest(content)}
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


def load_ckpt(path: Path | str) -> dict[str, Any]:
    """The verified content of a checkpoint, tensors on the CPU, plus its "digest".

    Raises :class:`CheckpointError`: missing, not to be read, of a newer version; and
    :class:`DamagedError`, which is one: damaged, or not ours.
    """
    content = load_pt(Path(path), FORMAT, KEYS)
    if "weights" not in content:
        content["weights"] = tree_digest(content["model"])
    return content


def load_pt(path: Path, kind: str, keys: Keys) -> dict[str, Any]:
    """The verified content of a file of :func:`save_pt`, of any version of its format."""
    what = kind.removeprefix("vae-hyperband ")
    if not path.is_file():
        raise CheckpointError(f"No {what} at {path}: give a .pt file, as checkpoints/NAME/best.pt.")
    try:
        data = path.read_bytes()
    except OSError as error:  # which says nothing of what the file holds
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


def model_from_ckpt(content: dict[str, Any], source: Path | str = "the checkpoint") -> VAE:
    """The model of a loaded checkpoint, on the CPU; :class:`CheckpointError` if it does not fit."""
    channels, image_size, _ = content["data"]["image_shape"]
    settings = model_settings(content["config"])
    return _model(
        {"image_size": image_size, "channels": channels, **settings}, content["model"], source
    )


def _model(settings: dict[str, Any], tensors: dict[str, Tensor], source: Path | str) -> VAE:
    with torch.device("meta"):
        model = VAE(**settings)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source} is of another model: {reason}") from error
    return model.requires_grad_(True)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> VAE:
    """The model of any checkpoint of ours, or of a folder that ``export`` wrote, in eval mode.

    Raises :class:`CheckpointError`.
    """
    path = Path(path)
    model = load_shared(path) if path.is_dir() else model_from_ckpt(load_ckpt(path), path)
    return model.to(device).eval()


# ---- a model to be handed on: weights alone, in a format that other libraries read, too

SHARED_FORMAT = "vae-hyperband model"
SHARED_WEIGHTS, SHARED_CONFIG = "model.safetensors", "config.json"


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
    if config.get("version") != 1:
        raise CheckpointError(
            f"{folder} has format version {config.get('version')}, but this program reads 1: use a "
            "newer vae-hyperband."
        )
    if other := {str(x.dtype) for x in tensors.values() if x.dtype != torch.float32}:
        raise CheckpointError(f"{path} holds {', '.join(other)}, but a model of ours is float32.")
    try:
        model = _model(config["model"], tensors, path)
    except (KeyError, TypeError, RuntimeError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{folder / SHARED_CONFIG} describes no model: {error}") from error
    described = json.dumps(config["model"]) == about.get("model")
    if not described or tree_digest(dict(model.state_dict())) != config.get("weights"):
        raise CheckpointError(f"{path} is damaged: {SHARED_CONFIG} is of other weights.")
    return model


#: The losses that runs are compared by, as a reader is told; nats per image.
LOSS_NAMES = {
    "bound": "bound (beta = 1)",
    "recon_loss": "reconstruction",
    "KL_divergence": "KL divergence",
}


def split_of(content: dict[str, Any], ckpt: Path, name: SplitName, data_dir: Path | None) -> Split:
    """A split of the data that a checkpoint was trained on.

    Test images may be others of the same size; those of the training file have to be the same ones.
    Raises :class:`CheckpointError` where they are not, and what :func:`load_split` raises.
    """
    config, trained_on = content["config"], content["data"]
    split = load_split(name, data_dir, config["dataset"])
    if list(split.image_shape) != list(trained_on["image_shape"]):
        raise CheckpointError(
            f"{ckpt} was trained on images of shape {tuple(trained_on['image_shape'])}, but the "
            f"{name} split has {split.image_shape}: give the --data-dir it was trained on."
        )
    # garments that are drawn have no file
    if name != "test" and config["dataset"] != "drawn" and split.digest != trained_on["digest"]:
        raise CheckpointError(
            f"{ckpt} was trained on other images than these: give the --data-dir it was trained on."
        )
    return split


def own_losses(content: dict[str, Any]) -> dict[str, Any]:
    """The losses of a checkpoint's own weights on the validation split.

    Empty where it was written after further steps: those in it are of earlier weights.
    """
    metrics = content["metrics"]
    return metrics if metrics and metrics["step"] == content["step"] else {}
