"""The splits of every data set: training, validation and test images, and their labels.

Fashion-MNIST's training file gives its first 50,000 images and its last 10,000 (of other IDX
files, see :func:`load_split`); images of your own are split as they lie, or by their content
(:func:`~vae_hyperband.data.decoded.assign_splits`).

Shape suffixes: N images of a split, B images of a batch, C channels, H height, W width.
"""

import dataclasses
import functools
import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from vae_hyperband.common.checks import parse_size, plural
from vae_hyperband.common.config import (
    CommonConfig,
    DataConfig,
    Dataset,
    Folders,
    Holdout,
    with_data,
)
from vae_hyperband.common.errors import ConfigError, DataError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.fashion_mnist import FASHION_MNIST_CLASSES, check_test_files, read_part
from vae_hyperband.data.sources import (
    AS_THEY_ARE,
    SPLITS,
    ImageSettings,
    SplitName,
    images_as_bytes,
)
from vae_hyperband.data.synthetic import KINDS, NUM_SYNTHETIC, render_garments, sample_factors

MOST_LABELS = 12  # that are listed by number

#: Names of the labels 0, 1 ... of the data sets that always have the same.
CLASS_NAMES: dict[str, tuple[str, ...]] = {"fashion-mnist": FASHION_MNIST_CLASSES, "drawn": KINDS}


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, as stored: one byte per pixel."""

    images_NCHW: Tensor  # uint8
    labels_N: Tensor  # int64
    digest: str  # SHA-256 of the decompressed image file, or of the decoded images, of the split
    class_names: tuple[str, ...] = ()  # of the labels 0, 1 ...; empty if they have none

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images_NCHW.shape[1:]
        return channels, height, width

    def content_digest(self) -> str:
        """SHA-256 of these images and labels (``digest`` is that of the whole file)."""
        found = hashlib.sha256(self.images_NCHW.cpu().contiguous().numpy().data)
        found.update(self.labels_N.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def class_name(self, label: int) -> str:
        """The name of a label, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def subset(self, index: Tensor) -> Self:
        """The images at ``index``, in its order."""
        return dataclasses.replace(
            self, images_NCHW=self.images_NCHW[index], labels_N=self.labels_N[index]
        )

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
    data: Path | str | None = None,
    settings: ImageSettings = AS_THEY_ARE,
) -> Split:
    """Find, verify and decode one split.

    ``data`` is a folder, archive or file of images of your own
    (:mod:`~vae_hyperband.data.sources`), decoded once as the ``settings`` say. Otherwise
    ``data_dir`` is any folder with the IDX files, plain or gzipped; without it the user's cache,
    then the system's package are looked through (``make data`` fills one of them). ``custom``
    accepts other data in the same format; its validation split is the sixth of the training file
    whose images have the lowest hashes, whatever their order in the file, or with the ``holdout``
    "last" the last sixth, as Fashion-MNIST's is. ``drawn`` needs no files
    (:mod:`~vae_hyperband.data.synthetic`). Raises :class:`DataError`.
    """
    if data is not None and dataset == "fashion-mnist":
        dataset = "images"
    config = DataConfig(dataset=cast(Dataset, dataset), holdout=holdout)
    with_data(config, None if data is None else Path(data))
    if split not in SPLITS:
        raise ConfigError(f"The split is {split!r}, but must be one of {', '.join(SPLITS)}.")
    if dataset == "drawn":
        return synthetic_split(split)
    if data is not None:
        return _own_split(Path(data), settings, split)
    return idx_split(split, None if data_dir is None else Path(data_dir), config)


def idx_split(name: SplitName, data_dir: Path | None, config: DataConfig) -> Split:
    """A split of Fashion-MNIST or of other IDX files. Raises :class:`DataError`.

    The training file gives two splits; only the split "test" opens the test file.
    """
    is_fashion_mnist = config.dataset == "fashion-mnist"
    if not is_fashion_mnist and data_dir is None:
        raise ConfigError(
            "--dataset custom needs --data-dir, the folder with its four IDX files (also for "
            "models trained on it)."
        )
    part = "t10k" if name == "test" else "train"
    images, labels, digest = read_part(part, data_dir, is_fashion_mnist)
    if name == "test":
        return Split(images[:, None].clone(), labels.long(), digest)
    held_out = _held_out(images, "last" if is_fashion_mnist else config.holdout)
    if not 0 < len(held_out) < len(images):
        found = plural(len(images), "image")
        raise DataError(f"The training file holds {found}, too few different ones to split.")
    chosen = held_out
    if name == "train":
        is_trained_on_N = torch.ones(len(images), dtype=torch.bool)
        is_trained_on_N[held_out] = False
        chosen = is_trained_on_N.nonzero()[:, 0]
    return Split(images[chosen, None], labels[chosen].long(), digest)


