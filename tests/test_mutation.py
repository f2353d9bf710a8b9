# SPDX-License-Identifier: Apache-2.0
"""tests.mutation finds every check, takes out exactly that one, and tells a noticed mutant from one that is not."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests import mutation

SOURCE = """
class Gate:
    def admit(self, x):
        if x < 0 or x > 9 or x == 5:
            raise ValueError("out of range")
        self._check_more(x)
        _log(x)
        return x

    def _check_more(self, x):
        if x == 7:
            raise KeyError(x)

def _log(x):
    pass
"""


def run(mutant: mutation.Mutant | None, x: int) -> object:
    space: dict = {}
    tree = ast.parse(SOURCE) if mutant is None else mutation.mutated(SOURCE, mutant)
    exec(compile(tree, "source", "exec"), space)
    try:
        return space["Gate"]().admit(x)
    except (ValueError, KeyError) as error:
        return type(error)


def test_every_check_is_found_once_and_by_name() -> None:
    found = mutation.mutants("m", SOURCE)
    assert [mutant.name for mutant in found] == [
        "m:Gate.admit: or x < 0", "m:Gate.admit: or x > 9", "m:Gate.admit: or x == 5",
        "m:Gate.admit: raise ValueError('out of range')", "m:Gate.admit: self._check_more(x)",
        "m:Gate._check_more: raise KeyError(x)",
    ]  # fmt: skip


def test_a_mutant_lacks_its_own_check_and_no_other() -> None:
    inputs = (-1, 10, 5, 7, 3)
    expected = {None: [ValueError, ValueError, ValueError, KeyError, 3]}
    lost = [{-1}, {10}, {5}, {-1, 10, 5}, {7}, {7}]
    assert [run(None, x) for x in inputs] == expected[None]
    for mutant, passes in zip(mutation.mutants("m", SOURCE), lost, strict=True):
        for x, before in zip(inputs, expected[None], strict=True):
            assert run(mutant, x) == (x if x in passes else before), (mutant.name, x)


def program(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=mutation.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_module_is_run_for_real() -> None:
    """One small module: every mutant is noticed."""
    ran = program("-m", "tests.mutation", "privacy.identity.xwing")
    assert ran.returncode == 0, ran.stdout
    count = len(mutation.mutants("m", mutation.source_of("privacy.identity.xwing").read_text("utf-8")))
    assert ran.stdout.count("killed ") == count > 0
    assert f"{count} checks, 0 survived" in ran.stdout


@pytest.mark.slow
def test_a_check_that_no_test_holds_survives() -> None:
    name = "privacy.identity.xwing"
    code = f"mutation.TESTS[{name!r}] = ('test_merkle',); raise SystemExit(mutation.main([{name!r}]))"
    ran = program("-c", f"from tests import mutation; {code}")
    assert ran.returncode == 1
    assert "SURVIVED" in ran.stdout
    assert "killed " not in ran.stdout


def test_code_that_is_imported_already_is_refused() -> None:
    ran = program("-c", "import privacy.secure_sum.merkle; from tests import mutation; raise SystemExit(mutation.main([]))")
    assert ran.returncode == 1
    assert "start this as a program" in ran.stderr


def test_every_entry_names_a_module_and_its_tests() -> None:
    for module, names in mutation.TESTS.items():
        assert mutation.source_of(module).exists(), module
        assert mutation.mutants(module, mutation.source_of(module).read_text("utf-8")), f"{module} has nothing to take out"
        for name in names:
            file, _, one = mutation.place_of(name).partition("::")
            text = (mutation.ROOT / "tests" / file).read_text("utf-8")
            assert f"def {one}" in text, (module, name)
    texts = {module: mutation.source_of(module).read_text("utf-8") for module in mutation.TESTS}
    every = {each.name for module, text in texts.items() for each in mutation.mutants(module, text)}
    assert set(mutation.EQUIVALENT) <= every, "of these nothing is said any more"


RULE = """
def chosen(lists, silos):
    if not lists:
        return []
    found = [silo for silo in silos if silo in lists if silo > 1]
    return found if len(found) > 1 or silos == [2] else []
"""


def test_in_a_module_of_rules_every_condition_is_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mutation.mutants("m", RULE) == []
    monkeypatch.setattr(mutation, "RULES", ("m",))
    questions = (([], [2]), ([2, 1, 3], [1, 2, 3]), ([2, 3], [2, 3, 4]), ([2], [2]), ([2], [1, 2]))

    def answers(tree: ast.Module) -> list[list[int]]:
        space: dict = {}
        exec(compile(tree, "rule", "exec"), space)
        return [space["chosen"](*each) for each in questions]

    right = answers(ast.parse(RULE))
    assert right == [[], [2, 3], [2, 3], [2], []]
    found = mutation.mutants("m", RULE)
    wrong = {mutant.name: answers(mutation.mutated(RULE, mutant)) for mutant in found}
    assert len(wrong) == len(found) == 8
    unnoticed = [name for name, said in wrong.items() if said == right]
    assert unnoticed == ["m:chosen: never not lists"], "the rest of the rule gives nothing for no lists as well"
    assert wrong["m:chosen: without silo > 1 in for silo in silos if silo in lists if silo > 1"][1] == [1, 2, 3]
