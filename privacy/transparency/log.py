# SPDX-License-Identifier: Apache-2.0
"""The transparency log: what a leaf says, where tiles lie, and reading a whole tree from tiles that nobody has to be trusted for.

Every document on the board, in the order of storing, is a leaf of one RFC 6962 tree; only the log's own documents and masked
vectors (``UNLOGGED``) are none. The tree is published as C2SP tlog-tiles: files of 256 hashes, and bundles of the leaves.

Promised: ``Tiles.check`` returns only if the leaves it covers, and the nodes before them, give the signed root; then these leaves
are the log's, and ``Tiles.root`` of ``since`` is the *only* root that this log can have had at that size. A receipt that was made
verifies. A leaf has one encoding.

Not promised: that a document is in the log (ask for it), or that others were shown the same head (cosignatures say that).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from privacy.errors import TrustError
from privacy.federation import Contract, Guardian, Member
from privacy.messages import NOTE_KINDS, Digest, Kind, Number, PartyId, Signed, Upload, Wire, decode
from privacy.transparency import notes, proofs, tree
from privacy.transparency.notes import COSIGNATURE, Checkpoint, Note, VerifierKey

UNLOGGED: Final = NOTE_KINDS | {"vector"}
"""Kinds of documents that are no leaves of the log: those that speak about it, and masked vectors, which logged headers bind."""
WIDTH: Final = 256
"""Hashes in a full tile, leaves in a full bundle."""
MOST_LEAF_BYTES: Final = 256
MOST_RESOURCE_BYTES: Final = WIDTH * (2 + MOST_LEAF_BYTES)
_LEVELS: Final = 8
_INDEX: Final = r"(?:x[0-9]{3}/){0,4}[0-9]{3}"
_WIDTH: Final = r"(?:\.p/(?:[1-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5]))?"
_RESOURCE: Final = re.compile(rf"checkpoint|tile/(?:[0-9]|[1-5][0-9]|6[0-3]|entries)/{_INDEX}{_WIDTH}", re.ASCII)
_PROOF: Final = "c2sp.org/tlog-proof@v1"


class Leaf(Wire, frozen=True, kw_only=True):
    """One document: its slot, the SHA-256 of its bytes, for an upload also that of its signed header, and when it was stored.

    ``time``: Unix seconds by the aggregator's clock, for people; nothing rests on it.
    """

    format: Literal["siloquy-leaf/1"] = "siloquy-leaf/1"
    kind: Kind
    number: Number
    party: PartyId
    digest: Digest
    header: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    time: Annotated[int, msgspec.Meta(ge=0)]


_RESOLVED = msgspec.msgpack.Decoder(Leaf)  # before any thread does: see privacy.messages


def header_digest(kind: str, document: bytes) -> bytes:
    """SHA-256 of the signed header in an upload; nothing for another kind, or for bytes that are no upload."""
    if kind != "upload":
        return b""
    try:
        return hashlib.sha256(decode(decode(document, Signed).body, Upload).header).digest()
    except TrustError:
        return b""


def origin(terms: Contract) -> str:
    """What the federation's log is called in its checkpoints; the aggregator's note key has the same name."""
    return f"{terms.name}/log"


def aggregator_key(terms: Contract) -> VerifierKey:
    """The key that signs checkpoints."""
    return VerifierKey(name=origin(terms), key=bytes.fromhex(terms.aggregator.sign_key))


def cosigners(terms: Contract) -> Mapping[int, Member | Guardian]:
    """Whose cosignatures count, by id: the members' in consent mode, the guardians' in share mode."""
    return {party.id: party for party in (terms.guardian if terms.shared else terms.member)}


def cosigner_name(terms: Contract, party: Member | Guardian) -> str:
    """The name under which a party signs notes about this log."""
    return f"{terms.name}/{party.name}"


def cosigner_key(terms: Contract, party: Member | Guardian) -> VerifierKey:
    """The key of a party's cosignatures."""
    return VerifierKey(name=cosigner_name(terms, party), key=bytes.fromhex(party.sign_key), type=COSIGNATURE)


