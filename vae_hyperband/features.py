"""What a classifier of Fashion-MNIST sees in images: the space that FID and its kin measure in.

Inception, which papers on natural images use, was trained on 299x299 photographs; a 28x28 garment
blown up to that size lies far from anything it has seen. So the features here are those of a small
classifier of Fashion-MNIST itself, trained on the training split alone and shipped with its digest.
Its distances can be compared with each other, never with FIDs in Inception's features; who has
Inception's weights can have those, too (:func:`inception_features`).

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, F features.
"""

import functools
import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vae_hyperband.data import Split, per_split
from vae_hyperband.errors import CheckpointError, ConfigError

WEIGHTS = Path(__file__).with_name("feature_net.safetensors")

#: SHA-256 of :data:`WEIGHTS`; benchmarks/RECORDS.md says how they were made.
WEIGHTS_SHA256 = "a63a061b13e6b955be60f2566cd7dd3da4f13a0f2d65b71736f76568245d8bef"

NUM_FEATURES = 128
BATCH_SIZE = 100  # on a CPU half the time of 1000: what is in the works stays in the cache

# about the mean and standard deviation of the training split's pixels, 0.2855 and 0.3528
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3527


class FeatureNet(nn.Module):
    """Five 3x3 convolutions, each with batch normalisation and ReLU; mean over places; ten logits.

    Takes any image size from 4x4 on: the features are means over places.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128, 128, NUM_FEATURES)
        strides = (1, 2, 2, 1, 1)  # 28x28, 14x14, 7x7, 7x7, 7x7
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(widths[i + 1]),
                    nn.ReLU(),
                )
                for i, stride in enumerate(strides)
            )
        )
        self.classify = nn.Linear(NUM_FEATURES, 10)
        #: Makes the variance of the training images' features 1 on average over features.
        self.register_buffer("scale", torch.ones(()))

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> what the last layer classifies by, scaled, shape (B, F)."""
        return self._pooled(x_BCHW) * self.scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classify(self._pooled(x_BCHW))

    def _pooled(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks((x_BCHW - PIXEL_MEAN) / PIXEL_STD).mean(dim=(2, 3))


@functools.cache
def load_feature_net(device: torch.device | str = "cpu") -> FeatureNet:
    """The shipped network, in eval mode; :class:`CheckpointError` if its file is another one."""
    from safetensors.torch import load_file  # not needed where nothing but training is done

    found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() if WEIGHTS.is_file() else "no file"
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{WEIGHTS} has SHA-256 {found}, expected {WEIGHTS_SHA256}: install the package again."
        )
    net = FeatureNet()
    net.load_state_dict(load_file(WEIGHTS))
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def image_features(x_NCHW: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Features of images, as bytes or as floats in [0, 1]: float32 on the CPU, shape (N, F)."""
    if x_NCHW.shape[1] != 1:
        raise ConfigError(
            f"The feature network takes grey images, these have {x_NCHW.shape[1]} channels."
        )
    net = load_feature_net(device)
    parts = []
    for x_BCHW in x_NCHW.split(BATCH_SIZE):
        x_BCHW = x_BCHW.to(device)
        parts.append(net.features(x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW).cpu())
    return torch.cat(parts)


@per_split
def split_features(split: Split, device: torch.device | str = "cpu") -> Tensor:
    """Features of a whole split, which is looked at again and again."""
    return image_features(split.images_NCHW, device)


@torch.no_grad()
def inception_features(
    images_NCHW: Tensor, weights: Path, device: torch.device | str = "cpu"
) -> Tensor:
    """Inception's 2048 features of images as bytes: float32 on the CPU, shape (N, F).

    ``weights`` is the TorchScript translation of the network of Heusel et al. 2017 that
    StyleGAN2-ADA published as inception-2015-12-05.pt and clean-fid uses: called with bytes
    (B, 3, H, W) and ``return_features=True``, it resizes to 299x299 itself. Other networks that
    can be called like this will do, too. Raises :class:`CheckpointError` for any other file.
    """
    with warnings.catch_warnings():
        # torch.jit is deprecated, but the file that everyone compares with is in its format
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            net = torch.jit.load(weights, map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{weights} is no TorchScript file: {why}") from error
    parts = []
    for x_BCHW in images_NCHW.split(BATCH_SIZE):
        rgb_BCHW = x_BCHW.expand(-1, 3, -1, -1).contiguous().to(device)
        try:
            features_BF = net(rgb_BCHW, return_features=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} cannot be called with bytes (B, 3, H, W) and return_features=True, as "
                "inception-2015-12-05.pt can."
            ) from error
        parts.append(features_BF.float().cpu())
    return torch.cat(parts)
