"""What images can come from: a :class:`Source`; arrays of numpy, IDX and Parquet files.

A source lists its images without decoding them, and reads them one after the other;
:mod:`~vae_hyperband.data.decoded` makes one array of them. Folders of pictures and archives are in
:mod:`~vae_hyperband.data.folders`.
"""

import bisect
import functools
import itertools
import json
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import Fit
from vae_hyperband.common.errors import DataError
from vae_hyperband.data.idx import read_idx

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

#: Names of folders, files and arrays that mean a split.
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

#: A file's content, or an image as an array of bytes (H, W) or (H, W, C); a reason, if it has none.
Content = bytes | np.ndarray | str


#: How the files of pictures end that are looked at.
ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
)

MAX_FILE_BYTES = 1 << 28  # of one picture; a header can promise more than any picture needs


class ImageSettings(NamedTuple):
    """How images become an array."""

    image_size: tuple[int, int] | None = None  # None: their own, if all have the same
    fit: Fit = "crop"
    channels: int | None = None  # None: 1 if every image is grey, else 3


AS_THEY_ARE = ImageSettings()


class Item(NamedTuple):
    """An image of a source."""

    name: str  # its path below the source's, or the array or file that it is in and its number
    label: int
    split: SplitName | None  # None: the source does not say


class Listing(NamedTuple):
    """What a source holds."""

    items: list[Item]
    class_names: tuple[str, ...]  # of the labels 0, 1 ...; empty if they have no names
    remarks: list[str]  # what was left out, and why


class Source(ABC):
    """Images at a path."""

    kind: str  # what it is, in words

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        self.path = path
        self.files = files  # all that its content depends on, by their names in the digest

    @functools.cached_property
    @abstractmethod
    def listing(self) -> Listing:
        """Its images in the order in which they are read. Raises :class:`DataError`."""

    @abstractmethod
    def read(self, start: int) -> Iterator[Content]:
        """The contents of the images from number ``start`` on. Raises :class:`DataError`."""


# ---- Arrays


class Part(NamedTuple):
    """An array of images and that of their labels."""

    name: str
    split: SplitName | None
    images: np.ndarray
    labels: np.ndarray | None = None


class Arrays(Source):
    """A .npy file of images, or a .npz file with labels, or with splits as Keras names them."""

    kind = "array of images"

    @functools.cached_property
    def _parts(self) -> list[Part]:
        try:
            if self.path.name.lower().endswith(".npy"):
                images = np.load(self.path, mmap_mode="r", allow_pickle=False)
                return [Part(self.path.name, None, images)]
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _useful(file.files)}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path} cannot be read as arrays: {error}.") from error
        return self._named(arrays)

    def _named(self, arrays: dict[str, np.ndarray]) -> list[Part]:
        parts = list[Part]()
        for name in arrays:
            kind, _, split = name.partition("_")
            if kind in IMAGE_ARRAYS and split in SPLIT_NAMES:
                labels = [arrays[f"{x}_{split}"] for x in LABEL_ARRAYS if f"{x}_{split}" in arrays]
                parts.append(Part(name, SPLIT_NAMES[split], arrays[name], *labels[:1]))
        if parts:
            return parts
        images = next((arrays[name] for name in IMAGE_ARRAYS if name in arrays), None)
        if images is None:
            raise DataError(
                f"{self.path} holds the arrays {', '.join(arrays) or 'of no known name'}, but "
                "needs images under images, x or arr_0 (labels: labels or y), or under x_train "
                "and x_test."
            )
        labels = [arrays[name] for name in LABEL_ARRAYS if name in arrays]
        return [Part(self.path.name, None, images, *labels[:1])]

    @functools.cached_property
    def listing(self) -> Listing:
        items, texts = list[Item](), set[str]()
        parts = self._parts
        for name, _, images, labels in parts:
            _check_images(self.path, name, images)
            if labels is not None:
                _check_labels(self.path, name, images, labels)
                if labels.dtype.kind in "US":
                    texts.update(map(str, labels))
        class_names = sorted(texts)
        numbers = {name: number for number, name in enumerate(class_names)}
        for name, split, images, labels in parts:
            found = [0] * len(images) if labels is None else labels.reshape(-1).tolist()
            items += [
                Item(f"{name}[{i}]", numbers[label] if label in numbers else int(label), split)
                for i, label in enumerate(found)
            ]
        return Listing(items, tuple(class_names), [])

    def read(self, start: int) -> Iterator[Content]:
        ends = list(itertools.accumulate(len(images) for _, _, images, _ in self._parts))
        for number in range(start, ends[-1]):
            part = bisect.bisect_right(ends, number)
            name, _, images, _ = self._parts[part]
            yield _as_bytes(self.path, name, images, number - (ends[part] - len(images)))


