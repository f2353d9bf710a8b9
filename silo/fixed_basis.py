# SPDX-License-Identifier: Apache-2.0
"""The factors that a basis round fixed, as a silo keeps them: one flat file, ``basis.safetensors``, written once.

They follow from the round's released sum by ``privacy.basis_round`` alone; the file saves the time. Promised: what is read has the
digest that the state names, so neither a file nor a board can slip other factors in; a file that is missing or damaged is made
again from the round's outcome. Not promised: that the aggregator still shows that outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import numpy as np

from privacy import basis_file, basis_round, files, orthonormal
from privacy.dp import ring
from privacy.errors import RoundError, SiloquyError, TrustError
from privacy.federation import Contract
from privacy.messages import AGGREGATOR, Outcome, Signed, decode
from privacy.orthonormal import Factors
from privacy.update_rule import State
from silo.home import Home
from silo.transport import Transport

T = TypeVar("T")
_NO_FACTORS: Final = frozenset({"no-basis", "basis-file"})
"""The codes with which ``load`` refuses: no file, and one that holds other bytes."""


def keep(home: Home, outcome: Outcome, terms: Contract) -> None:
    """Write the factors that follow from the outcome of a basis round, which is verified."""
    files.write_atomic(home.basis_path, basis_file.save(_factors(outcome, terms)))


def load(home: Home, digest: bytes) -> dict[str, Factors]:
    """The factors with this digest.

    Raises:
        TrustError: the file is missing, damaged, or holds others.
    """
    return basis_file.load(read(home, hint="run `silo train`: it fetches the basis again"), digest)


def read(home: Home, *, hint: str) -> bytes:
    """The bytes of the silo's file, not yet held to any digest. Raises TrustError with this hint when it cannot be read."""
    try:
        return home.basis_path.read_bytes()
    except OSError as error:
        message = f"{home.basis_path.name} cannot be read: {error.strerror}"
        raise TrustError(message, hint=hint, code="no-basis") from error


def known(home: Home, state: State) -> dict[str, Factors] | None:
    """The factors that a state names; None where it names none: they are public, or not fixed yet. Raises as ``load``."""
    return load(home, state.basis) if state.basis else None


def built(home: Home, transport: Transport, terms: Contract, digest: bytes, build: Callable[[], T]) -> T:
    """What ``build`` makes of the factors with this digest; where it finds no such file, they are made again first (``ensure``).

    So the file is read once, by whoever needs it, and only a damaged one is read again.

    Raises:
        RoundError: as ``ensure``. And whatever ``build`` raises.
    """
    try:
        return build()
    except TrustError as error:
        if not digest or error.code not in _NO_FACTORS:
            raise
        ensure(home, transport, terms, digest)
        return build()


def ensure(home: Home, transport: Transport, terms: Contract, digest: bytes) -> None:
    """Return once the file holds the factors with this digest; where it does not, they are made from the board.

    Nothing that the board shows is believed but for the digest of what follows from it.

    Raises:
        RoundError: no outcome on the board leads to these factors.
    """
    if not digest or _is_here(home, digest):
        return
    number = 1
    while (document := transport.get("outcome", number, AGGREGATOR, wait_s=0)) is not None:
        found = _factors_in(document, terms)
        if found is not None and orthonormal.digest(found) == digest:
            files.write_atomic(home.basis_path, basis_file.save(found))
            return
        number += 1
    raise RoundError(
        f"no outcome on the board gives the basis {digest.hex()[:16]} of this silo's state",
        hint="ask the coordinator to put back the folder evidence/, then run the same command again", code="no-basis",
    )  # fmt: skip


def _is_here(home: Home, digest: bytes) -> bool:
    try:
        load(home, digest)
    except TrustError:
        return False
    return True


def _factors_in(document: bytes, terms: Contract) -> Mapping[str, Factors] | None:
    try:
        return _factors(decode(decode(document, Signed).body, Outcome), terms)
    except (SiloquyError, ValueError):
        return None


def _factors(outcome: Outcome, terms: Contract) -> dict[str, Factors]:
    return basis_round.factors(ring.lift(np.frombuffer(outcome.total, dtype="<u4")), terms)