def split_for(
    config: DataConfig,
    folders: Folders,
    name: SplitName,
    should_stop: Callable[[], bool] = lambda: False,
) -> Split:
    """A split of the images that a configuration and its folders say. Raises as above."""
    config = with_data(config, folders.data)
    if folders.data is None:
        return load_split(name, folders.data_dir, config.dataset, config.holdout)
    return _own_split(folders.data, image_settings(config), name, should_stop)


#: What :func:`as_split` takes: images, images and their labels, or a data set of such pairs.
Images = Split | np.ndarray | Tensor | tuple[Any, Any] | TorchDataset[Any]


def as_split(given: Images) -> Split:
    """Images from Python as a split, held in memory as bytes.

    ``given`` is an array or tensor of images, (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or
    floats in [0, 1]; a pair of it and its N labels, integers; or a ``torch.utils.data.Dataset``
    whose items are an image (of these kinds, or Pillow's) or a pair (image, label). Raises
    :class:`DataError`.
    """
    if isinstance(given, Split):
        return given
    images, labels = given, None
    if isinstance(given, tuple):
        images, labels = given
    elif not isinstance(given, np.ndarray | Tensor):
        images, labels = _items_of(given)
    images_NCHW = images_as_bytes(Path("splits"), "images", np.asarray(images))
    num = len(images_NCHW)
    labels_N = torch.as_tensor(np.zeros(num) if labels is None else np.asarray(labels)).long()
    if labels_N.shape != (num,):
        raise DataError(
            f"splits has {plural(num, 'image')}, but labels of shape {tuple(labels_N.shape)}: they "
            "do not belong together."
        )
    split = Split(torch.from_numpy(images_NCHW), labels_N, "")
    return dataclasses.replace(split, digest=split.content_digest())


def _items_of(dataset: TorchDataset[Any]) -> tuple[np.ndarray, list[int]]:
    """All images and labels of a data set with a length."""
    images, labels = list[np.ndarray](), list[int]()
    for number in range(len(cast(Sized, dataset))):
        item = dataset[number]
        image, label = item if isinstance(item, tuple | list) else (item, 0)
        if hasattr(image, "convert") and image.mode not in ("L", "RGB"):  # Pillow's palettes
            image = image.convert("RGB")
        images.append(np.asarray(image))
        labels.append(int(label))
    if len({image.shape for image in images}) != 1:
        shapes = sorted({str(image.shape) for image in images})
        raise DataError(
            f"The images of the data set have the shapes {', '.join(shapes[:3])} ...: resize them."
            if images
            else "The data set has no image."
        )
    return np.stack(images), labels


def image_settings(config: DataConfig) -> ImageSettings:
    """How the images of ``--data`` become arrays."""
    size = None if config.image_size is None else parse_size(config.image_size)
    return ImageSettings(size, config.fit, config.channels)


def _own_split(
    path: Path,
    settings: ImageSettings,
    name: SplitName,
    should_stop: Callable[[], bool] = lambda: False,
) -> Split:
    """A split of the images at a path. Raises :class:`DataError` if it is empty."""
    from vae_hyperband.data.decoded import decoded_set  # needs Pillow, which other data do not

    found = decoded_set(path, settings, should_stop)
    rows = found.rows(name)
    if rows.start == rows.stop:
        counts = ", ".join(f"{split} {num}" for split, num in found.counts.items())
        raise DataError(
            f"{path} has no {name} images ({counts}): to be split, images need to be several "
            "different ones, or to have a training split among them."
        )
    images_NCHW, labels_N = (
        read_only_tensor(array[rows]) for array in (found.images_NCHW, found.labels_N)
    )
    return Split(images_NCHW, labels_N, found.digest, found.class_names)


def read_only_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that may not be written."""
    with warnings.catch_warnings():  # nothing writes to a split
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def load_training_splits(
    config: DataConfig, folders: Folders, should_stop: Callable[[], bool] = lambda: False
) -> tuple[Split, Split]:
    """The training and the validation split of a configuration; says which classes one lacks."""
    train, held_out = (split_for(config, folders, name, should_stop) for name in SPLITS[:2])
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


def check_test_split(
    image_shape: tuple[int, int, int], config: DataConfig, folders: Folders
) -> None:
    """Raise :class:`DataError` if the test split is missing, or of images of another size.

    Its images are for the end: only the headers of IDX files are looked at.
    """
    if config.dataset in ("fashion-mnist", "custom") and folders.data is None:
        check_test_files(image_shape, folders.data_dir)
    else:
        split_for(config, folders, "test")


def missing_classes(train: Split, held_out: Split) -> str:
    """Says which labels only one of two splits has; empty if there are none."""
    here, there = (set(split.labels_N.tolist()) for split in (train, held_out))
    said = [
        f"no image of the {name} split has the label{'s' * (len(labels) > 1)} "
        + ", ".join(train.class_name(label) for label in sorted(labels)[:MOST_LABELS])
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
