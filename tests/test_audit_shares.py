# SPDX-License-Identifier: Apache-2.0
"""Verification in share mode: guardians' documents, a silo that fell, a round that guardians closed; every fault is named."""

from __future__ import annotations

import functools
import shutil
import threading

import msgspec
import pytest

from privacy.audit import whole
from privacy.audit.evidence import Entry, Evidence
from privacy.audit.findings import Slot
from privacy.identity import keys
from privacy.messages import Certificate, Freeze, Outcome, Signed, decode
from silo.guardians import guarding
from silo.guardians.guardian import Guardian, party_of
from silo.home import Home
from silo.watch import Watch
from tests import auditing
from tests.auditing import bent, by_slot, flipped, named, outcome_of, put, read, resigned, sampled, verdict
from tests.whole import PowerCut, Whole, together

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
FOUR = (1, 2, 3, 4)

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Whole:
    """Three rounds; in the second silo 3 fell before its upload, so its pair keys are in the outcome."""
    whole = Whole.create(tmp_path_factory.mktemp("shares") / "whole", silos=FOUR, sum=SHARES)
    whole.run(1)
    whole = whole.restarted()

    def falls() -> None:
        with pytest.raises(PowerCut):
            whole.take_part(3, 2, line=whole.dying("upload", 2))

    whole.run_hurried(2, falls, *(functools.partial(whole.take_part, silo, 2) for silo in (1, 2, 4)))
    whole = whole.restarted()
    whole.run(3)
    whole.close()
    return whole


@pytest.fixture(scope="module")
def entries(finished) -> list[Entry]:
    return auditing.index_of(finished)


@pytest.fixture
def copy(finished, tmp_path):
    return auditing.evidence_of(finished, tmp_path)


def test_a_federation_in_which_a_silo_fell_holds(finished, entries):
    found = verdict(finished.home.evidence_folder, entries, pinned=[finished.accepted.digest.hex()], log=True)
    assert found.holds, found.failed
    assert not found.open
    assert found.recomputed == (1, 2, 3)
    assert found.state == finished.progress(1).state.digest.hex()
    second = outcome_of(finished.home.evidence_folder, entries, 2)
    assert [silo for silo, _ in second.seeds] == [1, 2, 4]
    assert {missing for _, missing, _ in second.pair_keys} == {3}
    assert {"list", "endorsement", "shares", "guardian-note"} <= {check.kind for check in found.checks}


def test_one_flipped_bit_in_any_file_names_exactly_that_object(copy, entries):
    for entry in sampled(entries):
        path = copy / entry.name
        data = path.read_bytes()
        path.write_bytes(flipped(data))
        assert named(verdict(copy, entries)) == {entry.slot}, entry.slot
        path.write_bytes(data)


def test_a_validly_signed_document_of_another_round_is_named(copy, entries):
    kinds, at = set(), by_slot(entries)
    for entry in sampled(each for each in entries if each.slot.number == 3 and each.leaf is not None):
        slot = entry.slot
        other = at.get(slot._replace(number=1))
        if other is None:
            continue
        assert named(verdict(copy, put(copy, entries, slot, (copy / other.name).read_bytes()))) == {slot}, slot
        kinds.add(slot.kind)
    assert kinds >= {"manifest", "upload", "list", "freeze", "endorsement", "certificate", "shares", "outcome"}


def test_a_document_of_another_guardian_in_a_slot_is_named(copy, entries):
    for kind in ("list", "endorsement", "shares"):
        parties = sorted(slot.party for slot in by_slot(entries) if slot[:2] == (kind, 1))
        slot = Slot(kind, 1, parties[0])
        found = verdict(copy, put(copy, entries, slot, read(copy, entries, kind, 1, parties[1])))
        assert named(found) == {slot}, found.failed


@pytest.mark.parametrize("lie", ["pair key", "one pair key less", "a silo less", "a silo that was not there"])
def test_a_forged_sum_over_a_set_with_a_missing_silo_is_named(finished, copy, entries, lie):
    true = outcome_of(copy, entries, 2)
    (silo, missing, key), *rest = true.pair_keys
    changes = {
        "pair key": {"pair_keys": ((silo, missing, bent(key)), *rest)},
        "one pair key less": {"pair_keys": tuple(rest)},
        "a silo less": {"seeds": true.seeds[1:], "vectors": true.vectors[1:]},
        "a silo that was not there": {"pair_keys": ((silo, 1, key), *rest)},
    }[lie]
    index, slot = resigned(finished, copy, entries, "outcome", 2, Outcome, **changes)
    found = verdict(copy, index)
    assert slot in named(found)
    assert 2 not in found.recomputed


