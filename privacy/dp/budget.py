# SPDX-License-Identifier: Apache-2.0
"""The gate of one silo: may this attempt run, what is spent, what is left, what would more rounds cost?

Composing rule: everything on the silo's ledger composes, whatever the contract, run, round or outcome, unless runs are shown to
share no unit (``privacy.dp.overlap``). Then each part composes by itself, and the figure is that of the most spent part.

- A *plan* is declared before its first step and certified as a whole (the smaller of PLD and RDP); stopping early is free.
- As soon as a second contract has charged units of a first, its parameters may have been chosen after releases of the first were
  seen. Then an RDP filter at one order decides (``accounting.certify_adaptive``); the order follows from the limits alone.
  A limit that is raised later moves the order too: raise it before a run, not because of what a run showed.
- A plan *without differential privacy* has no epsilon: the silo's word for it (``Limits.without_privacy``) admits it in place of a
  limit, once, before its plan stands on the ledger. From its first attempt on the ledger's epsilon is infinite, whatever else is
  on it, and no plan with noise is admitted any more (``privacy.dp.unprotected``).

Promised: nothing is admitted that brings the certified epsilon of all reserved attempts above the limit, and an admitted
attempt is on the disk before ``admit`` returns. Not promised: that the mechanism is run as declared (``lattice``,
``noise``), nor that the ledger is the newest copy (``ledger.check_receipt``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from privacy.dp import accounting, groups, overlap, unprotected
from privacy.dp.accounting import Certificate
from privacy.dp.declared import Declared, require_same_unit
from privacy.dp.entries import Commit, Reserve, Void
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import Mechanism, Unprotected
from privacy.dp.together import Together, merged
from privacy.errors import BudgetExhausted, PrivacyRefusal

MOST_ATTEMPTS = 3
"""Attempts at one round that one ledger is charged for."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that may be spent on any unit of this silo, over all runs.

    ``delta`` is the one in which figures are stated. ``filter_delta`` is the silo's own limit where a contract states a smaller
    one: the filter's order must be the same under every contract on the ledger. ``without_privacy`` is the silo's word that
    a plan without noise may be declared.

    Raises:
        PrivacyRefusal: epsilon is not a positive number, or delta not inside (0, 1).
    """

    epsilon: float
    delta: float
    filter_delta: float | None = None
    without_privacy: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise PrivacyRefusal(
                f"limits are epsilon {self.epsilon} and delta {self.delta}, they must be positive and delta below 1",
                hint="correct [limits] in silo.toml",
            )

    @functools.cached_property
    def filter_order(self) -> int:
        """The Renyi order at which this limit holds the most unsampled Gaussian steps; a function of the limit alone."""

        def room(order: int) -> float:
            return (self.epsilon - accounting.conversion(order, self.filter_delta or self.delta)) / order

        return max(accounting.INTEGER_ORDERS, key=room)


def require_word(given: bool) -> None:
    """Return if this silo itself said that it takes part without differential privacy.

    Raises:
        PrivacyRefusal: it did not.
    """
    if not given:
        raise PrivacyRefusal(
            "this contract has NO DIFFERENTIAL PRIVACY: no noise is added, and records can be reconstructed from its sums",
            hint="do not join; or `silo join --without-differential-privacy`, after your data protection officer agrees in writing",
            code="no-differential-privacy",
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Runs that may have drawn one unit, by contract, and what they come to together."""

    contracts: tuple[str, ...]
    cost: Certificate


