"""What a trained model is worth on a named split. The only place that opens the test split."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from vae_hyperband.bounds import eval_dataloader, split_nats
from vae_hyperband.checkpoint import load_ckpt, model_from_ckpt
from vae_hyperband.config import TrainConfig
from vae_hyperband.data import Split, SplitName, load_split
from vae_hyperband.errors import CheckpointError
from vae_hyperband.objective import entropy_floor
from vae_hyperband.process import environment, pick_device


def evaluate(
    ckpt: Path,
    split: SplitName = "validation",
    data_dir: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """The bound and its parts on a split, in nats per image, each with its standard error.

    ``nats_above_floor`` is the bound minus the entropy of the split's own grey pixels, which no
    model can go below; splits differ by more than a nat there. Raises the errors of
    :func:`load_ckpt` and :func:`load_split`.
    """
    target = pick_device(device)
    content = load_ckpt(ckpt)
    config = TrainConfig.from_dict(content["config"], str(ckpt))
    model = model_from_ckpt(content, ckpt).to(target).eval()
    held_out = _fitting_split(ckpt, content, split, data_dir, config.dataset)
    nats = split_nats(model, eval_dataloader(held_out, target), config.seed)
    bound_N = nats.recon_B + nats.kl_B
    floor = entropy_floor(held_out.pixels(slice(None)))
    return {
        "checkpoint": str(ckpt),
        "checkpoint_digest": content["digest"],
        "split": split,
        "num_images": len(held_out),
        "data_digest": held_out.digest,
        "unit": "nats per image, lower is better",
        "protocol": "one posterior sample per image, grey pixels, beta = 1",
        "bound": _mean_and_error(bound_N),
        "recon_loss": _mean_and_error(nats.recon_B),
        "KL_divergence": _mean_and_error(nats.kl_B),
        "entropy_floor": floor,
        "nats_above_floor": bound_N.mean().item() - floor,
        "epoch": content["epoch"],
        "step": content["step"],
        "config": config.to_dict(),
        "environment": environment(target),
    }


def _fitting_split(
    ckpt: Path, content: dict[str, Any], split: SplitName, data_dir: Path | None, dataset: str
) -> Split:
    held_out = load_split(split, data_dir, dataset)
    trained_on = tuple(content["data"]["image_shape"])
    if held_out.image_shape != trained_on:
        raise CheckpointError(
            f"{ckpt} was trained on images of shape {trained_on}, but the {split} split has "
            f"{held_out.image_shape}: give the --data-dir it was trained on."
        )
    return held_out


def _mean_and_error(values_N: Tensor) -> dict[str, float]:
    """Mean over images and the standard error of that mean (images as independent draws)."""
    spread = values_N.std().item() if len(values_N) > 1 else math.nan
    return {"mean": values_N.mean().item(), "standard_error": spread / math.sqrt(len(values_N))}
