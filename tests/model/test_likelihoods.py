"""Each likelihood is a probability distribution, and the one that its name says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import ContinuousBernoulli

from vae_hyperband.model.likelihoods import LIKELIHOODS, pixel_means, reconstruction_nats

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


def test_the_series_near_zero_meets_the_formula():
    edge = torch.tensor([0.01 - 1e-5, 0.01 + 1e-5]).reshape(2, 1, 1, 1)
    nats = reconstruction_nats(edge, torch.full((2, 1, 1, 1), 0.3), "continuous-bernoulli")
    assert abs((nats[0] - nats[1]).item()) < 1e-5
    means = pixel_means(edge, "continuous-bernoulli")
    assert abs((means[0] - means[1]).item()) < 1e-4


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
