# SPDX-License-Identifier: Apache-2.0
"""transparency.proofs against the definition of RFC 6962, exhaustively for small trees, and every forgery that is cheap to try."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import TrustError
from privacy.secure_sum.merkle import root_of_leaves
from privacy.transparency import proofs

MOST = 33
LEAVES = [bytes([index]) for index in range(MOST)]
HASHES = [proofs.leaf_hash(leaf) for leaf in LEAVES]
ROOTS = [root_of_leaves(LEAVES[:size]) for size in range(MOST + 1)]


def path_by_definition(hashes: list[bytes], index: int) -> list[bytes]:
    """PATH(m, D[n]) as RFC 6962 §2.1.1 writes it."""
    if len(hashes) == 1:
        return []
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    if index < split:
        return [*path_by_definition(hashes[:split], index), proofs.root_of_hashes(hashes[split:])]
    return [*path_by_definition(hashes[split:], index - split), proofs.root_of_hashes(hashes[:split])]


@pytest.mark.parametrize("size", range(MOST + 1))
def test_the_root_over_hashes_is_the_root_over_leaves(size: int) -> None:
    assert proofs.root_of_hashes(HASHES[:size]) == ROOTS[size]


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_complete_every_leaf_of_every_tree_is_proven(size: int) -> None:
    for index in range(size):
        proof = proofs.inclusion_proof(HASHES[:size], index)
        assert list(proof) == path_by_definition(HASHES[:size], index)
        assert len(proof) == proofs.inclusion_length(index, size)
        proofs.verify_inclusion(HASHES[index], index, size, proof, ROOTS[size])


@pytest.mark.parametrize("size", range(MOST + 1))
def test_complete_every_beginning_of_every_tree_is_proven(size: int) -> None:
    for old in range(size + 1):
        proofs.verify_consistency(old, ROOTS[old], size, ROOTS[size], proofs.consistency_proof(HASHES[:size], old))


def bent(proof: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """The proof with a bit changed, a hash missing, one too many, swapped, or cut."""
    other = [(*proof[:i], bytes([h[0] ^ 1]) + h[1:], *proof[i + 1 :]) for i, h in enumerate(proof)]
    other += [proof[:i] + proof[i + 1 :] for i in range(len(proof))]
    other += [(*proof[:i], extra, *proof[i:]) for i in range(len(proof) + 1) for extra in (bytes(32), HASHES[0])]
    other += [(*proof[:i], h[:-1], *proof[i + 1 :]) for i, h in enumerate(proof)]
    if len(set(proof)) > 1:
        other.append(proof[::-1])
    return other


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 11, 16, 17])
def test_sound_no_other_leaf_place_size_or_proof_verifies(size: int) -> None:
    for index in range(size):
        proof = proofs.inclusion_proof(HASHES[:size], index)
        wrong = [(HASHES[index], index, size, each, ROOTS[size]) for each in bent(proof)]
        wrong += [(HASHES[index], at, size, proof, ROOTS[size]) for at in range(-1, size + 2) if at != index]
        wrong += [(HASHES[at], index, size, proof, ROOTS[size]) for at in range(size) if at != index]
        wrong += [(HASHES[index], index, size, proof, ROOTS[at]) for at in range(MOST) if at != size]
        for case in wrong:
            with pytest.raises(TrustError, match="proof over a hash tree"):
                proofs.verify_inclusion(*case)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7, 8, 11, 16, 17])
def test_sound_no_other_beginning_size_or_proof_verifies(size: int) -> None:
    for old in range(size + 1):
        proof = proofs.consistency_proof(HASHES[:size], old)
        wrong = [(old, ROOTS[old], size, ROOTS[size], each) for each in bent(proof)]
        wrong += [(old, ROOTS[at], size, ROOTS[size], proof) for at in range(MOST) if at != old]
        if old:
            wrong += [(old, ROOTS[old], size, ROOTS[at], proof) for at in range(MOST) if at != size]
        for case in wrong:
            with pytest.raises(TrustError, match="proof over a hash tree"):
                proofs.verify_consistency(*case)


def test_a_forked_tree_is_never_consistent() -> None:
    for old in range(1, 12):
        fork = [proofs.leaf_hash(b"other"), *HASHES[1:20]]
        with pytest.raises(TrustError):
            proofs.verify_consistency(old, ROOTS[old], 20, proofs.root_of_hashes(fork), proofs.consistency_proof(fork, old))


def test_a_node_passes_for_no_leaf() -> None:
    node = proofs.node_hash(HASHES[0], HASHES[1])
    assert proofs.leaf_hash(HASHES[0] + HASHES[1]) != node
    assert proofs.leaf_hash(b"x") == hashlib.sha256(b"\0x").digest()


def test_what_is_not_there_is_refused_by_the_prover_too() -> None:
    for call in (
        lambda: proofs.inclusion_proof(HASHES[:3], 3), lambda: proofs.inclusion_proof([], 0),
        lambda: proofs.inclusion_proof(HASHES, -1),
        lambda: proofs.consistency_proof(HASHES[:3], 4), lambda: proofs.consistency_proof(HASHES[:3], -1),
        lambda: proofs.inclusion_length(3, 3), lambda: proofs.verify_consistency(2, ROOTS[2], 1, ROOTS[1], ()),
    ):  # fmt: skip
        with pytest.raises(TrustError):
            call()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**40), st.data())
def test_the_length_of_a_proof_follows_from_its_place_alone(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    length = proofs.inclusion_length(index, size)
    assert length <= (size - 1).bit_length()
    proofs.root_from_inclusion(HASHES[0], index, size, [bytes(32)] * length)
    with pytest.raises(TrustError):
        proofs.root_from_inclusion(HASHES[0], index, size, [bytes(32)] * (length + 1))


def test_many_proofs_from_one_tree_are_the_single_ones() -> None:
    assert proofs.inclusion_proofs(HASHES[:11], (4, 0, 10)) == tuple(proofs.inclusion_proof(HASHES[:11], i) for i in (4, 0, 10))
