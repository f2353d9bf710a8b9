# SPDX-License-Identifier: Apache-2.0
"""A server that lies, against real silos and guardians: each lie ends in a refusal with a name, and nothing is sent on it.

Four silos, of which one may be away, and four guardians in homes of their own, of which one is corrupt: q = 3 must agree.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from privacy import federation
from privacy.errors import Equivocation, SiloquyError, TrustError
from privacy.federation import GUARDIANS_FROM
from privacy.messages import (
    AGGREGATOR,
    Certificate,
    Endorsement,
    EpochCall,
    EpochNote,
    Freeze,
    Header,
    Listing,
    Manifest,
    Outcome,
    Roster,
    Signed,
    Upload,
    decode,
    encode,
)
from privacy.secure_sum import freeze, guardian_sum
from privacy.transparency import notes
from silo.guardians.vows import Vows
from silo.home import Home
from tests.malicious import OtherLog, Spy, World, impatient

G1, G2, G3, G4 = GUARDIANS = tuple(GUARDIANS_FROM + each for each in (1, 2, 3, 4))
FOUR = (1, 2, 3, 4)


@pytest.fixture(scope="module", autouse=True)
def _impatient():
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        yield


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory):
    """One round is over, and the manifest of the next stands."""
    world = World.create(tmp_path_factory.mktemp("malicious") / "first")
    world.run(1)
    while not world.has("manifest", 2):
        world.cycle((*GUARDIANS, AGGREGATOR))
    world.close()
    return world


@pytest.fixture(scope="module")
def counted(confirmed, tmp_path_factory):
    """All four uploaded in round 2, but guardian 1 was not shown that of silo 4, and all have listed. No set is proposed yet."""
    world = confirmed.copied(tmp_path_factory.mktemp("counted") / "world")
    world.tell(("upload", 2, 4), None, G1)
    world.cycle(FOUR)
    world.cycle((G2, G3, G4))
    world.whole.clock.skip(61.0)
    world.cycle((G1,))
    assert world.whole.store.parties("list", 2) == GUARDIANS
    world.close()
    return world


@pytest.fixture(scope="module")
def ended(confirmed, tmp_path_factory):
    """Round 2 has an outcome over silos 1 to 3; silo 4 was away; silo 1 has uploaded and seen nothing since."""
    world = confirmed.copied(tmp_path_factory.mktemp("ended") / "world")
    world.cycle((1, 2, 3))
    world.whole.clock.skip(61.0)
    world.until("outcome", 2, parties=(AGGREGATOR, *GUARDIANS))
    world.close()
    return world


def copy_of(name):
    @pytest.fixture
    def made(request, tmp_path):
        world = request.getfixturevalue(name).copied(tmp_path / "world")
        yield world
        world.close()

    return made


world, listed, over = copy_of("confirmed"), copy_of("counted"), copy_of("ended")


@pytest.fixture
def refusals(monkeypatch):
    """Codes with which guardians refuse headers and sets; they say so in words and go on."""
    found = []
    for name in ("check_header", "check_freeze"):
        original = getattr(guardian_sum, name)

        def checked(*given, original=original, **named):
            try:
                return original(*given, **named)
            except SiloquyError as error:
                found.append(error.code)
                raise

        monkeypatch.setattr(guardian_sum, name, checked)
    return found


def refuses(world, party, code, kind=TrustError):
    found = world.step(party)
    assert isinstance(found, kind), found
    assert found.code == code, found
    assert found.hint
    return found


def nothing_of(world, silo, number):
    """Nothing was spent, promised or sent in the round."""
    assert world.spent(silo, number) == 0
    assert world.home(silo).promised_manifest(number) is None
    assert not world.doors[silo].said("upload", number)


def said_nothing(world, guardian, number, *kinds):
    for kind in kinds:
        assert not world.doors[guardian].said(kind, number), kind


# --- Manifests -----------------------------------------------------------------------------------------------------------------

OTHER = b"\x5a" * 32
SILO_FIELDS = {
    "epoch_ctx": OTHER, "epoch": 2, "round": 3, "previous": OTHER, "base_state": OTHER, "dimension": 3, "lattice_bits": 3,
    "clamp": 7, "deadline_at": 1, "log_size": 1, "log_root": OTHER,
}  # fmt: skip
GUARDIAN_FIELDS = ("epoch_ctx", "epoch", "round", "previous", "deadline_at", "log_size", "log_root")


def other_manifest(world, **changes):
    made = msgspec.structs.replace(world.body("manifest", 2, Manifest), **changes)
    return world.sign("manifest", world.context(2), made)


@pytest.mark.parametrize("field", SILO_FIELDS)
def test_a_manifest_that_says_anything_else_is_refused_by_the_fields_name(world, field):
    world.tell(("manifest", 2, AGGREGATOR), other_manifest(world, **{field: SILO_FIELDS[field]}))
    refuses(world, 1, f"manifest-{field}".replace("_", "-"))
    nothing_of(world, 1, 2)
    if field in GUARDIAN_FIELDS:
        refuses(world, G1, f"manifest-{field}".replace("_", "-"))
        assert world.vows(G1).promised("manifest", 2) is None


def test_a_stale_base_state_with_its_old_outcome_is_refused(world):
    first = world.body("manifest", 1, Manifest)
    world.tell(("manifest", 2, AGGREGATOR), other_manifest(world, base_state=first.base_state, previous=first.previous), 1)
    refuses(world, 1, "manifest-previous")
    world.tell(("manifest", 2, AGGREGATOR), other_manifest(world, base_state=first.base_state), 1)
    refuses(world, 1, "manifest-base-state")
    nothing_of(world, 1, 2)


@pytest.mark.parametrize("party", [1, G1])
def test_an_old_manifest_opens_no_round(world, party):
    world.tell(("manifest", 2, AGGREGATOR), world.raw("manifest", 1), party)
    refuses(world, party, "manifest-round")


@pytest.mark.parametrize("party", [1, G1])
def test_a_second_manifest_of_a_round_is_equivocation_after_a_restart_too(world, party):
    world.step(party)
    sent = set(world.doors[party].sent)
    manifest = world.body("manifest", 2, Manifest)
    later = {"opened_at": manifest.opened_at + 1, "deadline_at": manifest.deadline_at + 1}
    world.tell(("manifest", 2, AGGREGATOR), other_manifest(world, **later), party)
    world.crash(party)
    refuses(world, party, "equivocation", Equivocation)
    assert {(slot, data) for slot, data in world.doors[party].sent if slot[:2] != ("acknowledgement", 1)} == {
        (slot, data) for slot, data in sent if slot[:2] != ("acknowledgement", 1)
    }, "only the same bytes again"
    assert party != 1 or world.spent(1, 2) == 1, "the second one cost nothing"


def test_two_manifests_for_two_silos_put_them_in_no_common_sum(world, refusals):
    manifest = world.body("manifest", 2, Manifest)
    later = {"opened_at": manifest.opened_at + 1, "deadline_at": manifest.deadline_at + 1}
    world.tell(("manifest", 2, AGGREGATOR), other_manifest(world, **later), 1)
    assert isinstance(world.step(1), SiloquyError), "the honest board does not take its upload"
    (upload,) = world.doors[1].said("upload", 2)
    world.tell(("upload", 2, 1), upload, *GUARDIANS)
    world.cycle((2, 3, 4))
    world.whole.clock.skip(61.0)
    world.cycle(GUARDIANS)
    assert set(refusals) == {"sum-refused"}
    assert any("the upload of silo 1 is refused" in text for text in world.told[G1])
    for guardian in GUARDIANS:
        assert [silo for silo, _ in world.body("list", 2, Listing, guardian).headers] == [2, 3, 4]


# --- Uploads and bundles ---------------------------------------------------------------------------------------------------------


def upload_of(world, silo, number=2):
    return world.body("upload", number, Upload, silo)


def resigned(world, silo, **changes):
    """The upload as a silo that works with the server signs it."""
    made = msgspec.structs.replace(upload_of(world, silo), **changes)
    return world.by(silo, "upload", world.context(2), made)


def test_a_replayed_upload_is_as_good_as_none(world, refusals):
    world.cycle((1, 3, 4))
    world.tell(("upload", 2, 2), world.raw("upload", 1, 2), G1)
    world.whole.clock.skip(61.0)
    world.cycle((G1,))
    assert refusals == ["sum-refused"]
    assert [silo for silo, _ in world.body("list", 2, Listing, G1).headers] == [1, 3, 4]


@pytest.mark.parametrize("whose", [2, 3], ids=["in the same silo's slot", "in another silo's slot"])
def test_bundles_that_the_server_moved_do_not_pass_the_silos_signature(world, whose):
    world.cycle(FOUR)
    made = msgspec.structs.replace(upload_of(world, 2), bundles=upload_of(world, 1).bundles)
    signed = decode(world.raw("upload", 2, 2), Signed)
    moved = encode(msgspec.structs.replace(signed, body=encode(made)))
    world.tell(("upload", 2, whose), moved, G1)
    world.whole.clock.skip(61.0)
    world.cycle((G1,))
    assert any(f"the upload of silo {whose} is refused" in text for text in world.told[G1])
    assert whose not in dict(world.body("list", 2, Listing, G1).headers)


@pytest.mark.parametrize("what", ["guardians", "silos", "rounds", "root"])
def test_bundles_swapped_with_a_silos_help_are_disputed_in_the_log(world, what):
    """A colluding silo signs the swap, in its header too: the bundle does not open where it was put; both names are in the list."""
    world.cycle(FOUR)
    own, header = upload_of(world, 2), decode(decode(upload_of(world, 2).header, Signed).body, Header)
    bundles, entries = list(own.bundles), list(header.bundles)
    if what == "guardians":
        bundles[0], entries[0] = bundles[1], (entries[0][0], *entries[1][1:])
    elif what == "root":
        entries[0] = (*entries[0][:2], OTHER)
    else:
        other = upload_of(world, 3) if what == "silos" else upload_of(world, 2, 1)
        stated = decode(decode(other.header, Signed).body, Header).bundles
        bundles[0], entries[0] = other.bundles[0], stated[0]
    bent = world.by(2, "header", world.context(2), msgspec.structs.replace(header, bundles=tuple(entries)))
    world.tell(("upload", 2, 2), resigned(world, 2, header=bent, bundles=tuple(bundles)), G1)
    world.cycle((G1,))
    listing = world.body("list", 2, Listing, G1)
    assert listing.disputes == ((2, "root" if what == "root" else "sealed"),)
    assert 2 not in dict(listing.headers)


# --- Sets ------------------------------------------------------------------------------------------------------------------------


def proposal(world, *guardians):
    lists = world.lists(2)
    made = world.proposal(2, {each: lists[each] for each in guardians})
    assert made is not None
    return made


def show_set(world, made, *guardians):
    world.tell(("freeze", 2, AGGREGATOR), world.sign("freeze", world.context(2), made), *guardians)


def endorsements(world, *guardians):
    return {g: world.doors[g].said("endorsement", 2)[0] for g in guardians if world.doors[g].said("endorsement", 2)}


def certificate(world, made, documents):
    return freeze.choose_endorsements(documents, world.frozen(2, made), accepted=world.accepted, epoch_ctx=world.context(2))


def show_certificate(world, made, *guardians):
    world.tell(("certificate", 2, AGGREGATOR), world.sign("certificate", world.context(2), made), *guardians)


def not_endorsed(world, guardian):
    world.step(guardian)
    said_nothing(world, guardian, 2, "endorsement", "shares")
    assert world.vows(guardian).promised("set", 2) is None
    assert any("the proposed set is refused" in text for text in world.told[guardian])


def test_two_sets_for_two_halves_of_the_guardians_are_not_both_certified(listed):
    """Split view, with a corrupt guardian that signs for both: one set reaches q, and shares leave for that one alone."""
    small, large = proposal(listed, G1, G2, G3), proposal(listed, G2, G3, G4)
    ones, others = listed.frozen(2, small), listed.frozen(2, large)
    assert (list(ones.headers), list(others.headers)) == ([1, 2, 3], [1, 2, 3, 4])
    show_set(listed, small, G1, G2)
    show_set(listed, large, G3)
    listed.cycle((G1, G2, G3))
    for made, frozen, wanted in ((small, ones, True), (large, others, False)):
        corrupt = listed.by(G4, "endorsement", listed.context(2), freeze.endorsement(frozen, guardian=G4))
        found = certificate(listed, made, {**endorsements(listed, G1, G2, G3), G4: corrupt})
        assert (found is not None) == wanted
        if found is not None:
            show_certificate(listed, found, G1, G2, G3)
    listed.cycle((G1, G2))
    refuses(listed, G3, "sum-refused")
    listed.crash(G3)
    show_set(listed, small, G3)
    refuses(listed, G3, "equivocation", Equivocation)
    released = listed.released(2)
    assert {digest for each in released.values() for digest, _ in each} == {ones.digest}
    assert (len(released[G1]), len(released[G2]), released[G3]) == (1, 1, [])


def test_nobody_is_alive_and_dead(listed):
    """Silo 4 in the first set and missing in the second: after the first, no guardian gives out a share for the second."""
    small, large = proposal(listed, G1, G2, G3), proposal(listed, G2, G3, G4)
    show_set(listed, large)
    listed.cycle(GUARDIANS)
    first = certificate(listed, large, endorsements(listed, *GUARDIANS))
    show_certificate(listed, first)
    listed.cycle(GUARDIANS)
    show_set(listed, small)
    frozen = listed.frozen(2, small)
    corrupt = {g: listed.by(g, "endorsement", listed.context(2), freeze.endorsement(frozen, guardian=g)) for g in GUARDIANS}
    show_certificate(listed, certificate(listed, small, corrupt))  # more than T keys are stolen: even this opens nothing now
    for guardian in GUARDIANS:
        listed.crash(guardian)
        refuses(listed, guardian, "equivocation", Equivocation)
    released = listed.released(2)
    assert [len(released[g]) for g in GUARDIANS] == [1, 1, 1, 1]
    places = {place for each in released.values() for _, given in each for place in given}
    assert places == {(silo, 0) for silo in FOUR}, "self masks only: no key of a pair"


def test_an_upload_that_a_guardian_listed_cannot_be_called_absent(listed, refusals):
    small = proposal(listed, G1, G2, G3)
    assert dict(small.left_out) == {4: "unlisted"}
    show_set(listed, msgspec.structs.replace(small, left_out=((4, "absent"),)))
    not_endorsed(listed, G2)
    assert refusals == ["left-out"]


def test_an_upload_withheld_from_all_others_is_not_absent_for_the_one_that_saw_it(world, refusals):
    world.tell(("upload", 2, 4), None, G1, G2, G3)
    world.cycle(FOUR)
    world.whole.clock.skip(61.0)
    world.cycle(GUARDIANS)
    made = msgspec.structs.replace(proposal(world, G1, G2, G3), left_out=((4, "absent"),))
    assert world.frozen(2, made).missing == (4,), "so say the lists"
    show_set(world, made)
    not_endorsed(world, G4)
    assert refusals == ["left-out"]
    world.cycle((G1, G2, G3))
    assert len(endorsements(world, *GUARDIANS)) == 3, "who was not shown it cannot know"


def forged_lists(world):
    """(name, code, freeze): ways to a set that no q guardians listed."""
    made = proposal(world, G2, G3, G4)
    lists, context = list(made.lists), world.context(2)
    empty = Listing(round_ctx=world.ctx(2), guardian=G2, headers=(), disputes=())
    theirs = decode(lists[0], Signed)
    yield "signed by the server", "wrong-sender", world.sign("list", context, empty)
    yield "another body under its signature", "bad-signature", encode(msgspec.structs.replace(theirs, body=encode(empty)))
    yield "of the round before", "sum-refused", world.raw("list", 1, G2)
    yield "by another guardian", "sum-refused", lists[1]


@pytest.mark.parametrize("which", range(4))
def test_forged_lists_carry_no_set(listed, refusals, which):
    name, code, forged = list(forged_lists(listed))[which]
    made = proposal(listed, G2, G3, G4)
    show_set(listed, msgspec.structs.replace(made, lists=(forged, *made.lists[1:])))
    not_endorsed(listed, G2)
    assert refusals == ["sum-refused" if name == "signed by the server" else code], name


@pytest.mark.parametrize("lie", ["fewer lists", "fewer silos", "an invented silo", "a header twice", "of the round before"])
def test_a_set_below_the_contract_or_with_strangers_is_not_endorsed(listed, refusals, lie):
    made = proposal(listed, G2, G3, G4)
    stranger = listed.by(1, "header", listed.context(2), Header(**{**fields(listed, 1), "silo": 9}))
    bent = {
        "fewer lists": {"lists": made.lists[:2]},
        "fewer silos": {"headers": made.headers[:2], "left_out": ((3, "absent"), (4, "absent"))},
        "an invented silo": {"headers": (*made.headers, encode(msgspec.structs.replace(decode(stranger, Signed), sender=9)))},
        "a header twice": {"headers": (*made.headers, made.headers[-1])},
    }
    told = listed.body("freeze", 1, Freeze) if lie == "of the round before" else msgspec.structs.replace(made, **bent[lie])
    show_set(listed, told)
    not_endorsed(listed, G2)
    assert refusals == ["sum-refused"]


def fields(world, silo):
    header = decode(decode(upload_of(world, silo).header, Signed).body, Header)
    return {name: getattr(header, name) for name in Header.__struct_fields__}


def test_two_silos_that_agree_with_each_other_alone_are_too_few(world, refusals):
    """u_min is the contract's: q guardians that were shown two uploads only list two, and sign for no set of two."""
    world.tell(("upload", 2, 3), None)
    world.tell(("upload", 2, 4), None)
    world.cycle(FOUR)
    world.whole.clock.skip(61.0)
    world.cycle(GUARDIANS)
    lists = tuple(world.lists(2)[g] for g in (G1, G2, G3))
    headers = world.headers(2)
    assert world.proposal(2) is None
    two = Freeze(round_ctx=world.ctx(2), headers=(headers[1], headers[2]), lists=lists, left_out=((3, "absent"), (4, "absent")))
    with pytest.raises(TrustError) as caught:
        world.frozen(2, two)
    assert caught.value.code == "set-too-small"


