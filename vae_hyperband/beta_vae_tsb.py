"""Train a few betas side by side and watch them in TensorBoard, in one command.

    python -m vae_hyperband.beta_vae_tsb --betas 0.5 1 4 --epochs 3

A higher beta buys a simpler code (lower KL) with blurrier images (higher reconstruction): the
rate-distortion trade-off of the beta-VAE (Higgins et al. 2017; Alemi et al. 2018). The command
``vae-hyperband study`` does the same for whole grids, and evaluates every model.
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vae_hyperband.commands.options import ConfigFile, parse_options
from vae_hyperband.common.config import CommonConfig, Places, TrainConfig, with_data
from vae_hyperband.common.errors import ConfigError, VAEHyperbandError
from vae_hyperband.common.process import EXIT_STOPPED, available_cpus, pick_device, stop_flag
from vae_hyperband.data.splits import split_for
from vae_hyperband.model.checkpoint import Metrics
from vae_hyperband.training.study import train_side_by_side


@dataclass(frozen=True, kw_only=True)
class BetaArgs(ConfigFile, CommonConfig, Places):
    """Train a few betas side by side and watch them in TensorBoard.

    python -m vae_hyperband.beta_vae_tsb --betas 0.5 1 4 --epochs 3
    """

    run: str = "betas"
    """Name of the comparison; its runs are called <run>-beta-0.5 and so on."""
    betas: tuple[float, ...] = (0.5, 1.0, 4.0)
    """Weights of the KL term; 1 is the VAE."""
    epochs: int = 3
    """Passes over the training split, per run."""
    latent_dim: int = 32
    """Number of latent dimensions of z."""
    seed: int = 0
    """The same for every beta: equal initial weights, order of the images and noise."""
    port: int = 6006
    """Port of TensorBoard, which listens on 127.0.0.1 only."""
    serve: bool = True
    """Open TensorBoard and keep it open until Ctrl-C (--no-serve: only train)."""

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        Places.__post_init__(self)

    def configs(self) -> dict[str, TrainConfig]:
        """The configurations, by the names of their runs without ``run``."""
        return {
            f"beta-{beta:g}": TrainConfig(
                beta=beta,
                epochs=self.epochs,
                latent_dim=self.latent_dim,
                seed=self.seed,
                **with_data(self, self.data).common(),
            )
            for beta in self.betas
        }


def train(args: BetaArgs, should_stop: Callable[[], bool]) -> bool:
    """Train every beta, as many at a time as there are cores, and print their losses.

    False if told to stop; then the same command continues.
    """

    def show(name: str, losses: Metrics) -> None:
        print(
            f"{name.removeprefix('beta-'):<6} {losses['recon_loss']:14.2f} "
            f"{losses['KL_divergence']:7.2f} {losses['bound']:7.2f}",
            flush=True,
        )

    print("beta   reconstruction      KL   bound (validation, nats/image; bound at beta = 1)")
    return train_side_by_side(args.configs(), args, available_cpus(), should_stop, show)


def check(args: BetaArgs) -> None:
    """Report an invalid option in one line here, instead of once in each process."""
    if len(args.configs()) < len(args.betas) or not args.betas:
        raise ConfigError(f"--betas is {args.betas}, but must have one or more different values.")
    pick_device(args.device)
    split_for(args, args, "train")
    if args.serve:
        try:
            with socket.create_server(("127.0.0.1", args.port)):
                pass
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--port {args.port} cannot be used ({error}): choose another one."
            ) from error


def serve(logs_dir: Path, port: int) -> subprocess.Popen[bytes]:
    """Start TensorBoard over the logs, on loopback: nobody else on the network can see it."""
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
            if not train(args, should_stop):
                print("stopped and saved; the same command continues.", flush=True)
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
