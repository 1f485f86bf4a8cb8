"""``compare`` and ``animate`` on real runs of a second."""

import dataclasses
import html
import io
import json
import math
import shutil

import pytest
import torch
from chromium import Watched, barriers
from conftest import write_idx_folder
from PIL import Image

from vae_hyperband.common.config import Places, RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.evaluation.latents import Posteriors
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.model.initialization import initialized_vae
from vae_hyperband.reporting import figures, report
from vae_hyperband.reporting.animations import Walk, latent_walk, logged_samples
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import SearchResult, TrialRecord, write_result
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit
from vae_hyperband.training.tracker import Tracker, logged_pictures


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
    bounds = [f"{c.metrics['bound']:.2f}" for c in content]
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


def write_search(folder, **config):
    """A finished search of three trials, written as a search writes it."""

    def row(epoch, bound):
        return {"epoch": epoch, "step": epoch, "bound": bound, "total_loss": bound,
                "recon_loss": bound - 9, "KL_divergence": 9.0}  # fmt: skip

    tried = Hyperparameters(latent_dim=16, learning_rate=1e-3, batch_size=64, beta=1.0)
    trials = [
        TrialRecord(0, tried, [row(1, 200.0), row(2, 110.5)], "finished"),
        TrialRecord(
            1,
            tried.replace(learning_rate=9e-3),
            [],
            "failed",
            "<b>diverged</b> & died",
        ),
        TrialRecord(2, tried.replace(beta=4.0), [row(1, 99.25), row(2, 90.75)], "finished"),
    ]
    config = SearchConfig(num_trials=3, max_epochs=2, dataset="custom", **config)
    folder.mkdir(parents=True)
    write_result(SearchResult(config, trials, folder))


def test_a_run_s_report_has_all_there_is_to_see_and_needs_nothing_else(runs, places, small_data):
    data, out = ["--data-dir", str(small_data)], runs / "report.html"
    assert main(["report", "other", "--out", str(out), *places, *data]) == 0
    page = out.read_text()
    content = load_ckpt(runs / "checkpoints/other/best.pt")
    for fact in (content.weights_digest, content.data.digest, "Run other", "kl warmup epochs"):
        assert fact in page
    assert "free bits" not in page  # it is for another objective
    assert f"{content.metrics['bound']:.2f}" in page
    # curves, three validations, reconstructions, samples, traversals
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 1 + 3 + 3
    assert page.count("<img") == page.count('alt="')
    assert "default-src 'none'" in html.unescape(page)
    assert "http" not in page.replace("http-equiv", "")


def test_a_report_takes_the_evaluation_of_its_checkpoint_and_of_no_other(runs, places, small_data):
    data, place = ["--data-dir", str(small_data)], runs / "logs/one/evaluation.json"
    best = runs / "checkpoints/one/best.pt"
    how = ["--parts", "likelihood", "--json", str(place)]
    assert main(["evaluate", str(best), *how, *data]) == 0
    assert main(["report", "one", *places, *data]) == 0
    assert "mean +- standard error" in (runs / "logs/one/report.html").read_text()
    place.write_text(json.dumps(json.loads(place.read_text()) | {"checkpoint_digest": "0"}))
    assert main(["report", "one", *places, *data]) == 0
    assert "mean +- standard error" not in (runs / "logs/one/report.html").read_text()


def test_a_search_s_report_has_every_trial_with_its_reasons(runs, places):
    write_search(runs / "checkpoints/s", betas=(1.0, 4.0))
    assert main(["report", "s", *places]) == 0
    page = (runs / "logs/s/report.html").read_text()
    assert page.count("<tr data-trial=") + page.count('<tr class="winner" data-trial=') == 3
    assert '<tr class="winner" data-trial="2"><td data-value="2"' in page
    assert "&lt;b&gt;diverged&lt;/b&gt; &amp; died" in page
    assert "<b>diverged" not in page
    assert "trial_002 won with 90.75" in page


