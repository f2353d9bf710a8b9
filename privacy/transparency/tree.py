# SPDX-License-Identifier: Apache-2.0
"""A Merkle tree that is too large to hold as a list: its nodes, roots and proofs from whoever can read single nodes.

Promised: the same roots and proofs as ``transparency.proofs`` gives over a list of hashes, from a few reads. ``node(level, index)``
is the hash over the leaves [index·2^level, (index+1)·2^level), all of which are in the tree.

Also here: proofs about a subtree [start, end), one that starts at a multiple of the smallest power of two not below its length
(draft-ietf-plants-merkle-tree-certs). **Formal guarantees**: they verify only with the length that sizes and place demand, and
hashes that give the roots; of an empty subtree nothing is ever proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from privacy.errors import TrustError
from privacy.transparency.proofs import EMPTY_ROOT, HASH_BYTES, leaf_hash, node_hash

Node = Callable[[int, int], bytes]


class Tree:
    """A whole tree in memory, which only grows: what the log's keeper has."""

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = [[]]

    @property
    def size(self) -> int:
        """How many leaves it has."""
        return len(self._levels[0])

    def append(self, leaf: bytes) -> None:
        """Add a leaf, given by its bytes, at the end."""
        self._levels[0].append(leaf_hash(leaf))
        for level, below in enumerate(self._levels):
            if len(below) % 2:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(node_hash(below[-2], below[-1]))

    def node(self, level: int, index: int) -> bytes:
        """See the module docstring."""
        return self._levels[level][index]

    def nodes(self, level: int, start: int, count: int) -> list[bytes]:
        """``count`` nodes of a level from ``start`` on."""
        return self._levels[level][start : start + count]

    def root(self, size: int | None = None) -> bytes:
        """The root over all leaves, or over the first ``size``."""
        return root(self.node, 0, self.size if size is None else size)


def span(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The fewest nodes, as (level, index) from left to right, that cover the leaves [start, end)."""
    while start < end:
        most = (end - start).bit_length() - 1
        level = min(most, (start & -start).bit_length() - 1) if start else most
        yield level, start >> level
        start += 1 << level


def root_of(covering: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The root over the leaves that these nodes (level, index, hash) cover, from left to right without a gap.

    So the root of a larger tree comes from the nodes of a smaller one and those of what was added.
    """
    stack: list[tuple[int, int, bytes]] = []
    for each in covering:
        level, index, value = each
        while stack and stack[-1][0] == level and index & 1:
            value = node_hash(stack.pop()[2], value)
            level, index = level + 1, index >> 1
        stack.append((level, index, value))
    if not stack:
        return EMPTY_ROOT
    result = stack.pop()[2]
    while stack:
        result = node_hash(stack.pop()[2], result)
    return result


def root(node: Node, start: int, end: int) -> bytes:
    """The root over the leaves [start, end), which are a tree or a subtree."""
    return root_of([(level, index, node(level, index)) for level, index in span(start, end)])


def inclusion(node: Node, index: int, size: int) -> tuple[bytes, ...]:
    """The proof that leaf ``index`` is in the tree of ``size`` leaves, for ``proofs.verify_inclusion``.

    Raises:
        TrustError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise _refused(f"there is no leaf {index} in a tree of {size}")
    proof, start, end = [], 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(root(node, middle, end))
            end = middle
        else:
            proof.append(root(node, start, middle))
            start = middle
    return tuple(proof[::-1])


def consistency(node: Node, old: int, new: int) -> tuple[bytes, ...]:
    """The proof that the tree of ``old`` leaves is the beginning of that of ``new``, for ``proofs.verify_consistency``.

    Raises:
        TrustError: ``old`` is negative or larger than ``new``.
    """
    if not 0 <= old <= new:
        raise _refused(f"a tree of {new} leaves has no beginning of {old}")
    proof, start, end = [], 0, new
    while old and end != old:
        middle = start + _split(end - start)
        if old <= middle:
            proof.append(root(node, middle, end))
            end = middle
        else:
            proof.append(root(node, start, middle))
            start = middle
    return (*([root(node, start, end)] if start else []), *proof[::-1])


def verify_subtree_inclusion(leaf: bytes, index: int, start: int, end: int, proof: Sequence[bytes], root: bytes) -> None:
    """Return if ``proof`` shows that the leaf with hash ``leaf`` is at ``index`` of the tree, in the subtree [start, end).

    Raises:
        TrustError: it does not, or there is no such place or subtree.
    """
    _check_hashes(leaf, root, *proof)
    if not _is_subtree(start, end) or not start <= index < end:
        raise _refused(f"there is no leaf {index} in [{start}, {end})")
    left = list(proof)
    if _climb(leaf, index - start, end - start, left) != root or left:
        raise _refused(f"leaf {index} does not stand in [{start}, {end}) under this root")


def verify_subtree_consistency(start: int, end: int, size: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> None:
    """Return if ``proof`` shows that [start, end) under ``old_root`` is a subtree of the ``size`` leaves under ``new_root``.

    Raises:
        TrustError: it does not, or it is no subtree.
    """
    _check_hashes(old_root, new_root, *proof)
    if not _is_subtree(start, end) or end > size:
        raise _refused(f"[{start}, {end}) is no subtree of a tree of {size} leaves")
    left = list(proof)
    if _grow(start, end, size, left, old_root) != (old_root, new_root) or left:
        raise _refused(f"[{start}, {end}) does not stand in the tree of {size} leaves with these roots")


def _climb(leaf: bytes, index: int, size: int, proof: list[bytes]) -> bytes:
    """The root that a proof gives; what it uses is taken from its end."""
    if size == 1:
        return leaf
    half, other = _split(size), _next(proof)
    if index < half:
        return node_hash(_climb(leaf, index, half, proof), other)
    return node_hash(other, _climb(leaf, index - half, size - half, proof))


def _grow(start: int, end: int, size: int, proof: list[bytes], known: bytes | None) -> tuple[bytes, bytes]:
    """The roots of the subtree and of the whole that a proof gives. ``known``: the subtree's, while it is a node of the whole."""
    if (start, end) == (0, size):
        same = _next(proof) if known is None else known
        return same, same
    half, other = _split(size), _next(proof)
    if end <= half:
        subtree, whole = _grow(start, end, half, proof, known)
        return subtree, node_hash(whole, other)
    if start >= half:
        subtree, whole = _grow(start - half, end - half, size - half, proof, known)
        return subtree, node_hash(other, whole)
    subtree, whole = _grow(0, end - half, size - half, proof, None)
    return node_hash(other, subtree), node_hash(other, whole)


def _next(proof: list[bytes]) -> bytes:
    if not proof:
        raise _refused("a proof that is too short")
    return proof.pop()


def _split(size: int) -> int:
    """The largest power of two below ``size``."""
    return 1 << (size - 1).bit_length() - 1


def _is_subtree(start: int, end: int) -> bool:
    return 0 <= start < end < 2**64 and start % (1 << (end - start - 1).bit_length()) == 0


def _check_hashes(*hashes: bytes) -> None:
    for each in hashes:
        if len(each) != HASH_BYTES:
            raise _refused(f"a hash in a tree has {HASH_BYTES} bytes, got {len(each)}")


def _refused(what: str) -> TrustError:
    return TrustError(
        f"a proof over a hash tree fails: {what}", code="tree-proof",
        hint="keep both sides as evidence: whoever made the proof is faulty or lies",
    )  # fmt: skip
