# SPDX-License-Identifier: Apache-2.0
"""One silo's ledger read together with those of its other homes on the same records: what is charged on any of them counts.

**Formal guarantees**

- *Nothing left out*: ``entries`` and ``charged`` are those of all ledgers; each is verified where it was read.
- *Own place*: counter, head, attempts and receipts are those of the silo's own ledger, which alone is written.

Not promised: that the others stand still. Whoever spends holds their locks meanwhile (``silo.other_homes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from privacy.dp.entries import Body, Plan
from privacy.dp.ledger import History
from privacy.dp.mechanism import Mechanism


def merged(events: Iterable[Mechanism]) -> list[Mechanism]:
    """Equal mechanisms as one, with their steps summed."""
    steps: dict[Mechanism, int] = {}
    for event in events:
        one = event.with_steps(1)
        steps[one] = steps.get(one, 0) + event.steps
    return [one.with_steps(count) for one, count in steps.items()]


class Together(History):
    """The ledgers of several homes as one history, of which only ``own`` grows."""

    def __init__(self, own: History, others: Sequence[History]) -> None:
        self._own = own
        self._all = (own, *others)

    @property
    def counter(self) -> int:
        """How many entries the silo's own ledger has."""
        return self._own.counter

    @property
    def head(self) -> str:
        """The head of its own ledger."""
        return self._own.head

    @property
    def entries(self) -> tuple[Body, ...]:
        """All bodies, its own first."""
        return tuple(body for each in self._all for body in each.entries)

    def charged(self, contract: str | None = None) -> list[Mechanism]:
        """Everything ever reserved on any of the ledgers, equal mechanisms merged."""
        return merged(event for each in self._all for event in each.charged(contract))

    def charging(self, contract: str) -> int:
        """How many of the ledgers were charged under ``contract``."""
        return sum(each.charging(contract) for each in self._all)

    def attempts(self, contract: str, round_number: int) -> list[str]:
        """The attempts that its own ledger reserved for a round."""
        return self._own.attempts(contract, round_number)

    def plan(self, contract: str) -> Plan | None:
        """The plan declared under ``contract``, on its own ledger if it stands there."""
        return next((found for each in self._all if (found := each.plan(contract)) is not None), None)

    def check_receipt(self, counter: int, head: str) -> None:
        """As its own ledger does."""
        self._own.check_receipt(counter, head)
