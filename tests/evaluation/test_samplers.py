"""Where z comes from: the flow against what theory says, mixtures against moments, files."""

import dataclasses
import functools
import math
import os

import pytest
import torch
from conftest import write_idx_folder

from vae_hyperband.common.errors import CheckpointError, ConfigError, DataError, RunFolderError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import as_trained, load_split
from vae_hyperband.evaluation import samplers
from vae_hyperband.evaluation.bounds import eval_dataloader
from vae_hyperband.evaluation.flow import Flow, fit_flow, matching_loss
from vae_hyperband.evaluation.latents import Posteriors, encode_split
from vae_hyperband.evaluation.samplers import (
    LearnedFlow,
    Mixture,
    Prior,
    SamplerConfig,
    covariance_kind,
    fit_sampler,
    generate,
    get_sampler,
    sampler_file,
)
from vae_hyperband.model.checkpoint import load_ckpt, load_model, save_ckpt
from vae_hyperband.model.vae import VAE
from vae_hyperband.training.loop import fit

QUICK = SamplerConfig(components=2, flow_epochs=2, flow_width=16, flow_depth=1)


def best_velocity(z_BZ, t_B, label_B):
    """E[z - noise | z_t] where both are N(0, I): both ends are one Gaussian."""
    t_B1 = t_B[:, None]
    return (2 * t_B1 - 1) / (t_B1**2 + (1 - t_B1) ** 2) * z_BZ


def test_the_matching_loss_of_the_best_velocity_is_pi_half():
    """The variance left is 1 / (t^2 + (1 - t)^2), whose integral over [0, 1] is pi / 2."""
    z_BZ = torch.randn(200_000, 2, generator=generator(0, "test"))
    stream = generator(1, "test")
    label_B = torch.zeros(len(z_BZ), dtype=torch.int64)
    loss = matching_loss(best_velocity, z_BZ, label_B, stream)
    assert loss.item() == pytest.approx(math.pi / 2, abs=0.02)
    worse = matching_loss(lambda *at: best_velocity(*at) + 0.3, z_BZ, label_B, generator(1, "test"))
    assert worse.item() == pytest.approx(loss.item() + 0.09, abs=0.02)


def test_the_best_velocity_between_equal_gaussians_leads_every_point_back_to_itself():
    flow = Flow(2, num_labels=1, width=4, depth=1)
    flow.velocity.forward = best_velocity
    flow.mean_Z, flow.std_Z = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    z_NZ = flow.draw(torch.zeros(100, dtype=torch.int64), generator(5, "test"))
    noise_NZ = torch.randn(100, 2, generator=generator(5, "test"))
    assert torch.allclose(z_NZ, flow.mean_Z + flow.std_Z * noise_NZ, atol=5e-3)


@pytest.fixture(scope="module")
def two_rings():
    """Label 0: two Gaussians at x = -3 and 3; label 1: one at y = 5, thrice as frequent."""
    stream = generator(0, "test")
    label_P = (torch.rand(8000, generator=stream) < 0.75).long()
    side_P = torch.where(torch.rand(8000, generator=stream) < 0.5, -3.0, 3.0)
    centre_PZ = torch.stack((torch.where(label_P == 0, side_P, 0.0), 5.0 * label_P), dim=1)
    mu_PZ = centre_PZ + 0.2 * torch.randn(8000, 2, generator=stream)
    return Posteriors(mu_PZ, torch.full((8000, 2), 2 * math.log(0.3))), label_P


