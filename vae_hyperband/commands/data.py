"""The command ``data``: find or download Fashion-MNIST and verify it."""

from dataclasses import dataclass
from pathlib import Path

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.config import Dataset, Holdout, plural
from vae_hyperband.data.download import ensure_data
from vae_hyperband.data.splits import SplitName, load_split, missing_classes


@dataclass(frozen=True)
class DataArgs(ConfigFile):
    """Find or download Fashion-MNIST and verify it.

    vae-hyperband data
    """

    data_dir: Path | None = None
    """Verify the four files in this folder; download nothing."""
    dataset: Dataset = "fashion-mnist"
    """custom: the IDX files in --data-dir; drawn: synthetic garments, which need no files."""
    holdout: Holdout = "content"
    """custom: the sixth of the training file to validate on, by a hash of each image or the last"""
    install: bool = False
    """If no mirror can be reached, install the system's package, if this user is allowed to."""


def data(argv: list[str]) -> int:
    args = parse_options(DataArgs, argv, "vae-hyperband data")
    if args.data_dir is None and args.dataset == "fashion-mnist":
        ensure_data(args.install)
    names: tuple[SplitName, ...] = ("train", "validation", "test")
    splits = [load_split(name, args.data_dir, args.dataset, args.holdout) for name in names]
    for name, split in zip(names, splits, strict=True):
        num_images = plural(len(split), "image")
        print(f"{name:10} {num_images:>13} {split.image_shape}, file {split.digest[:12]}...")
    if missing := missing_classes(splits[0], splits[1]):
        print(f"note: {missing}")
    return 0
