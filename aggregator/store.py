# SPDX-License-Identifier: Apache-2.0
"""The documents of a federation: each slot (kind, number, party) written once, the bytes in files named by their digest.

Promised: after ``put_once`` returns, the document is on the disk, its bytes before its row; a slot never changes; ``get``
gives exactly the bytes that were put, or says which object is damaged. The service and the coordinator, two processes, use
one store at the same time. Not promised: that a document is genuine (privacy.envelope proves that), nor anything against
somebody who rewrites the table and the files together.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

from privacy import files
from privacy.errors import Equivocation, MachineError, TrustError

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
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the table says about one document. ``received_at`` is Unix seconds, by this machine's clock."""

    digest: bytes
    size: int
    received_at: int


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
        with _database(), contextlib.ExitStack() as opening:
            evidence.mkdir(parents=True, exist_ok=True)
            opening.enter_context(files.shared(evidence))
            self._engine = sa.create_engine(url)
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _durable)
            with self._engine.begin() as connection:
                connection.execute(CreateTable(_DOCUMENTS, if_not_exists=True))
            self._open = opening.pop_all()

    def close(self) -> None:
        """Close all connections."""
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
            "kind": kind,
            "number": number,
            "party": party,
            "digest": digest.hex(),
            "size": len(data),
            "received_at": int(received_at),
        }
        try:
            with _database(), self._engine.begin() as connection:
                connection.execute(_DOCUMENTS.insert().values(**row))
        except sa.exc.IntegrityError as error:  # somebody was faster
            found = self.entry(kind, number, party)
            if found is None:
                raise MachineError("the database refused a document", hint="look at its log", code="database") from error
            return _same(kind, number, party, found.digest, digest)
        return "created"

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

    def entry(self, kind: str, number: int, party: int) -> Entry | None:
        """What the table says about a slot, or None when it is empty."""
        columns = _DOCUMENTS.c
        where = (columns.kind == kind) & (columns.number == number) & (columns.party == party)
        rows = self._rows(sa.select(columns.digest, columns.size, columns.received_at).where(where))
        return Entry(digest=bytes.fromhex(rows[0][0]), size=rows[0][1], received_at=rows[0][2]) if rows else None

    def parties(self, kind: str, number: int) -> tuple[int, ...]:
        """Who wrote a document of this kind and number, ascending."""
        columns = _DOCUMENTS.c
        where = (columns.kind == kind) & (columns.number == number)
        return tuple(row[0] for row in self._rows(sa.select(columns.party).where(where).order_by(columns.party)))

    def latest(self, kind: str) -> int | None:
        """The highest number of this kind, or None when there is no such document."""
        found: int | None = self._rows(sa.select(sa.func.max(_DOCUMENTS.c.number)).where(_DOCUMENTS.c.kind == kind))[0][0]
        return found

    def _rows(self, query: sa.Select[Any]) -> list[tuple[Any, ...]]:
        with _database(), self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

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


def _damaged(what: str) -> TrustError:
    return TrustError(f"the evidence is damaged: {what}", hint="restore the folder evidence/ from a backup", code=DAMAGED)
