"""A trial in this process, its reports caught here: what goes wrong ends as a report."""

import contextlib

import pytest
import torch
from conftest import write_idx_folder

from vae_hyperband.common.errors import FolderInUseError, RunFolderError
from vae_hyperband.data.splits import load_split
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.search.config import SearchConfig, SearchOptions
from vae_hyperband.training.loop import fit
from vae_hyperband.tune import worker
from vae_hyperband.tune.storage import TrialStore
from vae_hyperband.tune.worker import SharedSplit, TrialJob

TRIED = {"latent_dim": 2, "learning_rate": 4e-3, "batch_size": 32, "beta": 1.0}


class Paused(SystemExit):
    """What Ray raises in a trial that the search pauses or stops."""


@pytest.fixture
def train(tmp_path, small_data, monkeypatch):
    """``train(pause_at=2)`` runs trial 0 and returns its reports; ``train.folder`` is its own."""
    config = SearchConfig(max_epochs=3, dataset="custom", batch_sizes=(32,), latent_dims=(2,))
    options = SearchOptions(
        run="s", checkpoints_dir=tmp_path / "c", logs_dir=tmp_path / "l", device="cpu"
    )

    def run(pause_at=None, tried=TRIED, data=small_data, **changes):
        reports = []
        splits = [load_split(name, data, "custom") for name in ("train", "validation")]

        def report(row):
            reports.append(row)
            if row.get("epoch") == pause_at:
                raise Paused

        monkeypatch.setattr(worker.tune, "report", report)
        with contextlib.suppress(Paused):
            worker.train_trial(
                {"number": 0, "hyperparameters": tried},
                job=TrialJob(
                    config,
                    SearchOptions(**{**vars(options), **changes}),
                    TrialStore(str(tmp_path / "t")),
                    tuple(map(SharedSplit.of, splits)),
                    "cpu",
                ),
            )
        return reports

    run.folder = tmp_path / "t/trial_000"
    return run


def test_a_paused_trial_says_again_where_it_is_and_goes_on_as_if_it_had_not_been(train, tmp_path):
    first = train(pause_at=2)
    assert [row["epoch"] for row in first] == [1, 2]
    second = train()
    assert [row["epoch"] for row in second] == [2, 3]
    assert second[0] == first[1]
    bits = load_ckpt(train.folder / "latest.pt").digest
    for file in train.folder.iterdir():
        file.unlink()
    whole = train()
    assert [row["epoch"] for row in whole] == [1, 2, 3]
    assert whole == [*first, second[1]]
    assert load_ckpt(train.folder / "latest.pt").digest == bits


def test_an_error_is_tried_again_from_the_checkpoint_and_then_reported(train, monkeypatch):
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(worker, "fit", failing)
    [row] = train(max_failures=2)
    assert row == {
        "failed": "out of memory: CUDA out of memory. Tried to allocate 7 GiB; tried 3 times"
    }
    assert len(calls) == 3


def test_an_error_that_passes_costs_nothing(train, monkeypatch):
    calls = []

    def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 2):
            raise RunFolderError("No space left on device")
        return fit(*args, **kwargs)

    monkeypatch.setattr(worker, "fit", flaky)
    assert [row["epoch"] for row in train(max_failures=2)] == [1, 2, 3]


def test_progress_gives_a_trial_all_its_attempts_back(train, monkeypatch):
    """Two failures in each epoch are more than two, but none of them without progress between."""

    def flaky(*args, on_validation, **kwargs):
        if flaky.calls % 3 != 2:
            flaky.calls += 1
            raise OSError("a bad moment")

        def one_epoch(state):
            on_validation(state)
            flaky.calls += 1
            raise OSError("after an epoch")

        return fit(*args, on_validation=one_epoch, **kwargs)

    flaky.calls = 0
    monkeypatch.setattr(worker, "fit", flaky)
    epochs = [row.get("epoch") for row in train(max_failures=3)]
    assert sorted(set(epochs)) == [1, 2, 3]


def test_divergence_is_not_tried_again(train, monkeypatch):
    calls = []
    monkeypatch.setattr(worker, "fit", lambda *a, **k: (calls.append(1), fit(*a, **k))[1])
    [row] = train(tried=TRIED | {"beta": 1e38})
    assert row["failed"].startswith("diverged: Training diverged at step")
    assert len(calls) == 1


def test_what_cannot_even_begin_is_a_report_and_no_error_of_rays(train, monkeypatch):
    def broken(self, name):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(TrialStore, "work_folder", broken)
    assert train() == [{"failed": "PermissionError: [Errno 13] Permission denied"}]


def test_a_trial_of_other_data_is_refused_and_not_thrown_away(train, tmp_path):
    train(pause_at=2)
    before = (train.folder / "latest.pt").read_bytes()
    other = write_idx_folder(tmp_path / "other", num_train=240)
    [_, row] = train(data=other)
    assert row["failed"].startswith("ResumeError: ")
    assert (train.folder / "latest.pt").read_bytes() == before


def test_damaged_checkpoints_cost_a_trial_no_report(train):
    """It goes on from the best one, if that is good, else from its start."""
    whole = train()
    for name, first in (("latest.pt", "best.pt"), ("best.pt", None)):
        best_epoch = load_ckpt(train.folder / first).epoch if first else 1
        for path in {train.folder / "latest.pt", train.folder / name}:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))
        assert train() == whole[best_epoch - 1 :]


def test_a_trial_whose_last_process_is_still_dying_waits_for_its_lock(train, monkeypatch):
    calls = []

    def busy(*args, **kwargs):
        calls.append(1)
        if len(calls) <= 5:
            raise FolderInUseError("in use by process 1 on another node")
        return fit(*args, **kwargs)

    monkeypatch.setattr(worker, "fit", busy)
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    assert [row["epoch"] for row in train(max_failures=0)] == [1, 2, 3]


def test_the_shared_split_is_the_same_memory(small_data):
    split = load_split("train", small_data, "custom")
    shared = SharedSplit.of(split)
    again = shared.split()
    assert again.images_NCHW.data_ptr() == split.images_NCHW.data_ptr()
    assert again.digest == split.digest
    shared.images_NCHW.setflags(write=False)  # as Ray's are
    assert torch.equal(shared.split().images_NCHW, split.images_NCHW)


def test_being_paused_at_the_same_place_again_and_again_is_no_failure(train):
    for _ in range(4):
        assert train(pause_at=1, max_failures=0)[-1]["epoch"] == 1
    assert [row["epoch"] for row in train(max_failures=0)] == [1, 2, 3]
