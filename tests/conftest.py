"""Small data that the tests make themselves, real Fashion-MNIST where one test needs it."""

import os

# before PyTorch is imported: threads of several processes on few cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import dataclasses
import functools
import gzip
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import Forks
from killing import descendants, listening, sigkill, started_after

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import DataError
from vae_hyperband.common.files import cache_folder
from vae_hyperband.data.splits import load_split
from vae_hyperband.model.checkpoint import FORMAT, KEYS, load_pt, save_pt
from vae_hyperband.training.loop import FitResult, fit

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-xdist's, which looks at the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Tests that share what takes long to make run in one process, one after the other.

    Those of a file that use a fixture of that file, and all that use the finished search. The
    others run wherever there is room.
    """
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs
        scopes = {name: found[-1].scope for name, found in fixtures.items()}
        if "searched" in scopes:
            item.add_marker(pytest.mark.xdist_group("searched"))
        elif "module" in scopes.values():
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    yield
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if config.getoption("loadgroup", False):
        # a pytest that is too new for pytest-xdist would make everything twice, in silence
        assert all("@" in item.nodeid for item in grouped), "pytest-xdist does not see the groups"


TEST_SECONDS = 2700  # the longest, of many kills, takes some minutes


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Whatever a test waits for, it ends: what it has started is killed, and it has failed."""
    begun = time.clock_gettime(time.CLOCK_BOOTTIME)

    def end(*_: object) -> None:
        for pid in descendants(os.getpid())[1:]:
            if started_after(begun, pid):
                sigkill(pid)
        raise AssertionError(f"not at its end after {TEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(TEST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def idx_bytes(array: np.ndarray) -> bytes:
    """The array as an IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_folder(
    folder: Path,
    num_train: int = 360,
    num_test: int = 60,
    size: int = 8,
    zipped: bool = False,
    num_classes: int = 10,
) -> Path:
    """Four IDX files of bright rectangles, whose width and height depend on the label."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for part, num in (("train", num_train), ("t10k", num_test)):
        labels = random.integers(0, num_classes, num)
        images = random.integers(0, 20, (num, size, size))
        for image, label in zip(images, labels, strict=True):
            image[: 2 + label % 3 * 2, : 2 + label // 3] += 200
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{part}-{kind}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, which has what the user's has at first: Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(DataError, OSError):  # no home directory, no cache
        for path in cache_folder().iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_HYPERBAND_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set: 300 training, 60 validation, 60 test images of 8x8."""
    return write_idx_folder(tmp_path_factory.mktemp("small-data"))


SMALL = TrainConfig(dataset="custom", latent_dim=4, batch_size=32, epochs=3, seed=3)


@pytest.fixture
def small_config() -> TrainConfig:
    return SMALL


@pytest.fixture
def options(tmp_path: Path, small_data: Path) -> Callable[..., RunOptions]:
    """``options(run="a")`` for runs under this test's own folder."""

    return functools.partial(run_options, tmp_path, small_data)


def run_options(folder: Path, idx_files: Path, **changes: object) -> RunOptions:
    given = {
        "run": "a",
        "device": "cpu",
        "num_threads": 1,
        "data_dir": idx_files,
        "checkpoints_dir": folder / "checkpoints",
        "logs_dir": folder / "logs",
        "log_interval": 4,
    }
    return RunOptions(**(given | changes))


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> FitResult:
    """A finished run of ``small_config``, shared: nothing may be written to its folders."""
    folder = tmp_path_factory.mktemp("trained")
    return fit(SMALL, run_options(folder, small_data), quiet=True)


@pytest.fixture
def trained(trained_once: FitResult, options: Callable[..., RunOptions]) -> FitResult:
    """The same in this test's own folder, as if it had been trained there."""
    place = options()
    shutil.copytree(trained_once.latest.parent, place.ckpt_folder)
    shutil.copytree(trained_once.log_folder, place.log_folder)
    return dataclasses.replace(
        trained_once,
        latest=place.ckpt_folder / trained_once.latest.name,
        best=place.ckpt_folder / trained_once.best.name,
        log_folder=place.log_folder,
    )


@pytest.fixture(scope="session")
def fashion_mnist() -> None:
    """Real Fashion-MNIST, wherever load_split finds it. In CI it has to be there."""
    try:
        load_split("test")
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs the real data: {error}")


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Processes that have imported everything."""
    with Forks() as server:
        yield server


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run the command line as a user would, in this test's own folder."""

    def run(*argv: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*argv), cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def fork(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Command:
    """As ``command``, without the seconds of imports, for what starts no Ray."""
    said = tmp_path_factory.mktemp("said")

    def run(*argv: object, **how: object) -> subprocess.CompletedProcess[str]:
        return forks.completed(argv, tmp_path, said, **how)

    return run


def command_line(*argv: object) -> list[str]:
    return [sys.executable, "-m", "vae_hyperband.train_vae", *map(str, argv)]


def written(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Everything below a folder and when it was written; reading changes nothing of it."""
    facts = {path: path.stat() for path in folder.rglob("*")}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in facts.items()}


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A real browser. CI has to have one; elsewhere, without it, its tests are skipped."""
    from chromium import browser, trouble

    if why := trouble():
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    with browser() as found:
        yield found


def rewrite_ckpt(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint file holds, and give it the digest of the changed content."""
    content = load_pt(path, FORMAT, KEYS)
    del content["digest"]
    change(content)
    save_pt(path, content, FORMAT, KEYS)


SEARCHED = ["--dataset", "custom", "--batch-sizes", 32, 64, "--latent-dims", 2, 4]


def search_command(small_data: Path, run: str, *extra: object) -> list[str]:
    return command_line(
        "search", "--run", run, "--data-dir", small_data, "--device", "cpu", *SEARCHED, *extra
    )


@pytest.fixture(scope="session")
def searched(tmp_path_factory, small_data) -> tuple[Path, str]:
    """One finished ASHA search, shared: its working folder and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    train_only = folder / "data"  # a search that opened the test file would not find it
    train_only.mkdir()
    for file in small_data.glob("train-*"):
        (train_only / file.name).write_bytes(file.read_bytes())
    command = search_command(
        train_only, "s", "--num-trials", 9, "--max-epochs", 9, "--reduction-factor", 3,
        "--track", "mlflow", "--optuna", "sqlite:///optuna.db",
    )  # fmt: skip
    said, addresses = "", set()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            said += line
            if " epoch " in line:  # the driver, Ray's servers and the workers are all there
                addresses |= set(listening(descendants(process.pid)))
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    (folder / "addresses.json").write_text(json.dumps(sorted(addresses)))
    return folder, said
