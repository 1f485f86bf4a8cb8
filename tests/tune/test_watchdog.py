"""What a process that hangs leaves behind: where it was, whatever it was doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import descendants, until_the_end

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
