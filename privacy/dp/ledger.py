# SPDX-License-Identifier: Apache-2.0
"""The privacy ledger of one silo: append-only, hash-chained, signed, and on the disk before anything is computed.

One file (``ledger.jsonl``, mode 0600) holds every run over this silo's records, in every federation. An entry is one line
of JSON: ``sequence``, ``previous`` (SHA-256 of the previous line's bytes without its newline, zeros for the first),
``time``, ``kind``, ``body``, ``signature`` (hex, last), signed over ``siloquy ledger``, NUL and the line without its
signature field. An attempt is reserved before it is computed and stays charged whatever becomes of it.

Promised: any byte changed, any line removed, moved or repeated before the last one is refused on opening by line number;
a crash at any point loses no entry that was acknowledged. Not promised: that lines cut from the *end* are noticed. No
file can know that about itself; a receipt outside the silo can, and ``check_receipt`` compares with one. Nor does the ledger
judge: ``privacy/dp/budget.py`` decides what may be spent.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from privacy import files
from privacy.dp.entries import Begin, Body, Commit, Entry, Plan, Reserve, Void
from privacy.dp.mechanism import Mechanism
from privacy.errors import LedgerBroken, MachineError, PrivacyRefusal

FORMAT_VERSION = 1
NO_PREVIOUS = "0" * 64

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], None]

_DOMAIN = b"siloquy ledger\x00"
_SIGNATURE = re.compile(rb',"signature":"([0-9a-f]+)"\}')


class History:
    """A verified ledger in memory: what was declared, charged and released. It has no way to write.

    ``History.read`` is for status commands and auditors, who need neither the key nor the lock.
    """

    def __init__(self, name: str, verify: Verify) -> None:
        self._name = name
        self._verify = verify
        self._digests: list[str] = []
        self._bodies: list[Body] = []

    @classmethod
    def read(cls, path: Path, *, verify: Verify) -> Self:
        """The ledger in ``path`` as it stands; a line that another process is still writing is left out.

        Raises:
            LedgerBroken: the file is missing, empty, or does not verify.
        """
        history = cls(path.name, verify)
        history._load(_content(path))
        return history

    @property
    def counter(self) -> int:
        """How many entries the ledger has."""
        return len(self._digests)

    @property
    def head(self) -> str:
        """Hex SHA-256 of the last line; zeros for an empty ledger."""
        return self._digests[-1] if self._digests else NO_PREVIOUS

    @property
    def entries(self) -> tuple[Body, ...]:
        """All bodies in order."""
        return tuple(self._bodies)

    def charged(self, contract: str | None = None) -> list[Mechanism]:
        """Everything ever reserved (under ``contract``, or in all), equal mechanisms merged into one with their steps summed.

        Void, failed and repeated attempts count like any other.
        """
        steps: dict[Mechanism, int] = {}
        for body in self._bodies:
            if isinstance(body, Reserve) and contract in (None, body.contract):
                one = body.mechanism.with_steps(1)
                steps[one] = steps.get(one, 0) + body.mechanism.steps
        return [one.with_steps(count) for one, count in steps.items()]

    def charging(self, contract: str) -> int:
        """How many ledgers, of this one, were charged under ``contract``: 0 or 1."""
        return int(any(isinstance(body, Reserve) and body.contract == contract for body in self._bodies))

    def attempts(self, contract: str, round_number: int) -> list[str]:
        """The attempts reserved for a round, oldest first."""
        return [
            body.attempt for body in self._bodies
            if isinstance(body, Reserve) and (body.contract, body.round) == (contract, round_number)
        ]

    def plan(self, contract: str) -> Plan | None:
        """The plan declared under ``contract``, if there is one."""
        return next((body for body in self._bodies if isinstance(body, Plan) and body.contract == contract), None)

    def check_receipt(self, counter: int, head: str) -> None:
        """Nothing, when this ledger contains the state (``counter``, ``head``) that a receipt outside the silo attests.

        Raises:
            LedgerBroken: the ledger is behind the receipt (rolled back, restored from a copy) or has another history.
        """
        hint = "stop: restore the newest copy of the ledger, never start a new one"
        if self.counter < counter:
            raise LedgerBroken(
                f"{self._name} has {self.counter} entries, a receipt says {counter}", hint=hint, code="ledger-behind",
                entries=self.counter, receipt=counter,
            )
        found = self._digests[counter - 1] if counter > 0 else NO_PREVIOUS
        if found != head:
            raise LedgerBroken(
                f"{self._name} line {counter} has digest {found[:16]}, a receipt says {head[:16]}", hint=hint, line=counter,
                found=found, receipt=head,
            )

    def _load(self, data: bytes) -> int:
        """Verify every whole line of ``data``; the number of bytes that they take."""
        *lines, torn = data.split(b"\n")
        for line in lines:
            self._accept(line)
        closed = _SIGNATURE.search(torn)
        if closed and closed.end() < len(torn):
            raise self._broken("ends in bytes after a whole entry", len(torn), closed.end())
        if not lines:
            raise LedgerBroken(
                f"{self._name} has no entry, it must begin with one of kind open", hint="restore the newest copy of the ledger"
            )
        return len(data) - len(torn)

    def _accept(self, line: bytes) -> None:
        """Take ``line`` as the next entry, or raise by line number; nothing changes on failure."""
        closed = _SIGNATURE.search(line)
        if closed is None or closed.end() != len(line):
            raise self._broken("does not end in one signature", len(line), closed.end() if closed else "none")
        signed = line[: closed.start()] + b"}"
        try:
            self._verify(_DOMAIN + signed, bytes.fromhex(closed[1].decode()))
        except Exception as error:
            digest = hashlib.sha256(signed).hexdigest()
            what = f"with digest {digest[:16]} is not signed by this silo's key"
            raise self._broken(what, closed[1][:16].decode(), "its signature") from error
        self._bodies.append(self._decoded(signed))
        self._digests.append(hashlib.sha256(line).hexdigest())

    def _decoded(self, signed: bytes) -> Body:
        try:
            entry = msgspec.json.decode(signed, type=Entry)
            body = entry.content()
        except (msgspec.DecodeError, PrivacyRefusal, ValueError, RecursionError) as error:
            raise self._broken("is not an entry of this version", str(error), f"version {FORMAT_VERSION}") from error
        if entry.sequence != self.counter:
            raise self._broken("has the wrong sequence", entry.sequence, self.counter)
        if entry.previous != self.head:
            raise self._broken("does not continue the line before", entry.previous[:16], self.head[:16])
        if isinstance(body, Begin) != (self.counter == 0):
            raise self._broken("has the wrong kind for its place", entry.kind, "open in the first line and nowhere else")
        return body

    def _broken(self, what: str, found: object, expected: object) -> LedgerBroken:
        return LedgerBroken(
            f"{self._name} line {self.counter + 1} {what}: {found}, expected {expected}",
            hint="stop: restore the newest copy of the ledger; what it charged stays charged",
            line=self.counter + 1, found=str(found), expected=str(expected),
        )


class Ledger(History):
    """A ledger open for appending, by one process at a time. Each method returns once its entry is on the disk.

    Args (of ``open`` and ``create``):
        path: the file; its lock lies beside it.
        sign: signs bytes with the silo's identity key.
        verify: takes (data, signature) and raises when they do not match that key.
        clock: seconds since 1970.

    Formal guarantees:
        - an entry whose method returned is there, unchanged, whenever the ledger is opened again;
        - an entry whose method did not return is there whole or not at all;
        - ``charged`` never shrinks; nothing is ever rewritten but the torn end of a line that no method acknowledged;
        - after a failed write the object takes no more entries until it is opened again.
    """

    def __init__(self, path: Path, *, sign: Sign, verify: Verify, clock: Callable[[], float]) -> None:
        super().__init__(path.name, verify)
        self._path = path
        self._sign = sign
        self._clock = clock
        self._size = 0
        self._writable = False
        self._lock = contextlib.ExitStack()

    @classmethod
    def create(cls, path: Path, *, who: str, sign: Sign, verify: Verify, clock: Callable[[], float]) -> Self:
        """A new ledger for ``who``, whose first entry is on the disk.

        Raises:
            LedgerBroken: there is one already; a ledger is never reset.
            MachineError: another process holds it, or the disk cannot be written.
        """
        ledger = cls(path, sign=sign, verify=verify, clock=clock)
        with ledger._opening():
            if is_begun(path):
                raise LedgerBroken(f"{path.name} exists, a ledger is never started twice", hint="open it, or restore its copy")
            files.write_atomic(path, b"", mode=files.PRIVATE)
            ledger._append(Begin(who=who, version=FORMAT_VERSION))
        return ledger

    @classmethod
    def open(cls, path: Path, *, sign: Sign, verify: Verify, clock: Callable[[], float]) -> Self:
        """The ledger in ``path``, with its whole chain verified and the torn end of an unacknowledged line cut off.

        Raises:
            LedgerBroken: the file is missing, empty, or does not verify; the message names the line and both values.
            MachineError: another process holds it.
        """
        ledger = cls(path, sign=sign, verify=verify, clock=clock)
        with ledger._opening():
            data = _content(path)
            ledger._size = ledger._load(data)
            if ledger._size < len(data):
                files.write_atomic(path, data[: ledger._size], mode=files.PRIVATE)
        return ledger

    def declare(
        self, *, contract: str, run: str, mechanism: Mechanism, epsilon: float, delta: float, units: str | None = None,
        before: Mechanism | None = None, unit: str | None = None,
    ) -> None:  # fmt: skip
        """Write the whole plan of a run, the limits it was admitted under, and for which units (``entries.Plan``)."""
        self._append(
            Plan(
                contract=contract, run=run, mechanism=mechanism, epsilon=epsilon, delta=delta, units=units, before=before, unit=unit
            )
        )  # fmt: skip

    def reserve(
        self, *, contract: str, round_number: int, attempt: str, mechanism: Mechanism, units: str | None = None
    ) -> None:
        """Charge one attempt, before anything of it is computed.

        Raises:
            PrivacyRefusal: this attempt was charged before; a new one needs a new name, sample and noise.
        """
        if attempt in self.attempts(contract, round_number):
            raise PrivacyRefusal(
                f"attempt {attempt[:16]} at round {round_number} is charged already, each attempt needs its own",
                hint="resend the sealed bytes of that attempt, or draw a new one", code="attempt-charged", round=round_number,
            )
        self._append(Reserve(contract=contract, round=round_number, attempt=attempt, mechanism=mechanism, units=units))

    def commit(self, *, contract: str, round_number: int, attempt: str, silos: int | None = None) -> None:
        """Note that a reserved attempt became part of a released sum, over so many ``silos``.

        Raises:
            PrivacyRefusal: the attempt was never reserved.
        """
        if attempt not in self.attempts(contract, round_number):
            raise PrivacyRefusal(
                f"attempt {attempt[:16]} at round {round_number} was released, the ledger never reserved it",
                hint="stop and compare this ledger with its copies", code="never-reserved", round=round_number,
            )
        self._append(Commit(contract=contract, round=round_number, attempt=attempt, silos=silos))

    def void(self, *, contract: str, round_number: int, reason: str) -> None:
        """Note that a round ended without a result. Nothing is given back."""
        self._append(Void(contract=contract, round=round_number, reason=reason))

    def close(self) -> None:
        """Let another process open it; this object takes no more entries. Closing twice is harmless."""
        self._writable = False
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Take the lock for the life of this object; give it back when the body fails."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked(self._path.with_suffix(".lock")))
            self._writable = True
            yield
            self._lock = stack.pop_all()

    def _append(self, body: Body) -> None:
        if not self._writable:
            raise MachineError(f"{self._name} is closed, or a write to it failed", hint="open it again", code="ledger-closed")
        line = self._signed(body)
        if _size(self._path) != self._size:
            raise self._broken("cannot be appended, the file was changed from outside", _size(self._path), self._size)
        self._writable = False
        files.append_line(self._path, line)
        self._size += len(line) + 1
        self._accept(line)
        self._writable = True

    def _signed(self, body: Body) -> bytes:
        """The next line. It is read back strictly first: what cannot be opened again is never written."""
        entry = Entry(
            sequence=self.counter, previous=self.head, time=int(self._clock()), kind=body.kind,
            body=msgspec.Raw(msgspec.json.encode(body)),
        )
        plain = msgspec.json.encode(entry)
        try:
            msgspec.json.decode(plain, type=Entry).content()
        except msgspec.DecodeError as error:
            raise PrivacyRefusal(f"not an entry for the ledger: {error}", hint="correct the value that is named") from error
        return plain[:-1] + b',"signature":"' + self._sign(_DOMAIN + plain).hex().encode() + b'"}'


def is_begun(path: Path) -> bool:
    """Whether a ledger stands there; what a crash inside ``Ledger.create`` leaves is none: nobody was told of its entry."""
    return path.exists() and b"\n" in _content(path)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LedgerBroken(
            f"{path.name} is missing, this silo has one", hint="restore its newest copy; a lost ledger is never started anew"
        ) from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", hint="mend the permissions", code="cannot-read") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
