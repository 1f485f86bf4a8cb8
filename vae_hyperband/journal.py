"""The decision log of a search: an append-only file of JSON lines, the one thing it knows.

What is in it happened; what is not did not. Each line is on disk before anything follows from it,
and carries a check of its own, so that a line torn by a kill or a power cut is told from a damaged
file: the former can only be the last one, and is taken back.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, Self

from vae_hyperband.errors import RunFolderError, SearchError
from vae_hyperband.files import fsync_folder, no_link

Event = dict[str, Any]


class Journal:
    """The events of the log so far, and a pen at its end. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = read_events(path)
        self._file: io.FileIO | None = None

    def __enter__(self) -> Self:
        try:
            self._file = file = open(self.path, "ab", buffering=0, opener=no_link)
            fsync_folder(self.path.parent)
            whole = sum(len(_line(event)) for event in self.events)
            if file.tell() > whole:  # a torn line
                file.truncate(whole)
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}.") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, event: str, **facts: Any) -> Event:
        """Write one event; it is on disk when this returns. Raises :class:`RunFolderError`."""
        assert self._file is not None
        written: Event = {"event": event, **facts}
        start = self._file.seek(0, os.SEEK_END)
        try:
            line = _line(written)
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise RunFolderError(
                f"{self.path} cannot be written ({error.strerror}): make room, then the same "
                "command goes on."
            ) from error
        self.events.append(written)
        return written


def read_events(path: Path) -> list[Event]:
    """The events of a log, a torn last line left out; none if there is no file.

    Raises :class:`SearchError` for a log that is damaged elsewhere.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise SearchError(f"{path} cannot be read: {error.strerror}.") from error
    events = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or torn
        event = _event(line)
        if event is None:
            if number == len(lines) - 1 and lines[-1] == b"":
                break  # a power cut may leave the length of a line, but not its content
            raise SearchError(
                f"Line {number} of {path} is damaged, so the search cannot go on from it: start "
                "anew with --fresh, or with another --run."
            )
        events.append(event)
    return events


def _line(event: Event) -> bytes:
    text = json.dumps(event)
    return f'{text[:-1]}, "check": "{_check(text)}"}}\n'.encode()


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        check = event.pop("check")
        return event if check == _check(json.dumps(event)) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
