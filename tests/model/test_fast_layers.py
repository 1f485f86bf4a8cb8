"""The fast layers against torch.nn's own, and the network with either."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import load_split
from vae_hyperband.model import fast_layers, initialization, vae
from vae_hyperband.model.fast_layers import Conv2d, ConvTranspose2d, Flatten
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.objective import nats_per_image
from vae_hyperband.training.loop import train_epoch
from vae_hyperband.training.state import new_state

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = [(1, 32, 28), (3, 5, 8), (5, 1, 12), (32, 64, 14), (64, 32, 4)]  # in, out, size
KINDS = {
    Conv2d: {"stride": 2, "padding": 1},
    ConvTranspose2d: {"stride": 2, "padding": 1, "output_padding": 1},
}
LAYERS = [
    pytest.param(kind, *shape, id=f"{kind.__name__}-{shape}") for kind in KINDS for shape in SHAPES
] + [pytest.param(ConvTranspose2d, 64, 32, 7, id="from an odd size")]


def make(kind, channels_in, channels_out):
    return kind(channels_in, channels_out, 3, **KINDS[kind])


def plain(layer, x):
    """The same by torch.nn's own layer."""
    return type(layer).__base__.forward(layer, x)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("kind", "channels_in", "channels_out", "size"), LAYERS)
def test_a_layer_equals_pytorch_s_own_in_values_and_gradients(
    kind, channels_in, channels_out, size, dtype
):
    torch.manual_seed(0)
    layer = make(kind, channels_in, channels_out).to(dtype)
    x = torch.randn(6, channels_in, size, size, dtype=dtype, requires_grad=True)
    found, expected = layer(x), plain(layer, x)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < ROUNDING[dtype]
    weights = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    for gradient, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert gradient.shape == other.shape
        assert relative_error(gradient, other) < ROUNDING[dtype]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 6), (6, 1), (6, 7)])
def test_gradients_are_those_of_finite_differences(kind, channels_in, channels_out):
    torch.manual_seed(0)
    layer = make(kind, channels_in, channels_out).double()
    x = torch.randn(2, channels_in, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(
            layer, {"weight": weight, "bias": bias}, x
        ),
        (x, layer.weight, layer.bias),
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_layers_take_any_memory_layout_and_leave_what_they_are_given_alone(kind):
    torch.manual_seed(0)
    for channels_in, channels_out in ((1, 8), (8, 1), (8, 9)):
        layer = make(kind, channels_in, channels_out)
        x = torch.randn(3, channels_in, 8, 8)
        for given in (
            x.to(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack((x, x))[1],
            x[:1].expand(3, -1, -1, -1),
        ):
            given.requires_grad_()
            y, before = layer(given), given.detach().clone()
            assert relative_error(y, plain(layer, given)) < 1e-5
            gradient = torch.ones(()).expand(y.shape)  # as that of a sum: one number in memory
            y.backward(gradient)
            assert torch.equal(given, before)
            assert torch.equal(gradient, torch.ones(y.shape))


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(2, 4, 5, stride=2, padding=2),
        Conv2d(2, 4, 3, stride=1, padding=1),
        Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
        Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        ConvTranspose2d(2, 4, 3, stride=2, padding=1),
    ],
    ids=str,
)
def test_other_layers_of_these_names_are_torch_nn_s(layer):
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(layer(x), plain(layer, x))
    odd = torch.randn(2, 2, 7, 7)
    assert torch.equal(layer(odd), plain(layer, odd))


def test_every_convolution_of_the_default_network_is_a_fast_one(monkeypatch):
    """Not torch.nn's, which gives the same result, only later."""

    def fail(*_):
        raise AssertionError("torch.nn's own layer was called")

    model = initialized_vae(32, 28, 1, seed=3)
    for kind in KINDS:
        monkeypatch.setattr(kind.__base__, "forward", fail)
    model(torch.rand(2, 1, 28, 28), torch.randn(2, 32))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flatten_is_torch_nn_s_and_its_gradient_has_the_layout_of_its_input(layout):
    x = torch.randn(5, 6, 4, 2).to(memory_format=layout).requires_grad_()
    y, seen = x * 1, []
    y.register_hook(seen.append)
    weights = torch.randn(5, 48)
    found = Flatten()(y)
    assert torch.equal(found, nn.Flatten()(y))
    (found * weights).sum().backward()
    assert torch.equal(x.grad, weights.view(5, 6, 4, 2))
    assert seen[0].is_contiguous(memory_format=layout)


@pytest.fixture
def plain_vae(monkeypatch, tmp_path):
    """model/vae.py with torch.nn in the place of the fast layers: one line of it is replaced."""
    fast = "from vae_hyperband.model import fast_layers as nn\n"
    source = Path(vae.__file__).read_text()
    assert source.count(fast) == 1
    path = tmp_path / "plain_vae.py"
    path.write_text(source.replace(fast, "from torch import nn\n"))
    spec = importlib.util.spec_from_file_location("plain_vae", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_vae", module)
    spec.loader.exec_module(module)
    assert module.Encoder.__base__ is nn.Module
    return module


def test_the_model_with_torch_nn_trains_to_the_same_losses(plain_vae, monkeypatch, small_data):
    """Two epochs, at a rate too low to blow rounding up."""
    config = TrainConfig(
        dataset="custom", latent_dim=4, batch_size=32, epochs=2, learning_rate=1e-3, seed=3
    )
    split = load_split("train", small_data, "custom")

    def losses():
        state = new_state(config, split.image_shape, len(split))
        loader = get_dataloader(split, 32, seed=3, shuffle=True)
        return state.model, [train_epoch(state, loader) for _ in range(2)]

    model, found = losses()
    assert type(model.encoder.conv1) is fast_layers.Conv2d
    monkeypatch.setattr(initialization, "VAE", plain_vae.VAE)
    model, expected = losses()
    assert type(model.encoder.conv1) is nn.Conv2d
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_network_equals_the_plain_one_in_values_and_gradients(plain_vae, dtype):
    model = initialized_vae(32, 28, 1, seed=3).to(dtype)
    other = plain_vae.VAE().to(dtype)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    x, noise = torch.rand(7, 1, 28, 28).to(dtype), torch.randn(7, 32).to(dtype)
    total, expected = (sum(nats_per_image(network, x, noise)).mean() for network in (model, other))
    assert relative_error(total, expected) < ROUNDING[dtype]
    total.backward()
    expected.backward()
    for parameter, plain_one in zip(model.parameters(), other.parameters(), strict=True):
        assert relative_error(parameter.grad, plain_one.grad) < ROUNDING[dtype]


def test_a_step_gives_the_same_bits_whatever_was_computed_before():
    """The gather's table is kept; nothing else may be."""
    model = initialized_vae(16, 28, 1, seed=0)
    x, noise = torch.rand(9, 1, 28, 28), torch.randn(9, 16)

    def gradients():
        model.zero_grad()
        sum(nats_per_image(model, x, noise)).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    first = gradients()
    initialized_vae(16, 8, 3, seed=0).sample(50, torch.Generator())
    model.reconstruct(torch.rand(70, 1, 28, 28))
    for before, after in zip(first, gradients(), strict=True):
        assert torch.equal(before, after)


def test_the_kept_table_does_not_depend_on_what_was_current_when_it_was_made():
    layer, x = make(Conv2d, 1, 32), torch.rand(2, 1, 20, 24)  # of a size that nobody else has
    with torch.device("meta"), torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert relative_error(layer(x), plain(layer, x)) < 1e-5
