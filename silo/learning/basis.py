# SPDX-License-Identifier: Apache-2.0
"""The frozen factors B and A of an adapter, from public things alone: the base model, or its name. They cost no privacy.

``weights``: the top singular vectors of W0 (LoRA-XS). ``random``: orthonormal vectors from a public seed
(``privacy.orthonormal``). Every silo computes them itself, and their digest is compared before a round. Factors out of a gradient
(``public``, ``private``, ``raw``) come from ``privacy.sketch``. Promised: no record and no random generator is read; the factors
are orthonormal to 1e-5. Not promised: equal bytes of ``weights`` across BLAS and LAPACK builds. Rounding to a grid makes them equal
unless an entry lies within the build's error (1e-13 for an exact SVD) of a rounding boundary or two singular values coincide; the
digest shows it when it happens. Per million entries that is about one chance in five for unlike builds, so with large models it
will: then use ``random``, or machines that are alike.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError, MachineError
from privacy.federation import Contract
from privacy.orthonormal import GRID, Factors, check_orthonormal, check_rank, digest, gaussian, on_grid, random_basis

__all__ = ["GRID", "Factors", "digest", "factors", "random_basis", "weights_basis"]

EXACT_UP_TO = 1500
"""A weight whose smaller side is longer gets a randomised SVD."""

OVERSAMPLING = 16
POWER_ITERATIONS = 6


def factors(terms: Contract, name: str, weight: NDArray[np.floating]) -> Factors:
    """The factors of the module ``name``, whose weight is ``weight`` ``(out, in)``, by the basis that ``terms`` chose.

    Raises:
        ConfigError: the basis is out of a gradient, so it cannot be computed here; else as ``weights_basis`` and ``random_basis``.
        MachineError: as these.
    """
    if terms.adapter.basis == "random":
        return random_basis(bytes.fromhex(terms.model.digest), name, weight.shape, terms.adapter.vectors)
    if terms.adapter.basis != "weights":
        raise ConfigError(
            f"the basis is {terms.adapter.basis!r}: it comes out of a gradient, and has not been made yet",
            hint="a silo has it after the basis step of its federation", code="no-basis",
        )  # fmt: skip
    return weights_basis(weight.astype(np.float64), terms.adapter.vectors)


def weights_basis(weight: NDArray[np.float64], rank: int) -> Factors:
    """The top-``rank`` singular vectors (B ``(m, r)``, A ``(r, n)``), float32, of ``weight`` ``(m, n)`` float64.

    The largest entry of each column of B is positive (the first such entry where several are equal on the grid).
    Exact SVD up to a smaller side of 1500: 0.1 s for 1536 × 384. Beyond, a randomised one of width r + 16 with 6 power iterations
    from a public seed (SHA-256 of ``siloquy/basis/weights/1`` NUL, m and n, each u64): Halko, Martinsson, Tropp 2011, algorithms
    4.4 and 5.1. Seconds for 4096 × 14336. Its B and A hold 99.6 % of the energy that the best ones of their rank hold where
    the r-th singular value lies in a flat bulk (measured), and more where the spectrum decays; a single direction may be turned
    within a group of nearly equal singular values.
    Source: LoRA-XS, arXiv 2405.17604.

    Raises:
        ConfigError: ``weight`` is no matrix, not finite, or ``rank`` is not in 1..min(m, n).
        MachineError: the SVD did not converge or is not orthonormal to 1e-5.
    """
    check_rank(weight.shape, rank)
    if not np.isfinite(weight).all():
        raise ConfigError(
            f"a weight of shape {weight.shape} holds a value that is not finite",
            hint="fetch the base model again and check its digest",
        )
    weight = weight.astype(np.float64, copy=False)
    try:
        is_large = min(weight.shape) > max(EXACT_UP_TO, rank + OVERSAMPLING)
        left, right = _randomised(weight, rank) if is_large else _exact(weight)
    except np.linalg.LinAlgError as error:
        raise MachineError(f"the SVD of a {weight.shape} weight failed: {error}", hint="try another numpy build") from error
    b, a = on_grid(left[:, :rank]), on_grid(right[:rank])
    signs = np.where(b[np.abs(b).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    b, a = b * signs, a * signs[:, None]
    check_orthonormal(b)
    check_orthonormal(a.T)
    return b.astype(np.float32), a.astype(np.float32)


def _exact(weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    return left, right


def _randomised(weight: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(left ``(m, l)``, right ``(l, n)``) singular vectors of ``weight`` in the range that l = rank + 16 random vectors find."""
    m, n = weight.shape
    key = hashlib.sha256(b"siloquy/basis/weights/1\x00" + struct.pack("<QQ", m, n)).digest()
    found = np.linalg.qr(weight @ gaussian(key, rank + OVERSAMPLING, n).T)[0]
    for _ in range(POWER_ITERATIONS):
        found = np.linalg.qr(weight @ np.linalg.qr(weight.T @ found)[0])[0]
    left, _, right = np.linalg.svd(found.T @ weight, full_matrices=False)
    return found @ left, right
