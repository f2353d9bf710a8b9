# SPDX-License-Identifier: Apache-2.0
"""The report's facts: every epsilon is the accountant's, every upload is charged, and nothing is said that is not known."""

from __future__ import annotations

import functools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.reporting import wording
from aggregator.reporting.compliance import true_positive_bound
from aggregator.reporting.record import SCHEMA, Report
from privacy import federation
from privacy.dp import accounting
from privacy.errors import ConfigError
from privacy.identity import keys
from privacy.reporting import numbers
from tests.sample_report import NAMES, contract, make, run, sample

DELTA = 1e-6


@functools.cache
def small(uploads: int = 3, **terms) -> Report:
    """A plan of four rounds, of which ``uploads`` were charged; the second is void."""
    return make(contract(rounds=4, **terms), run(uploads, void=(2,)))


def certified(terms, *, shares: int, steps: int) -> accounting.Certificate:
    return accounting.certify([federation.mechanism(terms, shares=shares, rounds=1).with_steps(steps)], DELTA)


def test_epsilon_equals_the_accountant_for_every_adversary():
    terms = contract().terms
    for each, shares in zip(sample().guarantee.adversaries, (3, 2, 1), strict=True):
        for figure, steps in ((each.spent, 24), (each.plan, 30)):
            bound = certified(terms, shares=shares, steps=steps)
            assert (figure.epsilon, figure.epsilon_pld, figure.epsilon_rdp) == (bound.epsilon, bound.epsilon_pld, bound.epsilon_rdp)
            assert figure.steps == steps
        assert each.shares == shares


def test_epsilon_can_be_computed_again_from_the_event_in_the_report():
    report = sample()
    event = report.accounting.event
    assert accounting.certify([event], DELTA).epsilon == report.accounting.plan.epsilon
    assert accounting.certify([event.with_steps(24)], DELTA).epsilon == report.accounting.spent.epsilon


def test_the_profile_holds_epsilon_at_the_contracts_delta_and_at_1e_5():
    report, terms = small(), contract(rounds=4).terms
    event = federation.mechanism(terms, shares=2)
    points = {point.delta: (point.spent, point.plan) for point in report.accounting.profile}
    for delta in (DELTA, 1e-5):
        assert points[delta] == tuple(accounting.certify([event.with_steps(steps)], delta).epsilon for steps in (3, 4)), delta
    assert points[1e-5] < points[DELTA]


@pytest.mark.parametrize("unit", ["record", "patient_id"])
def test_the_report_names_unit_and_neighbours_of_every_contract(unit):
    guarantee = small(unit=unit).guarantee
    assert guarantee.unit
    assert "added to or removed from the records of one silo" in guarantee.relation
    assert ("patient_id" in guarantee.relation) == (unit == "patient_id")


def test_a_silo_is_charged_for_every_round_that_holds_its_upload_void_ones_too():
    assert [silo.spent.steps for silo in sample().silos] == [24, 24, 23]
    report = make(contract(rounds=4), run(4, void=(2,), missing=(3,)))
    assert [silo.spent.steps for silo in report.silos] == [3, 3, 2]
    terms = contract(rounds=4).terms
    assert report.silos[0].spent.epsilon == certified(terms, shares=2, steps=3).epsilon
    assert report.accounting.spent.steps == 3


def test_budget_left_and_rounds_left_follow_from_the_contract():
    for silo in sample().silos:
        assert silo.limit == 3.0
        assert silo.left == 3.0 - silo.spent.epsilon
        assert silo.rounds_left == 30 - silo.spent.steps


def test_rounds_left_stop_where_the_limit_would_be_passed():
    curve = [certified(contract(rounds=4).terms, shares=2, steps=steps).epsilon for steps in range(1, 5)]
    report = small(uploads=1, epsilon=(curve[1] + curve[2]) / 2)
    assert [silo.rounds_left for silo in report.silos] == [1, 1, 1]
    exact = small(uploads=1, epsilon=curve[2])
    assert exact.silos[0].rounds_left == 2


def test_a_passed_limit_leaves_nothing_and_says_so():
    report = small(uploads=3, epsilon=0.3)
    silo = report.silos[0]
    assert (silo.left, silo.rounds_left) == (0.0, 0)
    assert silo.spent.epsilon > silo.limit
    share = wording.up(100 * silo.spent.epsilon / 0.3, 0)
    assert f"{share}\u00a0% of the limit ε = 0.3" in report.summary[0]


def test_uploads_beyond_the_plan_are_charged():
    report = make(contract(rounds=4), run(6))
    assert report.accounting.spent.steps == 6
    assert report.silos[0].rounds_left == 0
    assert report.burn_down[-1].steps == 6
    assert report.accounting.spent.epsilon > report.accounting.plan.epsilon


