# SPDX-License-Identifier: Apache-2.0
"""identity.signatures: two halves over the same bytes, both of which must verify; and what becomes of one without the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from privacy import envelope
from privacy.errors import ConfigError, TrustError
from privacy.identity import keys, signatures
from privacy.messages import Countersignature, Signed, decode, encode
from tests.whole import SILOS, Whole

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "wycheproof" / "mldsa_65_verify_test.json"
ALICE = keys.Identity(name="alice", sign_seed=b"a" * 32, ml_dsa_seed=b"A" * 32)
BOB = keys.Identity(name="bob", sign_seed=b"b" * 32, ml_dsa_seed=b"B" * 32)
HYBRID = keys.HYBRID


def signed(identity=ALICE, data=b"data"):
    return identity.under(HYBRID).sign(data)


def test_verify_signature_takes_exactly_both_halves() -> None:
    key, signature = ALICE.public.verify_key, signed()
    assert (len(key), len(signature)) == (1984, 3373)
    assert signatures.signature_bytes(HYBRID) == 3373
    keys.verify_signature(key, b"data", signature)
    keys.verify_signature(key[:32], b"data", ALICE.sign(b"data"))
    other = signed(data=b"other")
    bobs = signed(BOB)
    wrong = {
        "stripped to Ed25519": signature[:64], "the ML-DSA half alone": signature[64:], "nothing": b"",
        "a byte more": signature + b"\0", "a byte less": signature[:-1],
        "the halves the other way round": signature[64:] + signature[:64],
        "right Ed25519, ML-DSA of another document": signature[:64] + other[64:],
        "right ML-DSA, Ed25519 of another document": other[:64] + signature[64:],
        "right Ed25519, ML-DSA of another identity": signature[:64] + bobs[64:],
        "right ML-DSA, Ed25519 of another identity": bobs[:64] + signature[64:],
        "right Ed25519, zeros": signature[:64] + bytes(3309), "zeros, right ML-DSA": bytes(64) + signature[64:],
    }  # fmt: skip
    for what, bad in wrong.items():
        with pytest.raises(TrustError) as caught:
            keys.verify_signature(key, b"data", bad)
        assert caught.value.code == "bad-signature", what


def test_a_key_of_one_suite_takes_no_signature_of_the_other() -> None:
    for key, signature in ((ALICE.public.verify_key, ALICE.sign(b"data")), (ALICE.public.sign_key, signed())):
        with pytest.raises(TrustError, match="not by key"):
            keys.verify_signature(key, b"data", signature)


def test_every_half_of_a_key_counts() -> None:
    mixed = ALICE.public.sign_key + BOB.public.ml_dsa_key
    for key in (mixed, BOB.public.sign_key + ALICE.public.ml_dsa_key):
        with pytest.raises(TrustError, match="not by key"):
            keys.verify_signature(key, b"data", signed())
    for size in (0, 31, 33, 1952, 1983, 1985):
        with pytest.raises(TrustError, match="32 or 1984 bytes"):
            keys.verify_signature(ALICE.public.verify_key[:size].ljust(size, b"\0"), b"data", signed())
    with pytest.raises(TrustError, match="prime order"):  # the identity point, before a good ML-DSA key
        keys.verify_signature(b"\1" + bytes(31) + ALICE.public.ml_dsa_key, b"data", b"\1" + bytes(63) + signed()[64:])


def test_flipped_bits_of_either_half_are_refused() -> None:
    key, signature = ALICE.public.verify_key, signed()
    for place in [*range(0, 64, 5), *range(64, 3373, 97), 3372]:
        changed = bytearray(signature)
        changed[place] ^= 1 << place % 8
        with pytest.raises(TrustError):
            keys.verify_signature(key, b"data", bytes(changed))


@pytest.mark.skipif(not VECTORS.is_file(), reason="../shared/vectors/wycheproof is not beside the project")
def test_agrees_with_wycheproof_on_ml_dsa_65() -> None:
    """Through our entry point: an Ed25519 half that verifies stands before each. Vectors with a context are none of ours."""
    seen = {"valid": 0, "invalid": 0}
    for group in json.loads(VECTORS.read_text())["testGroups"]:
        key = ALICE.public.sign_key + bytes.fromhex(group["publicKey"])
        for case in group["tests"]:
            if case.get("ctx"):
                continue
            message = bytes.fromhex(case["msg"])
            try:
                keys.verify_signature(key, message, ALICE.sign(message) + bytes.fromhex(case["sig"]))
                verdict = "valid"
            except TrustError:
                verdict = "invalid"
            assert verdict == case["result"], case["comment"]
            seen[verdict] += 1
    assert min(seen.values()) > 10


# --- Identities and documents ---------------------------------------------------------------------------------------------


def test_an_identity_signs_with_exactly_the_suite_it_is_under(tmp_path) -> None:
    made = keys.create(tmp_path / "a.key", name="a", receives=False)
    assert len(made.sign(b"x")) == 64
    assert len(made.under(HYBRID).sign(b"x")) == 3373
    assert len(made.under(HYBRID).under(keys.ED25519).sign(b"x")) == 64
    assert keys.load(tmp_path / "a.key") == made
    assert f'ml_dsa_seed = "{made.ml_dsa_seed.hex()}"' in (tmp_path / "a.key").read_text()
    assert made.ml_dsa_seed.hex() not in repr(made)


def test_an_identity_without_a_second_seed_still_loads_and_cannot_join_the_second_suite(tmp_path) -> None:
    old = keys.Identity(name="a", sign_seed=bytes(32))
    keys.save(tmp_path / "a.key", old)
    assert "ml_dsa" not in (tmp_path / "a.key").read_text()
    loaded = keys.load(tmp_path / "a.key")
    assert loaded == old
    for identity in (loaded, loaded.public):
        assert identity.under(keys.ED25519)
        with pytest.raises(ConfigError, match="a has no ML-DSA-65 key") as caught:
            identity.under(HYBRID)
        assert caught.value.code == "no-ml-dsa"


def test_an_identity_pub_proves_possession_of_both_keys(tmp_path) -> None:
    keys.write_public(tmp_path / "a.pub", ALICE, "North Hospital")
    raw = (tmp_path / "a.pub").read_bytes()
    assert keys.read_public(raw).verify_key == ALICE.public.verify_key
    keys.write_public(tmp_path / "a.pub", ALICE, "North Hospital")
    assert (tmp_path / "a.pub").read_bytes() == raw, "what was sent to the coordinator stays the same file"
    lines = raw.splitlines(keepends=True)
    signature = bytes.fromhex(lines[-1].split(b'"')[1].decode())
    without = b"".join(line for line in lines[:-1] if not line.startswith(b"ml_dsa_key"))
    of_bob = b"".join(lines[:-1]).replace(ALICE.public.ml_dsa_key.hex().encode(), BOB.public.ml_dsa_key.hex().encode())
    signing = keys.signing_input(type="identity", context=keys.NO_CONTEXT, sender=0, body=of_bob)
    for body, sent in (
        (b"".join(lines[:-1]), signature[:64]),  # the signature stripped
        (without, signature[:64]),  # key and signature stripped
        (of_bob, ALICE.sign(signing) + signature[64:]),  # a key that its sender does not hold
    ):
        with pytest.raises(TrustError, match="not by key"):
            keys.read_public(body + b'signature = "' + sent.hex().encode() + b'"\n')


def test_the_fingerprint_covers_both_keys() -> None:
    both, one = ALICE.public, ALICE.public.under(keys.ED25519)
    mixed = keys.PublicIdentity(name="alice", sign_key=both.sign_key, ml_dsa_key=BOB.public.ml_dsa_key)
    moved = keys.PublicIdentity(name="alice", sign_key=both.sign_key, seal_key=both.ml_dsa_key)
    assert len({keys.fingerprint(each) for each in (both, one, mixed, moved)}) == 4


def test_a_documents_halves_cannot_be_stripped_or_swapped() -> None:
    def document(context):
        body = encode(Countersignature(contract=context, member=1))
        return envelope.sign(ALICE.under(HYBRID), type="countersignature", context=context, sender=1, body=body)

    here, there = bytes(32), b"\1" * 32
    raw, other = decode(document(here), Signed), decode(document(there), Signed)
    place = {"type": "countersignature", "context": here, "sender": 1, "key": ALICE.public.verify_key}
    assert envelope.open_signed(encode(raw), **place) == raw.body
    for signature in (raw.signature[:64], raw.signature[:64] + other.signature[64:], other.signature[:64] + raw.signature[64:]):
        forged = Signed(version="gsum/1", type=raw.type, sender=raw.sender, context=raw.context, body=raw.body, signature=signature)
        with pytest.raises(TrustError):
            envelope.open_signed(encode(forged), **place)


# --- A federation ---------------------------------------------------------------------------------------------------------


def test_a_whole_federation_signs_with_both(tmp_path) -> None:
    whole = Whole.create(tmp_path / "whole", signatures=HYBRID)
    settled, closed = whole.run(2)
    assert [each.kind for each in closed] == ["result", "result"]
    assert {each.state.digest for rounds in settled.values() for each in rounds[-1:]} == {closed[-1].state}
    seen = {}
    for (kind, _, party), data in whole.store.log:
        if kind in ("checkpoint", "cosignature", "head"):
            continue  # signed notes of the log are Ed25519 (ADR 0011)
        document = decode(data, Signed)
        assert len(document.signature) == 3373, kind
        terms = whole.accepted.terms
        key = terms.aggregator.verify_key if party == 0 else terms.by_id(party).verify_key
        envelope.open_signed(data, type=kind, context=document.context, sender=party, key=key)
        seen[kind] = seen.get(kind, 0) + 1
    assert {"contract", "countersignature", "epoch", "roster", "manifest", "upload", "consent", "outcome"} <= set(seen)


def test_the_board_refuses_a_stripped_document_and_takes_the_same_statement_again(tmp_path) -> None:
    whole = Whole.create(tmp_path / "whole", signatures=HYBRID)
    stands = whole.board.get("countersignature", 1, SILOS[0])
    document = decode(stands, Signed)
    identity = keys.load(tmp_path / "whole" / "silo-1" / "identity.key")
    place = {"type": "countersignature", "context": whole.accepted.digest, "sender": 1, "body": document.body}
    again = envelope.sign(identity.under(HYBRID), **place)
    assert again != stands
    assert whole.board.put("countersignature", 1, 1, again) == "same"
    assert whole.board.get("countersignature", 1, 1) == stands
    other = encode(Countersignature(contract=whole.accepted.digest, member=2))
    for signed_as in (identity, identity.under(HYBRID)):
        with pytest.raises(TrustError):
            whole.board.put("countersignature", 1, 1, envelope.sign(signed_as, **{**place, "body": other}))
