"""The search's logs in Ray Tune's format: read by Ray's own tools, the same after any kill."""

import json
import math
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from ray.tune import ExperimentAnalysis, ResultGrid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.decisions import Board, Journal
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import read_result
from vae_hyperband.training.tracking import PROJECT
from vae_hyperband.tune.logs import PARAMS, PROGRESS, RESULTS, SearchLogs

FILES = (RESULTS, PROGRESS, PARAMS)
CONFIG = SearchConfig(num_trials=6, max_epochs=9, scheduler="asha")


def hyperparameters(number: int, trials: list) -> Hyperparameters:
    return Hyperparameters(latent_dim=2 + number, learning_rate=1e-3, batch_size=8, beta=1.0)


def row(number: int, epoch: int) -> dict:
    bound = math.nan if (number, epoch) == (4, 2) else 250.0 - number - epoch
    return {
        "step": 100 * epoch, "epoch": epoch, "recon_loss": bound - 10, "KL_divergence": 10.0,
        "total_loss": bound, "bound": bound,
    }  # fmt: skip


def options(folder: Path) -> SearchOptions:
    return SearchOptions(
        run="s", checkpoints_dir=folder / "c", logs_dir=folder / "l", device="cpu"
    ).absolute()


def train(board: Board, num_reports: int) -> None:
    """Report for the first trial that may run."""
    for _ in range(num_reports):
        if board.finished:
            return
        if len(board.trials) < CONFIG.num_trials and len(board.runnable()) < 2:
            board.suggest_next()
            continue
        trial = board.trials[board.runnable()[0]]
        board.reported(trial.number, row(trial.number, trial.num_epochs + 1))


def finished(place: SearchOptions) -> Board:
    """The board of a search there that ran to its end."""
    place.ckpt_folder.mkdir(parents=True)
    with Journal(place.ckpt_folder / "log") as journal:
        board = Board(CONFIG, journal, hyperparameters, logs := SearchLogs(place))
        logs.write(board)
        train(board, 10**6)
        logs.write_state(board)
    return board


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in FILES
        for path in sorted(folder.glob(f"trial_*/{name}"))
    }


def test_the_logs_are_the_same_whatever_was_killed_and_torn(tmp_path):
    calm, storm = options(tmp_path / "calm"), options(tmp_path / "storm")
    for place in (calm, storm):
        place.ckpt_folder.mkdir(parents=True)
    with Journal(calm.ckpt_folder / "log") as journal:
        board = Board(CONFIG, journal, hyperparameters, logs := SearchLogs(calm))
        logs.write(board)
        train(board, 10**6)
        assert board.finished
    expected = written(calm.log_folder)
    assert len(expected) == 3 * CONFIG.num_trials

    random = np.random.default_rng(3)
    for _ in range(200):
        with Journal(storm.ckpt_folder / "log") as journal:
            board = Board(CONFIG, journal, hyperparameters, logs := SearchLogs(storm))
            logs.write(board)
            train(board, int(random.integers(1, 4)))
        if board.finished:
            break
        for path in storm.log_folder.glob("trial_*/*"):  # what a kill may leave of a file
            if random.random() < 0.3:
                path.write_bytes(path.read_bytes()[: int(random.integers(0, 200))])
    assert written(storm.log_folder) == expected


def test_logs_that_cannot_be_written_do_not_end_a_search(tmp_path, capsys):
    (tmp_path / "l").touch()  # a file, where the folder of logs should be
    place = options(tmp_path)
    board = finished(place)
    assert board.finished
    assert capsys.readouterr().err.count("note: the search's own logs are not written") == 1


def test_trials_that_failed_are_errors_to_ray(tmp_path):
    place = options(tmp_path)
    board = finished(place)
    failed = [trial for trial in board.trials if trial.outcome == "failed"]
    assert [trial.number for trial in failed] == [4]
    found = ResultGrid(ExperimentAnalysis(str(place.log_folder)))
    assert len(found) == CONFIG.num_trials
    assert found.num_errors == 1
    assert (place.log_folder / "trial_004/error.txt").read_text() == failed[0].why + "\n"
    assert not (place.log_folder / ".validate_storage_marker").exists()


