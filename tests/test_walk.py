"""The documentation as a reader walks through it: every command, page by page, in one folder.

Only the data are others: a few rectangles under Fashion-MNIST's names, few synthetic garments, and
small pictures for the photographs that are the reader's.
"""

import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
from conftest import NAMES, command_line, write_idx_folder
from forking import Forks
from PIL import Image

ROOT = Path(__file__).parent.parent

#: In the order of the site; the README is its first page.
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
        if (ROOT / "docs" / name).is_file()
    ),
]

#: How commands begin that are not run here, and why.
NOT_RUN = {
    "make ": "steps of CI; bench, reproduce and best take hours, and no test runs them",
    "source ": "installs",
    "pip ": "installs",
    "uv ": "installs",
    "python3 -m venv": "installs",
    "docker ": "needs a container engine",
    "apptainer ": "needs a container engine",
    "sbatch ": "needs Slurm: make slurm-test",
    "python -m vae_hyperband.beta_vae_tsb": "serves until Ctrl-C: commands/test_end_to_end.py",
    "vae-hyperband train --run icons": "needs a package of Debian's",
    "vae-hyperband sample icons": "needs the run above",
}

#: Every process of the walk imports this first: the sizes and digests of the small data.
SITE = """
import sys
from importlib.machinery import PathFinder

CHANGES = {changes}

class Smaller:
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def changed(module):
            execute(module)
            for constant, values in CHANGES[name].items():
                getattr(module, constant).update(values)

        spec.loader.exec_module = changed
        return spec

sys.meta_path.insert(0, Smaller())
"""


def steps() -> Iterator[tuple[str, str, str]]:
    """Page, language and text of each command and of each example in another language, in order.

    Commands within the text count if they have options and no placeholder such as RUN.
    """
    blocks = r"^```(\w+)\n(.*?)^```$|`(vae-hyperband [a-z]+ [^`]+)`"
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for kind, block, inline in re.findall(blocks, page.read_text(), re.DOTALL | re.MULTILINE):
            if kind and kind != "sh":
                yield name, kind, block
            elif kind:
                yield from ((name, kind, line) for line in block.splitlines())
            elif not re.search(r"\b(RUN|NAME|FILE|FOLDER)\b", inline):
                yield name, "sh", " ".join(inline.split())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the reader is, who has some images but has not run anything yet."""
    fashion = write_idx_folder(tmp_path / "cache", num_train=480, num_test=40, size=28)
    digests = {n: hashlib.sha256((fashion / n).read_bytes()).hexdigest() for n in NAMES}
    changes = {
        "vae_hyperband.data.fashion_mnist": {"FASHION_MNIST_SHA256": digests},
        "vae_hyperband.data.synthetic": {
            "NUM_SYNTHETIC": {"train": 300, "validation": 60, "test": 60}
        },
    }
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE.format(changes=changes))
    path = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("VAE_HYPERBAND_CACHE", str(fashion))
    monkeypatch.setenv("HOME", str(tmp_path))
    here = tmp_path / "here"
    shutil.copytree(fashion, here / "fashion")
    random = np.random.default_rng(0)
    for place in ("photos/cats", "photos/dogs", "ordinary/a", "ordinary/b", "held-out", "new"):
        (here / place).mkdir(parents=True)
        for number in range(100):
            pixels = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / place / f"{number}.png")
    for name in ("photo.jpg", "photo1.jpg", "photo2.jpg"):
        Image.fromarray(pixels).save(here / name)
    for _, _, text in steps():  # the files that the pages show
        if named := re.match(r"# (?:the module )?(\w+)(\.toml)?\n", text):
            (here / (named[1] + (named[2] or ".py"))).write_text(text)
    return here


@pytest.mark.faults  # for its minutes
def test_every_command_of_the_documentation_works_in_its_order(folder, tmp_path, monkeypatch):
    failures = []
    with hub_server.running() as (_, address), Forks() as forks:
        for name, value in (("HF_ENDPOINT", address), ("HF_HOME", str(tmp_path / "hf"))):
            monkeypatch.setenv(name, value)
        for page, kind, text in steps():
            begun = time.monotonic()
            if kind == "sh":
                done = run(text, folder, forks)
            elif kind == "python" and page != "README.md":  # see test_docs.py
                done = completed([sys.executable, "-c", text], folder)
            else:
                continue
            print(f"{time.monotonic() - begun:6.1f} s  {page}: {text.splitlines()[0]}", flush=True)
            if done and (done.returncode or "Traceback" in done.stderr):
                failures.append(f"{page}: {text}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
                print(failures[-1], flush=True)
    assert not failures, "\n\n".join(failures)


def run(line: str, folder: Path, forks: Forks) -> subprocess.CompletedProcess[str] | None:
    """A line of a shell, which may be a comment and may send its output to a file."""
    words = shlex.split(line, comments=True)
    if not words or line.startswith(tuple(NOT_RUN)):
        return None
    *words, arrow, out = words if ">" in words else [*words, ">", ""]
    assert arrow == ">", line
    if words[0] == "python":
        done = completed([sys.executable, *words[1:]], folder)
    else:
        assert words[0] == "vae-hyperband", line
        # a fork may start neither Ray nor a tracker, and has imported the hub's package
        if words[1] == "search" or {"--track", "--push"} & set(words):
            done = completed(command_line(*words[1:]), folder)
        else:
            done = forks.completed(words[1:], folder, folder.parent)
    if out:
        (folder / Path(out).expanduser()).write_text(done.stdout)
    for option, value in itertools.pairwise(words):
        assert option != "--out" or done.returncode or (folder / value).exists(), line
    return done


def completed(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
