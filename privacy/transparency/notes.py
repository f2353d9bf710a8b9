# SPDX-License-Identifier: Apache-2.0
"""Signed notes, checkpoints and cosignatures as C2SP specifies them (c2sp.org/signed-note, tlog-checkpoint, tlog-cosignature).

A note is text and signature lines ``— name base64(4-byte key id ‖ signature)``. Promised: ``verified`` gives only what the holders
of the keys asked for signed over exactly this text; one note has one spelling (base64 and numbers are canonical, nothing is
trimmed), so nobody can make two different files of one statement. A line of an unknown key counts for nothing; a line of a known
key that does not verify spoils the note.

Not promised: that a note is new, or that its text is true. Signatures here are Ed25519 only, also where the contract demands
ML-DSA-65 beside it: the manifest, which carries both signatures, binds the root of the log that a checkpoint shows.

An identity key signs notes too, beside the protocol's documents: these begin with "gsum/1 sig ", a checkpoint with its origin, a
cosignature with "cosignature/v1", a complaint with its title. So no text of one kind is one of another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.errors import TrustError
from privacy.identity.curve25519 import verify_signature

ED25519: Final = 1
COSIGNATURE: Final = 4
MOST_LINES: Final = 512
MOST_BYTES: Final = 128 * 1024
_DASH: Final = "— "
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_HEX8: Final = re.compile(r"[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class VerifierKey:
    """An Ed25519 key that signs notes under a name. ``type`` is ``ED25519``, or ``COSIGNATURE`` for timestamped cosignatures."""

    name: str
    key: bytes
    type: int = ED25519

    def __post_init__(self) -> None:
        if not is_name(self.name) or len(self.key) != 32 or self.type not in (ED25519, COSIGNATURE):
            raise _malformed(f"{self.name!a:.80} with a key of {len(self.key)} bytes and type {self.type} is no verifier key")

    @property
    def id(self) -> bytes:
        """The 4-byte key id: SHA-256(name ‖ newline ‖ type ‖ key), cut."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.type]) + self.key).digest()[:4]

    @property
    def text(self) -> str:
        """``name+hex(id)+base64(type ‖ key)``, as verifier keys are published."""
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(bytes([self.type]) + self.key).decode()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The verifier key in its published form. Raises TrustError when it is not exactly that."""
        name, _, rest = text.partition("+")
        stated, _, encoded = rest.partition("+")
        raw = from_base64(encoded)
        made = cls(name=name, key=raw[1:], type=raw[0] if raw else 0)
        if not _HEX8.fullmatch(stated) or made.id.hex() != stated:
            raise _malformed(f"the verifier key of {name!a:.80} states id {stated!a:.20}, its key has {made.id.hex()}")
        return made


@dataclass(frozen=True, kw_only=True)
class Line:
    """One signature line, not verified: who it says signed, with which key id, and the bytes of the signature."""

    name: str
    key_id: bytes
    signature: bytes

    def __str__(self) -> str:
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A parsed note: its text, which ends in a newline, and its lines in order. Nothing is verified yet."""

    text: str
    lines: tuple[Line, ...]

    def to_bytes(self) -> bytes:
        """The note's one spelling."""
        return (self.text + "\n" + "".join(map(str, self.lines))).encode()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The head of a log: what it is called, how many leaves it has, and the RFC 6962 root (32 bytes) over them."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text of its note; there are no extension lines."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def parse(raw: bytes) -> Note:
    """The note in ``raw``, which must be its one spelling.

    Raises:
        TrustError: longer than ``MOST_BYTES``; not UTF-8, or with a control character; no signature line, or more than
            ``MOST_LINES``; two lines of one name and key id; or any other spelling.
    """
    if len(raw) > MOST_BYTES:
        raise _malformed(f"a note of {len(raw)} bytes, at most {MOST_BYTES} are read")
    try:
        whole = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("a note that is not UTF-8") from None
    if any((character < " " and character != "\n") or character == "\x7f" for character in whole):
        raise _malformed("a note with a control character")
    text, gap, tail = whole.rpartition("\n\n")
    if not gap or not text or not tail.endswith("\n"):
        raise _malformed("a note without a text, a blank line and signature lines")
    lines = tail[:-1].split("\n")
    if len(lines) > MOST_LINES:
        raise _malformed(f"a note with {len(lines)} signatures, at most {MOST_LINES} are read")
    note = Note(text=text + "\n", lines=tuple(map(_parse_line, lines)))
    if len({(line.name, line.key_id) for line in note.lines}) != len(note.lines):
        raise _malformed("a note with two signatures of one key")
    return note


