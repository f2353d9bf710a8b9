# SPDX-License-Identifier: Apache-2.0
"""Evidence at rest: a flat folder of documents, each in a file named by the SHA-256 of its bytes, and an index of their slots.

The file name is the whole protection against decay: whoever changes a byte changes the digest. The index (the aggregator's table,
the leaves of its log) says which document stands where; without one, ``by_content`` places every document by what it says of
itself. Promised: a document is given out only if its bytes have the digest that the index names; what is damaged, missing or
unknown is named. Not promised: that a document is genuine; privacy.audit.whole asks that.

A ``Remnant`` is what is kept of an outcome when its masked vectors are deleted, in ``<digest>.remnant``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from privacy.audit.findings import Check, Slot
from privacy.errors import ConfigError, MachineError, TrustError
from privacy.messages import Digest, Outcome, Signature, Signed, Wire, decode, encode

DAMAGED: Final = "evidence-damaged"
MOST_REPORT_BYTES: Final = 2**26
"""A hundred times the record of a thousand rounds."""
REMNANT: Final = ".remnant"
_NAME: Final = re.compile(r"[0-9a-f]{64}")


class Remnant(Wire, frozen=True, kw_only=True):
    """An outcome without its masked vectors: ``body`` is the digest that was signed, ``outcome`` the Outcome with no vectors.

    The signature proves the digest only. That the rest is what it covered is shown by the acknowledgements, which name digest and
    next state, and by the update rule, which leads from the sum to that state.
    """

    format: Literal["siloquy-remnant/1"] = "siloquy-remnant/1"
    context: Digest
    body: Digest
    signature: Signature
    outcome: bytes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What an index says of one document; ``size``, ``time`` (Unix seconds) and ``leaf`` where it says so."""

    slot: Slot
    digest: bytes
    size: int | None = None
    time: int | None = None
    leaf: int | None = None

    @property
    def name(self) -> str:
        """The document's file name."""
        return self.digest.hex()


@dataclass(kw_only=True)
class Evidence:
    """A folder and an index over it; privacy.audit.findings.Source.

    ``spare``: files that the index does not name, with what is known of them. ``broken``: files that were documents, and that
    nobody can place any more.
    """

    folder: Path
    entries: dict[Slot, Entry]
    spare: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def indexed(cls, folder: Path, entries: Iterable[Entry]) -> Evidence:
        """The folder under an index. Files that the index does not name are spare."""
        by_slot = {entry.slot: entry for entry in entries}
        known = {entry.name for entry in by_slot.values()}
        spare = {name: "no index names it" for name in names(folder) if name.removesuffix(REMNANT) not in known}
        return cls(folder=folder, entries=by_slot, spare=spare)

    def get(self, kind: str, number: int, party: int) -> bytes | None:
        """The document, or None when the index has none there. Raises TrustError when its file is missing or damaged."""
        entry = self.entries.get(Slot(kind, number, party))
        return None if entry is None else self._read(entry)

    def has(self, kind: str, number: int, party: int) -> bool:
        """Whether the index has a document there."""
        return Slot(kind, number, party) in self.entries

    def latest(self, kind: str) -> int:
        """The highest number of this kind, 0 when there is none."""
        return max((slot.number for slot in self.entries if slot.kind == kind), default=0)

    def digest(self, kind: str, number: int, party: int) -> bytes | None:
        """What the index says; ``integrity`` holds the files to it."""
        entry = self.entries.get(Slot(kind, number, party))
        return None if entry is None else entry.digest

    def file(self, kind: str, number: int, party: int) -> str:
        """The name of the document's file, or ""."""
        entry = self.entries.get(Slot(kind, number, party))
        return "" if entry is None else entry.name

    def remnant(self, kind: str, number: int, party: int) -> bytes | None:
        """What is kept of a document whose vectors were deleted: only while the document itself is gone."""
        entry = self.entries.get(Slot(kind, number, party))
        if entry is None or (self.folder / entry.name).exists():
            return None
        path = self.folder / (entry.name + REMNANT)
        return read_file(path) if path.is_file() else None

    def integrity(self) -> Iterator[Check]:
        """One check per entry of the index, and a note per file that it does not name."""
        for slot, entry in self.entries.items():
            if self.remnant(*slot) is not None:
                yield _check(entry, "note", "its masked vectors were deleted; what is kept stands in its remnant")
                continue
            try:
                self._read(entry)
            except TrustError as error:
                yield _check(entry, "failed", error.message)
            else:
                yield _check(entry, "ok")
        for name, why in sorted(self.broken.items()):
            yield Check(kind="unknown", number=0, party=0, what="file", status="failed", why=why, file=name)
        for name, why in sorted(self.spare.items()):
            yield Check(kind="unknown", number=0, party=0, what="file", status="note", why=f"an extra file: {why}", file=name)

    def _read(self, entry: Entry) -> bytes:
        try:
            data = read_file(self.folder / entry.name)
        except FileNotFoundError:
            raise _damaged(f"{entry.slot}: its file {entry.name[:16]}… is missing") from None
        if (found := hashlib.sha256(data).digest()) != entry.digest:
            said = "" if entry.size in (None, len(data)) else f" and {len(data)} bytes instead of {entry.size}"
            raise _damaged(f"the copy of {entry.slot} here is damaged: its bytes have digest {found.hex()[:16]}…{said}")
        if entry.size not in (None, len(data)):
            raise _damaged(f"{entry.slot} has {len(data)} bytes, the index says {entry.size}")
        return data


def names(folder: Path) -> list[str]:
    """The names of all files in the folder, ascending, without the temporary ones of a write in progress.

    Raises:
        MachineError: the folder cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise MachineError(
            f"cannot read {folder}: {error.strerror}", hint="name the folder evidence/", code="cannot-read"
        ) from error


def is_digest(name: str) -> bool:
    """Whether a file name is that of a document."""
    return _NAME.fullmatch(name) is not None


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. Raises FileNotFoundError, TrustError for anything else there, MachineError when unreadable."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _damaged(f"{path.name[:16]}… is no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", hint="mend its permissions", code="cannot-read") from error


def read_report(path: Path) -> tuple[bytes, bytes | None]:
    """A report's record, and the signature that lies beside it.

    Raises:
        ConfigError: there is no record, it is no regular file or larger than any report, or one of both cannot be read.
    """
    beside = path.with_name(path.name + ".sig")
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MOST_REPORT_BYTES:
            raise ConfigError(f"{path} is no file of at most {MOST_REPORT_BYTES} bytes", hint="name a report.json", code="no-file")
        return path.read_bytes(), beside.read_bytes() if beside.is_file() else None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name a report.json", code="no-file") from error


def remnant_of(document: bytes) -> bytes:
    """The remnant of a signed outcome: write it as ``<digest of the document>.remnant``, then the document may be deleted.

    Raises:
        TrustError: the document is no outcome.
    """
    signed = decode(document, Signed)
    bare = msgspec.structs.replace(decode(signed.body, Outcome), vectors=())
    body = hashlib.sha256(signed.body).digest()
    return encode(Remnant(context=signed.context, body=body, signature=signed.signature, outcome=encode(bare)))


def _check(entry: Entry, status: Literal["ok", "failed", "note"], why: str = "") -> Check:
    slot = entry.slot
    return Check(kind=slot.kind, number=slot.number, party=slot.party, what="file", status=status, why=why, file=entry.name)


def _damaged(what: str) -> TrustError:
    return TrustError(what, hint="restore the folder evidence/ from a backup", code=DAMAGED)
