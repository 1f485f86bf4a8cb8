"""What images can come from: a :class:`Source`; arrays of numpy, IDX and Parquet files.

A source lists its images without decoding them, and reads them one after the other;
:mod:`~vae_hyperband.data.decoded` makes one array of them. Folders of pictures and archives are in
:mod:`~vae_hyperband.data.folders`.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import time
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import Fit
from vae_hyperband.common.errors import DataError, RunFolderError
from vae_hyperband.common.files import make_folder, write_text
from vae_hyperband.common.process import available_cpus
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


def class_order(name: str) -> tuple[int, int, str]:
    """By which classes are sorted: numbers as numbers, so that 0 to 10 are their own labels."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


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


# ---- Files, of which a source is made

#: A file that is younger may change within the resolution of its time.
SETTLED_SECONDS = 2.0


def file_digests(files: dict[str, Path], seen_path: Path) -> dict[str, str]:
    """The SHA-256 of each file; those whose size and time have not changed are not read again."""
    try:
        seen = json.loads(seen_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        seen = {}
    facts = {name: _facts_of(path) for name, path in files.items()}
    new = [name for name in files if seen.get(name, [])[:3] != facts[name]]
    with ThreadPoolExecutor(available_cpus()) as pool:
        for name, digest in zip(new, pool.map(_digest_of, map(files.get, new)), strict=True):
            seen[name] = [*facts[name], digest]
    if new or len(seen) != len(files):
        now = time.time_ns()
        kept = {n: seen[n] for n in files if now - max(seen[n][1:3]) > SETTLED_SECONDS * 1e9}
        with contextlib.suppress(RunFolderError):  # it only saves time
            make_folder(seen_path.parent)
            write_text(seen_path, json.dumps(kept))
    return {name: seen[name][3] for name in files}


def _facts_of(path: Path) -> list[int]:
    try:
        facts = path.stat()
    except OSError:
        return [-1, 0, 0]
    # the time of the last change cannot be set, unlike that of the last write
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _digest_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # the file is left out when it is decoded; the others are not
        return f"unreadable: {error.strerror}"


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
            # by its content, whatever the file is called
            file = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if isinstance(file, np.ndarray):
                return [Part(self.path.name, None, file)]
            with file:
                arrays = {name: file[name] for name in _useful(file.files)}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path} cannot be read as arrays: {error}.") from error
        return self._named(arrays)

    def _named(self, arrays: dict[str, np.ndarray]) -> list[Part]:
        parts = list[Part]()
        # one kind of names alone: the same images may be there under two
        kinds = [kind for kind in IMAGE_ARRAYS if any(n.startswith(f"{kind}_") for n in arrays)]
        for name in arrays:
            kind, _, split = name.partition("_")
            if kind in kinds[:1] and split in SPLIT_NAMES:
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
                    texts.update(_texts(labels))
        class_names = sorted(texts, key=class_order)
        numbers = {name: number for number, name in enumerate(class_names)}
        for name, split, images, labels in parts:
            if labels is None:
                found = [0] * len(images)
            elif labels.dtype.kind in "US":
                found = [numbers[text] for text in _texts(labels)]
            else:
                found = [int(label) for label in labels.reshape(-1).tolist()]
            items += [Item(f"{name}[{i}]", label, split) for i, label in enumerate(found)]
        return Listing(items, tuple(class_names), [])

    def read(self, start: int) -> Iterator[Content]:
        ends = list(itertools.accumulate(len(images) for _, _, images, _ in self._parts))
        for number in range(start, ends[-1]):
            part = bisect.bisect_right(ends, number)
            name, _, images, _ = self._parts[part]
            yield _as_bytes(self.path, name, images, number - (ends[part] - len(images)))


