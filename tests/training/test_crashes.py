"""Kills, power cuts, full disks: what was saved is there, and the run ends as if none had come."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk import Change, crashes, watch
from forking import kill
from test_resume import digests, scalars, stop_after

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import CheckpointError, FolderInUseError, RunFolderError
from vae_hyperband.model import checkpoint
from vae_hyperband.model.checkpoint import load_ckpt
from vae_hyperband.training import keeper, loop
from vae_hyperband.training.keeper import newest_good
from vae_hyperband.training.loop import fit
from vae_hyperband.training.tracker import _rows_until, read_rows


def train_arguments(run: str, data: Path, **changes: object) -> list[object]:
    settings = {
        "run": run, "dataset": "custom", "data-dir": data, "device": "cpu", "num-threads": 1,
        "latent-dim": 2, "batch-size": 16, "epochs": 3, "ckpt-seconds": 0, "log-interval": 5,
        "learning-rate": 0.02,
    }  # fmt: skip
    return [
        "train",
        *(part for name, value in (settings | changes).items() for part in (f"--{name}", value)),
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, small_data):
    """What a run of two epochs, stopped once within one, does to its files, and its log."""
    place = tmp_path_factory.mktemp("powercut")
    config = TrainConfig(dataset="custom", latent_dim=1, batch_size=100, epochs=2)
    options = RunOptions(
        run="a", device="cpu", num_threads=1, data_dir=small_data, ckpt_seconds=0,
        checkpoints_dir=place / "c", logs_dir=place / "l", log_interval=1,
    )  # fmt: skip
    changes: list[Change] = []

    def on_change(change: Change) -> None:
        last = changes[-1] if changes else None
        if last and change.kind == last.kind == "write" and change.path == last.path:
            changes[-1] = last._replace(what=last.what + change.what)
        else:
            changes.append(change)

    real_save = keeper.Keeper.save

    def save(self, content, improved):
        real_save(self, content, improved)
        changes.append(Change("said", ".", content.step))

    with pytest.MonkeyPatch.context() as patch:
        watch(place, on_change, patch.setattr)
        patch.setattr(loop.Keeper, "save", save)
        fit(config, options, should_stop=stop_after(2), quiet=True)
        fit(config, options, quiet=True)
    rows = read_rows(place / "l/a/metrics.jsonl")
    assert {change.what for change in changes if change.kind == "said"} == {1, 2, 3, 4, 5, 6}
    return changes, rows


@pytest.fixture
def loaded_once(monkeypatch):
    """The same bytes are read by the real function once only: most states share most files."""
    known = {}

    def load(path):
        content = Path(path).read_bytes()
        if content not in known:
            try:
                known[content] = load_ckpt(path)
            except CheckpointError as error:
                known[content] = error
        if isinstance(known[content], CheckpointError):
            raise known[content]
        return known[content]

    monkeypatch.setattr(keeper, "load_ckpt", load)
    return load


def violation(changes: list[Change], rows: list, folder: Path, load) -> str | None:
    """Where a power cut loses something, if anywhere."""
    num_cuts = 0
    for number, left in crashes(changes):
        num_cuts += 1
        said = [c.what for c in changes[:number] if c.kind == "said"]
        shutil.rmtree(folder, ignore_errors=True)
        for path, content in left.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        where = f"after {number} changes, the last one {changes[number - 1][:2]}"
        try:
            found = newest_good(folder / "c/a")
            for path in (folder / "c/a").glob("*.pt"):
                load(path)
        except CheckpointError as error:
            return f"{where}: {error}"
        if found is None:
            if said:
                return f"{where}: no checkpoint, but step {said[-1]} was said to be saved"
            continue
        step = found.step
        if said and step < said[-1]:
            return f"{where}: step {step}, but {said[-1]} was said to be saved"
        if said and not list((folder / "l/a").glob("events.out.tfevents.*")):
            return f"{where}: no event file"
        best = folder / "c/a/best.pt"
        if found.best["step"] and (not best.exists() or load(best).step < found.best["step"]):
            return f"{where}: latest.pt names a best checkpoint that is not there"
        kept = _rows_until(folder / "l/a/metrics.jsonl", step).splitlines()
        if len(kept) != sum(row["step"] <= step for row in rows):
            return f"{where}: {len(kept)} rows of the log up to step {step}"
    assert num_cuts > 200
    print(f"{num_cuts} states that a power cut may leave")
    return None


def test_no_power_cut_loses_what_was_saved(recorded, tmp_path, loaded_once):
    assert violation(*recorded, tmp_path / "left", loaded_once) is None


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("fsync", ".pt-"),  # of a new checkpoint, before it is renamed
        ("fsync", "c/a"),  # of the folder, after that
        ("fsync", "c"),  # of the folder's own name
        ("fsync", "."),
        ("fsync", "metrics.jsonl"),  # of the rows, before the checkpoint that supposes them
    ],
)
def test_each_fsync_is_needed(recorded, tmp_path, loaded_once, kind, suffix):
    """Without any one of them the model finds what is lost: it has eyes, and none is idle."""
    changes, rows = recorded

    def left_out(change: Change) -> bool:
        there = suffix in change.path if suffix == ".pt-" else change.path.endswith(suffix)
        exact = suffix not in ("c", ".") or change.path == suffix
        return change.kind == kind and there and exact

    fewer = [change for change in changes if not left_out(change)]
    assert len(fewer) < len(changes)
    assert violation(fewer, rows, tmp_path / "left", loaded_once) is not None


@pytest.mark.faults
def test_a_process_ended_at_any_change_to_a_file_costs_nothing(tmp_path, small_data, forks):
    """The n-th create, write, fsync, rename, link ... is not made any more, for every n."""
    arguments = train_arguments("a", small_data, epochs=1, **{"batch-size": 150})
    (tmp_path / "whole").mkdir()
    assert forks.run(arguments, tmp_path / "whole") == 0
    expected = digests(tmp_path / "whole", "a")
    place, number, ended, with_state, steps = tmp_path / "cut", 0, 0, 0, set()
    while True:
        number += 1
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        status = forks.run(arguments, place, die_at=number)
        if status == 0:
            break
        assert status == 9, (place / "said.txt").read_text()
        ended += 1
        found = newest_good(place / "checkpoints/a")
        for path in place.glob("checkpoints/a/*.pt"):
            load_ckpt(path)
        if found:
            with_state += 1
            steps.add(found.step)
        if number % 10 == 0:
            assert forks.run(arguments, place) == 0, (place / "said.txt").read_text()
            assert digests(place, "a") == expected
            assert not list(place.glob("checkpoints/a/.*"))  # no leftovers
    print(f"ended at each of {ended} changes; {with_state} after the first save; steps {steps}")
    assert ended > 30
    assert steps == {1, 2}


@pytest.mark.parametrize(
    ("seed", "num_kills"), [(2, 5), pytest.param(5, 50, marks=pytest.mark.faults)]
)
def test_sigkill_at_random_moments_changes_nothing(tmp_path, small_data, forks, seed, num_kills):
    """Real processes, each killed some time after its start, until all kills are spent."""
    epochs = 12 if num_kills > 10 else 4
    arguments = train_arguments("a", small_data, **{"batch-size": 8, "epochs": epochs})
    (tmp_path / "whole").mkdir()
    forks.run(arguments, tmp_path)  # the first child waits until its parent has imported all
    begun = time.monotonic()
    assert forks.run(arguments, tmp_path / "whole") == 0
    whole = time.monotonic() - begun  # seconds, of a machine that may be busy
    expected = digests(tmp_path / "whole", "a"), scalars(tmp_path / "whole/logs/a")
    rng, kills, steps, place = random.Random(seed), 0, [], tmp_path / "cut"
    place.mkdir()
    while kills < num_kills:
        child = forks.start(arguments, place)
        time.sleep(rng.uniform(0, whole / 2))
        kill(child)
        status = forks.wait()
        found = newest_good(place / "checkpoints/a")
        steps.append(found.step if found else 0)
        if status == 0:  # it was faster: compare, and begin anew
            assert (digests(place, "a"), scalars(place / "logs/a")) == expected
            shutil.rmtree(place)
            place.mkdir()
            continue
        assert status == -9, (place / "said.txt").read_text()
        kills += 1
    assert forks.run(arguments, place) == 0
    assert (digests(place, "a"), scalars(place / "logs/a")) == expected, f"seed {seed}"
    print(f"{kills} kills, seed {seed}; steps on disk after each: {steps}")
    assert len({step for step in steps if 0 < step < epochs * 38}) >= num_kills // 5


def test_a_disk_that_is_full_for_a_while_costs_nothing(options, small_config, monkeypatch, capfd):
    """Files of that size do not fit for some saves; then they do again, and all is caught up."""
    whole = fit(small_config, options(run="whole"), quiet=True)
    place = options(run="cut", ckpt_seconds=0)
    real, count = keeper.save_ckpt, 0

    def full_for_a_while(path, content):
        nonlocal count
        count += 1
        if 5 < count < 25:  # over the first epoch's end, whose checkpoint is the best by then
            monkeypatch.setattr(checkpoint, "write_bytes", no_room)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(keeper, "save_ckpt", full_for_a_while)
        real(path, content)

    def no_room(path, content):
        raise RunFolderError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(keeper, "save_ckpt", full_for_a_while)
    result = fit(small_config, place, quiet=True)
    said = capfd.readouterr().err
    assert said.count("cannot be written: No space left on device.") >= 15
    assert "Training continues, unsaved." in said
    assert load_ckpt(result.latest).digest == load_ckpt(whole.latest).digest
    assert load_ckpt(result.best).digest == load_ckpt(whole.best).digest
    logs = [run.log_folder / "metrics.jsonl" for run in (whole, result)]
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_a_best_one_for_which_there_was_no_room_is_saved_as_it_was(
    options, small_config, monkeypatch
):
    """By a later save, when the weights have changed."""
    whole = fit(small_config, options(run="whole"), should_stop=stop_after(12), quiet=True)
    real, count = checkpoint.write_bytes, 0

    def full_for_a_while(path, content):
        nonlocal count
        count += 1
        if 8 < count < 14:
            raise RunFolderError(f"{path} cannot be written: No space left on device.")
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_bytes", full_for_a_while)
    place = options(run="cut", ckpt_seconds=0)
    result = fit(small_config, place, should_stop=stop_after(18), quiet=True)
    assert count > 14
    assert load_ckpt(result.best).step == 10
    assert load_ckpt(result.best).digest == load_ckpt(whole.best).digest


@pytest.mark.parametrize("room", [100, 3000, 30_000])
def test_files_that_may_not_grow_are_said_and_leave_what_was(tmp_path, small_data, forks, room):
    """RLIMIT_FSIZE: no file, log or checkpoint, may be longer than that."""
    arguments = train_arguments("a", small_data, epochs=2)
    assert forks.run(arguments, tmp_path) == 0
    longer = train_arguments("a", small_data, epochs=3)
    assert forks.run(longer, tmp_path, max_file_bytes=room) == 2
    said = (tmp_path / "said.txt").read_text()
    # what is said goes to a file, too, and may find no room; that is no reason to die of it
    assert "cannot be written: " in said.splitlines()[-1] or len(said) >= room
    assert "Traceback" not in said
    for path in tmp_path.glob("checkpoints/a/*"):
        load_ckpt(path)
    assert not list(tmp_path.glob("checkpoints/a/.*"))
    assert forks.run(longer, tmp_path) == 0
    (tmp_path / "whole").mkdir()
    assert forks.run(arguments, tmp_path / "whole") == 0
    assert forks.run(longer, tmp_path / "whole") == 0
    assert digests(tmp_path, "a") == digests(tmp_path / "whole", "a")
    assert scalars(tmp_path / "logs/a") == scalars(tmp_path / "whole/logs/a")


@pytest.mark.faults
def test_a_really_full_disk(tmp_path, small_data, forks):
    """A file system with room for the first save only, then for all."""
    small = tmp_path / "small"
    small.mkdir()
    size = ["-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(["mount", "-t", "tmpfs", *size], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        assert forks.run(train_arguments("a", small_data), small) in (2, 0)
        said = (small / "said.txt").read_text()
        assert "No space left on device" in said
        assert "Traceback" not in said
        for path in small.glob("checkpoints/a/*"):
            load_ckpt(path)
        assert not list(small.glob("checkpoints/a/.*"))
        remount = ["mount", "-o", "remount,size=50m", str(small)]
        subprocess.run(remount, check=True)
        assert forks.run(train_arguments("a", small_data), small) == 0
        found = digests(small, "a"), scalars(small / "logs/a")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    (tmp_path / "whole").mkdir()
    assert forks.run(train_arguments("a", small_data), tmp_path / "whole") == 0
    assert found == (digests(tmp_path / "whole", "a"), scalars(tmp_path / "whole/logs/a"))


def test_the_folder_of_a_killed_process_is_free(tmp_path, small_data, forks):
    """While it lives, the second is told who it is; when it was killed, nothing has to be done."""
    arguments = train_arguments("a", small_data, epochs=500)
    child = forks.start(arguments, tmp_path)
    place = RunOptions(
        run="a", device="cpu", num_threads=1, data_dir=small_data,
        checkpoints_dir=tmp_path / "checkpoints", logs_dir=tmp_path / "logs",
    )  # fmt: skip
    while not place.ckpt_folder.exists() or newest_good(place.ckpt_folder) is None:
        time.sleep(0.01)
    config = newest_good(place.ckpt_folder).config
    with pytest.raises(FolderInUseError, match=f"in use by process {child} on "):
        fit(config, place, quiet=True)
    kill(child)
    assert forks.wait() == -9
    assert not fit(config, place, should_stop=lambda: True, quiet=True).finished


def test_too_large_batches_are_one_sentence_with_the_size_that_fits(tmp_path, forks):
    """With ever more room (RLIMIT_AS) a run gets to its first step, and no further."""
    arguments = ["train", "--run", "a", "--dataset", "drawn", "--epochs", 1, "--device", "cpu"]
    arguments += ["--num-threads", 1, "--batch-size"]
    for gib in (1.5, 2, 2.5, 3, 3.5, 4, 5, 6):
        status = forks.run([*arguments, 10000], tmp_path, max_memory_bytes=int(gib * 2**30))
        said = (tmp_path / "said.txt").read_text().splitlines()[-1]
        if status == 2 and "--batch-size" in said:
            break
    assert "There is not enough memory on cpu for batches of 10000 images: --batch-size " in said
    size = int(said.split("--batch-size ")[1].split()[0])
    assert size in [10000 >> halvings for halvings in range(1, 14)]
    again = [*arguments[:2], "b", *arguments[3:], size]
    assert forks.run(again, tmp_path, max_memory_bytes=int(gib * 2**30)) == 0


@pytest.mark.faults
def test_the_soak_finds_nothing_in_its_first_cases():
    """A few of them, so that what ``make soak`` runs for an hour keeps working."""
    soak = Path(__file__).parent.parent / "soak.py"
    ended = subprocess.run(
        [sys.executable, soak, "--cases", "6", "--seed", "13"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("6 cases from seed 13, 0 failed")
