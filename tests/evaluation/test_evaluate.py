"""The evaluator: what it reports holds for real images, known models and chosen parts."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import idx_bytes, write_idx_folder

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, binarized, load_split
from vae_hyperband.data.synthetic import sample_factors
from vae_hyperband.evaluation import features as features_module
from vae_hyperband.evaluation.bounds import (
    entropy_floor,
    eval_dataloader,
    eval_epoch,
    mean_image_nats,
    prior_fid,
)
from vae_hyperband.evaluation.evaluate import (
    EvaluateOptions,
    evaluate,
    evaluate_once,
    of_whole_split,
)
from vae_hyperband.evaluation.feature_net import NUM_FEATURES, accuracy
from vae_hyperband.evaluation.features import (
    WEIGHTS,
    WEIGHTS_SHA256,
    features_for,
    shipped_features,
)
from vae_hyperband.evaluation.image_quality import (
    copying,
    frechet,
    frechet_distance,
    kernel_distance,
    manifold_measures,
    moments,
    nearest,
)
from vae_hyperband.evaluation.latents import (
    dci_disentanglement,
    encode_split,
    factor_vae_score,
    knn_probe,
    linear_probe,
    mutual_information_gap,
)
from vae_hyperband.evaluation.results import Estimate, Evaluation, mean_and_error
from vae_hyperband.evaluation.samplers import (
    Prior,
    SamplerConfig,
    decode_bytes,
    generate,
    get_sampler,
)
from vae_hyperband.model.checkpoint import load_ckpt, load_model, save_ckpt
from vae_hyperband.model.likelihoods import reconstruction_nats
from vae_hyperband.reporting.tables import evaluation_text
from vae_hyperband.training.loop import fit
from vae_hyperband.training.study import row_of

QUICK = SamplerConfig(components=2, flow_epochs=2, flow_width=16, flow_depth=1)


def numbers(node):
    if isinstance(node, dict):
        return [number for value in node.values() for number in numbers(value)]
    if isinstance(node, list):
        return [number for value in node for number in numbers(value)]
    return [node] if isinstance(node, float) else []


def test_every_part_says_its_protocol_and_every_estimate_its_error(trained, small_data):
    asked = EvaluateOptions(iwae_samples=5, iwae_images=20, sampler=QUICK)
    report = evaluate(trained.best, "test", small_data, "cpu", asked)
    assert all(math.isfinite(number) for number in numbers(report.to_dict()))
    assert Evaluation.from_dict(json.loads(report.to_json()), "evaluation.json") == report
    for part in (report, report["latents"], report["images"]):
        assert len(part["protocol"]) > 20
    assert report["iwae"]["num_samples"] == 5
    assert report["iwae"]["num_images"] == 20
    gain = report["iwae"]["gain_on_these_images"]["mean"]
    assert report["iwae"]["mean"] == pytest.approx(report["bound"]["mean"] - gain)
    assert report["entropy_floor"] < report["bound"]["mean"]
    assert report["share_of_gap"] == pytest.approx(
        1 - report["nats_above_floor"] / (report["mean_image"] - report["entropy_floor"])
    )
    latents = report["latents"]
    assert latents["latent_dim"] == 4
    assert len(latents["kl_by_dimension"]) == 4
    total = sum(kl["mean"] for kl in latents["kl_by_dimension"])
    assert total == pytest.approx(report["KL_divergence"]["mean"], rel=1e-5)
    images = report["images"]
    assert {row["num_images"] for _, row in images_of(report)} == {60}
    for name in ("reconstructions", "prior", "mixture", "flow"):
        for measure in ("fid", "precision", "recall", "density", "coverage"):
            assert images[name][measure]["standard_error"] >= 0
        assert 0 <= images[name]["closer_than_held_out"]["mean"] <= 1
    text = evaluation_text(report)
    for word in ("IWAE-5 bound", "active units", "linear probe", "FID", "reconstructions", "flow"):
        assert word in text


class Inception(torch.nn.Module):
    """With the interface of inception-2015-12-05.pt: bytes in, features if asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 5)
        self.classify = torch.nn.Linear(6, 10)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        features = self.conv(img.float() / 255).amax(dim=[2, 3])
        return features if return_features else self.classify(features)


