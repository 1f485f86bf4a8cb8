"""Fashion-MNIST: find -> verify -> decode -> split.

A file is accepted by the SHA-256 of its *decompressed* content, so that every compression of the
right bytes is accepted, and nothing else. The training file gives two splits, its first 50,000
images and its last 10,000 (of other data, see :func:`load_split`); only the split "test" opens the
test file.

Shape suffixes: N images of a split, B images of a batch, C channels, H height, W width.
"""

import contextlib
import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from vae_hyperband.common.config import CommonConfig, Dataset, Holdout, plural
from vae_hyperband.common.errors import ConfigError, DataError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.idx import idx_sizes, read_idx_once
from vae_hyperband.data.synthetic import NUM_SYNTHETIC, render_garments, sample_factors

SplitName = Literal["train", "validation", "test"]
SPLITS = get_args(SplitName)
DATASETS = get_args(Dataset)
HOLDOUTS = get_args(Holdout)

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

#: SHA-256 of the decompressed files (Xiao, Rasul & Vollgraf 2017, github.com/zalandoresearch).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

FILES = tuple(FASHION_MNIST_SHA256)
MOST_LABELS = 12  # that are listed by number

TORCHVISION = ("raw", "FashionMNIST/raw", "MNIST/raw")  # below the folder that it is given

