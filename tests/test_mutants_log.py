# SPDX-License-Identifier: Apache-2.0
"""Checks of the log whose absence no other test noticed (tests.mutation found them), each with the input only it refuses."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import federation
from privacy.chain import Lineage
from privacy.errors import TrustError
from privacy.messages import encode
from privacy.transparency import log, notes, proofs, tree
from privacy.transparency.notes import COSIGNATURE, ED25519, Checkpoint, Line, Note, VerifierKey
from tests.terms import contract_bytes, public, seed
from tests.test_chain import SILOS, contract

LEAVES = [proofs.leaf_hash(bytes([index])) for index in range(4)]
FIRST, SECOND, BOTH = LEAVES[0], LEAVES[1], proofs.node_hash(LEAVES[0], LEAVES[1])
TERMS = federation.parse(contract_bytes(3, aggregator_key=public(100))).terms
KEY = Ed25519PrivateKey.from_private_bytes(seed(100)).public_key().public_bytes_raw()


def refused(*words: object, match: str | None = None) -> None:
    with pytest.raises(TrustError, match=match):
        proofs.verify_consistency(*words)


# --- proofs --------------------------------------------------------------------------------------------------------------


def test_a_log_that_says_it_grew_under_the_same_root_is_refused() -> None:
    """Two leaves, then "four" with the same root: the shortest proof of all is an empty one."""
    refused(2, BOTH, 4, BOTH, (), match="too short")
    refused(1, FIRST, 2, FIRST, (), match="too short")


def test_an_empty_proof_of_growth_is_refused() -> None:
    refused(3, proofs.root_of_hashes(LEAVES[:3]), 4, proofs.root_of_hashes(LEAVES), (), match="empty proof")


def test_a_log_that_shrinks_is_refused_even_under_the_same_root() -> None:
    refused(4, BOTH, 2, BOTH, (), match="cannot shrink")
    refused(-1, BOTH, 2, BOTH, (), match="cannot shrink")


def test_a_proof_with_hashes_to_spare_is_refused_as_too_long() -> None:
    refused(2, BOTH, 4, proofs.root_of_hashes(LEAVES), (proofs.node_hash(LEAVES[2], LEAVES[3]), FIRST), match="too long")


def test_the_tree_of_no_leaves_has_one_root() -> None:
    proofs.verify_consistency(0, proofs.EMPTY_ROOT, 0, proofs.EMPTY_ROOT, ())
    refused(0, proofs.EMPTY_ROOT, 0, BOTH, ())


def test_hashes_cut_at_another_place_are_refused() -> None:
    """31 bytes and 33 bytes hash to the same node as 32 and 32."""
    short, long = (FIRST + SECOND)[:31], (FIRST + SECOND)[31:]
    assert proofs.node_hash(short, long) == BOTH
    proofs.verify_inclusion(FIRST, 0, 2, [SECOND], BOTH)
    with pytest.raises(TrustError, match="has 32 bytes, got 31"):
        proofs.verify_inclusion(short, 0, 2, [long], BOTH)
    proofs.verify_consistency(1, FIRST, 2, BOTH, [SECOND])
    refused(1, short, 2, BOTH, [long], match="has 32 bytes, got 31")


# --- notes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    {"name": ""}, {"name": "a b"}, {"name": "a+b"}, {"key": KEY[:31]}, {"key": KEY + b"\0"}, {"type": 2}, {"type": 0},
])  # fmt: skip
def test_what_is_no_verifier_key_is_not_made(change: dict) -> None:
    with pytest.raises(TrustError, match="no verifier key"):
        VerifierKey(**{"name": "a", "key": KEY, "type": ED25519, **change})


def test_a_checkpoint_ends_with_its_third_line() -> None:
    text = Checkpoint(origin="o", size=1, root=FIRST).text
    assert notes.checkpoint(text).size == 1
    with pytest.raises(TrustError, match="an origin, a size and a root"):
        notes.checkpoint(text + "more")


@pytest.mark.parametrize("time", [0, 2**63, 2**64 - 1])
def test_a_cosignature_of_no_time_counts_for_nothing_however_well_signed(time: int) -> None:
    """The other side of ``cosigned``: 64 right bytes after a time that the format does not have."""
    text, key = Checkpoint(origin="o", size=1, root=FIRST).text, VerifierKey(name="w", key=KEY, type=COSIGNATURE)
    private = Ed25519PrivateKey.from_private_bytes(seed(100))

    def note(at: int) -> Note:
        signature = at.to_bytes(8, "big") + private.sign(f"cosignature/v1\ntime {at}\n{text}".encode())
        return Note(text=text, lines=(Line(name="w", key_id=key.id, signature=signature),))

    assert notes.verified(note(1), [key]) == (key,)
    with pytest.raises(TrustError, match=f"time {time}"):
        notes.verified(note(time), [key])


@pytest.mark.parametrize(("kind", "size", "words"), [
    (ED25519, 63, "has 63 bytes, an Ed25519"), (ED25519, 65, "has 65 bytes, an Ed25519"),
    (COSIGNATURE, 71, "has 71 bytes and time"), (COSIGNATURE, 73, "has 73 bytes and time"),
])  # fmt: skip
def test_a_signature_of_another_length_is_told_so(kind: int, size: int, words: str) -> None:
    key = VerifierKey(name="w", key=KEY, type=kind)
    note = Note(text="text\n", lines=(Line(name="w", key_id=key.id, signature=bytes(7) + b"\1" * (size - 7)),))
    with pytest.raises(TrustError, match=words):
        notes.verified(note, [key])


def test_a_text_that_would_read_back_as_another_note_is_not_signed() -> None:
    """A text that ends in a signature line: signing it would make a note with two, over a shorter text."""
    line = f"— w {base64.b64encode(bytes(68)).decode()}"
    with pytest.raises(TrustError, match="no note can have"):
        notes.signed(f"text\n\n{line}", name="o", seed=seed(100))


# --- the log -------------------------------------------------------------------------------------------------------------


def head(size: int, root: bytes) -> Note:
    text = Checkpoint(origin=log.origin(TERMS), size=size, root=root).text
    return notes.signed(text, name=log.aggregator_key(TERMS).name, seed=seed(100))


def test_a_cosignature_of_somebody_outside_is_refused_as_such() -> None:
    note = head(1, FIRST).to_bytes()
    with pytest.raises(TrustError) as caught:
        log.open_cosignature(note, note, TERMS, 9)
    assert caught.value.code == "log-cosigner"


def test_no_receipt_is_written_that_nobody_could_verify() -> None:
    tiles = SimpleNamespace(leaf=lambda index: b"\0", node=lambda level, index: SECOND, size=2)
    assert log.receipt(tiles, 0, head(2, BOTH))
    tiles.node = lambda level, index: LEAVES[2]  # a wrong tile above the leaves
    with pytest.raises(TrustError, match="does not stand under this root"):
        log.receipt(tiles, 0, head(2, BOTH))


@pytest.mark.parametrize(("raw", "words"), [
    (b"c2sp.org/tlog-proof@v1\n\n", "tlog-proof with its leaf"),
    (b"c2sp.org/tlog-proof@v1\nextra AA==\nindex 0", "tlog-proof with its leaf"),
    (b"c2sp.org/tlog-proof@v1\nextra AA==\nindex 0\n\n" + b"x" * 3 * notes.MOST_BYTES, "too long"),
])  # fmt: skip
def test_what_is_no_receipt_is_refused_before_it_is_read(raw: bytes, words: str) -> None:
    with pytest.raises(TrustError, match=words):
        log.open_receipt(raw, TERMS)


@pytest.mark.parametrize("label", [b"extra ", b"index "])
def test_a_receipt_has_one_spelling_of_its_labels(label: bytes) -> None:
    leaf = encode(log.Leaf(kind="list", number=1, party=1, digest=FIRST, header=b"", time=1))
    tiles = SimpleNamespace(leaf=lambda index: leaf, node=None, size=1)
    raw = log.receipt(tiles, 0, head(1, proofs.leaf_hash(leaf)))
    log.open_receipt(raw, TERMS)
    with pytest.raises(TrustError, match="tlog-proof with its leaf"):
        log.open_receipt(raw.replace(label, b"", 1), TERMS)


def test_only_a_range_that_is_a_subtree_has_proofs() -> None:
    """[1, 3) of four leaves lies in no one subtree, although its two hashes pair like any other two."""
    tree.verify_subtree_inclusion(LEAVES[2], 2, 2, 4, [LEAVES[3]], proofs.node_hash(LEAVES[2], LEAVES[3]))
    with pytest.raises(TrustError):
        tree.verify_subtree_inclusion(LEAVES[1], 1, 1, 3, [LEAVES[2]], proofs.node_hash(LEAVES[1], LEAVES[2]))


# --- the chain -----------------------------------------------------------------------------------------------------------


def test_half_of_the_members_is_not_over_half_though_enough_for_a_sum() -> None:
    """Three of six stay, who would hide each other; nobody's signature is looked at yet."""
    six = {number: SILOS[number] for number in range(1, 7)}
    first = contract(members=six)
    for stay, enough in ((3, False), (4, True)):
        after = contract(2, first.digest.hex(), {number: SILOS[number] for number in (*range(1, stay + 1), 7)})
        if enough:
            assert Lineage.begin(first).extended(after).newest == after
            continue
        with pytest.raises(TrustError, match="3 of the 6 members of version 1 stay") as caught:
            Lineage.begin(first).extended(after)
        assert caught.value.code == "chain-overlap"
