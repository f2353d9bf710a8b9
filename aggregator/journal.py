# SPDX-License-Identifier: Apache-2.0
"""The keeper of the transparency log: leaves in order from the store, tiles in ``log/``, and signed heads on the board.

::

    log/signed                     the last head that was signed, on the disk before its signature was made
    log/checkpoint                 the newest head with its signatures
    log/tile/<level>/<n>[.p/<w>]   256 hashes, or the w first of them
    log/tile/entries/<n>[.p/<w>]   256 leaves, or the w first of them

Promised: two signed heads of this journal are consistent, also when it was killed in between: what was signed last is compared
with the table before anything is signed, so a table that lost or changed a leaf stops the coordinator. A head's tiles are on the
disk before the head can be seen; none of them ever changes. Not promised: anything when ``log/`` and the table are put back
together; the silos' own heads notice that. One coordinator at a time writes here; the service only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from aggregator.store import Store
from privacy import files
from privacy.errors import Equivocation, TrustError
from privacy.federation import Contract
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, encode
from privacy.transparency import log, notes
from privacy.transparency.log import WIDTH
from privacy.transparency.notes import Checkpoint, Note
from privacy.transparency.proofs import EMPTY_ROOT
from privacy.transparency.tree import Tree

ROLLED_BACK: Final = "log-rolled-back"
_AT_ONCE: Final = 4096


class Journal:
    """See the module docstring.

    Args:
        folder: where the log's files lie; created when missing.
        clock: Unix seconds.
        former: the terms of the contract's earlier versions: what their parties cosigned last counts still.
        before_head: puts into the store what must be in a new head; called before each.
    """

    def __init__(
        self, folder: Path, *, store: Store, identity: Identity, terms: Contract, clock: Callable[[], float],
        former: Sequence[Contract] = (), before_head: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._folder, self._store, self._identity, self._terms, self._clock = folder, store, identity, terms, clock
        self._former, self._before_head = former, before_head
        self._tree = Tree()
        self._leaves: list[bytes] = []
        files.make_folder(folder)
        for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            files.sweep(each)

    def checkpoint(self, number: int) -> Checkpoint:
        """The head on which round ``number`` is opened: signed and published now, if it was not before.

        Raises:
            TrustError: the table does not continue the head that was signed last.
            MachineError: the disk refuses.
        """
        raw = self._store.get("checkpoint", number, AGGREGATOR)
        before = self._read()
        if raw is None:
            head, note = self._next(before)
            self._store.put_once("checkpoint", number, AGGREGATOR, note.to_bytes(), received_at=self._clock())
            self._show(note)
            return head
        if self._shown_size() < before.size:  # killed before it was shown
            self._show(notes.parse(raw))
        return log.open_checkpoint(notes.parse(raw), self._terms, self._former)

    def renew(self) -> Checkpoint:
        """A head of all that stands now, in ``log/checkpoint`` and in no slot: for what comes when no round is to follow.

        Nobody cosigns it; the head of the next round, which is cosigned, continues it.

        Raises:
            TrustError: the table does not continue the head that was signed last.
            MachineError: the disk refuses.
        """
        head, note = self._next(self._read())
        if head.size > self._shown_size():
            self._show(note)
        return head

    def head(self, number: int) -> Checkpoint | None:
        """The same head once a quorum cosigned it, which is then published; None while too few did.

        Raises:
            TrustError: a document about it is damaged.
        """
        raw = self._store.get("head", number, AGGREGATOR)
        if raw is None:
            raw = self._store.get("checkpoint", number, AGGREGATOR)
            parties = [each for each in self._store.parties("cosignature", number) if each in log.cosigners(self._terms)]
            if raw is None or len(parties) < self._terms.quorum:
                return None
            note = notes.joined(notes.parse(raw), [self._cosignature(raw, number, party) for party in parties])
            self._store.put_once("head", number, AGGREGATOR, note.to_bytes(), received_at=self._clock())
            self._show(note)
            return log.open_head(note, self._terms, self._former)
        return log.open_head(notes.parse(raw), self._terms, self._former)

    def _cosignature(self, checkpoint: bytes, number: int, party: int) -> Note:
        raw = self._store.get("cosignature", number, party) or b""
        return log.open_cosignature(raw, checkpoint, self._terms, party, self._former)

    def _read(self) -> Checkpoint:
        """Read what was stored since; the head that was signed last, of which it is a continuation."""
        size, before = self._store.log_size(), self._signed()
        for start in range(self._tree.size, size, _AT_ONCE):
            for leaf in map(encode, self._store.leaves(start, min(size, start + _AT_ONCE))):
                self._leaves.append(leaf)
                self._tree.append(leaf)
        if size < before.size or self._tree.root(before.size) != before.root:
            raise _rolled_back(f"the table has {size} leaves that do not continue the {before.size} that were signed")
        return before

    def _next(self, before: Checkpoint) -> tuple[Checkpoint, Note]:
        """A new head, and its note: of what was read, and what ``before_head`` put behind it."""
        self._before_head()
        self._read()
        head = self._grow(before)
        return head, notes.signed(head.text, name=head.origin, seed=self._identity.sign_seed)

    def _grow(self, before: Checkpoint) -> Checkpoint:
        """Write the tiles of what was read, and note the head that may be signed now."""
        self._write_tiles(self._tree.size, before.size)
        head = Checkpoint(origin=log.origin(self._terms), size=self._tree.size, root=self._tree.root())
        files.write_atomic(self._folder / "signed", head.text.encode())
        return head

    def _signed(self) -> Checkpoint:
        path = self._folder / "signed"
        if not path.exists():
            return Checkpoint(origin=log.origin(self._terms), size=0, root=EMPTY_ROOT)
        return notes.checkpoint(path.read_bytes().decode("utf-8", "replace"))

    def _write_tiles(self, size: int, after: int) -> None:
        for level, index, width in log.tiles_of(size, after):
            start = index * WIDTH
            self._write(log.tile_path(level, index, width), b"".join(self._tree.nodes(8 * level, start, width)))
            if level == 0:
                self._write(log.tile_path("entries", index, width), log.bundle(self._leaves[start : start + width]))

    def _write(self, path: str, data: bytes) -> None:
        whole = self._folder / path
        files.make_folder(whole.parent)
        try:
            files.write_once(whole, data)
        except Equivocation as error:
            raise _rolled_back(f"{path} was published with other bytes than the table gives") from error

    def _shown_size(self) -> int:
        path = self._folder / "checkpoint"
        try:
            return notes.checkpoint(notes.parse(path.read_bytes()).text).size if path.exists() else 0
        except TrustError:  # it is not what counts: written again
            return 0

    def _show(self, note: Note) -> None:
        """Make this the newest head that is shown, unless a larger one is."""
        if notes.checkpoint(note.text).size >= self._shown_size():
            files.write_atomic(self._folder / "checkpoint", note.to_bytes())


def _rolled_back(why: str) -> TrustError:
    return TrustError(
        f"the log cannot go on: {why}",
        hint="restore the newest backup of the table, and of evidence/; never delete log/: the silos remember what it said",
        code=ROLLED_BACK,
    )
