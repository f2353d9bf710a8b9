# SPDX-License-Identifier: Apache-2.0
"""A frozen causal language model and its LoRA-SB adapters: what a silo trains to complete prompts. Only the R train.

A row's loss is the mean over *its own* response tokens of the cross entropy of the next token. It is never transformers' own
``labels=`` loss, whose mean is over the tokens of the whole batch: there one record's length moves all others' gradients, and
clipping bounds nothing. The output layer is the base model's own and frozen, so there is no head to train.

Promised: as ``silo.learning.adapted``; and what the names say is computed before it is believed: a model whose output layer is
another function of its last hidden states, or whose tokens see later ones, is refused. Only local files are read and no code from
a model folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from privacy.errors import ConfigError
from privacy.federation import Contract
from privacy.orthonormal import Factors
from silo.learning.adapted import Adapted, Precision, agree, attached, from_folder, prepared
from silo.learning.gradients import PhysicalBatch
from silo.learning.lora_sb import Adapter

IGNORED = -100
"""The target of a position at which nothing is learned."""

LOGITS = 1 << 26
"""Numbers of logits held at a time (256 MiB in float32): a vocabulary is larger than the model is wide."""


class CausalModel(Adapted):
    """Logits ``(rows, L, vocabulary)`` of a batch; the trainables are each R.

    ``softcap``: c of Gemma 2's c·tanh(z/c) on the logits; None elsewhere. ``prefix``: what the base model is called within
    transformers' class for the whole.
    """

    def __init__(
        self,
        encoder: nn.Module,
        adapter: Adapter,
        output: nn.Linear,
        *,
        softcap: float | None,
        prefix: str,
        precision: Precision,
        basis_digest: bytes,
    ) -> None:
        super().__init__(encoder, adapter, precision=precision, basis_digest=basis_digest)
        self.output = output
        self.prefix = prefix
        self.softcap = softcap
        self.eval()

    def forward(self, batch: PhysicalBatch) -> Tensor:
        """Logits ``(rows, L, vocabulary)`` float32, of all positions at once."""
        return self.logits(self.hidden(batch))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``(…, vocabulary)`` of hidden states ``(…, hidden)``."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            found: Tensor = self.output(hidden)
        found = found.float()
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)

    def row_losses(self, batch: PhysicalBatch) -> Tensor:
        """The mean cross entropy ``(rows,)`` of each row's own response tokens; ``batch.labels`` says where a response begins.

        Formal guarantees:
            - *Own*: a row's loss is a function of that row: its sum and the number it is divided by are of its own tokens.
            - *Response alone*: a prompt's token is no target, whatever it is; nor is padding.
            - *Public shapes*: how the positions are cut into pieces follows from the batch's shape and the vocabulary.

        ===========================  ===========================================
        case                         result
        ===========================  ===========================================
        a row without a target       0, and a gradient of zeros (a filler row)
        a prompt of no token         the first token is no target: nothing is before it
        a response beyond the cut    the tokens that are left
        ===========================  ===========================================
        """
        sums, counts = self.row_sums(batch)
        return sums / counts.clamp(min=1)

    def row_sums(self, batch: PhysicalBatch) -> tuple[Tensor, Tensor]:
        """(the summed cross entropy ``(rows,)`` float32 of each row's response tokens, how many they are ``(rows,)`` int64)."""
        hidden, aims = self.hidden(batch), targets(batch)
        width = max(1, LOGITS // (len(aims) * self.output.out_features))
        pieces = list(zip(torch.split(hidden, width, dim=1), torch.split(aims, width, dim=1), strict=True))
        if len(pieces) == 1:
            sums = self._sums(*pieces[0])
        else:  # the logits of a piece are computed again in its backward pass, so that one piece's are held at a time
            each = [checkpoint(self._sums, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
            sums = torch.stack(each).sum(dim=0)
        return sums, (aims != IGNORED).sum(dim=1)

    def _sums(self, hidden: Tensor, aims: Tensor) -> Tensor:
        """Summed cross entropies ``(rows,)`` of some positions ``(rows, T, hidden)`` and their targets ``(rows, T)``."""
        logits = self.logits(hidden)
        flat = functional.cross_entropy(logits.flatten(0, 1), aims.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(aims.shape).sum(dim=1)

    def mark(self, seed: int, length: int) -> int:
        """How many tokens are the prompt's: none, or half of them."""
        return length // 2 if seed % 2 else 0


def targets(batch: PhysicalBatch) -> Tensor:
    """What each position ``(rows, L)`` is to say: the token after it where that one is of the row's response, else ``IGNORED``."""
    places = torch.arange(1, batch.input_ids.shape[1], device=batch.input_ids.device)
    wanted = (places >= batch.labels[:, None]) & (batch.attention_mask[:, 1:] != 0)
    shifted = batch.input_ids[:, 1:].masked_fill(~wanted, IGNORED)
    return functional.pad(shifted, (0, 1), value=IGNORED)


def build(
    path: str | Path,
    terms: Contract,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    bases: Mapping[str, Factors] | None = None,
) -> CausalModel:
    """The model of the contract ``terms`` around the base model in the folder ``path``, its state all zeros.

    The global generators are left as they were.

    Raises:
        ConfigError: no loadable causal language model at ``path``, weights are missing from it, or what ``assemble`` refuses.
    """
    return assemble(load(path), terms, precision=precision, device=device, bases=bases)


def load(path: str | Path) -> PreTrainedModel:
    """The causal language model in the folder ``path``, float32. The global generators are left as they were.

    Raises:
        ConfigError: no loadable model at ``path``, or weights are missing from it: an encoder has no output layer, for one.
    """
    try:
        whole, missing = from_folder(AutoModelForCausalLM, path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no usable causal language model at {path}: {str(error).splitlines()[0][:200]}",
            hint="give the folder of a decoder with its output layer, such as GPT-2, Llama, Mistral, Qwen or Gemma",
        ) from error
    if missing:
        raise ConfigError(
            f"the base model lacks {len(missing)} weights, the first is {missing[0]}",
            hint="a causal language model comes with its output layer; choose such a folder, or fetch it again",
        )
    return whole


def assemble(
    whole: PreTrainedModel,
    terms: Contract,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    bases: Mapping[str, Factors] | None = None,
) -> CausalModel:
    """The model of ``terms`` around a transformers causal language model that is already loaded; it becomes part of it.

    ``bases``: as for ``silo.learning.classifier.assemble``.

    Raises:
        ConfigError: as there; or the logits are no linear function of the last hidden states, or a token sees later ones.
    """
    encoder, output, softcap = parts(whole, terms)
    adapter, digest = attached(encoder, terms, device, bases)
    model = CausalModel(
        encoder, adapter, output.to(device), softcap=softcap, prefix=whole.base_model_prefix, precision=precision,
        basis_digest=digest,
    )  # fmt: skip
    agree("number of trainables", sum(p.numel() for p in model.parameters() if p.requires_grad), terms.dimension)
    return model


def parts(whole: PreTrainedModel, terms: Contract) -> tuple[PreTrainedModel, nn.Linear, float | None]:
    """(the base model, its frozen output layer, the soft cap on its logits), fit for gradients of one row at a time.

    Raises:
        ConfigError: as ``silo.learning.adapted.prepared``; or as ``assemble``.
    """
    encoder, output = whole.base_model, whole.get_output_embeddings()
    if encoder is whole or type(output) is not nn.Linear:
        raise _refused(whole, "it is not a base model under a plain linear output layer")
    encoder = prepared(encoder, terms)
    output = output.float().requires_grad_(False)
    softcap: float | None = getattr(whole.config, "final_logit_softcapping", None)
    with torch.no_grad():
        bare = Adapter(names=(), layers=())
        _check_output(
            whole.eval(),
            CausalModel(encoder, bare, output, softcap=softcap, prefix="", precision="float32", basis_digest=b""),
        )
    return encoder, output, softcap


def _check_output(whole: PreTrainedModel, bare: CausalModel) -> None:
    """Raises ConfigError unless ``bare`` gives the logits of ``whole``, and no token changes those before it."""
    ids = torch.arange(8)[None] % whole.config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = whole(**inputs).logits
    found = bare.logits(bare.encoder(**inputs).last_hidden_state)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
        raise _refused(whole, "its logits are another function of its last hidden states than its output layer")
    changed = {**inputs, "input_ids": torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % whole.config.vocab_size], dim=1)}
    if not torch.allclose(whole(**changed).logits[:, :-1], wanted[:, :-1], rtol=1e-4, atol=1e-5):
        raise _refused(whole, "its tokens see later ones: it is no causal language model")


def _refused(whole: PreTrainedModel, why: str) -> ConfigError:
    return ConfigError(
        f"a {whole.config.model_type} model cannot be trained as a causal language model: {why}",
        hint="choose a decoder such as GPT-2, Llama, Mistral, Qwen, Gemma or Mamba", code="no-causal-lm",
        model_type=whole.config.model_type,
    )  # fmt: skip
