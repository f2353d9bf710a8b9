# SPDX-License-Identifier: Apache-2.0
"""The discrete Gaussian: its law against the exact one, every decision against mpmath, and each promise of its docstring.

Keys are fixed, so nothing here can fail by chance; a chi-square passes at p > 1e-3 and the negative control shows its power.
"""

from __future__ import annotations

import hashlib
import math
import random
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from privacy.dp import noise
from privacy.dp.noise import MAX_VARIANCE, RevealedUniform, discrete_gaussian, exp_bounds
from privacy.errors import ConfigError, MachineError
from privacy.prg import Randomness

LARGE = [1 << 17, 1 << 20, 1 << 23]


def source(name):
    return Randomness.from_key(hashlib.sha256(f"test_noise {name}".encode()).digest())


def exact_pmf(variance, reach):
    """P(y) for y in [-reach, reach]; the reach holds all but 1e-20 of the mass, sums are fsum."""
    weights = [math.exp(-y * y / (2 * variance)) for y in range(-reach, reach + 1)]
    total = math.fsum(weights)
    return np.array([weight / total for weight in weights])


def chi_square(observed, expected):
    assert observed.sum() == pytest.approx(expected.sum(), rel=1e-9)
    assert expected.min() > 5
    return chi2.sf(((observed - expected) ** 2 / expected).sum(), len(observed) - 1)


def law_p_value(samples, variance, bins):
    """Chi-square of ``samples`` against the exact pmf, neighbouring integers pooled into at most ``bins`` equal-mass cells."""
    reach = 12 * math.isqrt(variance) + 12
    pmf = exact_pmf(variance, reach)
    cell = np.minimum((np.cumsum(pmf) - pmf / 2) * bins, bins - 1).astype(int)
    cell = np.unique(cell, return_inverse=True)[1]
    expected = np.bincount(cell, weights=pmf) * samples.size
    return chi_square(np.bincount(cell[samples + reach], minlength=expected.size), expected)


@pytest.mark.parametrize(("variance", "bins"), [(1, 300), (2, 300), (9, 1000), (1_000_000, 400)])
def test_exact_law_by_chi_square_at_small_s(variance, bins):
    assert law_p_value(discrete_gaussian(1_000_000, variance, source(variance)), variance, bins) > 1e-3


def test_the_chi_square_rejects_a_rounded_gaussian_and_a_wrong_variance():
    """Negative control: what a naive sampler would return is told apart."""
    rounded = np.rint(np.random.default_rng(1).normal(0, 1, 1_000_000)).astype(np.int64)
    assert law_p_value(rounded, 1, 300) < 1e-12
    assert law_p_value(discrete_gaussian(1_000_000, 1_030_000, source("wrong")), 1_000_000, 400) < 1e-6


@pytest.mark.parametrize("s", LARGE)
def test_exact_law_at_large_s_by_quantiles_mean_and_variance(s):
    """200 quantile cells. P(y < e) is Φ((e − ½)/s) up to 1/(24·s²) ≤ 2.5e-12 (midpoint rule): nothing at a million samples."""
    count, normal = 1_000_000, NormalDist(0, s)
    samples = discrete_gaussian(count, s * s, source(s))
    edges = [round(normal.inv_cdf(i / 200)) for i in range(1, 200)]
    cdf = np.array([0.0, *(normal.cdf(edge - 0.5) for edge in edges), 1.0])
    observed = np.bincount(np.searchsorted(edges, samples, side="right"), minlength=200)
    assert chi_square(observed, np.diff(cdf) * count) > 1e-3
    assert abs(samples.mean()) < 4 * s / math.sqrt(count)
    assert abs(samples.var() / s**2 - 1) < 4 * math.sqrt(2 / count)


@pytest.mark.parametrize("s", LARGE)
def test_exact_law_low_bits_are_uniform_at_large_s(s):
    """Modulo 256 the law is uniform up to e^(−2π²s²/2¹⁶): the integers between lattice multiples are really used."""
    observed = np.bincount(discrete_gaussian(500_000, s * s + 12345, source(f"low {s}")) % 256, minlength=256)
    assert chi_square(observed, np.full(256, 500_000 / 256)) > 1e-3


@pytest.mark.parametrize("variance", [9, 10**6, 1 << 34, 1 << 46])
def test_unbounded_tails_have_their_mass(variance):
    count = 2_000_000
    samples = np.abs(discrete_gaussian(count, variance, source(f"tail {variance}")))
    for sigmas in (3, 4, 4.5):
        limit = math.ceil(sigmas * math.sqrt(variance))
        if variance <= 10**6:
            tail = 2 * exact_pmf(variance, 12_100)[12_100 + limit :].sum()
        else:
            tail = math.erfc((limit - 0.5) / math.sqrt(2 * variance))
        assert binomtest(int((samples >= limit).sum()), count, tail).pvalue > 1e-3


