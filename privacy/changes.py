# SPDX-License-Identifier: Apache-2.0
"""What is another in a version of the contract than in the one in effect before it, in words for people who decide to sign it.

Promised: every party that comes, goes or has another key is named, with the new key's fingerprint, and every value that may
change in a chain (privacy.chain). Not promised: what it means for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from privacy.federation import Contract, Guardian, Member
from privacy.identity import keys


def changes(before: Contract, after: Contract) -> tuple[str, ...]:
    """What is another in ``after``, for people: one sentence for each party and each value."""
    return (*_parties_in_words(before, after), *_values_in_words(before, after))


def _parties_in_words(before: Contract, after: Contract) -> Iterator[str]:
    old, new = _parties(before), _parties(after)
    for number in sorted(old.keys() | new.keys()):
        what = "silo" if number < 2**15 else "guardian"
        if number not in new:
            yield f"{what} {number}, {old[number].name} ({old[number].organisation}) leaves"
        elif number not in old:
            yield f"{what} {number}, {new[number].name} ({new[number].organisation}) joins: {_shown(new[number])}"
        elif new[number].verify_key != old[number].verify_key:
            yield f"{what} {number}, {new[number].name} ({new[number].organisation}) has a new key: {_shown(new[number])}"


def _values_in_words(before: Contract, after: Contract) -> Iterator[str]:
    for table in ("training", "privacy", "sum", "basis"):
        old, new = getattr(before, table), getattr(after, table)
        if old is None or new is None:  # adapter.basis stays, so both are
            continue
        for field in old.__struct_fields__:
            if getattr(old, field) != getattr(new, field):
                yield f"{table}.{field}: {getattr(old, field)} becomes {getattr(new, field)}"
    for field in ("expires", "signatures"):
        if getattr(before, field) != getattr(after, field):
            yield f"{field}: {getattr(before, field)} becomes {getattr(after, field)}"
    if before.aggregator != after.aggregator:
        yield f"aggregator {after.aggregator.name} has other keys: {_shown(after.aggregator, after.aggregator.seal_key)}"


def _parties(terms: Contract) -> dict[int, Member | Guardian]:
    found: dict[int, Member | Guardian] = {member.id: member for member in terms.member}
    return found | {guardian.id: guardian for guardian in terms.guardian}


def _shown(party: keys.Party, seal_key: str = "") -> str:
    return keys.fingerprint(keys.stated(party, bytes.fromhex(seal_key) or None))
