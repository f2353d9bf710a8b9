# SPDX-License-Identifier: Apache-2.0
"""Verification of whose vectors a round sums: uploads, guardians' lists, the frozen set, and everybody's agreement to it.

Consent mode: every silo's consent stands in the certificate. Share mode: the set follows from q guardians' lists, q endorsements
make the certificate, and q closes end a round without a sum. Documents that hold copies of others are compared with those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from privacy import envelope
from privacy.audit.check_epoch import EpochFacts, own, refused, same_as_stored
from privacy.audit.findings import Findings, Slot, shown
from privacy.messages import AGGREGATOR, Certificate, Freeze, Header, Manifest, Outcome, Release, Shares, Signed, Upload, decode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.secure_sum.guardian_sum import Frozen


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A round whose manifest holds."""

    number: int
    at: EpochFacts
    manifest: Manifest
    ctx: bytes
    summed: bool
    """Whether the outcome, as far as it can be read, is a result."""

    @property
    def context(self) -> bytes:
        """The epoch_ctx in which all its documents are signed."""
        return self.at.context

    @property
    def shared(self) -> bool:
        """Whether guardians answer for it."""
        return self.at.accepted.terms.shared


def uploads_of(found: Findings, opened: Opened, counters: dict[int, int]) -> dict[int, Upload | None]:
    """Every upload that is recorded, by silo; None where it does not hold. ``counters``: the ledger counters stated so far."""
    uploads: dict[int, Upload | None] = {}
    for silo in opened.at.silos:
        slot = Slot("upload", opened.number, silo)
        raw = found.read(slot)
        if raw is None and not found.failed(slot):
            continue
        uploads[silo] = None if raw is None else found.test(slot, "signature", _open_upload, raw, opened, silo)
        header = None if uploads[silo] is None else found.test(slot, "header", _check_header, uploads[silo], opened, silo)
        if header is None:
            continue
        before = counters.get(silo, 0)
        if header.ledger_counter <= before:
            why = f"it states {header.ledger_counter} ledger entries, in an earlier round it stated {before}"
            found.add(slot, "ledger counter", "failed", why)
        else:
            found.add(slot, "ledger counter", "ok")
        counters[silo] = header.ledger_counter
    return uploads


def set_of(found: Findings, opened: Opened, uploads: Mapping[int, Upload | None]) -> Frozen | None:
    """The set of the round with the agreement to it, where there is one."""
    number = opened.number
    slot = Slot("freeze", number, AGGREGATOR)
    _words_of_guardians(found, opened)
    went_on = found.source.has("certificate", number, AGGREGATOR) or opened.summed
    raw = found.read(slot, required="the round went on from it" if went_on else "")
    body = None if raw is None else own(found, slot, opened.at.accepted, opened.context, raw)
    made = None if body is None else found.test(slot, "contents", decode, body, Freeze)
    frozen = None if made is None else found.test(slot, "set", _check_freeze, made, opened)
    if made is None or frozen is None:
        return None
    _compare_headers(found, opened, made, uploads)
    for raw in made.lists:
        same_as_stored(found, Slot("list", number, decode(raw, Signed).sender), raw, "the freeze")
    _agreements(found, opened, frozen)
    certificate = Slot("certificate", number, AGGREGATOR)
    raw = found.read(certificate, required="the round has a result" if opened.summed else "")
    if raw is not None:
        _certificate(found, opened, frozen, raw)
    return frozen


def ended_without_sum(found: Findings, opened: Opened, outcome: Outcome) -> None:
    """Nothing was summed; in share mode q guardians' closes say so, and whether it is void or annulled follows from them."""
    slot = Slot("outcome", opened.number, AGGREGATOR)
    nothing = not (outcome.total or outcome.seeds or outcome.vectors or outcome.pair_keys)
    found.expect(slot, "nothing summed", [("emptiness", nothing, True)])
    if opened.shared:
        kind = found.test(slot, "closes", _ended, outcome, opened)
        if kind is not None:
            found.expect(slot, "closes", [("kind", outcome.kind, kind)])
            for raw in outcome.closes:
                same_as_stored(found, Slot("close", opened.number, decode(raw, Signed).sender), raw, "the outcome")
    else:
        found.expect(slot, "kind", [("kind", outcome.kind, "void"), ("closes", outcome.closes, ())])


def _words_of_guardians(found: Findings, opened: Opened) -> None:
    """Lists and closes that are recorded, however the round ended."""
    for guardian in opened.at.guardians:
        for kind, check in (("list", _check_list), ("close", _check_close)):
            slot = Slot(kind, opened.number, guardian)
            raw = found.read(slot)
            if raw is not None:
                found.hold(slot, "signature", check, raw, opened, guardian)


def _compare_headers(found: Findings, opened: Opened, made: Freeze, uploads: Mapping[int, Upload | None]) -> None:
    """Every header in the freeze is the one in its silo's upload."""
    for raw in made.headers:
        silo = decode(raw, Signed).sender
        slot, upload = Slot("upload", opened.number, silo), uploads.get(silo)
        if upload is not None:
            digests = hashlib.sha256(upload.header).digest(), hashlib.sha256(raw).digest()
            found.expect(slot, "in the set", [("signed header", *digests)])
        elif silo not in uploads:
            found.read(slot, required="its header stands in the set")


