"""A run's checkpoint files: the latest, the best and earlier ones; which of them to go on from.

What is saved is never at risk: a new file takes an old one's place only when it was read back, a
full disk costs nothing but the save, and where a file has been damaged the newest good one is used.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae_hyperband.checkpoint import BEST, LATEST, copy_ckpt, load_ckpt, save_ckpt
from vae_hyperband.errors import CheckpointError, RunFolderError
from vae_hyperband.files import remove_leftovers


def earlier_ckpts(folder: Path) -> dict[int, Path]:
    """Checkpoints that were the latest one once, by their step, newest first."""
    found = {}
    for path in folder.glob("step-*.pt"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its content; None if the run has none yet.

    It is latest.pt, or, where that is damaged or lost, the newest good one beside it, and a note
    says so. Raises :class:`CheckpointError` if all are damaged.
    """
    latest = folder / LATEST
    all_of_them = (latest, *earlier_ckpts(folder).values(), folder / BEST)
    files = [path for path in all_of_them if path.exists()]
    good, damage = [], []
    for path in files:
        try:
            good.append((path, load_ckpt(path)))
        except CheckpointError as error:
            damage.append(error)
        if path == latest and good:
            return good[0]
    if not good:
        if damage:
            raise damage[0]
        return None
    path, content = max(good, key=lambda found: found[1]["step"])
    why = damage[0] if latest.exists() else f"{latest} is not there."
    print(
        f"note: {why} Going on from the newest good one, {path.name} of step {content['step']}.",
        file=sys.stderr,
        flush=True,
    )
    return path, content


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
        for path in (self.latest, self.best):
            remove_leftovers(path)
        self._keep, self._flush_logs = keep, flush_logs
        self._resumed_from = resumed_from.resolve() if resumed_from else None
        self._last_step: int | None = None  # of a latest.pt that is good
        with contextlib.suppress(CheckpointError):
            self._last_step = load_ckpt(self.latest)["step"]
        self._unsaved_best: dict[str, Any] | None = None

    def save(self, content: dict[str, Any], improved: bool) -> None:
        """Save what a checkpoint holds as the latest, and as the best if it ``improved``.

        Raises :class:`RunFolderError` if there is no room. Then no file has lost anything, and a
        best one is kept in memory, for the next save to write.
        """
        if improved:
            self._unsaved_best = content
        try:
            self._flush_logs()
            # best.pt first: a kill between the two costs work, but latest.pt never names a best
            # checkpoint that is not there
            if self._unsaved_best is not None:
                save_ckpt(self.best, self._unsaved_best)
                self._unsaved_best = None
            self._keep_previous(content["step"])
            if improved:
                copy_ckpt(self.best, self.latest)
            else:
                save_ckpt(self.latest, content)
        except RunFolderError:
            if self._unsaved_best is content:
                self._unsaved_best = copy.deepcopy(content)  # the weights go on changing
            raise
        self._last_step = content["step"]
        self._remove_superfluous()

    def _keep_previous(self, step: int) -> None:
        """Give the latest.pt that is about to be replaced a second name."""
        if not self._keep or self._last_step in (None, step):
            return
        second = self.latest.with_name(f"step-{self._last_step:08d}.pt")
        second.unlink(missing_ok=True)  # of the same step, but perhaps damaged since
        try:
            os.link(self.latest, second)
        except OSError:  # not every file system has such links
            copy_ckpt(self.latest, second)

    def _remove_superfluous(self) -> None:
        kept = 0
        for step, path in earlier_ckpts(self.latest.parent).items():
            # one of a later step is damaged: the run went on from before it
            kept += (stays := kept < self._keep and step < (self._last_step or 0))
            if not stays and path.resolve() != self._resumed_from:
                path.unlink()
