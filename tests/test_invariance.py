# SPDX-License-Identifier: Apache-2.0
"""Sensitivity on integers (R01), any order and grouping (R09), and company that leaks: the start-up test and its controls."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.errors import PrivacyRefusal
from silo.learning.classifier import Classifier, assemble
from silo.learning.gradients import PhysicalBatch
from silo.learning.invariance import check_invariance, probe
from silo.learning.tokens import EncodedUnit
from tests.tiny_models import MAX_LENGTH, MODULES, SIZES, classifier, encoder, gradients, terms, unit

BITS = 14
KINDS = pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
unit_lists = st.lists(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=4), max_size=12)

MODELS = {kind: classifier(kind) for kind in MODULES}


def integer_sum(model: Classifier, units: list[EncodedUnit], norm: float = 0.5) -> torch.Tensor:
    if not units:
        return torch.zeros(model.dimension, dtype=torch.int64)
    return sum_lattice(to_lattice(gradients(model, units), max_grad_norm=norm, lattice_bits=BITS))


@KINDS
@settings(max_examples=12, deadline=None)
@given(lengths=unit_lists, extra=st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=4), at=st.integers(0, 12))
def test_one_unit_more_moves_the_integer_sum_by_at_most_the_bound(
    kind: str, lengths: list[list[int]], extra: list[int], at: int
) -> None:
    units = [unit(seed, its) for seed, its in enumerate(lengths)]
    neighbour = [*units[:at], unit(99, extra), *units[at:]]
    difference = integer_sum(MODELS[kind], neighbour) - integer_sum(MODELS[kind], units)
    alone = to_lattice(gradients(MODELS[kind], [unit(99, extra)]), max_grad_norm=0.5, lattice_bits=BITS)[0]
    assert int(difference.square().sum()) <= 4**BITS
    assert torch.equal(difference, alone)


@KINDS
def test_longest_record_among_short_ones_moves_the_sum_by_at_most_the_bound(kind: str) -> None:
    short = [unit(seed, [4]) for seed in range(20)]
    difference = integer_sum(MODELS[kind], [*short[:7], unit(99, [MAX_LENGTH] * 4), *short[7:]]) - integer_sum(MODELS[kind], short)
    assert 0.9 * 4**BITS < int(difference.square().sum()) <= 4**BITS


@KINDS
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(list(range(9))), cuts=st.lists(st.integers(0, 9), max_size=3))
def test_any_order_and_grouping_of_units_gives_the_same_integers(kind: str, order: list[int], cuts: list[int]) -> None:
    units = [unit(seed, [1 + 7 * seed % 23] * (1 + seed % 3)) for seed in range(9)]
    edges = [0, *sorted(cuts), 9]
    groups = [[units[i] for i in order[a:b]] for a, b in itertools.pairwise(edges)]
    parts = sum(integer_sum(MODELS[kind], group) for group in groups)
    assert torch.equal(parts, integer_sum(MODELS[kind], units))


def check(model: Classifier, rows: int = 6, most: int = 2) -> bool:
    return check_invariance(model, lambda _: rows, max_length=MAX_LENGTH, most=most)


@KINDS
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
def test_honest_models_pass_in_float32_and_get_their_state_back(kind: str, rows: int) -> None:
    model = classifier(kind)
    before = model.read()
    assert check(model, rows, most=min(rows, 3))
    assert (model.read() == before).all()


@KINDS
def test_in_bfloat16_a_pass_means_what_it_says(kind: str) -> None:
    """Whether the slot matters is the machine's business; where the test says no, every unit has its bits in every order."""
    model = classifier(kind, precision="bfloat16")
    before = model.read()
    together = check(model, rows=4)
    assert (model.read() == before).all()
    units = [unit(seed, [20 + seed]) for seed in range(4)]
    forth, back = gradients(model, units), gradients(model, units[::-1]).flip(0)
    assert torch.equal(forth, back) or not together


class BatchMean(nn.Module):
    """A normalisation over the batch that no name gives away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=(0, 1))


class TokenMean(Classifier):
    """The loss of a causal language model as transformers takes it: a mean over all tokens of the batch."""

    def row_losses(self, batch: PhysicalBatch) -> torch.Tensor:
        tokens = batch.attention_mask.sum(dim=1)
        return super().row_losses(batch) * tokens / tokens.sum()


class SlotWeighted(Classifier):
    """Rows apart, but their place counts: what a kernel with other tiles for the last rows does."""

    def row_losses(self, batch: PhysicalBatch) -> torch.Tensor:
        return super().row_losses(batch) * (1 + 1e-6 * torch.arange(len(batch.labels)))


class SlotWeightedAt24(Classifier):
    """The same in one bucket only, in the middle."""

    def row_losses(self, batch: PhysicalBatch) -> torch.Tensor:
        step = 1e-6 if batch.input_ids.shape[1] == 24 else 0.0
        return super().row_losses(batch) * (1 + step * torch.arange(len(batch.labels)))


class LongestSoFar(nn.Module):
    """Memory of the longest batch since the last of 8 tokens, as a dynamic rope has it, kept where no buffer shows it."""

    longest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, x.shape[1]) if x.shape[1] > 8 else 0
        return x * (1 + 1e-3 * self.longest)


class Counts(nn.Module):
    """A buffer that moves and, so far, changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x


