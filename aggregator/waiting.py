# SPDX-License-Identifier: Apache-2.0
"""Long polls: many requests wait for few slots, and one watcher looks for all of them as soon as somebody has written.

The watcher asks the database whether anything changed (``Store.changes``, a few microseconds), and only then looks for the slots
that are waited for, once each. Where the database cannot say, it looks every ``BLIND_S``. Promised: a document that stands
before the time is up is found; a fault of the database reaches every request that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from starlette.concurrency import run_in_threadpool

from aggregator.board import Board
from privacy.errors import SiloquyError
from privacy.messages import Kind

LOOK_S: Final = 0.004
BLIND_S: Final = 0.025
_LONGEST_S: Final = 0.5
"""A request that waits looks for itself this often, whatever the watcher says."""

Slot = tuple[Kind, int, int]


class Waiting:
    """Requests that wait for documents of a board. Used from one event loop.

    Args:
        clock: seconds; how long a request has waited.
        stopping: whether the service ends, and with it every wait.
    """

    def __init__(self, board: Board, clock: Callable[[], float], stopping: Callable[[], bool]) -> None:
        self._board, self._clock, self._stopping = board, clock, stopping
        self._bells: dict[Slot, asyncio.Event] = {}
        self._waiting: dict[Slot, int] = {}
        self._watcher: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """How many requests wait."""
        return sum(self._waiting.values())

    async def until(self, slot: Slot, seconds: float) -> bool:
        """Whether the slot is taken, within ``seconds``. Raises MachineError when the database does not work."""
        end = self._clock() + seconds
        bell = self._bells.setdefault(slot, asyncio.Event())  # before the first look: what is written after it rings
        self._waiting[slot] = self._waiting.get(slot, 0) + 1
        try:
            while not await run_in_threadpool(self._board.has, *slot):
                if (left := end - self._clock()) <= 0 or self._stopping():
                    return False
                self._ensure_watched()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), min(left, _LONGEST_S))
                bell.clear()  # whoever waited is awake: a bell that rang for a fault must not ring on
            return True
        finally:
            self._waiting[slot] -= 1
            if not self._waiting[slot]:
                del self._waiting[slot], self._bells[slot]

    def _ensure_watched(self) -> None:
        watcher, loop = self._watcher, asyncio.get_running_loop()
        if watcher is None or watcher.done() or watcher.get_loop() is not loop:
            self._watcher = loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Ring for every slot that is taken, and for all of them when the service stops or the database fails."""
        seen, looked = -1, 0.0
        while self._bells and not self._stopping():
            pause = _LONGEST_S
            try:
                changes = self._board.changes()
                if changes != seen or time.monotonic() - looked >= _LONGEST_S:
                    seen, looked = -1 if changes is None else changes, time.monotonic()
                    for slot, bell in tuple(self._bells.items()):
                        if not bell.is_set() and await run_in_threadpool(self._board.has, *slot):
                            bell.set()
                pause = BLIND_S if changes is None else LOOK_S
            except SiloquyError:
                seen = -1
                self._ring()  # each request meets it in its own look
            await asyncio.sleep(pause)
        self._ring()

    def _ring(self) -> None:
        for bell in self._bells.values():
            bell.set()
