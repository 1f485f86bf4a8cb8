"""TensorBoard, metrics.jsonl and progress: all that a person watches is written here.

``metrics.jsonl`` holds one row per step and split, without any clock in it, so that a run that was
killed and resumed leaves the same bytes as one that was not. Speed goes to ``timing.jsonl``.
"""

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import create_summary_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, hparams, image, scalar, text
from tqdm import tqdm

from vae_hyperband.common.errors import RunFolderError
from vae_hyperband.common.files import (
    AppendedFile,
    make_folder,
    remove_leftovers,
    write_bytes,
    write_text,
)
from vae_hyperband.common.process import on_terminal
from vae_hyperband.training.tracking import Mirror

COLUMNS = 8  # of a logged grid
MARGIN = 2  # pixels between the images of a grid


def image_grid(
    images_NCHW: Tensor, columns: int, margin: int = MARGIN, background: float = 1.0
) -> Tensor:
    """Images in [0, 1] side by side, filled row by row: (C, height, width)."""
    num, channels, height, width = images_NCHW.shape
    rows = math.ceil(num / columns)
    cell_h, cell_w = height + margin, width + margin
    size = (channels, rows * cell_h + margin, columns * cell_w + margin)
    # on the CPU, wherever the images are: a picture is written, not computed with
    grid = torch.full(size, background)
    for i, image_CHW in enumerate(images_NCHW.cpu()):
        top, left = margin + i // columns * cell_h, margin + i % columns * cell_w
        grid[:, top : top + height, left : left + width] = image_CHW
    return grid


#: Grey images of which more than half of the pixels are darker are ink, as garments and digits are.
INK = 0.1


def is_ink(images_NCHW: Tensor) -> bool:
    """Whether people should see such images as ink on paper, 0 as white; photographs are not."""
    return images_NCHW.shape[1] == 1 and bool(images_NCHW.median() < INK)


#: A row of metrics.jsonl or timing.jsonl: step, epoch, split and values by name.
LogRow = dict[str, Any]


