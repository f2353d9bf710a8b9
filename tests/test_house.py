# SPDX-License-Identifier: Apache-2.0
"""The house keeps its rules: who imports whom, no circle, short functions and files, fast help, nothing that executes data."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("privacy", "silo", "aggregator", "cli")
MAY_IMPORT = {"privacy": {"privacy"}, "silo": {"silo", "privacy"}, "aggregator": {"aggregator", "privacy"}, "cli": set(ROOMS)}
LEARNING = {"torch", "transformers", "peft", "opacus"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_only_what_they_may() -> None:
    for path, tree in trees():
        room = path.parts[0]
        heads = {name.split(".")[0] for name in imported(tree)}
        assert heads & set(ROOMS) <= MAY_IMPORT[room], path


def test_torch_lives_in_the_silo_and_in_one_file_of_privacy() -> None:
    found = {str(path) for path, tree in trees() if {name.split(".")[0] for name in imported(tree)} & LEARNING}
    assert {path for path in found if not path.startswith("silo/")} == {"privacy/dp/lattice.py"}


def test_web_sql_and_terminal_libraries_stay_in_their_rooms() -> None:
    where = {"starlette": {"aggregator"}, "uvicorn": {"aggregator"}, "typst": {"privacy"}, "typer": {"cli"}, "rich": {"cli"}}
    for path, tree in trees():
        for name in {name.split(".")[0] for name in imported(tree)}:
            assert path.parts[0] in where.get(name, set(ROOMS)), f"{path} imports {name}"
            assert name != "sqlalchemy" or path.name in ("store.py", "refused.py")


def test_nothing_that_executes_data_is_imported() -> None:
    banned = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    for path, tree in trees():
        assert not {name.split(".")[0] for name in imported(tree)} & banned, path


def test_there_is_no_import_circle() -> None:
    graph = {}
    names = {str(path.with_suffix("")).replace("/", ".") for path, _ in trees()}
    for path, tree in trees():
        name = str(path.with_suffix("")).replace("/", ".")
        graph[name] = {target for target in imported(tree) if target in names and target != name}
    done: set[str] = set()
    while ready := {name for name, targets in graph.items() if name not in done and targets <= done}:
        done |= ready
    assert done == set(graph), f"circle among {sorted(set(graph) - done)}"


def test_functions_and_files_stay_short_and_annotated() -> None:
    for path, tree in trees():
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (len(text.splitlines()) if text else 0)
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"
                unnamed = [
                    a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None and a.arg not in {"self", "cls"}
                ]
                assert not unnamed, f"{path}:{node.lineno} {node.name}: {unnamed}"
                assert node.returns is not None, f"{path}:{node.lineno} {node.name}"


def test_no_global_generator_is_seeded_and_nothing_prints() -> None:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed", "print"}, (
                    f"{path}:{node.lineno}"
                )


@pytest.mark.parametrize("command", ["silo", "aggregator"])
def test_help_is_fast_and_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; sys.argv=['{command}','-h']; from cli.{command} import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch','scipy','dp_accounting','sqlalchemy','transformers','numpy','starlette'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else 0)"
    )
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    # Processor seconds, not the clock: the suite runs beside others.
    assert min(times) < 0.3, f"{min(times):.2f} s"
