import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, idx_bytes, write_idx_folder
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vae_hyperband.common.config import TrainConfig
from vae_hyperband.common.errors import ConfigError, DataError
from vae_hyperband.data import idx, splits
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.idx import read_idx
from vae_hyperband.data.splits import (
    Split,
    load_split,
    load_training_splits,
    missing_classes,
    per_split,
)


def custom(folder, split="train"):
    return load_split(split, folder, "custom")


def test_results_kept_per_split_are_not_mixed_up():
    """Splits of one file have one digest, and may have one length."""
    calls = []

    @per_split
    def brightness(split, offset):
        calls.append(offset)
        return split.images_NCHW.double().mean().item() + offset

    pictures = torch.tensor([0, 9], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    dark, bright = (Split(pictures[i : i + 1], torch.zeros(1).long(), "file") for i in range(2))
    assert [brightness(dark, 0), brightness(bright, 0), brightness(dark, 1)] == [0, 9, 1]
    assert [brightness(dark, 0), brightness(bright, 0), brightness(dark, 1)] == [0, 9, 1]
    assert calls == [0, 0, 1]
    for offset in range(2, 9):
        brightness(dark, offset)
    assert len(calls) == 10
    brightness(dark, 0)  # long forgotten
    assert len(calls) == 11


def test_plain_and_gzipped_files_give_the_same_arrays(tmp_path, small_data):
    zipped = write_idx_folder(tmp_path / "zipped", zipped=True)
    for split in ("train", "validation", "test"):
        a, b = custom(small_data, split), custom(zipped, split)
        assert torch.equal(a.images_NCHW, b.images_NCHW)
        assert torch.equal(a.labels_N, b.labels_N)
        assert a.digest == b.digest


def test_the_last_sixth_of_the_training_file_is_held_out_where_that_is_asked_for(small_data):
    whole, _ = read_idx(small_data / NAMES[0], 3)
    train, validation = (
        load_split(name, small_data, "custom", "last") for name in ("train", "validation")
    )
    assert (len(train), len(validation)) == (300, 60)
    assert torch.equal(torch.cat((train.images_NCHW, validation.images_NCHW))[:, 0], whole)


def rewritten(folder, small_data, order) -> Path:
    """The small data with the images of the training file in another order."""
    shutil.copytree(small_data, folder)
    for name, dims in zip(NAMES[:2], (3, 1), strict=True):
        array, _ = read_idx(small_data / name, dims)
        (folder / name).write_bytes(idx_bytes(array[order].numpy()))
    return folder


def held_out(folder) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in custom(folder, "validation").images_NCHW)


def test_the_validation_split_does_not_follow_the_order_of_the_file(tmp_path, small_data, capsys):
    labels, _ = read_idx(small_data / NAMES[1], 1)
    sorted_by_class = rewritten(tmp_path / "sorted", small_data, labels.argsort())
    backwards = rewritten(tmp_path / "back", small_data, torch.arange(359, -1, -1))
    assert held_out(small_data) == held_out(sorted_by_class) == held_out(backwards)
    assert len(held_out(small_data)) == 60
    train, validation = custom(sorted_by_class), custom(sorted_by_class, "validation")
    assert missing_classes(train, validation) == ""
    # whoever wants the last ones is told what that means
    last = load_training_splits(TrainConfig(dataset="custom", holdout="last"), sorted_by_class)
    here, there = (set(split.labels_N.tolist()) for split in last)
    only_in_training = ", ".join(map(str, sorted(here - there)))
    said = capsys.readouterr().err
    assert f"no image of the validation split has the labels {only_in_training}" in said
    assert len(there) <= 3


def test_the_same_image_twice_is_never_in_both_splits(tmp_path, small_data):
    folder = rewritten(tmp_path / "twice", small_data, torch.arange(360).repeat(2))
    found = held_out(folder)
    assert len(found) == 120
    train = {image.numpy().tobytes() for image in custom(folder).images_NCHW}
    assert not train & set(found)
    alike = rewritten(tmp_path / "alike", small_data, torch.zeros(360, dtype=torch.long))
    with pytest.raises(DataError, match="too few different ones to split"):
        custom(alike)


