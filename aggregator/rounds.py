# SPDX-License-Identifier: Apache-2.0
"""The aggregator's side of the protocol as pure functions: from the documents that exist to the next one it may write.

Nothing here touches a disk, a network or a clock; times come in as numbers. Promised: a body is made only when everything
it rests on was verified against the contract, and the same documents give the same body, so a coordinator that was killed
writes the same bytes again. Not promised: that a silo is honest; see privacy.secure_sum.guardian_sum for what a set proves.

``previous`` of a manifest, and ``outcome`` of an acknowledgement, are SHA-256 of the outcome's body; before round 1 it is
the contract's digest. A result whose sum no honest run reaches, or whose next state would not be finite, moves nothing:
its reason is "rejected". Where slices are audited, one that the silos' verdicts do not bear out moves nothing either: "unaudited".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from aggregator import versions
from aggregator.versions import Documents
from privacy import basis_round, envelope, federation, update_rule
from privacy.dp import ring
from privacy.errors import RoundError, TrustError
from privacy.federation import Accepted, Contract, Member
from privacy.messages import (
    AGGREGATOR,
    Acknowledgement,
    Certificate,
    EpochCall,
    EpochNote,
    Freeze,
    Kind,
    Manifest,
    Outcome,
    Roster,
    Signed,
    Upload,
    Wire,
    decode,
)
from privacy.secure_sum import epoch, guardian_sum
from privacy.secure_sum.audits import UNAUDITED
from privacy.secure_sum.guardian_sum import Certified, Frozen
from privacy.transparency.notes import Checkpoint
from privacy.update_rule import State

Words = NDArray[np.uint32]
W = TypeVar("W", bound=Wire)

ABSENT: Final = "absent"
REJECTED: Final = "rejected"
NO_FROZEN: Final = b""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch whose roster stands: its number, epoch_ctx, and E, the silos that take part in it, ascending."""

    number: int
    context: bytes
    silos: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Round:
    """An opened round: its manifest, round_ctx, the epoch_ctx in which all its documents are signed, and the epoch's silos."""

    manifest: Manifest
    ctx: bytes
    context: bytes
    silos: tuple[int, ...]

    @property
    def number(self) -> int:
        """The round's number."""
        return self.manifest.round


# --- What stands on the board -------------------------------------------------------------------------------------------


def accepted_in(documents: Documents) -> Accepted | None:
    """The latest contract on the board, its signature verified, or None before the first."""
    return versions.newest(documents)


def own(documents: Documents, accepted: Accepted, kind: Kind, number: int, context: bytes) -> bytes | None:
    """The body of one of the aggregator's documents, its signature verified, or None when it does not stand yet."""
    raw = documents.get(kind, number, AGGREGATOR)
    if raw is None:
        return None
    key = accepted.terms.aggregator.verify_key
    return envelope.open_signed(raw, type=kind, context=context, sender=AGGREGATOR, key=key)


def epoch_in(documents: Documents, accepted: Accepted, number: int) -> Epoch | None:
    """The epoch with this number, or None while its roster does not stand; by the contract of its call, not by ``accepted``."""
    accepted = versions.of_epoch(documents, number) or accepted
    body = own(documents, accepted, "roster", number, accepted.digest)
    return None if body is None else _epoch_of(accepted.digest, number, body)


@functools.lru_cache(maxsize=4)
def _epoch_of(contract: bytes, number: int, body: bytes) -> Epoch:
    """The epoch of a roster that is the aggregator's own; once for the same bytes."""
    notes = (decode(decode(raw, Signed).body, EpochNote) for raw in decode(body, Roster).notes)
    return Epoch(number=number, context=epoch.epoch_ctx(contract, number, body), silos=tuple(note.silo for note in notes))


def round_in(documents: Documents, accepted: Accepted, number: int) -> Round | None:
    """The round with this number, or None while its manifest does not stand; by the contract of its epoch, as ``epoch_in``.

    Raises:
        TrustError: the manifest is not the aggregator's, or names an epoch that does not stand.
    """
    raw = documents.get("manifest", number, AGGREGATOR)
    if raw is None:
        return None
    stated = decode(decode(raw, Signed).body, Manifest)
    accepted = versions.of_epoch(documents, stated.epoch) or accepted
    at = epoch_in(documents, accepted, stated.epoch)
    if at is None or at.context != stated.epoch_ctx:
        raise TrustError(
            f"the manifest of round {number} names another epoch {stated.epoch} than the board has", hint="keep it, it is evidence"
        )
    body = own(documents, accepted, "manifest", number, at.context)
    return Round(manifest=stated, ctx=guardian_sum.round_ctx(body or b""), context=at.context, silos=at.silos)