def _agreements(found: Findings, opened: Opened, frozen: Frozen) -> None:
    """Consents, or endorsements and shares, that are recorded."""
    number = opened.number
    for silo in () if opened.shared else frozen.headers:
        raw = found.read(Slot("consent", number, silo))
        if raw is not None:
            found.hold(Slot("consent", number, silo), "signature", _check_consent, raw, opened, frozen, silo)
    for guardian in opened.at.guardians:
        raw = found.read(Slot("endorsement", number, guardian))
        if raw is not None:
            found.hold(Slot("endorsement", number, guardian), "signature", _check_endorsement, raw, opened, frozen, guardian)
        raw = found.read(Slot("shares", number, guardian))
        if raw is not None:
            found.hold(Slot("shares", number, guardian), "signature", _check_shares, raw, opened, frozen, guardian)


def _certificate(found: Findings, opened: Opened, frozen: Frozen, raw: bytes) -> None:
    accepted, number = opened.at.accepted, opened.number
    slot = Slot("certificate", number, AGGREGATOR)
    body = own(found, slot, accepted, opened.context, raw)
    stated = None if body is None else found.test(slot, "contents", decode, body, Certificate)
    if stated is None or not found.hold(slot, "agreement", _check_certificate, stated, frozen, opened):
        return
    kind = "endorsement" if opened.shared else "consent"
    for each in stated.consents:
        same_as_stored(found, Slot(kind, number, decode(each, Signed).sender), each, "the certificate")
    for silo in () if opened.shared else frozen.headers:
        release = Slot("release", number, silo)
        given = found.read(release, required="the round has a result" if opened.summed else "")
        if given is not None:
            found.hold(release, "signature", _check_release, given, opened, frozen, silo)


# --- What each document must say ---------------------------------------------------------------------------------------------


def _open_upload(raw: bytes, opened: Opened, silo: int) -> Upload:
    key = opened.at.accepted.terms.by_id(silo).verify_key
    upload = decode(envelope.open_signed(raw, type="upload", context=opened.context, sender=silo, key=key), Upload)
    size = 4 * opened.manifest.dimension + envelope.OVERHEAD_BYTES
    if len(upload.sealed) != size:
        raise refused(f"its sealed vector has {len(upload.sealed)} bytes, expected {size}")
    return upload


def _check_header(upload: Upload, opened: Opened, silo: int) -> Header:
    accepted = opened.at.accepted
    header = guardian_sum.check_header(
        upload.header,
        accepted.terms.by_id(silo),
        accepted=accepted,
        epoch_ctx=opened.context,
        round_ctx=opened.ctx,
        silos=opened.at.silos,
    )
    shares.check_bundles(upload, header)
    return header


def _check_freeze(made: Freeze, opened: Opened) -> Frozen:
    return guardian_sum.check_freeze(
        made,
        accepted=opened.at.accepted,
        epoch_ctx=opened.context,
        round_ctx=opened.ctx,
        own_header=None,
        silos=opened.at.silos,
    )


def _check_consent(raw: bytes, opened: Opened, frozen: Frozen, silo: int) -> None:
    guardian_sum.check_consent(raw, opened.at.accepted.terms.by_id(silo), frozen, epoch_ctx=opened.context)


def _check_certificate(stated: Certificate, frozen: Frozen, opened: Opened) -> None:
    guardian_sum.check_certificate(stated, frozen, accepted=opened.at.accepted, epoch_ctx=opened.context)


def _check_release(raw: bytes, opened: Opened, frozen: Frozen, silo: int) -> None:
    member = opened.at.accepted.terms.by_id(silo)
    stated = envelope.open_member(raw, Release, type="release", context=opened.context, member=member)
    _check_place(stated.round_ctx, stated.frozen, opened, frozen)


def _check_list(raw: bytes, opened: Opened, guardian: int) -> None:
    who = opened.at.accepted.terms.by_guardian(guardian)
    freeze.check_list(raw, who, epoch_ctx=opened.context, round_ctx=opened.ctx, silos=opened.at.silos)


def _check_endorsement(raw: bytes, opened: Opened, frozen: Frozen, guardian: int) -> None:
    freeze.check_endorsement(raw, opened.at.accepted.terms.by_guardian(guardian), frozen, epoch_ctx=opened.context)


def _check_shares(raw: bytes, opened: Opened, frozen: Frozen, guardian: int) -> None:
    who = opened.at.accepted.terms.by_guardian(guardian)
    stated = envelope.open_guardian(raw, Shares, type="shares", context=opened.context, guardian=who)
    _check_place(stated.round_ctx, stated.frozen, opened, frozen)


def _check_close(raw: bytes, opened: Opened, guardian: int) -> None:
    freeze.check_close(raw, opened.at.accepted.terms.by_guardian(guardian), epoch_ctx=opened.context, round_ctx=opened.ctx)


def _ended(outcome: Outcome, opened: Opened) -> str:
    return freeze.ended(outcome.closes, accepted=opened.at.accepted, epoch_ctx=opened.context, round_ctx=opened.ctx)


def _check_place(round_ctx: bytes, stated: bytes, opened: Opened, frozen: Frozen) -> None:
    if (round_ctx, stated) != (opened.ctx, frozen.digest):
        raise refused(f"it is for round {shown(round_ctx)} and set {shown(stated)}, not for this one")
