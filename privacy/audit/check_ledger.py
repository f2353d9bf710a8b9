# SPDX-License-Identifier: Apache-2.0
"""Verification of a silo's own ledger against the uploads that others hold: nothing left that was not reserved before.

Only the silo has its ledger, so only it asks this. Asked: the chain and every signature, and for each own upload on the board that
the entry to which its signed header points is the reservation of exactly this attempt at this round under this contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from privacy.audit.check_epoch import refused
from privacy.audit.check_round import RoundFacts
from privacy.audit.findings import Findings, Slot
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History
from privacy.messages import Header, Signed, Upload, decode


def check_ledger(
    found: Findings, rounds: Sequence[RoundFacts], *, path: Path, verify: Callable[[bytes, bytes], None], silo: int
) -> None:
    """Hold the ledger in ``path`` to the uploads of ``silo`` in these rounds.

    Args:
        verify: takes (data, signature) and raises when they do not match the silo's key.
    """
    slot = Slot("ledger", 0, silo)
    history = found.test(slot, "chain", lambda: History.read(path, verify=verify))
    for each in rounds:
        if silo not in each.charged:
            continue
        raw = found.read(Slot("upload", each.number, silo))
        contract = None if each.accepted is None else each.accepted.digest.hex()
        found.hold(Slot("ledger", each.number, silo), "reserve", _check_reserved, history, raw, contract, each.number)


def _check_reserved(history: History, raw: bytes, contract: str, number: int) -> None:
    header = decode(decode(decode(decode(raw, Signed).body, Upload).header, Signed).body, Header)
    if not 1 <= header.ledger_counter <= history.counter:
        raise refused(f"the upload of round {number} points to entry {header.ledger_counter}, the ledger has {history.counter}")
    body = history.entries[header.ledger_counter - 1]
    wanted = (contract, number, header.attempt.hex())
    if not isinstance(body, Reserve) or (body.contract, body.round, body.attempt) != wanted:
        raise refused(f"entry {header.ledger_counter} is no reservation of attempt {wanted[2][:16]}… at round {number}")
