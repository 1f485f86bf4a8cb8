"""The main entry: ``vae-hyperband train``, or ``python -m vae_hyperband.train_vae train``.

Exit status: 0 done; 2 a user's mistake, told in one sentence; 3 training diverged, or every trial
of a search failed; 70 Ray broke down; 75 stopped on request and saved; 128 + n ended at once by
signal n. After the last three the same command goes on.
"""

import importlib
import os
import signal
import sys
from importlib import metadata

from vae_hyperband.commands import COMMANDS
from vae_hyperband.common.errors import ConfigError, VAEHyperbandError
from vae_hyperband.common.process import keep_freed_memory, lossy_output
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.evaluation.bounds import eval_epoch
from vae_hyperband.model.checkpoint import save_ckpt
from vae_hyperband.training.loop import train_epoch

__all__ = ["eval_epoch", "get_dataloader", "main", "save_ckpt", "train_epoch"]

USAGE = """usage: vae-hyperband COMMAND [OPTIONS]

  run       the whole job: data, search, train the winner, evaluate, figures
  search    search hyperparameters with Ray Tune (ASHA, HyperBand)
  train     train one VAE or beta-VAE, or go on training it
  evaluate  what a checkpoint is worth: bounds, latent space, FID ..., with standard errors
  sample    draw images from a checkpoint
  export    a checkpoint as ONNX, as safetensors with a card, or as a page that runs in a browser
  report    a run or a search as one HTML file to keep and hand on
  compare   runs side by side: what differs, what came of it, their curves
  animate   a moving picture: samples over training, or a walk through the latent space
  study     a grid of betas and latent sizes, trained and judged: the rate-distortion picture
  data      find or fetch Fashion-MNIST and check it
  completion  print what a shell completes commands and options by

"vae-hyperband COMMAND --help" explains each. Hyphens and underscores in options are the same.
Exit status: 0 done, 2 a mistake in the command or its files, 3 training diverged or every trial of
a search failed, 70 Ray broke down, 75 stopped on request (SIGINT, SIGTERM, SIGUSR1), 128 + n ended
at once by signal n. After 70, 75, 128 + n and a kill the same command goes on.
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()  # evaluation and sampling, too; ``fit`` does so for those who call it
    with lossy_output():
        return _status_of(argv)


def _status_of(argv: list[str]) -> int:
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="", flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(metadata.version("vae-hyperband"))
            return 0
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r} is no command: use one of {', '.join(COMMANDS)}.")
        module, _, function = COMMANDS[argv[0]].partition(":")
        command = getattr(importlib.import_module(f"vae_hyperband.{module}"), function)
        return command(argv[1:])
    except VAEHyperbandError as error:
        print(f"vae-hyperband: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # as in "--help | head": who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # outside of training and search, which end in order
        print("vae-hyperband: interrupted; the same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
