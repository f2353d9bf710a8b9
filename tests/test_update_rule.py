# SPDX-License-Identifier: Apache-2.0
"""The update rule against an independent implementation in exact order, and its refusals."""

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import federation, update_rule
from privacy.errors import RoundError, TrustError
from tests.sharing import share_terms
from tests.terms import contract_bytes


@pytest.fixture(scope="module")
def terms() -> federation.Contract:
    return federation.parse(contract_bytes()).terms


def scalar_adam(totals: list[int], terms: federation.Contract) -> float:
    """Adam on one coordinate in Python floats, written from the specification's expression tree."""
    t, p = terms.training, terms.privacy
    theta = m = v = 0.0
    b1 = b2 = 1.0
    for k, s in enumerate(totals):
        g = (float(s) * (p.max_grad_norm / float(2**p.lattice_bits))) / terms.divisor
        b1, b2 = b1 * t.beta1, b2 * t.beta2
        m = (m * t.beta1) + (g * (1.0 - t.beta1))
        v = (v * t.beta2) + ((g * g) * (1.0 - t.beta2))
        theta = theta - update_rule.learning_rate(t, k) * ((m / (1.0 - b1)) / (math.sqrt(v / (1.0 - b2)) + t.epsilon))
    return theta


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_adam_is_bit_equal_to_python_floats(totals: list[int]) -> None:
    terms = federation.parse(contract_bytes()).terms
    state = update_rule.initial(terms)
    for s in totals:
        state = update_rule.advance(state, np.full(terms.dimension, s, dtype=np.int64), terms)
    expected = scalar_adam(totals, terms)
    assert state.theta[0] == state.theta[-1] == expected
    assert state.applied == len(totals)


def test_sgd_with_momentum_is_bit_equal_to_python_floats(terms: federation.Contract) -> None:
    training = msgspec.structs.replace(terms.training, optimizer="sgd", momentum=0.5)
    sgd = msgspec.structs.replace(terms, training=training)
    state, theta, m = update_rule.initial(sgd), 0.0, 0.0
    for k, s in enumerate([5, -(2**30), 7]):
        state = update_rule.advance(state, np.full(sgd.dimension, s, dtype=np.int64), sgd)
        m = (m * 0.5) + (float(s) * (sgd.privacy.max_grad_norm / float(2**sgd.privacy.lattice_bits))) / sgd.divisor
        theta = theta - update_rule.learning_rate(training, k) * m
    assert state.theta[3] == theta


def test_state_round_trips_and_every_flipped_byte_changes_the_digest_or_is_refused(terms: federation.Contract) -> None:
    state = update_rule.advance(update_rule.initial(terms), np.arange(terms.dimension, dtype=np.int64), terms)
    raw = state.to_bytes()
    assert update_rule.State.from_bytes(raw).digest == state.digest
    for position in range(0, len(raw), 97):
        bent = bytearray(raw)
        bent[position] ^= 1
        try:
            other = update_rule.State.from_bytes(bytes(bent))
        except TrustError:
            continue
        assert other.digest != state.digest
    with pytest.raises(TrustError):
        update_rule.State.from_bytes(raw[:-1])


def test_a_non_finite_update_is_refused_and_the_old_state_stands(terms: federation.Contract) -> None:
    state = update_rule.initial(terms)
    huge = msgspec.structs.replace(state, first_moment=np.full(terms.dimension, np.finfo(float).max), beta1_power=1.0)
    training = msgspec.structs.replace(terms.training, optimizer="sgd", momentum=0.99, learning_rate=1e9)
    with pytest.raises(RoundError, match="not finite"):
        update_rule.advance(huge, np.zeros(terms.dimension, dtype=np.int64), msgspec.structs.replace(terms, training=training))
    assert np.all(state.theta == 0.0)