@pytest.mark.parametrize("lie", ["fewer", "twice", "stranger", "old", "other set"])
def test_a_certificate_below_the_contract_opens_nothing(listed, lie):
    large, small = proposal(listed, G2, G3, G4), proposal(listed, G1, G2, G3)
    show_set(listed, large)
    listed.cycle((G2, G3, G4))
    good = certificate(listed, large, endorsements(listed, *GUARDIANS))
    first, second, third = good.consents
    other = listed.frozen(2, small)
    stolen = {g: listed.by(g, "endorsement", listed.context(2), freeze.endorsement(other, guardian=g)) for g in (G1, G2, G3)}
    bent = {
        "fewer": msgspec.structs.replace(good, consents=(first, second)),
        "twice": msgspec.structs.replace(good, consents=(first, second, second)),
        "stranger": msgspec.structs.replace(good, consents=(listed.sign("endorsement", listed.context(2), decode(
            decode(first, Signed).body, Endorsement)), second, third)),
        "old": listed.body("certificate", 1, Certificate),
        "other set": certificate(listed, small, stolen),
    }[lie]  # fmt: skip
    show_certificate(listed, bent)
    refuses(listed, G2, "sum-refused")
    said_nothing(listed, G2, 2, "shares")
    show_certificate(listed, good)
    assert listed.step(G2) is None
    assert len(listed.released(2)[G2]) == 1, "the right one still does"


