"""The command ``sample``: images from a trained model."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

from vae_hyperband.commands.options import (
    ConfigFile,
    NetworkOption,
    RunArg,
    find_ckpt,
    parse_options,
)
from vae_hyperband.common.checks import plural, require_number
from vae_hyperband.common.config import Folders
from vae_hyperband.common.errors import ConfigError, RunFolderError
from vae_hyperband.common.files import check_place, fsync_folder, make_folder, replacing
from vae_hyperband.common.process import pick_device
from vae_hyperband.evaluation.samplers import (
    Sampler,
    SamplerConfig,
    SamplerName,
    generate,
    get_sampler,
    sampler_file,
)
from vae_hyperband.export.pretrained import PREFIX
from vae_hyperband.model.checkpoint import Checkpoint, load_ckpt
from vae_hyperband.reporting import animations, figures
from vae_hyperband.reporting.summaries import print_progress

MOST_IN_GRID = 4096  # images: a larger picture takes gigabytes, and nobody can look at it


@dataclass(frozen=True)
class SampleArgs(ConfigFile):
    """Generate images with a trained model.

    vae-hyperband sample mine --sampler flow --label sneaker --out samples.png
    """

    run: RunArg
    fitting: tyro.conf.OmitArgPrefixes[SamplerConfig]
    num_samples: int = 64
    """Number of images."""
    sampler: SamplerName | None = None
    """Distribution of z; None: the prior, or the mixture that pretrained:images comes with. A
    mixture or flow is fitted on first use and saved with the checkpoint."""
    label: str = ""
    """mixture, flow: generate this class only, by its name (sneaker) or its number."""
    out: Path = Path("samples.png")
    """.png: one grid; .npy: bytes, shape (N, C, H, W); no ending: a new folder of PNG files."""
    seed: int = 0
    """The same seed gives the same images."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    network: NetworkOption = None
    folders: tyro.conf.OmitArgPrefixes[Folders] = field(default_factory=Folders)


def sample(argv: list[str]) -> int:
    args = parse_options(SampleArgs, argv, "vae-hyperband sample")
    require_number("num_samples", args.num_samples, 1)
    _check_out(args.out)
    if args.out.suffix == ".png" and args.num_samples > MOST_IN_GRID:
        raise ConfigError(
            f"A grid shows at most {MOST_IN_GRID:,} images: give --out an .npy file or a folder."
        )
    checkpoint = load_ckpt(find_ckpt(args.run, args.folders))
    names = checkpoint.class_names
    label = label_number(args.label, names)
    sampler_name = args.sampler or usual_sampler(args.run, checkpoint)
    sampler = sampler_for(checkpoint, sampler_name, args.fitting, args.folders)
    model = checkpoint.model(pick_device(args.device))
    images_NCHW = generate(model, sampler, args.num_samples, args.seed, label)
    if args.out.suffix == ".npy":
        _save_array(images_NCHW, args.out)
    elif not args.out.suffix:
        save_pictures(images_NCHW, args.out)
    else:
        kind = "" if label is None else f", {names[label] if names else f'label {label}'}"
        title = (
            f"{plural(args.num_samples, 'sample')}, z from the {sampler_name}{kind}, "
            f"seed {args.seed}"
        )
        figures.images(images_NCHW / 255, title, args.out)
    print(args.out)
    return 0


def _check_out(path: Path) -> None:
    """Refuse what cannot be written before any image is made, and create its parent folder."""
    if path.suffix in (".png", ".npy"):
        check_place(path)
    elif path.suffix:  # also the 5 of run-0.5, which may be meant as a folder
        raise ConfigError(
            f"--out is {path}, but must end in .png or .npy, or be a new folder, whose name has no "
            "dot."
        )
    elif path.exists() or path.is_symlink():
        raise RunFolderError(f"{path} exists: give the name of a new folder.")
    else:
        make_folder(path.parent)


def usual_sampler(run: str, checkpoint: Checkpoint) -> SamplerName:
    """The prior, which every model has, or the mixture that a model in the package comes with."""
    with_mixture = run.startswith(PREFIX) and sampler_file(checkpoint.path, "mixture").exists()
    return "mixture" if with_mixture else "prior"


def sampler_for(
    checkpoint: Checkpoint, name: SamplerName, config: SamplerConfig, folders: Folders
) -> Sampler:
    """A checkpoint's sampler; the training split is loaded only if it has to be fitted."""
    return get_sampler(
        name, checkpoint, lambda: checkpoint.split("train", folders), config, print_progress
    )


def label_number(label: str, names: Sequence[str]) -> int | None:
    """A class by its number, its name, or an unambiguous part of its name; None for ""."""
    if not label:
        return None
    if label.isdecimal() and (not names or int(label) < len(names)):
        return int(label)
    asked = label.lower().replace("_", " ").replace("-", " ")
    exact = [i for i, name in enumerate(names) if name.lower().replace("-", " ") == asked]
    found = exact or [i for i, name in enumerate(names) if asked in name.lower().replace("-", " ")]
    if len(found) != 1:
        raise ConfigError(
            f"--label is {label!r}, but must be "
            + (f"one of {', '.join(names)}." if names else "a number, for this data.")
        )
    return found[0]


def save_pictures(images_NCHW: Tensor, folder: Path) -> None:
    """A new folder of PNG files, which has its name only when all of them are in it."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            complete = Path(temporary) / folder.name
            animations.save_pictures(images_NCHW, complete)
            complete.rename(folder)
            fsync_folder(folder.parent)
    except OSError as error:  # Pillow's own errors have no number
        raise RunFolderError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _save_array(images_NCHW: Tensor, path: Path) -> None:
    try:
        with replacing(path.resolve()) as temporary, open(temporary, "wb") as file:
            np.save(file, images_NCHW.numpy(), allow_pickle=False)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
