"""``--data``: what is read, how it is decoded, and what is said of what cannot be."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, idx_bytes, write_idx_folder
from PIL import Image

from vae_hyperband.common.checks import parse_size
from vae_hyperband.common.config import Folders, RunOptions, TrainConfig, with_data
from vae_hyperband.common.errors import CheckpointError, ConfigError, DataError, StoppedError
from vae_hyperband.data import decoded
from vae_hyperband.data.decoded import decoded_set, verified
from vae_hyperband.data.pictures import PictureError, bombs_refused, decode, size_of
from vae_hyperband.data.sources import ImageSettings, assign_splits
from vae_hyperband.data.splits import as_split, load_split
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.training.loop import fit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(folder))
    return folder


def picture(number: int, size=(8, 8), mode="RGB") -> Image.Image:
    """A picture of that width and height, other for each number."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind="PNG", **how) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixty pictures of 8x8 in two folders."""
    for number in range(60):
        name = ("cat", "dog")[number % 2]
        write(tmp_path / "photos" / name / f"{number:02}.png", encoded(picture(number)))
    return tmp_path / "photos"


def digests(found, split) -> list[bytes]:
    return [image.tobytes() for image in found.images_NCHW[found.rows(split)]]


def pixels(content, **how) -> np.ndarray:
    with bombs_refused():
        return decode(content, **how).pixels_CHW


# ---- One picture


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_same_pixels_and_the_same_digest(kind):
    how = {"lossless": True} if kind == "WEBP" else {}
    with bombs_refused():
        found = decode(encoded(picture(1), kind, **how))
        assert found == decode(np.asarray(picture(1)))._replace(pixels_CHW=found.pixels_CHW)
    assert np.array_equal(found.pixels_CHW, np.asarray(picture(1)).transpose(2, 0, 1))


def test_a_picture_that_lies_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be turned clockwise
    image = picture(1, (12, 8))
    content = encoded(image, "PNG", exif=exif)
    with bombs_refused():
        found = decode(content)
    assert found.size == size_of(content) == (12, 8)
    assert found.notes == ("turned upright",)
    assert np.array_equal(found.pixels_CHW, np.rot90(np.asarray(image), -1).transpose(2, 0, 1))


def test_what_is_transparent_is_seen_over_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    with bombs_refused():
        found = decode(encoded(image))
    assert found.pixels_CHW[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]
    assert found.notes == ("transparent, over white",)
    # an alpha channel that hides nothing is no news
    with bombs_refused():
        assert decode(encoded(Image.new("RGBA", (2, 1), "red"))).notes == ()


def test_palettes_grey_cmyk_and_black_and_white_become_bytes():
    colours = picture(1).quantize(4)
    assert np.array_equal(
        pixels(encoded(colours)), np.asarray(colours.convert("RGB")).transpose(2, 0, 1)
    )
    transparent = picture(1).quantize(4)
    transparent.info["transparency"] = 0
    hidden = np.asarray(transparent) == 0
    found = pixels(encoded(transparent, transparency=0))
    assert (found[:, hidden] == 255).all()
    grey = picture(2, mode="L")
    assert np.array_equal(pixels(encoded(grey)), np.asarray(grey)[None])
    assert set(pixels(encoded(picture(2, mode="1"))).ravel().tolist()) == {0, 255}
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    red = pixels(encoded(flat, "JPEG", quality=100))
    assert red.shape == (3, 8, 8)
    assert (abs(red.astype(int) - np.array([254, 0, 0])[:, None, None]) <= 8).all()


def test_sixteen_bits_of_grey_become_eight():
    values = np.array([[0, 256, 32896, 65535]], dtype=np.uint16)
    with bombs_refused():
        found = decode(encoded(Image.fromarray(values)))
        assert found.pixels_CHW.tolist() == [[[0, 1, 128, 255]]]
        assert found.notes == ("16-bit grey, to 8 bits",)
        with pytest.raises(PictureError, match="more than 16 bits"):
            decode(encoded(Image.fromarray(values.astype(np.int32) * 7), "TIFF"))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("L", (4, 4), grey) for grey in (10, 200)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with bombs_refused():
        found = decode(content)
    assert (found.pixels_CHW == 10).all()
    assert found.notes == ("first frame of several",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "not an image"),
        (encoded(picture(1, (64, 64)), "JPEG")[:-300], "truncated"),
        (encoded(picture(1))[:60], "truncated|damaged"),
        (encoded(picture(1), "PPM"), "not an image"),  # a format of Pillow's that nobody asked for
    ],
)
def test_what_is_damaged_is_refused_in_a_few_words(content, reason):
    with bombs_refused(), pytest.raises(PictureError, match=reason):
        decode(content)


def bomb(width=50_000, height=50_000) -> bytes:
    """A small PNG whose header announces gigabytes."""
    import struct
    import zlib

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    with bombs_refused(), warnings.catch_warnings(), pytest.raises(PictureError, match="bomb"):
        decode(bomb(*size))
    with bombs_refused(), pytest.raises(PictureError, match="bomb"):
        size_of(bomb(*size))


