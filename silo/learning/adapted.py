# SPDX-License-Identifier: Apache-2.0
"""A frozen base model and its LoRA-SB adapters: what every kind of task trains, as one flat vector.

Promised: exactly the R of the named layers, and a head where the task has one, are trainable; the base model stays in evaluation
mode, so that no dropout bit depends on a generator; attention takes one path, whether or not *another* row of the batch is padded.
Not promised: that an unknown architecture treats rows apart. The names checked here only explain; ``silo.learning.invariance``
decides.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionMaskInterface, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask

from privacy.errors import ConfigError
from privacy.federation import Contract
from privacy.orthonormal import Factors
from silo.learning import basis
from silo.learning.gradients import PhysicalBatch, Slot
from silo.learning.lora_sb import Adapter, attach, find_linear, matrix
from silo.learning.prefix import Prefix

Precision = Literal["float32", "bfloat16"]

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Adapted(nn.Module, ABC):
    """A model whose rows are independent and whose trainables are one flat float64 vector (``gradients.Rowwise``).

    ``encoder``: the base model as ``AutoModel`` has it, with the adapters in it. ``basis_digest`` (32 bytes) is what silos compare
    before a round; see ``silo.learning.basis.digest``.
    """

    def __init__(self, encoder: nn.Module, adapter: Adapter, *, precision: Precision, basis_digest: bytes) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.precision = precision
        self.basis_digest = basis_digest
        self.takes_types = _takes_types(encoder)
        self.frozen = Prefix.below(encoder, adapter.names)

    @abstractmethod
    def forward(self, batch: PhysicalBatch) -> Tensor:
        """The logits."""

    @abstractmethod
    def row_losses(self, batch: PhysicalBatch) -> Tensor:
        """One loss per row ``(rows,)``; a row's loss depends on that row alone."""

    @abstractmethod
    def mark(self, seed: int, length: int) -> int:
        """What stands in the last place of a made-up record (``tokens.Row``) of ``length`` tokens: a public function."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.encoder.parameters()).device

    @property
    def dimension(self) -> int:
        """d, the number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.trainables())

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever ``mode`` says: dropout must not depend on a generator."""
        del mode
        return super().train(False)

    def hidden(self, batch: PhysicalBatch) -> Tensor:
        """The base model's output ``(rows, L, hidden)`` in the model's precision."""
        encode = partial(self._encode, batch)
        found: Tensor = (encode() if self.frozen is None else self.frozen.run(encode, batch)).last_hidden_state
        return found

    def keep_frozen(self, batch: PhysicalBatch) -> None:
        """Compute what the frozen layers below the adapters give for ``batch``, and keep it, if that is on."""
        if self.frozen is not None:
            self.frozen.fill(partial(self._encode, batch), batch)

    def _encode(self, batch: PhysicalBatch) -> Any:  # noqa: ANN401  (each architecture has its own type)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None and self.takes_types:
            inputs["token_type_ids"] = batch.token_type_ids
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.encoder(**inputs)

    @contextlib.contextmanager
    def recording(self, rows: Tensor) -> Iterator[None]:
        """While open, backward passes add per-row gradients to ``rows`` ``(rows, d)`` float32, in the order of ``read``."""
        blocks = torch.split(rows, [parameter.numel() for parameter in self.trainables()], dim=1)
        matrices = blocks[: len(self.adapter.layers)]
        for name, layer, block in zip(self.adapter.names, self.adapter, matrices, strict=True):
            layer.slot = Slot(weight=block.view(-1, *layer.R.shape), layer=name)
        try:
            with self.recording_head(blocks[len(matrices) :]):
                yield
        finally:
            for layer in self.adapter:
                layer.slot = None

    @contextlib.contextmanager
    def recording_head(self, blocks: tuple[Tensor, ...]) -> Iterator[None]:
        """The same for what is trained beside the R, whose blocks ``(rows, ·)`` these are; nothing where there is no such thing."""
        del blocks
        yield

    def trainables(self) -> list[Tensor]:
        """Every R in contract order, then what else the kind of task trains."""
        return [layer.R for layer in self.adapter]

    def read(self) -> NDArray[np.float64]:
        """The state theta ``(d,)`` float64: each of ``trainables`` row-major, in their order."""
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


def from_folder(kind: type[AutoModel | AutoModelForCausalLM], path: str | Path) -> tuple[PreTrainedModel, list[str]]:
    """(the model in the folder ``path`` as ``kind`` has it, float32, the weights it lacks, sorted), from local files alone.

    The global generators are left as they were.

    Raises:
        OSError, ValueError: there is no such model.
    """
    with torch.random.fork_rng(devices=[]):
        loaded, report = kind.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    return loaded, sorted(report["missing_keys"])


def attached(
    encoder: PreTrainedModel, terms: Contract, device: str | torch.device, bases: Mapping[str, Factors] | None
) -> tuple[Adapter, bytes]:
    """(the adapters of ``terms``, now in ``encoder``, the digest of their factors). See ``classifier.assemble`` for ``bases``.

    Raises:
        ConfigError: the encoder lacks a module of the contract or cannot carry the rank; or the contract's basis comes out of a
            gradient and ``bases`` is not given.
    """
    if bases is None:
        weights = {name: matrix(find_linear(encoder, name)).cpu().numpy() for name in terms.adapter.modules}
        bases = {name: basis.factors(terms, name, weight) for name, weight in weights.items()}
    adapter = attach(encoder.to(device), terms.adapter.modules, bases, terms.adapter.scale, terms.adapter.heads)
    return adapter, basis.digest({name: bases[name] for name in terms.adapter.modules})


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
    agree("hidden size", int(encoder.config.hidden_size), terms.model.hidden_size)
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


def agree(what: str, found: int, wanted: int) -> None:
    """Returns when a figure of the model is the contract's. Raises ConfigError when it is not."""
    if found != wanted:
        raise ConfigError(
            f"the base model's {what} is {found}, the contract says {wanted}",
            hint="compare [model] and [adapter] of federation.toml with the model's config.json",
        )
