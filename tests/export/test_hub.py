"""The folder for model hubs: weights, arguments and a card, which they and we read."""

import dataclasses
import inspect
import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard

from vae_hyperband.common.errors import CheckpointError
from vae_hyperband.evaluation.results import Evaluation
from vae_hyperband.export.hub import card, write_shared
from vae_hyperband.model.checkpoint import load_ckpt, load_model
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.model.vae import VAE
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit

GOLDEN = Path(__file__).parents[1] / "golden/evaluation.json"


@pytest.fixture(scope="module")
def ckpt(trained_once):
    return trained_once.best


@pytest.fixture
def hub(ckpt, tmp_path):
    out = tmp_path / "hub"
    assert main(["export", str(ckpt), "--format", "safetensors", "--out", str(out)]) == 0
    return out


def test_load_model_takes_what_export_wrote(ckpt, hub):
    ours, theirs = load_model(ckpt).state_dict(), load_model(hub).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_kind_of_model_is_written_and_read(options, small_config, tmp_path):
    import dataclasses

    for i, settings in enumerate(
        [{"prior": "vamp", "pseudo_inputs": 3}, {"likelihood": "discretized-logistic"}]
    ):
        config = dataclasses.replace(small_config, epochs=1, **settings)
        best, out = fit(config, options(run=f"r{i}")).best, tmp_path / f"hub{i}"
        assert main(["export", str(best), "--format", "safetensors", "--out", str(out)]) == 0
        x = torch.rand(3, 1, 8, 8)
        torch.testing.assert_close(load_model(out).reconstruct(x), load_model(best).reconstruct(x))


def test_the_card_tells_data_metrics_licence_and_weights(ckpt, tmp_path, small_data):
    report, out = tmp_path / "report.json", tmp_path / "hub"
    data = ["--data-dir", str(small_data)]
    command = ["evaluate", str(ckpt), "--parts", "likelihood", "--json", str(report), *data]
    assert main([*command, "--split", "test"]) == 0
    command = ["export", str(ckpt), "--format", "safetensors", "--out", str(out)]
    assert main([*command, "--evaluation", str(report), "--license", "cc-by-4.0"]) == 0
    card, content = (out / "README.md").read_text(), load_ckpt(ckpt)
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: vae-hyperband\n")
    assert f"`{content.data.digest}`" in card
    assert '"objective": "elbo"' in card
    assert "capacity" not in card  # no setting of this objective
    assert f"`{content.weights_digest}`" in card
    assert "test split, 60 images" in card
    bound = json.loads(report.read_text())["bound"]["mean"]
    assert math.isfinite(bound)
    assert f"{bound:.2f} +- " in card


