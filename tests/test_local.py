# SPDX-License-Identifier: Apache-2.0
"""Local mode: silos that train alone, what they send, what their ledgers hold, and that the mean is the mean to the bit."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from aggregator import rounds
from privacy import envelope, federation, update_rule
from privacy.dp import accounting, grid, noise, ring
from privacy.errors import MachineError, RoundError
from privacy.federation import ring_plan, update_grid
from privacy.messages import Outcome, Signed, decode
from privacy.prg import Randomness
from privacy.secure_sum import guardian_sum
from silo.learning import local
from tests.federation import upload_of
from tests.terms import contract_bytes
from tests.whole import SILOS, Whole, contribution, noise_source

ROUNDS, STEPS = 3, 4
LOCAL = {"mode": "local", "steps_per_round": STEPS, "learning_rate": 0.05, "warmup_rounds": 2}


def terms_of(**training) -> federation.Contract:
    return federation.parse(contract_bytes(training={**LOCAL, **training})).terms


def keyed(start: int = 0):
    """Fresh, replayable randomness for each call."""
    numbers = itertools.count(start)
    return lambda: Randomness.from_key(next(numbers).to_bytes(32, "big"))


def changed_by_hand(terms, shared, contribute, randomness, steps):
    """A silo's own (θ, m, v) after ``steps`` steps from ``shared``: plain numpy, by the specification's expression tree."""
    plan, t, p = ring_plan(terms), terms.training, terms.privacy
    theta, m, v, b1, b2 = shared.theta.copy(), 0.0, 0.0, 1.0, 1.0
    for step in range(steps):
        seen = msgspec.structs.replace(shared, theta=theta, applied=step)
        drawn = noise.discrete_gaussian(terms.dimension, plan.share_variance, randomness())
        g = ((contribute(seen) + drawn).astype(np.float64) * (p.max_grad_norm / 2.0**p.lattice_bits)) / (p.sampling_rate * p.units)
        rate = update_rule.learning_rate(t, shared.applied)
        b1, b2 = b1 * t.beta1, b2 * t.beta2
        m, v = m * t.beta1 + g * (1.0 - t.beta1), v * t.beta2 + (g * g) * (1.0 - t.beta2)
        theta = theta - rate * ((m / (1.0 - b1)) / (np.sqrt(v / (1.0 - b2)) + t.epsilon))
    return theta, m, v


def model_of(shared, own, terms, contribute, randomness):
    """A silo's own model ``(d,)`` after a round's steps, which exists in its memory only."""
    state = msgspec.structs.replace(own or update_rule.initial(terms), theta=shared.theta)
    for _ in range(terms.training.steps_per_round):
        total = ring.lift(local.noisy(contribute(state), terms, randomness()))
        state = update_rule.step(state, total, terms, applied=shared.applied)
    return state.theta


# --- One silo --------------------------------------------------------------------------------------------------------------


def test_a_silos_steps_are_adam_on_its_own_noisy_sums_with_the_noise_in_full():
    terms = terms_of()
    shared = update_rule.initial(terms)
    words, own = local.trained(shared, None, terms, contribute=contribution(1), randomness=keyed())
    theta, first_moment, second_moment = changed_by_hand(terms, shared, contribution(1), keyed(), STEPS)
    assert np.array_equal(own.first_moment, first_moment)
    assert np.array_equal(own.second_moment, second_moment)
    assert own.applied == STEPS
    assert not own.theta.any(), "less the shared model it would be the vector without its mask"
    grid = update_grid(terms)
    assert np.array_equal(ring.lift(words), np.rint(theta / grid.step).astype(np.int64))
    assert ring_plan(terms).share_variance == math.ceil(terms.privacy.noise_multiplier**2 * 4**terms.privacy.lattice_bits)


def test_the_schedule_follows_rounds_and_the_moments_follow_steps():
    terms = terms_of(optimizer="sgd", momentum=0.5, rounds=10)
    shared = msgspec.structs.replace(update_rule.initial(terms), applied=1)
    _, once = local.trained(shared, None, terms, contribute=contribution(1), randomness=keyed())
    _, again = local.trained(shared, once, terms, contribute=contribution(1), randomness=keyed(100))
    assert (once.applied, again.applied) == (STEPS, 2 * STEPS)
    total = ring.lift(local.noisy(contribution(1)(update_rule.initial(terms)), terms, keyed()()))
    rate = terms.training.learning_rate * 2 / 2
    first = update_rule.step(update_rule.initial(terms), total, terms, applied=1)
    assert np.array_equal(first.theta, -(rate * (total * (0.5 / 2.0**20) / (0.25 * 200))))
    fresh = local.trained(shared, None, terms, contribute=contribution(1), randomness=keyed(100))[1]
    assert not np.array_equal(again.first_moment, fresh.first_moment), "the moments of the round before are in it"


def test_every_step_draws_a_sample_and_noise_of_its_own_and_a_public_number_of_them():
    terms, seen = terms_of(), []

    def contribute(state):
        seen.append(state)
        return np.zeros(terms.dimension, dtype=np.int64)

    sources = []

    def randomness():
        sources.append(Randomness.from_key(len(sources).to_bytes(32, "big")))
        return sources[-1]

    local.trained(update_rule.initial(terms), None, terms, contribute=contribute, randomness=randomness)
    assert len(seen) == len(sources) == STEPS
    assert len({state.theta.tobytes() for state in seen}) == STEPS


def test_a_change_beyond_the_bound_is_cut_and_the_silos_own_model_goes_on_from_the_shared_one():
    terms = terms_of(update_bound=1e-3)
    shared, seen = update_rule.initial(terms), []
    words, own = local.trained(shared, None, terms, contribute=contribution(1), randomness=keyed())
    assert (np.abs(model_of(shared, None, terms, contribution(1), keyed())) > 1e-3).any()
    assert np.abs(ring.lift(words)).max() == update_grid(terms).clamp
    moved = msgspec.structs.replace(shared, theta=shared.theta + 7.0)
    local.trained(moved, own, terms, contribute=lambda state: seen.append(state) or contribution(1)(state), randomness=keyed())
    assert np.array_equal(seen[0].theta, moved.theta)
    assert np.array_equal(seen[0].first_moment, own.first_moment)


def test_a_step_of_another_shape_or_one_that_is_not_finite_is_an_error():
    terms = terms_of(optimizer="sgd", learning_rate=1e9)
    with pytest.raises(MachineError, match="a step gave"):
        local.trained(
            update_rule.initial(terms), None, terms, contribute=lambda state: np.zeros(3, dtype=np.int64), randomness=keyed()
        )
    wild = msgspec.structs.replace(update_rule.initial(terms), first_moment=np.full(terms.dimension, np.finfo(float).max))
    terms = terms_of(optimizer="sgd", momentum=0.99, learning_rate=1e9)
    with pytest.raises(RoundError, match="not finite"):
        local.trained(update_rule.initial(terms), wild, terms, contribute=contribution(1), randomness=keyed())


# --- A federation ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["adam", "sgd"])
def federated(request, tmp_path_factory):
    """(whole, what each silo settled, how the rounds closed): three rounds, noise drawn from known sources.

    ``whole.kept``: the attempt of each silo and round as it lay on the disk while the round was open.
    """
    whole = Whole.create(tmp_path_factory.mktemp("local") / "f", training={**LOCAL, "optimizer": request.param, "momentum": 0.5})
    original, whole.kept = whole.take_part, {}

    def take_part(silo, last, **options):
        def looking(slot, data):
            attempt = whole.root / f"silo-{silo}" / "epoch" / "1" / "attempt"
            if slot[0] == "freeze" and attempt.is_file():
                whole.kept[silo, slot[1]] = attempt.read_bytes()
            return data

        line = whole.line()
        line.alter = looking
        return original(silo, last, seeded=True, line=line, **options)

    whole.take_part = take_part
    settled, closed = whole.run(ROUNDS)
    return whole, settled, closed


def models_of(whole):
    """(silo, round, θ of the shared model before it, the silo's own θ after it): what no silo keeps, computed again."""
    terms = whole.accepted.terms
    shared, own = update_rule.initial(terms), dict.fromkeys(SILOS)
    for number in range(1, ROUNDS + 1):
        total = 0
        for silo in SILOS:
            yield silo, number, shared.theta, model_of(shared, own[silo], terms, contribution(silo), noise_of(silo, number))
            words, own[silo] = local.trained(
                shared, own[silo], terms, contribute=contribution(silo), randomness=noise_of(silo, number)
            )
            total = total + ring.lift(words)
        shared = update_rule.advance(shared, total, terms)


def opened_uploads(whole):
    """Every masked vector as the hub reads it, opened with its own seed."""
    for (kind, number, silo), raw in whole.store.log:
        if kind == "upload":
            ctx = rounds.round_in(whole.store, whole.accepted, number).ctx
            upload = upload_of(raw)
            info = guardian_sum.upload_info(round_ctx=ctx, silo=silo, header=upload.header)
            yield envelope.open_sealed(whole.identity.receive_seed, upload.sealed, info=info, what=f"{number} {silo}")


def numbers_of(*arrays):
    """Each number of float64 arrays as its 8 bytes; they are all different, so that none is found by chance."""
    numbers = [number.tobytes() for array in arrays for number in array.astype("<f8")]
    assert len(set(numbers)) == len(numbers)
    return numbers


def noise_of(silo, number):
    """The sources that a seeded silo draws from in a round, one for each step, again."""
    steps = itertools.count(1)
    return lambda: noise_source(silo, number, next(steps))


def test_the_shared_model_is_the_mean_of_what_separate_machines_compute_bit_for_bit(federated):
    whole, settled, closed = federated
    terms = whole.accepted.terms
    grid, shared, own = update_grid(terms), update_rule.initial(terms), dict.fromkeys(SILOS)
    for number in range(1, ROUNDS + 1):
        sent, models = {}, {}
        for silo in SILOS:
            source = noise_of(silo, number)
            models[silo] = model_of(shared, own[silo], terms, contribution(silo), noise_of(silo, number))
            sent[silo], own[silo] = local.trained(shared, own[silo], terms, contribute=contribution(silo), randomness=source)
        total = sum(ring.lift(words) for words in sent.values())
        exact = (sum(models[silo] - shared.theta for silo in SILOS)) / 3
        theta = shared.theta + (total * grid.step) / 3.0
        assert np.all(np.abs(theta - shared.theta - exact) <= grid.step)
        shared = msgspec.structs.replace(shared, theta=theta, applied=number)
        for silo in SILOS:
            assert settled[silo][number - 1].state.digest == shared.digest == closed[number - 1].state
    assert shared.theta.all()
    assert not shared.first_moment.any()
    assert not shared.second_moment.any()
    for silo in SILOS:
        assert whole.progress(silo).own.to_bytes() == own[silo].to_bytes()
    assert len({own[silo].to_bytes() for silo in SILOS}) == 3


def test_each_ledger_holds_every_step_and_costs_what_the_accountants_say_of_one_silos_noise(federated):
    from opacus.accountants import PRVAccountant

    whole, _, _ = federated
    terms, delta = whole.accepted.terms, 1e-5
    event = federation.mechanism(terms, rounds=ROUNDS)
    assert (event.steps, event.shares) == (ROUNDS * STEPS, 1)
    found = accounting.certify([event], delta)
    other = PRVAccountant()
    other.history = [(event.effective_noise_multiplier, terms.privacy.sampling_rate, ROUNDS * STEPS)]
    assert found.epsilon_pld == pytest.approx(other.get_epsilon(delta, eps_error=0.01), abs=0.011)
    for silo in SILOS:
        history = whole.history(silo)
        assert history.charged() == [event]
        assert accounting.certify(history.charged(), delta) == found
    assert {each.shares for each in federation.adversaries(terms).values()} == {1}


def test_a_silos_own_model_and_moments_stand_in_no_document(federated):
    whole, _, _ = federated
    opened = list(opened_uploads(whole))
    assert {len(raw) for raw in opened} == {4 * whole.accepted.terms.dimension}
    assert len(opened) == ROUNDS * len(SILOS)
    documents = [*(data for _, data in whole.store.log), *opened]
    assert len(documents) > 40
    for silo in SILOS:
        own = whole.progress(silo).own
        secret = numbers_of(own.first_moment, *([own.second_moment] if own.second_moment.any() else []))
        assert not [number for number in secret for data in documents if number in data]
    for silo, _, before, theta in models_of(whole):
        assert not [number for number in numbers_of(theta) for data in documents if number in data]
        words = grid.encode(theta - before, update_grid(whole.accepted.terms)).tobytes()
        assert not [data for data in documents if words in data], f"silo {silo} without its mask"


def test_a_silos_own_model_lies_on_no_disk(federated):
    """Own θ less shared θ would be the vector without its mask, in every backup of the state."""
    whole, _, _ = federated
    assert set(whole.kept) == {(silo, number) for silo in SILOS for number in range(1, ROUNDS + 1)}
    for silo, number, before, theta in models_of(whole):
        home = whole.root / f"silo-{silo}"
        lying = [whole.kept[silo, number], *(path.read_bytes() for path in home.rglob("*") if path.is_file())]
        change = theta - before
        words = grid.encode(change, update_grid(whole.accepted.terms)).tobytes()
        assert not [secret for secret in (*numbers_of(theta), *numbers_of(change), words) for data in lying if secret in data]
    for silo in SILOS:
        assert whole.progress(silo).own.to_bytes() in whole.kept[silo, ROUNDS], "the optimiser does lie there"


def test_what_is_opened_is_the_sum_alone(federated):
    """No silo's words stand on the board unmasked, and the mean cannot be read as anybody's change."""
    whole, _, _ = federated
    terms = whole.accepted.terms
    outcomes = {number: data for (kind, number, _), data in whole.store.log if kind == "outcome"}
    shared, own = update_rule.initial(terms), {}
    for silo in SILOS:
        own[silo], _ = local.trained(shared, None, terms, contribute=contribution(silo), randomness=noise_of(silo, 1))
        assert not [data for _, data in whole.store.log if own[silo].tobytes() in data]
    said = decode(decode(outcomes[1], Signed).body, Outcome)
    assert said.total == (own[1] + own[2] + own[3]).astype("<u4").tobytes()
