# SPDX-License-Identifier: Apache-2.0
"""Other homes on the same records: a silo in two federations has two homes, and what one spends counts in the other.

``[records] other_homes`` in ``silo.toml`` names them, in each of them. Their ledgers are read, verified with their own keys, and
composed with this one's. Their unit files are made with other keys, so nothing shows that runs of two homes share no unit: all of
them compose.

**Formal guarantees**

- *Counted in full*: every reservation on a named home's ledger composes with this home's, at the gate and in every figure.
- *Both ways*: a home that is named and does not name this one back is refused, for its figures would leave this one out.
- *One at a time*: while one of them may spend, none of the others can.

Not promised: that a home is noticed that no one names. One directory of records has as many homes as somebody made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from privacy import files
from privacy.dp.ledger import History
from privacy.errors import ConfigError
from silo import config, keyring
from silo.config import Config
from silo.home import Home


def histories(home: Home, settings: Config) -> tuple[History, ...]:
    """The verified ledgers of the other homes, as they stand.

    Raises:
        ConfigError: one is no silo, is this one, or does not name this home back.
        LedgerBroken: a ledger does not verify.
    """
    return tuple(_read(home, Home(Path(root))) for root in settings.records.other_homes)


@contextlib.contextmanager
def held(home: Home, settings: Config) -> Iterator[tuple[History, ...]]:
    """``histories``, while no other process can write them. Raises MachineError (``busy``) when one is at work, and as it does."""
    with contextlib.ExitStack() as stack:
        for root in settings.records.other_homes:
            other = Home(Path(root))
            if other.root.is_dir():
                stack.enter_context(files.locked(other.ledger_path.with_suffix(".lock")))
        yield histories(home, settings)


def _read(home: Home, other: Home) -> History:
    here = home.root.resolve()
    if other.root.resolve() == here:
        raise ConfigError(f"other_homes names {other.root}, which is this home", hint="name the others only", code="other-home")
    back = config.load(other.config_path).records.other_homes
    if here not in (Path(root).resolve() for root in back):
        raise ConfigError(
            f"{other.config_path} does not name {home.root}: what is spent here would not count there",
            hint="write this home into [records] other_homes there", code="other-home",
        )  # fmt: skip
    return History.read(other.ledger_path, verify=keyring.verifier(other))
