"""What lies at ``--data PATH``: folders and archives of pictures, and the files of sources.py.

Folders give labels as torchvision's ImageFolder reads them: the first folder below ``train/``,
``validation/`` (``val/``) and ``test/``, or below PATH if it has none of these.
"""

import functools
import itertools
import lzma
import os
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import DataError
from vae_hyperband.data.sources import (
    ENDINGS,
    IDX_NAMES,
    MAX_FILE_BYTES,
    SPLIT_NAMES,
    Arrays,
    Content,
    Idx,
    Item,
    Listing,
    Parquet,
    Source,
    SplitName,
    class_order,
)

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
HIDDEN = frozenset({"thumbs.db", "desktop.ini", "__macosx"})  # besides names that begin with a dot


def find_source(path: Path) -> Source:
    """What lies at a path. Raises :class:`DataError` if that is nothing with images."""
    if not path.exists():
        raise DataError(f"--data is {path}, but there is no such file or folder.")
    if path.is_dir():
        return _in_folder(path)
    name = path.name.lower()
    for endings, kind in (
        (ARCHIVES, Archive),
        ((".npy", ".npz"), Arrays),
        ((".parquet",), Parquet),
    ):
        if name.endswith(endings):
            return kind(path, {path.name: path})
    if name.endswith(tuple(ENDINGS)):
        raise DataError(f"--data is {path}, which is one image: give the folder that it is in.")
    raise DataError(
        f"--data is {path}, but must be a folder of images, an archive of one "
        f"({', '.join(ARCHIVES)}), or a .npy, .npz or .parquet file."
    )


