# SPDX-License-Identifier: Apache-2.0
"""``silo audit``: canaries through the contract's mechanism, and what a one-run audit concludes about epsilon.

A rehearsal on this machine. Canaries are units whose gradient the auditor chose: one direction each, eight times as long as the
clipping norm. Each is in the data with probability 1/2, by a bit of the operating system's generator. They go through the code
of a real round: Poisson sample, clip on the lattice, integer sum, clamp (``training.Contribution``), and each honest silo's noise
in the ring (``silo.upload.noisy``), step by step. What insiders would see, the sum with h shares of noise, is scored and dropped.

Promised: no record is read, nothing leaves, no ledger is charged; and the bound is valid (``privacy.dp.empirical``). Not promised:
that a silo's records, its model's gradients or its neighbours' code are looked at: ``silo selftest`` asks about the gradients. An
audit with canaries among real records, of rounds that are released, would be a run like any other, charged in the ledger.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy import update_rule
from privacy.dp import accounting, empirical, ring
from privacy.dp.empirical import Booleans, Floats, Outcome
from privacy.dp.mechanism import LatticeGaussian
from privacy.dp.tradeoff import TradeOff, trade_off, with_noise
from privacy.errors import ConfigError, PrivacyRefusal
from privacy.federation import Contract, mechanism
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.learning.adapted import Adapted
from silo.learning.sampling import Words
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution
from silo.upload import noisy

Directions = Literal["dirac", "random"]

CONFIDENCE = 0.95
"""With which both bounds hold at once."""

CANARIES = 10_000
LEAST_CANARIES = 1000
LENGTH = 8.0
"""The canaries' gradients before clipping, as a multiple of the clipping norm: a run without clipping shows them."""

MOST_WORK = 1_200_000_000
"""Numbers that one audit clips, a noise sample counting as ten: about a minute on one core. Of a longer plan the first steps are
audited, and held against the epsilon of these."""

