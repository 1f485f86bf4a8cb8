"""Runs in W&B, MLflow and Trackio, read back from their stores by their own packages."""

import dataclasses
import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import command_line
from killing import sigkill
from mlflow import MlflowClient
from PIL import Image
from test_resume import outcome, stop_after

from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.training import tracking
from vae_hyperband.training.loop import fit
from vae_hyperband.training.study import train_side_by_side
from vae_hyperband.training.tracker import logged_pictures, read_rows
from vae_hyperband.training.tracking import IDENTITY, PROJECT

KINDS = ("wandb", "mlflow", "trackio")


@pytest.fixture(autouse=True, scope="session")
def trackio_folder(tmp_path_factory):
    """Trackio reads this variable once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory):
    """An empty store of MLflow's: it takes seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name(PROJECT)
    return path


@pytest.fixture
def tracked(options, mlflow_tables):
    """The places of a run that is tracked; MLflow's store has its tables already."""

    def places(kind: str) -> RunOptions:
        place = options(track=kind)
        if kind == "mlflow":
            place.logs_dir.mkdir(exist_ok=True)
            shutil.copy(mlflow_tables, place.logs_dir / "mlflow.db")
        return place

    return places


@dataclasses.dataclass
class Found:
    """What a tracker has of a run. Lists, so that what is there twice is seen."""

    name: str
    group: str
    settings: dict[str, object]
    facts: dict[str, str]
    values: list[tuple[int, str, float]]
    pictures: list[tuple[int, str, bytes]]


def read_wandb(place: RunOptions, run_id: str) -> Found:
    from wandb.proto.wandb_internal_pb2 import Record

    [folder] = (place.logs_dir / "wandb").glob("offline-run-*-" + run_id)
    found = Found("", "", {}, {}, [], [])
    [file] = folder.glob("*.wandb")
    records, deadline = [], time.monotonic() + 60
    # W&B's own process may write the last records a moment after it has said that it is done
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline
        records = [Record.FromString(line) for line in leveldb_records(file.read_bytes())]
    for record in records:
        if record.HasField("run"):
            found.name, found.group = record.run.display_name, record.run.run_group
            items = record.run.config.update
            found.settings |= {item.key: json.loads(item.value_json) for item in items}
        if record.HasField("summary"):
            items = [(i.key or "/".join(i.nested_key), i.value_json) for i in record.summary.update]
            found.facts |= {key: json.loads(text) for key, text in items if key.startswith("best_")}
        if record.HasField("history"):
            items: dict[str, dict[str, object]] = {}
            for item in record.history.item:
                key, *part = item.nested_key or [item.key]
                items.setdefault(key, {})["".join(part)] = json.loads(item.value_json)
            step = items["_step"][""]
            for key, value in items.items():
                if "path" in value:
                    png = (folder / "files" / value["path"]).read_bytes()
                    found.pictures.append((step, key, png))
                elif not key.startswith("_"):
                    found.values.append((step, key, value[""]))
    return found


def leveldb_records(content: bytes) -> list[bytes]:
    """The records of a file in the format of LevelDB's logs, behind W&B's seven bytes."""
    assert content[:4] == b":W&B"
    block, place, found, parts = 32768, 7, [], b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
    return found


