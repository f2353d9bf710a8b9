# SPDX-License-Identifier: Apache-2.0
"""Clocks around the functions of a federation, put there from outside: the product has no timing hooks.

Each moment of a party's thread belongs to exactly one phase: an inner phase stops the clock of the outer one. Waiting for
other parties is a phase by itself. It ends when the awaited document stands on the board; what passes from then until it
is held (the other side's looking again, HTTP) is transport.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from aggregator.desk import Desk
from aggregator.store import Store
from silo.learning.gradients import PhysicalBatch, Tape
from silo.transport import HttpTransport

WAITING, TRANSPORT, REST, ASIDE = "waiting for others", "transport", "documents, disk, rest", "not part of the round"
Slot = tuple[str, int, int]


@dataclass(kw_only=True)
class Cost:
    """Seconds of one phase: by the clock on the wall, and of the thread's processor time."""

    wall: float = 0.0
    cpu: float = 0.0


def now() -> tuple[float, float]:
    """Seconds by the clock on the wall, and of this thread's processor time."""
    return time.perf_counter(), time.thread_time()


class Timeline:
    """One party's time since the last cut, by phase. Belongs to one thread, whose clocks are read by ``clock``."""

    def __init__(self, clock: Callable[[], tuple[float, float]] = now) -> None:
        self._clock = clock
        self._phase = REST
        self._costs: dict[str, Cost] = defaultdict(Cost)
        self._wall, self._cpu = clock()

    def enter(self, phase: str) -> str:
        """Charge what passed to the present phase and begin another; the phase that was left."""
        wall, cpu = self._clock()
        cost, before = self._costs[self._phase], self._phase
        cost.wall, cost.cpu = cost.wall + wall - self._wall, cost.cpu + cpu - self._cpu
        self._phase, self._wall, self._cpu = phase, wall, cpu
        return before

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase; the one around it goes on afterwards."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, wall: float, *, to: str) -> None:
        """Count ``wall`` seconds that were charged as waiting elsewhere."""
        self._costs[WAITING].wall -= wall
        self._costs[to].wall += wall

    def cut(self) -> dict[str, Cost]:
        """The costs since the last cut; a new account begins."""
        self.enter(self._phase)
        costs, self._costs = self._costs, defaultdict(Cost)
        return dict(costs)


