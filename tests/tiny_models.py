# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoders, contracts and units for the tests of the silo's tensor side; nothing touches a global generator."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedModel

from privacy.federation import Contract, parse
from silo.learning.classifier import Classifier, Precision, assemble
from silo.learning.gradients import Tape, pack, unit_gradients
from silo.learning.tokens import EncodedUnit, Row
from tests.terms import contract_bytes

MAX_LENGTH = 40
BERT_LEAVES = ("attention.self.query", "attention.self.value", "output.dense")
MODULES = {
    "bert": [f"encoder.layer.{i}.{leaf}" for i in range(2) for leaf in BERT_LEAVES],
    "llama": [f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")],
    "gpt2": [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
}
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random BERT, Llama (grouped-query attention) or GPT-2 (Conv1D) of two layers, weights large enough to be non-linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            quiet = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
            return BertModel(BertConfig(**SIZES, **quiet, max_position_embeddings=64, initializer_range=0.3))
        if kind == "gpt2":
            sizes = {"vocab_size": 60, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
            return GPT2Model(GPT2Config(**sizes, initializer_range=0.3))
        return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3))


def terms(
    modules: list[str], hidden: int = 16, rank: int = 3, pooling: str = "mean", max_length: int = MAX_LENGTH, basis: str = "weights"
) -> Contract:
    """A valid contract for three labels; lattice bits as many as fit."""
    raw = contract_bytes(
        task={"labels": ["a", "b", "c"], "max_length": max_length},
        model={"hidden_size": hidden, "pooling": pooling},
        adapter={"rank": rank, "modules": modules, "basis": basis, "scale": 1.5, "head_scale": 0.5},
        privacy={"lattice_bits": 14},
    )
    return parse(raw).terms


def classifier(kind: str, pooling: str = "mean", precision: Precision = "float32") -> Classifier:
    """A tiny classifier at a fixed state where every gradient is non-zero."""
    model = assemble(encoder(kind), terms(MODULES[kind], pooling=pooling), precision=precision)
    model.write(state(model.dimension))
    return model


def state(dimension: int, seed: int = 5, scale: float = 0.3) -> np.ndarray:
    return scale * np.random.Generator(np.random.PCG64(seed)).standard_normal(dimension)


def unit(seed: int, lengths: Iterable[int], vocabulary: int = 60, types: bool = False) -> EncodedUnit:
    """A unit with one record per entry of ``lengths``."""
    bits = np.random.Generator(np.random.PCG64(seed))

    def row(n: int) -> Row:
        token_types = tuple(int(i >= n // 2) for i in range(n)) if types else None
        return tuple(int(t) for t in bits.integers(1, vocabulary, n)), token_types, seed % 3

    return EncodedUnit(id=f"unit-{seed}", rows=tuple(row(n) for n in lengths))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the largest wanted number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def by_autograd(model: Classifier, one: EncodedUnit) -> torch.Tensor:
    """The unit's gradient by ordinary autograd, one unpadded record at a time."""
    total = torch.zeros(model.dimension)
    for row in one.rows:
        single = next(pack([EncodedUnit(id="x", rows=(row,))], lambda _: 1, max_length=len(row[0])))
        parts = torch.autograd.grad(model.row_losses(single).sum(), model.trainables())
        total += torch.cat([part.reshape(-1) for part in parts])
    return total


def gradients(model: Classifier, units: Iterable[EncodedUnit], rows: int = 4, max_length: int = MAX_LENGTH) -> torch.Tensor:
    """Per-unit gradients of all ``units``; order as packed."""
    tape = Tape(model.dimension)
    batches = pack(list(units), lambda _: rows, max_length=max_length)
    return torch.cat([unit_gradients(model, batch, tape) for batch in batches])
