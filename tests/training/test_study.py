"""Studies: a grid trained and evaluated once, in one table and one picture."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import NAMES, command_line, write_idx_folder, written
from matplotlib.figure import Figure

from vae_hyperband import train_vae
from vae_hyperband.commands.study import StudyArgs, table
from vae_hyperband.common.config import CommonConfig, Places, TrainConfig
from vae_hyperband.common.process import cpu_threads, only_writer
from vae_hyperband.evaluation.evaluate import EvaluateOptions
from vae_hyperband.evaluation.results import (
    Estimate,
    Evaluation,
    Factors,
    ImportanceBound,
    LatentSpace,
    Likelihood,
)
from vae_hyperband.evaluation.samplers import SamplerConfig
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting import figures
from vae_hyperband.training import dry_run, study
from vae_hyperband.training.study import grouped, over_seeds, row_of, run_study, value_of

QUICK = EvaluateOptions(
    iwae_samples=2,
    samplers=("prior", "mixture"),
    sampler=SamplerConfig(components=1, flow_epochs=1, flow_width=8, flow_depth=1),
)


@pytest.fixture
def places(tmp_path, small_data):
    return Places(
        run="small",
        device="cpu",
        data_dir=small_data,
        checkpoints_dir=tmp_path / "checkpoints",
        logs_dir=tmp_path / "logs",
    )


def configs(seeds=(0, 1), betas=(0.5, 2.0)):
    return {
        f"b{beta:g}-s{seed}": TrainConfig(
            dataset="custom", latent_dim=3, batch_size=64, epochs=1, beta=beta, seed=seed
        )
        for beta in betas
        for seed in seeds
    }


def test_a_study_trains_judges_and_remembers(places, monkeypatch):
    rows = run_study(configs(), places, "validation", QUICK)
    assert [row["name"] for row in rows] == ["b0.5-s0", "b0.5-s1", "b2-s0", "b2-s1"]
    for row in rows:
        for measure in ("bound", "iwae", "linear_probe", "raw_linear_probe", "fid_prior",
                        "fid_mixture", "fid_reconstructions", "coverage_real"):  # fmt: skip
            assert row[measure]["standard_error"] >= 0
            assert math.isfinite(value_of(row, measure))
        assert 0 <= row["active_units"] <= 3
        assert "mig" not in row
        assert math.isnan(value_of(row, "mig"))
    content = json.loads((places.log_folder / "study.json").read_text())
    assert content == {"split": "validation", "rows": rows}
    head, *lines, about = table(rows).splitlines()
    assert "+-: half of the 95% interval over seeds" in about
    assert head.split()[:4] == ["latent", "beta", "n", "bound"]
    assert [line.split()[:3] for line in lines] == [["3", "0.5", "2"], ["3", "2", "2"]]
    assert lines[1].split()[3] == f"{over_seeds(rows[2:], 'bound')['mean']:.2f}"

    # nothing is trained or evaluated a second time
    from vae_hyperband.evaluation import evaluate
    from vae_hyperband.training import loop

    def never(*at, **named):
        raise AssertionError("a second time")

    monkeypatch.setattr(loop, "train_epoch", never)
    monkeypatch.setattr(evaluate, "evaluate", never)
    assert run_study(configs(), places, "validation", QUICK) == rows


def test_another_question_is_evaluated_again(places):
    [first] = run_study(configs((0,), (1.0,)), places, "validation", QUICK)
    [test] = run_study(configs((0,), (1.0,)), places, "test", QUICK)
    assert first["bound"] != test["bound"]
    more = EvaluateOptions(parts=("likelihood",), iwae_samples=4)
    [third] = run_study(configs((0,), (1.0,)), places, "validation", more)
    assert third["bound"] == first["bound"]
    assert third["iwae"] != first["iwae"]


def test_other_data_are_evaluated_again(places, tmp_path):
    [first] = run_study(configs((0,), (1.0,)), places, "test", QUICK)
    folder = write_idx_folder(tmp_path / "other", num_test=59)
    for name in NAMES[:2]:  # the same training images, another test split
        shutil.copy2(places.data_dir / name, folder / name)
    there = dataclasses.replace(places, data_dir=folder)
    [other] = run_study(configs((0,), (1.0,)), there, "test", QUICK)
    assert other["bound"] != first["bound"]


@pytest.mark.faults
def test_a_stopped_study_goes_on(places):
    asked = iter([False] * 7 + [True] * 1000)
    assert run_study(configs(), places, "validation", QUICK, lambda: next(asked)) is None
    rows = run_study(configs(), places, "validation", QUICK)
    fresh = run_study(
        configs(),
        Places(
            run="fresh", device="cpu", data_dir=places.data_dir,
            checkpoints_dir=places.checkpoints_dir, logs_dir=places.logs_dir,
        ),
        "validation",
        QUICK,
    )  # fmt: skip
    assert rows == fresh


def fake_row(beta, seed, bound, **more):
    config = TrainConfig(beta=beta, seed=seed).to_dict()
    return {"name": "x", "config": config, "bound": {"mean": bound, "standard_error": 1.0}, **more}


def test_means_over_seeds_have_student_s_interval():
    rows = [fake_row(1.0, seed, bound) for seed, bound in enumerate([240.0, 241.0, 245.0])]
    [group] = grouped(rows)
    found = over_seeds(group, "bound")
    assert found["mean"] == 242
    spread = statistics.stdev([240, 241, 245])
    assert found["half_interval"] == pytest.approx(4.3027 * spread / math.sqrt(3), rel=1e-4)
    assert found["n"] == 3
    assert math.isnan(over_seeds(rows[:1], "bound")["half_interval"])
    assert len(grouped([*rows, fake_row(2.0, 0, 250.0)])) == 2


def test_a_row_takes_what_the_report_has():
    dci = {"disentanglement": 0.4}
    bound = Estimate(1.0, 0.1)
    report = Evaluation(
        checkpoint="best.pt", checkpoint_digest="", split="validation", options={}, num_images=9,
        data_digest="", epoch=1, step=1, config={"beta": 1.0}, environment={},
        likelihood=Likelihood(
            "nats", "", bound, bound, bound, iwae=ImportanceBound(0.9, 0.1, 5, 9, bound)
        ),
        latents=LatentSpace("", 8, 7, False, [], bound, factors=Factors([], 0.2, 0.3, dci)),
    )  # fmt: skip
    row = row_of("r", report)
    assert row["iwae"] == {"mean": 0.9, "standard_error": 0.1}
    assert (row["active_units"], row["mig"], row["dci"]) == (7, 0.2, 0.4)
    assert "fid_prior" not in row
    assert value_of(row, "mig") == 0.2


def test_the_command_trains_the_grid_on_drawn_garments(tmp_path, monkeypatch, capsys):
    """The whole way, with the measures that need factors."""
    monkeypatch.chdir(tmp_path)
    arguments = ["study", "--run", "d", "--dataset", "drawn", "--betas", "1", "4", "--epochs", "1"]
    arguments += ["--latent-dims", "4", "--parts", "likelihood", "latents", "--iwae-samples", "0"]
    assert train_vae.main([*arguments, "--device", "cpu"]) == 0
    said, progress = capsys.readouterr()
    assert "run 2 of 2: z4-b4-s0" in progress
    assert "MIG" in said
    rows = json.loads((tmp_path / "logs/d/study.json").read_text())["rows"]
    assert [row["config"]["beta"] for row in rows] == [1, 4]
    assert all(0 <= row["mig"] <= 1 for row in rows)
    picture = tmp_path / "logs/d/rate_distortion.png"
    assert picture.stat().st_size > 20_000
    assert str(picture.relative_to(tmp_path)) in said


def test_runs_side_by_side_give_what_one_after_the_other_gives(
    tmp_path, small_data, monkeypatch, capsys
):
    argv = ["study", "--dataset", "custom", "--data-dir", str(small_data), "--device", "cpu"]
    argv += ["--betas", "4", "0.5", "1", "--latent-dims", "2", "--epochs", "1"]
    argv += ["--parts", "likelihood", "--iwae-samples", "0"]
    studies = []
    for jobs in ("1", "2"):
        (tmp_path / jobs).mkdir()
        monkeypatch.chdir(tmp_path / jobs)
        with cpu_threads(1):
            assert train_vae.main([*argv, "--jobs", jobs]) == 0
        table, progress = capsys.readouterr()
        weights = [
            load_ckpt(f"checkpoints/study-z2-b{beta}-s0/latest.pt").weights_digest
            for beta in ("4", "0.5", "1")
        ]
        studies.append((table, Path("logs/study/study.json").read_text(), weights))
    assert "trained: z2-b4-s0\ntrained: z2-b0.5-s0\ntrained: z2-b1-s0\nrun 1 of 3" in progress
    assert studies[0] == studies[1]
    assert train_vae.main([*argv, "--jobs", "2", "--run", "b", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "runs         3, 2 side by side, evaluated on the validation split\n" in said
    assert "cpu, 1 CPU thread each\n" in said
    assert not Path("logs/b").exists()


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_a_study_stops_its_runs(tmp_path, small_data, how):
    """Sent to the parent alone, as a batch system does; of SIGKILL the runs learn nothing."""
    argv = ["study", "--dataset", "custom", "--data-dir", small_data, "--betas", "1", "2"]
    command = command_line(*argv, "--epochs", "100000", "--device", "cpu", "--jobs", "2")
    folders = [tmp_path / f"checkpoints/study-z32-b{beta}-s0" for beta in ("1", "2")]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not all((folder / "latest.pt").exists() for folder in folders):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(how)
        said = process.stdout.read()  # until the last process that writes to it has ended
    if how == signal.SIGTERM:
        assert process.returncode == 75
        assert "stopped and saved; resume with: " in said
    for folder in folders:
        with only_writer(folder):
            assert load_ckpt(folder / "latest.pt").step > 0


def test_a_run_that_fails_stops_the_others(tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/study-z32-b2-s0").write_text("in the way")
    argv = ["study", "--dataset", "custom", "--data-dir", str(small_data), "--betas", "1", "2"]
    assert train_vae.main([*argv, "--epochs", "100000", "--device", "cpu", "--jobs", "2"]) == 2
    assert "checkpoints/study-z32-b2-s0 cannot be created" in capsys.readouterr().err


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["study", "--run", "s", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--betas", "1", "4", "--latent-dims", "2", "3", "--epochs", "2", "--device", "cpu"]
    assert train_vae.main([*argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    shared = json.loads(said[: said.index("}") + 1])
    assert shared["epochs"] == 2
    assert not {"beta", "latent_dim", "capacity"} & set(shared)  # differ, or have no effect
    assert "runs         4, one after the other, evaluated on the validation split\n" in said
    for run in ("s-z2-b1-s0", "s-z2-b4-s0", "s-z3-b1-s0", "s-z3-b4-s0"):
        assert f"  {run:24} 0 of 6 steps done\n" in said
    assert re.search(r"training     about \d+ s; validation", said)
    assert said.endswith("Nothing was written.\n")
    assert list(tmp_path.iterdir()) == []
    where = ["--dataset", "custom", "--data-dir", str(small_data), "--device", "cpu"]
    trained = ["train", "--run", "s-z2-b4-s0", "--latent-dim", "2", "--beta", "4", "--epochs", "2"]
    assert train_vae.main([*trained, *where]) == 0
    before = written(tmp_path)
    capsys.readouterr()
    assert train_vae.main([*argv, "--dry-run"]) == 0
    assert f"  {'s-z2-b4-s0':24} 6 of 6 steps done\n" in capsys.readouterr().out
    argv[argv.index("--epochs") + 1] = "1"  # fewer than it has had
    assert train_vae.main([*argv, "--dry-run"]) == 2
    assert "s-z2-b4-s0/latest.pt was trained for 2.00 epochs" in capsys.readouterr().err
    assert written(tmp_path) == before


def test_a_study_of_a_split_too_small_for_what_was_asked_plots_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = write_idx_folder(tmp_path / "data", num_test=1)
    argv = ["study", "--dataset", "custom", "--data-dir", str(folder), "--device", "cpu"]
    argv += ["--betas", "1", "--epochs", "1", "--split", "test", "--parts", "images"]
    assert train_vae.main(argv) == 0
    assert "the test split is too small for --parts images\n" in capsys.readouterr().out
    assert not list((tmp_path / "logs/study").glob("*.png"))


@pytest.mark.parametrize("command", ["train", "study"])
def test_a_dry_run_measures_with_the_threads_of_the_run(
    command, tmp_path, small_data, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vae_hyperband.common.process.cpu_quotas", lambda: [1.5])
    measured = []
    for module in (dry_run, study):
        monkeypatch.setattr(
            module, "seconds_per_step", lambda *_: measured.append(torch.get_num_threads()) or 1.0
        )
    argv = [command, "--dry-run", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--device", "cpu"]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert train_vae.main(argv) == 0
    finally:
        torch.set_num_threads(before)
    assert set(measured) == {2}
    assert "cpu, 2 CPU threads\n" in capsys.readouterr().out


def test_the_picture_shows_whatever_was_measured(tmp_path):
    measures = {
        name: {"mean": 0.5, "standard_error": 0.1}
        for name in ("recon_loss", "KL_divergence", "linear_probe", "knn_probe", "raw_linear_probe",
                     "raw_knn_probe", "fid_prior", "fid_mixture", "fid_reconstructions")
    }  # fmt: skip
    rows = [
        fake_row(beta, seed, 240.0, active_units=9, **measures)
        for beta in (0.1, 1.0, 8.0)
        for seed in (0, 1)
    ]
    assert figures.rate_distortion(rows, tmp_path / "p.png").stat().st_size > 20_000


def drawn(rows, monkeypatch):
    """The axes of the picture of a study that can be seen."""
    kept = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: kept.append(figure))
    figures.rate_distortion(rows, None)
    return [axes for axes in kept[0].axes if axes.get_visible()]


def test_the_picture_has_no_panel_of_what_was_not_measured(monkeypatch):
    rows = [fake_row(beta, 0, 240.0, active_units=9) for beta in (0.5, 2.0)]
    assert [axes.get_title(loc="left") for axes in drawn(rows, monkeypatch)] == ["active units"]
    nats = {"recon_loss": {"mean": 200.0}, "KL_divergence": {"mean": 20.0}}
    both = [row | nats for row in rows]
    assert [axes.get_title(loc="left") for axes in drawn(both, monkeypatch)] == [
        "rate and distortion, labelled with beta", "active units",
    ]  # fmt: skip


@pytest.mark.parametrize("betas", [(0.0,), (0.0, 0.5, 2.0), (0.5, 2.0)], ids=str)
def test_every_beta_has_its_place_in_the_picture(betas, monkeypatch):
    rows = [fake_row(beta, 0, 240.0, active_units=9 + beta) for beta in betas]
    [axes] = drawn(rows, monkeypatch)
    line = axes.containers[0].lines[0]
    assert line.get_xdata().tolist() == list(betas)
    points = axes.transData.transform(line.get_xydata())[:, 0]
    left, right = axes.bbox.x0, axes.bbox.x1
    assert all(left <= point <= right for point in points)
    assert all(b - a > (right - left) / 10 for a, b in itertools.pairwise(points))
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{b:g}" for b in betas]


def test_the_picture_has_a_line_for_each_latent_size():
    rows = [
        {**fake_row(beta, 0, 240.0), "config": TrainConfig(beta=beta, latent_dim=size).to_dict(),
         "KL_divergence": {"mean": size + beta}, "recon_loss": {"mean": 200.0 - beta}}
        for beta in (0.5, 1.0, 2.0)
        for size in (32, 16)
    ]  # fmt: skip
    lines = figures.families_of(rows)
    assert [[group[0]["config"]["beta"] for group in groups] for _, groups in lines] == [
        [0.5, 1.0, 2.0]
    ] * 2
    axes = Figure().subplots()
    figures.plane(axes, lines)
    assert [line.get_xdata().tolist() for line in axes.lines] == [
        [16.5, 17.0, 18.0], [32.5, 33.0, 34.0],
    ]  # fmt: skip
    assert [text.get_text() for text in axes.get_legend().texts] == ["latent 16", "latent 32"]


def test_the_grid_is_every_combination():
    args = StudyArgs(
        betas=(0.5, 1), latent_dims=(16, 32), seeds=(0, 1, 2), epochs=3,
        shared=CommonConfig(prior="vamp", dataset="drawn"),
    )  # fmt: skip
    found = args.configs()
    assert len(found) == 12
    assert found["z16-b0.5-s2"] == TrainConfig(
        latent_dim=16, beta=0.5, seed=2, epochs=3, prior="vamp", dataset="drawn"
    )
