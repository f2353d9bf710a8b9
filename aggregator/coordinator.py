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
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from aggregator import consent, refusals, rounds, shares, states, versions
from aggregator.config import Home
from aggregator.desk import Desk, Event
from aggregator.epochs import Epochs
from aggregator.journal import ROLLED_BACK, Journal
from aggregator.rounds import Epoch, Round
from aggregator.store import DAMAGED, Store
from privacy import update_rule
from privacy.errors import ConfigError, Equivocation, RoundError, TrustError
from privacy.federation import Accepted, Contract
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, Kind, Outcome, Wire
from privacy.secure_sum import guardian_sum
from privacy.transparency import log
from privacy.transparency.notes import Checkpoint
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
        signer = identity.under(accepted.terms.signatures)
        self._desk = Desk(store=store, identity=signer, accepted=accepted, clock=clock, sleep=sleep, progress=progress)
        former = _former(store, accepted)
        self._journal = Journal(
            home.log_folder, store=store, identity=identity, terms=accepted.terms, clock=clock, former=former,
            before_head=lambda: refusals.publish(store, self.say),
        )  # fmt: skip
        self._epochs = Epochs(self._desk)
        self._reached: tuple[int, State] | None = None

    @property
    def next_round(self) -> int:
        """The round that is open, or the number after the last settled one."""
        latest = self._store.latest("manifest") or 0
        return latest if latest and not self._desk.settled(latest) else latest + 1

    @property
    def superseded(self) -> bool:
        """Whether a newer version of the contract stands and no round is open: it is in force for a coordinator that starts now."""
        now = versions.in_force(self._store)
        return now is not None and now.digest != self._accepted.digest

    def say(self, kind: Kind, number: int, message: Wire) -> None:
        """Publish a document that belongs to no round, under the contract at work here."""
        self._desk.publish(kind, number, self._accepted.digest, message)

    def renew_head(self) -> Checkpoint:
        """Show a head of the log that covers all that stands now (Journal.renew)."""
        return self._journal.renew()

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
            TrustError: the new epoch is refused (privacy.secure_sum.epoch); calling again starts another.
        """
        if self.next_round > 1:
            self._journal.checkpoint(self.next_round)  # log: checks the table; makes the head if a killed run did not
        latest, at = self._store.latest("epoch"), self._epochs.standing
        if at is None and latest is not None and self._is_ours(latest):
            try:
                at = self._epochs.complete(latest)
            except TrustError as error:
                if _ours(error):
                    raise
        if at is not None and (self._is_open() or not self._epochs.knocked(at)):
            return at
        return self.new_epoch()

    def new_epoch(self) -> Epoch:
        """A new epoch with fresh keys of every member.

        Raises:
            RoundError: a round is open; or a member is missing at the deadline.
            TrustError: the epoch is refused (privacy.secure_sum.epoch).
        """
        if self._is_open():
            latest = self._store.latest("manifest")
            raise RoundError(f"round {latest} is open", hint="end it first: run `aggregator round`", code="open-round")
        return self._epochs.call()

    def _is_ours(self, number: int) -> bool:
        """Whether this epoch was called under the contract at work here: another version starts with new keys of all."""
        called = versions.of_epoch(self._store, number)
        return called is not None and called.digest == self._accepted.digest

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
        self._journal.checkpoint(number + 1)
        self._journal.head(number + 1)  # of the last round too; before another one is opened it is waited for
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

    def _is_open(self) -> bool:
        latest = self._store.latest("manifest") or 0
        return latest > 0 and not self._desk.settled(latest)

    def state(self) -> State:
        """The model state after the last settled round, from the cache or computed again from the outcomes.

        Raises:
            TrustError: an outcome does not hold.
        """
        latest = self._store.latest("outcome") or 0
        if self._reached is None or self._reached[0] != latest:
            self._reached = (latest, self._derive(latest))
        return self._reached[1]

    # --- Round -----------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> Round:
        self._check_may_open(number)
        at = self.ensure_epoch()
        manifest = rounds.manifest(
            accepted=self._accepted, at=at, number=number, previous=self._previous(number), state=self.state(),
            now=self._desk.now(), head=self._head(number),
        )  # fmt: skip
        body = self._desk.publish("manifest", number, at.context, manifest)
        return Round(manifest=manifest, ctx=guardian_sum.round_ctx(body), context=at.context, silos=at.silos)

    def _head(self, number: int) -> Checkpoint:
        """The head on which the round is opened: it covers the outcome before, or the first roster, and a quorum cosigned it."""
        self._journal.checkpoint(number)
        deadline_at = self._desk.now() + self._accepted.terms.sum.deadline_s
        cosigners, quorum = tuple(log.cosigners(self._accepted.terms)), self._accepted.terms.quorum
        missing = self._desk.collect(
            "cosignature", number, shown=number, deadline_at=deadline_at, parties=cosigners, enough=quorum
        )
        head = self._journal.head(number)
        if head is None:
            raise RoundError(
                f"no cosignature {number} of the log from parties {list(missing)} by the deadline, {quorum} are needed",
                hint="start them, then run the same command again", code="absent", missing=list(missing),
            )  # fmt: skip
        return head

    def _check_may_open(self, number: int) -> None:
        terms = self._accepted.terms
        if number != self.next_round:
            raise RoundError(
                f"round {number} is out of order, the next is {self.next_round}",
                hint="rounds are numbered without gaps",
                code="order",
            )
        sketched, basis = self._basis_rounds(number), terms.basis
        if basis is not None and not self.state().basis and sketched >= basis.attempts:
            raise RoundError(
                f"{sketched} basis rounds ended without a result, the plan pays for {basis.attempts}",
                hint="find out who was missing; no later version has more of them, so it takes a new federation", code="plan-done",
            )  # fmt: skip
        if number - sketched > terms.training.rounds:
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
            is_here = before.manifest.epoch == self._store.latest("epoch") and self._is_ours(before.manifest.epoch)
            if is_here and self._desk.outcome(number - 1)[1].kind == "result":
                self._compare_digests(before)

    def _basis_rounds(self, number: int) -> int:
        """How many rounds before this one were basis rounds: they come first and are none of those that the contract declares."""
        terms = self._accepted.terms
        if terms.basis is None:
            return 0
        lengths = (self._desk.round(each).manifest.dimension for each in range(1, number))
        return sum(1 for _ in itertools.takewhile(lambda length: length != terms.trainables, lengths))

    def _close(self, opened: Round) -> None:
        """Bring an open round to its outcome; a faulty document ends it without a sum and is raised."""
        summed = shares.summed if self._accepted.terms.shared else consent.summed
        fault, state = None, self.state()
        try:
            ended = summed(self._desk, opened, state, self._seal_seed)
        except TrustError as error:
            if _ours(error):
                raise
            fault, ended = error, f"refused: {error.code}"
        if isinstance(ended, str):
            shared = self._accepted.terms.shared
            made = shares.closed(self._desk, opened, state, ended) if shared else rounds.void(opened, state, ended)
            ended = made, state
        self._settle(opened, *ended)
        if fault is not None:
            raise fault

    def _settle(self, opened: Round, outcome: Outcome, after: State) -> None:
        self._desk.publish("outcome", opened.number, opened.context, outcome)
        self._journal.checkpoint(opened.number + 1)
        self._reached = (opened.number, after)
        states.save(self._home.state_folder, opened.number, after)
        every = len(opened.silos)
        self._desk.tell(opened.number, "outcome", every, self._desk.now() - opened.manifest.opened_at, expected=every)

    def _compare_digests(self, opened: Round) -> None:
        number = opened.number
        mine = self._desk.outcome(number)[1].next_state
        stated = {
            silo: rounds.open_acknowledgement(raw, opened, self._accepted.terms.by_id(silo)).state
            for silo, raw in self._acknowledged(opened).items()
        }
        if apart := {silo: state.hex()[:16] for silo, state in stated.items() if state != mine}:
            raise RoundError(
                f"model digests differ after round {number}: here {mine.hex()[:16]}, silos {apart}",
                code="digests-differ",
                hint="compare the numpy versions and processors of these silos; no further round is opened",
                silos=sorted(apart),
            )

    def _acknowledged(self, opened: Round) -> dict[int, bytes]:
        """The silos' last words on a round: of all, in share mode of those in the sum, of which at least u_min must speak."""
        number, terms = opened.number, self._accepted.terms
        if not terms.shared:
            self._desk.demand("acknowledgement", number, shown=number)
            return self._desk.all("acknowledgement", number, self._desk.members)
        summed = tuple(silo for silo, _ in self._desk.outcome(number)[1].seeds)
        deadline_at = self._desk.deadline_after("outcome", number)
        self._desk.collect("acknowledgement", number, shown=number, deadline_at=deadline_at, parties=summed)
        here = self._store.parties("acknowledgement", number)
        if len(here) < terms.fewest:
            missing = [silo for silo in opened.silos if silo not in here]
            raise RoundError(
                f"no acknowledgement {number} from silos {missing} by the deadline: {len(here)} are here, {terms.fewest} needed",
                hint="start them, then run the same command again", code="absent", missing=missing,
            )  # fmt: skip
        return self._desk.all("acknowledgement", number, here)

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
            under = versions.of_round(self._store, each) or self._accepted
            state = rounds.settle(state, self._desk.outcome(each)[1], under.terms)
        states.save(self._home.state_folder, number, state)
        return state


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
        accepted = versions.in_force(store)
        if accepted is None:
            raise ConfigError("no contract is signed yet", hint="add the members, then run `aggregator sign`", code="no-contract")
        yield Coordinator(home=home, store=store, identity=identity, accepted=accepted, clock=clock, sleep=sleep, progress=progress)


def _former(store: Store, accepted: Accepted) -> tuple[Contract, ...]:
    """The terms of the versions before this one, each of which follows the one before it."""
    chain = versions.lineage(store, accepted.terms.version)
    return () if chain is None else tuple(each.terms for each in chain.versions[:-1])


def _receive_seed(identity: Identity, accepted: Accepted) -> bytes:
    named, public = accepted.terms.aggregator, identity.public
    if identity.receive_seed is None or public.seal_key is None:
        raise ConfigError(
            "this identity cannot receive", hint="use the aggregator.key that `aggregator init` made", code="identity"
        )
    held = public.under(accepted.terms.signatures).verify_key
    if held != named.verify_key or public.seal_key.hex() != named.seal_key:
        raise ConfigError(
            f"the key here is {public.sign_key.hex()[:16]}…, the contract names {named.sign_key[:16]}…",
            hint="use the aggregator.key with which the contract was signed",
            code="identity",
        )
    return identity.receive_seed


def _ours(error: TrustError) -> bool:
    """Whether the fault lies on this machine and not in a silo's document: then nothing is closed because of it."""
    return isinstance(error, Equivocation) or error.code in (DAMAGED, ROLLED_BACK, "outcome")
