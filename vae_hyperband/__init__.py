"""A variational autoencoder for fashion images, and the repeatable experiment around it."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

#: Where the public names are, imported when first used: PyTorch takes more than a second.
_MODULES = {
    "VAE": "model.vae",
    "EvaluateOptions": "evaluation.evaluate",
    "RunOptions": "common.config",
    "SearchConfig": "search.config",
    "SearchOptions": "search.config",
    "TrainConfig": "common.config",
    "VAEHyperbandError": "common.errors",
    "allow_network": "model.networks",
    "eval_epoch": "evaluation.bounds",
    "evaluate": "evaluation.evaluate",
    "fit": "training.loop",
    "get_dataloader": "data.batches",
    "kl_to_standard_normal": "model.objective",
    "load_ckpt": "model.checkpoint",
    "load_model": "model.checkpoint",
    "load_pretrained": "export.pretrained",
    "load_split": "data.splits",
    "nats_per_image": "model.objective",
    "new_state": "training.state",
    "reconstruction_nats": "model.likelihoods",
    "save_ckpt": "model.checkpoint",
    "train_epoch": "training.loop",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
