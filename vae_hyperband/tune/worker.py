"""One trial, in a process of Ray's: a call of :func:`~vae_hyperband.training.loop.fit`.

The trial's folder says how far it is; so if its process dies, the same call in another one
continues. Errors in here become a report to the search; Ray never sees an exception.
"""

import contextlib
import faulthandler
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypedDict

import numpy as np
import torch
from ray import tune

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    DivergedError,
    FolderInUseError,
    OutOfMemoryError,
    ResumeError,
)
from vae_hyperband.common.files import make_folder
from vae_hyperband.common.process import lacks_memory
from vae_hyperband.data.splits import Split, read_only_tensor
from vae_hyperband.model.networks import allow_network
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.trials import trial_name
from vae_hyperband.training.keeper import newest_good
from vae_hyperband.training.loop import fit
from vae_hyperband.training.state import TrainState
from vae_hyperband.tune.storage import TrialStore

#: Seconds to wait for the lock of a trial whose last process is still dying, maybe on another node.
LOCK_SECONDS = 120.0

#: Seconds more for the interpreter to report a hang; after them it is what hangs.
INTERPRETER_SECONDS = 10.0


@dataclass(frozen=True)
class SharedSplit:
    """A split as numpy arrays: Ray keeps these once per node, in memory that processes share."""

    # tensors are pickled by value: each worker would have a copy of the data set of its own
    images_NCHW: np.ndarray  # uint8
    labels_N: np.ndarray  # int64
    digest: str
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, split: Split) -> Self:
        arrays = split.images_NCHW.numpy(), split.labels_N.numpy()
        return cls(*arrays, split.digest, split.class_names)

    def split(self) -> Split:
        """The split itself, on the same memory."""
        images_NCHW, labels_N = map(read_only_tensor, (self.images_NCHW, self.labels_N))
        return Split(images_NCHW, labels_N, self.digest, self.class_names)


SharedSplits = tuple[SharedSplit, SharedSplit]  # training, validation


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a search have in common; Ray keeps one copy per node."""

    config: SearchConfig
    options: SearchOptions
    store: TrialStore
    splits: SharedSplits
    device: str  # "cpu" or "cuda": the only GPU that Ray shows the process
    #: Networks of the user's own that the command line names; see
    #: :func:`~vae_hyperband.model.networks.allow_network`.
    networks: dict[str, str] = field(default_factory=dict)

    def run_options(self, name: str, folder: Path) -> RunOptions:
        """How :func:`fit` computes the trial of that name, in that folder."""
        options = self.options
        return RunOptions(
            run=name,
            device=self.device,
            data=options.data,
            data_dir=options.data_dir,
            checkpoints_dir=folder.parent,
            # a store that is not a folder of this node keeps the logs, too
            logs_dir=folder / "logs" if self.store.is_url else options.log_folder,
            # bits depend on the number of threads, so it must not depend on the machine
            num_threads=options.cpus_per_trial,
            track=options.track,
            track_group=options.run,
            keep_ckpts=0,  # a trial whose files are damaged can be trained again
        )


class TrialSpec(TypedDict):
    """What Ray calls the config of a trial."""

    number: int
    hyperparameters: dict[str, object]  # a dictionary, since Ray makes its own copies of it


def train_trial(trial: TrialSpec, *, job: TrialJob) -> None:
    """Train the trial from where its folder says it is, until it ends or the search stops it.

    Reports a :class:`~vae_hyperband.search.trials.ValidationRow` per epoch, or ``{"failed": why}``.
    """
    # Ray gives a process up that takes longer to leave a trial, as it may on a slow file system
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
    for network, place in job.networks.items():
        allow_network(network, place)
    name, failure = trial_name(trial["number"]), ""
    try:
        with Watchdog(hang_report(job.options, name), job.options.trial_timeout) as watchdog:
            folder = job.store.work_folder(name)
            try:
                failure = _train(trial, job, job.run_options(name, folder), watchdog)
            finally:
                job.store.discard(folder)
    # anything: to Ray an exception is a crash of the actor, which it would restart for ever, while
    # the board has to know the reason
    except Exception as error:
        failure = reason(error)
    if failure:
        tune.report({"failed": failure})


def _train(trial: TrialSpec, job: TrialJob, run: RunOptions, watchdog: "Watchdog") -> str:
    """Train to the end; an empty string, or why the trial failed.

    After an error it is tried again from the last checkpoint, up to ``max_failures`` times in a row
    without progress.
    """
    config = job.config.trial_config(job.config.hyperparameters(trial["hyperparameters"]))
    train, held_out = (split.split() for split in job.splits)

    def report(row: Mapping[str, float]) -> None:
        with watchdog.paused():  # waiting for the search's answer is not hanging
            tune.report(dict(row))  # leaves by SystemExit if the search pauses or stops the trial

    def validated(state: TrainState) -> None:
        # in this order: what was reported may be asked for on another node at once
        job.store.push(run.run, run.ckpt_folder)
        report(state.metrics)

    attempts, last_step, started = 0, -1, time.monotonic()
    while True:
        watchdog.restart()
        step, row = _progress(run.ckpt_folder)
        try:
            if row:  # a kill may have come between its checkpoint and the search's log
                report(row)
            fit(config, run, splits=(train, held_out), on_validation=validated, quiet=True)
            return ""
        except (DivergedError, ConfigError, ResumeError) as error:
            return reason(error)  # the same bits would do the same
        except FolderInUseError as error:
            if time.monotonic() - started > LOCK_SECONDS:
                return reason(error)
            time.sleep(0.5)
            continue  # no failure: it has not begun
        except DamagedError as error:
            why = reason(error)
            shutil.rmtree(run.ckpt_folder)  # the trial from its start gives the same reports
        except Exception as error:  # a full disk, too little memory: it may pass
            why = reason(error)
        torch.cuda.empty_cache()  # after an out-of-memory error, the next attempt needs all of it
        attempts = attempts + 1 if step == last_step else 1
        last_step = step
        if attempts > job.options.max_failures:
            return f"{why}; tried {plural(attempts, 'time')}"


def _progress(folder: Path) -> tuple[int, Mapping[str, float]]:
    """Step and last validation of the checkpoint to continue from; -1 and nothing without one."""
    # damaged files are not reported here: fit finds the same damage and raises it
    with contextlib.suppress(CheckpointError):
        if found := newest_good(folder):
            return found.step, found.metrics
    return -1, {}


def hang_report(options: SearchOptions, name: str) -> Path:
    """Where a trial's process writes its stacks when it is ended for hanging."""
    return options.log_folder / name / "hung.txt"


