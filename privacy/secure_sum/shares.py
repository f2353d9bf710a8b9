# SPDX-License-Identifier: Apache-2.0
"""Share mode: guardians hold shares of what unmasks a sum, so that a silo may go after its one upload.

Order, all pure: ``deal`` (silo, in its upload) → ``receive`` and ``listing`` (guardian) → ``secure_sum.freeze`` (the set, its
certificate) → ``release`` (guardian) → ``open_shares`` and ``reconstruct`` (aggregator) → ``secure_sum.guardian_sum.unmask``.
Shamir's sharing of every b_i and k_ij with threshold q (``privacy.secure_sum.shamir``); bundles after Flamingo (arXiv 2308.09883).

**Formal guarantees.** Let a coalition hold the aggregator, the network, at most T guardians and at most t_c silos.

1. *Too few shares say nothing*: of a secret that no honest guardian released the coalition has at most T < q shares.
2. *Never both*: of a silo in U b_i is released and none of its keys with silos in U; of a silo outside U no b_i. What is
   released follows from the certified set alone: no message can name a silo or a kind of secret.
3. *Only certified*: a share leaves a guardian sealed, and only for a ``Certified`` set.
4. *Right secret, or a name*: a share that is not the dealer's is refused and its guardian named; a secret that q right shares
   give and that contradicts its commitment names the dealer.

Assumed: as ``privacy.secure_sum.guardian_sum``; and that honest guardians keep their promise, one set per round, on their disk.

**Not promised**: that a round ends with a sum when dealers collude (one that seals rubbish to a guardian silences it in this
round), anything against more than T guardians with the aggregator, or that a released secret is forgotten.

===========================================  ==========================================================
edge case                                    behaviour
===========================================  ==========================================================
a bundle that does not open                  dispute "sealed", both named, nobody guilty
one that opens and contradicts its root      dispute "root", likewise
a guardian without a bundle of one of U      it releases nothing (TrustError "no-bundle")
no silo is missing                           only b_i are released
===========================================  ==========================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, Contract, Guardian
from privacy.identity.keys import u32
from privacy.messages import Header, Listing, Shares, Upload
from privacy.secure_sum import shamir
from privacy.secure_sum.freeze import Certified, Frozen, check_seed
from privacy.secure_sum.masking import check_round, check_set, pair_commitment, refused
from privacy.transparency import proofs

Bytes = NDArray[np.uint8]
Place = tuple[int, int]
"""Whose bundle, and which secret in it: 0 for b_i, j for k_ij."""


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """A silo's bundles by ascending guardian, for its Upload, and what its header says of them."""

    bundles: tuple[bytes, ...]
    entries: tuple[tuple[int, bytes, bytes], ...]


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a guardian has of one upload: the header, its digest as signed, and the shares (m, 32), or why there are none."""

    header: Header
    digest: bytes
    dispute: Literal["sealed", "root"] | None = None
    shares: Bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Released:
    """One guardian's shares for a certified set, (places, 32), each proven to be its dealer's."""

    guardian: int
    shares: Bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a certified set gives: b_i by silo of U, and k_ij by (i in U, j missing). Public from here on, by the outcome."""

    seeds: dict[int, bytes] = field(repr=False)
    pair_keys: dict[Place, bytes] = field(repr=False)


