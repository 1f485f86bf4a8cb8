"""What a run needs from its process: a stop flag, a lock on its folder, a device, threads."""

import contextlib
import ctypes
import errno
import math
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, cast

from filelock import FileLock, Timeout, has_fcntl

from vae_hyperband.common.errors import DeviceError, FolderInUseError, RunFolderError
from vae_hyperband.common.files import make_folder

if TYPE_CHECKING:
    import torch  # functions import it: without it the command line has begun before a second

#: Exit status of a run or search that was told to stop, has saved, and continues when started
#: again (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

HANGUP: Any = getattr(signal, "SIGHUP", None)  # Windows has none

#: Those of the system: Windows has the first two, and SIGBREAK.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)


@contextlib.contextmanager
def stop_flag(doing: str = "saving, then stopping") -> Iterator[Callable[[], bool]]:
    """A function that tells whether one of :data:`STOP_SIGNALS` came.

    A second one, unless it is SIGHUP, ends the process at once.

    Outside of the main thread, as in a notebook server, it is never true: Python gives signals to
    the main thread alone.
    """
    if not in_main_thread():
        yield lambda: False
        return
    stopped_by: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        # a terminal that is closed may say so twice: by the shell and by the kernel
        if stopped_by and number == HANGUP:
            return
        if stopped_by:
            os._exit(128 + number)
        stopped_by.append(number)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Lossy):
                stream.reader_may_be_gone = True
        name = signal.Signals(number).name
        again = "" if number == HANGUP else " (again: stop at once)"
        with contextlib.suppress(OSError):  # the output's reader may be gone, too
            os.write(2, f"\n{name}: {doing}{again}\n".encode())

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if before.get(HANGUP) == signal.SIG_IGN:  # nohup: the run is to outlive its terminal
        del before[HANGUP]
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield lambda: bool(stopped_by)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """float32, gradients, no autocast, the CPU: whatever modes of PyTorch the caller has entered.

    Also a decorator. The default dtype is the process's, so other threads see float32, too, until
    the last one leaves; the other modes are a thread's own.
    """
    import torch

    with contextlib.ExitStack() as modes:
        modes.enter_context(_float32_by_default())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # only then: it costs time in every call
            modes.enter_context(torch.device("cpu"))
        yield


_float32_lock = threading.Lock()
_float32_blocks: list["_float32_by_default"] = []  # those entered and not left, in their order


class _float32_by_default:
    """A block with float32 as the process's default dtype, also if other threads are in one."""

    def __enter__(self) -> None:
        import torch

        with _float32_lock:
            self._before = torch.get_default_dtype()
            _float32_blocks.append(self)
            torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        import torch

        with _float32_lock:
            place = _float32_blocks.index(self)
            del _float32_blocks[place]
            if place == len(_float32_blocks):
                torch.set_default_dtype(self._before)
            else:  # a thread that came later is still in its block: it restores what this one found
                _float32_blocks[place]._before = self._before


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def file_lock(path: Path) -> FileLock:
    """A lock of one process at a time, to ``acquire``; without a timeout that does not wait.

    The kernel releases it when the process dies, also if forks of it live on.
    """
    # no soft lock on a file system that has no locks: a file that a dead process of another host
    # left would stay in the way
    sign = _sign if has_fcntl else None  # Windows lets nobody read a locked file
    return FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False, on_acquired=sign)


