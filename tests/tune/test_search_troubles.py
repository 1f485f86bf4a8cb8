"""Real searches in trouble: what hangs, dies, moves, is foreign or damaged, and what is said."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, command_line, write_idx_folder
from killing import (
    descendants,
    idle_workers,
    sigkill,
    trial_workers,
    until_the_end,
)

from vae_hyperband.common.errors import DataError, RayBrokeError
from vae_hyperband.common.process import EXIT_STOPPED
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.trials import read_result
from vae_hyperband.tune.driver import search


def search_command(data: Path, *extra: object) -> list[str]:
    return command_line(
        "search", "--run", "s", "--data-dir", data, "--device", "cpu", "--dataset", "custom",
        "--latent-dims", 2, 4, *extra,
    )  # fmt: skip


def run(command: list[str], folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def refused(fork: Command, data: Path, *extra: object, **how: object) -> str:
    """The one sentence of a search that is refused before Ray is started."""
    done = fork(*search_command(data, *extra)[3:], **how)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def interrupt_at(text: str, command: list[str], folder: Path) -> None:
    """Start the command, and send SIGINT when it has said ``text``."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if text in line:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == EXIT_STOPPED


@pytest.fixture
def slow_data(tmp_path) -> Path:
    """Epochs of about a second."""
    return write_idx_folder(tmp_path / "data", num_train=7200, size=12)