def test_an_image_that_is_there_too_often_does_not_fill_the_validation_split(tmp_path, small_data):
    for seed in range(5):
        order = torch.arange(360)
        order[180:] = seed  # half of them one image
        folder = rewritten(tmp_path / str(seed), small_data, order)
        assert len(held_out(folder)) == 60
        assert len(set(held_out(folder))) == 60


def test_the_first_images_of_the_validation_split_are_of_several_classes(tmp_path, small_data):
    """Pictures of a run show the first ones."""
    labels, _ = read_idx(small_data / NAMES[1], 1)
    folder = rewritten(tmp_path / "sorted", small_data, labels.argsort())
    assert len(custom(folder, "validation").labels_N[:32].unique()) >= 7


def test_a_holdout_that_is_none_is_refused(small_data):
    with pytest.raises(
        ConfigError, match="The holdout is 'first', but must be one of content, last"
    ):
        load_split("train", small_data, "custom", "first")
    last = get_dataloader("validation", 60, data_dir=small_data, dataset="custom", holdout="last")
    expected = load_split("validation", small_data, "custom", "last")
    assert torch.equal(next(iter(last))[1], expected.labels_N)


def test_train_and_validation_never_open_the_test_file(tmp_path, small_data):
    folder = write_idx_folder(tmp_path / "d")
    for name in NAMES[2:]:
        (folder / name).unlink()
    assert len(custom(folder)) == 300
    assert len(custom(folder, "validation")) == 60
    with pytest.raises(DataError, match="No file t10k-images"):
        custom(folder, "test")


def test_a_pixel_is_its_byte_over_255_and_the_last_batch_is_smaller(small_data):
    split = custom(small_data)
    loader = get_dataloader(split, batch_size=64, shuffle=False)
    assert isinstance(loader, DataLoader)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [64, 64, 64, 64, 44]
    images = torch.cat([x for x, _ in batches])
    assert torch.equal(images, split.images_NCHW.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels_N)


def test_the_order_is_a_function_of_seed_and_epoch(small_data):
    split = custom(small_data)

    def labels(seed, epoch):
        loader = get_dataloader(split, 300, seed=seed, shuffle=True)
        loader.sampler.start_at(epoch)
        [(_, labels_B)] = loader
        return labels_B.tolist()

    assert labels(0, 3) == labels(0, 3)
    assert labels(0, 3) != labels(0, 4) != labels(1, 3)
    assert sorted(labels(0, 3)) == sorted(split.labels_N.tolist())


