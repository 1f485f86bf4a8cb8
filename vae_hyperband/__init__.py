"""A variational autoencoder for fashion images, and the repeatable experiment around it."""

from vae_hyperband.bounds import eval_epoch
from vae_hyperband.checkpoint import load_ckpt, load_model, save_ckpt
from vae_hyperband.config import RunOptions, TrainConfig
from vae_hyperband.data import get_dataloader, load_split
from vae_hyperband.errors import VAEHyperbandError
from vae_hyperband.evaluation import evaluate
from vae_hyperband.evaluation_config import EvaluateOptions
from vae_hyperband.likelihoods import reconstruction_nats
from vae_hyperband.model import VAE
from vae_hyperband.objective import kl_to_standard_normal, nats_per_image
from vae_hyperband.search_config import SearchConfig, SearchOptions
from vae_hyperband.state import new_state
from vae_hyperband.training import fit, train_epoch

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "EvaluateOptions",
    "RunOptions",
    "SearchConfig",
    "SearchOptions",
    "TrainConfig",
    "VAEHyperbandError",
    "eval_epoch",
    "evaluate",
    "fit",
    "get_dataloader",
    "kl_to_standard_normal",
    "load_ckpt",
    "load_model",
    "load_split",
    "nats_per_image",
    "new_state",
    "reconstruction_nats",
    "save_ckpt",
    "train_epoch",
]
