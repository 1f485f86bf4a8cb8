"""The command ``evaluate``; ``encode``, ``reconstruct``, ``nearest``, ``score``: image by image."""

import csv
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro

from vae_hyperband.commands.options import (
    ConfigFile,
    NetworkOption,
    RunArg,
    find_ckpt,
    parse_options,
)
from vae_hyperband.commands.sample import save_pictures
from vae_hyperband.common.checks import plural, require, require_number
from vae_hyperband.common.config import Folders, RunOptions
from vae_hyperband.common.errors import DataError
from vae_hyperband.common.files import check_place, write_bytes, write_text
from vae_hyperband.common.process import cpu_threads, pick_device
from vae_hyperband.data.pictures import PictureError, bombs_refused, decode
from vae_hyperband.data.sources import ImageSettings, SplitName
from vae_hyperband.data.splits import Split, as_trained, image_settings, read_only_tensor
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.evaluation.latents import encode_images
from vae_hyperband.evaluation.samplers import decode_bytes
from vae_hyperband.evaluation.scores import above_entropy, auroc, encode, nearest_codes, scores
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.reporting import figures
from vae_hyperband.reporting.summaries import print_progress
from vae_hyperband.reporting.tables import evaluation_text

TABLES = (".npz", ".parquet", ".csv")
MOST_IN_TABLE = 10  # anomalies that are printed

ImagesArg = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="[IMAGE ...]", help="Image files, resized as those of the run were."),
]