# --- Outcomes --------------------------------------------------------------------------------------------------------------------


def lied_outcome(world, **changes):
    made = msgspec.structs.replace(world.body("outcome", 2, Outcome), **changes)
    world.tell(("outcome", 2, AGGREGATOR), world.sign("outcome", world.context(2), made), 1)


def first_word_up(raw):
    return ((raw[0] + 1) % 256).to_bytes(1, "big") + raw[1:]


def outcome_lies(world):
    true = world.body("outcome", 2, Outcome)
    (first, y), *rest = true.vectors
    yield "another sum", "false-sum", {"total": first_word_up(true.total)}
    yield "a short sum", "outcome-refused", {"total": true.total[:-4]}
    yield "another state", "state-differs", {"next_state": OTHER}
    yield "a hidden key of the missing silo", "sum-refused", {"pair_keys": true.pair_keys[1:]}
    yield "another key of the missing silo", "sum-refused", {"pair_keys": ((*true.pair_keys[0][:2], OTHER), *true.pair_keys[1:])}
    yield "another seed", "sum-refused", {"seeds": ((true.seeds[0][0], OTHER), *true.seeds[1:])}
    yield "another vector", "sum-refused", {"vectors": ((first, first_word_up(y)), *rest)}
    yield "a hidden silo", "outcome-refused", {"seeds": true.seeds[1:], "vectors": true.vectors[1:]}
    yield "another set", "no-consent", {"frozen": OTHER}
    yield "another round", "wrong-round", {"round": 1}
    yield "a void that nobody closed", "sum-refused", {"kind": "void", "total": b"", "seeds": (), "vectors": (), "pair_keys": ()}


