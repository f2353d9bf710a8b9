# SPDX-License-Identifier: Apache-2.0
"""One step of a unit that may stand in a sum several times: k contributions of norm at most 1, each drawn by its own coin.

In units of the clipping bound the worst case is N(0, z^2) against N(J, z^2) with J from Binomial(k, q) (docs/concepts/privacy.md,
"A unit in several places"). Here are its Renyi curve and its privacy loss distribution; ``accounting`` and ``pld`` compose them.

Promised: both bound both ways of neighbouring, a unit added and a unit removed. The Renyi curve of the one way comes from an
expansion that is exact at integer orders, and from a quadrature, which must agree or nothing is certified; that of the other way
from an upper sum over cells of a monotone, log-concave one. The distribution is dp_accounting's for a mixture of Gaussians, with an
inverse of the loss that is vectorised, and solved to the last digits at both ends of its range, where theirs is rounded away.
Not promised: tightness of the Renyi curve with more than ``MOST_EXPANDED`` contributions or very little noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import NotCertified

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Floats = NDArray[np.float64]

MOST_EXPANDED = 16
"""So many contributions are expanded; beyond them, and where their number is more than 64 times the noise, see ``expands``."""

MOST_TABULATED = 64
"""Of more contributions no distribution is computed."""

_LARGEST_SHIFT = 64.0
_AGREEMENT, _FLOOR = 1e-9, 1e-11
_SPACING = 0.25  # of the quadrature, in deviations of the noise: a Gaussian is off by 2·exp(-2 pi^2 / 0.25^2) = 10^-137
_REACH, _FAR, _NEAR, _CELLS = 12.0, (-37.0, -8.0), (-8.0, 8.0), 2**12
_TABLE = 2**14  # starting points of the inverse


def expands(sigma: float, contributions: int) -> bool:
    """Whether ``rdp_curve`` takes these parameters."""
    return contributions <= MOST_EXPANDED and contributions <= _LARGEST_SHIFT * sigma


def log_binomial(contributions: int, rate: float) -> Floats:
    """log of the probability that j of the contributions are drawn, j = 0 … k; minus infinity where that cannot be."""
    if rate == 1.0:
        return np.array([-math.inf] * contributions + [0.0])
    return np.array(
        [
            math.log(math.comb(contributions, j)) + j * math.log(rate) + (contributions - j) * math.log1p(-rate)
            for j in range(contributions + 1)
        ]
    )


def log_ratio(x: Floats, sigma: float, rate: float, contributions: int) -> Floats:
    """log of the density with the unit over the density without it, at sums ``x``; it never falls in x."""
    return _height(x, np.arange(contributions + 1, dtype=np.float64), log_binomial(contributions, rate), sigma**2)


def _height(x: Floats, shifts: Floats, logs: Floats, variance: float) -> Floats:
    """log of the sum of exp(logs + (2·shift·x - shift^2)/(2·variance))."""
    top = np.full(np.shape(x), -np.inf)
    for shift, log in zip(shifts, logs, strict=True):
        top = np.logaddexp(top, log + (2 * shift * x - shift**2) / (2 * variance))
    return np.asarray(top)


def _slope(x: Floats, height: Floats, shifts: Floats, logs: Floats, variance: float) -> Floats:
    """Its derivative."""
    found = np.zeros(np.shape(x))
    for shift, log in zip(shifts, logs, strict=True):
        found += shift / variance * np.exp(log + (2 * shift * x - shift**2) / (2 * variance) - height)
    return found


@functools.lru_cache(maxsize=128)
def rdp_curve(rate: float, sigma: float, contributions: int, orders: tuple[float, ...]) -> Floats:
    """RDP of one step at ``orders``: every integer from 2 to some order, then fractions between them. Read-only.

    Formal guarantees: at each order at least the Renyi divergence of either way of neighbouring.

    Raises:
        NotCertified: expansion and quadrature disagree by more than 1e-9, or a value is not finite.
    """
    integers = [int(order) for order in orders if order == int(order)]
    removed, rounding = _expanded(rate, sigma, contributions, integers[-1])
    checked = _quadrature(integers, rate, sigma, contributions)
    agree = np.abs(removed - checked) <= _AGREEMENT * np.abs(removed) + _FLOOR + rounding
    if not (np.all(agree) and np.all(removed > 0) and np.all(removed < math.inf)):
        at = int(np.argmin(agree & (removed > 0) & (removed < math.inf)))
        raise NotCertified(
            f"RDP of {contributions} contributions at order {integers[at]}: log moment {removed[at]!r} by expansion and "
            f"{checked[at]!r} by quadrature",
            hint="these parameters are outside what can be certified; raise the noise or change the sampling rate",
            order=integers[at], sampling_rate=rate, sigma=sigma, contributions=contributions,
        )  # fmt: skip
    moments = np.maximum.reduce([removed + rounding, checked, _added(integers, rate, sigma, contributions)])
    # The log moment is convex in the order, and 0 at order 1: between two integers it is below their chord.
    curve: Floats = np.interp(orders, integers, moments) / (np.array(orders) - 1)
    curve.flags.writeable = False  # it is shared through the cache
    return curve


def quick_epsilon(rate: float, sigma: float, contributions: int, steps: int, convert: Callable[[float], float]) -> float:
    """Epsilon of so many steps by the expansion alone, at orders up to 64, for searching; ``convert`` is what an order adds."""
    moments, _ = _expanded(rate, sigma, contributions, 64)
    return min(steps * float(moment) / (order - 1) + convert(order) for order, moment in enumerate(moments, start=2))


def _expanded(rate: float, sigma: float, contributions: int, last: int) -> tuple[Floats, Floats]:
    """log E[(p/p0)^order] at orders 2 … last, p with the unit, and what rounding can hide of each.

    It is the mean of exp((S^2 - sum of j_i^2) / 2 sigma^2), S = sum of j_i, over independent j_1 … j_order from Binomial(k, q). The
    weights of S are an order-fold convolution, in logarithms; no term is negative, so nothing cancels.
    """
    j = np.arange(contributions + 1, dtype=np.float64)
    kernel = log_binomial(contributions, rate) - j**2 / (2 * sigma**2)
    weights, moments, hidden = kernel, [], []
    for order in range(2, last + 1):
        longer = np.full(order * contributions + 1, -np.inf)
        for step, factor in enumerate(kernel):
            part = slice(step, step + len(weights))
            longer[part] = np.logaddexp(longer[part], weights + factor)
        weights = longer
        terms = weights + np.arange(len(weights), dtype=np.float64) ** 2 / (2 * sigma**2)
        finite = terms[terms > -np.inf]
        moments.append(_log_sum(finite))
        hidden.append(1e-15 * order * (contributions + 1) * (1 + float(np.max(np.abs(finite)))))
    return np.array(moments), np.array(hidden)


def _quadrature(orders: list[int], rate: float, sigma: float, contributions: int) -> Floats:
    """The same log moments as integrals over the released number, by the trapezoidal rule."""
    steps = [math.ceil((2 * _REACH + order * contributions / sigma) / _SPACING) for order in orders]
    u: Floats = -_REACH + _SPACING * np.arange(max(steps) + 1, dtype=np.float64)
    ratio = log_ratio(u * sigma, sigma, rate, contributions)
    sums = [_log_sum(order * ratio[: last + 1] - u[: last + 1] ** 2 / 2) for order, last in zip(orders, steps, strict=True)]
    return np.array(sums) + math.log(_SPACING) - math.log(2 * math.pi) / 2


def _added(orders: list[int], rate: float, sigma: float, contributions: int) -> Floats:
    """log E[f] under p0, f = (p0/p)^(order-1), from above.

    f falls with the sum, and its logarithm is concave: in a cell from a it is below f(a) exp(s (u - a)), s its slope at a, and that
    is below its chord. What the chord takes off is counted at half the cell's mass, or less where the mass leans to a.
    """
    logs, shifts = log_binomial(contributions, rate), np.arange(contributions + 1, dtype=np.float64)
    if logs[0] == -math.inf:  # q = 1: one Gaussian against another, the same both ways
        return np.array([order * (order - 1) * contributions**2 / (2 * sigma**2) for order in orders], dtype=np.float64)
    edges = np.concatenate([np.linspace(*_FAR, _CELLS, endpoint=False), np.linspace(*_NEAR, _CELLS + 1)])
    below, above = (np.array([math.erfc(side * edge / math.sqrt(2)) / 2 for edge in edges]) for side in (-1, 1))
    mass, beyond = np.log(np.where(edges[1:] <= 0, np.diff(below), -np.diff(above))), math.log(above[-1])
    ratio = _height(edges * sigma, shifts, logs, sigma**2)
    slope = sigma * _slope(edges * sigma, ratio, shifts, logs, sigma**2)[:-1]
    width, lean = np.diff(edges), np.minimum(1.0, np.exp((edges[:-1] ** 2 - edges[1:] ** 2) / 2)) / 2
    found = []
    for order in orders:
        cells = mass + (1 - order) * ratio[:-1] + np.log1p(lean * np.expm1((1 - order) * slope * width))
        ends = [math.log(below[0]) + (1 - order) * logs[0], beyond + (1 - order) * ratio[-1]]
        found.append(_log_sum(np.concatenate([cells, ends])))
    return np.array(found) + 1e-12


def _log_sum(logs: Floats) -> float:
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum()))


def one_step(rate: float, sigma: float, contributions: int, grid: float) -> PrivacyLossDistribution:
    """One step's privacy loss distribution, rounded pessimistically to ``grid``: dp_accounting's for a mixture of Gaussians."""
    from dp_accounting.pld import privacy_loss_distribution, privacy_loss_mechanism

    made = functools.partial(_loss_class(), sigma, list(range(contributions + 1)), list(np.exp(log_binomial(contributions, rate))))
    both = [
        privacy_loss_distribution._create_pld_pmf_from_monotone_privacy_loss(
            made(adjacency_type=way), pessimistic_estimate=True, value_discretization_interval=grid, use_connect_dots=True
        )
        for way in (privacy_loss_mechanism.AdjacencyType.REMOVE, privacy_loss_mechanism.AdjacencyType.ADD)
    ]
    return privacy_loss_distribution.PrivacyLossDistribution(*both)


@functools.cache
def _loss_class() -> Callable[..., Any]:
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss

    class Loss(MixtureGaussianPrivacyLoss):  # type: ignore[misc]
        """Theirs, with the inverse of the loss for all values at once."""

        def inverse_privacy_losses(self, privacy_losses: Floats, precision: float = 1e-6) -> Floats:
            """For each loss the sum at which it is met; beyond the range of losses, the end of the line."""
            del precision  # it is met everywhere
            shifts, logs, variance = np.asarray(self.sensitivities), np.log(self.sampling_probs), self._variance
            removed = self.adjacency_type == AdjacencyType.REMOVE
            wanted = np.asarray(privacy_losses, dtype=np.float64) * (1 if removed else -1)
            found = _inverse(wanted, shifts, logs, variance)
            return -found if removed else found

    return Loss


def _inverse(wanted: Floats, shifts: Floats, logs: Floats, variance: float) -> Floats:
    """The numbers at which ``_height``, which never falls, is as high as wanted."""
    reach = 40 * math.sqrt(variance) + float(np.max(shifts))
    table = np.linspace(-reach, reach, _TABLE)
    heights = np.maximum.accumulate(_height(table, shifts, logs, variance))
    cell = np.clip(np.searchsorted(heights, wanted), 1, _TABLE - 1)
    low, high = table[cell - 1], table[cell]
    y = np.clip(np.interp(wanted, heights, table), low, high)
    for _ in range(4):
        height = _height(y, shifts, logs, variance)
        slope = _slope(y, height, shifts, logs, variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(slope > 0, (wanted - height) / slope, 0.0)
        y = np.clip(y + step, low, high)
    return np.asarray(y)
