"""What a process that hangs leaves behind: where it was, whatever it was doing."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from killing import descendants, until_the_end

from vae_hyperband.tune import worker

# one interpreter imports Ray and PyTorch, its children hang
SCRIPT = """
import os, re, sys
from pathlib import Path
from vae_hyperband.tune.worker import Watchdog

def descend(depth):
    return depth and descend(depth - 1)

def never_ends_in_python():
    while True:
        sum(descend(x % 3) for x in range(20))

def never_ends_in_c():
    re.match("(a+)+$", "a" * 50 + "b")  # exponential, and no other thread runs meanwhile

hang, folder, num_processes = globals()[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
for number in range(num_processes):
    pid = os.fork()
    if not pid:
        with Watchdog(folder / str(number), 0.2):
            hang()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hang", "num_processes", "status"),
    [("never_ends_in_python", 30, "1"), ("never_ends_in_c", 1, "-9")],
)
def test_the_report_of_a_hang_goes_back_to_where_the_process_began(
    hang, num_processes, status, tmp_path
):
    """The stack of a thread that runs, read without stopping it, is cut off one time in five."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, hang, tmp_path, str(num_processes)],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for _ in until_the_end(process, seconds=120):  # what hangs is killed with it
            pass
        said = process.stdout.read()
    assert said.split() == [status] * num_processes
    for number in range(num_processes):
        report = Path(tmp_path / str(number)).read_text()
        assert f"in {hang}\n" in report, report
        assert report.rstrip().endswith("in <module>"), report


@pytest.mark.parametrize("everything", [True, False])
def test_time_in_which_the_process_did_not_run_is_no_hang(everything, tmp_path):
    """Stopped for three times as long as it may hang: alone, or with all that it started."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from vae_hyperband.tune import worker\n"
        "worker.INTERPRETER_SECONDS = 0.5\n"
        "with worker.Watchdog(Path(sys.argv[1]), 1.5):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(0.7)\n"
        "print('well', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "report"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        stopped = descendants(process.pid) if everything else [process.pid]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                os.kill(pid, number)
            time.sleep(6 if number == signal.SIGSTOP else 0)
        assert process.stdout.read() == "well\n"
    assert process.returncode == 0
    assert not (tmp_path / "report").exists()


@pytest.fixture
def no_listener_yet():
    """As in a new process; afterwards, too."""

    def forget():
        # a listener of another test's search ends with this process: nobody waits for it before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            worker._heartbeat.cache_clear()
            gc.collect()

    forget()
    yield
    forget()


def test_without_memory_for_a_listener_the_thread_watches_alone(
    tmp_path, monkeypatch, no_listener_yet
):
    def fail(*_, **__):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(worker.subprocess, "Popen", fail)
    with worker.Watchdog(tmp_path / "report", 1000) as watchdog:
        assert watchdog._thread.is_alive()
    assert not (tmp_path / "report").exists()


def test_each_process_has_a_listener_of_its_own(tmp_path, monkeypatch, no_listener_yet):
    """A fork inherits the memory of its parent, but not that somebody listens to it."""
    started = []
    with open(os.devnull, "wb") as nobody:

        def popen(arguments, **_):
            started.append(arguments[-3])
            return SimpleNamespace(stdin=nobody)

        monkeypatch.setattr(worker.subprocess, "Popen", popen)
        for pid in (101, 101, 102):
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            with worker.Watchdog(tmp_path / "report", 1000):
                pass
    assert started == ["101", "102"]


def test_progress_while_the_seconds_are_counted_is_not_lost(tmp_path):
    watchdog = worker.Watchdog(tmp_path / "report", 4000)
    told = []

    class Counting:
        """What the watching thread looks at between reading and writing the seconds."""

        def __bool__(self):
            told.append(threading.Thread(target=watchdog.restart))
            told[0].start()
            told[0].join(0.5)  # time enough to come in between, if it can
            return True

    with watchdog:
        watchdog._spent, watchdog._counting = 3000.0, Counting()
        deadline = time.monotonic() + 60
        while isinstance(watchdog._counting, Counting) and time.monotonic() < deadline:
            time.sleep(0.01)
        told[0].join()
        time.sleep(0.1)  # for what the other thread may still write
        assert watchdog._spent < 1000


def test_a_listener_whose_process_is_gone_ends_in_silence(tmp_path):
    """Also where a fork of that process still holds the pipe by which it would be told."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from vae_hyperband.tune.worker import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), 600):\n"
        "    fork = os.fork()\n"
        "    if not fork:\n"
        "        time.sleep(600)\n"
        "    print(fork, flush=True)\n"
        "    sys.stdin.readline()\n"
        "    os._exit(0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "report"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        fork = int(process.stdout.readline())
        (listener,) = set(descendants(process.pid)) - {process.pid, fork}
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(60)
        deadline = time.monotonic() + 60
        while _runs(listener) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(listener)
        os.kill(fork, signal.SIGKILL)
        assert process.stderr.read() == ""


def _runs(pid):
    """Whether there is such a process that has not ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False
