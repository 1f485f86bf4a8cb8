"""What Ray Tune is told: which trial to create, to start, to pause, to stop. The board decides.

Ray runs the trials: it places them, restarts them where a process or a node died, hands their
reports over. It keeps no state that a search would go on from: its own record forgets the
scheduler, hangs with HyperBand (ray#30838) and is pickled. Each call makes a new Tuner, which gets
the trials that the board still wants trained.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from vae_hyperband.common.errors import RayBrokeError, VAEHyperbandError
from vae_hyperband.data.splits import Split
from vae_hyperband.search.config import SearchOptions
from vae_hyperband.search.decisions import Board
from vae_hyperband.search.trials import trial_name
from vae_hyperband.tune.session import nodes, num_places, trial_device, trial_resources
from vae_hyperband.tune.storage import TrialStore
from vae_hyperband.tune.worker import SharedSplit, hang_report, train_trial

#: What the board keeps of a report; Ray adds clocks and names to it.
ROW = frozenset(
    {"step", "epoch", "recon_loss", "KL_divergence", "total_loss", "bound", "iwae", "fid"}
)

#: Ray may say twice that a process died; another one takes longer to start.
ONE_DEATH_SECONDS = 0.5

#: A trial gives its place to one that is so many epochs behind: the last ones of a search are then
#: side by side until its end, instead of one of them being left to a single worker. What a trial
#: does decides nothing about another's order, so who runs when changes no decision.
LEAD = 2

ACTIONS = {
    "go on": TrialScheduler.CONTINUE,
    "wait": TrialScheduler.PAUSE,
    "stop": TrialScheduler.STOP,
}


def run_trials(
    board: Board,
    options: SearchOptions,
    store: TrialStore,
    splits: tuple[Split, Split],
    should_stop: Callable[[], bool],
) -> None:
    """Have the board's trials trained until it is finished, or until ``should_stop`` says so.

    The board knows which it was. Raises :class:`RayBrokeError`, and what the board raised.
    """
    draws = Draws(board, options, should_stop)
    folder = options.ckpt_folder / "ray"
    shutil.rmtree(folder, ignore_errors=True)  # nothing is ever read from it
    trainable = tune.with_parameters(
        train_trial,
        config=board.config,
        options=options,
        store=store,
        device=trial_device(options),
        splits=tuple(map(SharedSplit.of, splits)),
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, trial_resources(options)),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the searcher says that it is finished
            search_alg=draws,
            scheduler=Decisions(board, draws, options),
            reuse_actors=True,  # a new process costs 3 s and more, most of it importing torch
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=tune.FailureConfig(max_failures=-1),  # the board counts
            stop=StopAll(draws.should_stop),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception as error:  # whatever Ray raises when its processes are gone
        if not draws.troubles:
            said = str(error).strip() or type(error).__name__
            raise RayBrokeError(
                f"Ray broke down ({said.splitlines()[-1]}): what was done is kept, and the same "
                "command goes on."
            ) from error
    shutil.rmtree(folder, ignore_errors=True)
    if draws.troubles:
        raise draws.troubles[0]


def _trial_name(trial: Trial) -> str:
    return trial_name(_number(trial))


def _number(trial: Trial) -> int:
    return trial.config["number"]


class StopAll(Stopper):
    """Ends the experiment in order when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop, self._on_usr1 = should_stop, signal.getsignal(signal.SIGUSR1)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        signal.signal(signal.SIGUSR1, self._on_usr1)  # Tune has set one of its own by now
        return self._should_stop()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles its Tuner; the board that is behind this holds an open file


