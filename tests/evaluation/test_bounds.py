"""The IWAE bound against cases that are known exactly. The plain bound is in test_training.py."""

import statistics

import pytest
import torch

from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.bounds import eval_dataloader, eval_epoch, iwae_nats, split_nats
from vae_hyperband.model.initialization import initialized_vae


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
