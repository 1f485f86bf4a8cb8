"""A variational autoencoder for fashion images, and the repeatable experiment around it."""

from importlib.metadata import version

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import VAEHyperbandError
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import load_split
from vae_hyperband.evaluation.bounds import eval_epoch
from vae_hyperband.evaluation.evaluate import EvaluateOptions, evaluate
from vae_hyperband.export.pretrained import load_pretrained
from vae_hyperband.model.checkpoint import load_ckpt, load_model, save_ckpt
from vae_hyperband.model.likelihoods import reconstruction_nats
from vae_hyperband.model.networks import allow_network
from vae_hyperband.model.objective import kl_to_standard_normal, nats_per_image
from vae_hyperband.model.vae import VAE
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.training.loop import fit, train_epoch
from vae_hyperband.training.state import new_state

__version__ = version("vae-hyperband")  # of pyproject.toml, where alone it is written

__all__ = [
    "VAE",
    "EvaluateOptions",
    "RunOptions",
    "SearchConfig",
    "SearchOptions",
    "TrainConfig",
    "VAEHyperbandError",
    "allow_network",
    "eval_epoch",
    "evaluate",
    "fit",
    "get_dataloader",
    "kl_to_standard_normal",
    "load_ckpt",
    "load_model",
    "load_pretrained",
    "load_split",
    "nats_per_image",
    "new_state",
    "reconstruction_nats",
    "save_ckpt",
    "train_epoch",
]
