# SPDX-License-Identifier: Apache-2.0
"""Privacy loss distributions of composed steps: how finely they are tabulated, and epsilon from them.

Promised: ``composed`` is an upper bound (pessimistic rounding, tails folded into infinity, what FFT rounding can hide taken off
delta), the same to the last bit for every caller. Not promised: that it is the smaller of two bounds; ``accounting`` compares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from privacy.dp import mixture
from privacy.dp.mechanism import LatticeMixture, Noised

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Steps = dict[tuple[float, float, int], int]

DISCRETIZATIONS = (1e-3, 1e-4, 1e-5, 1e-6)
"""Grids of privacy losses: 1e-4 (1e-3 for very wide tables), finer only while the figure exceeds RDP, twice at most."""

LOSS_CEILING = 200.0
"""Above this expected privacy loss (RDP of order 1) no PLD is computed: absurd parameters took 20 GB, and protect nobody."""

_WIDE_TABLE, _MAX_TABLE = 2**20, 2**23  # entries
FFT_ALLOWANCE = 1e-14
"""What FFT rounding can hide per composed step, taken off delta before a distribution is asked."""

_TAIL_DEVIATIONS = 10.0  # beyond them dp_accounting folds the tail, exp(-50), into infinity


def refined(events: tuple[Noised, ...], delta: float, by_rdp: float) -> tuple[float, float]:
    """(epsilon, grid) on the first grid that does not exceed RDP, else on the last that fits; (inf, 0) where none does."""
    best, used = math.inf, 0.0
    most = max((contributions for _, _, contributions in steps_of(events)), default=1)
    if most > mixture.MOST_TABULATED:
        return best, used
    mean, width = expected_loss(events)
    if not mean <= LOSS_CEILING:
        return best, used
    first = 1 if width <= _WIDE_TABLE * DISCRETIZATIONS[1] and most == 1 else 0
    for grid in DISCRETIZATIONS[first : first + 3]:
        if not width * most <= _MAX_TABLE * grid or best <= by_rdp:
            break
        best, used = composed(events, delta, grid), grid
    return best, used


def composed(events: tuple[Noised, ...], delta: float, grid: float) -> float:
    """Epsilon at ``delta`` of all these steps, on one grid; infinite where the grid cannot say.

    Formal guarantees: an upper bound on epsilon of the discrete mechanisms, under add-or-remove-one neighbours.
    """
    steps, zeta = steps_of(events), slack(events)
    at = delta * math.exp(-zeta) - FFT_ALLOWANCE * sum(steps.values())
    if not at > 0:
        return math.inf
    parts = [_steps_pld(*key, grid, count) for key, count in steps.items()]
    whole = functools.reduce(lambda left, right: left.compose(right), parts)
    epsilon = float(whole.get_epsilon_for_delta(at)) + 2 * zeta
    return epsilon if epsilon >= 0 else math.inf  # NaN included


@functools.lru_cache(maxsize=32)
def _steps_pld(rate: float, sigma: float, contributions: int, grid: float, count: int) -> PrivacyLossDistribution:
    """``count`` steps, from the largest power of two in it and the rest: a plan that is looked at step after step shares them.

    The same way for every caller, so that silo, aggregator and auditor get the same figure to the last bit.
    """
    if count == 1:
        return one_step(rate, sigma, grid, contributions)
    half = 1 << (count - 1).bit_length() - 1  # the largest power of two below count
    return _steps_pld(rate, sigma, contributions, grid, half).compose(_steps_pld(rate, sigma, contributions, grid, count - half))


@functools.lru_cache(maxsize=16)
def one_step(rate: float, sigma: float, grid: float, contributions: int = 1) -> PrivacyLossDistribution:
    """One step's distribution, rounded pessimistically to ``grid``, for a unit of so many contributions."""
    if contributions > 1:
        return mixture.one_step(rate, sigma, contributions, grid)
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=rate, value_discretization_interval=grid, pessimistic_estimate=True,
    )


def expected_loss(events: Sequence[Noised]) -> tuple[float, float]:
    """(mean, range) of the privacy loss of the composition, by quadrature: the screen for memory and time, never a bound."""
    mean, variance, reach = 0.0, 0.0, 0.0
    for (rate, sigma, contributions), count in steps_of(events).items():
        x = np.linspace(-_TAIL_DEVIATIONS * sigma, contributions + _TAIL_DEVIATIONS * sigma, 20_001)
        if contributions > 1:
            loss = mixture.log_ratio(x, sigma, rate, contributions)
        else:
            ratio = (2 * x - 1) / (2 * sigma**2)
            loss = ratio if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
        weight = np.exp(loss - x**2 / (2 * sigma**2))
        weight = weight / weight.sum()
        mean += count * float(weight @ loss)
        variance += count * float(weight @ loss**2)
        reach = max(reach, float(loss[-1] - loss[0]))
    return mean, reach + 2 * (mean + _TAIL_DEVIATIONS * math.sqrt(variance))


def steps_of(events: Sequence[Noised]) -> Steps:
    """Steps by (sampling rate, effective noise multiplier, contributions of one unit), all that an accountant looks at."""
    steps: Steps = {}
    for event in events:
        contributions, releases = (event.contributions, event.releases) if isinstance(event, LatticeMixture) else (1, 1)
        key = (event.sampling_rate, event.effective_noise_multiplier, contributions)
        steps[key] = steps.get(key, 0) + event.steps * releases
    return steps


def slack(events: Sequence[Noised]) -> float:
    """How far, in max divergence, all these discrete mechanisms are from their continuous ones."""
    return math.fsum(event.slack_log for event in events)
