# SPDX-License-Identifier: Apache-2.0
"""A unit in several silos, a person with several records: exact enumeration, published figures, and every place where it counts."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import enrolment, planning
from aggregator.reporting import report
from aggregator.reporting.counted import Counted
from aggregator.reporting.figures import Curve
from cli import aggregator as cli
from cli import errors
from privacy import chain, federation
from privacy.audit import check_budget
from privacy.dp import accounting, groups, mixture, pld, unprotected
from privacy.dp.accounting import certify
from privacy.dp.budget import Account, Limits
from privacy.dp.entries import Reserve
from privacy.dp.groups import certify_for, exposure
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian, LatticeMixture, Unprotected
from privacy.errors import BudgetExhausted, ConfigError, PrivacyRefusal
from silo import budgeting
from tests.sample_report import contract, make, run
from tests.terms import contract_bytes
from tests.test_accounting import discrete_gaussian, hockey_stick, lattice, never_below
from tests.test_budget import PARTS, A, gate_for, verify
from tests.test_budget import path as ledger_path  # noqa: F401
from tests.test_enrolment import TERMS, made

DELTA = 1e-5
ORDERS = tuple(float(order) for order in accounting.INTEGER_ORDERS)


def small(rate, s, bits, *, steps=1, dimension=1):
    return LatticeGaussian(
        sampling_rate=rate, lattice_bits=bits, share_variance=s * s, shares=1, dimension=dimension, steps=steps
    )


def binomial(count, rate):
    return [math.comb(count, j) * rate**j * (1 - rate) ** (count - j) for j in range(count + 1)]


# --- The discrete mechanism itself, by enumeration ---------------------------------------------------------------------


@functools.cache
def moved_by(rate, s, bits, count):
    """(without the unit, with it): one coordinate, ``count`` contributions of 2^bits, each by its own coin."""
    mixed = sum(weight * discrete_gaussian(s, j * 2**bits, reach=10) for j, weight in enumerate(binomial(count, rate)))
    return discrete_gaussian(s, reach=10), mixed


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
@pytest.mark.parametrize(("s", "bits", "count"), [(64, 6, 2), (101, 6, 2), (128, 6, 3), (64, 5, 4)])
def test_several_contributions_never_exceed_the_accountant(rate, s, bits, count):
    event = exposure(small(rate, s, bits), silos=count)
    base, mixed = moved_by(rate, s, bits, count)
    assert never_below(event, base, mixed, np.linspace(0.0, 1.5, 7) * (rate**0.5)) >= 4


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
@pytest.mark.parametrize(
    "shifts", [((64, 0), (64, 0)), ((64, 0), (0, 64)), ((64, 0), (-64, 0)), ((45, 45), (1, 63)), ((64, 0), (0, 0))]
)
def test_silos_that_pull_apart_or_hold_back_never_exceed_the_accountant(rate, shifts):
    """Any two vectors within the clip: the worst case is two equal ones of full length, which is what is charged."""
    event = exposure(small(rate, 64, 6, dimension=2), silos=2)
    line = discrete_gaussian(64, reach=7)
    base = np.outer(line, line)
    mixed = np.zeros_like(base)
    for first in (0, 1):
        for second in (0, 1):
            at = [first * shifts[0][axis] + second * shifts[1][axis] for axis in (0, 1)]
            weight = math.prod(rate if drawn else 1 - rate for drawn in (first, second))
            if weight:
                mixed += weight * np.outer(*(discrete_gaussian(64, part, reach=7) for part in at))
    for epsilon in (0.02, 0.5, 1.5):
        delta = hockey_stick(mixed, base, epsilon)
        if delta > 1e-9:
            assert certify([event], delta).epsilon >= epsilon


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_two_composed_steps_of_two_contributions_never_exceed_the_accountant(rate):
    event = exposure(small(rate, 64, 6, steps=2), silos=2)
    base, mixed = (line[::1] for line in moved_by(rate, 64, 6, 2))
    for epsilon in (0.3, 1.5, 4.0):
        delta = hockey_stick(np.outer(mixed, mixed), np.outer(base, base), epsilon)
        assert certify([event], delta).epsilon >= epsilon


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_uploads_read_one_by_one_never_exceed_the_accountant(rate):
    """Two silos' own releases of one step: their product, by enumeration."""
    event = exposure(small(rate, 64, 6), silos=2, together=False)
    base, mixed = moved_by(rate, 64, 6, 1)
    for epsilon in (0.1, 0.7, 1.5):
        delta = hockey_stick(np.outer(mixed, mixed), np.outer(base, base), epsilon)
        assert certify([event], delta).epsilon >= epsilon


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
def test_the_renyi_curve_is_never_below_the_discrete_mechanism_either_way(rate):
    base = discrete_gaussian(64, reach=24)
    mixed = sum(weight * discrete_gaussian(64, j * 64, reach=24) for j, weight in enumerate(binomial(2, rate)))
    curve = mixture.rdp_curve(rate, 1.0, 2, ORDERS)  # at sigma itself: integer orders of integer shifts are exact
    for order in (2, 3, 5):
        removed = math.log(float((base * (mixed / base) ** order).sum())) / (order - 1)
        added = math.log(float((mixed * (base / mixed) ** order).sum())) / (order - 1)
        assert max(removed, added) <= curve[order - 2] * (1 + 1e-9)
        assert curve[order - 2] == pytest.approx(max(removed, added), rel=1e-3 if rate < 0.1 else 1e-4)


