"""Real Fashion-MNIST; the whole job; and the beta comparison with a real TensorBoard."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from vae_hyperband import beta_vae_tsb
from vae_hyperband.commands.run import MainJob
from vae_hyperband.common.config import TrainConfig
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.bounds import eval_dataloader, eval_epoch
from vae_hyperband.model.checkpoint import load_ckpt, load_model
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import SearchResult, TrialRecord, read_result, write_result
from vae_hyperband.training.loop import fit


def test_real_data_are_trained_on_stopped_and_gone_on_with(fashion_mnist, options):
    """An epoch and more is for the faults; 120 steps are a third of one."""
    for num_steps in (100, 20):
        asked = iter([False] * (num_steps - 1) + [True] * 9)
        where = options(data_dir=None)
        stopped = fit(TrainConfig(), where, should_stop=asked.__next__, quiet=True)
    train, validation = load_split("train"), load_split("validation")
    content = load_ckpt(stopped.latest)
    assert content.step == 120
    assert content.data.digest == train.digest
    held_out = dataclasses.replace(
        validation, images_NCHW=validation.images_NCHW[:500], labels_N=validation.labels_N[:500]
    )
    bound = eval_epoch(load_model(stopped.latest), eval_dataloader(held_out))["bound"]
    assert 280 < bound < 315  # measured 296; the mean image has 385


def test_the_main_job_trains_and_evaluates_the_winner_of_its_search(fork, small_data, tmp_path):
    """The search has been made; it starts Ray and is tested with that."""
    job = MainJob(
        run="p", dataset="custom", data_dir=small_data, num_trials=2, max_epochs=1,
        scheduler="none",
    )  # fmt: skip
    config, _ = job.search()
    folder = tmp_path / "checkpoints/p-search"
    folder.mkdir(parents=True)
    settings = {**config.to_dict(), "id": "0", "storage": None}
    (folder / "search.json").write_text(json.dumps(settings))
    row = {"epoch": 1, "step": 9, "KL_divergence": 9.0, "recon_loss": 80.0}
    trials = [
        TrialRecord(
            number,
            Hyperparameters(latent_dim=16, learning_rate=1e-3, batch_size=64, beta=1.0),
            [row | {"bound": 90.0 - number, "total_loss": 90.0 - number}],
            "finished",
        )
        for number in (0, 1)
    ]
    write_result(SearchResult(config, trials, folder))
    arguments = ["run", "--run", "p", "--dataset", "custom", "--data-dir", small_data]
    arguments += ["--num-trials", 2, "--max-epochs", 1, "--scheduler", "none"]
    arguments += ["--epochs", 1, "--device", "cpu", "--parts", "likelihood"]
    done = fork(*arguments)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
    best = load_ckpt(tmp_path / "checkpoints/p-best/best.pt")
    assert best.config.latent_dim == 16
    report = json.loads((tmp_path / "logs/p-best/evaluation.json").read_text())
    assert report["split"] == "test"
    assert f"{report['bound']['mean']:.2f} +- " in done.stdout
    assert_it_shows_all_it_has(done.stdout, "p", tmp_path, 4000)
    again = fork(*arguments)
    assert again.returncode == 0
    assert "epoch 1/1" not in again.stdout  # nothing is trained a second time
    assert again.stdout.splitlines()[-9:] == done.stdout.splitlines()[-9:]


def assert_it_shows_all_it_has(said, run, folder, num_bytes):
    for text in ("best configuration", "validation bound", "test bound", "TensorBoard logs"):
        assert text in said
    for picture in (f"{run}-search/best_config", f"{run}-best/curves", f"{run}-best/samples",
                    f"{run}-best/reconstructions", f"{run}-best/traversal"):  # fmt: skip
        assert (folder / f"logs/{picture}.png").stat().st_size > num_bytes
        assert f"logs/{picture}.png" in said
    for name, title in (("search", "Search"), ("best", "Run")):
        report = (folder / f"logs/{run}-{name}/report.html").read_text()
        assert f"<h1>{title} {run}-{name}</h1>" in report
        assert f"logs/{run}-{name}/report.html" in said


@pytest.mark.faults
def test_the_main_job_on_real_data_goes_from_pixels_to_figures(fashion_mnist, command, tmp_path):
    arguments = ["run", "--num-trials", 2, "--max-epochs", 1, "--scheduler", "none"]
    arguments += ["--epochs", 1, "--device", "cpu", "--parts", "likelihood"]
    done = command(*arguments, timeout=550)
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "checkpoints/fashion-search")
    assert len(result.trials) == 2
    best = load_ckpt(tmp_path / "checkpoints/fashion-best/best.pt")
    report = json.loads((tmp_path / "logs/fashion-best/evaluation.json").read_text())
    assert report["split"] == "test"
    assert report["num_images"] == 10_000
    assert report["entropy_floor"] == pytest.approx(189.86, abs=0.01)
    # 1 epoch of the default recipe: measured 258.2 on validation
    assert 245 < best.metrics["bound"] < 270
    assert abs(report["bound"]["mean"] - best.metrics["bound"]) < 3
    assert f"{report['bound']['mean']:.2f} +- " in done.stdout
    assert_it_shows_all_it_has(done.stdout, "fashion", tmp_path, 20_000)
    again = command(*arguments, timeout=200)
    assert again.returncode == 0
    assert "epoch 1/1" not in again.stdout  # nothing is trained a second time
    assert again.stdout.splitlines()[-9:] == done.stdout.splitlines()[-9:]


@pytest.mark.faults
def test_the_main_job_goes_without_the_bound_and_starts_over_if_told_to(
    command, small_data, tmp_path
):
    arguments = ["run", "--run", "p", "--dataset", "custom", "--data-dir", small_data]
    arguments += ["--device", "cpu", "--num-trials", 1, "--max-epochs", 1, "--scheduler", "none"]
    done = command(*arguments, "--epochs", 1, "--parts", "latents")
    assert done.returncode == 0, done.stderr
    assert "linear probe" in done.stdout
    assert "validation bound" in done.stdout
    assert "test bound" not in done.stdout
    again = command(*arguments, "--epochs", 1, "--parts", "latents", "--seed", 1, "--fresh")
    assert again.returncode == 0, again.stderr
    for name, seed in (("p-search", 1), ("p-search-before-1", 0)):
        settings = json.loads((tmp_path / f"checkpoints/{name}/search.json").read_text())
        assert settings["seed"] == seed
    for name, seed in (("p-best", 1), ("p-best-before-1", 0)):
        assert load_ckpt(tmp_path / f"checkpoints/{name}/best.pt").config.seed == seed


def test_betas_are_trained_side_by_side_and_shown_on_loopback(tmp_path, small_data, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vae_hyperband.beta_vae_tsb", "--betas", "0.5", "4"]
    command += ["--epochs", "2", "--dataset", "custom", "--data-dir", small_data, "--device", "cpu"]
    command += ["--latent-dim", "4", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        try:
            assert f"http://127.0.0.1:{port}/" in said
            url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
            tags: dict[str, list[str]] = {}
            while len(tags) < 2:
                assert process.poll() is None
                time.sleep(0.2)
                with contextlib.suppress(OSError):  # it has not started yet
                    tags = json.load(urllib.request.urlopen(url, timeout=30))
            assert set(tags) == {"betas-beta-0.5", "betas-beta-4"}
            for run in tags.values():
                assert {"recon_loss/validation", "KL_divergence/train"} <= set(run)
        finally:
            process.terminate()
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0.5", "4"]
    assert process.returncode == 0
    with socket.create_server(("127.0.0.1", port)):
        pass  # TensorBoard went with its parent
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command[-1] = str(taken.getsockname()[1])
        assert beta_vae_tsb.main([str(word) for word in command[3:]]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_signal_to_the_beta_comparison_reaches_every_training(tmp_path, small_data):
    """As a batch system sends it: to one process, not to a terminal's."""
    command = [sys.executable, "-m", "vae_hyperband.beta_vae_tsb", "--betas", "0.5", "4"]
    command += ["--epochs", "4000", "--dataset", "custom", "--data-dir", small_data, "--no-serve"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        files = [tmp_path / f"checkpoints/betas-beta-{beta}/latest.pt" for beta in ("0.5", "4")]
        while not all(path.exists() for path in files) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 75
        assert "the same command continues" in process.stdout.read()
    for path in files:
        assert load_ckpt(path).step > 0


def test_a_mistake_in_the_beta_comparison_is_one_sentence(tmp_path, capsys):
    assert beta_vae_tsb.main(["--data-dir", str(tmp_path), "--no-serve"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("beta_vae_tsb: No file train-images-idx3-ubyte")
    assert len(said.splitlines()) == 1
