"""Ray itself: one of our own on loopback for the time of a search, or a cluster that is there."""

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

from vae_hyperband.common.errors import SearchError
from vae_hyperband.search.config import SearchOptions

#: No usage report, no second set of logs, no advice between our lines; the user's own values win.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # that a process died is one line of ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours stops in order, too, and SIGTERM as well
    "TUNE_MAX_PENDING_TRIALS_PG": "16",  # start the workers of a large machine side by side
}


@contextmanager
def ray_for(options: SearchOptions) -> Iterator[None]:
    """A connection to the cluster at --address, or a Ray of our own on loopback, then stopped."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = signal.getsignal(signal.SIGTERM)
    if options.address:
        _join(options.address, quiet)
    else:
        # a Ray on the same machine that does not answer is dead; Ray would wait for a minute
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
        # Ray takes loopback to be a mistake where there may be clusters, and would listen on the
        # address by which other machines reach this one
        clusters = ray_constants.ENABLE_RAY_CLUSTER
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
    signal.signal(signal.SIGTERM, before)  # ray.init sets one of its own, which exits at once
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, quiet: dict[str, Any]) -> None:
    """Join a running cluster; asked first whether it is one, since Ray would knock for minutes."""
    asked = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # a closed port says so at once, Ray's own check after its time-out
            socket.create_connection((host, int(port)), timeout=10).close()
        if address != "auto":
            subprocess.run(asked, check=True, capture_output=True, timeout=20)
        ray.init(address=address, **quiet)
    except (OSError, OverflowError, subprocess.SubprocessError, RuntimeError, ValueError) as error:
        raise SearchError(
            f"No Ray cluster answers at {address}: start one with ray start --head and give its "
            "address (host:port), or leave out --address."
        ) from error


#: What one machine has of each kind: {"CPU": 8, "GPU": 1}.
Resources = dict[str, float]


def nodes() -> list[Resources]:
    """The machines of the cluster as they are now; nodes may come and go."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def with_gpus(options: SearchOptions, machines: list[Resources]) -> SearchOptions:
    """The options with their GPUs per trial filled in.

    "auto" takes a whole GPU per trial if there is one; several trials share one if
    --gpus-per-trial says a fraction.
    """
    if options.gpus_per_trial is not None:
        return options
    wanted = options.device.startswith("cuda")
    if options.device == "auto":
        wanted = any(machine.get("GPU", 0) > 0 for machine in machines)
    return dataclasses.replace(options, gpus_per_trial=float(wanted))


def trial_device(options: SearchOptions) -> str:
    """What a trial computes on: the GPU that Ray shows it as its only one, or the CPU."""
    return "cuda" if options.gpus_per_trial else "cpu"


def num_places(machines: list[Resources], options: SearchOptions) -> int:
    """How many trials can run side by side."""
    places = 0
    for machine in machines:
        on_machine = int(machine.get("CPU", 0) // options.cpus_per_trial)
        if options.gpus_per_trial:
            on_machine = min(on_machine, int(machine.get("GPU", 0) / options.gpus_per_trial))
        places += on_machine
    return max(1, min(places, options.max_concurrent or places))


def trial_resources(options: SearchOptions) -> Resources:
    """What Ray keeps free for each trial."""
    return {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial or 0}


def check_resources(machines: list[Resources], options: SearchOptions) -> None:
    """Without this, Ray would wait for resources that never come."""
    asked = {"CPU": options.cpus_per_trial, "GPU": options.gpus_per_trial or 0}
    for kind, amount in asked.items():
        most = max((machine.get(kind, 0.0) for machine in machines), default=0.0)
        if amount > most:
            raise SearchError(
                f"A trial asks for {amount:g} {kind}, but no machine has more than {most:g}: lower "
                f"--{kind.lower()}s-per-trial."
            )
