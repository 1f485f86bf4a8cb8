"""A real Slurm of several nodes on this host, without systemd, every address on loopback."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
# the base states of a job that runs no more (Slurm's "Job State Codes")
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
)  # fmt: skip
SPOOL = Path("/var/spool/vae-hyperband-slurm")
CONFIG = Path("/etc/slurm/slurm.conf")

SETTINGS = {
    "ClusterName": "onehost",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "StateSaveLocation": f"{SPOOL}/ctld",
    "SlurmdSpoolDir": f"{SPOOL}/%n",
    "SlurmctldPidFile": f"{SPOOL}/slurmctld.pid",
    "SlurmdPidFile": f"{SPOOL}/%n.pid",
    "SlurmctldLogFile": f"{SPOOL}/slurmctld.log",
    "SlurmdLogFile": f"{SPOOL}/%n.log",
    "SlurmctldPort": "16817",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SwitchType": "switch/none",
    "MpiDefault": "none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "JobCompType": "jobcomp/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "bf_interval=5,sched_interval=5,batch_sched_delay=1",
    "SlurmdParameters": "config_overrides",  # nodes of one CPU each on a machine with more
    "ReturnToService": "2",
    "JobRequeue": "1",
    "KillWait": "5",
    "MinJobAge": "3600",
}


def unavailable() -> str:
    """Why no Slurm can be started here, or nothing. Root may install Debian's package."""
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    if not all(map(shutil.which, PROGRAMS)) and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
        subprocess.run([*install, "slurm-wlm", "munge"], capture_output=True, check=False)
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    if CONFIG.exists():
        return f"{CONFIG} is there already: this machine has a Slurm of its own"
    return ""


class Cluster:
    """``with Cluster(nodes=2):`` and sbatch works, one CPU per node."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        host = socket.gethostname().split(".")[0]
        shutil.rmtree(SPOOL, ignore_errors=True)
        (SPOOL / "ctld").mkdir(parents=True)
        lines = [f"{name}={value}" for name, value in SETTINGS.items()]
        lines.append(f"SlurmctldHost={host}(127.0.0.1)")
        for i, node in enumerate(self.nodes):
            (SPOOL / node).mkdir()
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={17001 + i} CPUs=1 "
                "RealMemory=4000"
            )
        lines.append(f"PartitionName=debug Nodes={','.join(self.nodes)} Default=YES State=UP")
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text("\n".join(lines) + "\n")
        self._started_munge = subprocess.run(["pgrep", "-x", "munged"], check=False).returncode != 0
        if self._started_munge:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
        self._start("slurmctld", "-D", "-c")
        time.sleep(1)
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 30
        while self._idle() < len(self.nodes):
            assert time.monotonic() < deadline, (SPOOL / "slurmctld.log").read_text()
            time.sleep(0.3)
        return self

    def _start(self, *command: str) -> None:
        quiet = subprocess.DEVNULL
        self._daemons.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))

    def _idle(self) -> int:
        said = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True
        ).stdout
        return len(said.split())

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "-u", "root"], check=False)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        if self._started_munge:
            subprocess.run(["pkill", "-x", "munged"], check=False)
        CONFIG.unlink()
        shutil.rmtree(SPOOL, ignore_errors=True)


def sbatch(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Submit, and return the job's number."""
    command = ["sbatch", "--parsable", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def facts(job: str) -> dict[str, str]:
    """What scontrol says of a job."""
    done = subprocess.run(
        ["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=True
    )
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def is_over(job: str) -> bool:
    """Whether it has ended. One that has not may show more than PENDING and RUNNING: passing flags,
    such as SIGNALING and CONFIGURING, hide these."""
    return facts(job)["JobState"] in ENDED


def wait_for(job: str, log: Path, done: str = "", seconds: float = 300) -> None:
    """Until the job has ended, or its log says ``done``; a job put back is started at once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = facts(job)  # before the log: what an ended job has said is all there
        said = log.read_text() if log.exists() else ""
        if done and done in said:
            return
        if now["JobState"] == "PENDING" and now["Restarts"] != "0":  # Slurm would wait two minutes
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True
            )
        if now["JobState"] in ENDED:
            assert (now["JobState"], done) == ("COMPLETED", ""), said
            return
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s:\n{log.read_text() if log.exists() else ''}")