@dataclass(kw_only=True)
class Watch:
    """What is known about a running federation: who works on which timeline, when documents stood, what was carried.

    ``turn`` is held by the one silo that works, so that no silo slows another. ``step_pairs`` are processor seconds of a
    batch's per-unit gradients and of the ordinary step on the same batch, taken for every ``every``-th batch.
    """

    every: int
    turn: threading.Lock = field(default_factory=threading.Lock)
    own: threading.local = field(default_factory=threading.local)
    stood: dict[Slot, float] = field(default_factory=dict)
    sent: dict[Slot, int] = field(default_factory=dict)
    received: dict[tuple[str, int, int], int] = field(default_factory=lambda: defaultdict(int))
    step_pairs: list[tuple[float, float]] = field(default_factory=list)
    rows: int = 0
    filler_rows: int = 0
    batches: int = 0

    @property
    def line(self) -> Timeline | None:
        """The timeline of this thread."""
        return getattr(self.own, "line", None)

    @contextlib.contextmanager
    def party(self, silo: int) -> Iterator[Timeline]:
        """This thread is a party's; 0 is the coordinator."""
        self.own.line, self.own.silo = Timeline(), silo
        try:
            yield self.own.line
        finally:
            self.own.line = None

    # --- Seams -----------------------------------------------------------------------------------------------------------

    def timed(self, phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A wrapper that charges a function's time to ``phase``."""

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def function(*args: Any, **kwargs: Any) -> Any:
                line = self.line
                if line is None:
                    return original(*args, **kwargs)
                with line.within(phase):
                    return original(*args, **kwargs)

            return function

        return around

    def gradients(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Times per-unit gradients; beside every so many batches, the ordinary step of the same parameters on that batch."""

        def function(model: Any, batch: PhysicalBatch, tape: Tape) -> torch.Tensor:
            line = self.line
            if line is None:
                return original(model, batch, tape)
            self.batches += 1
            self.rows += len(batch.unit)
            self.filler_rows += int((batch.unit < 0).sum())
            compared = self.batches % self.every == 0
            first = compared and self.batches // self.every % 2 == 0  # neither of the two is always the one with warm caches
            ordinary = self._ordinary(line, model, batch) if first else 0.0
            with line.within("gradient"):
                begun = time.thread_time()
                made = original(model, batch, tape)
                spent = time.thread_time() - begun
            if compared:
                self.step_pairs.append((spent, ordinary if first else self._ordinary(line, model, batch)))
            return made

        return function

    def _ordinary(self, line: Timeline, model: Any, batch: PhysicalBatch) -> float:
        """Processor seconds of forward and backward without privacy; the clock of the round stands still."""
        with line.within(ASIDE):
            begun = time.thread_time()
            model.row_losses(batch.to(model.device)).mean().backward()
            spent = time.thread_time() - begun
            for parameter in model.trainables():
                parameter.grad = None
        return spent

    def get(self, original: Callable[..., bytes | None]) -> Callable[..., bytes | None]:
        """Fetching: waiting until the document stands, transport from then on. Another silo may work meanwhile."""

        def function(transport: HttpTransport, kind: str, number: int, party: int, *, wait_s: float) -> bytes | None:
            line = self.line
            if line is None:
                return original(transport, kind, number, party, wait_s=wait_s)
            if wait_s == 0:
                with line.within(TRANSPORT):
                    found = original(transport, kind, number, party, wait_s=wait_s)
            else:
                with line.within(WAITING):
                    found, carrying = self._waited(lambda: original(transport, kind, number, party, wait_s=wait_s), kind, number)
                line.move(carrying, to=TRANSPORT)
            if found is not None:
                self.received[kind, number, self.own.silo] += len(found)
            return found

        return function

    def _waited(self, fetch: Callable[[], bytes | None], kind: str, number: int) -> tuple[bytes | None, float]:
        """What was fetched, and the seconds of it after the aggregator's document stood."""
        begun = time.perf_counter()
        self.turn.release()
        try:
            found = fetch()
            ended = time.perf_counter()
        finally:
            self.turn.acquire()
        return found, 0.0 if found is None else ended - max(begun, self.stood.get((kind, number, 0), begun))

    def put(self, original: Callable[..., None]) -> Callable[..., None]:
        """Sending a document."""

        def function(transport: HttpTransport, kind: str, number: int, party: int, data: bytes) -> None:
            line = self.line
            with contextlib.nullcontext() if line is None else line.within(TRANSPORT):
                original(transport, kind, number, party, data)
            self.sent[kind, number, party] = len(data)
            self.stood[kind, number, party] = time.perf_counter()

        return function

    def publish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Notes when a document of the coordinator stands."""

        def function(store: Store, kind: str, number: int, party: int, *args: Any, **kwargs: Any) -> Any:
            done = original(store, kind, number, party, *args, **kwargs)
            self.stood[kind, number, party] = time.perf_counter()
            return done

        return function

    def collect(self, original: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
        """The coordinator's waiting; what passes after the last document stood, until it looks again, is transport."""

        def function(desk: Desk, kind: str, number: int, **kwargs: Any) -> tuple[int, ...]:
            line = self.line
            if line is None:
                return original(desk, kind, number, **kwargs)
            begun = time.perf_counter()
            with line.within(WAITING):
                missing = original(desk, kind, number, **kwargs)
            last = max(self.stood.get((kind, number, silo), begun) for silo in desk.members)
            line.move(time.perf_counter() - max(begun, last), to=TRANSPORT)
            return missing

        return function


@contextlib.contextmanager
def wrapped(seams: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]) -> Iterator[None]:
    """While open, each (owner, name, wrapper) stands for what ``owner`` has under ``name``."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in seams]
    try:
        for (owner, name, original), (_, _, wrapper) in zip(before, seams, strict=True):
            setattr(owner, name, wrapper(original))
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
