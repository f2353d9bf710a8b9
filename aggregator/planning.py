# SPDX-License-Identifier: Apache-2.0
"""A plan before anybody commits to it: how much noise an epsilon asks for, what rounds cost, and which plan carries least noise.

Every figure is of the mechanism that a contract with these numbers would have (``ring.plan``, ``accounting.certify``), so that
what is planned here is what ``aggregator sign`` will calibrate. A basis round before the steps (ADR 0020) is part of every figure,
all the attempts that the plan pays for. Promised: no epsilon below the certified one. Not promised: accuracy; the noise column
says how much noise the whole run carries beside its signal, not what a model does with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aggregator import defaults
from privacy.dp import accounting, groups, mechanism, ring
from privacy.dp.mechanism import LatticeGaussian, Noised
from privacy.errors import ConfigError

_EIGHTHS = 8
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sampling rates to compare, as multiples of the one that was asked for, at equally many passes over the records."""


@dataclass(frozen=True, kw_only=True)
class BasisRound:
    """The basis round of a plan, as ``[basis]`` of a contract has it (``privacy.contract.Basis``).

    Args:
        dimension: the numbers of all sketches together.
        noise_multiplier: sigma of this round.
        attempts: for how many of them the plan pays.
        lattice_bits: p of this round; None: the finest that fits the ring.
    """

    dimension: int
    noise_multiplier: float = defaults.BASIS_NOISE_MULTIPLIER
    attempts: int = defaults.BASIS_ATTEMPTS
    lattice_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is planned.

    Args:
        epsilon: the target for the whole plan against the insiders; None where ``noise_multiplier`` is given instead.
        noise_multiplier: sigma of the guarantee; None to have it calibrated.
        steps: private steps T in all; ``steps_per_round`` of them are one round.
        silos, colluders, dropouts: n, t_c and t_d; ``local`` faces one share whatever they are.
        max_silos_per_unit: m, how many of the silos may know one unit; every figure is for such a unit.
        units: the public bound on one silo's units; dimension: d, all numbers that train.
        basis: the basis round before the steps; None where there is none.
        lattice_bits: p of the steps; None: the finest that fits the ring.

    Raises:
        ConfigError: neither or both of epsilon and noise_multiplier, or counts that leave no honest share.
    """

    delta: float
    steps: int
    sampling_rate: float
    silos: int
    units: int
    dimension: int
    epsilon: float | None = None
    noise_multiplier: float | None = None
    colluders: int = 1
    dropouts: int = 0
    steps_per_round: int = 1
    local: bool = False
    max_silos_per_unit: int = 1
    basis: BasisRound | None = None
    lattice_bits: int | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ConfigError("a plan has either an epsilon or a noise multiplier", hint="give one of the two", code="plan")
        if not self.local and (self.shares < 1 or self.fewest > self.silos or self.dropouts >= self.silos):
            raise ConfigError(
                f"{self.silos} silos with {self.colluders} colluders and {self.dropouts} drop-outs leave no honest noise",
                hint="more silos, or fewer of the others", code="plan",
            )  # fmt: skip
        if not 1 <= self.max_silos_per_unit <= self.silos:
            raise ConfigError(
                f"a unit in up to {self.max_silos_per_unit} of {self.silos} silos", hint="correct --max-silos-per-unit", code="plan"
            )

    def exposure(self, event: LatticeGaussian, *, apart: bool = False, silos: int = 1, records: int = 1) -> Noised:
        """As ``federation.exposure``: ``event`` as such a unit is exposed to it."""
        known = max(silos, self.max_silos_per_unit)
        return groups.exposure(event, silos=known, records=records, together=not (apart or self.local))

    @property
    def before(self) -> tuple[LatticeGaussian, ...]:
        """What is released before the first step: every attempt at the basis round that the plan pays for, or nothing.

        Formal guarantees: as ``privacy.basis_round.BasisTerms`` has it: q = 1, all silos in the ring, in local mode one share.
        """
        if self.basis is None:
            return ()
        plan = ring.plan(
            silos=self.silos, shares=self.shares, dimension=self.basis.dimension, sampling_rate=1.0, units=self.units,
            noise_multiplier=self.basis.noise_multiplier, lattice_bits=self.basis.lattice_bits,
        )  # fmt: skip
        return (
            LatticeGaussian(
                sampling_rate=1.0, lattice_bits=plan.lattice_bits, share_variance=plan.share_variance, shares=self.shares,
                dimension=self.basis.dimension, steps=self.basis.attempts,
            ),
        )  # fmt: skip

    @property
    def shares(self) -> int:
        """h = u_min - t_c, the noise shares that the insiders face; 1 in local mode."""
        return 1 if self.local else self.fewest - self.colluders

    @property
    def fewest(self) -> int:
        """u_min: the silos in the smallest sum that may be released, as ``Contract.fewest`` has it."""
        return max(3, self.silos - self.dropouts) if self.dropouts else self.silos


@dataclass(frozen=True, kw_only=True)
class BasisCost:
    """What a basis round takes of a plan, against the insiders; epsilons do not add, so there are three figures.

    ``epsilon``: of all its attempts alone. ``without``: of the steps alone, at the plan's noise. ``share``: by which part of itself
    the plan's epsilon is larger than that.
    """

    epsilon: float
    without: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was planned. ``lattice_bits`` and ``share_deviation`` (of one silo's noise, in clipping bounds C) are per number.

    ``rounds``: (round, certified epsilon after it). ``relative_noise``: sigma·√T/(q·T), the noise of the whole run beside its
    signal, for plans of equally many passes. ``several``: ("silos" or "records", how many, epsilon against the insiders) of a
    unit in more silos than planned for, and of a person with so many records where each is a unit; None where no figure holds.
    ``basis``: None where there is no basis round. Every other epsilon is of it and the steps together.
    """

    noise_multiplier: float
    epsilon: dict[str, float]
    lattice_bits: int
    share_deviation: float
    rounds: list[tuple[int, float]]
    relative_noise: float
    several: list[tuple[str, int, float | None]]
    basis: BasisCost | None = None


