# SPDX-License-Identifier: Apache-2.0
"""Would a test notice if one check were gone? Neutralises the checks of the protocol's modules one at a time and runs their tests.

Run: ``OMP_NUM_THREADS=1 python -m tests.mutation`` (or with module names). A *check* is a ``raise``, one alternative of an
``if … or …: raise``, or a statement that only calls a function named check, verify, expect, refuse, open or load. Each mutant
lives in a forked process, in memory: no file is changed. Prints a line for each; exits 1 if one survives that is not listed
in ``EQUIVALENT`` with the reason why no test can tell it apart, or if an entry there is out of date.

The modules in ``RULES`` decide and raise nothing. There every condition is a check: an ``if``, in a statement or an expression, is
never true, then always; a ``while`` never; each filter of a comprehension and each operand of ``and`` and ``or`` is left out.

Not promised: that a check is right; only that some test fails without it. Elsewhere checks inside expressions are not seen.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import hypothesis
import pytest

# Imported once, before the forks; nothing of the code under test is.
for _name in ("cryptography.hazmat.primitives.hpke", "msgspec", "numpy"):
    importlib.import_module(_name)

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120.0
WORDS = re.compile(r"_?(check|verify|expect|refuse|open|load)(_|$)")

_SLICES = (
    "test_every_silo_of_the_set_finds_a_right_sum_right", "test_a_claim_is_held_to_the_set", "test_bound_to_one_claim",
    "test_a_claim_is_held_to_each_segment_of_the_vectors", "test_a_claim_shows_the_keys_of_the_pairs_with_a_missing_silo",
    "test_a_verdict_of_a_stranger_is_refused_in_an_audit",
    "test_nobody_elses_word_counts", "test_verdicts_out_of_order_or_of_nothing_are_refused",
    "test_a_segment_that_is_withheld_is_not_right", "test_a_silo_outside_the_set_has_no_word", "test_a_wrong_sum_is_never_applied",
    "test_silos_that_fall_silent_are_made_up_for_by_as_many_spares",
)  # fmt: skip
_BLOCKS = (
    "test_blocks_stay_in_a_chain", "test_rank_is_that_of_the_participation_matrix", "test_one_factor_a_block_in_every_combination",
    "test_three_overlapping_sets_give_one_silo_away_and_are_refused", "test_only_whole_blocks_are_ever_frozen",
)  # fmt: skip
_GHOSTS = (
    "test_what_never_took_effect_changes_nothing", "test_a_chain_goes_on_over_several_that_never_took_effect",
    "test_a_version_that_all_signed_cannot_be_passed_over", "test_a_key_is_not_swapped_by_a_version_that_never_took_effect",
)  # fmt: skip

TESTS: dict[str, tuple[str, ...]] = {
    "privacy.secure_sum.guardian_sum": ("test_guardian_sum", "test_mutants_sum", "test_shares"),
    "privacy.secure_sum.masking": ("test_guardian_sum", "test_mutants_sum", "test_shares"),
    "privacy.secure_sum.freeze": ("test_freeze", "test_guardian_sum"),
    "privacy.secure_sum.shares": ("test_shares", "test_mutants_sum"),
    "privacy.secure_sum.shamir": ("test_shamir",),
    "privacy.envelope": ("test_envelope", "test_mutants_sum"),
    "privacy.secure_sum.epoch": ("test_epoch", "test_mutants_sum"),
    "privacy.secure_sum.roster": ("test_epoch", "test_freeze"),
    "privacy.secure_sum.slices": ("test_slices", "test_mutants_sum"),
    "privacy.secure_sum.audits": ("test_mutants_sum", *(f"test_slice_rounds::{each}" for each in _SLICES)),
    "privacy.secure_sum.choice": ("test_mutants_sum", "test_freeze"),
    "privacy.secure_sum.blocks": ("test_mutants_sum", *(f"test_without_privacy::{each}" for each in _BLOCKS)),
    "privacy.secure_sum.merkle": ("test_merkle",),
    "privacy.transparency.proofs": ("test_proofs", "test_mutants_log"),
    "privacy.transparency.tree": ("test_log", "test_proofs", "test_vectors", "test_mutants_log"),
    "privacy.transparency.notes": ("test_notes", "test_mutants_log"),
    "privacy.transparency.log": ("test_log", "test_mutants_log"),
    "privacy.transparency.notices": (
        "test_log_refusals::test_a_refusal_of_somebody_else_is_named", "test_log_refusals::test_a_false_accusation_is_named",
    ),
    "privacy.chain": (
        "test_chain", "test_mutants_log", "test_without_privacy::test_blocks_stay_in_a_chain",
        *(f"test_versions::{each}" for each in _GHOSTS),
        "test_review_log::test_a_replaced_key_does_not_come_back_with_a_silo_that_was_away",
        "test_review_log::test_a_coordinator_takes_no_key_that_a_silo_had",
        "test_review_log::test_a_replaced_key_of_the_coordinator_does_not_come_back",
    ),
    "privacy.dp.ledger": ("test_ledger",),
    "privacy.prg": ("test_prg", "test_mutants_sum"),
    "privacy.identity.curve25519": ("test_keys", "test_mutants_sum"),
    "privacy.identity.signatures": ("test_signatures", "test_mutants_sum"),
    "privacy.identity.xwing": ("test_keys", "test_mutants_sum"),
}
"""The test modules, or single tests of one, that answer for a module; the first to fail ends a mutant."""

RULES = ("privacy.secure_sum.choice", "privacy.secure_sum.blocks", "privacy.secure_sum.merkle")
"""Modules of pure rules: see the docstring."""

_LIBRARY = "the library refuses it as well; kept so that nothing rests on that"
_NO_KEY = "no such encoding passes for a point of prime order, and as R the library refuses it as well"
_ALL = "how many threads hash; the hashes are the same"
EQUIVALENT: dict[str, str] = {
    "privacy.secure_sum.merkle:_leaf_hashes: never len(leaves) < _FEW_LEAVES or threads == 1": _ALL,
    "privacy.secure_sum.merkle:_leaf_hashes: always len(leaves) < _FEW_LEAVES or threads == 1": _ALL,
    "privacy.secure_sum.merkle:: without os.cpu_count() in os.cpu_count() or 1": _ALL,
    "privacy.secure_sum.merkle:: without 1 in os.cpu_count() or 1": _ALL,
    "privacy.secure_sum.merkle:_leaf_hashes: without len(leaves) < _FEW_LEAVES in len(leaves) < _FEW_LEAVES or threads == 1": _ALL,
    "privacy.secure_sum.merkle:_leaf_hashes: without threads == 1 in len(leaves) < _FEW_LEAVES or threads == 1": _ALL,
    "privacy.identity.curve25519:check_dh_key: or len(key) != 32": _LIBRARY,
    "privacy.identity.curve25519:_coordinates: raise ValueError('y is not reduced')": _NO_KEY,
    "privacy.identity.curve25519:_coordinates: or (v * x * x - u) % _FIELD": _NO_KEY,
    "privacy.identity.curve25519:_coordinates: or x == 0 and sign": _NO_KEY,
    "privacy.identity.curve25519:_coordinates: raise ValueError('no such point')": _NO_KEY,
    "privacy.identity.curve25519:verify_signature: or len(signature) != 64": _LIBRARY,
    "privacy.identity.curve25519:verify_signature: or int.from_bytes(signature[32:], 'little') >= _ORDER": _LIBRARY,
    "privacy.identity.curve25519:verify_signature: raise InvalidSignature": _LIBRARY,
    "privacy.transparency.notes:VerifierKey.parse: or not _HEX8.fullmatch(stated)": "stated must equal an id, which is such digits",
    "privacy.transparency.notes:parse: or not gap": "without a gap the text before it is empty, which is refused beside it",
    "privacy.secure_sum.shares:check_pair_key: or stated is None": "a commitment is bytes and never equals None",
}
"""``module:function: what`` of mutants that no test can tell from the original, and why."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One check: where it stands, and how to neutralise it.

    ``alternative`` is the operand or filter to drop, or -1 for all. Of a condition, ``node`` is its place in ``ast.walk``, and
    ``always`` what an ``if`` becomes.
    """

    module: str
    function: str
    line: int
    column: int
    what: str
    alternative: int = -1
    node: int = -1
    always: bool = False

    @property
    def name(self) -> str:
        """Stable under edits elsewhere in the file."""
        return f"{self.module}:{self.function}: {self.what}"


def mutants(module: str, source: str) -> list[Mutant]:
    """All checks of a module, in its order; of one in ``RULES`` its conditions too."""
    tree = ast.parse(source)
    return [*_found(module, tree, ""), *(_conditions(module, tree) if module in RULES else ())]


def _conditions(module: str, tree: ast.Module) -> Iterator[Mutant]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    def mutant(at: ast.expr, what: str, **how: int) -> Mutant:
        around = [each for each in functions if each.lineno <= at.lineno <= (each.end_lineno or 0)]
        function = ".".join(each.name for each in sorted(around, key=lambda each: each.lineno))
        what = " ".join(what.split())[:90]
        return Mutant(module=module, function=function, line=at.lineno, column=at.col_offset, what=what, **how)

    for index, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield mutant(node.test, f"never {ast.unparse(node.test)}", node=index)
        if isinstance(node, ast.If | ast.IfExp):
            yield mutant(node.test, f"always {ast.unparse(node.test)}", node=index, always=True)
        for place, value in enumerate(_parts(node)):
            yield mutant(value, f"without {ast.unparse(value)} in {ast.unparse(node)}", node=index, alternative=place)


def _parts(node: ast.AST) -> list[ast.expr]:
    """The operands of ``and`` and ``or``, the filters of a comprehension."""
    return node.values if isinstance(node, ast.BoolOp) else node.ifs if isinstance(node, ast.comprehension) else []


def _without_condition(tree: ast.Module, mutant: Mutant) -> ast.Module:
    node = list(ast.walk(tree))[mutant.node]
    if isinstance(node, ast.BoolOp):
        node.values[mutant.alternative] = ast.Constant(isinstance(node.op, ast.And))
    if isinstance(node, ast.comprehension):
        del node.ifs[mutant.alternative]
    if mutant.alternative < 0:
        assert isinstance(node, ast.If | ast.IfExp | ast.While)
        node.test = ast.Constant(mutant.always)
    return ast.fix_missing_locations(tree)


def _found(module: str, node: ast.AST, function: str) -> Iterator[Mutant]:
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.stmt) and _is_check(child):
            what = " ".join(ast.unparse(child).split())[:90]
            yield Mutant(module=module, function=inside, line=child.lineno, column=child.col_offset, what=what)
        for index, value in enumerate(_alternatives(child)):
            place = {"line": child.lineno, "column": child.col_offset}
            yield Mutant(module=module, function=inside, what=f"or {ast.unparse(value)}"[:90], alternative=index, **place)
        yield from _found(module, child, inside)


def _alternatives(node: ast.AST) -> Sequence[ast.expr]:
    """A, B, … of ``if A or B or …: raise``."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.BoolOp) or not isinstance(node.test.op, ast.Or):
        return ()
    return node.test.values if any(isinstance(each, ast.Raise) for each in node.body) else ()


