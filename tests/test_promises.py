"""PROMISES.md names tests that exist, and costs that were measured."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMISES = (ROOT / "PROMISES.md").read_text()


def test_every_promise_has_a_test_that_exists():
    rows = re.findall(r"^\| (P\d+) \| (.+) \| (.+) \|$", PROMISES, re.MULTILINE)
    assert [number for number, *_ in rows] == [f"P{n}" for n in range(1, 53)]
    functions = {}
    for number, _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, number
        for file, name in named:
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text())
                functions[file] = {
                    node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                }
            assert name in functions[file], f"{number}: {file}::{name}"


def test_the_costs_are_those_of_the_raw_file():
    measured = json.loads((ROOT / "benchmarks/safety_cost.json").read_text())
    saving = measured["saving"]["share_of_training"]
    check = measured["non_finite_check"]["share_of_a_step"]
    [said] = re.findall(r"<!--saving-->(.*?)<!--/-->", PROMISES)
    assert said == f"{100 * saving['median']:.1f}"
    [said] = re.findall(r"<!--check-->(.*?)<!--/-->", PROMISES)
    assert said == f"{100 * check:.1f}"
    assert saving["n"] >= 5
