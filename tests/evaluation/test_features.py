"""Which features images are compared in: of whose network, how it is trained, kept and named."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vae_hyperband.common.config import Folders, RunOptions, TrainConfig
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation import feature_net
from vae_hyperband.evaluation import features as features_module
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.evaluation.feature_net import FeatureNet, accuracy, settings_for, train_own
from vae_hyperband.evaluation.features import (
    WEIGHTS_SHA256,
    features_for,
    file_features,
    kept,
    own_features,
    shipped_features,
)
from vae_hyperband.evaluation.image_quality import frechet, moments
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.evaluation.samplers import Prior, generate
from vae_hyperband.export.hub import _hub_metrics
from vae_hyperband.model.checkpoint import load_model
from vae_hyperband.reporting.tables import evaluation_text
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.training.dry_run import dry_run
from vae_hyperband.training.loop import fit
from vae_hyperband.training.study import row_of
from vae_hyperband.tune.driver import load_splits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_net, "MOST_EPOCHS", 10)  # these images are easy
    return tmp_path / "cache" / "features"


def colours(num=90, height=8, width=8, seed=0) -> Split:
    """Noise, brighter in the channel of the label; the labels are 1, 4 and 9."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 150, (num, 3, height, width))
    classes = random.integers(0, 3, num)
    images[np.arange(num), classes] += 100
    labels = torch.tensor([1, 4, 9])[torch.from_numpy(classes)]
    return Split(torch.from_numpy(images).to(torch.uint8), labels, "colours")


def write_folder(folder, labels=("red", "green", "blue"), num=120):
    """Pictures of 8x8, each in the folder of its colour; in one folder, if there are no labels."""
    split = colours(num)
    for number, (image, label) in enumerate(zip(split.images_NCHW, split.labels_N, strict=True)):
        place = folder / labels[{1: 0, 4: 1, 9: 2}[int(label)]] if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return folder


def trained_on(folder, tmp_path):
    options = RunOptions(
        run="mine", device="cpu", num_threads=1, data=folder,
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l",
    )  # fmt: skip
    return fit(TrainConfig(latent_dim=2, batch_size=16, epochs=1), options, quiet=True)


IMAGES = EvaluateOptions(parts=("images",), samplers=("prior",))


