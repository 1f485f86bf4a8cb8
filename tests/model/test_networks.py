"""Networks that follow the image: any size, any widths, two families, and the user's own."""

import math
import sys

import pytest
import torch

from vae_hyperband.common.config import TrainConfig, changed_options
from vae_hyperband.common.errors import ConfigError, NetworkError
from vae_hyperband.model import networks
from vae_hyperband.model.fast_layers import Conv2d, ConvTranspose2d
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.networks import allow_network
from vae_hyperband.model.objective import forward_pass, nats_per_image
from vae_hyperband.model.vae import VAE, stage_widths

FAMILIES = ("conv", "residual")
SIZES = {  # (height, width), channels, widths
    "one pixel": ((1, 1), 1, (32, 64)),
    "odd": ((5, 7), 1, (4, 6)),
    "three stages": ((28, 28), 1, (3, 5, 9)),
    "wide": ((32, 48), 1, "auto"),
    "colour": ((96, 128), 3, "auto"),
    "one stage": ((9, 2), 4, (5,)),
}


@pytest.fixture
def own(tmp_path, monkeypatch, request):
    """Writes a module and allows a function of it: its name for --network."""
    monkeypatch.setattr(networks, "_allowed", {})
    module = f"net_{abs(hash(request.node.name))}"

    def write(source, function="build"):
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        allow_network(f"{module}:{function}", str(tmp_path))
        return f"{module}:{function}"

    yield write
    sys.modules.pop(module, None)


