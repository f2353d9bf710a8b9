# SPDX-License-Identifier: Apache-2.0
"""A silo's records, grouped into privacy units.

Promised: what is kept of a unit is a function of that unit's own records and a key that never leaves the silo, whatever
else the file holds and in whatever order. Nothing is deduplicated, counted or fitted across units. Every
record that cannot be used is refused with its file and line, and none is ever quoted: errors end up in logs.
Not promised: that two spellings of one person are one unit. The unit column must say so.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from privacy.errors import RecordsError
from privacy.federation import Privacy, Task
from privacy.rows import Row, read_rows, refuse

RECORD_AS_UNIT = "record"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One or two texts and the class (a position in ``task.labels``).

    Of a causal language model: the text; prompt and response; or role, content, role, content, … of a conversation. Its class is 0.
    """

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True, kw_only=True)
class Unit:
    """All records that stand or fall together: one patient, one customer, or one record."""

    id: str
    records: tuple[Record, ...]


def load(path: Path, task: Task, privacy: Privacy, *, selection_key: bytes) -> tuple[Unit, ...]:
    """The units of ``path``, in the order in which they first appear.

    The columns are ``text``, ``text_pair`` where the task has one, and ``label``; for a causal language model ``text``, ``prompt``
    and ``response``, or ``messages``, as ``task.format`` says; and the one that ``privacy.unit`` names. With the
    unit ``record`` each row is a unit, named by its place. Others are passed over.

    Formal guarantees:
        - A unit's records depend on its own rows and ``selection_key`` (32 secret bytes) alone.
        - At most ``max_records_per_unit`` are kept: those with the smallest HMAC-SHA256, in that order.
        - The order of the rows, and the other units, change neither which are kept nor their order.

    Edge cases:
        - Equal records of one unit count as many times as they stand there.
        - A row without a unit value is refused, never given a unit of its own.

    Raises:
        RecordsError: a row, or the file, cannot be used; see the module docstring.
        ValueError: ``selection_key`` is not 32 bytes.
    """
    if len(selection_key) != 32:
        raise ValueError(f"the selection key must be 32 bytes, found {len(selection_key)}")
    units: dict[str, list[Record]] = {}
    for line, row in read_rows(path):
        unit = _unit_of(path, line, row, privacy.unit)
        units.setdefault(unit, []).append(_record(path, line, row, task))
    return tuple(
        Unit(id=unit, records=_kept(records, privacy.max_records_per_unit, selection_key)) for unit, records in units.items()
    )


def check_enough(units: Sequence[Unit], privacy: Privacy) -> None:
    """Returns when ``units`` are at least one expected batch of the contract, q·units, and at most its public ``units``.

    Raises:
        RecordsError: they are fewer; or more, which the message says without their number: δ ≤ 1/(10 · all units) rests on
            the contract's figure being an upper bound.
    """
    if len(units) > privacy.units:
        raise RecordsError(
            f"the records do not fit the contract: it is for at most {privacy.units} privacy units per silo",
            hint="agree on a larger `units` figure in a new version of the contract",
            code="too-many-units",
            expected=privacy.units,
        )
    batch = math.ceil(privacy.sampling_rate * privacy.units)
    if len(units) < batch:
        raise RecordsError(
            f"{len(units)} privacy units, one batch of this contract expects {batch} "
            f"(sampling rate {privacy.sampling_rate:g} of {privacy.units} units)",
            hint="add records, or agree on a smaller sampling rate or number of units in the contract",
            found=len(units),
            expected=batch,
        )


def _kept(records: Sequence[Record], most: int, key: bytes) -> tuple[Record, ...]:
    return tuple(sorted(records, key=lambda record: hmac.digest(key, _canonical(record), hashlib.sha256))[:most])


def _canonical(record: Record) -> bytes:
    """An injective encoding: every text with its length in front, then the class."""
    texts = [text.encode() for text in record.texts]
    return b"".join(len(text).to_bytes(8, "big") + text for text in texts) + record.label.to_bytes(8, "big")


