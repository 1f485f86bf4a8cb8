"""Which checkpoints of a run there are, and which one it goes on from."""

import dataclasses
import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import written
from test_resume import outcome, stop_after

from vae_hyperband.common.errors import CheckpointError, RunFolderError, VAEHyperbandError
from vae_hyperband.model.checkpoint import load_ckpt, tree_digest
from vae_hyperband.training.keeper import Keeper, earlier_ckpts, newest_good
from vae_hyperband.training.loop import fit


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_ckpt(path)


@pytest.fixture
def cut(options, small_config):
    """A run of 10 steps an epoch, saved after each step, stopped at step 25."""
    place = options(run="cut", ckpt_seconds=0, keep_ckpts=3)
    fit(small_config, place, should_stop=stop_after(27), quiet=True)
    assert newest_good(place.ckpt_folder).step == 25
    return place


def test_the_last_ones_and_the_best_are_kept(cut):
    assert [*earlier_ckpts(cut.ckpt_folder)] == [24, 23, 22]
    assert load_ckpt(cut.ckpt_folder / "step-00000023.pt").step == 23
    assert load_ckpt(cut.ckpt_folder / "best.pt").step == 20
    assert len(list(cut.ckpt_folder.iterdir())) == 5


@pytest.mark.parametrize(
    ("damaged", "used", "step"),
    [
        (["latest.pt"], "step-00000024.pt", 24),
        (["latest.pt", "step-00000024.pt", "step-00000023.pt"], "step-00000022.pt", 22),
        (["latest.pt", *(f"step-{n:08d}.pt" for n in (22, 23, 24))], "best.pt", 20),
    ],
)
def test_the_newest_good_one_is_used_and_said_and_the_end_is_the_same(
    cut, trained_once, small_config, capsys, damaged, used, step
):
    for name in damaged:
        damage(cut.ckpt_folder / name)
    result = fit(small_config, cut)
    said = capsys.readouterr()
    assert f"Going on from the newest good one, {used} of step {step}." in said.err
    assert "latest.pt is damaged" in said.err
    assert f"resuming cut at step {step} of 30" in said.out
    assert [*earlier_ckpts(cut.ckpt_folder)] == [29, 28, 27]  # no damaged one is left
    for path in cut.ckpt_folder.iterdir():
        load_ckpt(path)
    assert outcome(result) == outcome(trained_once)


@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "lost"])
def test_a_best_one_that_is_gone_is_trained_again_from_an_earlier_one(
    options, small_config, trained_once, capsys, lost
):
    """latest.pt, and the one of step 19, are good, but not the best one; that of step 10 was it."""
    place = options(run="cut", keep_ckpts=30, ckpt_seconds=0)
    fit(small_config, place, should_stop=stop_after(27), quiet=True)
    best = place.ckpt_folder / "best.pt"
    for step in range(20, 25):
        (place.ckpt_folder / f"step-{step:08d}.pt").unlink()
    best.unlink() if lost else damage(best)
    result = fit(small_config, place)
    said = capsys.readouterr()
    assert f"best.pt is {'not there' if lost else 'damaged'}" in said.err
    assert "Going on from the newest good one, step-00000010.pt of step 10." in said.err
    assert "resuming cut at step 10 of 30" in said.out
    assert outcome(result) == outcome(trained_once)


def test_a_best_one_that_is_the_latest_one_too_is_copied(options, small_config):
    place = options(run="cut", keep_ckpts=0)
    fit(small_config, place, should_stop=stop_after(21), quiet=True)
    before = (place.ckpt_folder / "best.pt").read_bytes()
    damage(place.ckpt_folder / "best.pt")
    fit(small_config, place, should_stop=lambda: True, quiet=True)
    assert (place.ckpt_folder / "best.pt").read_bytes() == before


def test_where_the_best_one_is_damaged_for_good_it_is_said(options, small_config, capsys):
    """Removing it is to go on without it."""
    place = options(run="cut", keep_ckpts=0, ckpt_seconds=0)
    fit(small_config, place, should_stop=stop_after(27), quiet=True)
    best = place.ckpt_folder / "best.pt"
    damage(best)
    before = (place.ckpt_folder / "latest.pt").read_bytes()
    with pytest.raises(CheckpointError, match=rf"remove .*cut to train anew, or {best} to go on"):
        fit(small_config, place, quiet=True)
    assert (place.ckpt_folder / "latest.pt").read_bytes() == before
    best.unlink()
    result = fit(small_config, place)
    assert "best.pt is not there. Going on from the newest good one, latest.pt" in (
        capsys.readouterr().err
    )
    assert load_ckpt(result.best).step == result.state.best["step"] == 30


def test_a_lost_latest_is_no_reason_to_begin_anew(cut, small_config, capsys):
    (cut.ckpt_folder / "latest.pt").unlink()
    fit(small_config, cut)
    said = capsys.readouterr()
    assert "latest.pt is not there. Going on from the newest good one, step-00000024.pt" in said.err
    assert "resuming cut at step 24" in said.out


def test_where_all_are_damaged_nothing_is_overwritten(cut, small_config):
    for path in cut.ckpt_folder.iterdir():
        damage(path)
    before = {path: path.read_bytes() for path in cut.ckpt_folder.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"latest\.pt is damaged.* remove .*cut to train anew\."
    ):
        fit(small_config, cut, quiet=True)
    assert {path: path.read_bytes() for path in cut.ckpt_folder.iterdir()} == before


