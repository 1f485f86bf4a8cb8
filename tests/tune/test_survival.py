"""A search of real trials under SIGKILL: whoever died, it ends as if nobody had."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command_line, write_idx_folder
from killing import run_with_kills, until_the_end

from vae_hyperband.model.checkpoint import load_ckpt

# one after the other: two searches at a time would meet most kills while they start
pytestmark = [pytest.mark.faults, pytest.mark.xdist_group("survival")]


def search_command(data: Path, scheduler: str, *extra: object) -> list[str]:
    return command_line(
        "search", "--run", "s", "--data-dir", data, "--device", "cpu", "--dataset", "custom",
        "--batch-sizes", 32, 64, "--latent-dims", 2, 4, "--num-trials", 12, "--max-epochs", 9,
        "--scheduler", scheduler, "--max-failures", 10, *extra,
    )  # fmt: skip


def first_epoch(command: list[str], folder: Path) -> float:
    """Run the command to its end; the seconds until it spoke of an epoch."""
    begun, first = time.monotonic(), 0.0
    with (folder / "said.txt").open("wb") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        for _ in until_the_end(process):
            if not first and b"epoch 1/" in (folder / "said.txt").read_bytes():
                first = time.monotonic() - begun
    assert process.returncode == 0, (folder / "said.txt").read_text()
    return first


@pytest.mark.parametrize(
    ("scheduler", "extra", "num_images", "kinds"),
    [
        ("asha", [], 12000, {"driver": 7, "worker": 8, "everything": 5}),
        # twice as many epochs as ASHA trains, all of them by one worker: of half the images
        ("hyperband", ["--max-concurrent", 1], 6000, {"driver": 4, "worker": 5, "everything": 3}),
    ],
    ids=["asha", "hyperband-one-worker"],
)
def test_kills_of_driver_worker_or_everything_change_nothing(
    tmp_path, scheduler, extra, num_images, kinds
):
    # epochs of about a second: kills have to find training under way
    data = write_idx_folder(tmp_path / "data", num_train=num_images, size=12)
    command = search_command(data, scheduler, *extra)
    calm = tmp_path / "calm"
    calm.mkdir()
    start_seconds = first_epoch(command, calm)
    expected = json.loads((calm / "checkpoints/s/trials.json").read_text())
    best = json.loads((calm / "checkpoints/s/best_config.json").read_text())
    assert {trial["outcome"] for trial in expected["trials"]} == {"finished", "stopped"}
    for trial in expected["trials"]:
        epochs = [row["epoch"] for row in trial["rows"]]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) in (1, 3, 9)

    random = np.random.default_rng(7)
    kills = random.permutation([kind for kind, count in kinds.items() for _ in range(count)])
    left = kills.tolist()
    while left:  # a search that ends before the last kill: another one
        storm = tmp_path / "storm"
        storm.mkdir()
        run_with_kills(command, storm, random, left, start_seconds)
        found = json.loads((storm / "checkpoints/s/trials.json").read_text())
        assert found == expected  # every trial, every epoch, every digit, every reason
        again = json.loads((storm / "checkpoints/s/best_config.json").read_text())
        assert again == best
        winners = [load_ckpt(place / "checkpoints/s/winner.pt") for place in (storm, calm)]
        assert winners[0].digest == winners[1].digest  # of every weight and moment
        for kind in ("metrics.jsonl", "result.json", "progress.csv"):
            logs = sorted((calm / "logs/s").glob(f"*/{kind}"))
            assert len(logs) == 12
            for log in logs:
                name = f"{log.parent.name}/{kind}"
                assert (storm / "logs/s" / name).read_bytes() == log.read_bytes()
        shutil.rmtree(storm)
    print(f"{scheduler}: survived {len(kills)}, start {start_seconds:.0f} s")