def deal(
    *,
    self_seed: bytes,
    pair_keys: Mapping[int, bytes],
    round_ctx: bytes,
    silo: int,
    attempt: bytes,
    terms: Contract,
    guardian_keys: Mapping[int, bytes],
) -> Dealt:
    """Shares of b_i and of every k_ij for each guardian, sealed to its epoch key. Fresh coefficients at every call: the upload
    that is kept is the one that is sent.

    Args:
        guardian_keys: X-Wing key by guardian id, from the roster's notes; at least q of the contract's guardians.

    Raises:
        TrustError: keys of other guardians than the contract's, an unfit key, or a secret that has not 32 bytes.
    """
    guardians = [guardian.id for guardian in terms.guardian]
    if not set(guardian_keys) <= set(guardians) or len(guardian_keys) < terms.quorum:
        raise refused(f"keys of guardians {sorted(guardian_keys)}, the contract has {guardians} and needs {terms.quorum}")
    held = [self_seed, *(key for _, key in sorted(pair_keys.items()))]
    if any(len(each) != shamir.SECRET_BYTES for each in held):
        raise refused(f"a secret of silo {silo} has not {shamir.SECRET_BYTES} bytes")
    secrets = np.frombuffer(b"".join(held), dtype=np.uint8).reshape(len(held), shamir.SECRET_BYTES)
    split = shamir.split(secrets, threshold=terms.quorum, count=len(guardians))
    bundles, entries = [], []
    for guardian, shares in zip(guardians, split, strict=True):
        if guardian not in guardian_keys:  # not in this epoch: its share is never seen
            continue
        where: _Where = {"round_ctx": round_ctx, "attempt": attempt, "silo": silo, "guardian": guardian}
        sealed = envelope.seal(guardian_keys[guardian], shares.tobytes(), info=_bundle_info(**where))
        root = proofs.root_of_hashes(_leaves(shares, sorted(pair_keys), **where))
        bundles.append(sealed)
        entries.append((guardian, hashlib.sha256(sealed).digest(), root))
    return Dealt(bundles=tuple(bundles), entries=tuple(entries))


def bundle_bytes(silos: int) -> int:
    """How long a sealed bundle is in an epoch of ``silos`` silos: one b_i, and a key for each peer."""
    return shamir.SECRET_BYTES * silos + envelope.OVERHEAD_BYTES


def check_bundles(upload: Upload, header: Header) -> None:
    """Return if the upload's bundles are those of which its verified header speaks, by digest and length.

    Raises:
        TrustError: another number of bundles, another digest, or another length than this epoch's.
    """
    if len(upload.bundles) != len(header.bundles):
        raise refused(f"the upload of silo {header.silo} has {len(upload.bundles)} bundles, its header says {len(header.bundles)}")
    size = bundle_bytes(len(header.pair_commitments) + 1)
    for sealed, (guardian, digest, _) in zip(upload.bundles, header.bundles, strict=True):
        if len(sealed) != size or hashlib.sha256(sealed).digest() != digest:
            raise refused(f"the bundle of silo {header.silo} for guardian {guardian} is not the one in its header")


def receive(upload: Upload, header: Header, *, guardian: int, seal_seed: bytes) -> Received:
    """What this guardian has of an upload whose header was verified; a bad bundle is a dispute and raises nothing."""
    guardians = [each for each, _, _ in header.bundles]
    at = guardians.index(guardian) if guardian in guardians else len(upload.bundles)
    bundle = upload.bundles[at] if at < len(upload.bundles) else b""
    return receive_bundle(bundle, upload.header, header, guardian=guardian, seal_seed=seal_seed)


def receive_bundle(bundle: bytes, raw_header: bytes, header: Header, *, guardian: int, seal_seed: bytes) -> Received:
    """``receive`` for a guardian that kept its own bundle alone.

    Args:
        raw_header: the signed header, of which ``header`` = check_header(raw_header, …).
    """
    digest = hashlib.sha256(raw_header).digest()
    stated = {each: (sealed, root) for each, sealed, root in header.bundles}.get(guardian)
    if stated is None or hashlib.sha256(bundle).digest() != stated[0]:
        return Received(header=header, digest=digest, dispute="sealed")
    where = _where(header, guardian)
    try:
        raw = envelope.open_sealed(seal_seed, bundle, info=_bundle_info(**where))
    except TrustError:
        return Received(header=header, digest=digest, dispute="sealed")
    peers = [peer for peer, _ in header.pair_commitments]
    if len(raw) != shamir.SECRET_BYTES * (len(peers) + 1):
        return Received(header=header, digest=digest, dispute="root")
    shares = np.frombuffer(raw, dtype=np.uint8).reshape(-1, shamir.SECRET_BYTES)
    if proofs.root_of_hashes(_leaves(shares, peers, **where)) != stated[1]:
        return Received(header=header, digest=digest, dispute="root")
    return Received(header=header, digest=digest, shares=shares)


