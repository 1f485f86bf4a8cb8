"""The command line in children of a process that has imported everything: in 0.1 s instead of 3.

``Forks`` is a context; ``start`` gives the process id of a real process that does what
``vae-hyperband ...`` does, which can be killed, and ``wait`` its status. This file is also the
program that forks them.

A child may do all that does not start Ray: threads that Ray's import has started are not forked.
Commands that import Ray are forked by a process of their own: a child without those threads may
wait for them for ever when it runs out of memory.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self


class Forks:
    def __enter__(self) -> Self:
        self._servers: dict[bool, subprocess.Popen[str]] = {}  # without and with Ray
        self._child = 0  # the one that was started and has not been waited for
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.communicate(timeout=60)

    def _server_for(self, command: str) -> subprocess.Popen[str]:
        """The process that has imported what the command needs; started when first asked for."""
        needs_ray = command in ("search", "run")
        if needs_ray not in self._servers:
            env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
            module = "vae_hyperband.commands." + ("run" if needs_ray else "train")
            self._servers[needs_ray] = server = subprocess.Popen(
                [sys.executable, __file__, module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env,
            )  # fmt: skip
            assert server.stdout.readline() == "ready\n"
        return self._servers[needs_ray]

    def start(self, argv: list[object], cwd: Path, **how: Any) -> int:
        """Begin ``vae-hyperband argv``; what it says goes to said.txt. For ``how`` see _child."""
        if self._child:  # of a test that failed
            kill(self._child)
            self.wait()
        job = {"argv": [str(argument) for argument in argv], "cwd": str(cwd), **how}
        self._server = self._server_for(job["argv"][0])
        self._server.stdin.write(json.dumps(job) + "\n")
        self._child = int(self._server.stdout.readline())
        return self._child

    def wait(self, seconds: float = 900) -> int:
        """The status of the one that was started last, as subprocess gives it.

        One that takes longer than that is killed.
        """
        child, killed = self._child, []

        def end() -> None:
            killed.append(child)
            kill(child)

        late = threading.Timer(seconds, end)
        late.start()
        try:
            status = int(self._server.stdout.readline())
        finally:
            late.cancel()
        self._child = 0
        assert not killed, f"not at its end after {seconds} s"
        return status

    def run(self, argv: list[object], cwd: Path, **how: Any) -> int:
        self.start(argv, cwd, **how)
        return self.wait()

    def completed(
        self, argv: list[object], cwd: Path, folder: Path, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run gives it. What the command says is kept in ``folder``."""
        said, errors = folder / "stdout.txt", folder / "stderr.txt"
        for path in (said, errors):
            path.unlink(missing_ok=True)
        status = self.run(argv, cwd, said=str(said), errors=str(errors), pictures=True, **how)
        return subprocess.CompletedProcess(argv, status, said.read_text(), errors.read_text())


def _serve(module: str) -> None:
    import torch._dynamo  # noqa: F401, which AdamW imports when it is first used

    import vae_hyperband

    importlib.import_module(module)
    # what commands import when they run, each child would import again
    for later in ("training.dry_run", "reporting.summaries"):
        importlib.import_module(f"vae_hyperband.{later}")
    for name in vae_hyperband.__all__:
        getattr(vae_hyperband, name)
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
    said: str = "said.txt",
    errors: str | None = None,
    pictures: bool = False,
    umask: int | None = None,
) -> None:
    """End before the ``die_at``-th change to a file; bound what files and memory may take.

    Output goes to the file ``said``, that of stderr to ``errors`` if that is given.
    """
    import resource
    import traceback

    from vae_hyperband import train_vae
    from vae_hyperband.reporting import summaries

    os.chdir(cwd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(said, flags)
    for handle, number in ((nothing, 0), (out, 1), (os.open(errors, flags) if errors else out, 2)):
        os.dup2(handle, number)
    if not pictures:  # they take seconds, and are others' subject
        summaries.print_training_summary = lambda *_: None
    if umask is not None:
        os.umask(umask)
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
    except SystemExit as stop:  # tyro's end of a completion, as of --help
        sys.stdout.flush()
        status = 1 if stop.code and not isinstance(stop.code, int) else stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
