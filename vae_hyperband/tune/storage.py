"""Where the files of a search's trials lie: a folder that all nodes share, or an object store.

A trial is trained in a folder. If the store is a folder, it is that one; if it is a URL
(s3://bucket/folder, gs://..., any that Arrow's file systems open), the trial is trained in a folder
of the node, which is copied to the store after every validation and from it before going on.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from vae_hyperband.common.errors import SearchError
from vae_hyperband.common.files import make_folder
from vae_hyperband.model.checkpoint import LATEST
from vae_hyperband.search.config import SearchOptions


@dataclass(frozen=True)
class TrialStore:
    """One folder or URL that holds a folder per trial."""

    root: str

    @property
    def is_url(self) -> bool:
        return "://" in self.root

    def work_folder(self, name: str) -> Path:
        """The folder to train in, with what the store has of the trial."""
        if not self.is_url:
            return Path(self.root) / name
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-")) / name
        make_folder(folder)
        remote, path = fs.FileSystem.from_uri(self._url(name))
        if remote.get_file_info(path).type == fs.FileType.Directory:
            fs.copy_files(path, str(folder), source_filesystem=remote)
        return folder

    def push(self, name: str, folder: Path) -> None:
        """Copy a work folder to the store; latest.pt last, since it speaks of all the rest."""
        if not self.is_url:
            return
        remote, path = fs.FileSystem.from_uri(self._url(name))
        inside = sorted(folder.rglob("*"))
        files = [file for file in inside if file.is_file() and file.name[0] != "."]  # no locks
        for file in sorted(files, key=lambda file: file.name == LATEST):
            target = f"{path}/{file.relative_to(folder)}"
            remote.create_dir(target.rpartition("/")[0])
            fs.copy_files(str(file), target, destination_filesystem=remote)

    def leave(self, folder: Path) -> None:
        """Remove a work folder that is a copy."""
        if self.is_url:
            shutil.rmtree(folder.parent, ignore_errors=True)

    def fetch(self, name: str, file: str, target: Path) -> None:
        """Copy one file of a trial to ``target``."""
        with self._one_sentence():
            if self.is_url:
                remote, path = fs.FileSystem.from_uri(self._url(f"{name}/{file}"))
                fs.copy_files(path, str(target), source_filesystem=remote)
            else:
                shutil.copyfile(Path(self.root) / name / file, target)

    def check(self) -> None:
        """Raise :class:`SearchError` now if the store cannot be used."""
        with self._one_sentence():
            if self.is_url:
                remote, path = fs.FileSystem.from_uri(self.root)
                remote.create_dir(path)
            else:
                make_folder(Path(self.root))

    @contextlib.contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        # Arrow raises whatever the file system of that scheme does
        except Exception as error:
            raise SearchError(
                f"--storage {self.root} cannot be used ({str(error).splitlines()[0]}): give a "
                "folder or a URL that can be written."
            ) from error

    def _url(self, name: str) -> str:
        """The URL of something in the store; what follows a "?" are the file system's options."""
        address, mark, options = self.root.partition("?")
        return f"{address.rstrip('/')}/{name}{mark}{options}"


def store_for(options: SearchOptions, search_id: str) -> TrialStore:
    """The store of a search whose options have absolute paths.

    ``search_id`` keeps apart what searches of one name, from other places, keep in one store.
    """
    if options.storage is None:
        return TrialStore(str(options.ckpt_folder / "trials"))
    address, mark, rest = options.storage.partition("?")
    return TrialStore(f"{address.rstrip('/')}/{options.run}-{search_id}{mark}{rest}")
