# SPDX-License-Identifier: Apache-2.0
"""``silo selftest``: silent on sound code, and every seeded bug that concerns a silo's step is caught, in the real function.

The list is R34 of the design: no clip, clip after mean, noise at a quarter, noise per microbatch, token-mean loss, same seed,
skipped empty batch, divisor of the data, float noise, NaN, shuffle. (Partial unmasking is no part of a step.)
"""

from __future__ import annotations

import dataclasses
import math
import os
from statistics import NormalDist

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from privacy import contract, update_rule
from privacy.dp import noise, ring
from privacy.federation import parse, ring_plan
from privacy.prg import Randomness
from silo import selftest, selftest_noise, upload
from silo.learning import tiny, training
from silo.learning.classifier import Classifier, assemble
from silo.learning.training import Contribution
from silo.parts import Parts
from tests import sessions, tiny_models
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_export import contents, home_of

MODULES = tiny_models.MODULES["bert"]


@pytest.fixture(scope="module")
def subject():
    raw = contract_bytes(
        task={"labels": ["a", "b", "c"], "max_length": 40}, model={"hidden_size": 16},
        adapter={"rank": 8, "modules": MODULES, "scale": 1.5}, privacy={"lattice_bits": 16, "max_records_per_unit": 2},
    )  # fmt: skip
    terms = parse(raw).terms
    model = assemble(tiny_models.encoder("bert"), terms)
    return selftest.Subject(name="test", terms=terms, model=model, rows_tokens=160)


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch):
    """A fifth of the noise samples: every bug here is larger than what they leave open."""
    monkeypatch.setattr(selftest_noise, "SAMPLES", 200_000)


def failed(subject) -> dict[str, str]:
    return {check.name: check.found for check in selftest.examine(subject) if not check.passed}


def test_sound_code_passes_every_check_and_each_says_how_often_chance_fails_it(subject):
    checks = selftest.examine(subject)
    assert [check.name for check in checks if not check.passed] == []
    assert len({check.name for check in checks}) == len(checks) == 13
    assert all(check.found and check.asks for check in checks)
    assert all(0 <= check.false_alarm < 1e-6 for check in checks)
    assert sum(check.false_alarm for check in checks) < 1e-5
    chance = {check.name for check in checks if check.false_alarm}
    assert chance == {"sampling", "noise: variance", "noise: law", "noise: fresh"}


def test_of_a_contract_without_noise_nothing_about_noise_is_asked(subject):
    off = msgspec.structs.replace(subject.terms.privacy, off="no differential privacy", noise_multiplier=0.0)
    loud = dataclasses.replace(subject, terms=msgspec.structs.replace(subject.terms, privacy=off))
    checks = selftest.examine(loud)
    assert [check.name for check in checks if not check.passed] == []
    assert not any("noise" in check.name for check in checks)


# --- The seeded bugs, each in the real function ----------------------------------------------------------------


def no_clip(gradients, *, max_grad_norm, lattice_bits):
    return (gradients.double() * (2**lattice_bits / max_grad_norm)).clamp(-(2**40), 2**40).trunc().to(torch.int64)


def test_no_clip(subject, monkeypatch):
    monkeypatch.setattr(training, "to_lattice", no_clip)
    assert {"bound"} <= failed(subject).keys()