@pytest.mark.parametrize("which", range(11))
def test_an_outcome_that_is_not_the_rounds_own_is_refused(over, which):
    name, code, changes = list(outcome_lies(over))[which]
    before = over.whole.progress(1)
    lied_outcome(over, **changes)
    refuses(over, 1, code)
    after = over.whole.progress(1)
    assert (after.round, after.state.digest) == (1, before.state.digest), name
    assert not over.doors[1].said("acknowledgement", 2)
    over.honest_again()
    assert over.step(1).state.digest == over.body("outcome", 2, Outcome).next_state, "the right one still does"


@pytest.mark.parametrize("kind", ["freeze", "certificate"])
@pytest.mark.parametrize("lie", ["missing", "old"])
def test_an_outcome_without_the_set_and_certificate_of_its_round_is_refused(over, kind, lie):
    over.tell((kind, 2, AGGREGATOR), None if lie == "missing" else over.raw(kind, 1), 1)
    refuses(over, 1, f"no-{kind}" if lie == "missing" else "sum-refused")
    assert over.whole.progress(1).round == 1


def test_an_old_outcome_ends_no_round(over):
    over.tell(("outcome", 2, AGGREGATOR), over.raw("outcome", 1), 1)
    refuses(over, 1, "wrong-round")


# --- Closes ----------------------------------------------------------------------------------------------------------------------


