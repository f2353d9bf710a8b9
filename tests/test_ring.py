# SPDX-License-Identifier: Apache-2.0
"""The plan's inequalities, recomputed another way, and the exactness of sums through the ring."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.dp import ring
from privacy.dp.noise import discrete_gaussian
from privacy.dp.ring import Plan, clamp, encode, lift, plan
from privacy.errors import ConfigError, SiloquyError
from privacy.prg import Randomness

USUAL = {"silos": 5, "shares": 4, "dimension": 294_912, "sampling_rate": 0.2, "units": 11_000, "noise_multiplier": 5.3}


def fits(p, *, silos, shares, dimension, sampling_rate, units, noise_multiplier):
    """The upper conditions of ``ring.plan`` at p in 60-digit decimals: (fits, s², H, Q)."""
    with localcontext() as context:
        context.prec = 60
        variance = (Decimal(noise_multiplier) ** 2 * 4**p / shares).to_integral_value("ROUND_CEILING")
        headroom = (12 * variance.sqrt() * Decimal(silos).sqrt() - Decimal("1e-40")).to_integral_value("ROUND_CEILING")
        clamp_at = int((2**31 - 1 - headroom) // silos) if headroom < 2**31 else -1
        expected = Decimal(sampling_rate) * units
        small = 2**p * (expected + 6 * expected.sqrt()) <= clamp_at
        return small and 2 * p + math.ceil(math.log2(dimension)) <= 62 and variance <= 2**48, int(variance), int(headroom), clamp_at


terms = st.fixed_dictionaries({
    "silos": st.integers(1, 200), "shares": st.integers(1, 200), "dimension": st.integers(1, 5_000_000),
    "sampling_rate": st.floats(1e-4, 1.0), "units": st.integers(1, 1_000_000),
    "noise_multiplier": st.just(0.0) | st.floats(1e-3, 100.0),
})


@settings(max_examples=300, deadline=None)
@given(terms)
def test_plan_is_the_largest_lattice_that_fits_or_is_refused(values):
    values["shares"] = min(values["shares"], values["silos"])
    largest = next((p for p in range(20, 0, -1) if fits(p, **values)[0]), None)
    coarse = largest is None or largest < math.log2(values["dimension"]) / 2 + 6
    weak = largest is not None and 0 < fits(largest, **values)[1] < 4096
    if coarse or weak:
        with pytest.raises(ConfigError, match=r"\d"):
            plan(**values)
        return
    chosen = plan(**values)
    _, variance, headroom, clamp_at = fits(largest, **values)
    assert chosen == Plan(lattice_bits=largest, share_variance=variance, clamp=clamp_at, headroom=headroom, silos=values["silos"])
    assert plan(**values, lattice_bits=largest) == chosen


@settings(max_examples=200, deadline=None)
@given(terms, st.integers(1, 20))
def test_guarantees_of_a_given_lattice(values, bits):
    values["shares"] = min(values["shares"], values["silos"])
    try:
        made = plan(**values, lattice_bits=bits)
    except ConfigError:
        ok, variance, _, _ = fits(bits, **values)
        assert not ok or bits < math.log2(values["dimension"]) / 2 + 6 or variance < 4096
        return
    assert made.silos * made.clamp + made.headroom <= 2**31 - 1, "No overflow"
    assert made.lattice_bits == bits >= math.log2(values["dimension"]) / 2 + 6, "Fine enough"
    assert values["shares"] * made.share_variance >= Decimal(values["noise_multiplier"]) ** 2 * 4**bits, "Enough noise"
    assert made.headroom >= 12 * math.sqrt(made.share_variance * values["silos"]) * (1 - 1e-12)
    assert made.share_variance >= 4096 or values["noise_multiplier"] == 0


def test_plan_same_everywhere_worked_examples():
    assert plan(**USUAL) == Plan(lattice_bits=17, share_variance=120_645_631_345, clamp=427_632_703, headroom=9_320_132, silos=5)
    large = plan(silos=200, shares=150, dimension=5_000_000, sampling_rate=0.01, units=1000, noise_multiplier=3.0)
    assert large == Plan(lattice_bits=18, share_variance=4_123_168_605, clamp=10_682_932, headroom=10_897_122, silos=200)


def test_plan_lowers_the_lattice_where_squares_would_not_fit_int64():
    wide = plan(**{**USUAL, "dimension": 2**22 + 1, "units": 500})
    assert wide.lattice_bits == 19
    with pytest.raises(ConfigError, match="63, at most 62"):
        plan(**{**USUAL, "dimension": 2**22 + 1, "units": 500}, lattice_bits=20)


def test_plan_decides_exactly_at_each_threshold():
    quiet = {"silos": 29, "shares": 1, "dimension": 1, "sampling_rate": 0.1, "noise_multiplier": 0.0}
    # Q = 74,051,160 is 70.62·2²⁰; B₊ is 70.50 at 35.0 expected units and 70.65 at 35.1.
    assert plan(**quiet, units=350).lattice_bits == 20
    assert plan(**quiet, units=351).lattice_bits == 19
    assert plan(**{**USUAL, "dimension": 2**22, "units": 500}).lattice_bits == 20
    small = {"silos": 2, "shares": 1, "dimension": 1, "sampling_rate": 0.1, "units": 100, "lattice_bits": 12}
    assert plan(**small, noise_multiplier=64 / 4096).share_variance == 4096
    with pytest.raises(ConfigError, match=r"63\.9"):
        plan(**small, noise_multiplier=63.9 / 4096)
    for dimension, least in ((4**4, 10), (4**4 + 1, 11)):
        assert plan(**{**small, "dimension": dimension, "lattice_bits": least}, noise_multiplier=3.0).lattice_bits == least
        with pytest.raises(ConfigError, match=f"at least {least}"):
            plan(**{**small, "dimension": dimension, "lattice_bits": least - 1}, noise_multiplier=3.0)


def test_plan_without_noise():
    quiet = plan(**{**USUAL, "noise_multiplier": 0})
    assert (quiet.share_variance, quiet.headroom, quiet.clamp) == (0, 0, (2**31 - 1) // 5)


@pytest.mark.parametrize(
    ("change", "values_named"),
    [
        ({"sampling_rate": math.nan}, ["nan", "(0, 1]"]),
        ({"sampling_rate": math.inf}, ["inf", "(0, 1]"]),
        ({"sampling_rate": 0.0}, ["0.0", "(0, 1]"]),
        ({"sampling_rate": 1.0000001}, ["1.0000001", "(0, 1]"]),
        ({"noise_multiplier": math.nan}, ["nan", "finite"]),
        ({"noise_multiplier": math.inf}, ["inf", "finite"]),
        ({"noise_multiplier": -1.0}, ["-1.0", "not negative"]),
        ({"silos": 0}, ["silos = 0", "from 1"]),
        ({"shares": 0}, ["shares = 0", "from 1"]),
        ({"shares": 6}, ["6 honest", "5 silos"]),
        ({"dimension": 0}, ["dimension = 0", "from 1"]),
        ({"dimension": 1.5}, ["1.5", "integer"]),
        ({"units": -3}, ["-3", "from 1"]),
        ({"units": math.inf}, ["inf", "integer"]),
        ({"lattice_bits": 0}, ["lattice_bits = 0", "from 1"]),
        ({"lattice_bits": 21}, ["21", "at most 20"]),
        ({"lattice_bits": 17.0}, ["17.0", "integer"]),
        ({"lattice_bits": 20}, ["at lattice_bits = 20", "ring leaves"]),
        ({"lattice_bits": 12}, ["lattice_bits = 12", "at least 16"]),
        ({"units": 10**9}, ["lattice_bits = 1,", "at least 16"]),
        ({"units": 10**12}, ["may reach 4e+11", "ring leaves"]),
        ({"noise_multiplier": 1e-4}, ["s = 6.557", "at least 64"]),
        ({"noise_multiplier": 1e300}, ["s² near 2^1994", "2^48"]),
    ],
)
def test_plan_refuses_and_names_both_values(change, values_named):
    with pytest.raises(ConfigError) as caught:
        plan(**{**USUAL, **change})
    assert caught.value.hint
    for named in values_named:
        assert named in caught.value.message


def test_clamp_is_lipschitz_and_bounded():
    made = plan(**USUAL)
    rng = np.random.default_rng(2)
    first, second = (rng.integers(-(2**33), 2**33, 10_000) for _ in range(2))
    extremes = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, made.clamp, -made.clamp, made.clamp + 1])
    assert np.all(np.abs(clamp(first, made) - clamp(second, made)) <= np.abs(first - second))
    assert clamp(extremes, made).tolist() == [-made.clamp, made.clamp, made.clamp, -made.clamp, made.clamp]
    kept = first % made.clamp
    assert np.array_equal(clamp(kept, made), kept)
    assert clamp(kept, made) is not kept


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32))
def test_no_overflow_sums_of_encoded_vectors_lift_to_the_exact_integers(silos, seed):
    made = plan(silos=silos, shares=max(1, silos - 1), dimension=64, sampling_rate=0.1, units=500, noise_multiplier=4.0)
    rng = np.random.default_rng(seed)
    totals = clamp(rng.integers(-(2**31), 2**31, (silos, 64)), made)
    totals[:, :2] = made.clamp, -made.clamp
    share = made.headroom // silos
    noises = rng.integers(-share, share + 1, (silos, 64))
    noises[:, :2] = share, -share
    words = np.zeros(64, dtype="<u4")
    for total, noise in zip(totals, noises, strict=True):
        words += encode(total, noise)
    assert np.array_equal(lift(words), (totals + noises).sum(axis=0))


def test_no_overflow_a_real_round_lifts_to_the_exact_sum():
    made = plan(**{**USUAL, "dimension": 5000})
    rng = np.random.default_rng(8)
    totals = [clamp(rng.integers(-(2**30), 2**30, 5000), made) for _ in range(5)]
    noises = [discrete_gaussian(5000, made.share_variance, Randomness.from_os()) for _ in range(5)]
    words = sum((encode(total, noise) for total, noise in zip(totals, noises, strict=True)), np.zeros(5000, "<u4"))
    assert np.array_equal(lift(words), sum(totals) + sum(noises))


@given(st.lists(st.tuples(st.integers(-(2**31), 2**31), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=20))
def test_encode_never_refuses_values_and_reduces_them(pairs):
    totals, noises = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    words = encode(totals, noises)
    assert words.dtype == np.dtype("<u4")
    assert words.tolist() == [(total + noise) % 2**32 for total, noise in pairs]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_lift_undoes_encode_over_the_whole_centred_range(values):
    integers = np.array(values, dtype=np.int64)
    assert lift(encode(integers, np.zeros_like(integers))).tolist() == values


def test_lift_at_the_ends():
    assert lift(np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype="<u4")).tolist() == [0, 1, 2**31 - 1, -(2**31), -1]


def test_one_noise_per_coordinate_and_integers_only():
    integers = np.zeros(4, dtype=np.int64)
    for noise in (np.zeros(1, np.int64), np.zeros((4, 1), np.int64), np.zeros(4), np.zeros(4, np.int32)):
        with pytest.raises(SiloquyError):
            encode(integers, noise)
    with pytest.raises(SiloquyError, match="float64"):
        encode(np.zeros(4), integers)
    with pytest.raises(SiloquyError, match="float64"):
        clamp(np.array([0.0, math.nan]), plan(**USUAL))
    with pytest.raises(SiloquyError, match="int64"):
        lift(integers)


def test_no_function_of_the_ring_touches_noise_after_it_was_added():
    """Clamp, cut or redraw after noise would break the guarantee: the module offers five public names and none does."""
    own = {name for name, value in vars(ring).items() if callable(value) and value.__module__ == ring.__name__}
    assert {name for name in own if name[0] != "_"} == {"Plan", "plan", "clamp", "encode", "lift"}