def test_independent_of_neighbours_of_its_sign_and_of_other_sources():
    count = 1_000_000
    first, second = (discrete_gaussian(count, 1 << 40, Randomness.from_os()).astype(float) for _ in range(2))
    bound = 5.5 / math.sqrt(count)  # a true law passes all five but for 2e-7
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    for lag in (1, 2, 3):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < bound
    assert abs(np.corrcoef(np.sign(first), np.abs(first))[0, 1]) < bound


def test_independent_of_global_generators():
    torch = pytest.importorskip("torch")
    fixed, fresh = [], []
    for seed in (3, 3, 4):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        fixed.append(discrete_gaussian(500, 1 << 40, source("seeded")).tolist())
        fresh.append(discrete_gaussian(500, 1 << 40, Randomness.from_os()).tolist())
    assert fixed[0] == fixed[1] == fixed[2]
    assert fresh[0] != fresh[1]


def test_replayable_golden_values_never_change():
    samples = discrete_gaussian(40_000, 5 << 36, Randomness.from_key(bytes(32)))
    assert samples[:4].tolist() == [-135227, -271233, -475540, -278962]
    digest = hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()
    assert digest == "96545222428ef13aa70988b8198f4aa6b92a2a0d7ec6abcf067f1230dcd8f48f"


@pytest.mark.parametrize("variance", [1, 2, 3, 10, 1 << 34, (1 << 40) + 7, MAX_VARIANCE - 1, MAX_VARIANCE])
def test_exact_every_proposal_is_decided_as_real_numbers_say(variance):
    """An independent reading of the same words in 60-digit arithmetic: K = ⌊−ln U⌋, CKS's rule, no tables, no first round."""
    size, t = 400, math.isqrt(variance - 1) + 1
    words = [int(word) for word in source(variance).uint64(3 * size)]
    expected = []
    with mpmath.workdps(60):
        for first, second, third in zip(words[:size], words[size : 2 * size], words[2 * size :], strict=True):
            block = int(-mpmath.log(mpmath.mpf((first >> 11) + mpmath.mpf("0.5")) / 2**53))
            y, negative = block * t + (second >> 1) % t, second & 1
            accept = mpmath.mpf(third >> 11) / 2**53 < mpmath.exp(-(mpmath.mpf(y * y) / (2 * variance) - block + mpmath.mpf("0.5")))
            if accept and not (y == 0 and negative):
                expected.append(-y if negative else y)
    assert noise._accepted_proposals(size, variance, source(variance)).tolist() == expected


@pytest.mark.parametrize("variance", [1, 5, 1 << 34, MAX_VARIANCE])
def test_exact_decisions_hold_next_to_the_boundary(variance):
    """Words around every probability, from one unit of 2⁻⁵³ to beyond the margin: decided as exact arithmetic says."""
    rng = np.random.default_rng(variance % 1000)
    t = math.isqrt(variance - 1) + 1
    block = np.repeat(rng.integers(0, 9, 120), 13)
    y = block * t + np.repeat(rng.integers(0, t, 120), 13)
    steps = np.tile([0, 1, -1, 2, -2, 1000, -1000, 2**13, -(2**13), 2**14, -(2**14), 2**30, -(2**30)], 120)
    prefixes, truth = [], []
    for k, distance, step in zip(block.tolist(), y.tolist(), steps.tolist(), strict=True):
        low, high = exp_bounds(distance * distance - 2 * variance * k + variance, 2 * variance, 120)
        prefixes.append(min(max((low >> 67) + step, 0), 2**53 - 1))
        truth.append(True if (prefixes[-1] + 1) << 67 <= low else False if prefixes[-1] << 67 >= high else None)
    words = np.array(prefixes, dtype=np.uint64) << np.uint64(11)
    decided = noise._accept(y, block, variance, words, source("boundary"))
    assert all(sure in (None, got) for got, sure in zip(decided.tolist(), truth, strict=True))
    assert sum(sure is None for sure in truth) < 400


def test_exact_float_estimate_is_within_its_stated_error():
    cells = np.arange(4095) / 64
    x = np.concatenate([np.random.default_rng(5).uniform(0, 63.98, 4000), cells, np.nextafter(cells[1:], 0)])
    with mpmath.workdps(40):
        estimates = zip(x.tolist(), noise._exp_minus(x).tolist(), strict=True)
        worst = max(abs(mpmath.mpf(got) / mpmath.exp(-mpmath.mpf(at)) - 1) for at, got in estimates)
    assert worst < 2.0**-45  # the rest of 2⁻⁴⁴ is for the rounding of x itself
    assert (noise._exp_minus(np.array([63.99, 700.0, 1e18])) * 2.0**53 < 1e-11).all()


rationals = st.tuples(st.integers(0, 2**110), st.integers(1, 2**110)) | st.integers(1, 2**60).flatmap(
    lambda b: st.tuples(st.integers(0, 200 * b), st.just(b))
)


