# SPDX-License-Identifier: Apache-2.0
"""Admission: every document in its place is let in, and every misplaced, altered or late one is refused with its reason."""

from __future__ import annotations

import os

import msgspec
import pytest

from aggregator import admission, rounds, sizes
from privacy import envelope
from privacy.errors import Replay, RoundError, TrustError
from privacy.messages import (
    AGGREGATOR_KINDS,
    Acknowledgement,
    Confirmation,
    Consent,
    Countersignature,
    Header,
    PairSeeds,
    Release,
    Signed,
    Upload,
    decode,
    encode,
)
from privacy.secure_sum import epoch as epochs
from tests.federation import HUB, Federation, signed_by_hub, silo_identity, upload_of

MEMBER_KINDS = ("countersignature", "epoch-note", "pair-seeds", "confirmation", "upload", "consent", "release", "acknowledgement")


@pytest.fixture
def federation(tmp_path):
    made = Federation(tmp_path)
    yield made
    made.store.close()


def admit(federation, kind, number, party, data):
    admission.admit(kind, number, party, data, federation.store)


def stalled(federation, kind):
    """The one document that is missing: silo 2's ``kind``, for number 1."""
    federation.stall(1, kind, 2)
    return federation.silos[1].held[kind, 1]


def context_of(federation, kind):
    if kind in ("countersignature", "epoch-note"):
        return federation.accepted.digest
    return rounds.epoch_in(federation.store, federation.accepted, 1).context


def signed(federation, kind, message, *, by=2, sender=2, context=None, type=None):
    body = message if isinstance(message, bytes) else encode(message)
    where = context or context_of(federation, kind)
    return envelope.sign(silo_identity(by), type=type or kind, context=where, sender=sender, body=body)


