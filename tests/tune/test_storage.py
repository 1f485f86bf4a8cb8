"""Where trials lie: a folder, or a URL of Arrow's file systems."""

import pytest

from vae_hyperband.common.errors import SearchError
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.tune import storage
from vae_hyperband.tune.storage import TrialStore, store_for


def test_a_url_store_gives_back_what_was_pushed(tmp_path):
    store = TrialStore(f"file://{tmp_path}/bucket/s/trials")
    store.check()
    folder = store.work_folder("trial_000")
    assert list(folder.iterdir()) == []
    (folder / "latest.pt").write_bytes(b"one")
    store.push("trial_000", folder)
    (folder / "latest.pt").write_bytes(b"two, not pushed")
    store.discard(folder)
    assert not folder.exists()
    again = store.work_folder("trial_000")
    assert (again / "latest.pt").read_bytes() == b"one"
    store.fetch("trial_000", "latest.pt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"one"
    store.discard(again)
    assert list(store.work_folder("trial_001").iterdir()) == []


def test_a_folder_store_is_trained_in_without_copies(tmp_path):
    options = SearchOptions(
        run="s", checkpoints_dir=tmp_path, logs_dir=tmp_path / "logs"
    ).absolute()
    store = store_for(options, "12ab")
    folder = store.work_folder("trial_000")
    assert folder == tmp_path / "s/trials/trial_000"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"one")
    store.push("trial_000", folder)
    store.discard(folder)
    store.fetch("trial_000", "best.pt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"one"


def test_the_options_of_a_url_stay_at_its_end():
    options = SearchOptions(run="r", storage="s3://bucket/folder/?endpoint_override=h:1")
    store = store_for(options, "12ab")  # of another search of that name: another folder
    assert store.root == "s3://bucket/folder/r-12ab?endpoint_override=h:1"
    named = store._url("trial_000/best.pt")
    assert named == "s3://bucket/folder/r-12ab/trial_000/best.pt?endpoint_override=h:1"


def test_the_checkpoint_that_speaks_of_the_others_is_pushed_last(tmp_path, monkeypatch):
    """A kill in between must not leave a latest.pt that names a best.pt that is not there."""
    store = TrialStore(f"file://{tmp_path}/bucket")
    folder = store.work_folder("trial_000")
    names = ("latest.pt", "best.pt", "logs/trial_000/metrics.jsonl", "zzz", "logs/.trial_000.lock")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    pushed = []
    real = storage.fs.copy_files

    def copy(source, target, **options):
        pushed.append(target.rpartition("/")[2])
        real(source, target, **options)

    monkeypatch.setattr(storage.fs, "copy_files", copy)
    store.push("trial_000", folder)
    assert pushed[-1] == "latest.pt"
    assert sorted(pushed) == ["best.pt", "latest.pt", "metrics.jsonl", "zzz"]
    again = store.work_folder("trial_000")
    assert (again / "logs/trial_000/metrics.jsonl").read_text().endswith("metrics.jsonl")


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    for root in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(SearchError, match=r"cannot be used .*give a folder or a URL"):
            TrialStore(root).fetch("trial_000", "best.pt", tmp_path / "copy")
