# SPDX-License-Identifier: Apache-2.0
"""Sensitivity on integers (R01), any order and grouping (R09), and company that leaks: the start-up test and its controls."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from privacy.errors import ConfigError, PrivacyRefusal
from privacy.lattice import sum_lattice, to_lattice
from silo.classifier import Classifier, assemble
from silo.gradients import PhysicalBatch, check_invariance
from silo.tokens import EncodedUnit
from tests.tiny_models import MAX_LENGTH, MODULES, classifier, encoder, gradients, terms, unit

BITS = 14
KINDS = pytest.mark.parametrize("kind", ["bert", "llama"])
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


PROBES = [unit(1, [5]), unit(2, [11, 3]), unit(3, [20]), unit(4, [8])]


@KINDS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_honest_models_pass_and_get_their_state_back(kind: str, precision: str) -> None:
    model = classifier(kind, precision=precision)
    before = model.read()
    check_invariance(model, PROBES, lambda _: 4, max_length=MAX_LENGTH)
    assert (model.read() == before).all()


@KINDS
def test_slots_do_not_matter_in_float32(kind: str) -> None:
    assert check_invariance(classifier(kind), PROBES, lambda _: 4, max_length=MAX_LENGTH)


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


def dressed(kind: type[Classifier]) -> Classifier:
    model = classifier("bert")
    model.__class__ = kind
    return model


def mixing() -> Classifier:
    model = classifier("bert")
    model.encoder.embeddings.LayerNorm = nn.Sequential(model.encoder.embeddings.LayerNorm, BatchMean())
    return model


@pytest.mark.parametrize("make", [mixing, lambda: dressed(TokenMean)])
def test_models_that_mix_examples_are_refused_and_get_their_state_back(make) -> None:
    model = make()
    before = model.read()
    with pytest.raises(PrivacyRefusal, match="batch-mates"):
        check_invariance(model, PROBES, lambda _: 4, max_length=MAX_LENGTH)
    assert (model.read() == before).all()


def test_token_mean_breaks_the_sensitivity_that_the_refusal_protects() -> None:
    """The negative control of R01: with that loss one long record moves the other units' integers."""
    model, short = dressed(TokenMean), [unit(seed, [17]) for seed in range(3)]
    long = unit(99, [24])
    alone = gradients(model, [long])
    together = integer_sum(model, [long, *short], 5.0) - integer_sum(model, short, 5.0)
    assert not torch.equal(together, to_lattice(alone, max_grad_norm=5.0, lattice_bits=BITS)[0])


def test_models_where_only_the_slot_matters_ask_for_one_unit_per_batch() -> None:
    assert check_invariance(dressed(SlotWeighted), PROBES, lambda _: 4, max_length=MAX_LENGTH) is False


def test_the_test_covers_units_that_fill_their_batch() -> None:
    assert check_invariance(classifier("bert"), [unit(1, [5, 6, 7, 8])], lambda _: 4, max_length=MAX_LENGTH)


def test_the_test_needs_a_unit() -> None:
    with pytest.raises(ConfigError, match="no unit"):
        check_invariance(classifier("bert"), [], lambda _: 4, max_length=MAX_LENGTH)


def test_full_batches_and_padded_ones_take_one_attention_path() -> None:
    """transformers leaves the mask out when no row is padded; in bfloat16 a padded batch-mate then changed a unit's bits."""
    model = assemble(encoder("bert"), terms(MODULES["bert"]), precision="bfloat16")
    full = [unit(i, [16]) for i in range(4)]
    assert check_invariance(model, full, lambda _: 4, max_length=16)
