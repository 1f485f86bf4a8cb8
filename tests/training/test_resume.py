"""A run that is stopped, killed or continued ends in the same bytes as one that was not."""

import dataclasses
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import command_line, rewrite_ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vae_hyperband import train_vae
from vae_hyperband.common.config import ONLY_WITH, RESUME_MAY_CHANGE, RunOptions, TrainConfig
from vae_hyperband.common.errors import FolderInUseError, ResumeError, RunFolderError
from vae_hyperband.common.process import EXIT_STOPPED, only_writer
from vae_hyperband.data import batches
from vae_hyperband.data.splits import load_split, split_for
from vae_hyperband.model.checkpoint import load_ckpt, save_ckpt, tree_digest
from vae_hyperband.training import keeper, step
from vae_hyperband.training.loop import fit
from vae_hyperband.training.tracker import read_rows

OTHER_VALUES = {
    "network": "residual",
    "widths": [4, 8],
    "latent_dim": 5,
    "beta": 2.0,
    "kl_warmup_epochs": 1.0,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "batch_size": 16,
    "seed": 9,
    "kl_cycles": 2,
    "objective": "capacity",
    "free_bits": 0.2,
    "capacity": 5.0,
    "train_samples": 7,
    "prior": "vamp",
    "pseudo_inputs": 9,
    "sigma": 0.2,
    "likelihood": "continuous-bernoulli",
    "binarize": "dynamic",
    "dataset": "fashion-mnist",
    "holdout": "last",
    "image_size": "6",
    "fit": "pad",
    "channels": 3,
}


def outcome(result) -> dict[str, str]:
    """Everything that has to be equal, by digest."""
    latest, best = load_ckpt(result.latest), load_ckpt(result.best)
    metrics = (result.log_folder / "metrics.jsonl").read_bytes()
    return {
        "model": tree_digest(latest.model_state),
        "optimizer": tree_digest(latest.optimizer_state),
        "sums": tree_digest(latest.sums),
        "best": tree_digest(latest.best),
        "best.pt": tree_digest(best.model_state),
        "step": str(latest.step),
        "metrics": metrics.decode(),
    }


def stop_after(num_steps):
    """Says stop when asked so many times: after every step, and once more after an epoch."""
    asked = 0

    def should_stop():
        nonlocal asked
        asked += 1
        return asked >= num_steps

    return should_stop


@pytest.fixture(scope="session")
def uninterrupted(trained_once):
    return outcome(trained_once)


# 10 steps an epoch: the first step, mid-epoch, one before its end, its end, the next one's first
@pytest.mark.parametrize("stops", [[1], [5], [9], [10], [11], [29], [1, 1, 1], [3, 8, 2, 9]])
def test_resume_from_any_step_gives_the_same_bytes(options, small_config, uninterrupted, stops):
    for num_steps in stops:
        result = fit(
            small_config, options(run="cut"), should_stop=stop_after(num_steps), quiet=True
        )
        assert not result.finished
    result = fit(small_config, options(run="cut"), quiet=True)
    assert result.finished
    assert outcome(result) == uninterrupted


def test_a_finished_run_is_left_as_it_is(options, small_config):
    first = fit(small_config, options(), quiet=True)
    before = first.latest.read_bytes(), outcome(first)
    again = fit(small_config, options(), quiet=True)
    assert (again.latest.read_bytes(), outcome(again)) == before


@settings(max_examples=12, deadline=None, derandomize=True)
@given(stops=st.lists(st.integers(1, 33), min_size=1, max_size=6))
def test_any_chain_of_stops_gives_the_same_bytes(
    tmp_path_factory, small_data, uninterrupted, stops
):
    """After every one of its 30 steps and 3 validations a run may be told to stop."""
    config = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=3, seed=3)
    folder = tmp_path_factory.mktemp("chain")
    place = RunOptions(
        run="a", device="cpu", num_threads=1, data_dir=small_data, log_interval=4,
        checkpoints_dir=folder / "c", logs_dir=folder / "l", tensorboard=False,
    )  # fmt: skip
    for num_steps in stops:
        fit(config, place, should_stop=stop_after(num_steps), quiet=True)
    assert outcome(fit(config, place, quiet=True)) == uninterrupted