def dressed(kind: type[Classifier]) -> Classifier:
    model = classifier("bert")
    model.__class__ = kind
    return model


def followed_by(module: nn.Module) -> Classifier:
    model = classifier("bert")
    model.encoder.embeddings.LayerNorm = nn.Sequential(model.encoder.embeddings.LayerNorm, module)
    return model


def dynamic_rope() -> Classifier:
    """Its rotary embedding is stretched by the longest batch so far; put in where no name in the configuration tells."""
    model = classifier("llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=12, rope_parameters=rope)
    model.encoder.rotary_emb = LlamaRotaryEmbedding(config)
    return model


@pytest.mark.parametrize("make", [lambda: followed_by(BatchMean()), lambda: dressed(TokenMean)])
@pytest.mark.parametrize("rows", [2, 4, 6])
def test_models_that_mix_examples_are_refused_and_get_their_state_back(make, rows: int) -> None:
    model = make()
    before = model.read()
    with pytest.raises(PrivacyRefusal, match="batch-mates"):
        check(model, rows)
    assert (model.read() == before).all()


def test_token_mean_breaks_the_sensitivity_that_the_refusal_protects() -> None:
    """The negative control of R01: with that loss one long record moves the other units' integers."""
    model, short = dressed(TokenMean), [unit(seed, [17]) for seed in range(3)]
    long = unit(99, [24])
    alone = gradients(model, [long])
    together = integer_sum(model, [long, *short], 5.0) - integer_sum(model, short, 5.0)
    assert not torch.equal(together, to_lattice(alone, max_grad_norm=5.0, lattice_bits=BITS)[0])


@pytest.mark.parametrize("kind", [SlotWeighted, SlotWeightedAt24])
@pytest.mark.parametrize("rows", [2, 6])
def test_models_where_only_the_slot_matters_ask_for_one_unit_per_batch(kind: type[Classifier], rows: int) -> None:
    assert check(dressed(kind), rows) is False


def test_every_shape_is_run_at_its_own_number_of_rows() -> None:
    model, shapes = classifier("bert"), set()
    model.encoder.register_forward_pre_hook(lambda _, args, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    assert check_invariance(model, lambda length: max(2, 100 // length), max_length=MAX_LENGTH, most=2)
    assert shapes == {(12, 8), (6, 16), (4, 24), (3, 32), (2, 40)}


@pytest.mark.parametrize("make", [dynamic_rope, lambda: followed_by(Counts())])
def test_a_buffer_that_a_batch_changes_is_refused(make) -> None:
    with pytest.raises(PrivacyRefusal, match=r"changed \d buffers") as caught:
        check(make())
    assert caught.value.code == "carries-state"


def test_memory_without_a_buffer_is_refused_too() -> None:
    with pytest.raises(PrivacyRefusal, match="after longer ones") as caught:
        check(followed_by(LongestSoFar()))
    assert caught.value.code == "carries-state"


def test_the_dynamic_rope_that_is_refused_moves_other_units() -> None:
    """The negative control of the refusal: one long unit in an earlier batch moves the others' integers."""
    model, units = dynamic_rope(), [unit(seed, [20]) for seed in range(4)]
    fresh = integer_sum(model, units)
    integer_sum(model, [unit(99, [MAX_LENGTH])])
    assert not torch.equal(integer_sum(model, units), fresh)


@pytest.mark.parametrize("types", [0, 1, 2])
def test_probes_are_public_and_fit_the_model(types: int) -> None:
    model = classifier("bert" if types else "llama")
    model.encoder.config.type_vocab_size = types
    model.encoder.config.vocab_size = 7
    found = probe(model, [30, 2], seed=3)
    assert found == probe(model, [30, 2], seed=3) != probe(model, [30, 2], seed=4)
    assert [len(ids) for ids, _, _ in found.rows] == [30, 2]
    assert {token for ids, _, _ in found.rows for token in ids} == set(range(7))
    assert {kind for _, kinds, _ in found.rows for kind in kinds or ()} == set(range(types))
    assert found.rows[0][2] in range(3)


def test_full_batches_and_padded_ones_take_one_attention_path() -> None:
    """transformers leaves the mask out when no row is padded; in bfloat16 a padded batch-mate then changed a unit's bits."""
    model = assemble(encoder("bert"), terms(MODULES["bert"]), precision="bfloat16")
    masks = set()
    attention = model.encoder.encoder.layer[0]
    attention.register_forward_pre_hook(lambda _, args, kwargs: masks.add((*args, *kwargs.values())[1] is None), with_kwargs=True)
    check_invariance(model, lambda _: 4, max_length=16, most=1)
    assert masks == {False}