class Means(torch.nn.Module):
    """Bytes (B, C, H, W) -> the mean of each channel, and that of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.channels or x.dtype != torch.uint8:
            raise RuntimeError("other images")
        x = x.float().mean(dim=[2, 3])
        return torch.cat((x, x.mean(dim=1, keepdim=True)), dim=1)


class Fixed(torch.nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


def scripted(net, path):
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(net).save(path)
    return path


# ---- The choice


def test_garments_have_the_shipped_features_and_nothing_else_has(small_data):
    grey = load_split("train", small_data, "custom")
    for dataset in ("fashion-mnist", "drawn"):
        assert features_for(dataset, grey) is shipped_features("cpu")
    assert shipped_features("cpu").digest == WEIGHTS_SHA256
    for dataset in ("custom", "images"):
        found = features_for(dataset, grey)
        assert found.name == "own classifier"
        assert found.digest != WEIGHTS_SHA256


def test_pictures_with_labels_are_compared_in_their_own_classifier_s_features(tmp_path, cache):
    trained = trained_on(write_folder(tmp_path / "photos"), tmp_path)
    said = []
    found = evaluate(trained.best, "test", None, "cpu", IMAGES, said.append)
    assert found.images.features == "own classifier"
    assert sum(text.startswith("fitting a classifier of the") for text in said) == 1
    held_out = load_split("test", data=tmp_path / "photos")
    own = own_features(load_split("train", data=tmp_path / "photos"))
    share = accuracy(own.net, held_out)
    assert share > 0.9
    protocol = f"a classifier of the training split (accuracy {share:.3f} on the test split, SHA-"
    assert f"{protocol}256 {own.digest[:12]})" in found.images.protocol
    model = load_model(trained.best)
    samples = generate(model, Prior(model), len(held_out), trained.state.config.seed)
    by_hand = frechet(moments(own(held_out.images_NCHW)), moments(own(samples)))
    assert found.images.kinds["prior"].fid.mean == pytest.approx(by_hand, rel=1e-6)
    assert found.images.kinds["prior"].kid.mean > 0
    assert len(list(cache.iterdir())) == 1

    said = evaluation_text(found)
    assert "FID (own classifier)" in said
    assert "KID" in said
    assert "Fashion" not in said + found.images.protocol
    kinds = {(metric.type, metric.name) for metric in _hub_metrics(found, "bernoulli")}
    name = f"FID (own classifier), prior, {len(held_out)} images"
    assert ("fid_own_classifier", name) in kinds
    assert row_of("x", found)["fid_name"] == "FID (own classifier)"
    assert Evaluation.from_dict(json.loads(found.to_json()), "e.json") == found


def test_pictures_without_labels_keep_what_needs_no_features(tmp_path):
    trained = trained_on(write_folder(tmp_path / "photos", labels=()), tmp_path)
    said = []
    options = EvaluateOptions(iwae_samples=2, samplers=("prior",))
    found = evaluate(trained.best, "test", None, "cpu", options, said.append)
    assert found.images is None
    assert found.likelihood
    assert found.latents
    assert said == [
        "images left out: FID and the measures beside it compare features, and images without "
        "labels have no classifier of their own: give --features, a TorchScript file of a network",
        "1 of 2: likelihood bounds",
        "2 of 2: latent space and probes",
    ]
    net = scripted(Means(3), tmp_path / "means.pt")
    options = dataclasses.replace(IMAGES, features=net)
    found = evaluate(trained.best, "test", None, "cpu", options)
    assert found.images.features == "features of means.pt"
    assert "FID (features of means.pt)" in evaluation_text(found)
    held_out = load_split("test", data=tmp_path / "photos")
    model = load_model(trained.best)
    samples = generate(model, Prior(model), len(held_out), trained.state.config.seed)
    sets = (moments(Means(3)(x)) for x in (held_out.images_NCHW, samples))
    assert found.images.kinds["prior"].fid.mean == pytest.approx(frechet(*sets), rel=1e-6)


def test_fid_while_training_is_in_the_same_features(tmp_path, capsys):
    folder = write_folder(tmp_path / "photos")
    options = RunOptions(
        run="mine", device="cpu", num_threads=1, data=folder,
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l",
    )  # fmt: skip
    config = TrainConfig(latent_dim=2, batch_size=16, epochs=1, fid_samples=20)
    trained = fit(config, options)
    assert "fitting a classifier of the" in capsys.readouterr().err
    train, held_out = (load_split(name, data=folder) for name in ("train", "validation"))
    own = own_features(train)
    samples = trained.state.model.sample(20, generator(config.seed, "fid"))
    by_hand = frechet(moments(own(held_out.images_NCHW)), moments(own(samples)))
    assert trained.state.metrics["fid"] == pytest.approx(by_hand, rel=1e-4)
    events = b"".join(path.read_bytes() for path in trained.log_folder.glob("events*"))
    assert b"own classifier: features of a classifier of the training split" in events


def test_fid_of_pictures_without_labels_is_refused_before_anything_is_trained(tmp_path):
    folder = write_folder(tmp_path / "photos", labels=())
    options = RunOptions(
        run="mine", device="cpu", data=folder,
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l",
    )  # fmt: skip
    config = TrainConfig(latent_dim=2, batch_size=16, epochs=1, fid_samples=20)
    refused = r"images without labels .* remove --fid-samples or --metric fid"
    for call in (lambda: fit(config, options, quiet=True), lambda: dry_run(config, options)):
        with pytest.raises(ConfigError, match=refused):
            call()
    assert not list(tmp_path.glob("c/mine/*"))
    search = SearchConfig(metric="fid", batch_sizes=(16,), dataset="images")
    with pytest.raises(ConfigError, match=refused):
        load_splits(search, SearchOptions(data=folder, checkpoints_dir=tmp_path / "c"))


def test_a_search_names_the_features_it_compares_trials_in():
    assert SearchConfig(metric="fid").metric_name == (
        "validation FID (Fashion-MNIST features), z from the prior"
    )
    named = SearchConfig(metric="fid", dataset="images").metric_name
    assert named == "validation FID (own classifier), z from the prior"
    assert SearchConfig().metric_name == "validation bound at beta = 1, nats/image"


# ---- A classifier of one's own


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (36, 24), (44, 40)])
def test_a_classifier_is_trained_for_any_size_and_any_labels(size):
    train, held_out = colours(60, *size), colours(60, *size, seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = train_own(train)
    assert torch.equal(torch.get_rng_state(), before)  # observing a run does not change it
    assert net.settings.labels == (1, 4, 9)
    assert net.settings.halvings == {8: 0, 4: 0, 36: 1, 44: 2}[size[0]]
    assert accuracy(net, held_out) > 0.9
    features_NF = net.features(train.images_NCHW / 255)
    assert features_NF.shape == (60, 128)
    assert features_NF.var(dim=0).mean().item() == pytest.approx(1, rel=1e-3)


def test_a_classifier_is_a_function_of_the_images():
    net = train_own(colours())
    torch.manual_seed(2)
    again = train_own(colours()).state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, again[name])


def test_pixels_are_normalised_by_the_training_split_s_own():
    train = colours(2500)
    found = settings_for(train)
    pixels = train.images_NCHW.double() / 255
    assert found.pixel_mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
    std = pixels.std(dim=(0, 2, 3), correction=0)
    assert found.pixel_std == pytest.approx(std.tolist(), rel=1e-12)
    empty = dataclasses.replace(train, images_NCHW=train.images_NCHW.clone())
    empty.images_NCHW[:, 1] = 0
    assert settings_for(empty).pixel_std[1] > 0
    net = FeatureNet(found)
    x = pixels[:5].float()
    normalised = (x - x.new_tensor(found.pixel_mean)[:, None, None]) / x.new_tensor(
        found.pixel_std
    )[:, None, None]
    plain = FeatureNet(found._replace(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3))
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(net.eval()(x), plain.eval()(normalised), atol=1e-5)


def test_a_classifier_is_trained_once_for_the_same_images_and_labels(monkeypatch, cache):
    train, trainings = colours(), []

    def counted(split):
        trainings.append(split)
        return train_own(split)

    monkeypatch.setattr(features_module, "train_own", counted)
    first, again = own_features(train), own_features(dataclasses.replace(train, digest="moved"))
    assert len(trainings) == 1
    assert (first.digest, first.name) == (again.digest, again.name)
    x = colours(20, seed=2).images_NCHW
    assert torch.equal(first(x), again(x))
    other = own_features(colours(seed=5))
    relabelled = own_features(dataclasses.replace(train, labels_N=train.labels_N.flip(0)))
    assert len(trainings) == 3
    assert len({first.digest, other.digest, relabelled.digest}) == 3
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(features_module, "RECIPE", 0)
    own_features(train)
    assert len(trainings) == 4


def test_a_damaged_classifier_is_found_and_made_again(cache):
    train, said = colours(), []
    digest = own_features(train).digest
    [path] = cache.iterdir()
    good = path.read_bytes()
    last = good[:-1] + bytes([good[-1] ^ 1])
    other_digest = good.replace(digest.encode(), digest[::-1].encode())
    assert other_digest != good
    for content in (last, good[:500], b"", other_digest):
        path.write_bytes(content)
        said.clear()
        assert own_features(train, say=said.append).digest == digest
        assert "is damaged" in said[0]
        said.clear()
        assert own_features(train, say=said.append).digest == digest
        assert not said
    path.unlink()
    own_features(colours(seed=5))
    [other] = cache.iterdir()
    other.rename(path)  # intact, but of other images
    assert own_features(train, say=said.append).digest == digest


def test_without_a_cache_the_classifier_is_fitted_and_not_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "file"))
    said = []
    assert own_features(colours(), say=said.append).name == "own classifier"
    assert any("the classifier is not kept: The folder" in text for text in said)


# ---- A network of the user's


def test_a_network_of_the_user_s_takes_grey_or_colour(tmp_path):
    grey = colours(120).images_NCHW[:, :1]
    three, one = (scripted(Means(n), tmp_path / f"{n}.pt") for n in (3, 1))
    assert torch.equal(file_features(three)(grey), Means(3)(grey.expand(-1, 3, -1, -1)))
    assert torch.equal(file_features(one)(grey), Means(1)(grey))
    assert torch.equal(file_features(one)(grey / 255), Means(1)(grey))  # as bytes again
    assert file_features(one) == file_features(one) != file_features(three)
    with pytest.raises(CheckpointError, match=r"1\.pt cannot be called with bytes \(100, 3, 8, 8"):
        file_features(one)(colours(120).images_NCHW)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(7, 3), r"gives \(7, 3\) for 5 images, expected features of shape \(5, F\)"),
        (torch.zeros(5), r"gives \(5,\) for 5 images, expected features of shape \(5, F\)"),
        (torch.full((5, 2), torch.nan), "gives features that are not finite"),
    ],
)
def test_what_is_no_feature_of_each_image_is_refused(value, message, tmp_path):
    net = file_features(scripted(Fixed(value), tmp_path / "net.pt"))
    with pytest.raises(CheckpointError, match=rf"net\.pt {message}"):
        net(colours(5).images_NCHW)


def test_folders_of_an_evaluation_may_be_given(tmp_path):
    """The features are those of the run's own training images, wherever they are now."""
    folder = write_folder(tmp_path / "photos")
    trained = trained_on(folder, tmp_path)
    folder.rename(tmp_path / "moved")
    moved = Folders(data=tmp_path / "moved")
    found = evaluate(trained.best, "validation", moved, "cpu", IMAGES)
    assert "own classifier" in evaluation_text(found)


