"""What a trained model is worth on a named split: likelihood, latent space, generated images.

The only place that opens the test split. Each part of the report states its protocol, and each
estimate its standard error. Choose between models on the validation split; read the test split once
per number that is published.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vae_hyperband.bounds import eval_dataloader, iwae_nats, split_nats
from vae_hyperband.checkpoint import load_ckpt, model_from_ckpt
from vae_hyperband.config import TrainConfig, check_types, require, require_number
from vae_hyperband.data import Split, SplitName, binarized, load_split
from vae_hyperband.distances import (
    Measured,
    copying,
    frechet_distance,
    manifold_measures,
    mean_and_error,
)
from vae_hyperband.errors import CheckpointError
from vae_hyperband.features import WEIGHTS_SHA256, image_features
from vae_hyperband.latents import (
    ACTIVE_VARIANCE,
    Posteriors,
    active_units,
    encode_split,
    kl_by_dimension,
    knn_probe,
    linear_probe,
    mutual_information,
)
from vae_hyperband.model import VAE
from vae_hyperband.objective import entropy_floor, mean_image_nats
from vae_hyperband.process import environment, pick_device
from vae_hyperband.randomness import generator
from vae_hyperband.samplers import (
    SAMPLERS,
    SamplerConfig,
    SamplerName,
    decode_bytes,
    generate,
    get_sampler,
)

Part = Literal["likelihood", "latents", "images"]
#: Of the report's layout and protocols.
REPORT_VERSION = 2

PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at, and how closely."""

    parts: tuple[Part, ...] = PARTS
    """likelihood: bounds; latents: active units, probes; images: FID and its kin."""
    iwae_samples: int = 100
    """Importance samples per image of the IWAE bound; 0: leave it out."""
    iwae_images: int = 1000
    """Images of the split, from its first on, for the IWAE bound."""
    samplers: tuple[SamplerName, ...] = SAMPLERS
    """Where z comes from for generated images; what is not fitted yet is fitted first."""
    num_generated: int | None = None
    """Images to generate per sampler (default: as many as the split has); FID depends on it."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.parts) > 0, "--parts names no part: give at least one.")
        require_number("iwae_samples", self.iwae_samples, 0)
        require_number("iwae_images", self.iwae_images, 1)
        if self.num_generated is not None:
            require_number("num_generated", self.num_generated, 10)


def evaluate(
    ckpt: Path,
    split: SplitName = "validation",
    data_dir: Path | None = None,
    device: str = "auto",
    options: EvaluateOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The parts of :class:`EvaluateOptions` on a split, as plain data for JSON.

    ``say`` is told what is being done. Raises the errors of :func:`load_ckpt`, :func:`load_split`
    and, for a sampler, :func:`get_sampler`.
    """
    options = options or EvaluateOptions()
    target = pick_device(device)
    content = load_ckpt(ckpt)
    config = TrainConfig.from_dict(content["config"], str(ckpt))
    model = model_from_ckpt(content, ckpt).to(target).eval()

    def load(name: SplitName) -> Split:
        return _fitting_split(ckpt, content, name, data_dir, config)

    subject = Subject(model, ckpt, config, load("train"), load(split), target)
    report: dict[str, Any] = {
        "version": REPORT_VERSION,
        "checkpoint": str(ckpt),
        "checkpoint_digest": content["digest"],
        "split": split,
        "num_images": len(subject.held_out),
        "data_digest": subject.held_out.digest,
        "epoch": content["epoch"],
        "step": content["step"],
        "config": config.to_dict(),
        "environment": environment(target),
    }
    if "likelihood" in options.parts:
        say("likelihood bounds")
        report |= _likelihood(subject, options)
    if "latents" in options.parts:
        say("latent space and probes")
        report["latents"] = _latents(subject)
    if "images" in options.parts:
        report["images"] = _images(subject, options, say)
    return report


def _fitting_split(
    ckpt: Path, content: dict[str, Any], name: SplitName, data_dir: Path | None, config: TrainConfig
) -> Split:
    split = load_split(name, data_dir, config.dataset)
    trained_on = tuple(content["data"]["image_shape"])
    if split.image_shape != trained_on:
        raise CheckpointError(
            f"{ckpt} was trained on images of shape {trained_on}, but the {name} split has "
            f"{split.image_shape}: give the --data-dir it was trained on."
        )
    return split


@dataclass(frozen=True)
class Subject:
    """A model and what it is measured with."""

    model: VAE
    ckpt: Path
    config: TrainConfig
    train: Split
    held_out: Split  # as the data set has it
    device: torch.device

    @property
    def seed(self) -> int:
        return self.config.seed

    def seen(self, split: Split) -> Split:
        """The split as the model takes it: grey, or the bits that stand for it."""
        return binarized(split) if self.config.binarize != "none" else split

    def posteriors(self, split: Split) -> Posteriors:
        return encode_split(self.model, eval_dataloader(self.seen(split), self.device))