# --- Figures, and what they are compared with --------------------------------------------------------------------------


@pytest.mark.parametrize(("silos", "published"), [(1, 2.99), (2, 6.71), (3, 10.98)])
def test_the_published_figures_of_a_unit_in_several_silos(silos, published):
    found = certify_for([lattice(0.2, 2.64, 75)], DELTA, silos=silos)
    assert found.epsilon == pytest.approx(published, abs=0.01)
    assert found.epsilon == found.epsilon_pld < found.epsilon_rdp < 1.12 * found.epsilon


@pytest.mark.parametrize(("records", "published"), [(1, 1.83), (2, 3.98), (4, 8.90), (8, 20.9)])
def test_the_published_figures_of_a_person_with_several_records(records, published):
    found = certify_for([lattice(0.01, 1.0, 1000)], DELTA, records=records)
    assert found.epsilon == pytest.approx(published, abs=0.01)
    assert found.epsilon == found.epsilon_pld < found.epsilon_rdp < 1.2 * found.epsilon


@pytest.mark.parametrize(("rate", "sigma", "count"), [(0.2, 2.64, 2), (0.01, 1.0, 4), (1.0, 5.0, 3)])
def test_the_distribution_is_that_of_dp_accounting(rate, sigma, count):
    """Theirs rounds the inverse to 1e-6 and drops both ends; the figures agree, and ours are not the smaller ones."""
    from dp_accounting.pld import privacy_loss_distribution

    theirs = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        sigma, list(range(count + 1)), binomial(count, rate), value_discretization_interval=1e-2
    ).self_compose(20)
    ours = mixture.one_step(rate, sigma, count, 1e-2).self_compose(20)
    for delta in (1e-3, 1e-6):
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-5)
        assert ours.get_epsilon_for_delta(delta) >= theirs.get_epsilon_for_delta(delta) - 1e-7


