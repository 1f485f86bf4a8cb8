"""IDX files, the format of MNIST and its successors: a header of sizes, then bytes."""

import contextlib
import functools
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_hyperband.common.errors import DataError

#: The largest size that a header may announce; Fashion-MNIST's largest file has 47 MB.
MAX_IDX_BYTES = 1 << 30


@functools.lru_cache(maxsize=4)
def read_idx_once(path: Path, mtime_ns: int, num_dims: int) -> tuple[Tensor, str]:
    """As :func:`read_idx`, but cached: two splits and all trials of a worker share a file."""
    return read_idx(path, num_dims)


def read_idx(path: Path, num_dims: int) -> tuple[Tensor, str]:
    """Decode an IDX file of unsigned bytes, plain or gzipped: ``(uint8 tensor, SHA-256)``.

    The digest is that of the decompressed content. Any other or damaged file raises
    :class:`DataError`. Never reads more than the header announces (at most 1 GiB).
    """
    with _opened(path) as file:
        return _decode_idx(file, path, num_dims)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The decompressed file. Raises :class:`DataError` for whatever goes wrong inside."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if zipped else raw as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def idx_sizes(path: Path, num_dims: int) -> list[int]:
    """What an IDX file announces, such as [10000, 28, 28]; nothing beyond its header is read.

    Raises :class:`DataError` as :func:`read_idx` does.
    """
    with _opened(path) as file:
        return _sizes(file.read(4 + 4 * num_dims), path, num_dims)


def _decode_idx(file: io.BufferedIOBase, path: Path, num_dims: int) -> tuple[Tensor, str]:
    header = file.read(4 + 4 * num_dims)
    sizes = _sizes(header, path, num_dims)
    num_bytes = math.prod(sizes)
    body = bytearray(file.read(num_bytes + 1))  # one more than announced, to find trailing bytes
    if len(body) != num_bytes:
        found = "more" if len(body) > num_bytes else f"only {len(body)}"
        raise DataError(f"{path} announces {num_bytes} bytes {sizes}, but holds {found}.")
    digest = hashlib.sha256(header)
    digest.update(body)
    return torch.frombuffer(body, dtype=torch.uint8).view(sizes), digest.hexdigest()


def _sizes(header: bytes, path: Path, num_dims: int) -> list[int]:
    # Big-endian header: two zero bytes, type 8 (unsigned byte), number of dimensions, their sizes.
    if header[:4] != bytes([0, 0, 8, num_dims]) or len(header) < 4 + 4 * num_dims:
        raise DataError(
            f"{path} is not an IDX file of {num_dims}-dimensional bytes: it starts with "
            f"{header[:8].hex() or 'nothing'}."
        )
    sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
    if not 0 < math.prod(sizes) <= MAX_IDX_BYTES:
        raise DataError(f"{path} announces sizes {sizes}, but needs 1 to {MAX_IDX_BYTES} bytes.")
    return sizes
