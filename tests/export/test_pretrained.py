"""The models in the package: small, as good as what they were packed from, usable everywhere."""

import dataclasses
import hashlib
import io
import json
import re

import pytest
import torch

from vae_hyperband import load_ckpt, load_pretrained, train_vae
from vae_hyperband.common.errors import ConfigError, DataError
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation import samplers
from vae_hyperband.evaluation.samplers import SamplerConfig, get_sampler, sampler_file
from vae_hyperband.export import pretrained
from vae_hyperband.model import checkpoint
from vae_hyperband.model.checkpoint import load_pt
from vae_hyperband.training.loop import fit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "cache"))


FORMATS = {
    "checkpoint": (checkpoint.FORMAT, checkpoint.KEYS),
    "mixture": (samplers.FORMAT, samplers.KEYS),
}


def no_data():
    raise DataError("There is no Fashion-MNIST here.")


@pytest.fixture
def small(options, small_config, small_data, tmp_path, monkeypatch):
    """A small model packed as "small", and the checkpoint that it was packed from."""
    trained = load_ckpt(fit(small_config, options(), quiet=True).best)
    train = load_split("train", small_data, "custom")
    get_sampler("mixture", trained, lambda: train)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
    (tmp_path / "package").mkdir()
    pretrained.pack(trained.path, tmp_path / "package/small.pt")
    return trained


def test_a_packed_model_is_the_checkpoint_in_half_precision(small):
    found = load_ckpt(pretrained.pretrained_ckpt("small"))
    assert (found.config, found.data, found.metrics) == (small.config, small.data, small.metrics)
    for name, tensor in small.model_state.items():
        assert torch.equal(found.model_state[name], tensor.half().float())
    assert found.weights_digest != small.weights_digest
    x_BCHW = torch.rand(5, *small.data.image_shape)
    torch.testing.assert_close(
        found.model().reconstruct(x_BCHW), small.model().reconstruct(x_BCHW), rtol=0, atol=0.01
    )
    assert torch.equal(load_pretrained("small").state_dict()["decoder.fc.bias"],
                       found.model_state["decoder.fc.bias"])  # fmt: skip


def test_its_mixture_is_that_of_the_checkpoint_and_needs_no_data(small):
    found = load_ckpt(pretrained.pretrained_ckpt("small"))
    unpacked = get_sampler("mixture", found, no_data)
    fitted = get_sampler("mixture", small, no_data)
    for field in dataclasses.fields(fitted):
        expected, found = getattr(fitted, field.name), getattr(unpacked, field.name)
        torch.testing.assert_close(found, expected.half().double(), rtol=0, atol=0)


@pytest.mark.parametrize("what", ["checkpoint", "mixture"])
@pytest.mark.parametrize("lost", [True, False])
def test_what_is_lost_or_damaged_in_the_cache_is_written_again(small, what, lost):
    path = pretrained.pretrained_ckpt("small")
    file = path if what == "checkpoint" else sampler_file(path, "mixture")
    before = file.read_bytes()
    file.write_bytes(before[:1000])
    if lost:
        file.unlink()
    pretrained.pretrained_ckpt("small")
    assert load_pt(file, *FORMATS[what])["digest"] == torch.load(io.BytesIO(before))["digest"]


def test_another_fit_does_not_take_the_place_of_its_mixture(small, small_data):
    found = load_ckpt(pretrained.pretrained_ckpt("small"))
    train = load_split("train", small_data, "custom")
    get_sampler("mixture", found, lambda: train, SamplerConfig(components=1))
    found = load_ckpt(pretrained.pretrained_ckpt("small"))
    assert get_sampler("mixture", found, no_data).weights_LK.shape[1] == SamplerConfig.components


def test_it_cannot_be_trained_further(small, small_data, tmp_path, capsys):
    argv = ["train", "--resume_ckpt", str(pretrained.pretrained_ckpt("small")), "--epochs", "9"]
    argv += ["--data-dir", str(small_data), "--run", "more"]
    assert train_vae.main(argv) == 2
    assert "cannot be trained further: train its --preset instead" in capsys.readouterr().err


def test_an_unknown_model_is_named_with_those_that_there_are(capsys):
    with pytest.raises(ConfigError, match="has no model pretrained:x: use pretrained:bound or"):
        load_pretrained("x")
    assert train_vae.main(["report", "pretrained:images"]) == 2
    assert "is a model of the package, without logs" in capsys.readouterr().err
    assert train_vae.main(["sample", "pretrained:"]) == 2
    assert "use pretrained:bound or pretrained:images." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["images", "bound"])
def test_the_models_of_the_package_are_what_their_card_says(name):
    file = pretrained.FOLDER / f"{name}.pt"
    assert file.stat().st_size <= 4e6
    card = (
        (pretrained.FOLDER / "README.md").read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    )
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    raw = json.loads((pretrained.FOLDER.parents[1] / "benchmarks/pretrained.json").read_text())
    bound = raw[name]["packed, test"]["bound"]
    said = re.search(r"bound +([\d.]+) \+- ([\d.]+)", card).groups()
    assert said == (f"{bound['mean']:.2f}", f"{bound['standard_error']:.2f}")
    found = load_ckpt(pretrained.pretrained_ckpt(name))
    assert found.digest == raw[name]["packed, test"]["checkpoint_digest"]
    assert found.model()(torch.rand(2, 1, 28, 28), torch.zeros(2, found.config.latent_dim))


def test_samples_of_the_images_come_from_the_mixture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_vae.main(["sample", "pretrained:images", "--out", "x.npy", "--device", "cpu"]) == 0
    argv = ["sample", "pretrained:images", "--out", "y.npy", "--device", "cpu"]
    assert train_vae.main([*argv, "--sampler", "mixture"]) == 0
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()
    path = sampler_file(pretrained.pretrained_ckpt("images"), "mixture")
    assert torch.load(path)["fitted"] == SamplerConfig().of("mixture")
