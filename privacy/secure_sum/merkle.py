# SPDX-License-Identifier: Apache-2.0
"""The RFC 6962 Merkle root of a byte vector, cut in leaves of 64 KiB.

Promised: two different byte strings with one root are a SHA-256 collision, and a leaf can later be shown to be part of the
vector without showing the rest. Not here: the proofs, and any hiding (a root of low-entropy data can be guessed).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

LEAF_BYTES: Final = 65536
THREADS: Final = min(4, os.cpu_count() or 1)
_FEW_LEAVES: Final = 16
"""Below this, starting threads costs more than they save. hashlib lets go of Python's lock while it hashes a leaf."""


def root(data: bytes | memoryview, *, threads: int = THREADS) -> bytes:
    """The root (32 bytes) over ⌈len/65536⌉ leaves, the last one short; of no bytes, SHA-256 of nothing (RFC 6962 §2.1)."""
    view = memoryview(data).cast("B")
    return root_of_leaves([view[start : start + LEAF_BYTES] for start in range(0, len(view), LEAF_BYTES)], threads=threads)


def root_of_leaves(leaves: list[bytes] | list[memoryview], *, threads: int = THREADS) -> bytes:
    """The root (32 bytes) over the leaves as given. A leaf is hashed after 0x00, a node after 0x01 (RFC 6962 §2.1)."""
    if not leaves:
        return hashlib.sha256().digest()
    level = _leaf_hashes(leaves, threads)
    while len(level) > 1:
        # Pairing neighbours and lifting an odd last node gives RFC 6962's split at the largest power of two.
        paired = [_hash(b"\1", level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[2 * len(paired) :]
    return level[0]


def _leaf_hashes(leaves: Sequence[bytes | memoryview], threads: int) -> list[bytes]:
    if len(leaves) < _FEW_LEAVES or threads == 1:
        return [_hash(b"\0", leaf) for leaf in leaves]
    each = -(-len(leaves) // threads)
    parts = [leaves[start : start + each] for start in range(0, len(leaves), each)]
    with ThreadPoolExecutor(threads) as pool:
        hashed = pool.map(lambda part: [_hash(b"\0", leaf) for leaf in part], parts)
        return [digest for part in hashed for digest in part]


def _hash(prefix: bytes, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(prefix)
    digest.update(data)
    return digest.digest()
