# SPDX-License-Identifier: Apache-2.0
"""What so many rounds of a contract cost: every epsilon of a report comes from here, and here from the accountants.

Promised: each figure is ``accounting.certify`` of the contract's mechanism at the stated steps and shares, computed once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import msgspec

from aggregator.reporting.wording import Fact
from privacy import federation
from privacy.dp import accounting
from privacy.dp.mechanism import LatticeGaussian
from privacy.federation import Contract

Natural = Annotated[int, msgspec.Meta(ge=0)]


class Figure(Fact, frozen=True, kw_only=True):
    """Epsilon after so many rounds, which are so many private steps. ``epsilon_pld`` is null where no PLD was computed."""

    rounds: Natural
    steps: Natural
    epsilon: float
    epsilon_pld: float | None
    epsilon_rdp: float


def stood(terms: Contract, standing: Sequence[int | None]) -> dict[str, float]:
    """What rounds cost that are over, by adversary, with the noise that stood: an odometer, not the plan's guarantee.

    Args:
        standing: for each charged round how many silos were in its sum; None where there was none, taken as the fewest.
    """
    events: dict[str, list[LatticeGaussian]] = {}
    for silos, count in Counter(standing).items():
        for name, event in federation.adversaries(terms, standing=silos, rounds=count).items():
            events.setdefault(name, []).append(event)
    return {name: accounting.certify(each, terms.privacy.delta).epsilon for name, each in events.items()}


class Curve:
    """Figures of one contract's mechanism; each (delta, shares, rounds) is certified once."""

    def __init__(self, terms: Contract) -> None:
        self.terms = terms
        self._known: dict[tuple[float, int, int], Figure] = {}

    def __call__(self, rounds: int, *, delta: float | None = None, shares: int | None = None) -> Figure:
        """The figure after ``rounds`` rounds; by default at the contract's delta against the insiders."""
        key = (delta or self.terms.privacy.delta, shares or self.terms.shares, rounds)
        if key not in self._known:
            self._known[key] = self._certified(*key)
        return self._known[key]

    def _certified(self, delta: float, shares: int, rounds: int) -> Figure:
        if rounds == 0:
            return Figure(rounds=0, steps=0, epsilon=0.0, epsilon_pld=0.0, epsilon_rdp=0.0)
        event = federation.mechanism(self.terms, shares=shares, rounds=rounds)
        bound = accounting.certify([event], delta)
        pld = bound.epsilon_pld if math.isfinite(bound.epsilon_pld) else None
        return Figure(rounds=rounds, steps=event.steps, epsilon=bound.epsilon, epsilon_pld=pld, epsilon_rdp=bound.epsilon_rdp)

    def rounds_within(self, limit: float) -> int:
        """The largest number of rounds of the declared plan whose epsilon is at most ``limit``."""
        low, high = 0, self.terms.training.rounds
        if self(high).epsilon <= limit:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle).epsilon <= limit else (low, middle)
        return low