def test_ray_s_analysis_finds_the_trials_and_the_winner_of_a_search(searched):
    folder = searched[0]
    result = read_result(folder / "checkpoints/s")
    found = ExperimentAnalysis(str(folder / "logs/s"), default_metric="bound", default_mode="min")
    assert found.best_trial.trial_id == result.winner.name
    assert found.best_config == result.winner.hyperparameters.to_dict()
    assert len(found.trials) == len(result.trials) == 9
    for trial in result.trials:
        table = pd.read_csv(folder / "logs/s" / trial.name / PROGRESS)
        assert table["bound"].tolist() == pytest.approx(trial.curve("bound"), rel=1e-15)
        assert table["training_iteration"].tolist() == trial.curve("epoch")
        lines = (folder / "logs/s" / trial.name / RESULTS).read_text().splitlines()
        assert [json.loads(line)["bound"] for line in lines] == trial.curve("bound")
        table = pd.read_json(folder / "logs/s" / trial.name / RESULTS, lines=True)
        assert table["bound"].tolist() == pytest.approx(trial.curve("bound"), rel=1e-9)
        params = json.loads((folder / "logs/s" / trial.name / PARAMS).read_text())
        assert params == found.get_all_configs()[trial.name]
        assert found.trial_dataframes[trial.name]["step"].tolist() == trial.curve("step")
        last = table["done"].tolist()  # as Ray has it: also of a trial that was stopped
        assert last == [False] * (len(last) - 1) + [True]
    best = ResultGrid(found).get_best_result(metric="bound", mode="min")
    assert best.metrics["bound"] == result.best_score


def test_optuna_finds_the_trials_and_the_winner_of_a_search(searched):
    folder = searched[0]
    result = read_result(folder / "checkpoints/s")
    found = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'optuna.db'}")
    assert found.best_trial.user_attrs["name"] == result.winner.name
    assert found.best_value == result.best_score
    there = {one.user_attrs["number"]: one for one in found.trials}
    assert sorted(there) == [trial.number for trial in result.trials]
    assert len(found.trials) == len(there)
    states = {"finished": "COMPLETE", "stopped": "PRUNED"}
    for trial in result.trials:
        one = there[trial.number]
        assert one.state.name == states[trial.outcome]
        assert list(one.intermediate_values.values()) == trial.curve("bound")
        assert one.params == trial.hyperparameters.to_dict()


def test_each_trial_of_a_search_is_a_run_of_its_group_in_mlflow(searched):
    folder = searched[0]
    result = read_result(folder / "checkpoints/s")
    client = MlflowClient(f"sqlite:///{folder / 'logs/s/mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT).experiment_id
    runs = {
        run.info.run_name: run
        for run in client.search_runs([experiment], "tags.group = 's'", max_results=99)
    }
    assert sorted(runs) == [f"s/{trial.name}" for trial in result.trials]
    for trial in result.trials:
        run = runs[f"s/{trial.name}"]
        history = client.get_metric_history(run.info.run_id, "bound/validation")
        expected = list(zip(trial.curve("step"), trial.curve("bound"), strict=True))
        assert sorted((value.step, value.value) for value in history) == expected
        assert run.data.params["latent_dim"] == str(trial.hyperparameters["latent_dim"])


def hparams_row(folder: Path) -> tuple[dict, str, dict[str, float]]:
    """A run's row of TensorBoard's HParams table: settings, status, and values by tag."""
    events = EventAccumulator(str(folder)).Reload()
    start, end = (
        HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
        for tag in (SESSION_START_INFO_TAG, SESSION_END_INFO_TAG)
    )
    settings = {
        name: value.string_value or value.number_value
        for name, value in start.session_start_info.hparams.items()
    }
    status = Status.Name(end.session_end_info.status)
    values = {
        tag: events.Scalars(tag)[-1].value
        for tag in ("best_bound", "final_bound")
        if tag in events.Tags()["scalars"]
    }
    return settings, status, values


def test_tensorboard_s_table_has_every_trial_of_a_search_and_its_outcome(searched):
    result = read_result(searched[0] / "checkpoints/s")
    assert {trial.outcome for trial in result.trials} >= {"finished", "stopped"}
    for trial in result.trials:
        settings, status, values = hparams_row(searched[0] / "logs/s" / trial.name)
        assert settings["outcome"] == trial.outcome
        assert settings["learning_rate"] == trial.hyperparameters["learning_rate"]
        assert status == "STATUS_SUCCESS"
        assert values["final_bound"] == pytest.approx(trial.curve("bound")[-1], rel=1e-6)
        assert values["best_bound"] == pytest.approx(min(trial.curve("bound")), rel=1e-6)


def test_a_trial_that_failed_has_its_row_once_whatever_was_killed(tmp_path):
    place = options(tmp_path)
    board = finished(place)
    rows = list(place.log_folder.glob("trial_*/events.out.tfevents.*.outcome"))
    ended = [trial.name for trial in board.trials if trial.outcome != "finished"]
    assert sorted(path.parent.name for path in rows) == ended
    settings, status, values = hparams_row(place.log_folder / "trial_004")
    assert (settings["outcome"], status) == ("failed", "STATUS_FAILURE")
    assert values["final_bound"] == board.trials[4].rows[-1]["bound"]
    rows[0].unlink()  # a kill came before it
    SearchLogs(place).write(board)
    again = place.log_folder.glob("trial_*/events.out.tfevents.*.outcome")
    assert sorted(path.parent.name for path in again) == ended