def test_without_an_upload_nothing_is_spent():
    report = make(contract(rounds=4), ())
    assert report.summary[0].startswith("No upload has reached the aggregator")
    assert {silo.spent.epsilon for silo in report.silos} == {0.0}
    assert [odds.spent for odds in report.guarantee.odds] == [0.001, 0.01]


def test_burn_down_holds_start_now_and_end_and_never_falls():
    points = sample().burn_down
    assert {0, 1, 24, 30} <= {point.steps for point in points}
    assert len(points) <= 17
    for figure in ("epsilon", "epsilon_pld", "epsilon_rdp"):
        values = [getattr(point, figure) for point in points]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("rounds", "names"),
    [
        (run(2)[::-1], "must ascend"),
        (run(1) * 2, "must ascend"),
        ((msgspec.structs.replace(run(1)[0], participants=(1, 1)),), "twice"),
        ((msgspec.structs.replace(run(1)[0], participants=(1, 9)),), "no member has id 9"),
    ],
)
def test_rounds_that_cannot_be_are_refused(rounds, names):
    with pytest.raises(ConfigError, match=names):
        make(contract(rounds=4), rounds)


def test_fingerprints_are_those_of_the_parties():
    for silo, member in zip(sample().silos, contract().terms.member, strict=True):
        public = keys.PublicIdentity(name=member.name, sign_key=bytes.fromhex(member.sign_key))
        assert silo.fingerprint == keys.fingerprint(public)
    assert [silo.organisation for silo in sample().silos] == [organisation for _, organisation in NAMES]


# --- the trade-off -------------------------------------------------------------------------------------------------------


@given(epsilon=st.floats(0, 30), delta=st.floats(0, 0.5), rate=st.floats(0, 0.5))
def test_true_positive_bound_is_the_formula(epsilon, delta, rate):
    expected = min(1.0, math.exp(epsilon) * rate + delta, 1 - math.exp(-epsilon) * (1 - delta - rate))
    assert true_positive_bound(rate, [(epsilon, delta)]) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@given(epsilon=st.floats(0.01, 8))
def test_true_positive_bound_is_reached_by_randomised_response(epsilon):
    truthful = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert true_positive_bound(1 - truthful, [(epsilon, 0.0)]) == pytest.approx(truthful, rel=1e-9)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1)), max_size=5), st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1)
)
def test_true_positive_bound_only_falls_with_more_bounds_and_stays_a_rate(profile, epsilon, delta, rate):
    fewer = true_positive_bound(rate, profile)
    more = true_positive_bound(rate, [*profile, (epsilon, delta)])
    assert rate - 1e-12 <= more <= fewer <= 1


def test_true_positive_bound_lies_above_the_true_gaussian_test():
    from statistics import NormalDist

    normal, terms = NormalDist(), contract(rounds=4, units=200, sampling_rate=1.0, noise_multiplier=4.0, epsilon=9.0)
    report = make(terms, run(4))
    mu = math.sqrt(4) / 4.0
    for odds in report.guarantee.odds:
        best = normal.cdf(normal.inv_cdf(odds.false_positive_rate) + mu)
        assert best <= odds.plan <= 1.4 * best


# --- the words -----------------------------------------------------------------------------------------------------------


def test_the_words_claim_nothing_about_any_law():
    for report in (sample(), small(unit="record")):
        text = msgspec.json.encode(report).decode().lower()
        for word in ("anonym", "complian", "compliant", "gdpr", "hipaa", "guaranteed", "impossible"):
            assert word not in text


def test_record_level_units_carry_their_own_assumption():
    assert any("several records" in each.text for each in small(unit="record").assumptions)
    assert not any("several records" in each.text for each in sample().assumptions)


def test_assumptions_are_numbered_and_ordered_by_severity():
    for report in (sample(), small(unit="record")):
        assert [each.id for each in report.assumptions] == [f"A{number}" for number in range(1, len(report.assumptions) + 1)]
        order = [("guarantee", "figure", "scope").index(each.severity) for each in report.assumptions]
        assert order == sorted(order)


def test_parameters_are_the_contracts():
    values = {each.name: each.value for each in sample().mechanism}
    terms = contract().terms
    plan = federation.ring_plan(terms)
    assert values["sampling rate"] == 0.1
    assert values["noise of one silo"] == plan.share_variance
    assert values["noise shares counted on"] == 2
    assert values["mean taken over"] == terms.divisor
    assert values["effective noise multiplier"] < values["noise multiplier"]


def test_only_commands_of_this_project_are_named():
    commands = [each.command for each in sample().checks]
    own = ["silo verify --report report.json", "silo budget", "silo status"]
    assert commands == [*own, "aggregator report", "sha256sum report.json"]


@given(st.floats(0, 1e6))
def test_rounding_never_flatters(value):
    assert float(numbers.up(value)) >= value >= float(numbers.down(value))
    assert float(numbers.up(value)) - value < 0.0101


