# SPDX-License-Identifier: Apache-2.0
"""Numbers for people. Every bound is rounded up, every remainder down; nothing is computed here but rounding."""

from __future__ import annotations

import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def up(value: float, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals, never below it: for bounds and for what is spent."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def down(value: float, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals, never above it: for what is left."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def scientific(value: float) -> str:
    """A small number as it is printed: 1e-06 gives "10⁻⁶", 8.3e-06 gives "8.3 × 10⁻⁶"."""
    mantissa, exponent = f"{value:.3e}".split("e")
    power = f"10{superscript(int(exponent))}"
    digits = mantissa.rstrip("0").rstrip(".")
    return power if digits == "1" else f"{digits} × {power}"


def superscript(number: int) -> str:
    """A whole number in raised digits."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def size(count: float) -> str:
    """A number of bytes for people, in decimal units: 15368 gives "15.4 kB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def counted(number: int, word: str) -> str:
    """A number and its word, in the plural where it needs one: "1 round", "1,200 rounds"."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def utc(seconds: int) -> str:
    """Unix seconds as "2026-01-02 03:04:05"."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def percent(rate: float, *, bound: bool = False) -> str:
    """A rate in percent, kept on one line; a bound is rounded up."""
    return f"{up(100 * rate, 1) if bound else format(100 * rate, 'g')}\u00a0%"


def plain(value: str | int | float | bool | None) -> str:
    """A parameter for people: whole numbers in groups of three, others to six digits, small ones by powers of ten."""
    if value is None or isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return scientific(value) if 0 < abs(value) < 0.001 else f"{value:.6g}"


def groups(digest: str) -> str:
    """A digest in groups of eight digits, so that two people can compare it and a line can break."""
    return " ".join(digest[start : start + 8] for start in range(0, len(digest), 8))
