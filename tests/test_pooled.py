# SPDX-License-Identifier: Apache-2.0
"""Joint mode: three silos compute what one machine with all the records would, bit for bit, from the same draws."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from privacy import update_rule
from privacy.dp import noise
from privacy.federation import ring_plan
from silo.learning.training import Contribution
from tests import tiny_models
from tests.whole import SILOS, Whole, noise_source

ROUNDS = 3
ROWS_TOKENS = 160
PER_SILO = 8


class Draws:
    """A sampler whose word for a unit in a round follows from both by hashing: the same wherever the unit lies."""

    def __init__(self, units):
        self.ids, self.round = [unit.id for unit in units], 0

    def __call__(self):
        self.round += 1
        return self

    def uint64(self, count):
        assert count == len(self.ids)
        return np.array([word(self.round, each) for each in self.ids], dtype=np.uint64)


def word(number: int, unit: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{number} {unit}".encode()).digest()[:8], "big")


def contribution(terms, units, rows_tokens=ROWS_TOKENS):
    model = tiny_models.classifier("bert")
    return Contribution(terms, model, units, rows_tokens=rows_tokens, randomness=Draws(units))


@pytest.fixture(scope="module")
def units():
    """By silo; lengths differ, and every third unit has two records."""
    lengths = [3, 9, 17, 6, 24, 5, 12, 40]

    def unit(silo, index):
        own = lengths[(index + silo) % len(lengths)]
        return tiny_models.unit(100 * silo + index, [own, 7] if index % 3 == 0 else [own])

    return {silo: [unit(silo, index) for index in range(PER_SILO)] for silo in SILOS}


@pytest.fixture(scope="module", params=["adam", "sgd"])
def federated(request, units, tmp_path_factory):
    """A whole federation after three rounds over these units, with its noise drawn from known sources."""
    whole = Whole.create(
        tmp_path_factory.mktemp("pooled") / "f",
        task={"labels": ["a", "b", "c"], "max_length": tiny_models.MAX_LENGTH},
        model={"hidden_size": 16},
        adapter={"rank": 3, "modules": tiny_models.MODULES["bert"], "scale": 1.5, "head_scale": 0.5},
        training={"optimizer": request.param, "learning_rate": 0.05},
        privacy={"lattice_bits": 14, "sampling_rate": 0.5, "max_records_per_unit": 2},
    )
    sums = {}

    def recorded(silo):
        own = contribution(whole.accepted.terms, units[silo])

        def contribute(state):
            total = own(state)
            sums[silo, own._randomness.round] = total
            return total

        return contribute

    jobs = {silo: recorded(silo) for silo in SILOS}
    original = whole.take_part
    whole.take_part = lambda silo, last, **options: original(silo, last, contribute=jobs[silo], seeded=True)
    settled, closed = whole.run(ROUNDS)
    return whole.accepted.terms, settled, closed, sums


def pooled_run(terms, everything, rows_tokens=ROWS_TOKENS):
    """(state, noiseless sum) after each round, on one machine with all records: same samples, same noise shares, one sum."""
    contribute, plan = contribution(terms, everything, rows_tokens), ring_plan(terms)
    state, found = update_rule.initial(terms), []
    for number in range(1, ROUNDS + 1):
        total = contribute(state)
        shares = [noise.discrete_gaussian(terms.dimension, plan.share_variance, noise_source(silo, number)) for silo in SILOS]
        assert int(np.abs(total).max()) < plan.clamp
        state = update_rule.advance(state, total + sum(shares), terms)
        found.append((state, total))
    return found


def test_joint_training_equals_training_on_the_pooled_records_bit_for_bit(federated, units):
    terms, settled, closed, sums = federated
    pooled = pooled_run(terms, [unit for silo in SILOS for unit in units[silo]])
    matrices = len(terms.adapter.modules) * terms.adapter.rank**2
    for number, (state, total) in enumerate(pooled, start=1):
        assert np.array_equal(sum(sums[silo, number] for silo in SILOS), total)
        assert total.any()
        for silo in SILOS:
            reached = settled[silo][number - 1].state
            assert np.array_equal(reached.theta.view(np.uint64), state.theta.view(np.uint64))
            assert reached.digest == state.digest == closed[number - 1].state
        assert state.theta[:matrices].all()
        assert state.theta[matrices:].all()
    sampled = [word(1, unit.id) < 2**63 for silo in SILOS for unit in units[silo]]
    assert 0 < sum(sampled) < len(sampled)


def test_another_order_of_the_units_changes_nothing(federated, units):
    terms, _, closed, _ = federated
    everything = [unit for silo in SILOS for unit in units[silo]]
    shuffled = [everything[i] for i in np.random.default_rng(3).permutation(len(everything))]
    assert [state.digest for state, _ in pooled_run(terms, shuffled)] == [c.state for c in closed]


def test_other_records_or_other_noise_give_another_model(federated, units):
    terms, _, closed, _ = federated
    everything = [unit for silo in SILOS for unit in units[silo]]
    assert pooled_run(terms, everything[1:])[-1][0].digest != closed[-1].state


@pytest.mark.parametrize("rows_tokens", [1, 40, 320])
def test_with_another_physical_batch_size_joint_still_equals_pooled(federated, units, rows_tokens):
    terms, _, _, _ = federated
    everything = [unit for silo in SILOS for unit in units[silo]]
    state = update_rule.initial(terms)
    parts = [contribution(terms, units[silo], rows_tokens)(state) for silo in SILOS]
    assert np.array_equal(sum(parts), contribution(terms, everything, rows_tokens)(state))


def test_one_unit_more_moves_the_sum_by_at_most_the_clipping_norm_and_the_divisor_not_at_all(federated, units):
    """R06: the units around it, their slots and their batches may not move by a bit."""
    terms, _, _, _ = federated
    everything = [unit for silo in SILOS for unit in units[silo]]
    state = msgspec.structs.replace(update_rule.initial(terms), theta=tiny_models.state(terms.dimension))
    without = contribution(terms, everything)(state)
    bound, moved = 4**terms.privacy.lattice_bits, 0
    for seed, place in enumerate((0, 5, len(everything), 11, 2, 17, 8, 20), start=905):
        more = tiny_models.unit(seed, [tiny_models.MAX_LENGTH])
        sampled = word(1, more.id) < 2**63
        total = contribution(terms, [*everything[:place], more, *everything[place:]])(state)
        squares = int(((total - without) ** 2).sum())
        assert squares <= bound
        assert (squares > 0) == sampled
        moved += sampled
    assert 0 < moved < 8
    # The divisor is the contract's public figure: what a sum becomes does not ask how many units there were.
    after = update_rule.advance(update_rule.initial(terms), without, terms)
    gamma = terms.privacy.max_grad_norm / 2**terms.privacy.lattice_bits
    public = terms.privacy.sampling_rate * terms.privacy.units * terms.silos
    share = 1.0 if terms.training.optimizer == "sgd" else 1.0 - terms.training.beta1
    assert np.array_equal(after.first_moment, without * gamma / public * share)
