import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vae_hyperband.common.errors import ConfigError
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.priors import reparameterize
from vae_hyperband.model.vae import LOGVAR_LIMIT, VAE


def test_the_network_is_the_table_of_the_mission():
    model = VAE()
    layers = [
        m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    kinds = [
        next(kind for kind in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear) if isinstance(layer, kind))
        for layer in layers
    ]
    assert [kind.__name__ for kind in kinds] == [
        "Conv2d", "Conv2d", "Linear", "Linear", "Linear", "ConvTranspose2d", "ConvTranspose2d",
    ]  # fmt: skip
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (32, 1, 3, 3),
        (64, 32, 3, 3),
        (32, 3136),
        (32, 3136),
        (3136, 32),
        (64, 32, 3, 3),
        (32, 1, 3, 3),
    ]
    assert all(layer.stride == (2, 2) for layer in layers if hasattr(layer, "stride"))
    encoder, decoder = model.encoder, model.decoder
    x, z = torch.rand(2, 1, 28, 28), torch.randn(2, 32)
    h = F.conv2d(x, encoder.conv1.weight, encoder.conv1.bias, stride=2, padding=1).relu()
    h = F.conv2d(h, encoder.conv2.weight, encoder.conv2.bias, stride=2, padding=1).relu()
    h = h.flatten(1)
    expected = (F.linear(h, fc.weight, fc.bias) for fc in (encoder.fc_mu, encoder.fc_logvar))
    torch.testing.assert_close(model.encode(x), tuple(expected))
    h = F.linear(z, decoder.fc.weight, decoder.fc.bias).view(2, 64, 7, 7)
    wide = {"stride": 2, "padding": 1, "output_padding": 1}
    h = F.conv_transpose2d(h, decoder.conv_t1.weight, decoder.conv_t1.bias, **wide).relu()
    logits = F.conv_transpose2d(h, decoder.conv_t2.weight, decoder.conv_t2.bias, **wide)
    torch.testing.assert_close(model.decode_images(z), logits.sigmoid())


@pytest.mark.parametrize(("size", "channels", "latent"), [(28, 1, 32), (32, 3, 16), (8, 1, 2)])
def test_shapes_follow_from_the_parameters(size, channels, latent):
    model = VAE(latent_dim=latent, image_size=size, channels=channels)
    x = torch.rand(5, channels, size, size)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (5, latent)
    assert model.decode(mu).shape == x.shape
    for images in (model.reconstruct(x), model.sample(5)):
        assert images.shape == x.shape
        assert 0 <= images.min() <= images.max() <= 1


def test_samples_are_a_function_of_the_generator():
    model = VAE()
    first, second = (model.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.sample(3, torch.Generator().manual_seed(6)))


def test_reparameterized_samples_have_the_posterior_s_mean_and_variance():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2.0]])
    z = reparameterize(
        mu, logvar, torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    )
    torch.testing.assert_close(z.mean(dim=0), mu[0], atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(dim=0), logvar[0].exp(), atol=0, rtol=0.03)


def test_log_variance_is_bounded():
    model = VAE()
    nn.init.constant_(model.encoder.fc_logvar.bias, 1e6)
    _, logvar = model.encode(torch.rand(2, 1, 28, 28))
    assert (logvar == LOGVAR_LIMIT).all()


def test_initial_weights_depend_on_the_seed_alone_and_spare_the_global_generator():
    before = torch.random.get_rng_state()
    first, again, other = (initialized_vae(32, 28, 1, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_initial_weights_spread_as_pytorch_s_own():
    torch.manual_seed(0)
    ours, theirs = initialized_vae(32, 28, 1, seed=0), VAE()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.numel() > 1000:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.1), name


@pytest.mark.parametrize(
    "wrong", [{"latent_dim": 0}, {"image_size": (0, 4)}, {"channels": 0}, {"pseudo_inputs": -1}]
)
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(ConfigError, match="cannot be built"):
        VAE(**wrong)
