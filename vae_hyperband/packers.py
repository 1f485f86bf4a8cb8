"""The packing processes of a search, as Ray's actors: how they are started, and how trials ask."""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from vae_hyperband.bounds import Losses
from vae_hyperband.cluster import num_lanes, trial_device
from vae_hyperband.data import Split
from vae_hyperband.engines import Engine, train_epoch_by
from vae_hyperband.errors import SearchError
from vae_hyperband.model import VAE
from vae_hyperband.packer import Packer, SharedSplit, SharedSplits
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.state import TrainState

WHOLE_EPOCH = sys.maxsize

#: Who has not begun by then, since another job has its GPU, say, is left out.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Started:
    """A packer that answers."""

    handle: ActorHandle
    node: str
    places: int  # trials that find enough to do there
    environment: dict[str, Any]


@dataclass(frozen=True)
class Packers:
    """The packing processes of a search."""

    started: tuple[Started, ...]
    data: ray.ObjectRef  # what a packer that is started again asks for: Ray keeps it while this is

    @property
    def num_places(self) -> int:
        return sum(packer.places for packer in self.started)

    def engine(self, number: int) -> Engine | None:
        """What trains the trial with that number: a packer of its node, or else of another.

        None where no node that has one is left: then it computes by itself.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        here = ray.get_runtime_context().get_node_id()
        there = [packer for packer in self.started if packer.node in alive]
        near = [packer for packer in there if packer.node == here] or there
        return _engine(near[number % len(near)]) if near else None


def _engine(packer: Started) -> Engine:
    def advance(state: TrainState, num_steps: int) -> Tensor:
        losses_K4, there = _answer(packer.handle.advance.remote(state, num_steps))
        state.model, state.optimizer = there.model, there.optimizer
        return losses_K4

    def evaluate(model: VAE, loader: object, *settings: Any) -> Losses:
        return _answer(packer.handle.evaluate.remote(model, *settings))

    return Engine(
        functools.partial(train_epoch_by, advance, WHOLE_EPOCH), evaluate, packer.environment
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
    """One packer for each free GPU of the cluster, or for each node if trials use none.

    Raises :class:`SearchError` if none begins.
    """
    data = ray.put(tuple(map(SharedSplit.of, splits)))
    fetch = functools.partial(_fetched, ray.cloudpickle.dumps(data))
    on_gpu, asked = bool(options.gpus_per_trial), {}
    for node in ray.nodes():
        resources = node["Resources"]
        lanes = 1 if on_gpu else num_lanes(resources, options)
        if not node["Alive"] or not lanes:
            continue
        # a pack is of one batch size: with so many trials there are enough of each
        sizes = len(config.batch_sizes) if options.num_in_pack > 1 else 1
        places = lanes * options.num_in_pack * sizes
        actor: Any = ray.remote(Packer).options(
            num_cpus=0,
            num_gpus=int(on_gpu),
            max_restarts=-1,
            max_task_retries=-1,  # what it does is a function of what it is given
            max_concurrency=2 * places + 8,  # those that wait are threads
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        settings = (trial_device(options), options.num_in_pack, lanes, options.cpus_per_trial)
        for _ in range(int(resources.get("GPU", 0)) if on_gpu else 1):
            handle = actor.remote(config, fetch, *settings)
            asked[handle.environment.remote()] = (handle, node["NodeID"], places)
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=START_SECONDS)
    for reference in late:
        ray.kill(asked[reference][0])
    try:
        started = [Started(*asked[reference], _answer(reference)) for reference in ready]
    except RayActorError as error:
        why = str(error).strip().splitlines()[-1]
        raise SearchError(f"No pack can be trained here ({why}): use --engine solo.") from error
    if not started:
        raise SearchError(
            f"No GPU of the cluster was free within {START_SECONDS:g} s: wait for the job that has "
            "them, or use --engine solo."
        )
    return Packers(tuple(started), data)


def _fetched(reference: bytes) -> SharedSplits:
    """What ``start_packers`` has put there.

    As bytes, since of a reference Ray would say that it may be gone when the process is started
    again: it is not, the driver holds it.
    """
    return ray.get(ray.cloudpickle.loads(reference))
