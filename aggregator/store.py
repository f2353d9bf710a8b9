# SPDX-License-Identifier: Apache-2.0
"""The documents of a federation: each slot (kind, number, party) written once, the bytes in files named by their digest.

Promised: after ``put_once`` returns, the document is on the disk, its bytes before its row; a slot never changes; ``get``
gives exactly the bytes that were put, or says which object is damaged. The service and the coordinator, two processes, use
one store at the same time. Every document but the log's own gets the next index in the log, in the same transaction as its
row: without gaps, in the order in which rows become visible, also with two processes. Not promised: that a document is genuine
(privacy.envelope proves that), nor anything against somebody who rewrites the table and the files together (transparency.log does).
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

from aggregator import refused
from aggregator.refused import Refused
from privacy import files
from privacy.errors import Equivocation, MachineError, TrustError
from privacy.transparency import log
from privacy.transparency.log import Leaf

DAMAGED: Final = "evidence-damaged"
_BUSY_MS: Final = 10_000

_METADATA: Final = sa.MetaData()
_DOCUMENTS: Final = sa.Table(
    "documents", _METADATA,
    sa.Column("kind", sa.String(32), primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("party", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("received_at", sa.BigInteger, nullable=False),
    sa.Column("leaf", sa.BigInteger, nullable=True, unique=True),
    sa.Column("header", sa.String(64), nullable=False),
)  # fmt: skip
_NEXT_LEAF: Final = sa.select(sa.func.coalesce(sa.func.max(_DOCUMENTS.c.leaf) + 1, 0)).scalar_subquery()
_MOST_TRIES: Final = 100
_C: Final = _DOCUMENTS.c
_OF_A_KIND: Final = (_C.kind == sa.bindparam("kind")) & (_C.number == sa.bindparam("number"))
_PARTIES: Final = sa.select(_C.party).where(_OF_A_KIND).order_by(_C.party)
_ENTRY: Final = sa.select(_C.digest, _C.size, _C.received_at, _C.leaf).where(_OF_A_KIND & (_C.party == sa.bindparam("party")))
"""Built once: they are asked many times a second, and building one takes longer than the answer."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the table says about one document. ``received_at``: Unix seconds by this machine; ``leaf``: its place in the log."""

    digest: bytes
    size: int
    received_at: int
    leaf: int | None = None


class Row(NamedTuple):
    """One row of the table as it stands there: digests in hex, ``leaf`` its place in the log or None."""

    kind: str
    number: int
    party: int
    digest: str
    size: int
    received_at: int
    leaf: int | None
    header: str