def test_a_search_s_report_says_how_to_search_again_and_where_its_winner_was_trained(searched):
    folder, _ = searched
    place = Places(run="s", checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs")
    page = report.report(place)
    winner = load_ckpt(folder / "checkpoints/s/winner.pt")
    for fact in (winner.weights_digest, winner.data.digest, winner.environment["torch"]):
        assert fact in page
    command = page.split("vae-hyperband search")[1].split("<")[0]
    assert command.split() == [
        "--run", "s", "--dataset", "custom", "--num-trials", "9",
        "--latent-dims", "2", "4", "--batch-sizes", "32", "64",
    ]  # fmt: skip


@pytest.mark.browser
def test_the_table_is_sorted_by_a_click_and_fits_a_phone(runs, chromium):
    if not (runs / "checkpoints/t").exists():
        write_search(runs / "checkpoints/t")
    where = ["--checkpoints-dir", str(runs / "checkpoints"), "--logs-dir", str(runs / "logs")]
    out = runs / "sorted.html"
    assert main(["report", "t", "--out", str(out), *where]) == 0
    watched = Watched(chromium, viewport={"width": 390, "height": 844})
    page = watched.page
    page.goto(out.as_uri())
    numbers = "[...document.querySelectorAll('tbody tr td:first-child')].slice(0, 3)"
    order = f"{numbers}.map(cell => cell.dataset.value).join('')"
    assert page.evaluate(order) == "201"  # ranked; what has no value comes last
    assert page.get_attribute("th[aria-sort=ascending]", "aria-sort") == "ascending"
    page.click("th button >> text=epochs")
    page.click("th button >> text=bound")
    assert page.evaluate(order) == "201"
    page.click("th button >> text=bound")
    assert page.evaluate(order) == "021"
    page.click("th button >> text=outcome")
    assert page.evaluate(order) == "102"
    page.locator("th button >> text=trial").press("Enter")
    assert page.evaluate(order) == "012"
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert watched.requests == [out.as_uri()]
    assert watched.troubles == []
    watched.context.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_a_report_that_keeps_people_out(
    runs, searched, chromium, small_data, scheme
):
    evaluation = runs / "logs/same/evaluation.json"
    if not evaluation.exists():
        how = ["--samplers", "prior", "--num-generated", "30", "--data-dir", str(small_data)]
        ckpt = str(runs / "checkpoints/same/best.pt")
        assert main(["evaluate", ckpt, "--json", str(evaluation), *how]) == 0
    places = {
        "same": Places(
            data_dir=small_data, checkpoints_dir=runs / "checkpoints", logs_dir=runs / "logs"
        ),
        "s": Places(checkpoints_dir=searched[0] / "checkpoints", logs_dir=searched[0] / "logs"),
    }
    for run, place in places.items():
        path = report.write_report(dataclasses.replace(place, run=run))
        watched = Watched(chromium, color_scheme=scheme)
        for width in (1200, 390):
            watched.page.set_viewport_size({"width": width, "height": 844})
            watched.page.goto(path.as_uri())
            assert barriers(watched.page) == []
        wide = watched.page.locator(".wide").evaluate_all(
            "found => found.map(e => [e.scrollWidth > e.clientWidth, e.tabIndex === 0])"
        )
        assert any(scrolls for scrolls, _ in wide)
        assert all(scrolls == focusable for scrolls, focusable in wide)
        assert watched.troubles == []
        watched.context.close()


MISTAKES = {
    "no such report": (["report", "none"], "has no run none; there are one, other, same."),
    "one run": (["compare", "one"], "two or more"),
    "one run twice": (["compare", "one", "one"], "two or more"),
    "no such run": (["compare", "one", "none"], "has no run none; there are one, other, same."),
    "another folder": (["compare", "one", "../one"], ".. has no run one, and no other."),
    "a strange file": (["compare", "one", "other", "--out", "x.txt"], "must end in"),
    "a strange picture": (["animate", "one", "--out", "x.mp4"], "must end in"),
    "a checkpoint as report": (["report", "one", "--out", "best.pt"], "must end in .html"),
    "the name of a job": (["report", "ot"], "has no run ot; there are"),
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


def test_what_is_no_run_is_said_to_be_what_it_is(tmp_path, capsys):
    places = ["--checkpoints-dir", str(tmp_path), "--logs-dir", str(tmp_path / "logs")]
    for command in ("report", "animate"):
        assert main([command, "mine", *places]) == 2
        assert "has no run mine, and no other" in capsys.readouterr().err
    (tmp_path / "s").mkdir()
    (tmp_path / "s/search.json").write_text("{}")
    for argv in (["compare", "s", "t"], ["animate", "s"]):
        assert main([*argv, *places]) == 2
        assert "s is a search that has not ended" in capsys.readouterr().err
    (tmp_path / "s/trials.json").write_text("{}")
    assert main(["compare", "s", "t", *places]) == 2
    assert "vae-hyperband report s shows it" in capsys.readouterr().err
    assert main(["report", "s", *places]) == 2
    assert "trials.json is damaged" in capsys.readouterr().err
    (tmp_path / "r").mkdir()
    (tmp_path / "r/latest.pt").touch()
    assert main(["report", "r", *places]) == 2
    assert "has not been validated yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"likelihood": "continuous-bernoulli"}, "likelihood"),
        ({"binarize": "dynamic"}, "binarize"),
        ({"holdout": "last"}, "holdout"),
        ({}, "data"),
    ],
)
def test_losses_by_different_yardsticks_are_not_compared(
    runs, places, small_data, tmp_path, capsys, settings, named
):
    data = small_data if settings else write_idx_folder(tmp_path / "data", num_train=120)
    config = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=1, **settings)
    where = RunOptions(
        run="odd", device="cpu", num_threads=1, data_dir=data, tensorboard=False,
        checkpoints_dir=tmp_path / "checkpoints", logs_dir=tmp_path / "logs",
    )  # fmt: skip
    fit(config, where, quiet=True)
    shutil.copytree(runs / "checkpoints/one", tmp_path / "checkpoints/one")
    folders = ["--checkpoints-dir", str(tmp_path / "checkpoints")]
    folders += ["--logs-dir", str(tmp_path / "logs")]
    picture, why = tmp_path / "odd.svg", f"The runs differ in {named}: their losses cannot be"
    assert main(["compare", "one", "odd", "--out", str(picture), *folders]) == 0
    said = capsys.readouterr().out
    assert "*" not in said
    assert said.endswith(f"{why} compared.\n")
    assert why in picture.read_text()  # Matplotlib writes each text as a comment, too
    assert main(["compare", "one", "odd", "--json", *folders]) == 0
    assert named in json.loads(capsys.readouterr().out)["incomparable"]
    assert main(["compare", "one", "other", "--json", *places]) == 0
    assert json.loads(capsys.readouterr().out)["incomparable"] == ""
    assert main(["compare", "one", "other", "--out", str(picture), *places]) == 0
    assert "cannot be" not in picture.read_text()


