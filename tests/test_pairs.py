# SPDX-License-Identifier: Apache-2.0
"""The built-in pairs: the same every time, self-contained units, nothing imported."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from aggregator.simulation import pairs
from aggregator.simulation.pairs import LABELS, MAX_PER_FILE, Pair, collect

SOME = ("networkx", "rich", "sqlalchemy")


@pytest.fixture(scope="module")
def found() -> list[Pair]:
    return collect(200, libraries=SOME)


def test_the_same_environment_gives_the_same_pairs(found: list[Pair]) -> None:
    code = f"from aggregator.simulation.pairs import collect; print(collect(200, libraries={SOME}))"
    assert {python(code, seed) for seed in ("1", "2")} == {str(found)}


def python(code: str, hash_seed: str = "0") -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_limits_hold_and_about_half_is_wrong(found: list[Pair]) -> None:
    assert max(Counter(pair.library for pair in found).values()) <= 200
    assert max(Counter(pair.file for pair in found).values()) <= MAX_PER_FILE
    share = Counter(pair.label for pair in found)["no"] / len(found)
    assert {pair.label for pair in found} == set(LABELS)
    assert 0.4 < share < 0.6
    assert len(found) > 250


def test_no_docstring_stands_in_two_records(found: list[Pair]) -> None:
    assert max(Counter(pair.text_pair for pair in found).values()) == 1


def test_pairs_are_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {}
    for number in range(40):
        sentence = f"Compute the number {number} of the things that were asked for."
        own[f"thing_{number}"] = sentence
        (tmp_path / f"m{number}.py").write_text(
            f'raise SystemExit("imported")\nclass C:\n    async def thing_{number}(self, x: int = 1, /, *a, k, **b):\n'
            f'        """{sentence} More of it.\n\n        Other."""\n    def tiny(self):\n        """Short."""\n'
            f'    def __init__(self):\n        """A dunder that has a long enough docstring."""\n'
        )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('def probe():\n    """A test that has a long enough docstring."""\n')
    (tmp_path / "broken.py").write_text('"""')
    (tmp_path / "binary.py").write_bytes(b'"""\0\xff')
    monkeypatch.setattr(pairs, "_root", lambda library: tmp_path)
    found = collect(libraries=["made"])
    assert found
    for pair in found:
        name = pair.text.removeprefix("def ").partition("(")[0]
        assert pair.text == f"def {name}(self, x, k, *a, *b)"
        assert pair.file == f"made/m{name.removeprefix('thing_')}.py"
        assert (pair.text_pair == own[name]) == (pair.label == "yes")
        assert pair.text_pair in own.values()


def test_what_a_unit_says_stands_in_that_unit_alone(found: list[Pair]) -> None:
    units = {pair.file for pair in found}
    assert not any(pairs._hash(f"lends {file}") % pairs._LENDERS == 0 for file in units)


def test_a_library_that_is_missing_or_a_single_file_gives_nothing() -> None:
    assert collect(libraries=["no_such_library_here", "typing_extensions", "json"]) == []


def test_no_library_is_imported() -> None:
    code = f"from aggregator.simulation.pairs import collect; collect(20, libraries={SOME})"
    code = f"import sys; {code}; print(set({SOME}) & set(sys.modules))"
    assert python(code) == "set()"