def _sign(handle: int) -> None:
    """Write into a lock who holds it."""
    with contextlib.suppress(OSError):  # the lock holds; the text is for the message only
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        if has_fcntl and (text := path.read_text(encoding="utf-8").strip()):
            return text
    return "another process"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes."""
    if folder.is_symlink():
        raise RunFolderError(
            f"{folder} is a symbolic link, so a run would write elsewhere than its options say: "
            "choose another --run or folder."
        )
    make_folder(folder)
    path = folder.parent / f".{folder.name}.lock"  # beside it, not in it
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path))
        except Timeout as error:
            raise FolderInUseError(
                f"{folder} is in use by {_holder(path)}: wait for it, or choose another --run."
            ) from error
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
        yield


def pick_device(name: str) -> "torch.device":
    """The device by its name; "auto" is the GPU if there is one. Raises :class:`DeviceError`."""
    import torch

    if name == "auto":
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # not mps: it has no float64, in which averages are exact, and it was never measured
        if supported := device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
    # torch raises what the backend raises: RuntimeError, AssertionError, NotImplementedError ...
    except Exception as error:
        raise DeviceError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}): use --device cpu."
        ) from error
    if not supported:
        raise DeviceError(f"--device {name} is not supported: use --device cpu or cuda.")
    torch.backends.cudnn.deterministic = True  # else gradients are summed in varying order
    return device


@contextlib.contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with that many CPU threads, then restore their number.

    None: as before, but no more than a control group's quota has CPUs for.
    """
    import torch

    before = torch.get_num_threads()
    # PyTorch looks at the machine's cores; more threads than the quota wait for each other
    usual = min([before, *(math.ceil(quota) for quota in cpu_quotas())])
    torch.set_num_threads(usual if num_threads is None else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cpus() -> int:
    """How many CPUs this process may keep busy: by its affinity and its control group's quota."""
    return min([cpus_of_affinity(), *(math.ceil(quota) for quota in cpu_quotas())])


def cpus_of_affinity() -> int:
    """How many CPUs this process may run on; all of the machine where only Linux could say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quotas(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[float]:
    """The CPU quotas of this process's control group and those around it, in CPUs.

    As containers and batch systems set them: ``cpu.max`` of version 2, ``cpu.cfs_quota_us`` of
    version 1 (Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1). No quota: an empty
    list.
    """
    quotas = []
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for top in _mounted(root) if controllers else {root}:
                folder = top / path.strip("/")
                # the groups around count, too; in a container its own group is often the top
                for group in (folder, *folder.parents):
                    quotas += _quota(group)
                    if group == top:
                        break
    return quotas


def _mounted(root: Path) -> set[Path]:
    """Where version 1 has its groups of the controller "cpu"."""
    # by the name of the folder, not by the kernel's list of controllers: that may be in another
    # order ("cpuacct,cpu" for cpu,cpuacct), or the folder be called cpu alone; links are one folder
    return {folder.resolve() for folder in root.iterdir() if "cpu" in folder.name.split(",")}


def _quota(group: Path) -> list[float]:
    """The quota of one control group, as a list of one or none."""
    # a file that is not there, or says "max" or -1: no quota
    with contextlib.suppress(OSError, ValueError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
        if int(quota) > 0:
            return [int(quota) / int(period)]
    return []


def keep_freed_memory() -> None:
    """Make glibc keep the memory that one step frees for the next, up to 256 MiB of it.

    By default it returns tensors of a megabyte to the kernel, which then maps new pages one by
    one: thousands of page faults per step, a fifth of its time (benchmarks/RECORDS.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; Windows cannot even look
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 256 << 20)
    mallopt(top_pad, 16 << 20)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch reports a lack of memory."""
    import torch

    said = str(error)  # on a CPU, PyTorch raises RuntimeError; Ray has a type of its own
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return memory or "allocate memory" in said or "not enough memory" in said


#: torch, device, threads ...: what the last bits of a run depend on, as plain data.
Environment = dict[str, str | int | bool]


def environment(device: "torch.device") -> Environment:
    """What equal bits depend on besides configuration and data: the class of machine."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "torch": str(torch.__version__),  # a TorchVersion is not plain data
        "python": platform.python_version(),
        "device": gpu or device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


class _Lossy:
    """A stream that drops output on a full disk instead of ending the run.

    After a stop signal it also drops output that nobody reads: the run still has to save.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.reader_may_be_gone = False  # set by the signal handler of stop_flag

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = self.reader_may_be_gone and error.errno in (errno.EPIPE, errno.EIO)
            if not gone and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_standard_streams() -> None:
    """Put the null device where a batch system has closed stdin, stdout or stderr.

    Otherwise the next file that is opened takes its number, and whatever is printed goes into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            os.set_inheritable(number, True)  # the processes that this one starts need them, too
        if getattr(sys, name) is None:  # as Python leaves it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Let a full disk cost the output that goes to a file on it, but not the run."""
    open_standard_streams()
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Lossy(out)), cast(TextIO, _Lossy(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            try:
                stream.flush()
            except OSError:  # else Python would end with status 120 for unwritten output
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def on_terminal() -> bool:
    return sys.stderr.isatty()


class TimeShare:
    """Keeps what is done again and again to a share of the time, however long it takes.

    ``if share.due:`` says whether it may be done again; ``with share:`` measures it.
    """

    def __init__(self, share: float) -> None:
        self._share, self._next = share, 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._next = now + (now - self._begun) / self._share
