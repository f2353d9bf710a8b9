# SPDX-License-Identifier: Apache-2.0
"""Verification of what the aggregator says in the log beside the rounds: its refusals, each of them listed, and its reports.

Asked: did the aggregator sign every one of them; is a refused document that is kept really its party's; and does the report that
was handed over stand in the log. Without the log that last question is open. Not asked: whether a refusal was right (who was
refused knows what it sent), or who a refused document of which only the digest is kept was from.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

from privacy.audit.check_epoch import refused
from privacy.audit.findings import Findings, Slot, shown
from privacy.envelope import open_signed
from privacy.errors import TrustError
from privacy.federation import Accepted, Guardian, Member
from privacy.messages import AGGREGATOR, Signed, decode
from privacy.transparency import notes
from privacy.transparency.notices import Refusal, open_refusal, open_report


def check_notices(
    found: Findings, versions: Mapping[bytes, Accepted], seen: Mapping[Slot, int] | None, *, report: bytes | None = None
) -> None:
    """Verify refusals and report digests; every refusal is listed as a note.

    Args:
        seen: the log's leaves by slot; None when the log is not at hand, or does not fit its head.
        report: the record of a report whose digest must be in the log.
    """
    if not versions:
        return
    for serial in range(1, found.source.latest("refusal") + 1):
        _check_refusal(found, versions, serial)
    digests = _digests(found, versions)
    if report is not None:
        newest = list(versions.values())[-1]
        _check_logged(found, Slot("report", newest.terms.version, AGGREGATOR), hashlib.sha256(report).digest(), digests, seen)


def _check_refusal(found: Findings, versions: Mapping[bytes, Accepted], serial: int) -> None:
    slot = Slot("refusal", serial, AGGREGATOR)
    raw = found.read(slot, required="refusals are numbered without gaps")
    if raw is None:
        return
    made = found.test(slot, "signature", functools.partial(open_refusal, raw, serial, versions))
    if made is None:
        return
    if made.document:
        found.hold(slot, "document", _check_author, made, versions)
    found.add(slot, "refused", "note", _in_words(made))


def _check_author(made: Refusal, versions: Mapping[bytes, Accepted]) -> None:
    """The refused bytes are signed, as what they are said to be, with a key that a version of the contract gives this party."""
    signed = decode(made.document, Signed)
    for each in versions.values():
        parties: list[Member | Guardian] = [*each.terms.member, *each.terms.guardian]
        for key in (party.verify_key for party in parties if party.id == made.party):
            try:
                open_signed(made.document, type=made.kind, context=signed.context, sender=made.party, key=key)
            except TrustError:
                continue
            return
    raise refused(f"it accuses party {made.party} of a {made.kind} that this party did not sign")


def _in_words(made: Refusal) -> str:
    if made.more:
        return f"party {made.party}: {made.reason}"
    kept = "" if made.document else f"; of its bytes only the digest {shown(made.digest)} is kept"
    return f"{made.kind} {made.number} of party {made.party} was refused ({made.code}): {made.reason}{kept}"


def _digests(found: Findings, versions: Mapping[bytes, Accepted]) -> Mapping[Slot, bytes]:
    """What each published report's record had as its digest."""
    digests = {}
    for serial in range(1, found.source.latest("report") + 1):
        slot = Slot("report", serial, AGGREGATOR)
        raw = found.read(slot, required="reports are numbered without gaps")
        if raw is not None:
            said = found.test(slot, "published", functools.partial(open_report, raw, serial, versions))
            if said is not None:
                digests[slot] = said.digest
    return digests


def _check_logged(
    found: Findings, slot: Slot, digest: bytes, digests: Mapping[Slot, bytes], seen: Mapping[Slot, int] | None
) -> None:
    """Whether this digest stands in the log, and who signed the head over it."""
    published = [each for each, said in digests.items() if said == digest]
    if seen is None:
        found.add(slot, "in the log", "open", "the log is not at hand: nobody can say whether it has this report")
        return
    logged = [seen[each] for each in published if each in seen]
    if logged:
        found.add(slot, "in the log", "ok")
        if min(logged) >= _cosigned(found):
            found.add(slot, "in the log", "note", "only the aggregator signed the head over it; the next round's is cosigned")
    elif published:
        found.add(slot, "in the log", "open", "it is published, and no head of the log covers it yet: ask again after the next one")
    elif any(each.kind == "report" and each not in digests for each in seen):
        found.add(slot, "in the log", "open", "the log has a report that cannot be read here")
    else:
        found.add(slot, "in the log", "failed", f"no report in the log has its digest {shown(digest)}")


def _cosigned(found: Findings) -> int:
    """The size of the newest head that a quorum cosigned; ``check_log`` has held it to the log."""
    for number in range(found.source.latest("checkpoint"), 0, -1):
        head = Slot("head", number, AGGREGATOR)
        raw = found.read(head)
        if raw is not None and not found.failed(head):
            return notes.checkpoint(notes.parse(raw).text).size
    return 0
