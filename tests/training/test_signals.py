"""A signal at any moment: the work is saved, the status says so, the same command goes on."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_crashes import train_arguments
from test_resume import digests, scalars

from vae_hyperband.common.process import EXIT_STOPPED, STOP_SIGNALS
from vae_hyperband.training.keeper import newest_good


@pytest.mark.parametrize(
    ("seed", "num_signals"), [(1, 6), pytest.param(4, 40, marks=pytest.mark.faults)]
)
def test_a_signal_at_any_moment_saves_and_the_same_command_goes_on(
    tmp_path, small_data, forks, seed, num_signals
):
    """While loading, training, evaluating, saving, between two of these."""
    arguments = train_arguments(
        "a", small_data, **{"batch-size": 8, "epochs": 12 if num_signals > 10 else 4}
    )
    (tmp_path / "whole").mkdir()
    assert forks.run(arguments, tmp_path / "whole") == 0
    expected = digests(tmp_path / "whole", "a"), scalars(tmp_path / "whole/logs/a")
    rng, stopped, place = random.Random(seed), 0, tmp_path / "cut"
    place.mkdir()
    for i in range(num_signals):
        number = STOP_SIGNALS[i % len(STOP_SIGNALS)]
        before = newest_good(place / "checkpoints/a")
        child = forks.start(arguments, place)
        time.sleep(rng.uniform(0, 0.5))  # a whole run takes some seconds
        sent = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)
        status = forks.wait()
        assert time.monotonic() - sent < 30
        found = newest_good(place / "checkpoints/a")
        if status == EXIT_STOPPED:
            stopped += 1
            assert found
            assert not before or found.step >= before.step
            last_line = (place / "said.txt").read_text().splitlines()[-1]
            assert last_line.startswith("stopped and saved; resume with: ")
        elif status == 0:
            assert (digests(place, "a"), scalars(place / "logs/a")) == expected
            shutil.rmtree(place)
            place.mkdir()
        else:  # before training began there is nothing to save
            assert status in (-number, 128 + number), (place / "said.txt").read_text()
            assert bool(found) == bool(before)
            assert not found or found.step == before.step
    assert forks.run(arguments, place) == 0
    assert (digests(place, "a"), scalars(place / "logs/a")) == expected, f"seed {seed}"
    print(f"seed {seed}: {stopped} of {num_signals} signals came while training")
    assert stopped >= num_signals // 3


# not SIGHUP, which a closed terminal may send twice: tests/common/test_process.py
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(number):
    script = (
        "import os, sys, time\n"
        "from vae_hyperband.common.process import stop_flag\n"
        "with stop_flag() as should_stop:\n"
        f"    os.kill(os.getpid(), {number})\n"
        "    assert should_stop()\n"
        f"    os.kill(os.getpid(), {number})\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + number
    assert done.stderr.count(signal.Signals(number).name) == 1


@pytest.mark.parametrize("reader", ["died of the same Ctrl-C", "has a full disk"])
def test_what_nobody_can_read_does_not_cost_the_save(tmp_path, small_data, reader):
    """As "train 2>&1 | tee log" with Ctrl-C, which ends tee first."""
    arguments = train_arguments("a", small_data, **{"epochs": 4000, "val-interval": 4000})
    command = [sys.executable, "-m", "vae_hyperband.train_vae", *map(str, arguments)]
    end, other = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY) if "full" in reader else other
    process = subprocess.Popen(command, cwd=tmp_path, stdout=full, stderr=full)
    os.close(other)
    latest = tmp_path / "checkpoints/a/latest.pt"
    while not latest.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.close(end)
    before = newest_good(latest.parent).step
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == EXIT_STOPPED
    assert newest_good(latest.parent).step > before
