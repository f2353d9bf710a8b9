# SPDX-License-Identifier: Apache-2.0
"""A whole federation in one process: the real coordinator, store, board and admission; real silos with keys, ledgers and disks.

Only HTTP is left out: a silo's transport is the board itself. Levers: a power cut after or before any document, documents
altered on their way to one silo, a clock that a test moves, a copied home, and a spy on what a silo computes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aggregator import admission
from aggregator import config as places
from aggregator.board import Board
from aggregator.coordinator import Coordinator, coordinating
from privacy import envelope, federation
from privacy.dp import ledger
from privacy.dp.budget import Gate, Limits
from privacy.identity import keys
from privacy.messages import AGGREGATOR
from privacy.prg import Randomness
from privacy.transparency import log
from silo import config, membership, session
from silo.home import Home
from silo.participation import participate
from silo.parts import Parts, Settled
from silo.round import Rounds
from silo.settlement import load_progress
from silo.watch import Watch
from tests.federation import Remembering
from tests.terms import contract_bytes

SILOS = (1, 2, 3)
BASIS = b"b" * 32
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
LIMITS = Limits(epsilon=50.0, delta=1e-5)
PATIENCE_S = 30.0
MOST_STRIDE = 5
GUARDIAN_KINDS = frozenset({"guardian-note", "list", "endorsement", "shares", "close"})
"""What only guardians say: in consent mode there is none of it."""
SLICE_KINDS = frozenset({"vector", "claim", "verdict", "audit"})
"""What is only said where slices are audited."""


class PowerCut(BaseException):
    """Every process is gone: nothing may catch it."""


class Power:
    """Lets ``left`` new documents be stored, then cuts: after the last of them, or before the next one."""

    def __init__(self, left: int | None = None, *, before: bool = False):
        self.left, self.before, self.is_out = left, before, False

    def check(self) -> None:
        if self.is_out:
            raise PowerCut

    def cut(self) -> None:
        self.is_out = True
        raise PowerCut


def stride() -> int:
    """How many documents to let through until the next cut: by chance some, so that another place is cut in every run.

    With SILOQUY_FULL=1 always one: a cut between any two documents.
    """
    return 1 if "SILOQUY_FULL" in os.environ else random.SystemRandom().randint(1, MOST_STRIDE)


class Looks:
    """How often each thread paused for a document that did not come, since the last one came: who only waits, and who is slow."""

    ENOUGH = 2.0
    """Pauses after which a thread has seen all that there was: between two of them it does whatever it can."""

    def __init__(self) -> None:
        self.counts: dict[threading.Thread, float] = {}

    def clear(self) -> None:
        self.counts.update(dict.fromkeys(list(self.counts), 0.0))

    def enter(self) -> None:
        """This thread is at work, and is not waiting for anything yet."""
        self.counts[threading.current_thread()] = 0.0

    def leave(self) -> None:
        """This thread waits for something that only others can do."""
        self.counts.pop(threading.current_thread(), None)

    def add(self, pauses: float = 1.0) -> None:
        thread = threading.current_thread()
        self.counts[thread] = self.counts.get(thread, 0.0) + pauses

    def all_wait(self) -> bool:
        """Whether every thread that lives, but for the test's own, has paused often enough."""
        own = threading.main_thread()
        return all(count > self.ENOUGH for thread, count in list(self.counts.items()) if thread.is_alive() and thread is not own)


class LoggingStore(Remembering):
    """The store, which also keeps the order of its documents, and rings when one comes."""

    def __init__(self, *args, bell: threading.Condition, power: Power):
        super().__init__(*args)
        self.bell, self.power = bell, power
        self.log: list[tuple[tuple[str, int, int], bytes]] = []
        self.looks = Looks()

    def put_once(self, kind, number, party, data, *, received_at):
        with self.bell:
            self.power.check()
            is_new = self.entry(kind, number, party) is None
            if is_new and self.power.left == 0:
                self.power.cut()
            found = super().put_once(kind, number, party, data, received_at=received_at)
            if is_new:
                self.log.append(((kind, number, party), data))
                self.looks.clear()
                self.bell.notify_all()
                if self.power.left is not None:
                    self.power.left -= 1
                    if self.power.left == 0 and not self.power.before:
                        self.power.cut()
            return found


