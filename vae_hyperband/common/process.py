"""What a run asks of its process: a stop flag, a folder of its own, a device, threads."""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import torch

from vae_hyperband.common.errors import DeviceError, FolderInUseError, RunFolderError
from vae_hyperband.common.files import make_folder, no_link

#: Exit status of a run or search that was told to stop, saved, and goes on when started again
#: (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

_STOPS: list[int] = []  # the signal that this process was told to stop by, if any
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def stop_flag(doing: str = "saving, then stopping") -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT, SIGTERM or SIGUSR1 came; a second one ends at once."""
    _STOPS.clear()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if _STOPS:
            os._exit(128 + number)
        _STOPS.append(number)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # who reads may have died of the same Ctrl-C
            os.write(2, f"\n{name}: {doing} (again: stop at once)\n".encode())

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(_STOPS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process; the kernel lets go of it when this one dies."""
    if folder.is_symlink():
        raise RunFolderError(
            f"{folder} is a symbolic link, so that a run would write elsewhere than it says: "
            "choose another --run or folder."
        )
    make_folder(folder)
    path = folder.parent / f".{folder.name}.lock"  # beside it: what is in the folder is the run's
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a+", encoding="utf-8", opener=no_link))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FolderInUseError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, "
                "or choose another --run."
            ) from error
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
        with contextlib.suppress(OSError):  # the lock holds; who has it is for the message only
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises :class:`DeviceError`."""
    if name == "auto":
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch raises whatever its backend does: RuntimeError, AssertionError, NotImplementedError ...
    except Exception as error:
        raise DeviceError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): use --device cpu."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name} is not supported: use cpu or cuda.")
    torch.backends.cudnn.deterministic = True  # gradients that are summed in a fixed order
    return device


@contextlib.contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with that many CPU threads, then go back to what was set before."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if num_threads is None else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that one step frees for the next, up to 256 MiB of it.

    It would give tensors of a megabyte back to the kernel, to be mapped page by page again:
    thousands of page faults a step, a fifth of its time (benchmarks/RECORDS.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 256 << 20)
    mallopt(top_pad, 16 << 20)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python's or PyTorch's says that there is not enough memory."""
    said = str(error)  # on a CPU PyTorch raises a RuntimeError, and Ray one of its own
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return memory or "allocate memory" in said or "not enough memory" in said


#: torch, device, threads ...: what the last bits of a run depend on, as plain data.
Environment = dict[str, str | int | bool]


def environment(device: torch.device) -> Environment:
    """What bit-exactness depends on besides configuration and data: one machine class."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "torch": str(torch.__version__),  # a TorchVersion is not plain data
        "python": platform.python_version(),
        "device": gpu or device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


class _Lossy:
    """A stream to which nothing is written where there is no room, instead of ending the run.

    Nor where nobody reads any more, once the run was told to stop: it has to be saved then.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _no_room_is_fine():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _no_room_is_fine():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _no_room_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        gone = bool(_STOPS) and error.errno in (errno.EPIPE, errno.EIO)
        if not gone and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Have a full disk cost what is said into a file on it, but not the work that says it."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Lossy(out)), cast(TextIO, _Lossy(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            try:
                stream.flush()
            except OSError:  # Python would end with status 120 for what is left to write
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def on_terminal() -> bool:
    return sys.stderr.isatty()
