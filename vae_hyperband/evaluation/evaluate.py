"""Evaluation of a trained model on a split: likelihood, latent space, generated images.

The only module that opens the test split. Each part states its protocol, and each estimate its
standard error. Choose between models on the validation split; read the test split once per number
that is published.

Shape suffixes: N images of a split, P training images, M generated images, Z latents, F features.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from vae_hyperband.common.checks import check_types, read_json, require, require_number
from vae_hyperband.common.config import Folders, Places, TrainConfig
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.common.files import write_text
from vae_hyperband.common.process import environment, own_modes, pick_device
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Images, Split, SplitName, as_split, as_trained, per_split
from vae_hyperband.data.synthetic import FACTORS, sample_factors
from vae_hyperband.evaluation.bounds import (
    LEAST_GAP,
    bits_are_of,
    bits_per_dimension,
    entropy_floor,
    eval_dataloader,
    iwae_nats,
    mean_image_nats,
    of_whole_split,
    split_nats,
)
from vae_hyperband.evaluation.features import (
    Features,
    features_for,
    file_features,
    kept,
    why_no_features,
)
from vae_hyperband.evaluation.image_quality import ImageMetrics
from vae_hyperband.evaluation.latents import (
    ACTIVE_VARIANCE,
    Posteriors,
    active_units,
    dci_disentanglement,
    encode_split,
    factor_vae_score,
    knn_probe,
    linear_probe,
    mutual_information,
    mutual_information_gap,
)
from vae_hyperband.evaluation.results import (
    VERSION,
    Estimate,
    Evaluation,
    Factors,
    GeneratedImages,
    ImportanceBound,
    Json,
    LatentSpace,
    Likelihood,
    Probes,
    mean_and_error,
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
from vae_hyperband.model.objective import kl_per_dimension
from vae_hyperband.model.vae import VAE

# ---- Every setting of an evaluation, once.

Part = Literal["likelihood", "latents", "images"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation measures, and how."""

    parts: tuple[Part, ...] = PARTS
    """likelihood: bounds; latents: active units, probes; images: FID, precision, recall ..."""
    iwae_samples: int = 100
    """Importance samples per image of the IWAE bound; 0 disables it."""
    iwae_images: int = 1000
    """Random images of the split on which the gain of the IWAE bound is measured."""
    samplers: tuple[SamplerName, ...] = SAMPLERS
    """Where z comes from for generated images; a mixture or flow is fitted first if needed."""
    num_generated: int | None = None
    """Images to generate per sampler (default: as many as the split has); FID depends on it."""
    features: Path | None = None
    """Compare images in the features of a network that you supply, a TorchScript file: bytes (B,
    3, H, W) -> (B, F) (default: of a classifier; docs/evaluation.md)."""
    inception: Path | None = None
    """Also measure FID in Inception's features: such a file (inception-2015-12-05.pt of
    StyleGAN2-ADA)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.parts) > 0, "--parts needs at least one part.")
        require_number("iwae_samples", self.iwae_samples, 0)
        require_number("iwae_images", self.iwae_images, 2)
        for name, path in (("features", self.features), ("inception", self.inception)):
            require(
                path is None or path.is_file(),
                f"--{name} is {str(path)!r}, but there is no such file.",
            )
        if self.num_generated is not None:
            require_number("num_generated", self.num_generated, 10)


#: Images of the split without which a part has no value: a variance needs two, a covariance of
#: features and the nearest neighbours some more.
LEAST_IMAGES: dict[Part, int] = {"latents": 2, "images": 10}

#: Where the images of an evaluation are.
WhereImages = Folders | Path | tuple[Images, Images] | None

# ---- The three parts of an evaluation: likelihood, latent space, generated images.


@dataclass(frozen=True)
class EvaluationContext:
    """A model and what it is measured with."""

    model: VAE
    checkpoint: Checkpoint
    train: Split
    split: SplitName
    held_out: Split  # as the data set has it
    device: torch.device

    @classmethod
    def load(
        cls, ckpt: Path | Checkpoint, split: SplitName, data: WhereImages, device: str
    ) -> Self:
        target = pick_device(device)
        checkpoint = ckpt if isinstance(ckpt, Checkpoint) else load_ckpt(ckpt)
        if isinstance(data, tuple):
            train, held_out = map(as_split, data)
            if train.digest != checkpoint.data.digest:
                raise CheckpointError(f"{checkpoint.path} was trained on other images than these.")
        else:
            train, held_out = (checkpoint.split(name, data) for name in ("train", split))
        return cls(checkpoint.model(target), checkpoint, train, split, held_out, target)

    @property
    def config(self) -> TrainConfig:
        return self.checkpoint.config

    @property
    def seed(self) -> int:
        return self.config.seed

    def seen(self, split: Split) -> Split:
        """The split as the model takes it."""
        return as_trained(split, self.config)

    def posteriors(self, split: Split) -> Posteriors:
        return encode_split(self.model, eval_dataloader(self.seen(split), self.device))


def likelihood(context: EvaluationContext, options: EvaluateOptions) -> Likelihood:
    """The bound and its parts on all images of the split, and the IWAE bound if it is wanted."""
    model, held_out = context.model, context.seen(context.held_out)
    nats = split_nats(model, eval_dataloader(held_out, context.device), context.seed)
    bound_N = nats.recon_B + nats.kl_B
    grey = context.config.binarize == "none"
    pixels = "grey pixels" if grey else f"binarised once, SHA-256 {held_out.digest}"
    anchors = {}
    if model.likelihood == "bernoulli":
        anchors = _anchors(context.train, held_out, bound_N.mean().item())
    bound = mean_and_error(bound_N)
    iwae = _iwae(context, options, bound_N) if options.iwae_samples else None
    bits = bits_of_iwae = None
    if kind := bits_are_of(model.likelihood, grey):
        given = model.likelihood, held_out.image_shape
        bits = bits_per_dimension(bound, *given)
        bits_of_iwae = bits_per_dimension(iwae, *given) if iwae else None
    return Likelihood(
        unit="nats per image, lower is better",
        protocol=f"one posterior sample per image, {pixels}, beta = 1, "
        f"{model.likelihood} likelihood, {context.config.prior} prior"
        + (f"; bits per dimension of {kind}" if kind else ""),
        bound=bound,
        recon_loss=mean_and_error(nats.recon_B),
        KL_divergence=mean_and_error(nats.kl_B),
        **anchors,
        iwae=iwae,
        bits_per_dimension=bits,
        iwae_bits_per_dimension=bits_of_iwae,
    )


def _iwae(context: EvaluationContext, options: EvaluateOptions, bound_N: Tensor) -> ImportanceBound:
    """The IWAE bound of the split, whose gain over the bound is measured on random images of it."""
    held_out, seed = context.seen(context.held_out), context.seed
    order_N = torch.randperm(len(held_out), generator=generator(seed, "iwae images"))
    chosen = held_out.subset(order_N[: options.iwae_images])
    loader = eval_dataloader(chosen, context.device)
    iwae_n = iwae_nats(context.model, loader, seed, options.iwae_samples)
    bound_N = bound_N[order_N]
    whole = of_whole_split(bound_N, iwae_n)
    return ImportanceBound(
        mean=whole.mean,
        standard_error=whole.standard_error,
        num_samples=options.iwae_samples,
        num_images=len(chosen),
        gain_on_these_images=mean_and_error(bound_N[: len(chosen)] - iwae_n),
    )


def _anchors(train: Split, held_out: Split, bound: float) -> dict[str, float | None]:
    """Two levels to read a bound by: no model can go below the entropy of the pixels, and the mean
    of the training images needs no model."""
    x_NCHW = held_out.pixels(slice(None))
    floor = entropy_floor(x_NCHW)
    mean_image = mean_image_nats(train.pixels(slice(None)), x_NCHW)
    gap = mean_image - floor
    return {
        "entropy_floor": floor,
        "nats_above_floor": bound - floor,
        "mean_image": mean_image,
        # images that hardly differ leave nothing to learn: a share of that is only rounding
        "share_of_gap": (mean_image - bound) / gap if gap > LEAST_GAP else None,
    }


def latent_space(context: EvaluationContext) -> LatentSpace:
    """Active units, nats per dimension, probes and, with known factors, disentanglement."""
    train, held_out = context.train, context.held_out
    posteriors = context.posteriors(held_out)
    active = active_units(posteriors)
    kl_NZ = kl_per_dimension(posteriors.mu_NZ.double(), posteriors.logvar_NZ.double())
    several = len(train.labels_N.unique()) > 1  # a single class gives probes nothing to tell apart
    probes = (
        "probes trained on all images of the training split: logistic regression on standardised "
        "values (ridge chosen on a tenth of them), majority of the 10 nearest neighbours"
    )
    found = LatentSpace(
        protocol=f"posterior means; {probes if several else 'no probes, all of one class'}; "
        f"active: variance of the mean above {ACTIVE_VARIANCE}; mutual information of z and the "
        "number of the image, at most log N",
        latent_dim=context.model.latent_dim,
        active_units=active,
        collapsed=active == 0,
        kl_by_dimension=[mean_and_error(kl_N) for kl_N in kl_NZ.unbind(dim=1)],
        mutual_information=mutual_information(posteriors, posteriors.draw(context.seed)),
    )
    if several:
        of_means = _probes(train, held_out, context.posteriors(train).mu_NZ, posteriors.mu_NZ)
        found = dataclasses.replace(
            found,
            linear_probe=of_means.linear_probe,
            knn_probe=of_means.knn_probe,
            raw_pixels=_pixel_probes(train, held_out),
        )
    if context.config.dataset == "drawn":
        found = dataclasses.replace(found, factors=_factors(context, posteriors.mu_NZ))
    return found


def _probes(train: Split, held_out: Split, train_PF: Tensor, held_out_NF: Tensor) -> Probes:
    labelled = train_PF, train.labels_N, held_out_NF, held_out.labels_N
    return Probes(linear_probe(*labelled), knn_probe(*labelled))


@per_split
def _pixel_probes(train: Split, held_out: Split) -> Probes:
    def measured() -> Tensor:
        flat = (split.pixels(slice(None)).flatten(1) for split in (train, held_out))
        probes = _probes(train, held_out, *flat)
        return torch.tensor(
            [[x.mean, x.standard_error] for x in (probes.linear_probe, probes.knn_probe)],
            dtype=torch.float64,
        )

    found_22 = kept(train, ("probes of pixels", held_out.content_digest()), measured)
    return Probes(*(Estimate(*row) for row in found_22.tolist()))


def _factors(context: EvaluationContext, mu_NZ: Tensor) -> Factors:
    levels_NF = sample_factors(context.split, len(mu_NZ))
    return Factors(
        names=[factor.name for factor in FACTORS],
        mig=mutual_information_gap(mu_NZ, levels_NF),
        factor_vae_score=factor_vae_score(mu_NZ, levels_NF, context.seed),
        dci=dci_disentanglement(mu_NZ, levels_NF, context.seed),
    )


def generated_images(
    context: EvaluationContext,
    options: EvaluateOptions,
    step: Callable[[str], None],
    say: Callable[[str], None],
) -> GeneratedImages:
    """The quality of real images, of reconstructions and of the samples of each sampler.

    ``step`` is called with what begins, once for the real images and once per kind of generated
    ones; ``say`` with the progress of a sampler that is fitted.
    """
    model, held_out, train = context.model, context.held_out, context.train
    num = options.num_generated or len(held_out)
    step("features of the real images")
    features = features_for(
        context.config.dataset, train, context.device, say, given=options.features
    )
    inception = file_features(options.inception, context.device) if options.inception else None
    metrics = ImageMetrics(features, inception, train, held_out, context.seed)
    chosen = torch.randperm(len(train), generator=generator(context.seed, "real"))[:num]
    kinds = {"real": metrics.of_training_images(train.images_NCHW[chosen], chosen)}
    step("reconstructions")
    mu_NZ = context.posteriors(held_out).mu_NZ[:num]
    kinds["reconstructions"] = metrics.of_generated(decode_bytes(model, mu_NZ))
    for name in options.samplers:
        step(f"images from the {name}")
        sampler = get_sampler(name, context.checkpoint, lambda: train, options.sampler, say)
        kinds[name] = metrics.of_generated(generate(model, sampler, num, context.seed))
    protocol = _image_protocol(context, features, inception)
    return GeneratedImages(protocol, kinds, features.name)


def _image_protocol(
    context: EvaluationContext, features: Features, inception: Features | None
) -> str:
    bits = ""
    if context.config.binarize != "none":
        bits = ", grey ones, although the model was trained on bits"
    also = f"; inception_fid: {inception.protocol()}" if inception else ""
    return (
        f"{features.protocol(context.held_out, context.split)}, images as bytes against all "
        f"{len(context.held_out):,} images of the split{bits}; reconstructions of the split's "
        "first images from posterior means; real: images of the training split; 5 nearest "
        f"neighbours; errors of FID by bootstrap, of KID by jackknife of 20 blocks{also}"
    )


@own_modes()
def evaluate(
    ckpt: Path | Checkpoint,
    split: SplitName = "validation",
    data: WhereImages = None,
    device: str = "auto",
    options: EvaluateOptions | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measure a checkpoint on a split: the parts that :class:`EvaluateOptions` names.

    ``data`` says where the images are, if not where the run found them: folders, such as
    ``RunOptions(data=...)``; a folder of IDX files; or, for a run that was trained on images from
    Python, a pair of its training images and those to measure on, as :func:`fit` takes them.
    ``say`` is called with a line of progress at each step. Raises the errors of :func:`load_ckpt`,
    :meth:`Checkpoint.split` and, for a sampler, :func:`get_sampler`.
    """
    options = options or EvaluateOptions()
    if split == "train" and options.parts != ("likelihood",):
        raise ConfigError(
            "Probes and image metrics need a held-out split, because they compare with the "
            "training images: with --split train, use --parts likelihood."
        )
    context = EvaluationContext.load(ckpt, split, data, device)
    # the file keeps what was asked for, so that the same question finds it again
    found = _without_parts(context, options)
    parts, num_images = set(options.parts), len(context.held_out)
    for part, least in LEAST_IMAGES.items():
        if part in parts and num_images < least:
            say(f"{part} left out: they need {least} images, and the split has {num_images}")
            parts.remove(part)
    why = "" if options.features else why_no_features(context.config.dataset, context.train)
    if "images" in parts and why:
        say(f"images left out: {why}: give --features, a TorchScript file of a network")
        parts.remove("images")
    steps = {"likelihood": 1, "latents": 1, "images": 2 + len(options.samplers)}
    total = sum(steps[part] for part in parts)
    numbers = itertools.count(1)

    def step(text: str) -> None:
        say(f"{next(numbers)} of {total}: {text}")

    if "likelihood" in parts:
        step("likelihood bounds")
        found = dataclasses.replace(found, likelihood=likelihood(context, options))
    if "latents" in parts:
        step("latent space and probes")
        found = dataclasses.replace(found, latents=latent_space(context))
    if "images" in parts:
        images = generated_images(context, options, step, say)
        found = dataclasses.replace(found, images=images)
    return found


