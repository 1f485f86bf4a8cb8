"""The Ray session of a search: a local one on loopback while it runs, or an existing cluster."""

import dataclasses
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import SearchError, first_line
from vae_hyperband.common.process import HANGUP, available_cpus, cpus_of_affinity, in_main_thread
from vae_hyperband.search.config import SearchOptions

#: No usage report, no second set of logs, no advice between the console's lines. Ray reads these
#: from the environment; what the user has set there wins.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the console reports a dead worker in one line
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # stop_flag handles it, and SIGTERM, too
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # start the workers of a large machine side by side
}


MAX_SOCKET_BYTES = 107  # sun_path of unix(7), without the zero byte at its end
SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.0"  # the longest one


@contextmanager
def ray_for(options: SearchOptions) -> Iterator[None]:
    """Connect to the cluster at --address, or start a local Ray and stop it in the end.

    Raises :class:`SearchError` if no cluster answers, or the local one does not start.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    init = functools.partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    before = signal.getsignal(signal.SIGTERM)
    if options.address:
        _join(options.address, init)
    else:
        for note in quota_note(options):
            print(f"note: {note}", flush=True)
        # a local Ray that does not answer is dead; by default Ray would wait for a minute
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
        # where it supports clusters (Linux), Ray replaces a loopback address by the one that other
        # machines reach: then anyone on the network could run code here
        clusters = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False
        # its processes inherit this: a closed terminal is for the search, which then ends them
        ignores = HANGUP is not None and in_main_thread()
        hangup = signal.signal(HANGUP, signal.SIG_IGN) if ignores else None
        try:
            init(
                address="local",
                # the cores of this process, as Slurm or a container limits it, not the machine's
                num_cpus=local_cpus(options),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=short_temp_dir(),
            )
        # whatever its processes and its own code raise: a full disk, a path, a port, a time-out
        except Exception as error:
            said = first_line(error)
            raise SearchError(
                f"Ray cannot be started on this machine ({said}): correct that, or join a running "
                "cluster with --address."
            ) from error
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
            if ignores:
                signal.signal(HANGUP, hangup)
    if in_main_thread():
        signal.signal(signal.SIGTERM, before)  # ray.init sets a handler that exits at once
    try:
        yield
    finally:
        ray.shutdown()


def local_cpus(options: SearchOptions) -> int:
    """How many CPUs a local Ray has for trials: those that this process may keep busy.

    A trial that needs more than a control group's quota runs alone, if the affinity has its CPUs.
    """
    # a search that began elsewhere has to go on with its threads, on which the bits depend; a
    # quota makes them wait, but an affinity without a CPU for each is for the user to know about
    return max(available_cpus(), min(options.cpus_per_trial, cpus_of_affinity()))


def quota_note(options: SearchOptions) -> list[str]:
    """Says where a trial on this machine has more threads than the quota has CPUs."""
    quota, threads = available_cpus(), options.cpus_per_trial
    if options.address or not quota < threads <= local_cpus(options):
        return []
    return [
        f"the CPU quota here is {plural(quota, 'CPU')}: one trial at a time, whose {threads} "
        "threads wait for each other"
    ]


def short_temp_dir() -> str | None:
    """A folder for the session of a local Ray; None where Ray's own choice will do.

    The paths of its sockets may have 107 bytes, whatever TMPDIR is. Windows has no such sockets.
    """
    if not hasattr(os, "geteuid"):
        return None
    # as Ray looks for it, whether the folder exists or not
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    if len(os.fsencode(os.path.join(usual, "ray", SOCKET))) <= MAX_SOCKET_BYTES:
        return None
    return f"/tmp/ray-{os.geteuid()}"  # noqa: S108, where Ray's sessions are by default


def _join(address: str, init: Callable[..., object]) -> None:
    """Join a running cluster by ``init``. Raises :class:`SearchError` if there is none."""
    # checked first, since ray.init would keep trying for minutes
    health_check = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        "--address",
        address,
    ]
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # a closed port refuses at once; Ray's own check takes its time-out
            socket.create_connection((host, int(port)), timeout=10).close()
        if address != "auto":
            # in a process of its own, which can be given a time limit
            subprocess.run(health_check, check=True, capture_output=True, timeout=20)
        init(address=address)
    except (OSError, OverflowError, subprocess.SubprocessError, RuntimeError, ValueError) as error:
        raise SearchError(
            f"No Ray cluster answers at {address}: start one with ray start --head and give its "
            "address (host:port), or leave out --address."
        ) from error


#: Amounts by kind, of one machine or for one trial: {"CPU": 8, "GPU": 1}.
Resources = dict[str, float]


def nodes() -> list[Resources]:
    """The resources of each machine of the cluster at this moment; machines may come and go."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def with_gpus(options: SearchOptions, machines: list[Resources]) -> SearchOptions:
    """The options with ``gpus_per_trial`` filled in.

    With --device auto, a whole GPU per trial if any machine has one, else none.
    """
    # never a fraction unless told: two models that fit a GPU alone may not fit it together
    if options.gpus_per_trial is not None:
        return options
    wanted = options.device.startswith("cuda")
    if options.device == "auto":
        wanted = any(machine.get("GPU", 0) > 0 for machine in machines)
    return dataclasses.replace(options, gpus_per_trial=float(wanted))


def trial_device(options: SearchOptions) -> str:
    """The device of every trial: "cuda" is the GPU that Ray shows it as its only one, or "cpu"."""
    return "cuda" if options.gpus_per_trial else "cpu"


def num_concurrent(machines: list[Resources], options: SearchOptions) -> int:
    """How many trials can run in parallel; at least 1."""
    total = 0
    for machine in machines:
        # by machine: the free cores of two of them do not add up to one trial
        on_machine = int(machine.get("CPU", 0) // options.cpus_per_trial)
        if options.gpus_per_trial:
            on_machine = min(on_machine, int(machine.get("GPU", 0) / options.gpus_per_trial))
        total += on_machine
    return max(1, min(total, options.max_concurrent or total))


def trial_resources(options: SearchOptions) -> Resources:
    """What Ray reserves for each trial; its keys are in lower case here."""
    return {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial or 0}


def check_resources(machines: list[Resources], options: SearchOptions) -> None:
    """Raise :class:`SearchError` if no machine can run a trial."""
    # Ray would wait without a word: on a cluster that grows, the resources may yet come
    needed = {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial or 0}
    for kind, amount in needed.items():
        most = max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        if amount > most:
            raise SearchError(
                f"A trial needs {amount:g} {kind}, but no machine has more than {most:g}: lower "
                f"--{kind.lower()}s-per-trial."
            )
