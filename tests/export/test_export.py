"""What ``export`` writes computes what the checkpoint's model does, and is read back."""

import dataclasses
import json
import re
import resource
import sys
from pathlib import Path

import mpmath
import numpy as np
import onnxruntime
import pytest
import torch

import vae_hyperband
from vae_hyperband.common.config import NETWORKS, RunOptions, TrainConfig
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.evaluation.flow import VelocityNet
from vae_hyperband.evaluation.samplers import sampler_file
from vae_hyperband.export.onnx_export import (
    decoder_graph,
    encoder_graph,
    largest_difference,
    velocity_graph,
)
from vae_hyperband.model import networks
from vae_hyperband.model.checkpoint import load_ckpt, save_ckpt
from vae_hyperband.model.initialization import initialize, initialized_vae
from vae_hyperband.model.likelihoods import pixel_means
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, small_data):
    folder = tmp_path_factory.mktemp("export")
    config = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=1, seed=3)
    where = RunOptions(
        run="a", device="cpu", num_threads=1, data_dir=small_data,
        checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs",
    )  # fmt: skip
    return fit(config, where).best


ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/network.md").read_text()
[EXAMPLE] = re.findall(r"```python\n(# the module my_network\n.*?)```", GUIDE, re.DOTALL)

#: Encoders that PyTorch cannot export for every batch.
NOT_EXPORTED = """

class FixedBatch(Encoder):
    def forward(self, x):
        return super().forward(x.reshape(2, -1))


class ByValue(Encoder):
    def forward(self, x):
        return super().forward(x if x.mean() > 0.5 else -x)


def fixed_batch(latent_dim, image_shape):
    return FixedBatch(latent_dim, image_shape), dense(latent_dim, image_shape)[1]


def by_value(latent_dim, image_shape):
    return ByValue(latent_dim, image_shape), dense(latent_dim, image_shape)[1]
"""


