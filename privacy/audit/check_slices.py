# SPDX-License-Identifier: Apache-2.0
"""Verification of a round whose slices were audited: the claim, the silos' verdicts, the audit, and the published vectors.

The masked vectors are documents of their own there, and lie with the evidence while nobody has deleted them: then the whole sum is
recomputed as in any other round. Without them it rests on the verdicts: on t_c + 1 auditors of every segment. Whoever deletes
a vector leaves an empty ``<digest>.remnant`` in its place, so that it is not taken for lost.
"""

from __future__ import annotations

import hashlib

from privacy.audit.check_epoch import own, refused, same_as_stored
from privacy.audit.check_set import Opened
from privacy.audit.findings import Findings, Slot
from privacy.messages import AGGREGATOR, Audit, Outcome, Signed, Vector, decode
from privacy.secure_sum import audits
from privacy.secure_sum.audits import UNAUDITED, Claimed
from privacy.secure_sum.guardian_sum import Frozen


def is_audited(found: Findings, opened: Opened, outcome: Outcome, frozen: Frozen) -> bool:
    """Whether the outcome's sum is the claimed one, and as well audited as the outcome says."""
    claimed = _claimed(found, opened, frozen)
    slot = Slot("outcome", opened.number, AGGREGATOR)
    same = found.hold(slot, "as claimed", audits.check_total, outcome, claimed)
    for silo in opened.at.silos:
        _verdict(found, opened, claimed, silo)
    moves = outcome.reason != UNAUDITED
    at = Slot("audit", opened.number, AGGREGATOR)
    raw = found.read(at, required="the outcome says that its sum was audited" if moves else "")
    if not moves:
        if raw is not None:
            found.add(at, "outcome", "failed", "the outcome says that too few auditors bore the sum out")
        return same and raw is None
    body = None if raw is None else own(found, at, opened.at.accepted, opened.context, raw)
    stated = None if body is None else found.test(at, "contents", decode, body, Audit)
    held = found.hold(at, "verdicts", _check_audit, stated, claimed, opened)
    for each in stated.verdicts if stated is not None and held else ():
        same_as_stored(found, Slot("verdict", opened.number, decode(each, Signed).sender), each, "the audit")
    return same and held


def vectors_of(found: Findings, opened: Opened, frozen: Frozen) -> dict[int, bytes] | None:
    """The published masked vectors by silo; None where they are no longer all here, which is said."""
    vectors: dict[int, bytes] = {}
    for silo in frozen.headers:
        slot = Slot("vector", opened.number, silo)
        deleted = found.source.remnant(*slot) is not None
        raw = None if deleted else found.read(slot)
        words = None if raw is None else found.test(slot, "contents", _words, raw, opened, silo)
        if words is not None:
            vectors[silo] = words
    if missing := [silo for silo in frozen.headers if silo not in vectors]:
        slot = Slot("outcome", opened.number, AGGREGATOR)
        why = f"the masked vectors of silos {missing} are not here: the sum rests on the auditors' verdicts"
        found.add(slot, "sum", "note", why)
        return None
    return vectors


def _claimed(found: Findings, opened: Opened, frozen: Frozen) -> Claimed | None:
    accepted, number = opened.at.accepted, opened.number
    picks = Slot("certificate", number, AGGREGATOR)
    certificate = own(found, picks, accepted, opened.context, found.read(picks))
    slot = Slot("claim", number, AGGREGATOR)
    raw = found.read(slot, required="the round has a result")
    body = None if raw is None else own(found, slot, accepted, opened.context, raw)
    return found.test(slot, "contents", _check_claim, body, certificate, frozen, opened)


def _check_claim(body: bytes, certificate: bytes, frozen: Frozen, opened: Opened) -> Claimed:
    return audits.check_claim(body, frozen, certificate=hashlib.sha256(certificate).digest(), terms=opened.at.accepted.terms)


def _check_audit(stated: Audit, claimed: Claimed, opened: Opened) -> None:
    audits.check_audit(stated, claimed, accepted=opened.at.accepted, epoch_ctx=opened.context)


def _verdict(found: Findings, opened: Opened, claimed: Claimed | None, silo: int) -> None:
    """A verdict that is recorded; what it complains of is said, and decided by the vectors themselves where they are here."""
    slot = Slot("verdict", opened.number, silo)
    raw = found.read(slot)
    if raw is None:
        return
    member = opened.at.accepted.terms.by_id(silo)

    def check(claimed: Claimed) -> list[int]:
        return sorted(audits.complaints(audits.check_verdict(raw, member, claimed, epoch_ctx=opened.context)))

    if wrong := found.test(slot, "signature", check, claimed):
        found.add(slot, "complaint", "note", f"it calls segments {wrong} of the sum wrong or withheld")


def _words(raw: bytes, opened: Opened, silo: int) -> bytes:
    stated = decode(raw, Vector)
    if (stated.round_ctx, stated.silo) != (opened.ctx, silo):
        raise refused(f"it says that it is of silo {stated.silo} in another round")
    return stated.words
