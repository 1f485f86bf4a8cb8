"""Active units, mutual information and probes against cases that are known exactly."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.distributions import Normal, kl_divergence

from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation import latents
from vae_hyperband.evaluation.bounds import eval_dataloader, split_nats
from vae_hyperband.evaluation.latents import (
    Posteriors,
    active_units,
    aggregate,
    encode_split,
    information_per_dimension,
    knn_probe,
    linear_probe,
    mutual_information,
)
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.vae import VAE


def random_posteriors(num=50, dim=3, seed=0):
    stream = generator(seed, "test")
    return Posteriors(
        torch.randn(num, dim, generator=stream), torch.randn(num, dim, generator=stream) - 1
    )


def test_a_unit_is_active_where_its_mean_varies():
    mu_NZ = torch.randn(1000, 3, generator=generator(0, "test")) * torch.tensor([1.0, 0.11, 0.09])
    assert active_units(Posteriors(mu_NZ, torch.zeros(1000, 3))) == 2
    assert active_units(Posteriors(torch.ones(10, 3), torch.zeros(10, 3))) == 0


def test_information_per_dimension_adds_up_to_the_kl_of_the_bound(small_data):
    split = load_split("validation", small_data, "custom")
    model = initialized_vae(latent_dim=4, image_size=8, channels=1, seed=1)
    loader = eval_dataloader(split)
    nats_Z = information_per_dimension(model, encode_split(model, loader))
    assert nats_Z.shape == (4,)
    total = split_nats(model, loader, seed=0).kl_B.mean().item()
    assert nats_Z.sum().item() == pytest.approx(total, rel=1e-5)


def test_the_aggregate_posterior_has_the_mean_and_variance_of_draws():
    stream = torch.Generator().manual_seed(0)
    mu_NZ = 3 * torch.randn(50, 4, generator=stream, dtype=torch.double) - 8
    logvar_NZ = torch.randn(50, 4, generator=stream, dtype=torch.double)
    noise = torch.randn(20_000, 50, 4, generator=stream, dtype=torch.double)
    drawn = (mu_NZ + (0.5 * logvar_NZ).exp() * noise).flatten(0, 1)
    mean_Z, variance_Z = aggregate(Posteriors(mu_NZ, logvar_NZ))
    torch.testing.assert_close(mean_Z, drawn.mean(dim=0), rtol=0, atol=0.02)
    torch.testing.assert_close(variance_Z, drawn.var(dim=0), rtol=0.01, atol=0)


def test_information_per_dimension_is_the_kl_to_the_prior_or_to_all_images_together():
    mu_NZ = torch.tensor([[1.0, -8.6, -8.0], [-1.0, -8.6, -9.0]]).double()
    logvar_NZ = torch.log(torch.tensor([[0.25, 0.16, 0.01], [0.5, 0.16, 0.02]])).double()
    posteriors = Posteriors(mu_NZ, logvar_NZ)
    each = Normal(mu_NZ, (0.5 * logvar_NZ).exp())
    found = information_per_dimension(VAE(3, 8, 1), posteriors)
    expected = kl_divergence(each, Normal(torch.zeros(3), torch.ones(3))).mean(dim=0)
    torch.testing.assert_close(found, expected)
    found = information_per_dimension(VAE(3, 8, 1, pseudo_inputs=2), posteriors)
    mean_Z, variance_Z = aggregate(posteriors)
    expected = kl_divergence(each, Normal(mean_Z, variance_Z.sqrt())).mean(dim=0)
    torch.testing.assert_close(found, expected)
    assert found[1].abs() < 1e-12  # the same for every image, however far from 0
    assert found[2] > found[0] > 0


def test_mutual_information_is_what_densities_by_hand_give():
    posteriors = random_posteriors(num=620)  # more than one chunk
    z_NZ = posteriors.draw(seed=3)
    each = Normal(posteriors.mu_NZ.double(), posteriors.logvar_NZ.double().mul(0.5).exp())
    log_q_NN = each.log_prob(z_NZ.double()[:, None]).sum(dim=2)  # z of row under q of column
    by_hand = log_q_NN.diagonal() - (log_q_NN.logsumexp(dim=1) - math.log(620))
    found = mutual_information(posteriors, z_NZ)
    assert found.mean == pytest.approx(by_hand.mean().item(), rel=1e-9)
    assert found.standard_error == pytest.approx(by_hand.std().item() / math.sqrt(620), rel=1e-9)


def test_mutual_information_lies_between_nothing_and_log_n():
    same = Posteriors(torch.ones(40, 2), torch.zeros(40, 2))
    assert mutual_information(same, same.draw(0)).mean == pytest.approx(0, abs=1e-12)
    apart = Posteriors(torch.arange(40.0)[:, None] * 100, torch.zeros(40, 1))
    assert mutual_information(apart, apart.draw(0)).mean == pytest.approx(math.log(40))


def test_draws_of_posteriors_have_their_moments():
    posteriors = Posteriors(torch.full((20_000, 1), 2.0), torch.full((20_000, 1), math.log(9.0)))
    z_NZ = posteriors.draw(seed=1)
    assert z_NZ.mean().item() == pytest.approx(2, abs=0.1)
    assert z_NZ.std().item() == pytest.approx(3, abs=0.1)
    assert torch.equal(z_NZ, posteriors.draw(1, 0))
    assert not torch.equal(z_NZ, posteriors.draw(1, 1))


def labelled(num, seed, noise):
    """Ten classes at the corners of a regular figure."""
    stream = generator(seed, "test")
    labels_N = torch.randint(0, 10, (num,), generator=stream)
    noise_NF = torch.randn(num, 10, generator=stream) * noise
    return torch.eye(10)[labels_N] + noise_NF, labels_N


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_read_what_is_there_and_nothing_else(probe):
    train, held_out = labelled(2000, 1, 0.1), labelled(500, 2, 0.1)
    assert probe(*train, *held_out).mean == 1
    noise_NF = torch.randn(2500, 10, generator=generator(0, "test"))
    noise = probe(noise_NF[:2000], train[1], noise_NF[2000:], held_out[1])
    assert abs(noise.mean - 0.1) < 0.06
    blurred = probe(*labelled(2000, 1, 0.5), *labelled(500, 2, 0.5))
    p = blurred.mean
    assert 0.3 < p < 0.95
    assert blurred.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 499))


def test_the_linear_probe_does_not_depend_on_the_scale_of_a_dimension():
    (train, labels), (held_out, expected) = labelled(2000, 1, 0.5), labelled(500, 2, 0.5)
    scale = torch.logspace(-2, 2, 10)
    plain = linear_probe(train, labels, held_out, expected)
    assert linear_probe(train * scale, labels, held_out * scale, expected) == plain


def correlated(num, seed):
    """Two features whose small difference is the label: it takes large weights to see it."""
    stream = generator(seed, "test")
    labels_N = torch.randint(2, (num,), generator=stream)
    shared_N = torch.randn(num, generator=stream)
    small_N = labels_N - 0.5 + 0.2 * torch.randn(num, generator=stream)
    return torch.stack((shared_N, shared_N + 0.02 * small_N), dim=1), labels_N


def mislabelled(num, seed):
    """Ten features of 300 say something, a fifth of the training labels is wrong: large weights
    learn those by heart."""
    stream = generator(seed, "test")
    labels_N = torch.randint(2, (num,), generator=stream)
    features_NF = torch.randn(num, 300, generator=stream)
    features_NF[:, :10] += 2 * labels_N[:, None]
    wrong_N = torch.rand(num, generator=stream) < (0.2 if seed == 1 else 0)
    return features_NF, torch.where(wrong_N, 1 - labels_N, labels_N)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("made", "better", "worse"), [(correlated, 1, 0.01), (mislabelled, 0.01, 1)]
)
def test_the_linear_probe_chooses_its_ridge_on_training_images(
    made, better, worse, scaled, monkeypatch
):
    if not scaled:  # as images with many values
        monkeypatch.setattr(latents, "MOST_SCALED", 0)
    (train, labels), (held_out, expected) = made(1000, 1), made(3000, 2)
    mean, std = train.mean(dim=0), train.std(dim=0)
    accuracy = {
        ridge: LogisticRegression(C=ridge, max_iter=200)
        .fit(((train - mean) / std).numpy(), labels.numpy())
        .score(((held_out - mean) / std).numpy(), expected.numpy())
        for ridge in (0.01, 1)
    }
    assert accuracy[better] > accuracy[worse] + 0.1
    found = linear_probe(train, labels, held_out, expected)
    # without the better coordinates not quite converged; a third of the standard error
    apart = 1e-6 if scaled else found.standard_error / 3
    assert found.mean == pytest.approx(accuracy[better], abs=apart)


def test_the_linear_probe_of_large_images_needs_no_matrix_of_their_pixels(monkeypatch):
    monkeypatch.delattr(torch.linalg, "cholesky")
    labels_N = torch.arange(60) % 2
    features_NF = torch.randn(60, 3 * 64 * 64, generator=generator(1, "test"))
    features_NF += labels_N[:, None]
    assert linear_probe(features_NF[:40], labels_N[:40], features_NF[40:], labels_N[40:]).mean == 1


def test_the_linear_probe_learns_of_a_class_with_a_single_image():
    """Which may be absent where the ridge is chosen."""
    features_NF, rare_N = torch.randn(30, 2), torch.tensor([3] * 29 + [1])
    assert linear_probe(features_NF, rare_N, features_NF[:4], torch.full((4,), 3)).mean == 1


def test_the_knn_probe_asks_ten_neighbours():
    """The most frequent label of the nearest ten, not of all and not the nearest one's."""
    train = torch.cat((torch.full((4, 1), 0.1), torch.full((6, 1), 0.2), torch.full((9, 1), 5.0)))
    labels = torch.tensor([0] * 4 + [1] * 6 + [0] * 9)
    assert knn_probe(train, labels, torch.zeros(1, 1), torch.tensor([1])).mean == 1
