"""encode, reconstruct, nearest and score: a trained model on images, one by one."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit


def photograph(number: int, bright: int = 0) -> Image.Image:
    """A rectangle on noise, 12 wide and 8 high; a bright one is all noise."""
    random = np.random.default_rng(number)
    values = random.integers(0, 30, (8, 12, 3))
    values[: 2 + number % 5, : 3 + number % 7] += 150
    if bright:
        values = random.integers(0, 256, (8, 12, 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photographs, anomalies, and the checkpoint of a model of the former."""
    folder = tmp_path_factory.mktemp("codes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_HYPERBAND_CACHE", str(folder / "cache"))
        for number in range(70):
            path = folder / "photos" / ("a", "b")[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(number).save(path)
        (folder / "odd").mkdir()
        for number in range(12):
            photograph(number, bright=1).save(folder / "odd" / f"{number}.png")
        options = RunOptions(
            run="own", data=folder / "photos", device="cpu", num_threads=1, tensorboard=False,
            checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs",
        )  # fmt: skip
        config = TrainConfig(latent_dim=4, batch_size=10, epochs=15, likelihood="learned-gaussian")
        fit(config, options, quiet=True)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(place / "cache"))


def test_codes_of_the_run_s_own_split(place):
    assert main(["encode", "own", "--split", "test", "--out", "a.npz"]) == 0
    checkpoint = load_ckpt(place / "checkpoints/own/best.pt")
    split = checkpoint.split("test")
    with np.load("a.npz") as found:
        mu_NZ, logvar_NZ = checkpoint.model().encode(split.pixels(slice(None)))
        assert np.allclose(found["mu"], mu_NZ.detach(), atol=1e-6)
        assert np.allclose(found["logvar"], logvar_NZ.detach(), atol=1e-6)
        assert np.allclose(found["bound"], found["reconstruction"] + found["KL"])
        kl_NZ = 0.5 * (mu_NZ**2 + logvar_NZ.exp() - 1 - logvar_NZ)
        assert np.allclose(found["KL"], kl_NZ.sum(1).detach(), atol=1e-4)
        assert found["label"].tolist() == split.labels_N.tolist()
        for name, label in zip(found["file"], found["label"], strict=True):
            assert name.startswith(("a/", "b/")[label])


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_the_three_kinds_of_files_say_the_same(ending):
    assert main(["encode", "own", "--data", "odd", "--out", f"b.{ending}"]) == 0
    assert main(["encode", "own", "--data", "odd", "--out", "c.npz"]) == 0
    with np.load("c.npz") as expected:
        names, mu_NZ = expected["file"].tolist(), expected["mu"]
    assert names == sorted(f"{number}.png" for number in range(12))
    if ending == "csv":
        with open("b.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["file"] for row in rows] == names
        found = np.array([[float(row[f"mu_{i}"]) for i in range(4)] for row in rows])
    elif ending == "parquet":
        table = pyarrow.parquet.read_table("b.parquet")
        assert table["file"].to_pylist() == names
        found = np.array(table["mu"].to_pylist())
    else:
        with np.load("b.npz") as file:
            found = file["mu"]
    assert np.allclose(found, mu_NZ)


def test_images_are_resized_as_those_of_the_run_were(capsys):
    photograph(3).resize((120, 80), Image.Resampling.NEAREST).save("large.png")
    assert main(["encode", "own", "large.png", "photos/b/03.png", "--out", "d.npz"]) == 0
    with np.load("d.npz") as found:
        assert found["file"].tolist() == ["large.png", "photos/b/03.png"]
        assert found["mu"].shape == (2, 4)
        assert found["label"].tolist() == [-1, -1]
        assert found["class"].tolist() == ["", ""]
    assert capsys.readouterr().out == "d.npz: 2 images, 4 latents\n"


def test_reconstructions_as_a_grid_and_as_files():
    assert main(["reconstruct", "own", "photos/a/00.png", "photos/b/01.png"]) == 0
    with Image.open("reconstructions.png") as picture:
        assert picture.width > picture.height
    assert main(["reconstruct", "own", "--num-images", "5", "--out", "files"]) == 0
    files = sorted(Path("files").iterdir())
    assert [path.name for path in files] == [f"{number}.png" for number in range(5)]
    with Image.open(files[0]) as picture:
        assert picture.size == (12, 8)
    assert main(["reconstruct", "own", "--out", "files"]) == 2  # it is there already


def test_an_image_is_nearest_to_itself(capsys):
    assert main(["nearest", "own", "photos/a/04.png", "--data", "photos", "--num-images", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["0.000", "a/04.png"]
    distances = [float(line.split()[0]) for line in lines[:3]]
    assert distances == sorted(distances)
    assert lines[3] == "nearest.png"
    assert main(["nearest", "own", "0", "--num-images", "1"]) == 0
    assert capsys.readouterr().out.split()[0] == "0.000"


def test_what_the_model_has_not_seen_the_like_of_comes_first(capsys):
    command = ["score", "own", "--data", "odd", "--against", "photos", "--out", "scores.csv"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 images, bound in nats/image: mean" in said
    assert "against 70 images of photos" in said
    assert "AUROC 1.0000 (95% interval 0.7575 to 1.0000)" in said
    with open("scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert {row["file"] for row in rows} == {f"{number}.png" for number in range(12)}
    assert main(["score", "own", "--data", "odd", "--iwae-samples", "5"]) == 0
    tighter = float(capsys.readouterr().out.split("mean ")[1].split()[0])
    assert tighter < np.mean(scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "own", "photos/a/00.png", "--data", "odd"], "image files and --data all say"),
        (["encode", "own", "nothing.png"], "nothing.png cannot be read: No such file"),
        (["encode", "own", "checkpoints/own/best.pt"], "best.pt is not an image: give an image"),
        (["encode", "own", "--out", "x.txt"], "must end in .npz or .parquet or .csv"),
        (["nearest", "own", "999"], "The image is 999, but the validation split has"),
        (["score", "own", "--against", "nowhere"], "there is no such file or folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_model_of_grey_images_takes_coloured_files(tmp_path, small_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = RunOptions(run="grey", device="cpu", data_dir=small_data, tensorboard=False)
    fit(TrainConfig(dataset="custom", latent_dim=2, batch_size=50, epochs=1), where, quiet=True)
    photograph(1).save("photo.png")
    assert main(["encode", "grey", "photo.png", "--data-dir", str(small_data)]) == 0
    with np.load("latents.npz") as found:
        assert torch.from_numpy(found["mu"]).isfinite().all()


def test_labels_of_other_data_are_those_of_the_run(place):
    for number in range(4):
        path = place / "more" / ("b", "c")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(100 + number).save(path)
    assert main(["encode", "own", "--data", "more", "--out", "m.npz"]) == 0
    with np.load("m.npz") as found:
        assert found["file"].tolist() == ["b/0.png", "b/2.png", "c/1.png", "c/3.png"]
        assert found["label"].tolist() == [1, 1, -1, -1]
        assert found["class"].tolist() == ["b", "b", "", ""]


def test_one_image_can_be_scored(place, capsys):
    (place / "single").mkdir()
    photograph(5).save(place / "single" / "1.png")
    assert main(["score", "own", "--data", "single", "--against", "photos"]) == 0
    assert "1 image, bound" in capsys.readouterr().out
