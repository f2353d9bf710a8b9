# SPDX-License-Identifier: Apache-2.0
"""The search for the least noise: the same answer from anywhere, in few looks. Each look is two accountants' work."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.dp import accounting
from privacy.dp.mechanism import LatticeGaussian

COSTS = {
    "smooth": lambda tick: (9_000 / tick) ** 1.3,
    "steep": lambda tick: (9_000 / tick) ** 12,
    "bent": lambda tick: 3e3 / tick + (8_000 / tick) ** 9,
    "stairs": lambda tick: 9_000 / (tick - tick % 700 + 1),
    "a wall": lambda tick: math.inf if tick < 9_000 else 0.5,
    "nothing beyond it": lambda tick: 1e300 if tick < 9_000 else 0.0,
    "flat beside it": lambda tick: 1.0000001 if tick < 9_000 else 0.9999999,
}


def searched(cost, upper: int, probe: int) -> tuple[int, int]:
    """(the answer, how many ticks were looked at)."""
    looked = set()

    def seen(tick: int) -> float:
        looked.add(tick)
        return cost(tick)

    return accounting._smallest_within(seen, 1.0, upper, probe), len(looked)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@given(upper=st.integers(9_801, 200_000), probe=st.integers(-10, 10**9))
def test_the_answer_is_the_least_that_is_within_wherever_the_search_begins(cost, upper, probe):
    found, looks = searched(cost, upper, probe)
    assert cost(found) <= 1.0 < cost(found - 1)
    assert looks <= 1 + accounting._MOST_LINES + math.ceil(math.log2(upper)), "halving ends it where no line helps"


@pytest.mark.parametrize("power", [1.1, 1.5, 2.0, 3.0])
def test_a_cost_that_falls_as_guessed_takes_five_looks(power):
    def cost(tick: int) -> float:
        return (9_000.5 / tick) ** power

    upper = 9_700
    probe = accounting._guess(lambda tick: cost(tick) * 1.1, upper, cost(upper))
    assert probe == 9_001
    found, looks = searched(cost, upper, probe)
    assert found == 9_001
    assert looks <= 5


def test_where_nothing_is_known_of_the_slope_the_guess_is_lower():
    assert accounting._guess(lambda tick: 0.0, 1_000, 0.9) == 750
    assert accounting._guess(lambda tick: math.inf, 1_000, 0.9) == 750
    assert accounting._guess(lambda tick: 1 / tick, 1_000, 0.0) == 750
    assert accounting._guess(lambda tick: 1 / tick, 1, 0.9) == 0


def test_the_quick_figure_of_several_mechanisms_is_that_of_their_composition():
    def event(rate: float, sigma: float, steps: int) -> LatticeGaussian:
        variance = int((sigma * 2**20) ** 2 / 3)
        return LatticeGaussian(sampling_rate=rate, lattice_bits=20, share_variance=variance, shares=3, dimension=100, steps=steps)

    several = [event(1.0, 6.0, 1), event(0.1, 1.5, 40)]
    quick, whole = accounting._own_epsilon_rdp(several, 1e-5), accounting.epsilon_rdp(several, 1e-5)
    assert quick == pytest.approx(whole, rel=0.02)
    assert quick > max(accounting._own_epsilon_rdp([each], 1e-5) for each in several)
