# SPDX-License-Identifier: Apache-2.0
"""Tiny random causal language models, contracts, units and tokenizers for tests; nothing touches a global generator."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from privacy.federation import Contract, parse
from silo.learning.adapted import Precision
from silo.learning.causal import CausalModel, assemble
from silo.learning.tokens import EncodedUnit
from tests import tiny_models
from tests.terms import contract_bytes

SIZES = {**tiny_models.SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
MODULES = tiny_models.MODULES["llama"]
WORDS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", *(f"w{i}" for i in range(54)))
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
CAUSAL: dict[str, Any] = {
    "task": {"kind": "causal-lm", "format": "prompt-response", "labels": None, "text_pair": None, "max_length": 40},
    "model": {"hidden_size": 16, "pooling": None},
    "adapter": {"rank": 3, "modules": MODULES, "scale": 1.5, "head_scale": None},
    "privacy": {"lattice_bits": 14},
}
"""What makes a template contract one of a causal language model."""


def changes(**more: dict[str, Any]) -> dict[str, Any]:
    """``CAUSAL``, its tables changed as ``tests.terms.contract_bytes`` changes them."""
    return {name: {**CAUSAL.get(name, {}), **more.get(name, {})} for name in {*CAUSAL, *more}}


def terms(**more: dict[str, Any]) -> Contract:
    """A valid contract of a causal language model."""
    return parse(contract_bytes(**changes(**more))).terms


def base(kind: str = "llama", sizes: dict[str, Any] | None = None) -> PreTrainedModel:
    """A random causal language model of two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes or SIZES)))
    return made


def model(agreed: Contract | None = None, precision: Precision = "float32") -> CausalModel:
    """A tiny Llama at a fixed state where every gradient is non-zero."""
    made = assemble(base(), agreed or terms(), precision=precision)
    made.write(tiny_models.state(made.dimension))
    return made


def unit(seed: int, lengths: Iterable[int]) -> EncodedUnit:
    """A unit with one record per entry of ``lengths``, of which a third is the prompt."""
    bits = np.random.Generator(np.random.PCG64(seed))
    rows = tuple((tuple(int(t) for t in bits.integers(1, 60, n)), None, n // 3) for n in lengths)
    return EncodedUnit(id=f"unit-{seed}", rows=rows)


def tokenizer(template: str | None = CHAT, *, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One number per word; it puts ``<s>`` before a text."""
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token=eos, chat_template=template)


def folder(path: Path, **options: Any) -> Path:
    """A tiny Llama and its tokenizer as files."""
    base().save_pretrained(path)
    tokenizer(**options).save_pretrained(path)
    return path


def rows(count: int, *, start_at: int = 0) -> list[dict[str, str]]:
    """Records whose response follows from the prompt's word: w3 is answered by w23 and w24."""
    found = []
    for number in range(start_at, start_at + count):
        word = number * 7 % 5
        found.append({"prompt": f"w{word} w{number % 3 + 10}", "response": f"w{word + 20} w{word + 21}"})
    return found
