"""A process that trains many trials of a search at once: one for each GPU, one for a node's CPUs.

Ray sees ordinary trials. Each is a run of ``fit`` in a process of its own, which keeps the trial's
checkpoints and logs, and asks here for its next epoch and its validation: it sends its state and
gets it back. What waits at that moment and has one batch size goes into one pack; who comes later,
in the place of a trial that was stopped, say, goes into the next one, and nothing is compiled anew.
Nothing is kept here between two epochs, so this process may die at any moment: Ray starts another.
"""

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from vae_hyperband.bounds import Losses, eval_dataloader, eval_epoch
from vae_hyperband.cluster import num_lanes, trial_device
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, as_trained
from vae_hyperband.engines import Engine, train_epoch_by
from vae_hyperband.model import VAE
from vae_hyperband.packed import Pack
from vae_hyperband.process import environment, keep_freed_memory
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.state import TrainState

#: A pack that is not full waits for this long after the last trial that came.
LINGER_SECONDS = 0.05

WHOLE_EPOCH = sys.maxsize


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
    """One trial that waits for its next steps."""

    state: TrainState
    num_steps: int
    losses_K4: Tensor | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def same_pack(self, other: "_Job") -> bool:
        sizes = self.state.config.batch_size, other.state.config.batch_size
        return sizes[0] == sizes[1] and self.num_steps == other.num_steps


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
        self._device = torch.device(device)
        self._train, held_out = (shared.split() for shared in fetch())
        held_out = as_trained(held_out, config.common())
        self._loader = eval_dataloader(held_out, self._device)
        self._lanes = threading.Semaphore(lanes)
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._free: dict[tuple[int, int], list[Pack]] = {}  # packs that no lane is using

    def environment(self) -> dict[str, Any]:
        with self._lane():
            found = environment(self._device)
        return found if self._device.type == "cpu" else found | {"pack": self._size}

    def advance(self, state: TrainState, num_steps: int) -> tuple[Tensor, TrainState]:
        """:meth:`Pack.run` for one state, beside those that wait, too."""
        job = _Job(state, num_steps)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        with self._lane():
            if jobs := self._together_with(job):
                self._run(jobs)
        job.done.wait()
        if job.error:
            raise job.error
        assert job.losses_K4 is not None
        return job.losses_K4, job.state

    def evaluate(self, model: VAE, *settings: Any) -> Losses:
        """:func:`~vae_hyperband.bounds.eval_epoch` on the validation split."""
        with self._lane():
            return eval_epoch(model.to(self._device), self._loader, *settings)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[None]:
        with self._lanes:
            torch.set_num_threads(self._num_threads)  # for this thread; none keeps another number
            yield

    def _together_with(self, job: _Job) -> list[_Job]:
        """The job and those that can be packed with it; none if another thread has taken it."""

        def found() -> list[_Job]:
            return [other for other in self._waiting if other.same_pack(job)]

        with self._changed:
            while job in self._waiting and len(found()) < self._size:
                before = len(self._waiting)
                self._changed.wait(LINGER_SECONDS)
                if len(self._waiting) <= before:
                    break
            if job not in self._waiting:
                return []
            others = [other for other in found() if other is not job]
            jobs = [job, *others[: self._size - 1]]
            for chosen in jobs:
                self._waiting.remove(chosen)
            return jobs

    def _run(self, jobs: list[_Job]) -> None:
        try:
            pack = self._pack_for(jobs[0].state.config)
            found = pack.run([job.state for job in jobs], jobs[0].num_steps)
            for job, losses_K4 in zip(jobs, found, strict=True):
                job.losses_K4 = losses_K4
            with self._changed:
                self._free[pack.config.batch_size, pack.latent_dim].append(pack)
        except Exception as error:  # such as too little memory; each trial tries again, or gives up
            torch.cuda.empty_cache()
            for job in jobs:
                job.error = error
        finally:
            for job in jobs:
                job.done.set()

    def _pack_for(self, config: TrainConfig) -> Pack:
        widest = self._widest if self._size > 1 else config.latent_dim
        with self._changed:
            free = self._free.setdefault((config.batch_size, widest), [])
            if free:
                return free.pop()
        return Pack(config, self._train, self._size, widest, self._device)


@dataclass(frozen=True)
class Packers:
    """The packing processes of a search, with the node of each."""

    handles: tuple[ActorHandle, ...]
    nodes: tuple[str, ...]
    data: ray.ObjectRef  # what a packer that is started again asks for: Ray keeps it while this is

    def engine(self, number: int) -> Engine:
        """What trains the trial with that number: a packer of its node, or of another."""
        here = ray.get_runtime_context().get_node_id()
        pairs = list(zip(self.handles, self.nodes, strict=True))
        near = [handle for handle, node in pairs if node == here] or list(self.handles)
        packer = near[number % len(near)]

        def advance(state: TrainState, num_steps: int) -> Tensor:
            losses_K4, there = _answer(packer.advance.remote(state, num_steps))
            state.model, state.optimizer = there.model, there.optimizer
            return losses_K4

        def evaluate(model: VAE, loader: object, *settings: Any) -> Losses:
            return _answer(packer.evaluate.remote(model, *settings))

        return Engine(
            functools.partial(train_epoch_by, advance, WHOLE_EPOCH),
            evaluate,
            _answer(packer.environment.remote()),
        )


def _answer(reference: ray.ObjectRef) -> Any:
    """What a packer returns or raises."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error


def start_packers(
    config: SearchConfig, options: SearchOptions, splits: tuple[Split, Split]
) -> Packers:
    """One packer for each GPU of the cluster, or for each node if trials use none."""
    data = ray.put(tuple(map(SharedSplit.of, splits)))
    on_gpu, handles, nodes = bool(options.gpus_per_trial), [], []
    for node in ray.nodes():
        resources = node["Resources"]
        lanes = 1 if on_gpu else num_lanes(resources, options)
        if not node["Alive"] or not lanes:
            continue
        actor: Any = ray.remote(Packer).options(
            num_cpus=0,
            num_gpus=int(on_gpu),
            max_restarts=-1,
            max_concurrency=1000,  # those that wait are threads
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        for _ in range(int(resources.get("GPU", 0)) if on_gpu else 1):
            packer = actor.remote(
                config,
                functools.partial(ray.get, data),
                trial_device(options),
                options.num_in_pack,
                lanes,
                options.cpus_per_trial,
            )
            handles.append(packer)
            nodes.append(node["NodeID"])
    return Packers(tuple(handles), tuple(nodes), data)
