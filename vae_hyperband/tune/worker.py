"""One trial, in a process of Ray's: a run of ``fit`` like any other.

The trial's folder says how far it is, so whoever died in between, the same call goes on. What goes
wrong in here ends as a report to the search, never as an error of Ray's.
"""

import contextlib
import faulthandler
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from ray import tune

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
from vae_hyperband.data.splits import Split
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.trials import trial_name
from vae_hyperband.training.keeper import newest_good
from vae_hyperband.training.loop import fit
from vae_hyperband.training.state import TrainState
from vae_hyperband.tune.storage import TrialStore

#: Seconds to wait for the lock of a trial whose last process is still dying, on another node maybe.
PATIENCE = 120.0

#: Seconds to wait for the interpreter to report a hang; then it is what hangs.
INTERPRETER_SECONDS = 10.0


@dataclass(frozen=True)
class SharedSplit:
    """A split whose arrays Ray keeps once per node, in memory that all its processes share."""

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    digest: str

    @classmethod
    def of(cls, split: Split) -> Self:
        return cls(split.images_NCHW.numpy(), split.labels_N.numpy(), split.digest)

    def split(self) -> Split:
        with warnings.catch_warnings():  # that the memory is read-only: nothing writes to it
            warnings.simplefilter("ignore", UserWarning)
            images_NCHW, labels_N = map(torch.from_numpy, (self.images_NCHW, self.labels_N))
        return Split(images_NCHW, labels_N, self.digest)


SharedSplits = tuple[SharedSplit, SharedSplit]  # training, validation


def train_trial(
    trial: dict[str, Any],
    *,
    config: SearchConfig,
    options: SearchOptions,
    store: TrialStore,
    device: str,
    splits: SharedSplits,
) -> None:
    """Train the trial on, from where its folder says it is, until the search stops asking for more.

    ``trial`` has its "number" and what was "drawn" for it; it is computed on ``device``.
    """
    # Ray gives a process up that takes longer to leave a trial, as it may on a slow file system
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "600")
    name, hopeless = trial_name(trial["number"]), ""
    try:
        with Watchdog(hang_report(options, name), options.trial_timeout) as watchdog:
            folder = store.work_folder(name)
            try:
                run = RunOptions(
                    run=name,
                    device=device,
                    data_dir=options.data_dir,
                    checkpoints_dir=folder.parent,
                    # a store that is not a folder of this node keeps the logs, too
                    logs_dir=folder / "logs" if store.is_url else options.log_folder,
                    num_threads=options.cpus_per_trial,
                    keep_ckpts=0,  # a trial whose files are damaged can be trained again
                )
                hopeless = _attempts(trial, config, options, store, run, splits, watchdog)
            finally:
                store.leave(folder)
    except Exception as error:
        hopeless = reason(error)
    if hopeless:
        tune.report({"failed": hopeless})


def _attempts(
    trial: dict[str, Any],
    config: SearchConfig,
    options: SearchOptions,
    store: TrialStore,
    run: RunOptions,
    splits: SharedSplits,
    watchdog: "Watchdog",
) -> str:
    """Train to the end; or the reason why it is not to be tried again.

    An error is tried again from the last checkpoint, as often in a row as ``max_failures`` says
    without getting further.
    """
    in_memory = (splits[0].split(), splits[1].split())
    count, last_step, started = 0, -1, time.monotonic()

    def report(row: dict[str, Any]) -> None:
        with watchdog.asleep():  # waiting for the search's answer is not hanging
            tune.report(row)  # leaves by SystemExit if the search pauses or stops the trial here

    def validated(state: TrainState) -> None:
        store.push(run.run, run.ckpt_folder)
        report(dict(state.metrics))

    while True:
        watchdog.wake()
        step, row = _progress(run.ckpt_folder)
        try:
            if row:  # a kill may have come between its checkpoint and the search's log
                report(row)
            fit(
                config.trial_config(trial["drawn"]),
                run,
                splits=in_memory,
                on_validation=validated,
                quiet=True,
            )
            return ""
        except (DivergedError, ConfigError, ResumeError) as error:
            return reason(error)  # the same bits would do the same
        except FolderInUseError as error:
            if time.monotonic() - started > PATIENCE:
                return reason(error)
            time.sleep(0.5)
            continue
        except DamagedError as error:
            said = reason(error)
            shutil.rmtree(run.ckpt_folder)  # the trial from its start gives the same reports
        except Exception as error:
            said = reason(error)
        torch.cuda.empty_cache()
        count = count + 1 if step == last_step else 1
        last_step = step
        if count > options.max_failures:
            return f"{said}; tried {count} times"


def _progress(folder: Path) -> tuple[int, dict[str, Any]]:
    """Step and last validation of the checkpoint to go on from; -1 and nothing without one."""
    with contextlib.suppress(CheckpointError):
        if found := newest_good(folder):
            return found.step, dict(found.metrics)
    return -1, {}


def hang_report(options: SearchOptions, name: str) -> Path:
    """Where a trial's process writes what it was doing when it was ended for hanging."""
    return options.log_folder / name / "hung.txt"


class Watchdog:
    """Ends the process, with a report of where it was, if it is awake for too long.

    A thread of Python's writes the report, since the others stand still while it runs: to read
    the stack of a thread that runs gives half a stack, or none and a crash. Code that hangs without
    letting go of the interpreter keeps that thread from running; then, some seconds later, a thread
    in C does it, and nothing moves either.
    """

    def __init__(self, report: Path, seconds: float) -> None:
        self._report, self._seconds = report, seconds

    def __enter__(self) -> Self:
        make_folder(self._report.parent)
        self._file = self._report.open("w", encoding="utf-8")
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel()
        self._file.close()
        self._report.unlink(missing_ok=True)

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        self._cancel()
        yield
        self._start()

    def wake(self) -> None:
        """Count the seconds anew."""
        self._cancel()
        self._start()

    def _start(self) -> None:
        self._timer = threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()
        later = self._seconds + INTERPRETER_SECONDS
        faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _cancel(self) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._file)
        os._exit(1)


def reason(error: Exception) -> str:
    """An exception in one line."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, DivergedError):
        return f"diverged: {first}"
    if isinstance(error, OutOfMemoryError) or lacks_memory(error):
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}"
