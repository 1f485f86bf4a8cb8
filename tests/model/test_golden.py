"""What was so once stays so: losses of 200 steps, files of each version of the checkpoint format.

``python tests/model/test_golden.py`` records the losses again, which only a change that is meant to
change every result may do.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_idx_folder
from torch import nn

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.process import cpu_threads
from vae_hyperband.data.batches import get_dataloader
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.model import fast_layers
from vae_hyperband.model.checkpoint import KEYS, load_ckpt, load_model, tree_digest
from vae_hyperband.training.loop import fit, train_epoch
from vae_hyperband.training.state import new_state

GOLDEN = Path(__file__).parents[1] / "golden"


def trace() -> list[list[float]]:
    """(reconstruction, KL), nats per image, of each of 200 steps on garments that are drawn.

    With a learning rate so low that rounding is not blown up: measured, 1 and 2 threads, our layers
    and PyTorch's agree to 6e-5 in every step, and to 5e-7 in the first 50.
    """
    drawn = load_split("train", dataset="drawn")
    split = Split(drawn.images_NCHW[:1600], drawn.labels_N[:1600], drawn.digest)
    config = TrainConfig(
        dataset="drawn", batch_size=32, epochs=4, latent_dim=16, learning_rate=0.0003
    )
    state = new_state(config, split.image_shape, len(split))
    loader = get_dataloader(split, 32, seed=0, shuffle=True)
    rows = []

    def after_step(state):
        rows.append((state.sums[1, :2] / state.sums[1, 3]).tolist())
        state.sums[1] = 0
        return False

    while state.step < state.num_steps:
        train_epoch(state, loader, after_step)
    return rows


@pytest.mark.parametrize("plain", [False, True], ids=["our layers", "PyTorch's layers"])
def test_a_golden_trace_of_200_steps_is_reproduced(plain, monkeypatch):
    if plain:
        for name in ("Conv2d", "ConvTranspose2d", "Flatten"):
            monkeypatch.setattr(getattr(fast_layers, name), "forward", getattr(nn, name).forward)
    with cpu_threads(1):
        found = torch.tensor(trace(), dtype=torch.float64)
    expected = torch.tensor(json.loads((GOLDEN / "trace.json").read_text()), dtype=torch.float64)
    assert found.shape == (200, 2)
    torch.testing.assert_close(found[:25], expected[:25], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


WEIGHTS = {  # of the golden files, computed when they were made
    1: "81b68398d6d473014cf675626d1c613c6e302877722797c485d79c4dad68d0a4",
    2: "81b68398d6d473014cf675626d1c613c6e302877722797c485d79c4dad68d0a4",
}


@pytest.mark.parametrize("version", sorted(KEYS))
def test_a_file_of_each_version_loads_and_goes_on(version, tmp_path):
    """There is a golden file of each version, written by the code of its time at step 4 of 6."""
    path = GOLDEN / f"checkpoint-{version}.pt"
    content = load_ckpt(path)
    assert torch.load(path, weights_only=True)["version"] == version
    assert content.weights_digest == WEIGHTS[version] == tree_digest(content.model_state)
    assert load_model(path).latent_dim == 2
    small = write_idx_folder(tmp_path / "data", num_train=72, num_test=6, size=4)
    shutil.copy(path, tmp_path / "given.pt")
    options = RunOptions(
        run="a", device="cpu", num_threads=1, data_dir=small, resume_ckpt=tmp_path / "given.pt",
        checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l",
    )  # fmt: skip
    result = fit(content.config, options, quiet=True)
    assert result.finished
    assert (content.step, result.state.step) == (4, 6)
    assert torch.load(result.latest, weights_only=True)["version"] == max(KEYS)
    assert load_ckpt(result.latest).weights_digest == result.weights


if __name__ == "__main__":
    with cpu_threads(1):
        (GOLDEN / "trace.json").write_text(
            "[\n" + ",\n".join(json.dumps(row) for row in trace()) + "\n]\n"
        )