def convolved(rate, sigma, count, steps, delta, *, up, grid=1e-3, cells=60_000):
    """Epsilon by our own convolution: losses of cells of the line, all rounded up to a grid, or all down; both ways, the larger."""
    edges = np.linspace(-9 * sigma, count + 9 * sigma, cells + 1)
    below = {
        j: np.array([math.erfc(x) for x in ((j - edges) / (sigma * math.sqrt(2))).tolist()]) / 2 for j in range(count + 1)
    }
    mass = {
        "with": sum(weight * np.diff(below[j]) for j, weight in enumerate(binomial(count, rate))),
        "without": np.diff(below[0]),
    }
    ratio = mixture.log_ratio(edges, sigma, rate, count)
    worst = 0.0
    for who, losses in (("with", ratio), ("without", -ratio)):
        highest, lowest = np.maximum(losses[1:], losses[:-1]), np.minimum(losses[1:], losses[:-1])
        place = np.ceil(highest / grid).astype(int) if up else np.floor(lowest / grid).astype(int)
        least = place.min()
        pmf = np.bincount(place - least, weights=mass[who])
        size = 1 << math.ceil(math.log2(steps * len(pmf)))
        power = np.maximum(np.fft.irfft(np.fft.rfft(pmf, size) ** steps, size), 0)[: steps * (len(pmf) - 1) + 1]
        loss = grid * (np.arange(len(power)) + steps * least)
        lost = 1 - mass[who].sum() ** steps  # beyond the line: infinite going up, nothing going down
        least_loss = max(0, math.ceil(-loss[0] / grid)) + 1
        at, beyond = loss[least_loss:], power[least_loss:]
        tail = np.append(np.cumsum(beyond[::-1])[::-1][1:], 0.0)
        discounted = np.append(np.cumsum((beyond * np.exp(-at))[::-1])[::-1][1:], 0.0)
        hidden = tail - np.exp(at) * discounted + (lost if up else 0.0)
        within = hidden <= delta
        first = int(np.argmax(within)) if within.any() else len(at) - 1
        worst = max(worst, float(at[first] if up else at[first] - grid))
    return worst


@pytest.mark.parametrize(("rate", "sigma", "count", "steps"), [(0.2, 2.64, 2, 75), (0.2, 2.64, 3, 20), (0.05, 1.5, 4, 40)])
def test_our_own_convolution_brackets_the_figure(rate, sigma, count, steps):
    found = certify_for([lattice(rate, sigma, steps)], DELTA, records=count).epsilon_pld
    low, high = (convolved(rate, sigma, count, steps, DELTA, up=up) for up in (False, True))
    assert low <= found <= high
    assert high - low < 2.1 * 1e-3 * steps


def test_two_hundred_random_plans_are_never_below_a_second_distribution():
    """A lower bound on the true epsilon by our own convolution; ten mechanisms, twenty lengths of each, one unit and several."""
    bits = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(8), "big")))
    close = []
    for number in range(10):
        rate, sigma = float(10 ** bits.uniform(-2, 0)), float(10 ** bits.uniform(0, 1))
        count = int(bits.integers(2, 4)) if number % 3 == 0 else 1
        delta = 10.0 ** -int(bits.integers(3, 7))
        for steps in bits.integers(1, 16, size=20).tolist():
            found = certify_for([lattice(rate, sigma, steps)], delta, silos=count).epsilon
            least = convolved(rate, sigma, count, steps, delta, up=False, grid=4e-3, cells=3000)
            assert least <= found + 1e-9, (rate, sigma, count, delta, steps)
            close.append(least >= 0.8 * found)
    assert len(close) == 200
    assert sum(close) >= 60, "the second distribution says something"


@pytest.mark.parametrize(("rate", "sigma"), [(0.2, 2.64), (0.01, 1.0), (1.0, 10.0), (0.001, 0.8)])
def test_one_contribution_has_the_renyi_curve_that_two_libraries_have(rate, sigma):
    known, found = accounting.rdp_curve(rate, sigma), mixture.rdp_curve(rate, sigma, 1, ORDERS)
    assert np.all(found >= known * (1 - 1e-9))
    assert np.all(found <= known * 1.001 + 1e-11), "the other way is bounded by a sum of cells, never far above"


