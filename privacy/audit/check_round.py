# SPDX-License-Identifier: Apache-2.0
"""Verification of one round in consent mode, from its stored documents and the state before it.

Asked, in the protocol's order: is the manifest the contract's plan on top of the round before; are all uploads signed, their
headers those of the set, their ledger counters growing; did every silo consent to exactly this set; are the vectors and seeds in
the outcome those to which the headers are committed; do they give the sum, bit for bit; does the sum give the next state; do
the acknowledgements say the same. Sealed parts stay sealed: what they hold is shown by the outcome, and held to the headers.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from privacy import basis_round, envelope, update_rule
from privacy.audit import check_slices
from privacy.audit.check_epoch import EpochFacts, own, refused
from privacy.audit.check_set import Opened, ended_without_sum, set_of, uploads_of
from privacy.audit.evidence import Remnant
from privacy.audit.findings import Findings, Slot, shown
from privacy.dp import ring
from privacy.errors import RoundError, SiloquyError
from privacy.federation import Accepted, ring_plan
from privacy.identity import keys
from privacy.messages import (
    AGGREGATOR,
    Acknowledgement,
    Manifest,
    Outcome,
    Signed,
    decode,
)
from privacy.secure_sum import guardian_sum, shares
from privacy.secure_sum.audits import UNAUDITED
from privacy.secure_sum.guardian_sum import Frozen, Words
from privacy.update_rule import State

REJECTED = "rejected"
How = Literal["recomputed", "relied", "void", "unknown", "open"]


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """What a walk knows of a round: ``how`` its sum was verified, whose uploads are charged, and which silos stood in the sum."""

    number: int
    how: How
    charged: tuple[int, ...]
    stood: tuple[int, ...]
    accepted: Accepted | None
    state: str = ""
    """Hex digest of the state after it, as the walk computed it; "" when it is not known."""
    basis: bool = False
    """Whether it is a basis round (privacy.basis_round)."""


@dataclass(kw_only=True)
class Place:
    """Where a walk stands between two rounds; None is unknown, since something before it failed."""

    state: State | None
    previous: bytes | None
    counters: dict[int, int] = field(default_factory=dict)
    epoch: int = 0
    opened_at: int = 0


def walk_round(found: Findings, number: int, place: Place, epochs: Mapping[int, EpochFacts], *, full: bool = True) -> RoundFacts:
    """Verify a round, and move ``place`` behind it.

    Args:
        full: recompute everything; otherwise only what the rounds after it need: manifest, outcome, update rule.
    """
    opened = _manifest(found, number, place, epochs)
    if opened is None:
        _unknown_from_here(place)
        return RoundFacts(number=number, how="unknown", charged=_parties(found, "upload", number, epochs), stood=(), accepted=None)
    uploads = uploads_of(found, opened, place.counters) if full else {}
    frozen = set_of(found, opened, uploads) if full else None
    ended = _outcome(found, opened)
    accepted, basis = epochs[opened.manifest.epoch].accepted, basis_round.is_one(opened.at.accepted.terms)
    if ended is None:
        recorded = found.source.has("outcome", number, AGGREGATOR)
        if recorded or number < found.source.latest("manifest"):
            _unknown_from_here(place)
        how: How = "unknown" if recorded else "open"
        return RoundFacts(number=number, how=how, charged=tuple(uploads), stood=(), accepted=accepted, basis=basis)
    outcome, digest, bare = ended
    how = _verify_sum(found, opened, outcome, frozen, bare=bare) if full else "unknown"
    _move(found, opened, outcome, place)
    place.previous = digest
    if full:
        _acknowledgements(found, opened, outcome, digest, must_stand=bare)
    stood = tuple(silo for silo, _ in outcome.seeds)
    state = "" if place.state is None else place.state.digest.hex()
    return RoundFacts(
        number=number, how=how, charged=tuple(uploads), stood=stood, accepted=accepted, state=state, basis=basis
    )  # fmt: skip


def _manifest(found: Findings, number: int, place: Place, epochs: Mapping[int, EpochFacts]) -> Opened | None:
    slot = Slot("manifest", number, AGGREGATOR)
    raw = found.read(slot, required="rounds are numbered without gaps")
    at = None if raw is None else _epoch_of(found, slot, raw, epochs)
    body = own(found, slot, None if at is None else at.accepted, None if at is None else at.context, raw)
    stated = found.test(slot, "contents", decode, body, Manifest) if body is not None else None
    if stated is None or body is None or at is None:
        return None
    under = at.accepted.in_round(stated.dimension) if place.state is None else at.accepted.at(place.state.basis)
    at = dataclasses.replace(at, accepted=under)
    terms = at.accepted.terms
    plan = ring_plan(terms)
    previous = at.accepted.digest if number == 1 else place.previous
    held = found.expect(slot, "contents", [
        ("round", stated.round, number), ("epoch", stated.epoch, at.number), ("epoch_ctx", stated.epoch_ctx, at.context),
        ("dimension", stated.dimension, terms.dimension), ("lattice_bits", stated.lattice_bits, plan.lattice_bits),
        ("clamp", stated.clamp, plan.clamp), ("deadline_at", stated.deadline_at, stated.opened_at + terms.sum.deadline_s),
    ])  # fmt: skip
    _check_order(found, slot, stated, terms.expires, place)
    found.expect(slot, "previous", [("previous outcome", stated.previous, previous)])
    digest = None if place.state is None else place.state.digest
    found.expect(slot, "base state", [("base state", stated.base_state, digest)])
    if not held:
        return None
    return Opened(number=number, at=at, manifest=stated, ctx=guardian_sum.round_ctx(body), summed=_has_result(found, number))


def _check_order(found: Findings, slot: Slot, stated: Manifest, expires: str, place: Place) -> None:
    """Epochs and times only grow from round to round, and no round is opened after the contract expired."""
    opened = datetime.datetime.fromtimestamp(stated.opened_at, datetime.UTC).date().isoformat()
    if opened > expires:
        found.add(slot, "order", "failed", f"it was opened on {opened}, the contract expired on {expires}")
    elif stated.epoch < place.epoch or stated.opened_at < place.opened_at:
        why = f"it is of epoch {stated.epoch}, opened at {stated.opened_at}; the round before was {place.epoch}, {place.opened_at}"
        found.add(slot, "order", "failed", why)
    else:
        found.add(slot, "order", "ok")
    place.epoch, place.opened_at = stated.epoch, stated.opened_at


def _epoch_of(found: Findings, slot: Slot, raw: bytes, epochs: Mapping[int, EpochFacts]) -> EpochFacts | None:
    """The verified epoch in whose context a manifest is signed."""
    signed = found.test(slot, "contents", decode, raw, Signed)
    stated = None if signed is None else found.test(slot, "contents", decode, signed.body, Manifest)
    if signed is None or stated is None or stated.epoch not in epochs:
        return None  # an epoch that rounds name and that does not hold has failed by its own name
    at = epochs[stated.epoch]
    if signed.context != at.context:
        found.add(slot, "epoch", "failed", f"it is signed in another epoch {at.number}: {shown(signed.context)}")
        return None
    return at


def _has_result(found: Findings, number: int) -> bool:
    """Whether the round's outcome, as far as it can be read, is a result; nothing is reported."""
    try:
        raw = found.source.get("outcome", number, AGGREGATOR)
        return raw is not None and decode(decode(raw, Signed).body, Outcome).kind == "result"
    except SiloquyError:
        return False


