# SPDX-License-Identifier: Apache-2.0
"""Several cores on one layer: R is their blocks on a diagonal, in gradient, sum, merged weight and export alike."""

from __future__ import annotations

import hashlib
import tomllib

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from aggregator.draft import Terms, draft
from privacy import federation, update_rule
from privacy.dp import noise
from privacy.errors import ConfigError, MachineError
from privacy.federation import Model, parse, ring_plan
from privacy.identity.keys import PublicIdentity
from privacy.prg import Randomness
from silo import settlement
from silo.learning import export
from silo.learning.basis import random_basis, weights_basis
from silo.learning.classifier import Classifier, assemble
from silo.learning.invariance import check_invariance
from silo.learning.lora_sb import LoraSb
from silo.learning.training import Contribution, check_responds
from tests import sessions, tiny_models
from tests.terms import contract_bytes
from tests.test_export import made, run_card
from tests.tiny_models import MODULES, by_autograd, gradients, relative, unit

M, N, RANK, HEADS = 24, 20, 3, 4
SAMPLE = [unit(1, [5, 3, 8]), unit(2, [7]), unit(3, [2, 6]), unit(4, [30]), unit(5, [25, 4]), unit(6, [40])]


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def contract(kind: str, heads: int, basis: str = "weights", **changes: dict) -> federation.Contract:
    raw = contract_bytes(
        task={"labels": ["a", "b", "c"], "max_length": tiny_models.MAX_LENGTH}, model={"hidden_size": 16},
        adapter={"rank": 2, "heads": heads, "modules": MODULES[kind], "basis": basis, "scale": 1.5, "head_scale": 0.5},
        privacy={"lattice_bits": 14, "sampling_rate": 0.5, "max_records_per_unit": 2}, **changes,
    )  # fmt: skip
    return parse(raw).terms


def classifier(kind: str, heads: int, basis: str = "weights") -> Classifier:
    model = assemble(tiny_models.encoder(kind), contract(kind, heads, basis))
    model.write(tiny_models.state(model.dimension))
    return model


def layers(heads: int) -> tuple[LoraSb, LoraSb]:
    """A layer of several heads, and one of a single R of all their vectors that holds the same blocks; float64."""
    pair = []
    for count in (heads, 1):
        base = nn.Linear(N, M, device="meta").to_empty(device="cpu")
        base.weight.data, base.bias.data = torch.from_numpy(numbers(1, M, N)), torch.from_numpy(numbers(2, M))
        pair.append(LoraSb(base, weights_basis(numbers(1, M, N), heads * RANK), 0.7, count).double())
    blocks = torch.from_numpy(numbers(3, heads, RANK, RANK))
    pair[0].R.data = blocks if heads > 1 else blocks[0]
    pair[1].R.data = torch.block_diag(*blocks)
    return pair[0], pair[1]


@pytest.mark.parametrize("heads", [2, HEADS])
def test_it_computes_what_a_block_diagonal_core_computes_and_its_gradient_is_the_blocks(heads: int) -> None:
    several, whole = layers(heads)
    x = torch.from_numpy(numbers(4, 5, 7, N))
    assert torch.equal(several.core, whole.R)
    assert several.R.numel() == heads * RANK**2
    assert (several(x) - whole(x)).abs().max() <= 1e-12
    for each in (several, whole):
        each(x).tanh().square().sum().backward()
    for k in range(heads):
        block = whole.R.grad[k * RANK : (k + 1) * RANK, k * RANK : (k + 1) * RANK]
        assert (several.R.grad[k] - block).abs().max() <= 1e-12 * block.abs().max()


def test_the_merged_weight_computes_what_the_layer_does() -> None:
    several, whole = layers(HEADS)
    x = torch.from_numpy(numbers(4, 5, 7, N))
    merged = several.merged_weight()
    assert torch.equal(merged, whole.merged_weight())
    assert (nn.functional.linear(x, merged, several.bias) - several(x)).abs().max() <= 1e-12


@pytest.mark.parametrize("basis", ["weights", "random"])
def test_the_bases_of_heads_are_orthonormal_and_orthogonal_to_each_other(basis: str) -> None:
    model = classifier("bert", 3, basis)
    for layer in model.adapter:
        assert layer.R.shape == (3, 2, 2)
        for q in (layer.B.T, layer.A):
            assert (q @ q.T - torch.eye(6)).abs().max() <= 1e-5