def outcome_in(documents: Documents, accepted: Accepted, opened: Round) -> tuple[bytes, Outcome] | None:
    """The round's outcome as (body, message), or None while it is open."""
    accepted = versions.of_epoch(documents, opened.manifest.epoch) or accepted
    body = own(documents, accepted, "outcome", opened.number, opened.context)
    return None if body is None else (body, decode(body, Outcome))


# --- Epoch ---------------------------------------------------------------------------------------------------------------


def call(accepted: Accepted, number: int) -> EpochCall:
    """The call for epoch keys."""
    return EpochCall(contract=accepted.digest, epoch=number)


def roster(accepted: Accepted, number: int, notes: Mapping[int, bytes], guardians: Mapping[int, bytes] | None = None) -> Roster:
    """The roster of all members' notes; in share mode of the notes that are given: of at least u_min silos and q guardians.

    Raises:
        RoundError: a note that is needed is missing.
        TrustError: privacy.secure_sum.epoch.check_roster refuses it; the message names the silos.
    """
    terms, given = accepted.terms, guardians or {}
    if terms.shared and len(notes) >= terms.fewest:
        chosen = tuple(notes[silo] for silo in sorted(notes))
    else:
        chosen = _by_party([member.id for member in terms.member], notes, "epoch note")
    watching = tuple(given[guardian] for guardian in sorted(given))
    made = Roster(contract=accepted.digest, epoch=number, notes=chosen, guardians=watching)
    epoch.check_roster(made, accepted)
    return made


# --- Round ---------------------------------------------------------------------------------------------------------------


def manifest(
    *, accepted: Accepted, at: Epoch, number: int, previous: bytes, state: State, now: float, head: Checkpoint
) -> Manifest:
    """What round ``number`` is: the contract's integer plan, its first state, when uploads must be here, the log's head."""
    accepted = accepted.at(state.basis)
    plan = federation.ring_plan(accepted.terms)
    return Manifest(
        epoch_ctx=at.context, epoch=at.number, round=number, previous=previous, base_state=state.digest,
        dimension=accepted.terms.dimension, ring_bits=32, lattice_bits=plan.lattice_bits, clamp=plan.clamp,
        opened_at=int(now), deadline_at=int(now) + accepted.terms.sum.deadline_s, log_size=head.size, log_root=head.root,
    )  # fmt: skip


def freeze(accepted: Accepted, opened: Round, headers: Mapping[int, bytes]) -> tuple[Freeze, Frozen]:
    """The set of all members' headers, to be proposed, and the same verified.

    Raises:
        RoundError: a member's header is missing.
        TrustError: privacy.secure_sum.guardian_sum.check_freeze refuses the set; the message names the silos.
    """
    accepted = accepted.in_round(opened.manifest.dimension)
    made = Freeze(round_ctx=opened.ctx, headers=_by_party(opened.silos, headers, "upload"))
    frozen = guardian_sum.check_freeze(made, accepted=accepted, epoch_ctx=opened.context, round_ctx=opened.ctx, own_header=None)
    return made, frozen


def certificate(accepted: Accepted, opened: Round, frozen: Frozen, consents: Mapping[int, bytes]) -> tuple[Certificate, Certified]:
    """All members' consents to ``frozen``, and the proof that they are all there.

    Raises:
        RoundError: a consent is missing.
        TrustError: one is not for this set; the message names the silo.
    """
    made = Certificate(round_ctx=opened.ctx, frozen=frozen.digest, consents=_by_party(opened.silos, consents, "consent"))
    return made, guardian_sum.check_certificate(made, frozen, accepted=accepted, epoch_ctx=opened.context)


def result(
    accepted: Accepted,
    opened: Round,
    state: State,
    certified: Certified,
    total: Words,
    seeds: Mapping[int, bytes],
    vectors: Mapping[int, Words],
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
    *,
    audited: str = "",
) -> tuple[Outcome, State]:
    """The outcome of a round that was summed, with all that a silo needs to sum it again, and the state after it.

    Args:
        vectors: none where slices are audited; they are published by themselves.
        audited: what ``aggregator.audits.audited`` says.
    """
    after, reason = (state, UNAUDITED) if audited else apply(state, total, accepted.terms, silos=len(seeds))
    made = Outcome(
        round_ctx=opened.ctx, round=opened.number, kind="result", reason=reason, frozen=certified.frozen.digest,
        total=total.astype("<u4").tobytes(), seeds=tuple(sorted(seeds.items())),
        vectors=tuple((silo, vectors[silo].astype("<u4").tobytes()) for silo in sorted(vectors)), next_state=after.digest,
        pair_keys=tuple((i, j, key) for (i, j), key in sorted((pair_keys or {}).items())),
    )  # fmt: skip
    return made, after


