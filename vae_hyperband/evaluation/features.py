"""The features in which images are compared: of which network, chosen by the data set in one place.

Inception, which papers on natural images use, was trained on 299x299 photographs; a 28x28 garment
blown up to that size lies far from anything it has seen. So garments are compared in the features
of a small classifier of Fashion-MNIST, trained on the training split alone and shipped with its
digest. Other images are compared in those of a classifier of their own labels, trained when it is
first needed and kept in the user's cache; or in those of a network of the user's. FIDs in other
features cannot be compared.

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, F features.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import CheckpointError, ConfigError, DataError, RunFolderError
from vae_hyperband.common.files import cache_folder, make_folder, write_bytes
from vae_hyperband.data.splits import Split, per_split
from vae_hyperband.evaluation.feature_net import BATCH_SIZE, FeatureNet, NetSettings, train_own
from vae_hyperband.evaluation.results import FASHION_MNIST_FEATURES
from vae_hyperband.model.checkpoint import tree_digest

WEIGHTS = Path(__file__).with_name("feature_net.safetensors")

#: SHA-256 of :data:`WEIGHTS`; benchmarks/RECORDS.md says how they were made.
WEIGHTS_SHA256 = "a63a061b13e6b955be60f2566cd7dd3da4f13a0f2d65b71736f76568245d8bef"

#: Of the recipe of :mod:`~vae_hyperband.evaluation.feature_net`: a new one trains all nets again.
RECIPE = 1

#: Data sets of garments of 28x28, which the shipped network knows; synthetic ones are like them.
GARMENTS = ("fashion-mnist", "drawn")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Features:
    """A function from images to vectors. Equal ones have the same network on the same device."""

    name: str  # as tables have it: FID (own classifier)
    of: str  # what the features are of, for protocols
    digest: str  # SHA-256 of the network
    device: torch.device
    #: Images on the device, (B, C, H, W), bytes -> (B, F).
    compute: Callable[[Tensor], Tensor] = field(compare=False, repr=False)
    net: FeatureNet | None = field(default=None, compare=False, repr=False)

    @torch.no_grad()
    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Features of images, as bytes or as floats in [0, 1]: float32 on the CPU, shape (N, F)."""
        parts = [self.compute(x_BCHW.to(self.device)) for x_BCHW in x_NCHW.split(BATCH_SIZE)]
        return torch.cat([part.float().cpu() for part in parts])

    def protocol(self, held_out: Split | None = None, name: str = "") -> str:
        """Whose features they are; of an own classifier, with its accuracy on a split."""
        right = ""
        if self.net and self.name != FASHION_MNIST_FEATURES and held_out:
            found_N = self.net.labels_of(split_features(held_out, self).to(self.device)).cpu()
            share = (found_N == held_out.labels_N).double().mean().item()
            right = f"accuracy {share:.3f} on the {name} split, "
        return f"features of {self.of} ({right}SHA-256 {self.digest[:12]})"


@per_split
def split_features(split: Split, features: Features) -> Tensor:
    """Features of a whole split, kept for the next evaluation."""
    facts = ("features", features.digest, features.device.type)
    return kept(split, facts, lambda: features(split.images_NCHW))


# ---- What depends on images alone, in the user's cache

#: Of what is kept: a change of how it is computed needs a new one.
KEPT_VERSION = 1

#: Fewer images are measured again in a second; more bytes, or older files, are not kept.
LEAST_KEPT, MOST_KEPT_BYTES, MOST_KEPT_FILES = 5000, 64 << 20, 12


def kept(split: Split, facts: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
    """A tensor of a split and the facts that it depends on besides: from the cache, or computed
    and put there."""
    if len(split) < LEAST_KEPT:
        return compute()
    about = (KEPT_VERSION, split.image_shape, split.content_digest(), *facts)
    key, path = _cached("measured", *about)
    if path is None:
        return compute()
    found = _read_kept(path, key)
    if found is None:
        found = compute()
        if found.nbytes <= MOST_KEPT_BYTES:
            _write_kept(path, key, found)
    return found


def _cached(kind: str, *depends_on: object) -> tuple[str, Path | None]:
    """The key of what depends on that, and its file in the user's cache, if there can be one."""
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    try:
        return key, cache_folder() / kind / f"{key[:32]}.safetensors"
    except DataError:  # a user without a home directory
        return key, None


def _read_kept(path: Path, key: str) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    # whatever a damaged file makes the reader raise
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, SafetensorError):
        with safe_open(path, "pt") as file:
            about, found = file.metadata() or {}, file.get_tensor("found")
        if about == {"key": key, "digest": tree_digest({"found": found})}:
            os.utime(path)
            return found
    return None


