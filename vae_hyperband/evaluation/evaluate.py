"""What a trained model is worth on a named split: likelihood, latent space, generated images.

The only place that opens the test split. Each part states its protocol, and each estimate its
standard error. Choose between models on the validation split; read the test split once per number
that is published.

Shape suffixes: N images of a split, P training images, M generated images, Z latents, F features.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vae_hyperband.common.config import TrainConfig, check_types, read_json, require, require_number
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.files import write_text
from vae_hyperband.common.process import environment, pick_device
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, SplitName, as_trained, load_split, per_split
from vae_hyperband.data.synthetic import FACTORS, sample_factors
from vae_hyperband.evaluation.bounds import (
    entropy_floor,
    eval_dataloader,
    iwae_nats,
    mean_image_nats,
    split_nats,
)
from vae_hyperband.evaluation.image_quality import (
    WEIGHTS_SHA256,
    Measured,
    copying,
    frechet_distance,
    image_features,
    inception_features,
    manifold_measures,
    mean_and_error,
    nearest,
    split_features,
)
from vae_hyperband.evaluation.latents import (
    ACTIVE_VARIANCE,
    Posteriors,
    active_units,
    dci_disentanglement,
    encode_split,
    factor_vae_score,
    kl_by_dimension,
    knn_probe,
    linear_probe,
    mutual_information,
    mutual_information_gap,
)
from vae_hyperband.evaluation.samplers import (
    SAMPLERS,
    SamplerConfig,
    SamplerName,
    decode_bytes,
    generate,
    get_sampler,
)
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.model.vae import VAE

# ---- Every setting of an evaluation, once. What is looked at, and how closely.

Part = Literal["likelihood", "latents", "images"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at, and how closely."""

    parts: tuple[Part, ...] = PARTS
    """likelihood: bounds; latents: active units, probes; images: FID and its kin."""
    iwae_samples: int = 100
    """Importance samples per image of the IWAE bound; 0: leave it out."""
    iwae_images: int = 1000
    """Images of the split, at random, on which what the IWAE bound gains is measured."""
    samplers: tuple[SamplerName, ...] = SAMPLERS
    """Where z comes from for generated images; what is not fitted yet is fitted first."""
    num_generated: int | None = None
    """Images to generate per sampler (default: as many as the split has); FID depends on it."""
    inception: Path | None = None
    """Measure FID in Inception's features, too: its weights as TorchScript, which you have to have
    (inception-2015-12-05.pt of StyleGAN2-ADA; docs/evaluation.md)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.parts) > 0, "--parts names no part: give at least one.")
        require_number("iwae_samples", self.iwae_samples, 0)
        require_number("iwae_images", self.iwae_images, 2)
        require(
            self.inception is None or self.inception.is_file(),
            f"--inception is {str(self.inception)!r}, but there is no such file.",
        )
        if self.num_generated is not None:
            require_number("num_generated", self.num_generated, 10)


# ---- The three parts of an evaluation: likelihood, latent space, generated images.


@dataclass(frozen=True)
class Subject:
    """A model and what it is measured with."""

    model: VAE
    checkpoint: Checkpoint
    train: Split
    split: SplitName
    held_out: Split  # as the data set has it
    device: torch.device

    @property
    def config(self) -> TrainConfig:
        return self.checkpoint.config

    @property
    def seed(self) -> int:
        return self.config.seed

    def seen(self, split: Split) -> Split:
        return as_trained(split, self.config)

    def posteriors(self, split: Split) -> Posteriors:
        return encode_split(self.model, eval_dataloader(self.seen(split), self.device))


def likelihood(subject: Subject, options: EvaluateOptions) -> dict[str, Any]:
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
        order_N = torch.randperm(len(held_out), generator=generator(subject.seed, "iwae images"))
        some = held_out.subset(order_N[: options.iwae_images])
        iwae_n = iwae_nats(model, eval_dataloader(some, device), subject.seed, options.iwae_samples)
        bound_N = bound_N[order_N]
        report["iwae"] = {
            **of_whole_split(bound_N, iwae_n)._asdict(),
            "num_samples": options.iwae_samples,
            "num_images": len(some),
            "gain_on_these_images": mean_and_error(bound_N[: len(some)] - iwae_n)._asdict(),
        }
    return report


def of_whole_split(bound_N: Tensor, iwae_n: Tensor) -> Measured:
    """The split's IWAE bound, from the bound of all images and what the first n gain on it.

    The gain varies over images much less than the bounds do, so few images are enough for it. The
    variance of the sum of the two means is var(b)/N + var(d)/n + 2 cov(b, d)/N, d = iwae - b.
    """
    total, n = len(bound_N), len(iwae_n)
    pair_2n = torch.stack((bound_N[:n], iwae_n - bound_N[:n])).double()
    covariance_22 = pair_2n.cov() if n > 1 else torch.full((2, 2), math.nan)
    variance = (
        bound_N.double().var() / total + covariance_22[1, 1] / n + 2 * covariance_22[0, 1] / total
    )
    mean = bound_N.double().mean() + pair_2n[1].mean()
    return Measured(mean.item(), variance.clamp(min=0).sqrt().item())


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


def latent_space(subject: Subject) -> dict[str, Any]:
    """How many dimensions are used, what each says, and what can be read off the means."""
    train, held_out = subject.train, subject.held_out
    posteriors = subject.posteriors(held_out)
    active = active_units(posteriors)
    several = len(train.labels_N.unique()) > 1  # of one class there is nothing to tell apart
    probes = (
        "probes trained on all images of the training split: logistic regression on standardised "
        "values (ridge chosen on a tenth of them), majority of the 10 nearest neighbours"
    )
    report = {
        "protocol": f"posterior means; {probes if several else 'no probes, all of one class'}; "
        f"active: variance of the mean above {ACTIVE_VARIANCE}; mutual information of z and the "
        "number of the image, at most log N",
        "latent_dim": subject.model.latent_dim,
        "active_units": active,
        "collapsed": active == 0,
        "kl_by_dimension": [kl._asdict() for kl in kl_by_dimension(posteriors)],
        "mutual_information": mutual_information(
            posteriors, posteriors.draw(subject.seed)
        )._asdict(),
    }
    if several:
        report |= _probes(train, held_out, subject.posteriors(train).mu_NZ, posteriors.mu_NZ)
        report["raw_pixels"] = _pixel_probes(train, held_out)
    if subject.config.dataset == "drawn":
        report["factors"] = _factors(subject, posteriors.mu_NZ)
    return report


def _probes(
    train: Split, held_out: Split, train_PF: Tensor, held_out_NF: Tensor
) -> dict[str, dict[str, float]]:
    return {
        name: probe(train_PF, train.labels_N, held_out_NF, held_out.labels_N)._asdict()
        for name, probe in (("linear_probe", linear_probe), ("knn_probe", knn_probe))
    }


@per_split
def _pixel_probes(train: Split, held_out: Split) -> dict[str, dict[str, float]]:
    flat = (split.pixels(slice(None)).flatten(1) for split in (train, held_out))
    return _probes(train, held_out, *flat)


def _factors(subject: Subject, mu_NZ: Tensor) -> dict[str, Any]:
    """How cleanly the dimensions separate the factors that the split was drawn from."""
    levels_NF = sample_factors(subject.split, len(mu_NZ))
    return {
        "names": [factor.name for factor in FACTORS],
        "mig": mutual_information_gap(mu_NZ, levels_NF),
        "factor_vae_score": factor_vae_score(mu_NZ, levels_NF, subject.seed),
        "dci": dci_disentanglement(mu_NZ, levels_NF, subject.seed),
    }


def generated_images(
    subject: Subject,
    options: EvaluateOptions,
    step: Callable[[str], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """FID, precision, recall, density, coverage and copying of what the model makes.

    ``step`` is told what begins, once for the real images and once per kind of made ones; ``say``
    what a sampler that is fitted has to say.
    """
    model, held_out, train = subject.model, subject.held_out, subject.train
    num = options.num_generated or len(held_out)
    step("features of the real images")
    real_NF, train_PF = (split_features(split, subject.device) for split in (held_out, train))
    held_out_N = nearest(real_NF, train_PF, 1)[0][:, 0]
    chosen = torch.randperm(len(train), generator=generator(subject.seed, "real"))[:num]
    inception_fid = _inception_fid(subject, options)

    def compare(features_MF: Tensor, images_NCHW: Tensor) -> dict[str, Measured]:
        fid = frechet_distance(real_NF, features_MF, subject.seed)
        return {"fid": fid, **manifold_measures(real_NF, features_MF), **inception_fid(images_NCHW)}

    def judge(images_NCHW: Tensor) -> dict[str, Measured]:
        features_MF = image_features(images_NCHW, subject.device)
        nearest_M = nearest(features_MF, train_PF, 1)[0][:, 0]
        return compare(features_MF, images_NCHW) | copying(nearest_M, held_out_N)

    rows = {"real": compare(train_PF[chosen], train.images_NCHW[chosen])}
    step("reconstructions")
    mu_NZ = subject.posteriors(held_out).mu_NZ[:num]
    rows["reconstructions"] = judge(decode_bytes(model, mu_NZ))
    counts = {"real": len(chosen), "reconstructions": len(mu_NZ)}
    for name in options.samplers:
        step(f"images from the {name}")
        sampler = get_sampler(name, subject.checkpoint, lambda: train, options.sampler, say)
        rows[name], counts[name] = judge(generate(model, sampler, num, subject.seed)), num
    bits = inception = ""
    if subject.config.binarize != "none":
        bits = ", grey ones, although the model was trained on bits"
    if options.inception:
        digest = hashlib.sha256(options.inception.read_bytes()).hexdigest()
        inception = f"; inception_fid: in the features of {options.inception.name} ({digest[:12]})"
    return {
        "protocol": f"features of a Fashion-MNIST classifier (SHA-256 {WEIGHTS_SHA256[:12]}), "
        f"images as bytes against all {len(held_out):,} images of the split{bits}; "
        "reconstructions of the split's first images from posterior means; real: images of the "
        f"training split; 5 nearest neighbours; errors of FID by bootstrap{inception}",
        **{
            name: {
                "num_images": counts[name],
                **{key: value._asdict() for key, value in row.items()},
            }
            for name, row in rows.items()
        },
    }


def _inception_fid(
    subject: Subject, options: EvaluateOptions
) -> Callable[[Tensor], dict[str, Measured]]:
    """FID in Inception's features, against the split, of images as bytes; nothing if not asked."""
    if options.inception is None:
        return lambda images_NCHW: {}
    weights, device = options.inception, subject.device
    real_NF = inception_features(subject.held_out.images_NCHW, weights, device)

    def measure(images_NCHW: Tensor) -> dict[str, Measured]:
        features_MF = inception_features(images_NCHW, weights, device)
        return {"inception_fid": frechet_distance(real_NF, features_MF, subject.seed)}

    return measure


