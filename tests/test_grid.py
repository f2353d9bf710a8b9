# SPDX-License-Identifier: Apache-2.0
"""The grid on which changes of the model are added up: exact, close, and inside the ring for any number of silos."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.dp import ring
from privacy.dp.grid import Grid, encode, finest
from privacy.errors import ConfigError, SiloquyError

silo_counts = st.integers(1, 65_535)
bounds = st.floats(1e-6, 1e6)


@settings(max_examples=300, deadline=None)
@given(silo_counts, bounds)
def test_the_finest_power_of_two_that_cannot_overflow(silos, bound):
    made = finest(silos=silos, bound=bound)
    assert silos * made.clamp <= ring.RING_LIMIT < silos * 2 * made.clamp
    assert made.clamp & (made.clamp - 1) == 0
    assert Fraction(made.step) * made.clamp == Fraction(bound), "exact"


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), bounds, st.integers(0, 2**32))
def test_sums_lift_to_the_exact_integers_and_their_mean_is_half_a_step_away_at_most(silos, bound, seed):
    made, draw = finest(silos=silos, bound=bound), np.random.default_rng(seed)
    changes = draw.uniform(-bound, bound, (silos, 16))
    changes[:, 0], changes[:, 1] = bound, -bound
    words = np.zeros(16, dtype="<u4")
    for change in changes:
        words += encode(change, made)
    alone = [ring.lift(encode(change, made)) for change in changes]
    total = ring.lift(words)
    assert np.array_equal(total, sum(alone))
    assert all(np.all(np.abs(own * made.step - change) <= made.step / 2) for own, change in zip(alone, changes, strict=True))
    assert np.all(np.abs(total * made.step / silos - changes.mean(axis=0)) <= made.step * (0.5 + 1e-6))


@pytest.mark.parametrize("silos", [1, 2, 3, 1000, 32_767, 32_768, 65_535])
def test_as_many_silos_at_the_bound_as_there_can_be_do_not_wrap(silos):
    made = finest(silos=silos, bound=1.0)
    for edge in (made.clamp, -made.clamp):
        word = encode(np.array([edge * made.step * 1e9]), made)
        total = (int(word[0]) * silos) % 2**32
        assert ring.lift(np.array([total], dtype="<u4"))[0] == silos * edge


def test_what_is_larger_is_cut_and_halves_go_to_the_even_neighbour():
    made = Grid(clamp=8, step=0.25)
    values = np.array([0.0, -0.0, 0.125, 0.375, -0.125, -0.375, 1.99, 2.0, 2.2, -2.2, 1e308, -1e308, 5e-324])
    assert ring.lift(encode(values, made)).tolist() == [0, 0, 0, 2, 0, -2, 8, 8, 8, -8, 8, -8, 0]


@pytest.mark.parametrize(
    "wrong", [np.array([math.nan]), np.array([0.0, math.inf]), np.array([1], np.int64), np.array([1.0], np.float32)]
)
def test_what_is_not_finite_float64_is_refused(wrong):
    with pytest.raises(SiloquyError, match="finite float64"):
        encode(wrong, finest(silos=3, bound=1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"silos": 0}, "0 silos"),
        ({"silos": 2**31}, "2147483648 silos"),
        ({"silos": 1.0}, "1.0 silos"),
        ({"silos": True}, "True silos"),
        ({"bound": 0.0}, "update_bound = 0.0"),
        ({"bound": -1.0}, "update_bound = -1.0"),
        ({"bound": 1e-305}, "update_bound = 1e-305"),
        ({"bound": math.inf}, "update_bound = inf"),
        ({"bound": math.nan}, "update_bound = nan"),
    ],
)
def test_parameters_out_of_range_are_refused(change, said):
    with pytest.raises(ConfigError) as caught:
        finest(**{"silos": 3, "bound": 1.0, **change})
    assert said in caught.value.message
