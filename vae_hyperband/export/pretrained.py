"""The trained models in the package: ``pretrained:images`` and ``pretrained:bound``.

Each is one small file: a checkpoint without what only training needs, and the mixture from which
its images are best drawn. Floats are in half precision, triangular matrices without their zeros;
benchmarks/RECORDS.md has what that costs. On first use both become ordinary files in the user's
cache, so that there is a place beside them for what is fitted to the model.

Shape suffixes: L labels, K components, Z latent dimensions, T entries of a lower triangle.
"""

import contextlib
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.files import cache_folder, make_folder
from vae_hyperband.evaluation import samplers
from vae_hyperband.model import checkpoint
from vae_hyperband.model.checkpoint import BEST, Content, Keys, load_pt, save_pt, tree_digest
from vae_hyperband.model.vae import VAE

PREFIX = "pretrained:"
FOLDER = Path(__file__).parents[1] / "pretrained"
FORMAT = "vae-hyperband pretrained model"
KEYS: Keys = {1: frozenset({"checkpoint", "mixture"})}


def load_pretrained(name: str) -> VAE:
    """A model that comes with the package, "images" or "bound", on the CPU in eval mode.

    Raises :class:`ConfigError` for another name.
    """
    return checkpoint.load_model(pretrained_ckpt(name))


def pretrained_ckpt(name: str) -> Path:
    """The checkpoint of a model that comes with the package, in the user's cache.

    Its mixture, if it has one, is beside it: what has been lost, damaged or replaced by another fit
    is written again. Raises :class:`ConfigError` for an unknown name.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.pt"))
    if name not in names:
        raise ConfigError(
            f"The package has no model {PREFIX}{name}: use "
            f"{' or '.join(PREFIX + known for known in names)}."
        )
    packed = FOLDER / f"{name}.pt"
    version = hashlib.sha256(packed.read_bytes()).hexdigest()[:12]
    path = cache_folder() / "pretrained" / version / name / BEST
    make_folder(path.parent)
    content, mixture = _unpacked(load_pt(packed, FORMAT, KEYS))
    if mixture:
        _restore(samplers.sampler_file(path, "mixture"), mixture, samplers.FORMAT, samplers.KEYS)
    _restore(path, content, checkpoint.FORMAT, checkpoint.KEYS)
    return path


def pack(path: Path, out: Path) -> None:
    """Write the file of a model for the package: a checkpoint, and the mixture beside it if any."""
    content = load_pt(path, checkpoint.FORMAT, checkpoint.KEYS)
    del content["digest"]
    content |= {"optimizer": {}, "model": {n: x.half() for n, x in content["model"].items()}}
    mixture: Content | None = None
    file = samplers.sampler_file(path, "mixture")
    if file.exists():
        mixture = load_pt(file, samplers.FORMAT, samplers.KEYS)
        del mixture["digest"]
        tensors = mixture["tensors"]
        rows, columns = _triangle(tensors["means_LKZ"])
        tensors["roots_LKT"] = tensors.pop("roots_LKZZ")[..., rows, columns]
        mixture["tensors"] = {name: x.half() for name, x in tensors.items()}
    save_pt(out, {"checkpoint": content, "mixture": mixture}, FORMAT, KEYS)


def _restore(path: Path, content: Content, kind: str, keys: Keys) -> None:
    """Write a file, unless it is there with that content."""
    with contextlib.suppress(CheckpointError):  # it is missing, or damaged
        if load_pt(path, kind, keys)["digest"] == tree_digest(content):
            return
    save_pt(path, content, kind, keys)


def _unpacked(packed: Content) -> tuple[Content, Content | None]:
    """What the files of the checkpoint and of its mixture hold."""
    content, mixture = packed["checkpoint"], packed["mixture"]
    model = {name: x.float() for name, x in content["model"].items()}
    content |= {"model": model, "weights": tree_digest(model)}
    if mixture:
        tensors: dict[str, Tensor] = {n: x.double() for n, x in mixture["tensors"].items()}
        means_LKZ = tensors["means_LKZ"]
        rows, columns = _triangle(means_LKZ)
        roots_LKZZ = means_LKZ.new_zeros(*means_LKZ.shape, means_LKZ.shape[-1])
        roots_LKZZ[..., rows, columns] = tensors.pop("roots_LKT")
        mixture |= {
            "tensors": tensors | {"roots_LKZZ": roots_LKZZ},
            "checkpoint": tree_digest(content),  # of which it is
        }
    return content, mixture


def _triangle(means_LKZ: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of a lower triangle of that many dimensions."""
    rows, columns = torch.tril_indices(means_LKZ.shape[-1], means_LKZ.shape[-1])
    return rows, columns