def _outcome(found: Findings, opened: Opened) -> tuple[Outcome, bytes, bool] | None:
    """The outcome, the digest of its body, and whether it is a remnant without vectors; None while there is none, or it fails."""
    slot = Slot("outcome", opened.number, AGGREGATOR)
    kept = found.source.remnant(*slot)
    if kept is not None:
        return found.test(slot, "remnant", _open_remnant, kept, opened)
    later = opened.number < found.source.latest("manifest")
    raw = found.read(slot, required="a later round was opened" if later else "")
    if raw is None:
        return None
    body = own(found, slot, opened.at.accepted, opened.context, raw)
    outcome = found.test(slot, "contents", decode, body, Outcome) if body is not None else None
    if body is None or outcome is None:
        return None
    pairs = [("round", outcome.round, opened.number), ("round_ctx", outcome.round_ctx, opened.ctx)]
    return (outcome, hashlib.sha256(body).digest(), False) if found.expect(slot, "contents", pairs) else None


def _open_remnant(raw: bytes, opened: Opened) -> tuple[Outcome, bytes, bool]:
    kept = decode(raw, Remnant)
    signed = b"gsum/1 sig outcome\0" + opened.context + keys.u32(AGGREGATOR) + kept.body
    keys.verify_signature(opened.at.accepted.terms.aggregator.verify_key, signed, kept.signature)
    outcome = decode(kept.outcome, Outcome)
    if (outcome.round, outcome.round_ctx, outcome.vectors) != (opened.number, opened.ctx, ()):
        raise refused(f"it is of round {outcome.round}")
    return outcome, kept.body, True


