"""A real Ray, real trials on small data. Each search is a process, as a user would start it."""

import dataclasses
import json
import signal
import socket
import subprocess
import sys

import pytest
from conftest import NAMES, command_line, search_command

from vae_hyperband.common.errors import ConfigError, SearchError
from vae_hyperband.common.process import EXIT_STOPPED
from vae_hyperband.model.checkpoint import load_ckpt, load_model
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.search.decisions import Journal
from vae_hyperband.search.space import Choice, Space, read_space, shown
from vae_hyperband.search.trials import read_result
from vae_hyperband.tune.driver import existing_search


def test_every_listening_socket_of_a_search_is_on_loopback(searched):
    addresses = json.loads((searched[0] / "addresses.json").read_text())
    assert len(addresses) > 3
    assert {address for address, _ in addresses} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert 8265 not in {port for _, port in addresses}  # Ray's dashboard


def test_a_search_never_opens_the_test_file(searched):
    folder, _ = searched
    assert sorted(p.name for p in (folder / "data").iterdir()) == [NAMES[0], NAMES[1]]
    assert (folder / "checkpoints/s/best_config.json").exists()


def test_asha_stops_trials_at_its_rungs_and_says_what_that_saved(searched):
    folder, said = searched
    result = read_result(folder / "checkpoints/s")
    assert len(result.trials) == 9
    epochs = [trial.num_epochs for trial in result.trials]
    assert set(epochs) <= {1, 3, 9}  # rungs of grace period 1, reduction factor 3
    assert 9 in epochs
    num_stopped = len(result.with_outcome("stopped"))
    assert num_stopped == sum(n < 9 for n in epochs) >= 3
    assert result.epochs_saved == sum(9 - n for n in epochs)
    assert f"{num_stopped} of 9 trials stopped early, 0 failed" in said
    assert f"{sum(epochs)} epochs trained, {result.epochs_saved} saved" in said
    for trial in result.trials:
        assert trial.curve("epoch") == list(range(1, trial.num_epochs + 1))
        assert trial.outcome == ("finished" if trial.num_epochs == 9 else "stopped")
        assert trial.outcome == "finished" or f"after epoch {trial.num_epochs} was" in trial.why


def test_the_winner_has_the_lowest_validation_bound_at_beta_1(searched):
    folder, _ = searched
    result = read_result(folder / "checkpoints/s")
    assert result.best_score == min(b for t in result.trials for b in t.curve("bound"))
    best = json.loads((folder / "checkpoints/s/best_config.json").read_text())
    assert best["metric"]["value"] == result.best_score
    assert best["config"] == result.best_config.to_dict()
    winner = load_ckpt(folder / "checkpoints/s/winner.pt")
    assert winner.metrics["bound"] == result.best_score
    assert load_model(folder / "checkpoints/s/winner.pt").latent_dim == best["config"]["latent_dim"]


