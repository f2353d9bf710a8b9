# SPDX-License-Identifier: Apache-2.0
"""The federation's model as an ordinary PEFT adapter: plain transformers and peft load it, without Siloquy.

An adapted layer W + s·B·R·A is LoRA with ``lora_A`` = A and ``lora_B`` = s·B·R. The scale s is folded into the product, in
float64, so that one rounding is all that is lost; peft's own factor, lora_alpha/r, is exactly 1. The head goes to transformers'
token classifier of the base model, with head_scale folded in. The weights of every pooling sum to 1 and a linear layer commutes
with them, so pooling that class's logits *per token* gives the contract's logits, for all three poolings and whatever the
encoder. transformers' sequence classifiers do not: some put a tanh before the head, some have a head without bias. A causal
language model has no head: its adapter goes to transformers' causal language model, or is merged into the weights of a whole one.

Promised: the same state, base model and ledger give the same bytes, on one machine; a base model whose token classifier is
anything but encoder, dropout and linear head is refused. Formal guarantee: the exported model costs no privacy, because it is
a function of released state and public factors, which depend on records through noised sums alone. Not promised: the same of the
card's ε. It counts every attempt, and how often a silo crashed and tried again may depend on its records.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from privacy import base_model
from privacy.errors import ConfigError, MachineError
from privacy.federation import Contract
from privacy.weights import mapped
from silo.learning.adapted import Adapted
from silo.learning.card import Origin, card, causal_card
from silo.learning.causal import CausalModel, load
from silo.learning.classifier import Classifier
from silo.learning.evaluation import Bench
from silo.learning.lora_sb import find_linear

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@dataclass(frozen=True, kw_only=True)
class Host:
    """The names under which transformers' token classifier holds the encoder and the head."""

    encoder: str
    head: str


def adapter(bench: Bench, origin: Origin) -> dict[str, bytes]:
    """The files of the adapter, by name: weights, configuration, and a card with the code that loads it.

    Raises:
        ConfigError: transformers has no token classifier for this base model, or one that computes something else.
    """
    if isinstance(bench.model, CausalModel):
        return _causal_adapter(bench.model, origin)
    model = bench.classifier
    model.write(origin.state.theta)
    host = find_host(model, bench.terms)
    return {
        CARD: card(origin, takes_types=model.takes_types, head_replaced=_holds_other_head(bench, host)).encode(),
        CONFIG: _json(_config(model, host, origin.base)),
        WEIGHTS: safetensors.numpy.save(_tensors(model, host), metadata={"format": "pt"}),
    }


def _causal_adapter(model: CausalModel, origin: Origin) -> dict[str, bytes]:
    """The files of the adapter of a causal language model."""
    model.write(origin.state.theta)
    return {
        CARD: causal_card(origin, merged=False).encode(),
        CONFIG: _json({**_lora(model, model.prefix, origin.base), "task_type": "CAUSAL_LM"}),
        WEIGHTS: safetensors.numpy.save(_named(_matrices(model, model.prefix)), metadata={"format": "pt"}),
    }


def merged(bench: Bench, origin: Origin) -> dict[str, bytes]:
    """The files of a whole causal language model, in float32, whose weights are W + s·B·R·A: what plain transformers loads.

    Each product is summed in float64 and rounded once. The tokenizer's files are the base model's. All of it is held in memory.

    Raises:
        ConfigError: the task is another.
        MachineError: the folder for temporary files has no room for it.
    """
    model = bench.causal
    model.write(origin.state.theta)
    whole = load(bench.folder)
    with torch.no_grad():
        for name, layer in zip(model.adapter.names, model.adapter, strict=True):
            find_linear(whole.base_model, name).weight.copy_(layer.merged_weight())
    made = _saved(whole)
    beside = base_model.tokenizer_files(bench.folder)
    copied = {path.name: path.read_bytes() for path in beside if path.parent == bench.folder}
    trained_with = bench.folder / base_model.TEMPLATES / "default.jinja"  # of templates by name only this one goes along
    if trained_with in beside:
        copied["chat_template.jinja"] = trained_with.read_bytes()
    return {**made, **copied, CARD: causal_card(origin, merged=True).encode()}


