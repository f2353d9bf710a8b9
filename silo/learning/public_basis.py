# SPDX-License-Identifier: Apache-2.0
"""The basis ``public``: LoRA-SB's start on a public data set. It costs no privacy, because no private record has a part in it.

The same model, sketches and clipping as the basis step with records (``silo.learning.sketch``), without noise, and the same way
from sums to factors (``privacy.sketch``). Promised: nothing but the public units and public seeds is read. Not promised: equal
bytes on unlike machines: torch's floats differ, and with them a few integers. So one party, the coordinator, computes them, and all
others take its bytes by a digest (``privacy.basis_file``). And not checked: that the data set is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from privacy.dp import ring
from privacy.errors import RecordsError
from privacy.federation import Contract
from privacy.orthonormal import Factors
from privacy.sketch import Layout, factors_of
from silo.learning import records, sketch, tokens
from silo.learning.classifier import Precision
from silo.learning.tokens import EncodedUnit

PUBLIC_KEY = bytes(32)
"""The selection key of public records. Each is a unit of its own, so nothing is selected by it."""


def public_factors(
    folder: Path,
    terms: Contract,
    layout: Layout,
    units: Sequence[EncodedUnit],
    *,
    rank: int,
    max_grad_norm: float,
    rows_tokens: int,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
) -> dict[str, Factors]:
    """The factors of every module, of ``rank`` vectors, from the gradients of these public ``units``.

    Args:
        folder: the base model's, whose digest the caller has checked.
        layout: what of a gradient is kept; a wide one costs memory only.
        max_grad_norm: a unit of a larger gradient counts no more than one of this norm, as in training.
        rows_tokens: tokens in one physical batch.

    Raises:
        RecordsError: there are no units.
        ConfigError: as ``silo.learning.sketch.build`` and ``privacy.sketch.factors_of``.
        PrivacyRefusal, MachineError: as ``silo.learning.sketch.Sketch``.
    """
    if not units:
        raise RecordsError("a public basis of no records", hint="name a data set with records of this task")
    layout.check_rank(rank)
    model = sketch.build(folder, terms, layout, precision=precision, device=device)
    plan = _without_a_ring(layout.dimension)
    made = sketch.Sketch(terms, model, units, plan=plan, max_grad_norm=max_grad_norm, rows_tokens=rows_tokens)
    return factors_of(made.sum(units).astype(np.float64), layout, rank)


def _without_a_ring(dimension: int) -> ring.Plan:
    """The finest lattice on which norms can be proved; nothing is noised, masked or clamped here."""
    bits = min(ring.MOST_LATTICE_BITS, (ring.MOST_SQUARE_BITS - (dimension - 1).bit_length()) // 2)
    return ring.Plan(lattice_bits=bits, share_variance=0, clamp=2**62, headroom=0, silos=1)


def from_file(
    path: Path,
    folder: Path,
    terms: Contract,
    layout: Layout,
    *,
    rank: int,
    max_grad_norm: float,
    rows_tokens: int,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
) -> dict[str, Factors]:
    """``public_factors`` of the data set in ``path``, whose rows have the columns of this contract's task.

    Raises:
        RecordsError: a row cannot be used; else as ``public_factors``.
    """
    privacy = msgspec.structs.replace(terms.privacy, unit=records.RECORD_AS_UNIT)
    units = records.load(path, terms.task, privacy, selection_key=PUBLIC_KEY)
    encoded = tokens.encode(units, folder, terms.task)
    return public_factors(
        folder, terms, layout, encoded,
        rank=rank, max_grad_norm=max_grad_norm, rows_tokens=rows_tokens, precision=precision, device=device,
    )  # fmt: skip