def verified(note: Note, known: Iterable[VerifierKey]) -> tuple[VerifierKey, ...]:
    """Which of the known keys signed this note, in the order of its lines; it may be none.

    **Formal guarantees**: a key is in the answer only if its holder signed exactly this text: as a note (``ED25519``), or as
    a cosignature of it with some time (``COSIGNATURE``). A line whose name and id are those of no known key changes nothing.

    Raises:
        TrustError: a line with the name and id of a known key does not verify.
    """
    by_id = {(key.name, key.id): key for key in known}
    found = []
    for line in note.lines:
        key = by_id.get((line.name, line.key_id))
        if key is not None:
            _check_line(note, line, key)
            found.append(key)
    return tuple(found)


def signed(text: str, *, name: str, seed: bytes) -> Note:
    """The note over ``text`` with one Ed25519 line.

    Args:
        text: ends in a newline and has no other control character.
        seed: the 32-byte Ed25519 seed of the key.
    """
    private = Ed25519PrivateKey.from_private_bytes(seed)
    key = VerifierKey(name=name, key=private.public_key().public_bytes_raw())
    return _whole(Note(text=text, lines=(Line(name=name, key_id=key.id, signature=private.sign(text.encode())),)))


def cosigned(text: str, *, name: str, seed: bytes, time: int) -> Note:
    """The note over a checkpoint's ``text`` with one cosignature/v1 line, made at ``time`` (Unix seconds, above 0).

    It also says that its holder saw no other log of this origin at this size: sign only what you verified and wrote down.
    """
    private = Ed25519PrivateKey.from_private_bytes(seed)
    key = VerifierKey(name=name, key=private.public_key().public_bytes_raw(), type=COSIGNATURE)
    signature = time.to_bytes(8, "big") + private.sign(_cosigned_input(text, time))
    return _whole(Note(text=text, lines=(Line(name=name, key_id=key.id, signature=signature),)))


def joined(first: Note, others: Iterable[Note]) -> Note:
    """One note with the lines of all, which must have one text. Raises TrustError when they have not."""
    lines = list(first.lines)
    for other in others:
        if other.text != first.text:
            raise _malformed("two notes of different texts are not joined")
        lines += [line for line in other.lines if line not in lines]
    return _whole(Note(text=first.text, lines=tuple(lines)))


def checkpoint(text: str) -> Checkpoint:
    """The checkpoint that a note's text is: origin, decimal size, base64 root, and no more lines.

    Raises:
        TrustError: it is anything else.
    """
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not is_name(lines[0]) or not _DECIMAL.fullmatch(lines[1]):
        raise _malformed("a checkpoint is an origin, a size and a root")
    root = from_base64(lines[2])
    if len(root) != 32:
        raise _malformed(f"a checkpoint has a root of 32 bytes, not {len(root)}")
    return Checkpoint(origin=lines[0], size=int(lines[1]), root=root)


def is_name(text: str) -> bool:
    """Whether ``text`` may name a key: printable, not empty, at most 255 characters, without space and plus."""
    return 0 < len(text) <= 255 and text.isprintable() and not any(character.isspace() or character == "+" for character in text)


def from_base64(text: str) -> bytes:
    """The bytes that ``text`` is the one standard base64 spelling of. Raises TrustError when it is none."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        raise _malformed("not base64") from None
    if base64.b64encode(raw).decode() != text:  # spare bits and paddings that decode all the same
        raise _malformed("base64 that is not canonical")
    return raw


def decimal(text: str) -> int:
    """The number that ``text`` is the one ASCII decimal spelling of, below 10^19. Raises TrustError when it is none."""
    if not _DECIMAL.fullmatch(text):
        raise _malformed(f"{text!a:.40} is not a decimal number")
    return int(text)


def _parse_line(line: str) -> Line:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not is_name(name):
        raise _malformed("a signature line is a dash, a name and base64")
    raw = from_base64(encoded)
    if len(raw) < 5:
        raise _malformed(f"a signature of {len(raw)} bytes with its key id")
    return Line(name=name, key_id=raw[:4], signature=raw[4:])


def _check_line(note: Note, line: Line, key: VerifierKey) -> None:
    text, signature = note.text.encode(), line.signature
    if key.type == COSIGNATURE:
        time = int.from_bytes(signature[:8], "big")
        if len(signature) != 72 or not 0 < time < 2**63:
            raise _malformed(f"the cosignature of {key.name} has {len(signature)} bytes and time {time}")
        text, signature = _cosigned_input(note.text, time), signature[8:]
    if len(signature) != 64:
        raise _malformed(f"the signature of {key.name} has {len(signature)} bytes, an Ed25519 signature has 64")
    verify_signature(key.key, text, signature)


def _cosigned_input(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def _whole(note: Note) -> Note:
    """The note, which reads back as itself: what is signed can be verified."""
    if parse(note.to_bytes()) != note:
        raise _malformed("a text that no note can have")
    return note


def _malformed(why: str) -> TrustError:
    return TrustError(f"malformed note: {why}", hint="its sender or the line is faulty", code="malformed")
