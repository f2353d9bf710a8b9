# SPDX-License-Identifier: Apache-2.0
"""privacy.envelope: what may be opened, and every way in which it may not."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives import hpke
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Member
from privacy.identity import keys
from privacy.messages import Consent, Signed, decode, encode

ALICE = keys.Identity(name="alice", sign_seed=b"a" * 32, receive_seed=b"A" * 32)
BOB = keys.Identity(name="bob", sign_seed=b"b" * 32, receive_seed=b"B" * 32)
ONE, TWO = b"\1" * 32, b"\2" * 32
PLACE = {"type": "header", "context": ONE, "sender": 1}
RAW = envelope.sign(ALICE, type="header", context=ONE, sender=1, body=b"the body")
HPKE = Path(cryptography_vectors.__file__).parent / "HPKE" / "hpke-pq-test-vectors.json"


def opened(raw: bytes = RAW, **changes) -> bytes:
    return envelope.open_signed(raw, **{**PLACE, "key": ALICE.public.sign_key, **changes})


# --- signed -----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100), st.integers(min_value=0, max_value=65535))
@settings(max_examples=30, deadline=None)
def test_what_was_signed_opens(body: bytes, sender: int) -> None:
    raw = envelope.sign(ALICE, type="consent", context=TWO, sender=sender, body=body)
    assert opened(raw, type="consent", context=TWO, sender=sender) == body


def test_signing_is_deterministic() -> None:
    assert envelope.sign(ALICE, type="header", context=ONE, sender=1, body=b"the body") == RAW


@pytest.mark.parametrize(("change", "message"), [
    ({"type": "consent"}, "type header where type consent"), ({"context": TWO}, "context 0101.* where context 0202"),
    ({"sender": 2}, "sender 1 where sender 2"), ({"key": BOB.public.sign_key}, "not by key"),
    ({"key": b"\1" + bytes(31)}, "prime order"),
])  # fmt: skip
def test_another_place_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(TrustError, match=message):
        opened(**change)


@pytest.mark.parametrize(("field", "value"), [
    ("type", "consent"), ("context", TWO), ("sender", 2), ("body", b"The body"), ("signature", bytes(64)),
])  # fmt: skip
def test_a_rewritten_field_does_not_verify_where_it_claims_to_belong(field: str, value: object) -> None:
    document = decode(RAW, Signed)
    fields = {name: getattr(document, name) for name in Signed.__struct_fields__}
    forged = encode(Signed(**{**fields, field: value}))
    place = {field: value} if field in PLACE else {}
    with pytest.raises(TrustError, match="not by key"):
        opened(forged, **place)


def test_every_flipped_bit_is_refused() -> None:
    for bit in range(len(RAW) * 8):
        changed = bytearray(RAW)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TrustError):
            opened(bytes(changed))


@pytest.mark.parametrize("raw", [b"", RAW[:-1], RAW + b"\0", RAW + RAW, b"\x96" + bytes(40)])
def test_cut_or_longer_bytes_are_malformed(raw: bytes) -> None:
    with pytest.raises(TrustError, match="malformed signed"):
        opened(raw)


def test_types_contexts_and_senders_are_separate_domains() -> None:
    made = {
        keys.signing_input(type=type, context=context, sender=sender, body=body)
        for type, context, sender, body in product(("header", "consent", "release"), (ONE, TWO), (1, 2), (b"", b"x"))
    }
    assert len(made) == 24


def member(identity: keys.Identity, silo: int) -> Member:
    return Member(id=silo, name=identity.name, organisation="H", sign_key=identity.public.sign_key.hex())


def test_a_member_cannot_speak_for_another() -> None:
    body = encode(Consent(round_ctx=ONE, silo=2, frozen=TWO))
    raw = envelope.sign(ALICE, type="consent", context=ONE, sender=1, body=body)
    with pytest.raises(TrustError, match="consent of silo 1 says it is of silo 2"):
        envelope.open_member(raw, Consent, type="consent", context=ONE, member=member(ALICE, 1))
    honest = envelope.sign(ALICE, type="consent", context=ONE, sender=2, body=body)
    assert envelope.open_member(honest, Consent, type="consent", context=ONE, member=member(ALICE, 2)).frozen == TWO


def test_a_member_with_two_ids_signs_for_one_at_a_time() -> None:
    with pytest.raises(TrustError, match="sender 1 where sender 2"):
        envelope.open_member(RAW, Consent, type="header", context=ONE, member=member(ALICE, 2))


# --- sealed -----------------------------------------------------------------------------------------------------------

SEALED = envelope.seal(BOB.public.seal_key, b"secret", info=b"gsum/1 release\0place")


@given(st.binary(max_size=200), st.binary(max_size=80))
@settings(max_examples=20, deadline=None)
def test_what_was_sealed_opens(plaintext: bytes, info: bytes) -> None:
    sealed = envelope.seal(BOB.public.seal_key, plaintext, info=info)
    assert len(sealed) == len(plaintext) + envelope.OVERHEAD_BYTES
    assert envelope.open_sealed(BOB.receive_seed, sealed, info=info) == plaintext


def test_sealing_twice_shows_no_equality() -> None:
    again = envelope.seal(BOB.public.seal_key, b"secret", info=b"gsum/1 release\0place")
    assert again[:1120] != SEALED[:1120]
    assert again[1120:] != SEALED[1120:]


def test_every_failure_to_open_is_one_message() -> None:
    info = b"gsum/1 release\0place"
    places = (0, 1087, 1088, 1119, 1120, len(SEALED) - 1)
    flipped = [bytes(byte ^ (index == place) for index, byte in enumerate(SEALED)) for place in places]
    tries = [(BOB.receive_seed, raw, info) for raw in (*flipped, b"", SEALED[:10], SEALED[:-1], SEALED + b"\0")]
    tries += [(ALICE.receive_seed, SEALED, info)]
    tries += [(BOB.receive_seed, SEALED, other) for other in (info + b"x", b"gsum/1 release\0")]
    messages = set()
    for seed, raw, place in tries:
        with pytest.raises(TrustError) as caught:
            envelope.open_sealed(seed, raw, info=place)
        messages.add((caught.value.message, caught.value.hint))
        assert caught.value.__cause__ is None
        assert seed.hex() not in str(caught.value.as_json())
    assert len(messages) == 1


def test_a_low_order_half_in_the_ciphertext_does_not_open() -> None:
    with pytest.raises(TrustError, match="does not open"):
        envelope.open_sealed(BOB.receive_seed, SEALED[:1088] + bytes(32) + SEALED[1120:], info=b"gsum/1 release\0place")


def test_an_unfit_key_is_not_sealed_to() -> None:
    with pytest.raises(TrustError, match="X25519"):
        envelope.seal(BOB.public.seal_key[:1184] + bytes(32), b"x", info=b"")


def test_the_suite_is_the_one_of_rfc_9180_and_x_wing() -> None:
    """Any RFC 9180 implementation opens what we seal; the vectors pin the KEM and key schedule that both suites share."""
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    assert suite.decrypt(SEALED, keys.load_seal_seed(BOB.receive_seed), b"gsum/1 release\0place") == b"secret"
    (vector,) = [v for v in json.loads(HPKE.read_text()) if (v["kem_id"], v["kdf_id"], v["mode"]) == (0x647A, 1, 0)]
    assert len(bytes.fromhex(vector["enc"])) + 16 == envelope.OVERHEAD_BYTES