def closes(world, *guardians, frozen=b"", round_ctx=None):
    """Words of guardians whose keys the server has."""
    ctx = round_ctx or world.ctx(2)
    return tuple(world.by(g, "close", world.context(2), freeze.close(round_ctx=ctx, guardian=g, frozen=frozen)) for g in guardians)


@pytest.mark.parametrize("lie", ["too few", "one twice", "the server's", "of another round", "void although one signed"])
def test_a_round_is_not_void_by_a_forged_close(over, lie):
    state = over.whole.progress(1).state.digest
    other = freeze.close(round_ctx=over.ctx(2), guardian=G3)
    code, given = {
        "too few": ("sum-refused", closes(over, G1, G2)),
        "one twice": ("sum-refused", closes(over, G1, G2, G2)),
        "the server's": ("sum-refused", (*closes(over, G1, G2), over.sign("close", over.context(2), other))),
        "of another round": ("sum-refused", closes(over, G1, G2, G3, round_ctx=over.ctx(1))),
        "void although one signed": ("outcome-refused", (*closes(over, G1, G2), *closes(over, G3, frozen=OTHER))),
    }[lie]
    lied_outcome(
        over,
        kind="void",
        reason="absent",
        frozen=b"",
        total=b"",
        seeds=(),
        vectors=(),
        pair_keys=(),
        closes=given,
        next_state=state,
    )
    refuses(over, 1, code)
    assert over.whole.progress(1).round == 1