def _in_folder(folder: Path) -> Source:
    found = dict(_walk(folder))
    if idx := idx_files(found):
        return Idx(folder, idx)
    parquet = {name: path for name, path in found.items() if name.lower().endswith(".parquet")}
    pictures = {name: path for name, path in found.items() if _is_picture(name)}
    if pictures or not parquet:
        return Folder(folder, pictures, _others(found))
    return Parquet(folder, parquet)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """All files below a folder, by their paths in it, sorted; hidden ones left out.

    Links are followed: data sets are often folders of links. A folder that was seen before is not
    entered again, so that a loop of links ends.
    """
    seen, folders = set[tuple[int, int]](), [("", root)]
    while folders:
        prefix, folder = folders.pop()
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}.") from error
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself; is_file is False for one that leads nowhere
                continue
            if is_folder:
                folders.append((f"{prefix}{entry.name}/", Path(entry.path)))
            elif is_file:
                yield prefix + entry.name, Path(entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def _is_picture(name: str) -> bool:
    return PurePosixPath(name.lower()).suffix in ENDINGS


def _others(names: Iterable[str]) -> list[str]:
    """A remark on files that are no pictures by their names."""
    endings = Counter(
        PurePosixPath(name.lower()).suffix or "without an ending"
        for name in names
        if not _is_picture(name)
    )
    found = [f"{number:,} {ending}" for ending, number in endings.most_common(5)]
    return [f"files that are no images: {', '.join(found)}"] if found else []


# ---- Folders and archives: splits and labels from names


def listed(names: Iterable[str], remarks: list[str]) -> Listing:
    """Labels and splits of files by their paths, which keep their order."""
    parts = [(name, name.split("/")) for name in names]
    folders = {path[0] for _, path in parts if len(path) > 1}
    split_of = {f: SPLIT_NAMES[f.lower()] for f in folders if f.lower() in SPLIT_NAMES}
    # beside other folders, train is a class: of trains, or of training shoes
    if len(split_of) < len(folders) or "train" not in split_of.values():
        if split_of:
            taken = ", ".join(f"{folder}/" for folder in sorted(split_of))
            why = f"{taken} as a split: beside other folders it is a label"
            remarks = [*remarks, why]
        split_of = {}
    placed = list[tuple[str, str | None, SplitName | None]]()
    beside = 0
    for name, path in parts:
        split = split_of.get(path[0]) if len(path) > 1 else None
        if split_of and split is None:
            beside += 1
            continue
        inside = path[1:] if split else path
        placed.append((name, _class_name(inside[0]) if len(inside) > 1 else None, split))
    if beside:
        folders_named = ", ".join(f"{folder}/" for folder in sorted(split_of))
        remarks = [*remarks, f"{plural(beside, 'image')} beside {folders_named}"]
    labelled = [entry for entry in placed if entry[1] is not None]
    if labelled and len(labelled) < len(placed):
        loose = plural(len(placed) - len(labelled), "image")
        remarks = [*remarks, f"{loose} in no folder of a label, beside folders that have one"]
        placed = labelled
    classes = sorted({label for _, label, _ in placed if label is not None}, key=class_order)
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    items = [Item(name, numbers.get(label, 0), split) for name, label, split in placed]
    return Listing(items, tuple(classes), remarks)


def _class_name(folder: str) -> str:
    """One name for all ways to write it, as macOS has others; bytes that are no text as "?"."""
    return unicodedata.normalize("NFC", os.fsencode(folder).decode("utf-8", "replace"))


class Folder(Source):
    """A folder of pictures."""

    kind = "folder of images"

    def __init__(self, path: Path, files: dict[str, Path], remarks: list[str]) -> None:
        super().__init__(path, files)
        self._remarks = remarks

    @functools.cached_property
    def listing(self) -> Listing:
        if not self.files:
            found = f" ({self._remarks[0]})" if self._remarks else ": it is empty"
            raise DataError(
                f"{self.path} holds no image{found}; images end in {', '.join(sorted(ENDINGS))}."
            )
        found_listing = listed(self.files, self._remarks)
        with_images = {name.rpartition("/")[0] for name in self.files}
        with os.scandir(self.path) as entries:
            empty = [
                entry.name
                for entry in entries
                # not entry.is_dir(), which raises for a link to itself
                if os.path.isdir(entry.path)
                and not _is_hidden(entry.name)
                and not any(f"{folder}/".startswith(f"{entry.name}/") for folder in with_images)
            ]
        if empty:
            names = ", ".join(f"{name}/" for name in sorted(empty))
            found_listing.remarks.append(f"folders without an image: {names}")
        return found_listing

    def read(self, start: int) -> Iterator[Content]:
        for item in self.listing.items[start:]:
            path = self.files[item.name]
            try:
                if path.stat().st_size > MAX_FILE_BYTES:
                    yield _too_large(path.stat().st_size)
                    continue
                yield path.read_bytes()
            except OSError as error:
                yield f"cannot be read: {error.strerror}"


def _too_large(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB, more than a picture may have"


class Archive(Source):
    """A zip or tar file of a folder of pictures; links in it are not followed."""

    kind = "archive of images"

    @functools.cached_property
    def listing(self) -> Listing:
        with _archive_explained(self.path):
            names = list(dict.fromkeys(name for name, _ in self._members(None)))
        pictures = [name for name in names if _is_picture(name)]
        if not pictures:
            remarks = _others(names)
            found = f" ({remarks[0]})" if remarks else ""
            raise DataError(f"{self.path} holds no image{found}.")
        # most archives hold one folder that has the archive's name
        inside = os.path.commonpath([name.rpartition("/")[0] for name in pictures])
        cut = len(inside) + 1 if inside else 0
        found_listing = listed((name[cut:] for name in pictures), _others(names))
        self._inside = pictures[0][:cut]
        return found_listing

    def _wanted(self, found: Listing) -> Iterator[str]:
        """The names in the archive of the images that are listed."""
        return (self._inside + item.name for item in found.items)

    def read(self, start: int) -> Iterator[Content]:
        wanted = set(self._wanted(self.listing))
        with _archive_explained(self.path):
            for _, content in itertools.islice(self._members(wanted), start, None):
                assert content is not None
                yield content

    def _members(self, wanted: set[str] | None) -> Iterator[tuple[str, Content | None]]:
        """Names of files, in the archive's order, with their content if they are ``wanted``.

        Of several files of one name the first one.
        """
        left = None if wanted is None else set(wanted)
        for written, num_bytes, read in self._files():
            name = _plain_name(written)
            if left is None and name:
                yield name, None
            elif left and name in left:
                left.remove(name)
                yield name, _too_large(num_bytes) if num_bytes > MAX_FILE_BYTES else read()

    def _files(self) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
        """Name, size and content of each file in the archive, without folders, links, devices."""
        if self.path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    is_link = info.external_attr >> 28 == 0xA
                    if not info.is_dir() and not is_link:
                        yield info.filename, info.file_size, functools.partial(archive.read, info)
            return
        with tarfile.open(self.path, "r:*") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, member.size, file.read


def _plain_name(name: str) -> str:
    """A member's name without what other programs put into it; empty for hidden files.

    Some write backslashes, "./" before every name, or a name from the root.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "" if any(map(_is_hidden, parts)) else "/".join(parts)


class _archive_explained:
    """Turns what damaged archives raise into a :class:`DataError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        damaged = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
        if isinstance(error, RuntimeError | NotImplementedError):  # a password, a method
            raise DataError(f"{self.path} cannot be unpacked: {error}.") from error
        if isinstance(error, (*damaged, OSError)):
            reason = (str(error).splitlines() or [""])[0].rstrip(".:")
            raise DataError(f"{self.path} is damaged or not an archive: {reason}.") from error


def idx_files(found: dict[str, Path]) -> dict[str, Path]:
    """Those of the four IDX files that are among the files of a folder, by their plain names."""
    plain = dict[str, Path]()
    for name, path in found.items():
        called = name.rpartition("/")[2].removesuffix(".gz").replace(".idx", "-idx")
        if any(called in names for names in IDX_NAMES.values()):
            if called in plain and plain[called].parent != path.parent:
                raise DataError(
                    f"{called} is in {plain[called].parent} and in {path.parent}: give one of them."
                )
            plain.setdefault(called, path)
    return plain if IDX_NAMES["train"][0] in plain else {}
