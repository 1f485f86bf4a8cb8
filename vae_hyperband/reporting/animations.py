"""Animations: samples over training, and a walk through the latent space; pictures as files.

Shape suffixes: K stops, W walkers side by side, Z latent dimensions.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vae_hyperband.common.errors import ConfigError, RunFolderError
from vae_hyperband.common.files import make_folder, replacing
from vae_hyperband.common.randomness import generator
from vae_hyperband.evaluation.latents import Posteriors
from vae_hyperband.model.vae import VAE
from vae_hyperband.training.tracker import (
    COLUMNS,
    MARGIN,
    image_grid,
    is_ink,
    logged_pictures,
)

FORMATS = {".gif": "GIF", ".webp": "WEBP"}
MOST_FRAMES = 100  # of a training; more would take much memory
BAR = 6  # height in pixels of the bar below samples over training
SCALE, LARGEST_SIDE = 3, 1200  # screen pixels per pixel, fewer if a side would have more


def logged_samples(log_folder: Path, most: int) -> dict[int, Image.Image]:
    """A run's samples of the same noise after validations, by their step.

    The first, the last, and others evenly between them; ``most`` in all, at least two.
    """
    tag = "images/random_samples"
    pngs = {step: found[tag] for step, found in logged_pictures(log_folder, tag).items()}
    steps = sorted(pngs)
    most = min(most, len(steps))
    shown = sorted({round(i * (len(steps) - 1) / max(most - 1, 1)) for i in range(most)})
    pictures = {steps[i]: _opened(pngs[steps[i]]) for i in shown}
    # by the last one: the first samples are grey whatever the images are
    ink = bool(pictures) and _is_ink(pictures[max(pictures)])
    return {step: _on_paper(grid) if ink else grid for step, grid in pictures.items()}


def _is_ink(grid: Image.Image) -> bool:
    red, green, blue = grid.split()
    is_grey = red.tobytes() == green.tobytes() == blue.tobytes()
    return is_grey and is_ink(torch.from_numpy(np.array(red))[None, None] / 255)


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def over_training(log_folder: Path, path: Path) -> Path:
    """Samples of the same noise over the validations; the last frame stays for two seconds."""
    pictures = logged_samples(log_folder, MOST_FRAMES)
    if len(pictures) < 2:
        raise ConfigError(
            f"{log_folder} has {len(pictures)} pictures of samples, but an animation needs at "
            "least two: validate more often, with TensorBoard."
        )
    last = max(pictures)
    frames = [_with_progress(picture, step / last) for step, picture in pictures.items()]
    return _save(frames, [300] * (len(frames) - 1) + [2000], path)


def _with_progress(picture: Image.Image, share: float) -> Image.Image:
    """The picture above a progress bar of the training."""
    frame = Image.new("RGB", (picture.width, picture.height + BAR), "white")
    frame.paste(picture)
    right = MARGIN + round(share * (picture.width - 2 * MARGIN))
    box = (MARGIN, picture.height, right, picture.height + BAR - MARGIN - 1)
    ImageDraw.Draw(frame).rectangle(box, "#0072B2")
    return frame


@dataclass(frozen=True)
class Walk:
    """The size of a walk through the latent space."""

    walkers: int = 16  # side by side
    num_stops: int = 5  # images that each walker visits
    frames_per_leg: int = 12


def latent_walk(
    model: VAE, posteriors: Posteriors, path: Path, seed: int = 0, walk: Walk | None = None
) -> Path:
    """Walkers that go from the mean of one image to that of the next, and back to their first.

    Straight lines in z, slow at their ends. The seed chooses the images.
    """
    walk = walk or Walk()
    num_stops, walkers = walk.num_stops, walk.walkers
    order = torch.randperm(len(posteriors.mu_NZ), generator=generator(seed, "walk"))
    if len(order) < num_stops * walkers:
        raise ConfigError(f"A walk needs {num_stops * walkers} images, but there are {len(order)}.")
    stops_KWZ = posteriors.mu_NZ[order[: num_stops * walkers]].view(num_stops, walkers, -1)
    frames = [_frame(images) for images in _decoded(model, stops_KWZ, walk.frames_per_leg)]
    return _save(frames, [60] * len(frames), path)


@torch.no_grad()
def _decoded(model: VAE, stops_KWZ: Tensor, frames_per_leg: int) -> Iterator[Tensor]:
    """Images of all walkers, one moment after another."""
    for k, start_WZ in enumerate(stops_KWZ):
        end_WZ = stops_KWZ[(k + 1) % len(stops_KWZ)]
        for moment in range(frames_per_leg):
            share = moment / frames_per_leg
            yield model.decode_images(start_WZ.lerp(end_WZ, share**2 * (3 - 2 * share)))


def _frame(images_WCHW: Tensor) -> Image.Image:
    columns = round(len(images_WCHW) ** 0.5)
    background = 0.0 if is_ink(images_WCHW) else 1.0
    grid_CHW = image_grid(images_WCHW, columns, background=background)
    pixels_HWC = (grid_CHW.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels_HWC.numpy())
    return _negative(picture) if is_ink(images_WCHW) else picture


def _negative(picture: Image.Image) -> Image.Image:
    """Ink on paper, as in the figures."""
    return picture.point(lambda value: 255 - value)


def _on_paper(grid: Image.Image) -> Image.Image:
    """A logged grid of images, 8 in each of 8 rows, as ink on paper: the margins stay white."""
    paper = _negative(grid)
    pen = ImageDraw.Draw(paper)
    for start in range(0, grid.width, (grid.width - MARGIN) // COLUMNS):
        pen.rectangle((start, 0, start + MARGIN - 1, grid.height), "white")
    for start in range(0, grid.height, (grid.height - MARGIN) // COLUMNS):
        pen.rectangle((0, start, grid.width, start + MARGIN - 1), "white")
    return paper


def _save(frames: list[Image.Image], durations: list[int], path: Path) -> Path:
    """Durations are in milliseconds."""
    width, height = frames[0].size
    scale = max(1, min(SCALE, LARGEST_SIDE // max(width, height)))
    size = (width * scale, height * scale)
    first, *others = (frame.resize(size, Image.Resampling.NEAREST) for frame in frames)
    try:
        with replacing(path.resolve()) as temporary, open(temporary, "wb") as file:
            first.save(
                file,
                FORMATS[path.suffix],
                save_all=True,
                append_images=others,
                duration=durations,
                loop=0,
            )
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def save_pictures(images_NCHW: Tensor, folder: Path) -> None:
    """Bytes (N, C, H, W) as one PNG each, in a new folder: what programs that compute FIDs read."""
    make_folder(folder)
    width = len(str(len(images_NCHW) - 1))
    for number, image_CHW in enumerate(images_NCHW):
        pixels_HWC = image_CHW.permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
        picture.save(folder / f"{number:0{width}}.png")