MLP = """
import math
from torch import nn

class Encoder(nn.Module):
    def __init__(self, latent_dim, image_shape):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 16), nn.ReLU())
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 2 * latent_dim)

    def forward(self, x_BCHW):
        return self.head(self.norm(self.body(x_BCHW))).chunk(2, dim=1)

def build(latent_dim, image_shape):
    decoder = nn.Sequential(nn.Linear(latent_dim, math.prod(image_shape)),
                            nn.Unflatten(1, image_shape))
    return Encoder(latent_dim, image_shape), decoder
"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("network", FAMILIES)
def test_any_image_goes_in_and_comes_out_at_its_own_size(network, size):
    image_size, channels, widths = SIZES[size]
    model = initialized_vae(
        3, image_size, channels, 0, widths=widths, network=network, pseudo_inputs=2
    )
    x_BCHW = torch.rand(2, channels, *image_size)
    logits_BCHW, mu_BZ, logvar_BZ, _ = model(x_BCHW, torch.randn(2, 3))
    assert logits_BCHW.shape == x_BCHW.shape == model.reconstruct(x_BCHW).shape
    assert mu_BZ.shape == logvar_BZ.shape == (2, 3)
    assert model.vamp.images_KCHW.shape == (2, *model.image_shape)
    sum(forward_pass(model, x_BCHW, torch.randn(2, 3)).nats).sum().backward()
    # at 1x1 a normalisation of a single pixel and channel would be no function of it any more
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.sample(3, torch.Generator()).shape == (3, channels, *image_size)


@pytest.mark.parametrize("network", FAMILIES)
def test_every_parameter_has_an_effect_on_the_loss(network):
    model = initialized_vae(3, (12, 10), 3, 0, widths=(8, 16), network=network)
    stream = torch.Generator().manual_seed(0)
    x_BCHW = torch.rand(8, 3, 12, 10, generator=stream)
    sum(nats_per_image(model, x_BCHW, torch.randn(8, 3, generator=stream))).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("widths", "sides", "expected"),
    [
        ("auto", (28, 28), (32, 64)),
        ("auto", (8, 100), (32,)),
        ("auto", (1, 1), (32,)),
        ("auto", (33, 50), (32, 64, 128)),
        ("auto", (512, 256), (32, 64, 128, 256, 256)),
        ([7, 7], (28, 28), (7, 7)),
    ],
)
def test_auto_halves_until_the_shorter_side_is_at_most_8(widths, sides, expected):
    assert stage_widths(widths, (1, *sides)) == expected


def test_the_padding_is_zeros_on_both_sides_and_no_part_of_the_loss():
    model = initialized_vae(2, (5, 10), 1, 0, widths=(4, 8)).double()
    assert model.padding == (1, 1, 1, 2)  # left, right, top, bottom: 8x12
    x_BCHW = torch.rand(3, 1, 5, 10, dtype=torch.float64)
    padded = torch.zeros(3, 1, 8, 12, dtype=torch.float64)
    padded[:, :, 1:6, 1:11] = x_BCHW
    for found, expected in zip(model.encode(x_BCHW), model.encoder(padded), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    z_BZ = torch.randn(3, 2, dtype=torch.float64)
    whole = model.decoder(z_BZ).requires_grad_()
    assert whole.shape == (3, 1, 8, 12)
    torch.testing.assert_close(model.decode(z_BZ), whole[:, :, 1:6, 1:11], rtol=0, atol=1e-12)
    # a logit of the padding that is wrong costs nothing
    whole = whole.detach().requires_grad_()
    model.decoder.forward = lambda _: whole
    nats_per_image(model, x_BCHW, torch.zeros(3, 2, dtype=torch.float64)).recon_B.sum().backward()
    assert (whole.grad[:, :, 1:6, 1:11] != 0).all()
    whole.grad[:, :, 1:6, 1:11] = 0
    assert (whole.grad == 0).all()


def test_nothing_is_padded_or_copied_where_the_stages_fit():
    model = VAE()
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.decoder.register_forward_hook(lambda *given: seen.append(given[2]))
    x_BCHW = torch.rand(2, 1, 28, 28)
    logits_BCHW = model.decode(model.encode(x_BCHW)[0])
    assert seen[0] is x_BCHW
    assert seen[1] is logits_BCHW


def test_every_stage_of_any_widths_is_a_fast_layer(monkeypatch):
    model = initialized_vae(4, (21, 50), 3, 0, widths=(6, 7, 8, 9))

    def fail(*_):
        raise AssertionError("torch.nn's own layer was called")

    for kind in (Conv2d, ConvTranspose2d):
        monkeypatch.setattr(kind.__base__, "forward", fail)
    model(torch.rand(2, 3, 21, 50), torch.randn(2, 4))


def test_three_stages_keep_the_names_and_add_numbers():
    names = list(VAE(widths=(8, 16, 24)).state_dict())
    expected = [
        f"{part}.{layer}.{kind}"
        for part, layers in (
            ("encoder", ("conv1", "conv2", "conv3", "fc_mu", "fc_logvar")),
            ("decoder", ("fc", "conv_t1", "conv_t2", "conv_t3")),
        )
        for layer in layers
        for kind in ("weight", "bias")
    ]
    assert names == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": ()}, "one or more"),
        ({"widths": (32, 0)}, "one or more"),
        ({"widths": (8,) * 9}, "too small"),
        ({"network": "resnet"}, "must be conv, res"),
    ],
)
def test_impossible_stages_and_networks_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        VAE(**settings)


def test_the_settings_are_options_and_old_ones_load():
    config = TrainConfig.from_dict({"widths": [32, 64, 128], "network": "residual"})
    assert config.widths == (32, 64, 128)
    words = changed_options(config.to_dict(), TrainConfig().to_dict())
    assert words == ["--network", "residual", "--widths", "32", "64", "128"]
    words = changed_options(TrainConfig(widths="auto").to_dict(), TrainConfig().to_dict())
    assert words == ["--widths", "auto"]
    assert TrainConfig.from_dict({}).widths == (32, 64)
    for wrong in ("wide", (), (0,), (1.5,), 32, None):
        with pytest.raises(ConfigError, match="widths"):
            TrainConfig(widths=wrong)
    for wrong in ("resnet", "a:", ":b", "a-b:c", "a:b:c", "a.:b", ""):
        with pytest.raises(ConfigError, match="--network is"):
            TrainConfig(network=wrong)
    with pytest.raises(ConfigError, match="remove --widths"):
        TrainConfig(network="a.b:c", widths=(3,))


@pytest.mark.parametrize("network", FAMILIES)
def test_equal_seeds_give_equal_weights(network):
    torch.manual_seed(0)
    first = initialized_vae(3, (6, 9), 3, 7, network=network).state_dict()
    torch.manual_seed(1)
    again, other = (
        initialized_vae(3, (6, 9), 3, seed, network=network).state_dict() for seed in (7, 8)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_what_the_residual_network_says_of_an_image_does_not_depend_on_its_batch():
    model = initialized_vae(3, 12, 3, 0, network="residual").double()
    x_BCHW = torch.rand(8, 3, 12, 12, dtype=torch.float64)
    alone = model.encode(x_BCHW[:1])
    for found, expected in zip(alone, model.encode(x_BCHW), strict=True):
        torch.testing.assert_close(found, expected[:1], rtol=0, atol=1e-12)
    z_BZ = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(model.decode(z_BZ[:1]), model.decode(z_BZ)[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 64, 128, 128)])
def test_residual_activations_keep_their_size_at_first(widths):
    """A branch adds 1/sqrt(N) of itself, so N of them do not blow an image up."""
    model = initialized_vae(8, 32, 1, 0, widths=widths, network="residual")
    z_BZ = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert 0.01 < model.decode(z_BZ).std() < 1  # of logits, where sigmoids still have gradients


@pytest.mark.parametrize("network", [*FAMILIES, "own"])
def test_a_network_learns_one_small_batch_by_heart(network, own):
    network = (
        own(MLP.replace("nn.BatchNorm1d(16)", "nn.Identity()")) if network == "own" else network
    )
    model = (
        initialized_vae(4, (9, 6), 1, 0, widths=(8, 8), network=network)
        if (network in FAMILIES)
        else initialized_vae(4, (9, 6), 1, 0, network=network)
    )
    stream = torch.Generator().manual_seed(0)
    x_BCHW = (torch.rand(6, 1, 9, 6, generator=stream) > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(300):
        recon_B = nats_per_image(model, x_BCHW, torch.zeros(6, 4)).recon_B
        optimizer.zero_grad()
        recon_B.mean().backward()
        optimizer.step()
        losses.append(recon_B.mean().item())
    assert losses[0] == pytest.approx(54 * math.log(2), rel=0.1)  # of 54 pixels, all unknown
    assert losses[-1] < 0.05 * losses[0]


# ---- The user's own


def test_the_user_s_weights_follow_from_the_seed_and_spare_the_global_generator(own):
    name = own(MLP)
    before = torch.get_rng_state()
    first, again, other = (
        initialized_vae(3, (4, 5), 1, seed, network=name, pseudo_inputs=2).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    differing = [key for key in first if not torch.equal(first[key], other[key])]
    assert {"encoder.body.1.weight", "decoder.0.bias", "vamp.logits_KCHW"} <= set(differing)
    assert (first["encoder.norm.running_var"] == 1).all()  # the check was none of its batches
    model = initialized_vae(3, (4, 5), 1, 1, network=name)
    assert model.encoder.training


def test_a_network_that_nobody_has_allowed_is_not_imported(own, tmp_path, monkeypatch):
    name = own(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n" + MLP)
    monkeypatch.setattr(networks, "_allowed", {})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetworkError, match=f"add --network {name} to the command"):
        VAE(network=name)
    assert not (tmp_path / "ran").exists()
    path = list(sys.path)
    allow_network(name, str(tmp_path))
    assert VAE(network=name).network == name
    assert (tmp_path / "ran").exists()
    assert sys.path == path


BODY = "from torch import nn\nimport torch\n"
ZERO = BODY + "class Give(nn.Module):\n    def forward(self, x): return {}\n"
WRONG = {
    "no such function": ("x = 1", "has no function build"),
    "not callable": ("build = 5", "has no function build"),
    "an error": ("def build(z, s):\n    return 1 / 0", r"line 2: ZeroDivisionError: division"),
    "a broken import": ("import no_such_module", "ModuleNotFoundError: No module named"),
    "a syntax error": ("def", "SyntaxError"),
    "one module": (BODY + "def build(z, s): return nn.Linear(1, 1)", r"Linear, not \(encoder, dec"),
    "functions": ("def build(z, s): return abs, abs", "as the encoder, not a torch.nn.Module"),
    "one result": (
        ZERO.format("x") + "def build(z, s): return Give(), Give()",
        r"returned a tensor of shape \(2, 1, 28, 28\) for images",
    ),
    "mu of another shape": (
        ZERO.format("(x, x)") + "def build(z, s): return Give(), Give()",
        r"mu of the encoder .* must be a tensor of shape \(2, 32\) .* found a tensor of shape "
        r"\(2, 1, 28, 28\)",
    ),
    "logits of another shape": (
        MLP.replace("nn.Unflatten(1, image_shape)", "nn.Identity()"),
        r"logits of the decoder .* must be a tensor of shape \(2, 1, 28, 28\) .* found a tensor of "
        r"shape \(2, 784\)",
    ),
    "doubles": (
        MLP.replace("chunk(2, dim=1)", "double().chunk(2, dim=1)"),
        "must be torch.float32",
    ),
    "layers that do not fit": (MLP.replace("Linear(16,", "Linear(17,"), "RuntimeError: mat1 and"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_network_that_does_not_fit_is_one_sentence(mistake, own):
    source, said = WRONG[mistake]
    with pytest.raises(NetworkError, match=said) as caught:
        initialized_vae(32, 28, 1, 0, network=own(source))
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_one_sentence(own, tmp_path):
    own(MLP)
    allow_network("no_such_module.x:build", str(tmp_path))
    with pytest.raises(NetworkError, match=r"no module no_such_module.x in"):
        VAE(network="no_such_module.x:build")
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        allow_network("conv")


def test_tied_and_frozen_weights_of_the_user_s_stay_so_when_loaded(own):
    from vae_hyperband.model.checkpoint import _model

    name = own(
        MLP.replace(
            "    decoder = nn.Sequential(",
            "    first, second = (nn.Linear(latent_dim, latent_dim) for _ in range(2))\n"
            "    second.weight = first.weight\n"
            "    first.bias.requires_grad_(False)\n"
            "    decoder = nn.Sequential(first, second, ",
        )
    )
    settings = {"latent_dim": 3, "image_size": 4, "channels": 1, "network": name}
    first = initialized_vae(seed=3, **settings)
    loaded = _model(settings, first.state_dict(), "x")
    assert loaded.decoder[0].weight is loaded.decoder[1].weight
    assert not loaded.decoder[0].bias.requires_grad
    assert loaded.decoder[1].bias.requires_grad
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
