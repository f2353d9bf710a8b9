# SPDX-License-Identifier: Apache-2.0
"""Records for a simulation, dealt to its silos, and what a contract over them must say.

The figures for units and labels come from the records themselves. Only a simulator may do that, since it holds them all; the
report of a simulation says so. Members of a real federation agree on both beforehand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator.simulation import pairs, split
from privacy import rows
from privacy.errors import RecordsError

_RECORDS_OF_A_COLUMN = 8
_HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Records by silo, the held-out ones, and what a contract must say about them.

    ``left_out`` counts the silos' records above ``max_records_per_unit``; the silos pass them over.
    """

    shares: Sequence[Sequence[Mapping[str, object]]]
    held_out: Sequence[Mapping[str, object]]
    labels: tuple[str, ...]
    text_pair: bool
    unit: str
    max_records_per_unit: int
    units: int
    left_out: int


def deal(
    data: Path | None,
    *,
    silos: int,
    silo_column: str | None,
    unit: str | None,
    max_records_per_unit: int | None,
    held_out: Path | None = None,
) -> Dealt:
    """Records dealt to silos. ``data`` None takes the built-in pairs, whose unit is a file.

    A fifth of the units is held out, or none where ``held_out`` names a file of other records to be held out.

    Raises:
        SiloquyError: as ``privacy.rows.read_rows`` and ``aggregator.simulation.split.deal``.
        RecordsError: the file of held-out records is empty, or has other labels.
    """
    if data is None:
        found: list[Mapping[str, object]] = [
            {"text": pair.text, "text_pair": pair.text_pair, "label": pair.label, "file": pair.file} for pair in pairs.collect()
        ]
        labels: tuple[str, ...] = pairs.LABELS
        column, most = "file", max_records_per_unit or pairs.MAX_PER_FILE
    else:
        found = [row for _, row in rows.read_rows(data)]
        labels = tuple(sorted({str(row.get("label", "")) for row in found}))
        column = unit or "record"
        most = max_records_per_unit or (1 if column == "record" else _RECORDS_OF_A_COLUMN)
    share = _HELD_OUT if held_out is None else 0.0
    shares, away = split.deal(found, silos=silos, silo_column=silo_column, unit=column, held_out=share)
    per_unit = [
        [1] * len(share) if column == "record" else list(Counter(str(row[column]) for row in share).values()) for share in shares
    ]
    return Dealt(
        shares=shares,
        held_out=away if held_out is None else _apart(held_out, labels),
        labels=labels,
        text_pair="text_pair" in found[0],
        unit=column,
        max_records_per_unit=most,
        units=rounded_up(max(len(counts) for counts in per_unit)),
        left_out=sum(max(0, count - most) for counts in per_unit for count in counts),
    )


def _apart(path: Path, labels: Sequence[str]) -> Sequence[Mapping[str, object]]:
    """The held-out records of a file of their own, whose labels are refused now and not after the training."""
    found = [row for _, row in rows.read_rows(path)]
    unknown = sorted({str(row.get("label", "")) for row in found} - set(labels))
    if unknown or not found:
        raise RecordsError(
            f"{path.name}: {len(found)} records, {len(unknown)} labels that the training records do not have",
            hint="hold out records of the same task, with text and label",
            code="held-out",
        )
    return found


def rounded_up(count: int) -> int:
    """The next number of one significant digit: an upper bound, as members of a real federation agree on one without counts."""
    scale = int("1" + "0" * (len(str(count)) - 1))
    return -(-count // scale) * scale


def default_delta(units: int, silos: int) -> float:
    """1/(10 · units of the whole federation), rounded down to one significant digit, at most 1e-5."""
    bound = min(1e-5, 1 / (10 * units * silos))
    digit = 10.0 ** math.floor(math.log10(bound))
    return min(math.floor(bound / digit * (1 + 1e-12)) * digit, bound)
