"""A process that trains many trials of a search at once: one for each GPU, one for a node's CPUs.

Ray sees ordinary trials. Each is a run of ``fit`` in a process of its own, which keeps the trial's
checkpoints and logs, and asks here for its next epoch and its validation: it sends its state and
gets it back. What waits at that moment and has one batch size goes into one pack; who comes later,
in the place of a trial that was stopped, say, goes into the next one, and nothing is compiled anew.
Nothing is kept here between two epochs, so this process may die at any moment: Ray starts another.
"""

import functools
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vae_hyperband.bounds import Losses, eval_dataloader, eval_epoch
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, as_trained
from vae_hyperband.model import VAE
from vae_hyperband.packed import Pack
from vae_hyperband.process import environment, keep_freed_memory, pick_device
from vae_hyperband.search_config import SearchConfig
from vae_hyperband.state import TrainState

#: A pack that is not full waits for this long after the last trial that came.
LINGER_SECONDS = 0.05

EVALUATION = (0, 0)


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


@dataclass(eq=False)
class _Job:
    """What a trial asks for, and what it gets; jobs of one kind can be done together."""

    kind: tuple[int, int]  # batch size and number of steps, or EVALUATION
    work: Any  # a state to train on, or a model and how to evaluate it
    result: Any = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Packer:
    """Trains what asks for it; each request comes in a thread of its own.

    ``lanes`` packs of up to ``size`` trials compute at the same time, each with ``num_threads``.
    ``fetch`` gives the training and the validation split.
    """

    def __init__(
        self,
        config: SearchConfig,
        fetch: Callable[[], SharedSplits],
        device: str,
        size: int,
        lanes: int = 1,
        num_threads: int = 1,
    ) -> None:
        keep_freed_memory()
        self._widest, self._size, self._num_threads = max(config.latent_dims), size, num_threads
        self._device = pick_device(device)
        self._train, held_out = (shared.split() for shared in fetch())
        held_out = as_trained(held_out, config.common())
        self._loader = eval_dataloader(held_out, self._device)
        self._free: dict[tuple[int, int], list[Pack]] = {}  # packs that no lane is using
        self._waiting: list[_Job] = []
        self._num_asked = 0
        self._changed = threading.Condition()
        for _ in range(lanes):
            threading.Thread(target=self._lane, daemon=True).start()

    def environment(self) -> dict[str, Any]:
        """Of what is trained here: a network rounds as its place in the widest makes it."""
        found = environment(self._device) | {"num_threads": self._num_threads}
        return found if self._size == 1 else found | {"pack": f"{self._size} of {self._widest}"}

    def advance(self, state: TrainState, num_steps: int) -> tuple[Tensor, TrainState]:
        """:meth:`Pack.run` for one state, beside those that wait, too."""
        return self._do(_Job((state.config.batch_size, num_steps), state))

    def evaluate(self, model: VAE, *settings: Any) -> Losses:
        """:func:`~vae_hyperband.bounds.eval_epoch` on the validation split."""
        return self._do(_Job(EVALUATION, (model, settings)))

    def _do(self, job: _Job) -> Any:
        """Wait until a lane has done it."""
        with self._changed:
            self._waiting.append(job)
            self._num_asked += 1
            self._changed.notify_all()
        job.done.wait()
        if job.error:
            raise job.error
        return job.result

    def _lane(self) -> None:
        torch.set_num_threads(self._num_threads)  # of this thread
        while True:
            jobs = self._next()
            try:
                if jobs[0].kind == EVALUATION:
                    self._evaluate(jobs[0])
                else:
                    self._train_on(jobs)
            except Exception as error:  # each trial knows what to do
                for job in jobs:
                    job.error = error.with_traceback(None)  # which would keep the pack alive
            finally:
                for job in jobs:
                    job.done.set()
            self._recover(jobs[0].error)

    def _recover(self, error: Exception | None) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif isinstance(error, torch.AcceleratorError):  # the GPU is lost to this process
            time.sleep(1)  # those who asked are told first
            os._exit(1)

    def _next(self) -> list[_Job]:
        """The job that has waited longest, with those that can be done beside it."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: len(self._waiting))
                before = self._num_asked
                if not self._full() and self._changed.wait_for(
                    functools.partial(self._asked_since, before), LINGER_SECONDS
                ):
                    continue
                if jobs := self._first():  # another lane may have taken them
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    return jobs

    def _asked_since(self, num_asked: int) -> bool:
        return self._num_asked > num_asked

    def _first(self) -> list[_Job]:
        kind = self._waiting[0].kind if self._waiting else None
        alike = [job for job in self._waiting if job.kind == kind]
        return alike[: 1 if kind == EVALUATION else self._size]

    def _full(self) -> bool:
        jobs = self._first()
        return len(jobs) == self._size or (len(jobs) > 0 and jobs[0].kind == EVALUATION)

    def _train_on(self, jobs: list[_Job]) -> None:
        states, num_steps = [job.work for job in jobs], jobs[0].kind[1]
        pack = self._pack_for(states[0].config)
        for job, losses_K4 in zip(jobs, pack.run(states, num_steps), strict=True):
            job.result = losses_K4, job.work
        with self._changed:
            self._free[pack.config.batch_size, pack.latent_dim].append(pack)

    def _evaluate(self, job: _Job) -> None:
        model, settings = job.work
        job.result = eval_epoch(model.to(self._device), self._loader, *settings)

    def _pack_for(self, config: TrainConfig) -> Pack:
        widest = self._widest if self._size > 1 else config.latent_dim
        with self._changed:
            free = self._free.setdefault((config.batch_size, widest), [])
            if free:
                return free.pop()
        return Pack(config, self._train, self._size, widest, self._device)
