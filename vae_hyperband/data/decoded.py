"""Images are decoded once: into one array of bytes in the user's cache, mapped into memory.

The array is kept under a digest of all files that it was made from, so a copy of the files
elsewhere finds it, and a changed file makes another one. A process that is killed while it decodes
leaves its work to the next one; the array has its name only when it is complete. Its rows are in
the order of splits and, within one, of the images' digests: a split is a slice of it, and its first
images, which pictures show, are of all classes.

Shape suffixes: N images, C channels, H height, W width.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import DataError, RunFolderError, StoppedError
from vae_hyperband.common.files import cache_folder, fsync_folder, make_folder, reserve
from vae_hyperband.common.process import available_cpus, file_lock, on_terminal
from vae_hyperband.data.folders import find_source
from vae_hyperband.data.pictures import PictureError, bombs_refused, decode, size_of
from vae_hyperband.data.sources import (
    AS_THEY_ARE,
    SPLITS,
    Content,
    ImageSettings,
    Source,
    SplitName,
    assign_splits,
    file_digests,
    repetitions,
)

#: Of the array and its facts. A new one when the same files are to give other pixels or splits.
VERSION = 1

CHUNK = 64  # images that a thread decodes at a time
CHUNK_BYTES = 1 << 26  # or fewer: files of many megabytes are not to fill the memory
SAVE_SECONDS = 2.0  # between two records of what is decoded: the most that a kill can cost
VERIFIED_BYTES = 1 << 28  # an array up to this size is verified by every process that maps it
COPY_ROWS = 1024  # images that are copied at a time

Size = tuple[int, int]  # height, width


class Record(NamedTuple):
    """What is known of an image once it is decoded; one line of JSON holds those of a chunk."""

    digest: str  # of its content; empty if it cannot be decoded
    size: Size
    mode: str  # Pillow's; or why it cannot be decoded
    is_grey: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ImageSet:
    """A decoded set of images: where its arrays are, and what is known of it."""

    folder: Path
    kind: str  # what it was decoded from
    image_shape: tuple[int, int, int]  # channels, height, width
    counts: dict[SplitName, int]
    by_hash: tuple[SplitName, ...]  # splits that the source does not have
    class_names: tuple[str, ...]
    digest: str  # SHA-256 of images and labels of the training and the validation split
    sizes: dict[str, int]  # as 48x32, height first: how many images had it before resizing
    modes: dict[str, int]  # Pillow's names
    notes: dict[str, int]  # what was done to how many images
    skipped: dict[str, str]  # names of images that cannot be used, and why
    remarks: tuple[str, ...]  # other things left out
    twice: dict[str, int]  # pairs of splits, as "train, test": images that are in both
    repeated: int  # images whose content an earlier image has, too

    @property
    def images_NCHW(self) -> np.ndarray:
        """All images, mapped into memory, read-only: a writable map would count as this process's
        own memory."""
        try:
            array: np.ndarray = np.load(self.folder / IMAGES, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _lost(self.folder) from error
        if array.shape != (sum(self.counts.values()), *self.image_shape):
            raise _lost(self.folder)
        return array

    @property
    def labels_N(self) -> np.ndarray:
        """Their labels, int64."""
        try:
            array: np.ndarray = np.load(self.folder / LABELS, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _lost(self.folder) from error
        if array.shape != (sum(self.counts.values()),):
            raise _lost(self.folder)
        return array

    @property
    def names(self) -> list[str]:
        """Their names below the source."""
        return cast(list[str], json.loads((self.folder / NAMES).read_text(encoding="utf-8")))

    def rows(self, split: SplitName) -> slice:
        """Which rows of the arrays are a split's."""
        before = sum(self.counts[name] for name in SPLITS[: SPLITS.index(split)])
        return slice(before, before + self.counts[split])


IMAGES, LABELS, NAMES, FACTS = "images.npy", "labels.npy", "names.json", "facts.json"


def _lost(folder: Path) -> DataError:
    return DataError(f"{folder} is damaged: remove it, and the images are decoded again.")


