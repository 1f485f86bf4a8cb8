"""Latents for TensorBoard's embedding projector: vectors, labels and a sprite of their images.

The files are those that its documentation asks for; the projector finds them in a log folder.

Shape suffixes: N images, C channels, H height, W width, Z latent dimensions.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from vae_hyperband.files import make_folder, write_bytes, write_text
from vae_hyperband.tracking import image_grid

FOLDER = "projector"
NUM_IMAGES = 2000
SPRITE_SIZE = 8192  # pixels; a wider sprite is not shown


def most_in_sprite(height: int, width: int) -> int:
    """How many images of that size the projector can show, :data:`NUM_IMAGES` at most."""
    return min(NUM_IMAGES, (SPRITE_SIZE // max(height, width)) ** 2)


def write_projector(
    log_folder: Path, mu_NZ: Tensor, images_NCHW: Tensor, label_N: Tensor, names: Sequence[str]
) -> None:
    """Write what the projector shows of posterior means; ``images_NCHW`` are in [0, 1].

    Labels without a name are shown by their number.
    """
    folder = log_folder / FOLDER
    make_folder(folder)
    rows = ["\t".join(f"{value:.6g}" for value in mu_Z) for mu_Z in mu_NZ.tolist()]
    write_text(folder / "latents.tsv", "\n".join(rows) + "\n")
    labels = [names[label] if label < len(names) else str(label) for label in label_N.tolist()]
    # a table of one column has no head
    write_text(folder / "labels.tsv", "\n".join(labels) + "\n")
    write_bytes((folder / "sprite.png").resolve(), _sprite(images_NCHW))
    height, width = images_NCHW.shape[2:]
    config = (
        'embeddings {\n  tensor_name: "posterior means"\n'
        f'  tensor_path: "{FOLDER}/latents.tsv"\n  metadata_path: "{FOLDER}/labels.tsv"\n'
        f'  sprite {{\n    image_path: "{FOLDER}/sprite.png"\n'
        f"    single_image_dim: {width}\n    single_image_dim: {height}\n  }}\n}}\n"
    )
    write_text(log_folder / "projector_config.pbtxt", config)


def _sprite(images_NCHW: Tensor) -> bytes:
    """All images in one square, row by row, without margins: ink on paper if they are grey."""
    columns = math.ceil(len(images_NCHW) ** 0.5)
    grid_CHW = image_grid(images_NCHW, columns, margin=0, background=0.0)
    if len(grid_CHW) == 1:
        grid_CHW = 1 - grid_CHW
    pixels_HWC = (grid_CHW * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    square = Image.new(picture.mode, (picture.width, picture.width), "white")
    square.paste(picture)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    return buffer.getvalue()
