"""Export for model hubs: a folder with safetensors, config.json and a model card.

Nothing is uploaded unless :func:`push` is called.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import safetensors.torch

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import CommonConfig, in_effect, is_own_network
from vae_hyperband.common.errors import ConfigError, first_line
from vae_hyperband.common.files import make_folder, write_together
from vae_hyperband.evaluation.results import Evaluation, GeneratedImages
from vae_hyperband.model.checkpoint import (
    SHARED_CONFIG,
    SHARED_FORMAT,
    SHARED_VERSION,
    SHARED_WEIGHTS,
    Checkpoint,
)
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting.tables import LOSS_NAMES, evaluation_text

#: Names of the data sets, and of those that hubs have.
DATA_NAMES = {
    "fashion-mnist": "Fashion-MNIST",
    "drawn": "synthetic garments with known factors",
    "custom": "custom images",
    "images": "own images",
}
DATASETS = {"fashion-mnist": "zalando-datasets/fashion_mnist"}

#: Which of the hub's tasks the model does: hubs list models by it.
TASK = "unconditional-image-generation"

#: Characters of ``license:`` in the head of a card, which hubs read as an SPDX-like word.
LICENSE_WORDS = "abcdefghijklmnopqrstuvwxyz0123456789.-"

CARD = """\
---
license: {license}
library_name: vae-hyperband
pipeline_tag: {task}
tags:
- variational-autoencoder
- image-generation
{datasets}{model_index}---

# A variational autoencoder of {data_name}, latent dimension {latent_dim}, beta {beta:g}

Kingma & Welling 2014 (beta: Higgins et al. 2017), {parameters:,} parameters, likelihood
{likelihood}, prior {prior}. Trained for {epochs} ({steps}) with vae-hyperband.

```python
from vae_hyperband import load_model

model = load_model("path/to/this/folder"{network})  # or "hf:ORG/NAME", its place on the hub
images = model.sample(64)  # (64, {channels}, {height}, {width}), in [0, 1]
```

## Architecture

{architecture}
## Data

{data_name}, {num_images} of {height}x{width}x{channels}, SHA-256 of the {digest_of}
`{data_digest}`.

## Metrics

{metrics}

## Configuration

```json
{config}
```

SHA-256 of the weights, as `train` prints it: `{weights}`.
"""


def write_shared(
    checkpoint: Checkpoint, folder: Path, license: str, evaluation: Evaluation | None
) -> list[Path]:
    """Write a checkpoint's model to a folder that :func:`~vae_hyperband.load_model` reads.

    ``evaluation`` is of the same checkpoint; the card shows it.
    """
    if not license or not set(license) <= set(LICENSE_WORDS):
        raise ConfigError(f"--license is {license!r}, but must be a word such as mit or cc-by-4.0.")
    model = checkpoint.model()
    # clones: a network of the user's own may have one tensor under two names
    tensors = {name: x.contiguous().clone() for name, x in checkpoint.model_state.items()}
    arguments = _arguments(model)
    config = {
        "format": SHARED_FORMAT,
        "version": SHARED_VERSION,
        # not nested: huggingface_hub's PyTorchModelHubMixin takes them from the top level
        **arguments,
        "weights": checkpoint.weights_digest,
        "checkpoint": checkpoint.digest,
        "trained": checkpoint.config.to_dict(),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "data": {**checkpoint.data._asdict(), "image_shape": list(checkpoint.data.image_shape)},
        "environment": checkpoint.environment,
        "validation": checkpoint.own_losses,
        "evaluation": evaluation and evaluation.to_dict(),
    }
    make_folder(folder)
    about = {"format": "pt", "model": json.dumps(arguments)}
    files = {  # the weights first, so they come last: without them the folder is no model
        folder / SHARED_WEIGHTS: safetensors.torch.save(tensors, about),
        folder / SHARED_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        folder / "README.md": card(checkpoint, model, license, evaluation).encode(),
    }
    write_together(files)
    return list(files)


def push(files: list[Path], repository: str) -> str:
    """Upload the files of :func:`write_shared` to the Hugging Face hub, in one commit; its address.

    The repository, ORG/NAME, is created if it is missing. Server, token and proxies are settings of
    the package huggingface_hub. Raises :class:`ConfigError` if the hub refuses or is out of reach.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    changes = [huggingface_hub.CommitOperationAdd(path.name, path) for path in files]
    try:
        hub.create_repo(repository, exist_ok=True)
        commit = hub.create_commit(repository, changes, commit_message="Model of vae-hyperband")
    except Exception as error:  # of httpx or of the hub: they have no common type
        # what the hub has against a card is in the lines below "Invalid metadata"
        is_of_card = isinstance(error, ValueError)
        why = " ".join(str(error).split()) if is_of_card else first_line(error)
        raise ConfigError(
            f"--push {repository} failed: {why} The files are in {files[0].parent}."
        ) from error
    return str(commit.commit_url)


