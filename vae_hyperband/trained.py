"""What was trained, found by its name: its best checkpoint, its data, its losses."""

from pathlib import Path
from typing import Any

from vae_hyperband.checkpoint import BEST, LATEST
from vae_hyperband.config import Places
from vae_hyperband.data import Split, SplitName, load_split
from vae_hyperband.errors import CheckpointError
from vae_hyperband.trials import ASKED, RESULT

#: The losses that runs are compared by, as a reader is told; nats per image.
LOSSES = {
    "bound": "bound (beta = 1)",
    "recon_loss": "reconstruction",
    "KL_divergence": "KL divergence",
}


def best_ckpt(place: Places) -> Path:
    """The best checkpoint of the run of that name, or a :class:`CheckpointError` that says why
    there is none."""
    folder = place.ckpt_folder
    try:
        if (folder / BEST).exists():
            return folder / BEST
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error
    if (folder / RESULT).exists():
        why = f"{place.run} is a search, not a run: vae-hyperband report {place.run} shows it."
    elif (folder / ASKED).exists():
        why = f"{place.run} is a search that has not ended: the command that began it goes on."
    elif (folder / LATEST).exists():
        why = f"The run {place.run} has not been validated yet: its command goes on."
    elif related := sorted(path.name for path in place.checkpoints_dir.glob(f"{place.run}-*")):
        # the parts of a job, the runs of a study
        why = (
            f"{place.run} is no run, but {', '.join(related[:20])} begin with that name: give one."
        )
    else:
        there = sorted(path.parent.name for path in place.checkpoints_dir.glob(f"*/{BEST}"))
        why = f"{place.checkpoints_dir} has no run {place.run}" + (
            f"; there are {', '.join(there)}." if there else ", and no other."
        )
    raise CheckpointError(why)


def split_of(content: dict[str, Any], ckpt: Path, name: SplitName, data_dir: Path | None) -> Split:
    """A split of the data that a checkpoint was trained on.

    Test images may be others of the same size; those of the training file have to be the same ones.
    Raises :class:`CheckpointError` where they are not, and what :func:`load_split` raises.
    """
    config, trained_on = content["config"], content["data"]
    split = load_split(name, data_dir, config["dataset"])
    if list(split.image_shape) != list(trained_on["image_shape"]):
        raise CheckpointError(
            f"{ckpt} was trained on images of shape {tuple(trained_on['image_shape'])}, but the "
            f"{name} split has {split.image_shape}: give the --data-dir it was trained on."
        )
    # garments that are drawn have no file
    if name != "test" and config["dataset"] != "drawn" and split.digest != trained_on["digest"]:
        raise CheckpointError(
            f"{ckpt} was trained on other images than these: give the --data-dir it was trained on."
        )
    return split


def own_losses(content: dict[str, Any]) -> dict[str, Any]:
    """The losses of a checkpoint's own weights on the validation split.

    Empty where it was written after further steps: those in it are of earlier weights.
    """
    metrics = content["metrics"]
    return metrics if metrics and metrics["step"] == content["step"] else {}