def test_crop_pad_and_stretch():
    image = Image.new("L", (4, 2), 100)
    image.putpixel((0, 0), 250)
    content = encoded(image)
    assert pixels(content, size=(2, 2), fit="crop").tolist() == [[[100, 100], [100, 100]]]
    padded = pixels(content, size=(4, 4), fit="pad")
    assert padded[0, 1:3].tolist() == np.asarray(image).tolist()
    assert (padded[0, [0, 3]] == 0).all()
    assert pixels(content, size=(2, 2), fit="stretch")[0, 0, 0] > 120
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert (pixels(encoded(clear), size=(4, 4), fit="pad") == 255).all()
    assert pixels(content, channels=3).shape == (3, 2, 4)
    assert pixels(encoded(picture(1)), channels=1).shape == (1, 8, 8)


# ---- Folders, archives and arrays give the same


def test_a_folder_has_labels_by_its_folders_and_splits_by_content(folder):
    found = decoded_set(folder)
    assert found.class_names == ("cat", "dog")
    assert found.image_shape == (3, 8, 8)
    assert sum(found.counts.values()) == 60
    assert all(found.counts.values())
    assert found.by_hash == ("train", "validation", "test")
    for row, (name, label) in enumerate(zip(found.names, found.labels_N, strict=True)):
        number = int(Path(name).stem)
        assert found.class_names[label] == Path(name).parent.name == ("cat", "dog")[number % 2]
        expected = np.asarray(picture(number)).transpose(2, 0, 1)
        assert np.array_equal(found.images_NCHW[row], expected)
    split = load_split("validation", data=folder)
    assert len(split) == found.counts["validation"]
    assert split.class_names == ("cat", "dog")
    assert split.image_shape == (3, 8, 8)


def in_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, Path("photos") / file.relative_to(folder))
    return path


def in_tar(folder, path):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        archive.add(folder, "photos")
    return path


def in_npz(folder, path):
    files = sorted(folder.rglob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(path, images=images, labels=[file.parent.name for file in files])
    return path


def in_parquet(folder, path):
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.rglob("*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [("cat", "dog").index(file.parent.name) for file in files],
    }
    feature = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pyarrow.table(rows).replace_schema_metadata({"huggingface": json.dumps(feature)})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("write_it", "name"),
    [
        (in_zip, "a.zip"),
        (in_tar, "a.tar"),
        (in_tar, "a.tar.gz"),
        (in_npz, "a.npz"),
        (in_parquet, "a.parquet"),
    ],
)
def test_the_same_images_in_another_form_give_the_same_splits(folder, tmp_path, write_it, name):
    expected = decoded_set(folder)
    found = decoded_set(write_it(folder, tmp_path / name))
    assert found.counts == expected.counts
    assert found.class_names == ("cat", "dog")
    assert np.array_equal(found.images_NCHW, expected.images_NCHW)
    assert np.array_equal(found.labels_N, expected.labels_N)
    assert found.digest == expected.digest


def test_keras_names_and_channels_first(tmp_path):
    random = np.random.default_rng(0)
    images = random.random((40, 1, 6, 10)).astype(np.float32)
    path = tmp_path / "k.npz"
    np.savez(path, x_train=images[:30], y_train=np.arange(30) % 3, x_test=images[30:])
    found = decoded_set(path)
    assert found.image_shape == (1, 6, 10)
    assert found.by_hash == ("validation",)
    assert found.counts["test"] == 10
    assert found.counts["train"] + found.counts["validation"] == 30
    test = {image.tobytes() for image in np.rint(images[30:] * 255).astype(np.uint8)}
    assert set(digests(found, "test")) == test


def test_a_npy_file_and_boolean_images(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).random((50, 5, 7)) < 0.5)
    found = decoded_set(path)
    assert found.image_shape == (1, 5, 7)
    assert set(found.images_NCHW.ravel().tolist()) == {0, 255}


def test_the_hub_s_files_of_splits(folder, tmp_path):
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    in_parquet(folder / "cat", data / "train-00000-of-00002.parquet")
    in_parquet(folder / "dog", data / "train-00001-of-00002.parquet")
    for number in range(5):
        write(tmp_path / "more" / "cat" / f"{number}.png", encoded(picture(100 + number)))
    in_parquet(tmp_path / "more", data / "test-00000-of-00001.parquet")
    found = decoded_set(tmp_path / "hub")
    assert found.counts["test"] == 5
    assert found.by_hash == ("validation",)
    assert sum(found.counts.values()) == 65


