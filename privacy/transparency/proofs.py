# SPDX-License-Identifier: Apache-2.0
"""RFC 6962 proofs: that a leaf stands in a tree, and that one tree is the beginning of another.

Promised: a proof that verifies for a wrong leaf, place or beginning is a SHA-256 collision, and each true statement has one
proof, which no other length or order of hashes replaces (RFC 9162 §2.1.3, §2.1.4). Sizes and places come from signed
statements, never from the proof. Not here: where roots and sizes come from, and any hiding of neighbouring leaves' hashes.

Leaves are given by their hashes (``leaf_hash``); a leaf's own bytes are hashed after 0x00, so no node passes for a leaf.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

from privacy.errors import TrustError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256().digest()
"""The root of a tree without leaves."""


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256(0x00 ‖ leaf): how a leaf enters its tree."""
    return hashlib.sha256(b"\0" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right): the hash over two neighbouring subtrees."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root_of_hashes(hashes: Sequence[bytes]) -> bytes:
    """The root over leaf hashes; of none, SHA-256 of nothing."""
    levels = _levels(hashes)
    return levels[-1][0] if hashes else EMPTY_ROOT


def inclusion_proof(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The sibling hashes from leaf ``index`` to the root over ``hashes``, from the leaf upwards.

    Raises:
        TrustError: there is no such leaf.
    """
    return inclusion_proofs(hashes, (index,))[0]


def inclusion_proofs(hashes: Sequence[bytes], indices: Sequence[int]) -> tuple[tuple[bytes, ...], ...]:
    """``inclusion_proof`` for many leaves of one tree, which is hashed once."""
    levels, proofs = _levels(hashes), []
    for index in indices:
        if not 0 <= index < len(hashes):
            raise _refused(f"there is no leaf {index} in a tree of {len(hashes)}")
        siblings = [(level, (index >> height) ^ 1) for height, level in enumerate(levels[:-1])]
        proofs.append(tuple(level[sibling] for level, sibling in siblings if sibling < len(level)))
    return tuple(proofs)


@lru_cache(maxsize=65536)
def inclusion_length(index: int, size: int) -> int:
    """How many hashes the inclusion proof of leaf ``index`` in a tree of ``size`` has. Both are the reader's own figures.

    Raises:
        TrustError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise _refused(f"there is no leaf {index} in a tree of {size}")
    length, last = 0, size - 1
    while last:
        length += index < last or index & 1
        index, last = index >> 1, last >> 1
    return length


def root_from_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], *, node: Callable[[bytes, bytes], bytes] = node_hash
) -> bytes:
    """The root that leaf hash ``leaf`` at ``index`` of ``size`` leaves gives with this proof.

    Args:
        node: ``node_hash``, or the same with a memory, for many leaves of one tree.

    Raises:
        TrustError: there is no such leaf, or the proof has another length than that of this place.
    """
    if len(proof) != inclusion_length(index, size):
        raise _refused(f"a proof of {len(proof)} hashes for leaf {index} of {size}")
    _check_hashes(leaf, *proof)
    root, last, rest = leaf, size - 1, iter(proof)
    while last:
        if index & 1:
            root = node(next(rest), root)
        elif index < last:
            root = node(root, next(rest))
        index, last = index >> 1, last >> 1
    return root


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return if leaf hash ``leaf`` stands at ``index`` of the ``size`` leaves under ``root``.

    **Formal guarantees**: *complete*: ``inclusion_proof`` verifies for every leaf; *sound*: another leaf, place, size or any
    changed, missing or further hash is refused, or SHA-256 collides.

    Raises:
        TrustError: it does not.
    """
    if root_from_inclusion(leaf, index, size, proof) != root:
        raise _refused(f"leaf {index} of {size} does not stand under this root")


def consistency_proof(hashes: Sequence[bytes], old: int) -> tuple[bytes, ...]:
    """The proof that the tree over the first ``old`` hashes is the beginning of the tree over all (RFC 6962 §2.1.2).

    Raises:
        TrustError: ``old`` is negative or larger than the tree.
    """
    if not 0 <= old <= len(hashes):
        raise _refused(f"a tree of {len(hashes)} leaves has no beginning of {old}")
    return tuple(_subproof(old, hashes, True)) if old else ()


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Return if the tree of ``old`` leaves under ``old_root`` is the beginning of that of ``new`` under ``new_root``.

    **Formal guarantees**: *complete*: ``consistency_proof`` verifies for every beginning; *sound*: a proof that verifies for a
    tree whose beginning differs is a SHA-256 collision. The empty tree begins every tree, by an empty proof.

    Raises:
        TrustError: it is not, or the proof has another length than these sizes give.
    """
    if not 0 <= old <= new:
        raise _refused(f"a tree cannot shrink from {old} to {new} leaves")
    _check_hashes(old_root, new_root, *proof)
    if old in (0, new):
        expected = EMPTY_ROOT if old == 0 else new_root
        if proof or old_root != expected or (new == 0 and new_root != EMPTY_ROOT):
            raise _refused(f"the tree of {old} leaves is not the beginning of the tree of {new}")
        return
    found_old, found_new = _climb(old, old_root, new, proof)
    if (found_old, found_new) != (old_root, new_root):
        raise _refused(f"the tree of {old} leaves is not the beginning of the tree of {new}")


def _climb(old: int, old_root: bytes, new: int, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Both roots as the proof gives them (RFC 9162 §2.1.4.2), for 0 < old < new."""
    index, last = old - 1, new - 1
    while index & 1:
        index, last = index >> 1, last >> 1
    # A beginning of a power of two leaves is a whole subtree: its root is known and left out of the proof.
    steps = list(proof) if index else [old_root, *proof]
    if not steps:
        raise _refused("an empty proof of consistency")
    older = newer = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise _refused("a proof of consistency that is too long")
        if index & 1 or index == last:
            older, newer = node_hash(step, older), node_hash(step, newer)
            while index and not index & 1:
                index, last = index >> 1, last >> 1
        else:
            newer = node_hash(newer, step)
        index, last = index >> 1, last >> 1
    if last:
        raise _refused("a proof of consistency that is too short")
    return older, newer


def _subproof(old: int, hashes: Sequence[bytes], whole: bool) -> list[bytes]:
    if old == len(hashes):
        return [] if whole else [root_of_hashes(hashes)]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    if old <= split:
        return [*_subproof(old, hashes[:split], whole), root_of_hashes(hashes[split:])]
    return [*_subproof(old - split, hashes[split:], False), root_of_hashes(hashes[:split])]


def _levels(hashes: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree from the leaves up; an odd last node is lifted as it is."""
    levels = [list(hashes)]
    while len(levels[-1]) > 1:
        level = levels[-1]
        paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        levels.append(paired + level[2 * len(paired) :])
    return levels


def _check_hashes(*hashes: bytes) -> None:
    for each in hashes:
        if len(each) != HASH_BYTES:
            raise _refused(f"a hash in a tree has {HASH_BYTES} bytes, got {len(each)}")


def _refused(what: str) -> TrustError:
    return TrustError(
        f"a proof over a hash tree fails: {what}",
        code="tree-proof",
        hint="keep both sides as evidence: whoever made the proof is faulty or lies",
    )