@pytest.mark.parametrize("count", [2, 5, 16])
def test_steps_with_a_part_of_the_noise_bound_a_sum_with_all_of_it(count):
    """The independent bound: the noise split among the contributions. It holds where there is too much to expand."""
    integers = len(ORDERS)  # between them a chord stands for the curve
    split = count * accounting._agreed_curve(0.2, 3.0 / math.sqrt(count))
    assert np.all(accounting._curve(0.2, 3.0, count)[:integers] <= split[:integers] * (1 + 1e-6))
    many = mixture.MOST_EXPANDED + 1
    assert not mixture.expands(3.0, many)
    assert np.all(accounting._curve(0.2, 3.0, many) >= accounting._curve(0.2, 3.0, count) * (1 - 1e-6))


# --- One is unchanged, more is never less ------------------------------------------------------------------------------


def test_one_is_unchanged():
    event = lattice(0.2, 2.64, 75)
    assert exposure(event) is event
    assert exposure(event, silos=1, records=1, together=False) is event
    assert certify_for([event], DELTA) is certify([event], DELTA), "the same object: not a bit is computed in another way"
    terms = federation.parse(contract_bytes()).terms
    assert terms.privacy.max_silos_per_unit == 1
    assert federation.event(terms) == federation.mechanism(terms)
    assert federation.exposures(terms) == federation.adversaries(terms)


@settings(max_examples=6, deadline=None)
@given(
    rate=st.floats(0.001, 1.0), sigma=st.floats(0.9, 20.0), steps=st.integers(1, 40), count=st.integers(1, 3),
    delta=st.sampled_from([1e-3, 1e-6]),
)  # fmt: skip
def test_more_silos_never_cost_less(rate, sigma, steps, count, delta):
    event = lattice(rate, sigma, steps)
    fewer, more = (certify_for([event], delta, silos=silos) for silos in (count, count + 1))
    # Two grids of losses differ by less than a step of the coarser one for each composed step, at second order.
    assert more.epsilon >= fewer.epsilon - 1e-4
    assert more.epsilon_rdp >= fewer.epsilon_rdp - 1e-6
    apart = certify_for([event], delta, silos=count + 1, together=False)
    assert fewer.epsilon - 1e-4 <= apart.epsilon <= more.epsilon + 1e-4 or count > 1
    assert apart.epsilon <= more.epsilon + 1e-4, "one sum with one noise hides less than as many sums with as many"


@settings(max_examples=5, deadline=None)
@given(rate=st.floats(0.01, 1.0), sigma=st.floats(1.0, 10.0), steps=st.integers(1, 40), count=st.integers(2, 3))
def test_more_rounds_or_less_noise_never_cost_less(rate, sigma, steps, count):
    of = functools.partial(certify_for, delta=DELTA, records=count)
    assert of([lattice(rate, sigma, steps + 1)]).epsilon >= of([lattice(rate, sigma, steps)]).epsilon - 1e-6
    assert of([lattice(rate, sigma, steps)]).epsilon >= of([lattice(rate, 1.1 * sigma, steps)]).epsilon - 1e-6


def test_the_filter_takes_a_unit_in_several_silos_too():
    event = exposure(lattice(0.2, 2.64, 75), silos=2)
    fixed = certify([event, lattice(0.2, 3.0, 10)], DELTA)
    chosen = accounting.certify_adaptive([event, lattice(0.2, 3.0, 10)], DELTA, order=4)
    assert fixed.epsilon_rdp <= chosen.epsilon
    of = functools.partial(accounting.certify_adaptive, delta=DELTA, order=4)
    assert of([event]).epsilon > of([event.once]).epsilon


def test_the_smoothing_does_not_depend_on_how_far_a_sum_is_shifted():
    """Docs: the second draw of the convolution lemma is centred wherever the first fell, so the shift may be any integer."""
    event = lattice(0.2, 2.64, 75)
    for together, times in ((True, 1), (False, 3)):
        several = exposure(event, silos=3, together=together)
        assert several.effective_noise_multiplier == event.effective_noise_multiplier
        assert several.slack_log == times * event.slack_log
    base, far = discrete_gaussian(64), discrete_gaussian(64, 192)
    assert float(np.abs(far[192:] - base[:-192]).max()) < 1e-15, "the law is the same one, moved"