def test_the_four_idx_files(tmp_path):
    found = decoded_set(write_idx_folder(tmp_path / "idx", zipped=True))
    assert found.image_shape == (1, 8, 8)
    assert found.counts["test"] == 60
    assert found.by_hash == ("validation",)
    test = load_split("test", tmp_path / "idx", "custom")
    assert sorted(digests(found, "test")) == sorted(
        image.numpy().tobytes() for image in test.images_NCHW
    )


def test_folders_of_splits_are_the_splits(folder, tmp_path):
    own = tmp_path / "own"
    for split, name in (("train", "cat"), ("val", "dog"), ("test", "cat")):
        shutil.copytree(folder / name, own / split / name)
    (own / "beside.png").write_bytes(encoded(picture(99)))
    found = decoded_set(own)
    assert found.counts == {"train": 30, "validation": 30, "test": 30}
    assert found.by_hash == ()
    assert found.class_names == ("cat", "dog")
    assert found.twice == {"train, test": 30}
    assert found.remarks == ("1 image beside test/, train/, val/",)


def test_numbers_as_folders_are_the_labels(tmp_path):
    for number in range(40):
        label = (2, 10, 1)[number % 3]
        write(tmp_path / "n" / str(label) / f"{number}.png", encoded(picture(number)))
    assert decoded_set(tmp_path / "n").class_names == ("1", "2", "10")


# ---- Splits that do not leak


def test_the_same_image_is_never_in_two_splits_and_new_ones_move_no_other(folder):
    def split_of(found):
        return {image: name for name in found.counts for image in digests(found, name)}

    before = decoded_set(folder)
    for number in range(60):
        copy = folder / "cat" / f"copy{number}.bmp"
        copy.write_bytes(encoded(picture(number), "BMP"))  # other bytes, the same picture
        write(folder / "new" / f"{number}.png", encoded(picture(1000 + number)))
    after = decoded_set(folder)
    assert sum(after.counts.values()) == 180
    assert after.repeated == 60
    assert sum(len(set(digests(after, name))) for name in after.counts) == 120
    assert split_of(before).items() <= split_of(after).items()


def test_the_split_of_an_image_does_not_depend_on_the_size_that_it_is_given(folder):
    def split_of(settings):
        found = decoded_set(folder, settings)
        places = [name for name in ("train", "validation", "test") for _ in digests(found, name)]
        return dict(zip(found.names, places, strict=True))

    usual = split_of(ImageSettings())
    assert split_of(ImageSettings((4, 6), "stretch", 1)) == usual
    assert set(usual.values()) == {"train", "validation", "test"}