_SIGNIFICANCE = (1 - CONFIDENCE) / 2  # of each bound
_TRIALS = 5
_CHUNK = 256  # canaries that are expanded at once


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a rehearsal leaves: by canary (m,) whether it was in, and the two scores it is judged by; T is ``steps``.

    ``likelihood``: log of how much likelier its numbers are with it than without, under the claimed noise: the best score there is
    for the mechanism as it claims to be. ``spread``: largest minus smallest of its numbers, which shows noise that repeats.
    """

    included: Booleans
    likelihood: Floats
    spread: Floats
    steps: int

    def outcomes(self) -> tuple[Outcome, ...]:
        """The guesses of both scores, fixed in number before the run."""
        return empirical.merged(empirical.outcomes(scores, self.included) for scores in (self.likelihood, self.spread))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an audit concludes; every epsilon at the contract's delta, over ``run.steps`` steps, against insiders.

    ``bound``: holds for any mechanism; ``bound_family``: for subsampled Gaussian ones (0 where nothing is refuted), of which
    ``noise_family`` times the claimed noise is refuted. ``detectable``: the smallest epsilon that an audit like this one sees to be
    above ``claimed`` in most runs, and the part of the claimed noise that has it; infinite and 0 where it sees none.
    """

    run: Run
    outcomes: tuple[Outcome, ...]
    claimed: float
    bound: float
    bound_family: float
    noise_family: float | None
    detectable: float
    detectable_noise: float

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the accountant: both bounds are at most its figure."""
        return max(self.bound, self.bound_family) <= self.claimed


class Rehearsal(Contribution):
    """A contribution whose units are canaries instead of records: sample, clip, sum and clamp are the real ones.

    There is no model, so there is nothing for the start-up tests of ``Contribution`` to look at.
    """

    def __init__(self, terms: Contract, rows: Canaries, chosen: Sequence[int], randomness: Callable[[], Words]) -> None:
        self._terms, self._canaries, self._randomness = terms, rows, randomness
        self._units = tuple(EncodedUnit(id=str(canary), rows=()) for canary in chosen)
        self.model = cast(Adapted, rows)  # its dimension and device are all that a sum asks for

    def _load(self, state: State) -> None:
        del state  # a canary's gradient is the same at every state

    def _gradients(self, units: Sequence[EncodedUnit]) -> Iterator[Tensor]:
        numbers = [int(unit.id) for unit in units]
        for start in range(0, len(numbers), _CHUNK):
            yield torch.from_numpy(self._canaries.rows(numbers[start : start + _CHUNK]))


class Canaries:
    """``count`` directions of d numbers, of norm ``length``: single coordinates, or random ones from a public seed."""

    def __init__(self, count: int, dimension: int, directions: Directions, *, length: float) -> None:
        self.device, self.dimension, self.length = torch.device("cpu"), dimension, length
        self._places = np.arange(count) * dimension // count
        self._vectors: NDArray[np.float32] | None = None
        if directions == "random":
            drawn = np.random.Generator(np.random.PCG64(0)).standard_normal((count, dimension), dtype=np.float32)
            self._vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def rows(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        """The gradients ``(·, d)`` of the canaries with these numbers."""
        if self._vectors is not None:
            return self._vectors[list(numbers)] * np.float32(self.length)
        made = np.zeros((len(numbers), self.dimension), dtype=np.float32)
        made[np.arange(len(numbers)), self._places[list(numbers)]] = self.length
        return made

    def along(self, released: Floats) -> Floats:
        """The inner product of every direction (m,) with a released vector (d,)."""
        return released[self._places] if self._vectors is None else (self._vectors @ released.astype(np.float32)).astype(np.float64)


def rehearse(
    terms: Contract,
    *,
    canaries: int,
    steps: int,
    directions: Directions = "dirac",
    randomness: Callable[[], Randomness] | None = None,
) -> Run:
    """``steps`` steps of the contract with ``canaries`` canaries, and their scores.

    Single coordinates carry one canary each. Where there are more canaries, the mechanism is run several times side by side, each
    canary in one of the runs: to every canary that is the same one run, and for all together still one.

    Formal guarantees:
        - *Fair coins*: each canary is in by one bit of the operating system's generator, which nothing but the sum depends on.
        - *Real path*: sampling, clipping, integer sum, clamp, noise and ring are the functions that a round calls.
        - *Insiders' view*: each step's sum holds h shares of noise, as many as the plan's guarantee counts on; in local mode one.
        - *Nothing kept*: of the released sums only the scores remain.

    """
    fresh = randomness or Randomness.from_os
    runs = [_one(terms, size, steps, directions, fresh) for size in _sizes(terms.dimension, canaries, directions)]
    return Run(
        included=np.concatenate([run.included for run in runs]), likelihood=np.concatenate([run.likelihood for run in runs]),
        spread=np.concatenate([run.spread for run in runs]), steps=steps,
    )  # fmt: skip


def _sizes(dimension: int, canaries: int, directions: Directions) -> list[int]:
    """How many canaries each of the runs side by side carries."""
    runs = 1 if directions == "random" else -(-canaries // dimension)
    return [canaries // runs + (place < canaries % runs) for place in range(runs)]


def _one(terms: Contract, canaries: int, steps: int, directions: Directions, fresh: Callable[[], Randomness]) -> Run:
    rows = Canaries(canaries, terms.dimension, directions, length=LENGTH * terms.privacy.max_grad_norm)
    included = (fresh().uint64(canaries) >> np.uint64(63)).astype(np.bool_)
    contribute = Rehearsal(terms, rows, np.flatnonzero(included).tolist(), fresh)
    state, nothing = update_rule.initial(terms), np.zeros(terms.dimension, dtype=np.int64)
    norm, tally = float(2**terms.privacy.lattice_bits), Tally(mechanism(terms), canaries)
    for _ in range(steps):
        words = noisy(contribute(state), terms, fresh())
        for _ in range(terms.shares - 1):
            words = words + noisy(nothing, terms, fresh())
        tally.add(rows.along(ring.lift(words) / norm))
    return tally.run(included)


class Tally:
    """The scores of canaries, from their numbers step by step, in units of the clipping norm."""

    def __init__(self, event: LatticeGaussian, canaries: int) -> None:
        self._rate, self._variance = event.sampling_rate, event.effective_noise_multiplier**2
        self._log, self._steps = np.zeros(canaries), 0
        self._least, self._most = np.full(canaries, np.inf), np.full(canaries, -np.inf)

    def add(self, numbers: Floats) -> None:
        """One step's numbers (m,)."""
        ratio = (2 * numbers - 1) / (2 * self._variance)
        out = math.log1p(-self._rate) if self._rate < 1 else -math.inf
        self._log += np.logaddexp(out, math.log(self._rate) + ratio)
        np.minimum(self._least, numbers, out=self._least)
        np.maximum(self._most, numbers, out=self._most)
        self._steps += 1

    def run(self, included: Booleans) -> Run:
        """The scores after all steps."""
        return Run(included=included, likelihood=self._log, spread=self._most - self._least, steps=self._steps)


def conclude(run: Run, event: LatticeGaussian, delta: float, *, directions: Directions = "dirac") -> Finding:
    """What the scores of ``run`` say about ``event``, the mechanism it claims to be, with its steps.

    Formal guarantees: with probability at least ``CONFIDENCE`` neither bound is above the epsilon that the mechanism really has
    (``bound_family``: if it is a subsampled Gaussian one). So an honest mechanism, whose epsilon is at most ``claimed``, fails with
    probability at most 1 - ``CONFIDENCE``; in fact far less, since honest bounds are less than half of epsilon.

    Raises:
        NotCertified: no certified epsilon for ``event``.
    """
    found, count = run.outcomes(), len(run.included)
    claimed = accounting.certify([event], delta).epsilon
    curves = functools.cache(lambda noise: trade_off(with_noise(event, noise), delta))

    def inverse(noise: float) -> Callable[[float], float] | None:
        curve: TradeOff | None = curves(noise)
        return None if curve is None else curve.inverse

    refuted = empirical.in_family(found, inverse, canaries=count, significance=_SIGNIFICANCE, least=0.02)
    family = None if refuted is None else curves(refuted)
    clutter = event.sampling_rate * count / (2 * event.dimension) if directions == "random" else 0.0
    noise = _detectable_noise(event, count, inverse(1.0), clutter=clutter)
    above = curves(noise) if noise else None
    return Finding(
        run=run, outcomes=found, claimed=claimed,
        bound=empirical.one_run(found, canaries=count, delta=delta, significance=_SIGNIFICANCE),
        bound_family=0.0 if family is None else family.epsilon, noise_family=refuted,
        detectable=math.inf if above is None else above.epsilon, detectable_noise=noise,
    )  # fmt: skip


