"""Ray Tune at the board's orders: which trial to create, run, pause or stop.

Ray runs the trials: it places them on nodes, restarts them where a process or a node died, and
delivers their reports. It keeps no state that a search resumes from: a restored Tuner has forgotten
its scheduler, hangs with HyperBand (ray#30838) and is a pickle. Instead each call makes a new Tuner
for the trials that the board still wants trained.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from vae_hyperband.common.checks import plural
from vae_hyperband.common.errors import RayBrokeError, VAEHyperbandError
from vae_hyperband.common.process import in_main_thread
from vae_hyperband.data.splits import Split
from vae_hyperband.model.networks import allowed_networks
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.search.decisions import Board
from vae_hyperband.search.trials import ValidationRow, trial_name
from vae_hyperband.tune.session import nodes, num_concurrent, trial_device, trial_resources
from vae_hyperband.tune.storage import TrialStore
from vae_hyperband.tune.worker import (
    SharedSplit,
    TrialJob,
    TrialSpec,
    hang_report,
    train_trial,
)

#: Ray may report a process's death twice; a new process takes longer than this to start and die.
ONE_DEATH_SECONDS = 0.5

#: Epochs that a trial may be ahead of one that waits for a worker, before it is paused for that
#: one. So the last trials of a search run side by side until its end, instead of one being left to
#: a single worker. A verdict does not depend on when trials run, so this changes no decision.
MAX_LEAD = 2

ACTIONS = {
    "continue": TrialScheduler.CONTINUE,
    "pause": TrialScheduler.PAUSE,
    "stop": TrialScheduler.STOP,
}


def run_trials(
    board: Board,
    options: SearchOptions,
    store: TrialStore,
    splits: tuple[Split, Split],
    should_stop: Callable[[], bool],
) -> None:
    """Train the board's trials until it is finished or ``should_stop`` returns True.

    ``board.finished`` tells which it was. Raises :class:`RayBrokeError`, and what the board raises.
    """
    train, held_out = map(SharedSplit.of, splits)
    job = TrialJob(
        board.config,
        options,
        store,
        (train, held_out),
        trial_device(options),
        allowed_networks(),
    )
    searcher = BoardSearcher(board, options, should_stop)
    folder = options.ckpt_folder / "ray"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed search; nothing is ever read from it
    try:
        _tuner(job, searcher, BoardScheduler(board, searcher, options), folder).fit()
    except Exception as error:  # whatever Ray raises when its processes are gone
        if not searcher.errors:
            said = str(error).strip() or type(error).__name__
            raise RayBrokeError(
                f"Ray broke down ({said.splitlines()[-1]}): finished work is kept, and the same "
                "command resumes the search."
            ) from error
    shutil.rmtree(folder, ignore_errors=True)
    if searcher.errors:
        raise searcher.errors[0]


def _tuner(
    job: TrialJob, searcher: "BoardSearcher", scheduler: "BoardScheduler", folder: Path
) -> tune.Tuner:
    """A Tuner that leaves every decision to the searcher and the scheduler."""
    # with_parameters puts the job, data included, into the object store, not into every trial
    trainable = tune.with_parameters(train_trial, job=job)
    return tune.Tuner(
        tune.with_resources(trainable, trial_resources(job.options)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the searcher says that it is finished
            search_alg=searcher,
            scheduler=scheduler,
            reuse_actors=True,  # a new process costs 3 s and more, most of it importing torch
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=tune.FailureConfig(max_failures=-1),  # the scheduler counts them
            stop=StopOnRequest(searcher.should_stop),
            verbose=0,
        ),
    )


def _trial_name(trial: Trial) -> str:
    return trial_name(_number(trial))


def _number(trial: Trial) -> int:
    number: int = trial.config["number"]  # of the TrialSpec that the searcher gave
    return number


class StopOnRequest(Stopper):
    """Ends the experiment in order when ``should_stop`` returns True."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._handles_usr1 = in_main_thread() and hasattr(signal, "SIGUSR1")
        self._on_usr1 = signal.getsignal(signal.SIGUSR1) if self._handles_usr1 else None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        # Tune has set a handler of its own by now, but this is the signal by which Slurm warns of
        # a time limit: it has to stop the search
        if self._handles_usr1:
            signal.signal(signal.SIGUSR1, self._on_usr1)
        return self._should_stop()

    def __getstate__(self) -> dict[str, object]:
        return {}  # Ray pickles its Tuner; the board behind this holds an open file


