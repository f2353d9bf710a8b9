# SPDX-License-Identifier: Apache-2.0
"""What the service refused and somebody answers for, kept in the store's database until the coordinator has made leaves of it.

The service holds no key, so it cannot say anything in the log: it writes down here. A line gets its place (1, 2, 3, …) when it is
written, and the coordinator publishes line n as ``refusal`` n before each head (aggregator.refusals): killed in between, it finds
the same lines at the same places.

Promised: a document is written down once, by its digest; of one party at most ``MOST`` while one head is the newest, however many
processes write at once, and the rest is counted in one line; a line that has a place never changes. So up to head r a party has at
most r · ``MOST`` lines, and one more a head. Not promised: that what was counted can be told apart (again is counted again).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from privacy.errors import MachineError
from privacy.transparency.notices import TOO_MANY

MOST: Final = 8
"""Refused documents of one party that get a line of their own between two heads."""
_MOST_TRIES: Final = 100

_METADATA: Final = sa.MetaData()
TABLE: Final = sa.Table(
    "refused", _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("place", sa.BigInteger, nullable=True, unique=True),
    sa.Column("head", sa.BigInteger, nullable=True),
    sa.Column("party", sa.Integer, nullable=False),
    sa.Column("nth", sa.Integer, nullable=True),
    sa.Column("counting", sa.Integer, nullable=True, unique=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(64), nullable=True, unique=True),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Column("more", sa.BigInteger, nullable=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("head", "party", "nth"),
)  # fmt: skip
_DOCUMENTS: Final = sa.table("documents", sa.column("kind"), sa.column("number"))  # aggregator.store's


class Line(NamedTuple):
    """One refused document, or how many ``more`` of a party there were. ``digest`` in hex, "" in a line that counts."""

    place: int
    kind: str
    number: int
    party: int
    digest: str
    code: str
    reason: str
    document: bytes
    more: int
    time: int


class Refused:
    """The lines; safe to use from several threads and processes.

    Args:
        begin: a transaction of the store; IntegrityError passes through it.
        rows: the rows of a query.
    """

    def __init__(
        self, begin: Callable[[], AbstractContextManager[sa.Connection]], rows: Callable[[sa.Select[Any]], list[tuple[Any, ...]]]
    ) -> None:
        self._begin, self._rows = begin, rows

    def note(
        self, *, kind: str, number: int, party: int, digest: bytes, code: str, reason: str, document: bytes, time: int
    ) -> None:
        """Write a refused document down, or count it, durably; one that was written down before changes nothing.

        Raises:
            MachineError: the disk or the database refuses.
        """
        columns, values = TABLE.c, {"kind": kind, "number": number, "party": party, "code": code, "reason": reason, "time": time}
        for _ in range(_MOST_TRIES):
            if self._rows(sa.select(columns.id).where(columns.digest == digest.hex())):
                return
            head = 1 + (self._rows(_most("checkpoint"))[0][0] or 0)
            nth: int = self._rows(sa.select(sa.func.count()).where((columns.head == head) & (columns.party == party)))[0][0]
            try:
                if nth >= MOST:
                    self._count(party, time)
                    return
                with self._begin() as connection:  # the nth of this party before this head: two at once cannot both be
                    more = {"head": head, "nth": nth, "digest": digest.hex(), "document": document, "more": 0}
                    connection.execute(TABLE.insert().values(**values, **more, place=_next_place()))
                    return
            except sa.exc.IntegrityError:
                continue
        raise MachineError("the database refused a line", hint="look at its log", code="database")

    def due(self, after: int) -> list[Line]:
        """The lines to be published after place ``after``, in order; what was only counted so far gets its places now."""
        columns = TABLE.c
        for (counting,) in self._rows(sa.select(columns.id).where(columns.counting.is_not(None)).order_by(columns.id)):
            self._give_place(counting)
        chosen = (columns[name] for name in Line._fields)
        lines = [Line(*row) for row in self._rows(sa.select(*chosen).where(columns.place > after).order_by(columns.place))]
        return [line._replace(digest=line.digest or "", document=bytes(line.document)) for line in lines]

    def restore(self, lines: Iterable[Line]) -> None:
        """Put published lines into an empty table, so that these documents get no second one; of two of a document the first."""
        values, known = [], {""}
        for line in lines:
            values.append({**line._asdict(), "digest": None if line.digest in known else line.digest})
            known.add(line.digest)
        if values:
            with self._begin() as connection:
                connection.execute(TABLE.insert(), values)

    def _give_place(self, counting: int) -> None:
        for _ in range(_MOST_TRIES):
            try:
                with self._begin() as connection:
                    chosen = TABLE.update().where(TABLE.c.id == counting)
                    connection.execute(chosen.values(place=_next_place(), counting=None))
                return
            except sa.exc.IntegrityError:  # in some databases: the service was faster with this place
                continue
        raise MachineError("the database refused a line", hint="look at its log", code="database")

    def _count(self, party: int, time: int) -> None:
        """One more of this party without a line of its own."""
        columns = TABLE.c
        with self._begin() as connection:
            added = TABLE.update().where(columns.counting == party).values(more=columns.more + 1)
            if connection.execute(added).rowcount:
                return
            values: dict[str, Any] = {"kind": "refusal", "number": 0, "party": party, "code": TOO_MANY, "reason": "", "time": time}
            connection.execute(TABLE.insert().values(**values, counting=party, document=b"", more=1))


def _most(kind: str) -> sa.Select[Any]:
    return sa.select(sa.func.max(_DOCUMENTS.c.number)).where(_DOCUMENTS.c.kind == kind)


def _next_place() -> sa.ColumnElement[int]:
    """One after the last line, and after the last published one, which a lost table may not have any more."""
    last = sa.func.coalesce(sa.select(sa.func.max(TABLE.c.place)).scalar_subquery(), 0)
    published = sa.func.coalesce(_most("refusal").scalar_subquery(), 0)
    return sa.case((last > published, last), else_=published) + 1
