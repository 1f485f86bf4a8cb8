"""Atomic, durable file writes: after a kill or a power cut a file is the old or the new one.

At a power cut, written data may still be in memory, and so may a folder's list of names. Therefore
a new file is written beside the old one, fsynced, renamed over it, and then its folder is fsynced,
as Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), recommend.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vae_hyperband.common.errors import ConfigError, DataError, RunFolderError


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


class replacing:
    """``with replacing(path) as temporary:`` renames temporary over path if nothing was raised."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=_prefix(self.path))
        if hasattr(os, "fchmod"):
            os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's 0600 would hide it from colleagues
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            os.unlink(self.temporary)
            return
        try:
            os.replace(self.temporary, self.path)
        except OSError:
            os.unlink(self.temporary)
            raise
        fsync_folder(self.path.parent)


def _prefix(path: Path) -> str:
    return f".{path.name}-"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_folder(folder: Path) -> None:
    """Write a folder's list of names to disk: new, renamed and removed ones."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left of replacing the file. No other may be replacing it now."""
    for leftover in path.parent.glob(f"{_prefix(path)}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably, after reading back and comparing what was written.

    Raises :class:`RunFolderError` if it cannot be written; the old file is then intact.
    """
    write_together({path: content})


def write_together(contents: dict[Path, bytes]) -> None:
    """Replace files that belong together: all are on disk before the first one is renamed.

    The first one of the dictionary is renamed last. Raises :class:`RunFolderError` as
    :func:`write_bytes` does.
    """
    with contextlib.ExitStack() as files:
        for path, content in contents.items():
            try:
                temporary = files.enter_context(_replacing_named(path))
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if Path(temporary).read_bytes() != content:
                    raise OSError(errno.EIO, "the data read back differ from those written")
            except OSError as error:
                raise _unwritable(path, error) from error


@contextlib.contextmanager
def _replacing_named(path: Path) -> Iterator[str]:
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path} cannot be written: {error.strerror}.")


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically and durably, or raise :class:`RunFolderError`."""
    if path.exists() and not path.is_file():  # such as /dev/stdout, not to be replaced
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _unwritable(path, error) from error
    else:
        write_bytes(real(path), text.encode())


def real(path: Path) -> Path:
    """The path without symbolic links; unlike Path.resolve it does not raise for a loop of them."""
    return Path(os.path.realpath(path))


def check_place(path: Path, *endings: str, option: str = "--out") -> None:
    """Create the folder of a file. Raises :class:`RunFolderError` if the file cannot be written.

    Raises :class:`ConfigError` if its name has none of the ``endings``: it might replace a file of
    another kind.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder: give the path of a file.")
    if path.exists() and not path.is_file():
        return  # such as /dev/stdout
    if endings and path.suffix not in endings:
        raise ConfigError(f"{option} is {path}, but must end in {' or '.join(endings)}.")
    make_folder(real(path).parent)
    try:
        with tempfile.TemporaryFile(dir=real(path).parent):
            pass
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error


def make_folder(folder: Path) -> None:
    """Create a folder durably. Raises :class:`RunFolderError` if it cannot be written to."""
    try:
        _make_durably(folder)
    except OSError as error:
        raise RunFolderError(f"The folder {folder} cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise RunFolderError(f"The folder {folder} cannot be written to: choose another place.")


def _make_durably(folder: Path) -> None:
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder whose files another user may have written: this process would trust them."""
    if not hasattr(os, "geteuid"):  # Windows: neither owners nor modes are in a stat
        return
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o002:
        raise RunFolderError(
            f"{folder} belongs to another user or is writable by everyone, so its files cannot be "
            "trusted: choose another --run, or correct its owner and mode."
        )


def no_link(path: str | Path, flags: int) -> int:
    """An opener for ``open`` that refuses symbolic links, which would change another file."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def reserve(handle: int, num_bytes: int) -> None:
    """Give a file its size, and its room on the disk where the system can do that."""
    # writing to a mapped file without room would end the process by a signal
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, num_bytes)
    else:
        os.ftruncate(handle, num_bytes)


class AppendedFile:
    """A file to append to; what does not fit on a full disk is kept for the next flush."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "ab", buffering=0, opener=no_link)  # noqa: SIM115, close()
            fsync_folder(path.parent)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
        self._waiting = bytearray()

    def write(self, content: bytes) -> None:
        self._waiting += content

    def flush(self) -> None:
        """Write durably. Raises :class:`RunFolderError`, after which nothing is lost."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        self._file.close()
