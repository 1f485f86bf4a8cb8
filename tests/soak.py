"""Random runs under random faults, for as long as it is given: ``make soak MINUTES=60``.

Each case has a seed of its own, which chooses a configuration and a chain of faults: kills,
signals, ends at the n-th change to a file, full disks, flipped bits, cut files, lost files, torn
logs, a second process in the same folder, suspension, closed streams, no home, corrected labels.
After the last one the run is let through, and has to leave the bytes of the same run without any
fault. A case that does not prints the line that repeats it; kills and signals depend on the clock,
too, so that it may take a few tries.
"""

import argparse
import collections
import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conftest import command_line, write_idx_folder
from forking import Forks, kill

from vae_hyperband.common.errors import CheckpointError
from vae_hyperband.common.process import EXIT_STOPPED, STOP_SIGNALS
from vae_hyperband.model.likelihoods import LIKELIHOODS
from vae_hyperband.training import keeper

sys.path.insert(0, str(Path(__file__).parent / "training"))
from test_resume import digests, scalars

CHOICES: dict[str, list[object]] = {
    "latent-dim": [1, 3, 8],
    "batch-size": [8, 17, 32, 300],
    "epochs": [1, 2, 4],
    "val-interval": [1, 2, 3],
    "ckpt-seconds": [0, 0.02, 60],
    "keep-ckpts": [0, 1, 3],
    "log-interval": [1, 7, 100],
    "beta": [1, 4, 0.1],
    "learning-rate": [0.001, 0.008],
    "schedule": ["one-cycle", "constant"],
    "objective": ["elbo", "free-bits", "capacity", "beta-tc", "iwae"],
    "prior": ["normal", "vamp"],
    "likelihood": list(LIKELIHOODS),
    "binarize": ["none", "dynamic"],
    "kl-warmup-epochs": [0, 1],
    "seed": [0, 1],
}


