"""Train a few betas side by side and watch them in TensorBoard, in one command.

    python -m vae_hyperband.beta_vae_tsb --betas 0.5 1 4 --epochs 3

A higher beta buys a simpler code (lower KL) with blurrier images (higher reconstruction): the
rate-distortion trade-off of the beta-VAE (Higgins et al. 2017; Alemi et al. 2018).
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from vae_hyperband.commands.options import parse_options
from vae_hyperband.common.config import Dataset, Places, RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError, VAEHyperbandError
from vae_hyperband.common.process import EXIT_STOPPED, pick_device, stop_flag
from vae_hyperband.data.splits import load_split
from vae_hyperband.training.loop import FitResult, fit


@dataclass(frozen=True, kw_only=True)
class BetaArgs(Places):
    """Train a few betas side by side and open TensorBoard on loopback with them.

    python -m vae_hyperband.beta_vae_tsb --betas 0.5 1 4 --epochs 3
    """

    run: str = "betas"
    """Name of the comparison; the runs are <run>-beta-0.5 and so on."""
    betas: tuple[float, ...] = (0.5, 1.0, 4.0)
    """KL weights to compare; 1 is the VAE."""
    epochs: int = 3
    """Epochs of each."""
    latent_dim: int = 32
    """Number of latent dimensions of z."""
    seed: int = 0
    """The same for every beta: same initial weights, same order, same noise."""
    dataset: Dataset = "fashion-mnist"
    """fashion-mnist, or custom with --data-dir."""
    port: int = 6006
    """Where TensorBoard listens, on 127.0.0.1 only."""
    serve: bool = True
    """Open TensorBoard and keep it open until Ctrl-C (--no-serve: only train)."""


def run_name(args: BetaArgs, beta: float) -> str:
    return f"{args.run}-beta-{beta:g}"


def train_beta(args: BetaArgs, beta: float) -> FitResult:
    """One run, in a process of its own with one thread."""
    config = TrainConfig(
        beta=beta,
        epochs=args.epochs,
        latent_dim=args.latent_dim,
        seed=args.seed,
        dataset=args.dataset,
    )
    options = RunOptions(
        run=run_name(args, beta),
        device=args.device,
        num_threads=1,
        data_dir=args.data_dir,
        checkpoints_dir=args.checkpoints_dir,
        logs_dir=args.logs_dir,
    )
    # Ctrl-C reaches every process of the terminal; other signals the first one, which sets _stop
    with stop_flag() as came:
        return fit(config, options, should_stop=lambda: came() or _stop[0].is_set(), quiet=True)


_stop: list[Event] = []  # in a process that trains: set when it has to stop


def _take(stop: Event) -> None:
    _stop.append(stop)


def compare(args: BetaArgs, should_stop: Callable[[], bool]) -> bool:
    """Train every beta, as many at once as there are cores, and print what each reached.

    Whether all of them finished (False: stopped on request, the same command goes on).
    """
    num_workers = min(len(args.betas), len(os.sched_getaffinity(0)))
    context = get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(num_workers, context, _take, (stop,)) as pool:
        runs = {beta: pool.submit(train_beta, args, beta) for beta in args.betas}
        print("beta   reconstruction      KL   bound (validation, nats/image; bound at beta = 1)")
        for beta, run in runs.items():
            while not run.done() and not should_stop():
                wait([run], timeout=0.2)
            if should_stop():
                stop.set()
                pool.shutdown(cancel_futures=True)  # waits for those under way, which are saving
                return False
            losses = run.result().state.metrics
            print(
                f"{beta:<6g} {losses['recon_loss']:14.2f} {losses['KL_divergence']:7.2f} "
                f"{losses['bound']:7.2f}",
                flush=True,
            )
    return True


def check(args: BetaArgs) -> None:
    """A mistake is one sentence here, not one from each process."""
    for beta in args.betas:
        TrainConfig(beta=beta, epochs=args.epochs, latent_dim=args.latent_dim, seed=args.seed)
    if len({run_name(args, beta) for beta in args.betas}) < len(args.betas) or not args.betas:
        raise ConfigError(f"--betas is {args.betas}, but must name different values.")
    pick_device(args.device)
    load_split("train", args.data_dir, args.dataset)
    if args.serve:
        try:
            with socket.create_server(("127.0.0.1", args.port)):
                pass
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port {args.port} cannot be used ({error}): choose another one."
            ) from error


def serve(logs_dir: Path, port: int) -> subprocess.Popen[bytes]:
    """TensorBoard over the logs, on loopback: nobody else on the network can see it."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "5"]
    print(f"TensorBoard: http://127.0.0.1:{port}/#timeseries", flush=True)
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_options(BetaArgs, argv, "python -m vae_hyperband.beta_vae_tsb")
        check(args)
        with stop_flag("stopping") as should_stop, contextlib.ExitStack() as at_end:
            if args.serve:
                board = serve(args.logs_dir, args.port)
                at_end.callback(board.wait)
                at_end.callback(board.terminate)
            if not compare(args, should_stop):
                print("stopped and saved; the same command goes on.", flush=True)
                return EXIT_STOPPED
            if args.serve:
                print("Ctrl-C ends TensorBoard.", flush=True)
                while board.poll() is None and not should_stop():
                    time.sleep(0.2)
        return 0
    except VAEHyperbandError as error:
        print(f"beta_vae_tsb: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
