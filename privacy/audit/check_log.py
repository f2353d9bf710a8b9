# SPDX-License-Identifier: Apache-2.0
"""Verification of the transparency log: every document is a leaf at its place, and all heads are heads of one tree.

Asked: do tiles and bundles give the signed root; is every earlier checkpoint the beginning of the newest; did a quorum cosign each
head on which a round was opened, and does the round's manifest name it; is every document that is recorded the one in its leaf, at
its place, and is every leaf's document here. A log that does not fit its own head is one failed check, and the rest is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from privacy.audit.check_epoch import refused
from privacy.audit.check_notices import check_notices
from privacy.audit.check_round import RoundFacts
from privacy.audit.evidence import Entry
from privacy.audit.findings import Findings, Slot, shown
from privacy.chain import ancestors
from privacy.errors import TrustError
from privacy.federation import Accepted, Contract
from privacy.messages import AGGREGATOR, Manifest, Signed, decode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from privacy.transparency.notes import Checkpoint

Fetch = Callable[[str], bytes | None]


def leaves(fetch: Fetch) -> list[Entry]:
    """What the newest head's leaves say stands where, in order: an index. Its signature is not checked, its tiles are.

    Raises:
        TrustError: there is no head, or its tiles do not fit it.
    """
    raw = fetch("checkpoint")
    if raw is None:
        raise refused("there is no log here")
    head = notes.checkpoint(notes.parse(raw).text)
    tiles = Tiles(head.size, fetch)
    tiles.check(head.root)
    return [_entry(tiles, index) for index in range(head.size)]


def check_log(
    found: Findings,
    versions: Mapping[bytes, Accepted],
    rounds: Sequence[RoundFacts],
    *,
    fetch: Fetch,
    entries: Iterable[Entry] = (),
    report: bytes | None = None,
    known: Checkpoint | None = None,
) -> None:
    """Verify the log that ``fetch`` reads against the documents; and what the aggregator says there beside the rounds.

    Args:
        entries: the index of a table, whose leaf numbers are compared; documents of the source that it does not have are not asked.
        report: the record of a report that must be in the log.
        known: a head that somebody holds already: the log must go on from it.
    """
    check_notices(found, versions, _check_tree(found, versions, rounds, fetch, entries, known), report=report)


def _check_tree(
    found: Findings,
    versions: Mapping[bytes, Accepted],
    rounds: Sequence[RoundFacts],
    fetch: Fetch,
    entries: Iterable[Entry],
    known: Checkpoint | None,
) -> Mapping[Slot, int] | None:
    """The log's leaves by slot; None when they cannot be told."""
    every = list(versions.values())  # of which no key of one that was passed over counts
    terms = [each.terms for last in every[-1:] for each in (*ancestors(last, every), last)]
    slot = Slot("log", 0, AGGREGATOR)
    raw = fetch("checkpoint")
    if raw is None or not terms:
        found.add(slot, "head", "open" if rounds else "note", "there is no log here")
        return None
    head = found.test(slot, "head", lambda: _newest(raw, terms))
    if head is None:
        return None
    tiles = Tiles(head.size, fetch)
    if not found.hold(slot, "tiles", tiles.check, head.root):
        return None
    if known is not None:
        found.hold(slot, "own head", _check_beginning, tiles, known)
    under = {each.number: each.accepted.terms for each in rounds if each.accepted is not None}
    for number in range(1, found.source.latest("checkpoint") + 1):
        mine = under.get(number, terms[-1])  # a head of no round yet may be of the version that comes, or of the one in force
        former = [each for each in terms if each.version < mine.version and mine != under.get(number - 1)]
        _check_head(found, tiles, number, mine, terms, former)
    seen = _check_leaves(found, tiles, entries)
    _check_logged(found, [each for each in rounds if each.number < found.source.latest("checkpoint")], seen)
    return seen


def _newest(raw: bytes, terms: Sequence[Contract]) -> Checkpoint:
    note, refusal = notes.parse(raw), None
    for each in reversed(terms):
        try:
            return log.open_checkpoint(note, each)
        except TrustError as error:
            refusal = refusal or error
    raise refusal or refused("no contract gives the log's key")


