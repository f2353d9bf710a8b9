# SPDX-License-Identifier: Apache-2.0
"""Mechanisms in, (epsilon, delta) out: two accountants, two implementations of one of them, and no figure when they disagree.

Promised: a ``Certificate`` bounds the composition of the given mechanisms under add-or-remove-one neighbours. Its epsilon is
the smaller of a pessimistic privacy loss distribution (PLD, dp_accounting) and Renyi DP (RDP); the RDP curves of
dp_accounting and of this module agree at the integer orders 2 to 256, or nothing is certified. The accountants see the
continuous Gaussian at ``effective_noise_multiplier``; the discrete mechanism is within ``slack_log`` = zeta of it in max
divergence, so epsilon grows by 2 zeta and delta is evaluated at delta / exp(zeta) (docs/concepts/privacy.md).

``certify`` is for parameters fixed before the first step. What is chosen after a release was seen (another run, more
rounds) is bounded by ``certify_adaptive``, an RDP filter. A unit that contributes several times (``mechanism.LatticeMixture``)
has a curve and a distribution of its own (``mixture``). Not promised: credit for disjoint units or for participation. The
central-limit (GDP) accountant is absent on purpose: it under-reports.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privacy.dp import mixture, pld
from privacy.dp.mechanism import Noised
from privacy.errors import NotCertified, PrivacyRefusal

Floats = NDArray[np.float64]

INTEGER_ORDERS = tuple(range(2, 257))
FRACTIONAL_ORDERS = tuple(tenths / 10 for tenths in range(21, 110) if tenths % 10)
"""Between 2 and 11, where one step in the order moves epsilon; each is held between its integer neighbours."""

_AGREEMENT = 1e-9
# dp_accounting's log-gamma loses about this much of log A at order 256; it matters only where log A itself is near zero.
_LOG_GAMMA_FLOOR = 1e-11
_TICKS, _MAX_TICKS = 10_000, 10_000 * 10_000  # calibration moves in steps of 1e-4
_MOST_LINES, _FAR = 8, 16.0  # so many looks follow straight lines, the rest halve; further out than so many distances is no line


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """An (epsilon, delta) bound on a composition, with the two figures it came from.

    ``epsilon_pld`` is infinite and ``discretization`` 0 where no PLD was computed. ``orders_checked`` counts the integer
    orders at which both RDP implementations were compared.
    """

    epsilon: float
    epsilon_pld: float
    epsilon_rdp: float
    delta: float
    discretization: float
    orders_checked: int


def certify(events: Sequence[Noised], delta: float) -> Certificate:
    """The certified (epsilon, delta) of all ``events`` together, for parameters that were fixed in advance.

    Formal guarantees: epsilon is at least the true epsilon of the discrete mechanisms, the smaller of two valid bounds.

    ===============================  ==========================================
    case                             result
    ===============================  ==========================================
    no events                        epsilon 0
    expected privacy loss above 200  RDP alone, ``epsilon_pld`` infinite
    infinite or NaN bounds only      ``NotCertified``
    RDP implementations disagree     ``NotCertified``
    delta not inside (0, 1)          ``PrivacyRefusal``
    ===============================  ==========================================

    Raises:
        NotCertified, PrivacyRefusal: as above.
    """
    return _certify(_merged(events), _proper(delta))


def certify_adaptive(events: Sequence[Noised], delta: float, *, order: int) -> Certificate:
    """The (epsilon, delta) of ``events`` whose parameters may have been chosen after earlier releases were seen.

    Formal guarantees: valid for adaptively chosen mechanisms (Feldman, Zrnic 2021, Theorem 4.3) when ``order`` was fixed
    before the first of them and every step was admitted against the same limit. ``epsilon`` and ``epsilon_rdp`` are the
    bound at ``order`` alone; ``epsilon_pld`` reads "if parameters had been fixed in advance".

    Raises:
        NotCertified, PrivacyRefusal: as ``certify``.
    """
    fixed = _certify(_merged(events), _proper(delta))
    if not events:
        return fixed
    zeta = pld.slack(events)
    composed = sum(count * _curve(*key)[order - 2] for key, count in pld.steps_of(events).items())
    epsilon = float(composed) + conversion(order, delta * math.exp(-zeta)) + 2 * zeta
    if not epsilon < math.inf:
        raise _not_finite(math.inf, epsilon)
    return replace(fixed, epsilon=max(0.0, epsilon), epsilon_rdp=max(0.0, epsilon))


def epsilon_rdp(events: Sequence[Noised], delta: float) -> float:
    """Epsilon of the composition by RDP, at integer orders and tenths; at each order the larger of two implementations counts.

    Raises:
        NotCertified: the implementations disagree, or the result is not finite.
    """
    zeta = pld.slack(events)
    curve = np.sum([count * _curve(*key) for key, count in pld.steps_of(events).items()], axis=0)
    best = _best_epsilon(curve, _proper(delta) * math.exp(-zeta)) + 2 * zeta if events else 0.0
    if not best < math.inf:
        raise _not_finite(math.inf, best)
    return best


def epsilon_pld(events: Sequence[Noised], delta: float) -> float:
    """Epsilon of the composition by pessimistic PLD; infinite where the screen says that it must not be tried."""
    return _certify(_merged(events), _proper(delta)).epsilon_pld


def check_delta(delta: float, federation_units: int) -> None:
    """Nothing, when delta is small enough for a federation with at most ``federation_units`` privacy units in all.

    Raises:
        PrivacyRefusal: delta > min(1e-5, 1 / (10 * units)), or it is no probability.
    """
    _proper(delta)
    limit = min(1e-5, 1 / (10 * max(1, federation_units)))
    if not delta <= limit:
        raise PrivacyRefusal(
            f"delta is {delta:g}, at most {limit:g} is allowed for {federation_units} units",
            hint=f"set delta to {limit:g} or less", delta=delta, limit=limit, units=federation_units,
        )


class Curve:
    """Certified epsilon of one mechanism after k steps, on top of a fixed ``past``; ``curve(0)`` is the past alone."""

    def __init__(self, event: Noised, delta: float, *, past: Sequence[Noised] = ()) -> None:
        self._event = event
        self._delta = _proper(delta)
        self._past = tuple(past)

    def __call__(self, steps: int) -> float:
        """Certified epsilon after ``steps`` steps."""
        return certify([*self._past, self._event.with_steps(steps)] if steps else self._past, self._delta).epsilon

    def points(self, steps: Iterable[int]) -> list[tuple[int, float]]:
        """(k, epsilon after k steps) for each k, for charts and progress bars."""
        return [(count, self(count)) for count in steps]


def calibrate(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, make: Callable[[float], Noised],
    beside: Sequence[Noised] = (),
) -> float:  # fmt: skip
    """The smallest noise multiplier sigma, on a grid of 1e-4, whose plan is certified at (epsilon, delta), ``beside`` included.

    ``make`` gives one step's mechanism for sigma, at ``sampling_rate``; more sigma must never mean less noise.

    Formal guarantees: the certified epsilon at the result is at most ``epsilon``; one grid step below it is above.

    Raises:
        NotCertified: no sigma up to 10,000 reaches the target.
        PrivacyRefusal: the target is no positive number, or ``make`` uses another sampling rate.
    """
    _proper(delta)
    if not 0 < epsilon < math.inf:
        raise PrivacyRefusal(f"the target epsilon is {epsilon}, it must be a positive number", hint="correct epsilon")

    def event(ticks: int) -> Noised:
        made = make(ticks / _TICKS).with_steps(steps)
        if made.sampling_rate != sampling_rate:
            message = f"the plan samples at {made.sampling_rate}, calibration was asked for {sampling_rate}"
            raise PrivacyRefusal(message, hint="use one sampling rate")
        return made

    def by_rdp(ticks: int) -> float:
        return _or_infinity(lambda: _own_epsilon_rdp([*beside, event(ticks)], delta))

    upper = _first_within(by_rdp, epsilon)

    def cost(ticks: int) -> float:
        return _or_infinity(lambda: certify([*beside, event(ticks)], delta).epsilon)

    while not cost(upper) <= epsilon:
        upper += 1 + upper // 16  # the search above looks at fewer orders, and of a mixture at one way of neighbouring
    return _smallest_within(cost, epsilon, upper, _guess(by_rdp, upper, cost(upper) / epsilon)) / _TICKS


@functools.lru_cache(maxsize=512)
def rdp_curve(sampling_rate: float, noise_multiplier: float) -> Floats:
    """RDP of one Poisson-subsampled Gaussian step at the integer orders 2 to 256, shape (255,), read-only.

    Mironov, Talwar, Zhang, arXiv 1908.10530, equation 3.3, written as log1p of the sum from k = 2 of
    C(order, k) (1-q)^(order-k) q^k (exp(k(k-1)/2 sigma^2) - 1), so that small values keep their digits.
    """
    orders = np.array(INTEGER_ORDERS, dtype=np.float64)
    if sampling_rate == 1.0:
        curve: Floats = orders / (2 * noise_multiplier**2)
    else:
        moments = [_log_moment(order, sampling_rate, noise_multiplier) for order in INTEGER_ORDERS]
        curve = np.array(moments) / (orders - 1)
    curve.flags.writeable = False  # it is shared through the cache
    return curve


def _log_moment(order: int, rate: float, sigma: float) -> float:
    """log E[(p/p0)^order] of one step, to full relative precision even when it is near zero."""
    k = np.arange(2, order + 1, dtype=np.float64)
    growth = k * (k - 1) / (2 * sigma**2)
    # log(exp(x) - 1) without overflow for large x and without cancellation for small x.
    excess = np.where(growth > 1, growth + np.log1p(-np.exp(-np.maximum(growth, 1))), np.log(np.expm1(np.minimum(growth, 1))))
    gamma = _LOG_GAMMA
    choose = gamma[order + 1] - gamma[3 : order + 2] - gamma[order - 1 : 0 : -1]
    terms = choose + (order - k) * math.log1p(-rate) + k * math.log(rate) + excess
    top = float(terms.max())
    log_sum = top + math.log(math.fsum(np.exp(terms - top)))
    return float(np.logaddexp(0.0, log_sum)) if log_sum > 0 else math.log1p(math.exp(log_sum))


_LOG_GAMMA: Floats = np.array([math.inf, *(math.lgamma(n) for n in range(1, INTEGER_ORDERS[-1] + 2))])


@functools.lru_cache(maxsize=512)
def _agreed_curve(rate: float, sigma: float) -> Floats:
    """RDP of one step at the integer, then the fractional orders: the larger of both implementations, after they agreed."""
    # The accountant's public face gives epsilon only; the curve itself is what two implementations can be held to.
    from dp_accounting.rdp.rdp_privacy_accountant import _compute_rdp_poisson_subsampled_gaussian as reference_curve

    own = rdp_curve(rate, sigma)
    reference = np.asarray(reference_curve(rate, sigma, [float(order) for order in INTEGER_ORDERS]))
    floor = _LOG_GAMMA_FLOOR / (np.array(INTEGER_ORDERS) - 1)
    agree = np.abs(own - reference) <= _AGREEMENT * own + floor
    if not (np.all(agree) and np.all(own > 0) and np.all(own < math.inf)):
        at = int(np.argmin(agree & (own > 0) & (own < math.inf)))
        raise NotCertified(
            f"RDP at order {INTEGER_ORDERS[at]} is {own[at]!r} by our formula and {reference[at]!r} by dp_accounting",
            hint="these parameters are outside what can be certified; raise the noise or change the sampling rate",
            order=INTEGER_ORDERS[at], own=repr(own[at]), dp_accounting=repr(reference[at]), sampling_rate=rate, sigma=sigma,
        )
    fractional = np.asarray(reference_curve(rate, sigma, list(FRACTIONAL_ORDERS)))
    # RDP never falls with the order, so an order that left its neighbours (or was set to infinity) counts as the next integer.
    below, above = (own[[edge(order) - 2 for order in FRACTIONAL_ORDERS]] for edge in (math.floor, math.ceil))
    inside = (fractional >= below) & (fractional <= above)
    return np.concatenate([np.maximum(own, reference), np.where(inside, fractional, above)])


def _curve(rate: float, sigma: float, contributions: int) -> Floats:
    """RDP of one step at the integer, then the fractional orders, for a unit of so many contributions, each drawn by itself.

    The noise is a sum of k independent parts, each of a k-th of its variance: whoever sees each contribution with a part of its own
    sees more. So k steps at sigma / sqrt(k) bound it too; that counts where there is too much to expand (``mixture.expands``).
    """
    if contributions == 1:
        return _agreed_curve(rate, sigma)
    if mixture.expands(sigma, contributions):
        return mixture.rdp_curve(rate, sigma, contributions, INTEGER_ORDERS + FRACTIONAL_ORDERS)
    return contributions * _agreed_curve(rate, math.nextafter(sigma / math.sqrt(contributions), 0.0))


def _own_epsilon_rdp(events: Sequence[Noised], delta: float) -> float:
    """Epsilon by our own curve at the integer orders: 20 times faster than ``epsilon_rdp``, for searching. Slack is left out."""
    steps = pld.steps_of(events)
    if any(contributions > 1 for _, _, contributions in steps):
        (key, count), *others = steps.items()
        if others or not mixture.expands(key[1], key[2]):
            return epsilon_rdp(events, delta)
        return max(0.0, mixture.quick_epsilon(*key, count, lambda order: conversion(order, delta)))
    curve = np.sum([count * rdp_curve(rate, sigma) for (rate, sigma, _), count in steps.items()], axis=0)
    return _best_epsilon(curve, delta)


def _best_epsilon(curve: Floats, delta: float) -> float:
    """The smallest epsilon over the orders of ``curve``, which are the integer ones first; NaN stays NaN."""
    orders = (INTEGER_ORDERS + FRACTIONAL_ORDERS)[: len(curve)]
    best = float(np.min(curve + np.array([conversion(order, delta) for order in orders])))
    return 0.0 if best < 0 else best


def conversion(order: float, delta: float) -> float:
    """What RDP at ``order`` plus this gives is epsilon at ``delta``: Canonne, Kamath, Steinke, arXiv 2004.00010, Prop. 12."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@functools.lru_cache(maxsize=4096)