def void(
    opened: Round, state: State, reason: str, *, kind: Literal["void", "annulled"] = "void", closes: tuple[bytes, ...] = ()
) -> Outcome:
    """The outcome of a round that ends without a sum; the state does not move. In share mode q guardians' ``closes`` say so."""
    return Outcome(
        round_ctx=opened.ctx, round=opened.number, kind=kind, reason=reason, frozen=NO_FROZEN, total=b"", seeds=(), vectors=(),
        next_state=state.digest, closes=closes,
    )  # fmt: skip


def open_upload(raw: bytes, opened: Round, member: Member) -> Upload:
    """The member's upload, every byte of it as the member signed it in this epoch.

    The signature does not name the round: the header does, and what is sealed opens with that header only.

    Raises:
        TrustError: malformed, or not signed by the member, as an upload, in this epoch.
    """
    key = member.verify_key
    return decode(envelope.open_signed(raw, type="upload", context=opened.context, sender=member.id, key=key), Upload)


def open_acknowledgement(raw: bytes, opened: Round, member: Member) -> Acknowledgement:
    """The member's acknowledgement of this round; which outcome and state it names is the caller's to compare.

    Raises:
        TrustError: not signed by the member in this epoch, or it names another silo or round.
    """
    key = member.verify_key
    body = envelope.open_signed(raw, type="acknowledgement", context=opened.context, sender=member.id, key=key)
    stated = decode(body, Acknowledgement)
    if (stated.silo, stated.round_ctx) != (member.id, opened.ctx):
        raise TrustError(
            f"acknowledgement {opened.number} of silo {member.id} says silo {stated.silo}, round {stated.round_ctx.hex()[:16]}…",
            hint="that silo's software is faulty",
            code="wrong-round",
        )
    return stated


def apply(state: State, total: Words, terms: Contract, *, silos: int | None = None) -> tuple[State, str]:
    """The state after a sum of so many silos (None: of all), and the outcome's reason: "" when it moved, "rejected" when the sum
    was not to be believed.

    Raises:
        MachineError: this machine's floating point is not IEEE 754.
    """
    lifted, terms = ring.lift(total), basis_round.terms_after(terms, state.basis)
    if not update_rule.accepts(lifted, terms, silos=silos):
        return state, REJECTED
    try:
        return update_rule.advance(state, lifted, terms, silos=silos), ""
    except RoundError:  # not finite
        return state, REJECTED


def moved(outcome: Outcome) -> bool:
    """Whether the state moved: a result that was not rejected, nor left unaudited."""
    return outcome.kind == "result" and outcome.reason not in (REJECTED, UNAUDITED)


def settle(state: State, outcome: Outcome, terms: Contract) -> State:
    """The state after an outcome, computed again from the state before it.

    Raises:
        TrustError: the outcome names another state, reason or length of sum than the arithmetic gives.
    """
    after, terms = state, basis_round.terms_after(terms, state.basis)
    if outcome.kind == "result":
        if len(outcome.total) != 4 * terms.dimension:
            raise _other_state(outcome, f"its sum has {len(outcome.total)} bytes, the contract has {4 * terms.dimension}")
        after, reason = apply(state, np.frombuffer(outcome.total, dtype="<u4"), terms, silos=len(outcome.seeds))
        if terms.sliced and outcome.reason == UNAUDITED:
            after, reason = state, UNAUDITED
        if reason != outcome.reason:
            raise _other_state(outcome, f"its reason is {outcome.reason!r}, the arithmetic gives {reason!r}")
    if after.digest != outcome.next_state:
        raise _other_state(
            outcome, f"it names state {outcome.next_state.hex()[:16]}…, the arithmetic gives {after.digest.hex()[:16]}…"
        )
    return after


def _by_party(parties: Sequence[int], documents: Mapping[int, bytes], what: str) -> tuple[bytes, ...]:
    missing = [party for party in parties if party not in documents]
    if missing:
        raise RoundError(
            f"no {what} from silos {missing}", hint="start them, then run the same command again", code="absent", missing=missing
        )
    return tuple(documents[party] for party in parties)


def _other_state(outcome: Outcome, why: str) -> TrustError:
    return TrustError(
        f"the outcome of round {outcome.round} does not hold: {why}",
        hint="restore the folder evidence/ from a backup",
        code="outcome",
    )
