# SPDX-License-Identifier: Apache-2.0
"""A plan before anybody commits to it: how much noise an epsilon asks for, what rounds cost, and which plan carries least noise.

Every figure is of the mechanism that a contract with these numbers would have (``ring.plan``, ``accounting.certify``), so that
what is planned here is what ``aggregator sign`` will calibrate. Promised: no epsilon below the certified one. Not promised:
accuracy; the noise column says how much noise the whole run carries beside its signal, not what a model does with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privacy.dp import accounting, groups, mechanism, ring
from privacy.dp.mechanism import LatticeGaussian, Noised
from privacy.errors import ConfigError

_EIGHTHS = 8
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sampling rates to compare, as multiples of the one that was asked for, at equally many passes over the records."""


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
    def shares(self) -> int:
        """h = u_min - t_c, the noise shares that the insiders face; 1 in local mode."""
        return 1 if self.local else self.fewest - self.colluders

    @property
    def fewest(self) -> int:
        """u_min: the silos in the smallest sum that may be released, as ``Contract.fewest`` has it."""
        return max(3, self.silos - self.dropouts) if self.dropouts else self.silos


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was planned. ``lattice_bits`` and ``share_deviation`` (of one silo's noise, in clipping bounds C) are per number.

    ``rounds``: (round, certified epsilon after it). ``relative_noise``: sigma·√T/(q·T), the noise of the whole run beside its
    signal, for plans of equally many passes. ``several``: ("silos" or "records", how many, epsilon against the insiders) of a
    unit in more silos than planned for, and of a person with so many records where each is a unit; None where no figure holds.
    """

    noise_multiplier: float
    epsilon: dict[str, float]
    lattice_bits: int
    share_deviation: float
    rounds: list[tuple[int, float]]
    relative_noise: float
    several: list[tuple[str, int, float | None]]


def answer(question: Question) -> Answer:
    """The plan, with its cost against three adversaries and after every eighth of its rounds.

    Raises:
        ConfigError: the numbers do not fit the ring.
        NotCertified: no noise reaches this epsilon.
        PrivacyRefusal: epsilon or delta is no number of its range, or delta is more than a contract may state for so many units.
    """
    accounting.check_delta(question.delta, question.silos * question.units)
    sigma, event = _calibrated(question)
    plan = _ring(question, sigma)
    if question.local:
        seen = dict.fromkeys(("outside", "insiders", "sum_broken"), event)
    else:
        seen = mechanism.adversaries(event, silos=question.fewest, colluders=question.colluders)
    return Answer(
        noise_multiplier=sigma,
        epsilon={
            name: accounting.certify([question.exposure(each, apart=name == "sum_broken")], question.delta).epsilon
            for name, each in seen.items()
        },
        lattice_bits=plan.lattice_bits,
        share_deviation=math.sqrt(plan.share_variance) / 2.0**plan.lattice_bits,
        rounds=_forecast(question, event),
        relative_noise=_relative_noise(question, sigma),
        several=_several(question, event),
    )


def _several(question: Question, event: LatticeGaussian) -> list[tuple[str, int, float | None]]:
    cases = [("silos", groups.SILOS)] if question.max_silos_per_unit < groups.SILOS else []
    found = []
    for of, count in [*cases, *(("records", count) for count in groups.RECORDS)]:
        exposed = question.exposure(event, silos=count if of == "silos" else 1, records=count if of == "records" else 1)
        found.append((of, count, groups.epsilon_for([exposed], question.delta)))
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
            other = replace(question, sampling_rate=rate, steps=steps, steps_per_round=1)
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
            make=lambda sigma: question.exposure(made(sigma)),
        )  # fmt: skip
    return sigma, made(sigma).with_steps(question.steps)


def _ring(question: Question, sigma: float) -> ring.Plan:
    """As ``federation.ring_plan_at``: the noise of one silo alone in local mode, its share otherwise."""
    return ring.plan(
        silos=1 if question.local else question.silos, shares=question.shares, dimension=question.dimension,
        sampling_rate=question.sampling_rate, units=question.units, noise_multiplier=sigma,
    )  # fmt: skip


def _forecast(question: Question, event: LatticeGaussian) -> list[tuple[int, float]]:
    each = question.steps_per_round
    rounds = question.steps // each
    chosen = sorted({max(1, round(rounds * part / _EIGHTHS)) for part in range(1, _EIGHTHS + 1)})
    curve = accounting.Curve(question.exposure(event), question.delta)
    return [(count, curve(count * each)) for count in chosen]


def _relative_noise(question: Question, sigma: float) -> float:
    return sigma / (question.sampling_rate * math.sqrt(question.steps))
