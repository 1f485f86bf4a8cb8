"""The command ``data``: find or download Fashion-MNIST, or decode your own images; show them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.checks import plural
from vae_hyperband.common.config import DataConfig, Folders, with_data
from vae_hyperband.common.files import check_place
from vae_hyperband.data.decoded import ImageSet, decoded_set, verified
from vae_hyperband.data.download import ensure_data
from vae_hyperband.data.sources import SPLITS
from vae_hyperband.data.splits import image_settings, missing_classes, split_for

MOST_LINES = 12  # of classes, sizes or skipped files
NUM_IN_ROW = 12  # of the contact sheet


@dataclass(frozen=True, kw_only=True)
class DataArgs(ConfigFile, DataConfig):
    """Find or download Fashion-MNIST and verify it, or decode your own images and show them.

    vae-hyperband data --data path/to/folder --image-size 64
    """

    data: Path | None = None
    """Your own images: a folder (labels are its folders), .zip, .tar, .npy, .npz or .parquet."""
    data_dir: Path | None = None
    """Verify the four IDX files in this folder; download nothing."""
    sheet: Path | None = None
    """--data: write a contact sheet to this .png file (default: beside the decoded images)."""
    install: bool = False
    """If no mirror can be reached, install the system's package, if this user is allowed to."""


def data(argv: list[str]) -> int:
    args = parse_options(DataArgs, argv, "vae-hyperband data")
    config = with_data(args, args.data)
    if args.data is not None:
        show_images(args.data, config, args.sheet)
        return 0
    if args.data_dir is None and args.dataset == "fashion-mnist":
        ensure_data(args.install)
    folders = Folders(data_dir=args.data_dir)
    splits = [split_for(args, folders, name) for name in SPLITS]
    for name, split in zip(SPLITS, splits, strict=True):
        num_images = plural(len(split), "image")
        print(f"{name:10} {num_images:>13} {split.image_shape}, file {split.digest[:12]}...")
    if missing := missing_classes(splits[0], splits[1]):
        print(f"note: {missing}")
    return 0


def show_images(path: Path, config: DataConfig, sheet: Path | None) -> None:
    """Decode the images at a path, say what was found, and draw some of them."""
    if sheet:
        check_place(sheet, ".png", option="--sheet")
    found = verified(decoded_set(path, image_settings(config)))
    splits = {name: found.rows(name) for name in SPLITS if found.counts[name]}
    channels, height, width = found.image_shape
    colours = "grey" if channels == 1 else "red, green, blue"
    print(f"{path}: {found.kind}, as {height}x{width} images, {colours}")
    labels_N = found.labels_N
    classes = sorted(set(labels_N.tolist()))
    names = [_name(found, label) for label in classes]
    wide = max(len(name) for name in ["label", *names])
    if len(classes) > 1:
        print(f"{'label':{wide}} " + " ".join(f"{name:>10}" for name in splits))
        for label, name in list(zip(classes, names, strict=True))[:MOST_LINES]:
            counts = [int((labels_N[rows] == label).sum()) for rows in splits.values()]
            print(f"{name:{wide}} " + " ".join(f"{count:>10,}" for count in counts))
        if len(classes) > MOST_LINES:
            print(f"... {plural(len(classes) - MOST_LINES, 'label')} more")
    print(f"{'all':{wide}} " + " ".join(f"{found.counts[name]:>10,}" for name in splits))
    for line in _remarks(found):
        print(line)
    from vae_hyperband.reporting import figures

    sheet = figures.contact_sheet(_shown(found), sheet or found.folder / "contact_sheet.png")
    print(f"decoded images: {found.folder}")
    print(f"contact sheet: {sheet}")


def _name(found: ImageSet, label: int) -> str:
    return found.class_names[label] if label < len(found.class_names) else str(label)


def _remarks(found: ImageSet) -> list[str]:
    """What people should know of the images before they train on them."""
    lines = []
    given = [name for name in SPLITS if name not in found.by_hash]
    if not given:
        lines.append("splits: by a hash of each image, 5/7, 1/7 and 1/7")
    elif found.by_hash:
        taken = " and ".join(found.by_hash)
        lines.append(f"splits: {taken} taken from train by a hash of each image, 1/7 each")
    sizes = [f"{size} ({num:,})" for size, num in found.sizes.items()]
    lines.append(f"sizes: {_first(sizes)}")
    lines.append(f"modes: {_first([f'{mode} ({num:,})' for mode, num in found.modes.items()])}")
    lines += [f"{note}: {plural(num, 'image')}" for note, num in found.notes.items()]
    lines += [f"left out: {remark}" for remark in found.remarks]
    if found.skipped:
        lines.append(f"skipped: {plural(len(found.skipped), 'image')}")
        shown = list(found.skipped.items())[:MOST_LINES]
        lines += [f"  {name}: {reason}" for name, reason in shown]
        if len(found.skipped) > MOST_LINES:
            lines.append(f"  ... {len(found.skipped) - MOST_LINES:,} more")
    if found.repeated:
        lines.append(f"repeated: {plural(found.repeated, 'image')} with the content of another one")
    lines += [
        f"warning: {plural(n, 'image')} in two splits: {two}" for two, n in found.twice.items()
    ]
    return lines


def _first(words: list[str]) -> str:
    more = f", ... {len(words) - MOST_LINES} more" if len(words) > MOST_LINES else ""
    return ", ".join(words[:MOST_LINES]) + more


def _shown(found: ImageSet) -> dict[str, torch.Tensor]:
    """Some images of each class, by its name."""
    images_NCHW, labels_N = found.images_NCHW, found.labels_N
    shown = {}
    for label in sorted(set(labels_N.tolist()))[:MOST_LINES]:
        rows = (labels_N == label).nonzero()[0][:NUM_IN_ROW]
        shown[_name(found, label)] = torch.from_numpy(images_NCHW[rows])
    return shown
