"""slurm_job.sh on a real Slurm: whatever happens to a job, its search ends as one left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import command_line, write_idx_folder
from killing import command_lines
from slurm_cluster import Cluster, facts, is_over, sbatch, wait_for

ROOT = Path(__file__).parents[2]
READY = Path(sys.prefix) / ".vae-hyperband-ready"  # what "make setup" looks for
SEARCH = [
    "--device", "cpu", "--dataset", "custom", "--batch-sizes", 32, 64, "--latent-dims", 2, 4,
    "--num-trials", 8, "--max-epochs", 9,
]  # fmt: skip

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_idx_folder(tmp_path_factory.mktemp("data"), num_train=14400, size=12)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> dict:
    """trials.json of the same search without any cluster."""
    folder = tmp_path_factory.mktemp("alone")
    command = command_line("search", "--run", "s", "--data-dir", data, *SEARCH)
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    return json.loads((folder / "checkpoints/s/trials.json").read_text())


@pytest.fixture(scope="module")
def cluster():
    if why := slurm_cluster.unavailable():
        if os.environ.get("CI") and os.geteuid() == 0:
            raise RuntimeError(why)  # there it has to be
        pytest.skip(why)
    with Cluster(nodes=2) as running:
        yield running


@pytest.fixture
def project(tmp_path, cluster) -> Path:
    """A copy of the project, as on the shared storage of a cluster, with this environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "vae_hyperband", tmp_path / "vae_hyperband")
    READY.touch()  # this environment is set up: the tests run in it
    return tmp_path


class Job:
    """One submitted job and where it writes: in the project's folder, or in one with a script."""

    def __init__(self, project: Path, data: Path, *options: object, **env: str) -> None:
        self.project = project
        [script] = [*project.glob("slurm_job.sh"), *project.glob("vae_hyperband/slurm_job.sh")]
        environment = {"VENV": sys.prefix, "PYTHONPATH": str(project)}
        if script.parent == project:  # as after activating the environment
            environment = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
        self.id = sbatch(
            *options, script, "--data-dir", data, *SEARCH, cwd=project, env=environment | env
        )
        self.run = env.get("RUN", f"search-{self.id}")
        self.log = project / f"logs/slurm-{self.id}.log"

    def wait(self, done: str = "", seconds: float = 300) -> None:
        wait_for(self.id, self.log, done, seconds)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def driver(self) -> int:
        """Process id of this job's "vae-hyperband search"."""
        mark = b"\0".join([b"search", b"--run", self.run.encode(), b"--address"])
        [found] = [pid for pid, line in command_lines() if mark in line]
        return found

    def signal_usr1(self) -> None:
        """What Slurm sends to the batch script before the time limit."""
        subprocess.run(["scancel", "-b", "-s", "USR1", self.id], check=True)

    @property
    def result(self) -> dict:
        return json.loads((self.project / f"checkpoints/{self.run}/trials.json").read_text())

    def raylets(self) -> list[int]:
        """Process ids of Ray's node processes of this job."""
        mark = f"vae-ray-{self.id}".encode()
        return [
            pid
            for pid, line in command_lines()
            if line.split(b"\0")[0].endswith(b"/raylet") and mark in line
        ]


def num_training(raylets: list[int]) -> int:
    """On how many of these Ray nodes a trial is being trained."""
    return sum(
        any(title.startswith(b"ray::ImplicitFunc") for _, title in command_lines(raylet))
        for raylet in raylets
    )


def test_two_nodes_share_one_search(project, data, undisturbed):
    job = Job(project, data, "--nodes=2", "--cpus-per-task=1")
    job.wait("epoch 1/9")
    assert "Ray runs on 2 node(s): 2 CPUs" in job.log.read_text()
    raylets = job.raylets()
    assert len(raylets) == 2
    deadline = time.monotonic() + 60
    while num_training(raylets) < 2:
        assert time.monotonic() < deadline
        assert not is_over(job.id), job.said()
        time.sleep(0.2)
    job.wait()
    assert job.result == undisturbed
    assert not Path(f"/tmp/vae-ray-{job.id}").exists()
    assert not job.raylets()


def test_a_job_told_that_its_time_is_nearly_up_requeues_itself_and_goes_on(
    project, data, undisturbed
):
    job = Job(project, data, "--nodes=2", "--cpus-per-task=1")
    job.wait("epoch 2/9")
    job.signal_usr1()
    job.wait("requeueing: the search will continue")
    job.wait("restart 1")
    job.wait()
    assert "resuming the search" in job.log.read_text()
    assert job.result == undisturbed


def test_a_node_whose_ray_is_killed_comes_back_and_loses_nothing(project, data, undisturbed):
    job = Job(project, data, "--nodes=2", "--cpus-per-task=1")
    job.wait("epoch 2/9")
    [worker_node] = [
        pid for pid in job.raylets() if b"--head" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker_node, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(job.raylets()) < 2 and not is_over(job.id):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    job.wait()
    assert job.result == undisturbed


def test_the_time_limit_is_no_end(project, data, undisturbed):
    """One minute, of which Slurm's signal may take all. The search waits for it, however fast it is
    here: its driver is held from the first epoch until the signal has come."""
    job = Job(project, data, "--nodes=2", "--cpus-per-task=1", "--time=1", "--signal=B:USR1@20")
    held, deadline = None, time.monotonic() + 300
    while "the time limit is near" not in (said := job.said()):
        assert time.monotonic() < deadline, said
        assert not is_over(job.id), said
        if held is None and "epoch 1/9" in said:
            held = job.driver()
            os.kill(held, signal.SIGSTOP)
        time.sleep(0.2)
    if held is not None:
        os.kill(held, signal.SIGCONT)
    job.wait("requeueing")
    subprocess.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=10"], check=True)
    job.wait()
    assert int(facts(job.id)["Restarts"]) >= 1
    assert job.result == undisturbed


def test_two_jobs_on_one_host_do_not_disturb_each_other(project, data, undisturbed):
    jobs = [Job(project, data, "--nodes=1", "--cpus-per-task=1", RUN=run) for run in ("a", "b")]
    for job in jobs:
        job.wait("epoch 1/9")
    assert [len(job.raylets()) for job in jobs] == [1, 1]  # at the same time
    for job in jobs:
        job.wait()
        assert job.result == undisturbed


def test_the_printed_script_needs_no_clone_and_an_array_searches_once_per_seed(
    tmp_path, cluster, data, undisturbed
):
    printed = subprocess.run(command_line("slurm"), check=True, capture_output=True, text=True)
    (tmp_path / "slurm_job.sh").write_text(printed.stdout)
    job = Job(tmp_path, data, "--array=0", "--nodes=1", "--cpus-per-task=1", RUN="many")
    job.wait()
    found = json.loads((tmp_path / "checkpoints/many-seed-0/trials.json").read_text())
    assert found == undisturbed