class View:
    """aggregator.rounds.Documents over some documents: the board as it stood at a moment."""

    def __init__(self, documents):
        self.documents = dict(documents)

    def get(self, kind, number, party):
        return self.documents.get((kind, number, party))

    def parties(self, kind, number):
        return tuple(sorted(p for k, n, p in self.documents if (k, n) == (kind, number)))

    def latest(self, kind):
        return max((n for k, n, _ in self.documents if k == kind), default=None)


class Line:
    """A silo's transport: the board, without HTTP. ``alter`` may change what this silo is shown, or raise PowerCut."""

    def __init__(self, board: Board, bell: threading.Condition, power: Power, log_folder: Path, looks: Looks):
        self.board, self.bell, self.power, self.log_folder, self.looks = board, bell, power, log_folder, looks
        self.alter: Callable[[tuple[str, int, int], bytes | None], bytes | None] = lambda slot, data: data

    def get(self, kind, number, party, *, wait_s):
        end = time.monotonic() + wait_s
        with self.bell:
            while True:
                self.power.check()
                found = self.board.get(kind, number, party)
                if found is not None or time.monotonic() >= end:
                    self.looks.add(float(found is None and wait_s > 0))
                    return self.alter((kind, number, party), found)
                self.bell.wait(min(0.05, max(0.0, end - time.monotonic())))

    def part(self, kind, number, party, start, size, *, wait_s):
        self.power.check()
        return self.alter(("part", kind, number, party, start), self.board.part(kind, number, party, start, size))

    def put(self, kind, number, party, data):
        self.power.check()
        self.board.put(kind, number, party, data)

    def fetch(self, path):
        self.power.check()
        assert log.is_resource(path)
        found = self.log_folder / path
        return self.alter(("log", path), found.read_bytes() if found.is_file() else None)

    def status(self):
        return self.board.status()


class Clock:
    """The real time, moved by what the test skips."""

    def __init__(self):
        self.skipped = 0.0

    def __call__(self) -> float:
        return time.time() + self.skipped

    def skip(self, seconds: float) -> None:
        self.skipped += seconds


def contribution(silo: int, terms=None):
    """A silo's noiseless sum: integers that depend on silo and state; ``terms`` where basis rounds come first."""

    def contribute(state):
        size = state.theta.size if terms is None or state.basis else federation.basis_round.terms_of(terms).dimension
        return np.random.default_rng([silo, state.applied]).integers(-1000, 1000, size)

    return contribute


class Silo:
    """A silo's process over its home; making a new one is a restart. Use as a context: it holds the ledger's lock."""

    def __init__(self, root: Path, accepted, silo: int, line, *, contribute=None, limits=LIMITS, seeded=False, clock=time.time):
        self.id, self.home, self.line, self.drawn = silo, Home(root), line, {}
        self.identity = keys.load(self.home.identity_path)
        verify = functools.partial(keys.verify_signature, self.identity.public.sign_key)
        self.ledger = ledger.Ledger.open(self.home.ledger_path, sign=self.identity.sign, clock=time.time, verify=verify)
        self.gate = Gate(
            self.ledger, limits, plan=federation.event(accepted.terms), contract=accepted.digest.hex(),
            steps_per_attempt=accepted.terms.training.steps_per_round, fewest=accepted.terms.fewest,
            before=None if accepted.terms.basis is None else federation.event(accepted.at(b"").terms),
        )  # fmt: skip
        self.gate.declare()
        self.parts = Parts(
            home=self.home, transport=line, identity=self.identity.under(accepted.terms.signatures), accepted=accepted,
            member=accepted.terms.by_id(silo),
            gate=self.gate, clock=clock,
            contribute=contribute or contribution(silo, accepted.terms if accepted.terms.basis else None),
            **({"randomness": self.seeded_noise} if seeded else {}),
        )  # fmt: skip

    def seeded_noise(self) -> Randomness:
        """Noise that a test can draw again: a function of silo, round and step."""
        number = load_progress(self.home, self.parts.accepted).round + 1
        self.drawn[number] = self.drawn.get(number, 0) + 1
        return noise_source(self.id, number, self.drawn[number])

    def rounds(self, count: int, wait_s: float | None = None) -> Iterator[Settled]:
        usual_s = 20 * PATIENCE_S if self.parts.accepted.terms.shared else PATIENCE_S  # whose clock a test moves on
        return participate(self.parts, basis=BASIS, rounds=count, wait_s=usual_s if wait_s is None else wait_s)

    def take_part(self, count: int, wait_s: float | None = None) -> list[Settled]:
        with self:
            return list(self.rounds(count, wait_s))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ledger.close()


