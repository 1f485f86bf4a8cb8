"""The command ``data``: find or fetch Fashion-MNIST and check it."""

from dataclasses import dataclass
from pathlib import Path

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import Dataset
from vae_hyperband.data.download import ensure_data
from vae_hyperband.data.splits import SplitName, load_split


@dataclass(frozen=True)
class DataArgs:
    """Find or fetch Fashion-MNIST and check it.

    vae-hyperband data
    """

    data_dir: Path | None = None
    """Check the four files in this folder instead of fetching any."""
    dataset: Dataset = "fashion-mnist"
    """custom: other data in the same format, in --data-dir; drawn: garments made here."""
    install: bool = False
    """Where no mirror can be reached, install the system's package if this user may."""


def data(argv: list[str]) -> int:
    args = parse_options(DataArgs, argv, "vae-hyperband data")
    if args.data_dir is None and args.dataset == "fashion-mnist":
        ensure_data(args.install)
    names: tuple[SplitName, ...] = ("train", "validation", "test")
    for name in names:
        split = load_split(name, args.data_dir, args.dataset)
        print(f"{name:10} {len(split):6,} images {split.image_shape}, file {split.digest[:12]}...")
    return 0
