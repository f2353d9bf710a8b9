# SPDX-License-Identifier: Apache-2.0
"""Verification from evidence: a finished federation holds; whatever is changed, removed, moved or forged is named, and only that.

The federation is real (tests.whole): three rounds in two epochs. Each test works on copies of its evidence.
"""

from __future__ import annotations

import dataclasses
import hashlib

import msgspec
import numpy as np
import pytest

from aggregator import commands
from aggregator.reporting import report
from privacy import envelope, federation, update_rule
from privacy.audit import placing
from privacy.audit.evidence import REMNANT, Entry, Evidence, remnant_of
from privacy.audit.findings import Findings, Slot
from privacy.dp import accounting
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Acknowledgement, Freeze, Manifest, Outcome, Signed, decode, encode
from tests import auditing
from tests.auditing import CHANCE, bent, by_slot, flipped, named, outcome_of, put, read, resigned, sampled, verdict
from tests.whole import SILOS, Whole, together

pytestmark = pytest.mark.usefixtures("quick_polls")


def run_on(whole: Whole, last: int) -> Whole:
    whole.run(last)
    return whole.restarted()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Whole:
    """Rounds 1 and 2 in epoch 1, round 3 in epoch 2; its processes are gone."""
    whole = run_on(Whole.create(tmp_path_factory.mktemp("audit") / "whole"), 2)

    def silo(number: int) -> list:
        return whole.take_part(number, 3)

    def coordinate() -> None:
        with whole.coordinator() as coordinator:
            coordinator.new_epoch()
            coordinator.run_round(3)

    together(*(lambda number=number: silo(number) for number in SILOS), coordinate)
    whole.close()
    return whole


@pytest.fixture(scope="module")
def entries(finished) -> list[Entry]:
    return auditing.index_of(finished)


@pytest.fixture
def copy(finished, tmp_path):
    return auditing.evidence_of(finished, tmp_path)


# --- A federation that holds -------------------------------------------------------------------------------------------------


def test_a_verdict_without_a_failed_and_without_an_open_check(finished, entries):
    pinned = [finished.accepted.digest.hex()]
    found = verdict(finished.home.evidence_folder, entries, pinned=pinned, log=True)
    assert found.holds
    assert not found.open
    assert found.recomputed == (1, 2, 3)
    assert found.state == finished.progress(1).state.digest.hex()
    assert "rounds 1–3 recomputed from the masked vectors, bit for bit" in found.sentence()
    assert {check.kind for check in found.checks} >= {entry.slot.kind for entry in entries if entry.leaf is not None}


def test_an_index_is_found_again_by_what_the_documents_say(finished, entries):
    found = placing.by_content(finished.home.evidence_folder)
    assert found.entries.keys() == by_slot(entries).keys()
    assert {entry.name for entry in found.entries.values()} == {entry.name for entry in entries}
    assert not found.spare
    assert not found.broken


def test_the_leaves_of_the_log_are_an_index(finished, entries):
    found, _, leaves = placing.offline(finished.home.root)
    assert {entry.slot: entry.digest for entry in found.entries.values()} == {entry.slot: entry.digest for entry in entries}
    logged = {entry.slot: entry.leaf for entry in entries if entry.leaf is not None}
    assert leaves
    assert all(logged[entry.slot] == entry.leaf for entry in leaves)


def test_epsilon_after_each_round_is_that_of_the_accountants_for_all_three_adversaries(finished, entries):
    terms = finished.accepted.terms
    found = verdict(finished.home.evidence_folder, entries)
    assert [each.round for each in found.spent] == [1, 2, 3]
    for each in found.spent:
        for name, plan in federation.adversaries(terms).items():
            event = federation.mechanism(terms, shares=plan.shares, rounds=each.round)
            assert getattr(each, name) == accounting.certify([event], terms.privacy.delta).epsilon


def test_one_round_alone_is_verified_in_full_and_says_so(finished, entries):
    found = verdict(finished.home.evidence_folder, entries, rounds={2}, pinned=[finished.accepted.digest.hex()])
    assert found.holds
    assert found.recomputed == (2,)
    assert {check.number for check in found.checks if check.kind == "upload" and check.what == "header"} == {2}
    assert not verdict(finished.home.evidence_folder, entries, rounds={4}).holds


# --- Whatever happens to a file is named --------------------------------------------------------------------------------------


