"""A run's checkpoint files: the latest, the best and earlier ones, and which one to continue from.

What is saved is never at risk: a new file takes an old one's place only when it was read back, a
full disk costs nothing but the save, and where a file has been damaged the newest good one is used.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vae_hyperband.common.errors import DamagedError, RunFolderError
from vae_hyperband.common.files import remove_leftovers
from vae_hyperband.model.checkpoint import (
    BEST,
    LATEST,
    Checkpoint,
    Metrics,
    copy_ckpt,
    load_ckpt,
    save_ckpt,
)


def earlier_ckpts(folder: Path) -> dict[int, Path]:
    """Checkpoints that were the latest one once, by their step, newest first."""
    found = {}
    for path in folder.glob("step-*.pt"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))


def newest_good(folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from; None if the run has none yet.

    It is latest.pt, as long as that is good and so is the best.pt that it speaks of; else the
    newest one beside it that lacks nothing, and a note says so. Raises :class:`DamagedError` if
    files are damaged and there is none, :class:`CheckpointError` if one cannot be read, but may
    well be good.
    """
    latest, best = folder / LATEST, folder / BEST
    good: dict[Path, Checkpoint] = {}
    damage: list[DamagedError] = []

    def read(*paths: Path) -> None:
        for path in paths:
            try:
                if path.exists():
                    good[path] = load_ckpt(path)
            except DamagedError as error:
                damage.append(error)

    # most of the time these two are good, and the earlier ones need not be read
    read(latest, best)
    if latest in good and not _lacks_best(good[latest], good.get(best)):
        return good[latest]
    read(*earlier_ckpts(folder).values())
    whole = [path for path in good if not _lacks_best(good[path], good.get(best))]
    # a checkpoint whose best.pt is gone is used only if nothing was damaged: then a person removed
    # it, and the run can do without
    if not whole and (damage or not good):
        if damage:
            raise DamagedError(
                f"{damage[0]} None of the checkpoints beside it can stand in: remove {folder} to "
                "train anew" + (f", or {best} to go on without it." if good else ".")
            )
        return None
    path = max(whole or good, key=lambda path: (good[path].step, path == latest))
    if path != latest or not whole:
        _note(damage, latest if not latest.exists() else best, path, good[path].step)
    return good[path]


def _lacks_best(checkpoint: Checkpoint, best: Checkpoint | None) -> bool:
    """Whether a checkpoint speaks of a best one that is neither there nor itself."""
    wanted = checkpoint.best.get("step", 0)
    return wanted not in (0, checkpoint.step) and (best is None or best.step < wanted)


def _note(damage: list[DamagedError], missing: Path, used: Path, step: int) -> None:
    why = damage[0] if damage else f"{missing} is not there."
    print(
        f"note: {why} Going on from the newest good one, {used.name} of step {step}.",
        file=sys.stderr,
        flush=True,
    )


def restore(folder: Path, used: Checkpoint) -> Metrics:
    """Have the files as they were when ``used`` was the latest one; the best one's step and losses.

    Where the best one is lost and ``used`` has just been validated, that is the best from now on.
    """
    latest, best_file = folder / LATEST, folder / BEST
    best = used.best
    found = None
    with contextlib.suppress(DamagedError):
        found = load_ckpt(best_file) if best_file.exists() else None
    if _lacks_best(used, found):
        best = {name: used.own_losses[name] for name in best} if used.own_losses else {}
    if best.get("step") == used.step and (found is None or found.step < best["step"]):
        copy_ckpt(used.path, best_file)
    if used.path.resolve() != latest.resolve():  # there is a good latest.pt from the first step on
        copy_ckpt(used.path, latest)
    return best


class Keeper:
    """Saves the checkpoints of one run. No other process may be at its folder.

    ``keep`` is how many of the earlier ones stay; ``resumed_from`` stays in any case.
    ``flush_logs`` is called before each save: a checkpoint supposes the rows up to its step.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 0,
        resumed_from: Path | None = None,
        flush_logs: Callable[[], None] = lambda: None,
    ) -> None:
        self.latest, self.best = folder / LATEST, folder / BEST
        for path in (self.latest, self.best, *earlier_ckpts(folder).values()):
            remove_leftovers(path)
        self._keep, self._flush_logs = keep, flush_logs
        self._resumed_from = resumed_from.resolve() if resumed_from else None
        self._last_step: int | None = None  # of a latest.pt that is good
        if self.latest.exists():
            with contextlib.suppress(DamagedError):
                self._last_step = load_ckpt(self.latest).step
        self._unsaved_best: Checkpoint | None = None

    def save(self, checkpoint: Checkpoint, improved: bool) -> None:
        """Save a checkpoint as the latest, and as the best if it ``improved``.

        Raises :class:`RunFolderError` if there is no room. Then no file has lost anything, and a
        best one is kept in memory, for the next save to write.
        """
        if improved:
            self._unsaved_best = checkpoint
        try:
            # a checkpoint supposes the rows up to its step, so they are on disk before it
            self._flush_logs()
            # best.pt first: a kill between the two costs work, but latest.pt never names a best
            # checkpoint that is not there
            if self._unsaved_best is not None:
                save_ckpt(self.best, self._unsaved_best)
                self._unsaved_best = None
            self._keep_previous(checkpoint.step)
            if improved:
                copy_ckpt(self.best, self.latest)
            else:
                save_ckpt(self.latest, checkpoint)
        except RunFolderError:
            if self._unsaved_best is checkpoint:
                self._unsaved_best = copy.deepcopy(checkpoint)  # the weights keep changing
            raise
        self._last_step = checkpoint.step
        self._remove_superfluous()

    def _keep_previous(self, step: int) -> None:
        """Give the latest.pt that is about to be replaced a second name."""
        if not self._keep or self._last_step in (None, step) or not self.latest.exists():
            return
        second = self.latest.with_name(f"step-{self._last_step:08d}.pt")
        second.unlink(missing_ok=True)  # of the same step, but perhaps damaged since
        # a hard link costs no copy of the file
        try:
            os.link(self.latest, second)
        except OSError:  # not every file system has such links
            copy_ckpt(self.latest, second)

    def _remove_superfluous(self) -> None:
        # only now that the new file was read back: until then an old one may be all there is
        kept = 0
        for step, path in earlier_ckpts(self.latest.parent).items():
            # one of a later step is damaged: the run went on from before it
            kept += (stays := kept < self._keep and step < (self._last_step or 0))
            if not stays and path.resolve() != self._resumed_from:
                path.unlink(missing_ok=True)
