# SPDX-License-Identifier: Apache-2.0
"""One silo's part of a secure sum: its vector masked, and the header that binds it to what it sent.

Promised: see ``secure_sum.guardian_sum``, whose guarantees 1, 3 and 4 rest on ``mask``. Nothing here knows who else is in the sum:
peers are those for whom a pair key is given. Not here: sets, shares and releases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy import envelope, prg
from privacy.errors import TrustError
from privacy.federation import Accepted, Member
from privacy.identity.keys import expand, extract, u32
from privacy.messages import Header, Upload
from privacy.secure_sum import merkle

Words = NDArray[np.uint32]
Signs = list[tuple[bytes, Literal[1, -1]]]
"""Mask streams by key, each to be added (1) or taken away (-1)."""


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


def mask(x: Words, *, round_ctx: bytes, silo: int, attempt: bytes, self_seed: bytes, pair_keys: Mapping[int, bytes]) -> Words:
    """y_i = x_i + stream(self) + Σ_{j>i} stream(M_ij) - Σ_{j<i} stream(M_ij) mod 2³², as a new array (d,).

    **Formal guarantees**: while b_i, or any one k_ij, is unknown, y_i is uniform and independent of x_i. One mask stream
    serves one vector: call this once per attempt, with everything concatenated. There is no way to leave the self mask out.

    Raises:
        TrustError: ``x`` is not a non-empty uint32 vector, no peer is given, or this silo is among its peers.
    """
    _check_words(x, f"the vector of silo {silo}")
    if not pair_keys or silo in pair_keys:
        raise refused(f"silo {silo} needs a key for each of its peers, and none for itself; got {sorted(pair_keys)}")
    y = x.copy()
    streams: Signs = [(self_mask_key(self_seed, round_ctx=round_ctx, attempt=attempt, silo=silo), 1)]
    prg.add_streams(y, streams + [pair_mask(key, silo=silo, peer=peer) for peer, key in sorted(pair_keys.items())])
    return y


def self_mask_key(self_seed: bytes, *, round_ctx: bytes, attempt: bytes, silo: int) -> bytes:
    """The key of the self mask's stream: Expand(b_i, "gsum/1 self-mask" NUL ‖ round_ctx ‖ attempt ‖ i)."""
    return expand(self_seed, "gsum/1 self-mask", round_ctx, attempt, u32(silo))


def pair_mask(pair_key: bytes, *, silo: int, peer: int) -> tuple[bytes, Literal[1, -1]]:
    """M_ij = Expand(k_ij, "gsum/1 mask" NUL), and how it enters the silo's y: the lower id of a pair adds, the higher subtracts."""
    return expand(pair_key, "gsum/1 mask"), 1 if peer > silo else -1


def self_commitment(self_seed: bytes, *, round_ctx: bytes, attempt: bytes, silo: int) -> bytes:
    """Binds b_i without showing it: Expand(b_i, "gsum/1 self-commit" NUL ‖ round_ctx ‖ attempt ‖ i)."""
    return expand(self_seed, "gsum/1 self-commit", round_ctx, attempt, u32(silo))


def pair_commitment(pair_key: bytes) -> bytes:
    """C_ij = Expand(k_ij, "gsum/1 commit" NUL): equal on both sides if and only if both hold one k_ij."""
    return expand(pair_key, "gsum/1 commit")


def vector_root(y: Words, *, threads: int = merkle.THREADS) -> bytes:
    """The RFC 6962 root over the little-endian bytes of ``y`` in leaves of 64 KiB."""
    return merkle.root(np.ascontiguousarray(y, dtype="<u4").view(np.uint8).data, threads=threads)


