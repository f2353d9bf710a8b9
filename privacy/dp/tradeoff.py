# SPDX-License-Identifier: Apache-2.0
"""The trade-off curve of a plan: of any test that tells a unit's presence, the least misses at a given rate of false alarms.

Promised: the curve lies nowhere above the mechanism's own, since it is made of (epsilon, delta) pairs of a pessimistic privacy loss
distribution (dp_accounting), each of which holds; so what refutes the curve refutes the mechanism. Symmetric: both ways of
neighbouring, a unit added and a unit removed, are in each pair. Not promised: a certified epsilon (``accounting.certify``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy.dp import pld
from privacy.dp.mechanism import MIN_SHARE_VARIANCE, LatticeGaussian

_GRIDS = (1e-3, 1e-2)
_MAX_TABLE = 2**20


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Pairs (epsilon, delta), each of which the mechanism holds; ``epsilon`` is that at the delta it was asked for."""

    epsilons: NDArray[np.float64]
    deltas: NDArray[np.float64]
    epsilon: float

    @functools.cached_property
    def _growth(self) -> NDArray[np.float64]:
        return np.exp(self.epsilons)

    def inverse(self, y: float) -> float:
        """f(1 - y), f the largest convex curve below all pairs: f(x) = max(0, 1 - delta - e^epsilon·x, e^-epsilon·(1 - delta - x)).

        Wasserman, Zhou 2010; Dong, Roth, Su 2022, Proposition 2.13. What the f-DP audit calls ``empirical.Inverse``.
        """
        growth = self._growth
        steep = 1 - self.deltas - growth * (1 - y)
        flat = (y - self.deltas) / growth
        return max(0.0, float(steep.max()), float(flat.max()))


def trade_off(event: LatticeGaussian, delta: float) -> TradeOff | None:
    """The curve of ``event``, all its steps together; None where its losses are too large to be tabulated.

    Raises:
        NotCertified: the noise is below what the accountants can be asked about.
    """
    mean, width = pld.expected_loss([event])
    grid = next((grid for grid in _GRIDS if width <= _MAX_TABLE * grid), None)
    if grid is None or not mean <= pld.LOSS_CEILING:
        return None
    composed = pld.one_step(event.sampling_rate, event.effective_noise_multiplier, grid).self_compose(event.steps)
    zeta = event.slack_log
    epsilons = np.concatenate([np.linspace(0, 4, 161), np.linspace(4.1, 40, 360)])
    deltas = np.asarray(composed.get_delta_for_epsilon(list(epsilons)), dtype=np.float64)
    deltas = np.minimum(1.0, math.exp(zeta) * deltas + pld.FFT_ALLOWANCE * event.steps)
    at = delta * math.exp(-zeta) - pld.FFT_ALLOWANCE * event.steps
    epsilon = float(composed.get_epsilon_for_delta(at)) if at > 0 else math.inf
    return TradeOff(epsilons=epsilons + 2 * zeta, deltas=deltas, epsilon=epsilon + 2 * zeta)


def with_noise(event: LatticeGaussian, multiple: float) -> LatticeGaussian:
    """The same mechanism with ``multiple`` times its noise, never less than the accountants can be asked about."""
    variance = max(MIN_SHARE_VARIANCE, math.ceil(event.share_variance * multiple**2))
    return msgspec.structs.replace(event, share_variance=variance)
