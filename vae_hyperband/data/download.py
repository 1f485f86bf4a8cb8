"""Download Fashion-MNIST from a mirror, or install the system's package.

Downloads are not trusted: a file gets its name only after its content matched the known digest.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from filelock import Timeout

from vae_hyperband.common.errors import DataError, VAEHyperbandError
from vae_hyperband.common.files import cache_folder
from vae_hyperband.common.process import file_lock
from vae_hyperband.data.fashion_mnist import FASHION_MNIST_SHA256
from vae_hyperband.data.idx import read_idx
from vae_hyperband.data.splits import load_split

#: The authors' repository, and the copy that Keras downloads.
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
TRIES = 2  # per mirror and file
SILENCE_SECONDS = 10.0  # without data from a mirror
TOTAL_SECONDS = 300.0  # for all files from all mirrors
MAX_BYTES = 40_000_000  # the largest of the four is 26 MB
PACKAGE = "dataset-fashion-mnist"


def ensure_data(install: bool = False, mirrors: tuple[str, ...] = MIRRORS) -> None:
    """Make all four files available, by download or, with ``install``, by the package manager.

    Of several processes at once, only one downloads. Raises :class:`DataError`, which says which
    command to run.
    """
    with contextlib.suppress(DataError):
        return check_data()
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        with _alone(deadline):
            with contextlib.suppress(DataError):
                return check_data()  # another process has downloaded it meanwhile
            print("Fashion-MNIST is not on this machine; downloading it", flush=True)
            for name, sha256 in FASHION_MNIST_SHA256.items():
                if not _is_there(name, sha256):
                    _download(name, sha256, mirrors, deadline)
    # OSError: a cache that cannot be written
    except (DataError, OSError) as error:
        print(error, flush=True)
        if not (install and _install_package()):
            raise DataError(
                f"Fashion-MNIST could not be downloaded: on Debian or Ubuntu run "
                f'"sudo apt-get install {PACKAGE}", elsewhere give the folder of its four files '
                "with --data-dir; --dataset drawn needs no download."
            ) from error
    check_data()


def check_data() -> None:
    for split in ("train", "test"):
        load_split(split)


@contextlib.contextmanager
def _alone(deadline: float) -> Iterator[None]:
    """Be the only process that fills the cache; remove what a killed one left there."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = file_lock(cache / ".lock")
        try:
            seconds = max(0.0, deadline - time.monotonic())
            stack.enter_context(lock.acquire(timeout=seconds, poll_interval=0.2))
        except Timeout as error:
            raise DataError(
                f"Another process is still downloading to {cache}: try again later."
            ) from error
        for leftover in cache.glob("download-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _is_there(name: str, sha256: str) -> bool:
    with contextlib.suppress(DataError):
        return read_idx(cache_folder() / (name + ".gz"), _num_dims(name))[1] == sha256
    return False


def _num_dims(name: str) -> int:
    return 3 if "idx3" in name else 1


def _download(name: str, sha256: str, mirrors: tuple[str, ...], deadline: float) -> None:
    """Download a file from the first mirror that has it. Raises :class:`DataError` if none does."""
    failures = []
    for mirror in mirrors * TRIES:
        try:
            _fetch(mirror + name + ".gz", name, sha256, deadline)
        except (OSError, HTTPException, ValueError, VAEHyperbandError) as error:
            failures.append(f"{mirror}: {_first_line(error)}")
        else:
            print(f"downloaded {name}.gz from {mirror}", flush=True)
            return
        if time.monotonic() > deadline:
            break
    said = "; ".join(dict.fromkeys(failures))  # each once, in their order
    raise DataError(f"Could not download {name}.gz ({said}).")


def _fetch(url: str, name: str, sha256: str, deadline: float) -> None:
    """Download a file into the cache, where it appears only if its content is right."""
    cache = cache_folder()
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        path = Path(folder) / (name + ".gz")
        _in_time(lambda: _copy_from(url, path, deadline), deadline)
        _, found = read_idx(path, _num_dims(name))
        if found != sha256:
            raise DataError(f"its content has SHA-256 {found}, expected {sha256}")
        os.replace(path, cache / path.name)


def _in_time(work: Callable[[], None], deadline: float) -> None:
    """Run ``work``, or raise TimeoutError at the deadline: a server may send headers forever."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0))
    if raised:
        raise raised.pop()  # pop: else its traceback would keep it and an open socket alive
    if thread.is_alive():
        raise TimeoutError("it took too long")


def _copy_from(url: str, path: Path, deadline: float) -> None:
    """Save a server's response, if it arrives in time and has the announced length."""
    try:
        answer = urllib.request.urlopen(url, timeout=SILENCE_SECONDS)  # noqa: S310, http(s) above
    except HTTPError as refusal:  # is also the response, whose socket is open
        refusal.close()
        raise
    with answer, path.open("wb") as file:
        promised = answer.headers.get("Content-Length")
        while chunk := answer.read1(1 << 16):
            file.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError("it took too long")
            if file.tell() > MAX_BYTES:
                raise DataError("it is larger than any file of Fashion-MNIST")
        if promised is not None and file.tell() != int(promised):
            raise DataError(f"{file.tell()} bytes of {promised} arrived")


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _install_package() -> bool:
    """Install the distribution's package if this user is allowed to; whether it was installed."""
    if shutil.which("apt-get") is None:
        return False
    prefix: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            return False
        prefix = ["sudo", "-n"]  # fails instead of asking for a password
    install = [*prefix, "apt-get", "install", "-y", "--no-install-recommends", PACKAGE]
    print(f"Installing the system's package instead: {' '.join(install)}", flush=True)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
    try:
        if subprocess.run(install, **quiet).returncode == 0:
            return True
        # without package lists, a fresh machine does not know the package
        subprocess.run([*prefix, "apt-get", "update"], **quiet)
        return subprocess.run(install, **quiet).returncode == 0
    except subprocess.TimeoutExpired:
        return False
