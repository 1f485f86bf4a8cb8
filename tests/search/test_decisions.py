"""The decision log and the board: whatever was killed and torn, the same trials end the same."""

import json
import math

import numpy as np
import pytest

from vae_hyperband.common.errors import RunFolderError, SearchError
from vae_hyperband.search.config import SearchConfig
from vae_hyperband.search.decisions import (
    COLLAPSED_NATS,
    Board,
    Journal,
    SuggestEvent,
    read_events,
)
from vae_hyperband.search.space import Hyperparameters
from vae_hyperband.search.trials import TrialRecord

CONFIGS = {
    name: SearchConfig(num_trials=11, max_epochs=9, scheduler=name)
    for name in ("asha", "hyperband", "median", "none")
}


def suggest(number: int, trials: list) -> Hyperparameters:
    return Hyperparameters(latent_dim=2, learning_rate=1e-3, batch_size=8, beta=1.0)


def suggested(number: int) -> SuggestEvent:
    return {"event": "draw", "trial": number, "drawn": {"learning_rate": 1e-3 / 3}}


def row(number: int, epoch: int) -> dict:
    """What trial ``number`` reports after that epoch: a function of both, as training is."""
    random = np.random.default_rng((number, 5))
    bound = 250.0 - 20 * random.random() + 3 * np.random.default_rng((number, epoch)).random()
    if number == 4 and epoch == 3:
        bound = math.nan
    kl = 1e-4 if number == 6 else 12.0
    value = bound - epoch
    return {
        "epoch": epoch, "step": 100 * epoch, "bound": value, "total_loss": value,
        "KL_divergence": kl,
    }  # fmt: skip


def work(board: Board, random: np.random.Generator, num_reports: int = 10**6) -> bool:
    """Report for random trials that may run, as several workers would; whether it is finished."""
    for _ in range(num_reports):
        if board.finished:
            break
        runnable = board.runnable()
        if len(board.trials) < 11 and (not runnable or random.random() < 0.3):
            board.suggest_next()
            continue
        trial = board.trials[random.choice(runnable)]
        if trial.number == 8 and trial.num_epochs == 1:
            board.failed(8, "its process died")
        else:
            board.reported(trial.number, row(trial.number, trial.num_epochs + 1))
    return board.finished


def ends(board: Board) -> list[tuple]:
    return [(t.number, t.num_epochs, t.outcome, t.why) for t in board.trials]


@pytest.mark.parametrize("scheduler", CONFIGS)
def test_a_search_killed_anywhere_takes_the_decisions_it_would_have_taken(tmp_path, scheduler):
    """100 searches, each killed up to 8 times, most of them in the middle of writing a line."""
    config = CONFIGS[scheduler]
    with Journal(tmp_path / "undisturbed") as journal:
        undisturbed = Board(config, journal, suggest)
        assert work(undisturbed, np.random.default_rng(0))
    by_outcome = {trial.outcome for trial in undisturbed.trials}
    assert by_outcome >= {"finished", "failed"} | ({"stopped"} if scheduler != "none" else set())
    kills = 0
    for seed in range(100):
        random, path = np.random.default_rng((seed, 99)), tmp_path / f"log-{seed}"
        finished, kills_here = False, 0
        while not finished:
            with Journal(path) as journal:
                budget = int(random.integers(1, 20)) if kills_here < 8 else 10**6
                board = Board(config, journal, suggest)
                finished = work(board, random, budget)
            kills, kills_here = kills + (not finished), kills_here + 1
            content = path.read_bytes()
            last_line = len(content.rstrip(b"\n").rsplit(b"\n", 1)[-1])
            if not finished and random.random() < 0.7:
                path.write_bytes(content[: len(content) - int(random.integers(1, last_line))])
        assert ends(board) == ends(undisturbed)
        rungs = {1, 3, 9} if scheduler in ("asha", "hyperband") else set(range(1, 10))
        for trial in board.trials:
            assert [r["epoch"] for r in trial.rows] == list(range(1, trial.num_epochs + 1))
            assert trial.outcome == "failed" or trial.num_epochs in rungs
    assert kills > 400