@pytest.fixture
def inception(tmp_path):
    """The network, and a TorchScript file of it."""
    torch.manual_seed(0)
    net = Inception().requires_grad_(False)
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(net).save(tmp_path / "inception.pt")
    return net, tmp_path / "inception.pt"


def test_fid_in_the_features_of_inception_for_who_has_it(trained, small_data, inception):
    net, weights = inception
    options = EvaluateOptions(
        parts=("images",), samplers=("prior",), num_generated=200, inception=weights
    )
    report = evaluate(trained.best, "test", small_data, "cpu", options)
    found = {name: row["inception_fid"]["mean"] for name, row in images_of(report)}
    real = load_split("test", small_data, "custom").images_NCHW
    model = load_model(trained.best)
    drawn = generate(model, Prior(model), 200, trained.state.config.seed)
    one, other = (
        moments(net(x.expand(-1, 3, -1, -1), return_features=True)) for x in (real, drawn)
    )
    assert found["prior"] == pytest.approx(frechet(one, other), rel=1e-4)
    assert found["real"] < found["prior"]
    assert "inception.pt" in report["images"]["protocol"]
    assert "Inception FID" in evaluation_text(report)
    assert Evaluation.from_dict(json.loads(report.to_json()), "evaluation.json") == report


def images_of(report):
    return [(name, row) for name, row in report["images"].items() if isinstance(row, dict)]


def test_a_file_that_is_no_inception_is_named(trained, small_data, tmp_path):
    for option in ("inception", "features"):
        with pytest.raises(ConfigError, match=f"--{option} is .*none.pt', but there is no such"):
            EvaluateOptions(**{option: tmp_path / "none.pt"})
    (tmp_path / "text.pt").write_text("no network")
    for name, net in {"relu.pt": torch.nn.ReLU(), "five.pt": torch.nn.Conv2d(5, 2, 3)}.items():
        with pytest.warns(DeprecationWarning, match="torch.jit.script"):
            torch.jit.script(net).save(tmp_path / name)
    for name, message in {
        "text.pt": "is not a TorchScript file",
        "relu.pt": r"gives \(60, 3, 8, 8\) for 60 images, expected features of shape \(60, F\)",
        "five.pt": r"cannot be called with bytes \(60, 1, 8, 8\)",
    }.items():
        for option in ("inception", "features"):
            options = EvaluateOptions(parts=("images",), **{option: tmp_path / name})
            with pytest.raises(CheckpointError, match=rf"{name} {message}"):
                evaluate(trained.best, "test", small_data, "cpu", options)


def test_the_iwae_bound_of_a_split_from_what_some_images_gain():
    stream = generator(0, "test")
    found, errors = [], []
    for _ in range(1000):
        bound_N = 240 + 80 * torch.randn(500, generator=stream)
        gain_n = 3 + 0.02 * (bound_N[:50] - 240) + torch.randn(50, generator=stream)
        estimate = of_whole_split(bound_N, bound_N[:50] - gain_n)
        found.append(estimate.mean)
        errors.append(estimate.standard_error)
    assert sum(found) / 1000 == pytest.approx(237, abs=4 * 3.6 / math.sqrt(1000))
    assert sum(errors) / 1000 == pytest.approx(torch.tensor(found).std().item(), rel=0.08)
    iwae_N = bound_N - torch.rand(500, generator=stream)  # of all images: a plain mean
    plain = dataclasses.astuple(mean_and_error(iwae_N))
    found = dataclasses.astuple(of_whole_split(bound_N, iwae_N))
    assert found == pytest.approx(plain, rel=1e-5)


def measures(report, name):
    """The measures of a kind of images."""
    row = report["images"][name]
    return {key: Estimate(**value) for key, value in row.items() if key != "num_images"}