@pytest.mark.parametrize("size", [8, 12], ids=["of the same size", "of another size"])
def test_other_images_than_the_run_s_are_refused(runs, places, tmp_path, size, capsys):
    other = write_idx_folder(tmp_path / "data", num_train=600, num_test=90, size=size)
    ckpt = str(runs / "checkpoints/one/best.pt")
    for argv in (
        ["report", "one", "--out", str(tmp_path / "r.html"), *places],
        ["animate", "one", "--out", str(tmp_path / "w.gif"), *places],
        ["export", ckpt, "--format", "web", "--out", str(tmp_path / "page")],
        ["evaluate", ckpt],
    ):
        assert main([*argv, "--data-dir", str(other)]) == 2
        assert "--data-dir it was trained on" in capsys.readouterr().err
    argv = ["evaluate", ckpt, "--split", "test", "--parts", "likelihood"]
    if size == 12:
        assert main([*argv, "--data-dir", str(other)]) == 2
        assert "trained on images of shape (1, 8, 8), but the" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_rows_without_what_is_drawn_are_left_out(runs, places, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "copy")
    logs = tmp_path / "copy/logs/one"
    whole = {"step": 5, "split": "validation"} | dict.fromkeys(figures.LOSS_NAMES, 9.0)
    odd = [{**whole, "bound": value} for value in ("x", math.nan, None, [1])]
    odd += [{**whole, "split": 3}, {"step": 5}, {"step": 5, "images_per_second": "fast"}]
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(logs / name, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in odd)
    assert len(figures.logged_losses(logs)) == len(figures.logged_losses(runs / "logs/one"))
    places = ["--checkpoints-dir", str(tmp_path / "copy/checkpoints")]
    places += ["--logs-dir", str(tmp_path / "copy/logs")]
    out = tmp_path / "new/folder/c.png"  # which is made
    assert main(["compare", "one", "other", "--out", str(out), *places]) == 0
    with Image.open(out) as drawn:
        assert drawn.size[0] > 1000