def _certify(events: tuple[Noised, ...], delta: float) -> Certificate:
    if not events:
        return Certificate(epsilon=0.0, epsilon_pld=0.0, epsilon_rdp=0.0, delta=delta, discretization=0.0, orders_checked=0)
    by_rdp = epsilon_rdp(events, delta)
    by_pld, grid = pld.refined(events, delta, by_rdp)
    epsilon = min(by_rdp, by_pld)
    if not epsilon < math.inf:
        raise _not_finite(by_pld, by_rdp)
    return Certificate(
        epsilon=epsilon, epsilon_pld=by_pld, epsilon_rdp=by_rdp, delta=delta, discretization=grid,
        orders_checked=len(INTEGER_ORDERS),
    )


def _first_within(cost: Callable[[int], float], target: float) -> int:
    """The smallest tick with cost at most ``target``, by doubling and halving."""
    upper = _TICKS
    while not cost(upper) <= target:
        upper *= 2
        if upper > _MAX_TICKS:
            raise NotCertified(
                f"no noise multiplier up to {_MAX_TICKS / _TICKS:g} reaches epsilon {target:g}",
                hint="allow a larger epsilon or delta, or plan fewer rounds", target=target,
            )
    return bisect.bisect_left(range(upper), True, lo=1, key=lambda ticks: cost(ticks) <= target)


