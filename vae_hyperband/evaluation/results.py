"""What an evaluation found: its parts by name, and how evaluation.json holds them.

In the file the likelihood's keys lie beside those of the whole, and each kind of images beside the
protocol of the images; a part or a measure that was not taken is left out.
"""

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Self, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from vae_hyperband.common.errors import ConfigError
from vae_hyperband.data.splits import SplitName

#: Of the layout of evaluation.json and of the protocols that its numbers follow.
VERSION = 7

#: What tables call the features of the shipped classifier; evaluations before version 6 had these
#: alone, for all data sets.
FASHION_MNIST_FEATURES = "Fashion-MNIST features"

Json = dict[str, Any]  # an object of a JSON file


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error. ``f"{estimate:.2f}"`` gives both: ``240.51 +- 0.88``."""

    mean: float
    standard_error: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} +- {self.standard_error:{spec}}"


def mean_and_error(values_N: Tensor) -> Estimate:
    """Mean and the standard error of that mean, the values being independent samples."""
    values_N = values_N.double()
    spread = values_N.std().item() if len(values_N) > 1 else math.nan
    return Estimate(values_N.mean().item(), spread / math.sqrt(len(values_N)))


@dataclass(frozen=True)
class ImportanceBound(Estimate):
    """The IWAE bound of the whole split, from its gain over the bound on some of the images."""

    num_samples: int  # of z per image
    num_images: int
    gain_on_these_images: Estimate


@dataclass(frozen=True)
class Likelihood:
    """Bounds in nats per image, between what no model can reach and what needs none.

    Bits per dimension, of which the protocol says more, are None for grey pixels under a Bernoulli.
    """

    unit: str
    protocol: str
    bound: Estimate
    recon_loss: Estimate
    KL_divergence: Estimate
    # of Bernoulli likelihoods only: the others are densities, or of levels
    entropy_floor: float | None = None
    nats_above_floor: float | None = None
    mean_image: float | None = None
    #: Of the gap from the mean image to the floor, what the bound closes; None without a gap.
    share_of_gap: float | None = None
    iwae: ImportanceBound | None = None
    bits_per_dimension: Estimate | None = None
    iwae_bits_per_dimension: Estimate | None = None


@dataclass(frozen=True)
class Probes:
    """Accuracies of classifiers of the labels."""

    linear_probe: Estimate
    knn_probe: Estimate


@dataclass(frozen=True)
class Factors:
    """How cleanly latent dimensions separate the known factors of synthetic garments."""

    names: list[str]
    mig: float
    factor_vae_score: float
    dci: dict[str, float]  # disentanglement, completeness, informativeness


@dataclass(frozen=True)
class LatentSpace:
    """How many dimensions are used, what each carries, and what can be predicted from the means."""

    protocol: str
    latent_dim: int
    active_units: int
    collapsed: bool
    kl_by_dimension: list[Estimate]  # to N(0, 1), in nats
    mutual_information: Estimate  # of z and the number of the image, in nats
    linear_probe: Estimate | None = None  # the probes are None if all images are of one class
    knn_probe: Estimate | None = None
    raw_pixels: Probes | None = None
    factors: Factors | None = None  # of synthetic garments only


@dataclass(frozen=True)
class ImageQuality:
    """One kind of images against the split's. See :mod:`vae_hyperband.evaluation.image_quality`."""

    num_images: int
    fid: Estimate
    kid: Estimate | None = None  # None in files before version 6
    # the next four are None for images that do not differ
    precision: Estimate | None = None
    recall: Estimate | None = None
    density: Estimate | None = None
    coverage: Estimate | None = None
    inception_fid: Estimate | None = None  # with --inception only
    nearest_training_image: Estimate | None = None  # None for training images themselves
    nearest_training_image_of_held_out: Estimate | None = None
    closer_than_held_out: Estimate | None = None


@dataclass(frozen=True)
class GeneratedImages:
    """The quality of images by their kind: real, reconstructions, and one per sampler."""

    protocol: str
    kinds: dict[str, ImageQuality]
    features: str | None = None  # what tables call them; None in files before version 6

    @property
    def fid_name(self) -> str:
        """With the features, without which no two can be compared: ``FID (own classifier)``."""
        return f"FID ({self.features or FASHION_MNIST_FEATURES})"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A checkpoint on a split. A part that the options leave out is None."""

    version: int = VERSION
    checkpoint: str
    checkpoint_digest: str
    split: SplitName
    options: Json
    num_images: int
    data_digest: str
    epoch: int
    step: int
    config: Json
    environment: Json
    likelihood: Likelihood | None = None
    latents: LatentSpace | None = None
    images: GeneratedImages | None = None

    def to_dict(self) -> Json:
        """Plain data for JSON, as evaluation.json holds it."""
        content = _plain(self)
        likelihood, latents, images = (
            content.pop(part, {}) for part in ("likelihood", "latents", "images")
        )
        content |= likelihood
        if latents:
            content["latents"] = latents
        if images:
            kinds = images.pop("kinds")
            content["images"] = {**images, **kinds}
        return content

    def to_json(self) -> str:
        """The text of evaluation.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, content: Json, source: str) -> Self:
        """The evaluation that :meth:`to_dict` gave. Raises :class:`ConfigError`, naming the source,
        for anything else."""
        try:
            parts: Json = {"likelihood": content if "bound" in content else None}
            if images := content.get("images"):
                about = {name: images[name] for name in ("protocol", "features") if name in images}
                kinds = {kind: row for kind, row in images.items() if kind not in about}
                parts["images"] = {"protocol": images["protocol"], **about, "kinds": kinds}
            found = _read(cls, content | parts)
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{source} is not an evaluation of this version: run vae-hyperband evaluate again."
            ) from error
        assert isinstance(found, cls)
        return found

    def __getitem__(self, key: str) -> Any:
        """A key of evaluation.json: ``evaluation["bound"]["mean"]``."""
        return self.to_dict()[key]


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, without what is None."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: _plain(part) for name, part in parts.items() if part is not None}


def _read(kind: Any, value: Any) -> Any:
    """The value of a field of that type from plain data. Keys that no field has are ignored."""
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _read(get_args(kind)[0], value)
    if get_origin(kind) is list:
        return [_read(get_args(kind)[0], element) for element in value]
    if get_origin(kind) is dict:
        return {key: _read(get_args(kind)[1], element) for key, element in value.items()}
    if dataclasses.is_dataclass(kind):
        hints, make = get_type_hints(kind), cast(Any, kind)
        return make(**{name: _read(hints[name], value[name]) for name in hints if name in value})
    if kind in (bool, int, float, str):
        expected = (int, float) if kind is float else kind
        if not isinstance(value, expected):
            raise TypeError(f"{value!r} is not of type {kind}")
    return value
