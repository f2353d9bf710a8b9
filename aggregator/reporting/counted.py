# SPDX-License-Identifier: Apache-2.0
"""Who is charged for how many rounds under which version of the contract, by the aggregator's count of uploads.

Promised: a silo's load is the rounds, void and open ones too, in which an upload of it arrived, each under its own version; the
plan's load is every round that was opened under an earlier version, and what the version in force declares after them. Not
promised: attempts whose upload never arrived; a silo's own ledger has those.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from aggregator.reporting.figures import Curve
from privacy.federation import Accepted, Member
from privacy.spending import Load, load_of


class Held(Protocol):
    """What is needed of a round."""

    @property
    def number(self) -> int:
        """Its number."""
        ...

    @property
    def version(self) -> int:
        """The version under which it was opened."""
        ...

    @property
    def kind(self) -> str:
        """How it ended."""
        ...

    @property
    def participants(self) -> tuple[int, ...]:
        """Silos whose upload arrived."""
        ...

    @property
    def stood(self) -> int | None:
        """How many are in its sum."""
        ...


class Counted:
    """See the module docstring.

    Args:
        curve: gives the figures.
        versions: those in effect, ascending.
        still_open: silos whose upload to a round that has not ended is here; it is under the version in force.
    """

    def __init__(
        self, curve: Curve, versions: Sequence[Accepted], rounds: Sequence[Held], still_open: Collection[int]
    ) -> None:  # fmt: skip
        self.curve, self._versions, self._rounds, self._open = curve, versions, rounds, still_open
        self.members = self._members()
        self.loads = tuple(self.load(member.id) for member in self.members)
        self.most = curve.most(self.loads)
        """The load of the silo that is charged most, against the insiders."""

    def _members(self) -> tuple[Member, ...]:
        """Everybody who is or was a member, as the last version with it states it; by id."""
        found = {member.id: member for each in self._versions for member in each.terms.member}
        return tuple(found[number] for number in sorted(found))

    def versions_of(self, silo: int) -> tuple[int, ...]:
        """The versions in effect in which this silo is a member."""
        return tuple(
            each.terms.version for each in self._versions if any(member.id == silo for member in each.terms.member)
        )

    def load(self, silo: int) -> Load:
        """What this silo is charged for."""
        return load_of(self._charged(silo))

    def _charged(self, silo: int) -> list[int]:
        """The version of each round that this silo is charged for, in order."""
        now = [self.curve.terms.version] if silo in self._open else []
        return [each.version for each in self._rounds if silo in each.participants] + now

    @property
    def plan(self) -> Load:
        """What the whole plan charges."""
        now = self.curve.terms
        before = [each for each in self._rounds if each.version != now.version]
        left = max(0, now.training.rounds - max((each.number for each in before), default=0))
        return (*load_of(each.version for each in before), (now.version, left))

    def standing(self) -> list[tuple[int, int | None]]:
        """For each round of the silo that is charged most: its version, and how many silos stood in its sum; None without one."""
        silo = next(member.id for member, load in zip(self.members, self.loads, strict=True) if load == self.most)
        found = [
            (each.version, each.stood if each.kind == "result" else None) for each in self._rounds if silo in each.participants
        ]
        return [*found, *([(self.curve.terms.version, None)] if silo in self._open else [])]

    def path(self, counts: Sequence[int]) -> list[Load]:
        """What the silo that is charged most was charged for after so many rounds, and will be if the plan goes on."""
        silo = next(member.id for member, load in zip(self.members, self.loads, strict=True) if load == self.most)
        way = self._charged(silo)
        way += [self.curve.terms.version] * (max(counts, default=0) - len(way))
        return [load_of(way[:count]) for count in counts]