def test_every_row_of_images_is_what_its_name_says(trained, small_data):
    options = EvaluateOptions(parts=("images",), num_generated=40, sampler=QUICK)
    report = evaluate(trained.best, "test", small_data, "cpu", options)
    train, test = (load_split(name, small_data, "custom") for name in ("train", "test"))
    model, seed = load_model(trained.best), trained.state.config.seed
    of = features_for("custom", train)
    train_PF, real_NF = (of(split.images_NCHW) for split in (train, test))
    mu_NZ = encode_split(model, eval_dataloader(test)).mu_NZ

    def drawn(name):
        sampler = get_sampler(name, load_ckpt(trained.best), lambda: train, QUICK)
        return generate(model, sampler, 40, seed)

    for name, images in {
        "reconstructions": decode_bytes(model, mu_NZ[:40]),
        **{name: drawn(name) for name in ("prior", "mixture", "flow")},
    }.items():
        features = of(images)
        near = [nearest(x, train_PF, 1)[0][:, 0] for x in (features, real_NF)]
        expected = {
            "fid": frechet_distance(real_NF, features, seed),
            "kid": kernel_distance(real_NF, features),
            **manifold_measures(real_NF, features),
            **copying(*near),
        }
        assert measures(report, name) == expected
        assert report["images"][name]["num_images"] == 40
    assert measures(report, "prior") != measures(report, "flow")
    more = EvaluateOptions(parts=("images",), num_generated=400, samplers=("prior",), sampler=QUICK)
    rows = images_of(evaluate(trained.best, "test", small_data, "cpu", more))
    assert {name: row["num_images"] for name, row in rows} == {
        "real": 300, "reconstructions": 60, "prior": 400,
    }  # fmt: skip


def test_probes_are_of_the_posterior_means(trained, small_data):
    options = EvaluateOptions(parts=("latents",))
    report = evaluate(trained.best, "test", small_data, "cpu", options)["latents"]
    train, test = (load_split(name, small_data, "custom") for name in ("train", "test"))
    model = load_model(trained.best)
    latents = [encode_split(model, eval_dataloader(split)).mu_NZ for split in (train, test)]
    pixels = [split.pixels(slice(None)).flatten(1) for split in (train, test)]
    for name, probe in (("linear_probe", linear_probe), ("knn_probe", knn_probe)):
        for found, (x, y) in ((report, latents), (report["raw_pixels"], pixels)):
            expected = probe(x, train.labels_N, y, test.labels_N)
            assert Estimate(**found[name]) == expected


def test_images_of_one_class_have_no_probes(small_config, options, tmp_path):
    """An accuracy of 1.000 would say nothing of the latents."""
    data = write_idx_folder(tmp_path / "one", num_classes=1)
    trained = fit(small_config, options(data_dir=data), quiet=True)
    asked = EvaluateOptions(parts=("latents",))
    report = evaluate(trained.best, "test", data, "cpu", asked)
    assert not {"linear_probe", "knn_probe", "raw_pixels"} & set(report["latents"])
    assert "no probes, all of one class" in report["latents"]["protocol"]
    text = evaluation_text(report)
    assert "probe" not in text
    assert "mutual information" in text
    assert "linear_probe" not in row_of("x", report)


def test_each_step_says_which_of_how_many_it_is(trained, small_data):
    said = []
    options = EvaluateOptions(iwae_samples=0, samplers=("mixture",), sampler=QUICK)
    evaluate(trained.best, "test", small_data, "cpu", options, said.append)
    assert [text for text in said if not text.startswith("fitting")] == [
        "1 of 5: likelihood bounds",
        "2 of 5: latent space and probes",
        "3 of 5: features of the real images",
        "4 of 5: reconstructions",
        "5 of 5: images from the mixture",
    ]
    said.clear()
    options = EvaluateOptions(parts=("latents",))
    evaluate(trained.best, "test", small_data, "cpu", options, said.append)
    assert said == ["1 of 1: latent space and probes"]


