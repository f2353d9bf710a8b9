# SPDX-License-Identifier: Apache-2.0
"""A silo's eye on the transparency log: it goes on only with a log that grew, holds what this silo saw, and is shown to all alike.

Before a round the aggregator shows the head on which it will open it. ``follow`` checks that head against the last one and
against what must be in the log, writes it down, and cosigns it. ``head`` then gives the head that a quorum cosigned: the
manifest must name it.

**Formal guarantees**

- *Only growth*: a head is written down and cosigned only if the aggregator signed it, its leaves and nodes were read and give its
  root, and the same nodes give the root of the last head at the last size. A smaller head is refused as stale.
- *One log for all*: a round is taken part in only on a head that q parties cosigned, each of which checked the same. In consent
  mode these are all members, so no two silos are in one round on different logs.
- *Nothing dropped or changed*: a head is refused if an outcome that this silo settled, the roster of its epoch, or the
  contract that it joined, is not a leaf with the same digest once it is due. The first head is checked like every other. A newer
  version is due in the head after the first round that this silo opens under it: the head of that round may be older.
- *Receipts*: every outcome and own upload that is in the log leaves a receipt that anybody can check without the log; an own upload
  that is not there leaves a signed complaint.
- *Full stop*: two signed heads of which the tiles prove that one is not the beginning of the other are kept in one file, and while
  it lies there nothing starts.
- *Written first*: head and cosignature are on the disk before the cosignature leaves; after a crash the same bytes leave.

Not promised: that the log is served (tiles that do not fit the signed root are refused, and are no evidence), or that a head
is new.

Files in the home's ``log/``: ``head``; ``expect-<kind>-<number>-<party>``: digest, and the round whose head must have it;
``receipt-<kind>-<number>`` (C2SP tlog-proof); ``cosignature-<round>``; ``complaint-<round>``; ``equivocation-<size>-<root>.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privacy import files
from privacy.chain import ancestors
from privacy.envelope import open_contract
from privacy.errors import Equivocation, TrustError
from privacy.federation import Accepted, Contract
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR, decode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from privacy.transparency.notes import Checkpoint, Note
from privacy.transparency.proofs import EMPTY_ROOT
from silo.home import Home
from silo.transport import Transport

_EXPECTED: Final = re.compile(r"expect-([a-z-]+)-([0-9]{1,10})-([0-9]{1,5})", re.ASCII)
_DUE: Final = re.compile(rb"([0-9a-f]{64}) ([0-9]{1,10})\n")
_COMPLAINT: Final = "siloquy complaint/1"
_RECEIPTS: Final = ("upload", "outcome")


def refuse_after_equivocation(home: Home) -> None:
    """Return if no evidence of two inconsistent heads lies here.

    Raises:
        Equivocation: it does; a person must look at it, and remove it to go on.
    """
    found = sorted(home.log_folder.glob("equivocation-*.json"))
    if found:
        raise Equivocation(
            f"the aggregator signed two heads of its log that contradict each other: {found[0].name}",
            hint=f"show {found[0]} to the other members; only when the cause is found and mended, move the file away",
            code="log-equivocation", file=str(found[0]),
        )  # fmt: skip


def expect(home: Home, kind: str, number: int, party: int, document: bytes, *, due: int) -> None:
    """Write down that this document must be in the head of round ``due``; repeating it changes nothing.

    Raises:
        Equivocation: another document was written down for this slot.
    """
    files.make_folder(home.log_folder)
    path, digest = home.log_folder / f"expect-{kind}-{number}-{party}", hashlib.sha256(document).hexdigest().encode()
    if not path.is_file() or not path.read_bytes().startswith(digest):
        files.write_once(path, digest + f" {due}\n".encode())


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """A document that must be in the log."""

    path: Path
    slot: tuple[str, int, int]
    digest: bytes
    due: int

    def __str__(self) -> str:
        kind, number, party = self.slot
        return f"{kind} {number} of party {party}"


class Watch:
    """See the module docstring. A party whose key cosigns under this contract does so; another one only watches.

    Args:
        clock: Unix seconds, for the time in a cosignature.

    Raises:
        Equivocation: as ``refuse_after_equivocation``.
    """

    def __init__(
        self, *, home: Home, transport: Transport, identity: Identity, accepted: Accepted, clock: Callable[[], float]
    ) -> None:
        self._home, self._folder, self._transport, self._identity = home, home.log_folder, transport, identity
        self._terms, self._digest, self._clock = accepted.terms, accepted.digest, clock
        earlier = [open_contract(raw) for version, raw in home.contracts() if version < accepted.terms.version]
        kept = ancestors(accepted, earlier)
        self._former = tuple(each.terms for each in kept)  # whose last cosignatures count still
        own = identity.public.sign_key[:32].hex()
        self._cosigner = next((each for each in log.cosigners(self._terms).values() if each.sign_key == own), None)
        self._followed: tuple[int, Note] | None = None
        files.make_folder(self._folder)
        refuse_after_equivocation(home)

    def follow(self, number: int, *, wait_s: float) -> bool:
        """Check, write down and cosign the head of round ``number``; False when none is shown within ``wait_s`` seconds.

        Raises:
            Equivocation: it contradicts the last head; both are kept.
            TrustError: it is stale, not the aggregator's, lacks or changes a document, or its tiles do not fit it.
        """
        if self._followed is not None and self._followed[0] == number:
            return True
        raw = self._transport.get("checkpoint", number, AGGREGATOR, wait_s=wait_s)
        if raw is None:
            return False
        note = notes.parse(raw)
        found, last = log.open_checkpoint(note, self._terms, self._before()), self._last()
        if found.size < last.size:
            raise _refused(
                f"the head of round {number} has {found.size} leaves, this silo has seen {last.size}", "log-stale",
                "the aggregator was put back to an earlier time: it must restore its newest state",
            )  # fmt: skip
        tiles = self._grown(found, last, note)
        self._expect_newer(number)
        settled = [self._place(each, number, tiles, found, last) for each in self._expected()]
        for each, index in settled:
            if index is not None or each.due <= number:
                self._settle(each, index, tiles, note)
        files.write_atomic(self._folder / "head", raw)
        self._cosign(number, note)
        self._followed = (number, note)
        return True

    def head(self, number: int) -> Checkpoint:
        """The head of round ``number`` as ``follow`` checked it, now that a quorum cosigned it; receipts get these signatures too.

        Raises:
            TrustError: there is none, it is another one, or fewer than q parties cosigned it.
        """
        raw = self._transport.get("head", number, AGGREGATOR, wait_s=0)
        if raw is None or self._followed is None or self._followed[0] != number:
            raise _refused(f"round {number} has a manifest and no cosigned head", "log-no-head", "the aggregator is faulty")
        note = notes.parse(raw)
        found = log.open_head(note, self._terms, self._before())
        if note.text != self._followed[1].text:
            raise _refused(f"the cosigned head of round {number} is not the one that was shown before", "log-head-changed")
        for kind in _RECEIPTS:
            path = self._folder / f"receipt-{kind}-{number - 1}"
            kept = path.read_bytes() if path.is_file() else None
            if kept is not None and log.open_receipt(kept, self._terms, self._former)[2].text == note.text:
                files.write_atomic(path, log.with_note(kept, note))
        return found

    def _last(self) -> Checkpoint:
        path = self._folder / "head"
        if not path.is_file():
            return Checkpoint(origin=log.origin(self._terms), size=0, root=EMPTY_ROOT)
        return log.open_checkpoint(notes.parse(path.read_bytes()), self._terms, self._former)

    def _before(self) -> tuple[Contract, ...]:
        """The versions whose keys count still: only for the first round of a version, whose head may be older than it."""
        progress = self._home.progress()
        return self._former if progress is None or progress.contract != self._digest else ()

    def _grown(self, found: Checkpoint, last: Checkpoint, note: Note) -> Tiles:
        """The checked tiles of a head, whose beginning is the last one."""
        if found.size == last.size and found.root != last.root:
            raise self._stop(found, note)
        tiles = Tiles(found.size, self._transport.fetch)
        tiles.check(found.root, since=last.size)
        if tiles.root(last.size) != last.root:
            raise self._stop(found, note)
        return tiles

    def _stop(self, found: Checkpoint, note: Note) -> Equivocation:
        """Keep both heads, and the error that says so."""
        first = (self._folder / "head").read_bytes().decode()
        evidence = {"format": "siloquy-equivocation/1", "first": first, "second": note.to_bytes().decode()}
        path = self._folder / f"equivocation-{found.size}-{found.root.hex()[:16]}.json"
        files.write_atomic(path, json.dumps(evidence, ensure_ascii=False, indent=1).encode() + b"\n")
        last = notes.checkpoint(notes.parse(first.encode()).text)
        return Equivocation(
            f"the log of {found.size} leaves, root {found.root.hex()[:16]}…, does not continue that of {last.size}, "
            f"root {last.root.hex()[:16]}…; the aggregator signed both",
            hint=f"stop, and show {path} to the other members",
            code="log-equivocation", file=str(path),
        )  # fmt: skip

    # --- What must be in it ----------------------------------------------------------------------------------------------

    def _expected(self) -> Iterator[_Expected]:
        """What was written down and is not settled; before the first head also the contract that was joined."""
        for path in sorted(self._folder.iterdir()):
            name = _EXPECTED.fullmatch(path.name)
            if name is not None:
                stated = _DUE.fullmatch(path.read_bytes())
                if stated is None:
                    raise _refused(f"{path.name} is damaged", "malformed", "restore the silo from its backup")
                slot = (name[1], int(name[2]), int(name[3]))
                yield _Expected(path=path, slot=slot, digest=bytes.fromhex(stated[1].decode()), due=int(stated[2]))
        kept = next(iter(self._home.contracts()), None)  # the first version: newer ones may come after this head
        if kept is not None and not (self._folder / "head").exists():
            slot = ("contract", kept[0], AGGREGATOR)
            yield _Expected(path=self._folder / "contract", slot=slot, digest=hashlib.sha256(kept[1]).digest(), due=0)

    def _expect_newer(self, number: int) -> None:
        """In the first round under a newer version: its contract must be in the head after it."""
        version = self._terms.version
        kept = dict(self._home.contracts()).get(version) if version > 1 and self._before() else None
        if kept is not None and not (self._folder / f"receipt-contract-{version}").is_file():
            expect(self._home, "contract", version, AGGREGATOR, kept, due=number + 1)

    def _place(
        self, each: _Expected, number: int, tiles: Tiles, found: Checkpoint, last: Checkpoint
    ) -> tuple[_Expected, int | None]:
        """Where the document is in the log: among what was added, or, when it is due, anywhere; None when it is not there."""
        index = _find(each, tiles, last.size, found.size)
        if index is None and each.due <= number:
            if last.size:
                whole = Tiles(found.size, self._transport.fetch)
                whole.check(found.root)
                index = _find(each, whole, 0, last.size)
            if index is None and each.slot[0] != "upload":
                raise _refused(f"the log of {found.size} leaves lacks the {each}", "log-leaf-missing")
        return each, index

    def _settle(self, each: _Expected, index: int | None, tiles: Tiles, note: Note) -> None:
        """Keep a receipt, or for an upload that is not there the complaint, and expect the document no more."""
        kind, number, _ = each.slot
        if index is None:
            self._complain(each, note)
        elif kind in _RECEIPTS or (kind == "contract" and number > 1):
            files.write_atomic(self._folder / f"receipt-{kind}-{number}", log.receipt(tiles, index, note))
        each.path.unlink(missing_ok=True)

    def _complain(self, each: _Expected, note: Note) -> None:
        """A signed statement, for the other members, that an upload which was sent is not in the log."""
        _, number, party = each.slot
        text = (
            f"{_COMPLAINT}\nfederation {self._terms.name}\nround {number}\nsilo {party}\nupload {each.digest.hex()}\n"
            f"is not in this log:\n{note.text}"
        )
        made = notes.signed(text, name=f"{self._terms.name}/{self._identity.name}", seed=self._identity.sign_seed)
        files.write_atomic(self._folder / f"complaint-{number}", made.to_bytes())

    def _cosign(self, number: int, note: Note) -> None:
        if self._cosigner is None:
            return
        path = self._folder / f"cosignature-{number}"
        if not path.is_file():
            name = log.cosigner_name(self._terms, self._cosigner)
            made = notes.cosigned(note.text, name=name, seed=self._identity.sign_seed, time=int(self._clock()))
            files.write_once(path, made.to_bytes())
        kept = path.read_bytes()
        if notes.parse(kept).text != note.text:
            raise _refused(f"the head of round {number} is another one than this silo cosigned", "log-head-changed")
        self._transport.put("cosignature", number, self._cosigner.id, kept)


def _find(each: _Expected, tiles: Tiles, start: int, end: int) -> int | None:
    """The index of the document among the leaves [start, end). Raises TrustError when its slot has another digest there."""
    for index in range(start, end):
        leaf = decode(tiles.leaf(index), Leaf)
        if (leaf.kind, leaf.number, leaf.party) == each.slot:
            if leaf.digest != each.digest:
                raise _refused(
                    f"leaf {index} of the log has {leaf.digest.hex()[:16]}… for the {each}, here it was {each.digest.hex()[:16]}…",
                    "log-leaf-changed",
                )
            return index
    return None


def _refused(why: str, code: str, hint: str = "nothing was cosigned; show this to the other members") -> TrustError:
    return TrustError(why, hint=hint, code=code)
