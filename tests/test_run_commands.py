"""``compare`` and ``animate`` on real runs of a second."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from vae_hyperband.animations import latent_walk, logged_pictures
from vae_hyperband.checkpoint import load_ckpt
from vae_hyperband.config import RunOptions, TrainConfig
from vae_hyperband.errors import ConfigError
from vae_hyperband.latents import Posteriors
from vae_hyperband.model import initialized_vae
from vae_hyperband.tracking import Tracker
from vae_hyperband.train_vae import main
from vae_hyperband.training import fit


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_data):
    folder = tmp_path_factory.mktemp("runs")
    one = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=3, seed=3)
    for name, config in {
        "one": one,
        "same": one,
        "other": dataclasses.replace(one, beta=4.0, learning_rate=1e-3),
    }.items():
        where = RunOptions(
            run=name, device="cpu", num_threads=1, data_dir=small_data, log_interval=4,
            checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs",
        )  # fmt: skip
        fit(config, where, quiet=True)
    return folder


@pytest.fixture
def places(runs):
    return ["--checkpoints-dir", str(runs / "checkpoints"), "--logs-dir", str(runs / "logs")]


def test_compare_says_what_differs_and_what_came_of_it(runs, places, capsys):
    picture = runs / "compare.png"
    assert main(["compare", "one", "other", *places, "--out", str(picture)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["one", "other"]
    assert ["beta", "1", "4"] in lines
    assert ["learning_rate", "0.008", "0.001"] in lines
    assert not any(line[:1] == ["latent_dim"] for line in lines)  # the same in both
    content = [load_ckpt(runs / f"checkpoints/{name}/best.pt") for name in ("one", "other")]
    bounds = [f"{c['metrics']['bound']:.2f}" for c in content]
    bounds[bounds.index(min(bounds, key=float))] += "*"
    assert ["bound", "(beta", "=", "1)", *bounds] in lines
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 1000


def test_compare_as_json_has_every_run_and_nothing_else_on_stdout(runs, places, capsys):
    assert main(["compare", "one", "same", "other", "--json", *places]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differs"] == {"beta": [1.0, 1.0, 4.0], "learning_rate": [0.008, 0.008, 0.001]}
    assert [run["name"] for run in found["runs"]] == ["one", "same", "other"]
    assert found["runs"][0]["weights"] == found["runs"][1]["weights"]
    assert found["runs"][0]["images_per_second"] > 0


def test_two_runs_of_one_configuration_are_said_to_be_so(places, capsys):
    assert main(["compare", "one", "same", *places]) == 0
    assert "(the same configuration and data)" in capsys.readouterr().out


MISTAKES = {
    "one run": (["compare", "one"], "two or more"),
    "one run twice": (["compare", "one", "one"], "two or more"),
    "no such run": (["compare", "one", "none"], "No checkpoint at"),
    "another folder": (["compare", "one", "../one"], "plain name"),
    "a strange file": (["compare", "one", "other", "--out", "x.txt"], "must end in"),
    "a strange picture": (["animate", "one", "--out", "x.mp4"], "must end in"),
    "no logs": (["animate", "nothing", "--kind", "training"], "0 pictures of samples"),
    "too few images": (["animate", "one"], "80 images"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(places, small_data, mistake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, said = MISTAKES[mistake]
    data = ["--data-dir", str(small_data)] if argv[0] == "animate" else []
    assert main([*argv, *places, *data]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_samples_over_training_have_a_frame_per_validation(runs, places, ending, tmp_path):
    out = tmp_path / f"training.{ending}"
    assert main(["animate", "one", "--kind", "training", "--out", str(out), *places]) == 0
    with Image.open(out) as moving:
        assert moving.n_frames == 3
        assert moving.info.get("loop") == 0
        assert moving.size == (3 * (8 * 10 + 2), 3 * (8 * 10 + 2))
        if ending == "webp":  # the margins are white, as paper is
            assert moving.convert("RGB").getpixel((3 * 10 + 1, 100)) == (255, 255, 255)
            assert moving.convert("L").getextrema()[0] < 128


def test_pictures_of_steps_that_were_taken_back_do_not_count(tmp_path):
    def grey(value):
        return torch.full((1, 1, 8, 8), value)

    with Tracker(tmp_path, start_step=0) as tracker:
        for step in (1, 2, 3):
            tracker.pictures(step, random_samples=grey(0.25))
    with Tracker(tmp_path, start_step=1) as tracker:
        tracker.pictures(2, random_samples=grey(0.75))
    found = logged_pictures(tmp_path, "images/random_samples")
    assert sorted(found) == [1, 2]
    assert [found[step].getpixel((5, 5))[0] for step in (1, 2)] == [63, 191]


def test_a_walk_starts_and_stops_at_the_images_and_comes_back(tmp_path):
    model = initialized_vae(3, 8, 1, seed=0).eval()
    mu_NZ = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 5
    posteriors = Posteriors(mu_NZ, mu_NZ)
    how = {"num_stops": 2, "walkers": 4, "frames_per_leg": 5}
    paths = [
        latent_walk(model, posteriors, tmp_path / f"{i}.gif", seed=i % 2, **how) for i in (0, 2, 1)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    with Image.open(paths[0]) as moving:
        assert moving.n_frames == 10
    with pytest.raises(ConfigError, match="8 images, but there are 7"):
        latent_walk(model, Posteriors(mu_NZ[:7], mu_NZ[:7]), tmp_path / "x.gif", **how)