def answer(question: Question) -> Answer:
    """The plan, with its cost against three adversaries and after every eighth of its rounds.

    Raises:
        ConfigError: the numbers do not fit the ring, or the basis round alone costs the plan's epsilon.
        NotCertified: no noise reaches this epsilon.
        PrivacyRefusal: epsilon or delta is no number of its range, or delta is more than a contract may state for so many units.
    """
    accounting.check_delta(question.delta, question.silos * question.units)
    sigma, event = _calibrated(question)
    plan, whole = _ring(question, sigma), (*question.before, event)
    epsilon = {name: _epsilon(question, whole, name) for name in ("outside", "insiders", "sum_broken")}
    return Answer(
        noise_multiplier=sigma,
        epsilon=epsilon,
        lattice_bits=plan.lattice_bits,
        share_deviation=math.sqrt(plan.share_variance) / 2.0**plan.lattice_bits,
        rounds=_forecast(question, event),
        relative_noise=_relative_noise(question, sigma),
        several=_several(question, whole),
        basis=_basis_cost(question, event, epsilon["insiders"]),
    )


def _epsilon(question: Question, events: Sequence[LatticeGaussian], adversary: str) -> float:
    """What these events cost against an adversary, as ``federation.exposures`` has them of a contract."""
    if not question.local:
        each_seen = (mechanism.adversaries(each, silos=question.fewest, colluders=question.colluders) for each in events)
        events = [seen[adversary] for seen in each_seen]
    exposed = [question.exposure(each, apart=adversary == "sum_broken") for each in events]
    return accounting.certify(exposed, question.delta).epsilon


def _basis_cost(question: Question, event: LatticeGaussian, whole: float) -> BasisCost | None:
    if not question.before:
        return None
    without = _epsilon(question, [event], "insiders")
    return BasisCost(epsilon=_epsilon(question, question.before, "insiders"), without=without, share=1 - without / whole)


