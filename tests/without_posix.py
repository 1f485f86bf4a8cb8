"""Python without what POSIX alone gives, as far as Linux can play Windows or macOS.

``take_away`` removes modules and names. As on Windows, a folder cannot be opened, a file that is
open cannot be replaced or removed, and one that is open for reading cannot be flushed. This file is
also the program of tests/common/test_platforms.py: a run without those names, to its report.
"""

# what has builds or branches of its own for Windows is imported with all names
import asyncio  # noqa: F401
import ctypes
import errno
import faulthandler
import importlib
import json
import multiprocessing.popen_spawn_posix  # noqa: F401
import os
import shutil
import signal
import subprocess  # noqa: F401
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import ray.tune  # noqa: F401
import torch  # noqa: F401

MODULES = "fcntl grp pty pwd resource syslog termios tty"
OS = """
    fork forkpty register_at_fork posix_spawn posix_spawnp wait wait3 wait4 waitid WNOHANG
    getuid geteuid getgid getegid getgroups getpgid getpgrp setsid setuid setgid killpg nice
    chown fchown lchown chroot fchmod mkfifo mknod statvfs fstatvfs fdatasync sync lockf
    pread pwrite preadv pwritev readv writev posix_fallocate posix_fadvise sendfile pipe2 openpty
    sched_getaffinity sched_setaffinity sched_yield getloadavg sysconf uname getxattr setxattr
    O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC
"""
SIGNALS = """
    SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGRTMAX SIGRTMIN SIGSTOP SIGTSTP
    SIGUSR1 SIGUSR2 SIGWINCH alarm pause pthread_kill pthread_sigmask setitimer sigwait
"""


def take_away() -> None:
    resource_tracker.ensure_running()  # on Linux, Python 3.14 starts it with pthread_sigmask
    for name in [name for name in sys.modules if name.partition(".")[0] == "filelock"]:
        del sys.modules[name]  # Ray has imported it; it has to choose without the names
    for name in MODULES.split():
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, OS), (signal, SIGNALS), (faulthandler, "register unregister")):
        for name in names.split():
            delattr(module, name)
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False
    shutil._rmtree_impl = shutil._rmtree_unsafe  # type: ignore[attr-defined]  # since Python 3.14
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # as on Windows
    ctypes.CDLL = _named_library(ctypes.CDLL)
    os.open = _files_only(os.open)
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, _if_closed(getattr(os, name)))
    os.fsync = _if_writable(os.fsync)


def _named_library(real: type) -> Callable[..., Any]:
    class CDLL(real):
        def __init__(self, name: str | None, *rest: Any, **more: Any) -> None:
            if name is None:  # as on Windows, there is no library of the process itself
                raise TypeError("bad argument type for built-in operation")
            super().__init__(name, *rest, **more)

    return CDLL


def _files_only(real: Callable[..., int]) -> Callable[..., int]:
    def open(path: Any, *rest: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *rest, **more)

    return open


def _if_writable(real: Callable[[int], None]) -> Callable[[int], None]:
    def fsync(handle: int) -> None:
        [flags] = [
            int(line.split()[1], 8)
            for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
            if line.startswith("flags:")
        ]
        if flags & (os.O_WRONLY | os.O_RDWR) == 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle)

    return fsync


def _if_closed(real: Callable[..., None]) -> Callable[..., None]:
    def change(*paths: Any, **more: Any) -> None:
        names = tuple(os.path.realpath(os.fsdecode(path)) for path in paths)
        for used in _open_or_mapped():
            if any(used == name or used.startswith(name + os.sep) for name in names):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), used)
        real(*paths, **more)

    return change


def _open_or_mapped() -> set[str]:
    """Paths of the files that this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    for handle in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:  # that of this listing
            continue
    return found


def import_everything() -> int:
    package = Path(importlib.import_module("vae_hyperband").__file__).parent
    modules = sorted(path.relative_to(package.parent) for path in package.rglob("*.py"))
    for module in modules:
        importlib.import_module(".".join(module.with_suffix("").parts).removesuffix(".__init__"))
    return len(modules)


def _train_until_signalled(config: Any, options: Any, num_steps: int) -> None:
    from vae_hyperband.common.process import stop_flag
    from vae_hyperband.training.loop import fit

    steps = iter(range(1, num_steps + 1))
    with stop_flag() as stopped:

        def should_stop() -> bool:
            if next(steps, None) == num_steps:
                signal.raise_signal(signal.SIGTERM)
            return stopped()

        assert not fit(config, options, should_stop=should_stop, quiet=True).finished


def main(places: dict[str, Any], settings: dict[str, Any], pictures: str) -> None:
    warnings.filterwarnings("ignore", "only soft file lock is available")
    take_away()
    print(import_everything(), "modules imported")

    from vae_hyperband import train_vae
    from vae_hyperband.common.config import RunOptions, TrainConfig
    from vae_hyperband.common.errors import FolderInUseError
    from vae_hyperband.common.files import refuse_foreign
    from vae_hyperband.common.process import only_writer
    from vae_hyperband.data.decoded import decoded_set
    from vae_hyperband.training.loop import fit
    from vae_hyperband.tune.tuner import StopOnRequest
    from vae_hyperband.tune.worker import Watchdog

    config, options = TrainConfig(**settings), RunOptions(**places)
    _train_until_signalled(config, options, 14)
    latest = options.ckpt_folder / "latest.pt"
    saved = latest.read_bytes()
    _train_until_signalled(config, options, 5)
    latest.write_bytes(saved)  # as after a power cut: logs of steps that are computed again
    result = fit(config, options, quiet=True)
    assert result.finished
    try:
        with only_writer(options.ckpt_folder):
            fit(config, options, quiet=True)
    except FolderInUseError as error:
        print(error)
    found = decoded_set(Path(pictures), quiet=True)
    assert found.images_NCHW.shape == (12, 1, 8, 8)
    assert sorted(path.name for path in found.folder.parent.iterdir()) == sorted(
        [found.folder.name, "seen"]
    )
    data = ["--data-dir", places["data_dir"]]
    folders = ["--checkpoints-dir", places["checkpoints_dir"], "--logs-dir", places["logs_dir"]]
    for command in (
        ["evaluate", result.best, "--parts", "likelihood", *data],
        ["sample", result.best, "--out", Path(places["logs_dir"], "sample.png")],
        ["report", options.run, *data, *folders],
        ["train", "--dry-run", "--dataset", "drawn", "--run", "dry", *folders],
    ):
        assert train_vae.main([str(word) for word in command]) == 0, command
    with Watchdog(Path(places["logs_dir"], "hung.txt"), 60):
        assert not StopOnRequest(lambda: False).stop_all()
    refuse_foreign(options.log_folder)
    print(result.weights)


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:3]), sys.argv[3])