@pytest.mark.faults
def test_a_search_by_tpe_on_the_iwae_bound_gives_what_it_says(tmp_path, small_data, command):
    done = run(
        search_command(
            small_data, "--algorithm", "tpe", "--metric", "iwae", "--scheduler", "median",
            "--num-trials", 10, "--max-epochs", 4, "--batch-sizes", 32, 64, "--betas", 0.5, 1,
            "--max-concurrent", 1, "--final-epochs", 2,
        ),
        tmp_path,
    )  # fmt: skip
    result = read_result(tmp_path / "checkpoints/s")
    assert len(result.trials) == 10
    assert "(validation IWAE bound, nats/image)" in done.stdout
    assert "Importance (share of the variance): " in done.stdout
    assert result.importance is not None
    assert set(result.importance) == {"latent_dim", "learning_rate", "batch_size", "beta"}
    for trial in result.trials:
        for row in trial.rows:
            assert row["iwae"] < row["bound"]
    best = json.loads((tmp_path / "checkpoints/s/best_config.json").read_text())
    assert best["metric"]["value"] == result.winner.best_row["iwae"]
    # the winner alone, bit for bit; then the final training of the search itself
    again = command(
        "train", "--config", tmp_path / "checkpoints/s/best_config.json", "--run", "again",
        "--data-dir", small_data, "--device", "cpu",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    alone = load_ckpt(tmp_path / "checkpoints/again/best.pt")
    assert alone.metrics["iwae"] == best["metric"]["value"]
    assert load_ckpt(tmp_path / "checkpoints/s-best/best.pt").config.epochs == 2
    assert (tmp_path / "logs/s-best/samples.png").exists()


@pytest.mark.faults
def test_a_search_goes_on_in_another_place_with_its_trials_behind_a_url(tmp_path, slow_data):
    command = search_command(
        slow_data, "--algorithm", "grid", "--grid-points", 2, "--max-epochs", 9,
        "--batch-sizes", 32,
    )  # fmt: skip
    calm = tmp_path / "calm"
    calm.mkdir()
    run(command, calm)
    expected = read_result(calm / "checkpoints/s")
    assert len(expected.trials) == 4
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    stored = [*command, "--storage", f"file://{tmp_path}/bucket"]
    interrupt_at("epoch 2/9", stored, here)
    assert list((tmp_path / "bucket").glob("s-*/trial_*/latest.pt"))
    assert not (here / "checkpoints/s/trials").exists()
    shutil.move(here, there)
    run(stored, there)
    found = read_result(there / "checkpoints/s")
    assert found.trials == expected.trials
    winners = [load_ckpt(place / "checkpoints/s/winner.pt") for place in (there, calm)]
    assert winners[0].digest == winners[1].digest


@pytest.mark.faults
def test_a_trial_that_hangs_is_ended_and_named_and_the_search_goes_on(tmp_path):
    """An epoch of batches of one image takes far longer than the time that it is given.

    One of batches of 512 takes a tenth of it, so that it has time enough on a busy machine, too.
    That time is long beside the imports of a new process on a busy machine: in the midst of them,
    the report's 100 frames may not reach back to the training.
    """
    data = write_idx_folder(tmp_path / "data", num_train=150_000, size=12)
    done = run(
        search_command(
            data, "--scheduler", "none", "--num-trials", 3, "--max-epochs", 2,
            "--batch-sizes", 512, 1, "--trial-timeout", 60, "--max-failures", 0,
        ),
        tmp_path,
    )  # fmt: skip
    result = read_result(tmp_path / "checkpoints/s")
    slow = [trial for trial in result.trials if trial.hyperparameters["batch_size"] == 1]
    assert len(slow) == 1
    for trial in result.trials:
        assert trial.outcome == ("failed" if trial in slow else "finished")
    for trial in slow:
        assert trial.why.startswith("hung: no epoch in 60 s (last_hang.txt in its logs")
        assert trial.why.endswith("tried 1 time")
        assert f"{trial.name} failed: hung" in done.stdout
        where = tmp_path / f"logs/s/{trial.name}/last_hang.txt"
        assert "training/loop.py" in where.read_text()  # what it was doing


@pytest.mark.faults
def test_a_search_by_fid_compares_what_the_prior_draws(tmp_path, small_data):
    done = run(
        search_command(
            small_data, "--metric", "fid", "--scheduler", "none", "--num-trials", 3,
            "--max-epochs", 2, "--batch-sizes", 32, 64,
        ),
        tmp_path,
    )  # fmt: skip
    result = read_result(tmp_path / "checkpoints/s")
    assert "(validation FID (own classifier), z from the prior)" in done.stdout
    scores = [trial.best_row["fid"] for trial in result.trials]
    assert result.best_score == min(scores)
    assert len(set(scores)) == 3
    assert (tmp_path / "logs/s/best_config.png").exists()


@pytest.mark.faults
@pytest.mark.parametrize("storage", ["", "file://{folder}/bucket"])
def test_a_worker_that_dies_again_and_again_costs_one_trial(tmp_path, slow_data, storage):
    command = search_command(
        slow_data, "--scheduler", "none", "--num-trials", 2, "--max-epochs", 2,
        "--batch-sizes", 8, "--max-concurrent", 1, "--max-failures", 1,
        *(["--storage", storage.format(folder=tmp_path)] if storage else []),
    )  # fmt: skip
    killed = set()
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        for _ in until_the_end(process):
            for worker in trial_workers(process.pid):
                if worker not in killed and len(killed) < 2:
                    time.sleep(1)
                    killed.add(worker)
                    assert sigkill(worker)
    assert process.returncode == 0
    result = read_result(tmp_path / "checkpoints/s")
    assert result.trials[0].why == "its process died; tried 2 times"
    assert result.trials[1].outcome == "finished"
    assert result.winner.number == 1


@pytest.mark.faults
def test_an_idle_worker_that_dies_costs_nothing(tmp_path, small_data):
    """HyperBand pauses every trial; the process of the last one waits to be used again."""
    command = search_command(
        small_data, "--scheduler", "hyperband", "--num-trials", 6, "--max-epochs", 9,
        "--batch-sizes", 16, "--max-concurrent", 1, "--max-failures", 3,
    )  # fmt: skip
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    for folder in (calm, storm):
        folder.mkdir()
    run(command, calm)
    kills = 0
    with subprocess.Popen(command, cwd=storm, stdout=subprocess.DEVNULL) as process:
        for _ in until_the_end(process, pause=0.002):
            for worker in idle_workers(process.pid) if kills < 3 else []:
                if sigkill(worker):
                    kills += 1
                    time.sleep(3)
    assert process.returncode == 0
    assert kills > 0
    expected, found = (read_result(folder / "checkpoints/s") for folder in (calm, storm))
    assert found.trials == expected.trials


@pytest.mark.faults
def test_when_ray_itself_dies_the_same_command_goes_on(tmp_path, slow_data):
    command = search_command(
        slow_data, "--num-trials", 4, "--max-epochs", 9, "--batch-sizes", 16, "--max-concurrent", 1
    )
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "epoch 2/9" in line:
                break
        for child in descendants(process.pid)[1:]:
            sigkill(child)
        _, said = process.communicate(timeout=200)
    # Ray ends the process itself, with status 1, where it cannot tell us
    assert process.returncode in (RayBrokeError.exit_status, 1), said
    assert "Traceback" not in said
    run(command, tmp_path)
    epochs = [trial.curve("epoch") for trial in read_result(tmp_path / "checkpoints/s").trials]
    assert epochs[0] == list(range(1, 10))


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_costs_the_trials_that_do_not_fit(tmp_path, small_data):
    """A disk with room for checkpoints of 2 latents, not of 1,000."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        done = run(
            command_line(
                "search", "--run", "s", "--data-dir", small_data, "--device", "cpu",
                "--dataset", "custom", "--latent-dims", 2, 1000, "--batch-sizes", 32,
                "--num-trials", 4, "--max-epochs", 2, "--scheduler", "none",
                "--storage", small, "--max-failures", 0, "--max-concurrent", 1,
            ),
            tmp_path,
        )  # fmt: skip
    finally:
        subprocess.run(["umount", str(small)], check=True)
    result = read_result(tmp_path / "checkpoints/s")
    large = [trial for trial in result.trials if trial.hyperparameters["latent_dim"] == 1000]
    assert 0 < len(large) < 4
    for trial in result.trials:
        assert trial.outcome == ("failed" if trial in large else "finished")
    for trial in large:
        assert "RunFolderError" in trial.why
        assert "cannot be written" in trial.why
        assert trial.name in done.stdout


def test_a_folder_that_others_can_write_to_is_refused(tmp_path, small_data, fork):
    folder = tmp_path / "checkpoints/s"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "is writable by everyone" in refused(fork, small_data)
    if os.geteuid() == 0:
        folder.chmod(0o755)
        os.chown(folder, 12345, 12345)
        assert "belongs to another user" in refused(fork, small_data)


@pytest.mark.faults
def test_a_damaged_log_is_refused_and_fresh_moves_it_aside(tmp_path, small_data):
    folder = tmp_path / "checkpoints/s"
    folder.mkdir(parents=True)
    log = folder / "decisions.jsonl"
    log.write_text('{"event": "draw", "check": "0"}\n{"event": "draw", "check": "0"}\n')
    search = ["--num-trials", 2, "--max-epochs", 2, "--scheduler", "none", "--batch-sizes", 32]
    done = run(search_command(small_data, *search), tmp_path, status=2)
    assert f"Line 1 of {log} is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = run(search_command(small_data, *search, "--fresh"), tmp_path)
    assert f"moved {folder} to {folder}-before-1" in done.stdout
    assert (tmp_path / "checkpoints/s-before-1/decisions.jsonl").exists()
    assert len(read_result(folder).trials) == 2


def test_a_refused_command_does_not_bind_the_next_one(tmp_path, small_data, fork):
    said = refused(fork, tmp_path / "nowhere", "--batch-sizes", 32, "--num-trials", 7)
    assert "No file train-images-idx3-ubyte" in said
    assert (tmp_path / "checkpoints/s/search.json").exists()
    (tmp_path / "checkpoints/s/search.json").write_text("{")
    said = refused(fork, small_data, "--batch-sizes", 10**6)
    assert "--batch-sizes has more than" in said  # and not: other settings


def test_trials_whose_log_is_gone_are_not_removed(tmp_path, small_data, fork):
    trained = tmp_path / "checkpoints/s/trials/trial_000/latest.pt"
    trained.parent.mkdir(parents=True)
    trained.write_bytes(b"an hour of work")
    assert "holds trials, but not the log of their search" in refused(fork, small_data)
    assert trained.read_bytes() == b"an hour of work"


@pytest.mark.faults
def test_a_second_driver_is_told_who_the_first_is(tmp_path, small_data):
    folder = tmp_path / "checkpoints/s"
    command = search_command(small_data, "--max-epochs", 60, "--batch-sizes", 32)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not (folder / "search.json").exists():
            assert process.poll() is None
            time.sleep(0.1)
        done = run(command, tmp_path, status=2)
        process.send_signal(signal.SIGINT)  # in its first seconds, while Ray starts
        process.stdout.read()
    assert f"{folder} is in use by process {process.pid}" in done.stderr
    assert process.returncode == EXIT_STOPPED


def test_a_storage_that_cannot_be_used_is_one_sentence(small_data, fork):
    for storage in ("/proc/nowhere", "nosuchscheme://bucket"):
        assert "cannot be" in refused(fork, small_data, "--storage", storage)


@pytest.mark.faults
def test_every_trial_failing_has_a_status_of_its_own(tmp_path, small_data):
    command = search_command(
        small_data, "--num-trials", 2, "--max-epochs", 2, "--scheduler", "none", "--betas", 1e38,
        "--batch-sizes", 32,
    )  # fmt: skip
    done = run(command, tmp_path, status=3)
    assert "Every trial failed (diverged: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert np.isinf([trial.score("bound") for trial in read_all(tmp_path)]).all()


def read_all(folder: Path) -> list:
    from vae_hyperband.search.config import SearchConfig
    from vae_hyperband.search.decisions import Board, Journal

    asked = json.loads((folder / "checkpoints/s/search.json").read_text())
    del asked["id"], asked["storage"], asked["data"]
    with Journal(folder / "checkpoints/s/decisions.jsonl") as journal:
        return Board(SearchConfig(**asked), journal, lambda number, trials: {}).trials


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide a folder from a node")
def test_a_node_that_does_not_see_the_trials_is_named_before_the_search(tmp_path, small_data):
    """Two Ray nodes on this host, one of them with another file system over checkpoints/."""
    (tmp_path / "checkpoints").mkdir()
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("may not unshare here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    head = [*ray, "--head", "--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}"]
    hidden = f"mount -t tmpfs tmpfs {tmp_path}/checkpoints; exec $0 $@"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    nodes = [subprocess.Popen([*head, "--include-dashboard=false"], **quiet)]
    try:
        wait_for_nodes(address, 1, env)
        node = ["unshare", "-m", "sh", "-c", hidden, *ray, f"--address={address}"]
        nodes.append(subprocess.Popen(node, **quiet))
        wait_for_nodes(address, 2, env)
        command = search_command(small_data, "--batch-sizes", 32, "--address", address)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(timeout=60)
    assert done.returncode == 2
    assert "does not see" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def wait_for_nodes(address: str, num_nodes: int, env: dict[str, str]) -> None:
    script = (
        f"import ray; ray.init('{address}', log_to_driver=False, logging_level='ERROR')\n"
        f"raise SystemExit(len([n for n in ray.nodes() if n['Alive']]) < {num_nodes})"
    )
    deadline = time.monotonic() + 90
    while True:
        asked = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
        if asked.returncode == 0:
            return
        assert time.monotonic() < deadline, asked.stderr
        time.sleep(1)


@pytest.mark.faults
def test_other_data_on_the_way_is_refused(tmp_path, small_data):
    command = search_command(small_data, "--max-epochs", 60, "--batch-sizes", 32)
    interrupt_at("epoch 2/60", command, tmp_path)
    other = write_idx_folder(tmp_path / "other", num_train=240)
    command[command.index("--data-dir") + 1] = str(other)
    done = run(command, tmp_path, status=2)
    assert "was begun with other data" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_at_the_end_of_the_search_stops_the_final_training(tmp_path, small_data, number):
    command = search_command(
        small_data, "--num-trials", 2, "--max-epochs", 2, "--scheduler", "none",
        "--batch-sizes", 32, "--final-epochs", 2000,
    )  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "2 of 2 done" in line:
                break
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == EXIT_STOPPED, said
    assert "--final-epochs 2000" in said
    # anew, and with another seed: the trained winner of the old one is moved aside with it
    anew = [*command, "--fresh", "--seed", "5"]
    anew[anew.index("2000")] = "1"
    done = run(anew, tmp_path)
    assert "moved" in done.stdout
    assert list((tmp_path / "checkpoints").glob("s-best-before-1"))


def test_a_search_in_a_place_without_umask_can_be_gone_on_with(small_data, fork):
    """A folder that the first command made must not be one that the second refuses."""
    for _ in range(2):
        said = refused(fork, small_data, "--batch-sizes", 10**6, umask=0)
        assert "--batch-sizes has more than" in said


def test_a_number_of_trials_that_a_grid_ignores_is_said(tmp_path, capsys):
    options = SearchOptions(
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l", data_dir=tmp_path, device="cpu"
    )
    for num_trials, said in ((1000, True), (SearchConfig.num_trials, False)):
        config = SearchConfig(dataset="custom", algorithm="grid", num_trials=num_trials)
        with pytest.raises(DataError):  # no data there: Ray is not started
            search(config, options)
        note = "note: a grid has 36 combinations: --num-trials has no effect\n"
        assert (note in capsys.readouterr().out) == said