def _write_kept(path: Path, key: str, found: Tensor) -> None:
    import safetensors.torch

    about = {"key": key, "digest": tree_digest({"found": found})}
    # a cache that cannot be written, or that another process tidies at the same time
    with contextlib.suppress(RunFolderError, OSError):
        make_folder(path.parent)
        write_bytes(path, safetensors.torch.save({"found": found.contiguous()}, about))
        files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in files[:-MOST_KEPT_FILES]:
            old.unlink()


# ---- Which features


def why_no_features(dataset: str, train: Split) -> str:
    """Why a data set has no features of its own; empty if it has."""
    if dataset in GARMENTS:
        return ""
    if len(train.labels_N.unique()) < 2:
        why = "images without labels have no classifier of their own"
    elif all(bool((x == train.images_NCHW[:1]).all()) for x in train.images_NCHW.split(1000)):
        why = "a classifier of equal images has learned nothing"
    else:
        return ""
    return f"FID and the measures beside it compare features, and {why}"


def features_name(dataset: str) -> str:
    """What tables call the features of a data set."""
    return FASHION_MNIST_FEATURES if dataset in GARMENTS else "own classifier"


def check_features(dataset: str, train: Split) -> None:
    """Raise :class:`ConfigError` if training cannot measure FID on such images."""
    if why := why_no_features(dataset, train):
        raise ConfigError(
            f"{why}: remove --fid-samples or --metric fid, or sort the images into one folder per "
            "label."
        )


def features_for(
    dataset: str,
    train: Split,
    device: torch.device | str = "cpu",
    say: Say = lambda text: None,
    given: Path | None = None,
) -> Features:
    """The features for images like those of the training split: the one place that chooses.

    ``given`` is a file of :func:`file_features`, which goes before all others. Otherwise garments
    are compared in the shipped network's features, other images in those of a classifier of the
    training split; it is fitted if the cache does not have it, and ``say`` tells. Raises
    :class:`ConfigError` for images without labels.
    """
    if given is not None:
        return file_features(given, device)
    check_features(dataset, train)
    return shipped_features(device) if dataset in GARMENTS else own_features(train, device, say)


def _of_net(net: FeatureNet, name: str, of: str, digest: str, device: torch.device) -> Features:
    net = net.to(device).eval().requires_grad_(False)
    folded, channels = net.folded(), len(net.settings.pixel_mean)

    def compute(x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[1] != channels:
            raise ConfigError(
                f"The features of {of} are of images with {plural(channels, 'channel')}, these "
                f"have {x_BCHW.shape[1]}."
            )
        return folded.features(x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW)

    return Features(name, of, digest, device, compute, net)


# ---- The shipped network


@functools.cache
def shipped_features(device: torch.device | str = "cpu") -> Features:
    """Those of the shipped classifier. Raises :class:`CheckpointError` if its file differs."""
    from safetensors.torch import load_file  # training does not need it

    found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if WEIGHTS.is_file() else "no file"
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{WEIGHTS} has SHA-256 {found}, expected {WEIGHTS_SHA256}: install the package again."
        )
    net = FeatureNet()
    net.load_state_dict(load_file(WEIGHTS))
    of = "a Fashion-MNIST classifier"
    return _of_net(net, FASHION_MNIST_FEATURES, of, WEIGHTS_SHA256, torch.device(device))


# ---- A classifier of the training split, kept in the user's cache


