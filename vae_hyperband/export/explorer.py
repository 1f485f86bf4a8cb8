"""The latent explorer: one HTML file that encodes and decodes in the browser, without a network.

The page holds the two graphs, ONNX Runtime Web, images and their latents. Its
Content-Security-Policy allows no request, and only its own scripts and styles.

Shape suffixes: N images, C channels, H height, W width, Z latent dimensions, L labels, K
components.
"""

import base64
import gzip
import hashlib
import lzma
from pathlib import Path

import torch
from torch import Tensor

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.data.splits import Split
from vae_hyperband.evaluation.bounds import eval_dataloader
from vae_hyperband.evaluation.flow import NUM_STEPS
from vae_hyperband.evaluation.latents import (
    Posteriors,
    aggregate,
    encode_split,
    information_per_dimension,
)
from vae_hyperband.evaluation.samplers import LearnedFlow, Mixture
from vae_hyperband.export.onnx_export import (
    decoder_graph,
    encoder_graph,
    largest_difference,
    velocity_graph,
)
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting.page import Data, render

FOLDER = Path(__file__).with_name("web")
SCRIPTS = ("engine.js", "page.js", "drawing.js")

#: ONNX Runtime Web 1.30.0 as published; the WebAssembly after unpacking. To update them: npm pack
#: onnxruntime-web, then xz -9e of the second one.
RUNTIME_SHA256 = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm.xz": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}


def _runtime(name: str) -> bytes:
    content = (FOLDER / name).read_bytes()
    if name.endswith(".xz"):
        content = lzma.decompress(content)
    assert hashlib.sha256(content).hexdigest() == RUNTIME_SHA256[name], name
    return content


def page(
    model: VAE,
    split: Split,
    title: str,
    facts: dict[str, str],
    sampler: Mixture | LearnedFlow | None = None,
    ink: bool = False,
) -> str:
    """The whole page, with the split's images on its map, as the model takes them.

    ``facts`` are shown below the title. With ``ink`` the images are shown as the figures show
    garments: 0 is white. Raises :class:`ConfigError` where images have neither one channel nor
    three, and what :func:`~vae_hyperband.export.onnx_export.encoder_graph` raises.
    """
    if model.channels not in (1, 3):
        raise ConfigError(f"Images of {model.channels} channels cannot be shown: 1 or 3 can.")
    data, share = _data(model, split)
    data |= {
        "ink": ink,
        "mixture": _mixture(sampler) if isinstance(sampler, Mixture) else None,
        "flow": _flow(sampler) if isinstance(sampler, LearnedFlow) else None,
    }
    values = {
        "title": title,
        "facts": " · ".join(f"{name} {value}" for name, value in facts.items()),
        "map": f"Posterior means of {plural(len(split), 'image')}, in the plane of their first two "
        f"principal components ({share:.0%} of the variance).",
        "nats": "mean KL over the map's images"
        if model.vamp is None
        else "mean KL over the map's images to the Gaussian of all their z together",
        "footer": "Made by vae-hyperband. Runs in the browser with ONNX Runtime Web (MIT License, "
        "Copyright (c) Microsoft Corporation); nothing is loaded or sent.",
        "data": data,
    }
    script = "\n".join([_as_global(_runtime("ort.wasm.bundle.min.mjs").decode()), *_scripts()])
    allowed = {"script-src": "'wasm-unsafe-eval'", "img-src": "blob:"}
    return render(
        FOLDER / "explorer.html.jinja", values, FOLDER / "explorer.css", [script], allowed
    )


