# SPDX-License-Identifier: Apache-2.0
"""One table of records dealt to the silos of a simulated federation, with some units held out.

A privacy unit goes whole to one silo or is whole among the held-out: no unit is on both sides of the accuracy figure. Who
goes where follows from the SHA-256 of the unit's name under a public constant, so the same table is dealt the same way
everywhere. It is no secret and protects nothing; real silos never share a table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from privacy.errors import ConfigError, RecordsError

SALT = b"siloquy simulate: who goes where\0"
FEWEST_SILOS = 3

Row = Mapping[str, object]


def deal(
    rows: Sequence[Row], *, silos: int, silo_column: str | None, unit: str, held_out: float = 0.2
) -> tuple[list[list[Row]], list[Row]]:
    """(one list of rows per silo, the held-out rows), each in the order of ``rows``.

    Without ``silo_column`` the units are dealt out in turn, so that silos differ by one unit at most. With it, every
    distinct value is a silo (in natural order; ``silos`` is then not used), and each silo holds out its own share.
    With the unit ``record`` every row is a unit.

    Args:
        held_out: the share of the units, from 0 and below 1; above 0 at least one unit of each silo is held out.

    Raises:
        ConfigError: fewer than three silos, or ``held_out`` out of range.
        RecordsError: a row without unit or silo, a unit in two silos, or a silo that is left without a unit.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out = {held_out:g}, expected from 0 and below 1", hint="hold out 0.2 of the units")
    units = _units(rows, unit)
    groups = _dealt(units, silos) if silo_column is None else _by_column(rows, units, silo_column)
    if len(groups) < FEWEST_SILOS:
        raise ConfigError(
            f"{len(groups)} silos, at least {FEWEST_SILOS} are needed: a sum of fewer hides nobody",
            hint="name a column with three or more values, or use --silos 3",
            silos=len(groups),
        )
    kept, away = _hold_out(groups, held_out)
    return [_rows_of(rows, units, names) for names in kept], _rows_of(rows, units, away)


def _units(rows: Sequence[Row], column: str) -> dict[str, list[int]]:
    """Row numbers by unit; units in the order of their hash."""
    units: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        units.setdefault(str(place) if column == "record" else _value(row, place, column), []).append(place)
    return dict(sorted(units.items(), key=lambda item: hashlib.sha256(SALT + item[0].encode(errors="surrogatepass")).digest()))


def _value(row: Row, place: int, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise RecordsError(
            f'record {place + 1}: no usable "{column}", expected text or an integer',
            hint=f'give every row a "{column}"',
            record=place + 1,
        )
    return str(value)


def _dealt(units: Mapping[str, object], silos: int) -> list[list[str]]:
    names = list(units)
    return [names[place::silos] for place in range(max(silos, 0))]


def _by_column(rows: Sequence[Row], units: Mapping[str, list[int]], column: str) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, places in units.items():
        silos = {_value(rows[place], place, column) for place in places}
        if len(silos) > 1:
            raise RecordsError(
                f'one unit stands in {len(silos)} silos of "{column}" (first at record {places[0] + 1}), expected one',
                hint="if they are different people, put the silo's name in front of their ids",
                record=places[0] + 1,
            )
        groups.setdefault(silos.pop(), []).append(name)
    return [groups[silo] for silo in sorted(groups, key=_natural)]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name) if part]


def _hold_out(groups: Sequence[Sequence[str]], share: float) -> tuple[list[list[str]], list[str]]:
    kept: list[list[str]] = []
    away: list[str] = []
    for number, names in enumerate(groups, start=1):
        cut = max(1, round(share * len(names))) if share else 0
        if cut >= len(names):
            raise RecordsError(
                f"silo {number} has {len(names)} units, at least one to train on and one to hold out are needed",
                hint="use fewer silos or more records",
                silo=number,
                units=len(names),
            )
        away.extend(names[:cut])
        kept.append(list(names[cut:]))
    return kept, away


def _rows_of(rows: Sequence[Row], units: Mapping[str, list[int]], names: Sequence[str]) -> list[Row]:
    return [rows[place] for place in sorted(place for name in names for place in units[name])]
