# SPDX-License-Identifier: Apache-2.0
"""A guardian at work: alone in a process of its own (``silo guard``), or in a thread beside a silo's rounds (``silo train``).

Promised: what ends the guardian's work with an error is raised to whoever asks ``check``, and a thread has ended when the block is
left; a guardian for which a document changes nothing pauses before it looks again. The two share a home's lock, identity and
transport, and no file. Not promised: that a step happens at once (``POLL_S``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Container, Iterator, MutableMapping
from dataclasses import dataclass

from privacy.federation import Accepted
from privacy.identity import keys
from silo.guardians.guardian import Guardian, party_of
from silo.guardians.guardian_round import Slot
from silo.home import Home
from silo.transport import Transport

POLL_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What a guardian is made of; as in silo.guardians.guardian.Guardian."""

    home: Home
    transport: Transport
    identity: keys.Identity
    accepted: Accepted
    clock: Callable[[], float]
    former: Container[bytes] = ()


def work(
    guardian: Guardian, transport: Transport, clock: Callable[[], float], is_over: Callable[[], bool],
    pause: Callable[[float], object] = time.sleep,
) -> None:  # fmt: skip
    """Step and wait in turn until it is over. Raises as ``Guardian.step``.

    Args:
        pause: waits so many seconds; where what a step waits for stands already, and the next step waits for it again.
    """
    moved_nothing: Slot | None = None
    while not is_over():
        slot, until = guardian.step()
        if is_over():
            return
        if slot == moved_nothing:  # such as the call of an epoch in which this guardian may not act
            pause(POLL_S)
        found = transport.get(*slot, wait_s=min(POLL_S, max(0.0, until - clock())))
        moved_nothing = None if found is None else slot


@contextlib.contextmanager
def guarding(watching: Watching, outcomes: MutableMapping[int, bytes]) -> Iterator[Callable[[], None]]:
    """A guardian in a thread while the block runs, where this identity is one; ``check`` raises what ended it early.

    Args:
        outcomes: digests of the outcomes that the block itself verifies, by round, as it goes on.
    """
    party = party_of(watching.accepted, watching.identity)
    if party is None:
        yield lambda: None
        return
    guardian = Guardian(
        home=watching.home, transport=watching.transport, identity=watching.identity, accepted=watching.accepted, party=party,
        clock=watching.clock, former=watching.former, outcomes=outcomes,
    )  # fmt: skip
    stop, faults = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(guardian, watching.transport, watching.clock, stop.is_set, stop.wait)
        except BaseException as error:  # it is raised in the thread that asks
            faults.append(error)

    def check() -> None:
        if faults:
            raise faults[0]

    thread = threading.Thread(target=run, name=f"guardian-{party.id}", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