def _scripts() -> list[str]:
    return [(FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS]


def _as_global(module: str) -> str:
    """The runtime's module as an expression: its exports become the fields of ``ort``.

    A module cannot import another one of the same page.
    """
    head, exports = module.rsplit("export{", 1)
    pairs = [name.split(" as ") for name in exports.split("}", 1)[0].split(",")]
    names = {outside: inside for inside, outside in pairs}
    fields = ",".join(f"{name}:{names[name]}" for name in ("InferenceSession", "Tensor", "env"))
    # in a function, so that its short names do not collide with those of the page
    return f"const ort=(()=>{{{head}return {{{fields}}};}})();"


def _data(model: VAE, split: Split) -> tuple[Data, float]:
    """The data of the scripts, and the share of the variance that the map shows."""
    mu_NZ, logvar_NZ = encode_split(model, eval_dataloader(split))
    exact = Posteriors(mu_NZ.double(), logvar_NZ.double())
    nats_Z = information_per_dimension(model, exact)
    mean_Z, variance_Z = aggregate(exact)
    far_Z = 4 * variance_Z.sqrt()
    map_facts, share = _map(mu_NZ)
    encoder, decoder = (
        make(model, {}).SerializeToString() for make in (encoder_graph, decoder_graph)
    )
    largest_difference(model, encoder, decoder)
    data = {
        "latentDim": model.latent_dim,
        "shape": list(split.image_shape),
        "names": list(split.class_names),
        "labels": split.labels_N.tolist(),
        "images": _base64(split.images_NCHW.numpy().tobytes()),
        "mu": _floats(mu_NZ),
        "nats": _rounded(nats_Z),
        "order": nats_Z.argsort(descending=True).tolist(),
        "mean": _rounded(mean_Z),
        "low": _rounded(torch.minimum(mean_Z - far_Z, mu_NZ.amin(dim=0))),
        "high": _rounded(torch.maximum(mean_Z + far_Z, mu_NZ.amax(dim=0))),
        "map": map_facts,
        "encoder": _base64(encoder),
        "decoder": _base64(decoder),
        "runtime": _base64(
            gzip.compress(_runtime("ort-wasm-simd-threaded.wasm.xz"), compresslevel=9, mtime=0)
        ),
        "vamp": _vamp(model) if model.vamp else None,
    }
    return data, share


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _map(mu_NZ: Tensor) -> tuple[Data, float]:
    """The plane of the first two principal components of the means."""
    centre_Z = mu_NZ.double().mean(dim=0)
    centred_NZ = mu_NZ.double() - centre_Z
    _, lengths, axes = torch.linalg.svd(centred_NZ, full_matrices=False)
    axes_2Z = torch.zeros(2, mu_NZ.shape[1], dtype=torch.float64)
    axes_2Z[: len(axes[:2])] = axes[:2]  # a latent space of one dimension has one
    edge = (centred_NZ @ axes_2Z.T).abs().max().item() * 1.05
    energy = lengths.square()
    facts = {
        "centre": _floats(centre_Z),
        "axes": [_floats(axis_Z) for axis_Z in axes_2Z],
        "edge": round(max(edge, 0.1), 4),
    }
    return facts, (energy[:2].sum() / energy.sum().clamp_min(1e-300)).item()


def _mixture(mixture: Mixture) -> Data:
    return {
        "shares": mixture.shares_L.tolist(),
        "components": mixture.weights_LK.shape[1],
        "weights": _floats(mixture.weights_LK),
        "means": _floats(mixture.means_LKZ),
        "roots": _floats(mixture.roots_LKZZ),
    }


def _flow(sampler: LearnedFlow) -> Data:
    flow = sampler.flow
    return {
        "shares": sampler.shares_L.tolist(),
        "mean": flow.mean_Z.tolist(),
        "std": flow.std_Z.tolist(),
        "velocity": _base64(velocity_graph(flow.velocity).SerializeToString()),
        "steps": NUM_STEPS,
    }


@torch.no_grad()
def _vamp(model: VAE) -> Data:
    assert model.vamp is not None
    mu_KZ, logvar_KZ = model.encode(model.vamp.images_KCHW)
    return {
        "count": len(mu_KZ),
        "mu": _floats(mu_KZ),
        "sigma": _floats(torch.exp(0.5 * logvar_KZ)),
    }


def _floats(tensor: Tensor) -> str:
    """32-bit little-endian floats, as browsers on x86 and ARM have them."""
    return _base64(tensor.float().contiguous().numpy().astype("<f4").tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
