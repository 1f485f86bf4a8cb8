import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
)

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.bounds import entropy_floor, eval_dataloader, iwae_nats
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.likelihoods import reconstruction_nats
from vae_hyperband.model.objective import (
    Nats,
    Pass,
    forward_pass,
    kl_to_standard_normal,
    log_weights,
    nats_per_image,
    total_correlation,
    training_total,
)
from vae_hyperband.model.schedules import StepSettings, beta_at, settings_at
from vae_hyperband.model.vae import LOGVAR_LIMIT, VAE


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
        logits, mu, logvar, _ = torch.func.functional_call(model, named, (x, noise))
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
        logits, mu, logvar, _ = model(x, noise)
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


def weigh(beta, capacity=0.0):
    """The settings of a step with that weight of the KL."""
    return StepSettings(learning_rate=0.0, beta=beta, capacity=capacity)


def random_pass(num=300, dim=2, seed=0):
    stream = generator(seed, "test")
    mu, logvar = (torch.randn(num, dim, generator=stream).double() for _ in range(2))
    z = mu + (0.5 * logvar).exp() * torch.randn(num, dim, generator=stream)
    recon = 10 + torch.rand(num, generator=stream).double()
    return Pass(Nats(recon, kl_to_standard_normal(mu, logvar)), mu, logvar, z)


def test_the_beta_weighted_bound_is_the_default():
    passed = random_pass()
    expected = (passed.nats.recon_B + 4 * passed.nats.kl_B).mean()
    assert torch.equal(training_total(TrainConfig(), passed, weigh(4.0), 300), expected)


def test_free_bits_do_not_pay_for_what_is_free():
    """Dimension 0 costs 0.02 nats, below the 0.1 that are free; dimension 1 costs 2."""
    mu = torch.tensor([[0.2, 2.0], [0.2, -2.0]], requires_grad=True)
    logvar = torch.zeros(2, 2)
    nats = Nats(torch.tensor([5.0, 7.0]), kl_to_standard_normal(mu, logvar))
    passed = Pass(nats, mu, logvar, mu)
    total = training_total(TrainConfig(objective="free-bits", free_bits=0.1), passed, weigh(3.0), 2)
    assert total.item() == pytest.approx(6 + 3 * (0.1 + 2.0))
    total.backward()
    assert mu.grad[:, 0].tolist() == [0, 0]
    assert mu.grad[:, 1].abs().min() > 0
    none_free = TrainConfig(objective="free-bits", free_bits=0.0)
    plain = training_total(TrainConfig(), passed, weigh(3.0), 2)
    assert training_total(none_free, passed, weigh(3.0), 2).item() == pytest.approx(plain.item())


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 4)])
def test_capacity_pulls_the_kl_to_a_rising_aim(share, allowed):
    passed = random_pass()
    config = TrainConfig(objective="capacity", capacity=4.0)
    kl = passed.nats.kl_B.mean().item()
    expected = passed.nats.recon_B.mean().item() + 10 * abs(kl - allowed)
    aim = settings_at(config, step=round(share * 1000), steps_per_epoch=100).capacity
    assert training_total(config, passed, weigh(10.0, aim), 300).item() == pytest.approx(expected)


def gaussian_pass(correlation, num, seed=0):
    """An aggregate posterior that is, on average over images, a correlated Gaussian."""
    noise, own = torch.randn(2, num, 2, generator=generator(seed, "test"), dtype=torch.float64)
    root = torch.linalg.cholesky(torch.tensor([[1, correlation], [correlation, 1]]).double())
    spread = 0.3
    mu = noise @ (root * math.sqrt(1 - spread**2)).T
    logvar = torch.full_like(mu, 2 * math.log(spread))
    kl = kl_to_standard_normal(mu, logvar)
    return Pass(Nats(kl, kl), mu, logvar, mu + spread * own)


def test_total_correlation_of_a_gaussian_is_the_closed_form():
    """-1/2 log det of its correlation matrix; the posteriors' own spread weakens it."""
    for correlation in (0.0, 0.9):
        found = total_correlation(gaussian_pass(correlation, 3000), 3000).item()
        rho = correlation * (1 - 0.3**2)
        assert found == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.06)


def test_total_correlation_of_batches_estimates_that_of_the_whole():
    whole = gaussian_pass(0.9, 2000)
    expected = total_correlation(whole, 2000).item()
    batches = [
        Pass(whole.nats, whole.mu_BZ[part], whole.logvar_BZ[part], whole.z_BZ[part])
        for part in torch.arange(2000).split(250)
    ]
    mean = sum(total_correlation(batch, 2000).item() for batch in batches) / len(batches)
    assert mean == pytest.approx(expected, abs=0.15)


def test_beta_tc_weighs_the_total_correlation_alone():
    passed = random_pass()
    config = TrainConfig(objective="beta-tc", beta=3.0)
    bound = sum(part.mean() for part in passed.nats)
    assert training_total(config, passed, weigh(1.0), 1000).item() == pytest.approx(bound.item())
    more = training_total(config, passed, weigh(3.0), 1000)
    expected = bound + 2 * total_correlation(passed, 1000)
    assert more.item() == pytest.approx(expected.item())
    single = Pass(*(x[:1] if isinstance(x, torch.Tensor) else x for x in passed))
    assert total_correlation(single, 1000).isfinite()  # a last batch of one image