#: Where Debian's and Ubuntu's package dataset-fashion-mnist puts the four files.
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def cache_folder() -> Path:
    """The user's cache: $VAE_HYPERBAND_CACHE, else $XDG_CACHE_HOME or ~/.cache, vae-hyperband.

    Raises :class:`DataError` for a user without a home directory, as containers have them.
    """
    if chosen := os.environ.get("VAE_HYPERBAND_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "vae-hyperband"
    try:
        return Path.home() / ".cache" / "vae-hyperband"
    except RuntimeError as error:
        raise DataError(
            "This user has no home directory to keep data in: set VAE_HYPERBAND_CACHE to a folder."
        ) from error


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, as stored: one byte per pixel."""

    images_NCHW: Tensor  # uint8
    labels_N: Tensor  # int64
    digest: str  # SHA-256 of the decompressed image file of the split

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images_NCHW.shape[1:]
        return channels, height, width

    def content_digest(self) -> str:
        """SHA-256 of these images and labels (``digest`` is that of the whole file)."""
        found = hashlib.sha256(self.images_NCHW.cpu().contiguous().numpy().tobytes())
        found.update(self.labels_N.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def subset(self, index: Tensor) -> Self:
        """The images at ``index``, in its order."""
        return type(self)(self.images_NCHW[index], self.labels_N[index], self.digest)

    def pixels(self, index: Tensor | slice) -> Tensor:
        """The images at ``index`` as floats in [0, 1], shape (B, C, H, W)."""
        if isinstance(index, slice):
            return self.images_NCHW[index].float().div_(255)
        # ten times faster than indexing with brackets
        return self.images_NCHW.index_select(0, index).float().div_(255)


Result = TypeVar("Result")


def per_split(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache the last results of a function of splits, which are compared by their content."""
    kept: dict[Any, Result] = {}

    @functools.wraps(function)
    def remembering(*args: Any) -> Result:
        key = tuple(x.content_digest() if isinstance(x, Split) else x for x in args)
        if key not in kept:
            while len(kept) >= 4:
                del kept[next(iter(kept))]
            kept[key] = function(*args)
        return kept[key]

    return remembering


def binarized(split: Split) -> Split:
    """The split with every pixel sampled once: white with its grey value as the probability.

    Models of black and white pixels are compared on these (Norouzi et al. 2020 also sample their
    test pixels once). Every call gives the same pixels; the digest is that of the new images.
    """
    stream = generator(0, "binarized split", len(split))
    bits_NCHW = torch.bernoulli(split.pixels(slice(None)), generator=stream).to(torch.uint8) * 255
    return Split(bits_NCHW, split.labels_N, hashlib.sha256(bits_NCHW.numpy().tobytes()).hexdigest())


def as_trained(split: Split, config: CommonConfig) -> Split:
    """The split as models of that configuration expect it: grey, or binarized once."""
    return binarized(split) if config.binarize != "none" else split


def load_split(
    split: SplitName,
    data_dir: Path | None = None,
    dataset: str = "fashion-mnist",
    holdout: Holdout = "content",
) -> Split:
    """Find, verify and decode one split.

    ``data_dir`` is any folder with the IDX files, plain or gzipped; without it the user's cache,
    then the system's package are looked through (``make data`` fills one of them). ``custom``
    accepts other data in the same format; its validation split is the sixth of the training file
    whose images have the lowest hashes, whatever their order in the file, or with the ``holdout``
    "last" the last sixth, as Fashion-MNIST's is. ``drawn`` needs no files
    (:mod:`~vae_hyperband.data.synthetic`). Raises :class:`DataError`.
    """
    checks = (
        ("split", split, SPLITS),
        ("dataset", dataset, DATASETS),
        ("holdout", holdout, HOLDOUTS),
    )
    for name, value, known in checks:
        if value not in known:
            raise ConfigError(f"The {name} is {value!r}, but must be one of {', '.join(known)}.")
    if dataset == "drawn":
        return synthetic_split(split)
    data_dir = None if data_dir is None else Path(data_dir)
    if dataset == "custom" and data_dir is None:
        raise ConfigError(
            "--dataset custom needs --data-dir, the folder with its four IDX files (also for "
            "models trained on it)."
        )
    part = "t10k" if split == "test" else "train"
    expected = FASHION_MNIST_SHA256 if dataset == "fashion-mnist" else {}
    images_name, labels_name = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images, digest = _load_file(images_name, data_dir, expected.get(images_name))
    labels, _ = _load_file(labels_name, data_dir, expected.get(labels_name))
    if len(images) != len(labels):
        raise DataError(
            f"{images_name} holds {plural(len(images), 'image')}, but {labels_name} "
            f"{plural(len(labels), 'label')}: they do not belong together."
        )
    if split == "test":
        return Split(images[:, None].clone(), labels.long(), digest)
    held_out = _held_out(images, holdout if dataset == "custom" else "last")
    if not 0 < len(held_out) < len(images):
        found = plural(len(images), "image")
        raise DataError(f"{images_name} holds {found}, too few different ones to split.")
    chosen = held_out
    if split == "train":
        is_trained_on_N = torch.ones(len(images), dtype=torch.bool)
        is_trained_on_N[held_out] = False
        chosen = is_trained_on_N.nonzero()[:, 0]
    return Split(images[chosen, None], labels[chosen].long(), digest)


def load_training_splits(config: CommonConfig, data_dir: Path | None) -> tuple[Split, Split]:
    """The training and the validation split of a configuration; says which classes one lacks."""
    train, held_out = (
        load_split(name, data_dir, config.dataset, config.holdout)
        for name in ("train", "validation")
    )
    if missing := missing_classes(train, held_out):
        print(f"note: {missing}", file=sys.stderr, flush=True)
    return train, held_out


def _held_out(images_NHW: Tensor, holdout: Holdout) -> Tensor:
    """The numbers of the images of a training file that validate: a sixth of them, rounded up.

    Fewer where the next image is in the file so often that it would be more.
    """
    num = math.ceil(len(images_NHW) / 6)
    if holdout == "last":
        return torch.arange(len(images_NHW) - num, len(images_NHW))
    # a file sorted by class would hold out its last classes; a hash knows no order, and puts the
    # same image twice on one side
    places: dict[bytes, list[int]] = {}
    for place, image_HW in enumerate(images_NHW.numpy()):
        found = hashlib.blake2b(image_HW.tobytes(), digest_size=8).digest()
        places.setdefault(found, []).append(place)
    held_out: list[int] = []
    for found in sorted(places):
        if len(held_out) + len(places[found]) <= num:
            held_out += places[found]
    # in the order of their hashes: the first images, which pictures show, are of all classes
    return torch.tensor(held_out, dtype=torch.long)


def missing_classes(train: Split, held_out: Split) -> str:
    """Says which labels only one of two splits has; empty if there are none."""
    here, there = (set(split.labels_N.tolist()) for split in (train, held_out))
    said = [
        f"no image of the {name} split has the label{'s' * (len(labels) > 1)} "
        + ", ".join(map(str, sorted(labels)[:MOST_LABELS]))
        + (", ..." if len(labels) > MOST_LABELS else "")
        for name, labels in (("training", there - here), ("validation", here - there))
        if labels
    ]
    return "; ".join(said)


@functools.cache
def synthetic_split(name: SplitName, num: int | None = None) -> Split:
    """``num`` synthetic garments (default: the size of the split); their labels are the kinds."""
    levels_NF = sample_factors(name, num or NUM_SYNTHETIC[name])
    images_NCHW = render_garments(levels_NF)
    digest = hashlib.sha256(images_NCHW.numpy().tobytes()).hexdigest()
    return Split(images_NCHW, levels_NF[:, 0], digest)


def _load_file(name: str, data_dir: Path | None, sha256: str | None) -> tuple[Tensor, str]:
    """The first right file among the folders: its array and the digest of its content."""
    folders = _folders(data_dir)
    wrong = []
    for path in (path for folder in folders for path in _places_of(name, folder)):
        if not os.path.isfile(path):  # False, too, where this user may not look
            continue
        try:
            array, digest = read_idx_once(path, path.stat().st_mtime_ns, 3 if "idx3" in name else 1)
            if sha256 is None or digest == sha256:
                return array, digest
            raise DataError(
                f"{path} is not Fashion-MNIST's {name}: the SHA-256 of its content is {digest}, "
                f"expected {sha256}; remove the file, or pass --dataset custom to use other data."
            )
        except DataError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]
    places = " or ".join(str(folder) for folder in folders)
    hint = 'run "make data" (vae-hyperband data) to download it'
    if data_dir:
        hint = "--data-dir takes a folder of IDX files"
        if alike := sorted(path.name for path in data_dir.glob(f"*{name.partition('-idx')[0]}*")):
            hint = f"did you mean {alike[0]}? Give it that name"
    raise DataError(f"No file {name} or {name}.gz in {places}: {hint}.")


