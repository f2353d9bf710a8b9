# SPDX-License-Identifier: Apache-2.0
"""Verification of a sum in pieces: who audits which segment of the vector, and how a segment is checked by itself.

A segment is 1 MiB of the vector (2^18 words, the last one shorter): 16 leaves of the root in a silo's header, and one piece of
every mask stream. Where the contract says ``audit = "slices"``, segment g is audited by the t_c + 1 silos with the smallest
HMAC-SHA256(certificate digest, g ‖ i), by as many more as may still fall silent, and each silo adds some of its own random choice.
What they say, and what follows from it, is ``secure_sum.audits``.

**Formal guarantees**

- *Nobody chooses*: whose duty a segment is depends on the certificate's digest alone, and every segment has t_c + 1 different
  auditors: t_c of them may be corrupt, and one still looks, whichever certificate it is.
- *Same as the whole*: the words that ``sum_of_segment`` gives are those of the whole sum at their place, bit for bit.
- *Held to the header*: words that pass ``check_segment`` are those of the vector to which the header is committed, or SHA-256
  collides.

Not promised: that a segment nobody looked at is right, that the auditors' choice is secret, or that it falls evenly: a certificate
holds signatures of several parties, so the aggregator and a friend can try some until the auditors suit them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy import prg
from privacy.errors import TrustError
from privacy.identity.keys import expand, u32
from privacy.messages import Header
from privacy.secure_sum import merkle
from privacy.transparency import proofs

Words = NDArray[np.uint32]

OWN_ODDS: Final = 16
"""A silo audits every segment that is not its duty with a chance of one in so many."""
SEGMENT_WORDS: Final = prg.SEGMENT_WORDS
SEGMENT_BYTES: Final = 4 * SEGMENT_WORDS


def segments(dimension: int) -> int:
    """How many segments a vector of ``dimension`` words has."""
    return -(-dimension // SEGMENT_WORDS)


def auditors(certificate: bytes, segment: int, silos: Sequence[int], *, colluders: int, spare: int = 0) -> tuple[int, ...]:
    """Which silos of the set must audit a segment, ascending: the t_c + 1 + ``spare`` that the certificate picks.

    Args:
        certificate: the digest (32 bytes) of the round's certificate.
        silos: the set U.
        spare: how many of them may be silent and t_c + 1 still answer; at most all of U are picked.

    Raises:
        TrustError: fewer than t_c + 1 silos, or the digest has another length.
    """
    if len(certificate) != 32 or len(set(silos)) != len(silos) or len(silos) <= colluders:
        raise _refused(f"{len(silos)} silos and a certificate digest of {len(certificate)} bytes pick no {colluders + 1} auditors")
    ranked = sorted(silos, key=lambda silo: (hmac.digest(certificate, u32(segment) + u32(silo), "sha256"), silo))
    return tuple(sorted(ranked[: colluders + 1 + spare]))


def duties(
    certificate: bytes, silo: int, silos: Sequence[int], *, colluders: int, dimension: int, spare: int = 0
) -> tuple[int, ...]:
    """The segments that are the duty of ``silo``, ascending; the arguments are those of ``auditors``."""
    every = range(segments(dimension))
    return tuple(each for each in every if silo in auditors(certificate, each, silos, colluders=colluders, spare=spare))


def own_choice(must: Sequence[int], dimension: int, *, random: Callable[[int], bytes] = os.urandom) -> tuple[int, ...]:
    """Segments that are nobody's idea but this silo's, ascending: each that is not its duty, with a chance of one in OWN_ODDS."""
    free = [each for each in range(segments(dimension)) if each not in set(must)]
    return tuple(each for each in free if int.from_bytes(random(8), "big") % OWN_ODDS == 0)


def hashes(vector: Words) -> tuple[bytes, ...]:
    """The hash of every segment of ``vector``: nodes of its tree, whose root over these is the vector's (masking.vector_root)."""
    raw = memoryview(np.ascontiguousarray(vector, dtype="<u4").view(np.uint8).data)
    return tuple(merkle.root(raw[start : start + SEGMENT_BYTES]) for start in range(0, len(raw), SEGMENT_BYTES))


def check_segment(words: Words, proof: Sequence[bytes], header: Header, segment: int) -> None:
    """Return if ``words`` are segment ``segment`` of the masked vector of which the header speaks.

    A segment's 16 leaves are one whole subtree of the vector's tree, so its hash is a node there: sizes come from the header.

    Raises:
        TrustError: another length, or the proof does not lead to the header's root; the message names the silo.
    """
    wanted = min(SEGMENT_WORDS, header.dimension - segment * SEGMENT_WORDS)
    if words.dtype != np.dtype("<u4") or words.ndim != 1 or words.size != wanted or segment < 0:
        raise _refused(f"segment {segment} of silo {header.silo} has {words.size} words, its header gives {wanted}")
    node = merkle.root(np.ascontiguousarray(words).view(np.uint8).data)
    try:
        proofs.verify_inclusion(node, segment, segments(header.dimension), proof, header.root)
    except TrustError as error:
        raise _refused(f"segment {segment} of silo {header.silo} does not match the root in its header") from error


def sum_of_segment(
    pieces: Mapping[int, Words],
    seeds: Mapping[int, bytes],
    headers: Mapping[int, Header],
    segment: int,
    *,
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> Words:
    """Segment ``segment`` of the sum over the set, as a new array, from its silos' segments and the released secrets.

    Args:
        pieces: the segment of every silo of the set; each must have passed ``check_segment``.
        seeds: b_i of every silo of the set; each must match its header (guardian_sum.check_seed).
        headers: the set's headers, by silo.
        pair_keys: k_ij by (i in the set, j missing), where silos of the epoch are missing.

    Raises:
        TrustError: pieces or seeds are not exactly the set's.
    """
    if set(pieces) != set(headers) or set(seeds) != set(headers):
        raise _refused(f"pieces of silos {sorted(pieces)} and seeds of {sorted(seeds)} for a set of {sorted(headers)}")
    total = np.zeros(next(iter(pieces.values())).size, dtype="<u4")
    for silo, header in headers.items():
        np.add(total, pieces[silo], out=total)
        own = expand(seeds[silo], "gsum/1 self-mask", header.round_ctx, header.attempt, u32(silo))
        np.subtract(total, _stream(own, segment, total.size), out=total)
    for (silo, missing), key in (pair_keys or {}).items():
        mask = _stream(expand(key, "gsum/1 mask"), segment, total.size)
        # The silo in the set added the stream towards higher ids and subtracted it towards lower ones: the other way round here.
        (np.subtract if missing > silo else np.add)(total, mask, out=total)
    return total


def _stream(key: bytes, segment: int, count: int) -> Words:
    words = np.empty(count, dtype="<u4")
    prg.Keystream(key, segment=segment).read_into(words)
    return words


def _refused(what: str) -> TrustError:
    return TrustError(what, hint="keep the message, it is evidence", code="sum-refused")
