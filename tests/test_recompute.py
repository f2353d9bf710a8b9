# SPDX-License-Identifier: Apache-2.0
"""The file with which anybody computes a report's figures again, without this project: docs/reference/recompute_epsilon.py."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from aggregator.reporting import compliance, report
from aggregator.reporting.record import RoundFacts
from privacy import federation
from privacy.dp import accounting
from privacy.dp.budget import Limits
from privacy.spending import event_of
from tests import sample_report
from tests.terms import contract_bytes

FILE = Path(__file__).parents[1] / "docs" / "reference" / "recompute_epsilon.py"


SKETCHED = {"shapes": [[4, 8], [24, 16]], "width": 3, "max_grad_norm": 0.7, "noise_multiplier": 5.0, "lattice_bits": 18}


def as_read(facts) -> dict:
    return json.loads(report.encode(facts))


WHOLE = {"sampling_rate": 1.0, "unit": "patient_id", "noise_multiplier": 9.0}
"""At rate 1 the accountants are quick; the sample report has another rate."""


@pytest.fixture(scope="module", autouse=True)
def only_what_is_compared():
    """Reports without their curves, which take most of the time: what adversaries and silos spent, and the plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compliance, "PROFILE_DELTAS", ())
        patch.setattr(compliance, "_BURN_DOWN_POINTS", 1)
        patch.setattr(compliance, "_several", lambda counted: ())
        yield


def rounds(*places: tuple[int, bool, tuple[int, ...]]) -> tuple[RoundFacts, ...]:
    """One result for each (version, whether it is a basis round, whose uploads arrived)."""
    made = sample_report.run(len(places))
    return tuple(
        msgspec.structs.replace(each, version=version, basis=basis, participants=silos, kind="result" if len(silos) > 2 else "void")
        for each, (version, basis, silos) in zip(made, places, strict=True)
    )


@pytest.fixture(scope="module")
def record() -> dict:
    return as_read(sample_report.make(sample_report.contract(), sample_report.run(24, void=(7,))))


@pytest.fixture(scope="module")
def after_a_basis() -> dict:
    """A basis round that failed, one that gave a result, and three training rounds."""
    accepted = federation.parse(contract_bytes(adapter={"basis": "private"}, basis=SKETCHED, privacy=WHOLE))
    found = rounds((1, True, (1, 2)), (1, True, (1, 2, 3)), *[(1, False, (1, 2, 3))] * 3)
    return as_read(sample_report.make(accepted, found))


@pytest.fixture(scope="module")
def over_versions() -> dict:
    """A basis round and two training rounds under version 1; under version 2, with less noise, another two. Silo 3 missed those."""
    tables = {"adapter": {"basis": "private"}, "basis": SKETCHED}
    first = federation.parse(contract_bytes(**tables, privacy=WHOLE))
    second = federation.parse(
        contract_bytes(version=2, previous=first.digest.hex(), **tables, privacy={**WHOLE, "noise_multiplier": 7.0})
    )
    found = rounds((1, True, (1, 2, 3)), *[(1, False, (1, 2, 3))] * 2, *[(2, False, (1, 2))] * 2)
    return as_read(sample_report.make(second, found, earlier=(first,)))


@pytest.fixture(scope="module")
def file() -> ModuleType:
    """The file as a module of no package."""
    spec = importlib.util.spec_from_file_location("recompute_epsilon", FILE)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def run(file, tmp_path, capsys) -> Callable[[dict], tuple[int, str]]:
    """What it says of a record, and its exit code."""

    def asked(record: dict) -> tuple[int, str]:
        path = tmp_path / "report.json"
        path.write_text(json.dumps(record))
        return file.main([str(path)]), capsys.readouterr().out

    return asked


def copied(record: dict) -> dict:
    return json.loads(json.dumps(record))


def test_it_imports_nothing_of_ours() -> None:
    named = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(FILE.read_text()))
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert named == {"__future__", "collections", "functools", "json", "math", "sys", "pathlib", "typing", "dp_accounting"}