class Case:
    """One run and what happens to it."""

    def __init__(self, seed: int, forks: Forks, data: Path, place: Path) -> None:
        self.random, self.forks, self.place, self.data = random.Random(seed), forks, place, data
        chosen = {name: self.random.choice(values) for name, values in CHOICES.items()}
        if chosen["objective"] == "beta-tc":
            chosen["prior"] = "normal"
            chosen["beta"] = 4
        if chosen["binarize"] == "dynamic":
            chosen["likelihood"] = "bernoulli"
        if chosen["prior"] == "vamp":
            chosen["objective"] = self.random.choice(["elbo", "iwae"])
        if chosen["objective"] == "iwae":
            chosen["beta"], chosen["kl-warmup-epochs"] = 1, 0
        self.arguments: list[object] = ["train", "--run", "a", "--dataset", "custom"]
        self.arguments += ["--data-dir", data, "--device", "cpu", "--num-threads", 1]
        for name, value in chosen.items():
            self.arguments += [f"--{name}", value]
        self.happened: list[str] = []

    @property
    def ckpts(self) -> list[Path]:
        return sorted((self.place / "checkpoints/a").glob("*.pt"))

    def run(self, **how: int) -> int:
        return self.forks.run(self.arguments, self.place, **how)

    def said(self) -> str:
        path = self.place / "said.txt"
        return path.read_text() if path.exists() else ""

    def go(self, seconds: float) -> str | None:
        """What was wrong, if anything. ``seconds`` is how long the run takes."""
        faults: list[Callable[[float], str | None]] = [
            self.kill, self.kill, self.signal, self.end_at_a_change, self.fill_the_disk,
            self.flip_a_bit, self.cut_a_file, self.lose_a_file, self.tear_the_log, self.be_two,
            self.suspend, self.close_the_streams, self.lose_the_home, self.correct_the_labels,
        ]  # fmt: skip
        for _ in range(self.random.randint(1, 6)):
            fault = self.random.choice(faults)
            self.happened.append(fault.__name__)
            if wrong := fault(seconds):
                return wrong
            if "Traceback" in self.said():
                return "a traceback"
        status = self.run()
        return None if status == 0 else f"status {status} at the end"

    def kill(self, seconds: float) -> str | None:
        child = self.forks.start(self.arguments, self.place)
        time.sleep(self.random.uniform(0, seconds))
        kill(child)
        status = self.forks.wait()
        return None if status in (0, -signal.SIGKILL) else f"status {status} after a kill"

    def signal(self, seconds: float) -> str | None:
        number = self.random.choice(STOP_SIGNALS)
        child = self.forks.start(self.arguments, self.place)
        time.sleep(self.random.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        status = self.forks.wait()
        fine = status in (0, EXIT_STOPPED, -number, 128 + number)
        return None if fine else f"status {status} after {signal.Signals(number).name}"

    def end_at_a_change(self, seconds: float) -> str | None:
        status = self.run(die_at=int(10 ** self.random.uniform(0, 3.5)))
        return None if status in (0, 9) else f"status {status} after an end at a change to a file"

    def fill_the_disk(self, seconds: float) -> str | None:
        room = int(10 ** self.random.uniform(3, 6.5))
        status = self.run(max_file_bytes=room)
        return None if status in (0, 2) else f"status {status} with {room} bytes of room"

    def flip_a_bit(self, seconds: float) -> str | None:
        def flipped(content: bytes) -> bytes:
            changed = bytearray(content)
            changed[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            return bytes(changed)

        return self.damage(flipped)

    def cut_a_file(self, seconds: float) -> str | None:
        return self.damage(lambda content: content[: self.random.randrange(len(content))])

    def damage(self, change: Callable[[bytes], bytes]) -> str | None:
        """To all checkpoints but one at most; then it has to go on from a good one."""
        if not self.ckpts:
            return None
        for path in self.random.sample(self.ckpts, max(1, len(self.ckpts) - 1)):
            path.write_bytes(change(path.read_bytes()))
        return self.judge()

    def lose_a_file(self, seconds: float) -> str | None:
        if self.ckpts:
            self.random.choice(self.ckpts).unlink()
        return self.judge()

    def judge(self) -> str | None:
        """Where too much is damaged, the run has to say so; without a best one it ends else."""
        best = self.place / "checkpoints/a/best.pt"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = keeper.newest_good(best.parent)
            if found and not best.exists() and keeper._lacks_best(found, None):
                self.begin_anew()
        except CheckpointError:
            status = self.run()
            if status != 2 or "damaged" not in self.said().splitlines()[-1]:
                return f"status {status} where too many checkpoints are damaged"
            self.begin_anew()
        return None

    def begin_anew(self) -> None:
        for path in self.ckpts:
            path.unlink()

    def tear_the_log(self, seconds: float) -> str | None:
        log = self.place / "logs/a/metrics.jsonl"
        if log.exists():
            with log.open("ab") as file:
                file.write(self.random.choice([b'{"step": 99', b"\0" * 40, b"}\n", b"\xff\xfe"]))
        return None

    def be_two(self, seconds: float) -> str | None:
        """A process holds the run's folder while the same command is given."""
        lock = "import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        lock += "print('held', flush=True)\nsys.stdin.read()\n"
        folder = self.place / "checkpoints"
        folder.mkdir(exist_ok=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", lock, str(folder / ".a.lock")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdout is not None
        holder.stdout.readline()
        before = [path.read_bytes() for path in self.ckpts]
        status = self.run()
        untouched = before == [path.read_bytes() for path in self.ckpts]
        holder.communicate("")
        return None if status == 2 and untouched else f"status {status} beside another process"

    def suspend(self, seconds: float) -> str | None:
        """As a laptop's lid, ``docker pause`` or Slurm's SUSPEND do."""
        child = self.forks.start(self.arguments, self.place)
        time.sleep(self.random.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGSTOP)
            time.sleep(self.random.uniform(0, 1))
            os.kill(child, signal.SIGCONT)
        status = self.forks.wait()
        return None if status == 0 else f"status {status} after a suspension"

    def close_the_streams(self, seconds: float) -> str | None:
        """As a batch system does that wants no output."""
        closed = self.random.choice(["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
        status = self.in_shell(f'exec "$@" {closed}')
        return None if status == 0 else f"status {status} with {closed}"

    def lose_the_home(self, seconds: float) -> str | None:
        """As in a container whose user has no entry and no folder."""
        lost = self.random.choice(["unset HOME", "export HOME=/nonexistent", "export HOME="])
        status = self.in_shell(f'{lost}; exec "$@"')
        return None if status == 0 else f"status {status} after {lost}"

    def in_shell(self, script: str) -> int:
        """The status of a process of its own, begun as the script begins it."""
        with (self.place / "said.txt").open("ab") as said:
            return subprocess.run(
                ["bash", "-c", script, "bash", *command_line(*self.arguments)],
                cwd=self.place, stdout=said, stderr=said, timeout=300, check=False,
            ).returncode  # fmt: skip

    def correct_the_labels(self, seconds: float) -> str | None:
        """What was fitted to labels is fitted again when they change; the run itself goes on."""
        if not (self.place / "checkpoints/a/best.pt").exists():
            return None
        data = self.place / "data"
        if not data.exists():
            shutil.copytree(self.data, data)
        self.arguments[self.arguments.index("--data-dir") + 1] = data
        labels = data / "train-labels-idx1-ubyte"
        content = bytearray(labels.read_bytes())
        content[8:] = self.random.sample(bytes(content[8:]), len(content) - 8)
        labels.write_bytes(content)
        pictures = []
        for fresh in (False, True):  # with what an earlier call may have fitted, and without
            if fresh:
                for fitted in (self.place / "checkpoints/a").glob("*mixture*"):
                    fitted.unlink()
            status = self.forks.run(
                [
                    "sample", "a", "--data-dir", data, "--device", "cpu", "--sampler",
                    "mixture", "--label", 1, "--num-samples", 4, "--out", "labels.npy",
                ],
                self.place,
            )  # fmt: skip
            if status != 0:
                return f"status {status} of sample with corrected labels"
            pictures.append((self.place / "labels.npy").read_bytes())
            (self.place / "labels.npy").unlink()
        return None if pictures[0] == pictures[1] else "a mixture of labels that were corrected"


def one_case(seed: int, forks: Forks, data: Path) -> tuple[str | None, Case]:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        place = Path(folder)
        (place / "whole").mkdir()
        (place / "cut").mkdir()
        case = Case(seed, forks, data, place / "whole")
        started = time.monotonic()
        if (status := case.run()) != 0:
            return f"status {status} without any fault: {case.said()[-300:]}", case
        seconds = time.monotonic() - started
        expected = digests(place / "whole", "a"), scalars(place / "whole/logs/a")
        case.place = place / "cut"
        wrong = case.go(seconds)
        if wrong is None:
            found = digests(case.place, "a"), scalars(case.place / "logs/a")
            if found != expected:
                wrong = f"another end: {found[0]} instead of {expected[0]}"
        return wrong and f"{wrong}\n{case.said()[-1500:]}", case


def main() -> int:
    # that steps were computed again is what its reader of event files warns of
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the first case")
    parser.add_argument("--cases", type=int, default=10**9)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    end, failures, faults = time.monotonic() + 60 * args.minutes, 0, collections.Counter()
    with tempfile.TemporaryDirectory() as folder, Forks() as forks:
        data = write_idx_folder(Path(folder) / "data")
        num_cases = 0
        while num_cases < args.cases and time.monotonic() < end:
            wrong, case = one_case(seed + num_cases, forks, data)
            faults.update(case.happened)
            if wrong:
                failures += 1
                print(f"FAILED after {', '.join(case.happened)}: {wrong}")
                print(f"  run: {' '.join(map(str, case.arguments))}")
                print(f"  repeat it: python tests/soak.py --cases 1 --seed {seed + num_cases}")
            num_cases += 1
            if num_cases % 20 == 0:
                print(f"{num_cases} cases, {failures} failed", flush=True)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(faults.items()))
    print(f"{num_cases} cases from seed {seed}, {failures} failed; faults: {counts}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