def _record(path: Path, line: int, row: Row, task: Task) -> Record:
    if task.is_causal:
        return Record(texts=_completion(path, line, row, task.format), label=0)
    fields = ("text", "text_pair") if task.text_pair else ("text",)
    return Record(texts=tuple(text_of(path, line, row, field) for field in fields), label=_label(path, line, row, task.labels))


def _completion(path: Path, line: int, row: Row, form: str) -> tuple[str, ...]:
    """The texts of one record of a causal language model. Columns of another form are refused: a response must not go unread."""
    fields = {"text": ("text",), "prompt-response": ("prompt", "response"), "messages": ("messages",)}[form]
    other = {"prompt", "response", "messages"} & {name for name, value in row.items() if value is not None} - set(fields)
    if other:
        refuse(path, line, f'the field "{min(other)}" does not go with format = "{form}"', "write records as the contract says")
    if form == "messages":
        return _messages(path, line, _field(path, line, row, "messages"))
    return tuple(text_of(path, line, row, field) for field in fields)


def _messages(path: Path, line: int, found: object) -> tuple[str, ...]:
    """role, content, role, content, … of a conversation that ends with the assistant's answer."""
    hint = 'write "messages" as a list of {"role": "...", "content": "..."} of which the last is the assistant\'s'
    if not isinstance(found, list) or len(found) < 2:
        refuse(path, line, '"messages" is no list of two or more messages', hint)
    flat: list[str] = []
    for place, message in enumerate(found, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            refuse(path, line, f"message {place} is not of a role and a content alone", hint)
        flat += [text_of(path, line, message, field) for field in ("role", "content")]
    if flat[-2] != "assistant":
        refuse(path, line, "the last message is not the assistant's: there is no response to learn", hint)
    return tuple(flat)


def _field(path: Path, line: int, row: Row, field: str) -> object:
    value = row.get(field)
    if value is None:
        state = "is missing" if field not in row else "is null"
        refuse(path, line, f'the field "{field}" {state}, a value was expected', f'give every row a "{field}"')
    return value


def text_of(path: Path, line: int, row: Row, field: str) -> str:
    """The text of a field. Raises RecordsError where there is none, or it is empty or cannot be encoded."""
    value = _field(path, line, row, field)
    if not isinstance(value, str):
        refuse(path, line, f'"{field}" is {type(value).__name__}, expected text', f'write "{field}" as text')
    if not value.strip():
        refuse(path, line, f'"{field}" is empty, expected text', "drop the row or fill it in")
    _check_unicode(path, line, value, field)
    return value


def _label(path: Path, line: int, row: Row, labels: tuple[str, ...]) -> int:
    value = _field(path, line, row, "label")
    if not isinstance(value, str | int) or isinstance(value, bool):
        refuse(path, line, f'"label" is {type(value).__name__}, expected text or an integer', "write labels as the contract does")
    if str(value) not in labels:
        shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        refuse(
            path,
            line,
            f"the label is none of the contract's {len(labels)}: {shown}",
            "correct the row; a new label needs a new version of the contract",
        )
    return labels.index(str(value))


def _unit_of(path: Path, line: int, row: Row, column: str) -> str:
    if column == RECORD_AS_UNIT:
        return str(line)
    value = _field(path, line, row, column)
    if not isinstance(value, str | int) or isinstance(value, bool):
        refuse(
            path,
            line,
            f'the unit "{column}" is {type(value).__name__}, expected text or an integer',
            "write one kind of id throughout",
        )
    if not str(value).strip():
        refuse(path, line, f'the unit "{column}" is empty', "give every row the id of its unit, or drop the row")
    _check_unicode(path, line, str(value), column)
    return str(value)


def _check_unicode(path: Path, line: int, value: str, field: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(path, line, f'"{field}" holds half a character (a lone surrogate)', "mend the escape sequences of the row")
