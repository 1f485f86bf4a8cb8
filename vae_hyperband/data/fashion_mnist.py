"""Fashion-MNIST's four IDX files, or others of their format: found and verified.

A file of Fashion-MNIST is accepted by the SHA-256 of its *decompressed* content, so that every
compression of the right bytes is accepted, and nothing else.

Shape suffixes: N images, H height, W width.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import DataError
from vae_hyperband.common.files import cache_folder
from vae_hyperband.data.idx import idx_sizes, read_idx_once

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

#: SHA-256 of the decompressed files (Xiao, Rasul & Vollgraf 2017, github.com/zalandoresearch).
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

FILES = tuple(FASHION_MNIST_SHA256)
TORCHVISION = ("raw", "FashionMNIST/raw", "MNIST/raw")  # below the folder that it is given

#: Where Debian's and Ubuntu's package dataset-fashion-mnist puts the four files.
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_part(
    part: str, data_dir: Path | None, is_fashion_mnist: bool
) -> tuple[Tensor, Tensor, str]:
    """Images (N, H, W) and labels (N,) of a part, "train" or "t10k", uint8; the images' digest.

    Raises :class:`DataError` for files that are missing, damaged or, ``is_fashion_mnist``, others.
    """
    expected = FASHION_MNIST_SHA256 if is_fashion_mnist else {}
    images_name, labels_name = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images, digest = _load_file(images_name, data_dir, expected.get(images_name))
    labels, _ = _load_file(labels_name, data_dir, expected.get(labels_name))
    if len(images) != len(labels):
        raise DataError(
            f"{images_name} holds {plural(len(images), 'image')}, but {labels_name} "
            f"{plural(len(labels), 'label')}: they do not belong together."
        )
    return images, labels, digest


def _load_file(name: str, data_dir: Path | None, sha256: str | None) -> tuple[Tensor, str]:
    """The first right file among the folders: its array and the digest of its content."""
    folders = _folders(data_dir)
    wrong = []
    for path in (path for folder in folders for path in _places_of(name, folder)):
        if not os.path.isfile(path):  # False, too, where this user may not look
            continue
        try:
            array, digest = read_idx_once(path, path.stat().st_mtime_ns, 3 if "idx3" in name else 1)
            if sha256 is None or digest == sha256:
                return array, digest
            raise DataError(
                f"{path} is not Fashion-MNIST's {name}: the SHA-256 of its content is {digest}, "
                f"expected {sha256}; remove the file, or pass --dataset custom to use other data."
            )
        except DataError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]
    places = " or ".join(str(folder) for folder in folders)
    hint = 'run "make data" (vae-hyperband data) to download it'
    if data_dir:
        hint = "--data-dir takes a folder of IDX files, --data takes a folder of images"
        if alike := sorted(path.name for path in data_dir.glob(f"*{name.partition('-idx')[0]}*")):
            hint = f"did you mean {alike[0]}? Give it that name"
    raise DataError(f"No file {name} or {name}.gz in {places}: {hint}.")


def check_test_files(image_shape: tuple[int, int, int], data_dir: Path | None) -> None:
    """Raise :class:`DataError` if the test files are missing, or of images of another size.

    Looks at their headers alone: the images are for the end.
    """
    sizes = {}
    for name, num_dims in (("t10k-images-idx3-ubyte", 3), ("t10k-labels-idx1-ubyte", 1)):
        places = (path for folder in _folders(data_dir) for path in _places_of(name, folder))
        for path in filter(os.path.isfile, places):
            with contextlib.suppress(DataError):  # as when it is loaded: the next may be right
                sizes[num_dims] = idx_sizes(path, num_dims)
                break
        else:
            _load_file(name, data_dir, None)  # raises, and says where it has looked
    if tuple(sizes[3][1:]) != image_shape[1:] or sizes[3][0] != sizes[1][0]:
        raise DataError(
            f"The test files announce images {sizes[3]} and {plural(sizes[1][0], 'label')}, which "
            f"do not go with training images of shape {image_shape}."
        )


def _folders(data_dir: Path | None) -> list[Path]:
    """Where to look for the four files. Raises :class:`DataError` for a folder that is closed."""
    if data_dir is None:
        with contextlib.suppress(DataError):  # no cache: the system's package may do
            return [cache_folder(), SYSTEM_FOLDER]
        return [SYSTEM_FOLDER]
    try:
        os.listdir(data_dir)
    except FileNotFoundError:
        return [data_dir]  # said later, with the names of the files
    except OSError as error:
        raise DataError(f"--data-dir {data_dir} cannot be read: {error.strerror}.") from error
    if any(_is_there(name, data_dir) for name in FILES):
        return [data_dir]
    # one place for all four files: images of one data set must not meet labels of another
    inside = [data_dir / name for name in TORCHVISION]
    found = [folder for folder in inside if any(_is_there(name, folder) for name in FILES)]
    if len(found) > 1:
        places = " and in ".join(map(str, found))
        raise DataError(f"--data-dir {data_dir} has data in {places}: give one of them.")
    return found or [data_dir]


def _is_there(name: str, folder: Path) -> bool:
    return any(os.path.isfile(path) for path in _places_of(name, folder))


def _places_of(name: str, folder: Path) -> Iterator[Path]:
    """Where a folder may have a file: by its own name or Kaggle's, plain or gzipped."""
    for called in (name, name.replace("-idx", ".idx")):
        yield folder / called
        yield folder / f"{called}.gz"
