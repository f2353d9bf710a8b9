# SPDX-License-Identifier: Apache-2.0
"""Between sum and outcome, where slices are audited: publish vectors and claim, wait for the silos' verdicts, publish the audit.

Promised: the claim is made from the documents that stand, so a restart claims the same; a round is audited only when t_c + 1 of the
auditors of every segment said that it is right (``privacy.secure_sum.audits``), and once its audit stands it stays so. Who
complained, and who was silent, is named. Not promised: an audited round while more silos are silent than the set could spare.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

from aggregator import rounds
from aggregator.desk import Desk
from aggregator.rounds import Round, Words
from privacy.errors import TrustError
from privacy.messages import Audit, Outcome, SumClaim
from privacy.secure_sum import audits, slices
from privacy.secure_sum.audits import UNAUDITED, Claimed
from privacy.secure_sum.guardian_sum import Certified
from privacy.update_rule import State

_LOG = logging.getLogger(__name__)


def result(
    desk: Desk, opened: Round, state: State, certified: Certified, total: Words, vectors: Mapping[int, Words],
    seeds: Mapping[int, bytes], pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> tuple[Outcome, State]:  # fmt: skip
    """The outcome of a sum and the state after it; where slices are audited, once they are or the time for it is over."""
    if not desk.accepted.terms.sliced:
        return rounds.result(desk.accepted, opened, state, certified, total, seeds, vectors, pair_keys)
    said = audited(desk, opened, certified, total, vectors, seeds, pair_keys)
    return rounds.result(desk.accepted, opened, state, certified, total, seeds, {}, pair_keys, audited=said)


def audited(
    desk: Desk, opened: Round, certified: Certified, total: Words, vectors: Mapping[int, Words], seeds: Mapping[int, bytes],
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> str:  # fmt: skip
    """"" once the silos' verdicts bear the sum out, UNAUDITED when they do not within the contract's deadline.

    Raises:
        TrustError: a vector does not open or match any more; or evidence is damaged.
    """
    number = opened.number
    made = _claim(desk, opened, certified, total, vectors, seeds, pair_keys)
    claimed = audits.check_claim(
        desk.publish("claim", number, opened.context, made), certified.frozen, certificate=made.certificate,
        terms=desk.accepted.in_round(opened.manifest.dimension).terms,
    )  # fmt: skip
    if rounds.own(desk.store, desk.accepted, "audit", number, opened.context) is not None:
        return ""
    asked = tuple(sorted({silo for picked in claimed.auditors for silo in picked}))
    last: list[tuple[frozenset[int], Audit | None]] = []

    def done(arrived: frozenset[int]) -> bool:
        if not last or last[-1][0] != arrived:
            last.append((arrived, _audit_of(desk, opened, claimed, arrived)))
        return last[-1][1] is not None or len(arrived) == len(asked)

    deadline_at = desk.deadline_after("claim", number)
    arrived = desk.until("verdict", number, shown=number, deadline_at=deadline_at, parties=asked, done=done)
    _name(desk, opened, claimed, arrived)
    found = last[-1][1]
    if found is None:
        return UNAUDITED
    desk.publish("audit", number, opened.context, found)
    return ""


def _claim(
    desk: Desk, opened: Round, certified: Certified, total: Words, vectors: Mapping[int, Words], seeds: Mapping[int, bytes],
    pair_keys: Mapping[tuple[int, int], bytes] | None,
) -> SumClaim:  # fmt: skip
    """The claim of a sum, once every masked vector is published."""
    openings: dict[int, tuple[bytes, ...]] = {}
    for silo, header in certified.frozen.headers.items():
        words = vectors[silo]
        openings[silo] = slices.hashes(words)
        if desk.store.entry("vector", opened.number, silo) is None:
            raw = audits.document_of(words, header)
            desk.store.put_once("vector", opened.number, silo, raw, received_at=desk.now())
    body = rounds.own(desk.store, desk.accepted, "certificate", opened.number, opened.context) or b""
    return audits.claim_of(
        total, openings, seeds, certified.frozen, certificate=hashlib.sha256(body).digest(), pair_keys=pair_keys
    )


def _audit_of(desk: Desk, opened: Round, claimed: Claimed, arrived: frozenset[int]) -> Audit | None:
    # Also verdicts of silos that are no auditors: what they complain of, every silo looks at again.
    every = arrived.union(desk.store.parties("verdict", opened.number))
    documents = desk.all("verdict", opened.number, every)
    return audits.audit_of(documents, claimed, accepted=desk.accepted, epoch_ctx=opened.context)


def _name(desk: Desk, opened: Round, claimed: Claimed, arrived: frozenset[int]) -> None:
    """Say who complained, and of whom no word came that was needed."""
    stated = {}
    for silo, raw in desk.all("verdict", opened.number, desk.store.parties("verdict", opened.number)).items():
        stated[silo] = audits.check_verdict(raw, desk.accepted.terms.by_id(silo), claimed, epoch_ctx=opened.context)
    for silo, verdict in stated.items():
        if found := sorted(audits.complaints(verdict)):
            _fault(desk, opened, f"silo {silo} says that segments {found} of the sum are wrong or withheld", "complaint", silo)
    for segment in audits.lacking(list(stated.values()), claimed):
        silent = [silo for silo in claimed.auditors[segment] if silo not in stated]
        what = f"segment {segment} of the sum has too few verdicts; silos {silent} said nothing"
        _fault(desk, opened, what, "not-audited", *silent)


def _fault(desk: Desk, opened: Round, what: str, code: str, *silos: int) -> None:
    error = TrustError(f"round {opened.number}: {what}", hint="ask these silos; their logs say why", code=code, silos=list(silos))
    desk.faults.append(error)
    _LOG.warning("%s", error.message)
