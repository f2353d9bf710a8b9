# SPDX-License-Identifier: Apache-2.0
"""A contract and a base model that need no federation and no download, for ``silo selftest`` on a fresh installation.

Promised: the same weights on every machine, from a public seed; no global generator is changed. Not promised: any sense in them.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from privacy.contract import Adapter, Aggregator, Contract, Member, Model, Privacy, Sum, Task, Training
from privacy.federation import ring_plan_at
from silo.learning.classifier import Classifier, assemble

_HIDDEN = 32
_MODULES = tuple(f"encoder.layer.{layer}.{leaf}" for layer in range(2) for leaf in ("attention.self.value", "output.dense"))


def terms() -> Contract:
    """Joint mode, three silos, rank 8, a rate of 1/4; the finest lattice that fits."""
    made = Contract(
        format="siloquy/1", version=1, name="self-test", expires="9999-12-31",
        task=Task(labels=("no", "yes"), max_length=512),
        model=Model(name="tiny", digest="00" * 32, hidden_size=_HIDDEN),
        adapter=Adapter(rank=8, modules=_MODULES, scale=4.0),
        training=Training(rounds=24, learning_rate=0.04),
        privacy=Privacy(
            unit="unit", units=200, max_records_per_unit=3, sampling_rate=0.25, max_grad_norm=1.0, noise_multiplier=2.0,
            epsilon=8.0, delta=1e-5, lattice_bits=12,
        ),
        sum=Sum(),
        aggregator=Aggregator(name="hub", sign_key="ff" * 32, seal_key="00" * 1216),
        member=tuple(Member(id=k, name=f"silo-{k}", organisation="none", sign_key=f"{k:02x}" * 32) for k in (1, 2, 3)),
    )  # fmt: skip
    plan = ring_plan_at(made, noise_multiplier=made.privacy.noise_multiplier, lattice_bits=None)
    return msgspec.structs.replace(made, privacy=msgspec.structs.replace(made.privacy, lattice_bits=plan.lattice_bits))


def model() -> tuple[Contract, Classifier]:
    """The contract, and a BERT of two layers for it."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        encoder = BertModel(
            BertConfig(
                vocab_size=200, hidden_size=_HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=512,
            )
        )  # fmt: skip
    bits = np.random.Generator(np.random.PCG64(0))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.from_numpy(0.3 * bits.standard_normal(tuple(parameter.shape), dtype=np.float32)))
    made = terms()
    return made, assemble(encoder, made)
