# SPDX-License-Identifier: Apache-2.0
"""A frozen encoder, its LoRA-SB adapters and a linear task head: what a silo trains, as one flat vector.

Promised: exactly the R of the named layers and the head are trainable; the encoder stays in evaluation mode, so that no
dropout bit depends on a generator; attention takes one path, whether or not *another* row of the batch is padded. Only
local files are read and no code from a model folder is run. Not promised: that an unknown architecture treats rows apart.
The names checked here only explain; ``silo.learning.invariance`` decides.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionMaskInterface, AutoModel, PreTrainedModel
from transformers.masking_utils import eager_mask

from privacy.errors import ConfigError
from privacy.federation import Contract
from privacy.orthonormal import Factors
from silo.learning import basis
from silo.learning.gradients import PhysicalBatch, Slot, rowwise_linear
from silo.learning.lora_sb import Adapter, attach, find_linear, matrix
from silo.learning.prefix import Prefix

Precision = Literal["float32", "bfloat16"]
Pooling = Literal["mean", "cls", "last"]

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Classifier(nn.Module):
    """Logits ``(rows, labels)`` of a batch, and the trainables as one flat float64 vector.

    ``basis_digest`` (32 bytes) is what silos compare before a round; see ``silo.learning.basis.digest``.
    """

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
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.adapter = adapter
        self.pooling = pooling
        self.head_scale = head_scale
        self.precision = precision
        self.basis_digest = basis_digest
        self.takes_types = _takes_types(encoder)
        self.prefix = Prefix.below(encoder, adapter.names)
        self.head_slot: Slot | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.head.weight.device

    @property
    def dimension(self) -> int:
        """d, the number of trainable numbers."""
        return self.adapter.dimension + self.head.weight.numel() + self.head.bias.numel()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever ``mode`` says: dropout must not depend on a generator."""
        del mode
        return super().train(False)

    def forward(self, batch: PhysicalBatch) -> Tensor:
        """Logits ``(rows, labels)`` float32."""
        features = self.features(batch)[:, None, :]
        return rowwise_linear(features, self.head.weight, self.head.bias, self.head_slot).squeeze(1)

    def features(self, batch: PhysicalBatch) -> Tensor:
        """What the head sees: the pooled, scaled vector ``(rows, hidden)`` float32."""
        encode = partial(self._encode, batch)
        found = encode() if self.prefix is None else self.prefix.run(encode, batch)
        hidden = found.last_hidden_state  # (rows, L, hidden)
        weights = _pooling_weights(batch.attention_mask, self.pooling)  # (rows, L)
        pooled: Tensor = self.head_scale * (hidden.float() * weights[:, :, None]).sum(dim=1)
        return pooled

    def keep_prefix(self, batch: PhysicalBatch) -> None:
        """Compute what the frozen layers below the adapters give for ``batch``, and keep it, if that is on."""
        if self.prefix is not None:
            self.prefix.fill(partial(self._encode, batch), batch)

    def _encode(self, batch: PhysicalBatch) -> Any:  # noqa: ANN401  (each architecture has its own type)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None and self.takes_types:
            inputs["token_type_ids"] = batch.token_type_ids
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.encoder(**inputs)

    def row_losses(self, batch: PhysicalBatch) -> Tensor:
        """Cross entropy of each row, ``(rows,)``: never the mean over rows, and never the encoder's own loss."""
        return functional.cross_entropy(self(batch), batch.labels, reduction="none")

    @contextlib.contextmanager
    def recording(self, rows: Tensor) -> Iterator[None]:
        """While open, backward passes add per-row gradients to ``rows`` ``(rows, d)`` float32, in the order of ``read``."""
        blocks = torch.split(rows, [parameter.numel() for parameter in self.trainables()], dim=1)
        for name, layer, block in zip(self.adapter.names, self.adapter, blocks[:-2], strict=True):
            layer.slot = Slot(weight=block.view(-1, *layer.R.shape), layer=name)
        self.head_slot = Slot(weight=blocks[-2].view(-1, *self.head.weight.shape), bias=blocks[-1])
        try:
            yield
        finally:
            self.head_slot = None
            for layer in self.adapter:
                layer.slot = None

    def trainables(self) -> list[Tensor]:
        """Every R in contract order, then the head's weight and bias."""
        return [*(layer.R for layer in self.adapter), self.head.weight, self.head.bias]

    def read(self) -> NDArray[np.float64]:
        """The state theta ``(d,)`` float64: each R row-major in contract order, head weight row-major, head bias."""
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.trainables()])
        return flat.double().cpu().numpy()

    def write(self, theta: NDArray[np.float64]) -> None:
        """Sets the trainables to ``theta`` ``(d,)`` float64, rounded to float32.

        Raises:
            ConfigError: another shape or type, or a value that is not finite in float32.
        """
        values = torch.from_numpy(np.array(theta)).float()
        if theta.dtype != np.float64 or theta.shape != (self.dimension,) or not bool(values.isfinite().all()):
            raise ConfigError(
                f"a state of {theta.shape} {theta.dtype} does not fit a model of {self.dimension} finite float64 numbers",
                hint="use a state of the same contract",
            )
        sizes = [parameter.numel() for parameter in self.trainables()]
        with torch.no_grad():
            for parameter, block in zip(self.trainables(), torch.split(values, sizes), strict=True):
                parameter.copy_(block.view_as(parameter))


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
    with torch.random.fork_rng(devices=[]):
        try:
            encoder, report = AutoModel.from_pretrained(
                path, local_files_only=True, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no usable base model at {path}: {error}", hint="give a folder with config.json and model.safetensors"
            ) from error
    # A pooler on top is not used, and many checkpoints leave it out; anything else would be filled with random numbers.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"the base model lacks {len(missing)} weights, the first is {missing[0]}", hint="fetch the base model again"
        )
    loaded: PreTrainedModel = encoder
    return loaded


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
    if bases is None:
        weights = {name: matrix(find_linear(encoder, name)).cpu().numpy() for name in terms.adapter.modules}
        bases = {name: basis.factors(terms, name, weight) for name, weight in weights.items()}
    adapter = attach(encoder.to(device), terms.adapter.modules, bases, terms.adapter.scale, terms.adapter.heads)
    head = nn.Linear(terms.model.hidden_size, len(terms.task.labels), device="meta").to_empty(device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = Classifier(
        encoder, adapter, head, pooling=terms.model.pooling, head_scale=terms.adapter.head_scale,
        precision=precision, basis_digest=basis.digest({name: bases[name] for name in terms.adapter.modules}),
    )  # fmt: skip
    _agree("number of trainables", sum(p.numel() for p in model.parameters() if p.requires_grad), terms.dimension)
    _agree("dimension", model.dimension, terms.dimension)
    return model


def prepared(encoder: PreTrainedModel, terms: Contract) -> PreTrainedModel:
    """``encoder``, fit for gradients of one row at a time: checked, in float32, without a cache, and with one path of attention.

    Attention is switched to the eager kernels, whose mask is replaced for the whole process by one that holds the same numbers
    and is never left out.

    Raises:
        ConfigError: the encoder mixes examples by construction, is no single stack under an attention mask, or has another hidden
            size.
    """
    _refuse_shape(encoder)
    _refuse_mixing(encoder)
    _agree("hidden size", int(encoder.config.hidden_size), terms.model.hidden_size)
    AttentionMaskInterface.register("eager", _full_mask)
    encoder.set_attn_implementation("eager")
    encoder.config.use_cache = False
    return encoder.float()


def _full_mask(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (transformers' own signature)
    """The additive attention mask, also where no row is padded.

    transformers leaves it out when *every* row is full, and in bfloat16 the two paths round differently: one padded
    batch-mate then changed 11,264 of 13,058 numbers of a unit's gradient (MiniLM, 16 rows of 128 tokens).
    """
    mask: Tensor = eager_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})
    return mask


def _pooling_weights(mask: Tensor, pooling: Pooling) -> Tensor:
    """Weights ``(rows, L)`` float32 whose sum over L with the hidden states is the pooled vector; padding is on the right."""
    if pooling == "mean":
        return mask.float() / mask.sum(dim=1, keepdim=True)
    position = torch.zeros_like(mask[:, :1]) if pooling == "cls" else mask.sum(dim=1, keepdim=True) - 1
    return (torch.arange(mask.shape[1], device=mask.device) == position).float()


def _takes_types(encoder: nn.Module) -> bool:
    """Whether token types mean anything to ``encoder``: a plain tokenizer makes them for models that know none, or one kind."""
    kinds = getattr(getattr(encoder, "config", None), "type_vocab_size", None) or 0
    return kinds > 1 and "token_type_ids" in inspect.signature(encoder.forward).parameters


def _refuse_shape(encoder: PreTrainedModel) -> None:
    """Raises ConfigError for an encoder that cannot turn padded rows of tokens into one vector per token."""
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"the base model is an encoder-decoder ({encoder.config.model_type})",
            hint="choose a model of one stack, an encoder or a decoder",
        )
    missing = {"input_ids", "attention_mask"} - inspect.signature(encoder.forward).parameters.keys()
    if missing:
        raise ConfigError(
            f"the base model ({encoder.config.model_type}) takes no {min(missing)}",
            hint="choose a model of text with an attention mask: without one, padding is read as text",
        )


