"""The IWAE bound against cases that are known exactly. The plain bound is in test_training.py."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch.distributions import Laplace, Normal

from vae_hyperband.common.process import keep_freed_memory
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation.bounds import (
    bits_are_of,
    bits_per_dimension,
    eval_dataloader,
    eval_epoch,
    iwae_nats,
    split_nats,
)
from vae_hyperband.evaluation.results import Estimate
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.likelihoods import LEAST_SCALE, LIKELIHOODS, reconstruction_nats


@pytest.fixture
def split(small_data):
    return load_split("validation", small_data, "custom")


@pytest.fixture
def model():
    return initialized_vae(latent_dim=3, image_size=8, channels=1, seed=1)


def ignore_z(model):
    with torch.no_grad():
        model.decoder.fc.weight.zero_()


def test_where_the_decoder_ignores_z_the_iwae_bound_tends_to_the_reconstruction(model, split):
    """log p(x) is then the reconstruction term, and E_q[p(z) / q(z|x)] is 1."""
    ignore_z(model)
    with torch.no_grad():
        model.encoder.fc_mu.bias += 0.5
    loader = eval_dataloader(split)
    nats = split_nats(model, loader, seed=0)
    assert nats.kl_B.mean() > 0.1
    gap = (iwae_nats(model, loader, 0, 300) - nats.recon_B).mean().item()
    assert abs(gap) < 0.1 * nats.kl_B.mean()


def test_where_the_posterior_is_the_prior_every_sample_weighs_the_same(model, split):
    ignore_z(model)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.zero_()  # mu = 0, log sigma^2 = 0
    loader = eval_dataloader(split)
    recon_N = split_nats(model, loader, seed=0).recon_B
    for num_samples in (1, 7):
        found = iwae_nats(model, loader, 0, num_samples)
        assert torch.allclose(found, recon_N, rtol=0, atol=1e-4)


def test_one_sample_is_the_bound_and_more_tighten_it(model, split):
    with torch.no_grad():
        model.decoder.fc.weight.mul_(8)  # so that it matters which z was drawn
    loader = eval_dataloader(split)
    # of one seed each bound has a standard deviation of 1.3: of 600 the two agree to 0.07
    seeds = range(600)
    bound = statistics.fmean(eval_epoch(model, loader, seed)["bound"] for seed in seeds)
    one, five, twenty = (
        statistics.fmean(
            iwae_nats(model, loader, seed, k).mean().item() for seed in seeds[: 600 // k]
        )
        for k in (1, 5, 20)
    )
    assert one == pytest.approx(bound, abs=0.2)
    assert one > five + 0.5 > twenty + 0.6


def test_the_iwae_bound_does_not_depend_on_the_batch_size(model, split):
    whole = iwae_nats(model, eval_dataloader(split), 3, 4)
    parts = iwae_nats(model, get_dataloader(split, 7, shuffle=False), 3, 4)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-4)
    assert whole.dtype == torch.float64
    assert eval_epoch(model, eval_dataloader(split), 3, iwae_samples=4)["iwae"] == pytest.approx(
        whole.mean().item()
    )
    assert "iwae" not in eval_epoch(model, eval_dataloader(split), 3)


@pytest.mark.parametrize("likelihood", ["gaussian", "learned-gaussian", "laplace"])
def test_bits_per_dimension_of_a_density_are_those_on_the_scale_of_the_levels(likelihood):
    """torch's own density of the pixels as levels from 0 to 255."""
    torch.manual_seed(0)
    logits, x = torch.randn(1, 3, 8, 4).double(), torch.rand(1, 3, 8, 4).double()
    log_scale = torch.tensor(-1.5).double()
    scale = 0.2 if likelihood == "gaussian" else log_scale.exp() + LEAST_SCALE
    kind = Laplace if likelihood == "laplace" else Normal
    log_density = kind(255 * logits.sigmoid(), 255 * scale).log_prob(255 * x)
    nats = reconstruction_nats(logits, x, likelihood, log_scale, sigma=0.2).item()
    found = bits_per_dimension(Estimate(nats, 1.0), likelihood, (3, 8, 4))
    assert found.mean == pytest.approx(-log_density.mean().item() / math.log(2), rel=1e-6)
    assert found.standard_error == pytest.approx(1 / (96 * math.log(2)))


@pytest.mark.parametrize(
    ("likelihood", "nats_per_pixel", "bits"),
    [
        ("discretized-logistic", math.log(256), 8),  # all levels are equally probable
        ("continuous-bernoulli", 0, math.log2(255)),  # a uniform density on [0, 1]
        ("bernoulli", math.log(2), 1),
    ],
)
def test_bits_per_dimension_of_what_says_nothing_about_a_pixel(likelihood, nats_per_pixel, bits):
    nats = Estimate(3 * 8 * 4 * nats_per_pixel, 0.0)
    assert bits_per_dimension(nats, likelihood, (3, 8, 4)).mean == pytest.approx(bits)


def test_only_the_cross_entropy_of_grey_pixels_has_no_bits():
    assert [name for name in LIKELIHOODS if not bits_are_of(name, grey=True)] == ["bernoulli"]
    assert bits_are_of("bernoulli", grey=False)


def private_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_images():
    """A map of 4 GB was evaluated in as much memory as its images take as floats."""
    keep_freed_memory()  # as commands do
    model = initialized_vae(latent_dim=2, image_size=64, channels=3, seed=1, widths=(2,))
    row = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)

    def evaluated(num):
        images_NCHW = row.expand(num, -1, -1, -1)  # itself without memory
        loader = eval_dataloader(Split(images_NCHW, torch.zeros(num, dtype=torch.int64), "-"))
        split_nats(model, loader, seed=0)
        iwae_nats(model, loader, 0, num_samples=1)
        return private_megabytes()

    before = evaluated(500)
    assert evaluated(5000) - before < 100  # its images as floats: 246 MB


def test_a_shuffled_loader_gives_every_image_its_own_noise(model, split):
    shuffled, in_order = get_dataloader(split, 7, shuffle=True), eval_dataloader(split)
    close = {"rtol": 0, "atol": 1e-4}  # nats: batches of another size: the last bits of float32
    nats = zip(split_nats(model, shuffled, 0), split_nats(model, in_order, 0), strict=True)
    for found_N, expected_N in nats:
        torch.testing.assert_close(found_N, expected_N, **close)
    expected_N = iwae_nats(model, in_order, 0, 3)
    torch.testing.assert_close(iwae_nats(model, shuffled, 0, 3), expected_N, **close)
    assert shuffled.sampler.epoch == 0  # the order of training is left where it was
