# SPDX-License-Identifier: Apache-2.0
"""The secure sum in consent mode: the aggregator learns the sum of all silos' vectors, once, and only if all agreed to it.

Order, all pure: ``mask`` and ``build_header`` (silo) → ``check_freeze`` (everybody) → the silo writes (round → digest of U)
to its disk and signs a ``Consent`` → ``check_certificate`` (everybody) → ``seal_release`` (silo) → ``open_release`` and
``unmask`` (aggregator). After Bonawitz et al. 2017 (arXiv 1611.04482), double masking.

**Formal guarantees.** Let a coalition hold the aggregator, the network and all silos but an honest set H, |H| ≥ 2. Over all
messages of a round it learns Σ_{i∈H} x_i mod 2³² and nothing else about the x_i of H, and this only if every honest silo
signed for one set U; with |H| = 1 it learns that x. Without n consents every y_i stays uniform.

1. *Equal sums, equal views*: given the sum, the pair streams explain any other inputs with that sum equally well.
2. *No consent, no sum*: a seed is sealed only against a certificate with every member's signature on exactly this set.
3. *One sum per round*: a second attempt (new id, new b_i, same pair keys) reveals nothing, since the seed of an attempt
   outside U is refused release; the difference of two attempts' y is uniform.
4. *Bound to the terms*: another contract, roster, epoch, manifest or round number gives other masks; nothing cancels. The
   freeze is refused by the pairs' commitments before anyone consents.
5. *Right sum*: accepted vectors and seeds are those of the signed headers, bit for bit, or the culprit is named.

Assumed: HMAC-SHA256 and AES-256 are pseudo-random functions; SHA-256 is collision resistant; Ed25519 is unforgeable; the
pair secrets are as privacy.epoch states; honest silos follow the order of writes and are not rolled back. No proof of the
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
a missing silo                               no freeze, no release
===========================================  ==========================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from privacy import envelope, merkle, prg
from privacy.errors import TrustError
from privacy.federation import Accepted, Member
from privacy.keys import expand, extract, u32
from privacy.messages import Certificate, Consent, Freeze, Header, Release, Signed, Upload, decode

Words = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A set U that passed ``check_freeze``: all members' verified headers, by ascending silo, and U's digest."""

    round_ctx: bytes
    digest: bytes
    headers: Mapping[int, Header]


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A set for which every member signed. Only ``check_certificate`` makes one; release and unmasking demand it."""

    frozen: Frozen


def round_ctx(manifest: bytes) -> bytes:
    """SHA-256 of the manifest's bytes as logged: 32 bytes on which every mask of the round depends."""
    return hashlib.sha256(manifest).digest()


def self_seed(install_secret: bytes, attempt: bytes, x_digest: bytes, os_random: bytes) -> bytes:
    """b_i (32 bytes) for one attempt, from 32 fresh bytes of the operating system, made harder to repeat.

    **Formal guarantees**: uniform if ``os_random`` or ``install_secret`` (32 bytes each) is unknown; two attempts get
    different seeds if any argument differs, so a cloned machine with the same randomness masks another x with another seed.
    Given both secrets b_i would confirm a guess of x: neither is ever sent, ``x_digest`` = SHA-256(x_i) neither.
    """
    for name, value, size in (("os_random", os_random, 32), ("install_secret", install_secret, 32), ("attempt", attempt, 16)):
        _check_size(name, value, size)
    _check_size("x_digest", x_digest, 32)
    return expand(extract(install_secret, os_random), "gsum/1 self-seed", attempt, x_digest)


def mask(
    x: Words, *, round_ctx: bytes, silo: int, attempt: bytes, self_seed: bytes, pair_keys: Mapping[int, bytes]
) -> Words:
    """y_i = x_i + stream(self) + Σ_{j>i} stream(M_ij) - Σ_{j<i} stream(M_ij) mod 2³², as a new array (d,).

    **Formal guarantees**: while b_i, or any one k_ij, is unknown, y_i is uniform and independent of x_i. One mask stream
    serves one vector: call this once per attempt, with everything concatenated. There is no way to leave the self mask out.

    Raises:
        TrustError: ``x`` is not a non-empty uint32 vector, no peer is given, or this silo is among its peers.
    """
    _check_words(x, f"the vector of silo {silo}")
    if not pair_keys or silo in pair_keys:
        raise _refused(f"silo {silo} needs a key for each of its peers, and none for itself; got {sorted(pair_keys)}")
    y = x.copy()
    prg.add_stream(y, _self_mask_key(self_seed, round_ctx, attempt, silo), 1)
    for peer, pair_key in sorted(pair_keys.items()):
        prg.add_stream(y, expand(pair_key, "gsum/1 mask"), 1 if peer > silo else -1)
    return y


