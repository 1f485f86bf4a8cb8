import json
import re
import shlex

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from vae_hyperband.commands.options import parse_options
from vae_hyperband.commands.train import TrainArgs
from vae_hyperband.data.splits import load_split
from vae_hyperband.model.objective import kl_per_dimension
from vae_hyperband.training.loop import fit
from vae_hyperband.training.tracker import Tracker, image_grid, read_rows, write_projector

KINDS = ("images", "scalars", "histograms", "tensors")


@pytest.fixture
def board(options, small_config):
    result = fit(small_config, options(), quiet=True)
    board = EventAccumulator(str(result.log_folder), size_guidance=dict.fromkeys(KINDS, 0))
    board.Reload()
    return board, result


def test_tensorboard_shows_the_promised_scalars(board):
    events, _ = board
    tags = events.Tags()["scalars"]
    for name in ("recon_loss", "KL_divergence", "total_loss", "bound"):
        assert {f"{name}/train", f"{name}/validation"} <= set(tags)
    assert {"learning_rate", "images_per_second"} <= set(tags)
    steps = [event.step for event in events.Scalars("recon_loss/validation")]
    assert steps == [10, 20, 30]


def test_tensorboard_and_metrics_jsonl_say_the_same(board):
    events, result = board
    rows = read_rows(result.log_folder / "metrics.jsonl")
    for split in ("train", "validation"):
        for name in ("recon_loss", "KL_divergence", "total_loss"):
            shown = {e.step: e.value for e in events.Scalars(f"{name}/{split}")}
            written = {row["step"]: row[name] for row in rows if row["split"] == split}
            assert shown.keys() == written.keys()
            for step, value in written.items():
                assert shown[step] == pytest.approx(value, rel=1e-6)
                assert "images_per_second" not in rows[0]


def test_tensorboard_shows_input_reconstruction_and_the_same_samples_improving(board):
    events, _ = board
    images = events.Tags()["images"]
    assert {"images/input", "images/reconstruction", "images/random_samples"} == set(images)
    assert [e.step for e in events.Images("images/input")] == [0]
    samples = [e.encoded_image_string for e in events.Images("images/random_samples")]
    assert len(set(samples)) == 3
    assert samples[0].startswith(b"\x89PNG")


def test_kl_per_dimension_configuration_and_command_are_shown(board, small_data):
    events, result = board
    found = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    command, table = found.split("\n\n")
    assert "| latent_dim | 4 |" in table
    words = shlex.split(command.strip("`"))
    args = parse_options(TrainArgs, words[2:], "")
    assert args.training == result.state.config
    histograms = events.Histograms("KL_per_dimension")
    assert [event.step for event in histograms] == [10, 20, 30]
    assert sum(histograms[-1].histogram_value.bucket) == 4  # latent dimensions
    model = result.state.model
    images = load_split("validation", small_data, "custom").pixels(slice(32))
    kl_Z = kl_per_dimension(*model.encode(images)).mean(dim=0).detach()
    assert histograms[-1].histogram_value.sum == pytest.approx(kl_Z.sum().item(), rel=1e-5)


@pytest.mark.parametrize("ground", [0.0, 0.4])
def test_the_projector_gets_latents_labels_and_a_sprite(tmp_path, ground):
    images = torch.rand(5, 1, 8, 8)
    images[:, :, 2:] = ground  # of garments it is black; then they are shown as ink on paper
    write_projector(tmp_path, torch.arange(15.0).view(5, 3), images, torch.arange(5), ("a", "b"))
    config = (tmp_path / "projector_config.pbtxt").read_text()
    paths = re.findall(r'path: "(.*)"', config)
    assert all((tmp_path / path).is_file() for path in paths)
    assert len(paths) == 3
    vectors = (tmp_path / paths[0]).read_text().splitlines()
    assert [line.split("\t")[0] for line in vectors] == ["0", "3", "6", "9", "12"]
    assert (tmp_path / paths[1]).read_text().split() == ["a", "b", "2", "3", "4"]
    with Image.open(tmp_path / paths[2]) as sprite:
        assert sprite.size == (24, 24)  # 3 x 3 places
        pixel = images[1, 0, 0, 0].item()
        assert abs(sprite.getpixel((8, 0)) - 255 * (pixel if ground else 1 - pixel)) <= 1
        assert sprite.getpixel((8, 16)) == 255  # nothing there


def test_hyperparameters_stand_beside_the_final_metrics(board):
    events, result = board
    assert "_hparams_/session_start_info" in events.Tags()["tensors"] or any(
        "hparams" in name for name in events.summary_metadata
    )
    [final] = events.Scalars("best_bound")
    assert final.value == pytest.approx(result.state.best["bound"], rel=1e-6)


def test_speed_is_written_apart_from_the_metrics(board):
    _, result = board
    rows = read_rows(result.log_folder / "timing.jsonl")
    logged = read_rows(result.log_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [
        row["step"] for row in logged if row["split"] == "train"
    ]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_a_grid_has_every_image_at_its_place():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 3) / 4
    grid = image_grid(images, columns=3, margin=1, background=0.5)
    assert grid.shape == (1, 1 + 2 * 3, 1 + 3 * 4)
    assert grid[0, 1, 1::4].tolist() == [0, 0.25, 0.5]
    assert grid[0, 4, 1::4].tolist() == [0.75, 1, 0.5]
    assert (grid[0, 0] == 0.5).all()


def test_event_files_of_one_second_are_read_in_the_order_they_were_begun(tmp_path, monkeypatch):
    """Process ids, the next part of their names, may fall."""
    for pid in (30, 20, 10):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        Tracker(tmp_path, 0).__exit__()
    files = sorted(path.name for path in tmp_path.glob("events.out.tfevents.*"))
    assert [name.split(".")[-1] for name in files] == ["30", "20", "10"]


def test_a_damaged_line_costs_itself_and_is_said_a_torn_one_is_not(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "split": "train"}) for step in range(5)]
    path.write_text(
        "\n".join([*rows[:2], rows[2].replace("step", "suep"), *rows[3:], '{"step": 5, "spl'])
    )
    assert [row["step"] for row in read_rows(path)] == [0, 1, 3, 4]
    with Tracker(tmp_path, start_step=3):
        pass
    assert path.read_text().splitlines() == [*rows[:2], rows[3]]
    assert "1 damaged lines of" in capsys.readouterr().err
    path.write_text("\n".join([*rows, '{"step": 5, "spl']))
    with Tracker(tmp_path, start_step=9):
        pass
    assert path.read_text().splitlines() == rows
    assert capsys.readouterr().err == ""
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_a_run_of_less_than_a_second_is_in_the_table_of_hyperparameters(tmp_path, monkeypatch):
    """A second event file of that second may sort before the first one: number 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    with Tracker(tmp_path, start_step=0) as tracker:
        tracker.scalars("train", 1, 1, {"bound": 2.0})
        tracker.hyperparameters({"beta": 1.0}, {"final_bound": 2.0}, step=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("final_bound")] == [2.0]