def _saved(whole: PreTrainedModel) -> dict[str, bytes]:
    """The files that transformers makes of a model. Raises MachineError where there is no room for them."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"cannot write the merged model to a temporary folder: {error}",
            hint="name a folder with room for it in TMPDIR, and run the same command again", code="cannot-write",
        ) from error  # fmt: skip


def find_host(model: Classifier, terms: Contract) -> Host:
    """Where the parts of ``model`` belong in transformers' token classifier of its base model.

    The class is made without memory for its numbers, and its structure decides. Then it computes, around the encoder itself.

    Raises:
        ConfigError: as ``adapter``, or a module of the contract is no part of that class.
    """
    encoder, labels = model.encoder, len(terms.task.labels)
    whole = _token_classifier(encoder, labels)
    prefix = whole.base_model_prefix
    own = dict(itertools.chain(whole.named_parameters(), whole.named_buffers()))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.startswith(f"{prefix}.")}
    head = min(shapes, default="").rpartition(".")[0]
    if shapes != {f"{head}.weight": (labels, terms.model.hidden_size), f"{head}.bias": (labels,)}:
        raise _refused(encoder, f"{type(whole).__name__} has more than a linear head: {', '.join(sorted(shapes))[:200]}")
    absent = [name for name in model.adapter.names if f"{prefix}.{name}" not in dict(whole.named_modules())]
    if absent:
        raise _refused(encoder, f"{type(whole).__name__} has no module {prefix}.{absent[0]}")
    host = Host(encoder=prefix, head=head)
    if not _is_linear(whole, host, encoder):
        raise _refused(encoder, f"the logits of {type(whole).__name__} are no linear function of the encoder's output")
    return host


def _token_classifier(encoder: PreTrainedModel, labels: int) -> PreTrainedModel:
    """transformers' class for this encoder, on the meta device: names and shapes, no numbers."""
    config = copy.deepcopy(encoder.config)
    config.num_labels = labels
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise _refused(encoder, "transformers has no token classifier for it") from error


def _is_linear(whole: PreTrainedModel, host: Host, encoder: nn.Module) -> bool:
    """Whether ``whole``, given ``encoder`` and a head that is not zero, applies the one to the output of the other."""
    shape = whole.get_submodule(host.head).weight.shape
    head = nn.Linear(shape[1], shape[0], device="meta").to_empty(device="cpu").requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    setattr(whole, host.encoder, encoder)
    whole.set_submodule(host.head, head)
    tokens = torch.arange(4)[None]  # a contract allows no fewer
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        found, wanted = whole.eval()(**inputs).logits, head(encoder(**inputs).last_hidden_state)
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def _tensors(model: Classifier, host: Host) -> dict[str, NDArray[np.float32]]:
    """Everything the adapter changes, float32, under the names that peft gives it."""
    tensors = {
        f"{host.head}.weight": model.head_scale * model.head.weight.double(),
        f"{host.head}.bias": model.head.bias,
    }
    return _named(tensors | _matrices(model, host.encoder))


def _matrices(model: Adapted, prefix: str) -> dict[str, Tensor]:
    """A and s·B·R of every adapted layer."""
    tensors = {}
    for name, layer in zip(model.adapter.names, model.adapter, strict=True):
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.A
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.scale * (layer.B.double() @ layer.core.double())
    return tensors


def _named(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {f"base_model.model.{name}": _float32(tensor) for name, tensor in tensors.items()}


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _config(model: Classifier, host: Host, base: str) -> dict[str, object]:
    """What peft needs to know of a classifier."""
    return {**_lora(model, host.encoder, base), "modules_to_save": [host.head], "task_type": "TOKEN_CLS"}


def _lora(model: Adapted, prefix: str, base: str) -> dict[str, object]:
    """What peft needs to know. ``target_modules`` are full names: peft compares ends of names, and no other ends like these.

    A contract without modules trains the head alone; peft has a word for an adapter of nothing.
    """
    rank = len(model.adapter.layers[0].A) if model.adapter.layers else 1
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in model.adapter),
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [f"{prefix}.{name}" for name in model.adapter.names] or "dummy-target-modules",
    }


def _holds_other_head(bench: Bench, host: Host) -> bool:
    """Whether the base model's file brings a head of this name for other labels, which transformers must be told to replace."""
    labels = len(bench.terms.task.labels)
    with ExitStack() as stack:
        return any(tensor.name == f"{host.head}.weight" and tensor.shape[0] != labels for tensor, _ in mapped(bench.folder, stack))


def _json(document: dict[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _refused(encoder: PreTrainedModel, why: str) -> ConfigError:
    return ConfigError(
        f"a model on {encoder.config.model_type} cannot be exported: {why}",
        hint="use `silo eval`, which needs no such class; BERT, RoBERTa, GPT-2, Llama, Mistral and Qwen models can be exported",
        code="no-export",
        model_type=encoder.config.model_type,
    )