def noise_source(silo: int, number: int, step: int = 1) -> Randomness:
    return Randomness.from_key(hashlib.sha256(bytes([silo, number, step])).digest())


class Whole:
    """A federation in ``root``. Its folders may be copied and opened again with ``Whole.opened``."""

    def __init__(self, root: Path, accepted, *, power: Power | None = None):
        self.root, self.accepted, self.silos = root, accepted, tuple(member.id for member in accepted.terms.member)
        self.bell, self.power, self.clock = threading.Condition(threading.RLock()), power or Power(), Clock()
        self.home = places.Home(root / "aggregator")
        self.store = LoggingStore(
            self.home.evidence_folder, self.home.database_url(self.home.config()), bell=self.bell, power=self.power
        )
        self.board = Board(self.store, admission.admit, self.clock)
        self.waiting = None
        self.identity = keys.load(self.home.identity_path)

    @classmethod
    def create(cls, root: Path, *, silos=SILOS, notaries: int = 0, **changes) -> Whole:
        """A new federation, its contract published and countersigned by all; no epoch yet.

        In share mode all silos are guardians; or, with ``notaries``, so many homes of their own are.
        """
        hub = places.Home.create(root / "aggregator", places.Config(name="hub"))
        hub_identity = keys.create(hub.identity_path, name="hub", receives=True)
        identities = {}
        for silo in silos:
            home = Home.create(root / f"silo-{silo}")
            identity = identities[silo] = keys.create(home.identity_path, name=f"silo-{silo}", receives=False)
            verify = functools.partial(keys.verify_signature, identity.public.sign_key)
            ledger.Ledger.create(home.ledger_path, who=identity.name, sign=identity.sign, clock=time.time, verify=verify).close()
        changes["sum"] = {"deadline_s": 60, "max_void_rounds": 2, **changes.get("sum", {})}
        guardians = guardian_tables(root, identities, notaries) if changes["sum"].get("protocol") == "shares" else b""
        accepted = federation.parse(
            contract_bytes(
                sign_keys=[identities[s].public.sign_key.hex() for s in silos],
                aggregator_key=hub_identity.public.sign_key.hex(),
                seal_key=hub_identity.public.seal_key.hex(),
                **_second_keys(changes.get("signatures"), hub_identity, [identities[s] for s in silos]),
                **changes,
            )
            + guardians
        )
        whole = cls(root, accepted)
        signer = hub_identity.under(accepted.terms.signatures)
        raw = envelope.sign(signer, type="contract", context=accepted.digest, sender=AGGREGATOR, body=accepted.raw)
        whole.store.put_once("contract", 1, AGGREGATOR, raw, received_at=time.time())
        for silo in silos:
            membership.countersign(
                Home(root / f"silo-{silo}"), whole.line(), identities[silo], accepted,
                limits=config.Limits(epsilon=50.0, delta=1e-5, without_privacy=not accepted.terms.is_private), now=NOW,
                check_local=lambda accepted: None,
            )  # fmt: skip
        return whole

    def copied(self, root: Path, *, kind: type[Whole] | None = None, **options) -> Whole:
        """A copy of everything on disk, opened; ``kind`` may be one with another carrier."""
        self.close()
        shutil.copytree(self.root, root)
        return (kind or type(self))(root, self.accepted, **options)

    def restarted(self, **options) -> Whole:
        """New objects from the same disk."""
        self.close()
        return type(self)(self.root, self.accepted, **options)

    def close(self) -> None:
        self.store.close()

    def line(self) -> Line:
        return Line(self.board, self.bell, self.power, self.home.log_folder, self.store.looks)

    def silo(self, silo: int, *, folder: str = "", line: Line | None = None, **options) -> Silo:
        root = self.root / (folder or f"silo-{silo}")
        if self.accepted.terms.shared:  # guardians close a round by their own clocks
            options.setdefault("clock", self.clock)
        return Silo(root, options.pop("accepted", self.accepted), silo, line or self.line(), **options)

    @contextlib.contextmanager
    def coordinator(self) -> Iterator[Coordinator]:
        def sleep(seconds: float) -> None:
            self.power.check()
            self.store.looks.add(0.1)  # it pauses several times between two looks
            with self.bell:
                self.bell.wait(seconds)

        with coordinating(
            self.home, store=self.store, identity=self.identity, clock=self.clock, sleep=sleep, progress=self.told
        ) as made:
            yield made

    def coordinate(self, last: int):
        """Everything up to round ``last``, as `aggregator round` does it; how each round closed."""
        with self.coordinator() as coordinator:
            coordinator.ensure_countersigned()
            coordinator.ensure_epoch()
            return [coordinator.run_round(number) for number in range(coordinator.next_round, last + 1)]

    def run(self, last: int, *, silos=None, **options):
        """Rounds up to ``last`` with these silos: (what each silo settled, how the rounds closed)."""
        silos = self.silos if silos is None else silos
        jobs = [functools.partial(self.take_part, silo, last, **options) for silo in silos]
        *settled, closed = together(*jobs, functools.partial(self.coordinate, last))
        return dict(zip(silos, settled, strict=True)), closed

    def take_part(self, silo: int, last: int, **options) -> list[Settled]:
        """This silo's part up to round ``last``; a silo that is there already still says its last word."""
        with self.silo(silo, **options) as running:
            missing = last - self.progress(silo).round
            if missing > 0:
                return list(running.rounds(missing))
            Rounds(running.parts, session.current(running.home)).take_part(wait_s=0.0)
            return []

    def cosign(self, silo: int, number: int) -> None:
        """All that a silo does without taking part in a round: it checks and cosigns the head on which it will be opened."""
        home = Home(self.root / f"silo-{silo}")
        watch = Watch(
            home=home, transport=self.line(), identity=keys.load(home.identity_path), accepted=self.accepted, clock=time.time
        )
        assert watch.follow(number, wait_s=PATIENCE_S)

    def progress(self, silo: int):
        return load_progress(Home(self.root / f"silo-{silo}"), self.accepted)

    def attempts(self, silo: int, number: int) -> list[str]:
        return self.history(silo).attempts(self.accepted.digest.hex(), number)

    def history(self, silo: int) -> ledger.History:
        home = Home(self.root / f"silo-{silo}")
        key = keys.load(home.identity_path).public.sign_key
        return ledger.History.read(home.ledger_path, verify=functools.partial(keys.verify_signature, key))

    def told(self, event) -> None:
        """The coordinator's progress; the last word is kept."""
        self.waiting = event

    def hurry(self, is_over: Callable[[], bool], *, silent: int, stalled_s: float = 0.3) -> None:
        """Let a deadline pass whenever no document came for a while, until it is over.

        Only while no more than ``silent`` parties are waited for, and all who live only wait, however slow the machine is.
        Guardians close by their clocks.
        """
        seen, since = len(self.store.log), time.monotonic()
        while not is_over():
            time.sleep(0.02)
            if len(self.store.log) != seen:
                seen, since = len(self.store.log), time.monotonic()
                continue
            stalled = time.monotonic() - since
            waits = self.store.looks.all_wait() or stalled > PATIENCE_S
            if stalled > stalled_s and waits and self.waits_for_nobody_else(silent):
                self.clock.skip(self.accepted.terms.sum.deadline_s + 1.0)
                self.store.looks.clear()
                since = time.monotonic()

    def waits_for_nobody_else(self, silent: int) -> bool:
        at = self.waiting
        return at is None or at.step == "close" or at.arrived >= at.expected - silent

    def run_hurried(self, last: int, *jobs, silent: int = 1):
        """``coordinate`` beside other jobs, waiting for nobody longer than it takes to see that he is silent; how rounds closed."""
        done = threading.Event()

        def coordinate():
            try:
                return self.coordinate(last)
            finally:
                done.set()

        def lives(job):
            self.store.looks.enter()
            return job()

        living = [functools.partial(lives, job) for job in (*jobs, coordinate)]
        *_, closed, _ = together(*living, functools.partial(self.hurry, done.is_set, silent=silent))
        return closed

    def dying(self, kind: str, number: int, *, after: bool = False) -> Line:
        """The line of a silo whose power goes when it puts its document of this kind: just before, or just after it."""
        line, dead = self.line(), threading.Event()
        put = line.put

        def mortal_put(asked, at, party, data):
            falls = (asked, at) == (kind, number)
            if dead.is_set() or (falls and not after):
                dead.set()
                raise PowerCut
            put(asked, at, party, data)
            if falls:
                dead.set()
                raise PowerCut

        def shown(slot, data):
            if dead.is_set():
                raise PowerCut
            return data

        line.put, line.alter = mortal_put, shown
        return line

    def wait_for(self, kind: str, number: int, *parties: int) -> None:
        """Return when these parties' documents stand."""
        self.store.looks.leave()
        with self.bell:
            assert self.bell.wait_for(lambda: set(parties) <= set(self.store.parties(kind, number)), PATIENCE_S)


