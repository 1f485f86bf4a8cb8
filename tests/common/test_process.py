"""What surrounds a process: closed streams, threads, a caller's modes, control groups, links."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line

from vae_hyperband import train_vae
from vae_hyperband.common import process
from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError, FolderInUseError
from vae_hyperband.common.process import (
    available_cpus,
    cpu_quotas,
    cpu_threads,
    only_writer,
    own_modes,
    stop_flag,
)
from vae_hyperband.model.checkpoint import load_ckpt, save_ckpt
from vae_hyperband.training.loop import fit


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_quota_of_every_group_around_the_process_counts(tmp_path):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    write(groups, "0::/outer/inner\n")
    assert cpu_quotas(groups, root) == []
    write(root / "outer/inner/cpu.max", "max 100000\n")
    write(root / "outer/cpu.max", "150000 100000\n")
    assert cpu_quotas(groups, root) == [1.5]
    write(root / "cpu.max", "50000 100000\n")
    assert cpu_quotas(groups, root) == [1.5, 0.5]
    # version 1: a hierarchy per controller; -1 is no quota; the group may be the top's own
    write(groups, "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n")
    (root / "cpu.max").unlink()
    write(root / "cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    assert cpu_quotas(groups, root) == []
    write(root / "cpu,cpuacct/job/cpu.cfs_quota_us", "300000\n")
    assert cpu_quotas(groups, root) == [3.0]
    write(groups, "0::\n")
    assert cpu_quotas(groups, root) == []
    assert cpu_quotas(tmp_path / "nowhere", root) == []


@pytest.mark.parametrize("listed", ["cpu,cpuacct", "cpuacct,cpu", "cpu"])
@pytest.mark.parametrize("mounted", ["cpu,cpuacct", "cpuacct,cpu", "cpu"])
@pytest.mark.parametrize("linked", [True, False])
def test_a_quota_is_found_whatever_the_order_of_the_controllers(tmp_path, listed, mounted, linked):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    write(groups, f"5:cpuset:/job\n4:memory:/job\n3:{listed}:/job\n")
    for name, quota in ((mounted, "150000\n"), ("memory", "7\n"), ("cpuset", "7\n")):
        write(root / name / "job/cpu.cfs_quota_us", quota)
        write(root / name / "job/cpu.cfs_period_us", "100000\n")
    if linked:  # as most systems have them beside the folder
        for name in {"cpu", "cpuacct"} - {mounted}:
            (root / name).symlink_to(mounted)
    assert cpu_quotas(groups, root) == [1.5]


@pytest.mark.parametrize("version", [1, 2])
def test_quota_and_affinity_decide_how_many_trials_and_threads_there_are(
    version, tmp_path, monkeypatch
):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    if version == 2:
        write(groups, "0::/job\n")
        write(root / "job/cpu.max", "150000 100000\n")
    else:
        write(groups, "3:cpu,cpuacct:/job\n")
        write(root / "cpu,cpuacct/job/cpu.cfs_quota_us", "150000\n")
        write(root / "cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    monkeypatch.setattr(process, "cpu_quotas", functools.partial(cpu_quotas, groups, root))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with cpu_threads(None):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        for affinity, cpus in (({0, 1, 2, 3}, 2), ({3}, 1)):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, affinity=affinity: affinity)
            assert available_cpus() == cpus
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a control group")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to take one away")
def test_a_real_quota_of_one_cpu_leaves_one_trial_and_one_thread():
    group = Path("/sys/fs/cgroup/cpu/vae-hyperband-test")
    if not (group.parent / "cpu.cfs_quota_us").exists():
        pytest.skip("no control groups of version 1 here")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"may not make a control group here: {error}")
    try:
        write(group / "cpu.cfs_quota_us", "100000")
        script = (
            "import os, pathlib, sys\n"
            "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
            "from vae_hyperband.common.process import available_cpus, cpu_threads\n"
            "import torch\n"
            "torch.set_num_threads(2)\n"
            "with cpu_threads(None):\n"
            "    print(available_cpus(), torch.get_num_threads())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, group], capture_output=True, text=True, timeout=100
        )
    finally:
        group.rmdir()
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert available_cpus() > 1


def test_threads_are_the_caller_s_where_no_quota_is(monkeypatch):
    monkeypatch.setattr("vae_hyperband.common.process.cpu_quotas", lambda: [])
    before = torch.get_num_threads()
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    monkeypatch.setattr("vae_hyperband.common.process.cpu_quotas", lambda: [0.5])
    with cpu_threads(3):  # what was asked for counts more
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_cost_the_words_and_nothing_else(tmp_path, small_data, closed):
    command = command_line(
        "train", "--run", "a", "--dataset", "custom", "--data-dir", small_data, "--epochs", 1,
        "--device", "cpu", "--batch-size", 32, "--latent-dim", 4,
    )  # fmt: skip
    shell = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {closed}', *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert shell.returncode == 0, shell.stderr
    assert load_ckpt(tmp_path / "checkpoints/a/latest.pt").epoch == 1
    for path in (tmp_path / "logs/a/metrics.jsonl", tmp_path / "logs/a/timing.jsonl"):
        assert all(line.startswith("{") for line in path.read_text().splitlines())
    # the status tells the truth for what goes wrong, too
    wrong = subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {closed}', *command, "--beta", "-1"], timeout=300
    )
    assert wrong.returncode == 2


def test_a_run_in_a_thread_works_without_signals(small_data, options, small_config):
    found = []

    def work() -> None:
        with stop_flag() as should_stop:
            found.append(should_stop())
        found.append(fit(small_config, options(), quiet=True).finished)
        found.append(train_vae.main(["--version"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True, 0]


def test_a_closed_terminal_is_a_signal_to_save_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, too
    try:
        with stop_flag() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert should_stop()
            os.kill(os.getpid(), signal.SIGHUP)  # the shell and the kernel both send it
            assert should_stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_flag() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_fork_that_outlives_a_killed_process_does_not_keep_its_lock(tmp_path):
    script = (
        "import os, pathlib, sys, time\n"
        "from vae_hyperband.common.process import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    folder = tmp_path / "a"
    command = [sys.executable, "-c", script, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with (
                pytest.raises(FolderInUseError, match=f"in use by process {holder.pid} on "),
                only_writer(folder),
            ):
                pass
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            with only_writer(folder):
                pass
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_the_caller_s_modes_change_nothing(options, small_config):
    expected = fit(small_config, options(run="plain"), quiet=True).weights
    modes = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    for name, mode in modes.items():
        with mode:
            assert fit(small_config, options(run=name), quiet=True).weights == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert fit(small_config, options(run="double"), quiet=True).weights == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_modes_are_restored_after_an_error():
    @own_modes()
    def fail() -> None:
        assert torch.get_default_dtype() == torch.float32
        raise KeyError

    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_two_threads_leave_the_caller_s_default_dtype(first_to_leave):
    seen, inside = [], [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]

    def work(number: int) -> None:
        with own_modes():
            inside[number].set()
            assert leave[number].wait(60)
            with own_modes():
                pass
            seen.append(torch.get_default_dtype())

    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for number, thread in enumerate(threads):
            thread.start()
            assert inside[number].wait(60)
        for number in (first_to_leave, 1 - first_to_leave):
            leave[number].set()
            threads[number].join()
        assert torch.get_default_dtype() == torch.float64
        assert seen == [torch.float32, torch.float32]
    finally:
        torch.set_default_dtype(torch.float32)


def test_numbers_of_numpy_and_paths_as_text_are_taken(tmp_path, trained):
    config = TrainConfig(latent_dim=np.int64(8), beta=np.float32(0.5), epochs=np.uint8(3))
    assert config == TrainConfig(latent_dim=8, beta=0.5, epochs=3)
    assert [type(x) for x in (config.latent_dim, config.beta)] == [int, float]
    assert RunOptions(tensorboard=np.bool_(False)).tensorboard is False
    for wrong in ({"latent_dim": 8.5}, {"latent_dim": True}, {"beta": "1"}):
        with pytest.raises(ConfigError, match="must be of type"):
            TrainConfig(**wrong)
    assert RunOptions(checkpoints_dir=str(tmp_path)).checkpoints_dir == tmp_path
    save_ckpt(str(tmp_path / "x.pt"), load_ckpt(trained.best))
    assert load_ckpt(str(tmp_path / "x.pt")).step == load_ckpt(trained.best).step


def test_whatever_the_file_system_says_is_one_sentence(tmp_path, small_data, fork):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    places = [tmp_path / "loop", tmp_path / "file/below", tmp_path / ("long" * 100)]
    train = ["train", "--dataset", "custom", "--epochs", 1, "--device", "cpu"]
    for place in places:
        for arguments in (
            [*train, "--data-dir", place],
            [*train, "--data-dir", small_data, "--checkpoints-dir", place],
            [*train, "--data-dir", small_data, "--logs-dir", place],
            [*train, "--data-dir", small_data, "--resume-ckpt", place],
            ["evaluate", place / "best.pt"],
            ["sample", place / "best.pt", "--out", place / "a.png"],
            ["report", "a", "--logs-dir", place],
            ["data", "--dataset", "custom", "--data-dir", place],
            ["search", "--dataset", "custom", "--data-dir", small_data, "--checkpoints-dir", place],
        ):
            done = fork(*arguments)
            said = done.stderr.strip().splitlines()
            assert done.returncode == 2, (arguments, done.stderr)
            assert len(said) == 1, (arguments, done.stderr)
