# SPDX-License-Identifier: Apache-2.0
"""Any order of anything: silos, guardians and the coordinator step, crash at any durable write and restart, while the server hides
documents, shows old ones and proposes other sets to some. Whatever was done, the promises hold over all that left the parties.

Promised here: what ``Promises.check`` says. Not: that a round ends while somebody lies. More examples: ``SILOQUY_MACHINE=200``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from privacy import files
from privacy.errors import SiloquyError, TrustError
from privacy.federation import GUARDIANS_FROM
from privacy.messages import (
    AGGREGATOR,
    Consent,
    Endorsement,
    Freeze,
    Header,
    Outcome,
    Release,
    Signed,
    Upload,
    decode,
)
from privacy.secure_sum.freeze import digest_of_set
from silo.guardians.vows import Vows
from silo.parts import Settled
from tests.malicious import SHARES, Spy, World, impatient, some
from tests.whole import PowerCut

EXAMPLES = int(os.environ.get("SILOQUY_MACHINE", "3"))
STEPS = 12 if EXAMPLES < 10 else 30
FIRST = 2
"""The round in which a machine starts: its template has settled one."""
MODES = {"shares": ((1, 2, 3, 4), SHARES), "consent": ((1, 2, 3), {"protocol": "consent"})}
SHOWN = ("manifest", "freeze", "certificate", "outcome", "checkpoint", "head", "upload", "list")


@functools.cache
def template(mode: str) -> World:
    """A federation after its first round, to be copied."""
    root = Path(tempfile.mkdtemp(prefix="siloquy-machine-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    silos, terms = MODES[mode]
    world = World.create(root / mode, silos=silos, sum={**terms, "max_void_rounds": 9}, training={"rounds": 30})
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        world.run(1)
    world.close()
    return world


class Crashes:
    """Cuts the power at the n-th durable write after ``arm``: before it, or after it."""

    NAMES = ("write_once", "write_atomic", "append_line")

    def __init__(self, patch: pytest.MonkeyPatch, world: World) -> None:
        self.left: int | None = None
        self.after = False
        for name in self.NAMES:
            patch.setattr(files, name, self._mortal(getattr(files, name)))
        patch.setattr(world.whole.store, "put_once", self._mortal(world.whole.store.put_once))

    def _mortal(self, write):
        def mortal(*given, **named):
            falls = self.left == 0
            if self.left is not None:
                self.left -= 1
            if falls and not self.after:
                raise PowerCut
            found = write(*given, **named)
            if falls:
                raise PowerCut
            return found

        return mortal


class Machine(RuleBasedStateMachine):
    """One federation in which anything happens; see the module docstring."""

    mode = "shares"
    counts = True
    """Whether hypothesis is running, whose statistics say how rounds ended."""

    def __init__(self) -> None:
        super().__init__()
        made = template(self.mode)
        self.folder = Path(tempfile.mkdtemp(prefix="siloquy-machine-"))
        self.patch = pytest.MonkeyPatch()
        impatient(self.patch)
        self.world = made.copied(self.folder / "world")
        self.spy, self.crashes = Spy(self.patch), Crashes(self.patch, self.world)
        self.settled: dict[int, dict[int, bytes]] = {}
        self.has_lied = False
        self.away: set[int] = set()

    def party(self, index: int) -> int:
        return self.world.parties[index % len(self.world.parties)]

    # --- What parties do ---------------------------------------------------------------------------------------------------

    def step(self, party: int) -> None:
        found = self.world.step(party)
        if isinstance(found, Settled):
            self.settled.setdefault(found.round, {})[party] = found.state.digest
        elif isinstance(found, TrustError):
            assert self.has_lied, f"party {party} refuses though nobody lied: {found}"
            self.world.crash(party)  # the program ends with its message; somebody starts it again
        elif isinstance(found, SiloquyError):
            self.world.crash(party)
        elif party == AGGREGATOR and found is not None:
            self.world.target = found.round + 1

    @rule(index=st.integers(0, 8))
    def one_steps(self, index):
        self.step(self.party(index))

    @rule(order=st.permutations(range(9)))
    def everybody_steps(self, order):
        for index in order:
            if index < len(self.world.parties):
                self.step(self.world.parties[index])

    @rule(cycles=st.integers(1, 4))
    def the_round_goes_on(self, cycles=3):
        """Everybody who is not away steps; where nobody has anything to say, a deadline passes."""
        for _ in range(cycles):
            before = len(self.world.whole.store.log)
            for party in self.world.parties:
                if party not in self.away:
                    self.step(party)
            if len(self.world.whole.store.log) == before:
                self.a_deadline_passes()

    @rule(index=st.integers(1, 8))
    def one_goes_away(self, index):
        """Until it comes back, or the end."""
        self.away.add(self.party(index))

    @rule()
    def all_come_back(self):
        self.away.clear()

    @rule(index=st.integers(0, 8), writes=st.integers(0, 9), after=st.booleans())
    def one_crashes_at_a_write(self, index, writes, after):
        party = self.party(index)
        self.crashes.left, self.crashes.after = writes, after
        try:
            self.step(party)
        except PowerCut:
            self.world.crash(party)
        finally:
            self.crashes.left = None

    @rule(index=st.integers(0, 8))
    def one_restarts(self, index):
        self.world.crash(self.party(index))

    @rule()
    def a_deadline_passes(self):
        self.world.whole.clock.skip(self.world.terms.sum.deadline_s + 1.0)

    @precondition(lambda self: not self.is_open())
    @rule()
    def a_new_epoch_is_called(self):
        try:
            self.world._coordinator().new_epoch()
        except SiloquyError:
            self.world.crash(AGGREGATOR)
        except BaseException as error:
            if type(error).__name__ != "Idle":
                raise

    def is_open(self) -> bool:
        store = self.world.whole.store
        return (store.latest("manifest") or 0) > (store.latest("outcome") or 0)

    # --- What the server does ------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        return self.world.whole.store.latest("manifest") or 1

    @rule(index=st.integers(1, 8), kind=st.sampled_from(SHOWN), author=st.integers(0, 8))
    def a_document_is_hidden(self, index, kind, author):
        self.lie(index, (kind, self.number, self.author(kind, author)), None)

    @rule(index=st.integers(1, 8), kind=st.sampled_from(SHOWN), author=st.integers(0, 8), back=st.integers(1, 2))
    def an_old_document_is_shown(self, index, kind, author, back):
        slot = (kind, self.number, self.author(kind, author))
        old = self.world.whole.store.get(kind, max(1, slot[1] - back), slot[2])
        if old is not None:
            self.lie(index, slot, old)

    @precondition(lambda self: self.mode == "shares")
    @rule(index=st.integers(5, 8), left=st.integers(0, 3))
    def another_set_is_proposed_to_a_guardian(self, index, left):
        """The set of other q lists: it holds by the rules, and is not the one that others were shown."""
        if self.world.has("manifest", self.number):
            lists = self.world.lists(self.number)
            lists.pop(sorted(lists)[left], None) if left < len(lists) else None
            made = self.world.proposal(self.number, lists)
            if made is not None:
                self.lie(
                    index, ("freeze", self.number, AGGREGATOR), self.world.sign("freeze", self.world.context(self.number), made)
                )

    @precondition(lambda self: self.mode == "shares")
    @rule(index=st.integers(5, 8), author=st.integers(1, 4))
    def an_upload_is_hidden_from_a_guardian(self, index, author):
        """In this round or, where it is over, in the next one."""
        self.lie(index, ("upload", self.number + (not self.is_open()), author), None)

    @precondition(lambda self: self.mode == "shares")
    @rule(index=st.integers(5, 8))
    def a_guardian_is_shown_every_set_with_a_restart_between(self, index):
        number, guardian = self.number, self.party(index)
        for lists in some(self.world.lists(number), self.world.terms.quorum) if self.is_open() else ():
            made = self.world.proposal(number, lists)
            if made is not None:
                self.lie(index, ("freeze", number, AGGREGATOR), self.world.sign("freeze", self.world.context(number), made))
                self.step(guardian)
                self.world.crash(guardian)

    @rule(index=st.integers(1, 8))
    def a_party_is_shown_the_truth(self, index):
        party = self.party(index)
        if party != AGGREGATOR:
            self.world.doors[party].lies.clear()

    @rule(data=st.data())
    def a_document_comes_twice(self, data):
        log = self.world.whole.store.log
        if log:
            (kind, number, party), raw = data.draw(st.sampled_from(log))
            with contextlib.suppress(SiloquyError):  # the slot is the aggregator's, or its time is over
                self.world.whole.board.put(kind, number, party, raw)
            assert self.world.whole.store.get(kind, number, party) == raw

    def author(self, kind: str, index: int) -> int:
        if kind == "upload":
            return self.world.silos[index % len(self.world.silos)]
        return self.world.guardians[index % 4] if kind == "list" and self.world.guardians else AGGREGATOR

    def lie(self, index: int, slot, data) -> None:
        party = self.party(index)
        if party != AGGREGATOR:
            self.world.doors[party].lies[slot] = data
            self.has_lied = True

    # --- What must hold ------------------------------------------------------------------------------------------------------

    @invariant()
    def who_settled_a_round_stands_where_the_others_do(self):
        for number, digests in self.settled.items():
            assert len(set(digests.values())) == 1, number
            assert digests.keys() <= set(self.world.silos)

    def teardown(self):
        try:
            for party in self.world.parties:
                self.world.crash(party)
            self.world.honest_again()
            for _ in range(5):  # everybody is back and nobody lies: rounds go on, or end without a sum
                self.world.whole.clock.skip(20.0)
                for party in self.world.parties:
                    self.step(party)
            self.who_settled_a_round_stands_where_the_others_do()
            Promises(self).check()
        finally:
            self.world.close()
            self.patch.undo()
            shutil.rmtree(self.folder, ignore_errors=True)


class Promises:
    """What holds over everything that left the parties' doors, whether or not the board took it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.world, self.spy = machine, machine.world, machine.spy

    def check(self) -> None:
        for number in range(FIRST, (self.world.whole.store.latest("manifest") or 0) + 1):
            self.reserved(number)
            if self.world.terms.shared:
                self.one_set(number)
            else:
                self.one_consent(number)
            self.exact(number)

    def sent(self, party: int, kind: str, number: int, type_: type) -> list:
        return [decode(decode(raw, Signed).body, type_) for raw in self.world.doors[party].said(kind, number)]

    def reserved(self, number: int) -> None:
        """Every vector that left stands in its silo's ledger, with its own counter: epsilon is never understated."""
        for silo in self.world.silos:
            headers = {decode(decode(u.header, Signed).body, Header) for u in self.sent(silo, "upload", number, Upload)}
            attempts = self.world.whole.attempts(silo, number)
            assert {header.attempt.hex() for header in headers} <= set(attempts), (number, silo)
            assert len({header.ledger_counter for header in headers}) == len(headers)
            assert len({header.round_ctx for header in headers}) <= 1, "one manifest a round"

    def one_set(self, number: int) -> None:
        """A guardian signs one set and releases for it alone; one set has q signatures; of no silo both kinds are released."""
        by_set: dict[bytes, set[int]] = {}
        for guardian in self.world.guardians:
            said = {each.frozen for each in self.sent(guardian, "endorsement", number, Endorsement)}
            assert len(said) <= 1, (number, guardian)
            for frozen in said:
                by_set.setdefault(frozen, set()).add(guardian)
        certified = [frozen for frozen, guardians in by_set.items() if len(guardians) >= self.world.terms.quorum]
        assert len(certified) <= 1, number
        released = {(frozen, place) for said in self.world.released(number).values() for frozen, places in said for place in places}
        assert {frozen for frozen, _ in released} <= set(certified), "nothing is released for a set that has no certificate"
        alive = {silo for _, (silo, other) in released if not other}
        dead = {other for _, (_, other) in released if other}
        assert not alive & dead
        assert {silo for _, (silo, other) in released if other} <= alive

    def one_consent(self, number: int) -> None:
        """A silo consents to one set; its seed leaves only when all did."""
        said = {silo: {c.frozen for c in self.sent(silo, "consent", number, Consent)} for silo in self.world.silos}
        assert all(len(frozen) <= 1 for frozen in said.values()), number
        for silo in self.world.silos:
            for release in self.sent(silo, "release", number, Release):
                assert all(frozen == {release.frozen} for frozen in said.values()), "a seed without everybody's consent"

    def exact(self, number: int) -> None:
        """A result is the sum of exactly the vectors of its set; anything else moved nothing and says no number."""
        if not self.world.has("outcome", number):
            return
        outcome = self.world.body("outcome", number, Outcome)
        if self.machine.counts:
            event(f"{outcome.kind} of {len(outcome.seeds)}")
        for digest in self.machine.settled.get(number, {}).values():
            assert digest == outcome.next_state
        if outcome.kind != "result":
            assert (outcome.total, outcome.seeds, outcome.vectors, outcome.pair_keys) == (b"", (), (), ())
            return
        made = self.world.body("freeze", number, Freeze)
        headers = [decode(decode(raw, Signed).body, Header) for raw in made.headers]
        if self.world.terms.shared:
            headers = list(self.world.frozen(number).headers.values())
            assert len(headers) >= self.world.terms.fewest
        else:
            assert outcome.frozen == digest_of_set(made.headers)
        assert [silo for silo, _ in outcome.seeds] == [header.silo for header in headers]
        assert outcome.total == self.spy.sum_of(number, headers)


