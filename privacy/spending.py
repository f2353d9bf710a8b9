# SPDX-License-Identifier: Apache-2.0
"""What a silo's rounds cost that stand under one or several versions of the contract, each with the terms of its own version.

**Formal guarantees**

- *Own terms*: each round is charged with the mechanism of the version under which it was opened, as the named adversary of that
  version faces it.
- *Basis rounds*: they are charged with the mechanism of basis rounds; with the training rounds of the same version they were
  fixed in advance (``federation.whole_plan``), so both accountants compose them.
- *Adaptive*: with rounds under more than one version the later terms may have been chosen after the earlier results were seen, so
  the RDP filter composes them at one order that was fixed before the first round: it follows from the first version's limits alone.
- *Whoever has most*: of several silos the largest epsilon counts, for each adversary by itself.
- *Several silos*: where a unit may be in several, every round counts in which any upload arrived (``is_shared``), each at the
  exposure of a unit that all m of its silos brought in. Whichever m silos know it, it was exposed to no more.

=====================================  ===========================================================
edge case                              behaviour
=====================================  ===========================================================
no round                               epsilon 0
rounds under one version               ``accounting.certify``: the smaller of PLD and RDP
a version without differential privacy  infinity; no accountant is asked
=====================================  ===========================================================

Not here: a silo's own ledger, which charges every attempt and has limits of its own (privacy.dp.budget).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from privacy import basis_round, federation
from privacy.dp import unprotected
from privacy.dp.accounting import Certificate
from privacy.dp.budget import Limits
from privacy.dp.mechanism import Noised
from privacy.federation import Accepted, Contract

Adversary = Literal["outside", "insiders", "sum_broken"]
ADVERSARIES: tuple[Adversary, ...] = ("outside", "insiders", "sum_broken")
Load = tuple[tuple[int, int], ...]
"""(version, rounds charged under it), ascending: what one silo is charged for. Basis rounds of version v stand under -v."""


def place_of(version: int, *, basis: bool) -> int:
    """The number under which a round stands in a load: its version, or less than nothing for a basis round."""
    return -version if basis else version


def load_of(rounds: Iterable[int]) -> Load:
    """The load of rounds that stand under these versions (``place_of``), one number for each."""
    listed = list(rounds)
    return tuple((version, listed.count(version)) for version in sorted(set(listed)))


def is_shared(versions: Iterable[Accepted]) -> bool:
    """Whether a unit may be in several silos: then a round in which any upload arrived is charged to every silo alike."""
    return any(each.terms.privacy.max_silos_per_unit > 1 for each in versions)


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Costs under the versions of one contract.

    Args:
        versions: by number, at least those that a load names.
        first: the version whose limits fix the filter's order: the first that rounds stand under.
    """

    versions: Mapping[int, Accepted]
    first: int

    @property
    def order(self) -> int:
        """The filter's order for loads with more than one version."""
        plan = self.versions[self.first].terms.privacy
        return Limits(epsilon=plan.epsilon, delta=plan.delta).filter_order

    def certified(self, load: Load, adversary: Adversary, delta: float, *, silos: int = 1, records: int = 1) -> Certificate:
        """The cost of a load; see the module docstring.

        Args:
            silos: to a unit in so many silos, where that is more than the contract says.
            records: to a person with so many units in each of them.

        Raises:
            NotCertified: the accountants give no agreed, finite figure.
        """
        several = len({abs(place) for place, rounds in load if rounds}) > 1
        events = tuple(event_of(self.terms_at(place), adversary, rounds, silos, records) for place, rounds in load if rounds)
        return _certified(events, delta, self.order if several else None)

    def epsilon(self, loads: Iterable[Load], adversary: Adversary, delta: float) -> float:
        """The largest cost among several silos' loads."""
        listed = set(loads)
        if any(rounds and not self.terms_at(place).is_private for load in listed for place, rounds in load):
            return math.inf
        return max((self.certified(load, adversary, delta).epsilon for load in listed), default=0.0)

    def events(self, load: Load, adversary: Adversary) -> tuple[Noised, ...]:
        """One event for each version that a load has rounds of, and one for the basis rounds of each."""
        return tuple(event_of(self.terms_at(place), adversary, rounds) for place, rounds in load if rounds)

    def steps(self, load: Load) -> int:
        """How many private steps a load is."""
        return sum(rounds * self.terms_at(place).training.steps_per_round for place, rounds in load)

    def terms_at(self, place: int) -> Contract:
        """The terms that govern the rounds at a place of a load."""
        terms = self.versions[abs(place)].terms
        return terms if place > 0 else basis_round.terms_of(terms)


def event_of(terms: Contract, adversary: Adversary, rounds: int, silos: int = 1, records: int = 1) -> Noised:
    """What so many rounds expose a unit to against an adversary; ``silos`` and ``records`` as in ``federation.exposure``."""
    shares = federation.adversaries(terms)[adversary].shares
    event = federation.mechanism(terms, shares=shares, rounds=rounds)
    return federation.exposure(terms, event, apart=adversary == "sum_broken", silos=silos, records=records)


def composed(events: Sequence[Noised], delta: float, order: int | None) -> Certificate:
    """The cost of events: fixed in advance, or, with an order, composed by the filter."""
    return _certified(tuple(events), delta, order)


@functools.lru_cache(maxsize=4096)
def _certified(events: tuple[Noised, ...], delta: float, order: int | None) -> Certificate:
    return unprotected.certify(events, delta, order=order)