def test_a_bound_slightly_too_large(subject, monkeypatch):
    clip = training.to_lattice
    monkeypatch.setattr(training, "to_lattice", lambda rows, **terms: clip(rows, **terms) * 101 // 100)
    assert "bound" in failed(subject)


def test_clip_after_the_mean(subject, monkeypatch):
    def summed(self, units):
        rows = torch.cat([*self._gradients(units), torch.zeros(1, self.model.dimension)])
        privacy = self._terms.privacy
        mean = rows.sum(dim=0, keepdim=True) / max(1, len(units))
        return training.to_lattice(mean, max_grad_norm=privacy.max_grad_norm, lattice_bits=privacy.lattice_bits)[0].numpy() * len(
            units
        )

    monkeypatch.setattr(Contribution, "sum", summed)
    assert {"neighbours", "composition"} <= failed(subject).keys()


def test_noise_at_a_quarter(subject, monkeypatch):
    draw = noise.discrete_gaussian
    monkeypatch.setattr(noise, "discrete_gaussian", lambda count, variance, bits: draw(count, variance // 16, bits))
    assert {"noise: variance", "noise: law"} <= failed(subject).keys()


def test_a_share_of_noise_three_percent_too_small(subject, monkeypatch):
    planned = upload.ring_plan

    def less(terms):
        plan = planned(terms)
        return dataclasses.replace(plan, share_variance=plan.share_variance * 97 // 100)

    monkeypatch.setattr(upload, "ring_plan", less)
    assert "noise: variance" in failed(subject)


def test_another_law_of_the_same_variance(subject, monkeypatch):
    def uniform(count, variance, bits):
        width = math.sqrt(12 * variance)
        return np.rint((bits.uint64(count) / 2**64 - 0.5) * width).astype(np.int64)

    monkeypatch.setattr(noise, "discrete_gaussian", uniform)
    assert failed(subject).keys() == {"noise: law", "noise: exact"}


def test_noise_off(subject, monkeypatch):
    monkeypatch.setattr(noise, "discrete_gaussian", lambda count, variance, bits: np.zeros(count, dtype=np.int64))
    assert {"empty sample", "noise: variance", "noise: law", "noise: fresh"} <= failed(subject).keys()


def test_noise_per_microbatch(subject, monkeypatch):
    gradients = Contribution._gradients

    def noisy(self, units):
        for rows in gradients(self, units):
            yield rows * (1 + torch.randn(1))

    monkeypatch.setattr(Contribution, "_gradients", noisy)
    assert failed(subject).keys() & {"neighbours", "composition"}


def test_noise_in_the_sum_of_each_batch(subject, monkeypatch):
    add = training.sum_lattice

    def noised(rows):
        drawn = noise.discrete_gaussian(rows.shape[1], 2**20, Randomness.from_os())
        return add(rows) + torch.from_numpy(drawn)

    monkeypatch.setattr(training, "sum_lattice", noised)
    assert {"neighbours", "composition"} <= failed(subject).keys()


def test_token_mean_loss(subject, monkeypatch):
    def over_the_batch(self, batch):
        return functional.cross_entropy(self(batch), batch.labels, reduction="none") / batch.attention_mask.sum()

    monkeypatch.setattr(Classifier, "row_losses", over_the_batch)
    found = failed(subject)
    assert "batch-mates" in found
    assert "other batch-mates change" in found["batch-mates"]


def test_same_seed(subject, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)  # of a count: so many zeros
    assert {"sampling", "noise: fresh"} <= failed(subject).keys()


def test_a_fixed_key_where_rounds_take_their_bits(subject, monkeypatch):
    """The source that a round's noise, and its sample, have by default is the one that is tested."""

    def fixed():
        return Randomness.from_key(bytes(32))

    with monkeypatch.context() as patch:
        patch.setitem(training.build.__kwdefaults__, "randomness", fixed)
        assert failed(subject).keys() == {"sampling"}
    monkeypatch.setitem(Parts.__init__.__kwdefaults__, "randomness", fixed)
    found = failed(subject).keys()
    assert "noise: fresh" in found
    assert all(name.startswith("noise") for name in found)


def test_one_noise_for_every_two_numbers(subject, monkeypatch):
    draw = noise.discrete_gaussian
    monkeypatch.setattr(
        noise, "discrete_gaussian", lambda count, variance, bits: np.repeat(draw(count, variance, bits)[::2], 2)[:count]
    )
    assert "noise: fresh" in failed(subject)


def test_skipped_empty_batch(subject, monkeypatch):
    step = Contribution.sum
    monkeypatch.setattr(Contribution, "sum", lambda self, units: step(self, units) if units else None)
    assert "empty sample" in failed(subject)


def test_an_empty_step_without_noise(subject, monkeypatch):
    send = upload.noisy
    monkeypatch.setattr(
        selftest, "noisy", lambda total, terms, bits: send(total, terms, bits) if total.any() else total.astype("<u4")
    )
    assert "empty sample" in failed(subject)


def test_divisor_of_the_data(subject, monkeypatch):
    monkeypatch.setattr(contract.Contract, "divisor_for", lambda self, standing: 0.25 * 187 * standing)
    assert "divisor" in failed(subject)


def test_float_noise(subject, monkeypatch):
    def rounded(count, variance, bits):
        words = bits.uint64(count) >> np.uint64(11)
        normal = [NormalDist().inv_cdf((int(word) + 0.5) / 2**53) for word in words]
        return np.rint(np.array(normal) * math.sqrt(variance)).astype(np.int64)

    monkeypatch.setattr(selftest_noise, "SAMPLES", 20_000)
    monkeypatch.setattr(noise, "discrete_gaussian", rounded)
    assert set(failed(subject)) == {"noise: exact"}  # its law is as good as right: only the known answer tells


def test_nan_passed_on(subject, monkeypatch):
    clip = training.to_lattice

    def zeroed_as_a_whole(rows, **terms):
        return clip(rows if bool(rows.isfinite().all()) else torch.full_like(rows, 1e30), **terms)

    monkeypatch.setattr(training, "to_lattice", zeroed_as_a_whole)
    assert "not finite" in failed(subject)


class Dealt:
    """Samples dealt from a shuffled deck, as data loaders do."""

    def __init__(self):
        self.left = []

    def __call__(self, count, rate, bits):
        if len(self.left) < count * rate:
            self.left = np.random.Generator(np.random.PCG64(int(bits.uint64(1)[0]))).permutation(count).tolist()
        taken, self.left = self.left[: int(count * rate)], self.left[int(count * rate) :]
        return np.sort(np.array(taken, dtype=np.int64))


def test_shuffle(subject, monkeypatch):
    monkeypatch.setattr(training, "poisson", Dealt())
    assert "sampling" in failed(subject)


def test_batches_of_a_fixed_size(subject, monkeypatch):
    def choose(count, rate, bits):
        return np.argsort(bits.uint64(count))[: int(count * rate)]

    monkeypatch.setattr(training, "poisson", choose)
    found = failed(subject)
    assert "likeliest size" in found["sampling"]


def test_a_rate_two_percent_too_high(subject, monkeypatch):
    draw = training.poisson
    monkeypatch.setattr(training, "poisson", lambda count, rate, bits: draw(count, rate * 1.02, bits))
    assert "units sampled" in failed(subject)["sampling"]


def test_units_that_are_never_sampled(subject, monkeypatch):
    draw = training.poisson
    monkeypatch.setattr(training, "poisson", lambda count, rate, bits: draw(count, rate, bits)[1:])
    assert "sampling" in failed(subject)


def test_a_clamp_after_the_noise(subject, monkeypatch):
    encode = ring.encode

    def cut(clamped, drawn):
        limit = 3 * 2**16
        return encode(np.clip(clamped + drawn, -limit, limit), np.zeros_like(drawn))

    monkeypatch.setattr(ring, "encode", cut)
    assert {"clamp", "noise: variance"} <= failed(subject).keys()


def test_no_clamp_before_the_noise(subject, monkeypatch):
    monkeypatch.setattr(ring, "clamp", lambda total, plan: total)
    assert set(failed(subject)) == {"clamp"}


def test_an_adapter_that_does_nothing(subject, monkeypatch):
    layer = next(iter(subject.model.adapter))
    kept = layer.A.clone()
    layer.A.zero_()
    try:
        found = failed(subject)
    finally:
        layer.A.copy_(kept)
    assert "does not respond" in found["batch-mates"]


# --- The exact laws it compares with ---------------------------------------------------------------------------


def test_cells_hold_the_exact_mass(monkeypatch):
    """The two ways to a cell's mass, terms summed and midpoint rule, agree where both can be had; the masses sum to 1."""
    few, masses = selftest_noise.cells(64.0)
    y = np.arange(-2000, 2001)
    weights = np.exp(-(y**2) / (2 * 64.0**2))
    assert masses[0] == pytest.approx(weights[y < few[0]].sum() / weights.sum(), rel=1e-12)
    edges, exact = selftest_noise.cells(3000.5)
    monkeypatch.setattr(selftest_noise, "_SUMMED", 0)
    other, midpoint = selftest_noise.cells(3000.5)
    assert np.array_equal(edges, other)
    np.testing.assert_allclose(exact, midpoint, rtol=1e-6)
    assert exact.sum() == pytest.approx(1, abs=1e-12)
    assert midpoint.sum() == pytest.approx(1, abs=1e-12)


def test_the_share_is_the_contracts_by_another_way(subject):
    assert selftest_noise.share(subject.terms) == ring_plan(subject.terms).share_variance


def test_a_replayed_script_gives_the_words_it_was_given():
    script = selftest.Script([0, 5, 2**64 - 1])
    assert script.uint64(2).tolist() == [0, 5]
    assert script.asked == [2]


# --- The command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def north(tmp_path_factory):
    root = tmp_path_factory.mktemp("selftest")
    return home_of(root / "north", sessions.tiny_model(root / "model"))


def test_the_command_tests_the_silos_own_contract_and_changes_nothing(north, capsys):
    before = contents(north.root)
    (north.root / "records.jsonl").rename(north.root / "hidden")  # no record is needed
    try:
        done = Terminal(capsys)("silo selftest", "--home", north.root, "--json")
    finally:
        (north.root / "hidden").rename(north.root / "records.jsonl")
    assert done.code == 0, done.out
    assert done.document["passed"]
    assert "test-federation" in done.document["subject"]
    assert contents(north.root) == before


def test_the_command_ends_with_5_and_names_what_failed(north, capsys, monkeypatch):
    monkeypatch.setattr(training, "to_lattice", no_clip)
    done = Terminal(capsys)("silo selftest", "--home", north.root)
    assert done.code == 5
    assert "✗ bound" in done.out
    assert "train no further" in done.out


def test_without_a_federation_it_tests_a_built_in_model(tmp_path, capsys, monkeypatch):
    short = tiny.terms()
    short = msgspec.structs.replace(short, task=msgspec.structs.replace(short.task, max_length=24))
    monkeypatch.setattr(tiny, "terms", lambda: short)  # the built-in one reaches 512 tokens: half a minute on a busy core
    before = torch.random.get_rng_state()
    done = Terminal(capsys)("silo selftest", "--home", tmp_path)
    assert done.code == 0, done.out
    assert "built-in" in done.out
    assert done.out.count("✓") == 14
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


def test_the_built_in_contract_is_sound_and_its_model_the_same_every_time():
    made, model = tiny.model()
    assert made.task.max_length == 512
    assert ring_plan(made).share_variance > 0
    assert update_rule.initial(made).theta.size == model.dimension
    again = tiny.model()[1]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