@pytest.fixture(autouse=True, scope="module")
def own_networks(tmp_path_factory):
    """The module own_networks: the guide's example and what cannot be exported."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "own_networks.py").write_text(EXAMPLE + NOT_EXPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "_allowed", {})
        for name in ("dense", "fixed_batch", "by_value"):
            networks.allow_network(f"own_networks:{name}", str(folder))
        yield
    sys.modules.pop("own_networks", None)


#: Each family and size. The mean of a pixel is the sigmoid but for the second; of a prior, a graph
#: has nothing.
MODELS = {
    "bernoulli": {},
    "continuous": {"likelihood": "continuous-bernoulli"},
    "logistic": {"likelihood": "discretized-logistic", "channels": 3, "image_size": 32},
    "vamp": {"pseudo_inputs": 3},
    "one dimension": {"latent_dim": 1, "image_size": (1, 5)},
    "padded": {"channels": 3, "image_size": (33, 47), "widths": (8, 12, 16)},
    "residual": {"network": "residual", "widths": (8, 12)},
    "residual, padded": {
        "network": "residual", "channels": 3, "image_size": (33, 47), "widths": (8, 12, 16),
    },
    "own": {"network": "own_networks:dense", "channels": 3, "image_size": (9, 14)},
}  # fmt: skip


def vae(**settings):
    model = initialized_vae(
        **({"latent_dim": 16, "image_size": 28, "channels": 1, "seed": 0} | settings)
    ).eval()
    with torch.no_grad():
        if model.network == "conv":
            last = getattr(model.decoder, model.decoder.convs[-1])
            last.weight.mul_(20)  # logits from -40 to 40 and near 0
        if model.network in NETWORKS:  # clamped
            model.encoder.fc_logvar.bias.copy_(torch.linspace(-30, 30, model.latent_dim))
    return model


def run(graph, **feeds):
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_onnx_runtime_computes_what_pytorch_does(settings):
    model = vae(**settings)
    encoder, decoder = encoder_graph(model, {}), decoder_graph(model, {})
    stream = torch.Generator().manual_seed(1)
    for num in (1, 2, 16):
        x_BCHW = torch.rand(num, *model.image_shape, generator=stream)
        z_BZ = 2 * torch.randn(num, model.latent_dim, generator=stream)
        mu_BZ, logvar_BZ = model.encode(x_BCHW)
        found = run(encoder, x=x_BCHW)
        torch.testing.assert_close(found["mu"], mu_BZ, rtol=0, atol=1e-5)
        torch.testing.assert_close(found["logvar"], logvar_BZ, rtol=0, atol=1e-5)
        found = run(decoder, z=z_BZ)
        torch.testing.assert_close(found["logits"], model.decode(z_BZ), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["image"], model.decode_images(z_BZ), rtol=0, atol=1e-5)


@torch.no_grad()
def test_onnx_runtime_computes_a_flow_s_velocity():
    stream = torch.Generator().manual_seed(1)
    net = initialize(VelocityNet(5, num_labels=3, width=24, depth=2), stream)
    for block in net.blocks:
        torch.nn.init.normal_(block.norm.weight, 1, 0.3, generator=stream)
        torch.nn.init.normal_(block.norm.bias, 0, 0.3, generator=stream)
    z_BZ, t_B = torch.randn(7, 5, generator=stream), torch.rand(7, generator=stream)
    label_B = torch.arange(7) % 3
    kinds = torch.nn.functional.one_hot(label_B).float()
    found = run(velocity_graph(net), z=z_BZ, t=t_B[:, None], label=kinds)
    torch.testing.assert_close(found["v"], net(z_BZ, t_B, label_B), rtol=0, atol=1e-5)


@torch.no_grad()
def test_continuous_bernoulli_means_are_exact_for_every_logit():
    """The graph has the series near 0 that the model has."""
    size = torch.cat((torch.logspace(-20, 6, 200), torch.linspace(0.9, 1.1, 201)))
    size = torch.cat((size, torch.linspace(0.1, 90, 300)))
    logits = torch.cat((-size, torch.zeros(1), size))
    model = vae(latent_dim=1, image_size=4, channels=len(logits), likelihood="continuous-bernoulli")
    for parameter in model.decoder.parameters():
        parameter.zero_()
    model.decoder.conv_t2.bias.copy_(logits)  # of a channel each: all that remains
    image = run(decoder_graph(model, {}), z=torch.zeros(1, 1))["image"][0, :, 0, 0]
    expected = []
    with mpmath.workdps(60):
        for logit in map(mpmath.mpf, logits.tolist()):
            expected.append(float(1 / (1 - mpmath.exp(-logit)) - 1 / logit if logit else 0.5))
    assert np.abs(image.double().numpy() / expected - 1).max() < 1e-6
    ours = pixel_means(logits, "continuous-bernoulli")
    torch.testing.assert_close(image, ours, rtol=5e-7, atol=0)


def test_a_graph_is_of_its_weights_and_facts_alone():
    first, second = (encoder_graph(vae(), {"a": "b"}).SerializeToString() for _ in range(2))
    assert first == second
    here = Path(vae_hyperband.__file__).parent
    assert not any(str(path).encode() in first for path in (here, Path(torch.__file__).parent))
    assert b"site-packages" not in first


def test_a_graph_that_computes_something_else_is_refused():
    model, other = vae(), vae(seed=1)
    encoder, decoder = (
        graph(model, {}).SerializeToString() for graph in (encoder_graph, decoder_graph)
    )
    assert largest_difference(model, encoder, decoder) < 1e-5
    of_other = encoder_graph(other, {}).SerializeToString()
    with pytest.raises(CheckpointError, match="other values"):
        largest_difference(model, of_other, decoder)
    with pytest.raises(CheckpointError, match="ONNX Runtime cannot compute this model"):
        largest_difference(model, encoder, b"no graph")


@pytest.mark.parametrize("forward", ["fixed_batch", "by_value"])
def test_an_own_network_that_cannot_be_exported_is_one_sentence(forward, capfd):
    model = vae(network=f"own_networks:{forward}")
    with pytest.raises(ConfigError) as error:
        encoder_graph(model, {})
    said = str(error.value)
    assert said.startswith("PyTorch cannot export this model's encoder to ONNX for batches of any")
    assert len(said.splitlines()) == 1
    assert "--format safetensors" in said
    assert capfd.readouterr() == ("", "")  # PyTorch would print its graphs


def test_onnx_files_say_which_weights_they_are_of(ckpt, tmp_path, capsys):
    out = tmp_path / "made" / "onnx"
    assert main(["export", str(ckpt), "--format", "onnx", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "encoder.onnx"), str(out / "decoder.onnx")]
    session = onnxruntime.InferenceSession(out / "decoder.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    content = load_ckpt(ckpt)
    assert facts["weights"] == content.weights_digest
    assert json.loads(facts["config"]) == content.config.to_dict()


def test_the_sampler_that_is_kept_is_the_page_s(ckpt, tmp_path, small_data):
    data, fitted = ["--data-dir", str(small_data)], ["--sampler", "mixture", "--components", "2"]
    out = str(tmp_path / "s.png")
    assert main(["sample", str(ckpt), "--out", out, *fitted, *data]) == 0
    kept = sampler_file(ckpt, "mixture")
    before = kept.read_bytes()
    web = ["--format", "web", "--out", str(tmp_path / "w"), "--num-images", "60"]
    assert main(["export", str(ckpt), *web, *fitted, *data]) == 0
    assert kept.read_bytes() == before
    html = (tmp_path / "w/index.html").read_text()
    page = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert page["mixture"]["components"] == 2


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_one_sentence(ckpt, tmp_path, missing, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("onnx_export", "explorer"):
        monkeypatch.delitem(sys.modules, f"vae_hyperband.export.{name}", raising=False)

    class Hidden:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    assert main(["export", str(ckpt), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"vae-hyperband: This needs the package {missing}, which the base installation lacks: pip "
        "install 'vae-hyperband[export]'.\n"
    )
    assert not (tmp_path / "out").exists()


def test_weights_between_validations_are_not_given_another_one_s_losses(ckpt, tmp_path, small_data):
    """A checkpoint's metrics are of the last validation, its weights may be later."""
    content = load_ckpt(ckpt)
    bound = f"{content.metrics['bound']:.2f}"
    card = "README.md"
    for name, step in (("of them", content.step), ("earlier", content.step + 3)):
        save_ckpt(tmp_path / f"{name}.pt", dataclasses.replace(content, step=step))
        argv = ["export", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / name)]
        assert main([*argv, "--format", "safetensors"]) == 0
        assert main([*argv, "--format", "web", "--data-dir", str(small_data)]) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        page = (tmp_path / name / "index.html").read_text()
        assert (bound in (tmp_path / name / card).read_text()) == (name == "of them")
        assert bool(config["validation"]) == (name == "of them")
        assert ("validation bound" in page) == (name == "of them")


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_a_disk_that_fills_up_leaves_the_older_export_whole(ckpt, tmp_path, form, capsys):
    """The files of a model are of one model: all are on disk before any takes its name."""
    out = tmp_path / "out"
    argv = ["export", "--format", form, "--out", str(out)]
    assert main([*argv, str(ckpt)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    content = load_ckpt(ckpt)
    other = {name: 1.01 * x for name, x in content.model_state.items()}
    save_ckpt(tmp_path / "other.pt", dataclasses.replace(content, model_state=other))
    largest = max(map(len, before.values()))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))  # Python ignores SIGXFSZ
    try:
        assert main([*argv, str(tmp_path / "other.pt")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert "cannot be written: File too large" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*argv, str(tmp_path / "other.pt")]) == 0
    assert all(path.read_bytes() != before[path.name] for path in out.iterdir())


def test_an_encoder_never_stands_beside_a_decoder_of_another_model(ckpt, tmp_path, capsys):
    argv = ["export", str(ckpt), "--format", "onnx", "--out", str(tmp_path)]
    (tmp_path / "decoder.onnx").mkdir()
    (tmp_path / "encoder.onnx").write_text("older")
    assert main(argv) == 2
    assert "decoder.onnx cannot be written" in capsys.readouterr().err
    assert (tmp_path / "encoder.onnx").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_where_a_file_is_wanted_is_one_sentence(ckpt, tmp_path, small_data, capsys):
    for form, name in (
        ("web", "index.html"),
        ("onnx", "encoder.onnx"),
        ("safetensors", "README.md"),
    ):
        (tmp_path / form / name).mkdir(parents=True)
        argv = ["export", str(ckpt), "--format", form, "--out", str(tmp_path / form)]
        assert main([*argv, "--data-dir", str(small_data)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) <= 2  # ONNX says first how far its numbers are apart
        assert name in error
