"""What a trained model is worth on a named split: likelihood, latent space, generated images.

The only place that opens the test split. Each part of the report states its protocol, and each
estimate its standard error. Choose between models on the validation split; read the test split once
per number that is published.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_hyperband.checkpoint import load_ckpt, model_from_ckpt
from vae_hyperband.config import TrainConfig, read_json
from vae_hyperband.data import Split, SplitName, load_split
from vae_hyperband.errors import ConfigError
from vae_hyperband.evaluation_config import EvaluateOptions
from vae_hyperband.files import write_text
from vae_hyperband.measuring import Subject, generated_images, latent_space, likelihood
from vae_hyperband.process import environment, pick_device
from vae_hyperband.trained import split_of

#: Of the report's layout and protocols.
REPORT_VERSION = 5


def evaluate(
    ckpt: Path,
    split: SplitName = "validation",
    data_dir: Path | None = None,
    device: str = "auto",
    options: EvaluateOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The parts of :class:`EvaluateOptions` on a split, as plain data for JSON.

    ``say`` is told what is being done. Raises the errors of :func:`load_ckpt`, :func:`split_of`
    and, for a sampler, :func:`get_sampler`.
    """
    options = options or EvaluateOptions()
    if split == "train" and options.parts != ("likelihood",):
        raise ConfigError(
            "--split train says nothing of probes and images, which are measured against the "
            "training images: give --parts likelihood."
        )
    target = pick_device(device)
    content = load_ckpt(ckpt)
    config = TrainConfig.from_dict(content["config"], str(ckpt))
    model = model_from_ckpt(content, ckpt).to(target).eval()

    def load(name: SplitName) -> Split:
        return split_of(content, ckpt, name, data_dir)

    subject = Subject(model, ckpt, config, load("train"), split, load(split), target)
    report: dict[str, Any] = {
        "version": REPORT_VERSION,
        "checkpoint": str(ckpt),
        "checkpoint_digest": content["digest"],
        "split": split,
        "options": plain(options),
        "num_images": len(subject.held_out),
        "data_digest": subject.held_out.digest,
        "epoch": content["epoch"],
        "step": content["step"],
        "config": config.to_dict(),
        "environment": environment(target),
    }
    num_images_steps = 2 + len(options.samplers)
    total = sum(num_images_steps if part == "images" else 1 for part in set(options.parts))
    numbers = itertools.count(1)

    def step(text: str) -> None:
        say(f"{next(numbers)} of {total}: {text}")

    if "likelihood" in options.parts:
        step("likelihood bounds")
        report |= likelihood(subject, options)
    if "latents" in options.parts:
        step("latent space and probes")
        report["latents"] = latent_space(subject)
    if "images" in options.parts:
        report["images"] = generated_images(subject, options, step, say)
    return report


def evaluate_once(
    path: Path,
    ckpt: Path,
    split: SplitName,
    data_dir: Path | None,
    device: str,
    options: EvaluateOptions,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report in ``path`` if it is of this checkpoint and this question, or a new one.

    So a number of the test split is taken once.
    """
    content = load_ckpt(ckpt)
    asked = {
        "version": REPORT_VERSION,
        "checkpoint_digest": content["digest"],
        "split": split,
        "data_digest": load_split(split, data_dir, content["config"]["dataset"]).digest,
        "options": plain(options),
    }
    with contextlib.suppress(ConfigError):  # no such file yet, or a broken one
        report = read_json(path)
        if {name: report.get(name) for name in asked} == asked:
            return report
    report = evaluate(ckpt, split, data_dir, device, options, say)
    write_text(path, json.dumps(report, indent=2) + "\n")
    return report


def plain(options: EvaluateOptions) -> dict[str, Any]:
    """The options as JSON has them; a file is its SHA-256."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return json.loads(json.dumps(dataclasses.asdict(options), default=digest))
