# SPDX-License-Identifier: Apache-2.0
"""Wire types: one frozen struct per protocol step, and the only decoder.

Encoding is MessagePack arrays (no keys, hence no duplicate or unknown ones). ``decode`` accepts exactly the canonical
encoding: what it returns re-encodes to the bytes it was given, so trailing, non-minimal or coerced data is refused. Digests
and keys are raw bytes; ids count from 1; party 0 is the aggregator.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, TypeVar

import msgspec

from privacy.errors import TrustError

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Key = Digest
SealKey = Annotated[bytes, msgspec.Meta(min_length=1216, max_length=1216)]
Attempt = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=3373)]
"""Ed25519 (64 bytes), or Ed25519 ‖ ML-DSA-65 (3373 bytes); which of the two the contract says, not the message."""
Number = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
SiloId = Annotated[int, msgspec.Meta(ge=1, lt=2**15)]
GuardianId = Annotated[int, msgspec.Meta(gt=2**15, lt=2**16)]
PartyId = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]

AGGREGATOR = 0
EMPTY_LOG = hashlib.sha256(b"").digest()
"""The RFC 6962 root of no leaves."""

Kind = Literal[
    "contract", "countersignature",
    "epoch", "epoch-note", "guardian-note", "roster", "pair-seeds", "confirmation",
    "manifest", "upload", "list", "freeze", "consent", "endorsement", "certificate", "release", "shares", "close",
    "vector", "claim", "verdict", "audit",
    "outcome", "acknowledgement",
    "refusal", "report",
    "checkpoint", "cosignature", "head",
]  # fmt: skip
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]
AGGREGATOR_KINDS = frozenset(
    {"contract", "epoch", "roster", "manifest", "freeze", "certificate", "vector", "claim", "audit", "outcome", "refusal", "report"}
    | {"checkpoint", "head"}
)
NOTE_KINDS = frozenset({"checkpoint", "cosignature", "head"})
"""Kinds whose documents are signed notes about the log (privacy.transparency.log) and not ``Signed``; they are no leaves of it."""


class Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all wire types; see the module docstring for the encoding."""


class Signed(Wire, frozen=True, kw_only=True):
    """A document and its author's signature over the body's exact bytes (privacy.envelope)."""

    version: Literal["gsum/1"]
    type: Kind | Literal["identity", "header"]
    sender: PartyId
    context: Digest
    body: bytes
    signature: Signature


class Countersignature(Wire, frozen=True, kw_only=True):
    """A member's agreement to one contract version. The signature also proves possession of the member's key.

    ``former``: where the member has another key than in the version before, the signature of the old one over this same agreement
    with ``former`` empty (privacy.chain); empty when it was lost, and where nothing changed.
    """

    contract: Digest
    member: SiloId
    former: Annotated[bytes, msgspec.Meta(max_length=3373)] = b""


class EpochCall(Wire, frozen=True, kw_only=True):
    """The aggregator asks all members for epoch keys."""

    contract: Digest
    epoch: Number


class EpochNote(Wire, frozen=True, kw_only=True):
    """A member's fresh keys for one epoch. ``basis`` is the digest of the (A, B) that it computed itself."""

    contract: Digest
    epoch: Number
    silo: SiloId
    instance: Attempt
    seed_key: SealKey
    dh_key: Key
    basis: Digest


class GuardianNote(Wire, frozen=True, kw_only=True):
    """A guardian's fresh key for one epoch: bundles of shares are sealed to it."""

    contract: Digest
    epoch: Number
    guardian: GuardianId
    instance: Attempt
    guardian_key: SealKey


class Roster(Wire, frozen=True, kw_only=True):
    """All notes of an epoch, as signed, by ascending silo. epoch_ctx is computed over this struct's bytes.

    In share mode ``notes`` are those of the silos that take part in this epoch, at least u_min of them, and ``guardians`` are the
    notes of all guardians; in consent mode all silos take part and there are no guardians.
    """

    contract: Digest
    epoch: Number
    notes: tuple[bytes, ...]
    guardians: tuple[bytes, ...] = ()


class PairSeeds(Wire, frozen=True, kw_only=True):
    """One sealed 32-byte seed per peer, by ascending peer. Signing it also signs the roster: its context is epoch_ctx."""

    epoch: Number
    silo: SiloId
    sealed: tuple[tuple[SiloId, bytes], ...]