#: Of the report's layout and protocols.
REPORT_VERSION = 5


def evaluate(
    ckpt: Path | Checkpoint,
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
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else load_ckpt(ckpt)
    subject = Subject(
        checkpoint.model(target),
        checkpoint,
        checkpoint.split("train", data_dir),
        split,
        checkpoint.split(split, data_dir),
        target,
    )
    report: dict[str, Any] = {
        "version": REPORT_VERSION,
        "checkpoint": str(checkpoint.path),
        "checkpoint_digest": checkpoint.digest,
        "split": split,
        "options": plain(options),
        "num_images": len(subject.held_out),
        "data_digest": subject.held_out.digest,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "config": checkpoint.config.to_dict(),
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
    checkpoint = load_ckpt(ckpt)
    asked = {
        "version": REPORT_VERSION,
        "checkpoint_digest": checkpoint.digest,
        "split": split,
        "data_digest": load_split(split, data_dir, checkpoint.config.dataset).digest,
        "options": plain(options),
    }
    with contextlib.suppress(ConfigError):  # no such file yet, or a broken one
        report = read_json(path)
        if {name: report.get(name) for name in asked} == asked:
            return report
    report = evaluate(checkpoint, split, data_dir, device, options, say)
    write_text(path, json.dumps(report, indent=2) + "\n")
    return report


def plain(options: EvaluateOptions) -> dict[str, Any]:
    """The options as JSON has them; a file is its SHA-256."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return json.loads(json.dumps(dataclasses.asdict(options), default=digest))