def test_it_agrees_with_an_honest_report(record, tmp_path) -> None:
    """Three adversaries and the accountants' table, now and for the plan, and three silos; as somebody with nothing of ours."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps(record))
    done = subprocess.run([sys.executable, "-I", FILE, path], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.count("agrees")) == (0, 11), done.stdout + done.stderr


def test_it_pays_for_every_attempt_at_a_basis(after_a_basis, run) -> None:
    """Silo 3 is charged for one basis round, the others for two; both are composed with the training rounds by both accountants."""
    assert [[(each["basis"], each["rounds"]) for each in silo["charged"]] for silo in after_a_basis["silos"]] == [
        [(True, 2), (False, 3)], [(True, 2), (False, 3)], [(True, 1), (False, 3)],
    ]  # fmt: skip
    code, out = run(after_a_basis)
    assert (code, out.count("agrees")) == (0, 11), out


def test_a_basis_that_is_not_paid_for_differs(after_a_basis, run) -> None:
    """The figure without the basis rounds, wherever the charge still names them; and without the charge the steps differ."""
    terms = federation.parse(contract_bytes(adapter={"basis": "private"}, basis=SKETCHED, privacy=WHOLE)).terms
    free = accounting.certify([event_of(terms, "insiders", 3)], terms.privacy.delta)
    changed = copied(after_a_basis)
    changed["silos"][0]["spent"] |= {"epsilon": free.epsilon, "epsilon_pld": free.epsilon_pld, "epsilon_rdp": free.epsilon_rdp}
    code, out = run(changed)
    assert (code, out.count("DIFFERS")) == (1, 1), out
    changed = copied(after_a_basis)
    changed["silos"][0]["charged"] = [each for each in changed["silos"][0]["charged"] if not each["basis"]]
    code, out = run(changed)
    assert (code, out.count("DIFFERS")) == (1, 1), out


def test_over_versions_it_is_the_filter_at_the_order_of_the_first_ones_limits(over_versions, run) -> None:
    """Silo 3 has version 1 alone, so both accountants compose what it is charged for; the others' is one order's."""
    assert [silo["spent"]["epsilon_pld"] is None for silo in over_versions["silos"]] == [True, True, False]
    code, out = run(over_versions)
    assert (code, out.count("agrees")) == (0, 11), out


def test_another_order_of_the_filter_differs(over_versions, run) -> None:
    """Chosen after the fact, the best order would state less than the filter pays."""
    changed, privacy = copied(over_versions), over_versions["versions"][0]
    fixed = Limits(epsilon=privacy["epsilon"], delta=privacy["delta"]).filter_order
    assert changed["accounting"]["order"] == fixed
    figure = changed["silos"][0]["spent"]
    changed["accounting"]["order"] = fixed + 5
    figure["epsilon"] = figure["epsilon_rdp"] = figure["epsilon"] * 0.97
    code, out = run(changed)
    assert (code, out.count("DIFFERS")) == (1, 1), out


def test_an_understated_epsilon_differs(record, run) -> None:
    changed = copied(record)
    figure = changed["guarantee"]["adversaries"][1]["spent"]
    figure["epsilon"] *= 0.9
    code, out = run(changed)
    assert (code, out.count("DIFFERS")) == (1, 1), out


def test_what_it_does_not_cover_it_says(record, run) -> None:
    """A record of an earlier release, a version whose units may be in several silos, and no differential privacy."""
    changed = copied(record)
    del changed["versions"][0]["seen"]
    assert run(changed)[0] == 2
    changed = copied(record)
    changed["versions"][0]["seen"][2]["event"]["type"] = "lattice-gaussian-mixture"
    assert run(changed)[0] == 2
    changed["accounting"] = None
    code, out = run(changed)
    assert (code, "not covered" in out) == (2, True)


def test_a_figure_that_is_left_out_differs(after_a_basis, run) -> None:
    """An adversary that the report does not name, or a silo whose uploads stand in its rounds."""
    changed = copied(after_a_basis)
    del changed["guarantee"]["adversaries"][2]
    code, out = run(changed)
    assert (code, "no figure against sum_broken" in out) == (1, True), out
    changed = copied(after_a_basis)
    del changed["silos"][0]
    code, out = run(changed)
    assert (code, "silo 1 has 2 basis rounds of version 1" in out) == (1, True), out


def test_what_the_accountants_are_shown_with_differs(after_a_basis, run) -> None:
    """The figures in ``accounting`` are those that the report's summary and charts start from."""
    for when in ("spent", "plan"):
        changed = copied(after_a_basis)
        changed["accounting"][when]["epsilon"] *= 0.9
        code, out = run(changed)
        assert (code, out.count("DIFFERS")) == (1, 1), out


def test_fewer_rounds_charged_than_the_record_lists_differ(after_a_basis, run) -> None:
    """Every figure fits the charges, and the charges do not fit the rounds in which the silo's uploads arrived."""
    changed = copied(after_a_basis)
    changed["rounds"].append({**changed["rounds"][-1], "number": 6})
    code, out = run(changed)
    assert (code, out.count("DIFFERS")) == (1, 0), out
    assert "silo 1 has 4 rounds of version 1, and is charged for 3" in out