def build_header(
    y: Words,
    *,
    round_ctx: bytes,
    silo: int,
    attempt: bytes,
    ledger_counter: int,
    self_seed: bytes,
    pair_keys: Mapping[int, bytes],
    bundles: Sequence[tuple[int, bytes, bytes]] = (),
) -> Header:
    """The silo's binding statement about ``y``, to be signed as "header" in epoch_ctx. It holds digests and commitments only.

    Args:
        bundles: in share mode the ``entries`` of ``privacy.secure_sum.shares.deal``, for this attempt and these keys.
    """
    return Header(
        round_ctx=round_ctx, silo=silo, attempt=attempt, ledger_counter=ledger_counter, dimension=y.size, root=vector_root(y),
        self_commitment=self_commitment(self_seed, round_ctx=round_ctx, attempt=attempt, silo=silo),
        pair_commitments=tuple((peer, pair_commitment(key)) for peer, key in sorted(pair_keys.items())),
        bundles=tuple(bundles),
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
        raise refused(f"the masked vector of silo {header.silo} has {len(raw)} bytes, its header says {header.dimension} words")
    y = np.frombuffer(raw, dtype="<u4")
    check_vector(y, header)
    return y


def check_header(
    raw: bytes, member: Member, *, accepted: Accepted, epoch_ctx: bytes, round_ctx: bytes, silos: Sequence[int] | None = None
) -> Header:
    """The member's header for this round, by itself fit to be in a set; also what the aggregator checks at upload.

    Args:
        silos: the silos of the epoch, E; None for all members.

    Raises:
        TrustError: not signed by the member in this epoch, of another round or dimension, with other peers than E, or with
            bundles for others than at least q of the contract's guardians.
    """
    header = envelope.open_member(raw, Header, type="header", context=epoch_ctx, member=member)
    check_round("header", f"silo {member.id}", header.round_ctx, round_ctx)
    terms = accepted.terms
    if header.dimension != terms.dimension:
        raise refused(f"the header of silo {member.id} is for {header.dimension} words, the contract has {terms.dimension}")
    everybody = [other.id for other in terms.member] if silos is None else silos
    if member.id not in everybody:
        raise refused(f"silo {member.id} is not among the silos of this epoch, {list(everybody)}")
    peers, wanted = [peer for peer, _ in header.pair_commitments], [other for other in everybody if other != member.id]
    if peers != wanted:
        raise refused(f"the header of silo {member.id} commits to pairs with {peers}, its peers are {wanted}")
    dealt, guardians = [guardian for guardian, _, _ in header.bundles], [guardian.id for guardian in terms.guardian]
    # Those of the roster, which may be fewer than the contract's; a silo that leaves one out is disputed by that one.
    if dealt != [each for each in guardians if each in dealt] or len(dealt) < (terms.quorum if terms.shared else 0):
        raise refused(f"the header of silo {member.id} has bundles for guardians {dealt}, the contract has {guardians}")
    return header


def check_vector(y: Words, header: Header, *, threads: int = merkle.THREADS) -> None:
    """Return if ``y`` is the masked vector of which the header speaks. Raises TrustError naming the silo."""
    _check_words(y, f"the masked vector of silo {header.silo}")
    if y.size != header.dimension or vector_root(y, threads=threads) != header.root:
        raise refused(f"the masked vector of silo {header.silo} does not match the root in its header")


def check_round(what: str, whose: str, found: bytes, wanted: bytes) -> None:
    """Return if a message names this round. Raises TrustError."""
    check_same(what, whose, "round", found, wanted)


def check_set(what: str, whose: str, found: bytes, wanted: bytes) -> None:
    """Return if a message names this set. Raises TrustError."""
    check_same(what, whose, "set", found, wanted)


def check_same(what: str, whose: str, field: str, found: bytes, wanted: bytes) -> None:
    """Return if both digests are one. Raises TrustError that names the message, its author ("" for nobody) and the field."""
    if found != wanted:
        author = f" of {whose}" if whose else ""
        raise refused(f"the {what}{author} is for {field} {found.hex()[:16]}…, expected {wanted.hex()[:16]}…")


def _check_words(words: Words, name: str) -> None:
    if words.dtype != np.dtype("<u4") or words.ndim != 1 or words.size == 0:
        raise refused(f"{name} is {words.dtype} of shape {words.shape}, wanted a non-empty uint32 vector")


def _check_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise refused(f"{name} has {len(value)} bytes, wanted {size}")


def refused(what: str, *, code: str = "sum-refused", **facts: object) -> TrustError:
    """Why something is in no sum."""
    return TrustError(what, hint="nothing is released in this round; keep the message, it is evidence", code=code, **facts)
