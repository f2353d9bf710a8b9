# SPDX-License-Identifier: Apache-2.0
"""A silo's contribution: one clipped gradient per sampled unit, whatever else is in the sample; tiny real models."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from privacy import ring, update_rule
from privacy.errors import ConfigError, MachineError
from privacy.federation import ring_plan
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import config, training
from silo.gradients import pack
from silo.home import Home
from silo.training import Contribution
from tests import tiny_models


class Fixed:
    """Words that put exactly the given units into the sample."""

    def __init__(self, chosen):
        self.chosen = set(chosen)

    def uint64(self, count):
        return np.array([0 if i in self.chosen else 2**64 - 1 for i in range(count)], dtype=np.uint64)


@pytest.fixture(scope="module")
def units():
    return [tiny_models.unit(seed, [3 + seed]) for seed in range(8)] + [tiny_models.unit(20, [tiny_models.MAX_LENGTH])]


@pytest.fixture(scope="module")
def terms():
    return tiny_models.terms(tiny_models.MODULES["bert"])


def at(dimension, seed=5):
    zeros = np.zeros(dimension)
    theta = tiny_models.state(dimension, seed)
    return State(applied=1, beta1_power=0.9, beta2_power=0.99, theta=theta, first_moment=zeros, second_moment=zeros)


def contribution(terms, units, chosen=(), rows_tokens=160):
    return Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=rows_tokens, randomness=lambda: Fixed(chosen))


def test_its_own_a_units_vector_does_not_depend_on_the_sample(terms, units):
    state = at(terms.dimension)
    alone = [contribution(terms, units, {i})(state) for i in range(len(units))]
    for chosen in ({0, 1, 2, 3, 4, 5, 6, 7, 8}, {2, 8}, {7, 1, 4}):
        assert np.array_equal(contribution(terms, units, chosen)(state), sum(alone[i] for i in chosen))
    assert not np.array_equal(alone[0], alone[1])


def test_bounded_each_unit_adds_at_most_the_clipping_norm(terms, units):
    state = at(terms.dimension)
    bound = 4**terms.privacy.lattice_bits
    for i in range(len(units)):
        squares = int((contribution(terms, units, {i})(state) ** 2).sum())
        assert 0 < squares <= bound


def test_fresh_poisson_sample_every_call_asks_for_its_own_source(terms, units):
    sources = []

    def source():
        sources.append(Randomness.from_key(bytes([len(sources)]) * 32))
        return sources[-1]

    contribute = Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=160, randomness=source)
    state = at(terms.dimension)
    drawn = {contribute(state).tobytes() for _ in range(6)}
    assert len(sources) == 6
    assert len(drawn) > 1


def test_clamped_to_the_plan(terms, units, monkeypatch):
    seen = []
    original = ring.clamp
    monkeypatch.setattr(training.ring, "clamp", lambda total, plan: seen.append(plan) or original(total, plan))
    contribution(terms, units, {0})(at(terms.dimension))
    assert seen == [ring_plan(terms)]


def test_empty_sample_gives_zeros(terms, units):
    assert not contribution(terms, units, set())(at(terms.dimension)).any()


@pytest.mark.parametrize("rows_tokens", [1, 40, 4096])
def test_the_size_of_physical_batches_changes_nothing(terms, units, rows_tokens):
    state, chosen = at(terms.dimension), {0, 3, 5, 8}
    found = contribution(terms, units, chosen, rows_tokens)(state)
    reference = contribution(terms, units, chosen)(state)
    assert int(np.abs(found - reference).max()) <= 64  # other shapes, other kernels: the last bits of float32


def test_where_the_slot_matters_units_go_one_by_one(terms, units, monkeypatch):
    monkeypatch.setattr(training, "check_invariance", lambda *args, **kwargs: False)
    contribute = contribution(terms, units, {0, 1, 8})
    batches = list(contribute._batches(contribute._units[:3]))
    assert [int(batch.unit.max()) for batch in batches] == [0, 0, 0]
    assert contribute(at(terms.dimension)).any()


def test_the_state_is_what_the_model_computes_with(terms, units):
    contribute = contribution(terms, units, {0, 1})
    assert not np.array_equal(contribute(at(terms.dimension, 5)), contribute(at(terms.dimension, 6)))
    assert np.array_equal(contribute(at(terms.dimension, 5)), contribute(at(terms.dimension, 5)))


def test_a_model_that_does_not_hold_its_state_is_stopped(terms, units, monkeypatch):
    contribute = contribution(terms, units, {0})
    monkeypatch.setattr(contribute.model, "write", lambda theta: None)
    with pytest.raises(MachineError, match="does not hold"):
        contribute(at(terms.dimension, 9))


def test_an_adapter_that_does_nothing_is_found(units):
    model = tiny_models.classifier("bert")
    batch = next(pack(units[:1], lambda _: 4, max_length=tiny_models.MAX_LENGTH))
    training.check_responds(model, batch)
    before = model.read()
    layer = next(iter(model.adapter))
    layer.A.zero_()
    with pytest.raises(MachineError, match="1 of"):
        training.check_responds(model, batch)
    assert np.array_equal(model.read(), before)


def test_nothing_about_the_records_is_logged(terms, units, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        contribution(terms, units, {0, 1, 2})(at(terms.dimension))
    assert not [r for r in caplog.records if r.name.startswith(("silo", "privacy"))]
    assert capfd.readouterr() == ("", "")


def test_dry_run_gives_time_and_memory(terms, units):
    timing = contribution(terms, units, {0, 1}).dry_run(update_rule.initial(terms))
    assert timing.seconds > 0
    assert timing.peak_memory_bytes > 10**7
    assert (timing.device, timing.precision) == ("cpu", "float32")


def test_no_global_generator_is_touched(terms, units):
    before = torch.random.get_rng_state()
    contribution(terms, units, {0})(at(terms.dimension))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("flags", "native"), [("fpu avx512_bf16 amx_bf16", True), ("fp asimd bf16", True), ("fpu avx2 avx512f", False), ("", False)]
)
def test_native_bfloat16(flags, native):
    assert training.native_bfloat16(flags) is native


def test_resolve_takes_what_is_asked_for():
    threads = torch.get_num_threads()
    try:
        device, precision = training.resolve(config.Compute(device="cpu", precision="float32"))
        assert (device.type, precision) == ("cpu", "float32")
        assert torch.get_num_threads() == 1
        if not torch.cuda.is_available():
            with pytest.raises(MachineError, match="no CUDA"):
                training.resolve(config.Compute(device="cuda"))
    finally:
        torch.set_num_threads(threads)


def test_build_refuses_another_base_model(tmp_path, terms):
    tiny_models.encoder("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "r.jsonl").write_text('{"text": "x", "label": "a"}\n')
    config.write_commented(
        tmp_path / "silo.toml",
        name="n",
        organisation="N",
        url="https://x",
        fingerprint="",
        records="r.jsonl",
        epsilon=1,
        delta=1e-6,
        model="model",
    )
    with pytest.raises(ConfigError, match="the contract says"):
        training.build(Home.create(tmp_path), config.load(tmp_path / "silo.toml"), terms)
