# SPDX-License-Identifier: Apache-2.0
"""A folder that carries the protocol's documents where no network does: its names, and how it is read and written.

::

    inbox/<party>/<kind>-<number>-<digest>                        written by that party alone
    board/<shard>/<place>-<kind>-<number>-<party>-<digest>        written by the aggregator: what it accepted
    refused/<party>/<kind>-<number>-<digest>.json                 written by the aggregator: why it did not
    log/…                                                         written by the aggregator: the transparency log
    status.json                                                   written by the aggregator: a hint for people

``digest`` is SHA-256 of the file, ``place`` the document's index in the log, ``shard`` place // 1000. A name says everything about
its file, so a file may be copied by any means, at any time, in any order, twice, or half.

Promised: bytes that ``read`` gives are those of the digest asked for, from a regular file, never through a link below the folder,
and no more than the cap is ever read; what is half copied is not there yet. What ``write`` wrote is whole and durable, or not
there. Not promised: who wrote a file. Whoever may write in the folder can delete from it and fill it; documents prove themselves by
their signatures. Nothing but renaming is asked of the file system, so a FAT stick will do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from privacy import files
from privacy.errors import MachineError
from privacy.messages import KINDS, Kind

INBOX: Final = "inbox"
BOARD: Final = "board"
REFUSED: Final = "refused"
LOG: Final = "log"
STATUS: Final = "status.json"
PROBLEM_BYTES: Final = 1 << 16
"""The most a problem document, or the status, may have."""
PER_SHARD: Final = 1000

_INTO: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLAIN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Not blocking, so that a named pipe in place of a file holds nobody up."""
_CHUNK: Final = 1 << 20
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})

_KIND: Final = "[a-z]+(?:-[a-z]+)?"
_NUMBER: Final = "0|[1-9][0-9]{0,9}"
_PARTY: Final = "0|[1-9][0-9]{0,4}"
_SENT: Final = re.compile(rf"({_KIND})-({_NUMBER})-([0-9a-f]{{64}})", re.ASCII)
_POSTED: Final = re.compile(rf"([0-9]{{8}})-({_KIND})-({_NUMBER})-({_PARTY})-([0-9a-f]{{64}})", re.ASCII)
_ID: Final = re.compile(_PARTY, re.ASCII)
_SHARD: Final = re.compile("[0-9]{5}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A document in a party's inbox, by its name."""

    kind: Kind
    number: int
    digest: bytes

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.kind}-{self.number}-{self.digest.hex()}"

    @classmethod
    def named(cls, name: str) -> Sent | None:
        """What a file's name says, or None when it is no such name."""
        found = _SENT.fullmatch(name)
        if found is None or not _is_slot(found[1], found[2], "0"):
            return None
        return cls(kind=cast(Kind, found[1]), number=int(found[2]), digest=bytes.fromhex(found[3]))


@dataclass(frozen=True, kw_only=True)
class Posted:
    """A document on the board, by its name."""

    place: int
    kind: Kind
    number: int
    party: int
    digest: bytes

    @property
    def slot(self) -> tuple[Kind, int, int]:
        """(kind, number, party)."""
        return self.kind, self.number, self.party

    @property
    def folder(self) -> tuple[str, str]:
        """Where it lies."""
        return BOARD, shard(self.place)

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.place:08d}-{self.kind}-{self.number}-{self.party}-{self.digest.hex()}"

    @classmethod
    def named(cls, name: str) -> Posted | None:
        """What a file's name says, or None when it is no such name."""
        found = _POSTED.fullmatch(name)
        if found is None or not _is_slot(found[2], found[3], found[4]):
            return None
        digest = bytes.fromhex(found[5])
        return cls(place=int(found[1]), kind=cast(Kind, found[2]), number=int(found[3]), party=int(found[4]), digest=digest)


def shard(place: int) -> str:
    """The name of the folder under ``board/`` for this place."""
    return f"{place // PER_SHARD:05d}"


def is_shard(name: str) -> bool:
    """Whether a folder under ``board/`` is one of documents."""
    return _SHARD.fullmatch(name) is not None


def party(name: str) -> int | None:
    """The party whose inbox a folder is, or None when it is none."""
    return int(name) if _ID.fullmatch(name) and int(name) < 2**16 else None


def _is_slot(kind: str, number: str, of: str) -> bool:
    return kind in KINDS and int(number) < 2**32 and int(of) < 2**16


# --- Reading ---------------------------------------------------------------------------------------------------------------------


class TooLong(Exception):
    """The file is longer than what it is read for may be."""


def is_there(root: Path, *parts: str) -> bool:
    """Whether this is a folder, reached without a link below ``root``. Raises MachineError when it cannot be told."""
    with _entered(root, parts) as folder:
        return folder is not None


def names(root: Path, *parts: str) -> list[str]:
    """The names in a folder; none when it is not there. Raises MachineError when it cannot be listed."""
    with _entered(root, parts) as folder:
        try:
            if folder is None:
                return []
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries]
        except OSError as error:
            raise _cannot_read(root.joinpath(*parts), error) from error