def read_mlflow(place: RunOptions, run_id: str) -> Found:
    client = MlflowClient(f"sqlite:///{place.logs_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT).experiment_id
    [run] = client.search_runs([experiment], f"tags.vae_hyperband_id = '{run_id}'")
    assert run.info.status == "FINISHED"
    tags, pictures = run.data.tags, []
    for tag in [item.path for item in client.list_artifacts(run.info.run_id, "images")]:
        for item in client.list_artifacts(run.info.run_id, tag):
            path = Path(client.download_artifacts(run.info.run_id, item.path))
            pictures.append((int(path.stem.removeprefix("step-")), tag, path.read_bytes()))
    return Found(
        run.info.run_name,
        tags["group"],
        run.data.params,
        {name: tags[name] for name in tags if name.startswith("best_")},
        [
            (value.step, key, value.value)
            for key in run.data.metrics
            for value in client.get_metric_history(run.info.run_id, key)
        ],
        pictures,
    )


def read_trackio(place: RunOptions, run_id: str) -> Found:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    [run] = [run for run in trackio.Api().runs(PROJECT) if run.name.endswith(run_id)]
    found = Found(run.name.removesuffix(f"-{run_id}"), run.config["_Group"], run.config, {}, [], [])
    for row in SQLiteStorage.get_logs(PROJECT, run.name, run_id=run.id):
        for key, value in row.items():
            if key.startswith("best_"):
                found.facts[key] = value
            elif isinstance(value, dict):
                png = (MEDIA_DIR / value["file_path"]).read_bytes()
                found.pictures.append((row["step"], key, png))
            elif key not in ("step", "timestamp"):
                found.values.append((row["step"], key, value))
    return found


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def read_back(place: RunOptions) -> Found:
    run_id = json.loads((place.log_folder / IDENTITY).read_text())["id"]
    return READERS[place.track](place, run_id)


def logged(place: RunOptions) -> list[tuple[int, str, float]]:
    """What metrics.jsonl has, by the tags of TensorBoard."""
    found = []
    for row in read_rows(place.log_folder / "metrics.jsonl"):
        for name, value in row.items():
            if name == "learning_rate":
                found.append((row["step"], name, value))
            elif name not in ("step", "epoch", "split"):
                found.append((row["step"], f"{name}/{row['split']}", value))
    return sorted(found)


def assert_mirrored(place: RunOptions) -> Found:
    found = read_back(place)
    assert sorted(found.values) == logged(place)
    expected = logged_pictures(place.log_folder)
    assert Counter((step, tag) for step, tag, _ in found.pictures) == Counter(
        (step, tag) for step in expected for tag in expected[step]
    )
    for step, tag, png in found.pictures:
        there, here = (
            np.array(Image.open(io.BytesIO(x)).convert("RGB")) for x in (png, expected[step][tag])
        )
        assert np.array_equal(there, here)
    best = load_ckpt(place.ckpt_folder / "best.pt")
    assert found.facts == {
        "best_checkpoint": str(best.path), "best_weights": best.weights_digest
    }  # fmt: skip
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_is_there_once_and_whole(options, small_config, trained_once, kind):
    place = options(track=kind, track_group="g")
    for num_steps in (6, 9, 12):
        cut = fit(small_config, place, should_stop=stop_after(num_steps), quiet=True)
        assert not cut.finished
    result = fit(small_config, place, quiet=True)
    assert outcome(result) == outcome(trained_once)  # the copy changes no bit of the run
    found = assert_mirrored(place)
    assert len(found.values) > 50
    assert {step for step, _, _ in found.pictures} == {0, 10, 20, 30}
    assert (found.name, found.group) == ("g/a", "g")
    assert str(found.settings["latent_dim"]) == "4"
    assert found.settings["checkpoints"] == str(place.ckpt_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_logged_before_the_option_was_given_is_sent_too(
    options, tracked, small_config, kind
):
    """So it is after a kill between a checkpoint and the sending of what it supposes."""
    fit(small_config, options(), should_stop=stop_after(26), quiet=True)
    place = tracked(kind)
    fit(small_config, place, quiet=True)
    assert_mirrored(place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_back_to_an_older_checkpoint_is_another_one_there(
    tracked, small_config, kind
):
    """With more epochs the steps that it takes again have other values."""
    place = tracked(kind)
    fit(small_config, place, quiet=True)
    before = logged(place)
    for name in ("latest.pt", "best.pt"):  # what is left is of step 20
        (place.ckpt_folder / name).unlink()
    fit(dataclasses.replace(small_config, epochs=4), place, quiet=True)
    changed = {item for item in before if item[0] > 20} - set(logged(place))
    assert changed
    assert_mirrored(place)


def test_a_run_of_more_epochs_continues_in_mlflow(tracked, small_config):
    """Its parameters are for ever: what a resumed run changed stands beside them."""
    place = tracked("mlflow")
    fit(small_config, place, quiet=True)
    fit(dataclasses.replace(small_config, epochs=4), place, quiet=True)
    assert assert_mirrored(place).settings["epochs"] == "3"


def test_a_run_that_dies_before_its_first_checkpoint_leaves_nothing_there(options, small_config):
    def dies() -> bool:
        raise RuntimeError("killed")

    for kind in KINDS:
        place = options(run=kind, track=kind)
        with pytest.raises(RuntimeError, match="killed"):
            fit(small_config, place, should_stop=dies, quiet=True)
        assert not (place.log_folder / IDENTITY).exists()
    assert {path.name for path in place.logs_dir.iterdir() if path.is_dir()} == set(KINDS)


def test_the_runs_of_a_study_side_by_side_are_a_group_in_one_store(small_config, options):
    """Two processes make the store's tables, and send to it, at the same time."""
    place = options(run="rd", track="mlflow")
    configs = {f"s{seed}": dataclasses.replace(small_config, seed=seed) for seed in (1, 2)}
    assert train_side_by_side(configs, place, 2, lambda: False, lambda name, losses: None)
    for name in configs:
        one = dataclasses.replace(place, run=f"rd-{name}")
        found = assert_mirrored(one)
        assert (found.name, found.group) == (f"rd/rd-{name}", "rd")


class Broken:
    """A tracker that fails at a call of that name."""

    def __init__(self, call: str) -> None:
        self.call, self.last_step = call, -1
        self.fail("open")

    def fail(self, call: str) -> None:
        if call == self.call:
            raise OSError(28, "No space left on device")

    def log(self, moment: object) -> None:
        self.fail("log")

    def close(self, finished: bool) -> None:
        self.fail("close")


@pytest.mark.parametrize("call", ["open", "log", "close"])
def test_a_tracker_that_fails_costs_nothing_and_is_said_once(
    options, small_config, trained_once, monkeypatch, capsys, call
):
    monkeypatch.setitem(tracking.ADAPTERS, "wandb", lambda run: Broken(call))
    result = fit(small_config, options(track="wandb"), quiet=True)
    assert result.finished
    assert outcome(result) == outcome(trained_once)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "--track wandb failed" in said[0]
    assert "No space left on device" in said[0]


def test_a_server_of_the_user_s_that_is_gone_costs_nothing(
    options, small_config, trained_once, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    result = fit(small_config, options(track="mlflow"), quiet=True)
    assert outcome(result) == outcome(trained_once)
    assert capsys.readouterr().err.count("warning: --track mlflow failed") == 1
    assert not (result.log_folder.parent / "mlflow.db").exists()


def test_a_tracker_that_is_not_installed_is_one_sentence(options, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^--track wandb needs .* pip install 'vae-hyper.*\.$"):
        options(track="wandb")
    # nor is a folder of that name the package: W&B's own files lie in one
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match="needs the package wandb"):
        options(track="wandb")


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_at_random_is_there_once_and_whole(
    options, small_data, tmp_path, trackio_folder, kind
):
    place = options(track=kind, run="k")
    command = command_line(
        "train", "--run", "k", "--dataset", "custom", "--data-dir", small_data, "--latent-dim", 4,
        "--batch-size", 32, "--epochs", 40, "--device", "cpu", "--num-threads", 1,
        "--log-interval", 1, "--ckpt-seconds", 0, "--keep-ckpts", 0, "--track", kind,
    )  # fmt: skip
    random, metrics = np.random.default_rng(5), place.log_folder / "metrics.jsonl"
    kills = 0
    while True:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        size = metrics.stat().st_size if metrics.exists() else 0
        # in its midst: after some more rows than the process before had written
        enough = size + int(random.integers(2_000, 12_000))
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > enough):
            time.sleep(0.002)
        if kills < 6 and process.poll() is None:
            kills += sigkill(process.pid)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 3
    assert_mirrored(place)