def self_commitment(self_seed: bytes, *, round_ctx: bytes, attempt: bytes, silo: int) -> bytes:
    """Binds b_i without showing it: Expand(b_i, "gsum/1 self-commit" NUL ‖ round_ctx ‖ attempt ‖ i)."""
    return expand(self_seed, "gsum/1 self-commit", round_ctx, attempt, u32(silo))


def pair_commitment(pair_key: bytes) -> bytes:
    """C_ij = Expand(k_ij, "gsum/1 commit" NUL): equal on both sides if and only if both hold one k_ij."""
    return expand(pair_key, "gsum/1 commit")


def vector_root(y: Words) -> bytes:
    """The RFC 6962 root over the little-endian bytes of ``y`` in leaves of 64 KiB."""
    return merkle.root(np.ascontiguousarray(y, dtype="<u4").view(np.uint8).data)


def build_header(
    y: Words, *, round_ctx: bytes, silo: int, attempt: bytes, ledger_counter: int, self_seed: bytes, pair_keys: Mapping[int, bytes]
) -> Header:
    """The silo's binding statement about ``y``, to be signed as "header" in epoch_ctx. It holds digests and commitments only."""
    return Header(
        round_ctx=round_ctx, silo=silo, attempt=attempt, ledger_counter=ledger_counter, dimension=y.size, root=vector_root(y),
        self_commitment=self_commitment(self_seed, round_ctx=round_ctx, attempt=attempt, silo=silo),
        pair_commitments=tuple((peer, pair_commitment(key)) for peer, key in sorted(pair_keys.items())),
    )  # fmt: skip


def upload_info(*, round_ctx: bytes, silo: int, header: bytes) -> bytes:
    """The HPKE info of y_i on its way to the aggregator: "gsum/1 upload" NUL ‖ round_ctx ‖ i ‖ SHA-256(signed header)."""
    return b"gsum/1 upload\0" + round_ctx + u32(silo) + hashlib.sha256(header).digest()


def open_upload(upload: Upload, header: Header, *, seal_seed: bytes) -> Words:
    """The masked vector (d,) in ``upload``, checked against the root in ``header`` = check_header(upload.header, …).

    Raises:
        TrustError: it does not open in this round, for this silo and signed header, or contradicts the header.
    """
    info = upload_info(round_ctx=header.round_ctx, silo=header.silo, header=upload.header)
    raw = envelope.open_sealed(seal_seed, upload.sealed, info=info, what=f"the masked vector of silo {header.silo}")
    if len(raw) != 4 * header.dimension:
        raise _refused(f"the masked vector of silo {header.silo} has {len(raw)} bytes, its header says {header.dimension} words")
    y = np.frombuffer(raw, dtype="<u4")
    check_vector(y, header)
    return y


def digest_of_set(headers: Sequence[bytes]) -> bytes:
    """The digest of U = [(silo, attempt, header digest)] over signed headers: SHA-256("gsum/1 set" NUL ‖ entries of 52 bytes).

    Raises:
        TrustError: one is not a signed header; signatures are not checked here.
    """
    digest = hashlib.sha256(b"gsum/1 set\0")
    for raw in headers:
        header = decode(decode(raw, Signed).body, Header)
        digest.update(u32(header.silo) + header.attempt + hashlib.sha256(raw).digest())
    return digest.digest()