def test_cycles_rise_and_rest():
    weights = [beta_at(step, 2.0, 0, num_steps=80, cycles=2) for step in range(80)]
    assert weights[:40] == pytest.approx(weights[40:])
    assert weights[0] == 0
    assert weights[10] == pytest.approx(1.0)
    assert weights[20:40] == [2.0] * 20
    assert weights[40] == 0
    assert beta_at(5, 2.0, 0) == 2.0


def test_the_vamp_prior_is_the_mixture_of_its_posteriors():
    model = initialized_vae(3, 8, 1, seed=2, pseudo_inputs=5).double()
    z = torch.randn(40, 3, generator=generator(0, "test")).double()
    mu, logvar = model.encode(model.vamp.images_KCHW)
    mixture = MixtureSameFamily(
        Categorical(torch.ones(5).double()), Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    )
    torch.testing.assert_close(model.log_prior(z), mixture.log_prob(z))
    drawn = model.float().sample_prior(40_000, generator(1, "test"))
    torch.testing.assert_close(drawn.mean(dim=0), mixture.mean.float(), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0), mixture.variance.float(), atol=0.05, rtol=0)


def test_the_kl_to_a_vamp_prior_is_right_on_average():
    model = initialized_vae(3, 8, 1, seed=2, pseudo_inputs=5).double()
    with torch.no_grad():
        model.encoder.fc_mu.weight.mul_(30)
    x = torch.rand(1, 1, 8, 8, generator=generator(0, "test")).double()
    noise = torch.randn(100_000, 3, generator=generator(1, "test")).double()
    with torch.no_grad():
        sampled = forward_pass(model, x.expand(len(noise), 1, 8, 8), noise).nats.kl_B
        mu, logvar = model.encode(x)
        other_noise = torch.randn(100_000, 3, generator=generator(2, "test")).double()
        z = mu + (0.5 * logvar).exp() * other_noise
        q = Normal(mu, (0.5 * logvar).exp())
        by_hand = (q.log_prob(z).sum(dim=1) - model.log_prior(z)).mean()
    assert sampled.mean().item() == pytest.approx(by_hand.item(), abs=0.02)


@pytest.mark.parametrize("pseudo_inputs", [0, 4])
def test_importance_weights_are_ratios_of_densities(pseudo_inputs, small_data):
    """p(x|z) p(z) / q(z|x) with torch's own distributions, and the bound of six of them."""
    model = initialized_vae(4, 8, 1, seed=2, pseudo_inputs=pseudo_inputs)
    split = load_split("validation", small_data, "custom")
    x = split.pixels(slice(None))
    noise = torch.stack(
        [torch.randn(60, 4, generator=generator(3, "iwae", sample)) for sample in range(6)]
    )
    with torch.no_grad():
        mu, logvar = model.encode(x)
        found, passed = log_weights(model, x, mu, logvar, noise)
        q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
        p = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
        if pseudo_inputs:
            mu_K, logvar_K = model.encode(model.vamp.images_KCHW)
            parts = Independent(Normal(mu_K, (0.5 * logvar_K).exp()), 1)
            p = MixtureSameFamily(Categorical(torch.ones(pseudo_inputs)), parts)
        for sample in range(6):
            z = mu + (0.5 * logvar).exp() * noise[sample]
            pixels = Bernoulli(logits=model.decode(z), validate_args=False)
            likelihood = pixels.log_prob(x).flatten(1).sum(dim=1)
            by_hand = likelihood + p.log_prob(z) - q.log_prob(z)
            torch.testing.assert_close(found[sample], by_hand, atol=2e-4, rtol=0)
    bound = math.log(6) - found.double().logsumexp(dim=0)
    torch.testing.assert_close(bound, iwae_nats(model, eval_dataloader(split), 3, 6))
    assert passed.nats.kl_B.shape == (60,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kl_cycles": 2, "kl_warmup_epochs": 1}, "give only one"),
        ({"objective": "beta-tc", "beta": 4, "prior": "vamp"}, "so needs --prior normal"),
        ({"objective": "free-bits", "prior": "vamp"}, "so needs --prior normal"),
        ({"objective": "iwae", "beta": 2}, "has no KL term to weigh"),
        ({"objective": "iwae", "kl_cycles": 2}, "has no KL term to weigh"),
        ({"objective": "wae"}, "must be one of"),
        ({"free_bits": -1}, "--free-bits is -1"),
        ({"capacity": -1}, "--capacity is -1"),
        ({"train_samples": 0}, "--train-samples is 0"),
        ({"pseudo_inputs": 0}, "--pseudo-inputs is 0"),
        ({"kl_cycles": -1}, "--kl-cycles is -1"),
    ],
)
def test_objectives_without_sense_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(**changes)


def test_total_correlation_weighs_the_own_image_and_the_others_as_the_data_set_does():
    """By hand: 1/N for the image that z came from, the rest of the batch for the other N - 1."""
    passed, num_images = random_pass(num=3), 100
    z, mu, std = passed.z_BZ, passed.mu_BZ, (0.5 * passed.logvar_BZ).exp()
    total = 0.0
    for i in range(3):
        share = [1 / num_images if j == i else 99 / (num_images * 2) for j in range(3)]
        density = [Normal(mu[j], std[j]).log_prob(z[i]).exp() for j in range(3)]  # per dimension
        joint = sum(share[j] * density[j].prod() for j in range(3))
        marginals = sum(share[j] * density[j] for j in range(3))
        total += (joint.log() - marginals.log().sum()).item() / 3
    assert total_correlation(passed, num_images).item() == pytest.approx(total, rel=1e-9)