def test_factors_are_those_of_the_split(options):
    config = TrainConfig(dataset="drawn", latent_dim=3, epochs=1)
    trained = fit(config, options(data_dir=None), quiet=True)
    asked = EvaluateOptions(parts=("latents",))
    found = evaluate(trained.best, "validation", None, "cpu", asked)["latents"]["factors"]
    split = load_split("validation", None, "drawn")
    mu_NZ = encode_split(load_model(trained.best), eval_dataloader(split)).mu_NZ
    levels_NF = sample_factors("validation", len(split))
    assert found["mig"] == mutual_information_gap(mu_NZ, levels_NF)
    assert found["mig"] != mutual_information_gap(mu_NZ, sample_factors("train", len(split)))
    assert found["factor_vae_score"] == factor_vae_score(mu_NZ, levels_NF, config.seed)
    assert found["dci"] == dci_disentanglement(mu_NZ, levels_NF, config.seed)


def test_training_images_say_nothing_of_probes_and_images(trained, small_data):
    with pytest.raises(ConfigError, match="Probes and image metrics need a held-out split"):
        evaluate(trained.best, "train", small_data, "cpu")
    options = EvaluateOptions(parts=("likelihood",), iwae_samples=0)
    report = evaluate(trained.best, "train", small_data, "cpu", options)
    assert report["num_images"] == 300


def test_only_the_parts_asked_for_are_there(trained, small_data):
    for part, names in {
        "likelihood": {"bound", "iwae"},
        "latents": {"latents"},
        "images": {"images"},
    }.items():
        asked = EvaluateOptions(parts=(part,), samplers=("prior",), iwae_samples=2)
        report = evaluate(trained.best, "validation", small_data, "cpu", asked)
        assert evaluation_text(report)
        report = report.to_dict()
        assert names <= set(report)
        others = {"bound", "iwae", "latents", "images"} - names
        assert not others & set(report)
    asked = EvaluateOptions(parts=("likelihood",), iwae_samples=0)
    report = evaluate(trained.best, "validation", small_data, "cpu", asked)
    assert "iwae" not in report.to_dict()


def test_an_evaluation_is_kept_until_the_labels_change(tmp_path, options, small_config):
    """Probes depend on them; the images and the checkpoint are the same."""
    folder = write_idx_folder(tmp_path / "data")
    place = options(run="a", data_dir=folder)
    trained = fit(small_config, place, quiet=True)
    asked = EvaluateOptions(parts=("latents",))
    path, said = tmp_path / "evaluation.json", []

    def once():
        return evaluate_once(path, trained.best, "validation", place, asked, said.append)

    first = once()
    assert once() == first
    assert len(said) == 1
    labels = folder / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:8] + content[:7:-1])
    os.utime(labels, (1, 1))  # files are read again when their time differs
    again = once()
    assert len(said) == 2
    assert again.data_digest != first.data_digest


def test_a_split_of_one_image_keeps_what_one_image_can_say(tmp_path, options, small_config):
    folder = write_idx_folder(tmp_path / "data", num_test=1)
    trained = fit(small_config, options(run="a", data_dir=folder), quiet=True)
    said = []
    found = evaluate(trained.best, "test", folder, "cpu", EvaluateOptions(), said.append)
    assert found.likelihood
    assert (found.latents, found.images) == (None, None)
    assert "images left out: they need 10 images, and the split has 1" in said
    asked, place = EvaluateOptions(), options(run="a", data_dir=folder)
    for _ in range(2):
        evaluate_once(tmp_path / "e.json", trained.best, "test", place, asked, said.append)
    assert sum("images left out" in text for text in said) == 2  # the third call found a file


