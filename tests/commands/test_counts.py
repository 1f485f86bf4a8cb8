"""A count agrees with its noun: of one image, one step, one epoch and one sample of each."""

import re

import pytest
from conftest import write_idx_folder

from vae_hyperband import train_vae
from vae_hyperband.common.errors import ConfigError, DataError
from vae_hyperband.data.splits import load_split
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.reporting import figures
from vae_hyperband.training.loop import train_epoch
from vae_hyperband.training.state import new_state

WRONG = re.compile(r"\b1 (\w+ )?(images|labels|steps|batches|epochs|samples|cores|threads|runs)\b")


def test_commands_count_one_of_a_thing_in_the_singular(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data-dir", str(write_idx_folder(tmp_path / "data", num_train=2, num_test=1))]
    custom = ["--dataset", "custom", *data]
    where = [*custom, "--device", "cpu"]
    train = ["train", *where, "--epochs", "1", "--batch-size", "1", "--no-tensorboard"]
    titles = []
    monkeypatch.setattr(figures, "images", lambda images, title, path: titles.append(title))
    for argv in (
        ["data", *custom],
        [*train, "--dry-run"],
        train,
        [*train, "--epochs", "2", "--dry-run"],
        ["sample", "vae", "--num-samples", "1", "--out", "one.png"],
        ["export", "vae", "--format", "safetensors", "--out", "hub"],
    ):
        assert train_vae.main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    card = (tmp_path / "hub/README.md").read_text()
    text = "\n".join([said.out, said.err, *titles, card])
    assert [found[0] for found in WRONG.finditer(text)] == []
    for count in ("1 image", "1 training image", "1 step", "1 epoch", "1 sample"):
        assert re.search(rf"\b{count}\b", text), count
    with pytest.raises(ConfigError, match=r"gives 2 steps, but an epoch of the state has 1 step:"):
        train_epoch(new_state(load_ckpt("checkpoints/vae/best.pt").config, (1, 8, 8), 1), [1, 2])
    one = write_idx_folder(tmp_path / "one", num_train=1)
    with pytest.raises(DataError, match="holds 1 image, too few"):
        load_split("train", one, "custom")