IMAGE_ARRAYS = ("images", "x", "X", "data", "arr_0")
LABEL_ARRAYS = ("labels", "label", "y", "Y", "targets")


def _useful(names: list[str]) -> list[str]:
    known = {*IMAGE_ARRAYS, *LABEL_ARRAYS, "arr"}
    return [name for name in names if name.partition("_")[0] in known]


def images_as_bytes(path: Path, name: str, images: np.ndarray) -> np.ndarray:
    """An array of images, of any of the shapes and types that are accepted, as (N, C, H, W) bytes.

    ``path`` and ``name`` are what errors call it. Raises :class:`DataError`.
    """
    _check_images(path, name, images)
    rows = [_as_bytes(path, name, images, number) for number in range(len(images))]
    array = np.stack(rows)
    return array[:, None] if array.ndim == 3 else np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _check_images(path: Path, name: str, images: np.ndarray) -> None:
    where = f"{path}, array {name}," if name != path.name else str(path)
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{where} has the shape {images.shape}, but images need (N, H, W), (N, H, W, C) or "
            "(N, C, H, W)."
        )
    _channel_axis(path, name, images)
    if images.dtype not in (np.uint8, np.bool_) and images.dtype.kind != "f":
        raise DataError(
            f"{where} holds {images.dtype}, but images are bytes (uint8) or floats in [0, 1]: "
            'convert them, as with .astype("uint8").'
        )


def _channel_axis(path: Path, name: str, images: np.ndarray) -> int | None:
    """Which axis of images has the channels; None if there is none."""
    if images.ndim == 3:
        return None
    first, last = images.shape[1] in (1, 3, 4), images.shape[3] in (1, 3, 4)
    if first == last:
        raise DataError(
            f"{path}, array {name}, has the shape {images.shape}, in which "
            + ("two axes" if first else "no axis")
            + " can be the channels: give (N, H, W, C) or (N, C, H, W) with 1 or 3 channels."
        )
    return 1 if first else 3


def _check_labels(path: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    if labels.size != len(images):
        raise DataError(
            f"{path} holds {plural(len(images), 'image')} in {name}, but "
            f"{plural(labels.size, 'label')}: they do not belong together."
        )
    if labels.dtype.kind in "iu" and labels.min() < 0:
        raise DataError(f"{path} has the label {labels.min()}, but labels are 0, 1, 2 ...")
    if labels.dtype.kind not in "iuUSb":
        raise DataError(
            f"{path} has labels of type {labels.dtype}, but they must be integers or strings."
        )


def _as_bytes(path: Path, name: str, images: np.ndarray, number: int) -> np.ndarray:
    """One image as bytes, (H, W) or (H, W, C)."""
    image = np.asarray(images[number])
    if _channel_axis(path, name, images) == 1:
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    elif image.dtype.kind == "f":
        # also catches NaN, which no comparison holds for
        if not (image.min() >= 0 and image.max() <= 1):
            what = "NaN" if np.isnan(image).any() else f"{image.min():.4g} to {image.max():.4g}"
            raise DataError(
                f"{path}, image {name}[{number}], holds {what}, but floats must be in [0, 1]: "
                "divide by 255, or store bytes."
            )
        image = np.rint(image * 255).astype(np.uint8)
    return np.ascontiguousarray(image)


class Idx(Arrays):
    """The four files of MNIST and its successors."""

    kind = "IDX files"

    @functools.cached_property
    def _parts(self) -> list[Part]:
        parts = list[Part]()
        for split, names in IDX_NAMES.items():
            if names[0] not in self.files:
                continue
            missing = [name for name in names if name not in self.files]
            if missing:
                raise DataError(f"{self.path} has {names[0]}, but no {missing[0]}.")
            images, labels = (
                read_idx(self.files[name], dims)[0].numpy()
                for name, dims in zip(names, (3, 1), strict=True)
            )
            parts.append(Part(names[0], SPLIT_NAMES[split], images, labels))
        return parts


# ---- Parquet, as the Hugging Face hub stores images


class Parquet(Source):
    """Parquet files with a column of images (bytes) and maybe one of labels."""

    kind = "Parquet files"

    @functools.cached_property
    def _columns(self) -> tuple[str, str | None, tuple[str, ...]]:
        """The names of the columns of images and of labels, and the names of the labels."""
        first = next(iter(self.files.values()))
        schema = self._file(first).schema_arrow
        image = next((name for name in ("image", "img", "images") if name in schema.names), None)
        if image is None:
            raise DataError(
                f"{first} has the columns {', '.join(schema.names)}, but needs one called image."
            )
        label = next((name for name in ("label", "labels") if name in schema.names), None)
        names: tuple[str, ...] = ()
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        if label and isinstance(features.get(label), dict):
            names = tuple(map(str, features[label].get("names") or ()))
        return image, label, names

    @staticmethod
    def _file(path: Path) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"{path} cannot be read as Parquet: {reason}") from error

    @functools.cached_property
    def listing(self) -> Listing:
        _, label, class_names = self._columns
        rows = list[tuple[str, object, SplitName | None]]()
        names = self.files if len(self.files) > 1 else [next(iter(self.files))]
        for name in names:
            file = self._file(self.files[name])
            # as the hub names them: train-00000-of-00002.parquet, or test/0000.parquet
            words = name.lower().replace("/", "-").replace(".", "-").split("-")
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
            num = file.metadata.num_rows
            labels = [0] * num
            if label:
                labels = file.read(columns=[label])[label].to_pylist()
            rows += [(f"{name}[{i}]", labels[i], split) for i in range(num)]
        texts = sorted({str(found) for _, found, _ in rows if isinstance(found, str)})
        numbers = {text: number for number, text in enumerate(texts)}
        items = []
        for name, found, split in rows:
            number = numbers[found] if isinstance(found, str) else found
            if not isinstance(number, int) or number < 0:
                raise DataError(f"{self.path} has the label {found!r} at {name}: expected 0, 1 ...")
            items.append(Item(name, number, split))
        if not items:
            raise DataError(f"{self.path} holds no row.")
        return Listing(items, class_names or tuple(texts), [])

    def read(self, start: int) -> Iterator[Content]:
        image, _, _ = self._columns
        number = 0
        for path in self.files.values():
            file = self._file(path)
            if number + file.metadata.num_rows <= start:
                number += file.metadata.num_rows
                continue
            for batch in file.iter_batches(batch_size=64, columns=[image]):
                for value in batch.column(0).to_pylist():
                    if number >= start:
                        content = value.get("bytes") if isinstance(value, dict) else value
                        if isinstance(content, bytes):
                            yield content
                        else:
                            yield "no bytes in the column of images"
                    number += 1