def listing(received: Iterable[Received], *, round_ctx: bytes, guardian: int) -> Listing:
    """The guardian's list, to be signed as "list" in epoch_ctx: what it can answer for, and what it disputes.

    Raises:
        TrustError: two uploads of one silo, or one of another round.
    """
    given = list(received)
    by_silo = {each.header.silo: each for each in given}
    if len(by_silo) != len(given):
        raise refused("two uploads of one silo in a list")
    for silo, each in by_silo.items():
        check_round("header", f"silo {silo}", each.header.round_ctx, round_ctx)
    ordered = sorted(by_silo.items())
    return Listing(
        round_ctx=round_ctx, guardian=guardian,
        headers=tuple((silo, each.digest) for silo, each in ordered if each.dispute is None),
        disputes=tuple((silo, each.dispute) for silo, each in ordered if each.dispute is not None),
    )  # fmt: skip


def places(frozen: Frozen) -> list[Place]:
    """What is released for a set, in order: b_i for i in U ascending, then k_ij for i in U, j missing, ascending."""
    return [(silo, 0) for silo in frozen.headers] + [(silo, gone) for silo in frozen.headers for gone in frozen.missing]


def release(certified: Certified, received: Mapping[int, Received], *, guardian: int, seal_key: bytes) -> Shares:
    """This guardian's shares for the certified set, sealed to the aggregator's key, to be signed as "shares" in epoch_ctx.

    **Formal guarantees**: the places are computed from the set alone, and the shares are those of the very headers in it: an
    attempt outside U has another header and is refused.

    Args:
        received: by silo; at least all of U.

    Raises:
        TrustError: code "no-bundle": the bundle of a silo in U, for the header in U, never opened here; or an unfit key.
    """
    frozen = certified.frozen
    pieces: dict[Place, bytes] = {}
    for silo, header in frozen.headers.items():
        found = received.get(silo)
        if found is None or found.shares is None or found.header != header:
            raise refused(
                f"guardian {guardian} has no shares of silo {silo} for the header in the set", code="no-bundle", silo=silo
            )
        indices, peers = _indices(header, frozen), [peer for peer, _ in header.pair_commitments]
        leaves = _leaves(found.shares, peers, **_where(header, guardian))
        proven = proofs.inclusion_proofs(leaves, tuple(indices.values()))
        for (secret, at), proof in zip(indices.items(), proven, strict=True):
            pieces[silo, secret] = found.shares[at].tobytes() + b"".join(proof)
    payload = b"".join(pieces[place] for place in places(frozen))
    sealed = envelope.seal(seal_key, payload, info=_shares_info(frozen, guardian))
    return Shares(round_ctx=frozen.round_ctx, guardian=guardian, frozen=frozen.digest, sealed=sealed)


def release_bytes(frozen: Frozen) -> int:
    """The exact length of ``Shares.sealed`` for this set."""
    return _payload_bytes(frozen) + envelope.OVERHEAD_BYTES


def most_release_bytes(silos: int) -> int:
    """No ``Shares.sealed`` of an epoch of at most ``silos`` silos is longer: a cap before the set is known."""
    most = max(standing * (1 + silos - standing) for standing in range(silos + 1))
    return most * (shamir.SECRET_BYTES + proofs.HASH_BYTES * max(silos - 1, 0).bit_length()) + envelope.OVERHEAD_BYTES


