"""A pack against its members trained alone, by the loop that has no pack in it."""

import copy
import dataclasses
import math

import pytest
import torch

from vae_hyperband import convolution, packed
from vae_hyperband.checkpoint import tree_digest
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, get_dataloader, load_split
from vae_hyperband.errors import ConfigError
from vae_hyperband.packed import Pack
from vae_hyperband.process import pick_device
from vae_hyperband.state import new_state
from vae_hyperband.training import train_epoch

VARIANTS = {
    "elbo": {},
    "warm-up": {"kl_warmup_epochs": 1.5},
    "cycles": {"kl_cycles": 2},
    "free bits": {"objective": "free-bits"},
    "capacity": {"objective": "capacity", "capacity": 4.0},
    "beta-tc": {"objective": "beta-tc", "beta": 1.1},
    "iwae": {"objective": "iwae", "beta": 1.0},
    "bits": {"binarize": "dynamic"},
    "vamp": {"prior": "vamp", "pseudo_inputs": 5},
    "logistic": {"likelihood": "discretized-logistic"},
    "continuous": {"likelihood": "continuous-bernoulli"},
    "constant": {"schedule": "constant"},
}


@pytest.fixture
def train(small_data):
    return load_split("train", small_data, "custom")  # 300 images: batches of 32, the last of 12


def configs(**settings):
    """Three runs that differ in all that a pack's members may differ in, but for the code."""
    common = {"dataset": "custom", "latent_dim": 4, "epochs": 3, "batch_size": 32, "beta": 2.0}
    common |= settings
    one = TrainConfig(**common, seed=3)
    beta = common["beta"] if common.get("objective") == "iwae" else 0.5
    return [
        one,
        dataclasses.replace(one, learning_rate=2e-3),
        dataclasses.replace(one, seed=4, beta=beta, learning_rate=4e-3, epochs=2),
    ]


def members(train, chosen):
    return [new_state(config, train.image_shape, len(train)) for config in chosen]


def alone(train, config, num_steps, device="cpu"):
    """The state after so many steps of the loop without a pack, and its losses."""
    state = new_state(config, train.image_shape, len(train), device)
    loader = get_dataloader(train, config.batch_size, seed=config.seed, shuffle=True, device=device)
    while state.step < num_steps:
        train_epoch(state, loader, lambda state: state.step == num_steps)
    return state


def digest(state):
    return tree_digest({"model": state.model.state_dict(), "adam": state.optimizer.state_dict()})


def advance(pack, states, num_steps):
    """Steps of all, across epochs."""
    for _ in range(num_steps):
        for state, losses in zip(states, pack.run(states, 1), strict=True):
            state.step += len(losses)


