# SPDX-License-Identifier: Apache-2.0
"""The board: what members may write, once, and everybody may read.

Promised: the same statement for the same slot is accepted any number of times, also after the round is settled, so a retry
never fails, and the first one stands; other ones are refused by name, and only their owner's signature can accuse an owner of
equivocation. A refusal that the document's owner answers for is written down, for the log (aggregator.refusals). Waiting is the
caller's. The coordinator does not come through here: it writes its own documents into the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

from aggregator import refusals, versions
from aggregator.admission import published
from aggregator.sizes import cap
from aggregator.store import Store
from aggregator.versions import Documents
from privacy.errors import TrustError
from privacy.messages import NOTE_KINDS, Kind, Outcome, Signed, decode

Admission = Callable[[Kind, int, int, bytes, Documents], None]


class Board:
    """Members' access to a store.

    Args:
        admission: aggregator.admission.admit, or a stricter one.
        clock: Unix seconds.
    """

    def __init__(self, store: Store, admission: Admission, clock: Callable[[], float]) -> None:
        self._store = store
        self._admission = admission
        self._clock = clock

    def put(self, kind: Kind, number: int, party: int, data: bytes) -> Literal["created", "same"]:
        """Write a member's document, once.

        Raises:
            TrustError, Replay, RoundError: aggregator.admission refuses it.
            Equivocation: the slot holds another document of this member.
            MachineError: it cannot be stored.
        """
        found = self._store.entry(kind, number, party)
        if found is not None and (found.digest == hashlib.sha256(data).digest() or self._says(kind, number, party, data)):
            return "same"
        try:
            self._admission(kind, number, party, data, self._store)
            return self._store.put_once(kind, number, party, data, received_at=self._clock())
        except TrustError as error:
            refusals.note(self._store, kind, number, party, data, error, now=self._clock())
            raise

    def _says(self, kind: Kind, number: int, party: int, data: bytes) -> bool:
        """Whether the document that stands makes this very statement: an ML-DSA signature over it is another one each time."""
        stands = self._store.get(kind, number, party)
        if stands is None or kind in NOTE_KINDS:
            return False
        try:
            one, other = decode(stands, Signed), decode(data, Signed)
        except TrustError:
            return False
        return (one.type, one.sender, one.context, one.body) == (other.type, other.sender, other.context, other.body)

    def has(self, kind: Kind, number: int, party: int) -> bool:
        """Whether the slot is taken; cheap, for polling."""
        return self._store.entry(kind, number, party) is not None

    def changes(self) -> int | None:
        """A number that is another one once somebody has written; None where the database cannot say."""
        return self._store.changes()

    def get(self, kind: Kind, number: int, party: int) -> bytes | None:
        """The document, or None. Raises TrustError when the evidence is damaged."""
        return self._store.get(kind, number, party)

    def part(self, kind: Kind, number: int, party: int, start: int, size: int) -> bytes | None:
        """Some bytes of a document, or None when it is not there or shorter; see Store.part."""
        return self._store.part(kind, number, party, start, size)

    def cap(self, kind: Kind) -> int:
        """The most bytes a member's document of this kind may have.

        Raises:
            RoundError: no contract is published.
            TrustError: only the coordinator writes this kind.
        """
        both = (published(self._store), versions.in_force(self._store))
        return max(cap(kind, each) for each in both if each is not None)

    def status(self) -> dict[str, object]:
        """Public facts: contract, latest epoch and round, and how the latest settled round ended. A hint, never to act on."""
        accepted = versions.in_force(self._store)
        settled = self._store.latest("outcome")
        raw = None if settled is None else self._store.get("outcome", settled, 0)
        ended = None if raw is None else decode(decode(raw, Signed).body, Outcome)
        return {
            "contract": None if accepted is None else {
                "name": accepted.terms.name, "version": accepted.terms.version,
                "digest": accepted.digest.hex(), "rounds": accepted.terms.planned_rounds,
            },
            "countersigned": [] if accepted is None else list(self._store.parties("countersignature", accepted.terms.version)),
            "epoch": self._store.latest("epoch"),
            "round": self._store.latest("manifest"),
            "outcome": None if ended is None else {"round": ended.round, "kind": ended.kind, "state": ended.next_state.hex()},
        }  # fmt: skip
