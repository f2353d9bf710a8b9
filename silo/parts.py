# SPDX-License-Identifier: Apache-2.0
"""What a silo's rounds are made of, and how one ends: the parts that ``silo.round`` puts together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from privacy.federation import Accepted, Member
from privacy.identity import keys
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.home import Home
from silo.settlement import Integers
from silo.transport import Transport
from silo.witness import Ending

Contribute = Callable[[State], Integers]
"""The clamped, noiseless integer sum (d,) of one private step at this state, from a fresh sample."""


class Gate(Protocol):
    """What a round needs of privacy.dp.budget.Gate."""

    def admit(self, round: int, attempt: bytes, *, basis: bool = False) -> int:
        """Reserve the attempt's cost in the ledger, on disk, and give its counter; or refuse before any record is read."""
        ...

    def settle(self, round: int, outcome: Literal["result", "void"], *, silos: int | None = None) -> None:
        """Note how the round ended, once; nothing is given back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How a round ended for this silo. ``kind`` is "rejected" for a sum beyond the bounds: the state did not move.

    ``stood``: as in silo.home.Progress.
    """

    round: int
    kind: Ending
    reason: str
    state: State
    upload_bytes: int
    stood: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a silo's rounds are made of. ``clock`` gives Unix seconds; ``randomness`` and ``os_random`` are fresh at every call.

    ``pulse`` is called while waiting: it raises what else went wrong in this process.
    """

    home: Home
    transport: Transport
    identity: keys.Identity
    accepted: Accepted
    member: Member
    gate: Gate
    contribute: Contribute
    clock: Callable[[], float]
    randomness: Callable[[], Randomness] = Randomness.from_os
    os_random: Callable[[int], bytes] = os.urandom
    pulse: Callable[[], None] = lambda: None