def distance(one, other):
    """Of two models' weights, relative to what training has changed."""
    one, other = (torch.nn.utils.parameters_to_vector(x).detach() for x in (one, other))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("few", [0, 32], ids=["one after the other", "side by side"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_member_becomes_what_it_becomes_alone(train, variant, few, monkeypatch):
    """To the same bits on a CPU, in weights, in Adam's memory and over an epoch's short batch."""
    monkeypatch.setattr(packed, "FEW_IMAGES", few)
    chosen = configs(**VARIANTS[variant])
    states = members(train, chosen)
    pack = Pack(chosen[0], train, capacity=3)
    for _ in range(2):
        for state, losses in zip(states, pack.run(states, 100), strict=True):
            assert losses.shape == (10, 4)
            state.step += 10
    for state, config in zip(states, chosen, strict=True):
        assert digest(state) == digest(alone(train, config, 20))


def test_a_narrower_code_is_trained_as_if_it_were_of_its_own_size(train):
    """Initialised as its own size would be; what it does not have stays zero."""
    chosen = [
        dataclasses.replace(config, latent_dim=size)
        for config, size in zip(configs(), (2, 4, 7), strict=True)
    ]
    states = members(train, chosen)
    pack = Pack(chosen[0], train, capacity=3, latent_dim=7)
    first = pack.run(states, 1)
    for config, losses in zip(chosen, first, strict=True):
        expected = alone(train, config, 1)
        torch.testing.assert_close(losses[0], expected.sums[1], rtol=1e-6, atol=0)
    for state in states:
        state.step += 1
    pack.run(states, 9)
    for state, config in zip(states, chosen, strict=True):
        other = alone(train, config, 10)
        assert state.model.latent_dim == config.latent_dim
        assert distance(state.model.parameters(), other.model.parameters()) < 1e-4
    narrow = pack._stack._views(pack._stack._weights_NP)[4][0]  # the first member's fc_mu
    assert narrow.shape[0] == 7
    assert narrow[:2].abs().min() > 0
    assert narrow[2:].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_dimensions_that_a_member_does_not_have_cost_nothing(train, variant):
    """In no objective: the losses of a narrower code are its own, but for rounding."""
    config = dataclasses.replace(configs(**VARIANTS[variant])[0], latent_dim=3)
    (state,) = members(train, [config])
    losses = Pack(config, train, capacity=2, latent_dim=8).run([state], 10)[0]
    sums = alone(train, config, 10).sums[0]
    if config.objective == "elbo":  # counted apart, from the parts
        losses[:, 2] = sums[2] = 0
    torch.testing.assert_close(losses.sum(dim=0), sums, rtol=2e-4, atol=0)


def test_a_pack_of_batched_products_equals_the_loop_over_200_steps(train, monkeypatch):
    """What a GPU is given: gathered patches and one product for all members.

    Each step is taken by both from the loop's own state. From their own, they part as soon as one
    of the two has rounded a ReLU's input to the other side of zero, which depends on the CPU.
    """
    chosen = [dataclasses.replace(config, epochs=20) for config in configs()]
    states = members(train, chosen)
    pack, batched = (Pack(chosen[0], train, capacity=4, latent_dim=7) for _ in range(2))
    distances = []
    for _ in range(200):
        others = copy.deepcopy(states)
        with monkeypatch.context() as patch:
            patch.setattr(convolution, "_by_patches", lambda images, weight: weight.dim() == 5)
            patch.setattr(convolution, "_one_by_one", lambda tensor: False)
            losses = torch.stack(batched.run(others, 1))
        expected = torch.stack(pack.run(states, 1))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        for state, other in zip(states, others, strict=True):
            distances.append(distance(other.model.parameters(), state.model.parameters()))
            state.step += 1
    *most, _, _, _, _, _, worst = sorted(distances)
    assert 0 < most[-1] < 1e-7, most[-9:]
    assert worst < 1e-3


@pytest.mark.parametrize("few", [0, 32], ids=["one after the other", "side by side"])
def test_members_come_and_go_and_nobody_notices(train, few, monkeypatch):
    """At different places of different epochs, with places left empty, in a different order."""
    monkeypatch.setattr(packed, "FEW_IMAGES", few)
    chosen = [dataclasses.replace(config, epochs=3) for config in configs()]
    a, b, c = members(train, chosen)
    pack = Pack(chosen[0], train, capacity=3)
    advance(pack, [a], 4)
    advance(pack, [b, a], 7)  # a ends its epoch, with a shorter batch, while b is in its first
    advance(pack, [c, b], 5)
    for state, losses in zip((b, a, c), pack.run([b, a, c], 30), strict=True):
        state.step += len(losses)  # each to the end of its own epoch
    assert [a.step, b.step, c.step] == [20, 20, 10]
    for state, config in zip((a, b, c), chosen, strict=True):
        assert digest(state) == digest(alone(train, config, state.step))


def test_a_step_that_is_not_finite_holds_its_member_and_nobody_else(train):
    chosen = configs()
    chosen[1] = dataclasses.replace(chosen[1], learning_rate=1e12)
    states = members(train, chosen)
    losses = Pack(chosen[0], train, capacity=3).run(states, 10)
    good = len(losses[1])
    assert [len(found) for found in losses] == [10, good, 10]
    assert 0 < good < 10
    assert all(torch.isfinite(found).all() for found in losses)
    for state, config, found in zip(states, chosen, losses, strict=True):
        assert all(torch.isfinite(weight).all() for weight in state.model.parameters())
        assert digest(state) == digest(alone(train, config, len(found)))


@pytest.mark.parametrize("few", [0, 32], ids=["one after the other", "side by side"])
@pytest.mark.parametrize("variant", ["elbo", "iwae"])
def test_a_place_keeps_nothing_of_who_was_there(train, variant, few, monkeypatch):
    """After a wide code and one that diverged, narrow ones in the same places: to the same bits."""
    monkeypatch.setattr(packed, "FEW_IMAGES", few)
    wide, wild, narrow = configs(**VARIANTS[variant])
    wide = dataclasses.replace(wide, latent_dim=7, seed=9)
    wild = dataclasses.replace(wild, learning_rate=1e12, latent_dim=7)
    pack = Pack(wide, train, capacity=2, latent_dim=7)
    assert len(pack.run(members(train, [wide, wild]), 10)[1]) < 10
    fresh = Pack(wide, train, capacity=2, latent_dim=7)
    found, expected = members(train, [narrow, narrow]), members(train, [narrow, narrow])
    assert [len(losses) for losses in pack.run(found, 10)] == [10, 10]
    fresh.run(expected, 10)
    assert [digest(state) for state in found] == [digest(state) for state in expected]


def test_a_poisoned_image_holds_who_meets_it(train):
    class Poisoned(Split):
        def pixels(self, index):
            pixels = super().pixels(index)
            pixels[index == 123] = math.nan
            return pixels

    chosen = configs()[:1]
    pack = Pack(chosen[0], train)
    pack._train = Poisoned(train.images_NCHW, train.labels_N, "")
    (state,) = members(train, chosen)
    order = get_dataloader(train, 32, seed=3, shuffle=True).sampler.order(0).tolist()
    assert len(pack.run([state], 10)[0]) == order.index(123) // 32


@pytest.mark.parametrize(
    "change", [{"batch_size": 16}, {"objective": "free-bits"}, {"latent_dim": 5}]
)
def test_runs_that_do_not_belong_together_are_refused(train, change):
    config = configs()[0]
    (state,) = members(train, [dataclasses.replace(config, **change)])
    with pytest.raises(ConfigError, match="one batch size"):
        Pack(config, train, capacity=2).run([state], 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_captured_steps_equal_the_loop_to_rounding(train):
    pick_device("cuda")  # which makes cuDNN sum in a fixed order
    chosen = configs()
    widths = [
        dataclasses.replace(config, latent_dim=size)
        for config, size in zip(chosen, (2, 4, 7), strict=True)
    ]
    for capacity, width, runs in ((1, 4, chosen[:1]), (4, 7, widths)):
        digests = []
        for _ in range(2):
            states = [new_state(c, train.image_shape, len(train), "cuda") for c in runs]
            losses = Pack(runs[0], train, capacity, width, "cuda").run(states, 10)
            digests.append([digest(state) for state in states])
        assert digests[0] == digests[1]
        for state, config, found in zip(states, runs, losses, strict=True):
            other = alone(train, config, 10, "cuda")
            assert distance(state.model.parameters(), other.model.parameters()) < 1e-3
            recon = other.sums[0, 0].cpu()
            torch.testing.assert_close(found[:, 0].sum(), recon, rtol=1e-4, atol=0)