def _several(question: Question, events: Sequence[LatticeGaussian]) -> list[tuple[str, int, float | None]]:
    cases = [("silos", groups.SILOS)] if question.max_silos_per_unit < groups.SILOS else []
    found = []
    for of, count in [*cases, *(("records", count) for count in groups.RECORDS)]:
        silos, records = (count, 1) if of == "silos" else (1, count)
        exposed = [question.exposure(each, silos=silos, records=records) for each in events]
        found.append((of, count, groups.epsilon_for(exposed, question.delta)))
    return found


def alternatives(question: Question, factors: Sequence[float] = FACTORS) -> list[tuple[float, int, float, float]]:
    """(sampling rate, steps, sigma, relative noise) of plans with equally many passes and the same epsilon, where there are any.

    Raises:
        ConfigError: the question has no epsilon, so there is nothing to hold them to.
    """
    if question.epsilon is None:
        raise ConfigError("plans are compared at one epsilon", hint="give --epsilon", code="plan")
    found = []
    for factor in factors:
        rate, steps = question.sampling_rate * factor, max(1, round(question.steps / factor))
        if rate <= 1:
            other = replace(question, sampling_rate=rate, steps=steps, steps_per_round=1, lattice_bits=None)
            sigma, _ = _calibrated(other)
            found.append((rate, steps, sigma, _relative_noise(other, sigma)))
    return found


def _calibrated(question: Question) -> tuple[float, LatticeGaussian]:
    def made(sigma: float) -> LatticeGaussian:
        plan = _ring(question, sigma)
        return LatticeGaussian(
            sampling_rate=question.sampling_rate, lattice_bits=plan.lattice_bits, share_variance=plan.share_variance,
            shares=question.shares, dimension=question.dimension, steps=1,
        )  # fmt: skip

    sigma = question.noise_multiplier
    if sigma is None:
        assert question.epsilon is not None
        sigma = accounting.calibrate(
            epsilon=question.epsilon, delta=question.delta, sampling_rate=question.sampling_rate, steps=question.steps,
            make=lambda sigma: question.exposure(made(sigma)), beside=_beside(question, question.epsilon),
        )  # fmt: skip
    return sigma, made(sigma).with_steps(question.steps)


def _beside(question: Question, epsilon: float) -> tuple[Noised, ...]:
    """The basis round as a unit is exposed to it. Raises ConfigError when nothing of this epsilon is left for the steps."""
    before = tuple(question.exposure(each) for each in question.before)
    if before and 0 < epsilon <= (alone := _epsilon(question, question.before, "insiders")):
        raise ConfigError(
            f"the basis round alone costs epsilon {alone:.4g}, the whole plan may cost {epsilon:g}",
            hint="more noise in the basis round, fewer attempts at it, or a larger epsilon", code="plan",
        )  # fmt: skip
    return before


def _ring(question: Question, sigma: float) -> ring.Plan:
    """As ``federation.ring_plan_at``: the noise of one silo alone in local mode, its share otherwise."""
    return ring.plan(
        silos=1 if question.local else question.silos, shares=question.shares, dimension=question.dimension,
        sampling_rate=question.sampling_rate, units=question.units, noise_multiplier=sigma, lattice_bits=question.lattice_bits,
    )  # fmt: skip


def _forecast(question: Question, event: LatticeGaussian) -> list[tuple[int, float]]:
    each = question.steps_per_round
    rounds = question.steps // each
    chosen = sorted({max(1, round(rounds * part / _EIGHTHS)) for part in range(1, _EIGHTHS + 1)})
    past = [question.exposure(each) for each in question.before]
    curve = accounting.Curve(question.exposure(event), question.delta, past=past)
    return [(count, curve(count * each)) for count in chosen]


def _relative_noise(question: Question, sigma: float) -> float:
    return sigma / (question.sampling_rate * math.sqrt(question.steps))