@pytest.mark.parametrize(
    ("value", "text"), [(1e-6, "10⁻⁶"), (8.3e-6, "8.3 × 10⁻⁶"), (5e-4, "5 × 10⁻⁴"), (1.2e-10, "1.2 × 10⁻¹⁰"), (1.0, "10⁰")]
)
def test_small_numbers_in_print(value, text):
    assert numbers.scientific(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (15_368, "15.4 kB"), (999_900, "1000 kB"), (7_340_000, "7.34 MB"), (2e9, "2 GB")],
)
def test_sizes_in_print(count, text):
    assert numbers.size(count) == text


SIMULATED = {"simulated": True}
REAL_ONLY = (
    "that the members agreed on, not a count", "were chosen without looking at the records", "no other work on the records spends",
    "fingerprints were compared by people",
)


def test_a_simulation_is_called_one_and_says_nothing_that_only_a_real_federation_can():
    plain = msgspec.json.encode(small()).decode()
    for said in (None, False, "yes"):
        assert msgspec.json.encode(make(contract(rounds=4), run(3), extra={"simulated": said})).decode().count("simulation") == 0
    text = msgspec.json.encode(make(contract(rounds=4), run(3), extra=SIMULATED)).decode()
    for words in REAL_ONLY:
        assert words in plain
        assert words not in text
    assert "took the figure for units from them" in text
    assert "trained 3 more models on the same records, which no ledger charges" in text
    assert "would have to charge" in text
    assert "simulation" not in plain


def test_the_simulations_words_name_as_many_heads_as_are_trained():
    from silo.learning import evaluation

    assert len(evaluation.HEAD_RATES) == wording.HEAD_MODELS


def test_an_upload_to_a_round_that_is_still_open_is_charged():
    report = make(contract(rounds=4), run(2), still_open=(1, 3))
    assert [silo.spent.steps for silo in report.silos] == [3, 2, 3]
    assert report.accounting.spent.epsilon == certified(contract(rounds=4).terms, shares=2, steps=3).epsilon
    assert any("still open" in line for line in report.composition)


# --- local mode ----------------------------------------------------------------------------------------------------------


LOCAL = {"mode": "local", "steps_per_round": 3}


def test_in_local_mode_three_adversaries_face_one_share_and_a_round_is_charged_for_all_its_steps():
    report, terms = small(**LOCAL), contract(rounds=4, **LOCAL).terms
    assert (report.federation.mode, report.federation.steps_per_round) == ("local", 3)
    assert (report.accounting.event.shares, report.accounting.event.steps) == (1, 12)
    for each in report.guarantee.adversaries:
        assert each.shares == 1
        for figure, rounds in ((each.spent, 3), (each.plan, 4)):
            assert (figure.rounds, figure.steps) == (rounds, 3 * rounds)
            assert figure.epsilon == certified(terms, shares=1, steps=3 * rounds).epsilon
    assert [(silo.spent.rounds, silo.spent.steps) for silo in report.silos] == [(3, 9), (3, 9), (2, 6)]
    assert [(point.rounds, point.steps) for point in report.burn_down] == [(count, 3 * count) for count in range(5)]


def test_the_words_of_a_local_plan_rest_epsilon_on_the_silos_own_noise():
    said, joint = (msgspec.json.encode(report).decode() for report in (small(**LOCAL), small()))
    for words in (
        "against everyone", "4 rounds of 3 private steps in each silo", "each as 3 steps of the mechanism",
        "adds its own noise in full", "ε rests on none of these", "and its optimiser",
        "what the silo’s own private steps changed of the model",
    ):
        assert words in said, words
        assert words not in joint, words
    for words in ("subtract their own noise", "add the noise they owe", "the third row of the table", "in a round by its own coin"):
        assert words not in said, words
    values = {each.name: each.value for each in small(**LOCAL).mechanism}
    assert (values["noise shares counted on"], values["steps per round"], values["update bound"]) == (1, 3, 1.0)
    assert values["mean taken over"] == 0.1 * 2000
    assert "update bound" not in {each.name for each in small().mechanism}


def test_both_modes_name_the_pseudo_random_function_and_what_the_number_of_attempts_tells():
    for report in (small(), small(**LOCAL)):
        assert any("AES-256 as a pseudo-random function" in row.text for row in report.assumptions if row.severity == "guarantee")
        tried = [item for item in report.traffic.left if "a crash may depend on records" in item.what]
        assert [("ledger" in item.what, "header" in item.form, "adapter" in item.form) for item in tried] == [(True, True, True)]


def test_a_local_simulation_keeps_the_simulations_own_words():
    text = msgspec.json.encode(make(contract(rounds=4, **LOCAL), run(3), extra=SIMULATED)).decode()
    assert "one machine plays every party" in text
    for words in REAL_ONLY:
        assert words not in text


def test_schema_name_is_fixed():
    assert SCHEMA == sample().format == "siloquy-report/2"
