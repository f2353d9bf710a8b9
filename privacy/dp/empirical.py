# SPDX-License-Identifier: Apache-2.0
"""From guesses about canaries to a lower bound on epsilon: the arithmetic of a one-run audit, on numpy alone.

An auditor puts canaries into one run, each with probability 1/2 by a secret fair coin, and guesses afterwards, for those of which
its scores are surest, which were in. Too many right guesses contradict a claim of privacy. Two bounds, both at the stated
confidence, and both for a rule of guessing that was fixed before the run (``RULE``), with a union bound over it:

- *One run* (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, Theorem 5.2, Corollary 5.4): against any (epsilon, delta) mechanism.
- *f-DP* (Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235, Algorithm 3): against one trade-off curve, and so a bound within
  a family of mechanisms (``privacy.dp.tradeoff``); about twice as tight.

Not promised: that epsilon is near the bound, or below anything. An audit shows that something is broken, never that nothing is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Inverse = Callable[[float], float]
"""y to the smallest x from which a mechanism can reach y: 1 - f(x) = y. For a symmetric trade-off curve f it is f(1 - y)."""

RULE = ((0.05, 0.05), (0.15, 0.15), (0.4, 0.4), (0.1, 0.0), (0.3, 0.0))
"""The rule of guessing: which parts of the canaries are guessed to be in (the largest scores) and to be out (the smallest)."""

MOST_EPSILON = 64.0
_ROUNDING = 1 + 1e-9  # every tail is rounded up by more than float64 loses up to 10^4 guesses


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one entry of the rule gave: ``guesses`` made, ``correct`` of them right."""

    guesses: int
    correct: int


