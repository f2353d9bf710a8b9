# SPDX-License-Identifier: Apache-2.0
"""What a silo's rounds cost that stand under one or several versions of the contract, each with the terms of its own version.

**Formal guarantees**

- *Own terms*: each round is charged with the mechanism of the version under which it was opened, as the named adversary of that
  version faces it.
- *Adaptive*: with rounds under more than one version the later terms may have been chosen after the earlier results were seen, so
  the RDP filter composes them at one order that was fixed before the first round: it follows from the first version's limits alone.
- *Whoever has most*: of several silos the largest epsilon counts, for each adversary by itself.

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

from privacy import federation
from privacy.dp import unprotected
from privacy.dp.accounting import Certificate
from privacy.dp.budget import Limits
from privacy.dp.mechanism import LatticeGaussian
from privacy.federation import Accepted, Contract

Adversary = Literal["outside", "insiders", "sum_broken"]
ADVERSARIES: tuple[Adversary, ...] = ("outside", "insiders", "sum_broken")
Load = tuple[tuple[int, int], ...]
"""(version, rounds charged under it), ascending: what one silo is charged for."""


def load_of(rounds: Iterable[int]) -> Load:
    """The load of rounds that stand under these versions, one number for each."""
    listed = list(rounds)
    return tuple((version, listed.count(version)) for version in sorted(set(listed)))


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

    def certified(self, load: Load, adversary: Adversary, delta: float) -> Certificate:
        """The cost of a load; see the module docstring.

        Raises:
            NotCertified: the accountants give no agreed, finite figure.
        """
        events = self.events(load, adversary)
        return _certified(events, delta, self.order if len(events) > 1 else None)

    def epsilon(self, loads: Iterable[Load], adversary: Adversary, delta: float) -> float:
        """The largest cost among several silos' loads."""
        listed = set(loads)
        if any(rounds and not self.versions[version].terms.is_private for load in listed for version, rounds in load):
            return math.inf
        return max((self.certified(load, adversary, delta).epsilon for load in listed), default=0.0)

    def events(self, load: Load, adversary: Adversary) -> tuple[LatticeGaussian, ...]:
        """One event for each version that a load has rounds of."""
        return tuple(event_of(self.versions[version].terms, adversary, rounds) for version, rounds in load if rounds)

    def steps(self, load: Load) -> int:
        """How many private steps a load is."""
        return sum(rounds * self.versions[version].terms.training.steps_per_round for version, rounds in load)


def event_of(terms: Contract, adversary: Adversary, rounds: int) -> LatticeGaussian:
    """What so many rounds release against an adversary."""
    shares = federation.adversaries(terms)[adversary].shares
    return federation.mechanism(terms, shares=shares, rounds=rounds)


def composed(events: Sequence[LatticeGaussian], delta: float, order: int | None) -> Certificate:
    """The cost of events: fixed in advance, or, with an order, composed by the filter."""
    return _certified(tuple(events), delta, order)


@functools.lru_cache(maxsize=4096)
def _certified(events: tuple[LatticeGaussian, ...], delta: float, order: int | None) -> Certificate:
    return unprotected.certify(events, delta, order=order)
