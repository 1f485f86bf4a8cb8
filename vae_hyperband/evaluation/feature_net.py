"""A small classifier of images, and how it is trained: its last features are what FID compares in.

Shape suffixes: B images of a batch, N images of a split, C channels, H height, W width, F features,
K classes.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vae_hyperband.common.randomness import generator
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split
from vae_hyperband.model.schedules import learning_rate_at

NUM_FEATURES = 128
BATCH_SIZE = 100  # on a CPU twice as fast as 1000: activations stay in the cache


class NetSettings(NamedTuple):
    """What a network is built for. The defaults are Fashion-MNIST."""

    labels: tuple[int, ...] = tuple(range(10))  # of the K classes, in ascending order
    # of a channel of the training images; Fashion-MNIST's are 0.2855 and 0.3528, about these
    pixel_mean: tuple[float, ...] = (0.2860,)
    pixel_std: tuple[float, ...] = (0.3527,)
    halvings: int = 0  # stages of stride 2 before the others


class FeatureNet(nn.Module):
    """Five 3x3 convolutions, each with batch normalisation and ReLU; mean over places; K logits.

    Takes any image size: the features are means over places. More convolutions of stride 2 may go
    before the five (:attr:`NetSettings.halvings`), which saves time.
    """

    scale: Tensor
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, settings: NetSettings = NetSettings()) -> None:  # noqa: B008, a constant
        super().__init__()
        self.settings = settings
        halvings = settings.halvings
        widths = (len(settings.pixel_mean), *(32,) * halvings, 32, 64, 128, 128, NUM_FEATURES)
        strides = (*(2,) * halvings, 1, 2, 2, 1, 1)  # 28x28: 28x28, 14x14, 7x7, 7x7, 7x7
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
        self.classify = nn.Linear(NUM_FEATURES, len(settings.labels))
        #: Makes the variance of the training images' features 1 on average over features.
        self.register_buffer("scale", torch.ones(()))
        for name, values in (("mean_C11", settings.pixel_mean), ("std_C11", settings.pixel_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> what the last layer classifies by, scaled, shape (B, F)."""
        return self._pooled(x_BCHW) * self.scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classify(self._pooled(x_BCHW))

    def labels_of(self, features_NF: Tensor) -> Tensor:
        """The labels that the network gives to images with these features, int64, shape (N,)."""
        classes_N = self.classify(features_NF / self.scale).argmax(dim=1)
        return torch.tensor(self.settings.labels, device=classes_N.device)[classes_N]

    def folded(self) -> "FeatureNet":
        """The same function in eval mode with fewer steps: no normalisations, channels last.

        Each normalisation is folded into the weights before it. On a CPU that takes 0.8 of the
        time.
        """
        net, blocks = copy.deepcopy(self), list[nn.Module]()
        for block in net.blocks.children():
            conv, norm, relu = cast(Any, block)
            blocks += [fuse_conv_bn_eval(conv, norm), relu]
        net.blocks = nn.Sequential(*blocks)
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _pooled(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks((x_BCHW - self.mean_C11) / self.std_C11).mean(dim=(2, 3))


# ---- Training

SEED, PEAK, WEIGHT_DECAY, SMOOTHING = 0, 6e-3, 5e-2, 0.1

#: Images that a network of a user's own data is trained on, each as often as it is shown. On two
#: free cores that is about a minute at 28x28 (1,700 images per second of one core, measured); a
#: small data set gets no more than MOST_EPOCHS.
IMAGES_SHOWN, MOST_EPOCHS = 150_000, 30

#: Side that the five convolutions begin at, about: 0.4 of the time that they take from 28 on.
FIRST_SIDE = 14

SCALED_BY = 10_000  # random training images, whose features' variance is 1


def settings_for(train: Split) -> NetSettings:
    """The network for the images of a split: its classes, its pixels, its size."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(train.image_shape[0]):
        # whole numbers: the sums are exact, whatever their order
        counts = torch.zeros(256, dtype=torch.int64)
        for part in train.images_NCHW.split(1000):
            counts += torch.bincount(part[:, channel].flatten(), minlength=256)
        share = counts.double() / counts.sum()
        mean = float((share * levels).sum())
        variance = float((share * (levels - mean).square()).sum())
        means.append(mean)
        stds.append(max(math.sqrt(variance), 1 / 255))  # a channel may be empty
    shorter = min(train.image_shape[1:])
    return NetSettings(
        labels=tuple(train.labels_N.unique().tolist()),
        pixel_mean=tuple(means),
        pixel_std=tuple(stds),
        halvings=max(0, round(math.log2(shorter / FIRST_SIDE))),
    )


def train_own(train: Split) -> FeatureNet:
    """A network that classifies the images of a training split; on the CPU, in eval mode.

    A function of the split, but for rounding, which depends on the machine and its threads.
    """
    batch_size = min(len(train), 128, max(16, len(train) // 20))
    steps = min(
        MOST_EPOCHS * math.ceil(len(train) / batch_size), max(1, IMAGES_SHOWN // batch_size)
    )
    return train_feature_net(train, settings_for(train), batch_size, steps)


def train_feature_net(
    train: Split, settings: NetSettings, batch_size: int, num_steps: int, bfloat16: bool = False
) -> FeatureNet:
    """AdamW, one-cycle, label smoothing; images flipped and shifted. In eval mode, on the CPU."""
    with torch.random.fork_rng(devices=[]):  # the layers start from the process's own generator
        net = FeatureNet(settings)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _initialize(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=WEIGHT_DECAY, fused=True)
    labels_K = torch.tensor(settings.labels)
    for step, (x_BCHW, labels_B) in enumerate(_batches(train, batch_size, num_steps)):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, num_steps, PEAK, "one-cycle")
        x_BCHW = _augmented(x_BCHW, step).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = net(x_BCHW)
        classes_B = torch.searchsorted(labels_K, labels_B)
        loss = F.cross_entropy(logits.float(), classes_B, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    # as a network that is read from a file: the other layout rounds differently
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    some = torch.randperm(len(train), generator=generator(SEED, "scale"))[:SCALED_BY]
    parts = train.images_NCHW[some].split(BATCH_SIZE)
    features_NF = torch.cat([net.features(part / 255) for part in parts])
    net.scale.copy_(features_NF.var(dim=0).mean().clamp(min=1e-12).rsqrt())
    return net


def _batches(train: Split, batch_size: int, num: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``num`` batches of as many epochs as they need."""
    loader = get_dataloader(train, batch_size, seed=SEED, shuffle=True)
    while True:
        for x_BCHW, labels_B in loader:
            if num == 0:
                return
            num -= 1
            if len(x_BCHW) == 1:  # has no variance for the batch normalisation
                x_BCHW, labels_B = x_BCHW.repeat(2, 1, 1, 1), labels_B.repeat(2)
            yield x_BCHW, labels_B


def _initialize(net: FeatureNet) -> None:
    """He initialisation from our own generator."""
    stream = generator(SEED, "init")
    for parameter in net.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, 0, math.sqrt(2 / fan_in), generator=stream)
    nn.init.zeros_(net.classify.bias)


def _augmented(x_BCHW: Tensor, step: int) -> Tensor:
    """Each image flipped or not, and the batch shifted, at 28x28 by up to two pixels."""
    height, width = x_BCHW.shape[2:]
    most = max(1, round(min(height, width) / 14))
    stream = generator(SEED, "augment", step)
    flip_B = torch.rand(len(x_BCHW), generator=stream) < 0.5
    down, right = torch.randint(-most, most + 1, (2,), generator=stream).tolist()
    x_BCHW = torch.where(flip_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    padded = F.pad(x_BCHW, (most,) * 4)
    return padded[:, :, most + down : most + down + height, most + right : most + right + width]


@torch.no_grad()
def accuracy(net: FeatureNet, split: Split) -> float:
    """Share of the images of a split whose label the network finds."""
    found_N = torch.cat(
        [net.labels_of(net.features(part / 255)) for part in split.images_NCHW.split(BATCH_SIZE)]
    )
    return (found_N == split.labels_N).double().mean().item()