def _guess(by_rdp: Callable[[int], float], upper: int, share: float) -> int:
    """Where epsilon, now ``share`` of its target at ``upper``, meets it if it falls with sigma as fast as RDP does there."""
    near = upper - 1 - upper // 16
    high, low = by_rdp(upper), by_rdp(near) if near > 0 else math.inf
    if not (0 < high < low < math.inf and share > 0):
        return upper * 3 // 4
    slope = math.log(low / high) / math.log(upper / near)
    return math.ceil(upper * math.pow(share, 1 / slope))


def _smallest_within(cost: Callable[[int], float], target: float, upper: int, probe: int) -> int:
    """The smallest tick with cost at most ``target``, from ``upper`` that meets it; few calls, for a smooth cost.

    ``probe`` is looked at first. The answer does not depend on it, as long as more ticks never cost more.
    """
    lower, last, looks = 0, (upper, cost(upper)), 0
    while upper - lower > 1:
        probe = min(max(probe, lower + 1), upper - 1)
        before, last = last, (probe, cost(probe))
        if last[1] <= target:
            upper = probe
        else:
            lower = probe
        looks += 1
        line = _meets(before, last, target) if looks < _MOST_LINES else 0
        probe = line or (lower + upper) // 2
    return upper


def _meets(one: tuple[int, float], other: tuple[int, float], target: float) -> int:
    """The first tick at which a straight line in log sigma and log epsilon is within ``target``; 0 where it cannot say."""
    (x, a), (y, b) = one, other
    if not (0 < a < math.inf and 0 < b < math.inf and a != b):
        return 0
    share = math.log(a / target) / math.log(a / b)
    return math.ceil(x * math.pow(y / x, share)) if abs(share) < _FAR else 0


def _or_infinity(cost: Callable[[], float]) -> float:
    try:
        return cost()
    except NotCertified:
        return math.inf


def _merged(events: Sequence[Noised]) -> tuple[Noised, ...]:
    """Equal mechanisms as one with their steps summed, in one order: the key under which figures are cached."""
    counts: dict[Noised, int] = {}
    for event in events:
        counts[event.with_steps(1)] = counts.get(event.with_steps(1), 0) + event.steps
    return tuple(sorted((event.with_steps(count) for event, count in counts.items()), key=lambda event: event.as_json()))


def _proper(delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyRefusal(f"delta is {delta}, it must lie between 0 and 1", hint="correct delta", delta=repr(delta))
    return delta


def _not_finite(by_pld: float, by_rdp: float) -> NotCertified:
    return NotCertified(
        f"no finite bound: epsilon is {by_pld} by PLD and {by_rdp} by RDP", hint="raise the noise or plan fewer rounds",
        epsilon_pld=repr(by_pld), epsilon_rdp=repr(by_rdp),
    )