def _is_check(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return True
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    called = node.value.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return WORDS.match(name) is not None


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The module's tree without this check."""
    tree = ast.parse(source)
    if mutant.node >= 0:
        return _without_condition(tree, mutant)

    class Neutralise(ast.NodeTransformer):
        done = 0

        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            if not isinstance(node, ast.stmt) or (node.lineno, node.col_offset) != (mutant.line, mutant.column):
                return node
            self.done += 1
            if mutant.alternative < 0:
                return ast.copy_location(ast.Pass(), node)
            assert isinstance(node, ast.If)
            assert isinstance(node.test, ast.BoolOp)
            left = [each for index, each in enumerate(node.test.values) if index != mutant.alternative]
            node.test = ast.BoolOp(ast.Or(), left) if len(left) > 1 else left[0]
            return node

    change = Neutralise()
    tree = ast.fix_missing_locations(change.visit(tree))
    assert change.done == 1, mutant
    return tree


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module from code in memory."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        self.module, self.path, self.code = module, path, code

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.module else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self.path)
        exec(self.code, module.__dict__)


class _First:
    """Remembers the first test that fails."""

    failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.partition("::")[2]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"


@dataclass
class Job:
    """A child at work on a mutant, or on the module as it is (None)."""

    module: str
    mutant: Mutant | None
    pid: int
    pipe: int
    started: float