def read(root: Path, *parts: str, most: int, digest: bytes | None = None) -> bytes | None:
    """The bytes of a regular file below ``root``; None when it is not there, is no regular file, or has not this digest (yet).

    Raises:
        TooLong: it has more than ``most`` bytes.
        MachineError: it is there and cannot be read.
    """
    found = b"".join(_chunks(root, parts, most))
    is_right = hashlib.sha256(found).digest() == digest if digest is not None else bool(found)
    return found if is_right else None


def read_part(root: Path, *parts: str, start: int, size: int) -> bytes | None:
    """``size`` bytes of a regular file from byte ``start`` on; None when it is not there, is no regular file, or is shorter.

    They are held to no digest: the reader must know by other means that they are right.

    Raises:
        MachineError: it is there and cannot be read.
    """
    with _opened(root, parts) as descriptor:
        if descriptor is None:
            return None
        found = b"".join(_read_on(descriptor, start, size))
        return found if len(found) == size else None


def is_whole(root: Path, *parts: str, digest: bytes, most: int) -> bool:
    """Whether the file is there with this digest and at most ``most`` bytes; it is read in pieces and not kept.

    Raises:
        MachineError: as ``read``.
    """
    if (size(root, *parts) or 0) > most:  # a sparse file costs its writer nothing, and its reader minutes
        return False
    running = hashlib.sha256()
    try:
        for chunk in _chunks(root, parts, most):
            running.update(chunk)
    except TooLong:
        return False
    return running.digest() == digest


def size(root: Path, *parts: str) -> int | None:
    """The length of a regular file, or None when there is none."""
    with _entered(root, parts[:-1]) as folder, contextlib.suppress(OSError):
        if folder is not None:
            found = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
            return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None


def _chunks(root: Path, parts: tuple[str, ...], most: int) -> Iterator[bytes]:
    """The content of a regular file; nothing when there is none."""
    with _opened(root, parts) as descriptor:
        done = 0
        while descriptor is not None and (chunk := os.read(descriptor, _CHUNK)):
            done += len(chunk)
            if done > most:
                raise TooLong
            yield chunk


def _read_on(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := os.pread(descriptor, min(size, _CHUNK), start)):
        start, size = start + len(chunk), size - len(chunk)
        yield chunk


@contextlib.contextmanager
def _opened(root: Path, parts: tuple[str, ...]) -> Iterator[int | None]:
    """A descriptor of a regular file, reached without a link below ``root``, or None. Raises MachineError: it cannot be read."""
    with _entered(root, parts[:-1]) as folder:
        descriptor = None
        try:
            if folder is not None:
                descriptor = os.open(parts[-1], _PLAIN, dir_fd=folder)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _cannot_read(root.joinpath(*parts), error) from error
    try:
        yield descriptor if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError as error:
        raise _cannot_read(root.joinpath(*parts), error) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _entered(root: Path, parts: tuple[str, ...]) -> Iterator[int | None]:
    """A descriptor of the folder, or None when it is not there. Only ``root`` itself may be a link."""
    opened: list[int] = []
    try:
        try:
            opened.append(os.open(root, _INTO & ~os.O_NOFOLLOW))
            for part in parts:
                opened.append(os.open(part, _INTO, dir_fd=opened[-1]))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _cannot_read(root.joinpath(*parts), error) from error
            yield None
        else:
            yield opened[-1]
    finally:
        for descriptor in opened:
            os.close(descriptor)


# --- Writing ---------------------------------------------------------------------------------------------------------------------


def make(root: Path, *parts: str) -> None:
    """Make a folder below ``root``, durably, or find it there.

    Raises:
        MachineError: something else has its name, or the folder above cannot be written.
    """
    path = root
    files.make_folder(root)
    for part in parts:
        path /= part
        if path.is_symlink():
            raise MachineError(
                f"{path} is a link", hint="only real folders carry documents: remove it, and find out who made it", code="link"
            )
        if not path.is_dir():
            files.make_folder(path)
            with _entered(path.parent, ()) as above:
                if above is not None:
                    os.fsync(above)


def write(root: Path, *parts: str, data: bytes) -> None:
    """Write a file below ``root``: temporary name, fsync, rename, fsync of its folder.

    Raises:
        MachineError: the disk is full, or the folder is read-only or in part a link; nothing half written is left under the name.
    """
    make(root, *parts[:-1])
    files.write_atomic(root.joinpath(*parts), data)


def remove(root: Path, *parts: str) -> None:
    """Delete a file that is no longer needed; one that cannot be deleted stays, and does no harm."""
    with _entered(root, parts[:-1]) as folder, contextlib.suppress(OSError):
        if folder is not None:
            os.unlink(parts[-1], dir_fd=folder)


def sweep(root: Path, *parts: str) -> None:
    """Delete what crashes left half written in one folder. Only for the one process that writes there."""
    if is_there(root, *parts):
        files.sweep(root.joinpath(*parts))


def _cannot_read(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot read {path}: {error.strerror or error}",
        hint="mend its permissions, or look at the disk, then run the same command again",
        code="cannot-read",
        path=str(path),
    )
