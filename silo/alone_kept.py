# SPDX-License-Identifier: Apache-2.0
"""What runs alone left in a silo's home is held to its ledger: no board knows of them, so nobody else notices one that was cut.

**Formal guarantees** of ``require_reserved``

- *Behind stops*: a ledger without a reservation for a round that a run alone has trained is refused, whatever is to be run next:
  this run, one under another contract, or the federation's.
- *Nothing is written*: home and ledger stay as they were.

``behind`` names the contracts of such runs instead, for ``silo restore``, which charges them.

Not promised: that a run is noticed whose folder in ``alone/`` is gone, or was put back together with the ledger; nor an attempt
that was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from privacy import federation
from privacy.dp.ledger import History
from privacy.errors import ConfigError, LedgerBroken
from privacy.federation import Accepted
from silo.home import Home

FOLDER, CONTRACT = "alone", "contract"


def require_reserved(home: Home, history: History) -> None:
    """Return if every round that a run alone has trained was reserved; see the module docstring.

    Raises:
        LedgerBroken: one was not: the ledger was rolled back or replaced.
        TrustError: the state of a run alone is damaged.
    """
    for _, number in _unreserved(home, history):
        raise LedgerBroken(
            f"this silo trained round {number} alone, its ledger of {history.counter} entries has no reservation for it",
            hint="stop: restore the newest copy of the ledger, never an older one; `silo restore` charges what no copy has",
            code="ledger-behind", round=number,
        )  # fmt: skip


def behind(home: Home, history: History) -> list[Accepted]:
    """The contract of every run alone that has trained a round without a reservation.

    Raises:
        ConfigError: the contract of one cannot be read.
        TrustError: the state of a run alone is damaged.
    """
    places = dict.fromkeys(place for place, _ in _unreserved(home, history))
    return [read_contract(place / CONTRACT) for place in places]


def read_contract(path: Path) -> Accepted:
    """The contract in a file. Raises ConfigError when it cannot be read or is none."""
    try:
        return federation.parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name a federation.toml", code="contract") from error


def _unreserved(home: Home, history: History) -> Iterator[tuple[Path, int]]:
    """(the folder of a run alone, a round that it has trained and the ledger has no reservation for), in order."""
    folder = home.root / FOLDER
    for place in sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []:
        progress = Home(place).progress()
        for number in range(1, 1 + (0 if progress is None else progress.round)):
            if progress is not None and not history.attempts(progress.contract.hex(), number):
                yield place, number