def _likelihood(subject: Subject, options: EvaluateOptions) -> dict[str, Any]:
    """Bounds in nats per image, between what no model can reach and what needs none."""
    model, held_out, device = subject.model, subject.seen(subject.held_out), subject.device
    nats = split_nats(model, eval_dataloader(held_out, device), subject.seed)
    bound_N = nats.recon_B + nats.kl_B
    grey = subject.config.binarize == "none"
    pixels = "grey pixels" if grey else f"binarised once, SHA-256 {held_out.digest}"
    report: dict[str, Any] = {
        "unit": "nats per image, lower is better",
        "protocol": f"one posterior sample per image, {pixels}, beta = 1, "
        f"{model.likelihood} likelihood, {subject.config.prior} prior",
        "bound": mean_and_error(bound_N)._asdict(),
        "recon_loss": mean_and_error(nats.recon_B)._asdict(),
        "KL_divergence": mean_and_error(nats.kl_B)._asdict(),
    }
    if model.likelihood == "bernoulli":  # the others are densities or of levels
        report |= _anchors(subject.train, held_out, bound_N.mean().item())
    if options.iwae_samples:
        first = held_out.first(options.iwae_images)
        iwae_N = iwae_nats(
            model, eval_dataloader(first, device), subject.seed, options.iwae_samples
        )
        report["iwae"] = {
            **mean_and_error(iwae_N)._asdict(),
            "num_samples": options.iwae_samples,
            "num_images": len(first),
            "bound_of_these_images": bound_N[: len(first)].mean().item(),
        }
    return report


def _anchors(train: Split, held_out: Split, bound: float) -> dict[str, float]:
    """What no model can go below, and what one gives that has learned nothing of single images."""
    x_NCHW = held_out.pixels(slice(None))
    floor = entropy_floor(x_NCHW)
    mean_image = mean_image_nats(train.pixels(slice(None)), x_NCHW)
    return {
        "entropy_floor": floor,
        "nats_above_floor": bound - floor,
        "mean_image": mean_image,
        "share_of_gap": (mean_image - bound) / (mean_image - floor),
    }


def _latents(subject: Subject) -> dict[str, Any]:
    """How many dimensions are used, what each says, and what can be read off the means."""
    train, held_out = subject.train, subject.held_out
    posteriors = subject.posteriors(held_out)
    active = active_units(posteriors)

    def probes(train_PF: Tensor, held_out_NF: Tensor) -> dict[str, Any]:
        return {
            name: probe(train_PF, train.labels_N, held_out_NF, held_out.labels_N)._asdict()
            for name, probe in (("linear_probe", linear_probe), ("knn_probe", knn_probe))
        }

    return {
        "protocol": "posterior means; probes trained on all images of the training split: logistic "
        "regression on standardised values, majority of the 10 nearest neighbours; active: "
        f"variance of the mean above {ACTIVE_VARIANCE}; mutual information of z and the number of "
        "the image, at most log N",
        "latent_dim": subject.model.latent_dim,
        "active_units": active,
        "collapsed": active == 0,
        "kl_by_dimension": [kl._asdict() for kl in kl_by_dimension(posteriors)],
        "mutual_information": mutual_information(
            posteriors, posteriors.draw(subject.seed)
        )._asdict(),
        **probes(subject.posteriors(train).mu_NZ, posteriors.mu_NZ),
        "raw_pixels": probes(
            *(split.pixels(slice(None)).flatten(1) for split in (train, held_out))
        ),
    }


def _images(
    subject: Subject, options: EvaluateOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """FID, precision, recall, density, coverage and copying of what the model makes."""
    model, held_out, train = subject.model, subject.held_out, subject.train
    num = options.num_generated or len(held_out)
    say("features of the real images")
    real_NF = image_features(held_out.images_NCHW, subject.device)
    train_PF = image_features(train.images_NCHW, subject.device)
    chosen = torch.randperm(len(train), generator=generator(subject.seed, "real"))[:num]

    def compare(features_MF: Tensor) -> dict[str, Measured]:
        fid = frechet_distance(real_NF, features_MF, subject.seed)
        return {"fid": fid, **manifold_measures(real_NF, features_MF)}

    def judge(images_NCHW: Tensor) -> dict[str, Measured]:
        features_MF = image_features(images_NCHW, subject.device)
        return compare(features_MF) | copying(features_MF, real_NF, train_PF)

    rows = {
        "real": compare(train_PF[chosen]),
        "reconstructions": judge(decode_bytes(model, subject.posteriors(held_out).mu_NZ)),
    }
    for name in options.samplers:
        sampler = get_sampler(name, subject.ckpt, lambda: train, options.sampler, say)
        say(f"images from the {name}")
        rows[name] = judge(generate(model, sampler, num, subject.seed))
    return {
        "protocol": f"features of a Fashion-MNIST classifier (SHA-256 {WEIGHTS_SHA256[:12]}), "
        f"{num:,} generated images as bytes against the {len(held_out):,} images of the split; "
        "reconstructions of the same split from posterior means; real: as many images of the "
        "training split; 5 nearest neighbours; errors of FID by bootstrap",
        "num_generated": num,
        **{
            name: {key: value._asdict() for key, value in row.items()} for name, row in rows.items()
        },
    }
