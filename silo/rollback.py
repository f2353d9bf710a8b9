# SPDX-License-Identifier: Apache-2.0
"""Before a silo begins: is its ledger behind what it signed itself?

A home that was put back to an earlier time, whole or in part, looks right from within. What this silo said since lies elsewhere:
its own uploads on the board, whose signed headers state how many entries the ledger had, and their places in the transparency log.
So a ledger is held to them at every start, before an entry is written.

**Formal guarantees**

- *Behind stops*: a start fails by name (``ledger-behind``) if the board shows an upload signed by this silo, in a round from the
  last settled one on or in the newest round of which the home keeps a receipt, whose reservation is not at the place that its
  header states; or if the log has one, since the head that this home saw last, in a round for which the ledger has no reservation.
- *Reconciled goes on*: after ``silo restore`` the ledger holds these reservations, in their places.
- *Nothing is written*: the home and its ledger stay as they were.
- *Also alone*: ``asked_if_reached`` holds the ledger to the board in the same way where the board can be read, and says why where
  it cannot: a run alone works offline.

===========================================  ===================================================
edge case                                    result
===========================================  ===================================================
first start, or a round without own upload   nothing to compare: passes
crash after the reservation, before sending  passes: the ledger is ahead
an upload that this silo did not sign        ``TrustError``: the board is faulty
a head this silo cannot read                 not used; ``silo.watch`` takes part in no round on it
===========================================  ===================================================

Not promised: that an attempt is noticed that reached neither board nor log; nor that both do not hide what they have: then the next
upload is refused by its counter, and the next head by its size. A ledger of which only lines after the last upload are lost passes:
they charged what never left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from privacy import envelope
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History
from privacy.errors import LedgerBroken, MachineError, RoundError, TrustError
from privacy.federation import Accepted
from privacy.messages import AGGREGATOR, Header, Signed, Upload, decode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from silo import keyring, succession
from silo.config import Aggregator
from silo.folder import transporting
from silo.home import Home
from silo.transport import Transport

_HINT = "stop: `silo restore` brings home and ledger up to what this silo did (docs/guides/backup.md); never start a new ledger"

_PATIENCE_S: Final = 1.0
"""How long ``asked_if_reached`` goes on trying: whoever trains alone may have no network, and knows it."""


def asked_if_reached(home: Home, at: Aggregator, folder: Path | None = None) -> str:
    """Why the ledger was not held to the board; "" where it was, and is the newest.

    Args:
        folder: exchange documents there, whatever ``at`` says.

    Raises:
        LedgerBroken, TrustError: as ``require_newest``.
    """
    joined = succession.if_joined(home)
    if joined is None:
        return "no federation is joined"
    versions = [joined, *reversed(succession.ancestors(home, joined).values())]
    ledger = History.read(home.ledger_path, verify=keyring.verifier(home))
    try:
        with transporting(at, folder, patience_s=_PATIENCE_S) as transport:
            require_newest(home, transport, ledger, versions)
    except (MachineError, RoundError) as error:  # nobody answers, or what answers there is no board
        return error.message
    return ""


def require_newest(home: Home, transport: Transport, ledger: History, versions: Sequence[Accepted]) -> None:
    """Return if ``ledger`` has every upload that board and log show of this silo; see the module docstring.

    Args:
        versions: the contract, newest first, and those before it.

    Raises:
        LedgerBroken: it is behind. Nothing was written.
        TrustError: the board has a document in this silo's place that it did not sign, or the log does not fit its own head.
    """
    silo = _own_number(home, versions)
    if silo is None:
        return
    keys = {member.verify_key for version in versions for member in version.terms.member if member.id == silo}
    contracts = [version.digest.hex() for version in versions]
    progress = home.progress()
    since = max(1, 0 if progress is None else progress.round)
    logged = _logged(home, transport, versions, silo, since)
    for number in sorted({*_opened(transport, since), *_known(home)[-1:], *logged}):
        document = transport.get("upload", number, silo, wait_s=0)
        if document is not None:
            _hold(ledger, number, _header(document, silo, keys))
        elif number in logged and not any(ledger.attempts(contract, number) for contract in contracts):
            _behind(ledger, number, "the log has an upload of this silo")


def _own_number(home: Home, versions: Sequence[Accepted]) -> int | None:
    """As which member this silo stands in the newest of the contracts that has one of its keys; None where it is in none."""
    held = keyring.identities(home)
    found = (keyring.find_member(version, identity) for version in versions for identity in held)
    return next((member.id for member in found if member is not None), None)


def _opened(transport: Transport, since: int) -> list[int]:
    """The rounds from ``since`` on that the board has a manifest of."""
    number = since
    while transport.get("manifest", number, AGGREGATOR, wait_s=0) is not None:
        number += 1
    return list(range(since, number))


def _known(home: Home) -> list[int]:
    """The rounds in which this home keeps a trace of an own upload, ascending."""
    names = [path.name.split("-") for each in ("receipt-upload-*", "expect-upload-*") for path in home.log_folder.glob(each)]
    return sorted(int(name[2]) for name in names if name[2].isascii() and name[2].isdigit())


def _logged(home: Home, transport: Transport, versions: Sequence[Accepted], silo: int, since: int) -> frozenset[int]:
    """The rounds of own uploads in the log, from what this home saw of it to the newest head that the board shows."""
    terms, former = versions[0].terms, [each.terms for each in versions[1:]]
    number, raw = since - 1, None
    while (newer := transport.get("checkpoint", number + 1, AGGREGATOR, wait_s=0)) is not None:
        number, raw = number + 1, newer
    path = home.log_folder / "head"
    try:
        head = None if raw is None else log.open_checkpoint(notes.parse(raw), terms, former)
        seen = log.open_checkpoint(notes.parse(path.read_bytes()), terms, former).size if path.is_file() else 0
    except TrustError:
        return frozenset()  # of a version that this silo has not joined, or damaged: silo.watch says which
    if head is None or head.size <= seen:
        return frozenset()
    tiles = Tiles(head.size, transport.fetch)
    tiles.check(head.root, since=seen)
    leaves = (decode(tiles.leaf(index), Leaf) for index in range(seen, head.size))
    return frozenset(leaf.number for leaf in leaves if leaf.kind == "upload" and leaf.party == silo)


def _header(document: bytes, silo: int, keys: set[bytes]) -> Header:
    """What the header in an upload states, once both signatures are verified as this silo's."""
    context = decode(document, Signed).context
    for key in sorted(keys):
        try:
            body = envelope.open_signed(document, type="upload", context=context, sender=silo, key=key)
            raw = decode(body, Upload).header
            return decode(envelope.open_signed(raw, type="header", context=context, sender=silo, key=key), Header)
        except TrustError:
            continue
    raise TrustError(
        f"the board has an upload in the place of silo {silo} that this silo did not sign",
        hint="the aggregator is faulty: show this to the other members", code="upload-forged",
    )  # fmt: skip


def _hold(ledger: History, number: int, header: Header) -> None:
    """Return if the entry to which a header points is the reservation of its attempt."""
    counter = header.ledger_counter
    body = ledger.entries[counter - 1] if 1 <= counter <= ledger.counter else None
    if not isinstance(body, Reserve) or (body.round, body.attempt) != (number, header.attempt.hex()):
        _behind(ledger, number, f"this silo signed an upload as entry {counter} of its ledger")


def _behind(ledger: History, number: int, what: str) -> NoReturn:
    raise LedgerBroken(
        f"in round {number} {what}, the ledger here has {ledger.counter} entries and no such reservation: it is an older copy",
        hint=_HINT, code="ledger-behind", round=number, entries=ledger.counter,
    )  # fmt: skip
