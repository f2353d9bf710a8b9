# SPDX-License-Identifier: Apache-2.0
"""Other homes on the same records: a silo in two federations has two homes, and what one spends counts in the other.

``[records] other_homes`` in ``silo.toml`` names them, in each of them. Their ledgers are read, verified with their own keys, and
composed with this one's. Their unit files are made with other keys, so nothing shows that runs of two homes share no unit: all of
them compose.

**Formal guarantees**

- *Counted in full*: every reservation on a named home's ledger composes with this home's, at the gate and in every figure.
- *Room*: what is said of whether a contract, or a run alone, leaves room counts what the plans of named homes may still charge too
  (``reading.other_plans_left``).
- *Both ways*: a home that is named and does not name this one back is refused, for its figures would leave this one out; and one
  that names a further home, which this one does not name, for then the figures here would leave that one out.
- *One at a time*: while one of them may spend, none of the others can.
- *Not behind itself*: a home whose ledger lacks a round that it promised or trained alone is refused; so is one whose restore has
  not ended.
- *Two silos of a federation*: homes that are members of one federation are silos that know the same units. The gate does not open
  for more of them than its contract assumes (``require_elsewhere``): one sum holds such a unit several times under one noise.

Not promised: that a home is noticed that no one names. One directory of records has as many homes as somebody made. Nor that
another home's ledger is held to its board, as that home does when it starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from privacy import files
from privacy.dp.entries import Plan, Reserve
from privacy.dp.ledger import History
from privacy.errors import ConfigError, LedgerBroken
from silo import alone_kept, config, keyring
from silo.config import Config
from silo.home import Home


def histories(home: Home, settings: Config) -> tuple[History, ...]:
    """The verified ledgers of the other homes, as they stand.

    Raises:
        ConfigError: one is no silo, is this one, does not name this home back, or names a further one.
        LedgerBroken: a ledger does not verify, or is behind what that home promised.
        TrustError: a restore of one has not ended.
    """
    named = {Path(root).resolve() for root in settings.records.other_homes}
    return tuple(_read(home, Home(Path(root)), named) for root in settings.records.other_homes)


@contextlib.contextmanager
def held(home: Home, settings: Config) -> Iterator[tuple[History, ...]]:
    """``histories``, while no other process can write them. Raises MachineError (``busy``) when one is at work, and as it does."""
    with contextlib.ExitStack() as stack:
        for root in settings.records.other_homes:
            other = Home(Path(root))
            if other.root.is_dir():
                stack.enter_context(files.locked(other.ledger_path.with_suffix(".lock")))
        yield histories(home, settings)


def require_elsewhere(beside: Sequence[History], contracts: Iterable[str], *, known: int) -> None:
    """Return if at most ``known`` homes, this one and the others, stand under any of these versions of one contract.

    Args:
        known: ``max_silos_per_unit``: for a unit in so many silos the contract's figures hold.

    Raises:
        ConfigError: the same units are in more members of the federation than its contract assumes.
    """
    wanted = set(contracts)
    bodies = ((body for body in each.entries if isinstance(body, Plan | Reserve)) for each in beside)
    found = 1 + sum(any(body.contract in wanted for body in each) for each in bodies)
    if found > max(1, known):
        raise ConfigError(
            f"{found} homes on the same records are in the same federation, whose contract assumes {known} silo for a unit",
            hint="take part once; or have max_silos_per_unit raised, before anybody signs", code="same-federation",
        )  # fmt: skip


def _read(home: Home, other: Home, named: Collection[Path]) -> History:
    here = home.root.resolve()
    if other.root.resolve() == here:
        raise ConfigError(f"other_homes names {other.root}, which is this home", hint="name the others only", code="other-home")
    back = {Path(root).resolve() for root in config.load(other.config_path).records.other_homes}
    if here not in back:
        raise ConfigError(
            f"{other.config_path} does not name {home.root}: what is spent here would not count there",
            hint="write this home into [records] other_homes there", code="other-home",
        )  # fmt: skip
    if further := back - {here, *named}:
        raise ConfigError(
            f"{other.config_path} names {min(further)} too: what is spent there would not count here",
            hint="write every home on these records into [records] other_homes of every other", code="other-home",
        )  # fmt: skip
    other.restored_epoch()
    history = History.read(other.ledger_path, verify=keyring.verifier(other))
    alone_kept.require_reserved(other, history)
    reserved = {body.round for body in history.entries if isinstance(body, Reserve)}
    if missing := set(other.promised_rounds()) - reserved:
        raise LedgerBroken(
            f"{other.root} took part in round {min(missing)}, its ledger of {history.counter} entries has no reservation for it",
            hint="stop: restore the newest copy of that ledger", code="ledger-behind", round=min(missing),
        )  # fmt: skip
    return history
