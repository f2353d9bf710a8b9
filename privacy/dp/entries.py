# SPDX-License-Identifier: Apache-2.0
"""What a ledger can say: one line, and the five kinds of facts it may hold.

Promised: a body that is decoded has exactly the fields of its kind, in range; an unknown kind or field is refused. Not promised:
that a line is genuine or in its place. ``privacy.dp.ledger`` proves both.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from privacy.dp.mechanism import Mechanism

Hex = Annotated[str, msgspec.Meta(pattern=r"\A(?:[0-9a-f]{2})+\Z", max_length=256)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=500)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Begin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first entry: whose ledger this is."""

    kind: ClassVar[str] = "open"
    who: Text
    version: int


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A run declared before its first step: the whole plan against insiders, and the limits it was admitted under.

    ``units``: as in ``Reserve``, for the units it was admitted for. ``before``: the basis rounds that come before those of
    ``mechanism``, where the contract has them. ``unit``: what the contract protects, as it names it; none in ledgers of earlier
    versions.
    """

    kind: ClassVar[str] = "plan"
    contract: Hex
    run: Text
    mechanism: Mechanism
    epsilon: float
    delta: float
    units: Digest | None = None
    before: Mechanism | None = None
    unit: Text | None = None


class Reserve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One attempt at a round, charged in full from here on.

    ``units``: SHA-256 of the file that names the units it may draw (``privacy.dp.overlap``); none where nothing was said of them.
    """

    kind: ClassVar[str] = "reserve"
    contract: Hex
    round: Count
    attempt: Hex
    mechanism: Mechanism
    units: Digest | None = None


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The attempt was part of a released sum. ``silos``: how many stood in it, where that may be fewer than all; it is charged
    as declared all the same.
    """

    kind: ClassVar[str] = "commit"
    contract: Hex
    round: Count
    attempt: Hex
    silos: Annotated[int, msgspec.Meta(ge=1, lt=2**15)] | None = None


class Void(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The round ended without a result; what was reserved for it stays charged."""

    kind: ClassVar[str] = "void"
    contract: Hex
    round: Count
    reason: Text


Body = Begin | Plan | Reserve | Commit | Void
_BODIES: dict[str, type[Body]] = {body.kind: body for body in (Begin, Plan, Reserve, Commit, Void)}


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the ledger without its signature; ``body`` is the JSON object of its kind."""

    sequence: Count
    previous: Digest
    time: Count
    kind: str
    body: msgspec.Raw

    def content(self) -> Body:
        """The body as the type of its kind.

        Raises:
            msgspec.DecodeError: unknown kind, unknown field, or a value out of range.
        """
        if self.kind not in _BODIES:
            raise msgspec.ValidationError(f"unknown kind {self.kind!r}")
        return msgspec.json.decode(self.body, type=_BODIES[self.kind])