def check_header(raw: bytes, member: Member, *, accepted: Accepted, epoch_ctx: bytes, round_ctx: bytes) -> Header:
    """The member's header for this round, by itself fit to be in a set; also what the aggregator checks at upload.

    Raises:
        TrustError: not signed by the member in this epoch, of another round or dimension, or with other peers than the members.
    """
    header = envelope.open_member(raw, Header, type="header", context=epoch_ctx, member=member)
    _check_round("header", member.id, header.round_ctx, round_ctx)
    dimension = accepted.terms.dimension
    if header.dimension != dimension:
        raise _refused(f"the header of silo {member.id} is for {header.dimension} words, the contract has {dimension}")
    peers = [peer for peer, _ in header.pair_commitments]
    wanted = [other.id for other in accepted.terms.member if other.id != member.id]
    if peers != wanted:
        raise _refused(f"the header of silo {member.id} commits to pairs with {peers}, its peers are {wanted}")
    return header


def check_freeze(freeze: Freeze, *, accepted: Accepted, epoch_ctx: bytes, round_ctx: bytes, own_header: bytes | None) -> Frozen:
    """The proposed set, verified. A silo that gets this back may write its digest down, and then sign for it.

    **Formal guarantees**: every member stands in U once, with a header that it signed for this round; every pair's
    commitments agree, so all pair masks cancel; this silo's header is the very one it sent.

    Args:
        own_header: this silo's signed header as it was sent; None for the aggregator.

    Raises:
        TrustError: any of these fails; the message names the silos.
    """
    members = accepted.terms.member
    _check_round("freeze", 0, freeze.round_ctx, round_ctx)
    if len(freeze.headers) != len(members):
        raise _refused(f"the set has {len(freeze.headers)} headers for {len(members)} members")
    headers = {
        member.id: check_header(raw, member, accepted=accepted, epoch_ctx=epoch_ctx, round_ctx=round_ctx)
        for raw, member in zip(freeze.headers, members, strict=True)
    }
    if own_header is not None and own_header not in freeze.headers:
        raise _refused("the set holds another header of this silo than the one it sent")
    _check_pairs(headers)
    return Frozen(round_ctx=round_ctx, digest=digest_of_set(freeze.headers), headers=headers)


def check_certificate(certificate: Certificate, frozen: Frozen, *, accepted: Accepted, epoch_ctx: bytes) -> Certified:
    """Proof that every member signed for exactly ``frozen``; how many that is stands in the contract, not in the message.

    Raises:
        TrustError: a consent is missing, forged, of another round, or for another set; the message names the silo.
    """
    members = accepted.terms.member
    _check_round("certificate", 0, certificate.round_ctx, frozen.round_ctx)
    _check_set("certificate", 0, certificate.frozen, frozen.digest)
    if len(certificate.consents) != len(members):
        raise _refused(f"the certificate has {len(certificate.consents)} consents, all {len(members)} members must sign")
    for raw, member in zip(certificate.consents, members, strict=True):
        check_consent(raw, member, frozen, epoch_ctx=epoch_ctx)
    return Certified(frozen=frozen)


def check_consent(raw: bytes, member: Member, frozen: Frozen, *, epoch_ctx: bytes) -> None:
    """Return if ``raw`` is the member's consent to exactly this set. Raises TrustError."""
    consent = envelope.open_member(raw, Consent, type="consent", context=epoch_ctx, member=member)
    _check_round("consent", member.id, consent.round_ctx, frozen.round_ctx)
    _check_set("consent", member.id, consent.frozen, frozen.digest)


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
    _check_round("release", member.id, release.round_ctx, frozen.round_ctx)
    _check_set("release", member.id, release.frozen, frozen.digest)
    info = _release_info(frozen, member.id)
    seed = envelope.open_sealed(seal_seed, release.sealed, info=info, what=f"the released seed of silo {member.id}")
    check_seed(frozen, member.id, seed)
    return seed


def unmask(uploads: Mapping[int, Words], seeds: Mapping[int, bytes], certified: Certified) -> Words:
    """Σ x_i mod 2³² over the certified set, as a new array (d,).

    Holds one vector at a time beside the total: give a mapping that reads from disk, it is asked once per silo. All seeds are
    checked before the first vector is read.

    Raises:
        TrustError: a vector or seed is missing, or contradicts the silo's header; the message names the silo.
    """
    return _sum(uploads, seeds, certified.frozen)


