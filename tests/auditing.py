# SPDX-License-Identifier: Apache-2.0
"""What the tests of verification do to evidence: copies of a finished federation's, with files changed, swapped or forged.

A fault can be tried on every document or, by default, on a sample with every kind of document in it, drawn anew in each run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from aggregator import verify
from privacy import envelope
from privacy.audit import placing, whole
from privacy.audit.check_log import check_log
from privacy.audit.evidence import Entry, Evidence
from privacy.audit.findings import Slot
from privacy.messages import AGGREGATOR, Outcome, Signed, decode, encode

CHANCE = random.Random(os.urandom(16))
EVERYTHING = "SILOQUY_FULL" in os.environ


def index_of(finished) -> list[Entry]:
    """The table of a finished federation's aggregator, as an index."""
    return list(verify.entries_of(verify.rows_of(finished.home)))


def evidence_of(finished, to: Path) -> Path:
    """A copy of its evidence folder under ``to``, with the log beside it."""
    for name in ("evidence", "log"):
        if (finished.home.root / name).is_dir():
            shutil.copytree(finished.home.root / name, to / name)
    return to / "evidence"


def sampled(entries: Iterable[Entry], *, each: int = 1) -> list[Entry]:
    """So many entries of every kind, by chance; with SILOQUY_FULL=1 all of them."""
    found = list(entries)
    if EVERYTHING:
        return found
    kinds = sorted({entry.slot.kind for entry in found})
    of = {kind: [entry for entry in found if entry.slot.kind == kind] for kind in kinds}
    return [entry for kind in kinds for entry in CHANCE.sample(of[kind], min(each, len(of[kind])))]


def verdict(folder, index, *, log=False, **options) -> whole.Verdict:
    """What an audit finds, with the log that lies beside the folder if it is asked for."""
    if log:
        options["also"] = functools.partial(check_log, fetch=placing.reader(folder.parent / "log"))
    evidence = Evidence.indexed(folder, index) if isinstance(index, list) else index
    return whole.audit(evidence, before=list(evidence.integrity()), **options)


def named(found: whole.Verdict) -> set[Slot]:
    return {check.slot for check in found.failed}


def by_slot(entries) -> dict[Slot, Entry]:
    return {entry.slot: entry for entry in entries}


def put(folder, index: list[Entry], slot: Slot, data: bytes | None) -> list[Entry]:
    """The index and folder after somebody put another document into a slot, with its row: an aggregator's own lie."""
    kept = [entry for entry in index if entry.slot != slot]
    if data is None:
        return kept
    digest = hashlib.sha256(data).digest()
    (folder / digest.hex()).write_bytes(data)
    return [*kept, Entry(slot=slot, digest=digest, size=len(data))]


def read(folder, entries, kind, number, party=AGGREGATOR) -> bytes:
    return (folder / by_slot(entries)[Slot(kind, number, party)].name).read_bytes()


def flipped(data: bytes) -> bytes:
    place = CHANCE.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def resigned(finished, folder, entries, slot_kind, number, body_type, **changes) -> tuple[list[Entry], Slot]:
    """The aggregator's document with changes, signed again with its real key, in its slot."""
    signed = decode(read(folder, entries, slot_kind, number), Signed)
    body = encode(msgspec.structs.replace(decode(signed.body, body_type), **changes))
    raw = envelope.sign(finished.identity, type=slot_kind, context=signed.context, sender=AGGREGATOR, body=body)
    slot = Slot(slot_kind, number, AGGREGATOR)
    return put(folder, entries, slot, raw), slot


def outcome_of(folder, entries, number) -> Outcome:
    return decode(decode(read(folder, entries, "outcome", number), Signed).body, Outcome)


def bent(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]
