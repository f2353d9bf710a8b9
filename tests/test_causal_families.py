# SPDX-License-Identifier: Apache-2.0
"""Causal language models of the hub's families: a private step whose gradients are those of autograd, or a stated refusal.

Every model is real and tiny: its configuration class, random weights, saved and loaded as a silo loads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from privacy import base_model, update_rule
from privacy.errors import SiloquyError
from silo.learning import causal
from silo.learning.training import Contribution
from tests import causal_models, tiny_models
from tests.test_architectures import ALL_LINEAR, OPT

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "mamba", "mamba2")


def adapted(kind: str, sizes: dict[str, Any], folder: Path) -> causal.CausalModel:
    """The model of ``kind``, through its files, all linear layers adapted, at a state that is not zero."""
    causal_models.base(kind, sizes).save_pretrained(folder)
    described = base_model.describe(folder)
    modules = list(base_model.match_modules(described, ["all-linear"]))
    terms = causal_models.terms(
        task={"max_length": 24}, model={"hidden_size": described.hidden_size}, adapter={"modules": modules, "rank": 2}
    )
    made = causal.build(folder, terms)
    contribute = Contribution(terms, made, [causal_models.unit(1, [5, 9])], rows_tokens=72)
    assert contribute(update_rule.initial(terms)).shape == (terms.dimension,)
    made.write(tiny_models.state(made.dimension, scale=0.05))
    return made


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_starts_up_and_its_unit_gradients_are_those_of_autograd(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, ALL_LINEAR[kind][0], tmp_path)
    units = [causal_models.unit(seed, [3 + 4 * seed, 6][: 1 + seed % 2]) for seed in range(3)]
    for unit in units:
        (found,) = tiny_models.gradients(model, [unit], max_length=24)
        assert tiny_models.relative(found, tiny_models.by_autograd(model, unit)) <= 1e-4


def test_gemma_2_caps_its_logits_and_so_do_we(tmp_path: Path) -> None:
    sizes = {**ALL_LINEAR["gemma2"][0], "final_logit_softcapping": 2.0}
    model = adapted("gemma2", sizes, tmp_path)
    assert model.softcap == 2.0
    (row,) = causal_models.unit(3, [9]).rows
    with torch.no_grad():
        logits = model.logits(model.encoder(input_ids=torch.tensor([row[0]])).last_hidden_state)
    assert float(logits.abs().max()) <= 2.0


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("opt", OPT, r"layers\.0\.fc1 got an input of shape \(16, 2\)"),
        ("mixtral", {**causal_models.SIZES, "num_local_experts": 4}, r"leave out .* matrices .*\.experts\."),
    ],
)
def test_what_mixes_rows_is_refused_with_its_reason(kind: str, sizes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(SiloquyError, match=reason) as caught:
        adapted(kind, sizes, tmp_path)
    assert caught.value.hint
