# SPDX-License-Identifier: Apache-2.0
"""Orthonormal vectors from a public seed, the grid that factors lie on, and the digest that silos compare. Numpy alone.

Promised: no record, no weight and no random generator is read; what comes from a seed has the same bytes on every machine whose
arithmetic is IEEE 754, because it is made of integers and separate + − × ÷ √ in a stated order (docs/adr/0009). Not promised: that
any direction is good for learning.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privacy import prg
from privacy.errors import ConfigError, MachineError

GRID = 2.0**-20
"""Entries are multiples of this; it costs orthonormality about 1e-6."""

ORTHONORMAL_TO = 1e-5

WORDS_PER_NUMBER = 12
"""Uniform words whose sum is one nearly Gaussian number (variance 1): exact in integers, where log and cos are not."""

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(B, A): B ``(m, r)`` with orthonormal columns, A ``(r, n)`` with orthonormal rows."""


def random_basis(model: bytes, name: str, shape: Sequence[int], rank: int) -> Factors:
    """Orthonormal B ``(m, r)`` and A ``(r, n)``, float32, drawn from a public seed: nearly uniform among all of that shape.

    The seed of a factor is SHA-256 of ``siloquy/basis/random/1`` NUL, the factor's letter, the base model's digest (32 bytes), m
    and n (each u64, little endian) and the module's name. It is a key of ``privacy.prg.Keystream``. Vector k of length l takes the
    words of block k of 12·l: entry i is (their sum at places i, i + l, …, i + 11·l, less 12·(2³² − 1)/2) / 2³². The vectors are
    made orthonormal in order by modified Gram-Schmidt, and rounded to the grid. All of it is integers and + − × ÷ √ in a stated
    order, so every machine gets the same bytes, and a smaller rank gets the first vectors of a larger one (docs/adr/0009).

    No SVD: time m·r² and n·r², 0.2 s for rank 64 of 4096 × 11008, up to rank min(m, n).

    Raises:
        ConfigError: ``shape`` is no matrix's, or ``rank`` is not in 1..min(m, n).
        MachineError: the factors are not orthonormal to 1e-5.
    """
    check_rank(shape, rank)
    m, n = shape
    context = model + struct.pack("<QQ", m, n) + name.encode()
    left, right = (
        rows(b"siloquy/basis/random/1\x00" + letter + context, rank, length) for letter, length in ((b"B", m), (b"A", n))
    )
    return np.ascontiguousarray(left.T), right


def rows(seed: bytes, count: int, length: int) -> NDArray[np.float32]:
    """``count`` orthonormal vectors ``(count, length)`` float32 on the grid, from SHA-256 of ``seed``; see ``random_basis``.

    Raises:
        MachineError: they are not orthonormal to 1e-5.
    """
    vectors = on_grid(_orthonormal(gaussian(hashlib.sha256(seed).digest(), count, length)))
    check_orthonormal(vectors.T)
    return vectors.astype(np.float32)


def digest(bases: Mapping[str, Factors]) -> bytes:
    """SHA-256 (32 bytes) over names, shapes and '<f4' bytes of ``bases`` in their order; what silos compare."""
    state = hashlib.sha256(b"siloquy/basis/1\x00")
    for name, factors in bases.items():
        encoded = name.encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
        for factor in factors:
            state.update(struct.pack("<QQ", *factor.shape) + factor.astype("<f4").tobytes(order="C"))
    return state.digest()


def check_rank(shape: Sequence[int], rank: int) -> None:
    """Raises ConfigError when ``shape`` is no matrix's or has no ``rank`` directions."""
    if len(shape) != 2 or not 1 <= rank <= min(shape):
        raise ConfigError(
            f"rank {rank} does not fit a weight of shape {tuple(shape)}", hint="choose adapter.rank between 1 and the smaller side"
        )


def gaussian(key: bytes, count: int, length: int) -> NDArray[np.float64]:
    """``count`` vectors ``(count, length)`` of nearly Gaussian numbers; see ``random_basis``. Exact: sums are below 2**36."""
    stream, words = prg.Keystream(key), np.empty(WORDS_PER_NUMBER * length, dtype="<u4")
    drawn = np.empty((count, length))
    for row in drawn:
        stream.read_into(words)
        sums = words.reshape(WORDS_PER_NUMBER, length).sum(axis=0, dtype=np.int64)
        row[:] = (sums - WORDS_PER_NUMBER * (2**32 - 1) // 2) / 2.0**32
    return drawn


def dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products summed along the last axis by halves: numpy's own sum and BLAS choose an order by machine."""
    terms = left * right
    while (size := terms.shape[-1]) > 1:
        half = -(-size // 2)
        terms[..., : size - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0]


def on_grid(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """``vectors`` rounded to multiples of GRID, without negative zeros: −0.0 and 0.0 are different bytes."""
    return np.round(vectors / GRID) * GRID + 0.0


def check_orthonormal(columns: NDArray[np.float64]) -> None:
    """Raises MachineError when max|QᵀQ − I| exceeds 1e-5."""
    error = float(np.abs(columns.T @ columns - np.eye(columns.shape[1])).max())
    if not error <= ORTHONORMAL_TO:
        raise MachineError(
            f"the basis is orthonormal to {error:.2g} only, {ORTHONORMAL_TO:g} is needed",
            hint="this machine's LAPACK is not accurate enough; try another numpy build",
        )


def _orthonormal(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Modified Gram-Schmidt of the rows in order, in place: one IEEE operation after the other, no BLAS, no fused step."""
    for index in range(len(vectors)):
        row, rest = vectors[index], vectors[index + 1 :]
        row /= np.sqrt(dot(row, row))
        rest -= dot(rest, row)[:, None] * row
    return vectors