def test_sevenths_of_many():
    given = [(None, f"{number:032x}") for number in range(0, 1 << 128, (1 << 128) // 7000)]
    found = assign_splits(given)
    for name, share in (("train", 5), ("validation", 1), ("test", 1)):
        assert abs(found.count(name) - share * 1000) <= 1


@pytest.mark.parametrize("num", [2, 3, 4, 7])
def test_few_images_still_have_their_splits(tmp_path, num):
    for number in range(num):
        write(tmp_path / "few" / f"{number}.png", encoded(picture(number)))
    found = decoded_set(tmp_path / "few")
    assert found.counts["train"] >= 1
    assert found.counts["validation"] >= 1
    assert found.counts["test"] >= (1 if num > 2 else 0)
    assert found.class_names == ()
    assert sum(found.counts.values()) == num


def test_one_image_is_too_few_and_so_are_equal_ones(tmp_path):
    for number in range(2):
        write(tmp_path / "one" / f"{number}.png", encoded(picture(1)))
    assert decoded_set(tmp_path / "one").counts == {"train": 2, "validation": 0, "test": 0}
    with pytest.raises(
        DataError, match=r"has no validation images \(train 2, validation 0, test 0"
    ):
        load_split("validation", data=tmp_path / "one")


# ---- What is skipped, and what is refused


def test_what_cannot_be_used_is_skipped_and_said(folder, capfd):
    (folder / "cat" / "broken.jpg").write_bytes(encoded(picture(1, (64, 64)), "JPEG")[:-300])
    (folder / "cat" / "bomb.png").write_bytes(bomb())
    (folder / "dog" / "page.png").write_bytes(b"<html>")
    (folder / "dog" / "clip.mp4").write_bytes(b"video")
    (folder / "dog" / ".DS_Store").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "1.png").write_bytes(encoded(picture(200)))
    (folder / "bird").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    found = decoded_set(folder)
    assert sum(found.counts.values()) == 60
    assert found.skipped == {
        "cat/broken.jpg": "truncated",
        "cat/bomb.png": "too many pixels (a decompression bomb?)",
        "dog/page.png": "not an image",
    }
    assert found.remarks == (
        "files that are no images: 1 .mp4",
        "folders without an image: bird/",
    )
    said = capfd.readouterr().err
    assert "Warning" not in said
    assert "note: 3 images skipped; files that are no images: 1 .mp4; folders without" in said


def test_a_file_that_may_not_be_read_is_skipped(folder):
    # whoever runs this, root too: memory at address 0 cannot be read
    (folder / "cat" / "memory.png").symlink_to("/proc/self/mem")
    found = decoded_set(folder)
    assert found.skipped == {"cat/memory.png": "cannot be read: Input/output error"}


def test_links_are_followed_and_loops_of_them_end(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "cat")
    (linked / "loop").symlink_to(linked)
    write(linked / "dog" / "x.txt", b"")
    (linked / "dog" / "1.png").symlink_to(folder / "dog" / "01.png")
    found = decoded_set(linked)
    assert sum(found.counts.values()) == 31
    assert found.class_names == ("cat", "dog")


def test_links_in_an_archive_are_not_followed(folder, tmp_path):
    (folder / "cat" / "passwd.png").symlink_to("/etc/passwd")
    found = decoded_set(in_tar(folder, tmp_path / "a.tar"))
    assert sum(found.counts.values()) == 60
    assert not found.skipped


def test_names_in_any_script(tmp_path):
    for number in range(30):
        name = ("猫", "собака", "e\u0301te\u0301 \n😀")[number % 3]
        write(tmp_path / "n" / name / f"{number} ž.png", encoded(picture(number)))
    assert decoded_set(tmp_path / "n").class_names == ("été \n😀", "собака", "猫")


def several_sizes(folder):
    for number in range(3):
        write(folder / "dog" / f"wide{number}.png", encoded(picture(300 + number, (12, 8))))


def test_several_sizes_are_refused_until_one_is_given(folder):
    several_sizes(folder)
    with pytest.raises(
        DataError, match=r"2 sizes \(60 images of 8x8, 3 images of 8x12\): give --image-size, such "
    ) as error:
        decoded_set(folder)
    assert "--image-size 8x8" in str(error.value)
    found = decoded_set(folder, ImageSettings((8, 8), "pad"))
    assert found.image_shape == (3, 8, 8)
    assert found.sizes == {"8x8": 60, "8x12": 3}


def test_grey_pictures_have_one_channel_unless_one_of_them_has_colours(tmp_path):
    for number in range(30):
        mode = ("L", "RGB")[number % 2]
        grey = encoded(picture(number, mode="L").convert(mode))
        write(tmp_path / "g" / f"{number}.png", grey)
    found = decoded_set(tmp_path / "g")
    assert found.image_shape == (1, 8, 8)
    assert found.modes == {"L": 15, "RGB": 15}
    assert decoded_set(tmp_path / "g", ImageSettings(channels=3)).image_shape == (3, 8, 8)
    write(tmp_path / "g" / "colours.png", encoded(picture(99)))
    mixed = decoded_set(tmp_path / "g")
    assert mixed.image_shape == (3, 8, 8)
    assert decoded_set(tmp_path / "g", ImageSettings(channels=1)).image_shape == (1, 8, 8)


def arrays(**named):
    def write_it(folder):
        path = folder / "a.npz"
        np.savez(path, **named)
        return path

    return write_it


def parquet_of(**columns):
    def write_it(folder):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return write_it


def file_of(name, content):
    def write_it(folder):
        write(folder / "d" / name, content)
        return folder / "d" if "/" not in name and not name.startswith("=") else folder / "d" / name

    return write_it


GOOD = np.zeros((9, 8, 8), np.uint8)
MISTAKES = {
    "nothing there": (lambda folder: folder / "no", "there is no such file or folder"),
    "an empty folder": (lambda folder: folder, "holds no image: it is empty"),
    "only videos": (file_of("a.mp4", b"x"), r"holds no image \(files that are no images: 1 .mp4\)"),
    "only damaged": (file_of("a.png", b"x"), "none of its images can be decoded"),
    "one image": (
        lambda folder: write(folder / "a.png", encoded(picture(1))),
        "is one image: give the folder that it is in",
    ),
    "a text": (lambda folder: write(folder / "a.txt", b"x"), "must be a folder of images, an arch"),
    "floats to 255": (arrays(x=GOOD + 254.5), r"holds 254.5 to 254.5, but floats must be in \[0"),
    "NaN": (arrays(x=GOOD + np.nan), "holds NaN, but floats must be"),
    "int64": (arrays(x=GOOD.astype(np.int64)), "holds int64, but images are bytes"),
    "wrong rank": (arrays(x=GOOD[0]), r"has the shape \(8, 8\), but images need"),
    "no channels": (arrays(x=np.zeros((9, 8, 8, 8), np.uint8)), "no axis can be the channels"),
    "two channels": (arrays(x=np.zeros((9, 3, 8, 3), np.uint8)), "two axes can be the channels"),
    "unknown names": (arrays(what=GOOD), "needs images under images, x or arr_0"),
    "labels of another length": (arrays(x=GOOD, y=np.zeros(8, int)), "9 images in .*, but 8 lab"),
    "labels below 0": (arrays(x=GOOD, y=np.zeros(9, int) - 1), "has the label -1"),
    "labels of objects": (arrays(x=GOOD, y=np.zeros(9)), "has labels of type float64"),
    "a pickle": (arrays(x=np.array([{}], dtype=object)), "cannot be read as arrays"),
    "no image column": (parquet_of(text=["a"]), "has the columns text, but needs one called image"),
    "no parquet": (lambda folder: write(folder / "a.parquet", b"x"), "cannot be read as Parquet"),
    "no zip": (lambda folder: write(folder / "a.zip", b"x"), "is damaged or not an archive"),
    "no tar": (lambda folder: write(folder / "a.tar.gz", b"x"), "is damaged or not an archive"),
    "half an IDX set": (
        lambda folder: write(folder / NAMES[0], idx_bytes(GOOD)).parent,
        f"has {NAMES[0]}, but no {NAMES[1]}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, cache, mistake):
    write_it, message = MISTAKES[mistake]
    (tmp_path / "in").mkdir()
    path = write_it(tmp_path / "in")
    with pytest.raises(DataError, match=message) as error:
        decoded_set(path)
    assert "\n" not in str(error.value)
    assert not list(cache.glob("images/*.part"))
    # nor is there an array
    assert not [x for x in cache.glob("images/*") if complete(x)]


def test_pngs_where_idx_was_said_and_settings_without_data(folder):
    with pytest.raises(DataError, match=r"No file train-images-idx3-ubyte .*--data takes a folder"):
        load_split("train", folder, "custom")
    with pytest.raises(ConfigError, match="--image-size needs --data"):
        with_data(TrainConfig(image_size="8"), None)
    with pytest.raises(ConfigError, match="--image-size needs --data: add"):
        TrainConfig(dataset="drawn", image_size="8")
    with pytest.raises(ConfigError, match="--dataset images needs --data"):
        fit(TrainConfig(dataset="images"))
    with pytest.raises(ConfigError, match="--data and --dataset drawn both say which images"):
        load_split("train", data=folder, dataset="drawn")


def test_image_sizes():
    assert parse_size("64") == (64, 64)
    assert parse_size("48x32") == (48, 32)
    for wrong in ("", "x", "0", "48x", "1x2x3", "-4", "4.5", "5000", "٣"):
        with pytest.raises(ConfigError, match="but must be a side such as 64"):
            parse_size(wrong)


# ---- Decoded once


def test_images_are_decoded_once_wherever_they_lie(folder, tmp_path, monkeypatch):
    first = decoded_set(folder)
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(decoded, "decode", None)  # would raise TypeError if called
    assert decoded_set(folder) == first
    assert decoded_set(tmp_path / "copy").folder == first.folder


def test_a_changed_file_is_decoded_again(folder):
    before = decoded_set(folder)
    path = folder / "cat" / "00.png"
    facts = path.stat()
    path.write_bytes(encoded(picture(77)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert decoded_set(folder).digest != before.digest


def test_a_file_that_changes_within_the_resolution_of_its_time_is_read_again(folder):
    """Files that were just written are not remembered by size and time."""
    path = folder / "cat" / "00.bmp"
    path.write_bytes(encoded(picture(77), "BMP"))
    facts = path.stat()
    before = decoded_set(folder)
    path.write_bytes(encoded(picture(78), "BMP"))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    assert decoded_set(folder).digest != before.digest


def test_a_damaged_array_is_found(folder):
    found = decoded_set(folder)
    assert verified(found) is found
    path = found.folder / "images.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: remove it"):
        verified(found)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="is damaged: remove it"):
        load_split("train", data=folder)


def test_a_stop_and_the_next_call_continues(folder, monkeypatch):
    monkeypatch.setattr(decoded, "CHUNK", 1)
    monkeypatch.setattr(decoded, "available_cpus", lambda: 1)
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 20

    with pytest.raises(StoppedError, match="the same command continues"):
        decoded_set(folder, should_stop=stop)
    again, count = [], decode

    def counted(*args, **how):
        again.append(None)
        return count(*args, **how)

    monkeypatch.setattr(decoded, "decode", counted)
    found = decoded_set(folder)
    assert 20 < len(again) < 50  # and one for the size
    assert verified(found).counts == {"train": found.counts["train"], **found.counts}
    assert sum(found.counts.values()) == 60


KILLED = """
import os, sys
from pathlib import Path
from vae_hyperband.data import decoded
decoded.SAVE_SECONDS = 0
decoded.CHUNK = 4
left = [int(sys.argv[2])]
write = decoded.os.fsync
def fsync(handle):
    write(handle)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
decoded.os.fsync = fsync
decoded.decoded_set(Path(sys.argv[1]))
"""


def complete(path: Path) -> bool:
    return path.is_dir() and path.suffix != ".part" and path.name != "seen"


@pytest.mark.parametrize("saves", [1, 5, 16, 18])
def test_a_kill_leaves_the_work_to_the_next_process(folder, tmp_path, cache, saves, monkeypatch):
    expected = decoded_set(folder)
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "other"))
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(saves)], timeout=100)
    assert done.returncode == -9
    assert not [path for path in (tmp_path / "other").glob("images/*") if complete(path)]
    found = decoded_set(folder)
    assert found.digest == expected.digest
    assert found.names == expected.names
    assert not list((tmp_path / "other" / "images").glob("*.part"))