def own_features(
    train: Split, device: torch.device | str = "cpu", say: Say = lambda text: None
) -> Features:
    """Those of a classifier of the split's labels, which it is trained on if it is new."""
    key, path = _cached("features", RECIPE, train.image_shape, train.content_digest())
    net = _read_net(path, key, say)
    if net is None:
        say(f"fitting a classifier of the {plural(len(train), 'training image')}, for features")
        begun = time.monotonic()
        net = train_own(train)
        # two processes may fit it: all go on with the first one's
        net = _read_net(path, key, say) or _written(net, path, key, say)
        say(f"fitting the classifier took {time.monotonic() - begun:.0f} s")
    of = "a classifier of the training split"
    return _of_net(net, "own classifier", of, _digest(net), torch.device(device))


def _digest(net: FeatureNet) -> str:
    return tree_digest({"settings": json.dumps(net.settings), "net": dict(net.state_dict())})


def _written(net: FeatureNet, path: Path | None, key: str, say: Say) -> FeatureNet:
    """The network, which a file has from now on, if the cache can be written."""
    import safetensors.torch

    if path is not None:
        about = {"key": key, "settings": json.dumps(net.settings), "digest": _digest(net)}
        weights = {name: value.contiguous() for name, value in net.state_dict().items()}
        try:
            make_folder(path.parent)
            write_bytes(path, safetensors.torch.save(weights, about))
        except RunFolderError as error:
            say(f"the classifier is not kept: {error}")
    return net


def _read_net(path: Path | None, key: str, say: Say) -> FeatureNet | None:
    """The network in a file of :func:`_written`; None if there is none that is intact."""
    from safetensors import SafetensorError, safe_open

    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        labels, mean, std, halvings = json.loads(about["settings"])
        with torch.random.fork_rng(devices=[]):
            net = FeatureNet(NetSettings(tuple(labels), tuple(mean), tuple(std), halvings))
        net.load_state_dict(state)
        if (about["key"], about["digest"]) == (key, _digest(net)):
            return net
        why = "its content does not match its digest"
    # whatever a damaged file makes the reader, the settings or the network raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        why = type(error).__name__
    say(f"{path} is damaged ({why}): its classifier is fitted again")
    return None


# ---- A network of the user's


def file_features(path: Path, device: torch.device | str = "cpu", name: str = "") -> Features:
    """Those of a TorchScript network of the user's: bytes (B, 3, H, W) -> (B, F), F at will.

    A network of grey images may take (B, 1, H, W). One whose ``forward`` has an argument
    ``return_features`` is called with True, as the TorchScript translation of the network of
    Heusel et al. 2017 that StyleGAN2-ADA published as inception-2015-12-05.pt and clean-fid uses,
    which resizes to 299x299 itself. Raises :class:`CheckpointError` for any other file.
    """
    content = _content(path)
    with warnings.catch_warnings():
        # torch.jit is deprecated, but the file that everyone compares with is in its format
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            net: Any = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path} is not a TorchScript file: {why}") from error
    arguments = [argument.name for argument in net.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in arguments else {}

    def compute(x_BCHW: Tensor) -> Tensor:
        if x_BCHW.is_floating_point():
            x_BCHW = (x_BCHW * 255).round().to(torch.uint8)
        # in colour first, since most networks take that
        kinds = {3: x_BCHW.expand(-1, 3, -1, -1), x_BCHW.shape[1]: x_BCHW}
        for number, images_BCHW in enumerate(kinds.values(), start=1):
            try:
                found: Any = net(images_BCHW.contiguous(), **options)
                break
            except (RuntimeError, torch.jit.Error) as error:
                if number == len(kinds):
                    raise CheckpointError(
                        f"{path} cannot be called with bytes {tuple(images_BCHW.shape)}: "
                        f"{str(error).strip().splitlines()[-1]}"
                    ) from error
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(x_BCHW):
            raise CheckpointError(
                f"{path} gives {shape} for {plural(len(x_BCHW), 'image')}, expected features of "
                f"shape ({len(x_BCHW)}, F): give a network that returns one vector per image."
            )
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"{path} gives features that are not finite: give another file.")
        return found

    digest = hashlib.sha256(content).hexdigest()
    name = name or f"features of {path.name}"
    return Features(name, path.name, digest, torch.device(device), compute)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
