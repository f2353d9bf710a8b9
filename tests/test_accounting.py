# SPDX-License-Identifier: Apache-2.0
"""Accounting against exact enumeration of the discrete mechanism, published figures, and two other libraries."""

from __future__ import annotations

import ast
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.dp import accounting
from privacy.dp.accounting import Curve, calibrate, certify, certify_adaptive, check_delta, epsilon_pld, epsilon_rdp, rdp_curve
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import NotCertified, PrivacyRefusal

DELTA = 1e-5


def lattice(rate, sigma, steps=1, *, bits=16, shares=1, dimension=1000):
    variance = math.ceil(sigma**2 * 4**bits / shares)
    return LatticeGaussian(
        sampling_rate=rate, lattice_bits=bits, share_variance=variance, shares=shares, dimension=dimension, steps=steps
    )


# --- The discrete mechanism itself, by enumeration ---------------------------------------------------------------------


def discrete_gaussian(s, shift=0, reach=12):
    z = np.arange(-reach * s, reach * s + 64 + 1)
    weights = np.exp(-((z - shift) ** 2) / (2.0 * s * s))
    return weights / math.fsum(np.exp(-(np.arange(-40 * s, 40 * s + 1) ** 2) / (2.0 * s * s)))


def hockey_stick(p, q, epsilon):
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0).sum()), float(np.maximum(q - math.exp(epsilon) * p, 0).sum()))


def gaussian_hockey_stick(sigma, epsilon):
    """Balle, Wang 2018, Theorem 8: the continuous Gaussian's exact delta at q = 1."""
    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * phi(-1 / (2 * sigma) - epsilon * sigma)


def never_below(event, base, mixed, epsilons) -> int:
    """At how many of these epsilons the accountant was compared: at the delta that each really has it never gives less."""
    checked = 0
    for epsilon in epsilons:
        delta = hockey_stick(mixed, base, epsilon)
        if 1e-9 < delta < 1:
            assert certify([event], delta).epsilon >= epsilon
            checked += 1
    return checked


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
@pytest.mark.parametrize(("s", "bits"), [(64, 6), (101, 6), (128, 6), (64, 5)])
def test_one_dimension_never_exceeds_the_accountant(rate, s, bits):
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=bits, share_variance=s * s, shares=1, dimension=1, steps=1)
    base, moved = discrete_gaussian(s), discrete_gaussian(s, 2**bits)
    mixed = (1 - rate) * base + rate * moved
    assert never_below(event, base, mixed, np.linspace(0.0, 1.5, 12) * (rate**0.5)) >= 8


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
@pytest.mark.parametrize("shift", [(64, 0), (45, 45), (39, 50), (1, 63)])
def test_two_dimensions_never_exceed_the_accountant(rate, shift):
    assert shift[0] ** 2 + shift[1] ** 2 <= 64**2
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=6, share_variance=64**2, shares=1, dimension=2, steps=1)
    line = discrete_gaussian(64, reach=8)
    base = np.outer(line, line)
    moved = np.outer(*(discrete_gaussian(64, part, reach=8) for part in shift))
    mixed = (1 - rate) * base + rate * moved
    for epsilon in (0.02, 0.3, 1.0):
        delta = hockey_stick(mixed, base, epsilon)
        if delta > 1e-9:
            assert certify([event], delta).epsilon >= epsilon


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_two_composed_steps_never_exceed_the_accountant(rate):
    event = LatticeGaussian(sampling_rate=rate, lattice_bits=6, share_variance=64**2, shares=1, dimension=1, steps=2)
    base = discrete_gaussian(64, reach=8)
    mixed = (1 - rate) * base + rate * discrete_gaussian(64, 64, reach=8)
    for epsilon in (0.1, 0.7, 1.5):
        delta = hockey_stick(np.outer(mixed, mixed), np.outer(base, base), epsilon)
        assert certify([event], delta).epsilon >= epsilon