def test_what_depends_on_images_alone_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "LEAST_KEPT", 20)
    monkeypatch.setattr(features_module, "MOST_KEPT_FILES", 2)
    folder, measured = tmp_path / "cache" / "measured", []

    def measure(num, *facts, seed=0):
        measured.clear()
        for path in folder.glob("*"):  # a clock's tick may be longer than all of this takes
            before = path.stat().st_mtime_ns - 10**9
            os.utime(path, ns=(before, before))

        def compute():
            measured.append(facts)
            return torch.arange(3.0) + num

        return kept(colours(num, seed=seed), facts, compute).tolist()

    assert [measure(20, "a"), len(measured)] == [[20, 21, 22], 1]
    assert [measure(20, "a"), len(measured)] == [[20, 21, 22], 0]
    # other facts, other images, too few images to be kept
    for others in ((20, "b", 0), (20, "a", 1), (19, "a", 0), (19, "a", 0)):
        num, fact, seed = others
        assert [measure(num, fact, seed=seed)[0], len(measured)] == [num, 1]
    assert len(list(folder.iterdir())) == 2
    assert [measure(20, "b")[0], len(measured)] == [20, 0]
    [path] = [path for path in folder.iterdir() if path.stat().st_mtime_ns == newest(folder)]
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:50], b""):
        path.write_bytes(damaged)
        assert [measure(20, "b"), len(measured)] == [[20, 21, 22], 1]
        assert [measure(20, "b"), len(measured)] == [[20, 21, 22], 0]
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "file"))
    assert [measure(20, "a"), len(measured)] == [[20, 21, 22], 1]


def newest(folder):
    return max(path.stat().st_mtime_ns for path in folder.iterdir())


def test_a_folded_network_is_the_same_function():
    net = shipped_features().net
    images_NCHW = load_split("validation", dataset="drawn").pixels(slice(200))
    plain, folded = net.features(images_NCHW), net.folded().features(images_NCHW)
    assert torch.allclose(plain, folded, rtol=1e-4, atol=1e-5)
    assert plain.std() > 0.1
