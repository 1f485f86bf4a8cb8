import dataclasses
import random

import pytest
import torch

import vae_hyperband
from vae_hyperband.common.errors import CheckpointError, RunFolderError
from vae_hyperband.model.checkpoint import (
    FORMAT,
    KEYS,
    copy_ckpt,
    load_ckpt,
    load_model,
    load_pt,
    save_ckpt,
    tree_digest,
)


@pytest.fixture
def saved(trained):
    return trained.latest


def test_it_opens_with_plain_torch_and_holds_all_that_is_needed(saved):
    content = torch.load(saved, weights_only=True)
    assert content["config"]["latent_dim"] == 4
    assert (content["epoch"], content["step"]) == (3, 30)
    assert content["schedule"] == {"name": "one-cycle", "num_steps": 30}
    assert len(content["data"]["digest"]) == 64
    assert content["environment"]["torch"] == torch.__version__
    moments = content["optimizer"]["state"][0]
    assert moments["step"] == 30
    assert moments["exp_avg_sq"].abs().sum() > 0


def test_load_model_gives_the_trained_model_in_eval_mode(saved, options, small_config):
    model = vae_hyperband.load_model(saved)
    assert not model.training
    assert model.latent_dim == 4
    weights = load_ckpt(saved).model_state
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_no_flipped_bit_is_ever_loaded(saved, tmp_path):
    good, digest = saved.read_bytes(), load_ckpt(saved).digest
    rng, outcomes, path = random.Random(0), {"refused": 0, "same": 0}, tmp_path / "flipped.pt"
    pickled = good.index(b"data.pkl")  # names, types and shapes; what follows is mostly numbers
    for i in range(500):
        bad = bytearray(good)
        at = rng.randrange(len(bad)) if i % 2 else pickled + rng.randrange(6000)
        bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            content = load_pt(path, FORMAT, KEYS)
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            assert (
                content.pop("digest") == digest == tree_digest(content)
            )  # the bit was in the zip's padding
            outcomes["same"] += 1
    assert outcomes["refused"] > 375, outcomes


def test_no_truncated_file_is_ever_loaded(saved, tmp_path):
    good, rng, path = saved.read_bytes(), random.Random(1), tmp_path / "cut.pt"
    for _ in range(200):
        path.write_bytes(good[: rng.randrange(len(good))])
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
            load_ckpt(path)


def test_a_copy_of_a_file_that_is_gone_is_told_apart_from_a_crash(tmp_path):
    """Training continues, unsaved, as on a full disk."""
    with pytest.raises(RunFolderError, match="cannot be read"):
        copy_ckpt(tmp_path / "best.pt", tmp_path / "latest.pt")


def test_foreign_files_are_refused_by_name(tmp_path, saved):
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        load_ckpt(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_ckpt(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_ckpt(tmp_path / "other.pt")
    newer = torch.load(saved, weights_only=True) | {"version": 99}
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="format version 99"):
        load_ckpt(tmp_path / "newer.pt")


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen", "latent_dim"])
def test_weights_of_another_model_are_refused_by_name(saved, tmp_path, change):
    content, name = load_ckpt(saved), "decoder.fc.weight"
    if change == "missing":
        del content.model_state[name]
    elif change == "extra":
        name = "decoder.fc9.weight"
        content.model_state[name] = torch.zeros(1)
    elif change == "misshapen":
        content.model_state[name] = torch.zeros(2, 2)
    else:
        config = dataclasses.replace(content.config, latent_dim=5)
        content = dataclasses.replace(content, config=config)
    save_ckpt(tmp_path / "other.pt", content)
    with pytest.raises(CheckpointError, match=f"of another model.*{name}"):
        load_model(tmp_path / "other.pt")


def test_nothing_runs_because_it_was_loaded(tmp_path):
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"format": "vae-hyperband checkpoint", "model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError):
        load_ckpt(tmp_path / "bomb.pt")
    assert not marker.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)["model"].close()
    assert marker.exists()  # the bomb was live


def test_a_failed_save_leaves_the_old_file_and_no_other(saved, monkeypatch):
    before, content = saved.read_bytes(), load_ckpt(saved)
    names = sorted(saved.parent.iterdir())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        save_ckpt(saved, content)
    assert saved.read_bytes() == before
    assert sorted(saved.parent.iterdir()) == names


def test_the_digest_sees_every_kind_of_change():
    tree = {"a": torch.tensor([1.0, 2.0]), "b": [1, "x", None, 1.5], "c": {"d": True}}
    changes = [
        tree | {"a": torch.tensor([1.0, 2.0000002])},
        tree | {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        tree | {"a": torch.tensor([[1.0, 2.0]])},
        tree | {"b": [1, "x", None, 1.6]},
        tree | {"b": [1, "x", 1.5, None]},
        tree | {"c": {"d": 1}},
        tree | {"c": {"e": True}},
    ]
    digests = {tree_digest(t) for t in (tree, *changes)}
    assert len(digests) == len(changes) + 1