def _without_parts(context: EvaluationContext, options: EvaluateOptions) -> Evaluation:
    """What was evaluated, and where."""
    checkpoint = context.checkpoint
    return Evaluation(
        checkpoint=str(checkpoint.path),
        checkpoint_digest=checkpoint.digest,
        split=context.split,
        options=plain_options(options),
        num_images=len(context.held_out),
        data_digest=evaluated_data(context.train, context.held_out, context.config.dataset),
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        config=checkpoint.config.to_dict(),
        environment=environment(context.device),
    )


def evaluate_once(
    path: Path,
    ckpt: Path,
    split: SplitName,
    places: Places,
    options: EvaluateOptions,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """The evaluation in ``path`` if it has the same checkpoint, data and options, or a new one.

    So a number of the test split is taken once. Data and device are those of ``places``.
    """
    checkpoint = load_ckpt(ckpt)
    train, held_out = (checkpoint.split(name, places) for name in ("train", split))
    data_digest = evaluated_data(train, held_out, checkpoint.config.dataset)
    with contextlib.suppress(ConfigError):  # no such file yet, or a broken one
        found = Evaluation.from_dict(read_json(path), str(path))
        same = (VERSION, checkpoint.digest, split, data_digest, plain_options(options))
        if same == (
            found.version, found.checkpoint_digest, found.split, found.data_digest, found.options
        ):  # fmt: skip
            return found
    found = evaluate(checkpoint, split, places, places.device, options, say)
    write_text(path, found.to_json())
    return found


def evaluated_data(train: Split, held_out: Split, dataset: str) -> str:
    """SHA-256 of all the data that an evaluation depends on."""
    # the other data sets' files are accepted by their digests, so their labels cannot change
    if dataset not in ("custom", "images"):
        return held_out.digest
    return hashlib.sha256((train.content_digest() + held_out.content_digest()).encode()).hexdigest()


def plain_options(options: EvaluateOptions) -> Json:
    """The options as JSON has them; a file is its SHA-256."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return json.loads(json.dumps(dataclasses.asdict(options), default=digest))
