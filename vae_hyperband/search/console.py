"""What a person sees of a search under way: a table on a terminal, elsewhere a line per event."""

import shutil
import sys
import time

from vae_hyperband.search.decisions import Board, Event
from vae_hyperband.search.trials import TrialRecord, describe

NUM_ROWS = 12  # of the table


class Watch:
    """Called with every event of the board that is new."""

    def __init__(self) -> None:
        self._started, self._epochs_seen = time.monotonic(), 0
        self._table = sys.stdout.isatty()
        self._lines_drawn = 0

    def __call__(self, board: Board, event: Event) -> None:
        self._epochs_seen += event["event"] == "result"
        if self._table:
            self._draw_table(board)
        elif event["event"] != "draw":
            print(f"[{self._seconds:4.0f} s] {self._line(board, event)}", flush=True)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _line(self, board: Board, event: Event) -> str:
        trial, metric = board.trials[event["trial"]], board.config.metric
        if event["event"] == "result":
            row, best = event["row"], board.best
            assert best is not None
            return (
                f"{trial.name} epoch {row['epoch']}/{board.config.max_epochs}: {metric} "
                f"{row[metric]:.2f} (best so far {best.score(metric):.2f}) {describe(trial.drawn)}"
            )
        if event["event"] == "died":
            return f"{trial.name}: {event['why']}; it goes on from its last checkpoint"
        why = f" ({trial.why})" if trial.why else ""
        if trial.outcome == "failed":
            why += f" {describe(trial.drawn)}"
        return f"{trial.name} {trial.outcome} at epoch {trial.num_epochs}{why}; {self.sum(board)}"

    def sum(self, board: Board) -> str:
        """The search so far, in one line."""
        ended = [trial for trial in board.trials if trial.outcome]
        max_epochs = board.config.max_epochs
        stopped = [trial for trial in ended if trial.outcome == "stopped"]
        failed = sum(trial.outcome == "failed" for trial in ended)
        parts = [
            f"{len(ended)} of {board.config.total_trials} done",
            f"{sum(trial.num_epochs for trial in board.trials)} epochs trained",
            f"{sum(max_epochs - trial.num_epochs for trial in stopped)} epochs saved",
        ]
        if failed:
            parts.append(f"{failed} failed")
        if (left := self._seconds_left(board)) is not None:
            parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        return ", ".join(parts)

    def _seconds_left(self, board: Board) -> float | None:
        """A guess: trials to come will get as far as those that ended did, at the same pace."""
        ended = [trial.num_epochs for trial in board.trials if trial.outcome]
        if not ended or not self._epochs_seen or board.finished:
            return None
        usual = max(1.0, sum(ended) / len(ended))
        under_way = [trial.num_epochs for trial in board.trials if not trial.outcome]
        epochs = sum(max(usual - done, 1.0) for done in under_way)
        epochs += usual * (board.config.total_trials - len(board.trials))
        return epochs * self._seconds / self._epochs_seen

    def _draw_table(self, board: Board) -> None:
        """Over the table drawn before: the trials under way, then the best ones."""
        metric = board.config.metric
        under_way = [trial for trial in board.trials if not trial.outcome]
        ended = [trial for trial in board.trials if trial.outcome]
        ended.sort(key=lambda trial: trial.score(metric))
        lines = [f"{self.sum(board)}; {self._seconds:.0f} s"]
        lines.append(f"{'trial':10} {'epoch':>7} {metric:>9}  state     hyperparameters")
        lines += [self._row(board, trial) for trial in (under_way + ended)[:NUM_ROWS]]
        hidden = len(board.trials) - NUM_ROWS
        if hidden > 0:
            lines.append(f"... and {hidden} more")
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self._lines_drawn}F" if self._lines_drawn else ""
        print(up + "\n".join(line[:width] + "\x1b[K" for line in lines) + "\x1b[J", flush=True)
        self._lines_drawn = len(lines)

    def _row(self, board: Board, trial: TrialRecord) -> str:
        state = trial.outcome or ("waits" if board.verdict(trial.number).rung else "trains")
        value = f"{trial.rows[-1][board.config.metric]:9.2f}" if trial.rows else " " * 9
        epoch = f"{trial.num_epochs}/{board.config.max_epochs}"
        mark = "best " if trial is board.best else ""
        return f"{trial.name:10} {epoch:>7} {value}  {state:9} {mark}{describe(trial.drawn)}"