def decoded_set(
    path: Path,
    settings: ImageSettings = AS_THEY_ARE,
    should_stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> ImageSet:
    """The images at a path as one array; they are decoded if that was not done before.

    Of several processes, one decodes and the others wait for it. Raises :class:`DataError` for
    what cannot be read, and :class:`StoppedError` when ``should_stop`` is true while it decodes:
    the next call continues.
    """
    source = find_source(path)
    try:
        cache = cache_folder() / "images"
        folder = cache / _key(source, settings, cache)
        if not folder.is_dir():
            make_folder(cache)
            with _only_decoder(folder, should_stop):
                if not folder.is_dir():  # another process has decoded it meanwhile
                    _Decoding(source, settings, folder, should_stop, quiet).run()
    except (OSError, RunFolderError) as error:
        raise DataError(
            f"The images cannot be decoded into the cache ({error}): set VAE_HYPERBAND_CACHE to a "
            "folder that can be written."
        ) from error
    # of a process that was killed when it had just finished
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)
    found = _loaded(folder)
    if (folder / IMAGES).stat().st_size <= VERIFIED_BYTES:
        _verified_once(found.folder, (folder / IMAGES).stat().st_mtime_ns)
    return found


@functools.lru_cache(maxsize=8)
def _verified_once(folder: Path, mtime_ns: int) -> None:
    verified(_loaded(folder))