def test_one_flipped_bit_in_any_file_names_exactly_that_object(copy, entries):
    kinds = set()
    for entry in sampled(entries):
        path = copy / entry.name
        data = path.read_bytes()
        path.write_bytes(flipped(data))
        found = verdict(copy, entries)
        assert named(found) == {entry.slot}, entry.slot
        assert {check.file for check in found.failed} == {entry.name}
        assert "the copy" in found.failed[0].why
        assert "damaged" in found.failed[0].why
        path.write_bytes(data)
        kinds.add(entry.slot.kind)
    assert kinds >= {
        "contract", "countersignature", "epoch", "epoch-note", "roster", "pair-seeds", "confirmation", "manifest", "upload",
        "freeze", "consent", "certificate", "release", "outcome", "acknowledgement",
    }  # fmt: skip


def test_one_flipped_bit_is_named_without_any_table(copy, entries):
    """The log's leaves say what a file was; documents after its head are placed by what they still say of themselves."""
    logged = {entry.slot for entry in placing.offline(copy)[2]}
    for entry in sampled(entries):
        path = copy / entry.name
        data = path.read_bytes()
        path.write_bytes(flipped(data))
        found, _, _ = placing.offline(copy)
        failed = verdict(copy, found).failed
        assert entry.name in {check.file for check in failed}, entry.slot
        if entry.slot in logged:
            assert {check.slot for check in failed} == {entry.slot}
        path.write_bytes(data)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "empty", "longer", "a folder", "a link"])
def test_any_file_that_is_not_as_it_was_is_named(copy, entries, damage):
    for entry in CHANCE.sample(entries, 8):
        path = copy / entry.name
        data = path.read_bytes()
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage == "a link":
            path.symlink_to("/dev/zero")
        elif damage != "deleted":
            path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "longer": data + b"\0"}[damage])
        found = verdict(copy, entries)
        assert named(found) == {entry.slot}, entry.slot
        path.rmdir() if damage == "a folder" else path.unlink(missing_ok=True)
        path.write_bytes(data)


def test_two_swapped_files_are_both_named(copy, entries):
    for _ in range(5):
        one, other = CHANCE.sample(entries, 2)
        first, second = (copy / one.name).read_bytes(), (copy / other.name).read_bytes()
        (copy / one.name).write_bytes(second)
        (copy / other.name).write_bytes(first)
        assert named(verdict(copy, entries)) == {one.slot, other.slot}
        (copy / one.name).write_bytes(first)
        (copy / other.name).write_bytes(second)


def test_an_extra_file_is_reported_as_unknown_and_is_no_fault(copy, entries):
    (copy / hashlib.sha256(b"x").hexdigest()).write_bytes(b"x")
    (copy / "notes.txt").write_bytes(b"mine")
    found = verdict(copy, entries)
    assert found.holds
    assert {check.file for check in found.checks if check.status == "note" and check.kind == "unknown"} == {
        hashlib.sha256(b"x").hexdigest(), "notes.txt",
    }  # fmt: skip


# --- Documents that are whole, signed, and in the wrong place ------------------------------------------------------------------


def test_a_validly_signed_document_of_another_round_is_named(copy, entries):
    """The table was changed with it, so only what the document says gives it away."""
    for entry in sampled(each for each in entries if each.slot.number == 2 and each.leaf is not None):
        slot = entry.slot
        other = by_slot(entries).get(slot._replace(number=1))
        if other is None or slot.kind in ("contract", "countersignature"):
            continue
        index = put(copy, entries, slot, (copy / other.name).read_bytes())
        found = verdict(copy, index)
        assert named(found) == {slot}, (slot, found.failed)


def test_a_document_of_another_silo_in_a_slot_is_named(copy, entries):
    for kind in ("upload", "consent", "release", "acknowledgement", "pair-seeds", "confirmation", "epoch-note", "countersignature"):
        slot = Slot(kind, 1, 2)
        found = verdict(copy, put(copy, entries, slot, read(copy, entries, kind, 1, 3)))
        assert named(found) == {slot}, found.failed


def test_a_withheld_document_is_named(copy, entries):
    must = sampled(entry for entry in entries if entry.leaf is not None and entry.slot.number < 3)
    for slot in (entry.slot for entry in must):
        found = verdict(copy, put(copy, entries, slot, None))
        if slot.kind == "acknowledgement" and slot.number == 2:
            assert found.holds, "round 3 is of another epoch: its base state says the same"
        else:
            assert named(found) == {slot}, (slot, found.failed)


def test_bytes_that_are_no_document_are_named_in_any_slot(copy, entries):
    for entry in CHANCE.sample([each for each in entries if each.leaf is not None], 8):
        assert entry.slot in named(verdict(copy, put(copy, entries, entry.slot, b"nothing"))), entry.slot


def test_a_document_that_nothing_names_is_open(copy, entries):
    """A release of somebody who is no member: whole, recorded, and nobody can say what it is for."""
    index = put(copy, entries, Slot("release", 1, 9), read(copy, entries, "release", 1, 3))
    found = verdict(copy, index, log=True)
    assert Slot("release", 1, 9) in {check.slot for check in found.open}