def _texts(labels: np.ndarray) -> list[str]:
    """Labels that are strings, or bytes of them."""
    texts = labels.reshape(-1).tolist()
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts]


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
    if labels.dtype.kind in "iu" and not 0 <= labels.min() <= labels.max() < 1 << 31:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{path} has the label {wrong}, but labels are 0, 1, 2 ...")
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
                f"{path}, image {number} of {name}, holds {what}, but floats must be in [0, 1]: "
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
    def _image_column(self) -> str:
        """The name of the column of images, which all files have."""
        first, *others = (self._file(path).schema_arrow.names for path in self.files.values())
        name = next((name for name in ("image", "img", "images") if name in first), None)
        for path, names in zip(self.files.values(), (first, *others), strict=True):
            if name not in names:
                raise DataError(
                    f"{path} has the columns {', '.join(names)}, but needs one called "
                    f"{name or 'image'}."
                )
        assert name is not None
        return name

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
        rows = list[tuple[str, object, SplitName | None]]()
        _ = self._image_column  # which every file has to have
        for name, path in self.files.items():
            file = self._file(path)
            # as the hub names them: train-00000-of-00002.parquet, or test/0000.parquet
            words = name.lower().replace("/", "-").replace(".", "-").split("-")
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
            labels = self._labels(file)
            rows += [(f"{name}[{i}]", label, split) for i, label in enumerate(labels)]
        texts = {label for _, label, _ in rows if isinstance(label, str)}
        first = _hub_names(self._file(next(iter(self.files.values()))))
        classes = [*first, *sorted(texts - set(first), key=class_order)]
        numbers = {text: number for number, text in enumerate(classes)}
        items = []
        for name, label, split in rows:
            number = numbers[label] if isinstance(label, str) else label
            if not isinstance(number, int) or not 0 <= number < 1 << 31:
                raise DataError(f"{self.path} has the label {label!r} at {name}: expected 0, 1 ...")
            items.append(Item(name, number, split))
        if not items:
            raise DataError(f"{self.path} holds no row.")
        return Listing(items, tuple(classes), [])

    def _labels(self, file: Any) -> list[object]:
        """The labels of a file: the names of its classes where it has them, else as they are."""
        columns = file.schema_arrow.names
        column = next((name for name in ("label", "labels") if name in columns), None)
        if column is None:
            return [0] * file.metadata.num_rows
        names, labels = _hub_names(file), file.read(columns=[column])[column].to_pylist()
        in_names = [isinstance(n, int) and 0 <= n < len(names) for n in labels]
        return [names[n] if named else n for n, named in zip(labels, in_names, strict=True)]

    def read(self, start: int) -> Iterator[Content]:
        image, number = self._image_column, 0
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


def _hub_names(file: Any) -> list[str]:
    """The names of the labels 0, 1 ... that the hub's metadata of a file have, if any."""
    try:
        about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
        label = features.get("label") or features.get("labels")
        return [str(name) for name in label["names"]]
    except (ValueError, TypeError, KeyError, AttributeError):  # metadata of another program
        return []


# ---- Splits that a source does not have


def assign_splits(found: list[tuple[SplitName | None, str]]) -> list[SplitName]:
    """The split of each image, from the one that the source gives (or None) and its digest.

    Splits that the source does not have are taken from the training images, a seventh of them each,
    by the digest: the same image twice is in one split, other images change nothing, and no seed is
    involved. Splits stay empty if there are too few different images.
    """
    given = {split for split, _ in found} - {None}
    if given and "train" not in given:
        return [cast(SplitName, split) for split, _ in found]  # there is nothing to take from
    own = [name for name in ("test", "validation") if name not in given]  # each has its seventh
    split_of = dict[str, SplitName]()
    for split, digest in found:
        if split in (None, "train"):
            seventh = int(digest, 16) * 7 >> 4 * len(digest)
            name = ("test", "validation")[seventh] if seventh < 2 else "train"
            split_of[digest] = cast(SplitName, name if name in own else "train")
    _fill_empty(split_of, cast(list[SplitName], [name for name in SPLITS if name in own]))
    return [split_of[digest] if split in (None, "train") else split for split, digest in found]


def _fill_empty(split_of: dict[str, SplitName], own: list[SplitName]) -> None:
    """Give each split of a very small set an image; the test split comes last."""
    for name in ("train", *own):
        counts = Counter(split_of.values())
        largest = max(SPLITS, key=lambda split: counts[split])
        if counts[name]:
            continue
        if counts[largest] > 1:
            split_of[min(digest for digest in split_of if split_of[digest] == largest)] = name


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
