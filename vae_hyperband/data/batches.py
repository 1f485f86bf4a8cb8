"""Batches of a split, in an order that is a pure function of (seed, epoch).

Shape suffixes: N images of a split, B images of a batch, C channels, H height, W width.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import Holdout
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.common.randomness import generator
from vae_hyperband.data.sources import AS_THEY_ARE, ImageSettings
from vae_hyperband.data.splits import Split, SplitName, load_split


class SplitBatches(TorchDataset[tuple[Tensor, Tensor]]):
    """Indexed by a tensor of image numbers: one gather and one division per batch."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = Split(split.images_NCHW.to(device), split.labels_N.to(device), split.digest)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        index_B = index_B.to(self.split.labels_N.device)
        return self.split.pixels(index_B), self.split.labels_N[index_B]


#: Batches of (images, labels).
Batches = DataLoader[tuple[Tensor, Tensor]]


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The numbers of all images in the order of an epoch, int64, shape (num_images,)."""
    return torch.randperm(num_images, generator=generator(seed, "order", epoch))


class EpochOrder(Sampler[Tensor]):
    """Yields the image numbers of each batch; the order is a pure function of (seed, epoch).

    After each complete pass the next epoch follows. ``start_at(epoch, batch)`` sets where the next
    pass begins, which is all that resuming needs.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.start_at(0)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, batch

    def order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_images)
        return epoch_order(self.num_images, self.seed, epoch)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.order(self.epoch).split(self.batch_size)[self.first_batch :]
        self.start_at(self.epoch + 1)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.batch_size) - self.first_batch


def _unchanged(batch: Any) -> Any:
    return batch


def get_dataloader(
    split: SplitName | Split,
    batch_size: int = 128,
    *,
    seed: int = 0,
    shuffle: bool | None = None,
    data_dir: Path | None = None,
    dataset: str = "fashion-mnist",
    holdout: Holdout = "content",
    data: Path | str | None = None,
    settings: ImageSettings = AS_THEY_ARE,
    device: torch.device | str = "cpu",
) -> Batches:
    """Batches ``(x_BCHW in [0, 1], labels_B)`` of a split, held in memory on ``device``.

    ``data_dir``, ``dataset``, ``holdout``, ``data`` and ``settings`` are those of
    :func:`load_split`; give the holdout of a trained model's configuration to get its own splits.
    Without ``shuffle``, the name "train" is shuffled in every epoch, everything else is in the
    split's order (also a :class:`Split`). The last batch may be smaller. ``loader.sampler`` is the
    :class:`EpochOrder`. Raises
    :class:`DataError`, and :class:`ConfigError` if a batch is larger than the split.
    """
    if shuffle is None:
        shuffle = split == "train"
    loaded = split
    if not isinstance(loaded, Split):
        loaded = load_split(loaded, data_dir, dataset, holdout, data, settings)
    if not 1 <= batch_size <= len(loaded):
        raise ConfigError(
            f"--batch-size is {batch_size}, but must be between 1 and the "
            f"{plural(len(loaded), 'image')} of the split."
        )
    return DataLoader(
        SplitBatches(loaded, device),
        sampler=EpochOrder(len(loaded), batch_size, seed, shuffle),
        batch_size=None,  # the sampler yields whole batches
        collate_fn=_unchanged,
        generator=generator(seed, "loader"),  # else DataLoader uses the global generator
    )
