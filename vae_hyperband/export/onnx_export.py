"""The encoder, the decoder and a flow's velocity as ONNX graphs, written node by node.

The network is four (transposed) convolutions and three linear layers, so its graph is shorter than
what a tracer needs to be told, and the same weights give the same bytes. Needs ``onnx``.

Shape suffixes: B images of a batch, C channels, H height, W width, Z latent dimensions, L labels.
"""

import math
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation.flow import TIME_FEATURES, Block, VelocityNet
from vae_hyperband.model.likelihoods import MEAN_SERIES, SERIES_BELOW, Likelihood
from vae_hyperband.model.vae import LOGVAR_LIMIT, VAE, Decoder, Encoder

OPSET = 17
IR_VERSION = 8  # what programs of 2022 and later read


class _Graph:
    """Nodes and weights, collected in the order in which they are computed."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def tensor(self, name: str, value: Tensor) -> str:
        array = value.detach().cpu().contiguous().numpy()
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def number(self, name: str, value: float) -> str:
        self.weights.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def linear(self, x: str, layer: nn.Linear, out: str) -> str:
        weight = self.tensor(f"{out}.weight", layer.weight)
        bias = self.tensor(f"{out}.bias", layer.bias)
        return self.add("Gemm", x, weight, bias, out=out, transB=1)

    def norm(self, x: str, layer: nn.LayerNorm, out: str) -> str:
        weight = self.tensor(f"{out}.weight", layer.weight)
        bias = self.tensor(f"{out}.bias", layer.bias)
        return self.add("LayerNormalization", x, weight, bias, out=out, epsilon=layer.eps)

    def silu(self, x: str) -> str:
        gate = self.add("Sigmoid", x, out=f"{x}.gate")
        return self.add("Mul", x, gate, out=f"{x}.silu")

    def conv(self, x: str, layer: nn.Conv2d | nn.ConvTranspose2d, out: str, relu: bool) -> str:
        """3x3, stride 2, padding 1; see :mod:`vae_hyperband.model.fast_layers`."""
        assert layer.bias is not None
        weight = self.tensor(f"{out}.weight", layer.weight)
        bias = self.tensor(f"{out}.bias", layer.bias)
        up = isinstance(layer, nn.ConvTranspose2d)
        more = {"output_padding": [1, 1]} if up else {}
        kind = "ConvTranspose" if up else "Conv"
        self.add(kind, x, weight, bias, out=out, strides=[2, 2], pads=[1, 1, 1, 1], **more)
        return self.add("Relu", out, out=f"{out}.relu") if relu else out

    def model(self, name: str, given: list[Any], results: list[Any], facts: dict[str, str]) -> Any:
        graph = helper.make_graph(self.nodes, name, given, results, self.weights)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="vae-hyperband"
        )
        helper.set_model_props(model, facts)
        onnx.checker.check_model(model, full_check=True)
        return model


def _value(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _conv_network(model: VAE) -> tuple[Encoder, Decoder]:
    """The parts of a model whose graph can be written. Raises :class:`ConfigError` for others."""
    encoder, decoder = model.encoder, model.decoder
    if isinstance(encoder, Encoder) and isinstance(decoder, Decoder) and not any(model.padding):
        return encoder, decoder
    raise ConfigError(
        f"A model with the network {model.network} for images of {model.image_shape} cannot be "
        "exported to ONNX or a web page yet: use --format safetensors."
    )


def encoder_graph(model: VAE, facts: dict[str, str]) -> Any:
    """``x`` (B, C, H, W) in [0, 1] -> ``mu``, ``logvar`` (B, Z) of q(z|x)."""
    (encoder, _), graph = _conv_network(model), _Graph()
    h = "x"
    for name in encoder.convs:
        h = graph.conv(h, getattr(encoder, name), name, relu=True)
    h = graph.add("Flatten", h, out="flat")
    graph.linear(h, encoder.fc_mu, "mu")
    h = graph.linear(h, encoder.fc_logvar, "unbounded")
    low, high = graph.number("low", -LOGVAR_LIMIT), graph.number("high", LOGVAR_LIMIT)
    graph.add("Clip", h, low, high, out="logvar")
    images = _value("x", "batch", *model.image_shape)
    codes = [_value(name, "batch", model.latent_dim) for name in ("mu", "logvar")]
    return graph.model("encoder", [images], codes, facts)


def decoder_graph(model: VAE, facts: dict[str, str]) -> Any:
    """``z`` (B, Z) -> ``logits`` and ``image``, the mean of each pixel in [0, 1]; (B, C, H, W)."""
    (_, decoder), graph = _conv_network(model), _Graph()
    h = graph.linear("z", decoder.fc, "fc")
    shape = [-1, *decoder.small]
    graph.weights.append(helper.make_tensor("shape", TensorProto.INT64, [4], shape))
    h = graph.add("Reshape", h, "shape", out="small")
    for name in decoder.convs[:-1]:
        h = graph.conv(h, getattr(decoder, name), name, relu=True)
    graph.conv(h, getattr(decoder, decoder.convs[-1]), "logits", relu=False)
    _pixel_means(graph, model.likelihood)
    size = ("batch", *model.image_shape)
    results = [_value("logits", *size), _value("image", *size)]
    return graph.model("decoder", [_value("z", "batch", model.latent_dim)], results, facts)


def velocity_graph(net: VelocityNet) -> Any:
    """``z`` (B, Z), ``t`` (B, 1), ``label`` (B, L) one-hot -> ``v`` (B, Z), of flow matching."""
    graph = _Graph()
    frequencies = math.pi * torch.arange(1.0, TIME_FEATURES // 2 + 1)[None]
    waves = graph.add("Mul", "t", graph.tensor("frequencies", frequencies), out="waves")
    known = [graph.add(kind, waves, out=kind.lower()) for kind in ("Sin", "Cos")]
    known.append(graph.add("MatMul", "label", graph.tensor("kinds", net.label.weight), out="kind"))
    given = graph.linear(graph.add("Concat", *known, out="known", axis=1), net.given, "given")
    given = graph.silu(given)
    h = graph.add("Add", graph.linear("z", net.enter, "enter"), given, out="h")
    for i, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        up = graph.linear(graph.norm(h, block.norm, f"norm{i}"), block.up, f"up{i}")
        up = graph.silu(graph.add("Add", up, given, out=f"up{i} given"))
        h = graph.add("Add", h, graph.linear(up, block.down, f"down{i}"), out=f"h{i}")
    norm, leave = net.leave
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(leave, nn.Linear)
    graph.linear(graph.norm(h, norm, "norm"), leave, "v")
    z, v = (_value(name, "batch", net.enter.in_features) for name in "zv")
    inputs = [z, _value("t", "batch", 1), _value("label", "batch", net.label.num_embeddings)]
    return graph.model("velocity", inputs, [v], {})


def _pixel_means(graph: _Graph, likelihood: Likelihood) -> None:
    """``image`` from ``logits``, as :func:`~vae_hyperband.model.likelihoods.pixel_means` has it."""
    if likelihood != "continuous-bernoulli":
        graph.add("Sigmoid", "logits", out="image")
        return
    one, half, zero = (
        graph.number(name, x) for name, x in (("one", 1), ("half", 0.5), ("zero", 0))
    )
    graph.add("Abs", "logits", out="size")
    near = graph.add("Less", "size", graph.number("series below", SERIES_BELOW), out="near")
    far = graph.add("Where", near, one, "size", out="far")  # no division by 0
    decay = graph.add("Exp", graph.add("Neg", far, out="-far"), out="decay")
    odds = graph.add("Div", decay, graph.add("Sub", one, decay, out="1-decay"), out="odds")
    low = graph.add("Sub", graph.add("Reciprocal", far, out="1/far"), odds, out="low")
    high = graph.add("Sub", one, low, out="high")
    mean = graph.add("Where", graph.add("Greater", "logits", zero, out="+"), high, low, out="mean")
    square = graph.add("Mul", "logits", "logits", out="square")
    series = graph.number("c0", MEAN_SERIES[-1])
    for i, value in enumerate(reversed(MEAN_SERIES[:-1]), start=1):
        product = graph.add("Mul", series, square, out=f"product {i}")
        series = graph.add("Add", product, graph.number(f"c{i}", value), out=f"sum {i}")
    product = graph.add("Mul", series, "logits", out="series product")
    series = graph.add("Add", product, half, out="series")
    graph.add("Where", near, series, mean, out="image")


# ---- ONNX graphs against the model that they were written from, by ONNX Runtime.

#: Of posterior means, log variances and pixels. float32 and another order of sums give 1e-6.
TOLERANCE = 1e-4


@torch.no_grad()
def largest_difference(model: VAE, encoder: bytes, decoder: bytes, num: int = 16) -> float:
    """Of anything that the graphs and the model compute from some random images and latents.

    Raises :class:`CheckpointError` if that is more than :data:`TOLERANCE`.
    """
    stream = generator(0, "sample")
    size = (num, *model.image_shape)
    x_BCHW = torch.rand(size, generator=stream)
    z_BZ = torch.randn(num, model.latent_dim, generator=stream)
    codes = _run(encoder, ["mu", "logvar"], {"x": x_BCHW})
    (images,) = _run(decoder, ["image"], {"z": z_BZ})
    pairs = zip([*codes, images], [*model.encode(x_BCHW), model.decode_images(z_BZ)], strict=True)
    apart = max((found - expected).abs().max().item() for found, expected in pairs)
    if not apart <= TOLERANCE:
        raise CheckpointError(
            f"ONNX Runtime computes other values from this model than PyTorch does: {apart:.1e} "
            f"apart, at most {TOLERANCE:.0e} was expected; nothing was written."
        )
    return apart


def _run(graph: bytes, names: list[str], feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(array) for array in found]