def _loaded(folder: Path) -> ImageSet:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for name in ("image_shape", "by_hash", "class_names", "remarks"):
            facts[name] = tuple(facts[name])
        return ImageSet(folder=folder, **facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _lost(folder) from error


def verified(found: ImageSet) -> ImageSet:
    """The set, if its images are those that were decoded. Raises :class:`DataError`."""
    trained_on, images_NCHW = found.rows("test").start, found.images_NCHW
    digest = hashlib.sha256(repr(found.image_shape).encode())
    for start in range(0, trained_on, COPY_ROWS):
        digest.update(images_NCHW[start:trained_on][:COPY_ROWS].data)
    digest.update(found.labels_N[:trained_on].data)
    if digest.hexdigest() != found.digest:
        raise _lost(found.folder)
    return found


# ---- Which array: a digest of the files


def _key(source: Source, settings: ImageSettings, cache: Path) -> str:
    """The name of the array of these files with these settings."""
    seen = cache / "seen" / f"{_short_digest(os.path.realpath(source.path))}.json"
    digests = file_digests(source.files, seen)
    # JSON of all that decides the array; kinds and names, since labels and splits come from them
    return _short_digest(json.dumps([VERSION, source.kind, settings, sorted(digests.items())]))


def _short_digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


@contextlib.contextmanager
def _only_decoder(folder: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other process decodes these images."""
    said = False

    def waiting() -> bool:
        nonlocal said
        if not said:
            print("another process decodes these images: waiting for it", file=sys.stderr)
        said = True
        _stop_if(should_stop)
        return False

    path = folder.with_name(f".{folder.name}.lock")
    with file_lock(path).acquire(timeout=-1, poll_interval=0.2, cancel_check=waiting):
        yield
        with contextlib.suppress(OSError):  # on Windows it goes when it is released
            path.unlink(missing_ok=True)


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StoppedError(
            "Stopped while the images were decoded: the same command continues where this one was."
        )


# ---- Decoding


class _Decoding:
    """Decode the images of a source into a folder that is then complete."""

    def __init__(
        self,
        source: Source,
        settings: ImageSettings,
        folder: Path,
        should_stop: Callable[[], bool],
        quiet: bool,
    ) -> None:
        self.source, self.settings, self.folder = source, settings, folder
        self.should_stop, self.quiet = should_stop, quiet
        self.items = source.listing.items
        self.part = folder.with_name(f"{folder.name}.part")
        self.size = settings.image_size or self._first_size()
        # grey images among others have three channels; if all are grey, one is kept at the end
        shape = (len(self.items), settings.channels or 3, *self.size)
        make_folder(self.part)
        self.pixels = _mapped(self.part, shape)
        self.sizes_differ = False  # then only their sizes are of interest, for the message

    def run(self) -> None:
        try:
            with bombs_refused():
                records = self._decode()
            self._check_sizes(records)
            self._check_unchanged()
            self._complete(records)
        except DataError:  # the same images would give the same error
            shutil.rmtree(self.part, ignore_errors=True)  # Windows keeps a file that is mapped
            raise
        num = sum(not record.digest for record in records)
        lacks = [f"{plural(num, 'image')} skipped"] * (num > 0) + self.source.listing.remarks
        if lacks:
            self._say(f"note: {'; '.join(lacks)} (vae-hyperband data --data says more)")
        # another process that finds the array complete may be removing these, too
        shutil.rmtree(self.part, ignore_errors=True)

    def _first_size(self) -> Size:
        """That of the first image that can be decoded: the one of all, if they agree."""
        with bombs_refused():
            for content in self.source.read(0):
                with contextlib.suppress(PictureError):
                    if not isinstance(content, str):
                        return decode(content).size
        raise DataError(f"{self.source.path}: none of its images can be decoded.")

    def _decode(self) -> list[Record]:
        """Decode what was not decoded yet; the records of all images."""
        journal = self.part / "records"
        records = _read_records(journal)
        del records[len(self.items) :]
        with (
            open(journal, "ab") as file,
            ThreadPoolExecutor(available_cpus()) as pool,
            self._bar(len(records)) as bar,
        ):
            lines, saved = list[bytes](), time.monotonic()
            waiting = deque[Future[list[Record]]]()
            chunks = self._chunks(len(records))
            while True:
                for chunk in itertools.islice(chunks, 2 * available_cpus() - len(waiting)):
                    waiting.append(pool.submit(self._decode_chunk, *chunk))
                if waiting:
                    found = waiting.popleft().result()
                    records += found
                    lines.append(json.dumps(found).encode() + b"\n")
                    bar.update(len(found))
                if not waiting or time.monotonic() - saved > SAVE_SECONDS or self.should_stop():
                    # the pixels first: a record says that they are there
                    self.pixels.flush()
                    file.write(b"".join(lines))
                    file.flush()
                    os.fsync(file.fileno())
                    lines, saved = [], time.monotonic()
                    _stop_if(self.should_stop)
                if not waiting:
                    return records

    def _chunks(self, start: int) -> Iterator[tuple[int, list[Content]]]:
        contents = self.source.read(start)
        chunk, num_bytes = list[Content](), 0
        for content in contents:
            chunk.append(content)
            num_bytes += len(content) if isinstance(content, bytes) else 0
            if len(chunk) == CHUNK or num_bytes > CHUNK_BYTES:
                yield start, chunk
                start, chunk, num_bytes = start + len(chunk), [], 0
        if chunk:
            yield start, chunk

    def _decode_chunk(self, start: int, contents: list[Content]) -> list[Record]:
        return [self._decode_one(start + i, content) for i, content in enumerate(contents)]

    def _decode_one(self, number: int, content: Content) -> Record:
        fit, channels = self.settings.fit, self.settings.channels
        if isinstance(content, str):  # why it has none
            return Record("", (0, 0), content, False, ())
        try:
            if self.sizes_differ:
                return Record("not decoded", size_of(content), "", False, ())
            picture = decode(content, self.size, fit, channels)
        except PictureError as error:
            return Record("", (0, 0), str(error), False, ())
        if self.settings.image_size is None and picture.size != self.size:
            self.sizes_differ = True
        pixels_CHW = picture.pixels_CHW
        self.pixels[number] = pixels_CHW  # one channel is repeated where three are kept
        is_grey = len(pixels_CHW) == 1 or bool((pixels_CHW == pixels_CHW[:1]).all())
        return Record(picture.digest, picture.size, picture.mode, is_grey, picture.notes)

    def _bar(self, done: int) -> "tqdm":
        if not on_terminal():
            self._say(f"decoding {plural(len(self.items) - done, 'image')} of {self.source.path}")
        how = {"desc": "decoding", "unit": " images", "leave": False}
        quiet = self.quiet or not on_terminal()
        return tqdm(total=len(self.items), initial=done, disable=quiet, **how)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _check_unchanged(self) -> None:
        """Raise :class:`DataError` if files have changed since the array was named after them."""
        if (
            _key(find_source(self.source.path), self.settings, self.folder.parent)
            != self.folder.name
        ):
            raise DataError(f"Files of {self.source.path} changed while they were decoded.")

    def _check_sizes(self, records: list[Record]) -> None:
        """Raise :class:`DataError` if nothing was decoded, or sizes differ and none was given."""
        sizes = Counter(record.size for record in records if record.digest)
        if not sizes:
            name, reason = self.items[0].name, records[0].mode
            raise DataError(
                f"{self.source.path}: none of its {plural(len(records), 'image')} can be decoded; "
                f"{name} is {reason}."
            )
        if self.settings.image_size is None and len(sizes) > 1:
            common = sizes.most_common(3)
            found = ", ".join(f"{plural(num, 'image')} of {h}x{w}" for (h, w), num in common)
            raise DataError(
                f"The images of {self.source.path} have {len(sizes)} sizes ({found}"
                f"{', ...' if len(sizes) > 3 else ''}): give --image-size, such as --image-size "
                f"{_size_word(common[0][0])}, and --fit crop, pad or stretch."
            )

    def _complete(self, records: list[Record]) -> None:
        """Write the arrays in the order of splits and digests, and what is known of them."""
        good = [number for number, record in enumerate(records) if record.digest]
        given = {item.split for item in self.items} - {None}
        splits = assign_splits(
            [(self.items[number].split, records[number].digest) for number in good]
        )
        if lost := given - {self.items[number].split for number in good}:
            raise DataError(
                f"{self.source.path}: none of the images of {', '.join(map(str, lost))} can be "
                "decoded."
            )
        split_of = dict(zip(good, splits, strict=True))
        order = sorted(
            good,
            key=lambda n: (SPLITS.index(split_of[n]), records[n].digest, self.items[n].name),
        )
        keep_grey = all(records[number].is_grey for number in good)
        channels = self.settings.channels or (1 if keep_grey else 3)
        counts = Counter(splits)
        complete = self.part / "complete"
        shutil.rmtree(complete, ignore_errors=True)
        complete.mkdir()
        labels_N = np.array([self.items[number].label for number in order], dtype=np.int64)
        np.save(complete / LABELS, labels_N)
        names = [self.items[number].name for number in order]
        (complete / NAMES).write_text(json.dumps(names), encoding="utf-8")
        trained_on = counts["train"] + counts["validation"]
        digest = self._write_images(complete / IMAGES, order, channels, labels_N[:trained_on])
        facts = {
            "kind": self.source.kind,
            "image_shape": [channels, *self.size],
            "counts": {name: counts[name] for name in SPLITS},
            "by_hash": [name for name in SPLITS if name not in given],
            "class_names": self.source.listing.class_names,
            "digest": digest,
            "sizes": _counted(_size_word(records[number].size) for number in good),
            "modes": _counted(records[number].mode for number in good),
            "notes": _counted(itertools.chain(*(records[number].notes for number in good))),
            "skipped": {
                item.name: record.mode
                for item, record in zip(self.items, records, strict=True)
                if not record.digest
            },
            "remarks": self.source.listing.remarks,
            **repetitions([(split_of[number], records[number].digest) for number in good]),
        }
        (complete / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for path in complete.iterdir():
            with open(path, "r+b") as file:  # Windows flushes no file that is open for reading
                os.fsync(file.fileno())
        complete.rename(self.folder)
        fsync_folder(self.folder.parent)

    def _write_images(self, path: Path, order: list[int], channels: int, labels: np.ndarray) -> str:
        """Write the images in that order; the SHA-256 of the first ones, which have the labels."""
        shape = (len(order), channels, *self.size)
        images_NCHW = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        with open(path, "r+b") as file:  # else a full disk would end the process by a signal
            reserve(file.fileno(), path.stat().st_size)
        found = hashlib.sha256(repr((channels, *self.size)).encode())
        for start in range(0, len(order), COPY_ROWS):
            _stop_if(self.should_stop)
            rows = slice(start, min(start + COPY_ROWS, len(order)))
            images_NCHW[rows] = self.pixels[order[rows], :channels]
            found.update(images_NCHW[rows.start : min(rows.stop, len(labels))].data)
        images_NCHW.flush()
        found.update(labels.data)
        return found.hexdigest()


def _mapped(part: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array on a file, which is made, or as it was left."""
    path, num_bytes = part / "pixels", math.prod(shape)
    if not path.exists() or path.stat().st_size != num_bytes:
        (part / "records").unlink(missing_ok=True)
        with open(path, "wb") as file:
            try:
                reserve(file.fileno(), num_bytes)  # a full disk is said now
            except OSError as error:
                path.unlink()
                raise DataError(
                    f"The decoded images need {num_bytes / 1e6:,.0f} MB in {part.parent}: "
                    f"{error.strerror}; set VAE_HYPERBAND_CACHE to a folder with more room."
                ) from error
    return np.memmap(path, np.uint8, "r+", shape=shape)


def _read_records(path: Path) -> list[Record]:
    """The records in a journal, up to the first line that is not complete, which is cut off."""
    records = list[Record]()
    if not path.exists():
        return records
    good = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                found = json.loads(line if line.endswith(b"\n") else b"")
                records += [Record(d, (s[0], s[1]), m, g, tuple(n)) for d, s, m, g, n in found]
            except (ValueError, TypeError):
                break
            good += len(line)
    os.truncate(path, good)
    return records


def _size_word(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