@pytest.mark.parametrize("key", ["noise", "order"])
def test_the_comparison_sees_one_random_number_of_another_step(
    options, small_config, uninterrupted, monkeypatch, key
):
    """One step's noise, or two images of an epoch's order, after the resume."""
    fit(small_config, options(run="cut"), should_stop=stop_after(15), quiet=True)
    if key == "noise":
        real = step.standard_normal

        def other_noise(seed, purpose, position, *rest):
            return real(seed, purpose, position + 1000 * (position == 20), *rest)

        monkeypatch.setattr(step, "standard_normal", other_noise)
    else:
        real_order = batches.epoch_order

        def other_order(num_images, seed, epoch):
            order = real_order(num_images, seed, epoch)
            if epoch == 2:
                order[[0, 299]] = order[[299, 0]]
            return order

        monkeypatch.setattr(batches, "epoch_order", other_order)
    assert outcome(fit(small_config, options(run="cut"), quiet=True)) != uninterrupted


@pytest.mark.parametrize("part", ["optimizer", "sums", "step"])
def test_the_comparison_can_fail(options, small_config, uninterrupted, part):
    result = fit(small_config, options(run="cut"), should_stop=stop_after(15), quiet=True)
    content = load_ckpt(result.latest)
    if part == "optimizer":
        content.optimizer_state["state"][0]["exp_avg"].view(-1)[0] += 1e-3
    elif part == "sums":
        content.sums[1, 0] += 1e-3
    else:
        content = dataclasses.replace(content, step=content.step - 1)
    save_ckpt(result.latest, content)
    assert outcome(fit(small_config, options(run="cut"), quiet=True)) != uninterrupted


def train_command(tmp_path: Path, small_data: Path, run: str, **extra: object) -> list[str]:
    # enough steps that a kill lands between start and end; saves at almost every step
    arguments: list[object] = ["train", "--run", run, "--dataset", "custom", "--seed", 3]
    arguments += ["--data-dir", small_data, "--latent-dim", 4, "--batch-size", 8, "--epochs", 12]
    arguments += ["--num-threads", 1, "--ckpt-seconds", 0.02, "--log-interval", 10]
    arguments += ["--device", "cpu"]
    for name, value in extra.items():
        arguments += [f"--{name}", value]
    return command_line(*arguments)


def digests(tmp_path: Path, run: str) -> dict[str, str]:
    """Everything two runs of :func:`train_command` have to agree on."""
    latest = load_ckpt(tmp_path / "checkpoints" / run / "latest.pt")
    best = load_ckpt(tmp_path / "checkpoints" / run / "best.pt")
    metrics = (tmp_path / "logs" / run / "metrics.jsonl").read_text()
    return {
        "latest": latest.digest,
        "best": best.digest,
        "metrics": metrics,
    }


