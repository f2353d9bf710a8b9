# SPDX-License-Identifier: Apache-2.0
"""The frozen factors B and A of an adapter, from the base model's own weights: public, so they cost no privacy.

The top singular vectors of W0 (LoRA-XS) are recomputed by every silo from the pinned base model, and their digest is
compared before a round. Promised: no record and no random generator is read; the factors are orthonormal to 1e-5.
Not promised: equal bytes across LAPACK builds. Rounding to a grid makes them equal unless an entry lies within LAPACK's error
(about 1e-13) of a rounding boundary or two singular values coincide; the digest shows it when it happens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError, MachineError

GRID = 2.0**-20
"""Entries are multiples of this; it costs orthonormality about 1e-6."""

ORTHONORMAL_TO = 1e-5

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(B, A): B ``(m, r)`` with orthonormal columns, A ``(r, n)`` with orthonormal rows."""


def weights_basis(weight: NDArray[np.float64], rank: int) -> Factors:
    """The top-``rank`` singular vectors (B ``(m, r)``, A ``(r, n)``), float32, of ``weight`` ``(m, n)`` float64.

    The largest entry of each column of B is positive (the first such entry where several are equal on the grid).
    Exact SVD: 0.1 s for 1536 × 384, minutes for 4096 × 11008. Source: LoRA-XS, arXiv 2405.17604; PRIVACY.md section 6.

    Raises:
        ConfigError: ``weight`` is no matrix, not finite, or ``rank`` is not in 1..min(m, n).
        MachineError: the SVD did not converge or is not orthonormal to 1e-5.
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ConfigError(
            f"rank {rank} does not fit a weight of shape {weight.shape}", hint="choose adapter.rank between 1 and the smaller side"
        )
    if not np.isfinite(weight).all():
        raise ConfigError(
            f"a weight of shape {weight.shape} holds a value that is not finite",
            hint="fetch the base model again and check its digest",
        )
    try:
        left, _, right = np.linalg.svd(weight.astype(np.float64, copy=False), full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise MachineError(f"the SVD of a {weight.shape} weight failed: {error}", hint="try another numpy build") from error
    b, a = _on_grid(left[:, :rank]), _on_grid(right[:rank])
    signs = np.where(b[np.abs(b).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    b, a = b * signs, a * signs[:, None]
    _check_orthonormal(b)
    _check_orthonormal(a.T)
    return b.astype(np.float32), a.astype(np.float32)


def digest(bases: Mapping[str, Factors]) -> bytes:
    """SHA-256 (32 bytes) over names, shapes and '<f4' bytes of ``bases`` in their order; what silos compare."""
    state = hashlib.sha256(b"siloquy/basis/1\x00")
    for name, factors in bases.items():
        encoded = name.encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
        for factor in factors:
            state.update(struct.pack("<QQ", *factor.shape) + factor.astype("<f4").tobytes(order="C"))
    return state.digest()


def _on_grid(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """``vectors`` rounded to multiples of GRID, without negative zeros: −0.0 and 0.0 are different bytes."""
    return np.round(vectors / GRID) * GRID + 0.0


def _check_orthonormal(columns: NDArray[np.float64]) -> None:
    """Raises MachineError when max|QᵀQ − I| exceeds 1e-5."""
    error = float(np.abs(columns.T @ columns - np.eye(columns.shape[1])).max())
    if not error <= ORTHONORMAL_TO:
        raise MachineError(
            f"the basis is orthonormal to {error:.2g} only, {ORTHONORMAL_TO:g} is needed",
            hint="this machine's LAPACK is not accurate enough; try another numpy build",
        )
