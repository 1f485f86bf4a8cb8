"""The processes of a search: which there are, where they listen, and SIGKILL for some of them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TRAINING_SECONDS = 3.0  # the longest that a kill lets a search train: it is to outlast them
RUN_SECONDS = 600.0  # the longest that a command may take


def descendants(pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(after_name[1])
    found, frontier = [pid], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def started_after(begun: float, pid: int) -> bool:
    """Whether the process was started after that moment of CLOCK_BOOTTIME, and still runs."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    ticks = os.sysconf("SC_CLK_TCK")  # the file says a whole number of them
    return int(after_name[19]) >= int(begun * ticks)


def command_lines(root: int = 1) -> list[tuple[int, bytes]]:
    """Process id and command line, its words ended by zero bytes, of all that root started."""
    found = []
    for pid in descendants(root):
        try:
            found.append((pid, Path(f"/proc/{pid}/cmdline").read_bytes()))
        except OSError:  # it has just ended
            continue
    return found


def until_the_end(
    process: subprocess.Popen[bytes], pause: float = 0.05, seconds: float = RUN_SECONDS
) -> Iterator[None]:
    """Again and again, as long as the process lives; what outlives its time is killed, an error."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            kill("everything", process.pid, np.random.default_rng())
            raise AssertionError(f"not at its end after {seconds} s")
        yield
        time.sleep(pause)


def trial_workers(pid: int) -> list[int]:
    """Ray's processes that train the trials of the driver with that process id."""
    return ray_workers(pid, "ImplicitFunc")


def ray_workers(pid: int, kind: str) -> list[int]:
    """Ray's processes of a driver whose actors are of that class."""
    title = f"ray::{kind}".encode()
    return [child for child, line in command_lines(pid) if line.startswith(title)]


def idle_workers(pid: int) -> list[int]:
    """Those of :func:`trial_workers` that run no task: Ray would name it behind a dot."""
    return [
        child
        for child, line in command_lines(pid)
        if line.startswith(b"ray::ImplicitFunc") and b"." not in line.split(b"\0")[0]
    ]


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which those processes wait for TCP connections or UDP packets."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(handle))
            except OSError:
                continue
            inodes |= {found[1]} if found else set()
    addresses = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6), ("udp", 2)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            waits = fields[3] == "0A" or table == "udp"
            if waits and fields[9] in inodes:
                address, port = fields[1].split(":")
                raw = bytes.fromhex(address)
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                addresses.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return addresses


def kill(kind: str, driver: int, random: np.random.Generator) -> bool:
    """Whether there was something of that kind to kill."""
    if kind == "driver":
        victims = [driver]
    elif kind == "worker":
        workers = [*trial_workers(driver), *ray_workers(driver, "Packer")]
        victims = [int(random.choice(workers))] if workers else []
    else:
        victims = descendants(driver)
    return sum(map(sigkill, victims)) > 0


def sigkill(pid: int) -> bool:
    """Whether there was such a process to kill."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def run_with_kills(
    command: list[str],
    folder: Path,
    random: np.random.Generator,
    kinds: list[str],
    start_seconds: float,
) -> None:
    """Give the command until it ends with status 0, with kills of those kinds on the way.

    Half of them come during the start, which takes about ``start_seconds``, half in the seconds
    after it. Takes out of ``kinds`` what was killed. What the commands said is in said.txt.
    """
    with (folder / "said.txt").open("wb") as said:
        while True:
            process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
            deadline = time.monotonic() + RUN_SECONDS
            while kinds and process.poll() is None and time.monotonic() < deadline:
                earliest, latest = 0.0, start_seconds
                if random.random() < 0.5:
                    earliest, latest = start_seconds, start_seconds + TRAINING_SECONDS
                time.sleep(random.uniform(earliest, latest))
                if process.poll() is None and kill(kinds[-1], process.pid, random):
                    kinds.pop()
                    time.sleep(0.2)
            for _ in until_the_end(process):
                pass
            if process.returncode == 0:
                return
            assert process.returncode == -signal.SIGKILL, (folder / "said.txt").read_text()[-3000:]