def _check_head(
    found: Findings, tiles: Tiles, number: int, mine: Contract, terms: Sequence[Contract], former: Sequence[Contract]
) -> None:
    """The checkpoint for a round, its cosignatures, the head they make, and the manifest that names it.

    Args:
        mine: the version of the round, whose quorum counts.
        former: in the first round of a version the ones before it, whose last quorum may have seen the head.
    """
    slot, head = Slot("checkpoint", number, AGGREGATOR), Slot("head", number, AGGREGATOR)
    later = found.source.has("manifest", number, AGGREGATOR)
    raw = found.read(slot, required="a round was opened on it" if later else "")
    if raw is None:
        return
    stated = found.test(slot, "signature", lambda: _newest(raw, terms))
    if stated is None:
        return
    found.hold(slot, "consistency", _check_beginning, tiles, stated)
    by_party = {party: each for each in (*former, mine) for party in log.cosigners(each)}
    for party, its in by_party.items():
        place = Slot("cosignature", number, party)
        document = found.read(place)
        if document is not None:
            found.hold(place, "signature", log.open_cosignature, document, raw, its, party, former)
    document = found.read(head, required="a round was opened on it" if later else "")
    if document is not None:
        cosigned = found.test(head, "cosignatures", lambda: log.open_head(notes.parse(document), mine, former))
        if cosigned is not None:
            found.expect(head, "checkpoint", [("size", cosigned.size, stated.size), ("root", cosigned.root, stated.root)])
    if later:
        _check_manifest(found, number, stated)


def _check_beginning(tiles: Tiles, stated: Checkpoint) -> None:
    if stated.size > tiles.size:
        raise refused(f"it has {stated.size} leaves, the newest head has {tiles.size}")
    if (found := tiles.root(stated.size)) != stated.root:
        raise refused(f"it is no beginning of the newest head: {shown(stated.root)}, the tiles give {shown(found)}")


def _check_manifest(found: Findings, number: int, stated: Checkpoint) -> None:
    slot = Slot("manifest", number, AGGREGATOR)
    raw = found.read(slot)
    if raw is None:
        return
    manifest = found.test(slot, "log head", lambda: decode(decode(raw, Signed).body, Manifest))
    if manifest is not None:
        found.expect(slot, "log head", [("log size", manifest.log_size, stated.size), ("log root", manifest.log_root, stated.root)])


def _check_leaves(found: Findings, tiles: Tiles, entries: Iterable[Entry]) -> Mapping[Slot, int]:
    seen: dict[Slot, int] = {}
    for index in range(tiles.size):
        slot = _entry(tiles, index).slot
        leaf = decode(tiles.leaf(index), Leaf)
        if slot in seen:
            found.add(slot, "leaf", "failed", f"the log has it twice, as leaves {seen[slot]} and {index}")
            continue
        seen[slot] = index
        digest = found.source.digest(*slot)
        if digest is None:
            found.add(slot, "leaf", "failed", f"it is leaf {index} of the log, and not here")
        elif digest != leaf.digest:
            found.add(slot, "leaf", "failed", f"leaf {index} of the log has digest {shown(leaf.digest)}, here is {shown(digest)}")
        elif slot.kind == "upload":
            found.hold(slot, "leaf", _check_header, found.read(slot), leaf)
        else:
            found.add(slot, "leaf", "ok")
    for entry in entries:
        _check_place(found, entry, seen, tiles.size)
    return seen


def _check_logged(found: Findings, rounds: Sequence[RoundFacts], seen: Mapping[Slot, int]) -> None:
    """What a round that a head covers rests on is in the log; of other parties' documents some may have come after that head."""
    for each in rounds:
        kinds = ("manifest", "freeze", "certificate", "claim", "audit", "outcome")
        wanted = [Slot(kind, each.number, AGGREGATOR) for kind in kinds]
        wanted += [] if each.accepted is None else [Slot("contract", each.accepted.terms.version, AGGREGATOR)]
        for slot in (*wanted, *(Slot("upload", each.number, silo) for silo in each.stood)):
            if slot not in seen and found.source.has(*slot):
                found.add(slot, "leaf", "failed", "it is not in the log, whose heads cover its round")


def _check_header(raw: bytes, leaf: Leaf) -> None:
    if log.header_digest("upload", raw) != leaf.header:
        raise refused(f"its leaf names the header {shown(leaf.header)}")


def _check_place(found: Findings, entry: Entry, seen: Mapping[Slot, int], size: int) -> None:
    """What a table says of a document's place is what the log says."""
    slot = entry.slot
    if slot.kind in log.UNLOGGED:
        found.expect(slot, "row", [("leaf", entry.leaf, False)]) if entry.leaf is not None else None
    elif entry.leaf is None or entry.leaf >= size:
        if slot in seen:
            found.add(slot, "row", "failed", f"the table has it as leaf {entry.leaf}, in the log it is {seen[slot]}")
    elif seen.get(slot) != entry.leaf:
        found.add(slot, "row", "failed", f"the table has it as leaf {entry.leaf}, in the log it is {seen.get(slot, 'none')}")


def _entry(tiles: Tiles, index: int) -> Entry:
    leaf = decode(tiles.leaf(index), Leaf)
    return Entry(slot=Slot(leaf.kind, leaf.number, leaf.party), digest=leaf.digest, time=leaf.time, leaf=index)
