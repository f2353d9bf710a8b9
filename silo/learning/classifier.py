# SPDX-License-Identifier: Apache-2.0
"""A frozen encoder, its LoRA-SB adapters and a linear task head: what a silo trains to classify texts, as one flat vector.

Promised: as ``silo.learning.adapted``. Only local files are read and no code from a model folder is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel

from privacy.errors import ConfigError
from privacy.federation import Contract
from privacy.orthonormal import Factors
from silo.learning.adapted import Adapted, Precision, agree, attached, from_folder, prepared
from silo.learning.gradients import PhysicalBatch, Slot, rowwise_linear
from silo.learning.lora_sb import Adapter

__all__ = ["Classifier", "Pooling", "Precision", "assemble", "build", "load", "prepared"]

Pooling = Literal["mean", "cls", "last"]


class Classifier(Adapted):
    """Logits ``(rows, labels)`` of a batch; the trainables are each R, the head's weight and its bias."""

    def __init__(
        self,
        encoder: nn.Module,
        adapter: Adapter,
        head: nn.Linear,
        *,
        pooling: Pooling,
        head_scale: float,
        precision: Precision,
        basis_digest: bytes,
    ) -> None:
        super().__init__(encoder, adapter, precision=precision, basis_digest=basis_digest)
        self.head = head
        self.pooling = pooling
        self.head_scale = head_scale
        self.head_slot: Slot | None = None
        self.eval()

    def forward(self, batch: PhysicalBatch) -> Tensor:
        """Logits ``(rows, labels)`` float32."""
        features = self.features(batch)[:, None, :]
        return rowwise_linear(features, self.head.weight, self.head.bias, self.head_slot).squeeze(1)

    def features(self, batch: PhysicalBatch) -> Tensor:
        """What the head sees: the pooled, scaled vector ``(rows, hidden)`` float32."""
        weights = _pooling_weights(batch.attention_mask, self.pooling)  # (rows, L)
        pooled: Tensor = self.head_scale * (self.hidden(batch).float() * weights[:, :, None]).sum(dim=1)
        return pooled

    def row_losses(self, batch: PhysicalBatch) -> Tensor:
        """Cross entropy of each row, ``(rows,)``: never the mean over rows, and never the encoder's own loss."""
        return functional.cross_entropy(self(batch), batch.labels, reduction="none")

    def mark(self, seed: int, length: int) -> int:
        """A label."""
        del length
        return seed % self.head.out_features

    @contextlib.contextmanager
    def recording_head(self, blocks: tuple[Tensor, ...]) -> Iterator[None]:
        """While open, backward passes add the head's per-row gradients to ``blocks``: of its weight and its bias."""
        weight, bias = blocks
        self.head_slot = Slot(weight=weight.view(-1, *self.head.weight.shape), bias=bias)
        try:
            yield
        finally:
            self.head_slot = None

    def trainables(self) -> list[Tensor]:
        """Every R in contract order, then the head's weight and bias."""
        return [*super().trainables(), self.head.weight, self.head.bias]


def build(
    path: str | Path,
    terms: Contract,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    bases: Mapping[str, Factors] | None = None,
) -> Classifier:
    """The classifier of the contract ``terms`` around the base model in the folder ``path``, its state all zeros.

    The global generators are left as they were.

    Raises:
        ConfigError: no loadable model at ``path``, weights are missing from it, or what ``assemble`` refuses.
    """
    return assemble(load(path), terms, precision=precision, device=device, bases=bases)


def load(path: str | Path) -> PreTrainedModel:
    """The encoder in the folder ``path``, float32. The global generators are left as they were.

    Raises:
        ConfigError: no loadable model at ``path``, or weights are missing from it.
    """
    try:
        encoder, lacking = from_folder(AutoModel, path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no usable base model at {path}: {error}", hint="give a folder with config.json and model.safetensors"
        ) from error
    # A pooler on top is not used, and many checkpoints leave it out; anything else would be filled with random numbers.
    missing = [key for key in lacking if not key.startswith("pooler.")]
    if missing:
        raise ConfigError(
            f"the base model lacks {len(missing)} weights, the first is {missing[0]}", hint="fetch the base model again"
        )
    return encoder


def assemble(
    encoder: PreTrainedModel,
    terms: Contract,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    bases: Mapping[str, Factors] | None = None,
) -> Classifier:
    """The classifier of ``terms`` around a transformers ``encoder`` that is already loaded; the encoder becomes part of it.

    ``bases``: the factors of each module, where they came out of a gradient; without them they are computed from public things.

    Raises:
        ConfigError: as ``prepared``; the encoder lacks a module of the contract, cannot carry the rank, or has another number of
            trainables than the contract says; or the contract's basis comes out of a gradient and ``bases`` is not given.
    """
    encoder = prepared(encoder, terms)
    adapter, digest = attached(encoder, terms, device, bases)
    head = nn.Linear(terms.model.hidden_size, len(terms.task.labels), device="meta").to_empty(device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = Classifier(
        encoder, adapter, head, pooling=terms.model.pooling, head_scale=terms.adapter.head_scale,
        precision=precision, basis_digest=digest,
    )  # fmt: skip
    agree("number of trainables", sum(p.numel() for p in model.parameters() if p.requires_grad), terms.dimension)
    agree("dimension", model.dimension, terms.dimension)
    return model


def _pooling_weights(mask: Tensor, pooling: Pooling) -> Tensor:
    """Weights ``(rows, L)`` float32 whose sum over L with the hidden states is the pooled vector; padding is on the right."""
    if pooling == "mean":
        return mask.float() / mask.sum(dim=1, keepdim=True)
    position = torch.zeros_like(mask[:, :1]) if pooling == "cls" else mask.sum(dim=1, keepdim=True) - 1
    return (torch.arange(mask.shape[1], device=mask.device) == position).float()
