# SPDX-License-Identifier: Apache-2.0
"""The secure sum: the aggregator learns the sum of the silos' vectors, once, and only if it was agreed to.

Order in consent mode, all pure: ``mask`` and ``build_header`` (silo) → ``check_freeze`` (everybody) → the silo writes (round →
digest of U) to its disk and signs a ``Consent`` → ``check_certificate`` (everybody) → ``seal_release`` (silo) →
``open_release`` and ``unmask`` (aggregator). After Bonawitz et al. 2017 (arXiv 1611.04482), double masking. In share mode
guardians consent and release in the silos' place; see ``secure_sum.shares``. This module gives the names of ``secure_sum.masking``
and ``privacy.secure_sum.freeze`` on, so that a caller needs no other in consent mode.

**Formal guarantees.** In consent mode, let a coalition hold the aggregator, the network and all silos but an honest set H,
|H| ≥ 2. Over all messages of a round it learns Σ_{i∈H} x_i mod 2³² and nothing else about the x_i of H, and this only if every
honest silo signed for one set U; with |H| = 1 it learns that x. Without n consents every y_i stays uniform.

1. *Equal sums, equal views*: given the sum, the pair streams explain any other inputs with that sum equally well.
2. *No consent, no sum*: a seed is sealed only against a certificate with every member's signature on exactly this set.
3. *One sum per round*: a second attempt (new id, new b_i, same pair keys) reveals nothing, since the seed of an attempt
   outside U is refused release; the difference of two attempts' y is uniform.
4. *Bound to the terms*: another contract, roster, epoch, manifest or round number gives other masks; nothing cancels. The
   freeze is refused by the pairs' commitments before anyone consents.
5. *Right sum*: accepted vectors, seeds and pair keys are those of the signed headers, bit for bit, or the culprit is named.

In share mode the same holds with "q guardians" for "every honest silo" and "every member" while at most T guardians are
corrupt; 2 and 3 then rest on the guarantees of ``privacy.secure_sum.shares`` and on guardians that sign for one set per round.

Assumed: HMAC-SHA256 and AES-256 are pseudo-random functions; SHA-256 is collision resistant; Ed25519 is unforgeable; the
pair secrets are as secure_sum.epoch states; honest silos follow the order of writes and are not rolled back. No proof of the
composition by others exists.

**Not promised**: that x is honest (a silo can add any vector; one that masks with other streams than it committed to turns
the sum into noise, anonymously), that the sum itself is harmless (that is the noise's duty), who took part, that the round
completes (one silent silo closes it), or anything against the coalition if b_i and all pair keys of a silo leak later.

===========================================  ==========================================================
edge case                                    behaviour
===========================================  ==========================================================
two silos                                    each computes the other's vector from the sum (contract must say so)
a word of x is 0, or 2³² - 1                 as any other; the ring has no special values
empty vector, other type or shape            TrustError before any key is used
a missing silo                               consent mode: no freeze, no release; share mode: its masks are taken off
===========================================  ==========================================================
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from privacy import envelope, prg
from privacy.errors import TrustError
from privacy.federation import Member
from privacy.identity.keys import u32
from privacy.messages import Header, Release
from privacy.secure_sum import merkle
from privacy.secure_sum.freeze import (
    Certified,
    Frozen,
    check_certificate,
    check_consent,
    check_freeze,
    check_seed,
    digest_of_set,
)
from privacy.secure_sum.masking import (
    Signs,
    Words,
    build_header,
    check_header,
    check_round,
    check_set,
    check_vector,
    mask,
    open_upload,
    pair_commitment,
    pair_mask,
    refused,
    round_ctx,
    self_commitment,
    self_mask_key,
    self_seed,
    upload_info,
    vector_root,
)
from privacy.secure_sum.shares import check_pair_key

__all__ = [
    "Certified", "Frozen", "Words", "build_header", "check_certificate", "check_consent", "check_freeze", "check_header",
    "check_seed", "check_total", "check_vector", "digest_of_set", "mask", "open_release", "open_upload", "pair_commitment",
    "round_ctx", "seal_release", "self_commitment", "self_seed", "unmask", "upload_info", "vector_root",
]  # fmt: skip


def seal_release(certified: Certified, *, silo: int, self_seed: bytes, seal_key: bytes) -> Release:
    """b_i, sealed to the aggregator's key and bound to U, to be signed as "release" in epoch_ctx.

    **Formal guarantees**: only against a certificate, and only the seed of the attempt that stands in the certified set: the
    seed of any other attempt does not match its header's commitment and is refused.

    Raises:
        TrustError: the seed is of another attempt, round or silo, or the aggregator's key is unfit.
    """
    check_seed(certified.frozen, silo, self_seed)
    sealed = envelope.seal(seal_key, self_seed, info=_release_info(certified.frozen, silo))
    return Release(round_ctx=certified.frozen.round_ctx, silo=silo, frozen=certified.frozen.digest, sealed=sealed)


def open_release(raw: bytes, certified: Certified, *, member: Member, epoch_ctx: bytes, seal_seed: bytes) -> bytes:
    """b_i of the member from its signed release, checked against the commitment in its header.

    Raises:
        TrustError: not signed by the member, of another round or set, does not open, or contradicts its header.
    """
    frozen = certified.frozen
    release = envelope.open_member(raw, Release, type="release", context=epoch_ctx, member=member)
    check_round("release", f"silo {member.id}", release.round_ctx, frozen.round_ctx)
    check_set("release", f"silo {member.id}", release.frozen, frozen.digest)
    info = _release_info(frozen, member.id)
    seed = envelope.open_sealed(seal_seed, release.sealed, info=info, what=f"the released seed of silo {member.id}")
    check_seed(frozen, member.id, seed)
    return seed


def unmask(
    uploads: Mapping[int, Words],
    seeds: Mapping[int, bytes],
    certified: Certified,
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> Words:
    """Σ x_i mod 2³² over the certified set, as a new array (d,).

    Holds a few vectors at a time beside the total, as many as this machine hashes at once, at most six: give a mapping that reads
    from disk, it is asked once per silo, in this thread. All seeds and pair keys are checked before the first vector is read.

    Args:
        pair_keys: k_ij by (i in U, j missing); None or empty when no silo of the epoch is missing.

    Raises:
        TrustError: a vector, seed or pair key is missing, or contradicts the silo's header; the message names the silo.
    """
    return _sum(uploads, seeds, pair_keys or {}, certified.frozen)


def check_total(
    total: Words,
    vectors: Mapping[int, Words],
    seeds: Mapping[int, bytes],
    frozen: Frozen,
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> None:
    """Return if ``total`` is the sum over the set, computed again from the masked vectors and the released seeds and pair keys.

    **Formal guarantees**: vectors are held to the roots, seeds and keys to the commitments in the headers, which the signatures
    for the set cover; so whoever publishes another total must find a second preimage of SHA-256 or HMAC-SHA-256.

    Raises:
        TrustError: it is not, or a vector, seed or pair key is missing or contradicts its header.
    """
    if not np.array_equal(_sum(vectors, seeds, pair_keys or {}, frozen), total):
        raise TrustError(
            "the published sum is not the sum of the vectors it names", code="false-sum",
            hint="stop, and keep the outcome as evidence: the aggregator is faulty or lies",
        )


def _sum(
    uploads: Mapping[int, Words], seeds: Mapping[int, bytes], pair_keys: Mapping[tuple[int, int], bytes], frozen: Frozen
) -> Words:
    headers = frozen.headers
    for name, given in (("vectors", uploads), ("seeds", seeds)):
        if set(given) != set(headers):
            raise refused(f"{name} of silos {sorted(given)} for a set of {sorted(headers)}")
    wanted = {(silo, gone) for silo in headers for gone in frozen.missing}
    if set(pair_keys) != wanted:
        raise refused(f"keys of {len(pair_keys)} pairs {sorted(pair_keys)[:9]}, this set has {len(wanted)} with missing silos")
    streams: Signs = []
    for silo, header in headers.items():
        check_seed(frozen, silo, seeds[silo])
        streams.append((self_mask_key(seeds[silo], round_ctx=header.round_ctx, attempt=header.attempt, silo=silo), -1))
    for (silo, gone), key in pair_keys.items():
        check_pair_key(frozen, silo, gone, key)
        stream, sign = pair_mask(key, silo=silo, peer=gone)
        streams.append((stream, -1 if sign == 1 else 1))
    total = np.zeros(next(iter(headers.values())).dimension, dtype="<u4")
    for y in _checked(uploads, headers):
        np.add(total, y, out=total)
    prg.add_streams(total, streams)
    return total


def _checked(uploads: Mapping[int, Words], headers: Mapping[int, Header]) -> Iterator[Words]:
    """The vectors one by one, each held to its header: the next is read here while earlier ones are hashed by threads."""
    with ThreadPoolExecutor(merkle.THREADS) as pool:
        hashed: deque[tuple[Words, Future[None]]] = deque()
        for silo, header in headers.items():
            y = uploads[silo]
            hashed.append((y, pool.submit(check_vector, y, header, threads=1)))
            if len(hashed) > merkle.THREADS:
                yield _awaited(hashed)
        while hashed:
            yield _awaited(hashed)


def _awaited(hashed: deque[tuple[Words, Future[None]]]) -> Words:
    y, checked = hashed.popleft()
    checked.result()
    return y


def _release_info(frozen: Frozen, silo: int) -> bytes:
    # The digest of U binds round, attempt and header; the round is named again so that each field stands by itself.
    return b"gsum/1 release\0" + frozen.round_ctx + frozen.digest + u32(silo)