@pytest.mark.parametrize("name", ["mixture", "flow"])
def test_fitted_samplers_draw_what_they_were_fitted_to(two_rings, name):
    posteriors, label_P = two_rings
    config = SamplerConfig(components=2, flow_epochs=40, flow_width=64, flow_depth=2)
    sampler = fit_sampler(name, posteriors, label_P, 1, config)
    z_NZ = sampler.draw(4000, generator(2, "test"), label=0)
    assert (z_NZ[:, 0] < 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert z_NZ[:, 0].abs().mean().item() == pytest.approx(3, abs=0.15)
    assert z_NZ[:, 1].mean().item() == pytest.approx(0, abs=0.15)
    spread = math.hypot(0.2, 0.3)  # of the means and of the posteriors around them
    assert z_NZ[:, 1].std().item() == pytest.approx(spread, rel=0.25)
    other = sampler.draw(4000, generator(2, "test"), label=1)
    assert other.mean(dim=0).tolist() == pytest.approx([0, 5], abs=0.15)
    either = sampler.draw(4000, generator(3, "test"))
    assert (either[:, 1] > 2.5).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", ["mixture", "flow"])
def test_fitting_is_a_function_of_the_seed(two_rings, name):
    posteriors, label_P = two_rings

    def draw(seed):
        torch.manual_seed(seed * 17)  # nothing of the global generator comes in
        sampler = fit_sampler(name, posteriors, label_P, seed, QUICK)
        return sampler.draw(50, generator(0, "test"))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_mixture_of_one_is_the_gaussian_of_its_label(two_rings):
    posteriors, label_P = two_rings
    z_PZ = posteriors.draw(0)
    mixture = Mixture.fit(z_PZ, label_P, components=1, seed=0)
    of_label = z_PZ[label_P == 1].double()
    assert torch.allclose(mixture.means_LKZ[1, 0], of_label.mean(dim=0), atol=1e-6)
    root = mixture.roots_LKZZ[1, 0]
    covariance = of_label.T.cov(correction=0) + 1e-4 * torch.eye(2)
    assert torch.allclose(root @ root.T, covariance, atol=1e-6)
    assert mixture.shares_L.tolist() == pytest.approx((label_P.bincount() / 8000).tolist())


def test_a_label_without_images_is_never_drawn():
    z_PZ, label_P = torch.randn(60, 2, generator=generator(0, "test")), torch.tensor([0, 2] * 30)
    mixture = Mixture.fit(z_PZ, label_P, components=3, seed=0)
    assert mixture.draw(200, generator(0, "test")).isfinite().all()
    for label in (1, 3, -1):
        with pytest.raises(ConfigError, match=f"No training image has the label {label}"):
            mixture.draw(5, generator(0, "test"), label)


def test_a_label_with_a_single_image_is_around_it():
    z_PZ = torch.randn(61, 2, generator=generator(0, "test"))
    label_P = torch.tensor([0, 1] * 30 + [2])
    mixture = Mixture.fit(z_PZ, label_P, components=3, seed=0)
    assert mixture.shares_L.tolist() == pytest.approx([30 / 61, 30 / 61, 1 / 61])
    drawn = mixture.draw(2000, generator(0, "test"), label=2)
    assert torch.allclose(drawn.mean(dim=0), z_PZ[60], atol=0.2)
    assert drawn.std(dim=0).min() > 0.05
    with pytest.raises(ConfigError, match="No label has two training images"):
        Mixture.fit(z_PZ[:3], torch.tensor([0, 1, 2]), components=1, seed=0)


def test_covariances_too_large_for_memory_are_diagonal(monkeypatch):
    assert covariance_kind(10, 20, 256) == "full"  # 105 MB
    assert covariance_kind(10, 20, 512) == "diag"  # 419 MB
    monkeypatch.setattr(samplers, "MAX_ROOTS_BYTES", 8 * 2 * 3 * 2**2 - 1)
    scale_2 = torch.tensor([0.5, 3.0])
    z_PZ = torch.randn(4000, 2, generator=generator(0, "test")) * scale_2
    mixture = Mixture.fit(z_PZ, torch.tensor([0, 1] * 2000), components=3, seed=0)
    assert mixture.roots_LKZZ.shape == (2, 3, 2)
    drawn = mixture.draw(20000, generator(0, "test"))
    assert torch.allclose(drawn.std(dim=0), scale_2, rtol=0.05)


def test_samples_in_chunks_are_the_samples_at_once(two_rings, monkeypatch):
    posteriors, label_P = two_rings
    mixture = Mixture.fit(posteriors.draw(0), label_P, components=3, seed=0)
    at_once = mixture.draw(1000, generator(0, "test"))
    monkeypatch.setattr(samplers, "MAX_CHUNK_BYTES", 8 * 2**2 * 7)
    assert torch.allclose(mixture.draw(1000, generator(0, "test")), at_once, rtol=1e-6, atol=1e-7)


def test_a_rare_label_does_not_make_the_others_poorer():
    z_PZ = torch.randn(64, 2, generator=generator(0, "test"))
    label_P = torch.tensor([0, 1] * 30 + [2] * 4)
    mixture = Mixture.fit(z_PZ, label_P, components=6, seed=0)
    assert (mixture.weights_LK > 0).sum(dim=1).tolist() == [6, 6, 4]
    assert mixture.draw(200, generator(0, "test"), label=2).isfinite().all()


def test_the_prior_is_standard_normal_and_knows_no_labels():
    model = VAE(latent_dim=3, image_size=8)
    z_NZ = Prior(model).draw(50_000, generator(0, "test"))
    assert z_NZ.mean(dim=0).tolist() == pytest.approx([0] * 3, abs=0.02)
    assert torch.allclose(z_NZ.T.cov(), torch.eye(3), atol=0.03)
    with pytest.raises(ConfigError, match="The prior knows no labels"):
        Prior(model).draw(5, generator(0, "test"), label=1)


@pytest.mark.parametrize("name", ["mixture", "flow"])
def test_a_sampler_is_kept_beside_its_checkpoint_and_read_again(trained, small_data, name):
    said = []

    def draw(config=QUICK):
        load_train = functools.partial(load_split, "train", small_data, "custom")
        sampler = get_sampler(name, load_ckpt(trained.best), load_train, config, said.append)
        return sampler.draw(20, generator(0, "test"))

    def num_fits():
        return said.count(f"fitting the {name} to the training split's latents")

    first = draw()
    path = sampler_file(trained.best, name)
    assert path == trained.best.parent / f"best.{name}.pt"
    assert torch.equal(draw(), first)
    assert num_fits() == 1
    # other settings, or another checkpoint: fitted again
    draw(dataclasses.replace(QUICK, components=3, flow_epochs=3))
    assert num_fits() == 2
    draw()
    assert num_fits() == 3
    content = load_ckpt(trained.best)
    content.model_state["encoder.fc_mu.bias"] += 1
    save_ckpt(trained.best, content)
    assert not torch.equal(draw(), first)
    assert num_fits() == 4


@pytest.mark.parametrize("damage", ["one bit of a weight", "another file", "a newer version"])
def test_a_damaged_sampler_is_fitted_again(trained, small_data, damage):
    said = []

    def get():
        return get_sampler(
            "mixture",
            load_ckpt(trained.best),
            lambda: load_split("train", small_data, "custom"),
            QUICK,
            said.append,
        )

    first, path = get(), sampler_file(trained.best, "mixture")
    intact = path.read_bytes()
    if damage == "one bit of a weight":
        content = bytearray(intact)
        content[content.index(load_ckpt_bytes(path)) + 6] ^= 1
        path.write_bytes(content)
    elif damage == "another file":
        path.write_text("no sampler")
    else:
        torch.save({**torch.load(path, weights_only=True), "version": 999}, path)
    said.clear()
    again = get()
    assert any("damaged or of another version" in text for text in said)
    assert torch.equal(again.means_LKZ, first.means_LKZ)
    assert path.read_bytes() == intact


def test_other_training_images_are_refused(trained, tmp_path):
    other = write_idx_folder(tmp_path / "other", num_train=420)
    with pytest.raises(CheckpointError, match="was trained on other images than these"):
        get_sampler(
            "flow", load_ckpt(trained.best), lambda: load_split("train", other, "custom"), QUICK
        )
    assert not sampler_file(trained.best, "flow").exists()


def test_corrected_labels_fit_a_sampler_again(tmp_path, options, small_config):
    """The images are the same, so the checkpoint still belongs to the data."""
    folder = write_idx_folder(tmp_path / "data")
    trained = fit(small_config, options(run="a", data_dir=folder), quiet=True)
    checkpoint, said = load_ckpt(trained.best), []
    load_train = functools.partial(load_split, "train", folder, "custom")
    first = get_sampler("mixture", checkpoint, load_train, QUICK, said.append)
    again = get_sampler("mixture", checkpoint, load_train, QUICK, said.append)
    assert len(said) == 1  # kept
    path = folder / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    labels = bytes((label + 1) % 10 for label in content[8:])
    path.write_bytes(content[:8] + labels)
    os.utime(path, (1, 1))  # files are read again when their time differs
    corrected = get_sampler("mixture", checkpoint, load_train, QUICK, said.append)
    assert len(said) == 2
    assert torch.equal(first.means_LKZ, again.means_LKZ)
    assert torch.allclose(corrected.means_LKZ[1], first.means_LKZ[0])

    def gone():
        raise DataError("No file")

    without = get_sampler("mixture", checkpoint, gone, QUICK, said.append)
    assert torch.equal(without.means_LKZ, corrected.means_LKZ)


def test_a_sampler_that_cannot_be_kept_is_used_all_the_same(trained, small_data, monkeypatch):
    def full_disk(path, *content):
        raise RunFolderError(f"{path} cannot be written: no space left.")

    said = []
    load_train = functools.partial(load_split, "train", small_data, "custom")
    monkeypatch.setattr(samplers, "save_pt", full_disk)
    once = get_sampler("mixture", load_ckpt(trained.best), load_train, QUICK, said.append)
    assert "the mixture is not saved" in said[-1]
    monkeypatch.undo()
    again = get_sampler("mixture", load_ckpt(trained.best), load_train, QUICK)
    assert torch.equal(once.means_LKZ, again.means_LKZ)


def test_models_of_bits_have_samplers_of_bits(options, small_config, small_data):
    """A mixture of one is the mean of the posteriors' draws: of the bits, not of grey images."""
    config = dataclasses.replace(small_config, binarize="dynamic")
    trained = fit(config, options(), quiet=True)
    train = load_split("train", small_data, "custom")
    one = dataclasses.replace(QUICK, components=1)
    mixture = get_sampler("mixture", load_ckpt(trained.best), lambda: train, one)
    loader = eval_dataloader(as_trained(train, config))
    z_PZ = encode_split(load_model(trained.best), loader).draw(config.seed).double()
    for label in range(10):
        expected = z_PZ[train.labels_N == label].mean(dim=0)
        assert torch.allclose(mixture.means_LKZ[label, 0], expected, atol=1e-6)


def load_ckpt_bytes(path):
    """Some bytes of the file that are weights, not structure."""
    return torch.load(path, weights_only=True)["tensors"]["means_LKZ"].numpy().tobytes()


def test_generated_images_are_bytes_of_the_decoder_s_means(trained):
    model = load_model(trained.best)
    images = generate(model, Prior(model), 700, seed=4)  # more than one batch
    assert images.shape == (700, 1, 8, 8)
    assert images.dtype == torch.uint8
    z_NZ = torch.randn(700, 4, generator=generator(4, "sample"))
    expected = torch.sigmoid(model.decode(z_NZ))
    assert (images / 255 - expected).abs().max() <= 0.5 / 255 + 1e-5
    assert torch.equal(images, generate(model, Prior(model), 700, seed=4))


def test_flow_labels_are_an_input(two_rings):
    posteriors, label_P = two_rings
    flow = fit_flow(Flow(2, 2, width=16, depth=1), posteriors.draw, label_P, 0, epochs=1)
    sampler = LearnedFlow(torch.tensor([0.5, 0.5]), flow)
    draws = [sampler.draw(10, generator(0, "test"), label) for label in (0, 1)]
    assert not torch.equal(*draws)


def test_custom_data_with_few_images_of_a_label(tmp_path, options, small_config):
    """Fewer images than components: as many components as there are images."""
    folder = write_idx_folder(tmp_path / "few", num_train=60, num_test=20)
    trained = fit(small_config, options(run="few", data_dir=folder), quiet=True)
    sampler = get_sampler(
        "mixture", load_ckpt(trained.best), lambda: load_split("train", folder, "custom")
    )
    assert sampler.draw(10, generator(0, "test")).isfinite().all()
