# SPDX-License-Identifier: Apache-2.0
"""A malicious server against real parties: real silos, guardians, coordinator, board and disks, one step at a time in one thread.

A ``World`` is a federation of tests.whole whose parties never wait: who has nothing to do until another speaks gives the turn
back. Every party has a ``Door`` of its own: what it is shown there may be another document than the board's, an old one, or none;
what it puts there is kept, whether or not the board takes it, for the server has seen it. The server holds the aggregator's keys
and signs what it likes. Nothing here stands in for a party's code; only contributions are synthetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import silo.round
from aggregator.coordinator import Coordinator, coordinating
from privacy import envelope
from privacy.errors import SiloquyError
from privacy.federation import GUARDIANS_FROM
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Freeze, Header, Manifest, Roster, Signed, Upload, Wire, decode, encode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.transparency import notes
from privacy.transparency.log import Leaf, bundle, tile_path, tiles_of
from privacy.transparency.tree import Tree
from silo.guardians.guardian import Guardian, party_of
from silo.guardians.vows import Vows
from silo.home import Home
from silo.participation import participate
from silo.watch import Watch
from tests.whole import BASIS, Silo, Whole

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
POLLS = ("silo.round.HEAD_WAIT_S", "silo.participation.POLL_S", "silo.session.POLL_S")
AWAITED = ("freeze", "certificate", "outcome")
Slot = tuple[Any, ...]
WAITING = frozenset({"nothing-opened", "epoch-incomplete", "no-outcome", "absent"})
"""Refusals that only say that another party has not spoken yet."""


class Idle(BaseException):
    """A party has nothing to do until another one speaks."""


def idle(*_: object) -> None:
    """In the place of every wait."""
    raise Idle


class Door:
    """A party's transport. ``lies``: what it is shown instead of the truth, by slot or ("log", path); a callable gets the truth."""

    def __init__(self, whole: Whole) -> None:
        self.whole, self.lies = whole, dict[Slot, Any]()
        self.sent: list[tuple[Slot, bytes]] = []

    def _shown(self, slot: Slot, true: bytes | None) -> bytes | None:
        lie = self.lies.get(slot, true)
        return lie(true) if callable(lie) else lie

    def get(self, kind: str, number: int, party: int, *, wait_s: float) -> bytes | None:
        found = self._now(kind, number, party)
        if found is None and wait_s > 0 and kind in AWAITED and self._now("outcome", number, AGGREGATOR) is None:
            raise Idle  # in the middle of a round: a silo goes on from its disk at its next turn
        return found

    def _now(self, kind: str, number: int, party: int) -> bytes | None:
        slot = (kind, number, party)
        return self._shown(slot, self.whole.board.get(*slot))

    def put(self, kind: str, number: int, party: int, data: bytes) -> None:
        self.sent.append(((kind, number, party), data))
        self.whole.board.put(kind, number, party, data)

    def fetch(self, path: str) -> bytes | None:
        found = self.whole.home.log_folder / path
        return self._shown(("log", path), found.read_bytes() if found.is_file() else None)

    def status(self) -> dict[str, Any]:
        return self.whole.board.status()

    def said(self, kind: str, number: int) -> list[bytes]:
        """What left this party, whether or not the board took it."""
        return [data for slot, data in self.sent if slot[:2] == (kind, number)]


