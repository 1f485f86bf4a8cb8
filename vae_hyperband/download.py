"""Getting Fashion-MNIST onto a machine that lacks it: the mirrors, or the system's package.

Nothing that arrives is believed: it is stored under its name only after its content has matched.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vae_hyperband.data import (
    FASHION_MNIST_SHA256,
    cache_folder,
    load_split,
)
from vae_hyperband.errors import DataError, VAEHyperbandError
from vae_hyperband.idx import read_idx

#: The authors' repository, and the copy that Keras downloads.
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
)
TIMEOUT_SECONDS = (5, 20)  # to connect, and between two reads
PACKAGE = "dataset-fashion-mnist"


def ensure_data(install: bool = False, mirrors: tuple[str, ...] = MIRRORS) -> None:
    """Make both files of both parts available, by download or, if allowed, by the package manager.

    Raises :class:`DataError` with the one command that helps.
    """
    try:
        return check_data()
    except DataError:
        print("Fashion-MNIST is not on this machine yet; trying the mirrors", flush=True)
    try:
        for name, sha256 in FASHION_MNIST_SHA256.items():
            _download(name, sha256, mirrors)
    except DataError as error:
        print(error, flush=True)
        if not (install and _install_package()):
            raise DataError(
                f"Fashion-MNIST could not be downloaded: on Debian or Ubuntu run "
                f'"sudo apt-get install {PACKAGE}", elsewhere put its four files into '
                f"{cache_folder()} or any folder given by --data-dir."
            ) from error
    check_data()


def check_data() -> None:
    for split in ("train", "test"):
        load_split(split)


def _download(name: str, sha256: str, mirrors: tuple[str, ...]) -> None:
    """One file from the first mirror that has the right one; :class:`DataError` if none does."""
    failures = []
    for mirror in mirrors:
        try:
            _fetch(mirror + name + ".gz", name, sha256)
        # pooch passes on whatever its HTTP library raises (OSError), and ValueError
        except (OSError, ValueError, VAEHyperbandError) as error:
            failures.append(f"{mirror}: {_first_line(error)}")
        else:
            print(f"downloaded {name}.gz from {mirror}", flush=True)
            return
    raise DataError(f"Could not download {name}.gz ({'; '.join(failures)}).")


def _fetch(url: str, name: str, sha256: str) -> None:
    """Download one file into the cache, where it appears only if its content is the right one."""
    import pooch  # here, not above: who has the data needs neither pooch nor a network

    pooch.get_logger().setLevel(logging.WARNING)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        path = pooch.retrieve(
            url,
            known_hash=None,  # the content's own digest is checked below
            path=folder,
            fname=name + ".gz",
            downloader=pooch.HTTPDownloader(
                progressbar=sys.stderr.isatty(), timeout=TIMEOUT_SECONDS
            ),
        )
        _, found = read_idx(Path(path), num_dims=3 if "idx3" in name else 1)
        if found != sha256:
            raise DataError(f"its content has SHA-256 {found}, expected {sha256}")
        os.replace(path, cache / (name + ".gz"))


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _install_package() -> bool:
    """Install the distribution's package if this user may; whether that was done."""
    if shutil.which("apt-get") is None:
        return False
    prefix: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            return False
        prefix = ["sudo", "-n"]  # never asks for a password: then the caller prints the command
    install = [*prefix, "apt-get", "install", "-y", "--no-install-recommends", PACKAGE]
    print(f"Installing the system's package instead: {' '.join(install)}", flush=True)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
    try:
        if subprocess.run(install, **quiet).returncode == 0:
            return True
        # a machine that never updated its package lists does not know the package yet
        subprocess.run([*prefix, "apt-get", "update"], **quiet)
        return subprocess.run(install, **quiet).returncode == 0
    except subprocess.TimeoutExpired:
        return False
