# SPDX-License-Identifier: Apache-2.0
"""A report's digest in the transparency log: published before the report's files are written, so that none lies outside the log.

Promised: the same facts are one report. If the log has their record already, with the moment at which it was made, that record is
given out again, and there is no second leaf. Killed between leaf and files, the command writes the files of that leaf when it runs
again. Not promised: that a head covers the leaf at once; while a coordinator is at work, its next head does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from aggregator import versions
from aggregator.reporting import report
from aggregator.reporting.no_guarantee import AnyReport
from aggregator.store import Store
from privacy import envelope
from privacy.errors import Equivocation, TrustError
from privacy.federation import Accepted
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, encode
from privacy.transparency.notices import ReportDigest, open_report


def publish(store: Store, identity: Identity, accepted: Accepted, facts: AnyReport, *, now: float) -> AnyReport:
    """The report that is to be written: ``facts``, or the same facts with the moment at which the log has them already.

    Args:
        identity: the aggregator's, in the suite of the contract ``accepted``.

    Raises:
        TrustError: the evidence is damaged.
        MachineError: the disk or the database refuses.
    """
    found = [versions.published(store, version) for version in range(1, (store.latest("contract") or 0) + 1)]
    known = {each.digest: each for each in found if each is not None}
    while True:
        serial = 1 + (store.latest("report") or 0)
        if (before := _before(store, facts, serial, known)) is not None:
            return before
        digest = hashlib.sha256(report.encode(facts)).digest()
        last = max((each.number for each in facts.rounds), default=0)
        made = ReportDigest(serial=serial, digest=digest, schema=facts.format, last_round=last, time=facts.generated_at)
        raw = envelope.sign(identity, type="report", context=accepted.digest, sender=AGGREGATOR, body=encode(made))
        try:
            store.put_once("report", serial, AGGREGATOR, raw, received_at=now)
        except Equivocation:  # another `aggregator report` took this number
            continue
        return facts


def _before(store: Store, facts: AnyReport, end: int, known: Mapping[bytes, Accepted]) -> AnyReport | None:
    """These facts as a report before ``end`` has them, the newest first; None when none has."""
    for serial in range(end - 1, 0, -1):
        raw = store.get("report", serial, AGGREGATOR)
        if raw is None:
            raise TrustError(f"report {serial} is missing in the table", hint="run `aggregator verify`", code="missing")
        said = open_report(raw, serial, known)
        same = msgspec.structs.replace(facts, generated_at=said.time)
        if hashlib.sha256(report.encode(same)).digest() == said.digest:
            return same
    return None
