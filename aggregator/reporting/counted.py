# SPDX-License-Identifier: Apache-2.0
"""Who is charged for how many rounds under which version of the contract, by the aggregator's count of uploads.

Promised: a silo's load is the rounds, void and open ones too, in which an upload of it arrived, each under its own version (where a
unit may be in several silos: in which any upload arrived); the plan's load is every round that was opened under an earlier version,
and what the version in force declares after them. Not promised: attempts whose upload never arrived; a silo's own ledger has those.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from aggregator.reporting.figures import Curve
from privacy.federation import Accepted, Member
from privacy.spending import Load, is_shared, load_of, place_of


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
    def place(self) -> int:
        """Where it stands in a load: its version, or what says that it is a basis round of it."""
        ...

    @property
    def basis(self) -> bool:
        """Whether it is a basis round."""
        ...

    @property
    def kind(self) -> str:
        """How it ended."""
        ...

    @property
    def reason(self) -> str:
        """Why it moved nothing; "" where it did."""
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
        self._shared = is_shared(versions)
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

    def _charged(self, silo: int | None) -> list[int]:
        """The place in a load of each round that this silo is charged for, in order; None: for which anybody is."""
        now = [self._next] if self._holds(self._open, silo) else []
        return [each.place for each in self._rounds if self._holds(each.participants, silo)] + now

    def _holds(self, uploads: Collection[int], silo: int | None) -> bool:
        """Whether these uploads charge this silo: its own, and any where a unit of it may be in other silos too."""
        return bool(uploads) if silo is None or self._shared else silo in uploads

    @property
    def plan(self) -> Load:
        """What the whole plan charges."""
        now = self.curve.terms
        before = [each for each in self._rounds if each.version != now.version]
        sketched = sum(each.basis for each in self._rounds)  # basis rounds are none of those that a contract declares
        left = max(0, now.training.rounds - max(0, max((each.number for each in before), default=0) - sketched))
        mine = sum(each.basis for each in self._rounds if each.version == now.version)
        planned = now.basis.attempts if now.basis is not None and self._is_basis_missing else mine
        return load_of([*(each.place for each in before), *[-now.version] * planned, *[now.version] * left])

    @property
    def _is_basis_missing(self) -> bool:
        """Whether the next round is a basis round."""
        fixed = any(not each.basis or (each.kind == "result" and not each.reason) for each in self._rounds)
        return self.curve.terms.basis is not None and not fixed

    @property
    def _next(self) -> int:
        """The place of the round that comes next, or is open."""
        return place_of(self.curve.terms.version, basis=self._is_basis_missing)

    @property
    def everyone(self) -> Load:
        """Every round in which any upload arrived: what a unit was exposed to at most, whichever silos know it."""
        return load_of(self._charged(None))

    def standing(self) -> list[tuple[int, int | None]]:
        """For each round of the silo that is charged most: its version, and how many silos stood in its sum; None without one."""
        silo = next(member.id for member, load in zip(self.members, self.loads, strict=True) if load == self.most)
        found = [
            (each.place, each.stood if each.kind == "result" else None)
            for each in self._rounds
            if self._holds(each.participants, silo)
        ]
        return [*found, *([(self._next, None)] if self._holds(self._open, silo) else [])]

    def path(self, counts: Sequence[int]) -> list[Load]:
        """What the silo that is charged most was charged for after so many rounds, and will be if the plan goes on."""
        silo = next(member.id for member, load in zip(self.members, self.loads, strict=True) if load == self.most)
        way = self._charged(silo)
        if self._is_basis_missing:  # the plan pays for several, each of which may be the last
            place = self._next
            way += [place] * (dict(self.plan)[place] - way.count(place))
        way += [self.curve.terms.version] * (max(counts, default=0) - len(way))
        return [load_of(way[:count]) for count in counts]