@dataclass(frozen=True)
class EvaluateArgs(ConfigFile):
    """Measure a trained model: bounds, latent space, generated images, with standard errors.

    vae-hyperband evaluate mine --split test --json mine.json

    A mixture or flow is fitted on first use and saved beside the checkpoint.
    """

    run: RunArg
    evaluation: tyro.conf.OmitArgPrefixes[EvaluateOptions]
    split: Literal["train", "validation", "test"] = "validation"
    """The images to measure on: choose between models on validation, publish numbers on test."""
    json: Path | None = None
    """Also write the result with its protocol to this .json file; - prints it, without tables."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    num_threads: int | None = None
    """CPU threads (default: PyTorch's own choice)."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


def evaluate_command(argv: list[str]) -> int:
    args = parse_options(EvaluateArgs, argv, "vae-hyperband evaluate")
    RunOptions(num_threads=args.num_threads)  # checks it
    stdout = args.json == Path("-")
    if args.json and not stdout:
        check_place(args.json, ".json", option="--json")  # fail before the work
    with cpu_threads(args.num_threads):
        ckpt = find_ckpt(args.run, args.folders)
        found = evaluate(
            ckpt, args.split, args.folders, args.device, args.evaluation, print_progress
        )
    if args.json and not stdout:
        write_text(args.json, found.to_json())
    print(found.to_json(), end="") if stdout else print(evaluation_text(found))
    return 0


# ---- Image by image


class Named(NamedTuple):
    """Images with their names."""

    split: Split
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class CodesArgs(ConfigFile):
    """What the four commands share."""

    run: RunArg
    split: SplitName | None = None
    """A split of the images that the run was trained on (default without others: validation)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)

    def checkpoint(self) -> Checkpoint:
        return load_ckpt(find_ckpt(self.run, self.folders))


@dataclass(frozen=True, kw_only=True)
class EncodeArgs(CodesArgs):
    """Write the latent code, the bound and its parts of each image to a file.

    vae-hyperband encode mine --data photos --out latents.parquet
    """

    images: ImagesArg = ()
    out: Path = Path("latents.npz")
    """.npz, .parquet or .csv: mu, logvar, bound, reconstruction, KL, label and file per image."""


@dataclass(frozen=True, kw_only=True)
class ReconstructArgs(CodesArgs):
    """Draw images and what the model makes of them.

    vae-hyperband reconstruct mine photo1.jpg photo2.jpg --out reconstructions.png
    """

    images: ImagesArg = ()
    out: Path = Path("reconstructions.png")
    """.png: one grid; no ending: a new folder with a PNG file for each reconstruction."""
    num_images: int = 48
    """Without images: how many of the split, or of --data."""


@dataclass(frozen=True, kw_only=True)
class NearestArgs(CodesArgs):
    """Find the images whose codes are nearest to that of an image.

    vae-hyperband nearest mine photo.jpg --split train --out nearest.png
    """

    image: tyro.conf.Positional[str]
    """An image file, or the number of an image of the validation split."""
    num_images: int = 15
    """How many to find."""
    out: Path = Path("nearest.png")
    """.png: the image, then those found, the nearest first."""


@dataclass(frozen=True, kw_only=True)
class ScoreArgs(CodesArgs):
    """Rank images by how unlike the training images they are: anomalies first.

    vae-hyperband score mine --data new --against ordinary --out scores.csv
    """

    images: ImagesArg = ()
    against: Path | None = None
    """Ordinary images: print the AUROC of telling the scored ones from these, with its interval."""
    iwae_samples: int = 0
    """Take the IWAE bound of this many samples per image, which is tighter; 0: the bound."""
    out: Path | None = None
    """Also write the scores to this .csv, .parquet or .npz file."""


def encode_command(argv: list[str]) -> int:
    args = parse_options(EncodeArgs, argv, "vae-hyperband encode")
    check_place(args.out, *TABLES)
    checkpoint = args.checkpoint()
    found = images_of(args, checkpoint, args.images, args.folders.data)
    encoded = encode(checkpoint.model(pick_device(args.device)), found.split, checkpoint.config)
    columns = {
        "file": np.array(found.names),
        "label": found.split.labels_N.numpy(),
        "class": np.array(_classes(found.split.labels_N.tolist(), checkpoint.class_names)),
        "bound": encoded.bound_N.numpy(),
        "reconstruction": encoded.reconstruction_N.numpy(),
        "KL": encoded.kl_N.numpy(),
        "mu": encoded.mu_NZ.numpy(),
        "logvar": encoded.logvar_NZ.numpy(),
    }
    if args.folders.data:  # files in the order of their names
        order = sorted(range(len(found.names)), key=found.names.__getitem__)
        columns = {name: column[order] for name, column in columns.items()}
    write_table(args.out, columns)
    print(
        f"{args.out}: {plural(len(found.names), 'image')}, {checkpoint.config.latent_dim} latents"
    )
    return 0


def reconstruct_command(argv: list[str]) -> int:
    args = parse_options(ReconstructArgs, argv, "vae-hyperband reconstruct")
    require_number("num_images", args.num_images, 1, 4096)
    if args.out.suffix:
        check_place(args.out, ".png")
    checkpoint = args.checkpoint()
    found = images_of(args, checkpoint, args.images, args.folders.data)
    num = len(found.names) if args.images else args.num_images
    seen = as_trained(
        found.split.subset(torch.arange(min(num, len(found.names)))), checkpoint.config
    )
    images_NCHW = seen.pixels(slice(None))
    model = checkpoint.model(pick_device(args.device))
    if args.out.suffix:
        others = args.images or args.folders.data or args.split == "train"
        shown = "the images" if others else "images the model has not seen"
        figures.reconstructions(model, images_NCHW, args.out, shown)
    else:
        pictures = decode_bytes(model, encode_images(model, images_NCHW).mu_NZ)
        save_pictures(pictures, args.out)
    print(args.out)
    return 0


def nearest_command(argv: list[str]) -> int:
    args = parse_options(NearestArgs, argv, "vae-hyperband nearest")
    require_number("num_images", args.num_images, 1, 1000)
    check_place(args.out, ".png")
    checkpoint = args.checkpoint()
    model = checkpoint.model(pick_device(args.device))
    wanted = _wanted(args, checkpoint)
    found = images_of(args, checkpoint, (), args.folders.data)
    [mu_Z] = encode(model, wanted.split, checkpoint.config).mu_NZ
    mu_NZ = encode(model, found.split, checkpoint.config).mu_NZ
    distances, numbers = nearest_codes(mu_Z, mu_NZ, args.num_images)
    for distance, number in zip(distances.tolist(), numbers.tolist(), strict=True):
        print(f"{distance:8.3f}  {found.names[number]}")
    shown = torch.cat((wanted.split.images_NCHW, found.split.images_NCHW[numbers])) / 255
    title = f"{wanted.names[0]}, then the nearest of {plural(len(found.names), 'image')} by code"
    print(figures.images(shown, title, args.out))
    return 0


def score_command(argv: list[str]) -> int:
    args = parse_options(ScoreArgs, argv, "vae-hyperband score")
    require_number("iwae_samples", args.iwae_samples, 0)
    if args.out:
        check_place(args.out, *TABLES)
    checkpoint = args.checkpoint()
    model, config = checkpoint.model(pick_device(args.device)), checkpoint.config
    found = images_of(args, checkpoint, args.images, args.folders.data)
    ordinary = _of_data(args.against, checkpoint) if args.against else None
    score_N = scores(model, found.split, config, args.iwae_samples)
    kind = f"IWAE-{args.iwae_samples} bound" if args.iwae_samples else "bound"
    kind += " above the entropy of its pixels" if above_entropy(config) else ""
    print(f"{plural(len(score_N), 'image')}, {kind} in nats/image: mean {score_N.mean():.2f}")
    order = score_N.argsort(descending=True, stable=True).tolist()
    for number in order[:MOST_IN_TABLE]:
        print(f"{score_N[number]:10.2f}  {found.names[number]}")
    if ordinary:
        against_M = scores(model, ordinary.split, config, args.iwae_samples)
        area = auroc(score_N, against_M)
        print(
            f"against {plural(len(against_M), 'image')} of {args.against}, mean "
            f"{against_M.mean():.2f}: AUROC {area.value:.4f} (95% interval {area.low:.4f} to "
            f"{area.high:.4f})"
        )
    if args.out:
        names = np.array([found.names[number] for number in order])
        write_table(args.out, {"file": names, "score": score_N[order].numpy()})
        print(args.out)
    return 0


# ---- Images: files, a folder or archive of them, or a split of the run


def images_of(
    args: CodesArgs, checkpoint: Checkpoint, images: tuple[Path, ...], data: Path | None
) -> Named:
    """The images that a command is about, of the shape that the model takes."""
    given = [
        name
        for name, value in (("image files", images), ("--data", data), ("--split", args.split))
        if value
    ]
    require(len(given) < 2, f"{' and '.join(given)} all say which images: give only one of them.")
    if images:
        return _of_files(images, checkpoint)
    if data is not None:
        return _of_data(data, checkpoint)
    name = args.split or "validation"
    split = checkpoint.split(name, args.folders)
    return Named(split, _names_of(split, name, checkpoint, args.folders))


def _settings(checkpoint: Checkpoint) -> ImageSettings:
    channels, height, width = checkpoint.data.image_shape
    return ImageSettings((height, width), checkpoint.config.fit, channels)


def _of_files(paths: tuple[Path, ...], checkpoint: Checkpoint) -> Named:
    pixels = []
    with bombs_refused():
        for path in paths:
            try:
                picture = decode(path.read_bytes(), *_settings(checkpoint))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}.") from error
            except PictureError as error:
                raise DataError(f"{path} is {error}: give an image file.") from error
            pixels.append(torch.from_numpy(picture.pixels_CHW.copy()))
    split = Split(torch.stack(pixels), torch.full((len(paths),), -1), "")
    return Named(split, [str(path) for path in paths])


def _of_data(path: Path, checkpoint: Checkpoint) -> Named:
    """All images at a path, of all of its splits."""
    from vae_hyperband.data.decoded import decoded_set

    found = decoded_set(path, _settings(checkpoint))
    labels_N = _run_labels(found.labels_N, found.class_names, checkpoint.class_names)
    # as they are in the map: another order would copy it into memory
    images_NCHW = read_only_tensor(found.images_NCHW)
    split = Split(images_NCHW, torch.from_numpy(labels_N), found.digest, found.class_names)
    return Named(split, found.names)


def _classes(labels: list[int], names: tuple[str, ...]) -> list[str]:
    """The names of labels; empty for -1, and for one without a name."""
    return [names[label] if 0 <= label < len(names) else "" for label in labels]


def _run_labels(
    labels_N: np.ndarray, names: tuple[str, ...], of_run: tuple[str, ...]
) -> np.ndarray:
    """Labels of other data in the numbers of the run; -1 for a class that it does not have."""
    if not of_run:
        return labels_N
    number = {name: label for label, name in enumerate(of_run)}
    known = [number.get(name, -1) for name in _classes(labels_N.tolist(), names)]
    # data without names of classes, such as arrays, have the run's numbers or none
    return np.array(known) if names else np.full_like(labels_N, -1)


def _names_of(split: Split, name: SplitName, checkpoint: Checkpoint, folders: Folders) -> list[str]:
    """File names where the run has files, else numbers."""
    if checkpoint.config.dataset == "images":
        from vae_hyperband.data.decoded import decoded_set

        path = folders.data or Path(str(checkpoint.data.path))
        found = decoded_set(path, image_settings(checkpoint.config))
        return found.names[found.rows(name)]
    return [f"{name}[{number}]" for number in range(len(split))]


def _wanted(args: NearestArgs, checkpoint: Checkpoint) -> Named:
    """The one image that others are to be near to."""
    path = Path(args.image)
    if path.is_file() or not args.image.isdecimal():
        return _of_files((path,), checkpoint)
    split, number = checkpoint.split("validation", args.folders), int(args.image)
    require(
        number < len(split),
        f"The image is {number}, but the validation split has {plural(len(split), 'image')}.",
    )
    chosen = split.subset(torch.tensor([number]))
    return Named(chosen, [f"validation[{number}]"])


# ---- Tables


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Columns of equal length as .npz, .parquet or .csv; those of two dimensions are vectors."""
    if path.suffix == ".npz":
        content = io.BytesIO()
        # numpy's own function has an argument called file, which is a column here
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in columns.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        write_bytes(path.resolve(), content.getvalue())
        return
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        content = io.BytesIO()
        table = pyarrow.table({name: array.tolist() for name, array in columns.items()})
        pyarrow.parquet.write_table(table, content)
        write_bytes(path.resolve(), content.getvalue())
        return
    flat = dict[str, np.ndarray]()
    for name, array in columns.items():
        parts = enumerate(array.T) if array.ndim == 2 else ()
        flat |= {f"{name}_{i}": part for i, part in parts} or {name: array}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(flat)
    writer.writerows(zip(*(array.tolist() for array in flat.values()), strict=True))
    write_bytes(path.resolve(), text.getvalue().encode())