def test_what_disqualifies_a_trial_is_named_and_the_others_are_judged_without_it(tmp_path):
    config = SearchConfig(num_trials=11, max_epochs=9, scheduler="none")
    with Journal(tmp_path / "log") as journal:
        board = Board(config, journal, suggest)
        work(board, np.random.default_rng(0))
    whys = {trial.number: trial.why for trial in board.trials if trial.outcome == "failed"}
    assert whys[4] == "bound was nan after epoch 3"
    assert whys[6] == "collapsed: KL 1.0e-04 nats/image after epoch 1, no active unit"
    assert board.best is not None
    assert board.best.number not in whys
    assert all(board.trials[number].score("bound") == math.inf for number in whys)
    config = SearchConfig(num_trials=2, max_epochs=9, metric="iwae")
    with Journal(tmp_path / "other") as journal:
        board = Board(config, journal, suggest)
        board.suggest_next(), board.suggest_next()
        board.reported(0, {**row(0, 1), "iwae": 239.0})
        board.reported(1, row(1, 1))
        assert (board.trials[1].outcome, board.trials[1].why) == (
            "failed",
            "iwae was nan after epoch 1",
        )
        board.reported(0, {**row(0, 3), "iwae": 230.0})
        assert "are not of one search" in board.trials[0].why


def test_a_kl_just_above_the_threshold_is_no_collapse(tmp_path):
    with Journal(tmp_path / "log") as journal:
        board = Board(SearchConfig(num_trials=2), journal, suggest)
        board.suggest_next()
        board.reported(0, {**row(0, 1), "KL_divergence": 1.01 * COLLAPSED_NATS})
        assert board.trials[0].outcome is None
        board.suggest_next()
        untrained = {**row(1, 1), "KL_divergence": 0.1 * COLLAPSED_NATS, "step": 99}
        board.reported(1, untrained)
        assert board.trials[1].outcome != "failed"


def test_a_report_that_was_made_before_changes_nothing(tmp_path):
    with Journal(tmp_path / "log") as journal:
        board = Board(CONFIGS["asha"], journal, suggest)
        board.suggest_next()
        board.reported(0, row(0, 1))
        before = list(journal.events)
        board.reported(0, row(0, 1))
        assert journal.events == before


def test_a_torn_last_line_is_taken_back_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "log"
    with Journal(path) as journal:
        for number in range(4):
            journal.append(suggested(number))
    whole = path.read_bytes()
    first_three = b"".join(whole.splitlines(keepends=True)[:3])
    for end in range(len(first_three), len(whole)):
        path.write_bytes(whole[:end])
        assert len(read_events(path)) == 3
        with Journal(path) as journal:
            assert path.read_bytes() == first_three
            journal.append(suggested(3))
        assert path.read_bytes() == whole
    path.write_bytes(first_three + b"\0" * 50 + b"\n")  # a power cut: the length, not the content
    assert len(read_events(path)) == 3
    for position in range(0, len(first_three), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(SearchError, match=r"Line \d of .* is damaged.*--fresh"):
            Journal(path)


def test_every_line_is_on_disk_before_anything_follows_from_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "vae_hyperband.search.decisions.os.fsync", lambda handle: synced.append(handle)
    )
    with Journal(tmp_path / "log") as journal:
        assert len(synced) == 1  # the name of the file
        seen = []
        board = Board(CONFIGS["asha"], journal, suggest, lambda b, e: seen.append(len(synced)))
        work(board, np.random.default_rng(0), 40)
    assert seen == list(range(2, len(seen) + 2))
    assert len(seen) > 30


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with Journal(path) as journal:
        journal.append(suggested(0))

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vae_hyperband.search.decisions.os.fsync", full)
        with pytest.raises(RunFolderError, match=r"No space left.*the same command goes on"):
            journal.append(suggested(1))
    assert [json.loads(line)["trial"] for line in path.read_text().splitlines()] == [0]


def test_a_trial_counts_by_the_bound_of_its_best_checkpoint():
    """With a low beta that is not the checkpoint with the lowest bound."""
    rows = [
        {"epoch": 1, "bound": 10.0, "total_loss": 9.0},
        {"epoch": 2, "bound": 12.0, "total_loss": 8.0},
    ]
    trial = TrialRecord(0, suggest(0, []), rows)
    assert trial.best_row == rows[1]
    assert trial.score("bound") == 12