class Account:
    """What a ledger has spent under some limits, and what a plan would add. Reads only.

    Args:
        history: the silo's ledger, or a copy that was read.
        limits: the silo's limits, in whose delta every figure is stated.
        plan: the contract's mechanism for all its declared steps, at the shares that insiders cannot subtract.
        before: the mechanism of the basis rounds that come before them; None where there are none (``privacy.dp.declared``).
        contract: hex digest of the contract.
        steps_per_attempt: how many of those steps one attempt at a round is charged for.
        fewest: u_min, the silos in a sum for which ``plan`` counts its shares; None where every silo stands in every sum, or
            where their number does not change what a silo is charged (local mode).
        units: reads the unit files that the ledger names; without it everything composes.
        beside: ledgers of other homes on the same records; what they charged counts like the ledger's own.
    """

    def __init__(
        self, history: History, limits: Limits, *, plan: Mechanism, contract: str, steps_per_attempt: int,
        fewest: int | None = None, units: overlap.Read = overlap.nothing_shown, before: Mechanism | None = None,
        beside: Sequence[History] = (),
    ) -> None:  # fmt: skip
        self._own, self._history = history, Together(history, beside) if beside else history
        self._read_units = units
        self._fewest = fewest
        self._limits = limits
        self._plan = plan
        self._contract = contract
        self._declared = Declared(contract=contract, training=plan, each=steps_per_attempt, before=before)

    def spent(self) -> Certificate:
        """The certified cost of everything ever reserved on this ledger, to the unit that it cost most.

        Formal guarantees: for every unit, epsilon bounds the composition of all reserved attempts that may have drawn it, void and
        failed ones included; it is infinite as soon as one attempt on the ledger had no noise.
        """
        return self._with([])

    def parts(self) -> list[Part]:
        """What is charged, in parts that are shown to share no unit, and what each has cost; ``spent`` is the most of them."""
        return self._parted(self._charged(), more=[])

    def cost_of(self, contract: str) -> Certificate:
        """What one contract's attempts cost alone, as if nothing else had been run on the same units."""
        return unprotected.certify(self._history.charged(contract), self._limits.delta)

    def stood(self) -> Certificate:
        """What ``spent`` comes to with the noise that stood: each committed attempt at the shares of its own sum.

        At most ``spent``, and shown beside it only: who stood was not fixed beforehand, so nothing may be planned on it. An attempt
        without a commit, or whose sum nobody counted, is taken as it was reserved.
        """
        stood = {
            (body.round, body.attempt): body.silos
            for body in self._history.entries
            if isinstance(body, Commit) and body.silos is not None and body.contract == self._contract
        }
        steps: dict[str, list[Mechanism]] = {}
        for body in self._history.entries:
            if isinstance(body, Reserve):
                silos = stood.get((body.round, body.attempt)) if body.contract == self._contract else None
                one = body.mechanism
                if silos is not None and self._fewest is not None and not isinstance(one, Unprotected):
                    one = one.with_shares(one.shares + max(0, silos - self._fewest))
                steps.setdefault(body.contract, []).append(one)
        return _most(self._parted(steps, more=[]), self._limits.delta)

    def exposed(self, *, silos: int = 1, records: int = 1, together: bool = True) -> float | None:
        """``spent`` for a unit in so many silos with so many records in each (``privacy.dp.groups``); None where no figure holds.

        Of everything on the ledger as one part. What other silos did in rounds without this one is not on it.
        """
        events = merged(event for charged in self._charged().values() for event in charged)
        order = None if self._is_one_plan(tuple(self._charged())) else self._limits.filter_order
        return groups.epsilon_for(events, self._limits.delta, silos=silos, records=records, together=together, order=order)

    def same_units(self) -> tuple[str, ...]:
        """The other contracts that may have drawn a unit of this one's: all that are not shown to have drawn others only."""
        runs = overlap.runs_on(self._history.entries, self._read_units, to_come=self._to_come())
        part = next(part for part in overlap.parts(runs) if self._contract in part)
        return tuple(each for each in part if each != self._contract)

    @property
    def is_limited(self) -> bool:
        """Whether a limit holds: not for a plan without differential privacy, whose word admitted it."""
        return not isinstance(self._plan, Unprotected)

    @property
    def left(self) -> float:
        """The limit less what is spent; 0 when nothing is left. Epsilons do not add: ask ``forecast`` what fits."""
        return max(0.0, self._limits.epsilon - self.spent().epsilon)

    @property
    def steps_left(self) -> int:
        """How many private steps of this contract's training rounds are not charged yet."""
        return self._declared.left(self._own.entries, basis=False)

    @property
    def attempts_left(self) -> int:
        """How many whole attempts of this contract's plan are not charged yet."""
        return self._declared.attempts_left(self._own.entries)

    def forecast(self, rounds: Iterable[int]) -> list[tuple[int, float]]:
        """(n, certified epsilon) after n more attempts of this plan, for each n; never refuses."""
        return [(more, self._with(self._declared.ahead(self._own.entries, more)).epsilon) for more in rounds]

    def _rest(self) -> list[Mechanism]:
        """What the plan may still charge."""
        return self._declared.rest(self._own.entries)

    def _charged(self) -> dict[str, list[Mechanism]]:
        """Everything charged, by contract, in the order in which contracts were first charged."""
        contracts = dict.fromkeys(body.contract for body in self._history.entries if isinstance(body, Reserve))
        return {contract: self._history.charged(contract) for contract in contracts}

    def _with(self, more: Sequence[Mechanism]) -> Certificate:
        """The most spent part of everything charged and ``more`` of this plan."""
        return _most(self._parted(self._charged(), more=more), self._limits.delta)

    def _parted(self, charged: dict[str, list[Mechanism]], *, more: Sequence[Mechanism]) -> list[Part]:
        """The parts of what is charged and ``more`` of this plan: by PLD where one contract is in it, else by the filter."""
        if more:
            charged.setdefault(self._contract, []).extend(more)
        runs = overlap.runs_on(self._history.entries, self._read_units, to_come=self._to_come() if more else None)
        return [Part(contracts=part, cost=self._certified(charged, part)) for part in overlap.parts(runs)]

    def _to_come(self) -> Mapping[str, str | None]:
        """What units the next attempt says it may draw; nothing where this account charges none: those of the run so far."""
        known = any(isinstance(body, Reserve) and body.contract == self._contract for body in self._own.entries)
        plan = self._own.plan(self._contract)
        return {} if known else {self._contract: None if plan is None else plan.units}

    def _certified(self, charged: Mapping[str, Sequence[Mechanism]], part: Sequence[str]) -> Certificate:
        events = merged(event for contract in part for event in charged[contract])
        order = None if self._is_one_plan(part) or unprotected.noised(events) is None else self._limits.filter_order
        return unprotected.certify(events, self._limits.delta, order=order)


    def _is_one_plan(self, part: Sequence[str]) -> bool:
        """Whether all of a part was declared at once: one contract, in one home. Another may begin when it has seen the first."""
        if len(part) != 1:
            return not part
        homes = self._history.charging(part[0])
        return homes <= 1 if part[0] != self._contract or self._own.charging(part[0]) else homes == 0