def test_a_sum_of_shares_never_exceeds_the_accountant():
    event = LatticeGaussian(sampling_rate=1.0, lattice_bits=6, share_variance=64**2, shares=2, dimension=1, steps=1)
    share = discrete_gaussian(64)
    base, moved = np.convolve(share, share), np.convolve(share, discrete_gaussian(64, 64))
    for epsilon in (0.05, 0.4, 1.0):
        assert certify([event], hockey_stick(moved, base, epsilon)).epsilon >= epsilon


def test_at_sigma_itself_the_continuous_bound_is_false():
    """Why tau squared is taken off: without it some delta of the discrete mechanism lies above the continuous one."""
    base, moved = discrete_gaussian(64), discrete_gaussian(64, 64)
    grid = np.linspace(0.0, 2.0, 401)
    exact = [hockey_stick(moved, base, epsilon) for epsilon in grid]
    assert any(delta > gaussian_hockey_stick(1.0, epsilon) * (1 + 1e-9) for delta, epsilon in zip(exact, grid, strict=True))
    smaller = math.sqrt(64**2 - 16) / 64
    assert all(delta <= gaussian_hockey_stick(smaller, epsilon) for delta, epsilon in zip(exact, grid, strict=True))


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
def test_integer_renyi_orders_of_the_discrete_mechanism_equal_the_formula(rate):
    base, moved = discrete_gaussian(64, reach=20), discrete_gaussian(64, 64, reach=20)
    ratio = (1 - rate) + rate * moved / base
    for order in (2, 3, 5, 8):
        exact = math.log(math.fsum(base * ratio**order)) / (order - 1)
        assert exact == pytest.approx(rdp_curve(rate, 1.0)[order - 2], rel=1e-9)


# --- Published and independent figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "by_pld", "by_rdp"),
    [
        (0.01, 1, 1000, 1.828, 2.101), (0.01, 1, 2000, 2.584, 2.867), (0.01, 1, 10000, 6.188, 6.713),
        (0.01, 0.7, 1000, 4.618, 5.423), (0.05, 1, 1000, 10.987, 12.017),
        (0.001, 0.6, 10000, 2.456, 3.322), (1, 20, 100, 1.993, 2.166),
    ],
)
def test_reference_figures(rate, sigma, steps, by_pld, by_rdp):
    found = certify([lattice(rate, sigma, steps)], DELTA)
    assert (found.epsilon_pld, found.epsilon_rdp) == (pytest.approx(by_pld, abs=1e-2), pytest.approx(by_rdp, abs=1e-2))
    assert found.epsilon == found.epsilon_pld
    assert (found.delta, found.discretization, found.orders_checked) == (DELTA, 1e-4, 255)


def test_the_papers_noise_at_an_honest_delta():
    rate, steps = 32 / 183122, 34338
    assert epsilon_rdp([lattice(rate, 0.7666, steps)], DELTA) == pytest.approx(0.998, abs=1e-2)
    assert epsilon_rdp([lattice(rate, 0.6665, steps)], DELTA) == pytest.approx(1.46, abs=1e-2)


def test_three_adversaries_of_the_plan():
    figures = [certify([lattice(0.01, sigma, 2000)], DELTA).epsilon for sigma in (math.sqrt(5 / 4), 1.0, 0.5)]
    assert figures == pytest.approx([2.10, 2.58, 18.1], abs=0.06)


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.2, 2.64), (0.001, 0.6), (0.5, 4.0), (1.0, 20.0)])
def test_rdp_curves_of_three_implementations_agree(rate, sigma):
    from dp_accounting.rdp.rdp_privacy_accountant import _compute_rdp_poisson_subsampled_gaussian
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = list(accounting.INTEGER_ORDERS)
    own = rdp_curve(rate, sigma)
    np.testing.assert_allclose(own, compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders), rtol=1e-9)
    np.testing.assert_allclose(own, _compute_rdp_poisson_subsampled_gaussian(rate, sigma, orders), rtol=1e-9)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.01, 1.0, 1000), (0.2, 2.64, 75), (0.001, 0.6, 10000)])
def test_pld_agrees_with_opacus_prv_within_its_error(rate, sigma, steps):
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    assert epsilon_pld([lattice(rate, sigma, steps)], DELTA) == pytest.approx(prv.get_epsilon(DELTA, eps_error=0.01), abs=0.011)