class Tracker:
    """Writes one run's logs from a step on; what was logged after that step is taken back.

    A run killed after its last checkpoint has logged steps that it will compute again: their rows
    are removed, and TensorBoard is told to purge them.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        tensorboard: bool = True,
        mirror: Mirror | None = None,
    ) -> None:
        make_folder(folder)
        # a run that starts over must not append to the log of another
        if start_step == 0:
            _put_aside(folder / "metrics.jsonl")
        self._files = []
        for name in ("metrics.jsonl", "timing.jsonl"):
            remove_leftovers(folder / name)
            # rows after the checkpoint will be computed and written again
            write_bytes(folder / name, _rows_until(folder / name, start_step))
            self._files.append(AppendedFile(folder / name))
        self._metrics, self._timing = self._files
        self._mirror = mirror
        if mirror and start_step:
            with mirror.harmless():
                self._repeat(folder, start_step, mirror)
        self._board = None
        if tensorboard:
            file = AppendedFile(next_event_file(folder))
            self._board = EventFile(file, purge_step=start_step + 1 if start_step else 0)
            self._files.append(file)

    def _repeat(self, folder: Path, start_step: int, mirror: Mirror) -> None:
        """Log for the mirror once more what it may lack of the steps before."""
        for row in read_rows(folder / "metrics.jsonl"):
            mirror.values(row["step"], _by_tag(row))
        for step, pictures in logged_pictures(folder).items():
            for tag, png in pictures.items():
                if step <= start_step:
                    mirror.picture(step, tag, png)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            for file in self._files:
                file.close()
            if self._mirror:
                self._mirror.close()

    def scalars(self, split: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """One row of losses in nats per image; TensorBoard tags are ``recon_loss/train`` etc."""
        # no clock in it: a run that was killed and resumed leaves the same bytes
        row = {"step": step, "epoch": epoch, "split": split, **values}
        self._metrics.write(_line(row))
        by_tag = _by_tag(row)
        for tag, value in by_tag.items():
            self._show(scalar(tag, value), step)
        if self._mirror:
            self._mirror.values(step, by_tag)

    def speed(self, step: int, images_per_second: float) -> None:
        # in a file of its own, since it differs from run to run
        row = {"step": step, "images_per_second": round(images_per_second, 1)}
        self._timing.write(_line(row))
        self._show(scalar("images_per_second", images_per_second), step)

    def pictures(self, step: int, **images_NCHW: Tensor) -> None:
        """Each argument is a batch of images in [0, 1] and becomes one grid, 8 to a row."""
        if self._board:
            for name, images in images_NCHW.items():
                grid = image_grid(images, COLUMNS)
                summary = image(f"images/{name}", grid, dataformats="CHW")
                self._show(summary, step)
                if self._mirror:
                    [shown] = summary.value
                    self._mirror.picture(step, shown.tag, shown.image.encoded_image_string)

    def configuration(self, command: str, config: Mapping[str, Any]) -> None:
        """What the run is, as text: the command that repeats it, and a table."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in config.items())
        said = f"`{command}`\n\n| setting | value |\n|---|---|\n{rows}"
        self._show(text("configuration", said), 0)

    def kl_per_dimension(self, step: int, kl_Z: Tensor) -> None:
        """A histogram over the latent dimensions: those near 0 nats say nothing."""
        self._show(histogram("KL_per_dimension", kl_Z.cpu().numpy(), bins=30), step)

    def hyperparameters(
        self, config: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """The row of this run, which has finished, in TensorBoard's HParams table."""
        for summary in _hyperparameters(config, metrics, "finished"):
            self._show(summary, step)

    def _show(self, summary: Summary, step: int) -> None:
        if self._board:
            self._board.add(summary=summary, step=step)

    def saved(self, step: int, best_step: float) -> None:
        """A checkpoint is on disk that supposes what was logged up to its step."""
        if self._mirror:
            self._mirror.send(step, best_step)

    def flush(self) -> None:
        """On disk, durably: a checkpoint may be saved only after the rows that it supposes.

        Raises :class:`RunFolderError` if there is no room; what was logged is kept for the next
        try.
        """
        # a checkpoint that is ahead of its log would leave a hole in it after a power cut
        for file in self._files:
            file.flush()


EVENTS = "events.out.tfevents"


def next_event_file(folder: Path, ending: str = "") -> Path:
    """The path of one more file of a run's events; TensorBoard reads them in order of names."""
    others = [path.name.split(".")[3] for path in folder.glob(f"{EVENTS}.*.*")]
    second = max([int(time.time()), *(int(other) + 1 for other in others if other.isdecimal())])
    return folder / f"{EVENTS}.{second:010d}.{socket.gethostname()}.{os.getpid()}{ending}"


class EventFile:
    """Events of a run, as TensorBoard reads them, written into a file that is open.

    PyTorch's SummaryWriter loses what a full disk does not take, and flushes, but not to the disk.
    """

    def __init__(self, file: AppendedFile | io.BytesIO, purge_step: int) -> None:
        self._records = RecordWriter(file)
        self.add(file_version="brain.Event:2")
        # what older files say about steps from this one on counts no more
        self.add(session_log=SessionLog(status=SessionLog.START), step=purge_step)

    def add(self, **what: Any) -> None:
        """Add an event; its fields are those of TensorBoard's event.proto."""
        self._records.write(Event(wall_time=time.time(), **what).SerializeToString())


def logged_pictures(log_folder: Path, *tags: str) -> dict[int, dict[str, bytes]]:
    """The PNGs of a run's event files by their step and tag ("images/input"); some tags, or all.

    A run that resumed from a checkpoint has logged some steps twice: the last one counts. Raises
    :class:`RunFolderError` if a file cannot be read.
    """
    found: dict[int, dict[str, bytes]] = {}
    for path in sorted(log_folder.glob(f"{EVENTS}.*")):
        try:
            for record in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(record)
                if event.HasField("session_log"):  # what follows takes the place of these
                    found = {step: pngs for step, pngs in found.items() if step < event.step}
                for value in event.summary.value:
                    if value.HasField("image") and (not tags or value.tag in tags):
                        found.setdefault(event.step, {})[value.tag] = (
                            value.image.encoded_image_string
                        )
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    return found


def _hyperparameters(
    config: Mapping[str, Any], metrics: Mapping[str, float], outcome: str
) -> list[Summary]:
    """What TensorBoard makes a row of its HParams table of; the outcome is one of its columns."""
    # PyTorch's function takes no lists, which --widths is
    plain = {name: str(v) if isinstance(v, list) else v for name, v in config.items()}
    *head, end = hparams({"outcome": outcome, **plain}, dict(metrics))
    if outcome == "failed":  # PyTorch's function knows success only
        status = SessionEndInfo(status=Status.Value("STATUS_FAILURE"))
        data = HParamsPluginData(session_end_info=status)
        end.value[0].metadata.CopyFrom(create_summary_metadata(data))
    return [*head, end, *(scalar(name, value) for name, value in metrics.items())]


def write_hyperparameters(
    folder: Path, config: Mapping[str, Any], metrics: Mapping[str, float], step: int, outcome: str
) -> None:
    """Write the HParams row of a run that did not finish, beside its other events; once."""
    if any(folder.glob(f"{EVENTS}.*.outcome")):
        return
    memory = io.BytesIO()
    file = EventFile(memory, purge_step=step + 1)
    for summary in _hyperparameters(config, metrics, outcome):
        file.add(summary=summary, step=step)
    # atomically: a torn file would be taken for a whole one
    write_bytes(next_event_file(folder, ".outcome"), memory.getvalue())


def read_rows(path: Path, needed: tuple[str, ...] = ()) -> list[LogRow]:
    """The rows of a JSON-lines file; a line torn by a kill, or damaged, is left out.

    So is one without a finite number in a column that is ``needed``, or without a text as "split".
    No file has no rows; raises :class:`RunFolderError` if there is one that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    rows: list[LogRow] = []
    for line in lines:
        # a kill may tear a line, a disk may damage one: it costs its row, not all others
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row.get("step"), int)
            if whole and all(_usable(name, row.get(name)) for name in needed):
                rows.append(row)
    return rows


def _usable(name: str, value: Any) -> bool:
    if name == "split":
        return isinstance(value, str)
    return isinstance(value, int | float) and math.isfinite(value)


def _by_tag(row: LogRow) -> dict[str, float]:
    """A row's values by the tags that TensorBoard shows them under."""
    return {
        name if name == "learning_rate" else f"{name}/{row['split']}": value
        for name, value in row.items()
        if name not in ("step", "epoch", "split")
    }


def _line(row: LogRow) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _rows_until(path: Path, step: int) -> bytes:
    """The rows that a run keeps when it continues from that step. A kill may tear the last line."""
    rows = read_rows(path)
    # said, since a person may look for the rows
    lost = path.read_bytes().count(b"\n") - len(rows) if path.exists() else 0
    if lost > 0:
        print(f"note: {lost} damaged lines of {path} are left out", file=sys.stderr, flush=True)
    return b"".join(_line(row) for row in rows if row["step"] <= step)


def _put_aside(path: Path) -> None:
    """Rename the log of an earlier run whose checkpoints are gone, before a new run starts.

    A run that was killed before its first validation is not meant: it computes the same rows.
    """
    if any(row.get("split") == "validation" for row in read_rows(path)):
        aside = path.with_name("metrics.before.jsonl")
        os.replace(path, aside)
        print(
            f"note: {path} is of a run whose checkpoints are not here; kept as {aside.name}",
            file=sys.stderr,
            flush=True,
        )


class Progress:
    """A bar on a terminal, one line per validation elsewhere; ``quiet`` shows nothing."""

    def __init__(self, first_step: int, num_steps: int, quiet: bool = False) -> None:
        self._quiet = quiet
        self._first, self._num, self._started = first_step, num_steps, time.monotonic()
        self._last_log, self._images, self._images_per_second = self._started, 0, 0.0
        self._bound: float | None = None  # logged last, if not shown yet
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            # in a log file the bar would be thousands of lines
            disable=quiet or not on_terminal(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, num_images: int) -> None:
        self._images += num_images
        self._bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside, such as validating and saving, out of the training speed."""
        started = time.monotonic()
        yield
        # as if the clock had stood still
        self._last_log += time.monotonic() - started

    def logged(self, bound: float) -> None:
        """Show a training bound."""
        self._bound = bound

    def speed(self) -> float | None:
        """Images per second of training since the last call; None if nothing was logged since.

        To be asked for when all steps that were counted have been waited for.
        """
        if self._bound is None:
            return None
        now = time.monotonic()
        self._images_per_second = self._images / max(now - self._last_log, 1e-9)
        speed = f"{self._images_per_second:,.0f} images/s"
        # no refresh here: the bar draws itself at its own pace
        self._bar.set_postfix_str(f"bound {self._bound:.1f} nats, {speed}", refresh=False)
        self._last_log, self._images, self._bound = now, 0, None
        return self._images_per_second

    def validated(
        self,
        step: int,
        epoch: int,
        epochs: int,
        train: dict[str, float],
        held_out: dict[str, float],
    ) -> None:
        if self._quiet:
            return
        # steps of this process only: what was done before a resume took none of its time
        done = max(step - self._first, 1)
        left = (time.monotonic() - self._started) / done * (self._num - step)
        line = (
            f"epoch {epoch}/{epochs}: bound {train['bound']:.2f} train, {held_out['bound']:.2f} "
            f"validation (nats/image), {self._images_per_second:,.0f} images/s"
        )
        if self._bar.disable:
            print(f"{line}, {left:.0f} s left", flush=True)
        else:
            # through the bar: a print would land in the middle of it
            self._bar.write(line)


# ---- Latents for TensorBoard's embedding projector: vectors, labels and a sprite of their images.

PROJECTOR = "projector"
NUM_IMAGES = 2000
SPRITE_SIZE = 8192  # pixels; a wider sprite is not shown


def most_in_sprite(height: int, width: int) -> int:
    """How many images of that size the projector can show, :data:`NUM_IMAGES` at most."""
    return min(NUM_IMAGES, (SPRITE_SIZE // max(height, width)) ** 2)


def write_projector(
    log_folder: Path, mu_NZ: Tensor, images_NCHW: Tensor, label_N: Tensor, names: Sequence[str]
) -> None:
    """Write what the projector shows of posterior means; ``images_NCHW`` are in [0, 1].

    Labels without a name are shown by their number.
    """
    folder = log_folder / PROJECTOR
    make_folder(folder)
    rows = ["\t".join(f"{value:.6g}" for value in mu_Z) for mu_Z in mu_NZ.tolist()]
    write_text(folder / "latents.tsv", "\n".join(rows) + "\n")
    labels = [names[label] if label < len(names) else str(label) for label in label_N.tolist()]
    # a table of one column has no head
    write_text(folder / "labels.tsv", "\n".join(labels) + "\n")
    write_bytes((folder / "sprite.png").resolve(), _sprite(images_NCHW))
    height, width = images_NCHW.shape[2:]
    config = (
        'embeddings {\n  tensor_name: "posterior means"\n'
        f'  tensor_path: "{PROJECTOR}/latents.tsv"\n  metadata_path: "{PROJECTOR}/labels.tsv"\n'
        f'  sprite {{\n    image_path: "{PROJECTOR}/sprite.png"\n'
        f"    single_image_dim: {width}\n    single_image_dim: {height}\n  }}\n}}\n"
    )
    write_text(log_folder / "projector_config.pbtxt", config)


def _sprite(images_NCHW: Tensor) -> bytes:
    """All images in one square, row by row, without margins: ink on paper if they are grey."""
    from PIL import Image  # not installed everywhere that trains

    columns = math.ceil(len(images_NCHW) ** 0.5)
    grid_CHW = image_grid(images_NCHW, columns, margin=0, background=0.0)
    # the projector's background is white, so garments are shown as ink on paper
    if is_ink(images_NCHW):
        grid_CHW = 1 - grid_CHW
    pixels_HWC = (grid_CHW * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    # the projector takes square sprites only
    square = Image.new(picture.mode, (picture.width, picture.width), "white")
    square.paste(picture)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    return buffer.getvalue()