def head(folder):
    """The YAML between the first two lines of dashes, which hubs read."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_without_an_evaluation_the_head_of_the_card_has_no_numbers(hub):
    found = head(hub)
    assert found["pipeline_tag"] == "unconditional-image-generation"  # one of the hub's tasks
    assert found["license"] == "other"  # of images that are not this package's
    assert found["library_name"] == "vae-hyperband"
    assert "model-index" not in found


@pytest.mark.parametrize("given", [False, True], ids=["beside the logs", "as an option"])
def test_the_head_of_the_card_has_the_evaluation_where_hubs_look(ckpt, tmp_path, small_data, given):
    checkpoint = load_ckpt(ckpt)
    golden = json.loads(GOLDEN.read_text())
    golden["checkpoint_digest"] = checkpoint.digest
    golden["images"]["prior"]["fid"]["mean"] = math.nan  # no number: left out
    golden["bits_per_dimension"] = {"mean": 3.25, "standard_error": 0.25}
    golden["images"]["flow"]["inception_fid"] = {"mean": 12.5, "standard_error": 0.5}
    logs = tmp_path / "logs" / ckpt.parent.name
    logs.mkdir(parents=True)
    (logs / "evaluation.json").write_text(json.dumps(golden | {"split": "validation"}))
    (logs / "evaluation-test.json").write_text(json.dumps(golden))
    argv = ["export", str(ckpt), "--format", "safetensors", "--out", str(tmp_path / "hub")]
    argv += ["--logs-dir", str(logs.parent)]
    if given:
        argv += ["--evaluation", str(logs / "evaluation.json")]
    assert main(argv) == 0
    [entry] = head(tmp_path / "hub")["model-index"]
    read = ModelCard.load(tmp_path / "hub/README.md").data  # raises for what hubs cannot read
    assert read.model_name == entry["name"] == "vae-custom-z4-beta1"
    [result] = entry["results"]
    assert result["task"] == {"type": "unconditional-image-generation"}
    split = "validation" if given else "test"
    assert result["dataset"] == {"type": "custom", "name": "custom images", "split": split}
    kinds = ["bound", "recon_loss", "KL_divergence", "bits_per_dimension", "iwae_bound"]
    kinds += 3 * ["fid_fashion_mnist_features"] + ["fid"]
    assert [metric["type"] for metric in result["metrics"]] == kinds
    assert [metric.metric_type for metric in read.eval_results] == kinds
    found = {metric["name"]: metric["value"] for metric in result["metrics"]}
    name = "bound (beta = 1), nats per image, bernoulli likelihood"
    assert found[name] == pytest.approx(golden["bound"]["mean"], abs=1e-4)
    assert found["bound (beta = 1), bits per dimension, bernoulli likelihood"] == 3.25
    name = "FID (Fashion-MNIST features), mixture, 60 images"
    assert found[name] == pytest.approx(golden["images"]["mixture"]["fid"]["mean"], abs=1e-4)
    assert found["FID (Inception features), flow, 60 images"] == 12.5


def test_evaluations_of_other_weights_are_not_in_the_card(ckpt, tmp_path):
    logs = tmp_path / "logs" / ckpt.parent.name
    logs.mkdir(parents=True)
    shutil.copy2(GOLDEN, logs)
    argv = ["export", str(ckpt), "--format", "safetensors", "--out", str(tmp_path / "hub")]
    assert main([*argv, "--logs-dir", str(logs.parent)]) == 0
    assert "model-index" not in head(tmp_path / "hub")


def test_a_damaged_evaluation_that_nobody_named_costs_the_card_its_numbers(ckpt, tmp_path, capsys):
    logs = tmp_path / "logs" / ckpt.parent.name
    logs.mkdir(parents=True)
    (logs / "evaluation.json").write_bytes(GOLDEN.read_bytes()[:100])
    argv = ["export", str(ckpt), "--format", "safetensors", "--out", str(tmp_path / "hub")]
    assert main([*argv, "--logs-dir", str(logs.parent)]) == 0
    assert "note: " in capsys.readouterr().err
    assert "model-index" not in head(tmp_path / "hub")
    assert main([*argv, "--evaluation", str(logs / "evaluation.json")]) == 2


def test_data_that_hubs_have_are_named_as_they_are_there(ckpt, tmp_path):
    checkpoint = load_ckpt(ckpt)
    config = dataclasses.replace(checkpoint.config, dataset="fashion-mnist")
    checkpoint = dataclasses.replace(checkpoint, config=config)
    evaluation = Evaluation.from_dict(json.loads(GOLDEN.read_text()), "golden")
    write_shared(checkpoint, tmp_path, "mit", evaluation)
    [entry] = head(tmp_path)["model-index"]
    name = "zalando-datasets/fashion_mnist"
    assert entry["results"][0]["dataset"] == {
        "type": name, "name": "Fashion-MNIST", "split": "test"
    }  # fmt: skip
    assert head(tmp_path)["datasets"] == [name]


def test_numbers_of_the_card_agree_with_their_nouns(ckpt):
    checkpoint = load_ckpt(ckpt)
    once = dataclasses.replace(checkpoint, epoch=1, step=1)
    assert "Trained for 1 epoch (1 step) with" in card(once, once.model(), "mit", None)
    often = dataclasses.replace(checkpoint, epoch=10, step=4_300)
    assert "Trained for 10 epochs (4,300 steps) with" in card(often, often.model(), "mit", None)


HUB_MODELS = {
    "plain": {"latent_dim": 16},
    "vamp": {"prior": "vamp", "pseudo_inputs": 3},
    "logistic": {"likelihood": "discretized-logistic"},
    "continuous": {"likelihood": "continuous-bernoulli"},
    "gaussian": {"likelihood": "gaussian", "sigma": 0.25},
    "laplace": {"likelihood": "laplace"},
}


@pytest.mark.parametrize("settings", HUB_MODELS.values(), ids=HUB_MODELS)
def test_the_mixin_of_the_hub_s_library_builds_the_model(ckpt, tmp_path, settings):
    """PyTorchModelHubMixin, as huggingface_hub 2.4 has it: arguments from the top level of
    config.json, weights not strict. Run against the library itself as well, by hand."""
    checkpoint = load_ckpt(ckpt)
    config = dataclasses.replace(checkpoint.config, **settings)
    size = checkpoint.data.image_shape[1]
    more = {name: settings[name] for name in ("pseudo_inputs", "sigma") if name in settings}
    model = initialized_vae(
        config.latent_dim, size, 1, seed=5, likelihood=config.likelihood, **more
    )
    state = model.state_dict()
    write_shared(
        dataclasses.replace(checkpoint, config=config, model_state=state), tmp_path, "mit", None
    )
    content = json.loads((tmp_path / "config.json").read_text())
    names = inspect.signature(VAE.__init__).parameters
    built = VAE(**{name: content[name] for name in names if name in content})
    safetensors.torch.load_model(built, tmp_path / "model.safetensors", strict=False)
    for attribute in ("latent_dim", "image_size", "channels", "likelihood", "sigma"):
        assert getattr(built, attribute) == getattr(model, attribute)
    assert list(built.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())
    x = torch.rand(3, 1, size, size)
    assert torch.equal(load_model(tmp_path).reconstruct(x), built.eval().reconstruct(x))


def test_a_folder_of_version_1_is_still_read(ckpt, hub):
    """In version 1, as 0.1 wrote it, the arguments of the model are in an object of their own."""
    content = json.loads((hub / "config.json").read_text())
    names = ("latent_dim", "image_size", "channels", "likelihood", "pseudo_inputs")
    older = {"format": content["format"], "version": 1}
    older["model"] = {name: content.pop(name) for name in names}
    (hub / "config.json").write_text(json.dumps(older | {"weights": content["weights"]}))
    ours, theirs = load_model(ckpt).state_dict(), load_model(hub).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_evaluation_of_another_checkpoint_is_refused(ckpt, tmp_path, capsys):
    shutil.copy2(GOLDEN, tmp_path / "other.json")
    command = ["export", str(ckpt), "--format", "safetensors", "--out", str(tmp_path / "hub")]
    assert main([*command, "--evaluation", str(tmp_path / "other.json")]) == 2
    assert f"other.json is not an evaluation of {ckpt}" in capsys.readouterr().err
    assert main([*command, "--license", "MIT licence\n- x"]) == 2
    assert "--license" in capsys.readouterr().err


def _flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _convert(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: x.bfloat16() for name, x in tensors.items()}, path)


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "a flipped bit": (_flip_a_bit, "is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model that can"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "no model that can"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
        "no model that can",
    ),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "no model that can"),
    "not ours": (lambda folder: (folder / "config.json").write_text("[]"), "not of a model of"),
    "of another size": (
        lambda folder: _edit(folder, latent_dim=5),
        "of another model",
    ),
    "no description": (
        lambda folder: _edit(folder, version=1, model={"size": 5}),
        "describes no model",
    ),
    "impossible": (lambda folder: _edit(folder, latent_dim=0), "describes no model"),
    "another likelihood": (
        lambda folder: _edit(folder, likelihood="continuous-bernoulli"),
        "is damaged",
    ),
    "no likelihood": (lambda folder: _edit(folder, likelihood="none"), "describes no model"),
    "a list of them": (lambda folder: _edit(folder, likelihood=[]), "describes no model"),
    "fewer than none": (lambda folder: _edit(folder, pseudo_inputs=-1), "describes no model"),
    "too many": (lambda folder: _edit(folder, pseudo_inputs=10**18), "describes no model"),
    "far too many": (lambda folder: _edit(folder, channels=10**30), "describes no model"),
    "deep": (
        lambda folder: (folder / "config.json").write_text("[" * 10**6),
        "no model that can",
    ),
    "of other numbers": (lambda folder: _convert(folder), "bfloat16, but this package.s models"),
    "of tomorrow": (lambda folder: _edit(folder, version=3), "newer vae-hyperband"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_sentence(hub, damage):
    harm, said = DAMAGES[damage]
    harm(hub)
    with pytest.raises(CheckpointError, match=said):
        load_model(hub)


def test_other_libraries_read_the_weights_without_us(ckpt, hub):
    tensors = safetensors.torch.load_file(hub / "model.safetensors")
    weight = load_ckpt(ckpt).model_state["encoder.conv1.weight"]
    assert torch.equal(tensors["encoder.conv1.weight"], weight)