# --- Logs ------------------------------------------------------------------------------------------------------------------------


def test_a_log_with_another_past_stops_a_party_for_good_with_both_heads_in_a_file(world):
    world.cycle((1,))
    leaves = world.whole.store.leaves(0, world.whole.store.log_size())
    bent = [msgspec.structs.replace(leaves[0], time=leaves[0].time + 1), *leaves[1:]]
    OtherLog(world, bent).show(world, 3, 1)
    world.tell(("outcome", 2, AGGREGATOR), void_outcome(world), 1)
    world.step(1)
    error = refuses(world, 1, "log-equivocation", Equivocation)
    kept = list(world.home(1).log_folder.glob("equivocation-*.json"))
    assert [str(path) for path in kept] == [error.facts["file"]]
    assert kept[0].read_text().count("— ") >= 2, "both heads with the aggregator's signature"
    world.honest_again()
    world.crash(1)
    refuses(world, 1, "log-equivocation", Equivocation)


def void_outcome(world):
    """An end of round 2 that holds, by q guardians that work with the server."""
    made = Outcome(
        round_ctx=world.ctx(2), round=2, kind="void", reason="absent", frozen=b"", total=b"", seeds=(), vectors=(),
        next_state=world.whole.progress(1).state.digest, closes=closes(world, G1, G2, G3),
    )  # fmt: skip
    return world.sign("outcome", world.context(2), made)