@pytest.mark.parametrize("basis", ["weights", "random"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_per_unit_gradients_are_those_of_autograd_record_by_record(kind: str, basis: str) -> None:
    model = classifier(kind, 3, basis)
    found = gradients(model, SAMPLE)
    for row, one in zip(found, SAMPLE, strict=True):
        assert relative(row, by_autograd(model, one)) <= 1e-5
    assert all(layer.R.grad is None and layer.slot is None for layer in model.adapter)


def test_a_units_gradient_does_not_depend_on_its_company_and_every_core_responds() -> None:
    model = classifier("bert", 2)
    check_invariance(model, lambda _: 4, max_length=tiny_models.MAX_LENGTH, most=2)
    check_responds(model, tiny_models.MAX_LENGTH)


def test_the_dimension_is_heads_times_the_squared_rank() -> None:
    one, three = contract("bert", 1), contract("bert", 3)
    assert (three.adapter.vectors, three.adapter.core) == (6, 12)
    head = 3 * 16 + 3
    assert (one.dimension, three.dimension) == (6 * 4 + head, 6 * 12 + head)
    assert parse(contract_bytes()).terms.adapter.heads == 1
    assert classifier("bert", 3).dimension == three.dimension


def test_one_head_is_what_a_contract_without_the_word_has() -> None:
    plain = tiny_models.terms(MODULES["bert"], rank=2)
    ours = msgspec.structs.replace(plain, adapter=msgspec.structs.replace(plain.adapter, heads=1))
    assert ours == plain
    models = [assemble(tiny_models.encoder("bert"), terms) for terms in (plain, ours)]
    assert models[0].basis_digest == models[1].basis_digest
    assert models[0].adapter.layers[0].R.shape == (2, 2)


def test_more_heads_go_on_with_the_vectors_of_the_same_random_basis() -> None:
    few, many = (random_basis(b"\0" * 32, "x", (M, N), rank) for rank in (RANK, HEADS * RANK))
    assert np.array_equal(few[0], many[0][:, :RANK])
    assert np.array_equal(few[1], many[1][:RANK])


def test_vectors_that_do_not_part_or_do_not_fit_are_refused() -> None:
    base = nn.Linear(N, M)
    with pytest.raises(ConfigError, match="5 vectors do not part into 2 heads"):
        LoraSb(base, weights_basis(numbers(1, M, N), 5), 1.0, 2)
    with pytest.raises(ConfigError, match="rank 18"):
        classifier("bert", 9)
    with pytest.raises(ConfigError, match="heads"):
        contract("bert", 0)


class Draws:
    """Samples a unit in a round by a hash of both, wherever it lies."""

    def __init__(self, units: list) -> None:
        self.ids, self.round = [each.id for each in units], 0

    def __call__(self) -> Draws:
        self.round += 1
        return self

    def uint64(self, count: int) -> np.ndarray:
        hashes = [hashlib.sha256(f"{self.round} {each}".encode()).digest()[:8] for each in self.ids[:count]]
        return np.array([int.from_bytes(each) for each in hashes], dtype=np.uint64)


def test_joint_equals_pooled_bit_for_bit() -> None:
    terms = contract("bert", 2, training={"learning_rate": 0.05})
    silos = [[unit(10 * silo + k, [5 + 3 * k, 7] if k % 2 else [9]) for k in range(5)] for silo in range(3)]
    everything = [each for units in silos for each in units]
    plan, model = ring_plan(terms), classifier("bert", 2)
    apart = [Contribution(terms, model, units, rows_tokens=160, randomness=Draws(units)) for units in silos]
    pooled = Contribution(terms, model, everything, rows_tokens=160, randomness=Draws(everything))
    state = update_rule.initial(terms)
    for _ in range(3):
        parts, total = [each(state) for each in apart], pooled(state)
        assert np.array_equal(sum(parts), total)
        assert total.any()
        state = update_rule.advance(
            state, total + noise.discrete_gaussian(terms.dimension, plan.share_variance, Randomness.from_os()), terms
        )
    assert state.theta.all()


def test_cores_that_moved_in_the_last_head_alone_have_moved() -> None:
    terms = contract("bert", 3)
    state = msgspec.structs.replace(update_rule.initial(terms), applied=2)
    progress = settlement.Progress(
        contract=b"c" * 32, epoch=1, manifest=b"m" * 32, round=3, outcome=b"o" * 32, voids=0, state=state
    )
    with pytest.raises(MachineError, match="R has not moved"):
        settlement.refuse_to_go_on(progress, terms)
    theta = state.theta.copy()
    theta[6 * terms.adapter.core - 1] = 1.0
    moved = msgspec.structs.replace(state, theta=theta)
    settlement.refuse_to_go_on(msgspec.structs.replace(progress, state=moved), terms)


def test_exported_it_computes_the_same_in_peft(tmp_path) -> None:
    one = made(tmp_path, sessions.tiny_model(tmp_path / "model"), MODULES["bert"], heads=2)
    found = run_card(one.write())
    texts = ["fever cough", "rash"]
    assert torch.allclose(found["logits"](texts), one.logits(texts), rtol=0, atol=1e-5)
    layer = one.bench.model.adapter.layers[0]
    assert layer.R.shape == (2, 3, 3)
    assert f'"r": {6}' in (one.folder / export.CONFIG).read_text()


def test_a_draft_has_the_heads_it_was_asked_for() -> None:
    start = Terms(
        name="trial", expires="2099-12-31", labels=("no", "yes"), model=Model(name="m", digest="00" * 32, hidden_size=16),
        modules=("a",), units=100, rounds=3, rank=2, heads=5,
    )  # fmt: skip
    text = draft(start, PublicIdentity(name="hub", sign_key=bytes(32), seal_key=bytes(1216)))
    assert tomllib.loads(text)["adapter"]["heads"] == 5


def test_the_coordinator_asks_for_heads_with_one_word(tmp_path, capsys) -> None:
    model = sessions.tiny_model(tmp_path / "model")
    words = ("--name", "t", "--organisation", "T", "--labels", "no,yes", "--units", 100, "--rounds", 4, "--model", model)
    done = sessions.Terminal(capsys)("aggregator init", *words, "--rank", 2, "--heads", 3, "--home", tmp_path / "hub", "--json")
    assert done.code == 0, done.err
    drafted = tomllib.loads((tmp_path / "hub" / "federation.draft.toml").read_text())["adapter"]
    assert (drafted["heads"], drafted["rank"]) == (3, 2)
