# SPDX-License-Identifier: Apache-2.0
"""The guardians of a draft contract: who they are, and how many of them may fail or be corrupt.

A silo that drops out takes its guardian with it, so with silos as guardians as many must be able to be away as silos may. The
numbers come from a short table (docs/spec/guardian-sum.md): five guardians of which one may be away, seven of which two may, and
for more all members, of which about a third may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from aggregator.draft import AUTO, quote
from privacy.errors import ConfigError
from privacy.federation import GUARDIANS_FROM, Contract, Guardian, Member
from privacy.identity import keys
from privacy.identity.keys import PublicMember

_OPEN = rf'(?m)^(corrupt_guardians[ \t]*=[ \t]*)"{AUTO}"'


def of_members(silos: int, *, dropouts: int, colluders: int) -> tuple[int, int]:
    """(H, T) when silos are the guardians: the fewest guardians of the table of which ``dropouts`` may be away.

    Raises:
        ConfigError: so many may not be away among so many silos.
    """
    for guardians, corrupt in ((5, 2), (7, 2), (silos, _third(silos, colluders))):
        if guardians <= silos and corrupt >= colluders and guardians - _quorum(guardians, corrupt) >= dropouts:
            return guardians, corrupt
    raise ConfigError(
        f"{dropouts} of {silos} silos may not be away while they are the guardians too, with {colluders} colluders",
        hint="allow fewer, add silos, or let others be the guardians: `aggregator guardian`", code="contract",
    )  # fmt: skip


def filled(text: str, corrupt: int) -> str:
    """The draft with the open place for T filled in."""
    return re.sub(_OPEN, lambda found: f"{found[1]}{corrupt}", text)


def completed(text: str, terms: Contract) -> str:
    """The draft with its guardians: members where none are named, and T by the table where it is open. As it is in consent mode.

    Args:
        terms: the draft's values.

    Raises:
        ConfigError: the members cannot be the guardians for so many drop-outs.
    """
    if not terms.shared:
        return filled(text, 0)
    if terms.guardian:
        return filled(text, _third(len(terms.guardian), terms.privacy.colluders))
    guardians, corrupt = of_members(terms.silos, dropouts=terms.sum.dropouts, colluders=terms.privacy.colluders)
    tables = "".join(_table(_of_member(member)) for member in terms.member[:guardians])
    return filled(text.rstrip("\n") + "\n" + tables, corrupt)


def introduced(public: PublicMember, terms: Contract, former: Mapping[str, int] | None = None) -> tuple[Guardian, str]:
    """The guardian that an ``identity.pub`` introduces, with the next free id, and its table; an empty one when it is there.

    Args:
        former: the ids of guardians of earlier versions, by name: they are kept, and given to nobody else.

    Raises:
        ConfigError: its name or key stands in the draft as another's, or the draft has no guardians.
    """
    if not terms.shared:
        raise ConfigError("this draft has no guardians", hint='write protocol = "shares" in [sum]', code="contract")
    who, ever = public.under(terms.signatures), dict(former or {})
    ids = (*ever.values(), *(each.id for each in terms.guardian))
    made = Guardian(
        id=ever.get(public.name, max(ids, default=GUARDIANS_FROM) + 1), name=public.name,
        organisation=public.organisation, sign_key=who.sign_key.hex(), ml_dsa_key=(who.ml_dsa_key or b"").hex(),
    )  # fmt: skip
    for each in (terms.aggregator, *terms.guardian, *terms.member):
        same = (each.name, each.verify_key) == (made.name, made.verify_key)
        if same and isinstance(each, Guardian):
            return each, ""
        if not (same and isinstance(each, Member)) and (each.name == made.name or each.sign_key == made.sign_key):
            raise ConfigError(
                f"the draft has another party called {each.name} with key {each.sign_key[:16]}…",
                hint="every party has its own name and its own key; a silo is a guardian under its own", code="duplicate-member",
            )  # fmt: skip
    return made, _table(made)


def _of_member(member: Member) -> Guardian:
    return Guardian(
        id=GUARDIANS_FROM + member.id, name=member.name, organisation=member.organisation, sign_key=member.sign_key,
        ml_dsa_key=member.ml_dsa_key,
    )  # fmt: skip


def _table(guardian: Guardian) -> str:
    return "\n".join(_lines(guardian)) + "\n"


def _lines(guardian: Guardian) -> Iterator[str]:
    yield from ("", "[[guardian]]", f"# fingerprint {keys.fingerprint(keys.stated(guardian))}", f"id = {guardian.id}")
    yield f"name = {quote(guardian.name)}"
    yield f"organisation = {quote(guardian.organisation)}"
    yield f"sign_key = {quote(guardian.sign_key)}"
    if guardian.ml_dsa_key:
        yield f"ml_dsa_key = {quote(guardian.ml_dsa_key)}"


def _third(guardians: int, colluders: int) -> int:
    return max(-(-guardians // 3) - 1, colluders)


def _quorum(guardians: int, corrupt: int) -> int:
    return (guardians + corrupt) // 2 + 1
