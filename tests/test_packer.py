"""The process that trains many trials at once, asked by threads as Ray's actor is by trials."""

import dataclasses
import threading
import time

import pytest
import torch

from vae_hyperband import packer
from vae_hyperband.bounds import eval_dataloader, eval_epoch
from vae_hyperband.checkpoint import tree_digest
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import get_dataloader, load_split
from vae_hyperband.errors import ConfigError
from vae_hyperband.packed import Pack
from vae_hyperband.packer import Packer, SharedSplit
from vae_hyperband.packers import WHOLE_EPOCH
from vae_hyperband.process import cpu_threads
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.state import new_state
from vae_hyperband.training import train_epoch

SPACE = SearchConfig(dataset="custom", latent_dims=(4,), batch_sizes=(32, 64))


@pytest.fixture(autouse=True)
def a_busy_machine_delays_nobody(monkeypatch):
    monkeypatch.setattr(packer, "LINGER_SECONDS", 0.5)


@pytest.fixture
def splits(small_data):
    return [load_split(name, small_data, "custom") for name in ("train", "validation")]


@pytest.fixture
def packs(monkeypatch):
    """The packs that are made, and who was in each of their runs."""
    made, ran = [], []

    class Seen(Pack):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def run(self, members, num_steps):
            ran.append([member.config.seed for member in members])
            time.sleep(0.2)  # others come meanwhile
            return super().run(members, num_steps)

    monkeypatch.setattr(packer, "Pack", Seen)
    return made, ran


def make(splits, size, **changes):
    shared = tuple(map(SharedSplit.of, splits))
    return Packer(SPACE, lambda: shared, "cpu", size, **changes)


def state_of(splits, seed=0, **changes):
    config = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=3, seed=seed)
    config = dataclasses.replace(config, **changes)
    return new_state(config, splits[0].image_shape, len(splits[0]))


def ask(packing, states):
    """All states ask at once for an epoch; what each gets, or the error that it raised."""
    answers = {}

    def one(number, state):
        try:
            answers[number] = packing.advance(state, WHOLE_EPOCH)
        except Exception as error:
            answers[number] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(states)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(states))]


def weights(state):
    return tree_digest(state.model.state_dict())


def alone(splits, state):
    config = state.config
    twin = new_state(config, splits[0].image_shape, len(splits[0]))
    loader = get_dataloader(splits[0], config.batch_size, seed=config.seed, shuffle=True)
    with cpu_threads(1):  # as the lanes have
        train_epoch(twin, loader)
    return twin


def test_those_that_wait_go_into_one_pack_and_become_what_they_become_alone(splits, packs):
    _, ran = packs
    packing = make(splits, size=3)
    busy = threading.Thread(target=ask, args=(packing, [state_of(splits, 9, batch_size=64)]))
    busy.start()
    while not ran:
        time.sleep(0.001)
    states = [state_of(splits, seed) for seed in range(5)]
    answers = ask(packing, states)
    busy.join()
    assert [len(members) for members in ran] == [1, 3, 2]
    assert sorted(seed for members in ran[1:] for seed in members) == list(range(5))
    for losses, state in answers:
        twin = alone(splits, state)
        assert len(losses) == 10
        assert weights(state) == weights(twin)
        assert losses[:, 0].sum().item() == pytest.approx(twin.sums[0, 0].item(), rel=1e-12)


def test_batch_sizes_are_packed_apart(splits, packs):
    _, ran = packs
    states = [state_of(splits, seed, batch_size=32 * (1 + seed % 2)) for seed in range(4)]
    answers = ask(make(splits, size=4), states)
    assert sorted(map(sorted, ran)) == [[0, 2], [1, 3]]
    assert [weights(state) for _, state in answers] == [
        weights(alone(splits, state)) for state in states
    ]


def test_who_comes_later_takes_a_place_in_the_pack_that_is_there(splits, packs):
    """A trial was stopped, another one begins: nothing is made anew."""
    made, ran = packs
    packing = make(splits, size=2)
    (_, first), (_, second) = ask(packing, [state_of(splits, 0), state_of(splits, 1)])
    first.step = second.step = 10
    _, (_, third) = ask(packing, [second, state_of(splits, 2)])
    assert len(made) == 1
    assert [sorted(members) for members in ran] == [[0, 1], [1, 2]]
    assert weights(third) == weights(alone(splits, third))


def test_lanes_compute_at_the_same_time(splits, packs):
    made, ran = packs
    ask(make(splits, size=1, lanes=2), [state_of(splits, seed) for seed in range(2)])
    assert len(made) == len(ran) == 2  # the second did not wait for the first one's pack


def test_an_error_reaches_each_of_its_pack_and_no_later_one(splits, monkeypatch):
    run, calls = Pack.run, []

    def failing(self, members, num_steps):
        calls.append(len(members))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return run(self, members, num_steps)

    monkeypatch.setattr(Pack, "run", failing)
    packing = make(splits, size=2)
    answers = ask(packing, [state_of(splits, seed) for seed in range(2)])
    assert calls == [2]
    assert all(isinstance(answer, torch.OutOfMemoryError) for answer in answers)
    [(losses, _)] = ask(packing, [state_of(splits, 0)])
    assert len(losses) == 10


def test_it_validates_as_the_loop_does(splits):
    packing, state = make(splits, size=2), state_of(splits)
    with cpu_threads(1):
        expected = eval_epoch(state.model, eval_dataloader(splits[1]), 7, 2.0, 3)
    assert packing.evaluate(state.model, 7, 2.0, 3) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pack_size": 4}, "--pack-size is of --engine packed"),
        ({"engine": "packed", "pack_size": 0}, "--pack-size is 0"),
        ({"engine": "packed", "gpus_per_trial": 0.5}, "leave out --gpus-per-trial"),
        ({"engine": "graph"}, "engine"),
    ],
)
def test_contradictory_options_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        SearchOptions(**options)