def open_shares(raw: bytes, certified: Certified, *, guardian: Guardian, epoch_ctx: bytes, seal_seed: bytes) -> Released:
    """A guardian's released shares, each held to its dealer's root in the certified set.

    Raises:
        TrustError: not signed by the guardian, of another round or set; code "guardian-guilty": it does not open, has another
            length, or a share contradicts its root. Leave this guardian's shares aside, and name it.
    """
    frozen = certified.frozen
    stated = envelope.open_guardian(raw, Shares, type="shares", context=epoch_ctx, guardian=guardian)
    check_round("shares", f"guardian {guardian.id}", stated.round_ctx, frozen.round_ctx)
    check_set("shares", f"guardian {guardian.id}", stated.frozen, frozen.digest)
    try:
        payload = envelope.open_sealed(seal_seed, stated.sealed, info=_shares_info(frozen, guardian.id))
    except TrustError as error:
        raise _guilty(guardian.id, "do not open") from error
    if len(payload) != _payload_bytes(frozen):
        raise _guilty(guardian.id, f"have {len(payload)} bytes, this set gives {_payload_bytes(frozen)}")
    shares, start = [], 0
    checks = {silo: _Dealer.of(header, frozen, guardian.id) for silo, header in frozen.headers.items()}
    for silo, secret in places(frozen):
        dealer = checks[silo]
        end = start + dealer.piece_bytes(secret)
        shares.append(dealer.proven(secret, payload[start:end]))
        start = end
    return Released(guardian=guardian.id, shares=np.frombuffer(b"".join(shares), dtype=np.uint8).reshape(-1, shamir.SECRET_BYTES))


def reconstruct(released: Mapping[int, Released], certified: Certified, *, accepted: Accepted) -> Secrets:
    """Every secret of the certified set, from the q lowest guardians that released, each held to its commitment.

    Raises:
        TrustError: code "too-few-shares": fewer than q guardians; code "dealer-guilty": right shares of a wrong secret, the
            message names the silo.
    """
    terms, frozen = accepted.terms, certified.frozen
    used = sorted(released)[: terms.quorum]
    if len(used) < terms.quorum:
        raise refused(f"shares of {len(used)} guardians, {terms.quorum} are needed", code="too-few-shares", found=len(used))
    secrets = shamir.combine([terms.position(guardian) for guardian in used], [released[guardian].shares for guardian in used])
    found = {place: secret.tobytes() for place, secret in zip(places(frozen), secrets, strict=True)}
    for (silo, other), secret in found.items():
        _check_secret(frozen, silo, other, secret)
    seeds = {silo: secret for (silo, other), secret in found.items() if other == 0}
    return Secrets(seeds=seeds, pair_keys={place: secret for place, secret in found.items() if place[1]})


def check_pair_key(frozen: Frozen, silo: int, peer: int, key: bytes) -> None:
    """Return if ``key`` is the k_ij to which the silo's header in the set is committed. Raises TrustError naming the silo."""
    stated = frozen.commitments.get(silo, {}).get(peer)
    if len(key) != shamir.SECRET_BYTES or stated is None or pair_commitment(key) != stated:
        raise refused(f"the key of silos {silo} and {peer} contradicts the commitment in the set")


def _check_secret(frozen: Frozen, silo: int, other: int, secret: bytes) -> None:
    try:
        check_pair_key(frozen, silo, other, secret) if other else check_seed(frozen, silo, secret)
    except TrustError as error:
        raise refused(f"silo {silo} dealt shares of another secret: {error.message}", code="dealer-guilty", silo=silo) from error


class _Where(TypedDict):
    """Whose bundle for whom: what every share and seal is bound to."""

    round_ctx: bytes
    attempt: bytes
    silo: int
    guardian: int


def _where(header: Header, guardian: int) -> _Where:
    return {"round_ctx": header.round_ctx, "attempt": header.attempt, "silo": header.silo, "guardian": guardian}


