"""The encoder, the decoder and a flow's velocity as ONNX graphs, by PyTorch's exporter.

PyTorch traces the model, whatever network it has, so there is one description of each network. A
graph takes batches of any size, and the same weights give the same bytes. Needs ``onnx``,
``onnxscript`` and ``onnxruntime``.

Shape suffixes: B images of a batch, C channels, H height, W width, Z latent dimensions, L labels.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import onnxscript  # noqa: F401  (PyTorch's exporter needs it: if it is missing, that is known here)
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional as F

from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation.flow import VelocityNet
from vae_hyperband.model.likelihoods import pixel_means
from vae_hyperband.model.vae import VAE

OPSET = 18  # the exporter's oldest
IR_VERSION = 8  # of the same year, 2022: programs of 2023 and later read it

#: Between ONNX Runtime and PyTorch. float32 and another order of sums give 1e-6.
TOLERANCE = 1e-4

CHECKED = (1, 16)  # sizes of batches that are compared; the graph is made from one of 2


class _Part(nn.Module):
    """What becomes a graph: the names of its inputs and results, and inputs to try it with."""

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    #: Of the results, those that are compared. Logits have no limit, so neither has their rounding.
    compared: tuple[str, ...]

    def example(self, num: int) -> tuple[Tensor, ...]:
        """Random inputs, the same each time: a batch of ``num``."""
        raise NotImplementedError


class _Encoder(_Part):
    inputs, results = ("x",), ("mu", "logvar")
    compared = results

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def example(self, num: int) -> tuple[Tensor, ...]:
        return (torch.rand(num, *self.model.image_shape, generator=generator(0, "sample")),)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x_BCHW)


class _Decoder(_Part):
    inputs, results, compared = ("z",), ("logits", "image"), ("image",)

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def example(self, num: int) -> tuple[Tensor, ...]:
        return (torch.randn(num, self.model.latent_dim, generator=generator(0, "sample")),)

    def forward(self, z_BZ: Tensor) -> tuple[Tensor, Tensor]:
        logits_BCHW = self.model.decode(z_BZ)
        return logits_BCHW, pixel_means(logits_BCHW, self.model.likelihood)


class _Velocity(_Part):
    inputs, results = ("z", "t", "label"), ("v",)
    compared = results

    def __init__(self, net: VelocityNet) -> None:
        super().__init__()
        self.net = net

    def example(self, num: int) -> tuple[Tensor, ...]:
        stream, num_labels = generator(0, "sample"), self.net.label.num_embeddings
        z_BZ = torch.randn(num, self.net.enter.in_features, generator=stream)
        t_B1 = torch.rand(num, 1, generator=stream)
        return z_BZ, t_B1, F.one_hot(torch.arange(num) % num_labels, num_labels).float()

    def forward(self, z_BZ: Tensor, t_B1: Tensor, label_BL: Tensor) -> tuple[Tensor]:
        return (self.net(z_BZ, t_B1.squeeze(1), label_BL.argmax(dim=1)),)


def encoder_graph(model: VAE, facts: dict[str, str]) -> Any:
    """``x`` (B, C, H, W) in [0, 1] -> ``mu``, ``logvar`` (B, Z) of q(z|x).

    ``model`` is in eval mode, on the CPU; the graph's metadata are ``facts``. Raises
    :class:`ConfigError` if it has a network of somebody's own that PyTorch cannot export.
    """
    return _graph(_Encoder(model), "encoder", facts)


def decoder_graph(model: VAE, facts: dict[str, str]) -> Any:
    """``z`` (B, Z) -> ``logits`` and ``image``, the mean of each pixel in [0, 1]; (B, C, H, W).

    See :func:`encoder_graph`.
    """
    return _graph(_Decoder(model), "decoder", facts)


def velocity_graph(net: VelocityNet) -> Any:
    """``z`` (B, Z), ``t`` (B, 1), ``label`` (B, L) one-hot -> ``v`` (B, Z), of flow matching.

    Raises :class:`CheckpointError` if ONNX Runtime computes something else from it.
    """
    part = _Velocity(net)
    graph = _graph(part, "velocity", {})
    _require_close(_apart(part, graph.SerializeToString()))
    return graph


def _graph(part: _Part, name: str, facts: dict[str, str]) -> Any:
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                part.eval(),
                part.example(2),  # PyTorch takes a size of 1 for a constant
                dynamo=True,
                opset_version=OPSET,
                input_names=list(part.inputs),
                output_names=list(part.results),
                dynamic_shapes=[{0: batch} for _ in part.inputs],
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
    # the user's own network: tracing runs its code, which may fail in any way
    except Exception as error:
        raise _refusal(name, _first_line(error.__cause__ or error)) from error
    # where the code needs the example's size, PyTorch exports it for that alone, without a word
    if not all(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input):
        raise _refusal(name, "it computes with the number of images as a constant")
    _keep_what_computes(model)
    model.graph.name, model.ir_version, model.producer_name = name, IR_VERSION, "vae-hyperband"
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"PyTorch cannot export this model's {name} to ONNX for batches of any size ({why}): write "
        "its forward with operations of PyTorch on tensors alone, or use --format safetensors."
    )


def _keep_what_computes(model: Any) -> None:
    """Remove what the exporter notes of where each node is from.

    It has the paths of this machine's files, and needs a newer IR version.
    """
    graph = model.graph
    groups = (graph.node, graph.initializer, graph.value_info, graph.input, graph.output, [graph])
    for one in (one for group in groups for one in group):
        one.ClearField("metadata_props")
        one.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.ClearField("producer_version")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Around the exporter: no output or warning of what a user of this package cannot change."""
    before = logging.root.manager.disable
    # each export logs that torchvision's operations are not there
    logging.disable(logging.WARNING)
    try:
        # to stderr go the graphs of a network that it cannot export
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            # PyTorch 2.13 copies its own description of the arguments in a way that it deprecated
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # the velocity's three inputs have one batch, whose name is given once
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
            yield
    finally:
        logging.disable(before)


# ---- ONNX graphs against the model that they were made from, by ONNX Runtime.


def largest_difference(model: VAE, encoder: bytes, decoder: bytes) -> float:
    """Of posterior means, log variances and pixels of some random images and latents.

    Raises :class:`CheckpointError` if that is more than :data:`TOLERANCE`.
    """
    apart = max(_apart(_Encoder(model), encoder), _apart(_Decoder(model), decoder))
    _require_close(apart)
    return apart


def _require_close(apart: float) -> None:
    if not apart <= TOLERANCE:
        raise CheckpointError(
            f"ONNX Runtime computes other values from this model than PyTorch does: {apart:.1e} "
            f"apart, at most {TOLERANCE:.0e} was expected; nothing was written."
        )


@torch.no_grad()
def _apart(part: _Part, graph: bytes) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    differences = []
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for num in CHECKED:
            example = part.example(num)
            feeds = {name: x.numpy() for name, x in zip(part.inputs, example, strict=True)}
            expected = dict(zip(part.results, part(*example), strict=True))
            for name, found in zip(part.compared, session.run(part.compared, feeds), strict=True):
                differences.append((torch.from_numpy(found) - expected[name]).abs().max())
    # its errors have no type in common
    except Exception as error:
        raise CheckpointError(
            f"ONNX Runtime cannot compute this model ({_first_line(error)}): use --format "
            "safetensors."
        ) from error
    return torch.stack(differences).max().item()  # a NaN stays one


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