class Watchdog:
    """A context manager that ends the process if it makes no progress for ``seconds``.

    Before that it writes the stacks of all threads to ``report``. Ray has no time limit per report:
    a trial that hangs would hold its worker until the search is stopped. Time in which the process
    was suspended (a laptop's lid, Slurm's SUSPEND, ``docker pause``) does not count.
    """

    # A thread of Python's writes the report, since the others stand still while it runs: reading
    # the stack of a running thread, as faulthandler's own timer does, gives half a stack, or none
    # and a crash. Code that hangs without releasing the interpreter's lock keeps that thread from
    # running; then a second process, which hears nothing from it, has faulthandler's signal handler
    # write the report, and nothing moves then either. That process needs Linux.

    def __init__(self, report: Path, seconds: float) -> None:
        self._report, self._seconds = report, seconds
        self._done, self._spent, self._counting = threading.Event(), 0.0, True
        self._lock = threading.Lock()  # for _spent: the thread that watches adds to it

    def __enter__(self) -> Self:
        make_folder(self._report.parent)
        # opened now: a process that hangs may be short of memory, descriptors or disk
        self._file = self._report.open("w", encoding="utf-8")
        self._hearing: Callable[[bytes], None] = lambda what: None
        if REPORT_SIGNAL:
            faulthandler.register(REPORT_SIGNAL, file=self._file)
            # no process or memory to spare: the thread watches without it
            with contextlib.suppress(OSError):
                self._hearing = _heartbeat(self._seconds + INTERPRETER_SECONDS, os.getpid())
        self._hearing(ALIVE)  # now: what hangs may never let the thread begin
        # a daemon, or a process that is done would wait for it
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._hearing(ASLEEP)
        if REPORT_SIGNAL:
            faulthandler.unregister(REPORT_SIGNAL)
        self._file.close()
        self._report.unlink(missing_ok=True)  # what is left of a process tells how it ended

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside of this block."""
        self._counting = False
        yield
        # not in a finally: an exception leaves the trial, and nothing is to be counted any more
        self.restart()

    def restart(self) -> None:
        """Count the seconds from 0 again."""
        with self._lock:
            self._spent, self._counting = 0.0, True

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 4)
        last = time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            with self._lock:
                # far more than a tick: the process did not run meanwhile, so it did not hang either
                self._spent += min(now - last, 2 * tick) if self._counting else 0.0
                hangs = self._spent >= self._seconds
            last = now
            self._hearing(ALIVE)
            if hangs:
                faulthandler.dump_traceback(self._file)
                # at once: sys.exit in a thread ends the thread, and clean-up may hang as well
                os._exit(1)


ALIVE, ASLEEP = b"1", b"0"
#: That nobody else sends; 0 where there is none (macOS, Windows).
REPORT_SIGNAL = signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else 0

#: Ends the process that started it if that is awake and says nothing for so many seconds of its own
#: and of that process's running; with it, it ends itself. By its parent's id it knows that this is
#: gone: the pipe may be open in a fork, and the number be another process's by then.
LISTENER = """
import os, select, signal, sys, time
parent, seconds, report = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
awake, silent = False, 0.0

def end_if_alone():
    if os.getppid() != parent:
        sys.exit()

while silent < seconds:
    end_if_alone()
    begun = time.monotonic()
    if select.select([0], [], [], 1.0)[0]:
        said = os.read(0, 4096)
        if not said:
            sys.exit()
        awake, silent = said[-1:] == b"1", 0.0
    elif awake:
        try:
            with open(f"/proc/{parent}/stat") as stat:
                stopped = stat.read().rsplit(")", 1)[1].split()[0] in "Tt"
        except OSError:
            sys.exit()
        silent += 0.0 if stopped else min(time.monotonic() - begun, 1.5)
for number, seconds_to_write in (report, 1), (signal.SIGKILL, 0):
    end_if_alone()
    os.kill(parent, number)
    time.sleep(seconds_to_write)
"""


@functools.cache  # by the process's id, too: a fork has no listener yet
def _heartbeat(seconds: float, pid: int) -> Callable[[bytes], None]:
    """Start the listener of this process, once; a function that tells it ALIVE or ASLEEP."""
    numbers = map(str, (pid, seconds, int(REPORT_SIGNAL)))
    listener = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LISTENER, *numbers],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the search
    )

    def say(what: bytes) -> None:
        assert listener.stdin is not None
        with contextlib.suppress(OSError):  # the listener was killed: the thread still watches
            os.write(listener.stdin.fileno(), what)

    return say


def reason(error: Exception) -> str:
    """An exception in one line, as the decision log and the console show it."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, DivergedError):
        return f"diverged: {first}"
    if isinstance(error, OutOfMemoryError) or lacks_memory(error):
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}"
