# SPDX-License-Identifier: Apache-2.0
"""Refusals with their reasons: what of them the board writes down, and what the coordinator says in the log.

A refusal counts when somebody answers for the document: a member or guardian of the contract signed these bytes, as this kind, in
the context of this slot's contract or epoch, and for its round. Then it is written down, once for its bytes (aggregator.refused),
and published before the next head. All else is no line: junk, documents without a valid signature, and documents of another slot,
which anybody can have copied from the board. Nor are documents that came too early: they are asked for again.

Promised: nobody can make another party's line; a reason is our own message, cut, and printable. Not promised: anything about notes
(cosignatures name no slot; whoever cosigned another head is found by the heads themselves), or documents too long to be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, cast

from aggregator import rounds, versions
from aggregator.refused import Line
from aggregator.store import DAMAGED, Store
from aggregator.versions import Documents
from privacy import envelope
from privacy.audit import placing
from privacy.errors import SiloquyError, TrustError
from privacy.federation import Accepted, Guardian, Member
from privacy.messages import AGGREGATOR, AGGREGATOR_KINDS, NOTE_KINDS, Kind, Signed, decode
from privacy.transparency.notices import MOST_CODE, MOST_KEPT_BYTES, MOST_REASON, Refusal, open_refusal

_OF_EPOCH: Final = ("epoch-note", "guardian-note")
_IN_EPOCH: Final = ("pair-seeds", "confirmation")


def note(store: Store, kind: Kind, number: int, party: int, data: bytes, error: TrustError, *, now: float) -> None:
    """Write down that ``data`` was refused in this slot because of ``error``, if its author answers for it.

    Raises:
        MachineError: it cannot be written.
    """
    if error.code == DAMAGED or not is_answered_for(store, kind, number, party, data):
        return
    store.refused.note(
        kind=kind, number=number, party=party, digest=hashlib.sha256(data).digest(), code=_plain(error.code, MOST_CODE),
        reason=_plain(error.message, MOST_REASON), document=data if len(data) <= MOST_KEPT_BYTES else b"", time=int(now),
    )  # fmt: skip


def is_answered_for(view: Documents, kind: Kind, number: int, party: int, data: bytes) -> bool:
    """Whether this party of the contract signed ``data`` for this very slot.

    **Formal guarantees**: only if the holder of the key that the contract gives ``party`` signed these bytes, as ``kind``, as this
    party, in the slot's context; and a body that can be read names this slot's number or round. So a copy of a document that was
    made for another slot, federation or version is not its author's fault here.

    =========================================  ==================================================
    edge case                                  behaviour
    =========================================  ==================================================
    a note about the log                       False: it names no slot
    a kind of the aggregator's, or its slot    False: that is no slot of a member
    a body that cannot be read                 True when the context is the slot's: its author signed nonsense
    the slot's contract, epoch or round is     False
    not on the board, or damaged there
    =========================================  ==================================================
    """
    try:
        signed = decode(data, Signed)
        if kind in NOTE_KINDS | AGGREGATOR_KINDS or (signed.type, signed.sender) != (kind, party):
            return False
        accepted = versions.governing(view, kind, number)
        if accepted is None or not _is_for(view, kind, number, data, signed.context, accepted):
            return False
        parties: list[Member | Guardian] = [*accepted.terms.member, *accepted.terms.guardian]
        key = next(each.verify_key for each in parties if each.id == party)
        envelope.open_signed(data, type=kind, context=signed.context, sender=party, key=key)
    except (SiloquyError, StopIteration):
        return False
    return True


def _is_for(view: Documents, kind: Kind, number: int, data: bytes, context: bytes, accepted: Accepted) -> bool:
    """Whether the document's context, and what its body says of its place, are those of the slot."""
    claim = placing.claim(data)
    if kind == "countersignature":
        return context == accepted.digest and accepted.terms.version == number
    if kind in _OF_EPOCH:
        return context == accepted.digest and (claim is None or claim.number == number)
    if kind in _IN_EPOCH:
        at = rounds.epoch_in(view, accepted, number)
        return at is not None and context == at.context
    opened = rounds.round_in(view, accepted, number)
    return opened is not None and context == opened.context and (claim is None or claim.rests_on == opened.ctx)


def publish(store: Store, say: Callable[[Kind, int, Refusal], object]) -> None:
    """Make a document of every line that has none yet, through ``say``, in order; before a head is signed.

    Raises:
        MachineError: the disk or the database refuses.
    """
    for line in store.refused.due(store.latest("refusal") or 0):
        say("refusal", line.place, _document(line))


def _document(line: Line) -> Refusal:
    if line.more:
        reason = f"{line.more} more refused documents of this party came before this head, and have no line of their own"
        return Refusal(
            serial=line.place, kind="refusal", number=line.place, party=line.party, digest=b"", code=line.code, reason=reason,
            time=line.time, more=min(line.more, 2**32 - 1),
        )  # fmt: skip
    return Refusal(
        serial=line.place, kind=cast(Kind, line.kind), number=line.number, party=line.party, digest=bytes.fromhex(line.digest),
        code=line.code, reason=line.reason, time=line.time, document=line.document,
    )  # fmt: skip


def restore(store: Store) -> None:
    """After the table was made again: write the published refusals down, so that their documents get no second line."""
    accepted = [versions.published(store, version) for version in range(1, (store.latest("contract") or 0) + 1)]
    by_digest = {each.digest: each for each in accepted if each is not None}
    lines = []
    for serial in range(1, (store.latest("refusal") or 0) + 1):
        try:
            made = open_refusal(store.get("refusal", serial, AGGREGATOR) or b"", serial, by_digest)
        except TrustError:  # its file is gone or damaged; `verify` says so
            continue
        of = (made.kind, made.number, made.party, made.digest.hex(), made.code, made.reason, made.document, made.more, made.time)
        lines.append(Line(serial, *of))
    store.refused.restore(lines)


def _plain(text: str, most: int) -> str:
    """``text`` in printable characters, cut."""
    plain = "".join(each if each.isprintable() else "?" for each in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"