def guardian_tables(root: Path, silos: dict[int, keys.Identity], notaries: int) -> bytes:
    """The contract's guardians: the silos, or so many homes ``notary-…`` that are made here."""
    found = {silo: (f"silo-{silo}", f"Hospital {silo}", identity) for silo, identity in silos.items()}
    if notaries:
        homes = {each: Home.create(root / f"notary-{each}") for each in range(1, notaries + 1)}
        found = {
            each: (f"notary-{each}", f"Notary {each}", keys.create(home.identity_path, name=f"notary-{each}", receives=False))
            for each, home in homes.items()
        }
    lines = []
    for each, (name, organisation, identity) in found.items():
        lines += ["", "[[guardian]]", f"id = {federation.GUARDIANS_FROM + each}", f'name = "{name}"', ]
        lines.append(f'organisation = "{organisation}"')
        lines.append(f'sign_key = "{identity.public.sign_key.hex()}"')
    return ("\n".join(lines) + "\n").encode()


def _second_keys(signatures, hub, silos) -> dict:
    """What a contract says of ML-DSA keys when its signatures ask for them."""
    if signatures != keys.HYBRID:
        return {}
    return {"ml_dsa_keys": [i.public.ml_dsa_key.hex() for i in silos], "aggregator_ml_dsa_key": hub.public.ml_dsa_key.hex()}


def together(*jobs):
    """Run jobs at the same time: their results, or the first real error; a PowerCut is raised once all have ended."""
    results, faults = [None] * len(jobs), {}

    def run(place, job):
        try:
            results[place] = job()
        except BaseException as error:
            faults[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    real: list[BaseException] = []
    while not real and any(thread.is_alive() for thread in threads):
        time.sleep(0.002)
        real = [fault for fault in list(faults.values()) if not isinstance(fault, PowerCut)]
    if faults:
        raise (real or list(faults.values()))[0]
    return results


def flips(data: bytes, step: int = 37) -> Iterator[bytes]:
    """``data`` with one bit turned, at every ``step``-th byte; another bit each time."""
    for place in range(0, len(data), step):
        changed = bytearray(data)
        changed[place] ^= 1 << (place // step) % 8
        yield bytes(changed)
