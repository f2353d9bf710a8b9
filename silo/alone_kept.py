# SPDX-License-Identifier: Apache-2.0
"""What runs alone left in a silo's home is held to its ledger: no board knows of them, so nobody else notices one that was cut.

**Formal guarantees** of ``require_reserved``

- *Behind stops*: a ledger without a reservation for a round that a run alone has trained is refused, whatever is to be run next:
  this run, one under another contract, or the federation's.
- *Nothing is written*: home and ledger stay as they were.

Not promised: that a run is noticed whose folder in ``alone/`` is gone, or was put back together with the ledger; nor an attempt
that was lost.
"""

from __future__ import annotations

from privacy.dp.ledger import History
from privacy.errors import LedgerBroken
from silo.home import Home

FOLDER = "alone"


def require_reserved(home: Home, history: History) -> None:
    """Return if every round that a run alone has trained was reserved; see the module docstring.

    Raises:
        LedgerBroken: one was not: the ledger was rolled back or replaced.
        TrustError: the state of a run alone is damaged.
    """
    folder = home.root / FOLDER
    for place in sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []:
        progress = Home(place).progress()
        for number in range(1, 1 + (0 if progress is None else progress.round)):
            if progress is not None and not history.attempts(progress.contract.hex(), number):
                raise LedgerBroken(
                    f"this silo trained round {number} alone, its ledger of {history.counter} entries has no reservation for it",
                    hint="stop: restore the newest copy of the ledger, never an older one", code="ledger-behind", round=number,
                )  # fmt: skip