class World:
    """See the module docstring. Party 0 is the honest coordinator; a server that lies about everything does without it."""

    def __init__(self, whole: Whole, *, contribute: Callable[[int], Any] | None = None) -> None:
        self.whole, self.accepted, self.terms = whole, whole.accepted, whole.accepted.terms
        self.silos, self.guardians = whole.silos, tuple(guardian.id for guardian in self.terms.guardian)
        self.parties = (AGGREGATOR, *self.silos, *self.guardians)
        self.doors = {party: Door(whole) for party in (*self.silos, *self.guardians)}
        self.told: dict[int, list[str]] = {guardian: [] for guardian in self.guardians}
        self._running: dict[int, Any] = {}
        self._hub: contextlib.ExitStack | None = None
        self.target = 1

    @classmethod
    def create(cls, root: Path, *, silos: tuple[int, ...] = (1, 2, 3, 4), notaries: int = 4, **changes: Any) -> World:
        """Countersigned by all, no epoch yet. Without ``sum`` in share mode: one silo may be away, one guardian corrupt."""
        changes.setdefault("sum", SHARES)
        shared = changes["sum"].get("protocol") == "shares"
        whole = Whole.create(root, silos=silos, notaries=notaries if shared else 0, **changes)
        for each in range(1, notaries + 1) if shared else ():
            Home(root / f"notary-{each}").keep_contract(1, whole.store.get("contract", 1, AGGREGATOR))
        return cls(whole)

    def copied(self, root: Path) -> World:
        self.close()
        shutil.copytree(self.whole.root, root)
        copy = World(Whole(root, self.accepted))
        copy.whole.clock.skipped = self.whole.clock.skipped
        copy.target = self.target
        return copy

    def close(self) -> None:
        for party in self.parties:
            self.crash(party)
        self.whole.close()

    def home(self, party: int) -> Home:
        """The folder of a silo or a guardian."""
        if party > GUARDIANS_FROM:
            return Home(self.whole.root / f"notary-{party - GUARDIANS_FROM}")
        return Home(self.whole.root / f"silo-{party}")

    # --- Steps -------------------------------------------------------------------------------------------------------------

    def step(self, party: int) -> Any:
        """All that a party can do now: what it settled, its refusal, or None when it waits for another."""
        try:
            if party == AGGREGATOR:
                return self._coordinator().run_round(self.target)
            if party > GUARDIANS_FROM:
                self._guardian(party).step()
                return None
            return next(participate(self._silo(party).parts, basis=BASIS, rounds=1, wait_s=0.0))
        except Idle:
            return None
        except SiloquyError as error:
            return None if error.code in WAITING else error

    def crash(self, party: int) -> None:
        """The process is gone; the next step starts it again from its disk."""
        running = self._running.pop(party, None)
        if isinstance(running, Silo):
            running.ledger.close()
        if party == AGGREGATOR and self._hub is not None:
            self._hub.close()
            self._hub = None

    def cycle(self, parties: Iterable[int] | None = None) -> int:
        """One step of each; how many documents came of it."""
        before = len(self.whole.store.log)
        for party in self.parties if parties is None else parties:
            found = self.step(party)
            if isinstance(found, SiloquyError):
                raise found
        return len(self.whole.store.log) - before

    def run(self, number: int, parties: Iterable[int] | None = None) -> None:
        """Round by round up to this one, its acknowledgements too; when nobody has anything to say, a deadline passes."""
        parties = self.parties if parties is None else tuple(parties)
        for each in range(self.target, number + 1):
            self.target = each
            while not self.is_over(each, parties):
                if not self.cycle(parties):
                    self.whole.clock.skip(self.terms.sum.deadline_s + 1.0)
        self.target = number + 1

    def is_over(self, number: int, parties: Iterable[int]) -> bool:
        silos = {party for party in parties if 0 < party < GUARDIANS_FROM}
        return self.has("outcome", number) and silos <= set(self.whole.store.parties("acknowledgement", number))

    def until(self, kind: str, number: int, *, parties: Iterable[int] | None = None, count: int = 1) -> None:
        """Cycle until so many documents of this kind stand."""
        while len(self.whole.store.parties(kind, number)) < count:
            assert self.cycle(parties), f"nobody has anything to say before the {kind} of {number}"

    def _silo(self, party: int) -> Silo:
        if party not in self._running:
            made = self.whole.silo(party, line=self.doors[party], clock=self.whole.clock)
            self._running[party] = made
        return self._running[party]

    def _guardian(self, party: int) -> Guardian:
        if party not in self._running:
            home, door = self.home(party), self.doors[party]
            identity = keys.load(home.identity_path)
            watch = Watch(home=home, transport=door, identity=identity, accepted=self.accepted, clock=self.whole.clock)
            self._running[party] = Guardian(
                home=home, transport=door, identity=identity, accepted=self.accepted, party=party_of(self.accepted, identity),
                clock=self.whole.clock, watch=watch, told=self.told[party].append,
            )  # fmt: skip
        return self._running[party]

    def _coordinator(self) -> Coordinator:
        if self._hub is None:
            self._hub = contextlib.ExitStack()
            made = coordinating(
                self.whole.home, store=self.whole.store, identity=self.whole.identity, clock=self.whole.clock, sleep=idle,
                progress=lambda event: None,
            )  # fmt: skip
            self._running[AGGREGATOR] = self._hub.enter_context(made)
        return self._running[AGGREGATOR]

    # --- What stands, and what the server can make of it --------------------------------------------------------------------

    def has(self, kind: str, number: int, party: int = AGGREGATOR) -> bool:
        return self.whole.store.get(kind, number, party) is not None

    def raw(self, kind: str, number: int, party: int = AGGREGATOR) -> bytes:
        found = self.whole.store.get(kind, number, party)
        assert found is not None, (kind, number, party)
        return found

    def body(self, kind: str, number: int, type_: type, party: int = AGGREGATOR) -> Any:
        return decode(decode(self.raw(kind, number, party), Signed).body, type_)

    def context(self, number: int) -> bytes:
        """epoch_ctx of a round."""
        return decode(self.raw("manifest", number), Signed).context

    def ctx(self, number: int) -> bytes:
        """round_ctx."""
        return guardian_sum.round_ctx(decode(self.raw("manifest", number), Signed).body)

    def sign(self, kind: Any, context: bytes, message: Wire) -> bytes:
        """The server's own signature, as the aggregator's."""
        return envelope.sign(
            self.whole.identity.under(self.terms.signatures), type=kind, context=context, sender=AGGREGATOR, body=encode(message)
        )

    def by(self, party: int, kind: Any, context: bytes, message: Wire) -> bytes:
        """A document with a party's own key: for those that work together with the server."""
        identity = keys.load(self.home(party).identity_path)
        return envelope.sign(identity, type=kind, context=context, sender=party, body=encode(message))

    def places(self, number: int) -> dict[str, Any]:
        return {
            "accepted": self.accepted, "epoch_ctx": self.context(number), "round_ctx": self.ctx(number),
            "silos": self.epoch_silos(number),
        }  # fmt: skip

    def epoch_silos(self, number: int) -> tuple[int, ...]:
        roster = self.body("roster", self.body("manifest", number, Manifest).epoch, Roster)
        return tuple(decode(raw, Signed).sender for raw in roster.notes)

    def headers(self, number: int) -> dict[int, bytes]:
        """Signed headers of the uploads that stand."""
        return {s: self.body("upload", number, Upload, s).header for s in self.whole.store.parties("upload", number)}

    def lists(self, number: int) -> dict[int, bytes]:
        return {g: self.raw("list", number, g) for g in self.whole.store.parties("list", number)}

    def proposal(self, number: int, lists: dict[int, bytes] | None = None) -> Freeze | None:
        """The set that follows from these lists, by default from all that stand."""
        given = self.lists(number) if lists is None else lists
        return freeze.choose(self.headers(number), given, **self.places(number))

    def frozen(self, number: int, made: Freeze | None = None) -> freeze.Frozen:
        return freeze.check_freeze(made or self.body("freeze", number, Freeze), own_header=None, **self.places(number))

    def tell(self, slot: Slot, lie: Any, *parties: int) -> None:
        """Show these parties (all, if none) something else in this slot."""
        for party in parties or self.doors:
            self.doors[party].lies[slot] = lie

    def honest_again(self) -> None:
        for door in self.doors.values():
            door.lies.clear()

    # --- What parties hold to ------------------------------------------------------------------------------------------------

    def vows(self, guardian: int) -> Vows:
        return Vows(self.home(guardian))

    def spent(self, silo: int, number: int) -> int:
        """Reservations in the silo's ledger for a round."""
        return len(self.whole.attempts(silo, number))

    def released(self, number: int) -> dict[int, list[tuple[bytes, list[tuple[int, int]]]]]:
        """By guardian, every message of shares that left it: for which set, and which secrets it opens to the server."""
        found: dict[int, list[tuple[bytes, list[tuple[int, int]]]]] = {guardian: [] for guardian in self.guardians}
        known = {each.digest: each for each in self.certifiable(number)}
        for guardian in self.guardians:
            for raw in self.doors[guardian].said("shares", number):
                stated = decode(decode(raw, Signed).body, shares.Shares)
                certified = guardian_sum.Certified(frozen=known[stated.frozen])
                opened = shares.open_shares(
                    raw, certified, guardian=self.terms.by_guardian(guardian), epoch_ctx=self.context(number),
                    seal_seed=self.whole.identity.receive_seed,
                )  # fmt: skip
                assert len(opened.shares) == len(shares.places(certified.frozen))
                found[guardian].append((stated.frozen, shares.places(certified.frozen)))
        return found

    def certifiable(self, number: int) -> Iterator[freeze.Frozen]:
        """Every set that some q of the lists that stand give."""
        lists, seen = self.lists(number), set[bytes]()
        for few in some(lists, self.terms.quorum):
            made = self.proposal(number, few)
            if made is not None and (found := self.frozen(number, made)).digest not in seen:
                seen.add(found.digest)
                yield found