def check_total(total: Words, vectors: Mapping[int, Words], seeds: Mapping[int, bytes], frozen: Frozen) -> None:
    """Return if ``total`` is the sum over the set, computed again from the masked vectors and the released seeds.

    **Formal guarantees**: vectors are held to the roots and seeds to the commitments in the headers, which this silo's own
    consent covers; so whoever publishes another total must find a second preimage of SHA-256 or HMAC-SHA-256.

    Raises:
        TrustError: it is not, or a vector or seed is missing or contradicts its header.
    """
    if not np.array_equal(_sum(vectors, seeds, frozen), total):
        raise TrustError(
            "the published sum is not the sum of the vectors it names", code="false-sum",
            hint="stop, and keep the outcome as evidence: the aggregator is faulty or lies",
        )


def _sum(uploads: Mapping[int, Words], seeds: Mapping[int, bytes], frozen: Frozen) -> Words:
    headers = frozen.headers
    for name, given in (("vectors", uploads), ("seeds", seeds)):
        if set(given) != set(headers):
            raise _refused(f"{name} of silos {sorted(given)} for a set of {sorted(headers)}")
    for silo in headers:
        check_seed(frozen, silo, seeds[silo])
    total = np.zeros(next(iter(headers.values())).dimension, dtype="<u4")
    for silo, header in headers.items():
        y = uploads[silo]
        check_vector(y, header)
        np.add(total, y, out=total)
        prg.add_stream(total, _self_mask_key(seeds[silo], header.round_ctx, header.attempt, silo), -1)
    return total


def check_vector(y: Words, header: Header) -> None:
    """Return if ``y`` is the masked vector of which the header speaks. Raises TrustError naming the silo."""
    _check_words(y, f"the masked vector of silo {header.silo}")
    if y.size != header.dimension or vector_root(y) != header.root:
        raise _refused(f"the masked vector of silo {header.silo} does not match the root in its header")


def check_seed(frozen: Frozen, silo: int, seed: bytes) -> None:
    """Return if ``seed`` is the b_i to which the silo's header in the set is committed. Raises TrustError naming the silo."""
    header = frozen.headers.get(silo)
    if header is None:
        raise _refused(f"silo {silo} is not in the set")
    place = {"round_ctx": header.round_ctx, "attempt": header.attempt}
    if len(seed) != 32 or self_commitment(seed, silo=silo, **place) != header.self_commitment:
        raise _refused(f"the seed of silo {silo} contradicts the commitment of the attempt in the set")


def _self_mask_key(seed: bytes, round_ctx: bytes, attempt: bytes, silo: int) -> bytes:
    return expand(seed, "gsum/1 self-mask", round_ctx, attempt, u32(silo))


def _release_info(frozen: Frozen, silo: int) -> bytes:
    # The digest of U binds round, attempt and header; the round is named again so that each field stands by itself.
    return b"gsum/1 release\0" + frozen.round_ctx + frozen.digest + u32(silo)


def _check_pairs(headers: Mapping[int, Header]) -> None:
    commitments = {silo: dict(header.pair_commitments) for silo, header in headers.items()}
    apart = [(i, j) for i, j in combinations(headers, 2) if commitments[i][j] != commitments[j][i]]
    if apart:
        names = ", ".join(f"{i} and {j}" for i, j in apart)
        raise TrustError(
            f"the pair commitments of these silos differ: {names}", code="pairs-disagree", pairs=apart,
            hint="they saw another manifest, epoch or contract, or one of them lies; nothing was released",
        )


def _check_round(what: str, silo: int, found: bytes, wanted: bytes) -> None:
    _check_same(what, silo, "round", found, wanted)


def _check_set(what: str, silo: int, found: bytes, wanted: bytes) -> None:
    _check_same(what, silo, "set", found, wanted)


def _check_same(what: str, silo: int, field: str, found: bytes, wanted: bytes) -> None:
    if found != wanted:
        whose = f" of silo {silo}" if silo else ""
        raise _refused(f"the {what}{whose} is for {field} {found.hex()[:16]}…, expected {wanted.hex()[:16]}…")


def _check_words(words: Words, name: str) -> None:
    if words.dtype != np.dtype("<u4") or words.ndim != 1 or words.size == 0:
        raise _refused(f"{name} is {words.dtype} of shape {words.shape}, wanted a non-empty uint32 vector")


def _check_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise _refused(f"{name} has {len(value)} bytes, wanted {size}")


def _refused(what: str) -> TrustError:
    return TrustError(what, hint="nothing is released in this round; keep the message, it is evidence", code="sum-refused")