def test_records_in_several_silos_multiply_together_and_compose_apart():
    event = lattice(0.2, 2.64, 75)
    assert exposure(event, silos=2, records=3) == exposure(event, records=6)
    apart = exposure(event, silos=2, records=3, together=False)
    assert (apart.contributions, apart.releases) == (3, 2)
    assert exposure(exposure(event, records=3), silos=2) == exposure(event, records=6)
    assert pld.steps_of([apart]) == {(0.2, event.effective_noise_multiplier, 3): 150}
    noiseless = Unprotected(sampling_rate=0.2, lattice_bits=16, dimension=10, steps=3)
    assert groups.exposed([noiseless], silos=2) == (noiseless,)
    assert groups.epsilon_for([noiseless], DELTA, silos=2) is None


# --- What is refused, and what is absurd -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"silos": 0}, {"records": 0}, {"records": -1}, {"silos": 2**20}, {"silos": math.nan}])
def test_fewer_than_one_or_absurdly_many_are_refused(wrong):
    with pytest.raises(PrivacyRefusal):
        exposure(lattice(0.2, 2.64), **wrong)


@pytest.mark.parametrize(
    "wrong", [{"contributions": 1, "releases": 1}, {"contributions": 0}, {"releases": True}, {"contributions": 2.0}]
)
def test_a_mixture_that_is_none_is_refused(wrong):
    fields = msgspec.structs.asdict(lattice(0.2, 2.64))
    with pytest.raises(PrivacyRefusal):
        LatticeMixture(**fields, **{"contributions": 2, "releases": 1, **wrong})


@pytest.mark.parametrize(
    ("sigma", "steps", "count"), [(0.01, 10, 2), (2.0, 10**6, 3), (1.0, 1000, 65), (1.0, 10, 2**16), (50.0, 10**4, 64)]
)
def test_absurd_parameters_of_groups_are_fast_and_never_small(sigma, steps, count):
    event, start = lattice(0.2, sigma, steps, bits=18), time.process_time()
    found = certify_for([event], DELTA, records=count)
    assert time.process_time() - start < 10
    assert found.epsilon >= certify([event], DELTA).epsilon


# --- The ledger of one silo ------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(ledger_path):  # noqa: F811
    with Ledger.create(ledger_path, who="silo-1", **PARTS) as opened:
        yield opened


def test_one_silos_ledger_charges_what_a_unit_in_all_its_silos_was_exposed_to(ledger, ledger_path):  # noqa: F811
    event = exposure(lattice(0.2, 2.64, 75), silos=2)
    limits = Limits(epsilon=6.72, delta=DELTA)
    gate = gate_for(ledger, limits, event)
    assert gate.declare().epsilon == pytest.approx(6.71, abs=0.01)
    gate.admit(1, b"a" * 16)
    charged = [body.mechanism for body in ledger.entries if isinstance(body, Reserve)]
    assert charged == [event.with_steps(1)], "the entry itself says how many silos, whatever a later contract says"
    again = Account(History.read(ledger_path, verify=verify), limits, plan=event, contract=A, steps_per_attempt=1)
    assert again.spent() == certify([event.with_steps(1)], DELTA)
    assert again.spent().epsilon > certify([event.once.with_steps(1)], DELTA).epsilon
    assert again.steps_left == 74


def test_a_plan_that_fits_one_silo_and_not_two_is_refused(ledger):
    event = lattice(0.2, 2.64, 75)
    with pytest.raises(BudgetExhausted):
        gate_for(ledger, Limits(epsilon=3.0, delta=DELTA), exposure(event, silos=2)).declare()
    assert not ledger.entries or not ledger.charged()
    gate_for(ledger, Limits(epsilon=3.0, delta=DELTA), event).declare()


