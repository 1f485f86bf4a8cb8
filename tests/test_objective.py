import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, kl_divergence

from vae_hyperband.model import LOGVAR_LIMIT, VAE
from vae_hyperband.objective import (
    beta_at,
    entropy_floor,
    kl_to_standard_normal,
    nats_per_image,
    reconstruction_nats,
)
from vae_hyperband.randomness import generator


@pytest.fixture
def gaussian():
    stream = generator(0, "test")
    mu = torch.randn(5, 8, generator=stream, dtype=torch.float64)
    logvar = torch.randn(5, 8, generator=stream, dtype=torch.float64)
    return mu, logvar


def test_kl_equals_torch_distributions(gaussian):
    mu, logvar = gaussian
    q, p = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), kl_divergence(q, p).sum(dim=1))


def test_kl_equals_monte_carlo(gaussian):
    mu, logvar = gaussian
    noise = torch.randn(200_000, 5, 8, generator=generator(1, "test"), dtype=torch.float64)
    z = mu + (logvar / 2).exp() * noise
    log_q = Normal(mu, (logvar / 2).exp()).log_prob(z)
    log_p = Normal(torch.zeros_like(mu), torch.ones_like(mu)).log_prob(z)
    samples = (log_q - log_p).sum(dim=2)
    standard_error = samples.std(dim=0) / math.sqrt(len(samples))
    difference = (samples.mean(dim=0) - kl_to_standard_normal(mu, logvar)).abs()
    assert (difference < 5 * standard_error).all()


def test_kl_is_zero_only_for_the_prior():
    assert kl_to_standard_normal(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0
    assert kl_to_standard_normal(torch.tensor([[0.5]]), torch.zeros(1, 1)).item() == 0.125


def test_reconstruction_equals_torch_distributions_and_is_a_sum_over_pixels():
    stream = generator(0, "test")
    logits = torch.randn(3, 1, 28, 28, generator=stream)
    x = (torch.rand(3, 1, 28, 28, generator=stream) > 0.5).float()
    expected = -Bernoulli(logits=logits).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(reconstruction_nats(logits, x), expected)
    # 784 pixels of which nothing is known cost log 2 each
    unknown = reconstruction_nats(torch.zeros(1, 1, 28, 28), torch.rand(1, 1, 28, 28))
    assert unknown.item() == pytest.approx(784 * math.log(2), rel=1e-6)


@given(
    mu=st.floats(-1e6, 1e6, width=32),
    logvar=st.floats(-LOGVAR_LIMIT, LOGVAR_LIMIT, width=32),
    logit=st.floats(-1e6, 1e6, width=32),
    pixel=st.floats(0, 1, width=32),
)
def test_values_and_gradients_are_finite_at_the_extremes(mu, logvar, logit, pixel):
    inputs = [torch.tensor([[v]], requires_grad=True) for v in (mu, logvar)]
    logits = torch.full((1, 1, 1, 1), logit, requires_grad=True)
    total = kl_to_standard_normal(*inputs) + reconstruction_nats(
        logits, torch.full((1, 1, 1, 1), pixel)
    )
    total.sum().backward()
    for value in (total, *(t.grad for t in (*inputs, logits))):
        assert torch.isfinite(value).all()


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    model = VAE(latent_dim=2, image_size=4).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(2, 2, dtype=torch.float64)

    def bound(*parameters):
        named = dict(zip(names, parameters, strict=True))
        logits, mu, logvar = torch.func.functional_call(model, named, (x, noise))
        return (reconstruction_nats(logits, x) + kl_to_standard_normal(mu, logvar)).mean()

    names = [name for name, _ in model.named_parameters() if "fc" in name or "conv_t2" in name]
    parameters = [model.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(bound, parameters, fast_mode=True)


def test_the_bound_is_not_below_the_iwae_bound_of_the_same_model():
    # Burda et al. 2016: log p(x) >= IWAE(k) >= ELBO, so the bound in nats can only shrink with k
    torch.manual_seed(0)
    model = VAE(latent_dim=3, image_size=8).double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    weights = []
    for k in range(500):
        noise = torch.randn(4, 3, generator=generator(0, "iwae", k), dtype=torch.float64)
        logits, mu, logvar = model(x, noise)
        z = mu + (logvar / 2).exp() * noise
        log_q = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(dim=1)
        log_p = Normal(torch.zeros_like(mu), torch.ones_like(mu)).log_prob(z).sum(dim=1)
        weights.append(-reconstruction_nats(logits, x) + log_p - log_q)
    iwae = -(torch.stack(weights).logsumexp(dim=0) - math.log(500))
    noise = torch.randn(500 * 4, 3, generator=generator(1, "elbo"), dtype=torch.float64)
    nats = nats_per_image(model, x.repeat(500, 1, 1, 1), noise)
    bound = (nats.recon_B + nats.kl_B).view(500, 4).mean(dim=0)
    assert (bound >= iwae).all()


@pytest.mark.parametrize(
    ("step", "warmup", "expected"), [(0, 10, 0), (5, 10, 2), (10, 10, 4), (99, 10, 4), (0, 0, 4)]
)
def test_kl_warmup_is_linear_up_to_beta(step, warmup, expected):
    assert beta_at(step, beta=4, warmup_steps=warmup) == expected


def test_no_reconstruction_is_below_the_entropy_floor():
    x = torch.rand(6, 1, 8, 8, generator=generator(0, "test"))
    perfect = reconstruction_nats(torch.logit(x.double()), x.double()).mean().item()
    assert perfect == pytest.approx(entropy_floor(x), rel=1e-9)
    noise = torch.randn(6, 1, 8, 8, generator=generator(1, "test"), dtype=torch.float64)
    worse = reconstruction_nats(torch.logit(x.double()) + 0.1 * noise, x.double()).mean().item()
    assert worse > entropy_floor(x)
    assert entropy_floor(torch.zeros(2, 1, 4, 4)) == 0
