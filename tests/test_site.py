"""The habits of a public project: one version, the site's API page, workflows, templates.

That the site builds, and that no link of it leads nowhere, is what make docs checks.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import vae_hyperband

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    assert set(re.findall(r"^::: vae_hyperband\.(\w+)$", page, re.MULTILINE)) == set(
        vae_hyperband.__all__
    )


def test_the_version_is_the_same_everywhere():
    assert vae_hyperband.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    newest = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == PROJECT["version"]


def supported() -> list[str]:
    """The versions of Python that the package's classifiers name."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name)
             for name in PROJECT["classifiers"])  # fmt: skip
    return [match[1] for match in found if match]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_of_the_makefile(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for job in jobs.values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        matrix = job["strategy"]["matrix"]
        targets = [*matrix["target"], *(row["target"] for row in matrix.get("include", ()))]
        assert commands == ["make ${{ matrix.target }} PYTHON=python TORCH=cpu"]
        for target in targets:
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_the_tests_run_on_every_supported_python():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]
    assert job["strategy"]["matrix"]["python"] == supported()
    assert job["strategy"]["matrix"]["target"] == ["test"]
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in supported())
    assert {row["target"] for row in job["strategy"]["matrix"]["include"]} == {
        "lint", "docs", "wheel"
    }  # fmt: skip


def test_every_package_of_an_extra_is_pinned():
    constraints = (ROOT / "constraints.txt").read_text().lower()
    for extra in PROJECT["optional-dependencies"].values():
        for name in (re.match(r"[\w-]+", one)[0] for one in extra):
            if name != PROJECT["name"]:
                assert re.search(rf"^{name}==", constraints, re.MULTILINE), name