def test_two_logs_for_two_guardians_reach_no_quorum_and_open_no_round(tmp_path):
    world = World.create(tmp_path / "world")
    while not world.has("checkpoint", 1):
        world.cycle((*FOUR, *GUARDIANS, AGGREGATOR))
    leaves = world.whole.store.leaves(0, world.whole.store.log_size())
    other = OtherLog(world, [*leaves[:-1], msgspec.structs.replace(leaves[-1], time=leaves[-1].time + 1)])
    other.show(world, 1, G1, G2)
    for guardian in GUARDIANS:
        world.step(guardian)
    for _ in range(3):
        world.step(AGGREGATOR)
    assert not world.has("head", 1)
    assert not world.has("manifest", 1)
    assert {len(world.doors[g].said("cosignature", 1)) for g in GUARDIANS} == {1}
    world.close()


# --- Epochs and contract ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """All notes of the first epoch stand; the roster does not."""
    world = World.create(tmp_path_factory.mktemp("noted") / "world")
    world.cycle()
    assert world.whole.store.parties("epoch-note", 1) == FOUR
    world.close()
    return world


starting = copy_of("noted")


def roster_lies(world):
    notes = {s: world.raw("epoch-note", 1, s) for s in FOUR}
    guards = tuple(world.raw("guardian-note", 1, g) for g in GUARDIANS)
    stranger = encode(msgspec.structs.replace(decode(notes[4], Signed), sender=9))
    own_keys = decode(notes[2], Signed)
    swapped = encode(msgspec.structs.replace(own_keys, body=decode(notes[3], Signed).body))
    unsigned = encode(msgspec.structs.replace(own_keys, body=first_word_up(own_keys.body[::-1])[::-1]))
    yield "an invented silo", (*notes.values(), stranger), guards
    yield "another silo's keys", (notes[1], swapped, notes[3], notes[4]), guards
    yield "keys without a signature", (notes[1], unsigned, notes[3], notes[4]), guards
    yield "one note twice", (notes[1], notes[2], notes[2], notes[4]), guards
    yield "fewer than u_min", (notes[1], notes[2]), guards
    yield "fewer guardians than q", tuple(notes.values()), guards[:2]
    yield "a guardian's keys by the server", tuple(notes.values()), (
        encode(msgspec.structs.replace(decode(guards[0], Signed), body=decode(guards[1], Signed).body)), *guards[1:])  # fmt: skip


@pytest.mark.parametrize("which", range(7))
def test_a_roster_that_the_parties_did_not_make_starts_no_epoch(starting, which):
    name, notes, guards = list(roster_lies(starting))[which]
    made = Roster(contract=starting.accepted.digest, epoch=1, notes=notes, guardians=guards)
    starting.tell(("roster", 1, AGGREGATOR), starting.sign("roster", starting.accepted.digest, made))
    for party in (1, G1):
        found = starting.step(party)
        assert isinstance(found, TrustError), name
        assert found.code == ("bad-signature" if "keys" in name else "epoch-refused"), name
        assert not [slot for slot, _ in starting.doors[party].sent if slot[0] in ("pair-seeds", "confirmation")]


def test_ones_own_keys_swapped_for_others_is_equivocation(starting):
    """Two notes of one silo, both signed by it: the server kept one of a copied home."""
    notes = {s: starting.raw("epoch-note", 1, s) for s in FOUR}
    body = decode(notes[1], Signed).body
    other = msgspec.structs.replace(decode(body, EpochNote), instance=b"z" * 16)
    notes[1] = starting.by(1, "epoch-note", starting.accepted.digest, other)
    guards = tuple(starting.raw("guardian-note", 1, g) for g in GUARDIANS)
    made = Roster(contract=starting.accepted.digest, epoch=1, notes=tuple(notes.values()), guardians=guards)
    starting.tell(("roster", 1, AGGREGATOR), starting.sign("roster", starting.accepted.digest, made))
    refuses(starting, 1, "equivocation", Equivocation)


