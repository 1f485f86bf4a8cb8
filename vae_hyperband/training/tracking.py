"""A run in W&B, MLflow or Trackio (``--track``): a copy of what its own logs hold.

Only what a saved checkpoint supposes is sent, a step at a time and in order, so nothing that was
sent is taken back. How far the copy is, the tracker itself is asked, never a file of ours: a kill
at any moment, between sending and remembering as well, leaves each step there once.
:func:`~vae_hyperband.training.tracker.logged_pictures` and metrics.jsonl give a resumed run again
what was not sent yet.

Everything stays in files in the folder of logs, unless the tracker's own variables of the
environment name a server. What goes wrong is said once, and costs the run nothing.
"""

import contextlib
import io
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vae_hyperband.common.config import RunOptions
from vae_hyperband.common.errors import first_line
from vae_hyperband.common.files import real, write_text
from vae_hyperband.model.checkpoint import BEST, load_ckpt

PROJECT = "vae-hyperband"
IDENTITY = "tracking.json"  # in a run's folder of logs: its id in every tracker


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first values."""

    id: str
    name: str
    group: str
    folder: Path  # the trackers' own files lie in it
    settings: Mapping[str, object]


@dataclass(frozen=True)
class Moment:
    """What a run logged at one step: values, PNGs, and which checkpoint is the best one."""

    step: int
    values: Mapping[str, float]
    pictures: Mapping[str, bytes]
    facts: Mapping[str, str]


class External(Protocol):
    """A run in a tracker. ``last_step`` is the last one that it has; -1 if it has none."""

    last_step: int

    def log(self, moment: Moment) -> None:
        """Send one step, later than those before it, in whole or not at all."""

    def close(self, finished: bool) -> None: ...


class Mirror:
    """Collects what a run logs and sends it once a checkpoint supposes it; never raises."""

    def __init__(
        self, options: RunOptions, settings: Mapping[str, object], start_step: int, num_steps: int
    ) -> None:
        self._options, self._settings = options, settings
        self._start, self._num_steps = start_step, num_steps
        self._values: dict[int, dict[str, float]] = {}
        self._pictures: dict[int, dict[str, bytes]] = {}
        self._external: External | None = None
        self._best: tuple[float, dict[str, str]] = (0, {})  # its step, what is said of it
        self._failed = False
        if start_step == 0:  # another run may have had this folder
            with self.harmless():
                (options.log_folder / IDENTITY).unlink(missing_ok=True)

    def values(self, step: int, values: Mapping[str, float]) -> None:
        if not self._failed:
            self._values.setdefault(step, {}).update(values)

    def picture(self, step: int, tag: str, png: bytes) -> None:
        if not self._failed:
            self._pictures.setdefault(step, {})[tag] = png

    def send(self, step: int, best_step: float) -> None:
        """Send what was logged up to a step, whose checkpoint is on disk."""
        with self.harmless():
            if self._failed:
                return
            external = self._external = self._external or self._open()
            facts = self._facts_of(best_step)
            due = sorted(s for s in self._values.keys() | self._pictures.keys() if s <= step)
            for number in due:
                values, pictures = self._values.pop(number, {}), self._pictures.pop(number, {})
                if number > external.last_step:
                    external.log(Moment(number, values, pictures, facts))
                    external.last_step = number

    def close(self) -> None:
        with self.harmless():
            if self._external:
                self._external.close(finished=self._external.last_step >= self._num_steps)

    @contextlib.contextmanager
    def harmless(self) -> Iterator[None]:
        """An error inside is said, the first time, and nothing is sent any more."""
        try:
            yield
        except Exception as error:  # anything: it is only a copy
            if not self._failed:
                print(
                    f"warning: --track {self._options.track} failed, and gets nothing more until "
                    f"the next start: {first_line(error)}",
                    file=sys.stderr,
                    flush=True,
                )
            self._failed = True

    def _open(self) -> External:
        path = self._options.log_folder / IDENTITY
        if not path.exists():
            _write_identity(path)
        external = self._opened(path)
        if external.last_step > self._start:
            # it resumed from an older checkpoint: what was sent after that may not come again
            external.close(finished=False)
            _write_identity(path)
            external = self._opened(path)
        return external

    def _opened(self, path: Path) -> External:
        options = self._options
        run = TrackedRun(
            id=str(json.loads(path.read_text(encoding="utf-8"))["id"]),
            name=f"{options.track_group}/{options.run}" if options.track_group else options.run,
            group=options.track_group,
            folder=real(options.logs_dir),
            settings={**self._settings, "checkpoints": str(real(options.ckpt_folder))},
        )
        return ADAPTERS[options.track](run)

    def _facts_of(self, best_step: float) -> dict[str, str]:
        """A checkpoint by reference: where the best one is, and the digest of its weights."""
        if best_step != self._best[0]:
            best = load_ckpt(self._options.ckpt_folder / BEST)
            about = {"best_checkpoint": str(real(best.path)), "best_weights": best.weights_digest}
            self._best = (best_step, about)
        return self._best[1]


def _write_identity(path: Path) -> None:
    # of random bits: two runs of one name, one after another, are two runs in the tracker
    write_text(path, json.dumps({"id": secrets.token_hex(8)}) + "\n")


class Wandb:
    """W&B. Offline, a session writes a folder with the whole run and removes those before it.

    W&B does not resume offline runs: it would take two folders for two histories.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B's own Sentry
        import wandb

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        folder = Path(os.environ.get("WANDB_DIR", run.folder))
        if mode == "offline":
            for former in folder.glob(f"wandb/offline-run-*-{run.id}"):
                # W&B's own process may still be ending, after a kill, and write there
                shutil.rmtree(former, ignore_errors=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            group=run.group or None,
            dir=folder,
            config=dict(run.settings),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",  # another run of this process is not ended by it
            settings=wandb.Settings(
                # nothing of the machine, its packages or its screen: logs are shown to others
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        # W&B says which step comes next
        self.last_step = int(self._run.step) - 1

    def log(self, moment: Moment) -> None:
        pictures = {tag: self._wandb.Image(_opened(png)) for tag, png in moment.pictures.items()}
        self._run.log({**moment.values, **pictures}, step=moment.step, commit=True)
        self._run.summary.update(moment.facts)

    def close(self, finished: bool) -> None:
        self._run.finish()


class MLflow:
    """MLflow: an SQLite file, unless MLFLOW_TRACKING_URI names another store."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            # of a server that is gone: a run is not to wait for minutes
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        }.items():
            os.environ.setdefault(name, value)
        from filelock import FileLock
        from mlflow import MlflowClient, entities

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._entities = entities
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        place = None if uri else (run.folder / "mlflow-artifacts").as_uri()
        # runs side by side would make the tables, and the experiment, at the same time
        with contextlib.nullcontext() if uri else FileLock(run.folder / ".mlflow.lock"):
            client = self._client = MlflowClient(uri or f"sqlite:///{run.folder / 'mlflow.db'}")
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            there = client.get_experiment_by_name(name)
            experiment = there.experiment_id if there else client.create_experiment(name, place)
        # by an id of ours: names of MLflow's runs may repeat
        mine = client.search_runs([experiment], f"tags.vae_hyperband_id = '{run.id}'")
        tags = {"vae_hyperband_id": run.id, "group": run.group}
        found = mine[0] if mine else client.create_run(experiment, tags=tags, run_name=run.name)
        self._id = found.info.run_id
        client.update_run(self._id, "RUNNING")
        self._log_settings(run.settings, found.data.params)
        self.last_step = max(
            (
                value.step
                for key in found.data.metrics
                for value in client.get_metric_history(self._id, key)
            ),
            default=-1,
        )

    def _log_settings(self, settings: Mapping[str, object], there: Mapping[str, str]) -> None:
        texts = {name: str(value) for name, value in settings.items()}
        params = [self._entities.Param(n, text) for n, text in texts.items() if n not in there]
        # a parameter of MLflow's is for ever, but a resumed run may have more epochs
        tags = [
            self._entities.RunTag(f"{name} since it resumed", text)
            for name, text in texts.items()
            if there.get(name, text) != text
        ]
        self._client.log_batch(self._id, params=params, tags=tags)

    def log(self, moment: Moment) -> None:
        # the step's values last: only a step that has them counts as sent
        for tag, png in moment.pictures.items():
            # under a name of its step, so that a second time it takes the place of the first
            name = f"{tag}/step-{moment.step:08d}.png"
            self._client.log_image(self._id, _opened(png), artifact_file=name)
        # read once: the values of a step belong together
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(name, value, now, moment.step)
            for name, value in moment.values.items()
        ]
        tags = [self._entities.RunTag(name, value) for name, value in moment.facts.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Trackio:
    """Trackio: its SQLite database, unless TRACKIO_SERVER_URL or TRACKIO_SPACE_ID is set."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder / "trackio"))
        if not {"TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"} & set(os.environ):
            # it would ask the Hugging Face hub who the user is
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import trackio

        self._trackio = trackio
        # it prints how to start its dashboard, at each start and end of a run
        with contextlib.redirect_stdout(io.StringIO()):
            self._run: Any = trackio.init(
                project=PROJECT,
                name=f"{run.name}-{run.id}",  # by which it finds the run to continue
                group=run.group or None,
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self.last_step = self._run._next_step - 1

    def log(self, moment: Moment) -> None:
        pictures = {tag: self._trackio.Image(_opened(png)) for tag, png in moment.pictures.items()}
        self._run.log({**moment.values, **moment.facts, **pictures}, step=moment.step)

    def close(self, finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()  # of the run, and of what would finish it at exit


def _opened(png: bytes) -> Any:
    from PIL import Image  # not installed everywhere that trains

    return Image.open(io.BytesIO(png))


ADAPTERS: Mapping[str, Callable[[TrackedRun], External]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
