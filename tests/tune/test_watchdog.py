"""What a process that hangs leaves behind: where it was, whatever it was doing."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    ("hang", "num_processes"), [("never_ends_in_python", 30), ("never_ends_in_c", 1)]
)
def test_the_report_of_a_hang_goes_back_to_where_the_process_began(hang, num_processes, tmp_path):
    """The stack of a thread that runs, read without stopping it, is cut off one time in five."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, hang, tmp_path, str(num_processes)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["1"] * num_processes, done.stderr
    for number in range(num_processes):
        report = Path(tmp_path / str(number)).read_text()
        assert f"in {hang}\n" in report, report
        assert report.rstrip().endswith("in <module>"), report
