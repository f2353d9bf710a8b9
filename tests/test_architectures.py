# SPDX-License-Identifier: Apache-2.0
"""The adapter on the families of the hub: what the headers say is what torch has, one private step, or a stated refusal.

Every model is real and tiny: its configuration class, random weights, saved and loaded as a silo loads it. Not covered: weights
as they were trained, and models whose code comes with them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from privacy import base_model, update_rule
from privacy.errors import ConfigError, SiloquyError
from silo.learning.classifier import Classifier, assemble, build
from silo.learning.training import Contribution
from tests import tiny_models

BASE = {**tiny_models.SIZES, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 4}
SLIDING = {**GROUPED, "sliding_window": 8}
GPT = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
DISTIL = {"vocab_size": 60, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "initializer_range": 0.3}
OPT = {**BASE, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3}
NEO = {**BASE, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
STATE_SPACE = {"vocab_size": 60, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
XLNET = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
DISENTANGLED = {**BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True}

ALL_LINEAR: dict[str, tuple[dict[str, Any], int]] = {
    "bert": (BASE, 12),
    "roberta": (BASE, 12),
    "xlm-roberta": (BASE, 12),
    "distilbert": (DISTIL, 12),
    "electra": ({**BASE, "embedding_size": 8}, 12),
    "albert": ({**BASE, "embedding_size": 8}, 6),
    "mpnet": (BASE, 12),
    "modernbert": ({**BASE, "local_attention": 8}, 8),
    "gpt2": (GPT, 8),
    "openai-gpt": (GPT, 8),
    "gpt_bigcode": (GPT, 8),
    "gpt_neo": (NEO, 12),
    "gpt_neox": (BASE, 8),
    "gptj": ({**GPT, "rotary_dim": 4}, 12),
    "bloom": ({**BASE, "n_layer": 2, "n_head": 4}, 8),
    "llama": (GROUPED, 14),
    "mistral": (SLIDING, 14),
    "qwen2": (GROUPED, 14),
    "qwen3": (GROUPED, 14),
    "gemma": (GROUPED, 14),
    "gemma2": (SLIDING, 14),
    "gemma3_text": (SLIDING, 14),
    "phi3": (BASE, 8),
    "starcoder2": (GROUPED, 12),
    "mamba": ({**STATE_SPACE, "time_step_rank": 4}, 6),
    "mamba2": ({**STATE_SPACE, "num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 8}, 4),
}
"""Model type to its configuration and how many modules all-linear adapts."""

SOME = {
    "deberta-v2": (DISENTANGLED, ["value_proj", "dense"]),
    "opt": (OPT, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}
"""Model type to its configuration and the modules that can be adapted, where all-linear is refused."""


class Chosen:
    """Words that put exactly these units into the sample."""

    def __init__(self, *units: int) -> None:
        self.units = set(units)

    def uint64(self, count: int) -> np.ndarray:
        return np.array([0 if i in self.units else 2**64 - 1 for i in range(count)], dtype=np.uint64)


def saved(kind: str, sizes: dict[str, Any], folder: Path) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    made.save_pretrained(folder)
    return made


def adapted(folder: Path, modules: tuple[str, ...], basis: str = "weights") -> Classifier:
    hidden = base_model.describe(folder).hidden_size
    return build(folder, tiny_models.terms(list(modules), hidden=hidden, rank=2, basis=basis))


def check_private_step(model: Classifier, modules: tuple[str, ...]) -> None:
    """Start-up tests, gradients as by autograd, and one step of three sampled units out of six."""
    terms = tiny_models.terms(list(modules), hidden=model.head.in_features, rank=2)
    units = [tiny_models.unit(seed, [3 + 2 * seed, 4][: 1 + seed % 2]) for seed in range(6)]
    contribute = Contribution(terms, model, units, rows_tokens=96, randomness=lambda: Chosen(0, 2, 5))
    total = contribute(update_rule.initial(terms))
    assert total.shape == (terms.dimension,)
    assert total.any()
    model.write(tiny_models.state(model.dimension, scale=0.05))
    found = tiny_models.gradients(model, units[1:3])
    for row, one in zip(found, units[1:3], strict=True):
        assert tiny_models.relative(row, tiny_models.by_autograd(model, one)) <= 1e-5


def step_with_all_linear(folder: Path) -> None:
    modules = base_model.match_modules(base_model.describe(folder), ["all-linear"])
    check_private_step(adapted(folder, modules), modules)


FUSED = {"bloom", "gpt2", "gpt_bigcode", "gpt_neox", "mamba", "mamba2", "modernbert", "openai-gpt", "phi3"}


@pytest.mark.parametrize("kind", sorted({*ALL_LINEAR, *SOME} - FUSED))
def test_value_output_names_one_of_each_in_every_layer(kind: str, tmp_path: Path) -> None:
    sizes, _ = {**ALL_LINEAR, **SOME}[kind]
    saved(kind, sizes, tmp_path)
    found = base_model.match_modules(base_model.describe(tmp_path), ["value-output"])
    value = [name for name in found if name.rsplit(".", 1)[-1] in {"value", "value_proj", "v", "v_proj", "v_lin"}]
    assert len(found) == 2 * len(value) > 0
    assert all("attention" in name or "attn" in name for name in found)


@pytest.mark.parametrize("kind", sorted(FUSED))
def test_value_output_is_refused_where_they_are_one_with_others(kind: str, tmp_path: Path) -> None:
    saved(kind, ALL_LINEAR[kind][0], tmp_path)
    with pytest.raises(ConfigError, match="no value and output projections of their own"):
        base_model.match_modules(base_model.describe(tmp_path), ["value-output"])


@pytest.mark.parametrize("kind", ALL_LINEAR)
def test_all_linear_of_a_family_is_described_and_takes_a_private_step(kind: str, tmp_path: Path) -> None:
    sizes, count = ALL_LINEAR[kind]
    made = saved(kind, sizes, tmp_path)
    described = base_model.describe(tmp_path)
    linear = {
        name: (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        for name, module in made.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }  # fmt: skip
    left_out = {name for name in linear if re.search(r"embed|pooler|\.dt_proj$", name)}
    assert dict(described.linear) == {name: size for name, size in linear.items() if name not in left_out}
    assert described.hidden_size == made.config.hidden_size
    modules = base_model.match_modules(described, ["all-linear"])
    assert len(modules) == count
    check_private_step(adapted(tmp_path, modules), modules)


@pytest.mark.parametrize("kind", SOME)
def test_a_family_with_odd_layers_takes_a_private_step_on_the_others(kind: str, tmp_path: Path) -> None:
    sizes, targets = SOME[kind]
    saved(kind, sizes, tmp_path)
    modules = base_model.match_modules(base_model.describe(tmp_path), targets)
    check_private_step(adapted(tmp_path, modules), modules)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("deberta-v2", DISENTANGLED, r"self\.query_proj got an input of shape \(1, 16, 2\)"),
        ("opt", OPT, r"layers\.0\.fc1 got an input of shape \(16, 2\)"),
        ("longformer", {**BASE, "attention_window": 8}, r"self\.query got an input of shape \(16, 1, 2\)"),
        ("xlnet", XLNET, r"leave out 10 matrices .*layer\.0\.rel_attn\.k"),
        ("recurrent_gemma", {**GROUPED, "lru_width": 16}, r"leave out 4 matrices .*\.input_gate_weight"),
        ("squeezebert", {**BASE, "embedding_size": 16}, "no linear module"),
        ("falcon", BASE, "is a FalconLinear, not a plain linear layer"),
        ("mixtral", {**GROUPED, "num_local_experts": 4}, r"leave out .* matrices .*\.experts\."),
        ("fnet", BASE, r"\(fnet\) takes no attention_mask"),
        ("t5", T5, "encoder-decoder"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_with_their_reason(
    kind: str, sizes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    saved(kind, sizes, tmp_path)
    with pytest.raises(SiloquyError, match=reason) as caught:
        step_with_all_linear(tmp_path)
    assert caught.value.hint


def test_an_encoder_in_a_compiled_wrapper_is_refused() -> None:
    """``torch.compile`` of a module gives another module around it, under other names."""
    wrapped = torch.compile(tiny_models.encoder("bert"), backend="eager")
    with pytest.raises(ConfigError) as caught:
        assemble(wrapped, tiny_models.terms(tiny_models.MODULES["bert"]))
    assert caught.value.hint


@pytest.mark.slow
def test_an_encoder_compiled_in_place_has_the_same_gradients() -> None:
    """No setting compiles; whoever does it in code gets one graph through autograd, whose backward pass fills the slots too."""
    from torch._dynamo.utils import counters  # seconds of imports that no other test needs

    plain, model = tiny_models.classifier("bert"), tiny_models.classifier("bert")
    model.encoder.compile(backend="aot_eager")
    units = [tiny_models.unit(seed, [3 + 2 * seed, 4][: 1 + seed % 2]) for seed in range(4)]
    torch._dynamo.reset()
    counters.clear()
    found = tiny_models.gradients(model, units)
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    assert tiny_models.relative(found, tiny_models.gradients(plain, units)) <= 1e-5


def test_a_silo_refuses_an_encoder_decoder_too(tmp_path: Path) -> None:
    saved("t5", T5, tmp_path)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        build(tmp_path, tiny_models.terms([]))


def test_a_layer_that_a_model_goes_round_is_found_by_name(tmp_path: Path) -> None:
    """Mamba reads the weight of its step projection and never calls it; all-linear leaves it out."""
    saved("mamba", ALL_LINEAR["mamba"][0], tmp_path)
    modules = ("layers.0.mixer.in_proj", "layers.1.mixer.dt_proj")
    with pytest.raises(SiloquyError, match=r"1 of 3 parts have no gradient, the first is layers\.1\.mixer\.dt_proj"):
        check_private_step(adapted(tmp_path, modules), modules)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba"])
def test_a_random_basis_takes_a_private_step(kind: str, tmp_path: Path) -> None:
    saved(kind, ALL_LINEAR[kind][0], tmp_path)
    modules = base_model.match_modules(base_model.describe(tmp_path), ["all-linear"])
    model = adapted(tmp_path, modules, "random")
    assert model.basis_digest == adapted(tmp_path, modules, "random").basis_digest != adapted(tmp_path, modules).basis_digest
    check_private_step(model, modules)


def test_token_types_that_a_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    """A plain tokenizer makes them for every model; DistilBERT takes none, RoBERTa has one kind, GPT-2 would read them as words."""
    for kind in ("distilbert", "roberta", "gpt2", "llama"):
        sizes = {**ALL_LINEAR[kind][0], "type_vocab_size": 1} if kind == "roberta" else ALL_LINEAR[kind][0]
        saved(kind, sizes, tmp_path / kind)
        modules = base_model.match_modules(base_model.describe(tmp_path / kind), ["all-linear"])
        model = adapted(tmp_path / kind, modules)
        model.write(tiny_models.state(model.dimension, scale=0.05))
        typed, plain = (tiny_models.gradients(model, [tiny_models.unit(1, [6, 9], types=types)]) for types in (True, False))
        assert torch.equal(typed, plain)
