# SPDX-License-Identifier: Apache-2.0
"""What so many rounds of a federation cost: every epsilon of a report comes from here, and here from the accountants.

Promised: each figure is ``privacy.spending`` of the rounds under each version of the contract, computed once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import msgspec

from aggregator.reporting.wording import Fact
from privacy import federation, spending
from privacy.dp.mechanism import Noised
from privacy.errors import NotCertified
from privacy.federation import Accepted
from privacy.spending import Adversary, Load, Spending

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Figure(Fact, frozen=True, kw_only=True):
    """Epsilon after so many rounds, which are so many private steps. ``epsilon_pld`` is null where no PLD was computed.

    ``grid``: to which step its privacy losses were rounded up.

    Over rounds of more than one version the filter composes, which is of RDP alone.
    """

    rounds: Natural
    steps: Natural
    epsilon: float
    epsilon_pld: float | None
    epsilon_rdp: float
    grid: float | None = None


class Curve:
    """Figures of rounds under versions that follow each other, the last of them in force; each load is certified once.

    Args:
        versions: ascending.
        first: the first version that rounds stand under; the one in force while there is none.
    """

    def __init__(self, versions: Sequence[Accepted], first: int | None = None) -> None:
        self.terms = versions[-1].terms
        self.spending = Spending(
            versions={each.terms.version: each for each in versions}, first=self.terms.version if first is None else first
        )
        self._known: dict[tuple[float, Adversary, Load], Figure] = {}

    def __call__(self, load: Load, *, delta: float | None = None, adversary: Adversary = "insiders") -> Figure:
        """The figure of a load; by default at the contract's delta against the insiders."""
        key = (delta or self.terms.privacy.delta, adversary, tuple((version, rounds) for version, rounds in load if rounds))
        if key not in self._known:
            self._known[key] = self._certified(*key)
        return self._known[key]

    def most(self, loads: Sequence[Load], adversary: Adversary = "insiders") -> Load:
        """The load that costs most against an adversary."""
        return max(loads, key=lambda load: (self(load, adversary=adversary).epsilon, self.spending.steps(load)), default=())

    def _certified(self, delta: float, adversary: Adversary, load: Load) -> Figure:
        if not load:
            return Figure(rounds=0, steps=0, epsilon=0.0, epsilon_pld=0.0, epsilon_rdp=0.0)
        bound = self.spending.certified(load, adversary, delta)
        together = len({abs(place) for place, _ in load}) == 1  # one plan, its basis rounds with it
        pld = bound.epsilon_pld if math.isfinite(bound.epsilon_pld) and together else None
        return Figure(
            rounds=sum(rounds for _, rounds in load), steps=self.spending.steps(load), epsilon=bound.epsilon, epsilon_pld=pld,
            epsilon_rdp=bound.epsilon_rdp, grid=None if pld is None else bound.discretization,
        )  # fmt: skip

    def more(self, load: Load, rounds: int) -> Load:
        """The load with so many further rounds under the version in force."""
        now = dict(load)
        now[self.terms.version] = now.get(self.terms.version, 0) + rounds
        return tuple(sorted(now.items()))

    def exposed(self, load: Load, *, silos: int = 1, records: int = 1) -> float | None:
        """Epsilon against the insiders of a unit in so many silos, of so many units in each; None where no figure holds."""
        if not any(rounds for _, rounds in load):
            return 0.0
        try:
            return self.spending.certified(load, "insiders", self.terms.privacy.delta, silos=silos, records=records).epsilon
        except NotCertified:
            return None

    def rounds_within(self, load: Load, limit: float, most: int) -> int:
        """How many further rounds under the version in force, of ``most``, keep epsilon at or below ``limit``."""
        low, high = 0, most
        if most <= 0 or self(load).epsilon > limit:
            return 0
        if self(self.more(load, high)).epsilon <= limit:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(self.more(load, middle)).epsilon <= limit else (low, middle)
        return low

    def stood(self, standing: Sequence[tuple[int, int | None]]) -> dict[str, float]:
        """What rounds cost that are over, by adversary, with the noise that stood: an odometer, not the plan's guarantee.

        Args:
            standing: for each charged round its place in a load, and how many silos were in its sum; None where there was none,
                taken as the fewest.
        """
        events: dict[str, list[Noised]] = {}
        for (place, silos), count in sorted(Counter(standing).items(), key=str):
            terms = self.spending.terms_at(place)
            for name, event in federation.exposures(terms, standing=silos, rounds=count).items():
                events.setdefault(name, []).append(event)
        order = self.spending.order if len({abs(place) for place, _ in standing}) > 1 else None
        delta = self.terms.privacy.delta
        return {name: spending.composed(each, delta, order).epsilon for name, each in events.items()}
