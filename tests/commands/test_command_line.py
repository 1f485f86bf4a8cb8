"""The command line as its users meet it: what it can, and one sentence for each mistake."""

import dataclasses
import errno
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, command_line, write_idx_folder, written
from PIL import Image

import vae_hyperband
from vae_hyperband import train_vae
from vae_hyperband.commands.options import option_value
from vae_hyperband.commands.run import MainJob
from vae_hyperband.commands.sample import label_number
from vae_hyperband.common.checks import check_run_name
from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError, DeviceError, VAEHyperbandError
from vae_hyperband.common.process import pick_device
from vae_hyperband.data.fashion_mnist import FASHION_MNIST_CLASSES
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.evaluation.samplers import sampler_file
from vae_hyperband.model.checkpoint import load_ckpt, save_ckpt
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.decisions import Journal

LIKELIHOOD = EvaluateOptions(parts=("likelihood",))
BASE = ["--dataset", "custom", "--device", "cpu", "--num-threads", "1"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae_hyperband", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("vae_hyperband", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"{vae_hyperband.__version__}\n")


def test_train_takes_hyphens_and_underscores_alike(small_data, capsys):
    arguments = ["train", *BASE, "--data_dir", str(small_data), "--run", "x", "--epochs", "2"]
    arguments += ["--latent_dim", "3", "--batch-size", "50", "--val_interval", "2", "--seed", "5"]
    arguments += ["--learning-rate", "0.001", "--beta", "2"]
    assert train_vae.main(arguments) == 0
    config = load_ckpt("checkpoints/x/latest.pt").config
    assert (config.latent_dim, config.batch_size, config.beta) == (3, 50, 2)
    assert (config.val_interval, config.seed, config.learning_rate) == (2, 5, 0.001)
    said = capsys.readouterr().out
    assert "epoch 2/2: bound" in said
    assert "best after epoch" in said
    for name in ("curves", "reconstructions", "samples", "traversal"):
        assert (os.stat(f"logs/x/{name}.png")).st_size > 5000


def test_evaluate_prints_and_writes_what_python_returns(trained, small_data, capsys, tmp_path):
    arguments = ["evaluate", str(trained.best), "--split", "test", "--json", "e.json"]
    assert train_vae.main([*arguments, "--data-dir", str(small_data), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["split"] == "test"
    assert report["num_images"] == 60
    assert f"{report['bound']['mean']:.2f} +- " in capsys.readouterr().out
    again = evaluate(trained.best, "test", small_data, "cpu").to_dict()
    assert again == report
    assert again["bound"] == report["bound"]
    total = report["recon_loss"]["mean"] + report["KL_divergence"]["mean"]
    assert report["bound"]["mean"] == pytest.approx(total, rel=1e-12)
    above = report["bound"]["mean"] - report["entropy_floor"]
    assert report["nats_above_floor"] == pytest.approx(above)


def test_an_evaluation_is_printed_as_json_alone(trained, small_data, capsys, tmp_path):
    arguments = ["evaluate", str(trained.best), "--json", "-", "--parts", "likelihood"]
    assert train_vae.main([*arguments, "--data-dir", str(small_data), "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    again = evaluate(trained.best, "validation", small_data, "cpu", LIKELIHOOD)
    assert report == again.to_dict()
    assert not (tmp_path / "-").exists()


def test_evaluating_on_validation_repeats_the_training_s_own_number(trained, small_data):
    report = evaluate(trained.best, "validation", small_data, "cpu", LIKELIHOOD)
    assert report["bound"]["mean"] == pytest.approx(trained.state.best["bound"], rel=1e-6)


def test_the_standard_error_is_that_of_a_mean_over_images(trained, small_data):
    from vae_hyperband.evaluation.bounds import eval_dataloader, split_nats
    from vae_hyperband.model.checkpoint import load_model

    held_out = load_split("test", small_data, "custom")
    nats = split_nats(load_model(trained.best), eval_dataloader(held_out), seed=3)
    bound = nats.recon_B + nats.kl_B
    report = evaluate(trained.best, "test", small_data, "cpu", LIKELIHOOD)
    expected = (bound.var() / 60).sqrt().item()
    assert report["bound"]["standard_error"] == pytest.approx(expected, rel=1e-9)


def test_sample_writes_the_same_picture_for_the_same_seed(trained, tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        arguments = ["sample", str(trained.best), "--num-samples", "9", "--seed", str(seed)]
        assert train_vae.main([*arguments, "--out", name, "--device", "cpu"]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c


def test_sample_asks_a_fitted_sampler_for_one_label_and_writes_bytes(trained, small_data, tmp_path):
    arguments = ["sample", str(trained.best), "--data-dir", str(small_data), "--device", "cpu"]
    arguments += ["--num-samples", "7", "--components", "2", "--flow-epochs", "1"]
    for sampler in ("mixture", "flow"):
        found = []
        for label in ("3", "4"):
            out = f"{sampler}{label}.npy"
            more = ["--sampler", sampler, "--label", label, "--out", out]
            assert train_vae.main([*arguments, *more]) == 0
            found.append(np.load(tmp_path / out, allow_pickle=False))
        assert found[0].shape == (7, 1, 8, 8)
        assert found[0].dtype == np.uint8
        assert not np.array_equal(*found)
        assert sampler_file(trained.best, sampler).is_file()
    picture = [*arguments, "--sampler", "mixture", "--label", "3", "--out", "three.png"]
    assert train_vae.main(picture) == 0
    assert (tmp_path / "three.png").stat().st_size > 1000


def test_sample_writes_a_folder_of_pictures_and_no_grid_that_nobody_can_look_at(
    trained, tmp_path, capsys
):
    arguments = ["sample", str(trained.best), "--device", "cpu", "--num-samples"]
    assert train_vae.main([*arguments, "12", "--out", "many"]) == 0
    assert train_vae.main([*arguments, "12", "--out", "many.npy"]) == 0
    pictures = sorted((tmp_path / "many").iterdir())
    assert [path.name for path in pictures] == [f"{i:02}.png" for i in range(12)]
    expected = np.load(tmp_path / "many.npy", allow_pickle=False)[:, 0]
    assert np.array_equal([np.asarray(Image.open(path)) for path in pictures], expected)
    assert train_vae.main([*arguments, "12", "--out", "many"]) == 2
    assert "many exists: give the name of a new folder" in capsys.readouterr().err
    assert train_vae.main([*arguments, "100000", "--out", "grid.png"]) == 2
    assert "give --out an .npy file or a folder" in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "trouble",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("encoder error"), KeyboardInterrupt],
)
def test_a_folder_of_pictures_is_whole_or_not_there(
    trained, tmp_path, monkeypatch, capsys, trouble
):
    saved = []

    def save(picture, path):
        assert not (tmp_path / "many").exists()  # whatever a kill leaves has another name
        if len(saved) == 5:
            raise trouble
        saved.append(path)

    monkeypatch.setattr(Image.Image, "save", save)
    before = sorted(tmp_path.iterdir())
    argv = ["sample", str(trained.best), "--device", "cpu", "--num-samples", "12", "--out", "many"]
    assert train_vae.main(argv) == (130 if trouble is KeyboardInterrupt else 2)
    said = capsys.readouterr().err
    assert len(saved) == 5
    assert len(said.splitlines()) == 1
    if trouble is not KeyboardInterrupt:
        assert f"many cannot be written: {trouble.strerror or trouble}." in said
    assert sorted(tmp_path.iterdir()) == before


def test_what_sample_may_write_is_said_before_any_image_is_made(trained, tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for out, message in (
        ("run-0.5", "run-0.5, but must end in .png or .npy, or be a new folder"),
        ("a.jpg", "a.jpg, but must end in .png or .npy, or be a new folder"),
        ("link", "link exists: give the name of a new folder"),
        ("file/many", "file cannot be created"),
    ):
        argv = ["sample", str(trained.best), "--device", "none", "--out", out]
        assert train_vae.main(argv) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("missing", ["images", "labels", "size"])
def test_what_the_whole_job_needs_at_its_end_is_checked_at_its_start(tmp_path, capsys, missing):
    folder = write_idx_folder(tmp_path / "data")
    if missing == "size":
        other = write_idx_folder(tmp_path / "other", size=12)
        (other / "t10k-images-idx3-ubyte").replace(folder / "t10k-images-idx3-ubyte")
    else:
        next(folder.glob(f"t10k-{missing}-*")).unlink()
    job = ["run", "--dataset", "custom", "--data-dir", str(folder), "--device", "cpu"]
    said = "do not go with" if missing == "size" else f"No file t10k-{missing}-idx"
    for arguments in (job, [*job, "--dry-run"]):
        assert train_vae.main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_the_whole_job_s_space_fits_itself_to_few_images(tmp_path, capsys):
    for num_train, sizes in ((240, "64, 128"), (48, "10")):
        folder = write_idx_folder(tmp_path / str(num_train), num_train=num_train)
        job = ["run", "--dataset", "custom", "--data-dir", str(folder), "--device", "cpu"]
        assert train_vae.main([*job, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert f"batch sizes for {num_train * 5 // 6} images: {sizes}\n" in said


def test_a_job_whose_data_grew_is_told_so_by_what_it_has_options_for(tmp_path, capsys):
    """Its search began with batch sizes for fewer images, and there is no --batch-sizes."""
    data = write_idx_folder(tmp_path / "data", num_train=240)
    job = ["run", "--dataset", "custom", "--data-dir", str(data), "--device", "cpu", "--run", "j"]
    folder = tmp_path / "checkpoints/j-search"
    folder.mkdir(parents=True)
    config = dataclasses.replace(MainJob(dataset="custom", device="cpu").search()[0],
                                 batch_sizes=(64, 128))  # fmt: skip
    settings = config.to_dict() | {"id": "0", "storage": None}
    (folder / "search.json").write_text(json.dumps(settings))
    train, held_out = (load_split(name, data, "custom") for name in ("train", "validation"))
    digests = {"training": train.digest, "validation": held_out.digest}
    start = {"event": "start", "host": "h", "process": 1, "ray": "2", "python": "3"}
    with Journal(folder / "decisions.jsonl") as journal:
        journal.append(start | {"data": digests})
    assert train_vae.main([*job, "--dry-run"]) == 0
    assert "state        begun" in capsys.readouterr().out
    for num_train in (1000, 60):
        write_idx_folder(data, num_train=num_train)
        for argv in (job, [*job, "--dry-run"]):
            assert train_vae.main(argv) == 2
            said = capsys.readouterr().err
            assert "j-search was begun with other data" in said
            assert said.endswith(
                "give the same --data-dir to resume it, --fresh to start over, or choose another "
                "--run.\n"
            )
        assert train_vae.main([*job, "--fresh", "--dry-run"]) == 0
        assert "the existing folder would be moved aside" in capsys.readouterr().out
    assert train_vae.main([*job, "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "other settings (seed: 0 -> 1): give the same ones to resume it, --fresh" in said
    line = (folder / "decisions.jsonl").read_text()
    (folder / "decisions.jsonl").write_text("x" + line + line)
    assert train_vae.main(job) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "so the search cannot go on from it: start over with --fresh, or choose another --run.\n"
    )


@pytest.mark.parametrize(("wrapped", "holdout"), [(False, "content"), (True, "last")])
def test_only_a_file_that_the_program_wrote_has_the_holdout_of_0_1(
    wrapped, holdout, tmp_path, small_data, capsys
):
    settings = {"dataset": "custom", "latent_dim": 4, "batch_size": 32, "epochs": 1}
    (tmp_path / "c.json").write_text(json.dumps({"config": settings} if wrapped else settings))
    argv = ["train", "--config", str(tmp_path / "c.json"), "--data-dir", str(small_data)]
    assert train_vae.main([*argv, "--device", "cpu", "--dry-run"]) == 0
    assert re.search(rf"holdout\W+{holdout}\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("asked", "number"),
    [("sneaker", 7), ("Ankle boot", 9), ("ankle-boot", 9), ("t-shirt", 0), ("top", 0), ("5", 5),
     ("shirt", 6), ("", None)],
)  # fmt: skip
def test_a_label_is_known_by_its_name_or_number(asked, number):
    assert label_number(asked, FASHION_MNIST_CLASSES) == number


@pytest.mark.parametrize("asked", ["s", "boots", "hat", "10"])
def test_a_label_that_is_none_or_several_is_refused(asked):
    with pytest.raises(ConfigError, match="must be one of T-shirt/top, Trouser"):
        label_number(asked, FASHION_MNIST_CLASSES)


def test_labels_without_names_are_numbers():
    assert label_number("10", ()) == 10
    with pytest.raises(ConfigError, match="must be a number"):
        label_number("hat", ())


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--seed", "1", "--resume_ckpt", "a.pt"], "a.pt"),
        (["--resume-ckpt=a=b.pt", "--seed", "1"], "a=b.pt"),
        (["--resume_ckpt", "a.pt", "--resume-ckpt", "b.pt"], "b.pt"),
        (["--resume_ckpt", ""], ""),
        (["--resume_ckpt"], None),
        (["--resume_ckpt", "--seed", "1"], None),
        (["--resume", "a.pt"], None),
        ([], None),
    ],
)
def test_the_configuration_is_found_before_the_other_options_are_read(argv, value):
    assert option_value(argv, "--resume-ckpt") == value


def test_data_says_what_it_found(small_data, capsys):
    assert train_vae.main(["data", "--dataset", "custom", "--data-dir", str(small_data)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [
        ["train", "300"],
        ["validation", "60"],
        ["test", "60"],
    ]


@pytest.mark.parametrize("command", ["", *train_vae.COMMANDS])
def test_help_teaches(command, capsys):
    if command:
        with pytest.raises(SystemExit, match="0"):
            train_vae.main([command, "--help"])
    else:
        assert train_vae.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: vae-hyperband" in said
    for name in train_vae.COMMANDS:
        assert name in said or command
    if command == "train":
        assert "vae-hyperband train --run mine" in said
        assert "--resume-ckpt" in said


def test_the_promised_names_are_re_exported():
    for name in ("get_dataloader", "train_epoch", "eval_epoch", "save_ckpt"):
        assert callable(getattr(train_vae, name))


def foreign_ckpt(tmp_path):
    torch.save({"a": 1}, tmp_path / "foreign.pt")
    return tmp_path / "foreign.pt"


MISTAKES = {
    "no command": ("", "usage"),
    "unknown command": ("trian", "is not a command: use one of run, search, train"),
    "unknown option": ("train --latent_dum 3", "perhaps you meant --latent-dim"),
    "option without value": ("train --epochs", "--epochs"),
    "not a number": ("train --epochs many", "many"),
    "latent dim 0": ("train --latent-dim 0", "--latent-dim is 0"),
    "negative learning rate": ("train --learning-rate -1", "--learning-rate is -1.0"),
    "infinite learning rate": ("train --learning-rate inf", "--learning-rate is inf"),
    "negative beta": ("train --beta -1", "--beta is -1.0"),
    "beta nan": ("train --beta nan", "--beta is nan"),
    "batch size 0": ("train --batch-size 0", "--batch-size is 0"),
    "batch size above the split": (
        "train {base} --data-dir {data} --batch-size 301",
        "between 1 and the 300 images",
    ),
    "no epochs": ("train --epochs 0", "--epochs is 0"),
    "val interval 0": ("train --val-interval 0", "--val-interval is 0"),
    "negative seed": ("train --seed -1", "--seed is -1"),
    "no threads": ("train --num-threads 0", "--num-threads is 0"),
    "unknown schedule": ("train --schedule cosine", "cosine"),
    "run outside its folder": ("train --run ../x", "needs a plain name"),
    "absolute run": ("train --run /tmp/x", "needs a plain name"),
    "empty data folder": ("train --data-dir {tmp}", "No file train-images-idx3-ubyte"),
    "custom without folder": ("train --dataset custom", "needs --data-dir, the folder"),
    "other data": ("train --data-dir {data}", "is not Fashion-MNIST's train-images"),
    "not an IDX file": ("train {base} --data-dir {junk}", "is not an IDX file"),
    "no GPU": ("train {base} --data-dir {data} --device cuda:7", "use --device cpu"),
    "no such device": ("train {base} --data-dir {data} --device tpu9", "use --device cpu"),
    "missing checkpoint": ("train --resume_ckpt missing.pt", "No checkpoint at missing.pt"),
    "foreign checkpoint": ("train --resume_ckpt {foreign}", "not a checkpoint of this project"),
    "truncated checkpoint": ("train --resume_ckpt {cut}", "is damaged"),
    "checkpoint of other settings": (
        "train --resume_ckpt {ckpt} --latent-dim 9 --data-dir {data}",
        "latent_dim: 4 -> 9",
    ),
    "config and checkpoint": ("train --resume_ckpt {ckpt} --config x.json", "give only one"),
    "missing config": ("train --config missing.json", "missing.json cannot be read: No such file"),
    "config with unknown setting": (
        "train --config {config}",
        "has latent_dims, which is no option of vae-hyperband train (perhaps you meant latent_dim)",
    ),
    "unwritable output": (
        "train {base} --data-dir {data} --checkpoints-dir /proc/nowhere",
        "cannot be created",
    ),
    "file where a folder should be": (
        "train {base} --data-dir {data} --logs-dir {foreign}",
        "cannot be created",
    ),
    "evaluate nothing": ("evaluate missing.pt", "No checkpoint at missing.pt"),
    "evaluate other images": ("evaluate {ckpt} --data-dir {large}", "was trained on images of"),
    "evaluate with no threads": ("evaluate {ckpt} --num-threads 0", "--num-threads is 0"),
    "unknown split": ("evaluate {ckpt} --split valid", "valid"),
    "unwritable json": ("evaluate {ckpt} --data-dir {data} --json /proc/x.json", "/proc/x.json"),
    "no samples": ("sample {ckpt} --num-samples 0", "--num-samples is 0"),
    "sample to a text file": ("sample {ckpt} --out a.txt", "must end in .png or .npy"),
    "sample to an unwritable place": ("sample {ckpt} --out /proc/a.png", "/proc"),
    "sample a label from the prior": ("sample {ckpt} --label 3", "The prior knows no labels"),
    "sample by an unknown sampler": ("sample {ckpt} --sampler gan", "gan"),
    "evaluate an unknown part": ("evaluate {ckpt} --parts fid", "fid"),
    "evaluate few images": ("evaluate {ckpt} --num-generated 2", "--num-generated is 2"),
    "evaluate into a checkpoint": ("evaluate {ckpt} --json {ckpt}", "must end in .json"),
    "sample into a checkpoint": ("sample {ckpt} --out {ckpt}", "must end in .png or .npy"),
    "train with an infinite beta": ("train --beta inf", "must be a finite number"),
    "export ONNX with a sampler": (
        "export {ckpt} --format onnx --out o --sampler flow",
        "--sampler needs --format web",
    ),
    "export a page with a licence": (
        "export {ckpt} --format web --out o --license mit-0",
        "--license needs --format safetensors",
    ),
    "export components of no use": ("export {ckpt} --format web --out o --components 3", "mixture"),
    "study of two betas of one name": ("study --betas 1 1.0000001", "give runs the same name"),
    "study of no epochs": ("study --epochs 0", "--epochs is 0"),
    "study of no beta": ("study --betas", "--betas is empty, but needs at least one value"),
    "study of a seed twice": ("study --seeds 1 1", "--seeds has a value twice"),
    "study of a wrong run": ("study --run a/b", "called 'a/b'"),
    "train free bits of no use": ("train --free-bits 0.5", "needs --objective free-bits"),
    "train sigma of no use": ("train --sigma 0.2", "needs --likelihood gaussian"),
    "search pseudo-inputs of no use": ("search --pseudo-inputs 5", "needs --prior vamp"),
    "train two schedules": ("train --kl-cycles 2 --kl-warmup-epochs 1", "give only one"),
    "search of nothing": ("search --num-trials 0", "--num-trials is 0"),
    "search on an unknown device": ("search --device tpu9", "must be auto, cpu or cuda"),
    "search on a CPU with GPUs": ("search --device cpu --gpus-per-trial 1", "contradict"),
    "main job of no epochs": ("run --epochs 0", "--epochs is 0"),
    "main job that evaluates nothing": ("run --parts", "--parts needs at least one part"),
    "main job of a long name": (f"run --run {'a' * 98}", "at most 100"),
    "search of a long name": (f"search --run {'a' * 98} --final-epochs 1", "at most 100"),
    "main job on no device": ("run --device tpu9", "use --device cpu"),
    "search without room to stop": ("search --max-epochs 1", "nothing to stop"),
    "search over a training run": (
        "search --run a --dataset custom --data-dir {data} --batch-sizes 32",
        "holds a training run",
    ),
    "search with too large batches": (
        "search --run b --dataset custom --data-dir {data} --batch-sizes 64 301",
        "--batch-sizes has more than the 300 training images",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_and_nothing_is_harmed(
    name, tmp_path, small_data, trained, capfd
):
    argv, expected = MISTAKES[name]
    junk = write_idx_folder(tmp_path / "junk")
    (junk / NAMES[0]).write_bytes(b"<html>not found</html>")
    (tmp_path / "cut.pt").write_bytes(trained.best.read_bytes()[:5000])
    (tmp_path / "config.json").write_text('{"latent_dims": 3}')
    places = {
        "base": " ".join(BASE),
        "tmp": tmp_path,
        "data": small_data,
        "junk": junk,
        "ckpt": trained.latest,
        "cut": tmp_path / "cut.pt",
        "foreign": foreign_ckpt(tmp_path),
        "config": tmp_path / "config.json",
        "large": write_idx_folder(tmp_path / "large", size=12),
    }
    before = trained.latest.read_bytes()
    capfd.readouterr()
    assert train_vae.main(argv.format(**places).split()) == 2
    out, err = capfd.readouterr()
    assert any(part in out + err for part in expected.split("|")), out + err
    if argv:
        assert out == ""
        assert err.startswith("vae-hyperband: ")
        assert len(err.strip().splitlines()) == 1
        assert err.rstrip().endswith((".", "help.")) or "another model" in err
    assert trained.latest.read_bytes() == before


def test_help_into_a_closed_pipe_is_silent(tmp_path):
    line = shlex.join(command_line("train", "--help")) + " | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("usage: vae-hyperband train")
    assert done.stderr == ""


def test_usage_into_a_closed_pipe_is_silent(tmp_path):
    line = shlex.join(command_line("--help")) + " | true"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""


def test_from_python_the_same_mistakes_raise_our_own_types():
    with pytest.raises(DeviceError, match="use --device cpu"):
        pick_device("cuda:7")
    with pytest.raises(ConfigError, match="plain name"):
        check_run_name("a\0b")
    assert issubclass(ConfigError, VAEHyperbandError)


def test_from_python_strings_are_paths_and_wrong_types_are_refused(small_data):
    assert RunOptions(data_dir="x").data_dir == Path("x")
    assert len(load_split("test", str(small_data), "custom")) == 60
    for make in (
        lambda: SearchConfig(latent_dims=16),
        lambda: SearchConfig(learning_rates=(1e-3,)),
        lambda: TrainConfig(learning_rate=10**400),
        lambda: TrainConfig(latent_dim="many"),
        lambda: TrainConfig(latent_dim=True),
    ):
        with pytest.raises(ConfigError):
            make()


def test_writing_to_a_device_or_link_does_not_replace_it(trained, small_data, tmp_path, capfd):
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to("real.json")
    arguments = ["evaluate", str(trained.best), "--data-dir", str(small_data), "--device", "cpu"]
    assert train_vae.main([*arguments, "--json", "link.json"]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["num_images"] == 60
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert train_vae.main([*arguments, "--json", "pipe"]) == 0
    assert json.loads(os.read(reader, 100_000))["num_images"] == 60
    os.close(reader)


def test_divergence_has_its_own_exit_status(small_data, capsys):
    arguments = ["train", *BASE, "--data-dir", str(small_data), "--learning-rate", "1e6"]
    assert train_vae.main([*arguments, "--schedule", "constant", "--epochs", "60"]) == 3
    assert "diverged" in capsys.readouterr().err


def test_a_config_of_another_model_in_a_checkpoint_is_refused(trained, tmp_path, capsys):
    content = load_ckpt(trained.latest)
    config = dataclasses.replace(content.config, latent_dim=5)
    save_ckpt(tmp_path / "odd.pt", dataclasses.replace(content, config=config))
    assert train_vae.main(["sample", str(tmp_path / "odd.pt")]) == 2
    assert "is of another model" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path, small_data, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--run", "a", "--dataset", "custom", "--data-dir", str(small_data)]
    argv += ["--epochs", "2", "--batch-size", "32", "--num-threads", "1", "--device", "cpu"]
    assert train_vae.main([*argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    config = json.loads(said[: said.index("}") + 1])
    assert config["epochs"] == 2
    assert config["latent_dim"] == 32
    assert "capacity" not in config  # no other objective than capacity looks at it
    assert "train --run a --dataset custom --batch-size 32 --epochs 2" in said
    assert "cpu, 1 CPU thread\n" in said
    assert "steps        20 in 2 epochs\n" in said
    assert re.search(r"about \d+ s, [\d,]+ images/s", said)
    assert list(tmp_path.iterdir()) == []
    assert train_vae.main(argv) == 0
    before = written(tmp_path)
    capsys.readouterr()
    argv[argv.index("--epochs") + 1] = "3"
    assert train_vae.main([*argv, "--dry-run"]) == 0
    assert "steps        30 in 3 epochs, 20 of them done: it would go on" in capsys.readouterr().out
    assert train_vae.main([*argv, "--latent-dim", "4", "--dry-run"]) == 2
    assert "other settings (latent_dim: 32 -> 4)" in capsys.readouterr().err
    assert written(tmp_path) == before


def test_what_was_chosen_by_another_beta_says_by_which_loss(tmp_path, small_data, capsys):
    where = ["--data-dir", str(small_data), "--logs-dir", str(tmp_path / "my logs")]
    assert train_vae.main(["train", *BASE, "--epochs", "1", "--beta", "4", *where]) == 0
    said = capsys.readouterr().out
    best = load_ckpt(tmp_path / "checkpoints/vae/best.pt").metrics
    assert f"own validation loss, {best['total_loss']:.2f} nats/image; validation bound" in said
    assert "training vae for 1 epoch on 300 images, " in said
    assert f"--logdir '{tmp_path}/my logs' --host" in said  # to be copied


def test_a_dry_run_s_command_is_what_was_asked_for(trained, tmp_path, small_data, capsys):
    where = ["--data-dir", str(small_data), "--num-threads", "1", "--device", "cpu"]
    where += ["--checkpoints-dir", str(tmp_path / "c d"), "--logs-dir", str(tmp_path / "l")]
    resume = ["--resume_ckpt", str(trained.latest), "--run", "new", "--no-tensorboard"]
    epochs = load_ckpt(trained.latest).config.epochs
    assert train_vae.main(["train", *where, *resume, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "all of which are done: nothing would be trained" in said
    assert "--num-threads 1 may" not in said  # they were given
    command = next(line for line in said.splitlines() if line.startswith("command"))
    again = shlex.split(command)[2:]
    assert "--no-tensorboard" in again
    assert train_vae.main([*again, "--dry-run", "--epochs", str(epochs + 1)]) == 0
    assert "it would go on" in capsys.readouterr().out


def test_a_dry_run_finds_mistakes_too(tmp_path, capsys):
    argv = ["train", "--dry-run", "--dataset", "custom", "--data-dir", str(tmp_path)]
    assert train_vae.main(argv) == 2
    assert "No file train-images-idx3-ubyte" in capsys.readouterr().err