def outcomes(scores: Floats, included: Booleans) -> tuple[Outcome, ...]:
    """One outcome per entry of ``RULE`` for canaries with these ``scores`` (m,), of which ``included`` (m,) says the truth.

    Formal guarantees:
        - *Fixed in advance*: how many are guessed depends on m alone; which, on ``scores`` alone. The coins decide what is right.
        - *Ties*: equal scores, and NaN as the smallest, are ordered by the canary's number, which the coins do not touch.

    Raises:
        ConfigError: the shapes differ, or there are fewer than 100 canaries.
    """
    if scores.shape != included.shape or scores.ndim != 1 or len(scores) < 100:
        raise ConfigError(f"{scores.shape} scores for {included.shape} canaries", hint="audit with 100 canaries or more")
    order = np.argsort(np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    found = []
    for inside, outside in RULE:
        top, bottom = (round(len(scores) * part) for part in (inside, outside))
        right = int(included[order[len(order) - top :]].sum()) + int((~included[order[:bottom]]).sum())
        found.append(Outcome(guesses=top + bottom, correct=right))
    return tuple(found)


def p_value(outcome: Outcome, *, canaries: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of at least so many right guesses, if the mechanism is (epsilon, delta)-private.

    Formal guarantees: Corollary 5.4 of arXiv 2305.08846. With R ~ Binomial(guesses, e^epsilon/(1 + e^epsilon)) it is
    P[R >= correct] + 2·canaries·delta · max over i of P[correct - i <= R < correct]/i; rounded up, at most 1. It holds for every
    way to score and guess, for units added or removed, and grows with epsilon.

    ================  =================================
    case              result
    ================  =================================
    no right guess    1
    delta = 0         the binomial tail alone
    ================  =================================
    """
    if outcome.correct == 0:
        return 1.0
    masses = binomial(outcome.guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(masses[outcome.correct :].sum())
    below = np.cumsum(masses[outcome.correct - 1 :: -1])
    alpha = float(np.max(below / np.arange(1, outcome.correct + 1)))
    return min(1.0, (tail + 2 * canaries * delta * alpha) * _ROUNDING)


def one_run(found: Sequence[Outcome], *, canaries: int, delta: float, significance: float) -> float:
    """A lower bound on epsilon at ``delta``: too large with probability at most ``significance``, whatever the mechanism is.

    Formal guarantees: each outcome is tested at ``significance`` divided by their number, so that the largest of the bounds holds
    (union bound). For every epsilon the mechanism really has, P[bound > epsilon] <= significance.

    Edge case: 0 where nothing is refuted; never above ``MOST_EPSILON``.
    """
    each = significance / len(found)

    def refuted(outcome: Outcome, epsilon: float) -> bool:
        return p_value(outcome, canaries=canaries, epsilon=epsilon, delta=delta) <= each

    return max(_last(functools.partial(refuted, outcome), 0.0, MOST_EPSILON) for outcome in found)


def refutes(outcome: Outcome, inverse: Inverse, *, canaries: int, significance: float) -> bool:
    """Whether so many right guesses refute that the mechanism is f-private, for the curve f behind ``inverse``.

    Formal guarantees: Algorithm 3 of arXiv 2410.22235 (two choices a canary, with a cap on the guesses): for an f-private mechanism
    it is true with probability at most ``significance``. A smaller ``inverse`` (a weaker claim) is never refuted more easily.

    Edge case: fewer right guesses than wrong ones refute nothing.
    """
    guesses, correct = outcome.guesses, outcome.correct
    right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more = max(wrong, inverse(right))
        if more == wrong:  # neither changes any more
            break
        right = min(1.0, right + i / (guesses - i) * (more - wrong))
        wrong = more
    return right + wrong > guesses / canaries * _ROUNDING


def in_family(
    found: Sequence[Outcome], curve: Callable[[float], Inverse | None], *, canaries: int, significance: float, least: float
) -> float | None:
    """The smallest noise, as a multiple of the claimed one, that the outcomes refute within a family of mechanisms.

    Args:
        curve: the claim at a multiple of its noise, more private as it grows; None where it gives no curve, which is never refuted.
        least: the smallest multiple to look at.

    Formal guarantees: for a mechanism of the family with the multiple k, the result is at most k with probability at most
    ``significance``: each outcome has an equal part of it. So the epsilon of the result is a lower bound on the mechanism's.

    Edge cases: None where not even 1,000 times the noise is refuted; otherwise within 2 % above the smallest multiple refuted.
    """
    each = significance / len(found)

    def refuted(log_multiple: float) -> bool:
        inverse = curve(math.exp(-log_multiple))
        return inverse is not None and any(refutes(o, inverse, canaries=canaries, significance=each) for o in found)

    low = -math.log(1000.0)
    if not refuted(low):
        return None
    # The honest answer lies above 1, so the half in which it lies is asked first.
    low, high = (0.0, -math.log(least)) if refuted(0.0) else (low, 0.0)
    return math.exp(-_last(refuted, low, high, tolerance=0.02))


@dataclass(frozen=True, kw_only=True)
class Roc:
    """How well a score tells members from others: the curve's points (false, true positive rate), ascending, and its area."""

    false_positive: Floats
    true_positive: Floats
    area: float

    def at(self, rate: float) -> float:
        """The true positive rate at a false positive rate of at most ``rate``."""
        return float(self.true_positive[np.searchsorted(self.false_positive, rate, side="right") - 1])


def roc(scores: Floats, included: Booleans) -> Roc:
    """The curve over all thresholds; equal scores pass together. One canary in and one out are the least."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    inside = np.cumsum(included[order])[ends]
    outside = ends + 1 - inside
    true = np.concatenate([[0.0], inside / max(1, inside[-1])])
    false = np.concatenate([[0.0], outside / max(1, outside[-1])])
    area = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
    return Roc(false_positive=false, true_positive=true, area=area)


def binomial(trials: int, chance: float) -> Floats:
    """P[Binomial(trials, chance) = k] for k = 0 … trials, to a relative 1e-9 up to 10^4 trials and 1e-7 up to 10^7."""
    if chance in (0.0, 1.0):
        masses = np.zeros(trials + 1)
        masses[trials if chance else 0] = 1.0
        return masses
    k = np.arange(trials + 1)
    logs = _log_factorials(trials)
    odds: Floats = logs[-1] - logs - logs[::-1] + k * math.log(chance) + (trials - k) * math.log1p(-chance)
    return np.exp(odds)


def tail(trials: int, chance: float, found: int) -> float:
    """Twice the smaller of P[X <= found] and P[X >= found] for X ~ Binomial(trials, chance): an exact two-sided test."""
    masses = binomial(trials, chance)
    return min(1.0, 2 * min(float(masses[: found + 1].sum()), float(masses[found:].sum())))


@functools.lru_cache(maxsize=8)
def _log_factorials(largest: int) -> Floats:
    """log k! for k = 0 … largest: exact products up to 20!, then Stirling's series, whose next term is below 1e-12."""
    n = np.arange(1, largest + 1, dtype=np.float64)
    series = n * np.log(n) - n + np.log(2 * math.pi * n) / 2 + 1 / (12 * n) - 1 / (360 * n**3) + 1 / (1260 * n**5)
    series[:20] = [math.log(math.factorial(k)) for k in range(1, min(largest, 20) + 1)]
    return np.concatenate([[0.0], series])


def _last(holds: Callable[[float], bool], low: float, high: float, *, tolerance: float = 1e-4) -> float:
    """Where a property that holds up to a point ends in [low, high], at most ``tolerance`` below; low where it never holds."""
    if holds(high):
        return high
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def merged(parts: Iterable[tuple[Outcome, ...]]) -> tuple[Outcome, ...]:
    """The outcomes of several scores as one rule: the union bound then counts them all."""
    return tuple(outcome for part in parts for outcome in part)


def interval(found: int, trials: int, error: float) -> tuple[float, float]:
    """An interval that holds the chance behind ``found`` of ``trials`` independent trials (Clopper, Pearson 1934).

    Formal guarantees: it misses the chance with probability at most ``error``, half of it on each side; its ends are the exact ones
    moved outwards by at most 1e-6.
    """

    def low(chance: float) -> bool:
        return float(binomial(trials, chance)[found:].sum()) <= error / 2

    def high(chance: float) -> bool:  # of a failure
        return float(binomial(trials, chance)[trials - found :].sum()) <= error / 2

    least = 0.0 if found == 0 else _last(low, 0.0, found / trials, tolerance=1e-6)
    most = 1.0 if found == trials else 1 - _last(high, 0.0, 1 - found / trials, tolerance=1e-6)
    return least, most