def test_the_one_resumed_from_stays(cut, small_config):
    given = cut.ckpt_folder / "step-00000025.pt"
    os.link(cut.ckpt_folder / "latest.pt", given)
    before = given.read_bytes()
    fit(small_config, dataclasses.replace(cut, resume_ckpt=given), quiet=True)
    assert [*earlier_ckpts(cut.ckpt_folder)] == [29, 28, 27, 25]
    assert given.read_bytes() == before


def test_none_are_kept_if_none_are_asked_for(options, small_config):
    place = options(ckpt_seconds=0, keep_ckpts=0)
    fit(small_config, place, quiet=True)
    assert sorted(path.name for path in place.ckpt_folder.iterdir()) == ["best.pt", "latest.pt"]


def test_what_cannot_be_read_back_takes_nothing_s_place(cut, monkeypatch):
    """A disk that stores something else than it was given."""
    content = load_ckpt(cut.ckpt_folder / "latest.pt")
    content = dataclasses.replace(content, step=content.step + 1)
    before = {path: path.read_bytes() for path in cut.ckpt_folder.iterdir()}
    real = os.fsync

    def lying_fsync(handle):
        real(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        if ".pt-" in name:
            with open(name, "r+b") as file:
                file.seek(os.path.getsize(name) // 2)
                file.write(b"\x00\xff\x00")

    keeper = Keeper(cut.ckpt_folder, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lying_fsync)
        for improved in (False, True):
            with pytest.raises(RunFolderError, match=r"read back|is damaged"):
                keeper.save(content, improved)
            assert {path: path.read_bytes() for path in before} == before
            assert not list(cut.ckpt_folder.glob(".*"))
    keeper.save(content, improved=True)
    assert newest_good(cut.ckpt_folder).step == 26
    assert [*earlier_ckpts(cut.ckpt_folder)] == [25]


def test_leftovers_of_a_kill_are_removed(cut, small_config):
    leftover = cut.ckpt_folder / ".latest.pt-abc"
    leftover.write_bytes(b"half of a checkpoint")
    fit(small_config, cut, quiet=True)
    assert not leftover.exists()


def of_tomorrow(path, monkeypatch):
    """As a newer program may write it: another version, one more key, a digest of all of it."""
    content = torch.load(path, weights_only=True)
    payload = {k: v for k, v in content.items() if k not in ("format", "version", "digest")}
    payload["more"] = 1
    head = {"format": content["format"], "version": 3, "digest": tree_digest(payload)}
    torch.save({**head, **payload}, path)
    return "use a newer vae-hyperband"


def stale(path, monkeypatch):
    """A network file system that does not answer for a moment, or another owner's file."""
    real = Path.read_bytes

    def read(self):
        if self == path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    return "Stale file handle"


def no_memory(path, monkeypatch):
    def load(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    return "memory"


@pytest.mark.parametrize("trouble", [of_tomorrow, stale, no_memory])
def test_a_file_that_may_be_good_is_never_replaced_by_an_older_one(
    cut, small_config, monkeypatch, trouble
):
    latest = cut.ckpt_folder / "latest.pt"
    with monkeypatch.context() as patch:
        said = trouble(latest, patch)
        before = written(cut.ckpt_folder)
        with pytest.raises((VAEHyperbandError, MemoryError)) as raised:
            fit(small_config, cut, quiet=True)
        assert said in str(raised.value) or raised.type is MemoryError
    assert written(cut.ckpt_folder) == before
    if trouble is not of_tomorrow:
        assert newest_good(cut.ckpt_folder).step == 25


def test_taking_the_latest_one_away_during_a_run_costs_nothing(options, small_config, trained_once):
    place, calls = options(ckpt_seconds=0, keep_ckpts=2), []

    def take_away():
        calls.append(0)
        if len(calls) == 15:
            os.rename(place.ckpt_folder / "latest.pt", place.ckpt_folder / "kept.pt")
        return False

    result = fit(small_config, place, should_stop=take_away)
    assert result.finished
    assert load_ckpt(place.ckpt_folder / "latest.pt").step == 30
    assert load_ckpt(place.ckpt_folder / "kept.pt").step < 30
    assert outcome(result) == outcome(trained_once)


def test_leftovers_of_copies_of_earlier_ones_are_removed(cut, small_config):
    leftover = cut.ckpt_folder / ".step-00000024.pt-a1b2"
    leftover.write_bytes(b"half")
    fit(small_config, cut, quiet=True)
    assert not leftover.exists()


def test_a_best_one_that_is_not_beside_the_given_one_is_said(cut, options, small_config, capsys):
    alone = cut.checkpoints_dir.parent / "mail" / "latest.pt"
    alone.parent.mkdir()
    alone.write_bytes((cut.ckpt_folder / "latest.pt").read_bytes())
    fit(small_config, options(run="new", resume_ckpt=alone), quiet=True)
    assert f"the best checkpoint so far, of step 20, is not at {alone.parent / 'best.pt'}" in (
        capsys.readouterr().err
    )
    fit(small_config, options(run="newer", resume_ckpt=cut.ckpt_folder / "latest.pt"), quiet=True)
    assert "best checkpoint so far" not in capsys.readouterr().err


def test_logs_of_a_run_whose_checkpoints_are_elsewhere_are_kept(options, small_config, capsys):
    first = fit(small_config, options(), quiet=True)
    rows = (first.log_folder / "metrics.jsonl").read_bytes()
    assert capsys.readouterr().err == ""
    again = options(checkpoints_dir=first.log_folder.parent.parent / "others")
    fit(small_config, again, quiet=True)
    assert (first.log_folder / "metrics.before.jsonl").read_bytes() == rows
    assert "metrics.before.jsonl" in capsys.readouterr().err