def _arguments(model: VAE) -> dict[str, object]:
    """The arguments with which :class:`~vae_hyperband.model.vae.VAE` builds this model."""
    arguments: dict[str, object] = {
        "latent_dim": model.latent_dim,
        "image_size": model.image_size,
        "channels": model.channels,
        "likelihood": model.likelihood,
        "pseudo_inputs": len(model.vamp.logits_KCHW) if model.vamp else 0,
        # of the one likelihood that has it: config.json of the others stays as it was
        **({"sigma": model.sigma} if model.likelihood == "gaussian" else {}),
    }
    # the default ones as 0.2 wrote them, which reads them
    if model.widths not in ((), CommonConfig.widths):
        arguments["widths"] = model.widths
    if model.network != CommonConfig.network:
        arguments["network"] = model.network
    return arguments


def _architecture(model: VAE) -> str:
    """A table of the layers; of a network of the user's own, its name and its modules."""
    if model.network != "conv":
        what = "`residual` of vae-hyperband (model/residual.py)"
        if is_own_network(model.network):
            what = f"`{model.network}`, which is not part of vae-hyperband"
        return f"The network is {what}.\n\n```\n{model.encoder}\n{model.decoder}\n```\n"
    channels, height, width = model.image_shape
    left, right, top, bottom = model.padding
    padded = (height + top + bottom, width + left + right)
    shapes = [f"{channels} x {height} x {width}"] + [
        f"{width} x {padded[0] >> stage} x {padded[1] >> stage}"
        for stage, width in enumerate(model.widths, start=1)
    ]
    rows = [("convolution 3x3, stride 2, ReLU", shape) for shape in shapes[1:]]
    rows += [("linear, twice", f"mu and log sigma^2, {model.latent_dim} each")]
    rows += [("linear", shapes[-1])]
    rows += [("transposed convolution 3x3, stride 2, ReLU", x) for x in reversed(shapes[1:-1])]
    rows += [("transposed convolution 3x3, stride 2", f"{shapes[0]} logits")]
    if any(model.padding):
        rows.insert(0, ("padding with zeros", f"{channels} x {padded[0]} x {padded[1]}"))
        rows[-1] = ("transposed convolution 3x3, stride 2; without the padding", rows[-1][1])
    first_of_decoder = rows.index(("linear", shapes[-1]))
    names = {0: "encoder ", first_of_decoder: "decoder "}
    lines = [f"| {names.get(i, '')}| {layer} | {out} |" for i, (layer, out) in enumerate(rows)]
    return "\n".join(["| | layer | output |", "|---|---|---|", *lines]) + "\n"