def test_training_best_config_json_alone_gives_the_reported_metric_bit_for_bit(
    searched, small_data, fork
):
    folder, _ = searched
    best = json.loads((folder / "checkpoints/s/best_config.json").read_text())
    done = fork(
        "train", "--config", folder / "checkpoints/s/best_config.json", "--run", "again",
        "--data-dir", small_data, "--device", "cpu", "--checkpoints-dir", folder / "again",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = load_ckpt(folder / "again/again/best.pt")
    assert alone.metrics["bound"] == best["metric"]["value"]
    assert alone.metrics["epoch"] == best["metric"]["epoch"]


def test_every_trial_wrote_tensorboard_and_json_logs(searched):
    folder, _ = searched
    trials = sorted((folder / "logs/s").glob("trial_*"))
    assert [t.name for t in trials] == [f"trial_{i:03d}" for i in range(9)]
    for trial in trials:
        assert (trial / "metrics.jsonl").stat().st_size > 0
        assert list(trial.glob("events.out.tfevents.*"))
    assert (folder / "logs/s/best_config.png").stat().st_size > 10_000


def test_the_same_command_again_repeats_nothing_and_another_space_is_refused(
    searched, forks, tmp_path
):
    folder, said = searched
    arguments = ["--num-trials", 9, "--max-epochs", 9, "--reduction-factor", 3]
    command = search_command(folder / "data", "s", *arguments)
    before = (folder / "checkpoints/s/trials.json").stat().st_mtime_ns
    done = forks.completed(command[3:], folder, tmp_path)
    assert done.returncode == 0
    num_lines = len(done.stdout.splitlines())
    assert 4 <= num_lines <= 5  # with or without importances
    assert done.stdout.splitlines() == said.splitlines()[-num_lines:]
    assert (folder / "checkpoints/s/trials.json").stat().st_mtime_ns == before
    done = forks.completed([*command[3:], "--seed", "1"], folder, tmp_path)
    assert done.returncode == 2
    assert "other settings (seed: 0 -> 1)" in done.stderr


@pytest.fixture(scope="module")
def hyperband(tmp_path_factory, small_data):
    """A finished HyperBand search whose trials share some settings: its folder, what it printed.

    KL weights of 1e38 overflow float32 in the gradient: those trials fail in their first steps.
    """
    folder = tmp_path_factory.mktemp("hyperband")
    command = search_command(
        small_data, "h", "--scheduler", "hyperband", "--num-trials", 6, "--max-epochs", 4,
        "--reduction-factor", 2, "--prior", "vamp", "--pseudo-inputs", 4, "--likelihood",
        "discretized-logistic", "--kl-warmup-epochs", 1, "--betas", 1, 1e38,
    )  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "checkpoints/h", done.stdout


def test_all_trials_share_the_settings_that_are_not_searched(hyperband):
    shared = {
        "prior": "vamp", "pseudo_inputs": 4, "likelihood": "discretized-logistic",
        "kl_warmup_epochs": 1.0,
    }  # fmt: skip
    folder, _ = hyperband
    winner = load_ckpt(folder / "winner.pt")
    assert winner.config.to_dict().items() >= shared.items()
    assert read_result(folder).best_config.to_dict().items() >= shared.items()


def test_hyperband_runs_to_its_end(hyperband):
    result = read_result(hyperband[0])
    assert len(result.trials) == 6
    assert max(t.num_epochs for t in result.trials) == 4
    for trial in result.trials:  # a paused trial went on from its checkpoint, not from epoch 0
        assert trial.curve("epoch") == list(range(1, trial.num_epochs + 1))


def test_a_trial_that_diverges_ranks_last_and_harms_no_other(hyperband):
    folder, said = hyperband
    result = read_result(folder)
    wild = [trial for trial in result.trials if trial.hyperparameters["beta"] > 1]
    assert 0 < len(wild) < 6
    for trial in result.trials:
        assert (trial.outcome == "failed") == (trial in wild)
        assert (f"{trial.name} failed: diverged: " in said) == (trial in wild)
    assert all(trial.why.startswith("diverged: Training diverged at step") for trial in wild)
    # failing is not stopping early
    stopped = [trial for trial in result.trials if trial.outcome == "stopped"]
    assert result.epochs_saved == sum(4 - trial.num_epochs for trial in stopped)
    assert result.winner.hyperparameters["beta"] == 1
    assert f"{len(wild)} failed" in said


def test_a_search_in_a_thread_works_without_signals(tmp_path, small_data):
    """As in a notebook server, where the main thread is not the caller's."""
    script = (
        "import signal, sys, threading\n"
        "from pathlib import Path\n"
        "from vae_hyperband.search.config import SearchConfig, SearchOptions\n"
        "from vae_hyperband.tune.driver import search\n"
        "config = SearchConfig(dataset='custom', num_trials=2, max_epochs=1, scheduler='none',\n"
        "                      batch_sizes=(64,))\n"
        "options = SearchOptions(run='t', data_dir=Path(sys.argv[1]), device='cpu')\n"
        "found, handlers = [], [signal.getsignal(number) for number in range(1, 32)]\n"
        "thread = threading.Thread(target=lambda: found.append(search(config, options)))\n"
        "thread.start()\n"
        "thread.join()\n"
        "assert handlers == [signal.getsignal(number) for number in range(1, 32)]\n"
        "print('best', found[0].best_score)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, small_data],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "checkpoints/t")
    assert [trial.outcome for trial in result.trials] == ["finished"] * 2
    assert done.stdout.endswith(f"best {result.best_score}\n")


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_search_cleanly_and_the_same_command_goes_on(tmp_path, small_data, number):
    command = search_command(
        small_data, "c", "--scheduler", "asha", "--num-trials", 6, "--max-epochs", 60,
        "--reduction-factor", 4,
    )  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "epoch 3/60" in line:
                break
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == EXIT_STOPPED
    assert "vae-hyperband search --run c" in said
    assert not (tmp_path / "checkpoints/c/trials.json").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resuming the search" in done.stdout
    result = read_result(tmp_path / "checkpoints/c")
    assert len(result.trials) == 6
    assert max(trial.num_epochs for trial in result.trials) == 60
    for trial in result.trials:
        assert trial.outcome in ("finished", "stopped")
        assert trial.curve("epoch") == list(range(1, trial.num_epochs + 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_trials": 0}, "--num-trials is 0"),
        ({"max_epochs": 1}, "nothing to stop"),
        ({"scheduler": "median", "grace_period": 9}, "nothing to stop"),
        ({"scheduler": "hyperband", "max_epochs": 2}, "no rung"),
        ({"num_trials": 1}, "there is only one"),
        ({"latent_dims": (16, 16)}, "a value twice"),
        ({"metric": "loss"}, "must be one of"),
        ({"algorithm": "bohb"}, "must be one of"),
        ({"reduction_factor": 1}, "--reduction-factor is 1"),
        ({"latent_dims": (16, 0)}, "--latent-dim is 0"),
        ({"batch_sizes": ()}, "needs at least one value"),
        ({"betas": (-1.0,)}, "--beta is -1"),
        ({"learning_rates": (1e-2, 1e-3)}, "0 < lowest < highest"),
        ({"scheduler": "bohb"}, "must be one of"),
        ({"objective": "iwae", "betas": (1.0, 2.0)}, "no KL term to weigh"),
        ({"objective": "beta-tc", "betas": (4.0,), "prior": "vamp"}, "splits the KL by dimension"),
        ({"metric": "fid", "binarize": "dynamic"}, "FID compares grey images"),
        ({"objective": "beta-tc"}, "with a beta of 1 is the ELBO"),
        ({"likelihood": "continuous-bernoulli", "binarize": "dynamic"}, "needs grey pixels"),
    ],
)
def test_impossible_searches_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**wrong)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("--device", "cuda", "--gpus-per-trial", 300), "300 GPU"),
        pytest.param(("--cpus-per-trial", 1000), "1000 CPU", marks=pytest.mark.faults),
    ],
    ids=["GPUs", "CPUs"],
)
def test_more_resources_than_there_are_is_one_sentence_not_a_wait(
    tmp_path, small_data, asked, named
):
    command = search_command(small_data, "r", *asked)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("listening", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_an_address_without_a_ray_is_one_sentence(tmp_path, small_data, listening):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # listens, but is no Ray
        port = silent.getsockname()[1]
        if not listening:
            silent.close()
        command = search_command(small_data, "a", "--address", f"127.0.0.1:{port}")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"No Ray cluster answers at 127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_space_is_searched_and_a_changed_one_is_refused_by_name(tmp_path, small_data):
    space = tmp_path / "space.toml"
    space.write_text(
        "latent_dim = {range = [2, 4]}\nfree_bits = {log_range = [0.01, 0.2]}\nbatch_size = 32\n"
        'objective = "free-bits"\nschedule = {choice = ["one-cycle", "constant"]}\n'
    )
    command = command_line(
        "search", "--run", "p", "--dataset", "custom", "--data-dir", small_data, "--device", "cpu",
        "--num-trials", 3, "--max-epochs", 2, "--space", space,
    )  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints/p"
    result = read_result(folder)
    for trial in result.trials:
        trained = load_ckpt(folder / "trials" / trial.name / "latest.pt").config
        assert trained.to_dict().items() >= trial.hyperparameters.to_dict().items()
        assert (trained.objective, trained.batch_size) == ("free-bits", 32)
        assert 2 <= trained.latent_dim <= 4
    assert f"free_bits {shown(result.winner.hyperparameters['free_bits'])}" in done.stdout
    best = json.loads((folder / "best_config.json").read_text())
    assert best["config"] == result.best_config.to_dict()
    assert json.loads((folder / "search.json").read_text())["space"]["batch_size"] == {
        "choice": [32]
    }
    config = SearchConfig(dataset="custom", num_trials=3, max_epochs=2, space=read_space(space))
    options = SearchOptions(run="p", checkpoints_dir=tmp_path / "checkpoints")
    assert existing_search(config, options.absolute())  # the same resumes
    for text, changed in (
        (space.read_text().replace("0.2", "0.3"), r"free_bits in --space: .*0\.2.* -> .*0\.3"),
        (space.read_text().replace("batch_size = 32\n", ""), "batch_size in --space: .* -> None"),
    ):
        space.write_text(text)
        with pytest.raises(SearchError, match=rf"other settings \({changed}.*: give the same ones"):
            existing_search(
                dataclasses.replace(config, space=read_space(space)), options.absolute()
            )


def test_a_search_that_was_begun_without_a_space_resumes(tmp_path):
    """As version 0.2 began it: its settings have no such name."""
    folder = tmp_path / "checkpoints/old"
    folder.mkdir(parents=True)
    config, options = SearchConfig(), SearchOptions(run="old", checkpoints_dir=folder.parent)
    settings = {**config.to_dict(), "id": "0", "storage": None}
    del settings["space"]
    (folder / "search.json").write_text(json.dumps(settings))
    start = {"event": "start", "host": "h", "process": 1, "ray": "2", "python": "3", "data": {}}
    with Journal(folder / "decisions.jsonl") as journal:
        journal.append(start)
    assert existing_search(config, options.absolute()) == "0"
    wide = SearchConfig(space=Space({"latent_dim": Choice((2, 4))}))
    with pytest.raises(SearchError, match=r"latent_dim in --space: None -> \{'choice': \[2, 4\]\}"):
        existing_search(wide, options.absolute())
