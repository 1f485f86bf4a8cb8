"""Comparison of runs: differences in their configuration, and their results."""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_hyperband.common.config import Places, in_effect
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.model.checkpoint import BEST, LATEST, load_ckpt
from vae_hyperband.reporting.tables import LOSS_NAMES, Table
from vae_hyperband.search.trials import RESULT, SETTINGS_FILE
from vae_hyperband.training.tracker import LogRow, read_rows

#: Losses of runs that differ in one of these cannot be compared.
YARDSTICKS = ("likelihood", "binarize", "dataset", "data", "holdout")
NOTE = "validation split, nats per image"


@dataclass(frozen=True)
class Run:
    """A trained run, from its best checkpoint and its logs."""

    name: str
    config: dict[str, Any]
    data_digest: str
    weights: str  # SHA-256, of the best checkpoint
    epoch: int
    losses: dict[str, float]  # of the validation that the best checkpoint was written after
    rows: list[LogRow]
    images_per_second: float | None  # median; None if it was never logged


def read_run(name: str, places: Places) -> Run:
    """Raises :class:`CheckpointError` if there is no best checkpoint of that name."""
    place = dataclasses.replace(places, run=name)
    checkpoint = load_ckpt(best_ckpt(place))
    speeds = [
        row["images_per_second"]
        for row in read_rows(place.log_folder / "timing.jsonl", ("images_per_second",))
    ]
    return Run(
        name,
        in_effect(checkpoint.config.to_dict()),
        checkpoint.data.digest,
        checkpoint.weights_digest,
        checkpoint.epoch,
        {loss: checkpoint.own_losses[loss] for loss in LOSS_NAMES},
        read_rows(place.log_folder / "metrics.jsonl", ("split", *LOSS_NAMES)),
        statistics.median(speeds) if speeds else None,
    )


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings that differ between runs, with each run's value; None if it does not have one."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = {name: [run.config.get(name) for run in runs] for name in names}
    found["data"] = [run.data_digest[:12] for run in runs]
    return {
        name: values for name, values in found.items() if any(v != values[0] for v in values[1:])
    }


def incomparable(runs: list[Run]) -> str:
    """Why the losses of these runs cannot be compared; empty if they can."""
    names = [name for name in differing(runs) if name in YARDSTICKS]
    if not names:
        return ""
    return f"The runs differ in {', '.join(names)}: their losses cannot be compared."


def as_data(runs: list[Run]) -> dict[str, Any]:
    """The comparison as plain data for JSON."""
    return {
        "differs": differing(runs),
        "incomparable": incomparable(runs),
        "runs": [
            {key: value for key, value in dataclasses.asdict(run).items() if key != "rows"}
            for run in runs
        ],
    }


def table(runs: list[Run]) -> str:
    """The comparison as lines of text, with a star at the lowest bound if they can be compared."""
    if len({run.name for run in runs}) < max(len(runs), 2):
        raise ConfigError("compare needs two or more different runs.")
    rows: list[list[str]] = []
    differs = differing(runs)
    for name, values in differs.items():
        rows.append([name, *("-" if value is None else _short(value) for value in values)])
    if not differs:
        rows.append(["(the same configuration and data)", *("" for _ in runs)])
    why = incomparable(runs)
    rows.append(["best epoch", *(str(run.epoch) for run in runs)])
    for loss, title in LOSS_NAMES.items():
        best = min(run.losses[loss] for run in runs)
        # the parts have no best value: less KL is more reconstruction
        star = "*" if loss == "bound" and not why else ""
        cells = [f"{run.losses[loss]:.2f}{star * (run.losses[loss] == best)}" for run in runs]
        rows.append([title, *cells])
    speeds = [f"{run.images_per_second:,.0f}" if run.images_per_second else "-" for run in runs]
    rows.append(["images/s (median)", *speeds])
    notes = [NOTE, why] if why else [f"* lowest; {NOTE}"]
    lines = Table("runs", rows, head=["", *(run.name for run in runs)]).text()
    return "\n".join([lines, "", *notes])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- A run's best checkpoint, found by its name.


def best_ckpt(place: Places) -> Path:
    """The best checkpoint of a run. Raises a :class:`CheckpointError` with the reason if there is
    none."""
    folder = place.ckpt_folder
    try:
        if (folder / BEST).exists():
            return folder / BEST
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error
    if (folder / RESULT).exists():
        why = f"{place.run} is a search, not a run: vae-hyperband report {place.run} shows it."
    elif (folder / SETTINGS_FILE).exists():
        why = f"{place.run} is a search that has not ended: run its command again to resume it."
    elif (folder / LATEST).exists():
        why = f"The run {place.run} has not been validated yet: run its command again to resume it."
    elif related := sorted(path.name for path in place.checkpoints_dir.glob(f"{place.run}-*")):
        # the parts of a job, the runs of a study
        why = f"{place.run} is not a run; the names {', '.join(related[:20])} begin with it."
    else:
        there = sorted(path.parent.name for path in place.checkpoints_dir.glob(f"*/{BEST}"))
        why = f"{place.checkpoints_dir} has no run {place.run}" + (
            f"; there are {', '.join(there)}." if there else ", and no other."
        )
    raise CheckpointError(why)