def some(lists: dict[int, bytes], count: int) -> Iterator[dict[int, bytes]]:
    """Every choice of so many of the lists."""
    for chosen in itertools.combinations(sorted(lists), count):
        yield {guardian: lists[guardian] for guardian in chosen}


class OtherLog:
    """A second log of the server's: other leaves under its own signature, and the resources that prove them."""

    def __init__(self, world: World, leaves: list[Leaf]) -> None:
        self.leaves, self.tree = leaves, Tree()
        for each in leaves:
            self.tree.append(encode(each))
        origin = f"{world.terms.name}/log"
        head = notes.Checkpoint(origin=origin, size=len(leaves), root=self.tree.root())
        self.note = notes.signed(head.text, name=origin, seed=world.whole.identity.sign_seed)

    def show(self, world: World, number: int, *parties: int) -> None:
        """To these parties, as the head of a round with its tiles."""
        world.tell(("checkpoint", number, AGGREGATOR), self.note.to_bytes(), *parties)
        for level, index, width in tiles_of(len(self.leaves)):
            start = index * 256
            nodes = b"".join(self.tree.nodes(8 * level, start, width))
            world.tell(("log", tile_path(level, index, width)), nodes, *parties)
            if level == 0:
                entries = bundle([encode(each) for each in self.leaves[start : start + width]])
                world.tell(("log", tile_path("entries", index, width)), entries, *parties)


class Spy:
    """The vectors that silos masked, by (round, silo, attempt): what a sum must be of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.x: dict[tuple[int, int, bytes], np.ndarray] = {}
        original = silo.round.masked

        def masked(x: np.ndarray, **given: Any) -> Any:
            self.x[given["round_number"], given["silo"], given["attempt"]] = x.copy()
            return original(x, **given)

        patch.setattr(silo.round, "masked", masked)

    def sum_of(self, number: int, headers: Iterable[Header]) -> bytes:
        xs = [self.x[number, header.silo, header.attempt] for header in headers]
        return np.sum(np.array(xs, dtype=np.uint64), axis=0).astype("<u4").tobytes()


def impatient(patch: pytest.MonkeyPatch) -> None:
    """No party waits by the clock."""
    for name in POLLS:
        patch.setattr(name, 0.0)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
