"""Where z comes from when images are generated: the prior, a mixture of Gaussians, or a flow.

The decoder was trained on z from the posteriors of the training images. Their mixture is not the
prior, and differs the more the lower beta is (Rosca, Lakshminarayanan & Mohamed 2018). A small
second model of those z closes most of that gap (Dai & Wipf 2019, section 4). It is fitted to the
training split's latents alone, label by label, so that it can generate one kind of garment.

Shape suffixes: N samples, P training images, Z latent dimensions, K components, L labels.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from vae_hyperband.common.checks import check_types, require, require_number
from vae_hyperband.common.errors import CheckpointError, ConfigError, DataError, RunFolderError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.splits import Split, as_trained
from vae_hyperband.evaluation.bounds import eval_batch_size, eval_dataloader
from vae_hyperband.evaluation.flow import Flow, fit_flow
from vae_hyperband.evaluation.latents import Posteriors, encode_split
from vae_hyperband.model.checkpoint import Checkpoint, load_pt, save_pt
from vae_hyperband.model.vae import VAE

SamplerName = Literal["prior", "mixture", "flow"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

FORMAT = "vae-hyperband sampler"
_KEYS_1 = frozenset({"checkpoint", "sampler", "fitted", "tensors"})
#: "data" came with version 2: SHA-256 of the images and labels that it was fitted to.
KEYS = {1: _KEYS_1, 2: _KEYS_1 | {"data"}}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a sampler is fitted."""

    components: int = 20
    """Gaussians per class of the mixture; their covariances are full, or diagonal if too large."""
    flow_epochs: int = 40
    """Passes of the flow over the training split's latents."""
    flow_width: int = 256
    """Hidden units of the flow's layers."""
    flow_depth: int = 3
    """Residual blocks of the flow."""

    def __post_init__(self) -> None:
        check_types(self)
        for field in dataclasses.fields(self):
            require_number(field.name, getattr(self, field.name), 1)

    def of(self, name: SamplerName) -> dict[str, int]:
        """The settings that a sampler depends on."""
        settings = dataclasses.asdict(self)
        return {
            key: settings[key] for key in settings if key.startswith("flow") == (name == "flow")
        }


@dataclass(frozen=True)
class Prior:
    """z ~ p(z), the model's own prior, which the bound is of."""

    model: VAE

    def draw(self, num: int, stream: torch.Generator, label: int | None = None) -> Tensor:
        if label is not None:
            raise ConfigError("The prior knows no labels: use --sampler mixture or flow.")
        return self.model.sample_prior(num, stream)


#: Nats per image that a round of expectation-maximisation has to gain to be followed by another:
#: with a tenth of it a fit takes three times as long, for the same FID (benchmarks/RECORDS.md).
TOLERANCE = 0.01

MAX_ROOTS_BYTES = 256 << 20  # of a mixture, in memory and in its file
MAX_CHUNK_BYTES = 64 << 20  # of the matrices that samples are multiplied by at a time


def covariance_kind(num_labels: int, components: int, latent_dim: int) -> Literal["full", "diag"]:
    """What a mixture of that size has."""
    return "full" if 8 * num_labels * components * latent_dim**2 <= MAX_ROOTS_BYTES else "diag"


