"""What a search prints while it runs: a live table on a terminal, elsewhere a line per event."""

import heapq
import shutil
import sys
import time

from vae_hyperband.common.checks import plural
from vae_hyperband.common.process import TimeShare
from vae_hyperband.search.decisions import Board, TrialEvent
from vae_hyperband.search.space import describe
from vae_hyperband.search.trials import TrialRecord

NUM_ROWS = 12  # of the table: it has to fit on a small terminal, or redrawing it would scroll
TABLE_SHARE = 0.02  # of the time, for drawing the table: it ranks all trials


class Console:
    """Prints every new event of a board: give it to the board as its ``on_event``."""

    def __init__(self) -> None:
        # of this process: a resumed search has a pace of its own
        self._started, self._epochs_seen = time.monotonic(), 0
        self._table = sys.stdout.isatty()
        self._table_time, self._lines_printed = TimeShare(TABLE_SHARE), 0

    def __call__(self, board: Board, event: TrialEvent) -> None:
        self._epochs_seen += event["event"] == "result"
        if self._table:
            if self._table_time.due or board.finished:
                self._print_table(board)
        elif line := self._line(board, event):
            # flushed, so that a log file of a batch job shows how far the search is
            print(f"[{self._seconds:4.0f} s] {line}", flush=True)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _line(self, board: Board, event: TrialEvent) -> str:
        """What to say of an event; empty if that is nothing."""
        trial, metric = board.trials[event["trial"]], board.config.metric
        match event["event"]:
            case "draw":
                return ""  # the first result says what was suggested, and that it works
            case "result":
                row, best = event["row"], board.best
                assert best is not None
                return (
                    f"{trial.name} epoch {row['epoch']}/{board.config.max_epochs}: {metric} "
                    f"{row[metric]:.2f} (best so far {best.score(metric):.2f}) "
                    f"{describe(trial.hyperparameters)}"
                )
            case "died":
                return f"{trial.name}: {event['why']}; it continues from its last checkpoint"
            case "end":
                return f"{trial.summary}; {self.progress(board)}"

    def progress(self, board: Board) -> str:
        """The search so far, in one line."""
        totals = board.totals
        parts = [
            f"{totals.ended} of {board.config.total_trials} done",
            f"{plural(totals.epochs, 'epoch')} trained",
            f"{plural(totals.epochs_saved, 'epoch')} saved",
        ]
        if totals.failed:
            parts.append(f"{totals.failed} failed")
        if (left := self._seconds_left(board)) is not None:
            parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        return ", ".join(parts)

    def _seconds_left(self, board: Board) -> float | None:
        """An estimate: trials to come get as far as those that ended did, at the same pace."""
        totals = board.totals
        # before a trial has ended, nothing is known of how early the scheduler stops them
        if not totals.ended or not self._epochs_seen or board.finished:
            return None
        usual = max(1.0, totals.epochs_of_ended / totals.ended)
        under_way = [board.trials[number].num_epochs for number in board.under_way]
        # one that is past the usual end has at least one more epoch, or it would have ended
        epochs = sum(max(usual - done, 1.0) for done in under_way)
        epochs += usual * (board.config.total_trials - len(board.trials))
        # all workers together made this pace, so their number needs no place in the formula
        return epochs * self._seconds / self._epochs_seen

    def _print_table(self, board: Board) -> None:
        """Replace the table printed before: trials under way first, then the best ones."""
        with self._table_time:
            self._draw_table(board)

    def _draw_table(self, board: Board) -> None:
        metric = board.config.metric
        under_way = [board.trials[number] for number in sorted(board.under_way)]
        ended = [trial for trial in board.trials if trial.outcome]
        ended = heapq.nsmallest(NUM_ROWS, ended, key=lambda trial: trial.score(metric))
        lines = [f"{self.progress(board)}; {self._seconds:.0f} s"]
        lines.append(f"{'trial':10} {'epoch':>7} {metric:>9}  state     hyperparameters")
        lines += [self._row(board, trial) for trial in (under_way + ended)[:NUM_ROWS]]
        hidden = len(board.trials) - NUM_ROWS
        if hidden > 0:
            lines.append(f"... and {hidden} more")
        # cut to the width: a wrapped line takes two rows, and the cursor would go up too few
        width = shutil.get_terminal_size().columns - 1
        # ESC[nF: up n lines, to the first column; ESC[K, ESC[J: clear the rest of line, of screen
        up = f"\x1b[{self._lines_printed}F" if self._lines_printed else ""
        print(up + "\n".join(line[:width] + "\x1b[K" for line in lines) + "\x1b[J", flush=True)
        self._lines_printed = len(lines)

    def _row(self, board: Board, trial: TrialRecord) -> str:
        paused = board.verdict(trial.number).action == "pause"
        state = trial.outcome or ("paused" if paused else "running")
        value = f"{trial.rows[-1][board.config.metric]:9.2f}" if trial.rows else " " * 9
        epoch = f"{trial.num_epochs}/{board.config.max_epochs}"
        mark = "best " if trial is board.best else ""
        settings = f"{mark}{describe(trial.hyperparameters)}"
        return f"{trial.name:10} {epoch:>7} {value}  {state:9} {settings}"
