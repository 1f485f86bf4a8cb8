"""One picture -> its pixels as bytes: decode, turn upright, flatten, resize.

Everything here depends on the picture alone, so that the same file gives the same bytes in every
data set. What cannot be decoded raises :class:`PictureError` with a reason that people can read.

Shape suffixes: C channels (1 grey, 3 red, green and blue), H height, W width.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vae_hyperband.common.config import Fit

#: Pillow's names of the formats that are decoded; whatever else its plugins read is refused.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")

ORIENTATION = 0x0112  # the EXIF tag; 2 to 8 are mirrored or turned
WHITE, BLACK = 255, 0


class PictureError(Exception):
    """Why a picture cannot be used, in a few words: "truncated", "not an image"."""


class Picture(NamedTuple):
    """A decoded picture."""

    pixels_CHW: np.ndarray  # uint8
    digest: str  # of the upright pixels before resizing: equal pictures have equal ones
    size: tuple[int, int]  # height and width before resizing
    mode: str  # Pillow's name of what the file holds, such as L, RGB, RGBA, P, CMYK
    notes: tuple[str, ...]  # what was done to it beyond decoding and resizing


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Within it, Pillow raises for pictures whose header announces more than 89 million pixels."""
    # around all threads that decode: the filters of warnings are the process's, not a thread's
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # a damaged comment in a picture is no concern of its pixels
        warnings.simplefilter("ignore", UserWarning)
        yield


def decode(
    content: bytes | np.ndarray,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    channels: int | None = None,
) -> Picture:
    """The picture in a file's content, or in an array (H, W) or (H, W, C) of bytes.

    ``size`` is the height and width to resize to, by ``fit``: "crop" covers them and cuts off what
    is too much on both sides, "pad" keeps everything and adds black (white around transparent
    pictures), "stretch" changes the proportions. Without ``size`` or ``channels`` the picture keeps
    its own. Call it within :func:`bombs_refused`. Raises :class:`PictureError`.
    """
    try:
        image = _opened(content) if isinstance(content, bytes) else Image.fromarray(content)
        mode, notes = image.mode, []
        if getattr(image, "n_frames", 1) > 1:
            notes.append("first frame of several")
        image.load()
        if image.getexif().get(ORIENTATION, 1) in range(2, 9):
            image = ImageOps.exif_transpose(image)
            notes.append("turned upright")
        flat, transparent = _flattened(image)
        if transparent:
            notes.append("transparent, over white")
        if mode.startswith("I"):
            notes.append("16-bit grey, to 8 bits")
        height, width = flat.height, flat.width
        digest = hashlib.blake2b(b"%d %d " % (height, width), digest_size=16)
        # as red, green and blue also where it is grey: a grey picture is the same in any format
        digest.update(flat.convert("RGB").tobytes())
        if size is not None:
            flat = _resized(flat, size, fit, WHITE if transparent else BLACK)
        if channels is not None:
            flat = flat.convert("L" if channels == 1 else "RGB")
    except PictureError:
        raise
    except MemoryError:
        raise
    # Pillow's plugins raise OSError, SyntaxError, ValueError, EOFError, struct.error ...
    except Exception as error:
        raise PictureError(_reason(error)) from error
    pixels = np.asarray(flat)
    pixels_CHW = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Picture(pixels_CHW, digest.hexdigest(), (height, width), mode, tuple(notes))


def size_of(content: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of a picture, upright, from its header. Raises :class:`PictureError`."""
    if not isinstance(content, bytes):
        return content.shape[0], content.shape[1]
    try:
        image = _opened(content)
        turned = image.getexif().get(ORIENTATION, 1) in range(5, 9)
    except PictureError:
        raise
    except Exception as error:  # as in decode
        raise PictureError(_reason(error)) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise PictureError("empty" if not content else "not an image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise PictureError("too many pixels (a decompression bomb?)") from None


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    if "truncated" in text or "Truncated" in text:
        return "truncated"
    return f"damaged ({text or type(error).__name__})"


def _flattened(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in mode L or RGB, 8 bits per channel, and whether it was transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_16_bits(image), False
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        if alpha.getchannel("A").getextrema() != (255, 255):
            paper = Image.new("RGBA", image.size, "white")
            flat = Image.alpha_composite(paper, alpha).convert("RGB")
            return (flat.convert("L") if image.mode in ("LA", "La") else flat), True
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("L"), False
    return image.convert("RGB"), False


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise PictureError(f"values of more than 16 bits (mode {image.mode})")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _resized(image: Image.Image, size: tuple[int, int], fit: Fit, paper: int) -> Image.Image:
    if (image.height, image.width) == size:
        return image
    wanted, method = (size[1], size[0]), Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(image, wanted, method)
    if fit == "pad":
        colour = paper if image.mode == "L" else (paper, paper, paper)
        return ImageOps.pad(image, wanted, method, colour)
    return image.resize(wanted, method)
