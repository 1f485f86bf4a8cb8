"""The wheel holds all that the package reads at run time, not only its modules."""

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


def test_the_wheel_alone_has_a_version_and_exports_a_page(
    unpacked, options, small_config, small_data, tmp_path
):
    """In a process that knows no other copy of the package."""
    trained = fit(small_config, options(), quiet=True)

    def run(*argv: object) -> str:
        command = [sys.executable, "-P", "-m", "vae_hyperband.train_vae", *map(str, argv)]
        env = os.environ | {"PYTHONPATH": str(unpacked)}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").strip() == vae_hyperband.__version__
    where = ["--format", "web", "--out", tmp_path / "page", "--data-dir", small_data]
    run("export", trained.best, *where)
    page = (tmp_path / "page/index.html").read_text()
    assert page.count("<script") == 2
    run("report", "a")
    assert "<h1>Run a</h1>" in (tmp_path / "logs/a/report.html").read_text()
    run("evaluate", trained.best, "--parts", "images", "--num-generated", 30)