def _leaf_start(*, round_ctx: bytes, attempt: bytes, silo: int, guardian: int) -> bytes:
    return b"gsum/1 share\0" + round_ctx + attempt + u32(silo) + u32(guardian)


def _leaves(shares: Bytes, peers: Sequence[int], **where: Unpack[_Where]) -> list[bytes]:
    """Hashes of "gsum/1 share" NUL ‖ round_ctx ‖ attempt ‖ i ‖ guardian ‖ secret id (0 = b_i, else j) ‖ share."""
    start = _leaf_start(**where)
    pieces = zip(shares, (0, *peers), strict=True)
    return [proofs.leaf_hash(start + u32(secret) + share.tobytes()) for share, secret in pieces]


def _indices(header: Header, frozen: Frozen) -> dict[int, int]:
    """Where the secrets that are released stand in the dealer's bundle, by secret id."""
    # The bundle holds b_i, then the keys with all other silos of E: a missing one after i has one place less.
    return {0: 0, **{gone: rank + (1 if gone < header.silo else 0) for gone, rank in frozen.ranks.items()}}


@dataclass(frozen=True, kw_only=True)
class _Dealer:
    """What shares of one dealer are held to."""

    start: bytes
    silo: int
    guardian: int
    root: bytes
    size: int
    indices: Mapping[int, int]
    lengths: Mapping[int, int]
    node: Callable[[bytes, bytes], bytes]
    """Remembers: the paths of one dealer's shares join."""

    @classmethod
    def of(cls, header: Header, frozen: Frozen, guardian: int) -> Self:
        indices, size = _indices(header, frozen), len(header.pair_commitments) + 1
        return cls(
            start=_leaf_start(**_where(header, guardian)), silo=header.silo, guardian=guardian, size=size, indices=indices,
            root=next((root for each, _, root in header.bundles if each == guardian), b""),  # b"": no share fits it
            lengths={secret: proofs.inclusion_length(at, size) for secret, at in indices.items()},
            node=lru_cache(maxsize=None)(proofs.node_hash),
        )  # fmt: skip

    def piece_bytes(self, secret: int) -> int:
        """A share and its inclusion proof."""
        return shamir.SECRET_BYTES + proofs.HASH_BYTES * self.lengths[secret]

    def proven(self, secret: int, piece: bytes) -> bytes:
        """The share in ``piece``, whose proof leads to the dealer's root. Raises TrustError naming the guardian."""
        share, rest = piece[: shamir.SECRET_BYTES], piece[shamir.SECRET_BYTES :]
        proof = [rest[at : at + proofs.HASH_BYTES] for at in range(0, len(rest), proofs.HASH_BYTES)]
        leaf = proofs.leaf_hash(self.start + u32(secret) + share)
        if proofs.root_from_inclusion(leaf, self.indices[secret], self.size, proof, node=self.node) != self.root:
            raise _guilty(self.guardian, f"contradict the root of silo {self.silo}")
        return share


def _payload_bytes(frozen: Frozen) -> int:
    total = 0
    for header in frozen.headers.values():
        size = len(header.pair_commitments) + 1
        lengths = [proofs.inclusion_length(at, size) for at in _indices(header, frozen).values()]
        total += shamir.SECRET_BYTES * len(lengths) + proofs.HASH_BYTES * sum(lengths)
    return total


def _bundle_info(*, round_ctx: bytes, attempt: bytes, silo: int, guardian: int) -> bytes:
    return b"gsum/1 bundle\0" + round_ctx + attempt + u32(silo) + u32(guardian)


def _shares_info(frozen: Frozen, guardian: int) -> bytes:
    # The digest of U binds round and headers; the round is named again so that each field stands by itself.
    return b"gsum/1 shares\0" + frozen.round_ctx + frozen.digest + u32(guardian)


def _guilty(guardian: int, what: str) -> TrustError:
    return refused(f"the shares of guardian {guardian} {what}", code="guardian-guilty", guardian=guardian)