def test_a_certificate_with_too_few_guardians_is_named(finished, copy, entries):
    true = decode(decode(read(copy, entries, "certificate", 1), Signed).body, Certificate)
    index, slot = resigned(finished, copy, entries, "certificate", 1, Certificate, consents=true.consents[:-1])
    assert named(verdict(copy, index)) == {slot}


@pytest.mark.parametrize("lie", ["a list less", "left out without a reason", "a header less"])
def test_a_set_that_the_lists_do_not_give_is_named(finished, copy, entries, lie):
    true = decode(decode(read(copy, entries, "freeze", 2), Signed).body, Freeze)
    changes = {
        "a list less": {"lists": true.lists[:-1]},
        "left out without a reason": {"left_out": ()},
        "a header less": {"headers": true.headers[1:], "left_out": ((1, "absent"), *true.left_out)},
    }[lie]
    index, slot = resigned(finished, copy, entries, "freeze", 2, Freeze, **changes)
    assert slot in named(verdict(copy, index))


# --- A round that guardians closed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(tmp_path_factory) -> Whole:
    """Guardians apart from the silos; round 1 ends with a sum, in round 2 two of four silos are away: below u_min, so void."""
    sums = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 2}
    whole = Whole.create(tmp_path_factory.mktemp("closed") / "whole", silos=FOUR, notaries=5, sum=sums)
    guarded(whole, 1, *(functools.partial(whole.take_part, silo, 1) for silo in FOUR))
    whole = whole.restarted()

    def falls(silo: int) -> None:
        with pytest.raises(PowerCut):
            whole.take_part(silo, 2, line=whole.dying("upload", 2))

    there = (functools.partial(whole.take_part, silo, 2) for silo in (1, 2))
    guarded(whole, 2, *(functools.partial(falls, silo) for silo in (3, 4)), *there, hurried=True)
    whole.close()
    return whole


def guarded(whole: Whole, last: int, *jobs, hurried: bool = False) -> None:
    """Rounds up to ``last`` with these silos, all guardians at work until they are over. ``hurried``: no deadline is waited out."""
    over = threading.Event()

    def stand(number: int) -> None:
        home, line = Home(whole.root / f"notary-{number}"), whole.line()
        identity = keys.load(home.identity_path)
        guardian = Guardian(
            home=home, transport=line, identity=identity, accepted=whole.accepted,
            party=party_of(whole.accepted, identity), clock=whole.clock, outcomes={},
        )  # fmt: skip
        watch = Watch(home=home, transport=line, identity=identity, accepted=whole.accepted, clock=whole.clock)
        while not over.is_set() and not watch.follow(last, wait_s=0.05):
            guardian.step()
        guarding.work(guardian, line, whole.clock, over.is_set)

    def coordinate() -> None:
        try:
            whole.coordinate(last)
        finally:
            over.set()

    guardians = [functools.partial(stand, number) for number in range(1, 6)]
    wait = [functools.partial(whole.hurry, over.is_set, silent=2)] if hurried else []
    together(coordinate, *jobs, *guardians, *wait)


def test_a_round_that_guardians_closed_is_void_by_their_words(closed, tmp_path):
    index = auditing.index_of(closed)
    found = verdict(closed.home.evidence_folder, index, pinned=[closed.accepted.digest.hex()], log=True)
    assert found.holds, found.failed
    assert not found.open
    assert (found.recomputed, found.void) == ((1,), (2,))
    assert "round 2 void, nothing was summed" in found.sentence()
    folder = tmp_path / "evidence"
    shutil.copytree(closed.home.evidence_folder, folder)
    true = outcome_of(folder, index, 2)
    lies = {
        "kind": {"kind": "annulled" if true.kind == "void" else "void"},
        "fewer": {"closes": true.closes[:-1]},
        "moved": {"next_state": bytes(32)},
        "a sum": {"total": b"1234"},
    }
    for changes in lies.values():
        changed, slot = resigned(closed, folder, index, "outcome", 2, Outcome, **changes)
        assert slot in named(verdict(folder, changed)), changes
    closes = [entry.slot for entry in index if entry.slot.kind == "close"]
    assert closes
    for slot in closes:
        raw = read(folder, index, *slot)
        body = decode(raw, Signed)
        forged = msgspec.msgpack.encode(msgspec.structs.replace(body, signature=bytes(64)))
        assert slot in named(verdict(folder, put(folder, index, slot, forged)))


def test_epsilon_counts_a_void_round_for_those_who_sent_something(closed):
    index = auditing.index_of(closed)
    found = whole.audit(Evidence.indexed(closed.home.evidence_folder, index))
    assert [each.rounds_charged for each in found.spent] == [1, 2]
    assert found.spent[1].insiders > found.spent[0].insiders
    assert {slot.party for slot in by_slot(index) if slot[:2] == ("upload", 2)} == {1, 2}
