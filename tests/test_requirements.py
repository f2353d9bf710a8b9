# SPDX-License-Identifier: Apache-2.0
"""docs/reference/requirements.md names files and tests that exist, and every requirement and seeded bug once.

Not promised: that a test holds what its row says. That is for a reader.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reference/requirements.md").read_text(encoding="utf-8")
ROWS = {match[1]: match[0] for match in re.finditer(r"(?m)^\| ([RB]\d\d) \|.*$", PAGE)}
NAMED = re.compile(r"`([a-z_./0-9]+\.(?:py|md))(?:::(\w+))?`")


@cache
def functions(name: str) -> frozenset[str]:
    """The test functions at the top of a file."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def test_every_requirement_and_every_bug_has_one_row_in_order() -> None:
    rows = re.findall(r"(?m)^\| ([RB]\d\d) \|", PAGE)
    assert rows == [f"R{number:02}" for number in range(1, 36)] + [f"B{number:02}" for number in range(1, 13)]
    assert all(row.count("|") == (6 if name[0] == "R" else 4) for name, row in ROWS.items()), "a cell too many"


def test_every_file_and_test_that_the_page_names_exists() -> None:
    found = NAMED.findall(PAGE)
    assert len(found) > 150
    for name, test in found:
        assert (ROOT / name).is_file(), name
        assert not test or test in functions(name), f"{name}::{test}"
    commands = re.findall(r"`verify --report`|`silo selftest`", PAGE)
    assert len(found) + len(commands) == PAGE.count("`") // 2, "a name in another form, which nobody would look up"


def test_what_is_held_has_a_file_and_a_test_and_what_is_not_says_what_is_missing() -> None:
    for name, row in ROWS.items():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if name[0] == "B":
            assert "::test_" in cells[2], name
            continue
        _, _, built, tests, state = cells
        assert re.match(r"held|in part: .{20}|not yet: .{20}", state), name
        assert ".py`" in built or state.startswith("not yet"), name
        assert ("::test_" in tests) == (not state.startswith("not yet")), name
