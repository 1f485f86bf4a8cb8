"""A run whose steps a pack takes leaves what the plain loop leaves, byte for byte on a CPU."""

import dataclasses
import functools

import pytest
import torch

from vae_hyperband import engines
from vae_hyperband.checkpoint import load_ckpt, tree_digest
from vae_hyperband.data import get_dataloader, load_split
from vae_hyperband.engines import Engine, graph_engine, train_epoch_by
from vae_hyperband.errors import DivergedError
from vae_hyperband.packed import Pack
from vae_hyperband.state import new_state
from vae_hyperband.tracking import read_rows
from vae_hyperband.training import fit, train_epoch

CPU = torch.device("cpu")


@pytest.fixture
def train(small_data):
    return load_split("train", small_data, "custom")


@pytest.fixture(autouse=True)
def none_kept(monkeypatch):
    monkeypatch.setattr(engines, "_kept", {})


def left(result):
    """What a run has left, without what may differ: where it was computed, and when."""
    content = [load_ckpt(path) for path in (result.latest, result.best)]
    return [tree_digest(c) for c in content], (result.log_folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stride", [1, 7, 1000])
def test_a_run_in_a_pack_leaves_the_same_bytes(options, small_config, train, stride):
    plain = fit(small_config, options(run="plain", log_interval=3), quiet=True)
    engine = graph_engine(small_config, train, CPU, stride)
    packed = fit(small_config, options(run="pack", log_interval=3), engine=engine, quiet=True)
    assert left(plain) == left(packed)
    rows = read_rows(packed.log_folder / "metrics.jsonl")
    assert {row["step"] for row in rows if row["split"] == "train"} >= {3, 6, 9, 10, 12}


@pytest.mark.parametrize("first_in_a_pack", [True, False])
def test_a_stopped_run_goes_on_in_a_pack_or_without(options, small_config, train, first_in_a_pack):
    plain = fit(small_config, options(run="plain"), quiet=True)
    pack = graph_engine(small_config, train, CPU, stride=4)
    one, other = (pack, None) if first_in_a_pack else (None, pack)
    calls = iter(range(100))
    half = fit(
        small_config, options(run="b"), engine=one,
        should_stop=lambda: next(calls) >= 1, quiet=True,
    )  # fmt: skip
    assert not half.finished
    assert half.state.step % half.state.steps_per_epoch != 0
    assert left(fit(small_config, options(run="b"), engine=other, quiet=True)) == left(plain)


def test_a_save_within_an_epoch_holds_the_weights_of_its_step(options, small_config, train):
    """Saved wherever it may be: at each stride, never in between."""
    saved = []
    engine = graph_engine(small_config, train, CPU, stride=3)

    def seen(state, loader, on_step, on_losses):
        def noting(state):
            stop = on_step(state)
            saved.append(load_ckpt(folder / "latest.pt"))
            return stop

        return engine.train_epoch(state, loader, noting, on_losses)

    always = options(run="a", ckpt_seconds=0.0)
    folder = always.ckpt_folder
    fit(small_config, always, engine=Engine(seen), quiet=True)
    assert [content["step"] for content in saved[:3]] == [3, 6, 9]
    for content in saved[:3]:
        other = options(run=f"to-{content['step']}")
        calls = iter(range(1, 100))
        fit(
            small_config, other, quiet=True,
            should_stop=lambda calls=calls, end=content["step"]: next(calls) >= end,
        )  # fmt: skip
        assert load_ckpt(other.ckpt_folder / "latest.pt")["digest"] == content["digest"]


def test_a_pack_is_waited_for_where_the_step_is_a_multiple_of_the_stride(small_config, train):
    state = new_state(small_config, train.image_shape, len(train))
    loader = get_dataloader(train, small_config.batch_size, seed=small_config.seed, shuffle=True)
    assert train_epoch(state, loader, lambda state: state.step == 2) is None
    waited = []
    engine = graph_engine(small_config, train, CPU, stride=4)
    engine.train_epoch(state, loader, lambda state: waited.append(state.step))
    assert waited == [4, 8, 10]


def test_speed_is_measured_where_a_pack_was_waited_for(options, small_config, train):
    engine = graph_engine(small_config, train, CPU, stride=1000)
    result = fit(small_config, options(log_interval=3), engine=engine, quiet=True)
    rows = read_rows(result.log_folder / "timing.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]


def test_divergence_in_a_pack_says_what_the_loop_says(options, small_config, train):
    wild = dataclasses.replace(small_config, learning_rate=1e6, schedule="constant", epochs=50)
    with pytest.raises(DivergedError) as plain:
        fit(wild, options(run="plain", ckpt_seconds=0.0), quiet=True)
    engine = graph_engine(wild, train, CPU, 5)
    with pytest.raises(DivergedError) as packed:
        fit(wild, options(run="pack", ckpt_seconds=0.0), engine=engine, quiet=True)
    assert str(packed.value) == str(plain.value)


def test_a_later_run_of_the_same_shape_takes_the_captured_step_over(small_config, train):
    def pack_of(config, split=train):
        graph_engine(config, split, CPU)
        return list(engines._kept.values())[-1]

    first = pack_of(small_config)
    assert pack_of(dataclasses.replace(small_config, learning_rate=1e-4, seed=9)) is first
    assert pack_of(dataclasses.replace(small_config, batch_size=64)) is not first
    others = train.subset(torch.arange(len(train)).flip(0))
    assert pack_of(small_config, others) is not first
    for size in range(1, 9):
        pack_of(dataclasses.replace(small_config, latent_dim=size))
    assert len(engines._kept) == engines.NUM_KEPT


def test_what_a_pack_refuses_but_the_loop_takes_goes_on(small_config, train):
    """A GPU may round a step to infinity that is finite by itself."""
    pack = Pack(small_config, train)
    refused = []

    def advance(state, num_steps):
        if state.step == 4 and not refused:
            refused.append(state.step)
            return torch.zeros(0, 4, dtype=torch.float64)
        return pack.run([state], num_steps)[0]

    seen = []
    states = [new_state(small_config, train.image_shape, len(train)) for _ in range(2)]
    loaders = [
        get_dataloader(train, small_config.batch_size, seed=small_config.seed, shuffle=True)
        for _ in range(2)
    ]
    losses = functools.partial(train_epoch_by, advance, 4)(
        states[0], loaders[0], on_losses=lambda state: seen.append(state.step)
    )
    assert losses == train_epoch(states[1], loaders[1])
    assert seen == list(range(1, 11))
    for a, b in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
