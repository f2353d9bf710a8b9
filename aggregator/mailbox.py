# SPDX-License-Identifier: Apache-2.0
"""The mailbox in a folder: what HTTP is in aggregator.service, for silos that only exchange files. Layout: privacy.folder.

Each pass publishes what is new in the store on ``board/`` and ``log/``, and takes what is new in the inboxes through the same Board
and admission as HTTP. Promised: this process holds no private key; a document is read only as far as the contract allows for its
kind; one that is refused for good gets a problem document, and the others go on. What cannot be taken yet (half copied; the step
before it does not stand yet) stays where it is and is looked at again. Everything follows from the store, so a mailbox that was
killed goes on where it was; a file that somebody deleted or cut is written again. It may run beside the HTTP service.

Not promised: room for the honest when somebody fills the folder up: its owner sets who may write where (docs/guides/air-gap.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, cast

import msgspec

from aggregator.board import Board
from aggregator.config import Home
from aggregator.store import DAMAGED, Store
from privacy import files, folder
from privacy.errors import MachineError, RoundError, SiloquyError, TrustError
from privacy.folder import Posted, Sent
from privacy.messages import AGGREGATOR, KINDS, Kind
from privacy.transparency import notes
from privacy.transparency.log import MOST_RESOURCE_BYTES, UNLOGGED, is_resource

FILE: Final = "mailbox.json"
POLL_S: Final = 0.05
_IDLE_S: Final = 0.25
RETRY_S: Final = 1.0
_HEAL_S: Final = 60.0
_AT_ONCE: Final = 64
"""Documents taken from one inbox in a pass: a party that floods its own waits longer than the others."""
_LOG = logging.getLogger(__name__)


class Mailbox:
    """A store's door for files; see the module docstring. One of them works in a home at a time.

    Args:
        root: the shared folder; made when it is missing.
        home: the aggregator's, for the files of its evidence and log.
        clock: monotonic seconds.

    Raises:
        MachineError: the folder cannot be written.
    """

    def __init__(self, root: Path, *, home: Home, store: Store, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._home, self._store, self._board, self._clock = root, home, store, board, clock
        self._done: set[tuple[int, str]] = set()
        self._later: dict[tuple[int, str], float] = {}
        self._posted: set[Posted] = set()
        self._vectors: dict[tuple[int, int], Posted] = {}
        self._next, self._healed_at = 0, float("-inf")
        self._copied: dict[str, bytes] = {}
        self._stated = b""
        for name in (folder.INBOX, folder.BOARD, folder.REFUSED):
            folder.make(root, name)
        self._sweep()

    def once(self) -> bool:
        """One pass: publish, take in, publish what that brought. Whether anything was new.

        Raises:
            MachineError: the folder or the store cannot be written.
        """
        published, taken = self._publish(), self._take()
        if taken:
            self._later.clear()  # what came too early may be next
            self._publish()
        return published or taken

    # --- Out ---------------------------------------------------------------------------------------------------------------

    def _publish(self) -> bool:
        """Write what the store has and the board has not; now and then look whether all the rest still lies there."""
        if self._clock() - self._healed_at >= _HEAL_S:
            self._healed_at, self._next = self._clock(), 0
            self._posted.clear()
            self._copied.clear()
        new = [*self._new_leaves(), *self._new_unlogged()]
        self._copy_log(everything=bool(new))  # first the log, then what speaks of it
        for document in new:
            self._post(document)
        if new:
            self._state()
        return bool(new)

    def _state(self) -> None:
        try:
            stated = msgspec.json.encode(self._board.status()) + b"\n"
        except TrustError as error:  # a hint for people must not stop documents
            _LOG.error("%s: %s", error.message, error.hint)
            return
        if stated != self._stated:
            folder.write(self._root, folder.STATUS, data=stated)
        self._stated = stated

    def _new_leaves(self) -> list[Posted]:
        start, self._next = self._next, self._store.log_size()
        return [
            Posted(place=place, kind=leaf.kind, number=leaf.number, party=leaf.party, digest=leaf.digest)
            for place, leaf in enumerate(self._store.leaves(start, self._next), start)
        ]

    def _new_unlogged(self) -> list[Posted]:
        """What is no leaf of the log: of the two newest rounds, and of all after a look at everything."""
        found: list[Posted] = []
        for kind in (each for each in KINDS if each in UNLOGGED):
            latest = self._store.latest(kind) or 0
            for number in range(max(0, latest - 1) if self._posted else 0, latest + 1):
                found += [self._unlogged(kind, number, party) for party in self._store.parties(kind, number)]
        new = [document for document in found if document not in self._posted]
        self._posted.update(new)
        return new

    def _unlogged(self, kind: str, number: int, party: int) -> Posted:
        """Its place is the size of the log that it speaks of; that of a vector is its round's manifest's."""
        if kind == "vector":
            return self._vector(number, party)
        data = self._store.get(kind, number, party) or b""
        size = notes.checkpoint(notes.parse(data).text).size
        return Posted(place=size, kind=cast(Kind, kind), number=number, party=party, digest=hashlib.sha256(data).digest())

    def _vector(self, number: int, party: int) -> Posted:
        if (number, party) not in self._vectors:
            vector, opened = self._store.entry("vector", number, party), self._store.entry("manifest", number, AGGREGATOR)
            place, digest = (opened and opened.leaf) or 0, vector.digest if vector is not None else bytes(32)
            self._vectors[number, party] = Posted(place=place, kind="vector", number=number, party=party, digest=digest)
        return self._vectors[number, party]

    def _post(self, document: Posted) -> None:
        there = folder.size(self._root, *document.folder, document.name)
        with contextlib.suppress(OSError):
            if there == (self._home.evidence_folder / document.digest.hex()).stat().st_size:
                return
        try:
            data = self._store.get(*document.slot)
        except TrustError as error:  # one damaged file of evidence must not stop all others
            _LOG.error("%s: %s", error.message, error.hint)
            return
        if data is not None:
            folder.write(self._root, *document.folder, document.name, data=data)

    def _copy_log(self, *, everything: bool) -> None:
        """The public files of the log as they lie in the home: the newest checkpoint, and the tiles, which never change."""
        source = self._home.log_folder
        for path in sorted(source.rglob("*")) if everything else [source / "checkpoint"]:
            name = path.relative_to(source).as_posix()
            if name in self._copied and name != "checkpoint":
                continue
            if is_resource(name) and path.is_file() and (data := path.read_bytes()) != self._copied.get(name):
                if data != self._lies(name):
                    folder.write(self._root, folder.LOG, *name.split("/"), data=data)
                self._copied[name] = data if name == "checkpoint" else b""

    def _lies(self, name: str) -> bytes | None:
        try:
            return folder.read(self._root, folder.LOG, *name.split("/"), most=MOST_RESOURCE_BYTES)
        except folder.TooLong:
            return None

    # --- In ----------------------------------------------------------------------------------------------------------------

    def _take(self) -> bool:
        """Whether a document from an inbox went into the store or was refused."""
        is_new = False
        for name in folder.names(self._root, folder.INBOX):
            if (party := folder.party(name)) is not None:
                is_new |= self._take_from(party)
        return is_new

    def _take_from(self, party: int) -> bool:
        try:
            found = folder.names(self._root, folder.INBOX, str(party))
        except MachineError as error:  # one inbox that cannot be read must not stop all others
            _LOG.warning("%s", error.message)
            return False
        now = self._clock()
        due = [name for name in found if (party, name) not in self._done and now >= self._later.get((party, name), float("-inf"))]
        documents = [each for each in map(Sent.named, sorted(due)) if each is not None]
        return sum(self._take_one(party, document) for document in documents[:_AT_ONCE]) > 0

    def _take_one(self, party: int, sent: Sent) -> bool:
        """Whether the document is settled now: accepted or refused, in this pass."""
        key, answer = (party, sent.name), (folder.REFUSED, str(party), f"{sent.name}.json")
        entry = self._store.entry(sent.kind, sent.number, party)
        if (entry is not None and entry.digest == sent.digest) or folder.size(self._root, *answer) is not None:
            self._done.add(key)
            return False
        try:
            if not self._admitted(party, sent):
                self._later[key] = self._clock() + RETRY_S
                return False
        except SiloquyError as error:
            if isinstance(error, RoundError) or error.code == DAMAGED:
                self._later[key] = self._clock() + RETRY_S
                return False
            if isinstance(error, MachineError):
                raise
            folder.write(self._root, *answer, data=_problem(error))
            _LOG.warning("refused %s of party %d: %s", sent.name[:40], party, error.message)
        except Exception:  # as over HTTP: a bug met by one document must not stop the others
            _LOG.exception("the mailbox failed on %s of party %d", sent.name[:40], party)
            self._later[key] = self._clock() + 60 * RETRY_S
            return False
        self._done.add(key)
        return True

    def _admitted(self, party: int, sent: Sent) -> bool:
        """Put the document on the board; False while its file is not whole. Raises as ``Board.put``; TrustError: too long."""
        most = self._board.cap(sent.kind)
        try:
            data = folder.read(self._root, folder.INBOX, str(party), sent.name, most=most, digest=sent.digest)
        except folder.TooLong:
            raise TrustError(
                f"a {sent.kind} of more than {most} bytes", hint="check the contract and the kind", code="too-large"
            ) from None
        except MachineError as error:
            _LOG.warning("%s", error.message)
            return False
        if data is None:
            return False
        self._board.put(sent.kind, sent.number, party, data)
        return True

    def _sweep(self) -> None:
        """Delete what a killed mailbox left half written."""
        folder.sweep(self._root)
        for name in (folder.BOARD, folder.REFUSED, folder.LOG):
            folder.sweep(self._root, name)
            for path in (self._root / name).rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    folder.sweep(self._root, *path.relative_to(self._root).parts)


def _problem(error: SiloquyError) -> bytes:
    """RFC 9457, as aggregator.service answers it over HTTP."""
    body = {
        "type": "about:blank", "title": "Refused", "detail": error.message,
        "code": error.code, "exit_code": error.exit_code, "message": error.message, "hint": error.hint,
    }  # fmt: skip
    return msgspec.json.encode(body) + b"\n"


def serve(root: Path, *, home: Home, store: Store, board: Board) -> None:
    """Run a mailbox until SIGTERM or SIGINT. ``mailbox.json`` in the home names the folder while it runs.

    Raises:
        MachineError: another mailbox runs in this home, or the folder or the store cannot be written.
        KeyboardInterrupt: stopped by SIGINT.
    """
    stop = threading.Event()
    with files.locked(home.root / "mailbox.lock"), _stopped_by_termination(stop):
        mailbox = Mailbox(root, home=home, store=store, board=board)
        where, said = home.root / FILE, msgspec.json.encode({"folder": str(root), "pid": os.getpid()}) + b"\n"
        files.sweep(where)
        files.write_atomic(where, said)
        try:
            pause = POLL_S
            while not stop.wait(pause):
                pause = POLL_S if mailbox.once() else min(1.5 * pause, _IDLE_S)
        finally:
            where.unlink(missing_ok=True)


@contextlib.contextmanager
def _stopped_by_termination(stop: threading.Event) -> Iterator[None]:
    """SIGTERM is the ordinary end, between two passes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