def test_no_central_limit_accountant_is_ever_asked():
    """It under-reports. What is used of other libraries is the pessimistic PLD, the RDP curve and nothing else."""
    root, used = Path(accounting.__file__).parents[2], set()
    rooms = [root / room for room in ("privacy", "silo", "aggregator", "cli")]
    texts = [path.read_text(encoding="utf-8") for room in rooms for path in room.rglob("*.py")]
    for text in texts:
        if not re.search("dp_accounting|opacus|prv_accountant", text):
            continue
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            used |= {name for name in names if name.split(".")[0] in ("dp_accounting", "opacus", "prv_accountant")}
    assert used == {
        "dp_accounting.pld.privacy_loss_distribution", "dp_accounting.pld.privacy_loss_distribution.PrivacyLossDistribution",
        "dp_accounting.pld.privacy_loss_mechanism", "dp_accounting.pld.privacy_loss_mechanism.AdjacencyType",
        "dp_accounting.pld.privacy_loss_mechanism.MixtureGaussianPrivacyLoss",
        "dp_accounting.rdp.rdp_privacy_accountant._compute_rdp_poisson_subsampled_gaussian",
    }  # fmt: skip


def test_own_curve_keeps_its_digits_near_zero():
    """At q = 1e-6 log A is about 1e-12; the leading term q^2 (exp(1/sigma^2) - 1) is known in closed form."""
    assert rdp_curve(1e-6, 1.0)[0] == pytest.approx(1e-12 * math.expm1(1.0), rel=1e-9, abs=0)
    assert np.all(np.diff(rdp_curve(1e-6, 1.0)) > 0)


# --- Properties ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(1e-3, 1.0), sigma=st.floats(0.8, 20.0), steps=st.integers(1, 500))
def test_certified_is_the_smaller_bound_and_pld_the_tighter(rate, sigma, steps):
    found = certify([lattice(rate, sigma, steps)], DELTA)
    assert 0 <= found.epsilon == min(found.epsilon_pld, found.epsilon_rdp) < math.inf
    if found.discretization:
        assert found.epsilon_pld <= found.epsilon_rdp


@settings(max_examples=200, deadline=None)
@given(rate=st.floats(1e-5, 1.0), sigma=st.floats(0.3, 100.0))
def test_rdp_curve_is_positive_and_never_falls(rate, sigma):
    curve = rdp_curve(rate, sigma)
    assert np.all(curve > 0)
    assert np.all(np.diff(curve) >= -1e-12 * curve[1:])


def test_more_steps_and_less_noise_cost_more():
    curve = Curve(lattice(0.1, 1.5), DELTA)
    figures = [epsilon for _, epsilon in curve.points([0, 1, 2, 5, 20, 100])]
    assert figures == sorted(set(figures))
    assert figures[0] == 0
    assert certify([lattice(0.1, 1.4, 20)], DELTA).epsilon > curve(20)
    assert certify([lattice(0.1, 1.5, 20)], DELTA / 10).epsilon > curve(20)


def test_composition_is_of_everything_and_in_any_order():
    a, b = lattice(0.1, 1.5, 20), lattice(0.05, 2.0, 30)
    both = certify([a, b], DELTA)
    assert both == certify([b, a], DELTA)
    assert max(certify([each], DELTA).epsilon for each in (a, b)) < both.epsilon
    assert certify([a.with_steps(5), a.with_steps(15)], DELTA) == certify([a], DELTA)
    assert Curve(b, DELTA, past=[a])(30) == both.epsilon


def test_nothing_charged_costs_nothing():
    assert certify([], DELTA).epsilon == 0
    assert certify_adaptive([], DELTA, order=8).epsilon == 0
    assert epsilon_rdp([], DELTA) == 0