def _refuse_mixing(encoder: PreTrainedModel) -> None:
    """Raises ConfigError for what is known to let one example, or one batch, change another's result."""
    norms = [name for name, module in encoder.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    experts = [key for key in _EXPERT_KEYS if (getattr(encoder.config, key, None) or 0) > 1]
    if norms or experts:
        raise ConfigError(
            f"the base model lets examples influence each other: {', '.join([*norms, *experts][:3])}",
            hint="choose a base model without batch statistics and without routed experts", code="mixes-examples",
        )  # fmt: skip
    ropes = [kind for kind in _rope_types(encoder) if "dynamic" in kind or kind == "longrope"]
    if ropes:
        raise ConfigError(
            f"the base model's rope_type is {ropes[0]}: its rotary embedding follows the longest batch so far",
            hint="choose a base model with rotary embeddings that are fixed, such as default, linear, yarn or llama3",
            code="carries-state",
        )  # fmt: skip


def _rope_types(encoder: PreTrainedModel) -> list[str]:
    """Every kind of rotary embedding in the configuration: one table, or one per type of layer."""
    table = getattr(encoder.config, "rope_parameters", None) or {}
    tables = [table, *(each for each in table.values() if isinstance(each, dict))]
    return [str(each.get("rope_type", each.get("type", "default"))) for each in tables]


def _agree(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(
            f"the base model's {what} is {found}, the contract says {wanted}",
            hint="compare [model] and [adapter] of federation.toml with the model's config.json",
        )