# --- A lying aggregator, which signs what it likes -----------------------------------------------------------------------------


def forged_state(finished, outcome: Outcome, total: bytes) -> bytes:
    words = np.frombuffer(total, "<u4").astype(np.int32).astype(np.int64)
    return update_rule.advance(update_rule.initial(finished.accepted.terms), words, finished.accepted.terms).digest


@pytest.mark.parametrize("lie", ["sum", "sum and state", "vector", "seed", "state", "set", "void", "reason", "silos"])
def test_a_forged_outcome_is_named_with_what_does_not_hold(finished, copy, entries, lie):
    true = outcome_of(copy, entries, 1)
    (first, y), *rest = true.vectors
    (_, seed), *seeds = true.seeds
    changes, what = {
        "sum": ({"total": bent(true.total)}, "sum"),
        "sum and state": ({"total": bent(true.total), "next_state": forged_state(finished, true, bent(true.total))}, "sum"),
        "vector": ({"vectors": ((first, bent(y)), *rest)}, f"vector of silo {first}"),
        "seed": ({"seeds": ((first, bent(seed)), *seeds)}, f"seed of silo {first}"),
        "state": ({"next_state": bent(true.next_state)}, "update rule"),
        "set": ({"frozen": bent(true.frozen)}, "set"),
        "void": ({"kind": "void", "reason": "absent"}, "nothing summed"),
        "reason": ({"reason": "rejected"}, "update rule"),
        "silos": ({"vectors": tuple(reversed(true.vectors))}, "vectors"),
    }[lie]
    index, slot = resigned(finished, copy, entries, "outcome", 1, Outcome, **changes)
    found = verdict(copy, index)
    assert (slot, what) in {(check.slot, check.what) for check in found.failed}, found.failed
    assert 1 not in found.recomputed or lie in ("state", "reason")


@pytest.mark.parametrize(
    "changes", [{"clamp": 7}, {"lattice_bits": 9}, {"dimension": 5}, {"deadline_at": 1}, {"base_state": b"x" * 32},
                {"previous": b"x" * 32}, {"round": 9}, {"epoch_ctx": b"x" * 32}]
)  # fmt: skip
def test_a_manifest_that_is_not_the_contracts_plan_is_named(finished, copy, entries, changes):
    index, slot = resigned(finished, copy, entries, "manifest", 2, Manifest, **changes)
    found = verdict(copy, index)
    assert slot in named(found)
    assert next(iter(changes)).replace("_", " ").split()[0] in " ".join(check.why for check in found.failed if check.slot == slot)


def test_a_set_with_another_upload_of_a_silo_is_named(finished, copy, entries):
    first = decode(decode(read(copy, entries, "freeze", 1), Signed).body, Freeze)
    second = decode(decode(read(copy, entries, "freeze", 2), Signed).body, Freeze)
    headers = (second.headers[0], *first.headers[1:])
    index, slot = resigned(finished, copy, entries, "freeze", 1, Freeze, headers=headers)
    assert slot in named(verdict(copy, index))


def test_an_acknowledgement_of_another_state_is_named(finished, copy, entries):
    signed = decode(read(copy, entries, "acknowledgement", 2, 1), Signed)
    said = msgspec.structs.replace(decode(signed.body, Acknowledgement), state=b"s" * 32)
    identity = keys.load(finished.root / "silo-1" / "identity.key")
    raw = envelope.sign(identity, type="acknowledgement", context=signed.context, sender=1, body=encode(said))
    slot = Slot("acknowledgement", 2, 1)
    assert named(verdict(copy, put(copy, entries, slot, raw))) == {slot}


def test_a_wrong_fingerprint_is_a_failure_and_none_an_open_question(finished, copy, entries):
    wrong = verdict(copy, entries, pinned=["0" * 64])
    assert [(check.slot.kind, check.what) for check in wrong.failed] == [("contract", "pinned")]
    none = verdict(copy, entries, log=True)
    assert none.holds
    assert [(check.slot.kind, check.what) for check in none.open] == [("contract", "pinned")]
    shown = keys.fingerprint(keys.read_public(finished.home.public_path.read_bytes())) if finished.home.public_path.exists() else ""
    assert not shown or verdict(copy, entries, pinned=[shown]).holds


def test_two_signed_documents_for_one_slot_are_kept_apart_and_named(finished, copy, entries):
    index, slot = resigned(finished, copy, entries, "outcome", 2, Outcome, reason="twice")
    assert len(index) == len(entries)
    found = placing.by_content(copy)
    assert slot in found.entries
    assert any("said two things" in why for why in found.spare.values())


# --- Deleted vectors --------------------------------------------------------------------------------------------------------


