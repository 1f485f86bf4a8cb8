"""The main entry: ``vae-hyperband train``, or ``python -m vae_hyperband.train_vae train``.

Exit status: 0 done; 2 invalid option or file, with a one-line error; 3 training diverged, or every
trial of a search failed; 70 Ray broke down; 75 stopped on request and saved; 128 + n ended at once
by signal n. After the last three, the same command continues.
"""

import importlib
import os
import signal
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import vae_hyperband
from vae_hyperband.commands import COMMANDS, wrapped
from vae_hyperband.common.errors import ConfigError, VAEHyperbandError, optional_packages
from vae_hyperband.common.process import keep_freed_memory, lossy_output

if TYPE_CHECKING:
    from vae_hyperband.data.batches import get_dataloader
    from vae_hyperband.evaluation.bounds import eval_epoch
    from vae_hyperband.model.checkpoint import save_ckpt
    from vae_hyperband.training.loop import train_epoch

__all__ = ["eval_epoch", "get_dataloader", "main", "save_ckpt", "train_epoch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(vae_hyperband, name)


USAGE = """usage: vae-hyperband COMMAND [OPTIONS]

  run         run everything: data, search, training of the best configuration, evaluation, figures
  search      search hyperparameters with Ray Tune (ASHA, HyperBand)
  train       train a VAE or beta-VAE, or continue its training
  evaluate    measure a trained model: bounds, latent space, FID ..., with standard errors
  sample      generate images with a trained model
  export      write a trained model as ONNX, as safetensors, or as an interactive web page
  report      write a report of a run or a search: one HTML file
  compare     compare runs: configurations, results, curves
  animate     write an animation: samples over training, or a path through the latent space
  study       train and evaluate a grid of betas and latent sizes; plot rate against distortion
  encode      write the latent code and the bound of each image to a file
  reconstruct draw images and what a model makes of them
  nearest     find the images whose codes are nearest to that of an image
  score       rank images by their bound: anomalies first
  slurm       print a job script that runs the search on a Slurm cluster
  data        find or download Fashion-MNIST, or decode and show your own images
  completion  print a shell-completion script

"vae-hyperband COMMAND --help" explains each. Options take hyphens and underscores alike.
Exit status: 0 done; 2 invalid option or file; 3 training diverged, or every trial of a search \
failed; 70 Ray broke down; 75 stopped on request (SIGINT, SIGTERM, SIGHUP, SIGUSR1); 128 + n ended \
at once by signal n. After 70, 75, 128 + n and a kill, the same command continues.
"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()  # for evaluation and sampling; ``fit`` does it itself
    with lossy_output():
        return _status_of(argv)


def _status_of(argv: list[str]) -> int:
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(wrapped(USAGE), end="", flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(metadata.version("vae-hyperband"))
            return 0
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r} is not a command: use one of {', '.join(COMMANDS)}.")
        module, _, function = COMMANDS[argv[0]].partition(":")
        with optional_packages():
            command = getattr(importlib.import_module(f"vae_hyperband.{module}"), function)
            return command(argv[1:])
    except VAEHyperbandError as error:
        print(f"vae-hyperband: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # as in "--help | head": the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)  # Windows has no such signal
    except OSError as error:
        # of a path that an option names: no permission, too long, not a folder, a stale handle
        if error.filename is None:
            raise
        print(f"vae-hyperband: {error.filename}: {error.strerror}.", file=sys.stderr)
        return VAEHyperbandError.exit_status
    except KeyboardInterrupt:  # training and searches handle signals themselves
        print("vae-hyperband: interrupted; the same command continues.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
