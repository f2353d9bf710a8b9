# SPDX-License-Identifier: Apache-2.0
"""The board in a folder: the same documents as over HTTP, carried by whatever copies files. Layout: privacy.folder.

Promised: a document is shown when it is whole, and so is everything that the aggregator logged from the outcome before it up to it.
However the files were copied, a silo that goes from outcome to outcome sees a board that once stood so, and takes nothing that has
not come yet for missing. A document that is put is durable in this silo's inbox when the call returns, may be put any number of
times, and is looked after until the aggregator has answered.

A refusal comes back as the same error class as over HTTP, but later: ``put`` waits ``answer_s`` for an answer, which a shared
folder has by then; through an air gap the first call after the refusal arrived raises it. "Too late" (Replay) is raised by ``put``
alone: what made it late comes over the board. Not promised: that anything arrives; see docs/guides/air-gap.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from privacy import folder
from privacy.errors import Equivocation, MachineError, Replay, RoundError, SiloquyError, TrustError
from privacy.folder import Posted, Sent
from privacy.messages import AGGREGATOR, Kind, decode
from privacy.transparency import notes
from privacy.transparency.log import MOST_RESOURCE_BYTES, UNLOGGED, WIDTH, Leaf, is_resource, unbundle
from silo.config import Aggregator
from silo.transport import HttpTransport, most_bytes, refusal

_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.25
_RETRY_S: Final = 0.5
_ALL_SHARDS_S: Final = 10.0
_LOOK_AFTER_S: Final = 5.0

Slot = tuple[Kind, int, int]


class FolderTransport:
    """The board over a folder; see the module docstring. Safe to use from several threads of one process.

    Args:
        root: the folder, the same path at every call; the aggregator's ``board/`` must have been copied into it.
        patience_s: how long the folder may be gone (a disk that is not mounted), or a copy incomplete, before that is an error.
        answer_s: how long ``put`` waits for the aggregator's answer.
        clock, sleep: monotonic seconds, and how to wait.
    """

    def __init__(
        self,
        root: Path,
        *,
        patience_s: float = 120.0,
        answer_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root, self._patience_s, self._answer_s, self._clock, self._sleep = root, patience_s, answer_s, clock, sleep
        self._view = _View(root, clock)
        self._waiting: dict[tuple[int, Sent], bytes] = {}
        self._looked_after_at = float("-inf")
        self._swept: set[int] = set()
        self._seen: set[Slot] = set()
        self._lock = threading.RLock()

    def get(self, kind: str, number: int, party: int, *, wait_s: float) -> bytes | None:
        """See silo.transport.Transport.

        Raises:
            Equivocation: two documents lie in this slot.
            MachineError: the folder is gone or cannot be read, or a document that was shown before did not come back in time.
            SiloquyError: the aggregator's refusal of a document that was put before, as its class; never a Replay.
        """
        slot: Slot = (cast(Kind, kind), number, party)
        most = most_bytes(kind)
        start, pause = self._clock(), _FIRST_PAUSE_S
        while True:
            with self._lock:
                self._look()
                found = self._view.shown(slot, most)
                if found is not None:
                    self._seen.add(slot)
                    return found
                self._raise_refusals()
                self._look_after()
                # What was here and is not is being copied over: no caller may take it for missing.
                end = start + (max(wait_s, self._patience_s) if slot in self._seen else wait_s)
            if (left := end - self._clock()) <= 0:
                if slot in self._seen:
                    raise self._incomplete(f"the {kind} {number} of party {party} was in {self._root} before and is not now")
                return None
            self._sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def part(self, kind: str, number: int, party: int, start: int, size: int, *, wait_s: float) -> bytes | None:
        """See silo.transport.Transport: no more is read of the file than was asked for. Raises MachineError as ``get`` does."""
        end, pause = self._clock() + wait_s, _FIRST_PAUSE_S
        while True:
            with self._lock:
                self._look()
                found = self._view.part((cast(Kind, kind), number, party), start, size)
            if found is not None or (left := end - self._clock()) <= 0:
                return found
            self._sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def put(self, kind: str, number: int, party: int, data: bytes) -> None:
        """Leave a document in this silo's inbox, durably, and wait a moment for the answer.

        Raises:
            MachineError: the folder is gone, full or read-only.
            SiloquyError: the aggregator's refusal, as its class, of this document or of one that was put before.
        """
        sent = Sent(kind=cast(Kind, kind), number=number, digest=hashlib.sha256(data).digest())
        with self._lock:
            self._look()
            self._waiting[party, sent] = data
            self._raise_refusals((party, sent))
            if (party, sent) not in self._waiting:  # it stands
                return
            if party not in self._swept:
                folder.sweep(self._root, folder.INBOX, str(party))
                self._swept.add(party)
            folder.write(self._root, folder.INBOX, str(party), sent.name, data=data)
        self._await_answer(party, sent)

    def status(self) -> dict[str, Any]:
        """What the aggregator said about itself when it last wrote here: a hint for people, never a fact to act on.

        Raises:
            RoundError: it has written nothing yet.
            TrustError: it is no JSON object.
        """
        with self._lock:
            self._look()
        try:
            body = folder.read(self._root, folder.STATUS, most=folder.PROBLEM_BYTES)
            if body is None:
                raise RoundError(f"there is no status in {self._root}", hint="copy the aggregator's folder here", code="not-found")
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, folder.TooLong) as error:
            raise TrustError("the status is not JSON", hint="copy the aggregator's folder here again", code="malformed") from error

    def fetch(self, path: str) -> bytes | None:
        """A file of the transparency log, by its path under ``log/``; waits for it while the copy is incomplete.

        Raises:
            TrustError: the log has no such path.
            MachineError: it did not come within the patience.
        """
        if not is_resource(path):
            raise TrustError(f"{path[:80]!a} is no file of a log", hint="the aggregator is faulty", code="no-such-route")
        start, pause = self._clock(), _FIRST_PAUSE_S
        while True:
            with self._lock:
                self._look()
            with contextlib.suppress(folder.TooLong):  # as good as none: nobody honest wrote it
                found = folder.read(self._root, folder.LOG, *path.split("/"), most=MOST_RESOURCE_BYTES)
                if found is not None and _is_whole_resource(path, found):
                    return found
            if self._clock() - start >= self._patience_s:
                raise self._incomplete(f"{self._root} has no log/{path}")
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Nothing is held open."""

    # --- What stands, and what was refused -------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Read the names on the board; wait while the folder is not there."""
        start, pause = self._clock(), 0.1
        while not folder.is_there(self._root, folder.BOARD):
            if self._clock() - start + pause > self._patience_s:
                raise MachineError(
                    f"there is no board in {self._root} after {self._patience_s:g} s",
                    hint="mount it, copy the aggregator's folder there, or mend [aggregator] folder",
                    code="unreachable",
                    folder=str(self._root),
                )
            self._sleep(pause)
            pause = min(2 * pause, 5.0)
        self._view.refresh()

    def _incomplete(self, what: str) -> MachineError:
        return MachineError(
            what, hint="copy the aggregator's folder here again, then run the same command again", code="incomplete",
            folder=str(self._root),
        )  # fmt: skip

    def _await_answer(self, party: int, sent: Sent) -> None:
        end, pause = self._clock() + self._answer_s, _FIRST_PAUSE_S
        while True:
            with self._lock:
                self._look()
                self._raise_refusals((party, sent))
                if (party, sent) not in self._waiting:
                    return
            if (left := end - self._clock()) <= 0:
                return
            self._sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _raise_refusals(self, asked: tuple[int, Sent] | None = None) -> None:
        """Forget what was accepted, and raise the first refusal; a Replay of any other document than ``asked`` is forgotten."""
        for party, sent in list(self._waiting):
            if self._view.holds((sent.kind, sent.number, party), sent.digest):
                del self._waiting[party, sent]
                folder.remove(self._root, folder.INBOX, str(party), sent.name)
            elif (error := self._refusal(party, sent)) is not None:
                del self._waiting[party, sent]
                if (party, sent) == asked or not isinstance(error, Replay):
                    raise error

    def _look_after(self) -> None:
        """Write again what waits for an answer and was deleted, or overwritten by half a copy, meanwhile."""
        if self._waiting and self._clock() - self._looked_after_at >= _LOOK_AFTER_S:
            self._looked_after_at = self._clock()
            for (party, sent), data in self._waiting.items():
                if not folder.is_whole(self._root, folder.INBOX, str(party), sent.name, digest=sent.digest, most=len(data)):
                    folder.write(self._root, folder.INBOX, str(party), sent.name, data=data)

    def _refusal(self, party: int, sent: Sent) -> SiloquyError | None:
        try:
            body = folder.read(self._root, folder.REFUSED, str(party), f"{sent.name}.json", most=folder.PROBLEM_BYTES)
            stated = {} if body is None else msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, folder.TooLong):  # half copied
            return None
        return refusal(409, cast(bytes, body)) if stated else None