@settings(max_examples=300, deadline=None)
@given(rationals, st.integers(0, 400))
def test_exact_enclosure_holds_the_exponential(ratio, bits):
    a, b = ratio
    low, high = exp_bounds(a, b, bits)
    with mpmath.workdps(220):
        value = mpmath.exp(-mpmath.mpf(a) / b) * mpmath.mpf(2) ** bits
        assert low <= value <= high
    assert 0 <= low <= high <= low + 2


def test_exact_geometric_table_is_the_floor_of_the_exponential():
    with mpmath.workdps(60):
        floors = [int(mpmath.floor(mpmath.exp(-k) * 2**53)) for k in range(1, 38)]
    assert noise._geometric_floors(53).tolist() == floors[::-1]
    assert floors[-1] == 0 < floors[-2]


@pytest.mark.parametrize("first_bits", [1, 2, 5, 9])
def test_exact_law_when_comparisons_stay_open_after_the_first_bits(monkeypatch, first_bits):
    """With so few bits at once most comparisons read on in Python integers; the law stays."""
    monkeypatch.setattr(noise, "FIRST_BITS", first_bits)
    opened = []
    read_on = RevealedUniform._read_on
    monkeypatch.setattr(RevealedUniform, "_read_on", lambda self: (opened.append(1), read_on(self))[1])
    samples = discrete_gaussian(20_000, 9, source(f"open {first_bits}"))
    assert len(opened) > 20_000 / 2**first_bits
    assert law_p_value(samples, 9, 40) > 1e-3


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 3), (1, 1), (7, 2), (2**100 + 1, 2**101)])
def test_revealed_uniform_is_below_with_the_exact_probability(a, b):
    bits = source(f"bernoulli {a}/{b}")
    hits = sum(RevealedUniform(0, 0, bits).below_exp(a, b) for _ in range(5_000))
    assert hits == 5_000 if a == 0 else binomtest(hits, 5_000, math.exp(-a / b)).pvalue > 1e-3


def test_revealed_uniform_is_one_real_for_all_its_comparisons():
    bits = source("one real")
    for _ in range(300):
        uniform = RevealedUniform(0, 0, bits)
        answers = [uniform.below_exp(k, 3) for k in range(12)]
        assert answers == sorted(answers, reverse=True)
        assert answers == [uniform.below_exp(k, 3) for k in range(12)]


class Constant(Randomness):
    """A broken machine: every word is the same."""

    def uint64(self, count):
        return np.zeros(count, dtype="<u8")


def test_unbounded_a_dead_source_is_an_error_and_not_an_endless_loop():
    with pytest.raises(MachineError, match="4096"):
        discrete_gaussian(3, 1 << 40, Constant.from_key(bytes(32)))


def test_widths_blocks_beyond_the_vector_path_are_decided_exactly():
    """K = 64 is accepted when U starts with about 2900 zeros, and not otherwise; int64 would have wrapped from K = 182 on."""
    t = 1 << 24
    for block in (64, 182, 256, 2876):
        y = np.array([block * t + 5])
        assert not noise._accept(y, np.array([block]), t * t, np.zeros(1, np.uint64), source("wide"))[0]
    assert noise._accept(np.array([64 * t]), np.array([64]), t * t, np.zeros(1, np.uint64), Constant.from_key(bytes(32)))[0]


def test_widths_at_the_largest_variance_stay_below_two_to_the_62():
    t = math.isqrt(MAX_VARIANCE - 1) + 1
    y = 63 * t + t - 1
    assert t * t == MAX_VARIANCE
    assert max(y * y, 2 * MAX_VARIANCE * 63, y * y - 2 * MAX_VARIANCE * 63 + MAX_VARIANCE) < 2**62


@given(st.integers(1, MAX_VARIANCE), st.integers(0, 3000), st.data())
def test_acceptance_exponent_is_never_negative(variance, block, data):
    t = math.isqrt(variance - 1) + 1
    y = block * t + data.draw(st.integers(0, t - 1))
    assert t * t >= variance > (t - 1) ** 2
    assert y * y - 2 * variance * block + variance >= 0


def test_stated_variance_is_at_most_the_parameter_and_nearly_it():
    for variance in (1, 2, 9):
        reach = 60
        true = float((exact_pmf(variance, reach) * np.arange(-reach, reach + 1) ** 2).sum())
        assert variance * (1 - 3e-7) < true < variance * (1 + 1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 33_000])
def test_edge_counts(count):
    samples = discrete_gaussian(count, 100, source("edge"))
    assert samples.shape == (count,)
    assert samples.dtype == np.int64


def test_edge_empty_draw_reads_no_bit():
    bits = source("unread")
    discrete_gaussian(0, 100, bits)
    assert bits.bytes(8) == source("unread").bytes(8)


@pytest.mark.parametrize(
    ("count", "variance"),
    [(-1, 1), (1, 0), (1, -4), (1, MAX_VARIANCE + 1), (1, 2.0), (1, math.nan), (2.0, 1), (True, 1), (1, True), (1, np.int64(4))],
)
def test_refused_parameters(count, variance):
    with pytest.raises(ConfigError):
        discrete_gaussian(count, variance, source("refused"))
