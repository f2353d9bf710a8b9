# SPDX-License-Identifier: Apache-2.0
"""The coordinator: the one process that holds the aggregator's key and drives a federation from document to document.

Promised: everything it does follows from the documents on the board, so it may be killed at any point and started again: it
finds what stands, makes what is missing, and never says two things in one slot. It asks no silo for consent before it saw
that all vectors open and match their headers. A round that cannot be summed is closed as void; a faulty document also stops
the run, with its owner named. It goes on only after every silo computed the same model digest as it did itself.

Not promised: that a round ends before its silos answer or its deadline passes. One coordinator works in a home at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from aggregator import rounds, states
from aggregator.config import Home
from aggregator.desk import Desk, Event
from aggregator.rounds import Epoch, Round, Words
from aggregator.store import DAMAGED, Store
from privacy import epoch, guardian_sum, update_rule
from privacy.errors import ConfigError, Equivocation, RoundError, TrustError
from privacy.federation import Accepted
from privacy.guardian_sum import Certified, Frozen
from privacy.keys import Identity
from privacy.messages import AGGREGATOR, Outcome
from privacy.update_rule import State


@dataclass(frozen=True, kw_only=True)
class Closed:
    """How a round ended; ``state`` is the digest of the model after it, ``seconds`` from opening to outcome."""

    round: int
    kind: Literal["result", "void", "annulled"]
    reason: str
    state: bytes
    seconds: int


class Coordinator:
    """Drives a federation; take it from ``coordinating``, which holds the home against a second one.

    Args:
        home: for the state cache.
        clock: Unix seconds.
        sleep: waits some seconds between two looks at the board.
        progress: told about each arrival.

    Raises:
        ConfigError: the identity is not the aggregator of the contract.
    """

    def __init__(
        self, *, home: Home, store: Store, identity: Identity, accepted: Accepted, clock: Callable[[], float],
        sleep: Callable[[float], None], progress: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._home, self._store, self._accepted = home, store, accepted
        self._seal_seed = _receive_seed(identity, accepted)
        self._desk = Desk(store=store, identity=identity, accepted=accepted, clock=clock, sleep=sleep, progress=progress)
        self._confirmed: Epoch | None = None
        self._reached: tuple[int, State] | None = None

    @property
    def next_round(self) -> int:
        """The round that is open, or the number after the last settled one."""
        latest = self._store.latest("manifest") or 0
        return latest if latest and not self._desk.settled(latest) else latest + 1

    def ensure_countersigned(self) -> None:
        """Return when every member countersigned the contract.

        Raises:
            RoundError: some did not within the contract's deadline; they are named.
        """
        version = self._accepted.terms.version
        self._desk.demand("countersignature", version, shown=0, hint="they run `silo join`; then run the same command again")

    def ensure_epoch(self) -> Epoch:
        """The current epoch, all pairs confirmed. Goes on with an unfinished one; calls a new one where there is none, or it broke.

        Raises:
            RoundError: a member is missing at the deadline; it is named.
            TrustError: the new epoch is refused (privacy.epoch); calling again starts another.
        """
        latest = self._store.latest("epoch")
        if self._confirmed is not None and self._confirmed.number == latest:
            return self._confirmed
        if latest is not None:
            try:
                return self._complete(latest)
            except TrustError as error:
                if _ours(error):
                    raise
        return self.new_epoch()

    def new_epoch(self) -> Epoch:
        """A new epoch with fresh keys of every member.

        Raises:
            RoundError: a round is open; or a member is missing at the deadline.
            TrustError: the epoch is refused (privacy.epoch).
        """
        latest = self._store.latest("manifest") or 0
        if latest and not self._desk.settled(latest):
            raise RoundError(f"round {latest} is open", hint="end it first: run `aggregator round`", code="open-round")
        number = (self._store.latest("epoch") or 0) + 1
        self._desk.publish("epoch", number, self._accepted.digest, rounds.call(self._accepted, number))
        return self._complete(number)

    def run_round(self, number: int) -> Closed:
        """Run round ``number`` to its outcome, from wherever the documents stand; a settled round is checked again.

        Raises:
            RoundError: out of order, the plan is done, too many void or rejected rounds in a row, or the model digests differ.
            TrustError: a silo's document is faulty; the round was closed as void first.
            ConfigError: the contract expired.
        """
        opened = rounds.round_in(self._store, self._accepted, number) or self._open(number)
        if not self._desk.settled(number):
            self._close(opened)
        _, outcome = self._desk.outcome(number)
        if outcome.kind == "result":
            self._compare_digests(opened)
        self._check_voids(number)
        entry = self._store.entry("outcome", number, AGGREGATOR)
        ended = opened.manifest.opened_at if entry is None else entry.received_at
        return Closed(
            round=number,
            kind=outcome.kind,
            reason=outcome.reason,
            state=outcome.next_state,
            seconds=ended - opened.manifest.opened_at,
        )

    def state(self) -> State:
        """The model state after the last settled round, from the cache or computed again from the outcomes.

        Raises:
            TrustError: an outcome does not hold.
        """
        latest = self._store.latest("outcome") or 0
        if self._reached is None or self._reached[0] != latest:
            self._reached = (latest, self._derive(latest))
        return self._reached[1]

    # --- Epoch -----------------------------------------------------------------------------------------------------------

    def _complete(self, number: int) -> Epoch:
        at = rounds.epoch_in(self._store, self._accepted, number)
        if at is None:
            self._desk.demand("epoch-note", number, shown=number)
            roster = rounds.roster(self._accepted, number, self._desk.all("epoch-note", number))
            body = self._desk.publish("roster", number, self._accepted.digest, roster)
            at = Epoch(number=number, context=epoch.epoch_ctx(self._accepted.digest, number, body))
        self._desk.demand("pair-seeds", number, shown=number)
        self._desk.demand("confirmation", number, shown=number)
        tags = self._desk.all("confirmation", number)
        epoch.check_confirmations(tags, accepted=self._accepted, context=at.context, epoch=number)
        self._confirmed = at
        return at

    # --- Round -----------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> Round:
        self._check_may_open(number)
        at = self.ensure_epoch()
        manifest = rounds.manifest(
            accepted=self._accepted, at=at, number=number, previous=self._previous(number), state=self.state(), now=self._desk.now()
        )
        body = self._desk.publish("manifest", number, at.context, manifest)
        return Round(manifest=manifest, ctx=guardian_sum.round_ctx(body), context=at.context)

    def _check_may_open(self, number: int) -> None:
        terms = self._accepted.terms
        if number != self.next_round:
            raise RoundError(
                f"round {number} is out of order, the next is {self.next_round}",
                hint="rounds are numbered without gaps",
                code="order",
            )
        if number > terms.training.rounds:
            raise RoundError(
                f"the plan of {terms.training.rounds} rounds is done",
                hint="more rounds need a new contract version",
                code="plan-done",
            )
        today = datetime.datetime.fromtimestamp(self._desk.now(), datetime.UTC).date().isoformat()
        if today > terms.expires:
            raise ConfigError(
                f"the contract expired on {terms.expires}, today is {today}", hint="agree on a new version", code="expired"
            )
        if number > 1:
            self._check_voids(number - 1)
            before = self._desk.round(number - 1)
            # A silo acknowledges in the epoch of the round; in a later one the manifest's base state says the same.
            if before.manifest.epoch == self._store.latest("epoch") and self._desk.outcome(number - 1)[1].kind == "result":
                self._compare_digests(before)

    def _close(self, opened: Round) -> None:
        """Bring an open round to its outcome; a faulty document closes it as void and is raised."""
        try:
            reason = self._sum(opened)
        except TrustError as error:
            if _ours(error):
                raise
            self._settle(opened, rounds.void(opened, self.state(), f"refused: {error.code}"), self.state())
            raise
        if reason:
            self._settle(opened, rounds.void(opened, self.state(), reason), self.state())

    def _sum(self, opened: Round) -> str:
        """Why there is no sum ("absent"), or "" once the result stands."""
        number = opened.number
        if self._desk.collect("upload", number, shown=number, deadline_at=opened.manifest.deadline_at):
            return rounds.ABSENT
        frozen = self._freeze(opened)
        if self._desk.collect("consent", number, shown=number, deadline_at=self._desk.deadline_after("freeze", number)):
            return rounds.ABSENT
        certificate, certified = rounds.certificate(self._accepted, opened, frozen, self._desk.all("consent", number))
        self._desk.publish("certificate", number, opened.context, certificate)
        if self._desk.collect("release", number, shown=number, deadline_at=self._desk.deadline_after("certificate", number)):
            return rounds.ABSENT
        seeds = self._seeds(opened, certified)
        vectors = _Vectors(self._desk, frozen, self._seal_seed, opened)
        total = guardian_sum.unmask(vectors, seeds, certified)
        outcome, after = rounds.result(self._accepted, opened, self.state(), certified, total, seeds, vectors)
        self._settle(opened, outcome, after)
        return ""

    def _freeze(self, opened: Round) -> Frozen:
        headers = {silo: self._desk.upload(opened, silo).header for silo in self._desk.members}
        freeze, frozen = rounds.freeze(self._accepted, opened, headers)
        if self._store.entry("freeze", opened.number, AGGREGATOR) is None:
            vectors = _Vectors(self._desk, frozen, self._seal_seed, opened)
            for silo in vectors:
                vectors[silo]  # opens, or raises with the silo's name, while nobody has consented yet
        self._desk.publish("freeze", opened.number, opened.context, freeze)
        return frozen

    def _seeds(self, opened: Round, certified: Certified) -> dict[int, bytes]:
        releases = self._desk.all("release", opened.number)
        return {
            member.id: guardian_sum.open_release(
                releases[member.id], certified, member=member, epoch_ctx=opened.context, seal_seed=self._seal_seed
            )
            for member in self._accepted.terms.member
        }

    def _settle(self, opened: Round, outcome: Outcome, after: State) -> None:
        self._desk.publish("outcome", opened.number, opened.context, outcome)
        self._reached = (opened.number, after)
        states.save(self._home.state_folder, opened.number, after)
        self._desk.tell(opened.number, "outcome", len(self._desk.members), self._desk.now() - opened.manifest.opened_at)

    def _compare_digests(self, opened: Round) -> None:
        number = opened.number
        self._desk.demand("acknowledgement", number, shown=number)
        mine = self._desk.outcome(number)[1].next_state
        stated = {
            member.id: rounds.open_acknowledgement(self._desk.read("acknowledgement", number, member.id), opened, member).state
            for member in self._accepted.terms.member
        }
        if apart := {silo: state.hex()[:16] for silo, state in stated.items() if state != mine}:
            raise RoundError(
                f"model digests differ after round {number}: here {mine.hex()[:16]}, silos {apart}",
                code="digests-differ",
                hint="compare the numpy versions and processors of these silos; no further round is opened",
                silos=sorted(apart),
            )

    def _check_voids(self, number: int) -> None:
        """Return unless as many rounds up to this one as the contract allows charged every silo and moved nothing."""
        allowed = self._accepted.terms.sum.max_void_rounds
        most = max(1, allowed)  # where the silos stop too
        last = range(number, max(0, number - most), -1)
        if len(last) == most and not any(rounds.moved(self._desk.outcome(each)[1]) for each in last):
            reasons = ", ".join(sorted({self._desk.outcome(each)[1].reason for each in last}))
            raise RoundError(
                f"{most} rounds in a row were void or rejected (up to round {number}: {reasons}), the contract allows {allowed}",
                code="void-rounds",
                hint="find out who was missing or spoilt the sum, then agree on a new contract version",
                rounds=list(reversed(last)),
            )

    def _previous(self, number: int) -> bytes:
        return self._accepted.digest if number == 1 else hashlib.sha256(self._desk.outcome(number - 1)[0]).digest()

    def _derive(self, number: int) -> State:
        if number == 0:
            return update_rule.initial(self._accepted.terms)
        cached = states.load(self._home.state_folder, number, self._desk.outcome(number)[1].next_state)
        if cached is not None:
            return cached
        state = update_rule.initial(self._accepted.terms)
        for each in range(1, number + 1):
            state = rounds.settle(state, self._desk.outcome(each)[1], self._accepted.terms)
        states.save(self._home.state_folder, number, state)
        return state


class _Vectors(Mapping[int, Words]):
    """The masked vectors of a set, each read from the board, opened and checked when it is asked for."""

    def __init__(self, desk: Desk, frozen: Frozen, seal_seed: bytes, opened: Round) -> None:
        self._desk, self._headers, self._seal_seed, self._opened = desk, frozen.headers, seal_seed, opened

    def __getitem__(self, silo: int) -> Words:
        upload = self._desk.upload(self._opened, silo)
        return guardian_sum.open_upload(upload, self._headers[silo], seal_seed=self._seal_seed)

    def __iter__(self) -> Iterator[int]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


@contextlib.contextmanager
def coordinating(
    home: Home, *, store: Store, identity: Identity, clock: Callable[[], float], sleep: Callable[[float], None],
    progress: Callable[[Event], None],
) -> Iterator[Coordinator]:  # fmt: skip
    """The coordinator of a home, alone at work in it, for the latest contract on its board.

    Raises:
        MachineError: another coordinator is at work.
        ConfigError: no contract is signed yet, or the identity is not its aggregator.
    """
    with home.locked():
        accepted = rounds.accepted_in(store)
        if accepted is None:
            raise ConfigError("no contract is signed yet", hint="add the members, then run `aggregator sign`", code="no-contract")
        yield Coordinator(home=home, store=store, identity=identity, accepted=accepted, clock=clock, sleep=sleep, progress=progress)


def _receive_seed(identity: Identity, accepted: Accepted) -> bytes:
    named, public = accepted.terms.aggregator, identity.public
    if identity.receive_seed is None or public.seal_key is None:
        raise ConfigError(
            "this identity cannot receive", hint="use the aggregator.key that `aggregator init` made", code="identity"
        )
    if public.sign_key.hex() != named.sign_key or public.seal_key.hex() != named.seal_key:
        raise ConfigError(
            f"the key here is {public.sign_key.hex()[:16]}…, the contract names {named.sign_key[:16]}…",
            hint="use the aggregator.key with which the contract was signed",
            code="identity",
        )
    return identity.receive_seed


def _ours(error: TrustError) -> bool:
    """Whether the fault lies on this machine and not in a silo's document: then nothing is closed because of it."""
    return isinstance(error, Equivocation) or error.code in (DAMAGED, "outcome")