def body_of(data):
    return decode(data, Signed).body


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_the_right_document_is_admitted_and_every_wrong_envelope_is_refused(federation, kind):
    right = stalled(federation, kind)
    admit(federation, kind, 1, 2, right)
    wrong = {
        "bad-signature": right[:-1] + bytes([right[-1] ^ 1]),
        "malformed": right + b"\0",
        "wrong-type": signed(federation, kind, body_of(right), type="consent" if kind != "consent" else "release"),
        "wrong-context": signed(federation, kind, body_of(right), context=bytes(32)),
        "wrong-sender": signed(federation, kind, body_of(right), sender=3),
    }
    for code, data in wrong.items():
        refused(federation, kind, data, code)
    refused(federation, kind, signed(federation, kind, body_of(right), by=3), "bad-signature")
    with pytest.raises(TrustError):
        admit(federation, kind, 1, 3, right)  # another member's slot
    for number in (2, 0, 2**32 - 1):
        with pytest.raises((TrustError, RoundError)):
            admit(federation, kind, number, 2, right)
    with pytest.raises(TrustError, match="at most"):
        admit(federation, kind, 1, 2, right + bytes(sizes.cap(kind, federation.accepted)))
    with pytest.raises(TrustError) as caught:
        admit(federation, kind, 1, 4, right)
    assert caught.value.code == "unknown-member"


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_every_bit_of_a_document_counts(federation, kind):
    right = stalled(federation, kind)
    for position in range(0, len(right), max(1, len(right) // 40)):
        changed = right[:position] + bytes([right[position] ^ 0x10]) + right[position + 1 :]
        with pytest.raises(TrustError):
            admit(federation, kind, 1, 2, changed)


@pytest.mark.parametrize("kind", sorted(AGGREGATOR_KINDS))
def test_nobody_writes_the_aggregators_kinds_over_this_door(federation, kind):
    right = signed_by_hub(kind, federation.accepted.digest, b"")
    for party in (0, 1):
        with pytest.raises(TrustError) as caught:
            admit(federation, kind, 1, party, right)
        assert caught.value.code == "not-yours"
    with pytest.raises(TrustError, match="not taken"):
        sizes.cap(kind, federation.accepted)


def test_party_0_writes_no_members_kind(federation):
    raw = envelope.sign(HUB, type="countersignature", context=federation.accepted.digest, sender=0, body=b"")
    with pytest.raises(TrustError) as caught:
        admit(federation, "countersignature", 1, 0, raw)
    assert caught.value.code == "not-yours"


def refused(federation, kind, message, code, *, number=1, error=TrustError):
    data = message if isinstance(message, bytes) else signed(federation, kind, message)
    with pytest.raises(error) as caught:
        admit(federation, kind, number, 2, data)
    assert caught.value.code == code, caught.value.message
    assert caught.value.hint


def test_a_countersignature_is_of_this_contract_and_member(federation):
    digest = federation.accepted.digest
    refused(federation, "countersignature", Countersignature(contract=bytes(32), member=2), "wrong-contract")
    refused(federation, "countersignature", Countersignature(contract=digest, member=3), "wrong-silo")
    right = Countersignature(contract=digest, member=2)
    refused(federation, "countersignature", right, "wrong-contract-version", number=2)


def test_an_epoch_note_is_for_the_latest_called_epoch_with_fit_keys(federation):
    note = epochs.new_note(federation.accepted.digest, 1, 2, bytes(32))[1]
    refused(federation, "epoch-note", note, "not-open", error=RoundError)
    federation.ready()
    refused(federation, "epoch-note", note, "replay", error=Replay)  # its roster stands
    call = signed_by_hub("epoch", federation.accepted.digest, encode_call(federation, 2))
    federation.store.put_once("epoch", 2, 0, call, received_at=0)
    refused(federation, "epoch-note", note, "replay", error=Replay)  # the latest is 2
    refused(federation, "epoch-note", note, "wrong-epoch", number=2)
    fields = {name: getattr(note, name) for name in note.__struct_fields__} | {"epoch": 2}
    refused(federation, "epoch-note", type(note)(**{**fields, "contract": bytes(32)}), "wrong-contract", number=2)
    refused(federation, "epoch-note", type(note)(**{**fields, "dh_key": bytes(32)}), "weak-key", number=2)
    refused(federation, "epoch-note", type(note)(**{**fields, "seed_key": b"\xff" * 1216}), "weak-key", number=2)
    admit(federation, "epoch-note", 2, 2, signed(federation, "epoch-note", type(note)(**fields)))


def encode_call(federation, number):
    return rounds.call(federation.accepted, number)


def test_pair_seeds_and_confirmations_name_all_peers_and_come_in_order(federation):
    right = decode(body_of(stalled(federation, "pair-seeds")), PairSeeds)
    tag = Confirmation(epoch=1, silo=2, tags=((1, bytes(32)), (3, bytes(32))))
    refused(federation, "confirmation", tag, "too-early", error=RoundError)
    refused(federation, "pair-seeds", PairSeeds(epoch=2, silo=2, sealed=right.sealed), "wrong-epoch")
    refused(federation, "pair-seeds", PairSeeds(epoch=1, silo=2, sealed=right.sealed[:1]), "wrong-peers")
    refused(federation, "pair-seeds", PairSeeds(epoch=1, silo=2, sealed=right.sealed[::-1]), "wrong-peers")
    short = tuple((peer, sealed[:-1]) for peer, sealed in right.sealed)
    refused(federation, "pair-seeds", PairSeeds(epoch=1, silo=2, sealed=short), "wrong-sizes")
    refused(federation, "pair-seeds", PairSeeds(epoch=1, silo=3, sealed=right.sealed), "wrong-sender")


def test_a_confirmation_names_all_peers(federation):
    stalled(federation, "confirmation")
    tags = ((1, bytes(32)), (3, bytes(32)))
    refused(federation, "confirmation", Confirmation(epoch=1, silo=2, tags=tags[:1]), "wrong-peers")
    refused(federation, "confirmation", Confirmation(epoch=9, silo=2, tags=tags), "wrong-epoch")


def test_pair_seeds_before_the_roster_are_too_early(federation):
    stalled(federation, "epoch-note")
    seeds = PairSeeds(epoch=1, silo=2, sealed=())
    raw = signed(federation, "pair-seeds", seeds, context=bytes(32))
    refused(federation, "pair-seeds", raw, "too-early", error=RoundError)


def test_an_upload_is_of_this_round_dimension_and_silo_and_constant_size(federation):
    upload = upload_of(stalled(federation, "upload"))
    for change in ({"round_ctx": bytes(32)}, {"dimension": 5}, {"silo": 3}, {"pair_commitments": ()}):
        header = decode(body_of(upload.header), Header)
        fields = {name: getattr(header, name) for name in header.__struct_fields__} | change
        forged = signed(federation, "upload", Header(**fields), type="header")
        refused(
            federation,
            "upload",
            Upload(header=forged, sealed=upload.sealed),
            "wrong-sender" if "silo" in change else "sum-refused",
        )
    refused(federation, "upload", Upload(header=upload.header, sealed=upload.sealed[:-1]), "wrong-sealed-size")
    refused(federation, "upload", Upload(header=upload.header, sealed=upload.sealed + b"x"), "wrong-sealed-size")


def test_a_valid_header_with_other_sealed_bytes_fills_no_slot(federation):
    """What a man in the middle can make of a silo's upload, or another member of its header in the freeze."""
    right = stalled(federation, "upload")
    document, upload = decode(right, Signed), upload_of(right)
    others = [os.urandom(len(upload.sealed)), upload.sealed[:-1] + bytes([upload.sealed[-1] ^ 1])]
    for garbage in (Upload(header=upload.header, sealed=sealed) for sealed in others):
        by_nobody = {
            "malformed": encode(garbage),
            "bad-signature": encode(msgspec.structs.replace(document, body=encode(garbage))),
            "wrong-type": encode(msgspec.structs.replace(decode(upload.header, Signed), body=encode(garbage))),
        }
        by_another = {
            "wrong-sender": signed(federation, "upload", garbage, by=3, sender=3),
            "bad-signature": signed(federation, "upload", garbage, by=3, sender=2),
        }
        for code, data in [*by_nobody.items(), *by_another.items()]:
            with pytest.raises(TrustError) as caught:
                federation.board.put("upload", 1, 2, data)
            assert caught.value.code == code
            assert federation.store.parties("upload", 1) == (1, 3), "the slot stays free"
    assert federation.board.put("upload", 1, 2, right) == "created"
    assert federation.coordinator().run_round(1).kind == "result"


def test_a_members_own_upload_with_anothers_header_is_refused(federation):
    upload = upload_of(stalled(federation, "upload"))
    other = upload_of(federation.silos[2].sent["upload", 1])
    refused(federation, "upload", Upload(header=other.header, sealed=upload.sealed), "wrong-sender")


def test_consent_and_release_are_for_the_frozen_set_and_in_order(federation):
    federation.ready()
    opened = federation.stall(1, "upload", 2)
    consent = Consent(round_ctx=opened.ctx, silo=2, frozen=bytes(32))
    release = Release(round_ctx=opened.ctx, silo=2, frozen=bytes(32), sealed=os.urandom(1168))
    refused(federation, "consent", consent, "too-early", error=RoundError)
    refused(federation, "release", release, "too-early", error=RoundError)
    federation.stall(1, "consent", 2)
    refused(federation, "consent", consent, "wrong-set")
    refused(federation, "consent", Consent(round_ctx=bytes(32), silo=2, frozen=bytes(32)), "wrong-round")
    refused(federation, "release", release, "too-early", error=RoundError)
    federation.stall(1, "release", 2)
    refused(federation, "release", release, "wrong-set")
    frozen = federation.silos[1].consented
    refused(federation, "release", Release(round_ctx=opened.ctx, silo=2, frozen=frozen, sealed=bytes(1169)), "wrong-sealed-size")


def test_nothing_enters_a_settled_round_and_no_upload_after_the_freeze(federation):
    federation.ready()
    federation.stall(1, "consent", 2)
    upload = federation.silos[1].sent["upload", 1]
    refused(federation, "upload", upload, "replay", error=Replay)
    federation.coordinator().run_round(1)
    for kind in ("upload", "consent", "release"):
        refused(federation, kind, federation.silos[1].sent[kind, 1], "replay", error=Replay)
    refused(federation, "consent", federation.silos[1].sent["consent", 1], "not-open", number=2, error=RoundError)


def test_an_acknowledgement_waits_for_the_outcome_and_may_differ_in_the_state_only(federation):
    federation.ready()
    opened = federation.stall(1, "release", 2)
    early = Acknowledgement(round_ctx=opened.ctx, silo=2, outcome=bytes(32), state=bytes(32))
    refused(federation, "acknowledgement", early, "too-early", error=RoundError)
    federation.stall(1, "acknowledgement", 2)
    refused(federation, "acknowledgement", early, "wrong-outcome")
    federation.silos[1].step()
    right = decode(body_of(federation.silos[1].sent["acknowledgement", 1]), Acknowledgement)
    differing = Acknowledgement(round_ctx=opened.ctx, silo=2, outcome=right.outcome, state=bytes(32))
    admit(federation, "acknowledgement", 1, 2, signed(federation, "acknowledgement", differing))
    other = Acknowledgement(round_ctx=bytes(32), silo=2, outcome=right.outcome, state=right.state)
    refused(federation, "acknowledgement", other, "wrong-round")


def test_caps_leave_room_for_the_real_documents_and_little_more(federation):
    federation.ready().run_round(1)
    for silo in federation.silos:
        for (kind, _), data in silo.sent.items():
            cap = sizes.cap(kind, federation.accepted)
            assert len(data) <= cap <= len(data) + 1200, kind