def test_the_learning_rate_warms_up_stays_and_decays(terms: federation.Contract) -> None:
    t = msgspec.structs.replace(
        terms.training, rounds=100, learning_rate=1.0, warmup_rounds=10, decay_rounds=20, final_fraction=0.1
    )
    rates = [update_rule.learning_rate(t, k) for k in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[50] == rates[80] == 1.0
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_a_sum_beyond_what_n_silos_can_reach_is_not_accepted(terms: federation.Contract) -> None:
    plan = federation.ring_plan(terms)
    edge = plan.clamp * terms.silos + plan.headroom
    total = np.zeros(terms.dimension, dtype=np.int64)
    total[0] = edge
    assert update_rule.accepts(total, terms)
    total[0] = -edge - 1
    assert not update_rule.accepts(total, terms)


@pytest.fixture(scope="module")
def alone() -> federation.Contract:
    """Terms of local mode."""
    training = {"mode": "local", "steps_per_round": 2, "rounds": 10, "warmup_rounds": 4, "update_bound": 0.3}
    return federation.parse(contract_bytes(training=training)).terms


def test_in_local_mode_the_shared_model_takes_the_mean_and_has_no_moments(alone: federation.Contract) -> None:
    state, theta = update_rule.initial(alone), 0.0
    clamp = 2**29  # the largest power of two of which three fit below 2**31
    for total in (5, -(3 * clamp), 3 * clamp, 12_345_678):
        state = update_rule.advance(state, np.full(alone.dimension, total, dtype=np.int64), alone)
        theta = theta + ((float(total) * (0.3 / clamp)) / 3.0)
    assert state.theta[0] == state.theta[-1] == theta
    assert (state.applied, state.beta1_power, state.beta2_power) == (4, 1.0, 1.0)
    assert not state.first_moment.any()
    assert not state.second_moment.any()


def test_in_local_mode_no_sum_beyond_n_clamped_changes_is_accepted(alone: federation.Contract) -> None:
    total = np.zeros(alone.dimension, dtype=np.int64)
    for edge in (3 * 2**29, -3 * 2**29):
        total[1] = edge
        assert update_rule.accepts(total, alone)
        total[1] = edge + (1 if edge > 0 else -1)
        assert not update_rule.accepts(total, alone)


def test_a_silos_own_step_is_the_joint_rule_at_the_shared_states_place_in_the_schedule(alone: federation.Contract) -> None:
    total = np.arange(alone.dimension, dtype=np.int64) * 1_000_003
    state = update_rule.step(update_rule.initial(alone), total, alone, applied=2)
    state = update_rule.step(state, -total, alone, applied=2)
    training = msgspec.structs.replace(alone.training, mode="joint", learning_rate=0.02 * 3 / 4, warmup_rounds=0)
    privacy = msgspec.structs.replace(alone.privacy, colluders=0)
    joint = msgspec.structs.replace(alone, training=training, privacy=privacy, member=alone.member[:1])
    expected = update_rule.initial(joint)
    for each in (total, -total):
        expected = update_rule.advance(expected, each, joint)
    assert state.digest == expected.digest
    assert state.applied == 2


@pytest.mark.parametrize("standing", [3, 4, 5])
def test_a_sum_of_fewer_silos_is_divided_by_them(standing: int) -> None:
    """Joint: D = q·units·|U|; the same total over n silos gives another step. Local: the mean over |U|."""
    sgd = {"optimizer": "sgd"}
    joint = federation.parse(share_terms(5, 5, training=sgd)).terms
    total = np.arange(joint.dimension, dtype=np.int64) * 1_000_003
    state = update_rule.advance(update_rule.initial(joint), total, joint, silos=standing)
    t, p = joint.training, joint.privacy
    g = (float(total[7]) * (p.max_grad_norm / float(2**p.lattice_bits))) / (p.sampling_rate * p.units * standing)
    assert state.theta[7] == 0.0 - t.learning_rate * (0.0 * t.momentum + g)
    alone = federation.parse(share_terms(5, 5, training={"mode": "local", "update_bound": 0.3})).terms
    state = update_rule.advance(update_rule.initial(alone), total, alone, silos=standing)
    assert state.theta[7] == 0.0 + (float(total[7]) * federation.update_grid(alone).step) / float(standing)


def test_all_silos_stand_in_a_sum_unless_it_is_said() -> None:
    terms = federation.parse(share_terms(5, 5)).terms
    total = np.arange(terms.dimension, dtype=np.int64)
    start = update_rule.initial(terms)
    assert update_rule.advance(start, total, terms).digest == update_rule.advance(start, total, terms, silos=5).digest
    assert update_rule.advance(start, total, terms).digest != update_rule.advance(start, total, terms, silos=4).digest


@pytest.mark.parametrize("mode", ["joint", "local"])
def test_what_fewer_silos_can_reach_is_less(mode: str) -> None:
    terms = federation.parse(share_terms(5, 5, training={"mode": mode})).terms
    plan = federation.ring_plan(terms)
    each, room = (plan.clamp, plan.headroom) if mode == "joint" else (federation.update_grid(terms).clamp, 0)
    total = np.zeros(terms.dimension, dtype=np.int64)
    for standing in (3, 4, 5):
        for sign in (1, -1):
            total[0] = sign * (each * standing + room)
            assert update_rule.accepts(total, terms, silos=standing)
            total[0] += sign
            assert not update_rule.accepts(total, terms, silos=standing)


@pytest.mark.parametrize("standing", [0, 2, 6, -1])
def test_a_sum_of_more_or_fewer_silos_than_the_contract_lets_anybody_sum_is_refused(standing: int) -> None:
    for mode in ("joint", "local"):
        terms = federation.parse(share_terms(5, 5, training={"mode": mode})).terms
        total = np.zeros(terms.dimension, dtype=np.int64)
        for call in (
            lambda: update_rule.accepts(total, terms, silos=standing),  # noqa: B023
            lambda: update_rule.advance(update_rule.initial(terms), total, terms, silos=standing),  # noqa: B023
        ):
            with pytest.raises(RoundError, match=f"a sum of {standing} silos; under this contract 3 to 5"):
                call()


def test_this_machine_reaches_the_known_answer() -> None:
    assert update_rule.known_trajectory() == update_rule.KNOWN_ANSWER


def test_only_exact_operations_are_used() -> None:
    """The source calls no numpy function whose result a library may choose."""
    source = Path(update_rule.__file__).read_text(encoding="utf-8").split('"""', 2)[2]
    for banned in ("np.power", "np.exp", "np.cos", "np.sum", "np.mean", "np.dot", "np.linalg", "np.einsum", ".sum(", ".mean("):
        assert banned not in source, banned


def test_it_loads_no_torch() -> None:
    code = "import sys, privacy.update_rule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
