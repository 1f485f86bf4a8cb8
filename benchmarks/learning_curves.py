"""Every configuration of a grid, trained to its end: the learning curves that a scheduler sees.

A trial of a search is a function of its configuration and its seed, so a search over this grid is
a look-up in this table. benchmarks/scheduler_worth.py does many searches that way.

    python benchmarks/learning_curves.py       # an hour or two on 2 cores; goes on after a stop

Writes benchmarks/learning_curves.json.
"""

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vae_hyperband import RunOptions, TrainConfig, fit

FOLDER = Path(__file__).parent
TABLE = FOLDER / "learning_curves.json"
EPOCHS = 9
GRID: dict[str, tuple[Any, ...]] = {
    # in this order, so that what is there after a stop is a smaller grid
    "learning_rate": tuple(np.geomspace(5e-4, 1e-2, 4)[[0, 3, 2, 1]].tolist()),
    "latent_dim": (16, 32, 64),
    "batch_size": (64, 128, 256),
    "beta": (1.0,),
}


def curve(drawn: dict[str, Any]) -> dict[str, Any]:
    """Validation bound and KL after each epoch, in nats per image; one thread, as in a search."""
    bounds, kls = [], []

    def validated(state: Any) -> None:
        bounds.append(state.metrics["bound"])
        kls.append(state.metrics["KL_divergence"])

    scratch = Path(tempfile.mkdtemp())
    try:
        fit(
            TrainConfig(**drawn, epochs=EPOCHS, seed=0),
            RunOptions(
                device="cpu",
                num_threads=1,
                checkpoints_dir=scratch,
                logs_dir=scratch,
                tensorboard=False,
            ),
            on_validation=validated,
            quiet=True,
        )
    finally:
        shutil.rmtree(scratch)
    return {"drawn": drawn, "bounds": bounds, "kls": kls}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"curves": []}
    done = [row["drawn"] for row in table["curves"]]
    todo = [drawn for drawn in grid if drawn not in done]
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER, capture_output=True, text=True, check=False,
    )  # fmt: skip
    table["epochs"], table["grid"] = EPOCHS, GRID
    table["environment"] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, 2 cores",
        "commit": git.stdout.strip(),
    }
    with ProcessPoolExecutor(max_workers=2) as pool:
        for row in pool.map(curve, todo):
            table["curves"].append(row)
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
            print(len(table["curves"]), "of", len(grid), row["drawn"], row["bounds"][-1])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
