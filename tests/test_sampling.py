# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: exact threshold, one word per unit, independent inclusions. Names follow the docstring's guarantees."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy.errors import ConfigError
from privacy.prg import Randomness
from silo.learning.sampling import poisson, threshold


class Given:
    """Words chosen by the test."""

    def __init__(self, words):
        self.words = np.array(words, dtype=np.uint64)
        self.asked = []

    def uint64(self, count):
        self.asked.append(count)
        return self.words[:count]


@given(st.floats(min_value=0.0, max_value=1.0, exclude_min=True))
def test_independent_and_exact_threshold(rate):
    exact = Fraction(rate) * 2**64
    assert threshold(rate) <= exact < threshold(rate) + 1


@given(st.floats(min_value=1e-15, max_value=1.0, exclude_max=True))
def test_independent_and_exact_at_the_boundary(rate):
    limit = threshold(rate)
    assert poisson(3, rate, Given([limit - 1, limit, 2**64 - 1])).tolist() == [0]


def test_every_unit_draws_one_word():
    for rate in (1.0, 0.3, 1e-25):
        source = Given([5] * 9)
        poisson(9, rate, source)
        assert source.asked == [9]


def test_never_truncated_any_subset_can_occur():
    for subset in range(32):
        words = [0 if subset >> i & 1 else 2**64 - 1 for i in range(5)]
        assert poisson(5, 0.5, Given(words)).tolist() == [i for i in range(5) if subset >> i & 1]


def test_case_q_is_one_takes_every_unit():
    assert poisson(4, 1.0, Given([2**64 - 1] * 4)).tolist() == [0, 1, 2, 3]


def test_case_no_unit_drawn():
    assert poisson(3, 0.1, Given([2**64 - 1] * 3)).size == 0


def test_case_no_units():
    assert poisson(0, 0.1, Randomness.from_os()).size == 0


def test_case_a_rate_below_the_resolution():
    assert poisson(2, 2.0**-65, Given([0, 0])).size == 0


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_rate_outside_is_refused(rate):
    with pytest.raises(ConfigError):
        poisson(3, rate, Randomness.from_os())


def test_inclusion_counts_are_binomial():
    """Chi-square of 20,000 units' inclusion counts over 40 samples against Binomial(40, q), and of pairs for independence."""
    rate, steps, units = 0.2, 40, 20_000
    randomness = Randomness.from_key(bytes(range(32)))
    counts = np.zeros(units, dtype=np.int64)
    together = 0
    for _ in range(steps):
        chosen = np.zeros(units, dtype=bool)
        chosen[poisson(units, rate, randomness)] = True
        counts += chosen
        together += int(np.sum(chosen[:-1] & chosen[1:]))
    cells = np.arange(2, 17)
    observed = np.array([np.sum(counts <= 2), *[np.sum(counts == k) for k in cells[1:-1]], np.sum(counts >= 16)])
    law = stats.binom(steps, rate)
    expected = units * np.array([law.cdf(2), *law.pmf(cells[1:-1]), law.sf(15)])
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    neighbours = steps * (units - 1)
    # Neighbouring pairs overlap, so the variance is a little above binomial; six of the binomial's deviations cover it.
    assert abs(together - neighbours * rate**2) < 6 * np.sqrt(neighbours * rate**2)
