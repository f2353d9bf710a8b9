# SPDX-License-Identifier: Apache-2.0
"""The coordinator's desk: it signs and publishes the aggregator's documents, waits for the members', and reads both back.

Promised: a published document is durable before the call returns, and one slot never gets two of them. Waiting is by looking
at the store every ``POLL_S`` seconds through an injected ``sleep``; nothing here decides what a document must say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from aggregator import rounds
from aggregator.rounds import Round, Words
from aggregator.store import Store
from privacy.envelope import open_signed, sign
from privacy.errors import RoundError, TrustError
from privacy.federation import Accepted
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, Header, Kind, Outcome, Signed, Upload, Wire, decode, encode
from privacy.secure_sum import guardian_sum

POLL_S: Final = 0.02
_GLANCES: Final = 5
"""How often in ``POLL_S`` the desk asks whether anything was written at all, which costs next to nothing."""
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
        self.faults: list[TrustError] = []
        """What was found wrong with single parties' documents and did not end a round."""
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
        found = self.store.get(kind, number, AGGREGATOR)
        if found is not None and decode(found, Signed).body == body:  # a signature may be another one each time
            key = self.accepted.terms.aggregator.verify_key
            return open_signed(found, type=kind, context=context, sender=AGGREGATOR, key=key)
        raw = sign(self._identity, type=kind, context=context, sender=AGGREGATOR, body=body)
        self.store.put_once(kind, number, AGGREGATOR, raw, received_at=self._clock())
        return body

    def demand(
        self, kind: Kind, number: int, *, shown: int, hint: str = "start them, then run the same command again",
        parties: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """Return when every member's document is here, or that of all ``parties``.

        Raises:
            RoundError: some are missing after the contract's deadline, counted from now; they are named.
        """
        deadline_at = self._clock() + self.accepted.terms.sum.deadline_s
        missing = self.collect(kind, number, shown=shown, deadline_at=deadline_at, parties=parties)
        if missing:
            raise RoundError(
                f"no {kind} {number} from silos {list(missing)} by the deadline", hint=hint, code="absent", missing=list(missing)
            )

    def collect(
        self, kind: Kind, number: int, *, shown: int, deadline_at: float, parties: tuple[int, ...] = (), enough: int = 0
    ) -> tuple[int, ...]:
        """Wait until every member's document is here, or the deadline; who is missing. ``shown`` is the event's round.

        Args:
            parties: whose documents, if not the members'.
            enough: how many of them end the wait, if not all.
        """
        parties = parties or self.members
        arrived = self.until(
            kind, number, shown=shown, deadline_at=deadline_at, parties=parties,
            done=lambda arrived: len(arrived) >= (enough or len(parties)),
        )  # fmt: skip
        return tuple(party for party in parties if party not in arrived)

    def until(
        self, kind: Kind, number: int, *, shown: int, deadline_at: float, parties: tuple[int, ...],
        done: Callable[[frozenset[int]], bool],
    ) -> frozenset[int]:  # fmt: skip
        """Wait until ``done`` says so of those of ``parties`` whose documents are here, or the deadline; who they are."""
        start = self._clock()
        told: tuple[int, float] = (-1, start)
        while True:
            seen = self.store.changes()
            arrived, now = frozenset(self.store.parties(kind, number)).intersection(parties), self._clock()
            if len(arrived) != told[0] or now - told[1] >= _REPORT_S:
                told = (len(arrived), now)
                self.tell(shown, kind, len(arrived), now - start, expected=len(parties))
            if done(arrived) or now >= deadline_at:
                return arrived
            for _ in range(_GLANCES):
                self._sleep(POLL_S / _GLANCES)
                if seen is not None and self.store.changes() != seen:
                    break

    def tell(self, shown: int, step: Kind, arrived: int, seconds: float, *, expected: int) -> None:
        """Report progress."""
        self._progress(Event(round=shown, step=step, arrived=arrived, expected=expected, seconds=seconds))

    def deadline_after(self, kind: Kind, number: int) -> float:
        """When the step after one of the aggregator's documents must be complete."""
        entry = self.store.entry(kind, number, AGGREGATOR)
        return self.accepted.terms.sum.deadline_s + (self._clock() if entry is None else entry.received_at)

    def all(self, kind: Kind, number: int, parties: Iterable[int]) -> dict[int, bytes]:
        """The documents of these parties. Raises RoundError when one is missing."""
        return {party: self.read(kind, number, party) for party in sorted(parties)}

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


class Vectors(Mapping[int, Words]):
    """The masked vectors of these headers, each read from the board, opened and checked when it is asked for."""

    def __init__(self, desk: Desk, headers: Mapping[int, Header], seal_seed: bytes, opened: Round) -> None:
        self._desk, self._headers, self._seal_seed, self._opened = desk, headers, seal_seed, opened

    def __getitem__(self, silo: int) -> Words:
        upload = self._desk.upload(self._opened, silo)
        return guardian_sum.open_upload(upload, self._headers[silo], seal_seed=self._seal_seed)

    def __iter__(self) -> Iterator[int]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def check(self) -> None:
        """Return if all of them open and match their headers. Raises TrustError with the silo's name."""
        for silo in self:
            self[silo]