class Confirmation(Wire, frozen=True, kw_only=True):
    """Key confirmation per peer, by ascending peer: HKDF-Expand(s_ij, "gsum/1 confirm" ...)."""

    epoch: Number
    silo: SiloId
    tags: tuple[tuple[SiloId, Digest], ...]


class Manifest(Wire, frozen=True, kw_only=True):
    """What one round is. round_ctx is the SHA-256 of this struct's bytes.

    ``log_size`` and ``log_root``: the head of the transparency log on which the round is opened, so that two parties that were
    shown different logs are in different rounds.
    """

    epoch_ctx: Digest
    epoch: Number
    round: Number
    previous: Digest
    base_state: Digest
    dimension: Number
    ring_bits: Literal[32]
    lattice_bits: Number
    clamp: Number
    opened_at: int
    deadline_at: int
    log_size: Number = 0
    log_root: Digest = EMPTY_LOG


class Header(Wire, frozen=True, kw_only=True):
    """A silo's binding, public statement about its masked vector."""

    round_ctx: Digest
    silo: SiloId
    attempt: Attempt
    ledger_counter: Number
    dimension: Number
    root: Digest
    self_commitment: Digest
    pair_commitments: tuple[tuple[SiloId, Digest], ...]
    bundles: tuple[tuple[GuardianId, Digest, Digest], ...] = ()
    """In share mode, by ascending guardian: SHA-256 of its sealed bundle, and the RFC 6962 root of its shares."""


class Upload(Wire, frozen=True, kw_only=True):
    """A silo's one large message: its signed header, and the masked vector sealed to the aggregator.

    Its document is Signed as "upload" around both, so that nobody can put other sealed bytes beside a valid header. The header
    is Signed by itself too: it goes on alone, in the Freeze.
    """

    header: bytes
    sealed: bytes
    bundles: tuple[bytes, ...] = ()
    """In share mode, by ascending guardian: the silo's Shamir shares for it, sealed to its epoch key."""


class Listing(Wire, frozen=True, kw_only=True):
    """Which uploads a guardian can answer for: those whose bundle opened and matches its share root. It binds to no set.

    ``headers`` by ascending silo: SHA-256 of the signed header. ``disputes``: uploads it cannot answer for, and why.
    """

    round_ctx: Digest
    guardian: GuardianId
    headers: tuple[tuple[SiloId, Digest], ...]
    disputes: tuple[tuple[SiloId, Literal["sealed", "root"]], ...]


class Freeze(Wire, frozen=True, kw_only=True):
    """The set U that the aggregator proposes: signed headers by ascending silo, in consent mode of every member.

    In share mode ``lists`` are the q signed lists that U rests on, by ascending guardian, ``headers`` are all those that stand in
    every one of them, and ``left_out`` says of every silo of the epoch outside U why it is not in U. So everybody computes U
    again from this document alone.
    """

    round_ctx: Digest
    headers: tuple[bytes, ...]
    lists: tuple[bytes, ...] = ()
    left_out: tuple[tuple[SiloId, Literal["absent", "unlisted", "mismatch", "block"]], ...] = ()


class Consent(Wire, frozen=True, kw_only=True):
    """A silo's agreement that its vector is summed with exactly the set ``frozen`` (digest of U)."""

    round_ctx: Digest
    silo: SiloId
    frozen: Digest


class Endorsement(Wire, frozen=True, kw_only=True):
    """A guardian's one signature for a set in a round. It is on the guardian's disk before it leaves."""

    round_ctx: Digest
    guardian: GuardianId
    frozen: Digest


class Certificate(Wire, frozen=True, kw_only=True):
    """All consents, as signed, by ascending silo; in share mode the endorsements of q guardians, by ascending guardian."""

    round_ctx: Digest
    frozen: Digest
    consents: tuple[bytes, ...]


class Release(Wire, frozen=True, kw_only=True):
    """A silo's self-mask seed, sealed to the aggregator, sent only against a certificate."""

    round_ctx: Digest
    silo: SiloId
    frozen: Digest
    sealed: bytes


class Shares(Wire, frozen=True, kw_only=True):
    """What a guardian releases against a certificate, sealed to the aggregator: its shares of b_i for i in U, then of k_ij for
    i in U and j outside, ascending. The message names no silo: both sides compute the places from U alone.
    """

    round_ctx: Digest
    guardian: GuardianId
    frozen: Digest
    sealed: bytes


