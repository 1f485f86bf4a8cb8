"""Each likelihood is a probability distribution, and the one that its name says."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import ContinuousBernoulli, Laplace, Normal

from vae_hyperband.model.likelihoods import (
    FIRST_LOG_SCALE,
    LEARNED_SCALE,
    LEAST_SCALE,
    LIKELIHOODS,
    learned_log_scale,
    pixel_means,
    reconstruction_nats,
)

LOGITS = [-30.0, -3.0, -0.02, -0.005, 0.0, 1e-6, 0.009, 0.5, 4.0, 30.0]


def one_pixel(x):
    return torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("logit", LOGITS[1:-1])  # torch clamps probabilities near 0 and 1
def test_the_continuous_bernoulli_is_torch_s(logit):
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    theirs = ContinuousBernoulli(
        logits=torch.tensor(logit, dtype=torch.float64), validate_args=False
    )
    ours = -reconstruction_nats(
        torch.full((11, 1, 1, 1), logit).double(), one_pixel(x), "continuous-bernoulli"
    )
    # torch uses its own series near 0, good to about 1e-6
    torch.testing.assert_close(ours, theirs.log_prob(x), rtol=1e-5, atol=1e-5)
    mean = pixel_means(one_pixel([logit]), "continuous-bernoulli")
    assert mean.item() == pytest.approx(theirs.mean.item(), abs=1e-5)


@pytest.mark.parametrize("logit", LOGITS)
def test_the_continuous_bernoulli_integrates_to_one(logit):
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = torch.exp(
        -reconstruction_nats(
            one_pixel([logit]).expand(len(x), 1, 1, 1), one_pixel(x), "continuous-bernoulli"
        )
    )
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-4)
    mean = torch.trapezoid(x * density, x).item()
    found = pixel_means(one_pixel([logit]), "continuous-bernoulli").item()
    assert found == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("log_scale", [-6.0, -3.0, -1.0, 0.5])
@pytest.mark.parametrize("logit", [-8.0, -1.0, 0.0, 2.5])
def test_the_discretised_logistic_is_a_distribution_over_256_levels(logit, log_scale):
    levels = torch.arange(256, dtype=torch.float64) / 255
    scale = torch.tensor(log_scale, dtype=torch.float64)
    logits = one_pixel([logit]).expand(256, 1, 1, 1)
    mass = torch.exp(-reconstruction_nats(logits, one_pixel(levels), "discretized-logistic", scale))
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    mean = 1 / (1 + math.exp(-logit))
    for level in (1, 77, 254):

        def below(edge):
            return 1 / (1 + math.exp(-(edge - mean) / math.exp(log_scale)))

        by_hand = below((level + 0.5) / 255) - below((level - 0.5) / 255)
        assert mass[level].item() == pytest.approx(by_hand, rel=1e-6, abs=1e-13)


#: torch's own distribution around the means with the scale, which are float64 tensors.
ORACLES = {"gaussian": Normal, "learned-gaussian": Normal, "laplace": Laplace}


@pytest.mark.parametrize("log_scale", [-6.0, FIRST_LOG_SCALE, 0.5])
@pytest.mark.parametrize("likelihood", ORACLES)
def test_densities_have_the_values_and_gradients_of_torch_s(likelihood, log_scale):
    torch.manual_seed(0)
    logits = (4 * torch.randn(5, 3, 4, 4).double()).requires_grad_()
    x = torch.rand(5, 3, 4, 4).double().requires_grad_()
    learned = torch.tensor(log_scale).double().requires_grad_()
    if likelihood == "gaussian":
        scale = torch.tensor(math.exp(log_scale), dtype=torch.float64)
        found = reconstruction_nats(logits, x, likelihood, sigma=math.exp(log_scale))
    else:
        scale = learned.exp() + LEAST_SCALE
        found = reconstruction_nats(logits, x, likelihood, learned)
    theirs = ORACLES[likelihood](logits.sigmoid(), scale).log_prob(x)
    expected = -theirs.sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(pixel_means(logits, likelihood), logits.sigmoid())
    weight_B = torch.linspace(-1, 2, 5).double()
    inputs = [logits, x] if likelihood == "gaussian" else [logits, x, learned]
    for gradient, its in zip(
        torch.autograd.grad((found * weight_B).sum(), inputs),
        torch.autograd.grad((expected * weight_B).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, its, rtol=1e-9, atol=1e-9)


def test_the_discretised_logistic_has_the_scale_of_its_channel():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4).double()
    x = torch.randint(0, 256, (2, 3, 4, 4)) / 255.0
    scales = torch.tensor([-4.0, -2.0, 0.0]).double().reshape(3, 1, 1).requires_grad_()
    found = reconstruction_nats(logits, x.double(), "discretized-logistic", scales)
    channels = zip(logits.split(1, dim=1), x.double().split(1, dim=1), scales, strict=True)
    alone = [reconstruction_nats(*two, "discretized-logistic", scale) for *two, scale in channels]
    torch.testing.assert_close(found, sum(alone), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), scales)
    for channel, nats in enumerate(alone):  # no channel's scale depends on another channel
        (own,) = torch.autograd.grad(nats.sum(), scales, retain_graph=True)
        torch.testing.assert_close(gradient[channel], own[channel], rtol=1e-12, atol=0)


def test_grey_images_have_one_scale_and_only_the_logistic_one_per_channel():
    for likelihood in LIKELIHOODS:
        grey, colour = (learned_log_scale(likelihood, channels) for channels in (1, 3))
        if likelihood not in LEARNED_SCALE:
            assert grey is None
            assert colour is None
            continue
        assert grey.shape == ()
        several = likelihood == "discretized-logistic"
        assert colour.shape == ((3, 1, 1) if several else ())
        assert (colour == FIRST_LOG_SCALE).all()


def test_the_best_learned_sigma_is_the_root_of_the_mean_squared_error():
    """The analytic optimum of Rybkin et al. 2021, over all images; of Laplace: the mean error."""
    torch.manual_seed(0)
    logits, x = torch.randn(8, 3, 4, 4).double(), torch.rand(8, 3, 4, 4).double()
    error = x - logits.sigmoid()
    best = {"learned-gaussian": error.square().mean().sqrt(), "laplace": error.abs().mean()}
    for likelihood, scale in best.items():
        log_scale = (scale - LEAST_SCALE).log().requires_grad_()
        nats = reconstruction_nats(logits, x, likelihood, log_scale).sum()
        (slope,) = torch.autograd.grad(nats, log_scale)
        assert abs(slope.item()) < 1e-9 * nats.abs().item()
        for other in (log_scale - 0.1, log_scale + 0.1):
            assert reconstruction_nats(logits, x, likelihood, other).sum() > nats


@pytest.mark.parametrize("likelihood", ["learned-gaussian", "laplace"])
@pytest.mark.parametrize("log_scale", [-1e4, -100.0, 40.0])
def test_no_learned_scale_of_a_density_makes_nats_or_gradients_infinite(likelihood, log_scale):
    """-100 is where images that are reproduced exactly drive it; exp(-1e4) is 0."""
    logits = torch.tensor([-1e6, 0.0, 1e6]).reshape(3, 1, 1, 1).requires_grad_()
    x = torch.tensor([0.0, 0.5, 0.0]).reshape(3, 1, 1, 1)  # right, right, and as wrong as can be
    learned = torch.tensor(log_scale, requires_grad=True)
    nats = reconstruction_nats(logits, x, likelihood, learned)
    nats.sum().backward()
    for value in (nats, logits.grad, learned.grad):
        assert value.isfinite().all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("size", [0.0, 5e-3, 1e-2, 1.0, 1e3, 1e6])
def test_values_and_gradients_are_finite(likelihood, size):
    for sign in (-1, 1):
        logits = torch.full((3, 1, 1, 1), sign * size, requires_grad=True)
        log_scale = torch.tensor(-3.0, requires_grad=True)
        x = torch.tensor([0.0, 0.4, 1.0]).reshape(3, 1, 1, 1)
        nats = reconstruction_nats(logits, x, likelihood, log_scale)
        pixels = pixel_means(logits, likelihood)
        (nats.sum() + pixels.sum()).backward()
        assert nats.isfinite().all()
        assert logits.grad.isfinite().all()
        assert log_scale.grad is None or log_scale.grad.isfinite()
        assert ((pixels >= 0) & (pixels <= 1)).all()


def logits_everywhere():
    """float32, both signs: tiny, huge, and close to 0.01 and 1, where formulas have changed."""
    sizes = [torch.logspace(-20, 6, 200), torch.linspace(0.005, 0.02, 150)]
    sizes += [torch.linspace(0.9, 1.1, 201), torch.linspace(0.1, 90, 300)]
    size = torch.cat(sizes)
    return torch.cat((-size, torch.zeros(1), size))


def exact_mean(logit):
    """Of the continuous Bernoulli, with 60 digits: 1 / (1 - exp(-l)) - 1 / l."""
    with mpmath.workdps(60):
        logit = mpmath.mpf(logit)
        return float(1 / (1 - mpmath.exp(-logit)) - 1 / logit if logit else 0.5)


def exact_log_partition(logit):
    """log((exp(l) - 1) / l), with 60 digits: log p(x) is l x less this."""
    with mpmath.workdps(60):
        logit = mpmath.mpf(logit)
        more = max(logit, 0)  # exp(l) of a large logit has no use of 60 digits
        return more + mpmath.log(abs((1 - mpmath.exp(-abs(logit))) / logit) if logit else 1)


def test_the_continuous_bernoulli_s_mean_is_exact_for_every_logit():
    logits = logits_everywhere()
    expected = torch.tensor([exact_mean(logit) for logit in logits.tolist()]).double()
    found = pixel_means(logits, "continuous-bernoulli").double()
    assert ((found - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("x", [0.0, 0.25, 0.7, 1.0])
def test_the_continuous_bernoulli_s_nats_and_gradients_are_exact_for_every_logit(x):
    """The gradient of -log p(x) is the mean less x."""
    logits = logits_everywhere().requires_grad_()
    pixels = torch.full((len(logits), 1, 1, 1), x)
    nats = reconstruction_nats(logits.reshape(-1, 1, 1, 1), pixels, "continuous-bernoulli")
    nats.sum().backward()
    values, x = logits.tolist(), pixels[0].item()
    with mpmath.workdps(60):
        expected = [float(exact_log_partition(value) - mpmath.mpf(value) * x) for value in values]
    expected = torch.tensor(expected).double()
    assert ((nats.detach().double() - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-6
    slopes = torch.tensor([exact_mean(logit) for logit in values]).double() - x
    assert (logits.grad.double() - slopes).abs().max() < 1e-6


def test_the_continuous_bernoulli_s_gradients_are_those_of_its_values():
    logits = torch.tensor([-40, -1.5, -0.9, -1e-3, 0, 0.4, 1.2, 30]).double().reshape(8, 1, 1, 1)
    x = torch.linspace(0.1, 0.9, 8).double().reshape(8, 1, 1, 1)

    def nats(logits, x):
        return reconstruction_nats(logits, x, "continuous-bernoulli")

    assert torch.autograd.gradcheck(nats, (logits.requires_grad_(), x.requires_grad_()))
    logits, x = logits.detach().float().requires_grad_(), x.detach().float()
    compiled = torch.compile(nats, backend="aot_eager")(logits, x)
    (gradient,) = torch.autograd.grad(compiled.sum(), logits)
    assert torch.equal(compiled, nats(logits, x))
    (written,) = torch.autograd.grad(nats(logits, x).sum(), logits)
    torch.testing.assert_close(gradient, written, rtol=1e-6, atol=1e-6)


def test_the_cross_entropy_has_the_gradients_of_pytorch_s_own():
    torch.manual_seed(0)
    logits, x = torch.randn(3, 1, 4, 4).double(), torch.rand(3, 1, 4, 4).double()
    inputs, weight_B = (logits.requires_grad_(), x.requires_grad_()), torch.tensor([1.0, -2, 3])
    own = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=(1, 2, 3))
    found = reconstruction_nats(logits, x)
    assert torch.equal(found, own)
    for gradient, expected in zip(
        torch.autograd.grad((found * weight_B).sum(), inputs),
        torch.autograd.grad((own * weight_B).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


def test_the_continuous_bernoulli_has_second_derivatives():
    """As a gradient penalty needs them: A'' is the variance, and is not lost without a word."""
    logits = torch.linspace(-6, 6, 16, dtype=torch.float64)
    x = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def nats(logits):
        shape = (1, 1, 4, 4)
        return reconstruction_nats(logits.view(shape), x.view(shape), "continuous-bernoulli").sum()

    hessian = torch.autograd.functional.hessian(nats, logits)
    variance = ContinuousBernoulli(logits=logits).variance
    assert torch.allclose(hessian.diag(), variance, rtol=0, atol=1e-4)  # torch's own is coarser
    assert torch.equal(hessian, hessian.diag().diag())
    per_logit = torch.func.vmap(torch.func.grad(nats))(logits.expand(2, 16))
    assert per_logit.shape == (2, 16)
