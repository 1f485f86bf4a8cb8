"""The fast layers against PyTorch's own ones, which the same modules hold as ``plain``."""

import copy

import pytest
import torch
from torch import nn

from vae_hyperband.model.fast_layers import (
    Conv,
    ConvTranspose,
    linear_from_images,
    linear_to_images,
)
from vae_hyperband.model.objective import nats_per_image
from vae_hyperband.model.vae import initialized_vae

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = [(1, 32, 28), (3, 5, 8), (5, 1, 12), (32, 64, 14), (64, 32, 4)]  # in, out, size
LAYERS = [
    pytest.param(kind, relu, *shape, id=f"{kind.__name__}-{relu}-{shape}")
    for kind in (Conv, ConvTranspose)
    for relu in (True, False)
    for shape in SHAPES
]


class PlainVAE(nn.Module):
    """The same parameters in the formulas of the README's table, by PyTorch's own operations."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.vamp, self.likelihood, self.log_scale = None, model.likelihood, None

    def forward(self, x, noise):
        encoder, decoder = self.model.encoder, self.model.decoder
        h = encoder.conv2.plain(encoder.conv1.plain(x)).flatten(1)
        mu, logvar = encoder.fc_mu(h), encoder.fc_logvar(h).clamp(-20, 20)
        z = mu + torch.exp(0.5 * logvar) * noise
        h = decoder.fc(z).unflatten(1, (64, 7, 7))
        return decoder.conv_t2.plain(decoder.conv_t1.plain(h)), mu, logvar


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("kind", "relu", "channels_in", "channels_out", "size"), LAYERS)
def test_a_layer_equals_pytorch_s_own_in_values_and_gradients(
    kind, relu, channels_in, channels_out, size, dtype
):
    torch.manual_seed(0)
    layer = kind(channels_in, channels_out, relu=relu).to(dtype)
    x = torch.randn(6, channels_in, size, size, dtype=dtype, requires_grad=True)
    found, expected = layer(x), layer.plain(x)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < ROUNDING[dtype]
    weights = torch.randn_like(expected)
    inputs = (x, layer.weight, layer.bias)
    for gradient, plain in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert gradient.shape == plain.shape
        assert relative_error(gradient, plain) < ROUNDING[dtype]


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 6), (6, 1), (6, 7)])
def test_gradients_are_those_of_finite_differences(kind, channels_in, channels_out):
    torch.manual_seed(0)
    layer = kind(channels_in, channels_out, relu=False).double()
    x = torch.randn(2, channels_in, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, weight, bias: torch.func.functional_call(
            layer, {"weight": weight, "bias": bias}, x
        ),
        (x, layer.weight, layer.bias),
    )


@pytest.mark.parametrize("kind", [Conv, ConvTranspose])
def test_layers_take_any_memory_layout_and_leave_what_they_are_given_alone(kind):
    torch.manual_seed(0)
    for channels_in, channels_out in ((1, 8), (8, 1), (8, 9)):
        layer = kind(channels_in, channels_out)
        x = torch.randn(3, channels_in, 8, 8)
        for given in (
            x.to(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack((x, x))[1],
            x[:1].expand(3, -1, -1, -1),
        ):
            given.requires_grad_()
            y, before = layer(given), given.detach().clone()
            assert relative_error(y, layer.plain(given)) < 1e-5
            gradient = torch.ones(()).expand(y.shape)  # as that of a sum: one number in memory
            y.backward(gradient)
            assert torch.equal(given, before)
            assert torch.equal(gradient, torch.ones(y.shape))


def test_linear_layers_to_and_from_images_are_linear_layers_and_a_flattening():
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(5, 6, 4, 2).to(memory_format=layout)
        into, out = nn.Linear(48, 7), nn.Linear(7, 48)
        found = linear_from_images(images, into.weight, into.bias)
        torch.testing.assert_close(found, into(images.flatten(1)))
        found = linear_to_images(found, out.weight, out.bias, (6, 4, 2))
        torch.testing.assert_close(found, out(into(images.flatten(1))).view(5, 6, 4, 2))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_network_equals_the_plain_one_in_values_and_gradients(dtype):
    model = initialized_vae(32, 28, 1, seed=3).to(dtype)
    plain = PlainVAE(model)
    torch.manual_seed(0)
    x, noise = torch.rand(7, 1, 28, 28).to(dtype), torch.randn(7, 32).to(dtype)
    total, expected = (sum(nats_per_image(network, x, noise)).mean() for network in (model, plain))
    assert relative_error(total, expected) < ROUNDING[dtype]
    total.backward()
    expected.backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(parameter.grad, other.grad) < ROUNDING[dtype]


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
    layer, x = Conv(1, 32), torch.rand(2, 1, 20, 24)  # of a size that nobody else has
    with torch.device("meta"), torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert relative_error(layer(x), layer.plain(x)) < 1e-5