@pytest.mark.parametrize("level", [0, 128])
def test_images_that_do_not_differ_have_defined_values_or_a_reason(
    level, tmp_path, options, small_config, inception
):
    data = write_idx_folder(tmp_path / "data")
    for name, num in (("train", 360), ("t10k", 60)):
        images = np.full((num, 8, 8), level)
        (data / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    config = dataclasses.replace(small_config, epochs=1, holdout="last")
    trained = fit(config, options(run="equal", data_dir=data), quiet=True)
    asked = EvaluateOptions(iwae_samples=2, samplers=("prior", "mixture"), sampler=QUICK)
    said = []
    found = evaluate(trained.best, "validation", data, "cpu", asked, said.append)
    assert found.images is None
    assert "a classifier of equal images has learned nothing: give --features" in said[0]
    asked = dataclasses.replace(asked, features=inception[1])
    found = evaluate(trained.best, "validation", data, "cpu", asked)
    values = numbers(found.to_dict())
    assert all(math.isfinite(value) and abs(value) < 1e4 for value in values)
    assert found.images.kinds["real"].fid.mean == pytest.approx(0, abs=1e-6)
    assert found.images.kinds["real"].precision is None
    assert found.likelihood.share_of_gap is None
    said = evaluation_text(found)
    assert "no gap from here to the floor: the images hardly differ" in said
    assert "no precision to coverage: each image of the split equals its 5 nearest ones" in said
    assert Evaluation.from_dict(json.loads(found.to_json()), "evaluation.json") == found


def test_a_part_that_nobody_asked_for_is_not_measured_instead_of_one_left_out(
    tmp_path, options, small_config
):
    folder = write_idx_folder(tmp_path / "data", num_test=1)
    place = options(run="a", data_dir=folder)
    trained = fit(small_config, place, quiet=True)
    said, asked = [], EvaluateOptions(parts=("images", "latents"))
    for _ in range(2):
        found = evaluate_once(tmp_path / "e.json", trained.best, "test", place, asked, said.append)
        assert (found.likelihood, found.latents, found.images) == (None, None, None)
    assert len(said) == 2  # what is left out, once; the second call found a file
    assert evaluation_text(found) == "test split, 1 image; mean +- standard error"


def test_a_collapsed_model_is_called_that(trained, small_data):
    content = load_ckpt(trained.best)
    for name in ("encoder.fc_mu.weight", "encoder.fc_logvar.weight"):
        content.model_state[name].zero_()
    save_ckpt(trained.best, content)
    report = evaluate(
        trained.best, "validation", small_data, "cpu", EvaluateOptions(parts=("latents",))
    )
    assert report["latents"]["collapsed"]
    assert report["latents"]["active_units"] == 0
    assert report["latents"]["mutual_information"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "COLLAPSED" in evaluation_text(report)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parts": ()}, "--parts needs at least one part"),
        ({"parts": ("fid",)}, "must be one of"),
        ({"num_generated": 3}, "--num-generated is 3"),
        ({"iwae_samples": -1}, "--iwae-samples is -1"),
        ({"iwae_images": 1}, "--iwae-images is 1"),
        ({"samplers": ("gan",)}, "must be one of"),
    ],
)
def test_options_without_sense_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        EvaluateOptions(**changes)
    with pytest.raises(ConfigError, match="--flow-epochs is 0"):
        SamplerConfig(flow_epochs=0)


def test_the_mean_image_is_a_model_that_ignores_z(small_data):
    """A decoder that gives the training images' mean whatever z is has that reconstruction."""
    train, held_out = (load_split(name, small_data, "custom") for name in ("train", "validation"))
    x_PCHW = train.pixels(slice(None)).double()
    p = (x_PCHW.sum(dim=0) + 1) / (len(x_PCHW) + 2)
    x_NCHW = held_out.pixels(slice(None)).double()
    expected = reconstruction_nats(p.logit().expand(len(x_NCHW), -1, -1, -1), x_NCHW).mean().item()
    assert mean_image_nats(train.pixels(slice(None)), x_NCHW) == pytest.approx(expected, rel=1e-9)


def test_the_published_anchors_of_fashion_mnist(fashion_mnist):
    """Measured apart from this code: entropy 189.86 nats, mean image 385.02 (test split)."""
    train, test = (load_split(name).pixels(slice(None)) for name in ("train", "test"))
    assert entropy_floor(test) == pytest.approx(189.86, abs=0.005)
    assert mean_image_nats(train, test) == pytest.approx(385.02, abs=0.1)


def test_the_shipped_features_classify_fashion_mnist(fashion_mnist):
    split = load_split("test")
    right = accuracy(shipped_features().net, split)
    assert right >= 0.925
    root = Path(__file__).parents[2]
    said = json.loads((root / "benchmarks/feature_net.json").read_text())
    assert right == pytest.approx(said["test_accuracy"], abs=3e-4)
    assert said["sha256"] == WEIGHTS_SHA256
    assert WEIGHTS.stat().st_size < 2_000_000


