# SPDX-License-Identifier: Apache-2.0
"""Durable files: a write either happened whole and is on the disk, or did not happen.

Every promise of the protocol that reads "on disk first" goes through these functions. They are the only place that
knows about temporary names, ``fsync`` and directory entries.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from privacy.errors import Equivocation, MachineError

PRIVATE = 0o600
PUBLIC = 0o644

_RANDOM_BYTES = 6
_RANDOM_HEX = "[0-9a-f]" * 2 * _RANDOM_BYTES


def write_atomic(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Replace ``path`` by ``data``: temporary file, fsync, rename, fsync of the directory.

    Raises:
        MachineError: the disk is full or the folder cannot be written; the old content stays whole.
    """
    temporary = _temporary(path)
    try:
        _write_new(temporary, data, mode)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def write_folder(path: Path, contents: Mapping[str, bytes], *, mode: int = PUBLIC) -> None:
    """Create the folder ``path`` with the files ``contents``, by name: a temporary folder beside it, fsync, rename.

    An empty folder may be there. A process killed in between leaves ``path`` as it was, and beside it what ``sweep`` takes.

    Raises:
        MachineError: the disk is full, or ``path`` cannot be written, is a file, or holds something; it is left as it is.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, data in contents.items():
            _write_new(temporary / name, data, mode)
        _sync_directory(temporary)
        temporary.rename(path)  # refused by the system where ``path`` holds anything
        _sync_directory(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(path, error) from error


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Create the folder ``path`` and those above it, or find it there.

    Raises:
        MachineError: a file is in the way, or the folder above cannot be written.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"cannot make the folder {path}: {error.strerror or error}",
            hint="choose another folder, or mend its permissions",
            code="cannot-write",
            path=str(path),
        ) from error


def write_once(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Create ``path`` with ``data``, or find it there with exactly these bytes.

    Raises:
        Equivocation: the file exists with other bytes; it is left as it is.
        MachineError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = _temporary(path)
    try:
        _write_new(temporary, data, mode)
        os.link(temporary, path)
        _sync_directory(path.parent)
    except FileExistsError:
        _find_same(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: bytes, *, mode: int = PRIVATE) -> None:
    """Append ``line`` and a newline, fsynced. A failed append leaves the file as long as it was.

    Raises:
        MachineError: the disk is full or the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, line + b"\n")
            os.fsync(descriptor)
            if size == 0:
                _sync_directory(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise _cannot_write(path, error) from error
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Delete what crashes in the middle of a write left: of the file ``path``, or of everything in the folder ``path``.

    Only for the one process that writes there.

    Raises:
        MachineError: it cannot be deleted.
    """
    folder, name = (path, "*") if path.is_dir() else (path.parent, path.name)
    try:
        for leftover in folder.glob(f".{name}.{_RANDOM_HEX}"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock on ``path`` (created when missing), without waiting.

    Raises:
        MachineError: another process holds it, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(
                f"another process is at work in {path.parent}", hint="wait for it, or stop it", code="busy", folder=str(path.parent)
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Work in ``folder`` beside other processes that say so too. Whoever comes while nobody is there sweeps it first.

    Any user who can read the lock beside the folder can hold it.

    Raises:
        MachineError: the lock beside the folder cannot be opened.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT, PUBLIC)
    except OSError as error:
        raise _cannot_write(lock, error) from error
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(folder)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}")


def _find_same(path: Path, data: bytes) -> None:
    """Return if ``path`` holds ``data``, durably: a process may have been killed between the link and the sync."""
    if path.read_bytes() != data:
        raise Equivocation(
            f"{path.name} was written before with other content",
            hint="never delete it: it is a promise this party made",
            file=str(path),
        )
    _sync_directory(path.parent)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot write {path}: {error.strerror or error}",
        hint="free space or mend the permissions, then run the same command again",
        code="cannot-write",
        path=str(path),
        errno=error.errno,
    )
