"""Where the trials of a search keep their files: a folder that all nodes share, or a URL.

In a shared folder, a trial trains in its own subfolder. With a URL (s3://bucket/folder, gs://...,
whatever Arrow's file systems open), it trains in a temporary folder of the node, which is copied to
the store after every validation, and from the store before the trial continues.
"""

# Ray Tune has checkpoint storage of its own, but keeps there what it decides to, under names that
# its own record explains; here a trial is a run like any other, which any command can read.

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
    """A folder or URL that holds one folder per trial. Methods take the trial's name."""

    root: str

    @property
    def is_url(self) -> bool:
        return "://" in self.root

    def work_folder(self, name: str) -> Path:
        """The folder to train in; it holds what the store has of the trial."""
        if not self.is_url:
            return Path(self.root) / name
        # a new one each time: the process before may be alive, on this node or another
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-")) / name
        make_folder(folder)
        remote, path = fs.FileSystem.from_uri(self._url(name))
        if remote.get_file_info(path).type == fs.FileType.Directory:
            fs.copy_files(path, str(folder), source_filesystem=remote)
        return folder

    def push(self, name: str, folder: Path) -> None:
        """Copy a work folder to the store; nothing to do if it is in the store already."""
        if not self.is_url:
            return
        remote, path = fs.FileSystem.from_uri(self._url(name))
        inside = sorted(folder.rglob("*"))
        files = [file for file in inside if file.is_file() and file.name[0] != "."]  # no locks
        # latest.pt last: it names the others, so a kill in between must not leave it without them
        for file in sorted(files, key=lambda file: file.name == LATEST):
            target = f"{path}/{file.relative_to(folder)}"
            # object stores have no folders, but file:// and hdfs:// do
            remote.create_dir(target.rpartition("/")[0])
            fs.copy_files(str(file), target, destination_filesystem=remote)

    def discard(self, folder: Path) -> None:
        """Remove a work folder, if it is a copy."""
        if self.is_url:
            # what counts is in the store; a leftover in a temporary folder is no reason to fail
            shutil.rmtree(folder.parent, ignore_errors=True)

    def fetch(self, name: str, file: str, target: Path) -> None:
        """Copy one file of a trial to ``target``. Raises :class:`SearchError` if that fails."""
        with self._as_search_error():
            if self.is_url:
                remote, path = fs.FileSystem.from_uri(self._url(f"{name}/{file}"))
                fs.copy_files(path, str(target), source_filesystem=remote)
            else:
                shutil.copyfile(Path(self.root) / name / file, target)

    def check(self) -> None:
        """Raise :class:`SearchError` if the store cannot be used."""
        # before Ray is started, rather than in every trial
        with self._as_search_error():
            if self.is_url:
                remote, path = fs.FileSystem.from_uri(self.root)
                remote.create_dir(path)
            else:
                make_folder(Path(self.root))

    @contextlib.contextmanager
    def _as_search_error(self) -> Iterator[None]:
        try:
            yield
        # any: Arrow passes on whatever the library behind the scheme raises
        except Exception as error:
            raise SearchError(
                f"--storage {self.root} cannot be used ({str(error).splitlines()[0]}): give a "
                "folder or a URL that can be written."
            ) from error

    def _url(self, name: str) -> str:
        """The URL of something in the store; options after a "?" stay at the end."""
        address, mark, options = self.root.partition("?")
        return f"{address.rstrip('/')}/{name}{mark}{options}"


def store_for(options: SearchOptions, search_id: str) -> TrialStore:
    """The store of the search with that id; ``options`` must have absolute paths."""
    # the id keeps searches apart that share a --storage and a name, but not a folder
    if options.storage is None:
        return TrialStore(str(options.ckpt_folder / "trials"))
    address, mark, rest = options.storage.partition("?")
    return TrialStore(f"{address.rstrip('/')}/{options.run}-{search_id}{mark}{rest}")
