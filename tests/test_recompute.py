# SPDX-License-Identifier: Apache-2.0
"""The file with which anybody computes a report's figures again, without this project: docs/reference/recompute_epsilon.py."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.sample_report import sample

FILE = Path(__file__).parents[1] / "docs" / "reference" / "recompute_epsilon.py"


@pytest.fixture(scope="module")
def record() -> dict:
    return msgspec.to_builtins(sample())


def run(record: dict, folder: Path) -> tuple[int, str]:
    path = folder / "report.json"
    path.write_text(json.dumps(record))
    done = subprocess.run([sys.executable, "-I", FILE, path], capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def test_it_imports_nothing_of_ours() -> None:
    named = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(FILE.read_text()))
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert named == {"__future__", "json", "math", "sys", "pathlib", "typing", "dp_accounting"}


def test_it_agrees_with_an_honest_report(record, tmp_path) -> None:
    code, out = run(record, tmp_path)
    assert (code, out.count("agrees")) == (0, 6), out


def test_an_understated_epsilon_differs(record, tmp_path) -> None:
    changed = json.loads(json.dumps(record))
    figure = changed["guarantee"]["adversaries"][1]["spent"]
    figure["epsilon"] *= 0.9
    code, out = run(changed, tmp_path)
    assert (code, out.count("DIFFERS")) == (1, 1), out


def test_what_it_does_not_cover_it_says(record, tmp_path) -> None:
    changed = json.loads(json.dumps(record))
    changed["accounting"]["charged"].append({"version": 2, "rounds": 1, "basis": False})
    assert run(changed, tmp_path)[0] == 2
    changed["accounting"] = None
    code, out = run(changed, tmp_path)
    assert (code, "not covered" in out) == (2, True)