def test_of_several_processes_one_decodes(folder, tmp_path):
    script = (
        "import sys, pathlib\n"
        "from vae_hyperband.data import decoded\n"
        "count = decoded.decode\n"
        "def counted(*a, **h):\n"
        "    print('decoded'); return count(*a, **h)\n"
        "decoded.decode = counted\n"
        "print(decoded.decoded_set(pathlib.Path(sys.argv[1])).digest)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    lines = [process.communicate(timeout=200)[0].split() for process in processes]
    assert {found[-1] for found in lines} == {decoded_set(folder).digest}
    assert sorted(len(found) for found in lines) == [1, 1, 62]  # 60, the first size, the digest


def test_a_cache_that_cannot_be_written_is_one_sentence(folder, monkeypatch):
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", "/proc/self/nothing")
    with pytest.raises(DataError, match="set VAE_HYPERBAND_CACHE to a folder that can be written"):
        decoded_set(folder)


# ---- Runs on images of one's own


def small(**changes) -> TrainConfig:
    return TrainConfig(latent_dim=2, batch_size=16, epochs=1, **changes)


def where(tmp_path, **changes) -> RunOptions:
    return RunOptions(
        device="cpu", num_threads=1, tensorboard=False,
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l", **changes,
    )  # fmt: skip


def test_a_run_remembers_its_images(folder, tmp_path, capsys):
    first = fit(small(), where(tmp_path, data=folder))
    found = load_ckpt(first.latest)
    assert found.config.dataset == "images"
    assert found.data.path == str(folder)
    assert found.class_names == ("cat", "dog")
    assert found.split("test").image_shape == (3, 8, 8)
    # without --data, and with them elsewhere
    assert "training vae" in capsys.readouterr().out
    again = fit(TrainConfig(latent_dim=2, batch_size=16, epochs=2), where(tmp_path))
    assert "resuming vae" in capsys.readouterr().out
    assert again.state.num_images == first.state.num_images
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"are no longer at .*photos: give --data"):
        found.split("train")
    moved = Folders(data=tmp_path / "moved")
    assert len(found.split("train", moved)) == first.state.num_images
    more = {"latent_dim": 2, "batch_size": 16, "epochs": 3}
    third = fit(TrainConfig(**more), where(tmp_path, data=tmp_path / "moved"))
    assert third.state.step > again.state.step
    write(tmp_path / "moved" / "cat" / "new.png", encoded(picture(1234)))
    with pytest.raises(
        CheckpointError, match=r"trained on other images than these: give the --data"
    ):
        found.split("train", moved)


