"""What a program does to its files, and what of it a power cut may leave.

``watch`` tells of every change that this process makes below a folder, just before it is made.
``crashes`` plays a list of such changes back and enumerates what may be on disk if the power goes
after any of them. What it supposes of a file system is what POSIX promises and no more: a file has
what it had at its last fsync, or any part of what was written since; a folder has the names it had
at its last fsync, and any of the changes since, in their order; a rename happens or does not. The
method is that of Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import builtins
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Change(NamedTuple):
    kind: str  # create, write, truncate, fsync, mkdir, rename, link, unlink, said
    path: str  # below the folder that is watched
    #: bytes written; length truncated to; second name; what was said
    what: Any = None


class _Written:
    """A file opened for writing that tells of what is done to it."""

    def __init__(self, file: Any, tell: Callable[..., None], path: str) -> None:
        self._file, self._tell, self._path = file, tell, path

    def write(self, content: Any) -> int:
        data = content.encode() if isinstance(content, str) else bytes(content)
        self._tell("write", self._path, data)
        return self._file.write(content)

    def truncate(self, length: int) -> int:
        self._tell("truncate", self._path, length)
        return self._file.truncate(length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def watch(
    folder: Path, on_change: Callable[[Change], None], patch: Callable[[Any, str, Any], None]
) -> None:
    """Call ``on_change`` before each change; ``patch`` is setattr or monkeypatch's."""
    root = str(folder.resolve())
    handles: dict[int, str] = {}
    real = {name: getattr(os, name) for name in PATCHED}
    real_open = builtins.open

    def below(path: Any) -> str | None:
        if isinstance(path, int):
            return None
        full = os.path.abspath(os.fspath(path))
        return os.path.relpath(full, root) if full.startswith(root + os.sep) else None

    def tell(kind: str, path: str, what: Any = None) -> None:
        on_change(Change(kind, path, what))

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        name = below(path)
        if name and flags & os.O_CREAT and not os.path.exists(path):
            tell("create", name)
        handle = real["open"](path, flags, *args, **kwargs)
        handles[handle] = name or ("." if os.path.abspath(os.fspath(path)) == root else "")
        return handle

    def os_close(handle: int) -> None:
        handles.pop(handle, None)
        real["close"](handle)

    def os_fsync(handle: int) -> None:
        if name := handles.get(handle):
            tell("fsync", name)
        real["fsync"](handle)

    def two(kind: str, name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            if (a := below(source)) and (b := below(target)):
                tell(kind, a, b)
            real[name](source, target, **kwargs)

        return call

    def one(kind: str, name: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            if below(path) and (kind == "unlink") == os.path.lexists(path):
                tell(kind, below(path) or "")
            real[name](path, *args, **kwargs)

        return call

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        name = below(path)
        if name is None or not set(mode) & set("wax+"):
            return real_open(path, mode, *args, **kwargs)
        if not os.path.exists(path):
            tell("create", name)
        elif "w" in mode:
            tell("truncate", name, 0)
        file = real_open(path, mode, *args, **kwargs)
        handles[file.fileno()] = name
        return _Written(file, tell, name)

    calls = {
        "open": os_open, "close": os_close, "fsync": os_fsync,
        "replace": two("rename", "replace"), "rename": two("rename", "rename"),
        "link": two("link", "link"), "unlink": one("unlink", "unlink"),
        "remove": one("unlink", "remove"), "mkdir": one("mkdir", "mkdir"),
    }  # fmt: skip
    for name, call in calls.items():
        patch(os, name, call)
    patch(builtins, "open", opened)


PATCHED = ("open", "close", "fsync", "replace", "rename", "link", "unlink", "remove", "mkdir")


def end_before(number: int, folder: Path) -> None:
    """End this process just before the change of that number, counted from 1, to the folder.

    Of a write, the first half is still made.
    """
    count = 0

    def on_change(change: Change) -> None:
        nonlocal count
        count += 1
        if count == number:
            if change.kind == "write":
                half = change.what[: len(change.what) // 2]
                with os.fdopen(
                    real_open(folder / change.path, os.O_WRONLY | os.O_APPEND), "ab"
                ) as f:
                    f.write(half)
            os._exit(9)

    real_open = os.open
    watch(folder, on_change, setattr)


class _File:
    def __init__(self) -> None:
        self.now, self.synced = b"", b""

    def left(self) -> list[bytes]:
        """What a power cut may leave of it."""
        if self.now == self.synced:
            return [self.now]
        start = len(self.synced) if self.now.startswith(self.synced) else 0
        old, new = self.now[:start], self.now[start:]
        return [self.now, self.synced, old + new[: len(new) // 2], old + bytes(len(new))]


class _Folder:
    def __init__(self) -> None:
        self.synced: dict[str, Any] = {}  # name -> file or folder
        self.since: list[tuple[tuple[str, Any], ...]] = []  # names set, or removed by None, at once

    def now(self) -> dict[str, Any]:
        return self.after(self.since)

    def after(self, changes: Any) -> dict[str, Any]:
        names = dict(self.synced)
        for change in changes:
            names.update(change)
        return {name: thing for name, thing in names.items() if thing is not None}

    def left(self) -> list[dict[str, Any]]:
        """What a power cut may leave of its names: any of the changes since the last fsync."""
        if len(self.since) <= 4:
            choices = itertools.product((True, False), repeat=len(self.since))
            kept = [tuple(itertools.compress(self.since, choice)) for choice in choices]
        else:  # too many to try all: those up to each one, and all but one
            kept = [tuple(self.since[:n]) for n in range(len(self.since) + 1)]
            kept += [
                tuple(c for i, c in enumerate(self.since) if i != left_out)
                for left_out in range(len(self.since))
            ]
        return [self.after(changes) for changes in kept]


Left = dict[str, bytes]  # files by their path


def crashes(changes: list[Change]) -> Iterator[tuple[int, Left]]:
    """What a power cut after the first n changes may leave, for every n, with that n."""
    root = _Folder()

    def find(path: str) -> Any:
        thing: Any = root
        for part in Path(path).parts:
            thing = thing.now()[part]
        return thing

    def names(path: str, thing: Any) -> tuple[_Folder, tuple[str, Any]]:
        return find(str(Path(path).parent)), (Path(path).name, thing)

    seen: set[int] = set()
    for number, (kind, path, what) in enumerate(changes, start=1):
        if kind in ("create", "mkdir"):
            folder, entry = names(path, _File() if kind == "create" else _Folder())
            folder.since.append((entry,))
        elif kind == "write":
            find(path).now += what
        elif kind == "truncate":
            find(path).now = find(path).now[:what]
        elif kind == "fsync":
            thing = find(path)
            if isinstance(thing, _Folder):
                thing.synced, thing.since = thing.now(), []
            else:
                thing.synced = thing.now
        elif kind == "rename":
            (folder, gone), (to, entry) = names(path, None), names(what, find(path))
            assert folder is to, "a rename from folder to folder is not modelled"
            folder.since.append((gone, entry))
        elif kind == "link":
            folder, entry = names(what, find(path))
            folder.since.append((entry,))
        elif kind == "unlink":
            folder, entry = names(path, None)
            folder.since.append((entry,))
        for left in _left_of(root):
            key = hash((number if kind == "said" else 0, tuple(sorted(left.items()))))
            if key not in seen:
                seen.add(key)
                yield number, left


def _left_of(root: _Folder) -> Iterator[Left]:
    """All name spaces; in each all files as they were, all as they were synced, each one torn."""
    for places in _places(root, ""):
        files = {path: thing.left() for path, thing in places.items()}
        yield {path: choices[0] for path, choices in files.items()}
        yield {path: choices[min(1, len(choices) - 1)] for path, choices in files.items()}
        for path, choices in files.items():
            for torn in choices[2:]:
                yield {other: torn if other == path else files[other][0] for other in files}


def _places(folder: _Folder, prefix: str) -> Iterator[dict[str, _File]]:
    for names in folder.left():
        inner = [
            list(_places(thing, f"{prefix}{name}/"))
            for name, thing in names.items()
            if isinstance(thing, _Folder)
        ]
        own = {
            prefix + name: thing for name, thing in names.items() if not isinstance(thing, _Folder)
        }
        for choice in itertools.product(*inner):
            found = dict(own)
            for part in choice:
                found.update(part)
            yield found
