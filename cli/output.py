# SPDX-License-Identifier: Apache-2.0
"""Where words go: the answer on stdout, everything else on stderr.

With ``--json`` stdout carries exactly one JSON document and nothing is said on stderr. Without it, tables and facts go
to stdout, progress to stderr; both read well without colour (``NO_COLOR`` is respected by rich).
What was read elsewhere cannot move or hide a word of it (``privacy.visible``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import typer
from rich.console import Console
from rich.table import Table

from privacy.errors import ConfigError
from privacy.visible import visible


class Output:
    """One command's mouth. ``json`` is the user's ``--json``."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self.out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for people who watch; silent under ``--json``."""
        if not self.json:
            self.err.print(visible(text))

    def result(self, document: Mapping[str, object], lines: Iterable[str | Table] = ()) -> None:
        """The command's answer: the document under ``--json``, otherwise the lines and tables."""
        if self.json:
            sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
            return
        for line in lines:
            self.out.print(visible(line) if isinstance(line, str) else line)


def ask(question: str, *, yes: bool, json: bool) -> None:
    """Return if the user agrees, or said so beforehand with ``--yes``; ends the command if not.

    Raises:
        ConfigError: code "not-agreed": under ``--json`` nobody can be asked.
    """
    if yes:
        return
    if json:
        raise ConfigError(f"not agreed: {question}", hint="nobody is asked under --json: add --yes to agree", code="not-agreed")
    typer.confirm(question, abort=True, err=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table: the first column left, numbers right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*(visible(str(cell)) for cell in row))
    return made


def several(found: Iterable[tuple[str, int, float | None]]) -> Table:
    """Epsilon of whoever has more to hide than one unit: ("silos" or "records", how many, epsilon)."""
    words = {"silos": "a unit that {} silos know", "records": "a person with {} records, where the unit is a record"}
    rows = [(words[of].format(count), "no figure" if value is None else f"{value:.3f}") for of, count, value in found]
    return table("", ("epsilon of more than one unit", "epsilon"), rows)


def bar(value: float, limit: float, width: int = 24) -> str:
    """A bar of ``value`` against ``limit`` in block characters; full when the limit is reached."""
    filled = 0 if limit <= 0 else round(width * min(max(value / limit, 0.0), 1.0))
    return "█" * filled + "░" * (width - filled)


def size(count: int) -> str:
    """A byte count for people: ``15.4 kB``, decimal units as networks count."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