class Store:
    """The table and the evidence folder; safe to use from several threads and processes.

    Args:
        evidence: the folder of the bytes; created when missing.
        url: an SQLAlchemy URL; SQLite runs in WAL mode with ``synchronous=FULL``.

    Raises:
        MachineError: the database or the folder cannot be opened.
    """

    def __init__(self, evidence: Path, url: str) -> None:
        self._evidence = evidence
        self._open = contextlib.ExitStack()
        self._looking, self._eye = threading.Lock(), cast(sa.Connection | None, None)
        with _database(), contextlib.ExitStack() as opening:
            evidence.mkdir(parents=True, exist_ok=True)
            opening.enter_context(files.shared(evidence))
            self._engine = sa.create_engine(url)
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _durable)
            with self._engine.begin() as connection:
                for table in (_DOCUMENTS, refused.TABLE):
                    connection.execute(CreateTable(table, if_not_exists=True))
            self._open = opening.pop_all()
        self.refused = Refused(self._begin, self._rows)
        """What the service refused and somebody answers for: the coordinator makes leaves of it."""

    def close(self) -> None:
        """Close all connections."""
        with self._looking:
            if self._eye is not None:
                self._eye.close()
                self._eye = None
        self._engine.dispose()
        self._open.close()

    def put_once(self, kind: str, number: int, party: int, data: bytes, *, received_at: float) -> Literal["created", "same"]:
        """Write a document into its slot, durably, or find it there.

        Raises:
            Equivocation: the slot holds other bytes; they stay, and nothing is written.
            TrustError: an evidence file of this digest is damaged.
            MachineError: the disk or the database refuses.
        """
        digest = hashlib.sha256(data).digest()
        if (found := self.entry(kind, number, party)) is not None:
            return _same(kind, number, party, found.digest, digest)
        self._keep(digest, data)
        row = {
            "kind": kind, "number": number, "party": party, "digest": digest.hex(), "size": len(data),
            "received_at": int(received_at), "header": log.header_digest(kind, data).hex(),
            "leaf": None if kind in log.UNLOGGED else _NEXT_LEAF,
        }  # fmt: skip
        for _ in range(_MOST_TRIES):
            try:
                with _database(), self._engine.begin() as connection:
                    connection.execute(_DOCUMENTS.insert().values(**row))
            except sa.exc.IntegrityError:  # somebody was faster, with this slot or, in some databases, with this index in the log
                found = self.entry(kind, number, party)
                if found is not None:
                    return _same(kind, number, party, found.digest, digest)
            else:
                return "created"
        raise MachineError("the database refused a document", hint="look at its log", code="database")

    def get(self, kind: str, number: int, party: int) -> bytes | None:
        """The document, or None when the slot is empty.

        Raises:
            TrustError: its file is missing or has other bytes than were put.
        """
        entry = self.entry(kind, number, party)
        if entry is None:
            return None
        try:
            data = (self._evidence / entry.digest.hex()).read_bytes()
        except OSError as error:
            raise _damaged(f"{kind} {number} of party {party}: its file {entry.digest.hex()} cannot be read") from error
        if (found := hashlib.sha256(data).digest()) != entry.digest:
            raise _damaged(
                f"{kind} {number} of party {party} has digest {found.hex()[:16]}…, recorded is {entry.digest.hex()[:16]}…"
            )
        return data

    def part(self, kind: str, number: int, party: int, start: int, size: int) -> bytes | None:
        """``size`` bytes of a document from byte ``start`` on, or None when the slot is empty or the document shorter.

        They are not held to its digest: the reader must know by other means that they are right.

        Raises:
            TrustError: its file cannot be read.
        """
        entry = self.entry(kind, number, party)
        if entry is None or start + size > entry.size:
            return None
        try:
            with (self._evidence / entry.digest.hex()).open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise _damaged(f"{kind} {number} of party {party}: its file {entry.digest.hex()} cannot be read") from error

    def entry(self, kind: str, number: int, party: int) -> Entry | None:
        """What the table says about a slot, or None when it is empty."""
        rows = self._rows(_ENTRY, kind=kind, number=number, party=party)
        return Entry(digest=bytes.fromhex(rows[0][0]), size=rows[0][1], received_at=rows[0][2], leaf=rows[0][3]) if rows else None

    def changes(self) -> int | None:
        """A number that is another one once any connection has written; None where the database cannot say so cheaply.

        Raises:
            MachineError: the database does not work.
        """
        if self._engine.dialect.name != "sqlite":
            return None
        with _database(), self._looking:
            if self._eye is None:
                self._eye = self._engine.connect()
            driver = cast(sqlite3.Connection, self._eye.connection.driver_connection)
            try:
                version: int = driver.execute("PRAGMA data_version").fetchone()[0]
            except sqlite3.Error as error:
                eye, self._eye = self._eye, None  # the next question opens another one
                eye.invalidate()
                eye.close()
                raise OSError(str(error)) from error
            return version

    def parties(self, kind: str, number: int) -> tuple[int, ...]:
        """Who wrote a document of this kind and number, ascending."""
        return tuple(row[0] for row in self._rows(_PARTIES, kind=kind, number=number))

    def latest(self, kind: str) -> int | None:
        """The highest number of this kind, or None when there is no such document."""
        found: int | None = self._rows(sa.select(sa.func.max(_DOCUMENTS.c.number)).where(_DOCUMENTS.c.kind == kind))[0][0]
        return found

    def log_size(self) -> int:
        """How many leaves the log has."""
        size: int = self._rows(sa.select(sa.func.coalesce(sa.func.max(_DOCUMENTS.c.leaf) + 1, 0)))[0][0]
        return size

    def leaves(self, start: int, stop: int) -> list[Leaf]:
        """The leaves [start, stop) of the log.

        Raises:
            TrustError: the table lacks one of them, or has one that no document can have.
        """
        columns = _DOCUMENTS.c
        chosen = (columns.leaf, columns.kind, columns.number, columns.party, columns.digest, columns.header, columns.received_at)
        rows = self._rows(sa.select(*chosen).where((columns.leaf >= start) & (columns.leaf < stop)).order_by(columns.leaf))
        if [row[0] for row in rows] != list(range(start, stop)):
            raise _damaged(f"the table has {len(rows)} of the leaves {start} to {stop - 1} of the log")
        return [
            Leaf(kind=kind, number=number, party=party, digest=_unhex(digest), header=_unhex(header), time=time)
            for _, kind, number, party, digest, header, time in rows
        ]

    def rows(self) -> tuple[Row, ...]:
        """The whole table: what is in the log in its order, then the rest."""
        columns = (_DOCUMENTS.c[name] for name in Row.__annotations__)
        query = sa.select(*columns).order_by(_DOCUMENTS.c.leaf.is_(None), _DOCUMENTS.c.leaf, _DOCUMENTS.c.kind, _DOCUMENTS.c.number)
        return tuple(Row(*row) for row in self._rows(query))

    def restore(self, rows: Iterable[Row]) -> None:
        """Put exactly these rows into an empty table, all or none. Their files are not looked at.

        Raises:
            MachineError: the table is not empty, or refuses.
        """
        values = [row._asdict() for row in rows]
        with _database(), self._engine.begin() as connection:
            if connection.execute(sa.select(sa.func.count()).select_from(_DOCUMENTS)).scalar_one():
                raise MachineError(
                    "the table of documents is not empty", hint="move the database file away first", code="table-not-empty"
                )
            if values:
                connection.execute(_DOCUMENTS.insert(), values)

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with _database(), self._engine.begin() as connection:
            yield connection

    def _rows(self, query: sa.Select[Any], **values: object) -> list[tuple[Any, ...]]:
        with _database(), self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query, values)]

    def _keep(self, digest: bytes, data: bytes) -> None:
        try:
            files.write_once(self._evidence / digest.hex(), data)
        except Equivocation as error:
            raise _damaged(f"the file {digest.hex()} has other bytes than its name says") from error


def _same(kind: str, number: int, party: int, found: bytes, offered: bytes) -> Literal["same"]:
    if found != offered:
        raise Equivocation(
            f"a second {kind} {number} of party {party}: {offered.hex()[:16]}…, before it was {found.hex()[:16]}…",
            hint="two programs run as this party, or one was restored from a copy: stop both and find out which is right",
            kind=kind, number=number, party=party, first=found.hex(), second=offered.hex(),
        )  # fmt: skip
    return "same"


def _durable(connection: sqlite3.Connection, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextlib.contextmanager
def _database() -> Iterator[None]:
    """Turn faults of the disk and the database into MachineError; a taken slot passes through."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        raise MachineError(
            f"the document store does not work: {cause}",
            hint="free space, mend the permissions or the database url, then try again",
            code="database",
        ) from error


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise _damaged(f"the table has {text[:16]!r} for a digest") from None


def _damaged(what: str) -> TrustError:
    return TrustError(f"the evidence is damaged: {what}", hint="restore the folder evidence/ from a backup", code=DAMAGED)
