# SPDX-License-Identifier: Apache-2.0
"""The files that say which units a run may draw: ``units/<digest>`` in a silo's home, beside its ledger.

One JSON line, then one HMAC-SHA256 of a unit's id a line, in hex, ascending::

    {"format":"siloquy-units/1","unit":"patient_id","key":"5f0c…","lasting":true}
    00a1…
    03f9…

The key is derived from the silo's ``selection.key`` and never leaves it; ``key`` in the first line is a check value that names
it. The file's name is the SHA-256 of its bytes, which stands in the signed ledger. ``lasting`` is this silo's word, as
``[records] lasting_ids`` of its ``silo.toml`` gave it when the file was made, that the column names one unit by one id in every
extract for ever, and that whether a unit is in an extract depends on that unit alone; a file without it shows nothing, and later
words change no earlier file.

**Formal guarantees**

- *Before the charge*: the file is on the disk when ``keep`` returns, so before any reservation that names its digest.
- *Only what it says*: a file whose bytes are not those of its name, that is missing, of another form, or without the word, is
  read as nothing; then its run composes with every other.
- *All that may be drawn*: the file names every unit it was given; a step that would draw from others is refused.
- *Nothing leaves*: files are private (0600), in a folder of their own (0700); no message has a field for them, the ledger has as
  many lines with them as without, and neither hashes nor counts are in a repr or an error.

Where the unit is a record there is no file: a line number names nothing in another file. Not promised: secrecy against whoever has
this silo's key as well: ids can then be tried.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Iterable

import msgspec

from privacy import files
from privacy.dp.overlap import Read, UnitSet
from privacy.errors import RecordsError
from silo.home import Home
from silo.learning.records import RECORD_AS_UNIT

_DERIVED = b"siloquy unit ids"
_CHECKED = b"siloquy unit ids key"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line."""

    format: str
    unit: str
    key: str
    lasting: bool


_FORMAT = "siloquy-units/1"


def keep(home: Home, ids: Iterable[str], *, unit: str, lasting: bool) -> str | None:
    """Write down which units may be drawn; the digest for the ledger, or None where the unit is a record. Safe to repeat.

    Args:
        ids: of all units that may be drawn.
        unit: the column they stand in.
        lasting: this silo's word that ids last; see the module docstring.

    Raises:
        MachineError: the disk refuses.
    """
    if unit == RECORD_AS_UNIT:
        return None
    key = hmac.digest(home.selection_key, _DERIVED, hashlib.sha256)
    head = _Head(format=_FORMAT, unit=unit, key=hmac.digest(key, _CHECKED, hashlib.sha256).hex()[:32], lasting=lasting)
    marks = sorted({hmac.digest(key, b"id\x00" + each.encode(), hashlib.sha256).hex() for each in ids})
    data = "\n".join([msgspec.json.encode(head).decode(), *marks, ""]).encode()
    digest = hashlib.sha256(data).hexdigest()
    files.make_folder(home.units_folder, mode=0o700)
    path = home.units_folder / digest
    if not path.is_file() or path.read_bytes() != data:
        files.write_atomic(path, data, mode=files.PRIVATE)
    return digest


def require_named(ids: Iterable[str], named: Iterable[str]) -> None:
    """Return if every unit that may be drawn was named in the file.

    Raises:
        RecordsError: others came in since; how many, and which, is not said.
    """
    if not set(ids) <= set(named):
        raise RecordsError(
            "units came into the records while this silo was at work, which its ledger does not name", code="records-changed",
            hint="start `silo train` again: it names them first",
        )  # fmt: skip


def read(home: Home, digest: str) -> UnitSet | None:
    """The units in the file of this digest; None when it shows nothing, for whatever reason."""
    if not _DIGEST.fullmatch(digest):
        return None
    try:
        data = (home.units_folder / digest).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    first, *lines = data.decode("ascii", errors="replace").split("\n")
    try:
        head = msgspec.json.decode(first, type=_Head)
    except (msgspec.DecodeError, RecursionError):
        return None
    *marks, end = lines or [""]
    if head.format != _FORMAT or not head.lasting or end or not marks or not all(map(_DIGEST.fullmatch, marks)):
        return None
    return UnitSet(scope=f"{head.key} {head.unit}", marks=frozenset(map(bytes.fromhex, marks)))


def reader(home: Home) -> Read:
    """``read`` for one home, each file once: what a process has read stays as it was for that process."""
    return functools.lru_cache(maxsize=None)(functools.partial(read, home))