def test_a_run_keeps_its_size(folder, tmp_path):
    fit(small(image_size="4", channels=1), where(tmp_path, data=folder))
    config = {"latent_dim": 2, "batch_size": 16, "epochs": 2}
    again = fit(TrainConfig(**config), where(tmp_path))
    assert again.state.config.image_size == "4"
    assert load_ckpt(again.latest).data.image_shape == (1, 4, 4)
    with pytest.raises(CheckpointError, match="image_size: '4' -> None"):
        fit(TrainConfig(**config), where(tmp_path, data=folder))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, num, kind):
        self.num, self.kind = num, kind

    def __len__(self):
        return self.num

    def __getitem__(self, number):
        image = picture(number)
        if self.kind == "tensor":
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return (image, number % 2) if self.kind != "alone" else image


@pytest.mark.parametrize("kind", ["tensor", "pillow", "alone"])
def test_data_sets_of_pytorch(tmp_path, kind):
    train = as_split(Pairs(20, kind))
    assert np.array_equal(train.images_NCHW[3], np.asarray(picture(3)).transpose(2, 0, 1))
    assert train.labels_N.tolist() == [0 if kind == "alone" else n % 2 for n in range(20)]
    found = fit(small(), where(tmp_path), splits=(Pairs(20, kind), Pairs(8, kind)))
    assert load_ckpt(found.latest).config.dataset == "images"
    with pytest.raises(CheckpointError, match="came from Python"):
        load_ckpt(found.latest).split("train")


def test_arrays_from_python(tmp_path):
    images = np.random.default_rng(0).random((30, 8, 8))
    found = fit(small(), where(tmp_path), splits=((images, np.arange(30) % 3), images[:5]))
    assert load_ckpt(found.latest).data.image_shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"30 images, but labels of shape \(29,\)"):
        as_split((images, np.zeros(29, int)))
    with pytest.raises(DataError, match="floats must be in"):
        as_split(images * 255)
    with pytest.raises(DataError, match="have the shapes"):
        as_split([np.zeros((8, 8)), np.zeros((8, 9))])


