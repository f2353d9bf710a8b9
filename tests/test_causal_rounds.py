# SPDX-License-Identifier: Apache-2.0
"""Causal language models in a whole federation: joint equals pooled bit for bit, and held-out loss falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from privacy import base_model, federation, update_rule
from privacy.dp import noise
from privacy.errors import RecordsError
from privacy.federation import ring_plan
from silo import config, membership
from silo.home import Home
from silo.learning import evaluation, training
from silo.learning.training import Contribution
from tests import causal_models, sessions
from tests.terms import contract_bytes
from tests.test_pooled import Draws
from tests.whole import SILOS, Whole, noise_source

ROUNDS = 2


@pytest.fixture(scope="module")
def units():
    """By silo; lengths differ, and every third unit has two records."""
    lengths = [3, 9, 17, 6, 24, 5]
    return {
        silo: [
            causal_models.unit(100 * silo + i, [lengths[(i + silo) % 6], 7][: 2 if i % 3 == 0 else 1]) for i in range(6)
        ]
        for silo in SILOS
    }  # fmt: skip


def contribution(terms, units):
    return Contribution(terms, causal_models.model(terms), units, rows_tokens=160, randomness=Draws(units))


def test_joint_training_equals_training_on_the_pooled_records_bit_for_bit(units, tmp_path):
    more = {"training": {"learning_rate": 0.05}, "privacy": {"sampling_rate": 0.5, "max_records_per_unit": 2}}
    whole = Whole.create(tmp_path / "f", **causal_models.changes(**more))
    terms = whole.accepted.terms
    jobs = {silo: contribution(terms, units[silo]) for silo in SILOS}
    original = whole.take_part
    whole.take_part = lambda silo, last, **options: original(silo, last, contribute=jobs[silo], seeded=True)
    settled, closed = whole.run(ROUNDS)
    pooled, plan = contribution(terms, [unit for silo in SILOS for unit in units[silo]]), ring_plan(terms)
    state = update_rule.initial(terms)
    for number in range(1, ROUNDS + 1):
        total = pooled(state)
        assert total.any()
        assert int(np.abs(total).max()) < plan.clamp
        shares = [noise.discrete_gaussian(terms.dimension, plan.share_variance, noise_source(silo, number)) for silo in SILOS]
        state = update_rule.advance(state, total + sum(shares), terms)
        for silo in SILOS:
            assert settled[silo][number - 1].state.digest == state.digest == closed[number - 1].state


def learned(folder: Path, tmp_path: Path, records: list, held_out: list, *, rate: float, steps: int, **more) -> tuple:
    """(held-out likelihood before, after) so many noiseless full-batch steps on ``records``, through contract and records."""
    described = base_model.describe(folder)
    modules = list(base_model.match_modules(described, ["all-linear"]))
    changed = causal_models.changes(
        model={"name": str(folder), "digest": base_model.digest(folder), "hidden_size": described.hidden_size},
        adapter={"modules": modules, "rank": 8},
        training={"rounds": steps, "learning_rate": rate},
        privacy={"units": len(records), "sampling_rate": 1.0},
        **more,
    )
    terms = federation.parse(contract_bytes(**changed)).terms
    bench = evaluation.open_bench(terms)
    encoded = bench.units(sessions.write_rows(tmp_path / "records.jsonl", records))
    away = sessions.write_rows(tmp_path / "held-out.jsonl", held_out)
    contribute = training.Contribution(terms, bench.model, encoded, rows_tokens=512)
    state = update_rule.initial(terms)
    before = evaluation.likelihood(bench, None, away)
    for _ in range(steps):
        state = update_rule.advance(state, contribute(state), terms)
    return before, evaluation.likelihood(bench, state, away)


def test_held_out_loss_of_a_random_llama_falls_without_noise(tmp_path):
    folder = causal_models.folder(tmp_path / "model")
    before, after = learned(folder, tmp_path, causal_models.rows(40), causal_models.rows(9, start_at=40), rate=0.1, steps=12)
    assert before.tokens == after.tokens == 9 * 3
    assert after.loss < before.loss - 1.0
    assert after.perplexity < before.perplexity


def test_held_out_loss_of_a_pretrained_llama_falls_without_noise(tmp_path, shared):
    folder = shared / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip("no pretrained causal language model here: ../shared/models/stories260K-hf")
    names = ("Lily", "Tom", "Sue", "Ben", "Mia", "Tim")
    told = [
        {"prompt": f"Once there was a {pet} with {name}.", "response": f" The {pet} and {name} were happy."}
        for name in names for pet in ("cat", "dog", "bird")
    ]  # fmt: skip
    before, after = learned(folder, tmp_path, told[:15], told[15:], rate=0.02, steps=6)
    assert after.loss < before.loss - 0.2


def test_a_prompt_that_is_too_long_is_found_before_the_contract_is_signed(tmp_path):
    folder = causal_models.folder(tmp_path / "model")
    changed = causal_models.changes(
        task={"max_length": 8}, model={"name": str(folder), "digest": base_model.digest(folder)},
        privacy={"units": 10, "sampling_rate": 0.2},
    )  # fmt: skip
    accepted = federation.parse(contract_bytes(**changed))
    home = Home.create(tmp_path / "silo")
    rows = causal_models.rows(4)
    for words, usable in ((6, True), (7, False)):
        path = sessions.write_rows(tmp_path / "records.jsonl", [*rows, {"prompt": "w1 " * words, "response": "w2"}])
        settings = config.Config(
            name="north", organisation="North", aggregator=config.Aggregator(url="http://127.0.0.1:1", fingerprint=""),
            records=config.Records(path=str(path)), limits=config.Limits(epsilon=8.0, delta=1e-5),
        )  # fmt: skip
        if usable:
            assert len(membership.check_fit(accepted, config=settings, home=home)) == 5
            continue
        with pytest.raises(RecordsError, match="1 of 5 records leave no token of a response within 8 tokens"):
            membership.check_fit(accepted, config=settings, home=home)