class BoardSearcher(Searcher):
    """Gives Ray the trials to run: those begun before a stop first, then new ones.

    A new trial is suggested only when a worker is free for it: later, TPE has seen more results.
    """

    def __init__(
        self,
        board: Board,
        options: SearchOptions,
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._board, self._stop_requested = board, stop_requested
        # asked each time: nodes of a cluster come and go
        self._num_concurrent = lambda: num_concurrent(nodes(), options)
        self._trial_ids: dict[int, str] = {}  # number -> Ray's id
        halving = board.config.scheduler in ("asha", "hyperband")
        #: Whether a trial is paused for others that lag behind. Not with TPE, which would then
        #: suggest more trials before any has ended; nor with one worker, which does depth first
        #: what the paper's algorithms do in order.
        self.interleaves = (
            halving and board.config.algorithm != "tpe" and self._num_concurrent() > 1
        )
        self.errors: list[VAEHyperbandError] = []  # such as a full disk under the decision log

    def should_stop(self) -> bool:
        return bool(self.errors) or self._stop_requested()

    @contextlib.contextmanager
    def collecting_errors(self) -> Iterator[None]:
        """Keep our own errors for the end of the run; Ray would print tracebacks of them."""
        try:
            yield
        except VAEHyperbandError as error:
            self.errors.append(error)

    # Ray's own annotation leaves out FINISHED, which is a str
    def suggest(self, trial_id: str) -> Any:
        """A :class:`TrialSpec`, None if there is nothing to run now, or FINISHED."""
        board = self._board
        if board.finished or self.should_stop():
            return Searcher.FINISHED
        active = self._trial_ids.keys() & set(board.runnable())
        if self.interleaves:  # those that are ahead will make room for new ones
            active = {number for number in active if board.trials[number].num_epochs < MAX_LEAD}
        # Ray itself would ask for as many trials as it may keep pending, before one has started
        if len(active) >= self._num_concurrent():
            return None
        with self.collecting_errors():
            waiting = [number for number in board.runnable() if number not in self._trial_ids]
            trial = board.trials[waiting[0]] if waiting else board.suggest_next()
            if trial is not None:
                self._trial_ids[trial.number] = trial_id
                return TrialSpec(
                    number=trial.number, hyperparameters=trial.hyperparameters.to_dict()
                )
        return None

    def release(self, trial: Trial) -> None:
        """Ray gave up a trial that the board wants: make a new one with the same number.

        Ray does so when the process that it meant to reuse for the trial is gone or busy.
        """
        number = _number(trial)
        # only if it is still Ray's current trial of that number: the call is made again and again
        if self._trial_ids.get(number) == trial.trial_id:
            del self._trial_ids[number]

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """Nothing: the board knows it from the trial's last report."""

    def save(self, checkpoint_path: str) -> None:
        """Ray insists on a file; everything to keep is in the decision log."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search resumes from its decision log")

    def __getstate__(self) -> dict[str, object]:
        return {}  # as of StopOnRequest


class BoardScheduler(FIFOScheduler):
    """Tells the board what trials report, and Ray what the board decides.

    A trial that has to wait for an earlier one is paused: another trial gets its worker, and it
    continues from its checkpoint when it may.
    """

    def __init__(self, board: Board, searcher: BoardSearcher, options: SearchOptions) -> None:
        super().__init__()
        self._board, self._searcher, self._options = board, searcher, options
        # number -> the times at which its process died, since its last new result
        self._deaths: dict[int, list[float]] = {}
        # Ray's trials that have not ended: Ray's own list is of all that there ever were
        self._trials: dict[str, Trial] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._trials[trial.trial_id] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number = _number(trial)
        with self._searcher.collecting_errors():
            if "failed" in result:
                self._board.failed(number, result["failed"])
            elif not result.get("done"):  # a function that returned reports its last result again
                if result["epoch"] > self._board.trials[number].num_epochs:
                    self._deaths.pop(number, None)
                self._board.reported(number, _row(result))
        action = self._action(trial)
        # where the board has no objection, but others lag behind
        if action == "continue" and self._searcher.interleaves:
            action = "pause" if self._is_ahead(trial) else action
        return ACTIONS[action]

    def _is_ahead(self, trial: Trial) -> bool:
        """Whether a trial that waits for a worker is :data:`MAX_LEAD` epochs behind this one."""
        limit = self._num_epochs(trial) - MAX_LEAD
        return any(self._num_epochs(other) <= limit for other in self._ready())

    def _num_epochs(self, trial: Trial) -> int:
        return self._board.trials[_number(trial)].num_epochs

    def _ready(self) -> list[Trial]:
        """The trials that could run if there were a free worker."""
        return [
            trial
            for trial in self._trials.values()
            if trial.status in (Trial.PENDING, Trial.PAUSED) and self._action(trial) == "continue"
        ]

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial's process died. Ray starts another one, unless the trial has failed by that."""
        number, now = _number(trial), time.monotonic()
        deaths = self._deaths.setdefault(number, [])
        if deaths and now - deaths[-1] < ONE_DEATH_SECONDS:
            return
        deaths.append(now)
        with self._searcher.collecting_errors():
            why = self._cause_of_death(trial_name(number))
            self._board.died(number, why)
            # counted here and not by Ray, whose count knows no progress: on a cluster that loses a
            # node every hour, every long trial would fail in the end
            if len(deaths) > self._options.max_failures:
                self._board.failed(number, f"{why}; tried {plural(len(deaths), 'time')}")

    def _cause_of_death(self, name: str) -> str:
        """What a trial's process died of, from what it left in the logs."""
        report = hang_report(self._options, name)
        if not report.exists() or not report.stat().st_size:
            return "its process died"
        # renamed, or the next death would be taken for a hang, too
        report.rename(report.with_name("last_hang.txt"))
        seconds = self._options.trial_timeout
        return f"hung: no epoch in {seconds:g} s (last_hang.txt in its logs says where)"

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Of the trials that may run, the one furthest behind; of equals, the lowest number."""
        for trial in list(self._trials.values()):
            idle = trial.status in (Trial.PAUSED, Trial.PENDING)
            if idle and self._action(trial) == "stop":
                tune_controller.stop_trial(trial)  # it lost by a report of another, or failed
            elif trial.status in (Trial.ERROR, Trial.TERMINATED):
                self._searcher.release(trial)
                del self._trials[trial.trial_id]
        num_running = sum(trial.status == Trial.RUNNING for trial in self._trials.values())
        if num_running >= (self._options.max_concurrent or num_running + 1):
            return None
        # low numbers first, since a trial waits at a rung for all lower ones
        ready = self._ready()
        return min(ready, key=lambda trial: (self._num_epochs(trial), _number(trial)), default=None)

    def _action(self, trial: Trial) -> str:
        return self._board.verdict(_number(trial)).action

    def __getstate__(self) -> dict[str, object]:
        return {}  # as of StopOnRequest


def _row(result: dict[str, Any]) -> ValidationRow:
    """What a trial reported, without the clocks and names that Ray adds to it."""
    row = {name: result[name] for name in result if name in ValidationRow.__annotations__}
    return cast(ValidationRow, row)