def test_features_of_training_images_have_variance_one(fashion_mnist):
    features_NF = shipped_features()(load_split("train").subset(torch.arange(5000)).images_NCHW)
    assert features_NF.shape == (5000, NUM_FEATURES)
    assert features_NF.var(dim=0).mean().item() == pytest.approx(1, abs=0.05)


def test_features_of_bytes_are_those_of_floats(small_data):
    split = load_split("validation", small_data, "custom")
    floats = shipped_features()(split.pixels(slice(None)))
    assert torch.allclose(shipped_features()(split.images_NCHW), floats, atol=1e-4)
    with pytest.raises(ConfigError, match="are of images with 1 channel, these have 3"):
        shipped_features()(torch.zeros(2, 3, 8, 8))


def test_other_weights_are_refused(tmp_path, monkeypatch):
    other = tmp_path / "weights.safetensors"
    other.write_bytes(WEIGHTS.read_bytes()[:-1] + b"x")
    for path in (other, tmp_path / "none"):
        monkeypatch.setattr(features_module, "WEIGHTS", path)
        with pytest.raises(CheckpointError, match="install the package again"):
            shipped_features.__wrapped__()


def test_validation_measures_the_prior_s_fid_if_asked(trained, small_data):
    split = load_split("validation", small_data, "custom")
    model, loader = load_model(trained.best), eval_dataloader(split)
    features = features_for("custom", load_split("train", small_data, "custom"))
    found = eval_epoch(model, loader, seed=3, fid_samples=50, features=features)["fid"]
    with pytest.raises(ConfigError, match="not the features to compare images in"):
        eval_epoch(model, loader, seed=3, fid_samples=50)
    assert "fid" not in eval_epoch(model, loader, seed=3)
    images_NCHW = model.sample(50, generator(3, "fid"))
    by_hand = frechet(moments(features(split.images_NCHW)), moments(features(images_NCHW)))
    assert found == pytest.approx(by_hand, rel=1e-3)
    assert found == prior_fid(model, loader, 3, 50, features)  # the real images' moments are kept


def test_bits_are_drawn_once_and_with_the_grey_value_as_probability():
    grey = torch.tensor([0, 51, 128, 255], dtype=torch.uint8)
    split = Split(grey.repeat(10_000, 1)[:, None, None], torch.zeros(10_000).long(), "grey")
    bits = binarized(split)
    assert bits.images_NCHW.unique().tolist() == [0, 255]
    shares = (bits.images_NCHW == 255).double().mean(dim=(0, 1, 2))
    assert shares.tolist() == pytest.approx([0, 0.2, 128 / 255, 1], abs=0.02)
    assert torch.equal(binarized(split).images_NCHW, bits.images_NCHW)
    assert bits.digest == binarized(split).digest != "grey"
    assert entropy_floor(bits.pixels(slice(None))) == 0


def test_a_model_of_bits_trains_on_new_ones_and_is_judged_on_fixed_ones(
    options, small_config, small_data
):
    config = dataclasses.replace(small_config, binarize="dynamic")
    trained = fit(config, options(run="bits"), quiet=True)
    report = evaluate(
        trained.best, "validation", small_data, "cpu", EvaluateOptions(parts=("likelihood",))
    )
    bits = binarized(load_split("validation", small_data, "custom"))
    assert report["entropy_floor"] == 0
    assert bits.digest in report["protocol"]
    assert report["bound"]["mean"] == pytest.approx(trained.state.best["bound"], rel=1e-6)
    again = fit(config, options(run="again"), quiet=True)
    grey = fit(small_config, options(run="grey"), quiet=True)
    weight = "encoder.conv1.weight"
    one, two, three = (x.state.model.state_dict()[weight] for x in (trained, again, grey))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    with pytest.raises(ConfigError, match="FID compares grey images"):
        TrainConfig(binarize="dynamic", fid_samples=100)