def check_test_split(
    image_shape: tuple[int, int, int], data_dir: Path | None, dataset: str
) -> None:
    """Raise :class:`DataError` if the test split is missing, or of images of another size.

    Looks at the headers of its files alone: its images are for the end.
    """
    if dataset == "drawn":
        return
    sizes = {}
    for name, num_dims in (("t10k-images-idx3-ubyte", 3), ("t10k-labels-idx1-ubyte", 1)):
        places = (path for folder in _folders(data_dir) for path in _places_of(name, folder))
        for path in filter(os.path.isfile, places):
            with contextlib.suppress(DataError):  # as when it is loaded: the next may be right
                sizes[num_dims] = idx_sizes(path, num_dims)
                break
        else:
            _load_file(name, data_dir, None)  # raises, and says where it has looked
    if tuple(sizes[3][1:]) != image_shape[1:] or sizes[3][0] != sizes[1][0]:
        raise DataError(
            f"The test files announce images {sizes[3]} and {plural(sizes[1][0], 'label')}, which "
            f"do not go with training images of shape {image_shape}."
        )


def _folders(data_dir: Path | None) -> list[Path]:
    """Where to look for the four files. Raises :class:`DataError` for a folder that is closed."""
    if data_dir is None:
        with contextlib.suppress(DataError):  # no cache: the system's package may do
            return [cache_folder(), SYSTEM_FOLDER]
        return [SYSTEM_FOLDER]
    try:
        os.listdir(data_dir)
    except FileNotFoundError:
        return [data_dir]  # said later, with the names of the files
    except OSError as error:
        raise DataError(f"--data-dir {data_dir} cannot be read: {error.strerror}.") from error
    if any(_is_there(name, data_dir) for name in FILES):
        return [data_dir]
    # one place for all four files: images of one data set must not meet labels of another
    inside = [data_dir / name for name in TORCHVISION]
    found = [folder for folder in inside if any(_is_there(name, folder) for name in FILES)]
    if len(found) > 1:
        places = " and in ".join(map(str, found))
        raise DataError(f"--data-dir {data_dir} has data in {places}: give one of them.")
    return found or [data_dir]


def _is_there(name: str, folder: Path) -> bool:
    return any(os.path.isfile(path) for path in _places_of(name, folder))


def _places_of(name: str, folder: Path) -> Iterator[Path]:
    """Where a folder may have a file: by its own name or Kaggle's, plain or gzipped."""
    for called in (name, name.replace("-idx", ".idx")):
        yield folder / called
        yield folder / f"{called}.gz"