class Consents(Machine):
    """In consent mode."""

    mode = "consent"


PROFILE = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=False, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestShares, TestConsents = Machine.TestCase, Consents.TestCase
TestShares.settings = TestConsents.settings = PROFILE


def test_the_promises_would_notice(monkeypatch):
    """The checks on runs that break them: a sum with another vector, a reservation that is not there, a second set."""
    machine = Machine()
    machine.counts = False
    try:
        for _ in range(5):
            machine.the_round_goes_on()
        promises, world = Promises(machine), machine.world
        promises.check()
        number = FIRST
        assert world.body("outcome", number, Outcome).kind == "result"
        key = next(iter(key for key in machine.spy.x if key[0] == number))
        machine.spy.x[key] = machine.spy.x[key] + 1
        with pytest.raises(AssertionError):
            promises.exact(number)
        with monkeypatch.context() as patch:
            patch.setattr(world.whole, "attempts", lambda silo, number: [])
            with pytest.raises(AssertionError):
                promises.reserved(number)
        guardian = GUARDIANS_FROM + 1
        other = Endorsement(round_ctx=world.ctx(number), guardian=guardian, frozen=b"o" * 32)
        signed = world.by(guardian, "endorsement", world.context(number), other)
        world.doors[guardian].sent.append((("endorsement", number, guardian), signed))
        with pytest.raises(AssertionError):
            promises.one_set(number)
        world.doors[guardian].sent.pop()
    finally:
        machine.world.close()
        machine.patch.undo()
        shutil.rmtree(machine.folder, ignore_errors=True)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_guardian_that_keeps_no_promises_would_be_found(monkeypatch, keeps):
    """Two sets follow from the lists; a guardian is shown both, with a restart between. Only one without its disk signs both."""
    machine = Machine()
    machine.counts = False
    try:
        world = machine.world
        machine.an_upload_is_hidden_from_a_guardian(5, 3)
        while not world.has("manifest", FIRST):
            machine.the_round_goes_on(1)
        machine.away.add(AGGREGATOR)
        while len(world.lists(FIRST)) < 4:
            machine.the_round_goes_on(1)
        if not keeps:
            monkeypatch.setattr(Vows, "promise", lambda *given: None)
            monkeypatch.setattr(Vows, "document", lambda *given: None)
            monkeypatch.setattr(Vows, "keep_document", lambda *given: None)
            monkeypatch.setattr(Vows, "broken", lambda *given: False)  # it would see its own word on the board
        machine.a_guardian_is_shown_every_set_with_a_restart_between(8)
        with contextlib.nullcontext() if keeps else pytest.raises(AssertionError):
            Promises(machine).one_set(FIRST)
        assert len(world.doors[world.guardians[3]].said("endorsement", FIRST)) >= 1
    finally:
        machine.world.close()
        machine.patch.undo()
        shutil.rmtree(machine.folder, ignore_errors=True)