def test_the_data_command_says_what_was_found(folder, command, cache, tmp_path):
    several_sizes(folder)
    (folder / "cat" / "broken.png").write_bytes(b"x")
    (folder / "cat" / "twice.png").write_bytes(encoded(picture(1)))
    sheet = tmp_path / "sheet.png"
    done = command("data", "--data", folder, "--image-size", "8", "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    for line in (
        "folder of images, as 8x8 images, red, green, blue",
        "cat ",
        "splits: by a hash of each image, 5/7, 1/7 and 1/7",
        "sizes: 8x8 (61), 8x12 (3)",
        "skipped: 1 image",
        "  cat/broken.png: not an image",
        "repeated: 1 image with the content of another one",
        f"contact sheet: {sheet}",
    ):
        assert line in done.stdout
    with Image.open(sheet) as image:
        assert image.width > 400


def test_images_of_a_test_split_alone_can_be_looked_at_but_not_trained_on(tmp_path):
    path = arrays(x_test=GOOD)(tmp_path)
    assert decoded_set(path).counts == {"train": 0, "validation": 0, "test": 9}
    with pytest.raises(DataError, match="has no train images"):
        load_split("train", data=path)


def test_train_beside_other_folders_is_a_class(tmp_path):
    for number in range(40):
        kind = ("train", "bus", "boat", "plane")[number % 4]
        write(tmp_path / "vehicles" / kind / f"{number}.png", encoded(picture(number)))
    found = decoded_set(tmp_path / "vehicles")
    assert found.class_names == ("boat", "bus", "plane", "train")
    assert sum(found.counts.values()) == 40
    assert "train/ as a split: beside other folders it is a label" in found.remarks[0]


@pytest.mark.parametrize("prefix", ["./", "/", "x//", "x\\", "./x/./"])
def test_names_in_archives_as_other_programs_write_them(folder, tmp_path, prefix):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            name = f"{file.parent.name}/{file.name}"
            if "\\" in prefix:
                name = name.replace("/", "\\")
            archive.writestr(prefix + name, file.read_bytes())
    found, expected = decoded_set(tmp_path / "a.zip"), decoded_set(folder)
    assert found.class_names == ("cat", "dog")
    assert np.array_equal(found.images_NCHW, expected.images_NCHW)
    assert np.array_equal(found.labels_N, expected.labels_N)


