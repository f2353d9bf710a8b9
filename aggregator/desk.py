# SPDX-License-Identifier: Apache-2.0
"""The coordinator's desk: it signs and publishes the aggregator's documents, waits for the members', and reads both back.

Promised: a published document is durable before the call returns, and one slot never gets two of them. Waiting is by looking
at the store every ``POLL_S`` seconds through an injected ``sleep``; nothing here decides what a document must say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aggregator import rounds
from aggregator.rounds import Round
from aggregator.store import Store
from privacy.envelope import sign
from privacy.errors import RoundError
from privacy.federation import Accepted
from privacy.keys import Identity
from privacy.messages import AGGREGATOR, Kind, Outcome, Upload, Wire, encode

POLL_S: Final = 0.02
_REPORT_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Progress, for people: how many of a step's documents are here. ``round`` is the epoch's number in epoch steps, 0 before."""

    round: int
    step: Kind
    arrived: int
    expected: int
    seconds: float


class Desk:
    """Documents in and out; see the module docstring.

    Args:
        clock: Unix seconds.
        sleep: waits some seconds between two looks at the store.
        progress: told about each arrival, and once a second while waiting.
    """

    def __init__(
        self, *, store: Store, identity: Identity, accepted: Accepted, clock: Callable[[], float],
        sleep: Callable[[float], None], progress: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.store, self.accepted = store, accepted
        self.members = tuple(member.id for member in accepted.terms.member)
        self._identity, self._clock, self._sleep, self._progress = identity, clock, sleep, progress

    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    def publish(self, kind: Kind, number: int, context: bytes, message: Wire) -> bytes:
        """Sign a document and put it in the aggregator's slot; its body. Finding it there with the same bytes is the same.

        Raises:
            Equivocation: another document stands there.
        """
        body = encode(message)
        raw = sign(self._identity, type=kind, context=context, sender=AGGREGATOR, body=body)
        self.store.put_once(kind, number, AGGREGATOR, raw, received_at=self._clock())
        return body

    def demand(self, kind: Kind, number: int, *, shown: int, hint: str = "start them, then run the same command again") -> None:
        """Return when every member's document is here.

        Raises:
            RoundError: some are missing after the contract's deadline, counted from now; they are named.
        """
        missing = self.collect(kind, number, shown=shown, deadline_at=self._clock() + self.accepted.terms.sum.deadline_s)
        if missing:
            raise RoundError(
                f"no {kind} {number} from silos {list(missing)} by the deadline", hint=hint, code="absent", missing=list(missing)
            )

    def collect(self, kind: Kind, number: int, *, shown: int, deadline_at: float) -> tuple[int, ...]:
        """Wait until every member's document is here, or the deadline; who is missing. ``shown`` is the event's round."""
        start = self._clock()
        told: tuple[int, float] = (-1, start)
        while True:
            arrived = set(self.store.parties(kind, number))
            missing = tuple(silo for silo in self.members if silo not in arrived)
            here, now = len(self.members) - len(missing), self._clock()
            if here != told[0] or now - told[1] >= _REPORT_S:
                told = (here, now)
                self.tell(shown, kind, here, now - start)
            if not missing or now >= deadline_at:
                return missing
            self._sleep(POLL_S)

    def tell(self, shown: int, step: Kind, arrived: int, seconds: float) -> None:
        """Report progress."""
        self._progress(Event(round=shown, step=step, arrived=arrived, expected=len(self.members), seconds=seconds))

    def deadline_after(self, kind: Kind, number: int) -> float:
        """When the step after one of the aggregator's documents must be complete."""
        entry = self.store.entry(kind, number, AGGREGATOR)
        return self.accepted.terms.sum.deadline_s + (self._clock() if entry is None else entry.received_at)

    def all(self, kind: Kind, number: int) -> dict[int, bytes]:
        """Every member's document by silo. Raises RoundError when one is missing."""
        return {silo: self.read(kind, number, silo) for silo in self.members}

    def read(self, kind: Kind, number: int, party: int) -> bytes:
        """One document. Raises RoundError when it is missing."""
        raw = self.store.get(kind, number, party)
        if raw is None:
            raise RoundError(f"there is no {kind} {number} of party {party}", hint="run the same command again", code="missing")
        return raw

    def upload(self, opened: Round, silo: int) -> Upload:
        """A member's upload in this round, its signature verified.

        Raises:
            RoundError: it is missing.
            TrustError: not signed by that member, as an upload, in this epoch.
        """
        return rounds.open_upload(self.read("upload", opened.number, silo), opened, self.accepted.terms.by_id(silo))

    def settled(self, number: int) -> bool:
        """Whether the round has an outcome."""
        return self.store.entry("outcome", number, AGGREGATOR) is not None

    def round(self, number: int) -> Round:
        """A round that was opened. Raises RoundError when it was not."""
        opened = rounds.round_in(self.store, self.accepted, number)
        if opened is None:
            raise RoundError(f"round {number} was never opened", hint="rounds are numbered without gaps", code="order")
        return opened

    def outcome(self, number: int) -> tuple[bytes, Outcome]:
        """A settled round's outcome, as body and message. Raises RoundError when there is none."""
        found = rounds.outcome_in(self.store, self.accepted, self.round(number))
        if found is None:
            raise RoundError(f"round {number} has no outcome", hint="run the same command again", code="missing")
        return found
