# SPDX-License-Identifier: Apache-2.0
"""``silo budget`` in words: the figure, every run that is in it, and more rounds as a table with bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from privacy.dp.unprotected import in_words

if TYPE_CHECKING:
    from rich.table import Table

_WHY = {None: "", "plan": "refused: the plan is used up", "limit": "refused: above the limit"}


def words(facts: Mapping[str, Any]) -> list[str | Table]:
    """The lines and tables of ``silo budget``."""
    if facts["epsilon"] is None:
        charged = f"{facts['steps']} steps of this contract charged; nothing makes it finite again"
        return [f"epsilon {in_words(None)}", charged, *_runs(facts)]
    return [*_figure(facts), *_several(facts), *_runs(facts), *_forecast(facts)]


def _figure(facts: Mapping[str, Any]) -> list[str]:
    from cli.output import bar

    by_pld = "not computed" if facts["epsilon_pld"] is None else f"{facts['epsilon_pld']:.4g}"
    picture = bar(facts["epsilon"], facts["limit"])
    found = [
        f"epsilon {facts['epsilon']:.4g} of {facts['limit']:g} at delta {facts['delta']:g}   {picture}",
        f"by PLD {by_pld}, by RDP {facts['epsilon_rdp']:.4g}; {facts['steps']} private steps charged",
    ]
    if "epsilon_stood" in facts:
        found.append(f"with the noise that stood in each sum {facts['epsilon_stood']:.4g}; the charge counts the fewest silos")
    if "epsilon_with_plans" in facts:
        from silo.budgeting import room_in_words

        found.append(room_in_words(facts["epsilon_with_plans"], facts["limit"]))
    return found


def _several(facts: Mapping[str, Any]) -> list[str | Table]:
    from cli.output import several

    listed = [(each["of"], each["count"], each["epsilon"]) for each in facts.get("several", ())]
    return [several(listed)] if listed else []


def _runs(facts: Mapping[str, Any]) -> list[str | Table]:
    """Every run on the ledger where there are several: each alone, and which of them compose."""
    from cli.output import table

    if len(facts["runs"]) < 2:
        return []
    listed = [
        (each["run"] or each["contract"][:12], each["attempts"], in_words(each["epsilon"]), each["part"]) for each in facts["runs"]
    ]
    parts = [
        f"part {number} is {each['runs']} run{'s together, by the filter' if each['runs'] > 1 else ''}: "
        f"epsilon {in_words(each['epsilon'])}"
        for number, each in enumerate(facts["parts"], start=1)
    ]
    others = facts["earlier_runs"]
    beside = f"{others} other run{'' if others == 1 else 's'} on this contract's units, as far as is shown; parts share no unit"
    return [table("runs", ("run", "attempts", "epsilon alone", "part"), listed), *parts, beside]


def _forecast(facts: Mapping[str, Any]) -> list[str | Table]:
    from cli.output import bar, table

    if not facts["forecast"]:
        return []
    rows = [
        (row["rounds"], in_words(row["epsilon"]), "" if row["epsilon"] is None else bar(row["epsilon"], facts["limit"]),
         _WHY[row["refused"]])
        for row in facts["forecast"]
    ]  # fmt: skip
    left = f"{facts['rounds_left']} rounds of the plan are left"
    last = [left if facts["refused_from"] is None else f"{left}; {facts['refused_from']} more would be refused"]
    return [table("forecast", ("more rounds", "epsilon", f"of {facts['limit']:g}", ""), rows), *last]