def _verify_sum(found: Findings, opened: Opened, outcome: Outcome, frozen: Frozen | None, *, bare: bool) -> How:
    slot = Slot("outcome", opened.number, AGGREGATOR)
    if outcome.kind != "result":
        ended_without_sum(found, opened, outcome)
        return "void"
    if not found.expect(slot, "set", [("set", outcome.frozen, None if frozen is None else frozen.digest)]) or frozen is None:
        return "unknown"
    seeds = [found.hold(slot, f"seed of silo {silo}", guardian_sum.check_seed, frozen, silo, seed) for silo, seed in outcome.seeds]
    for silo, missing, key in outcome.pair_keys:
        what = f"key of pair {silo} and {missing}"
        seeds.append(found.hold(slot, what, shares.check_pair_key, frozen, silo, missing, key))
    if opened.at.accepted.terms.sliced:
        return _sliced(found, opened, outcome, frozen) if all(seeds) else "unknown"
    if bare and all(seeds):
        found.add(slot, "sum", "note", "the masked vectors were deleted: the sum rests on the silos' acknowledgements")
        return "relied"
    return "recomputed" if all(seeds) and _recompute(found, slot, outcome, frozen, outcome.vectors) else "unknown"


def _sliced(found: Findings, opened: Opened, outcome: Outcome, frozen: Frozen) -> How:
    """The same where slices were audited: the audit, and the whole sum from the published vectors where they are here."""
    held, slot = check_slices.is_audited(found, opened, outcome, frozen), Slot("outcome", opened.number, AGGREGATOR)
    vectors = check_slices.vectors_of(found, opened, frozen)
    if vectors is None:
        return "relied" if held else "unknown"
    return "recomputed" if _recompute(found, slot, outcome, frozen, tuple(vectors.items())) and held else "unknown"


def _recompute(found: Findings, slot: Slot, outcome: Outcome, frozen: Frozen, given: Sequence[tuple[int, bytes]]) -> bool:
    """Whether the vectors are those of the headers, and their sum is the outcome's, bit for bit."""
    if not found.expect(slot, "vectors", [("silos", [silo for silo, _ in given], list(frozen.headers))]):
        return False
    vectors = {silo: _words(raw) for silo, raw in given}
    for silo, header in frozen.headers.items():
        if not found.hold(slot, f"vector of silo {silo}", guardian_sum.check_vector, vectors[silo], header):
            return False
    seeds, total = dict(outcome.seeds), _words(outcome.total)
    pair_keys = {(silo, missing): key for silo, missing, key in outcome.pair_keys}
    return found.hold(slot, "sum", guardian_sum.check_total, total, vectors, seeds, frozen, pair_keys)


def _words(raw: bytes) -> Words:
    """Little-endian words; none at all when the length is no multiple of four, which no check then passes."""
    return np.frombuffer(raw if len(raw) % 4 == 0 else b"", dtype="<u4")


