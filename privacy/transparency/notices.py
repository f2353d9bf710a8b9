# SPDX-License-Identifier: Apache-2.0
"""What the aggregator says in the log beside the rounds: that it refused a document, and why; and that it gave out a report.

Both are documents in the aggregator's slot under a running number (1, 2, 3, … without gaps), signed in the context of the contract
that was in force, and so leaves. A ``Refusal`` names a document whose author signed it for the very slot that it was sent to:
somebody answers for it. A ``ReportDigest`` names a report's record by its digest.

Promised: ``open_refusal`` and ``open_report`` give only what the aggregator signed; where a refusal holds the refused bytes, they
have the digest that it names. Not promised: that a refusal was right, or, where it has no bytes, that there was such a document:
then it is the aggregator's word. Nor that every one is named: of one party some are between two heads, and the rest counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec

from privacy.envelope import open_signed
from privacy.errors import TrustError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR, Digest, Kind, Number, PartyId, Signed, Wire, decode

MOST_KEPT_BYTES: Final = 8192
"""The largest refused document that its refusal holds: larger than any but uploads, seeds and shares of many parties."""
MOST_REASON: Final = 240
MOST_CODE: Final = 64
TOO_MANY: Final = "too-many"
"""The code of a line that counts refusals which have no line of their own."""

_Time = Annotated[int, msgspec.Meta(ge=0)]


class Refusal(Wire, frozen=True, kw_only=True):
    """One document that was refused: the slot for which ``party`` signed it, the SHA-256 of its bytes, and why.

    ``time``: Unix seconds by the service's clock. ``document``: the bytes, where they are at most ``MOST_KEPT_BYTES``. A line that
    counts has ``more`` above 0, kind ``refusal``, code ``too-many``, its own number and no digest.
    """

    serial: Number
    kind: Kind
    number: Number
    party: PartyId
    digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    code: Annotated[str, msgspec.Meta(max_length=MOST_CODE)]
    reason: Annotated[str, msgspec.Meta(max_length=MOST_REASON)]
    time: _Time
    document: Annotated[bytes, msgspec.Meta(max_length=MOST_KEPT_BYTES)] = b""
    more: Number = 0


class ReportDigest(Wire, frozen=True, kw_only=True):
    """One report: the SHA-256 of ``report.json``, its schema, the last round that it covers (0: none), and when it was made.

    ``time`` is the record's ``generated_at``: so the same facts are found to be the same report.
    """

    serial: Number
    digest: Digest
    schema: Annotated[str, msgspec.Meta(max_length=64)]
    last_round: Number
    time: _Time


_RESOLVED = tuple(msgspec.msgpack.Decoder(kind) for kind in (Refusal, ReportDigest))  # before any thread does: see privacy.messages
N = TypeVar("N", Refusal, ReportDigest)


def open_refusal(raw: bytes, serial: int, versions: Mapping[bytes, Accepted]) -> Refusal:
    """The aggregator's refusal in the slot ``serial``.

    Args:
        versions: the contract's versions by digest; the refusal's context is one of them.

    Raises:
        TrustError: malformed, of another slot, not the aggregator's, or it holds other bytes than it names.
    """
    found = _opened(raw, Refusal, "refusal", serial, versions)
    if found.more:
        plain = (found.kind, found.number, found.digest, found.code, found.document) == ("refusal", serial, b"", TOO_MANY, b"")
    else:
        plain = len(found.digest) == 32 and (not found.document or hashlib.sha256(found.document).digest() == found.digest)
    if not plain:
        raise _refused(f"refusal {serial} names another document than it holds", "malformed")
    return found


def open_report(raw: bytes, serial: int, versions: Mapping[bytes, Accepted]) -> ReportDigest:
    """What the aggregator says of a report in the slot ``serial``. Arguments and errors as ``open_refusal``."""
    return _opened(raw, ReportDigest, "report", serial, versions)


def _opened(raw: bytes, shape: type[N], kind: Kind, serial: int, versions: Mapping[bytes, Accepted]) -> N:
    context = decode(raw, Signed).context
    if context not in versions:
        raise _refused(f"{kind} {serial} is of contract {context.hex()[:16]}…, which is not here", "wrong-context")
    key = versions[context].terms.aggregator.verify_key
    found = decode(open_signed(raw, type=kind, context=context, sender=AGGREGATOR, key=key), shape)
    if found.serial != serial:
        raise _refused(f"{kind} {serial} says that it is number {found.serial}", "wrong-number")
    return found


def _refused(why: str, code: str) -> TrustError:
    return TrustError(why, hint="keep the document: it is evidence against the aggregator", code=code)