@dataclass(frozen=True)
class Mixture:
    """Gaussians, up to K for each label. float64.

    Their covariances are full, or diagonal where full ones would take more than
    :data:`MAX_ROOTS_BYTES`.
    """

    shares_L: Tensor  # of the labels in the training split
    weights_LK: Tensor
    means_LKZ: Tensor
    roots_LKZZ: Tensor  # lower Cholesky factors of the covariances; (L, K, Z) if they are diagonal

    @classmethod
    def fit(cls, z_PZ: Tensor, label_P: Tensor, components: int, seed: int) -> Self:
        # scikit-learn takes a second to import, and every worker of a search imports this
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits

        counts_L, shares_L = label_P.bincount(), _shares(label_P)
        require(bool((counts_L > 1).any()), "No label has two training images to fit a mixture to.")
        num_labels, latent_dim = len(shares_L), z_PZ.shape[1]
        kind = covariance_kind(num_labels, components, latent_dim)
        weights_LK = torch.zeros(num_labels, components, dtype=torch.float64)
        means_LKZ = torch.zeros(num_labels, components, latent_dim, dtype=torch.float64)
        unit = torch.eye(latent_dim) if kind == "full" else torch.ones(latent_dim)
        roots_LKZZ = unit.double().repeat(num_labels, components, *[1] * unit.dim())
        for label in (counts_L > 1).nonzero()[:, 0].tolist():
            num = min(components, int(counts_L[label]))  # fewer for a rare label
            model = GaussianMixture(
                num, covariance_type=kind, tol=TOLERANCE, reg_covar=1e-4,
                random_state=seed & 0xFFFFFFFF,
            )  # fmt: skip
            # the matrices are small: two threads take two to four times as long as one
            with warnings.catch_warnings(), threadpool_limits(1):
                # a fit that has not converged after 100 rounds is good enough
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(z_PZ[label_P == label].double().numpy())
            weights_LK[label, :num] = torch.from_numpy(model.weights_)
            means_LKZ[label, :num] = torch.from_numpy(model.means_)
            covariances = torch.from_numpy(model.covariances_)
            roots_LKZZ[label, :num] = (
                torch.linalg.cholesky(covariances) if kind == "full" else covariances.sqrt()
            )
        # a single image has no covariance of its own: it takes one of the most frequent label
        for label in (counts_L == 1).nonzero()[:, 0].tolist():
            weights_LK[label, 0] = 1
            means_LKZ[label, 0] = z_PZ[label_P == label][0]
            roots_LKZZ[label, 0] = roots_LKZZ[int(counts_L.argmax()), 0]
        return cls(shares_L, weights_LK, means_LKZ, roots_LKZZ)

    def draw(self, num: int, stream: torch.Generator, label: int | None = None) -> Tensor:
        label_N = _labels(self.shares_L, num, stream, label)
        component_N = torch.multinomial(self.weights_LK[label_N], 1, generator=stream)[:, 0]
        mean_NZ = self.means_LKZ[label_N, component_N]
        noise_NZ = torch.randn(mean_NZ.shape, generator=stream, dtype=torch.float64)
        if self.roots_LKZZ.dim() == 3:
            return (mean_NZ + self.roots_LKZZ[label_N, component_N] * noise_NZ).float()
        # in chunks: each sample takes a matrix of its own, (Z, Z)
        size = max(1, MAX_CHUNK_BYTES // (8 * mean_NZ.shape[1] ** 2))
        parts = zip(*(x.split(size) for x in (label_N, component_N, noise_NZ)), strict=True)
        steps = [
            torch.einsum("nzy,ny->nz", self.roots_LKZZ[labels, components], noise)
            for labels, components, noise in parts
        ]
        return (mean_NZ + torch.cat(steps)).float()


@dataclass(frozen=True)
class LearnedFlow:
    """A flow from noise to z, given the label."""

    shares_L: Tensor
    flow: Flow

    def draw(self, num: int, stream: torch.Generator, label: int | None = None) -> Tensor:
        return self.flow.draw(_labels(self.shares_L, num, stream, label), stream)


Sampler = Prior | Mixture | LearnedFlow


def _shares(label_P: Tensor) -> Tensor:
    return label_P.bincount().double() / len(label_P)


def _labels(shares_L: Tensor, num: int, stream: torch.Generator, label: int | None) -> Tensor:
    """The given label, or labels as frequent as in the training split; shape (N,)."""
    if label is None:
        return torch.multinomial(shares_L, num, replacement=True, generator=stream)
    if not (0 <= label < len(shares_L) and shares_L[label] > 0):
        raise ConfigError(f"No training image has the label {label}, so none can be drawn.")
    return torch.full((num,), label)


def sampler_file(ckpt: Path, name: SamplerName) -> Path:
    """Where a checkpoint's sampler is kept: best.flow.pt beside best.pt."""
    return ckpt.with_name(f"{ckpt.stem}.{name}.pt")


def get_sampler(
    name: SamplerName,
    checkpoint: Checkpoint,
    load_train: Callable[[], Split],
    config: SamplerConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Sampler:
    """The sampler of a checkpoint: read from the file beside it, or fitted and saved there.

    If that file is damaged, or of another checkpoint, other settings or other data, the sampler is
    fitted again. ``load_train`` gives the training split. It is called to fit, and for data whose
    labels may change: without the data, a sampler that is there is used. Raises
    :class:`CheckpointError` if it is not the data that the checkpoint was trained on.
    """
    config = config or SamplerConfig()
    model = checkpoint.model()
    if name == "prior":
        return Prior(model)
    path = sampler_file(checkpoint.path, name)
    facts = {"checkpoint": checkpoint.digest, "sampler": name, "fitted": config.of(name)}
    if path.exists():
        try:
            found = load_pt(path, FORMAT, KEYS)
        except CheckpointError:
            say(f"{path} is damaged or of another version: fitting again")
        else:
            same = {key: found[key] for key in facts} == facts
            if same and _same_data(found.get("data"), checkpoint, load_train):
                return _from_tensors(name, found["tensors"], config)
    say(f"fitting the {name} to the training split's latents")
    train = load_train()
    if train.digest != checkpoint.data.digest:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other images than these, so no {name} can be "
            "fitted: give the --data-dir it was trained on, or leave the sampler out."
        )
    posteriors = encode_split(model, eval_dataloader(as_trained(train, checkpoint.config)))
    seed = checkpoint.config.seed
    sampler = fit_sampler(name, posteriors, train.labels_N, seed, config, say)
    try:
        content = {**facts, "tensors": _to_tensors(sampler), "data": train.content_digest()}
        save_pt(path, content, FORMAT, KEYS)
    except RunFolderError as error:  # perhaps another user's folder
        say(f"the {name} is not saved: {error}")
    return sampler


def _same_data(
    fitted_to: str | None, checkpoint: Checkpoint, load_train: Callable[[], Split]
) -> bool:
    """Whether the training split is still what a sampler was fitted to, as far as can be told."""
    # the other data sets' files are accepted by their digests, so their labels cannot change
    if checkpoint.config.dataset != "custom":
        return True
    with contextlib.suppress(DataError, ConfigError):  # the data are not here
        return load_train().content_digest() == fitted_to
    return True


def fit_sampler(
    name: SamplerName,
    posteriors: Posteriors,
    label_P: Tensor,
    seed: int,
    config: SamplerConfig,
    say: Callable[[str], None] = lambda text: None,
) -> Mixture | LearnedFlow:
    """Fit a mixture or a flow to samples of the posteriors. Deterministic in its arguments."""
    if name == "mixture":
        sizes = (int(label_P.max()) + 1, config.components, posteriors.mu_NZ.shape[1])
        if covariance_kind(*sizes) == "diag":
            say("the mixture's covariances are diagonal: full ones would take too much memory")
        return Mixture.fit(posteriors.draw(seed), label_P, config.components, seed)
    shares_L = _shares(label_P)

    def on_epoch(epoch: int, loss: float) -> None:
        if (epoch + 1) % 10 == 0:
            say(f"flow epoch {epoch + 1}/{config.flow_epochs}, loss {loss:.4f}")

    flow = fit_flow(
        _meta_flow(posteriors.mu_NZ.shape[1], len(shares_L), config),
        lambda epoch: posteriors.draw(seed, epoch),
        label_P,
        seed,
        config.flow_epochs,
        on_epoch,
    )
    return LearnedFlow(shares_L, flow)


def _meta_flow(latent_dim: int, num_labels: int, config: SamplerConfig) -> Flow:
    """A flow without weights."""
    with torch.device("meta"):
        return Flow(latent_dim, num_labels, config.flow_width, config.flow_depth)


def _to_tensors(sampler: Mixture | LearnedFlow) -> dict[str, Tensor]:
    if isinstance(sampler, Mixture):
        return {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    return {"shares_L": sampler.shares_L, **sampler.flow.state_dict()}


def _from_tensors(name: str, tensors: dict[str, Tensor], config: SamplerConfig) -> Sampler:
    if name == "mixture":
        return Mixture(**tensors)
    shares_L = tensors.pop("shares_L")
    flow = _meta_flow(len(tensors["mean_Z"]), len(shares_L), config)
    flow.load_state_dict(tensors, assign=True)
    return LearnedFlow(shares_L, flow.eval().requires_grad_(False))


@torch.no_grad()
def generate(
    model: VAE, sampler: Sampler, num: int, seed: int = 0, label: int | None = None
) -> Tensor:
    """Images decoded from samples of z, as bytes, shape (N, C, H, W), on the CPU."""
    z_NZ = sampler.draw(num, generator(seed, "sample"), label)
    return decode_bytes(model, z_NZ)


@torch.no_grad()
def decode_bytes(model: VAE, z_NZ: Tensor) -> Tensor:
    """Decoded latents as bytes: the mean of each pixel."""
    device = next(model.parameters()).device
    return torch.cat(
        [
            (model.decode_images(z_BZ.to(device)) * 255).round().to(torch.uint8).cpu()
            for z_BZ in z_NZ.split(eval_batch_size(model.image_shape))
        ]
    )