def pruned(folder, entries, number) -> Entry:
    entry = by_slot(entries)[Slot("outcome", number, AGGREGATOR)]
    path = folder / entry.name
    (folder / (entry.name + REMNANT)).write_bytes(remnant_of(path.read_bytes()))
    path.unlink()
    return entry


def test_it_says_which_of_the_two_it_did(finished, copy, entries):
    pruned(copy, entries, 1)
    found = verdict(copy, entries, pinned=[finished.accepted.digest.hex()], log=True)
    assert found.holds
    assert not found.open
    assert (found.recomputed, found.relied) == ((2, 3), (1,))
    assert "round 1 by signatures and update rule only" in found.sentence()
    assert found.state == finished.progress(1).state.digest.hex()


@pytest.mark.parametrize("change", ["total", "next_state", "vectors", "signature", "body", "missing acknowledgement"])
def test_a_remnant_that_lies_is_named(copy, entries, change):
    slot = Slot("outcome", 1, AGGREGATOR)
    path = copy / (pruned(copy, entries, 1).name + REMNANT)
    kept = decode(path.read_bytes(), placing_remnant())
    outcome = decode(kept.outcome, Outcome)
    index = entries
    if change in ("total", "next_state"):
        outcome = msgspec.structs.replace(outcome, **{change: bent(getattr(outcome, change))})
    elif change == "vectors":
        outcome = msgspec.structs.replace(outcome, vectors=((1, b"1234"),))
    elif change == "missing acknowledgement":
        slot = Slot("acknowledgement", 1, 2)
        index = put(copy, entries, slot, None)
    else:
        kept = msgspec.structs.replace(kept, **{change: bent(getattr(kept, change))})
    path.write_bytes(encode(msgspec.structs.replace(kept, outcome=encode(outcome))))
    found = verdict(copy, index)
    assert slot in named(found), found.failed


def placing_remnant():
    from privacy.audit.evidence import Remnant

    return Remnant


# --- Reports ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def papers(finished):
    """A signed report on the finished federation."""
    if not finished.home.facts_path.exists():
        finished.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    facts = commands.build_report(finished.home.root)
    record = report.encode(facts)
    return facts, record, finished.identity.sign(report.signing_input(record)).hex().encode()


def test_a_reports_figures_are_those_computed_again(finished, entries, papers):
    _, record, signature = papers
    found = verdict(finished.home.evidence_folder, entries, report=(record, signature))
    assert found.holds, found.failed
    assert {check.what for check in found.checks if check.kind == "report"} >= {
        "signature", "contents", "epsilon outside", "epsilon insiders", "epsilon sum_broken",
    }  # fmt: skip


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_report_with_another_figure_is_named(finished, entries, papers, position):
    facts, _, _ = papers
    rows = list(facts.guarantee.adversaries)
    rows[position] = msgspec.structs.replace(
        rows[position], spent=msgspec.structs.replace(rows[position].spent, epsilon=rows[position].spent.epsilon * 0.99)
    )
    lie = msgspec.structs.replace(facts, guarantee=msgspec.structs.replace(facts.guarantee, adversaries=tuple(rows)))
    record = report.encode(lie)
    signature = finished.identity.sign(report.signing_input(record)).hex().encode()
    found = verdict(finished.home.evidence_folder, entries, report=(record, signature))
    assert [(check.slot.kind, check.what) for check in found.failed] == [("report", f"epsilon {rows[position].name}")]


def test_a_report_that_was_changed_after_signing_is_named(finished, entries, papers):
    _, record, signature = papers
    found = verdict(finished.home.evidence_folder, entries, report=(record + b" ", signature))
    assert ("report", "signature") in {(check.kind, check.what) for check in found.failed}


# --- The shape of findings -----------------------------------------------------------------------------------------------------


def test_what_rests_on_a_fault_is_open_and_not_failed(copy, entries):
    path = copy / by_slot(entries)[Slot("manifest", 2, AGGREGATOR)].name
    path.write_bytes(flipped(path.read_bytes()))
    found = verdict(copy, entries)
    assert named(found) == {Slot("manifest", 2, AGGREGATOR)}
    assert Slot("manifest", 3, AGGREGATOR) in {check.slot for check in found.open}
    assert found.state == ""


def test_an_empty_folder_is_a_failure(tmp_path):
    found = verdict(tmp_path, placing.by_content(tmp_path))
    assert [(check.kind, check.what) for check in found.failed] == [("contract", "missing")]


def test_a_check_is_kept_once(tmp_path):
    found = Findings(Evidence.indexed(tmp_path, []))
    for _ in range(2):
        found.add(Slot("manifest", 1, 0), "file", "ok")
    assert len(found.checks) == 1
    assert dataclasses.asdict(Entry(slot=Slot("a", 1, 2), digest=b"d"))["size"] is None