def test_what_only_begins_with_a_name_is_named(runs, tmp_path, capsys):
    for name in ("job-search", "job-best"):
        (tmp_path / name).mkdir()
    assert main(["report", "job", "--checkpoints-dir", str(tmp_path)]) == 2
    assert (
        "job is not a run; the names job-best, job-search begin with it." in capsys.readouterr().err
    )


def test_a_setting_that_a_run_does_not_look_at_is_not_compared(runs, places, small_data, capsys):
    config = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=1,
                         objective="free-bits", free_bits=0.5)  # fmt: skip
    where = RunOptions(
        run="free", device="cpu", num_threads=1, data_dir=small_data,
        checkpoints_dir=runs / "checkpoints", logs_dir=runs / "logs",
    )  # fmt: skip
    fit(config, where, quiet=True)
    try:
        assert main(["compare", "one", "free", "--json", *places]) == 0
        differs = json.loads(capsys.readouterr().out)["differs"]
        assert differs["objective"] == ["elbo", "free-bits"]
        assert differs["free_bits"] == [None, 0.5]
    finally:
        shutil.rmtree(runs / "checkpoints/free")


def test_the_evaluation_of_a_study_is_one_of_its_run(runs, places, small_data, tmp_path):
    data, best = ["--data-dir", str(small_data)], runs / "checkpoints/other/best.pt"
    out = ["--out", str(tmp_path / "r.html")]
    assert main(["report", "other", *out, *places, *data]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"evaluation.json --data-dir {small_data}</span>" in page  # as it has to be given
    how = ["--json", str(runs / "logs/other/evaluation-validation.json"), "--parts", "likelihood"]
    assert main(["evaluate", str(best), *how, *data]) == 0
    assert main(["report", "other", *out, *places, *data]) == 0
    assert "validation split, 60 images; mean +- standard" in (tmp_path / "r.html").read_text()
    (runs / "logs/other/evaluation-validation.json").unlink()


def test_what_is_not_in_the_logs_is_said(runs, small_data, tmp_path, capsys):
    shutil.copytree(runs / "logs/one", tmp_path / "logs/one")
    places = ["--checkpoints-dir", str(runs / "checkpoints"), "--logs-dir", str(tmp_path / "logs")]
    out = tmp_path / "c.png"
    assert main(["compare", "one", "other", "--out", str(out), *places]) == 0
    assert (
        f"{tmp_path}/logs has no metrics.jsonl of other: plotted without" in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "logs/one")
    out.unlink()
    assert main(["compare", "one", "other", "--out", str(out), *places]) == 2
    assert "there are no curves to plot" in capsys.readouterr().err
    assert not out.exists()
    assert main(["report", "one", *places, "--data-dir", str(small_data)]) == 0
    page = (tmp_path / "logs/one/report.html").read_text()
    assert page.count("<img") == 3  # reconstructions, samples, traversals
    assert page.count(f"There are none in {tmp_path}/logs/one:") == 2


def test_what_cannot_be_read_is_one_sentence(runs, small_data, tmp_path, capsys):
    shutil.copytree(runs / "logs/one", tmp_path / "logs/one")
    places = ["--checkpoints-dir", str(runs / "checkpoints"), "--logs-dir", str(tmp_path / "logs")]
    commands = {
        "metrics.jsonl": ["report", "one", "--data-dir", str(small_data)],
        "timing.jsonl": ["compare", "one", "other"],
        "events.out.tfevents.1": ["animate", "one", "--kind", "training", "--out", "x.gif"],
    }
    for name, argv in commands.items():
        (tmp_path / "logs/one" / name).unlink(missing_ok=True)
        (tmp_path / "logs/one" / name).mkdir()  # like a file of another owner, for root, too
        assert main([*argv, *places]) == 2
        assert f"logs/one/{name} cannot be read: " in capsys.readouterr().err
        (tmp_path / "logs/one" / name).rmdir()


def test_pictures_of_a_long_training_are_thinned_out_evenly(tmp_path):
    with Tracker(tmp_path, start_step=0) as tracker:
        for step in range(1, 402):
            tracker.pictures(step, random_samples=torch.full((1, 1, 4, 4), 0.5))
    found = list(logged_samples(tmp_path, 101))
    assert found == list(range(1, 402, 4))
    assert list(logged_samples(tmp_path, 4)) == [1, 134, 268, 401]
    assert len(logged_samples(tmp_path, 1000)) == 401


def test_each_kind_of_animation_has_a_file_of_its_own(runs, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["animate", "one", "--kind", "training", *places]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["training.gif"]


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_samples_over_training_have_a_frame_per_validation(runs, places, ending, tmp_path):
    out = tmp_path / f"training.{ending}"
    assert main(["animate", "one", "--kind", "training", "--out", str(out), *places]) == 0
    with Image.open(out) as moving:
        assert moving.n_frames == 3
        assert moving.info.get("loop") == 0
        assert moving.size == (3 * (8 * 10 + 2), 3 * (8 * 10 + 2 + 6))
        if ending == "webp":  # the margins are white, as paper is; the format loses a little
            assert min(moving.convert("RGB").getpixel((3 * 10 + 1, 100))) >= 250
            assert moving.convert("L").getextrema()[0] < 128


def test_pictures_of_steps_that_were_taken_back_do_not_count(tmp_path):
    def grey(value):
        return torch.full((1, 1, 8, 8), value)

    with Tracker(tmp_path, start_step=0) as tracker:
        for step in (1, 2, 3):
            tracker.pictures(step, random_samples=grey(0.25))
    with Tracker(tmp_path, start_step=1) as tracker:
        tracker.pictures(2, random_samples=grey(0.75))
    tag = "images/random_samples"
    found = {step: pngs[tag] for step, pngs in logged_pictures(tmp_path, tag).items()}
    assert sorted(found) == [1, 2]
    for step, grey in ((1, 63), (2, 191)):
        with Image.open(io.BytesIO(found[step])) as picture:
            assert picture.convert("RGB").getpixel((5, 5))[0] == grey


def test_a_walk_starts_and_stops_at_the_images_and_comes_back(tmp_path):
    model = initialized_vae(3, 8, 1, seed=0).eval()
    mu_NZ = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 5
    posteriors = Posteriors(mu_NZ, mu_NZ)
    walk = Walk(num_stops=2, walkers=4, frames_per_leg=5)
    paths = [
        latent_walk(model, posteriors, tmp_path / f"{i}.gif", seed=i % 2, walk=walk)
        for i in (0, 2, 1)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    with Image.open(paths[0]) as moving:
        assert moving.n_frames == 10
    with pytest.raises(ConfigError, match="8 images, but there are 7"):
        latent_walk(model, Posteriors(mu_NZ[:7], mu_NZ[:7]), tmp_path / "x.gif", walk=walk)
