# SPDX-License-Identifier: Apache-2.0
"""The gate: refuses before anything is written, charges before anything runs, and composes everything on the ledger."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.dp import accounting
from privacy.dp.budget import Account, Gate, Limits
from privacy.dp.entries import Commit, Plan, Reserve, Void
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import BudgetExhausted, PrivacyRefusal

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
A, B = "aa" * 32, "bb" * 32
DELTA = 1e-5
LIMITS = Limits(epsilon=3.0, delta=DELTA)


def plan(steps=75, sigma=2.64, rate=0.2):
    return LatticeGaussian(
        sampling_rate=rate, lattice_bits=16, share_variance=math.ceil(sigma**2 * 4**16), shares=1, dimension=1000, steps=steps
    )


PLAN = plan()
"""Epsilon 2.995 by PLD, 3.28 by RDP."""


def verify(data, signature):
    KEY.public_key().verify(signature, data)


PARTS = {"sign": KEY.sign, "verify": verify, "clock": lambda: 0.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, who="silo-1", **PARTS) as made:
        yield made


def gate_for(ledger, limits=LIMITS, the_plan=PLAN, contract=A):
    return Gate(ledger, limits, plan=the_plan, contract=contract, steps_per_attempt=1)


def attempt(number):
    return number.to_bytes(16, "big")


def admit_until_refused(gate, path, first):
    """(how many were admitted, the refusal), after checking that the refusal left the ledger as it was."""
    for number in itertools.count(first):
        before = path.read_bytes()
        try:
            gate.admit(number, attempt(number))
        except BudgetExhausted as refusal:
            assert path.read_bytes() == before
            return number - first, refusal


def true_epsilon(ledger):
    return accounting.epsilon_pld(ledger.charged(), DELTA)


# --- Declaring ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_certified_as_a_whole_and_written_once(ledger):
    gate = gate_for(ledger)
    cost = gate.declare(run="first")
    assert cost == accounting.certify([PLAN], DELTA)
    assert ledger.plan(A) == Plan(contract=A, run="first", mechanism=PLAN, epsilon=3.0, delta=DELTA)
    counter = ledger.counter
    assert gate.declare() == cost
    assert gate_for(ledger).declare() == cost
    assert ledger.counter == counter


def test_a_plan_above_the_limit_is_refused_before_anything_is_written(ledger, path):
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match=r"the plan of 76 steps would bring epsilon to 3\.01\d*, the limit is 3 "):
        gate_for(ledger, the_plan=plan(76)).declare()
    assert path.read_bytes() == before


def test_the_limit_exactly_met_is_allowed_and_the_next_number_below_is_not(ledger, path):
    exact = accounting.certify([PLAN], DELTA).epsilon
    with pytest.raises(BudgetExhausted):
        gate_for(ledger, Limits(epsilon=math.nextafter(exact, 0), delta=DELTA)).declare()
    gate = gate_for(ledger, Limits(epsilon=exact, delta=DELTA))
    assert gate.declare().epsilon == exact
    for number in range(1, 76):
        gate.admit(number, attempt(number))
    assert gate.spent().epsilon == exact
    assert (gate.left, gate.steps_left) == (0.0, 0)


def test_a_contract_keeps_its_plan(ledger):
    gate_for(ledger).declare()
    with pytest.raises(PrivacyRefusal, match="75 steps") as caught:
        gate_for(ledger, the_plan=plan(20)).declare()
    assert caught.value.code == "plan-changed"
    with pytest.raises(PrivacyRefusal, match="no plan"):
        gate_for(ledger, the_plan=plan(20)).admit(1, attempt(1))


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(math.nan, DELTA), (0.0, DELTA), (math.inf, DELTA), (3.0, 0.0), (3.0, math.nan), (3.0, 1.0)]
)
def test_limits_are_numbers(epsilon, delta):
    with pytest.raises(PrivacyRefusal, match="limits"):
        Limits(epsilon=epsilon, delta=delta)


# --- Admitting ----------------------------------------------------------------------------------------------------------


def test_nothing_is_admitted_without_a_declared_plan(ledger, path):
    before = path.read_bytes()
    with pytest.raises(PrivacyRefusal, match="no plan"):
        gate_for(ledger).admit(1, attempt(1))
    assert path.read_bytes() == before


def test_an_attempt_is_on_the_disk_before_it_is_admitted(ledger, path):
    gate = gate_for(ledger)
    gate.declare()
    counter = gate.admit(1, attempt(1))
    on_disk = History.read(path, verify=verify)
    assert counter == on_disk.counter == 3
    assert on_disk.entries[-1] == Reserve(contract=A, round=1, attempt=attempt(1).hex(), mechanism=PLAN.with_steps(1))
    with pytest.raises(PrivacyRefusal, match="charged already"):
        gate.admit(1, attempt(1))


def test_no_more_attempts_than_the_plan_has_steps_whatever_became_of_them(ledger, path):
    gate = gate_for(ledger, the_plan=plan(3))
    gate.declare()
    gate.admit(1, attempt(1))
    gate.settle(1, "void")
    gate.admit(1, attempt(2))
    gate.admit(2, attempt(3))
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match="attempt 4, the plan has 3"):
        gate.admit(3, attempt(4))
    assert path.read_bytes() == before
    assert ledger.charged() == [plan(3)]


def test_a_lower_limit_after_the_declaration_stops_at_the_last_attempt_that_fits(ledger, path):
    gate_for(ledger).declare()
    tight = gate_for(ledger, Limits(epsilon=0.8, delta=DELTA))
    admitted, refusal = admit_until_refused(tight, path, 1)
    assert re.match(r"round \d+ would bring epsilon to 0\.8\d*, the limit is 0\.8 ", refusal.message)
    assert refusal.facts["round"] == admitted + 1
    assert tight.spent().epsilon <= 0.8 < accounting.certify([plan(admitted + 1)], DELTA).epsilon


def test_an_attempt_of_several_steps_is_charged_whole_before_it_is_admitted(ledger, path):
    gate = Gate(ledger, LIMITS, plan=plan(75), contract=A, steps_per_attempt=25)
    gate.declare()
    assert (gate.steps_left, gate.attempts_left) == (75, 3)
    gate.admit(1, attempt(1))
    assert History.read(path, verify=verify).entries[-1].mechanism == PLAN.with_steps(25)
    assert gate.spent() == accounting.certify([plan(25)], DELTA)
    assert gate.forecast([1, 2]) == [(more, accounting.certify([plan(25 * (more + 1))], DELTA).epsilon) for more in (1, 2)]
    gate.admit(1, attempt(2))  # the first attempt died: both are charged
    gate.settle(1, "void")
    gate.admit(2, attempt(3))
    before = path.read_bytes()
    with pytest.raises(BudgetExhausted, match="round 3 would be attempt 4, the plan has 3"):
        gate.admit(3, attempt(4))
    assert path.read_bytes() == before
    assert ledger.charged() == [plan(75)]
    assert (gate.steps_left, gate.attempts_left) == (0, 0)


def test_a_part_of_an_attempt_is_not_admitted(ledger, path):
    gate = Gate(ledger, LIMITS, plan=plan(70), contract=A, steps_per_attempt=25)
    gate.declare()
    gate.admit(1, attempt(1))
    gate.admit(2, attempt(2))
    assert (gate.steps_left, gate.attempts_left) == (20, 0)
    with pytest.raises(BudgetExhausted, match="plan has 2"):
        gate.admit(3, attempt(3))


def test_a_limit_that_falls_within_an_attempt_refuses_all_of_it(ledger, path):
    Gate(ledger, LIMITS, plan=PLAN, contract=A, steps_per_attempt=25).declare()
    limit = accounting.certify([plan(49)], DELTA).epsilon
    tight = Gate(ledger, Limits(epsilon=limit, delta=DELTA), plan=PLAN, contract=A, steps_per_attempt=25)
    admitted, refusal = admit_until_refused(tight, path, 1)
    assert admitted == 1
    assert refusal.facts["epsilon_after"] == accounting.certify([plan(50)], DELTA).epsilon


def test_admitting_is_fast_once_warm(ledger):
    gate = gate_for(ledger)
    gate.declare()
    gate.admit(1, attempt(1))
    started = time.process_time()
    for number in range(2, 52):
        gate.admit(number, attempt(number))
    assert (time.process_time() - started) / 50 < 0.05


def test_a_crash_after_the_reservation_counts(ledger, path):
    gate_for(ledger).declare()
    ledger.close()
    pid = os.fork()
    if pid == 0:
        with Ledger.open(path, **PARTS) as mine:
            gate_for(mine).admit(1, attempt(1))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with Ledger.open(path, **PARTS) as again:
        gate = gate_for(again)
        assert gate.spent() == accounting.certify([plan(1)], DELTA)
        assert gate.steps_left == 74


# --- Settling -----------------------------------------------------------------------------------------------------------


def test_settling_notes_the_outcome_once_and_gives_nothing_back(ledger):
    gate = gate_for(ledger)
    gate.declare()
    gate.admit(1, attempt(1))
    gate.admit(1, attempt(2))
    gate.admit(2, attempt(3))
    spent = gate.spent()
    for _ in range(2):
        gate.settle(1, "result")
        gate.settle(2, "void")
        gate.settle(3, "result")
    assert ledger.entries[-2:] == (
        Commit(contract=A, round=1, attempt=attempt(2).hex()),
        Void(contract=A, round=2, reason="the round closed without a result"),
    )
    assert ledger.counter == 7
    assert gate.spent() == spent


# --- Composing over contracts -------------------------------------------------------------------------------------------


def test_two_contracts_on_one_ledger_compose(ledger, path):
    first = gate_for(ledger, the_plan=plan(30))
    first.declare()
    for number in range(1, 31):
        first.admit(number, attempt(number))
    other = plan(60, sigma=3.0)
    second = gate_for(ledger, the_plan=other, contract=B)
    before = path.read_bytes()
    assert accounting.certify([other], DELTA).epsilon < 3.0, "alone it would fit"
    with pytest.raises(BudgetExhausted, match="60 steps"):
        second.declare()
    assert path.read_bytes() == before
    assert second.spent() == first.spent() == accounting.certify([plan(30)], DELTA), "one contract has charged so far"
    smaller = gate_for(ledger, the_plan=plan(10, sigma=3.0), contract=B)
    cost = smaller.declare()
    both = [plan(30), plan(10, sigma=3.0)]
    assert accounting.certify(both, DELTA).epsilon <= cost.epsilon == pytest.approx(
        accounting.certify_adaptive(both, DELTA, order=LIMITS.filter_order).epsilon
    )
    for number in range(1, 11):
        smaller.admit(number, attempt(number))
    assert smaller.spent().epsilon == first.spent().epsilon == cost.epsilon


def test_a_plan_interrupted_by_another_contract_stops_at_the_limit(ledger, path):
    first = gate_for(ledger)
    first.declare()
    for number in range(1, 11):
        first.admit(number, attempt(number))
    second = gate_for(ledger, the_plan=plan(30), contract=B)
    second.declare()
    for number in range(1, 31):
        second.admit(number, attempt(number))
    admitted, refusal = admit_until_refused(first, path, 11)
    assert refusal.code == "budget-exhausted"
    assert 0 < admitted < 65
    assert first.spent().epsilon <= 3.0
    assert true_epsilon(ledger) <= first.spent().epsilon


def test_the_order_of_the_filter_follows_from_the_limits_alone():
    assert LIMITS.filter_order == Limits(epsilon=3.0, delta=DELTA).filter_order
    stricter = Limits(epsilon=3.0, delta=DELTA / 1000, filter_delta=DELTA)
    assert stricter.filter_order == LIMITS.filter_order != Limits(epsilon=3.0, delta=DELTA / 1000).filter_order
    orders = [Limits(epsilon=epsilon, delta=DELTA).filter_order for epsilon in (0.1, 0.5, 1.0, 3.0, 8.0)]
    assert orders == sorted(orders, reverse=True)
    room = {order: (3.0 - accounting.conversion(order, DELTA)) / order for order in accounting.INTEGER_ORDERS}
    assert room[LIMITS.filter_order] == max(room.values()) > 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=st.lists(st.tuples(st.integers(1, 20), st.floats(1.0, 6.0), st.sampled_from([0.05, 0.2, 1.0])), min_size=1, max_size=3),
    stops=st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_reported_spent_is_never_below_what_was_charged_nor_above_the_limit(tmp_path_factory, runs, stops):
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    with Ledger.create(path, who="silo-1", **PARTS) as ledger:
        for index, ((steps, sigma, rate), stop) in enumerate(zip(runs, stops, strict=False)):
            gate = gate_for(ledger, the_plan=plan(steps, sigma, rate), contract=f"{index:064x}")
            try:
                gate.declare()
                for number in range(1, min(stop, steps) + 1):
                    gate.admit(number, attempt(number))
            except BudgetExhausted:
                pass
        spent = gate.spent().epsilon
        assert true_epsilon(ledger) <= spent
        if any(isinstance(body, Reserve) for body in ledger.entries):
            assert 0 < spent <= LIMITS.epsilon
        assert sum(event.steps for event in ledger.charged()) == sum(isinstance(body, Reserve) for body in ledger.entries)


# --- Looking ------------------------------------------------------------------------------------------------------------


def test_forecast_and_left_say_what_admitting_will_do(ledger):
    gate = gate_for(ledger)
    gate.declare()
    for number in range(1, 11):
        gate.admit(number, attempt(number))
    forecast = dict(gate.forecast([0, 1, 10, 65]))
    assert forecast[0] == gate.spent().epsilon == accounting.certify([plan(10)], DELTA).epsilon
    assert forecast[65] == accounting.certify([PLAN], DELTA).epsilon
    assert sorted(forecast.values()) == list(forecast.values())
    assert gate.left == pytest.approx(3.0 - forecast[0])
    gate.admit(11, attempt(11))
    assert gate.spent().epsilon == forecast[1]


def test_an_account_reads_while_a_gate_writes(ledger, path):
    gate = gate_for(ledger)
    gate.declare()
    gate.admit(1, attempt(1))
    account = Account(History.read(path, verify=verify), LIMITS, plan=PLAN, contract=A, steps_per_attempt=1)
    assert account.spent() == gate.spent()
    assert account.steps_left == 74
    assert not hasattr(account, "admit")


def test_nothing_spent_costs_nothing(ledger):
    gate = gate_for(ledger)
    assert gate.spent().epsilon == 0
    assert gate.left == 3.0
    assert gate.steps_left == 75
