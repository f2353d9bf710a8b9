# SPDX-License-Identifier: Apache-2.0
"""The crosswalk to NIST SP 800-226, the registry entry, and the views: complete, with evidence that is there, and made again."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.reporting import crosswalk, no_guarantee, registry, report
from cli import aggregator as aggregator_cli
from cli import silo as silo_cli
from privacy.audit.findings import Findings, Slot
from tests.sample_report import contract, make, run, sample
from tests.test_report import Page

ROOT = Path(__file__).parents[1]
APPS = {"silo": silo_cli.app, "aggregator": aggregator_cli.app}


@functools.cache
def record() -> dict:
    return msgspec.json.decode(report.encode(sample()))


@functools.cache
def entry() -> dict:
    return yaml.safe_load(registry.entry(sample(), "ab" * 32))


def at(tree: object, path: str) -> object:
    for key in path.split("."):
        assert isinstance(tree, dict)
        assert key in tree, path
        tree = tree[key]
    return tree


def commands(app) -> set[str]:
    return {each.name or each.callback.__name__ for each in app.registered_commands}


# --- the crosswalk -----------------------------------------------------------------------------------------------------


def test_every_block_and_every_hazard_is_answered_in_order():
    ids = [each.id for each in sample().crosswalk]
    assert ids == [*(f"P{number}" for number in range(1, 12)), *(f"H{number}" for number in range(1, 18))]
    for each in sample().crosswalk:
        assert all((each.title, each.value, each.evidence, each.residual)), each.id
        assert (each.layer == "hazard") == each.id.startswith("H")


@pytest.mark.parametrize("unit", ["record", "patient_id"])
@pytest.mark.parametrize("mode", ["joint", "local"])
def test_evidence_is_a_place_in_the_record_or_a_command_that_exists(unit, mode):
    facts = make(contract(unit=unit, mode=mode, rounds=2), run(1))
    tree = msgspec.json.decode(report.encode(facts))
    for each in facts.crosswalk:
        for place in each.evidence:
            program, _, command = place.partition(" ")
            if program in APPS:
                assert command in commands(APPS[program]), place
            else:
                at(tree, place)


def test_figures_in_it_are_those_of_the_accounting():
    value = sample().crosswalk[0].value
    assert re.findall(r"≤ (\d+\.\d\d)", value) == ["1.55", "1.70"]
    assert sample().accounting.spent.epsilon <= 1.55
    assert sample().accounting.plan.epsilon <= 1.70


def test_it_claims_no_assessment_and_no_law():
    text = " ".join(f"{each.title} {each.value} {each.residual}" for each in sample().crosswalk).lower()
    for word in ("anonym", "complian", "gdpr", "hipaa", "certified by", "approved"):
        assert word not in text
    assert "It is no assessment by NIST." in Page(report.render(sample())).text


def test_a_record_as_unit_is_a_row_and_not_a_person():
    rows = {each.id: each for each in make(contract(unit="record", rounds=1), ()).crosswalk}
    assert rows["H4"].value == "one record: a row, not a person"
    assert "several records" in rows["H4"].residual


def test_without_differential_privacy_the_pyramid_has_no_top():
    rows = crosswalk.of_open(contract().terms)
    assert rows[0].value == "none: no differential privacy"
    assert [each.layer for each in rows if each.id.startswith("H")] == ["hazard"]
    assert not re.search(r"≤ \d", " ".join(each.value for each in rows))
    places = {place.split(".")[0] for each in rows for place in each.evidence if place.split()[0] not in APPS}
    assert places <= {no_guarantee.KEY, *no_guarantee.OpenReport.__struct_fields__}


# --- the registry entry --------------------------------------------------------------------------------------------------


def fields() -> dict[str, tuple[str, str]]:
    """(type, allowed values) by path, as docs/reference/registry.md has them."""
    text = (ROOT / "docs" / "reference" / "registry.md").read_text(encoding="utf-8")
    return {
        path: (kind, allowed) for path, kind, allowed in re.findall(r"^\| `([a-z_.]+)` \| (\w+) \| ?(.*?) ?\|$", text, re.MULTILINE)
    }


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found |= leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def test_the_entry_has_every_field_of_tier_3_in_the_form_that_is_documented():
    known, said = fields(), leaves(entry())
    assert len(known) == 35
    assert set(said) == set(known)
    types = {"text": str, "number": float, "integer": int, "texts": list}
    for path, (kind, allowed) in known.items():
        assert isinstance(said[path], types[kind]), path
        assert said[path] not in ("", []), path
        choices = re.findall(r"`([^`]+)`", allowed)
        assert not choices or str(said[path]) in choices, path


def test_the_entrys_figures_are_the_records():
    loss = entry()["deployment"]["privacy_loss"]
    assert loss["privacy_parameters"] == {"epsilon": sample().accounting.spent.epsilon, "delta": sample().guarantee.delta}
    assert entry()["deployment"]["basic"]["data_curators"] == [each.organisation for each in sample().silos]
    assert entry()["status"] == "Draft"
    assert entry()["deployment"]["basic"]["intended_use"] == registry.OPEN, "nobody recorded it"


def test_equal_records_give_equal_entries_and_each_style_of_scalar_is_one_that_the_registry_takes():
    data = registry.entry(sample(), "ab" * 32)
    assert data == registry.entry(sample(), "ab" * 32)
    assert {token.style for token in yaml.scan(data) if hasattr(token, "style")} <= {None, '"'}


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=60).filter(lambda text: text.isprintable() and '"' not in text and "\\" not in text))
def test_no_name_leaves_its_place(name):
    silo = msgspec.structs.replace(sample().silos[0], organisation=name)
    renamed = msgspec.structs.replace(sample(), silos=(silo, *sample().silos[1:]))
    said = yaml.safe_load(registry.entry(renamed, "ab" * 32))
    assert set(leaves(said)) == set(leaves(entry()))
    (curator, *_) = said["deployment"]["basic"]["data_curators"]
    assert not re.search(r"(?<!\\)[`*_{}\[\]<>#|$~]", curator)


# --- views are made again ------------------------------------------------------------------------------------------------


class Nowhere:
    """Evidence that has no files: views are held to the record alone."""

    def file(self, kind, number, party) -> str:
        return ""


def checked(views: dict[str, bytes], stated=None) -> dict[str, str]:
    from aggregator.reporting import recheck

    found = Findings(Nowhere())
    recheck._check_views(found, Slot("report", 0, 0), stated or current(), views)
    return {each.what: each.status for each in found.checks if (each.what, each.status) != ("views", "ok")}


@functools.cache
def current():
    """The sample as the release that runs these tests would make it."""
    from aggregator import commands

    return msgspec.structs.replace(sample(), software=commands.software())


@functools.cache
def genuine() -> dict[str, bytes]:
    return report.views(current())


def test_genuine_views_verify_and_a_changed_byte_is_named():
    assert checked(genuine()) == dict.fromkeys(("report.html", "report.pdf", "registry.yaml"), "ok")
    for name, content in genuine().items():
        bent = {**genuine(), name: content[:-9] + b"X" + content[-8:]}
        assert checked(bent) == {**dict.fromkeys(genuine(), "ok"), name: "failed"}


def test_views_of_another_record_fail_and_of_another_release_are_open():
    later = msgspec.structs.replace(current(), generated_at=current().generated_at + 1)
    assert set(checked(genuine(), later).values()) == {"failed"}
    older = msgspec.structs.replace(current(), software={**current().software, "typst": "0.1"})
    assert checked(genuine(), older) == {"views": "open"}
    assert checked({}) == {}