# ---- Splits that a source does not have


def assign_splits(found: list[tuple[SplitName | None, str]], path: Path) -> list[SplitName]:
    """The split of each image, from the one that the source gives (or None) and its digest.

    Splits that the source does not have are taken from the training images, a seventh of them each,
    by the digest: the same image twice is in one split, other images change nothing, and no seed is
    involved. Raises :class:`DataError` if there are too few different images.
    """
    given = {split for split, _ in found} - {None}
    if given and "train" not in given:
        raise DataError(f"{path} has images of the splits {', '.join(map(str, given))} alone.")
    own = [name for name in ("test", "validation") if name not in given]  # each has its seventh
    split_of = dict[str, SplitName]()
    for split, digest in found:
        if split in (None, "train"):
            seventh = int(digest, 16) * 7 >> 4 * len(digest)
            name = ("test", "validation")[seventh] if seventh < 2 else "train"
            split_of[digest] = cast(SplitName, name if name in own else "train")
    _fill_empty(split_of, cast(list[SplitName], [name for name in SPLITS if name in own]), path)
    return [split_of[digest] if split in (None, "train") else split for split, digest in found]


def _fill_empty(split_of: dict[str, SplitName], own: list[SplitName], path: Path) -> None:
    """Give each split of a very small set an image; the test split comes last."""
    for name in ("train", *own):
        counts = Counter(split_of.values())
        largest = max(SPLITS, key=lambda split: counts[split])
        if counts[name]:
            continue
        if counts[largest] > 1:
            split_of[min(digest for digest in split_of if split_of[digest] == largest)] = name
        elif name != "test":
            raise DataError(
                f"{path} holds {plural(len(split_of), 'different image')}, too few for a training "
                "and a validation split."
            )


def repetitions(found: list[tuple[SplitName, str]]) -> dict[str, object]:
    """Images that are in more than one split, and how many are there more than once."""
    digests = {name: {digest for split, digest in found if split == name} for name in SPLITS}
    return {
        "twice": {
            f"{one}, {other}": len(digests[one] & digests[other])
            for one, other in itertools.combinations(SPLITS, 2)
            if digests[one] & digests[other]
        },
        "repeated": len(found) - len(set().union(*digests.values())),
    }
