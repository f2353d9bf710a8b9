# SPDX-License-Identifier: Apache-2.0
"""``aggregator verify`` and ``aggregator reindex``: the home checked from its own files, and its table made again from them.

The truth lies in ``evidence/`` and ``log/``; the table is an index. ``verify`` compares every row with its file and its leaf, and
then checks the federation itself. ``reindex`` fills an empty table: what the log's newest head covers stands where its leaves say,
and what was stored after it follows in the order in which its files were written. Nothing secret is read.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from aggregator import refusals
from aggregator.config import Home
from aggregator.reporting import recheck
from aggregator.store import Row, Store
from privacy.audit import placing, whole
from privacy.audit.check_log import check_log
from privacy.audit.evidence import Entry, Evidence, read_file
from privacy.audit.findings import Check, Slot
from privacy.audit.whole import Verdict
from privacy.errors import ConfigError
from privacy.identity import keys
from privacy.messages import KINDS
from privacy.transparency import log

_ORDER: Final = {kind: place for place, kind in enumerate(KINDS)}


def verify(
    root: Path,
    *,
    rounds: Collection[int] | None = None,
    report: tuple[bytes, bytes | None] | None = None,
    views: Mapping[str, bytes] | None = None,
    at_least: int = 0,
) -> Verdict:
    """Check the home in ``root``: table against files and log, then everything that privacy.audit.whole asks.

    Args:
        views: what lies beside that report, by file name (reporting.report.read_views).
        at_least: so many rounds must have ended.

    Raises:
        ConfigError: there is no aggregator there, or it has no table.
        MachineError, NotCertified: see privacy.audit.whole.
    """
    home = Home(root)
    entries = list(entries_of(rows_of(home)))
    evidence = Evidence.indexed(home.evidence_folder, entries)
    before = [*evidence.integrity(), *_rows_in_order(entries)]
    fetch = placing.reader(home.log_folder)
    also = functools.partial(check_log, fetch=fetch, entries=entries, report=None if report is None else report[0])
    return whole.audit(
        evidence, pinned=_fingerprints(home), rounds=rounds, before=before, also=also, report=report,
        again=functools.partial(recheck.recheck, views=views), at_least=at_least,
    )  # fmt: skip


def reindex(root: Path) -> dict[str, Any]:
    """Make the table again from ``evidence/`` and ``log/``; how many documents it then has, and what was left aside.

    Raises:
        ConfigError: there is no aggregator there.
        MachineError: the table is not empty, another process is at work in the home, or a file cannot be read.
    """
    home = Home(root)
    settings = home.config()
    with home.locked():
        evidence, _, _ = placing.offline(root)
        rows, missing = _rebuilt(evidence)
        store = Store(home.evidence_folder, home.database_url(settings))
        try:
            store.restore(rows)
            refusals.restore(store)
        finally:
            store.close()
    aside = {**evidence.spare, **evidence.broken}
    return {"documents": len(rows), "in_log": sum(row.leaf is not None for row in rows), "missing": missing, "aside": aside}


def _rebuilt(evidence: Evidence) -> tuple[list[Row], list[str]]:
    """The rows, and the documents that the log has and the folder has not."""
    entries = list(evidence.entries.values())
    logged = [entry for entry in entries if entry.leaf is not None]
    rest = [entry for entry in entries if entry.leaf is None]
    written = {entry.slot: _written_at(evidence, entry) for entry in rest}
    rest.sort(key=lambda entry: (written[entry.slot], _ORDER[entry.slot.kind], entry.slot.number, entry.slot.party))
    rows, missing, leaf = [], [], len(logged)
    for entry in (*sorted(logged, key=lambda entry: entry.leaf or 0), *rest):
        path = evidence.folder / entry.name
        if not path.is_file():
            missing.append(str(entry.slot))
        data = read_file(path) if path.is_file() else b""
        place = entry.leaf
        if place is None and entry.slot.kind not in log.UNLOGGED:
            place, leaf = leaf, leaf + 1
        time = written[entry.slot] // 10**9 if entry.time is None else entry.time
        header = log.header_digest(entry.slot.kind, data).hex()
        rows.append(Row(*entry.slot, entry.name, len(data), time, place, header))
    return rows, missing


def _written_at(evidence: Evidence, entry: Entry) -> int:
    path = evidence.folder / entry.name
    return path.stat().st_mtime_ns if path.is_file() else 0


def rows_of(home: Home) -> tuple[Row, ...]:
    """The table of a home. Raises ConfigError when there is none."""
    url = home.database_url(home.config())
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.exists():
        raise ConfigError(f"there is no table {path.name}", hint="make it again with `aggregator reindex`", code="no-table")
    store = Store(home.evidence_folder, url)
    try:
        return store.rows()
    finally:
        store.close()


def entries_of(rows: Iterable[Row]) -> Iterable[Entry]:
    """The rows as an index of evidence."""
    for row in rows:
        slot = Slot(row.kind, row.number, row.party)
        yield Entry(slot=slot, digest=_unhex(row.digest), size=row.size, time=row.received_at, leaf=row.leaf)


def _unhex(text: str) -> bytes:
    """A digest; for what is none, bytes that no file is named by."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return text.encode("utf-8", "replace")


def _rows_in_order(entries: Iterable[Entry]) -> Iterable[Check]:
    """The logged rows have the places 0, 1, 2, … and no other row has one."""
    wanted = 0
    for entry in entries:
        if (entry.slot.kind in log.UNLOGGED) != (entry.leaf is None):
            yield _row_check(entry, f"it has place {entry.leaf} in the log, which is none of its kind")
        elif entry.leaf is not None:
            if entry.leaf != wanted:
                yield _row_check(entry, f"its place in the log is {entry.leaf}, the next one is {wanted}")
            wanted = entry.leaf + 1


def _row_check(entry: Entry, why: str) -> Check:
    slot = entry.slot
    return Check(kind=slot.kind, number=slot.number, party=slot.party, what="row", status="failed", why=why, file=entry.name)


def _fingerprints(home: Home) -> list[str]:
    """Those of the aggregator's own public identity, with either suite: the contract must name these keys."""
    try:
        public = keys.read_public(home.public_path.read_bytes())
    except OSError:
        return []
    return [keys.fingerprint(public), keys.fingerprint(public.under(keys.ED25519))]