def _move(found: Findings, opened: Opened, outcome: Outcome, place: Place) -> None:
    """The next state by the update rule, compared with the one that the outcome names."""
    slot, before = Slot("outcome", opened.number, AGGREGATOR), place.state
    after = found.test(slot, "update rule", _next_state, before, outcome, opened) if before is not None else None
    place.state = after
    if before is None:
        found.add(slot, "update rule", "open", "the state before this round is not known")


def _next_state(before: State, outcome: Outcome, opened: Opened) -> State:
    terms, after, reason = opened.at.accepted.terms, before, ""
    if outcome.kind == "result":
        if len(outcome.total) != 4 * terms.dimension:
            raise refused(f"its sum has {len(outcome.total)} bytes, the contract has {4 * terms.dimension}")
        total = ring.lift(np.frombuffer(outcome.total, dtype="<u4"))
        reason = REJECTED
        stood = len(outcome.seeds)
        if update_rule.accepts(total, terms, silos=stood):
            try:
                after, reason = update_rule.advance(before, total, terms, silos=stood), ""
            except RoundError:  # not finite
                after = before
        if terms.sliced and outcome.reason == UNAUDITED:
            after, reason = before, UNAUDITED
        if outcome.reason != reason:
            raise refused(f"its reason is {outcome.reason!r}, the arithmetic gives {reason!r}")
    if after.digest != outcome.next_state:
        raise refused(f"it names the state {shown(outcome.next_state)}, the arithmetic gives {shown(after.digest)}")
    return after


def _acknowledgements(found: Findings, opened: Opened, outcome: Outcome, digest: bytes, *, must_stand: bool) -> None:
    """Every silo's own word on the state after the round.

    In consent mode all must stand before a later round of the same epoch is opened. Where the masked vectors were deleted, the
    sum rests on them: on all in consent mode, on more than may collude in share mode.
    """
    number, terms = opened.number, opened.at.accepted.terms
    later = number < found.source.latest("manifest") and outcome.kind == "result" and _same_epoch(found, opened)
    why = "the masked vectors were deleted, only it says that the sum holds" if must_stand else "a later round was opened"
    held = 0
    for silo in opened.at.silos:
        slot = Slot("acknowledgement", number, silo)
        raw = found.read(slot, required=why if (must_stand or later) and not terms.shared else "")
        if raw is not None:
            held += found.hold(slot, "signature", _check_acknowledgement, raw, opened, outcome, digest, silo)
    if must_stand and held <= terms.privacy.colluders:
        found.add(
            Slot("outcome", number, AGGREGATOR), "acknowledged", "failed", f"{held} silos say so, {terms.privacy.colluders} may lie"
        )


def _check_acknowledgement(raw: bytes, opened: Opened, outcome: Outcome, digest: bytes, silo: int) -> None:
    key = opened.at.accepted.terms.by_id(silo).verify_key
    body = envelope.open_signed(raw, type="acknowledgement", context=opened.context, sender=silo, key=key)
    stated = decode(body, Acknowledgement)
    wanted = Acknowledgement(round_ctx=opened.ctx, silo=silo, outcome=digest, state=outcome.next_state)
    if stated != wanted:
        raise refused(f"it names outcome {shown(stated.outcome)} and state {shown(stated.state)}, the round has "
                      f"{shown(wanted.outcome)} and {shown(wanted.state)}")  # fmt: skip


def _same_epoch(found: Findings, opened: Opened) -> bool:
    """Whether the next round is of this round's epoch; in a later one its manifest's base state says what this would."""
    try:
        raw = found.source.get("manifest", opened.number + 1, AGGREGATOR)
        return raw is not None and decode(decode(raw, Signed).body, Manifest).epoch == opened.at.number
    except SiloquyError:
        return False


def _parties(found: Findings, kind: str, number: int, epochs: Mapping[int, EpochFacts]) -> tuple[int, ...]:
    """Whose document of this kind is recorded, whatever it says."""
    silos = sorted({silo for at in epochs.values() for silo in at.silos})
    return tuple(silo for silo in silos if found.source.has(kind, number, silo))


def _unknown_from_here(place: Place) -> None:
    place.state, place.previous = None, None