def test_silo_budget_says_what_more_than_one_unit_costs(ledger):
    event, terms = lattice(0.01, 1.0, 1000), federation.parse(contract_bytes()).terms
    gate = gate_for(ledger, Limits(epsilon=3.0, delta=DELTA), event)
    gate.declare()
    assert budgeting.several(gate, terms) == []
    gate.admit(1, b"a" * 16)
    rows = budgeting.several(gate, terms)
    assert [(each["of"], each["count"]) for each in rows] == [("silos", 2), ("records", 2), ("records", 4), ("records", 8)]
    assert rows[1]["epsilon"] == certify_for([event.with_steps(1)], DELTA, records=2).epsilon
    assert [each["epsilon"] for each in rows[1:]] == sorted(each["epsilon"] for each in rows[1:])
    grouped = federation.parse(contract_bytes(privacy={"unit": "patient_id"})).terms
    assert [each["of"] for each in budgeting.several(gate, grouped)] == ["silos"]


# --- The contract and the report ----------------------------------------------------------------------------------------


def known_to(silos, **changes):
    plain = contract(**changes)
    return federation.parse(plain.raw.replace(b"[privacy]\n", b"[privacy]\nmax_silos_per_unit = %d\n" % silos))


def test_a_contract_guarantees_the_figures_of_a_unit_in_so_many_silos():
    once, terms = contract().terms, known_to(2, epsilon=10.0).terms
    whole = federation.whole_plan(terms)
    assert unprotected.certify(whole, 1e-6) == certify_for(federation.whole_plan(once), 1e-6, silos=2)
    seen = federation.exposures(terms)
    assert [(each.contributions, each.releases) for each in seen.values()] == [(2, 1), (2, 1), (1, 2)], "sum broken: read apart"
    local = known_to(3, mode="local", steps_per_round=2).terms
    assert {(each.contributions, each.releases) for each in federation.exposures(local).values()} == {(1, 3)}
    assert federation.event(local).steps == 60, "a step is a step, however many silos take it"


@pytest.mark.parametrize("silos", [0, 4, 1.5])
def test_more_silos_than_members_are_refused(silos):
    with pytest.raises(ConfigError):
        federation.parse(contract_bytes(privacy={"max_silos_per_unit": silos}))


def test_how_many_silos_know_a_unit_never_changes_in_a_chain():
    assert "privacy.max_silos_per_unit" in chain._FIXED
    terms = federation.parse(contract_bytes(privacy={"max_silos_per_unit": 3})).terms
    assert chain._value(terms, "privacy.max_silos_per_unit") == 3


def test_the_report_prints_two_silos_beside_one_and_several_records_beside_one():
    plain = contract(rounds=4, unit="record")
    found = make(plain, run(3)).guarantee
    assert [(each.of, each.count) for each in found.several] == [("silos", 2), ("records", 2), ("records", 4), ("records", 8)]
    three, four = (federation.mechanism(plain.terms, shares=2, rounds=rounds) for rounds in (3, 4))
    for each in found.several:
        count = {each.of: each.count}
        assert each.spent == certify_for([three], 1e-6, **count).epsilon
        assert each.plan == certify_for([four], 1e-6, **count).epsilon
    assert [each.of for each in make(contract(rounds=4), run(3)).guarantee.several] == ["silos"]
    assert [each.spent for each in make(contract(rounds=4), ()).guarantee.several] == [0.0]


def test_the_report_of_a_unit_in_two_silos_states_its_figures_and_the_assumption():
    accepted = known_to(2, rounds=4, epsilon=10.0)
    made_of = make(accepted, run(4, void=(2,)))
    assert made_of.guarantee.several == (), "the guarantee itself is of two silos"
    assert "up to 2 silos" in made_of.guarantee.relation
    assert any("at most 2 silos" in each.text for each in made_of.assumptions)
    event = made_of.accounting.event
    assert (type(event), event.contributions) == (LatticeMixture, 2)
    assert certify([event], 1e-6).epsilon == made_of.accounting.plan.epsilon
    once = make(contract(rounds=4, epsilon=10.0), run(4, void=(2,)))
    for mine, theirs in zip(made_of.guarantee.adversaries, once.guarantee.adversaries, strict=True):
        assert mine.plan.epsilon > theirs.plan.epsilon
        assert mine.effective_noise_multiplier == theirs.effective_noise_multiplier
    assert report.decode(report.encode(made_of)) == made_of