def test_a_lower_quorum_needs_another_contract_and_that_nobody_countersigned(starting):
    raw = starting.accepted.raw.replace(b"corrupt_guardians = 1", b"corrupt_guardians = 0")
    raw = raw[: raw.rindex(b"[[guardian]]")]
    lower = federation.parse(raw)
    assert lower.terms.quorum < starting.terms.quorum
    call = starting.sign("epoch", lower.digest, EpochCall(contract=lower.digest, epoch=2))
    starting.tell(("epoch", 2, AGGREGATOR), call)
    found = starting.step(1)
    assert found.code == "contract-superseded"
    assert not starting.doors[1].said("epoch-note", 2)
    starting.step(G1)
    assert not starting.doors[G1].said("guardian-note", 2)


# --- The control -----------------------------------------------------------------------------------------------------------------


def test_the_same_parties_sum_exactly_when_nobody_lies(world, monkeypatch):
    spy = Spy(monkeypatch)
    world.run(2)
    outcome, frozen = world.body("outcome", 2, Outcome), world.frozen(2)
    assert outcome.total == spy.sum_of(2, frozen.headers.values())
    assert np.frombuffer(outcome.total, "<u4").size == world.terms.dimension


# --- Classes of error in shipped systems: docs/concepts/tour.md ------------------------------------------------------------------

TOUR = Path(__file__).parents[1] / "docs" / "concepts" / "tour.md"
CLASSES = (
    "Seeds folded to 32 bits", "A non-cryptographic generator", "One mask stream for two vectors",
    "A round key that is a constant XOR the round number", "One scalar mask per tensor", "Both shares for a silo, alive *and* dead",
    "Unsigned relayed keys", "The threshold taken from the server's message", "An early drop that kills the round",
    "One secret key for all clients", "Counts and losses in clear", "Bounded float masks", "The identity point as an Ed25519 key",
    "`int()` accepting `１２` and `1_0`", "Non-canonical base64", "Pickle",
)  # fmt: skip


def tour() -> dict[str, list[tuple[str, str]]]:
    """Tests by class, as the page's tables name them."""
    rows = [line.split(" | ") for line in TOUR.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {
        row[0].removeprefix("| "): re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1]) for row in rows if "Class" not in row[0]
    }


def test_every_class_of_error_is_on_the_tour_and_every_test_there_exists():
    rows = tour()
    assert set(CLASSES) <= set(rows)
    for name, tests in rows.items():
        assert tests, f"{name} has no test"
        for file, test in tests:
            source = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
            found = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
            assert test in found, f"{name}: {file} has no {test}"


def masked_zeros(words):
    place = {"round_ctx": os.urandom(32), "silo": 1, "attempt": os.urandom(16)}
    given = {"self_seed": os.urandom(32), "pair_keys": {2: os.urandom(32)}}
    return guardian_sum.mask(np.zeros(words, dtype=np.uint32), **place, **given)


def test_every_number_has_a_mask_word_of_its_own():
    """Masked zeros are the mask: 2¹² words of 2³² hold at most a pair or two of equal ones (four: < 1e-8), a scalar mask 2¹²."""
    y = masked_zeros(2**12)
    assert len(np.unique(y)) > 2**12 - 4
    assert len(np.unique(np.diff(y))) > 2**12 - 5


def test_masks_cover_the_whole_ring():
    """Each of 256 slices of the ring is hit by 2¹⁴ words (missed: 256·e⁻⁶⁴), and so is each value of the low byte."""
    y = masked_zeros(2**14)
    assert len(np.unique(y >> 24)) == len(np.unique(y & 255)) == 256


@pytest.mark.parametrize("spelling", ["１２", "1_0", "٣", "+7", " 7", "07", "7\n", "0x7", "1e3"])
def test_numbers_have_one_spelling_in_notes_and_file_names(tmp_path, spelling):
    with pytest.raises(TrustError):
        notes.decimal(spelling)
    home = Home.create(tmp_path / "home")
    home.promise_manifest(3, OTHER)
    vows = Vows(home)
    if "\n" not in spelling and spelling != "07":  # zeros in front: of names that a party writes itself, and sorts as numbers
        for name in (f"manifest-{spelling}", f"guardian-manifest-{spelling}"):
            (home.root / "promises" / name).write_bytes(OTHER.hex().encode() + b"\n")
    assert home.promised_rounds() == [3]
    assert vows.latest == 0
