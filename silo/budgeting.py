# SPDX-License-Identifier: Apache-2.0
"""What ``silo budget`` says beside the figure: every run on the ledger, which share units, and what more rounds would cost.

All of it is local. Which runs share units, and every figure that follows from it, depends on this silo's records: nobody else is
told, and there is no message with a field for it.

**Formal guarantees**

- *All runs count*: every contract with an attempt on the ledger is listed, whatever it was for: a first try, another learning rate,
  a comparison alone. Those on the same units as this contract, as far as is known, are counted: unknown units are the same units.
- *Refused is refused*: the forecast says of a number of rounds that it is refused exactly if the plan has fewer left, or the
  certified epsilon after them is above the limit. A plan without differential privacy has no limit to pass.

Not promised: how many runs others made on the same people, or that all rounds ahead give a result: a void one is charged too, and
is one less that is left.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from privacy.dp import groups, unprotected
from privacy.dp.budget import Account
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History
from privacy.federation import Contract

MOST_ROWS = 8
"""Rows of a forecast, at equal distances."""


def runs(account: Account, history: History) -> dict[str, Any]:
    """Every run that is charged, the parts that share no unit, and how many others are on this contract's units."""
    parts = account.parts()
    place = {each: number for number, part in enumerate(parts, start=1) for each in part.contracts}
    whole = {part.contracts[0]: part.cost.epsilon for part in parts if len(part.contracts) == 1}
    alone = {each: whole[each] if each in whole else account.cost_of(each).epsilon for each in place}
    return {
        "runs": [{**_run(history, each), "epsilon": unprotected.figure(alone[each]), "part": place[each]} for each in place],
        "parts": [{"runs": len(part.contracts), "epsilon": unprotected.figure(part.cost.epsilon)} for part in parts],
        "earlier_runs": len(account.same_units()),
    }


def several(account: Account, terms: Contract) -> list[dict[str, Any]]:
    """Epsilon of a unit in two silos where the contract assumes one, and of a person with several records where each is a unit.

    Of everything on this ledger; nothing while it holds nothing, or a run without noise.
    """
    if not 0 < account.spent().epsilon < math.inf:
        return []
    plain, rows = terms.privacy, []
    if plain.max_silos_per_unit < groups.SILOS:
        alone = sum(len(part.contracts) for part in account.parts()) == 1  # of another run nobody says here that it was local
        epsilon = account.exposed(silos=groups.SILOS, together=not (alone and terms.is_local))
        rows.append({"of": "silos", "count": groups.SILOS, "epsilon": epsilon})
    for count in groups.RECORDS if plain.unit == "record" else ():
        rows.append({"of": "records", "count": count, "epsilon": account.exposed(records=count)})
    return rows


def _run(history: History, contract: str) -> dict[str, Any]:
    declared = history.plan(contract)
    return {
        "contract": contract,
        "run": "" if declared is None else declared.run,
        "attempts": sum(isinstance(body, Reserve) and body.contract == contract for body in history.entries),
    }


def in_words(account: Account) -> list[str]:
    """For whoever is asked to agree to a contract: what was run on the same units before; nothing where nothing was."""
    earlier = len(account.same_units())
    if not earlier:
        return []
    return [
        f"on this silo's ledger: {earlier} earlier run{'s' if earlier > 1 else ''} on the same units, as far as is shown, "
        f"for epsilon {unprotected.in_words(account.spent().epsilon, '.3g')}; this plan composes with them. Others are not told: "
        "say it to them, if the plan was chosen after what was seen"
    ]


def room_in_words(epsilon: float | None, limit: float) -> str:
    """Whether the plans of all of a silo's homes on the same records fit its limit; ``epsilon``: what they come to together."""
    fits = epsilon is not None and epsilon <= limit
    return (
        f"with all that the plans of this silo's homes on these records may still charge: epsilon "
        f"{unprotected.in_words(epsilon, '.4g')} of {limit:g}{'' if fits else ': there is no room for all of them'}"
    )


def forecast(account: Account, rounds: int, limit: float) -> dict[str, Any]:
    """Epsilon after up to so many more rounds, in at most ``MOST_ROWS`` rows, and the first number of them that is refused."""
    ahead = sorted({math.ceil(rounds * row / MOST_ROWS) for row in range(1, MOST_ROWS + 1)} - {0})
    rows = account.forecast(ahead)
    refused = [_refused(account, more, epsilon, limit) for more, epsilon in rows]
    first = next((more for (more, _), why in zip(rows, refused, strict=True) if why), None)
    if first is not None:
        admitted = max((more for (more, _), why in zip(rows, refused, strict=True) if not why), default=0)
        first = _first_refused(account, admitted, first, limit)
    return {
        "forecast": [
            {"rounds": more, "epsilon": unprotected.figure(epsilon), "refused": why}
            for (more, epsilon), why in zip(rows, refused, strict=True)
        ],
        "refused_from": first,
    }


def _refused(account: Account, rounds: int, epsilon: float, limit: float) -> Literal["plan", "limit"] | None:
    if rounds > account.attempts_left:
        return "plan"
    return "limit" if account.is_limited and not epsilon <= limit else None


def _first_refused(account: Account, admitted: int, refused: int, limit: float) -> int:
    """The smallest number that is refused, between one that is not and one that is."""
    while refused - admitted > 1:
        middle = (admitted + refused) // 2
        if _refused(account, middle, account.forecast([middle])[0][1], limit):
            refused = middle
        else:
            admitted = middle
    return refused