def start(module: str, source: str, mutant: Mutant | None) -> Job:
    """Fork a child that runs the module's tests with the mutant in place."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Job(module, mutant, pid, reading, time.monotonic())
    os.close(reading)
    os.setpgid(0, 0)
    code = 99
    try:
        path = source_of(module)
        tree = ast.parse(source) if mutant is None else mutated(source, mutant)
        sys.meta_path.insert(0, _Loader(module, path, compile(tree, str(path), "exec")))
        first, quiet = _First(), os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        files = [str(ROOT / "tests" / place_of(name)) for name in TESTS[module]]
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files], plugins=[first]))
        os.write(writing, json.dumps(first.failed).encode())
    finally:
        os._exit(code)


def place_of(name: str) -> str:
    """``test_x`` or ``test_x::test_y`` as pytest takes it, in the folder tests."""
    file, *one = name.split("::")
    return "::".join((f"{file}.py", *one))


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def finish(job: Job) -> tuple[str, str]:
    """("passed" | "failed" | "timeout" | "error", the first failed test), or ("", "") while it runs."""
    done, status = os.waitpid(job.pid, os.WNOHANG)
    if not done:
        if time.monotonic() - job.started < TIMEOUT_S:
            return "", ""
        os.killpg(job.pid, signal.SIGKILL)
        os.waitpid(job.pid, 0)
        os.close(job.pipe)
        return "timeout", ""
    text = os.read(job.pipe, 65536)
    os.close(job.pipe)
    if not text:
        return "error", "the run itself"
    return ("passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"), json.loads(text)


def run(modules: Sequence[str], jobs: int) -> tuple[list[tuple[Mutant, str, str]], list[str]]:
    """Every mutant with how it ended; and the modules whose tests fail without any mutant, of which nothing can be said."""
    sources = {module: source_of(module).read_text("utf-8") for module in modules}
    waiting: list[tuple[str, Mutant | None]] = [(module, None) for module in modules]
    for module, source in sources.items():
        waiting += [(module, mutant) for mutant in mutants(module, source)]
    results: list[tuple[Mutant, str, str]] = []
    broken: list[str] = []
    running: list[Job] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            module, mutant = waiting.pop(0)
            running.append(start(module, sources[module], mutant))
        time.sleep(0.02)
        for job in list(running):
            how, test = finish(job)
            if not how:
                continue
            running.remove(job)
            if job.mutant is not None:
                results.append((job.mutant, how, test))
                print(line(*results[-1]), flush=True)
            elif how != "passed":
                print(f"the tests of {job.module} do not pass as it is ({test}): nothing is said of it", flush=True)
                waiting = [(module, mutant) for module, mutant in waiting if module != job.module]
                broken.append(job.module)
    return results, broken


def line(mutant: Mutant, how: str, test: str) -> str:
    verdict = {"passed": "SURVIVED", "failed": "killed", "timeout": "killed", "error": "ERROR"}[how]
    if how == "passed" and mutant.name in EQUIVALENT:
        verdict = "equivalent"
    place = f"{mutant.module}:{mutant.line}"
    return f"{verdict:<11}{place:<28}{mutant.function + ': ' + mutant.what:<100}{test or how}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and say whether all was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    if loaded := sorted(name for name in sys.modules if name in TESTS):
        raise SystemExit(f"{loaded} are imported already: mutants of them would never be run; start this as a program")
    hypothesis.settings.register_profile("mutation", database=None, deadline=None)
    hypothesis.settings.load_profile("mutation")
    began = time.monotonic()
    results, broken = run(options.modules, options.jobs)
    survived = [mutant for mutant, how, _ in results if how in ("passed", "error") and mutant.name not in EQUIVALENT]
    names = {mutant.name for mutant, how, _ in results if how == "passed"}
    stale = [name for name in EQUIVALENT if name.partition(":")[0] in options.modules and name not in names]
    for name in stale:
        print(f"out of date in EQUIVALENT: {name}")
    print(f"{len(results)} checks, {len(survived)} survived, {time.monotonic() - began:.0f} s")
    return 1 if survived or stale or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