def test_the_filter_is_a_bound_at_one_order():
    events = [lattice(0.1, 1.5, 20), lattice(0.05, 2.0, 30)]
    fixed = certify(events, DELTA)
    figures = [certify_adaptive(events, DELTA, order=order).epsilon for order in range(2, 60)]
    assert min(figures) >= fixed.epsilon_rdp
    assert min(figures) < fixed.epsilon_rdp * 1.05
    first, second = (rdp_curve(event.sampling_rate, event.effective_noise_multiplier)[6] for event in events)
    rdp = 20 * first + 30 * second
    expected = rdp + math.log(7 / 8) - math.log(DELTA * 8) / 7
    assert certify_adaptive(events, DELTA, order=8).epsilon == pytest.approx(expected, rel=1e-9)
    assert certify_adaptive(events, DELTA, order=8).epsilon_pld == fixed.epsilon_pld


# --- Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_delta_that_is_no_probability_is_refused(delta):
    for ask in (certify, epsilon_rdp, epsilon_pld, Curve):
        with pytest.raises(PrivacyRefusal, match="delta"):
            ask(lattice(0.1, 1.5) if ask is Curve else [lattice(0.1, 1.5)], delta)


def test_delta_rule():
    check_delta(1e-5, 10_000)
    check_delta(1e-6, 100_000)
    for delta, units in ((1.1e-5, 10), (1e-5, 10_001), (math.nan, 10), (0.0, 10)):
        with pytest.raises(PrivacyRefusal, match="delta"):
            check_delta(delta, units)


def test_too_little_noise_for_the_lattice_is_refused():
    with pytest.raises(NotCertified, match="4096"):
        certify([LatticeGaussian(sampling_rate=0.1, lattice_bits=4, share_variance=4095, shares=4, dimension=1, steps=1)], DELTA)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [(0.5, 0.5, 10_000), (1.0, 0.1, 10**6), (1e-6, 0.01, 10**6), (0.9, 6e-8 * 64, 10**9)]
)
def test_absurd_parameters_are_fast_and_never_small(rate, sigma, steps):
    started = time.monotonic()
    try:
        found = certify([lattice(rate, sigma, steps, bits=30)], DELTA)
        assert found.epsilon > 200
        assert found.epsilon_pld == math.inf
        assert found.discretization == 0
    except NotCertified:
        pass
    assert time.monotonic() - started < 10


def test_a_delta_below_the_accuracy_of_the_fourier_transform_is_left_to_rdp():
    found = certify([lattice(0.1, 5.0, 100)], 1e-13)
    assert found.epsilon_pld == math.inf
    assert found.epsilon == found.epsilon_rdp < math.inf


# --- Calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "sigma"), [(1.0, 6.65), (3.0, 2.64)])
def test_calibration_is_tight_and_meets_the_planning_table(epsilon, sigma):
    found = calibrate(epsilon=epsilon, delta=DELTA, sampling_rate=0.2, steps=75, make=lambda noise: lattice(0.2, noise))
    assert found == pytest.approx(sigma, rel=2e-3)
    assert certify([lattice(0.2, found, 75)], DELTA).epsilon <= epsilon < certify([lattice(0.2, found - 1e-3, 75)], DELTA).epsilon
    assert round(found, 4) == found


def test_calibration_never_goes_below_what_can_be_certified():
    found = calibrate(epsilon=50, delta=DELTA, sampling_rate=1.0, steps=1, make=lambda noise: lattice(1.0, noise, bits=7, shares=4))
    assert found == 0.9999  # the first tick with ceil(sigma^2 * 4^7 / 4) >= 64^2


def test_calibration_refuses_what_it_cannot_reach():
    with pytest.raises(PrivacyRefusal, match="epsilon"):
        calibrate(epsilon=math.nan, delta=DELTA, sampling_rate=0.2, steps=1, make=lambda noise: lattice(0.2, noise))
    with pytest.raises(PrivacyRefusal, match="samples at"):
        calibrate(epsilon=1, delta=DELTA, sampling_rate=0.1, steps=1, make=lambda noise: lattice(0.2, noise))
    with pytest.raises(NotCertified, match="no noise multiplier"):
        calibrate(epsilon=1, delta=DELTA, sampling_rate=1.0, steps=10, make=lambda noise: lattice(1.0, 1.0))