@contextlib.contextmanager
def transporting(
    at: Aggregator, given: Path | None = None, *, patience_s: float = 120.0
) -> Iterator[HttpTransport | FolderTransport]:
    """The way to the aggregator: the folder that was given, else what the configuration says."""
    if given is not None or at.folder:
        transport: HttpTransport | FolderTransport = FolderTransport(given or Path(at.folder), patience_s=patience_s)
    else:
        transport = HttpTransport(at.url, insecure_http=at.insecure_http, patience_s=patience_s)
    try:
        yield transport
    finally:
        transport.close()


def _is_whole_resource(path: str, data: bytes) -> bool:
    """Whether a file of the log is no half copy, cut off or with zeros for its end: their names have no digest."""
    stem, _, width = path.partition(".p/")
    leaves = int(width or WIDTH)
    try:
        if path == "checkpoint":
            return bool(notes.parse(data).lines)
        if stem.startswith("tile/entries/"):
            return all(decode(leaf, Leaf) for leaf in unbundle(data, leaves))
    except TrustError:
        return False
    return len(data) == 32 * leaves and data[-8:] != bytes(8)


class _View:
    """The names on the board, and which of their files are whole."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root, self._clock = root, clock
        self._shards: dict[str, set[str]] = {}
        self._slots: dict[Slot, set[Posted]] = {}
        self._leaves: dict[int, set[Posted]] = {}
        self._full: set[str] = set()
        self._whole: set[Posted] = set()
        self._try_again_at: dict[Posted, float] = {}
        self._all_at = float("-inf")

    def refresh(self) -> None:
        """Take in the names that came or went. Shards that are full are looked at now and then: nothing new comes there."""
        every = self._clock() - self._all_at >= _ALL_SHARDS_S
        if every:
            self._all_at = self._clock()
        known = sorted(name for name in folder.names(self._root, folder.BOARD) if folder.is_shard(name))
        for name in {*known, *self._shards} if every else {*known[-2:], *(set(known) - self._full)}:
            self._compare(name, set(folder.names(self._root, folder.BOARD, name)))

    def holds(self, slot: Slot, digest: bytes) -> bool:
        """Whether the aggregator named this document as accepted."""
        return any(each.digest == digest for each in self._slots.get(slot, ()))

    def shown(self, slot: Slot, most: int) -> bytes | None:
        """The document, once it and all it rests on are whole. Raises Equivocation when two lie in the slot."""
        whole = [each for each in self._slots.get(slot, ()) if self._is_whole(each)]
        if len({each.digest for each in whole}) > 1:
            raise Equivocation(
                f"two documents on the board are the {slot[0]} {slot[1]} of party {slot[2]}: "
                + " and ".join(sorted(each.digest.hex()[:16] + "…" for each in whole)),
                hint="keep both files, and ask the coordinator which of them it wrote",
                code="two-documents",
            )
        if not any(self._rests_on_whole(each) for each in whole):
            return None
        found = whole[0]
        try:
            return folder.read(self._root, *found.folder, found.name, most=most, digest=found.digest)
        except folder.TooLong:
            raise MachineError(
                f"{found.name} is longer than {most} bytes", hint="check [aggregator] folder", code="too-large", most=most
            ) from None

    def part(self, slot: Slot, start: int, size: int) -> bytes | None:
        """Some bytes of the document's file, which need not be whole yet; None while it is not there, or shorter."""
        for each in sorted(self._slots.get(slot, ()), key=lambda each: each.name):
            found = folder.read_part(self._root, *each.folder, each.name, start=start, size=size)
            if found is not None:
                return found
        return None

    def _rests_on_whole(self, document: Posted) -> bool:
        """Whether everything between the outcome before it and it is whole, that outcome included."""
        if document.kind == "manifest" and not self._stands(("head", document.number, AGGREGATOR)):  # which it names
            return False
        for place in range(document.place - 1, -1, -1):
            before = [each for each in self._leaves.get(place, ()) if self._is_whole(each)]
            if not before:
                return False
            if before[0].kind == "outcome":
                return True
        return True

    def _stands(self, slot: Slot) -> bool:
        return any(self._is_whole(each) for each in self._slots.get(slot, ()))

    def _is_whole(self, document: Posted) -> bool:
        """Whether its file is there with its digest. Read once when it is; while it is not, at most every _RETRY_S seconds."""
        if document in self._whole:
            return True
        if self._clock() < self._try_again_at.get(document, float("-inf")):
            return False
        if folder.is_whole(self._root, *document.folder, document.name, digest=document.digest, most=most_bytes(document.kind)):
            self._whole.add(document)
            self._try_again_at.pop(document, None)
            return True
        self._try_again_at[document] = self._clock() + _RETRY_S
        return False

    def _compare(self, name: str, found: set[str]) -> None:
        before = self._shards.get(name, set())
        for gone in before - found:
            self._forget(gone)
        for came in found - before:
            document = Posted.named(came)
            if document is not None and folder.shard(document.place) == name:
                self._slots.setdefault(document.slot, set()).add(document)
                if document.kind not in UNLOGGED:
                    self._leaves.setdefault(document.place, set()).add(document)
        self._shards[name] = found
        first = int(name) * folder.PER_SHARD
        self._full.discard(name)
        if all(self._leaves.get(place) for place in range(first, first + folder.PER_SHARD)):
            self._full.add(name)

    def _forget(self, name: str) -> None:
        document = Posted.named(name)
        if document is not None:
            self._slots.get(document.slot, set()).discard(document)
            self._leaves.get(document.place, set()).discard(document)
            self._whole.discard(document)
            self._try_again_at.pop(document, None)