def test_each_pass_has_an_order_of_its_own(small_data):
    loader = get_dataloader(custom(small_data), 300, seed=1, shuffle=True)
    passes = [next(iter([y.tolist() for _, y in loader])) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    loader.sampler.start_at(1)
    assert [y.tolist() for _, y in loader] == [passes[1]]


def test_unknown_names_are_refused(small_data):
    for split, dataset in (("Train", "custom"), ("tset", "custom"), ("train", "fashion_mnist")):
        with pytest.raises(ConfigError, match="must be one of"):
            load_split(split, small_data, dataset)


def test_an_epoch_can_be_entered_in_its_middle(small_data):
    loader = get_dataloader(custom(small_data), 32, seed=1, shuffle=True)
    loader.sampler.start_at(2)
    whole = [y.tolist() for _, y in loader]
    loader.sampler.start_at(2, batch=4)
    assert len(loader) == len(whole) - 4
    assert [y.tolist() for _, y in loader] == whole[4:]


def test_the_loader_leaves_the_global_generator_alone(small_data):
    before = torch.random.get_rng_state()
    list(get_dataloader(custom(small_data), 32, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [0, 301])
def test_impossible_batch_sizes_are_refused(small_data, batch_size):
    with pytest.raises(ConfigError, match="between 1 and the 300 images"):
        get_dataloader(custom(small_data), batch_size)


def test_other_data_under_fashion_mnist_s_names_is_refused_by_digest(small_data):
    found = hashlib.sha256((small_data / NAMES[0]).read_bytes()).hexdigest()
    with pytest.raises(DataError) as error:
        load_split("train", small_data)
    assert found in str(error.value)
    assert splits.FASHION_MNIST_SHA256[NAMES[0]] in str(error.value)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("where", ["dots", "FashionMNIST/raw", "MNIST/raw", "raw"])
def test_files_are_found_where_kaggle_and_torchvision_have_them(tmp_path, where, zipped):
    folder = write_idx_folder(tmp_path / "d" / (where if where != "dots" else ""), zipped=zipped)
    if where == "dots":
        for path in folder.iterdir():
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    expected = custom(write_idx_folder(tmp_path / "usual"))
    found = custom(tmp_path / "d")
    assert torch.equal(found.images_NCHW, expected.images_NCHW)
    assert torch.equal(found.labels_N, expected.labels_N)


def test_images_of_one_folder_do_not_meet_labels_of_another(tmp_path):
    for name in ("FashionMNIST", "MNIST"):
        write_idx_folder(tmp_path / name / "raw")
    (tmp_path / "FashionMNIST/raw/train-labels-idx1-ubyte").unlink()  # an interrupted download
    with pytest.raises(DataError, match=r"has data in .*FashionMNIST/raw and in .*: give one"):
        custom(tmp_path)
    with pytest.raises(DataError, match="No file train-labels-idx1-ubyte"):
        custom(tmp_path / "FashionMNIST")


def test_a_file_of_another_name_is_named(tmp_path):
    folder = write_idx_folder(tmp_path / "d")
    for path in folder.iterdir():
        path.rename(path.with_name(f"emnist-letters-{path.name}"))
    with pytest.raises(DataError, match="did you mean emnist-letters-train-images-idx3-ubyte"):
        custom(folder)


def test_a_user_without_a_home_still_has_the_system_s_package(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("VAE_HYPERBAND_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(splits.Path, "home", no_home)
    monkeypatch.setattr(splits, "SYSTEM_FOLDER", tmp_path)
    with pytest.raises(DataError, match=f"No file train-images-idx3-ubyte .* in {tmp_path}: run"):
        load_split("train")
    write_idx_folder(tmp_path)
    with pytest.raises(DataError, match="is not Fashion-MNIST's"):  # looked at, and refused
        load_split("train")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_that_may_not_be_entered_is_one_sentence(tmp_path, small_data):
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    closed.chmod(0o700)
    script = (
        "import os, sys, pathlib\n"
        "from vae_hyperband.data.splits import load_split\n"
        "from vae_hyperband.common.errors import DataError\n"
        "os.setuid(12345)\n"
        "try: load_split('train', pathlib.Path(sys.argv[1]), 'custom')\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, closed / "data"], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.endswith("cannot be read: Permission denied.\n"), done.stderr


def damaged(tmp_path, change):
    folder = write_idx_folder(tmp_path / "d")
    path = folder / NAMES[0]
    path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "holds only"),
        (lambda b: b + b"\0", "holds more"),
        (lambda b: b"", "is not an IDX file"),
        (lambda b: b"<html>" + b, "is not an IDX file"),
        (lambda b: gzip.compress(b)[:-9], "cannot be read"),
        (lambda b: b"\x1f\x8b" + b, "cannot be read"),
        (lambda b: b[:4] + b"\xff" * 8 + b[12:], "but needs 1 to 1073741824 bytes"),
        (lambda b: idx_bytes(np.zeros((12, 8, 8))), "do not belong together"),
        (lambda b: idx_bytes(np.zeros(360)), "is not an IDX file of 3-dimensional"),
    ],
)
def test_damaged_files_raise_one_sentence_that_names_the_file(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as error:
        custom(damaged(tmp_path, change))
    assert NAMES[0] in str(error.value)


@given(st.binary(max_size=64) | st.binary(max_size=32).map(lambda tail: bytes([0, 0, 8, 1]) + tail))
def test_any_bytes_decode_exactly_or_raise_the_one_error(content):
    from pathlib import Path

    try:
        array, digest = idx._decode_idx(io.BytesIO(content), Path("x"), 1)
    except DataError:
        return
    assert idx_bytes(array.numpy()) == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(100)) + bytes(200_000_000)))
    read = []

    class Counting(gzip.GzipFile):
        def read(self, size=-1):
            content = super().read(size)
            read.append(len(content))
            return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip, "GzipFile", Counting)
        with pytest.raises(DataError, match="holds more"):
            read_idx(path, 1)
    assert sum(read) < 1000


