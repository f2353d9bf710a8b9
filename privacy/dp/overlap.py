# SPDX-License-Identifier: Apache-2.0
"""Which runs of one silo share a unit, so that what they cost composes; and which are shown to share none.

Epsilon belongs to units. A unit that only one of two runs could draw is touched by that run alone: what the other released is, for
it, as good as public. So the most that any unit has spent is the largest sum over *parts*: runs that share a unit, directly or
through others, are in one part, and within a part everything composes.

A run is a contract. Its units are all those that any of its reservations said it may draw: a file of keyed hashes of their ids,
whose digest stands in the signed entry. What it may draw is *unknown* when one reservation names no file, when a file is missing
or was edited, when it says nothing of ids that last (rows as units have none), or when files of one run were made with another
key or for another column. An unknown run shares units with every other one.

**Formal guarantees**

- *Parts partition*: every run is in exactly one part.
- *Apart only when shown*: two runs in different parts have known units of one key and column, and no hash in common.
- *Never understated*: for every unit, all runs that could draw it are in one part. So the largest cost over the parts, each
  composed as a whole, is at least what any unit has spent, whatever the sets are.
- *More is never less*: a run whose units become unknown, or more, joins parts and never splits one.

==========================  =====================================================
edge case                   result
==========================  =====================================================
no run                      no part
all units unknown           one part: everything composes
one run unknown among many  one part, as above: it may have drawn anybody
a set without a unit        unknown: nothing is shown by an empty file
==========================  =====================================================

Not promised: that one person has one id. Two spellings, or ids that were drawn anew for an extract, are two units here; that is
why a silo must give its word that its ids last before a file says so (``silo.unit_sets``). Nor that records were divided by a rule
that looks at each unit by itself, which the same word says: in "the first thousand to one run, the rest to the next" one unit less
moves another from run to run, and neighbours differ in more than one. Nor that parts depend on no record: they do, and stay in the
silo with every figure that follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from privacy.dp.entries import Body, Plan, Reserve


@dataclass(frozen=True, kw_only=True)
class UnitSet:
    """Units that may be drawn, by keyed hashes of their ids. Two sets can be compared when their ``scope`` (key, column) is one."""

    scope: str
    marks: frozenset[bytes]

    def __repr__(self) -> str:
        return "UnitSet(…)"  # neither a hash nor a count belongs into a log


Read = Callable[[str], UnitSet | None]
"""The set in the file of this digest; None where it shows nothing."""

Runs = Mapping[str, UnitSet | None]
"""Each run's units by contract; None where they are unknown."""


def nothing_shown(digest: str) -> None:
    """A reader for those who have no files: everything composes."""


def runs_on(entries: Iterable[Body], read: Read, *, to_come: Mapping[str, str | None] | None = None) -> dict[str, UnitSet | None]:
    """The units of each run with a reservation on a ledger, and of those with one to come.

    Args:
        entries: the bodies of a verified ledger, in order.
        to_come: by contract, the digest that a next reservation would name; None where it would name none.
    """
    named: dict[str, set[str | None]] = {}
    planned: dict[str, set[str | None]] = {}
    for body in entries:
        if isinstance(body, Reserve):
            named.setdefault(body.contract, set()).add(body.units)
        elif isinstance(body, Plan) and body.units is not None:
            planned.setdefault(body.contract, set()).add(body.units)
    for contract, digest in (to_come or {}).items():
        named.setdefault(contract, set()).add(digest)
    return {
        contract: union(None if digest is None else read(digest) for digest in digests | planned.get(contract, set()))
        for contract, digests in named.items()
    }


def union(sets: Iterable[UnitSet | None]) -> UnitSet | None:
    """All units of some sets; None when one of them is unknown or empty, when their scopes differ, or when there is none."""
    found = list(sets)
    known = [each for each in found if each is not None and each.marks]
    if not known or len(known) < len(found) or len({each.scope for each in known}) > 1:
        return None
    return UnitSet(scope=known[0].scope, marks=frozenset().union(*(each.marks for each in known)))


def share_a_unit(one: UnitSet | None, other: UnitSet | None) -> bool:
    """Whether two runs may have drawn one unit; False only when their sets show that they did not."""
    if one is None or other is None or one.scope != other.scope:
        return True
    return not (one.marks and other.marks and one.marks.isdisjoint(other.marks))


def parts(runs: Runs) -> tuple[tuple[str, ...], ...]:
    """The runs in parts that share no unit, each in the order of ``runs``; see the module docstring for what is guaranteed."""
    found: list[list[str]] = []
    for contract, units in runs.items():
        touched = [part for part in found if any(share_a_unit(units, runs[each]) for each in part)]
        joined = [each for part in touched for each in part]
        found = [part for part in found if part not in touched] + [[*joined, contract]]
    place = {contract: index for index, contract in enumerate(runs)}
    ordered = (tuple(sorted(part, key=place.__getitem__)) for part in found)
    return tuple(sorted(ordered, key=lambda part: place[part[0]]))