class Close(Wire, frozen=True, kw_only=True):
    """A guardian's word that it signs and releases nothing more in a round: the set it endorsed, if any, and if it released."""

    round_ctx: Digest
    guardian: GuardianId
    frozen: Annotated[bytes, msgspec.Meta(max_length=32)]
    released: bool


class Vector(Wire, frozen=True, kw_only=True):
    """A silo's masked vector in the clear, little-endian uint32, where slices are audited. Not signed: the header has its root.

    The words come last, so that their places are known and a part of them can be fetched by itself.
    """

    round_ctx: Digest
    silo: SiloId
    words: bytes


class SumClaim(Wire, frozen=True, kw_only=True):
    """Where slices are audited: the sum that the aggregator found, and all that each segment of it is held to, before the outcome.

    ``certificate``: digest of the certificate's body, which picks the auditors. ``segments``: the hash of every segment of the sum.
    ``openings``: by ascending silo of the set, the hash of every segment of its masked vector. ``seeds`` and ``pair_keys``: as
    in Outcome.
    """

    round_ctx: Digest
    frozen: Digest
    certificate: Digest
    segments: tuple[Digest, ...]
    openings: tuple[tuple[SiloId, tuple[Digest, ...]], ...]
    seeds: tuple[tuple[SiloId, Digest], ...]
    pair_keys: tuple[tuple[SiloId, SiloId, Digest], ...] = ()


class SegmentVerdict(Wire, frozen=True, kw_only=True):
    """What a silo found of the segments it summed again, each in one list, ascending: they are ``right``; or ``wrong``, with the
    hash that it found; or ``withheld``, with the first silo whose piece did not come or did not match its header.

    ``claim``: digest of the claim's body.
    """

    round_ctx: Digest
    silo: SiloId
    claim: Digest
    right: tuple[Number, ...]
    wrong: tuple[tuple[Number, Digest], ...] = ()
    withheld: tuple[tuple[Number, SiloId], ...] = ()


class Audit(Wire, frozen=True, kw_only=True):
    """The verdicts, as signed, by ascending silo, on which a sum may be applied."""

    round_ctx: Digest
    claim: Digest
    verdicts: tuple[bytes, ...]


class Outcome(Wire, frozen=True, kw_only=True):
    """How a round ended. For ``result``, by ascending silo of the set: every masked vector and the seed of its self mask; the sum
    they give (all vectors little-endian uint32), and the digest of the next state. With these every silo computes the sum again
    itself. Where silos of the epoch are missing in the set, ``pair_keys`` holds k_ij for every i in it and j missing. Where slices
    are audited ``vectors`` is empty: they are documents of their own.

    ``closes``: in share mode, the q words of guardians that end a round without a sum. It is ``void`` when they prove that no
    certificate can exist; otherwise ``annulled``: nothing was summed, and everything counts as released.
    """

    round_ctx: Digest
    round: Number
    kind: Literal["result", "void", "annulled"]
    reason: str
    frozen: bytes
    total: bytes
    seeds: tuple[tuple[SiloId, Digest], ...]
    vectors: tuple[tuple[SiloId, bytes], ...]
    next_state: Digest
    pair_keys: tuple[tuple[SiloId, SiloId, Digest], ...] = ()
    closes: tuple[bytes, ...] = ()


class Acknowledgement(Wire, frozen=True, kw_only=True):
    """A silo's own digest of the state after a round, computed by itself from the outcome."""

    round_ctx: Digest
    silo: SiloId
    outcome: Digest
    state: Digest


W = TypeVar("W", bound=Wire)


def encode(message: Wire) -> bytes:
    """The canonical bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[W]) -> W:
    """The message in ``data``, which must be its one canonical encoding.

    Raises:
        TrustError: not MessagePack, another shape, a value out of range, or not the canonical bytes.
    """
    try:
        message = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        raise _malformed(kind, str(error)) from error
    if encode(message) != data:
        raise _malformed(kind, "the bytes are not the canonical encoding of what they say")
    return message


# msgspec resolves a type at its first use, and first uses in two threads at once crash the process: the first ones are here.
_RESOLVED = tuple(msgspec.msgpack.Decoder(kind) for kind in Wire.__subclasses__())


def _malformed(kind: type[Wire], why: str) -> TrustError:
    return TrustError(
        f"malformed {kind.__name__.lower()}: {why}",
        hint="run compatible versions on both sides; otherwise the sender or the line is faulty",
        code="malformed",
        type=kind.__name__,
    )
