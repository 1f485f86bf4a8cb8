"""Which checkpoints of a run there are, and which one it goes on from."""

import dataclasses
import os

import pytest
from test_resume import outcome, stop_after

from vae_hyperband.checkpoint import load_ckpt
from vae_hyperband.errors import CheckpointError, RunFolderError
from vae_hyperband.keeping import Keeper, earlier_ckpts, newest_good
from vae_hyperband.training import fit


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
    assert newest_good(place.ckpt_folder)[1]["step"] == 25
    return place


def test_the_last_ones_and_the_best_are_kept(cut):
    assert [*earlier_ckpts(cut.ckpt_folder)] == [24, 23, 22]
    assert load_ckpt(cut.ckpt_folder / "step-00000023.pt")["step"] == 23
    assert load_ckpt(cut.ckpt_folder / "best.pt")["step"] == 20
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
    cut, options, small_config, capsys, damaged, used, step
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
    assert outcome(result) == whole(options, small_config)


def whole(options, small_config):
    return outcome(fit(small_config, options(run="whole"), quiet=True))


@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "lost"])
def test_a_best_one_that_is_gone_is_trained_again_from_an_earlier_one(
    options, small_config, capsys, lost
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
    assert outcome(result) == whole(options, small_config)


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
    assert load_ckpt(result.best)["step"] == result.state.best["step"] == 30


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
    content.pop("digest")
    content["step"] += 1
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
    assert newest_good(cut.ckpt_folder)[1]["step"] == 26
    assert [*earlier_ckpts(cut.ckpt_folder)] == [25]


def test_leftovers_of_a_kill_are_removed(cut, small_config):
    leftover = cut.ckpt_folder / ".latest.pt-abc"
    leftover.write_bytes(b"half of a checkpoint")
    fit(small_config, cut, quiet=True)
    assert not leftover.exists()