def test_a_changed_file_is_read_again(tmp_path):
    folder = write_idx_folder(tmp_path / "d")
    before = custom(folder).digest
    path = folder / NAMES[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert custom(folder).digest != before


def test_the_cache_comes_before_the_system_and_a_wrong_file_there_is_passed_over(
    tmp_path, monkeypatch, small_data
):
    cache, system = tmp_path / "cache", write_idx_folder(tmp_path / "system", zipped=True)
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(cache))
    monkeypatch.setattr(splits, "SYSTEM_FOLDER", system)
    digests = {name: hashlib.sha256((small_data / name).read_bytes()).hexdigest() for name in NAMES}
    monkeypatch.setattr(splits, "FASHION_MNIST_SHA256", digests)
    assert load_split("train").digest == digests[NAMES[0]]
    cache.mkdir()
    (cache / NAMES[0]).write_bytes(b"not it")
    assert load_split("train").digest == digests[NAMES[0]]
    for file in system.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="is not an IDX file"):
        load_split("train")


def test_real_fashion_mnist_has_its_known_shape_and_entropy(fashion_mnist):
    from vae_hyperband.evaluation.bounds import entropy_floor

    floors = {"train": 188.13, "validation": 189.05, "test": 189.86}  # measured, nats/image
    for (split, floor), num in zip(floors.items(), (50_000, 10_000, 10_000), strict=True):
        loaded = load_split(split)
        assert loaded.images_NCHW.shape == (num, 1, 28, 28)
        assert sorted(loaded.labels_N.unique().tolist()) == list(range(10))
        assert entropy_floor(loaded.pixels(slice(None))) == pytest.approx(floor, abs=0.01)


FUZZ = """
import gzip, random, resource, sys
from pathlib import Path
import numpy as np
from vae_hyperband.common.errors import DataError
from vae_hyperband.data.idx import read_idx

rng, path, counts = random.Random(int(sys.argv[1])), Path(sys.argv[2]), [0, 0]
array = np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8)
good = bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 8, 0, 0, 0, 8]) + array.tobytes()
def flip(b):
    b = bytearray(b); b[rng.randrange(len(b))] ^= 1 << rng.randrange(8); return bytes(b)
def sizes(b):
    return b[:4] + bytes(rng.choice((0, 1, 7, 8, 128, 255)) for _ in range(12)) + b[16:]
changes = [
    flip, sizes, gzip.compress, bytes,
    lambda b: b[: rng.randrange(len(b))],
    lambda b: b + rng.randbytes(rng.randrange(1, 99)),
    lambda b: rng.randbytes(rng.randrange(200)),
    lambda b: b[: rng.randrange(len(b))] + b[rng.randrange(len(b)) :],
    lambda b: gzip.compress(b + bytes(50_000_000)) if rng.random() < 0.05 else b,
]
room = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 150_000
for _ in range(2000):
    content = good
    for _ in range(rng.randrange(1, 4)):
        content = rng.choice(changes)(content) or b"x"
    path.write_bytes(content)
    try:
        found, digest = read_idx(path, 3)
    except DataError as error:
        counts[0] += 1
        if str(path) not in str(error):
            sys.exit(f"does not name its file: {error}")
    else:
        counts[1] += 1
        plain = content
        while plain[:2] == b"\\x1f\\x8b":
            plain = gzip.decompress(plain)
        if plain[16:] != found.numpy().tobytes() or list(found.shape) != [
            int.from_bytes(plain[i : i + 4], "big") for i in (4, 8, 12)
        ]:
            sys.exit("another array than the bytes say")
if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > room:
    sys.exit("more memory than any of these files has")
if min(counts) < 200:
    sys.exit(f"{counts}: nearly always the same outcome")
"""


@pytest.mark.parametrize(
    "optimized", [pytest.param([], marks=pytest.mark.faults), ["-O"]], ids=["", "python -O"]
)
def test_2000_damaged_files_decode_exactly_or_raise_the_one_error(optimized, tmp_path):
    """The checks are no asserts, which -O would leave out."""
    arguments = [sys.executable, *optimized, "-c", FUZZ, "3", str(tmp_path / "file")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