def open_checkpoint(note: Note, terms: Contract, former: Sequence[Contract] = ()) -> Checkpoint:
    """The checkpoint in a note that the aggregator signed for this federation's log, with its key in ``terms`` or ``former``.

    Raises:
        TrustError: not a checkpoint, of another log, or without the aggregator's signature.
    """
    found = notes.checkpoint(note.text)
    if found.origin != origin(terms):
        raise _refused(f"a checkpoint of the log {found.origin}, this federation's is {origin(terms)}", "log-origin")
    if not notes.verified(note, [aggregator_key(each) for each in (terms, *former)]):
        raise _refused(f"a checkpoint of {found.size} leaves that the aggregator did not sign", "log-unsigned")
    return found


def keys_of(terms: Contract, former: Sequence[Contract] = ()) -> dict[VerifierKey, int]:
    """Every key whose cosignature counts under ``terms``, and its party's id: also those of earlier versions of the contract.

    The head on which a new version's first round is opened may have been cosigned under the version before.
    """
    now = cosigners(terms)
    return {
        cosigner_key(each, party): number for each in (*former, terms) for number, party in cosigners(each).items() if number in now
    }


def open_cosignature(raw: bytes, checkpoint: bytes, terms: Contract, party: int, former: Sequence[Contract] = ()) -> Note:
    """A party's cosignature document: the text of the checkpoint document, and that party's line alone.

    Raises:
        TrustError: it is of another text or party, or has other lines.
    """
    note, by_key = notes.parse(raw), keys_of(terms, former)
    if party not in by_key.values():
        raise _refused(f"party {party} does not cosign this log", "log-cosigner")
    if note.text != notes.parse(checkpoint).text:
        raise _refused(f"the cosignature of party {party} is over another checkpoint than the one that stands", "log-cosignature")
    if len(note.lines) != 1 or len(notes.verified(note, [key for key, number in by_key.items() if number == party])) != 1:
        raise _refused(f"the cosignature of party {party} must have exactly its own line", "log-cosignature")
    return note


def cosigned_by(note: Note, terms: Contract, former: Sequence[Contract] = ()) -> tuple[int, ...]:
    """The ids of the parties that cosigned this note, ascending. Raises TrustError when a cosignature of one does not verify."""
    by_key = keys_of(terms, former)
    return tuple(sorted({by_key[key] for key in notes.verified(note, by_key)}))


def open_head(note: Note, terms: Contract, former: Sequence[Contract] = ()) -> Checkpoint:
    """The checkpoint in a note that the aggregator and a quorum of cosigners signed: nobody of them saw another log.

    With ``former``, the earlier versions' terms, a quorum of the last of them does as well: for the first round of a new version,
    whose head may have been shown before that version was in force.

    Raises:
        TrustError: as ``open_checkpoint``; or fewer than q parties cosigned it.
    """
    found, signers = open_checkpoint(note, terms, former), cosigned_by(note, terms, former)
    if len(signers) < terms.quorum:
        if former and len(cosigned_by(note, former[-1], former[:-1])) >= former[-1].quorum:
            return found
        raise _refused(
            f"the head of {found.size} leaves is cosigned by {list(signers)}, {terms.quorum} cosignatures are needed", "log-quorum"
        )
    return found


# --- Where things lie ------------------------------------------------------------------------------------------------------


def is_resource(path: str) -> bool:
    """Whether ``path`` names something of a log: ``checkpoint``, a tile or a bundle. Nothing else is read or served."""
    return _RESOURCE.fullmatch(path) is not None


def tile_path(level: int | Literal["entries"], index: int, width: int = WIDTH) -> str:
    """The path of a tile or bundle, such as ``tile/0/x001/234.p/5``; level 0 lies over the leaves."""
    groups = [f"{index % 1000:03d}"]
    while index := index // 1000:
        groups.insert(0, f"x{index % 1000:03d}")
    return f"tile/{level}/{'/'.join(groups)}" + ("" if width == WIDTH else f".p/{width}")