def test_the_grid_of_the_distribution_stands_in_the_report():
    accepted = contract(rounds=4)
    found = make(accepted, run(3)).accounting.plan
    assert found.grid == certify([federation.mechanism(accepted.terms)], 1e-6).discretization == 1e-4
    assert make(known_to(2, rounds=4, epsilon=10.0), run(3)).accounting.plan.grid == 1e-3


def test_where_a_unit_may_be_in_several_silos_every_round_counts_for_every_silo():
    """Silo 3 was away from round 2: a unit that it shares with silo 1 was exposed there all the same."""
    accepted, rounds = known_to(2, rounds=6, epsilon=10.0), run(4, void=(2,), missing=(3,))
    made_of = make(accepted, rounds)
    assert {each.spent.rounds for each in made_of.silos} == {3}
    counted = Counted(Curve((accepted,)), (accepted,), rounds, ())
    assert counted.loads == (counted.everyone,) * 3 == (((1, 3),),) * 3
    walked = [
        SimpleNamespace(accepted=accepted, number=each.number, charged=each.participants, basis=False) for each in rounds
    ]
    again = check_budget.spent(walked)[-1]
    for each in made_of.guarantee.adversaries:
        assert getattr(again, each.name) == each.spent.epsilon, each.name
    alone = Counted(Curve((contract(rounds=6),)), (contract(rounds=6),), rounds, ())
    assert [dict(load)[1] for load in alone.loads] == [3, 3, 2]
    assert alone.everyone == ((1, 3),)


def test_the_page_shows_what_more_than_one_unit_has():
    page = report.render(make(contract(rounds=4, unit="record"), run(3)))
    for text in ("A unit that 2 silos know", "A person with 8 records"):
        assert text in page


# --- Planning, before anybody commits -------------------------------------------------------------------------------------


def test_a_plan_for_two_silos_needs_more_noise_and_is_what_sign_calibrates(tmp_path):
    terms = replace(TERMS, epsilon=4.0, max_silos_per_unit=2, rounds=2)
    home, identity, store = made(tmp_path, terms)
    signed = enrolment.sign_version(home, identity, store, now=0.0).terms
    assert signed.privacy.max_silos_per_unit == 2
    question = planning.Question(
        epsilon=4.0, delta=terms.delta, steps=signed.steps, silos=3, units=terms.units, sampling_rate=terms.sampling_rate,
        dimension=signed.dimension, max_silos_per_unit=2,
    )  # fmt: skip
    found = planning.answer(question)
    assert found.noise_multiplier == signed.privacy.noise_multiplier
    assert found.epsilon["insiders"] == unprotected.certify(federation.whole_plan(signed), terms.delta).epsilon <= 4.0
    event = federation.mechanism(signed)
    assert certify([event], terms.delta).epsilon < 0.6 * found.epsilon["insiders"]
    assert [of for of, *_ in found.several] == ["records"] * 3
    with pytest.raises(ConfigError):
        replace(question, max_silos_per_unit=4)


def test_plan_prints_the_figures_of_several(capsys):
    words = ["plan", "--noise-multiplier", "2.64", "--rounds", "1", "--sampling-rate", "0.2", "--delta", "1e-5", "--json"]
    assert errors.run(cli.app, words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(each["of"], each["count"]) for each in facts["several"]] == [
        ("silos", 2), ("records", 2), ("records", 4), ("records", 8)
    ]  # fmt: skip
    assert facts["several"][0]["epsilon"] > facts["epsilon"]["insiders"]
    assert errors.run(cli.app, [*words, "--max-silos-per-unit", "2"]) == 0
    for_two = json.loads(capsys.readouterr().out)
    assert for_two["epsilon"]["insiders"] == facts["several"][0]["epsilon"]
    assert errors.run(cli.app, [*words, "--max-silos-per-unit", "4"]) != 0