def _most(parts: Sequence[Part], delta: float) -> Certificate:
    """The cost of the most spent part; nothing where nothing is charged."""
    return max((part.cost for part in parts), key=lambda cost: cost.epsilon, default=None) or unprotected.certify([], delta)


class Gate(Account):
    """Decides, before any record is read, whether a plan may start and whether an attempt may run; writes what it allows.

    Formal guarantees:
        - a refusal leaves the ledger as it was;
        - an attempt is reserved on the disk, all its steps, before ``admit`` returns, and stays charged;
        - the certified epsilon of everything reserved never passes ``limits.epsilon`` (meeting it exactly is allowed), unless this
          silo gave its word for a plan without differential privacy;
        - no more steps than the plan has are admitted under a contract.
    """

    def __init__(
        self, ledger: Ledger, limits: Limits, *, plan: Mechanism, contract: str, steps_per_attempt: int,
        fewest: int | None = None, units: overlap.Read = overlap.nothing_shown, before: Mechanism | None = None,
        beside: Sequence[History] = (), unit: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            ledger, limits, plan=plan, contract=contract, steps_per_attempt=steps_per_attempt, fewest=fewest, units=units,
            before=before, beside=beside,
        )  # fmt: skip
        self._ledger, self._unit = ledger, unit
        self._draws: str | None = None
        self._fits: tuple[Mechanism, ...] | None = None

    def draws_from(self, digest: str | None) -> None:
        """From here on every attempt says that it may draw the units in the file of this digest; None: nothing is said of them."""
        self._draws, self._fits = digest, None

    def _to_come(self) -> Mapping[str, str | None]:
        return {self._contract: self._draws}

    def declare(self, *, run: str = "") -> Certificate:
        """The cost of everything charged with the whole plan; the plan is on the ledger from here on. Safe to repeat.

        Raises:
            BudgetExhausted: that cost is above the limit.
            PrivacyRefusal: another plan was declared under this contract; what is charged protects another kind of unit; or it has
                no noise and this silo never said that it may.
        """
        known = self._ledger.plan(self._contract)
        if known is not None and not self._declared.is_on(known):
            raise PrivacyRefusal(
                f"this contract was declared with {known.mechanism.steps} steps, now its plan is another of {self._plan.steps}",
                hint="a changed plan needs a new contract", code="plan-changed", contract=self._contract,
            )
        if self.is_limited:
            require_same_unit(self._history.entries, self._contract, self._unit)
        cost = self._with(self._rest())
        if known is None:
            if isinstance(self._plan, Unprotected):
                require_word(self._limits.without_privacy)
            else:
                self._require_within(cost.epsilon)
            self._ledger.declare(
                contract=self._contract, run=run, mechanism=self._plan, epsilon=self._limits.epsilon, delta=self._limits.delta,
                units=self._draws, before=self._declared.before, unit=self._unit,
            )  # fmt: skip
        return cost

    def admit(self, round: int, attempt: bytes, *, basis: bool = False) -> int:
        """Charge one attempt at ``round`` on the disk; the number of ledger entries, for the signed upload.

        Args:
            basis: whether it is a basis round.

        Raises:
            BudgetExhausted: the plan is used up, or the attempt would pass the limit. Nothing was written.
            PrivacyRefusal: no such plan was declared, this attempt is charged already, or the round was attempted too often: a
                failure that comes back at every start must not burn the plan.
        """
        known = self._ledger.plan(self._contract)
        if not self._declared.is_on(known):
            raise PrivacyRefusal(
                f"round {round} has no plan on the ledger that says {self._plan.steps} steps with these parameters",
                hint="declare the plan first", code="plan-missing", round=round,
            )
        one, entries = self._declared.one(basis=basis), self._ledger.entries
        if self._declared.left(entries, basis=basis) < one.steps:
            used, planned = self._declared.used(entries, basis=basis), self._declared.before if basis else self._plan
            raise BudgetExhausted(
                f"round {round} would be {'basis ' * basis}attempt {used // one.steps + 1}, "
                f"the plan has {planned.steps // one.steps if planned else 0}",
                hint="stop here, or agree on a new contract", code="plan-used-up", round=round, plan=self._plan.steps,
            )
        made = len(self._ledger.attempts(self._contract, round))
        if made >= MOST_ATTEMPTS:
            raise PrivacyRefusal(
                f"round {round} was attempted {made} times, at most {MOST_ATTEMPTS} are made",
                hint="find out why no attempt left this machine; the round ends at its deadline, the next one is fresh",
                code="too-many-attempts", round=round,
            )
        self._require_fit(round, one)
        self._ledger.reserve(
            contract=self._contract, round_number=round, attempt=attempt.hex(), mechanism=one, units=self._draws
        )
        return self._ledger.counter

    def settle(self, round: int, outcome: Literal["result", "void"], *, silos: int | None = None) -> None:
        """Note how ``round`` ended, once; nothing is given back. A round without an attempt here leaves no trace as a result.

        Args:
            silos: how many stood in the sum, this silo among them; 0 when it was left out; None when it goes without saying.
        """
        place = (self._contract, round)
        if any(isinstance(body, Commit | Void) and (body.contract, body.round) == place for body in self._ledger.entries):
            return
        attempts = self._ledger.attempts(self._contract, round)
        if outcome == "void":
            self._ledger.void(contract=self._contract, round_number=round, reason="the round closed without a result")
        elif attempts and silos == 0:
            self._ledger.void(contract=self._contract, round_number=round, reason="the sum was made without this silo")
        elif attempts:
            self._ledger.commit(contract=self._contract, round_number=round, attempt=attempts[-1], silos=silos)

    def _require_fit(self, round_number: int, one: Mechanism) -> None:
        """Nothing, when one more attempt (``one``) stays within the limit; by the whole plan where that fits, else by itself."""
        if isinstance(self._plan, Unprotected):
            return  # the word that admitted its plan is on the ledger: there is no figure to hold to a limit
        reserved = (body for body in self._ledger.entries if isinstance(body, Reserve))
        past = tuple(body.mechanism for body in reserved if body.contract != self._contract)
        if self._fits == past:
            return
        if self._with(self._rest()).epsilon <= self._limits.epsilon:
            # Fewer steps of the same mechanism cost less: until another contract charges, every attempt of the plan fits.
            self._fits = past
            return
        after = self._with([one]).epsilon
        self._require_finite(after)
        if not after <= self._limits.epsilon:
            raise BudgetExhausted.for_round(
                round_number=round_number, epsilon_after=after, limit=self._limits.epsilon, delta=self._limits.delta
            )

    def _require_within(self, epsilon: float) -> None:
        self._require_finite(epsilon)
        if not epsilon <= self._limits.epsilon:
            raise BudgetExhausted(
                f"the plan of {self._plan.steps} steps would bring epsilon to {epsilon:.4g}, "
                f"the limit is {self._limits.epsilon:.4g} (delta {self._limits.delta:g})",
                hint="plan fewer rounds or more noise, or raise [limits] epsilon after your data protection officer agrees",
                epsilon_after=epsilon, limit=self._limits.epsilon, delta=self._limits.delta, steps=self._plan.steps,
            )

    def _require_finite(self, epsilon: float) -> None:
        if math.isinf(epsilon):
            raise BudgetExhausted(
                "this ledger holds a run without differential privacy: no noise makes its epsilon finite again",
                hint="records that no such run used belong into a silo of their own, with its own ledger",
                code="no-differential-privacy", limit=self._limits.epsilon,
            )