def tiles_of(size: int, after: int = 0) -> Iterator[tuple[int, int, int]]:
    """The (level, index, width) of each tile that a tree of ``size`` leaves has and one of ``after`` had not, levels ascending."""
    level = 0
    while size:
        for index in range(after // WIDTH, -(-size // WIDTH)):
            width = min(WIDTH, size - index * WIDTH)
            if index * WIDTH + width > after:
                yield level, index, width
        size, after, level = size // WIDTH, after // WIDTH, level + 1


def bundle(leaves: Sequence[bytes]) -> bytes:
    """An entry bundle: each leaf after its length (two bytes, big-endian)."""
    return b"".join(len(leaf).to_bytes(2, "big") + leaf for leaf in leaves)


def unbundle(data: bytes, width: int) -> list[bytes]:
    """The ``width`` leaves of a bundle. Raises TrustError when it is not exactly that many."""
    leaves: list[bytes] = []
    place = 0
    while place < len(data) and len(leaves) < width:
        end = place + 2 + int.from_bytes(data[place : place + 2], "big")
        leaves.append(data[place + 2 : end])
        place = end
    if place != len(data) or len(leaves) != width:
        raise damaged(f"a bundle of {len(data)} bytes does not hold {width} leaves")
    return leaves


# --- Reading -----------------------------------------------------------------------------------------------------------------


class Tiles:
    """The tree of one checkpoint, read from tiles and bundles as they are asked for; see the module docstring.

    Args:
        size: how many leaves the checkpoint states.
        fetch: a resource by its path, or None when it is not there.
    """

    def __init__(self, size: int, fetch: Callable[[str], bytes | None]) -> None:
        self.size = size
        self._fetch = fetch
        self._checked = size
        self._bundles: dict[int, list[bytes]] = {}
        self._tiles: dict[tuple[int, int], list[bytes]] = {}

    def check(self, root: bytes, *, since: int = 0) -> None:
        """Return if the leaves from ``since`` on, and the nodes that cover those before, give the signed root.

        Raises:
            TrustError: they do not, or something is missing or of another shape: ask again, or say that the log does not serve.
        """
        bundles = range(since // WIDTH, -(-self.size // WIDTH))
        for index in bundles:
            self._bundle(index)
        covering = [(level, index, self.node(level, index)) for level, index in tree.span(0, since)]
        # What was added counts as its leaves give it, not as a tile above them says: so the leaves are bound to the root.
        for number in bundles:
            start, end = max(since, number * WIDTH), min(self.size, (number + 1) * WIDTH)
            for level, index in tree.span(start, end):
                covering.append((level, index, self._over(self._tile(0, number), level, index)))
        if (found := tree.root_of(covering)) != root:
            raise damaged(f"the tiles of {self.size} leaves give the root {found.hex()[:16]}…, signed is {root.hex()[:16]}…")
        self._checked = since

    def leaf(self, index: int) -> bytes:
        """The bytes of a leaf that was checked; asking for another one is a bug."""
        if not self._checked <= index < self.size:
            raise RuntimeError(f"leaf {index} was not checked, only those from {self._checked} to {self.size}")
        return self._bundle(index // WIDTH)[index % WIDTH]

    def node(self, level: int, index: int) -> bytes:
        """The hash over the leaves [index·2^level, (index+1)·2^level)."""
        tile_level, within = divmod(level, _LEVELS)
        return self._over(self._tile(tile_level, (index << within) // WIDTH), within, index)

    def root(self, size: int) -> bytes:
        """The root over the first ``size`` leaves."""
        return tree.root(self.node, 0, size)

    def _over(self, hashes: list[bytes], levels: int, index: int) -> bytes:
        """The hash over 2^levels neighbouring hashes of a tile; ``index`` counts such groups over all tiles of that level."""
        start = (index << levels) % WIDTH
        hashes = hashes[start : start + (1 << levels)]
        if len(hashes) != 1 << levels:
            raise damaged(f"a tree of {self.size} leaves has no such node")
        while len(hashes) > 1:
            hashes = [proofs.node_hash(hashes[i], hashes[i + 1]) for i in range(0, len(hashes), 2)]
        return hashes[0]

    def _tile(self, level: int, index: int) -> list[bytes]:
        if (level, index) not in self._tiles:
            if level == 0 and index in self._bundles:
                self._tiles[0, index] = [proofs.leaf_hash(leaf) for leaf in self._bundles[index]]
            else:
                width, data = self._read(level, index)
                if len(data) != 32 * width:
                    raise damaged(f"a tile of {len(data)} bytes, {width} hashes have {32 * width}")
                self._tiles[level, index] = [data[i : i + 32] for i in range(0, len(data), 32)]
        return self._tiles[level, index]

    def _bundle(self, index: int) -> list[bytes]:
        if index not in self._bundles:
            width, data = self._read("entries", index)
            self._bundles[index] = unbundle(data, width)
        return self._bundles[index]

    def _read(self, level: int | Literal["entries"], index: int) -> tuple[int, bytes]:
        wide = self.size if level == "entries" else self.size >> _LEVELS * level
        width = min(WIDTH, wide - index * WIDTH)
        if width < 1:
            raise damaged(f"a tree of {self.size} leaves has no tile {level}/{index}")
        path = tile_path(level, index, width)
        if (data := self._fetch(path)) is None:
            raise damaged(f"the log does not serve {path}")
        return width, data


# --- Receipts --------------------------------------------------------------------------------------------------------------


def receipt(tiles: Tiles, index: int, note: Note) -> bytes:
    """A C2SP tlog-proof: the leaf in ``extra``, its index, its inclusion proof, and the signed checkpoint."""
    leaf, proof, head = tiles.leaf(index), tree.inclusion(tiles.node, index, tiles.size), notes.checkpoint(note.text)
    # Of the tiles above the leaves not all were checked.
    proofs.verify_inclusion(proofs.leaf_hash(leaf), index, head.size, proof, head.root)
    lines = [_PROOF, f"extra {base64.b64encode(leaf).decode()}", f"index {index}"]
    lines += [base64.b64encode(each).decode() for each in proof]
    return ("\n".join(lines) + "\n\n").encode() + note.to_bytes()


def open_receipt(raw: bytes, terms: Contract, former: Sequence[Contract] = ()) -> tuple[Leaf, int, Note]:
    """The leaf that a receipt proves to be in the log, its index, and the checkpoint's note; ``cosigned_by`` says who saw that.

    Raises:
        TrustError: malformed, not signed by the aggregator, or the leaf is not in that tree.
    """
    if len(raw) > 2 * notes.MOST_BYTES:
        raise _refused("a receipt that is too long", "malformed")
    head, gap, tail = raw.partition(b"\n\n")
    lines = head.decode("ascii", "replace").split("\n")
    if not gap or len(lines) < 3 or lines[0] != _PROOF or not lines[1].startswith("extra ") or not lines[2].startswith("index "):
        raise _refused("a receipt is a tlog-proof with its leaf in extra", "malformed")
    leaf, index = notes.from_base64(lines[1].removeprefix("extra ")), notes.decimal(lines[2].removeprefix("index "))
    note = notes.parse(tail)
    found = open_checkpoint(note, terms, former)
    proofs.verify_inclusion(proofs.leaf_hash(leaf), index, found.size, list(map(notes.from_base64, lines[3:])), found.root)
    return decode(leaf, Leaf), index, note


def with_note(raw: bytes, note: Note) -> bytes:
    """The same receipt with a note of the same checkpoint, which has more signatures."""
    return raw.partition(b"\n\n")[0] + b"\n\n" + note.to_bytes()


def damaged(why: str) -> TrustError:
    """The log's files do not fit its head: no evidence against anybody yet."""
    return _refused(why, "log-damaged", "try again; if it stays so, ask the coordinator what happened to the folder log/")


def _refused(why: str, code: str, hint: str = "keep the document: it is evidence") -> TrustError:
    return TrustError(why, hint=hint, code=code)