def _detectable_noise(
    event: LatticeGaussian, canaries: int, claim: Callable[[float], float] | None, *, clutter: float = 0.0
) -> float:
    """The largest part of the claimed noise with which most simulated audits refute the claim; 0 where none does.

    ``clutter``: the variance, in squared clipping norms, that other canaries add where directions are not orthogonal.
    A figure about the audit, not about this run: its numbers are drawn from a public seed, so it is the same every time.
    """
    bits = np.random.Generator(np.random.PCG64(1))
    each = _SIGNIFICANCE / (2 * len(empirical.RULE))

    def seen(part: float) -> bool:
        refuted = 0
        for _ in range(_TRIALS):
            found = _simulated(event, canaries, part, bits, clutter).outcomes()
            refuted += claim is not None and any(empirical.refutes(o, claim, canaries=canaries, significance=each) for o in found)
        return 2 * refuted > _TRIALS

    parts = [0.97**k for k in range(1, 128)]
    low, high = 0, len(parts) - 1
    if not seen(parts[high]):
        return 0.0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if seen(parts[middle]) else (middle + 1, high)
    return parts[low]


def _simulated(event: LatticeGaussian, canaries: int, part: float, bits: np.random.Generator, clutter: float) -> Run:
    """A run under ``part`` of the claimed noise, drawn with floats."""
    included = bits.random(canaries) < 0.5
    tally = Tally(event, canaries)
    sigma = math.hypot(part * event.effective_noise_multiplier, math.sqrt(clutter))
    for _ in range(event.steps):
        there = included & (bits.random(canaries) < event.sampling_rate)
        tally.add(there + sigma * bits.standard_normal(canaries))
    return tally.run(included)


def audit(terms: Contract, *, canaries: int = CANARIES, steps: int | None = None, directions: Directions = "dirac") -> Finding:
    """A rehearsal of the contract and what follows from it; ``CANARIES`` canaries, the plan's steps or what is affordable.

    Raises:
        ConfigError: fewer than ``LEAST_CANARIES``, or more steps than the plan has.
        PrivacyRefusal: the contract adds no noise, so there is nothing to audit.
    """
    if not terms.is_private:
        raise PrivacyRefusal("this contract adds no noise", hint="there is no epsilon to audit", code="no-noise")
    taken = _affordable(terms, canaries) if steps is None else steps
    if canaries < LEAST_CANARIES or not 1 <= taken <= terms.steps:
        raise ConfigError(
            f"an audit of {canaries} canaries over {taken} steps; the plan has {terms.steps}",
            hint=f"at least {LEAST_CANARIES} canaries, and 1 to {terms.steps} steps", code="audit",
        )  # fmt: skip
    run = rehearse(terms, canaries=canaries, steps=taken, directions=directions)
    return conclude(run, mechanism(terms).with_steps(taken), terms.privacy.delta, directions=directions)


def _affordable(terms: Contract, canaries: int) -> int:
    runs = -(-canaries // terms.dimension)
    a_step = terms.dimension * (10 * terms.shares * runs + terms.privacy.sampling_rate * canaries / 2)
    return min(terms.steps, max(1, int(MOST_WORK / a_step)))


def as_facts(finding: Finding, terms: Contract) -> dict[str, Any]:
    """The finding as the one JSON document of ``silo audit --json``. No record is in it, so it may be shown to anybody."""
    run, curve = finding.run, empirical.roc(finding.run.likelihood, finding.run.included)
    seen = math.isfinite(finding.detectable)
    return {
        "holds": finding.holds,
        "epsilon_claimed": finding.claimed,
        "delta": terms.privacy.delta,
        "confidence": CONFIDENCE,
        "epsilon_bound": finding.bound,
        "epsilon_bound_family": finding.bound_family,
        "detectable_epsilon": finding.detectable if seen else None,
        "detectable_factor": finding.detectable / finding.claimed if seen else None,
        "detectable_noise": finding.detectable_noise,
        "steps": run.steps,
        "steps_planned": terms.steps,
        "canaries": len(run.included),
        "noise_shares": terms.shares,
        "roc_area": curve.area,
        "true_positive_rate_at_1_percent": curve.at(0.01),
        "guesses": [dataclasses.asdict(outcome) for outcome in finding.outcomes],
    }