@pytest.mark.faults
def test_resume_after_sigkill_gives_the_same_bytes(tmp_path, small_data):
    """Processes begun anew each time, as a user would; test_crashes.py kills 50."""
    subprocess.run(train_command(tmp_path, small_data, "whole"), cwd=tmp_path, check=True)
    num_kills, rng, kills, mid_run = 2, random.Random(2), 0, 0
    latest = tmp_path / "checkpoints" / "cut" / "latest.pt"
    for _ in range(num_kills):
        process = subprocess.Popen(train_command(tmp_path, small_data, "cut"), cwd=tmp_path)
        # moments that matter lie after the first save; before it nothing is there to be lost
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if latest.exists() and latest.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        mid_run += 0 < load_ckpt(latest).step < 12 * 38
    assert kills >= num_kills // 2  # a run may end before its kill
    assert mid_run >= num_kills // 2
    subprocess.run(train_command(tmp_path, small_data, "cut"), cwd=tmp_path, check=True)
    assert digests(tmp_path, "cut") == digests(tmp_path, "whole")
    assert scalars(tmp_path / "logs" / "cut") == scalars(tmp_path / "logs" / "whole")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: one value per step, increasing, speed aside."""
    board = EventAccumulator(str(folder), purge_orphaned_data=True)
    board.Reload()
    shown = {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag != "images_per_second"
    }
    for tag, values in shown.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
    return shown


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, marks=pytest.mark.faults),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.faults),
    ],
)
def test_a_signal_saves_says_so_and_the_same_command_goes_on(tmp_path, small_data, number):
    process = subprocess.Popen(
        train_command(tmp_path, small_data, "cut"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    latest = tmp_path / "checkpoints" / "cut" / "latest.pt"
    while not latest.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED
    assert "vae-hyperband train --run cut" in said
    stopped_at = load_ckpt(latest).step
    assert 0 < stopped_at < 12 * 38
    done = subprocess.run(
        train_command(tmp_path, small_data, "cut"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert f"resuming cut at step {stopped_at}" in done.stdout


def test_resume_ckpt_takes_its_configuration_along_and_goes_on_elsewhere(
    tmp_path, small_data, options, small_config, monkeypatch, capsys
):
    cut = fit(small_config, options(run="cut"), should_stop=stop_after(13), quiet=True)
    whole = outcome(fit(small_config, options(run="whole"), quiet=True))
    monkeypatch.chdir(tmp_path)

    def train(*arguments):
        common = ["--data-dir", small_data, "--num-threads", 1, "--log-interval", 4]
        status = train_vae.main([*map(str, ["train", *arguments, *common, "--device", "cpu"])])
        return status, "".join(capsys.readouterr())

    step = load_ckpt(cut.latest).step
    assert step == 12
    for start in (step, 30):  # the second time it does not start over
        status, said = train("--resume_ckpt", cut.latest, "--run", "other")
        assert status == 0
        assert f"resuming other at step {start} of 30" in said
    latest = load_ckpt(tmp_path / "checkpoints/other/latest.pt")
    assert tree_digest(latest.model_state) == whole["model"]
    assert tree_digest(latest.optimizer_state) == whole["optimizer"]
    best = load_ckpt(tmp_path / "checkpoints/other/best.pt")
    assert tree_digest(best.model_state) == whole["best.pt"]
    # without --run it goes on in its own folder
    assert f"resuming cut at step {step}" in train("--resume-ckpt", cut.latest)[1]
    status, said = train("--resume_ckpt", cut.best, "--run", "whole")
    assert status == 2
    assert "would be lost" in said


@pytest.mark.parametrize("name", [n for n in OTHER_VALUES if n != "dataset"])
def test_other_settings_are_refused_with_old_and_new_value(
    options, small_config, small_data, name, tmp_path, monkeypatch
):
    config, images = small_config, {}
    if name in ONLY_WITH:
        chooser, choice = ONLY_WITH[name]
        config = dataclasses.replace(small_config, **{chooser: choice})
        if choice == "images":
            monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(tmp_path / "cache"))
            images = {"data": small_data}
            split_for(config, options(**images), "train")  # decoded now: a stop would stop that
    fit(config, options(**images), should_stop=stop_after(5), quiet=True)
    before = (options().ckpt_folder / "latest.pt").read_bytes()
    old, new = config.to_dict()[name], OTHER_VALUES[name]
    with pytest.raises(ResumeError, match=re.escape(f"{name}: {old!r} -> {new!r}")):
        fit(dataclasses.replace(config, **{name: new}), options(**images), quiet=True)
    assert (options().ckpt_folder / "latest.pt").read_bytes() == before


def test_a_run_of_0_1_keeps_the_split_that_it_was_trained_with(options, small_config, small_data):
    """It held out the last sixth of the file, and did not say so."""
    held_out = dataclasses.replace(small_config, holdout="last")
    begun = fit(held_out, options(run="old"), should_stop=stop_after(5), quiet=True)
    rewrite_ckpt(begun.latest, lambda content: content["config"].pop("holdout"))
    found = load_ckpt(begun.latest)
    last = load_split("validation", small_data, "custom", "last")
    assert torch.equal(found.split("validation", small_data).images_NCHW, last.images_NCHW)
    with pytest.raises(ResumeError, match="holdout: 'last' -> 'content'"):
        fit(small_config, options(run="old"), quiet=True)
    assert fit(held_out, options(run="old"), quiet=True).finished


def test_a_setting_without_effect_in_a_checkpoint_changes_nothing(
    options, small_config, uninterrupted
):
    """As an earlier version took it; now it is refused where it is given."""
    begun = fit(small_config, options(run="cut"), should_stop=stop_after(5), quiet=True)
    rewrite_ckpt(begun.latest, lambda content: content["config"].update(free_bits=0.5))
    assert outcome(fit(small_config, options(run="cut"), quiet=True)) == uninterrupted


def test_other_data_is_refused(options, small_config, tmp_path):
    from conftest import write_idx_folder

    fit(small_config, options(), should_stop=stop_after(5), quiet=True)
    other = write_idx_folder(tmp_path / "other", num_train=420)
    with pytest.raises(ResumeError, match=r"data's digest: "):
        fit(small_config, options(data_dir=other), quiet=True)


def test_more_epochs_are_allowed_and_other_logs_too(options, small_config, tmp_path):
    fit(small_config, options(), quiet=True)
    longer = dataclasses.replace(small_config, epochs=5, val_interval=2)
    result = fit(longer, options(logs_dir=tmp_path / "elsewhere"), quiet=True)
    assert result.state.step == 50
    assert read_rows(result.log_folder / "metrics.jsonl")[0]["step"] > 30


def test_fewer_epochs_than_are_trained_are_refused(options, small_config):
    fit(small_config, options(), quiet=True)
    with pytest.raises(ResumeError, match=r"trained for 3\.00 epochs already"):
        fit(dataclasses.replace(small_config, epochs=2), options(), quiet=True)


def test_another_machine_class_is_said_once_and_recorded(options, small_config, capsys):
    fit(small_config, options(num_threads=1), should_stop=stop_after(5))
    result = fit(small_config, options(num_threads=2))
    assert "num_threads: 1 -> 2" in capsys.readouterr().err
    assert load_ckpt(result.latest).environment["num_threads"] == 2


def test_two_runs_in_one_folder_the_second_is_told_who_the_first_is(options, small_config):
    with (
        only_writer(options().ckpt_folder),
        pytest.raises(RunFolderError, match=r"in use by process \d+ on .+"),
    ):
        fit(small_config, options(), quiet=True)
    assert fit(small_config, options(), quiet=True).finished  # the lock went with its holder


def test_two_runs_may_not_share_a_log_folder(options, small_config, tmp_path):
    place = options()
    with only_writer(place.log_folder), pytest.raises(FolderInUseError, match="logs/a is in use"):
        fit(small_config, options(checkpoints_dir=tmp_path / "elsewhere"), quiet=True)


def test_logs_beyond_the_last_checkpoint_are_taken_back(
    options, small_config, uninterrupted, trained_once
):
    """As after a power cut: steps that were logged, but not saved, are computed again."""
    result = fit(small_config, options(run="cut"), should_stop=stop_after(8), quiet=True)
    early = result.latest.read_bytes()
    fit(small_config, options(run="cut"), should_stop=stop_after(10), quiet=True)
    result.latest.write_bytes(early)
    again = fit(small_config, options(run="cut"), quiet=True)
    assert outcome(again) == uninterrupted
    assert scalars(again.log_folder) == scalars(trained_once.log_folder)


def test_a_torn_last_line_of_the_metrics_is_repaired(options, small_config, uninterrupted):
    result = fit(small_config, options(run="cut"), should_stop=stop_after(15), quiet=True)
    with (result.log_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "epo')
    assert outcome(fit(small_config, options(run="cut"), quiet=True)) == uninterrupted


def test_every_setting_is_guarded_or_may_change():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == set(OTHER_VALUES) | RESUME_MAY_CHANGE


def test_a_kill_between_best_and_latest_leaves_no_wrong_best(
    options, small_config, uninterrupted, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    for _ in range(3):  # at the end of each epoch, the last one included
        with monkeypatch.context() as patch:
            patch.setattr(keeper, "copy_ckpt", killed)
            with pytest.raises(KeyboardInterrupt):
                fit(small_config, options(run="cut"), quiet=True)
    result = fit(small_config, options(run="cut"), quiet=True)
    assert outcome(result) == uninterrupted
    assert load_ckpt(result.best).step == result.state.best["step"]


def test_going_back_in_a_run_s_own_folder_is_refused(options, small_config, tmp_path):
    result = fit(small_config, options(), should_stop=stop_after(15), quiet=True)
    early = result.latest.with_name("early.pt")
    early.write_bytes(result.latest.read_bytes())
    fit(small_config, options(), quiet=True)
    before = result.latest.read_bytes()
    with pytest.raises(ResumeError, match="would be lost"):
        fit(small_config, options(resume_ckpt=early), quiet=True)
    assert result.latest.read_bytes() == before
    elsewhere = fit(small_config, options(run="b", resume_ckpt=early), quiet=True)
    assert tree_digest(load_ckpt(elsewhere.latest).model_state) == outcome(result)["model"]