class Draws(Searcher):
    """Hands Ray one trial after the other: those begun before a stop first, then new ones.

    None before there is a place for it: what is drawn later can learn from more.
    """

    def __init__(
        self,
        board: Board,
        options: SearchOptions,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._board, self._asked_to_stop = board, asked_to_stop
        self._num_places = lambda: num_places(nodes(), options)
        self._given: dict[int, str] = {}  # number -> Ray's id
        halving = board.config.scheduler in ("asha", "hyperband")
        #: Whether trials give way to those behind; TPE draws late, having seen more by then.
        self.in_step = halving and board.config.algorithm != "tpe" and self._num_places() > 1
        self.troubles: list[VAEHyperbandError] = []  # such as a full disk under the decision log

    def should_stop(self) -> bool:
        return bool(self.troubles) or self._asked_to_stop()

    @contextlib.contextmanager
    def noting_trouble(self) -> Iterator[None]:
        """Keep our own errors for the end of the run; Ray would make tracebacks of them."""
        try:
            yield
        except VAEHyperbandError as error:
            self.troubles.append(error)

    # Ray's own annotation leaves out FINISHED, which is a str
    def suggest(self, trial_id: str) -> Any:
        board = self._board
        if board.finished or self.should_stop():
            return Searcher.FINISHED
        active = self._given.keys() & set(board.runnable())
        if self.in_step:  # those that are under way make room for new ones
            active = {number for number in active if board.trials[number].num_epochs < LEAD}
        if len(active) >= self._num_places():
            return None
        with self.noting_trouble():
            waiting = [number for number in board.runnable() if number not in self._given]
            trial = board.trials[waiting[0]] if waiting else board.draw_next()
            if trial is not None:
                self._given[trial.number] = trial_id
                return {"number": trial.number, "drawn": trial.drawn}
        return None

    def take_back(self, trial: Trial) -> None:
        """Ray gave a trial up that the board wants: it gets a new one for the same number.

        Ray does so where a process that was to be used again for this trial is gone or busy.
        """
        number = _number(trial)
        if self._given.get(number) == trial.trial_id:
            del self._given[number]

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """The board has it from the trial's last report."""

    def save(self, checkpoint_path: str) -> None:
        """What Ray wants to keep of this is in the decision log."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its decision log")

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Decisions(FIFOScheduler):
    """Tells the board what trials report, and Ray what the board says of them.

    A trial that has to wait for an earlier one is paused: it gives its place to another, and goes
    on from its checkpoint when its turn comes.
    """

    def __init__(self, board: Board, draws: Draws, options: SearchOptions) -> None:
        super().__init__()
        self._board, self._draws, self._options = board, draws, options
        self._deaths: dict[int, list[float]] = {}  # number -> when, since its last report

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number = _number(trial)
        with self._draws.noting_trouble():
            if "failed" in result:
                self._board.failed(number, result["failed"])
            elif not result.get("done"):  # a function that returned reports its last result again
                if result["epoch"] > self._board.trials[number].num_epochs:
                    self._deaths.pop(number, None)
                row = {name: result[name] for name in result if name in ROW}
                self._board.reported(number, row)
        action = self._action(trial)
        if action == "go on" and self._draws.in_step and self._gives_way(tune_controller, trial):
            action = "wait"
        return ACTIONS[action]

    def _gives_way(self, tune_controller: Any, trial: Trial) -> bool:
        limit = self._num_epochs(trial) - LEAD
        return any(self._num_epochs(other) <= limit for other in self._ready(tune_controller))

    def _num_epochs(self, trial: Trial) -> int:
        return self._board.trials[_number(trial)].num_epochs

    def _ready(self, tune_controller: Any) -> list[Trial]:
        """The trials that could run if there were a place for them."""
        return [
            trial
            for trial in tune_controller.get_trials()
            if trial.status in (Trial.PENDING, Trial.PAUSED) and self._action(trial) == "go on"
        ]

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial's process died. Ray starts another one, until the board has had enough."""
        number, now = _number(trial), time.monotonic()
        deaths = self._deaths.setdefault(number, [])
        if deaths and now - deaths[-1] < ONE_DEATH_SECONDS:
            return
        deaths.append(now)
        with self._draws.noting_trouble():
            why = self._cause_of_death(trial_name(number))
            self._board.died(number, why)
            if len(deaths) > self._options.max_failures:
                self._board.failed(number, f"{why}; tried {len(deaths)} times")

    def _cause_of_death(self, name: str) -> str:
        report = hang_report(self._options, name)
        if not report.exists() or not report.stat().st_size:
            return "its process died"
        report.rename(report.with_name("last_hang.txt"))
        seconds = self._options.trial_timeout
        return f"hung: no epoch in {seconds:g} s (last_hang.txt in its logs says where)"

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Of those that may run the one that is furthest behind; the first one, as drawn, of them,
        since it is the one that others wait for."""
        trials = tune_controller.get_trials()
        for trial in trials:
            waits = trial.status in (Trial.PAUSED, Trial.PENDING)
            if waits and self._action(trial) == "stop":
                tune_controller.stop_trial(trial)  # it lost by a report of another, or failed
            elif trial.status in (Trial.ERROR, Trial.TERMINATED):
                self._draws.take_back(trial)
        num_running = sum(trial.status == Trial.RUNNING for trial in trials)
        if num_running >= (self._options.max_concurrent or len(trials) + 1):
            return None
        ready = self._ready(tune_controller)
        return min(ready, key=lambda trial: (self._num_epochs(trial), _number(trial)), default=None)

    def _action(self, trial: Trial) -> str:
        return self._board.verdict(_number(trial)).action

    def __getstate__(self) -> dict[str, Any]:
        return {}