def card(checkpoint: Checkpoint, model: VAE, license: str, evaluation: Evaluation | None) -> str:
    """The model card, in Markdown, with the head that hubs read."""
    config, (channels, height, width) = checkpoint.config, model.image_shape
    known = DATASETS.get(config.dataset)
    return CARD.format(
        license=license,
        task=TASK,
        model_index=_model_index(checkpoint, evaluation) if evaluation else "",
        datasets=f"datasets:\n- {known}\n" if known else "",
        data_name=DATA_NAMES[config.dataset],
        latent_dim=model.latent_dim,
        beta=config.beta,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        likelihood=model.likelihood,
        prior=config.prior,
        epochs=plural(checkpoint.epoch, "epoch"),
        steps=plural(checkpoint.step, "step"),
        architecture=_architecture(model),
        network=f", network={model.network!r}" if is_own_network(model.network) else "",
        height=height,
        width=width,
        channels=channels,
        num_images=plural(checkpoint.data.num_images, "training image"),
        digest_of="decoded images" if config.dataset == "images" else "file",
        data_digest=checkpoint.data.digest,
        metrics=_metrics(checkpoint, evaluation),
        config=json.dumps(in_effect(config.to_dict()), indent=2),
        weights=checkpoint.weights_digest,
    )


class HubMetric(NamedTuple):
    """One number of an evaluation, as hubs list it."""

    type: str
    name: str
    value: float


def _hub_metrics(evaluation: Evaluation, likelihood: str) -> list[HubMetric]:
    """What hubs list of an evaluation: its bounds and FIDs."""
    found = []
    if part := evaluation.likelihood:
        unit = f"nats per image, {likelihood} likelihood"
        for kind, title in LOSS_NAMES.items():
            found.append(HubMetric(kind, f"{title}, {unit}", getattr(part, kind).mean))
        if bits := part.bits_per_dimension:
            name = f"bound (beta = 1), bits per dimension, {likelihood} likelihood"
            found.append(HubMetric("bits_per_dimension", name, bits.mean))
        if iwae := part.iwae:
            name = f"IWAE-{iwae.num_samples} bound, {unit}"
            found.append(HubMetric("iwae_bound", name, iwae.mean))
    generated = evaluation.images or GeneratedImages("", {})
    for kind, images in generated.kinds.items():
        if kind == "real":  # says nothing of the model
            continue
        # hubs take "fid" to be in Inception's features, with which this one cannot be compared
        fid, of = generated.fid_name, f"{kind}, {plural(images.num_images, 'image')}"
        metric = re.sub("[^a-z0-9]+", "_", fid.lower()).strip("_")
        found.append(HubMetric(metric, f"{fid}, {of}", images.fid.mean))
        if images.inception_fid:
            name = f"FID (Inception features), {of}"
            found.append(HubMetric("fid", name, images.inception_fid.mean))
    return [metric for metric in found if math.isfinite(metric.value)]


def _model_index(checkpoint: Checkpoint, evaluation: Evaluation) -> str:
    """The evaluation in the card's head: YAML, which takes strings as JSON quotes them."""
    config = checkpoint.config
    metrics = _hub_metrics(evaluation, config.likelihood)
    if not metrics:
        return ""
    lines = [
        "model-index:",
        f"- name: vae-{config.dataset}-z{config.latent_dim}-beta{config.beta:g}",
        "  results:",
        "  - task:",
        f"      type: {TASK}",
        "    dataset:",
        f"      type: {DATASETS.get(config.dataset, config.dataset)}",
        f"      name: {DATA_NAMES[config.dataset]}",
        f"      split: {evaluation.split}",
        "    metrics:",
    ]
    for metric in metrics:
        lines += [
            f"    - type: {metric.type}",
            f"      name: {json.dumps(metric.name)}",
            f"      value: {metric.value:.4f}",
        ]
    return "\n".join(lines) + "\n"


def _metrics(checkpoint: Checkpoint, evaluation: Evaluation | None) -> str:
    """The evaluation, or without one the losses on the validation split."""
    if evaluation:
        return (
            f"By `vae-hyperband evaluate --split {evaluation.split}`; bounds at beta = 1, in nats "
            f"per image, summed over pixels.\n\n```\n{evaluation_text(evaluation)}\n```"
        )
    losses = checkpoint.own_losses
    if not losses:
        return "None: these weights were saved between two validations."
    lines = [f"| {title} | {losses[name]:.2f} |" for name, title in LOSS_NAMES.items()]
    head = "Validation split, nats per image, summed over pixels, one sample of z per image:"
    return "\n".join([head, "", "| | nats |", "|---|---|", *lines])
