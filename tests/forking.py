"""The command line in children of a process that has imported everything: in 0.1 s instead of 3.

``Forks`` is a context; ``start`` gives the process id of a real process that does what
``vae-hyperband ...`` does, which can be killed, and ``wait`` its status. This file is also the
program that forks them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self


class Forks:
    def __enter__(self) -> Self:
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env,
        )  # fmt: skip
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=60)

    def start(self, argv: list[object], cwd: Path, **how: Any) -> int:
        """Begin ``vae-hyperband argv``; what it says goes to said.txt. For ``how`` see _child."""
        job = {"argv": [str(argument) for argument in argv], "cwd": str(cwd), **how}
        self._server.stdin.write(json.dumps(job) + "\n")
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """The status of the one that was started last, as subprocess gives it."""
        return int(self._server.stdout.readline())

    def run(self, argv: list[object], cwd: Path, **how: Any) -> int:
        self.start(argv, cwd, **how)
        return self.wait()


def _serve() -> None:
    import torch._dynamo  # noqa: F401, which AdamW imports when it is first used

    from vae_hyperband.commands import train

    train.print_training_summary = lambda *_: (
        None
    )  # its pictures take seconds, and are others' subject

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(**job)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(
    argv: list[str],
    cwd: str,
    die_at: int | None = None,
    max_file_bytes: int | None = None,
    max_memory_bytes: int | None = None,
) -> None:
    """End before the ``die_at``-th change to a file; bound what files and memory may take."""
    import resource
    import traceback

    from vae_hyperband import train_vae

    os.chdir(cwd)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for handle, number in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(handle, number)
    status = 1
    try:
        if die_at is not None:
            from disk import end_before

            end_before(die_at, Path(cwd))
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        if max_memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
        status = train_vae.main(argv)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