def test_of_two_members_of_one_name_the_first_is_taken(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in (*range(20), 3, 3):
            content = encoded(picture(number + 100 * (archive.offset > 40_000)))
            info = tarfile.TarInfo(f"a/{number}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    found = decoded_set(tmp_path / "a.tar")
    assert len(found.names) == len(set(found.names)) == 20


def test_one_class_in_two_unicode_forms_is_one_class(tmp_path):
    for number in range(30):
        name = ("caf\u00e9", "cafe\u0301", "dog")[number % 3]
        write(tmp_path / "n" / name / f"{number}.png", encoded(picture(number)))
    found = decoded_set(tmp_path / "n")
    assert found.class_names == ("caf\u00e9", "dog")
    assert np.bincount(found.labels_N).tolist() == [20, 10]


def test_a_class_whose_name_is_no_text_is_shown(folder, tmp_path):
    (folder / "cat").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    assert decoded_set(folder).class_names == ("caf\ufffd", "dog")
    data = fit(small(), where(tmp_path, data=folder)).log_folder
    assert data.is_dir()


def hub_file(path, names, labels):
    import pyarrow
    import pyarrow.parquet

    about = {"info": {"features": {"label": {"names": names}}}} if names else {"info": None}
    images = [{"bytes": encoded(picture(1000 * len(str(path)) + n))} for n in range(len(labels))]
    table = pyarrow.table({"image": images, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def test_hub_files_whose_classes_are_in_another_order_agree(tmp_path):
    hub_file(tmp_path / "hub" / "train.parquet", ["zebra", "ant", "cat"], [0, 1, 2] * 10)
    hub_file(tmp_path / "hub" / "test.parquet", ["cat", "ant", "zebra"], [0, 1, 2, 0])
    found = decoded_set(tmp_path / "hub")
    test = found.labels_N[found.rows("test")].tolist()
    names = [found.class_names[label] for label in test]
    assert sorted(names) == ["ant", "cat", "cat", "zebra"]
    assert set(found.class_names) == {"zebra", "ant", "cat"}


def test_hub_files_with_strings_and_other_metadata(tmp_path):
    hub_file(tmp_path / "a" / "x.parquet", ["zebra", "ant"], ["ant", "zebra", "cow"] * 9)
    found = decoded_set(tmp_path / "a")
    assert found.class_names == ("zebra", "ant", "cow")
    assert np.bincount(found.labels_N).tolist() == [9, 9, 9]
    hub_file(tmp_path / "b" / "x.parquet", None, ["10", "9", "2"] * 9)
    assert decoded_set(tmp_path / "b").class_names == ("2", "9", "10")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([b"b", b"a", b"c"] * 3), ("a", "b", "c")),
        (np.array([["10"], ["9"], ["2"]] * 3), ("2", "9", "10")),
    ],
)
def test_labels_of_arrays_that_are_texts(tmp_path, labels, names):
    path = arrays(images=np.arange(9 * 64, dtype=np.uint8).reshape(9, 8, 8), y=labels)(tmp_path)
    found = decoded_set(path)
    assert found.class_names == names
    assert np.bincount(found.labels_N).tolist() == [3, 3, 3]


def test_arrays_are_known_by_their_content(tmp_path):
    np.save(tmp_path / "a", np.zeros((9, 8, 8), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert decoded_set(tmp_path / "a.npz").image_shape == (1, 8, 8)
    with pytest.raises(DataError, match="has the label 1844674"):
        decoded_set(arrays(x=GOOD, y=np.full(9, 2**64 - 1, np.uint64))(tmp_path))


def test_a_test_split_that_cannot_be_decoded_is_not_replaced(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own" / "train")
    write(tmp_path / "own" / "test" / "cat" / "1.png", b"broken")
    with pytest.raises(DataError, match="none of the images of test can be decoded"):
        decoded_set(tmp_path / "own")


def test_files_that_change_while_they_are_decoded_are_said(folder, monkeypatch):
    before = decode

    def meddling(*args, **how):
        (folder / "cat" / "00.png").write_bytes(encoded(picture(4321)))
        return before(*args, **how)

    monkeypatch.setattr(decoded, "decode", meddling)
    with pytest.raises(DataError, match="changed while they were decoded"):
        decoded_set(folder)
    monkeypatch.setattr(decoded, "decode", before)
    assert sum(decoded_set(folder).counts.values()) == 60


def test_a_change_that_hides_is_found(folder):
    """The same size and time of the last write, long ago."""
    path = folder / "cat" / "00.bmp"
    path.write_bytes(encoded(picture(77), "BMP"))
    os.utime(path, (1, 1))
    before = decoded_set(folder)
    path.write_bytes(encoded(picture(78), "BMP"))
    os.utime(path, (1, 1))
    assert decoded_set(folder).digest != before.digest


def test_a_run_does_not_train_on_a_damaged_array(folder, tmp_path):
    fit(small(), where(tmp_path, data=folder))
    path = decoded_set(folder).folder / "images.npy"
    content = bytearray(path.read_bytes())
    content[500:] = bytes(len(content) - 500)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: remove it"):
        fit(TrainConfig(latent_dim=2, batch_size=16, epochs=2), where(tmp_path))


def test_what_a_kill_left_beside_a_complete_array_is_removed(folder):
    found = decoded_set(folder)
    left = found.folder.with_name(f"{found.folder.name}.part")
    left.mkdir()
    decoded_set(folder)
    assert not left.exists()


def test_a_link_to_itself_is_passed_over(folder):
    (folder / "self").symlink_to("self")
    assert sum(decoded_set(folder).counts.values()) == 60


def test_a_few_large_files_make_a_chunk(folder, monkeypatch):
    monkeypatch.setattr(decoded, "CHUNK_BYTES", 1000)
    sizes = []
    decode_chunk = decoded._Decoding._decode_chunk

    def counted(self, start, contents):
        sizes.append(sum(map(len, contents)))
        return decode_chunk(self, start, contents)

    monkeypatch.setattr(decoded._Decoding, "_decode_chunk", counted)
    assert sum(decoded_set(folder).counts.values()) == 60
    assert max(sizes) < 1000 + 300
    assert len(sizes) > 5


def test_a_run_on_arrays_is_evaluated_on_arrays(tmp_path):
    images = np.random.default_rng(0).random((40, 8, 8))
    labels = np.arange(40) % 2
    train, held_out = (images[:30], labels[:30]), (images[30:], labels[30:])
    found = fit(small(), where(tmp_path), splits=(train, held_out))
    options = EvaluateOptions(parts=("likelihood",), iwae_samples=0)
    report = evaluate(found.best, "validation", (train, held_out), "cpu", options)
    assert report["bound"]["mean"] == pytest.approx(found.state.best["bound"], abs=1e-3)
    with pytest.raises(CheckpointError, match="was trained on other images than these"):
        evaluate(found.best, "validation", (held_out, held_out), "cpu", options)


def test_another_process_may_clean_up_first(folder, monkeypatch):
    complete_it = decoded._Decoding._complete

    def completed(self, records):
        complete_it(self, records)
        shutil.rmtree(self.part)  # as a process does that finds the array
        self.folder.with_name(f".{self.folder.name}.lock").unlink()

    monkeypatch.setattr(decoded._Decoding, "_complete", completed)
    assert sum(decoded_set(folder).counts.values()) == 60
