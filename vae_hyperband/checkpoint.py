"""One checkpoint format: a ``.pt`` of tensors and plain values that carries its own digest.

``torch.load(path, weights_only=True)`` opens it, so nothing executes because it was loaded. That
function does not notice a flipped bit in a tensor, though, so the digest over every name, type,
shape, value and byte is checked before anything is used.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.config import model_settings
from vae_hyperband.errors import CheckpointError, RunFolderError
from vae_hyperband.model import VAE

FORMAT = "vae-hyperband checkpoint"
VERSION = 1
LATEST, BEST = "latest.pt", "best.pt"

#: What every checkpoint holds, besides "format", "version" and "digest".
KEYS = frozenset(
    {"config", "model", "optimizer", "schedule", "epoch", "step", "sums"}
    | {"best", "metrics", "data", "environment", "resumed_from"}
)


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
    """Write a checkpoint; ``content`` has exactly :data:`KEYS`. See :func:`save_pt`."""
    assert set(content) == KEYS, set(content) ^ KEYS
    save_pt(path, content, FORMAT, VERSION)


def save_pt(path: Path, content: dict[str, Any], kind: str, version: int) -> None:
    """Write a file so that the path holds either the old or the new one, whatever happens.

    Temporary file in the same folder, fsync, rename, fsync of the folder: without either fsync a
    power cut can lose a file that was already reported as saved. Raises :class:`RunFolderError` if
    the folder cannot be written; the old file is then intact.
    """
    head = {"format": kind, "version": version, "digest": tree_digest(content)}
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({**head, **content}, file)
            file.flush()
            os.fsync(file.fileno())
    # torch's zip writer reports a full disk as RuntimeError
    except (OSError, RuntimeError) as error:
        raise RunFolderError(f"{path} cannot be written: {error}.") from error


class replacing:
    """``with replacing(path) as temporary:`` renames temporary over path if nothing was raised."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(
            dir=self.path.parent, prefix=f".{self.path.name}-"
        )
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's 0600 would hide it from colleagues
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            os.unlink(self.temporary)
            return
        os.replace(self.temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically and durably, or raise :class:`RunFolderError`."""
    if path.exists() and not path.is_file():  # /dev/stdout and its like are not for replacing
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
    else:
        _write_bytes(path.resolve(), text.encode())


def check_place(path: Path) -> None:
    """Raise :class:`RunFolderError` if no file could be written there."""
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error


def copy_ckpt(source: Path, target: Path) -> None:
    """Make ``target`` the same checkpoint as ``source``, atomically and durably."""
    _write_bytes(target, source.read_bytes())


def _write_bytes(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error


def load_ckpt(path: Path | str) -> dict[str, Any]:
    """The verified content of a checkpoint, tensors on the CPU, plus its "digest".

    Raises :class:`CheckpointError`: missing, damaged, not ours, or of a newer version.
    """
    return load_pt(Path(path), KEYS, FORMAT, VERSION)


def load_pt(path: Path, keys: frozenset[str], kind: str, version: int) -> dict[str, Any]:
    """The verified content of a file of :func:`save_pt` that holds just those keys."""
    what = kind.removeprefix("vae-hyperband ")
    if not path.is_file():
        raise CheckpointError(f"No {what} at {path}: give the path of a .pt file of a run.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # whatever a damaged or foreign file makes the unpickler, the zip reader or torch raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or not a {what} of this project ({type(error).__name__}): "
            "give the path of a best.pt or latest.pt."
        ) from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CheckpointError(f"{path} is a PyTorch file, but not a {what} of this project.")
    if content.get("version") != version:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, but this program reads "
            f"version {version}: use a newer vae-hyperband."
        )
    payload = {name: content[name] for name in content if name in keys}
    try:
        intact = set(payload) == keys and tree_digest(payload) == content.get("digest")
    except TypeError:  # a value of a type that no checkpoint has
        intact = False
    if not intact:
        raise CheckpointError(
            f"{path} is damaged: its content does not match its own digest; use another "
            "checkpoint, such as best.pt or latest.pt beside it."
        )
    return {**payload, "digest": content["digest"]}


def model_from_ckpt(content: dict[str, Any], source: Path | str = "the checkpoint") -> VAE:
    """The model of a loaded checkpoint, on the CPU; :class:`CheckpointError` if it does not fit."""
    channels, image_size, _ = content["data"]["image_shape"]
    with torch.device("meta"):
        model = VAE(image_size=image_size, channels=channels, **model_settings(content["config"]))
    try:
        model.load_state_dict(content["model"], assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source} is of another model: {reason}") from error
    return model.requires_grad_(True)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> VAE:
    """The model of any checkpoint of ours, in eval mode. Raises :class:`CheckpointError`."""
    return model_from_ckpt(load_ckpt(path), path).to(device).eval()
