"""The wheel holds all that the package reads at run time, not only its modules."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vae_hyperband
from vae_hyperband.training.loop import fit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A folder with the content of the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves build/ and *.egg-info in the source tree
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vae_hyperband", source / "vae_hyperband", ignore=ignore)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build += ["--disable-pip-version-check", "--no-index", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


# arguments: the folder of the package, then commands, each as a JSON list
SCRIPT = """
import json, sys
from importlib import metadata
from pathlib import Path
from vae_hyperband import train_vae

folder = Path(sys.argv[1])
assert Path(train_vae.__file__).is_relative_to(folder), train_vae.__file__
assert Path(metadata.distribution("vae-hyperband").locate_file("")) == folder
for argv in map(json.loads, sys.argv[2:]):
    assert train_vae.main(argv) == 0, argv
"""


def test_the_wheel_alone_exports_reports_and_evaluates(
    unpacked, options, small_config, small_data, tmp_path
):
    """In a process that knows no other copy of the package."""
    trained = fit(small_config, options(), quiet=True)
    best, data = str(trained.best), ["--data-dir", str(small_data)]
    commands = [
        ["--version"],
        ["export", best, "--format", "web", "--out", "page", *data],
        ["report", "a", *data],
        ["evaluate", best, "--parts", "images", "--num-generated", "30", "--samplers", "prior"],
    ]
    commands[-1] += data
    command = [sys.executable, "-P", "-c", SCRIPT, str(unpacked), *map(json.dumps, commands)]
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{vae_hyperband.__version__}\n")
    assert (tmp_path / "page/index.html").read_text().count("<script") == 2
    assert "<h1>Run a</h1>" in (tmp_path / "logs/a/report.html").read_text()
    for name in ("py.typed", "slurm_job.sh", "model.ipynb", "pretrained/images.pt"):
        content = (ROOT / "vae_hyperband" / name).read_bytes()
        assert (unpacked / "vae_hyperband" / name).read_bytes() == content


# arguments: commands, each as a JSON list, until one fails; the packages of the extras are missing
BASE = """
import json, sys
from vae_hyperband.common.errors import EXTRAS

sys.modules |= dict.fromkeys(EXTRAS)  # importing what is None says that there is no such module
from vae_hyperband.train_vae import main
sys.exit(next(filter(None, map(main, map(json.loads, sys.argv[1:]))), 0))
"""


def in_the_base_installation(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BASE, *map(json.dumps, commands)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_base_installation_trains_evaluates_samples_and_exports(small_data, tmp_path):
    data = ["--data-dir", str(small_data)]
    done = in_the_base_installation(
        tmp_path,
        [
            "train",
            "--run",
            "a",
            "--epochs",
            "1",
            "--batch-size",
            "16",
            "--dataset",
            "custom",
            *data,
        ],
        ["evaluate", "a", "--parts", "likelihood", *data],
        ["report", "a", *data],
        ["sample", "a", "--num-samples", "4", "--out", "x.png"],
        ["export", "a", "--format", "safetensors", "--out", "shared"],
        ["completion", "bash"],
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shared/model.safetensors").exists()


@pytest.mark.parametrize("command", ["search", "run"])
def test_where_ray_is_missing_its_extra_is_named(command, tmp_path):
    """Of the extra [export], see test_export.py."""
    done = in_the_base_installation(tmp_path, [command, "--dry-run"])
    assert done.returncode == 2, done.stderr
    assert "This needs the package " in done.stderr
    assert done.stderr.endswith("pip install 'vae-hyperband[search]'.\n")
