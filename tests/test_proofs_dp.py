# SPDX-License-Identifier: Apache-2.0
"""docs/concepts/proofs.md by enumeration: every lemma at sizes where its error can be seen, and both theorems in both directions.

Sums that a lemma bounds by 10⁻¹³⁶ are taken in 200 digits. What ``tests/test_accounting.py`` enumerates (``certify`` against the
worse of two directions) is not repeated: here each direction stands alone, against the continuous mechanism in closed form.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from privacy.dp.accounting import certify, rdp_curve
from privacy.dp.mechanism import MIN_SHARE_VARIANCE, SMOOTHING_VARIANCE, LatticeGaussian

RATES = (1.0, 0.2, 0.01)
TAU = 4
DIRECTIONS = ("remove", "add")


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(200):
        yield


def rho(s, centre=0):
    """The sum over all integers z of exp(-(z - centre)^2 / 2 s^2), to 200 digits."""
    reach = int(31 * s) + 31
    return mpmath.fsum(mpmath.exp(-((z - centre) ** 2) / (2 * mpf(s) ** 2)) for z in range(-reach, reach + 1))


def theta(s):
    """E = exp(-2 pi^2 s^2): how far the sum over a lattice is from flat."""
    return mpmath.exp(-2 * mp.pi**2 * mpf(s) ** 2)


def pmf(s, reach):
    """The discrete Gaussian at -reach..reach, to 200 digits."""
    total = rho(s)
    return [mpmath.exp(-(z**2) / (2 * mpf(s) ** 2)) / total for z in range(-reach, reach + 1)]


def convolved(left, right):
    """The law of a sum; both are centred lists of odd length."""
    out = [mpf(0)] * (len(left) + len(right) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(left), enumerate(right)):
        out[i + j] += a * b
    return out


# --- Lemmas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1, 2, TAU])
def test_lemma_1_the_sum_over_a_shifted_lattice_is_flat(tau):
    flat = mpmath.sqrt(2 * mp.pi) * tau
    errors = [abs(rho(tau, mpf(part) / 8) / flat - 1) for part in range(9)]
    assert max(errors) <= mpf("2.01") * theta(tau)
    assert errors[0] >= 2 * theta(tau)  # 2.01 is no luxury: on the lattice itself the error is 2 E


@pytest.mark.parametrize(("tau", "s"), [(1, 2), (TAU, 64)])
def test_lemma_2_smoothing_gives_the_discrete_gaussian(tau, s):
    """The law of z by the trapezoidal rule, which for Gaussians is exact to far more digits than the lemma speaks of."""
    spread, total, parts = mpmath.sqrt(mpf(s) ** 2 - tau**2), rho(s), 4
    cells = [rho(tau, mpf(part) / parts) for part in range(parts)]  # rho_tau(Z - y) has period 1 in y
    for z in (0, 1, s // 2, s, 3 * s):
        middle, law = round(z * (1 - tau**2 / s**2)) * parts, mpf(0)
        for k in range(middle - 31 * tau * parts, middle + 31 * tau * parts + 1):
            y = mpf(k) / parts
            law += mpmath.exp(-(y**2) / (2 * spread**2) - (z - y) ** 2 / (2 * mpf(tau) ** 2)) / cells[k % parts]
        law /= parts * mpmath.sqrt(2 * mp.pi) * spread
        wanted = mpmath.exp(-(mpf(z) ** 2) / (2 * mpf(s) ** 2)) / total
        assert abs(mpmath.log(law / wanted)) <= 5 * theta(tau)


@pytest.mark.parametrize("s", [1, 1.5, 2])
def test_lemma_3_a_sum_of_two_and_three_shares_is_within_zeta(s):
    reach = round(9 * s)
    share = pmf(s, round(30 * s))
    summed, zeta = share, mpf(0)
    for count in (2, 3):
        summed = convolved(summed, share)
        zeta += 5 * theta(s * math.sqrt((count - 1) / count))
        middle, whole = len(summed) // 2, pmf(s * mpmath.sqrt(count), reach)
        off = [abs(mpmath.log(summed[middle + z] / whole[reach + z])) for z in range(-reach, reach + 1)]
        assert 0 < max(off) <= zeta
        assert count == 3 or max(off) >= zeta / 3  # of the right size; a third share smooths the first error away


@pytest.mark.parametrize("shares", [1, 2, 3, 100, 10**6])
@pytest.mark.parametrize("variance", [64**2, 10**6, 2**48])
def test_the_slack_in_the_code_is_above_both_lemmas(shares, variance):
    """``slack_log`` in floats loses exp(-40426) to underflow; 5 instead of 4.02 pays for it."""
    event = LatticeGaussian(sampling_rate=0.1, lattice_bits=6, share_variance=variance, shares=shares, dimension=7, steps=9)
    smoothing, most = mpf("4.03") * theta(TAU), min(shares, 50) - 1
    sharing = mpmath.fsum(5 * mpmath.exp(-2 * mp.pi**2 * variance * k / (k + 1)) for k in range(1, most + 1))
    sharing += max(0, shares - 1 - most) * 5 * mpmath.exp(-2 * mp.pi**2 * variance * most / (most + 1)) if most else 0
    assert 7 * 9 * (smoothing + sharing) < mpf(event.slack_log) < mpf("1e-134")
    assert SMOOTHING_VARIANCE == TAU**2
    assert MIN_SHARE_VARIANCE == 64**2


@settings(deadline=None)
@given(variance=st.integers(64**2, 2**48), shares=st.integers(1, 10**6), bits=st.integers(1, 20))
def test_sigma_prime_is_rounded_down_on_integers(variance, shares, bits):
    variance = min(variance, (2**63 - 1) // shares)
    event = LatticeGaussian(
        sampling_rate=0.1, lattice_bits=bits, share_variance=max(variance, 64**2), shares=shares, dimension=1, steps=1
    )
    found, exact = Fraction(event.effective_noise_multiplier) ** 2 * 4**bits, event.share_variance * shares - TAU**2
    assert exact * (1 - Fraction(1, 2**48)) < found < exact


@pytest.mark.parametrize("s", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slack_costs_two_zeta_in_epsilon_and_a_factor_in_delta(s, direction):
    """Two shares against the one discrete Gaussian that stands for them, where zeta is as large as 0.08."""
    share, reach = [float(p) for p in pmf(s, 12)], 24
    whole = np.array([float(p) for p in pmf(s * math.sqrt(2), reach)])
    summed = np.convolve(share, share)
    zeta = float(np.abs(np.log(summed / whole))[reach - 8 : reach + 9].max())
    for rate, epsilon in itertools.product((1.0, 0.2), (0.0, 0.3, 1.0)):
        known = [mixed(law, 1, rate, direction) for law in (summed, whole)]
        exact, stands_for_it = delta(*known[0], epsilon + 2 * zeta), delta(*known[1], epsilon)
        assert exact <= math.exp(zeta) * stands_for_it + 1e-12


@settings(deadline=None, max_examples=300)
@given(
    order=st.integers(2, 12),
    rate=st.fractions(Fraction(1, 1000), 1, max_denominator=1000),
    ratio=st.fractions(Fraction(1, 1000), 1000, max_denominator=1000),
)
def test_lemma_6_adding_a_unit_costs_no_more_than_removing_it_at_each_pair_of_points(order, rate, ratio):
    a, b = 1 - rate + rate * ratio, 1 - rate + rate / ratio
    gain = [x**order - x ** (1 - order) if x else None for x in (a, b)]
    assert a * b >= 1
    assert gain[0] + ratio * gain[1] >= 0  # exact: rationals throughout


# --- The first theorem --------------------------------------------------------------------------------------------------


def mixed(base, shift, rate, direction):
    """(first, second) of the hockey-stick divergence of a unit that moves ``base`` by ``shift`` places when it is drawn."""
    padded = np.concatenate([base, np.zeros(shift)])
    moved = np.concatenate([np.zeros(shift), base])
    pair = ((1 - rate) * padded + rate * moved, padded)
    return pair if direction == "remove" else pair[::-1]


def delta(first, second, epsilon):
    return float(np.maximum(first - math.exp(epsilon) * second, 0).sum())


def continuous(sigma, rate, epsilon, direction):
    """Delta of the Poisson-subsampled Gaussian of sensitivity 1 in one direction, in closed form."""

    def above(x):
        return 0.5 * math.erfc(x / (sigma * math.sqrt(2)))

    likely = (math.exp(epsilon if direction == "remove" else -epsilon) - (1 - rate)) / rate
    if likely <= 0:
        return 1 - math.exp(epsilon) if direction == "remove" else 0.0
    edge = sigma**2 * math.log(likely) + 0.5
    if direction == "remove":
        return (1 - rate) * above(edge) + rate * above(edge - 1) - math.exp(epsilon) * above(edge)
    return above(-edge) - math.exp(epsilon) * ((1 - rate) * above(-edge) + rate * above(1 - edge))


def line(s, reach=14):
    z = np.arange(-reach * s, reach * s + 1)
    weights = np.exp(-(z**2) / (2.0 * s * s))
    return weights / math.fsum(weights)


def epsilons(rate):
    return np.linspace(0.0, 2.0, 41) * rate**0.75


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("s", "bits"), [(64, 6), (91, 6), (64, 5)])
def test_theorem_1_in_one_dimension_and_each_direction(s, bits, rate, direction):
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=bits, share_variance=s * s, shares=1, dimension=1, steps=1)
    pair, exceeded, seen = mixed(line(s), 2**bits, rate, direction), 0, 0
    for epsilon in epsilons(rate):
        exact = delta(*pair, epsilon)
        if exact > 1e-9:
            assert exact <= continuous(event.effective_noise_multiplier, rate, epsilon, direction)
            exceeded += exact > continuous(s / 2**bits, rate, epsilon, direction) * (1 + 1e-9)
            seen += 1
    assert seen >= 5
    assert exceeded > 0, "at sigma itself the statement is false"
    exact = delta(*pair, epsilons(rate)[4])
    assert certify([event], exact).epsilon >= epsilons(rate)[4]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shift", [(39, 50), (45, 45), (1, 63)])
def test_theorem_1_in_two_dimensions_and_each_direction(shift, rate, direction):
    """The vector may point anywhere; the closed form knows its length alone, and takes the longest."""
    assert shift[0] ** 2 + shift[1] ** 2 <= 64**2
    lines = [mixed(line(64, 8), part, 1.0, "remove") for part in shift]
    moved, still = (np.outer(lines[0][at], lines[1][at]) for at in (0, 1))
    pair = ((1 - rate) * still + rate * moved, still)
    pair = pair if direction == "remove" else pair[::-1]
    smaller = math.sqrt(64**2 - TAU**2) / 64
    for epsilon in epsilons(rate)[1::6]:
        if (exact := delta(*pair, epsilon)) > 1e-9:
            assert exact <= continuous(smaller, rate, epsilon, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shares", [2, 3])
def test_theorem_1_for_a_sum_of_shares_and_each_direction(shares, rate, direction):
    share = line(64)
    summed = np.convolve(share, share if shares == 2 else np.convolve(share, share))
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=6, share_variance=64**2, shares=shares, dimension=1, steps=1)
    pair, seen = mixed(summed, 64, rate, direction), 0
    for epsilon in epsilons(rate)[::4]:
        if (exact := delta(*pair, epsilon)) > 1e-9:
            assert exact <= continuous(event.effective_noise_multiplier, rate, epsilon, direction)
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lemma_4_other_units_samples_only_help(direction):
    """Two more units, drawn or not: the law is a mixture over four sums, and a mixture is not worse than its worst part."""
    base, rate, others = line(64), 0.2, (64, 37)
    length = len(base) + 64 + sum(others)
    parts = []
    for drawn in itertools.product((0, 1), repeat=2):
        weight = math.prod(rate if each else 1 - rate for each in drawn)
        start = sum(shift for shift, each in zip(others, drawn, strict=True) if each)
        sides = [np.zeros(length), np.zeros(length)]
        for side, law in zip(sides, mixed(base, 64, rate, direction), strict=True):
            side[start : start + len(law)] = law
        parts.append((weight, *sides))
    whole = [sum(weight * each[side] for weight, *each in parts) for side in (0, 1)]
    for epsilon in epsilons(rate)[1::5]:
        worst = max(delta(first, second, epsilon) for _, first, second in parts)
        assert delta(*whole, epsilon) <= worst + 1e-15
        assert worst <= continuous(math.sqrt(64**2 - TAU**2) / 64, rate, epsilon, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rate", RATES)
def test_lemma_5_a_shorter_vector_costs_less(rate, direction):
    pairs = [mixed(line(64), shift, rate, direction) for shift in (0, 1, 16, 32, 63, 64)]
    for epsilon in epsilons(rate)[2::8]:
        figures = [delta(*pair, epsilon) for pair in pairs]
        assert figures == sorted(figures)
        assert figures[0] == 0


# --- The second theorem -------------------------------------------------------------------------------------------------


def moment(s, shift, rate, order, direction="remove"):
    """E of (first/second)^order under second, to 100 digits; ``shift`` is a vector, ``order`` any number above 1."""
    axes = [range(-int(23 * s) - 9 * part - 2, int(23 * s) + 9 * part + 3) for part in shift]  # beyond: 10⁻¹⁰⁰
    total, found = rho(s) ** len(shift), mpf(0)
    for z in itertools.product(*axes):
        at = mpmath.exp(-sum(x * x for x in z) / (2 * mpf(s) ** 2)) / total
        ratio = mpmath.exp(sum(2 * x * m - m * m for x, m in zip(z, shift, strict=True)) / (2 * mpf(s) ** 2))
        blend = 1 - mpf(rate) + mpf(rate) * ratio
        found += at * blend ** (order if direction == "remove" else 1 - order)
    return found


def formula(s, shift, rate, order):
    """Mironov, Talwar, Zhang: the sum over k of C(order, k) (1-q)^(order-k) q^k exp((k^2-k) |shift|^2 / 2 s^2)."""
    length, rate = sum(m * m for m in shift), mpf(rate)
    terms = (
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * mpmath.exp((k * k - k) * length / (2 * mpf(s) ** 2))
        for k in range(order + 1)
    )
    return mpmath.fsum(terms)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("s", "shift"), [(0.5, (1,)), (2, (1,)), (2, (2,)), (0.5, (1, 1))])
def test_theorem_2_integer_orders_are_exact_and_adding_costs_no_more(s, shift, rate):
    for order in (2, 3) if len(shift) == 2 else (2, 3, 8):
        exact = moment(s, shift, rate, order)
        assert abs(exact / formula(s, shift, rate, order) - 1) < mpf(10) ** -100
        assert moment(s, shift, rate, order, "add") <= exact * (1 + mpf(10) ** -100)


def test_between_the_integers_the_identity_is_false():
    """So fractional orders rest on the first theorem; without sampling the discrete moment is smaller, with it nothing is shown."""
    found = [moment(0.5, (1,), 1.0, order) / mpmath.exp((order**2 - order) * 2) for order in (mpf(2), mpf("2.5"), mpf(3))]
    assert abs(found[0] - 1) < mpf(10) ** -100
    assert abs(found[2] - 1) < mpf(10) ** -100
    assert found[1] < 1 - mpf("1e-3")


@pytest.mark.parametrize("rate", RATES)
def test_the_curve_that_certifies_is_that_formula_at_a_smaller_sigma(rate):
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=6, share_variance=64**2, shares=1, dimension=1, steps=1)
    at_sigma, certified = rdp_curve(rate, 1.0), rdp_curve(rate, event.effective_noise_multiplier)
    assert np.all(at_sigma < certified)
    for order in (2, 3, 16):
        exact = mpmath.log(formula(64, (64,), rate, order)) / (order - 1)
        assert float(exact) == pytest.approx(at_sigma[order - 2], rel=1e-12)


def test_two_units_with_different_samples_of_others_stay_below_the_worst_renyi_part():
    """Quasi-convexity at the Renyi orders: the mixture over other units against its worst part."""
    base, rate, order = line(64), 0.2, 4
    parts = [(1 - rate, 0), (rate, 37)]
    sides = [np.zeros(len(base) + 64 + 37), np.zeros(len(base) + 64 + 37)]
    for weight, start in parts:
        for side, law in zip(sides, mixed(base, 64, rate, "remove"), strict=True):
            side[start : start + len(law)] += weight * law
    kept = sides[1] > 0
    found = math.log(float(np.sum(sides[0][kept] ** order * sides[1][kept] ** (1.0 - order)))) / (order - 1)
    assert 0 < found <= rdp_curve(rate, 1.0)[order - 2]


def test_every_test_that_the_page_names_exists():
    root = Path(__file__).parents[1]
    page = (root / "docs/concepts/proofs.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(tests/\w+\.py)::)?(test_\w+)`", page)
    assert len(named) > 15
    for path, name in named:
        assert f"def {name}(" in (root / (path or "tests/test_proofs_dp.py")).read_text(encoding="utf-8"), name
