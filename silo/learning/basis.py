# SPDX-License-Identifier: Apache-2.0
"""The frozen factors B and A of an adapter, from public things alone: the base model, or its name. They cost no privacy.

``weights``: the top singular vectors of W0 (LoRA-XS). ``random``: orthonormal vectors from a public seed. Every silo computes
them itself, and their digest is compared before a round. Promised: no record and no random generator is read; the factors are
orthonormal to 1e-5; ``random`` has the same bytes on every machine whose arithmetic is IEEE 754. Not promised: equal bytes of
``weights`` across LAPACK builds. Rounding to a grid makes them equal unless an entry lies within LAPACK's error (about 1e-13)
of a rounding boundary or two singular values coincide; the digest shows it when it happens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privacy import prg
from privacy.errors import ConfigError, MachineError
from privacy.federation import Contract

GRID = 2.0**-20
"""Entries are multiples of this; it costs orthonormality about 1e-6."""

ORTHONORMAL_TO = 1e-5

WORDS_PER_NUMBER = 12
"""Uniform words whose sum is one nearly Gaussian number (variance 1): exact in integers, where log and cos are not."""

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(B, A): B ``(m, r)`` with orthonormal columns, A ``(r, n)`` with orthonormal rows."""


def factors(terms: Contract, name: str, weight: NDArray[np.floating]) -> Factors:
    """The factors of the module ``name``, whose weight is ``weight`` ``(out, in)``, by the basis that ``terms`` chose.

    Raises:
        ConfigError, MachineError: as ``weights_basis`` and ``random_basis``.
    """
    if terms.adapter.basis == "random":
        return random_basis(bytes.fromhex(terms.model.digest), name, weight.shape, terms.adapter.rank)
    return weights_basis(weight.astype(np.float64), terms.adapter.rank)


def weights_basis(weight: NDArray[np.float64], rank: int) -> Factors:
    """The top-``rank`` singular vectors (B ``(m, r)``, A ``(r, n)``), float32, of ``weight`` ``(m, n)`` float64.

    The largest entry of each column of B is positive (the first such entry where several are equal on the grid).
    Exact SVD: 0.1 s for 1536 × 384, minutes for 4096 × 11008. Source: LoRA-XS, arXiv 2405.17604.

    Raises:
        ConfigError: ``weight`` is no matrix, not finite, or ``rank`` is not in 1..min(m, n).
        MachineError: the SVD did not converge or is not orthonormal to 1e-5.
    """
    _check_rank(weight.shape, rank)
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
    _check_rank(shape, rank)
    m, n = shape
    context = model + struct.pack("<QQ", m, n) + name.encode()
    keys = [hashlib.sha256(b"siloquy/basis/random/1\x00" + letter + context).digest() for letter in (b"B", b"A")]
    left, right = (_on_grid(_orthonormal(_gaussian(key, rank, length))) for key, length in zip(keys, (m, n), strict=True))
    _check_orthonormal(left.T)
    _check_orthonormal(right.T)
    return np.ascontiguousarray(left.T, dtype=np.float32), right.astype(np.float32)


def digest(bases: Mapping[str, Factors]) -> bytes:
    """SHA-256 (32 bytes) over names, shapes and '<f4' bytes of ``bases`` in their order; what silos compare."""
    state = hashlib.sha256(b"siloquy/basis/1\x00")
    for name, factors in bases.items():
        encoded = name.encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
        for factor in factors:
            state.update(struct.pack("<QQ", *factor.shape) + factor.astype("<f4").tobytes(order="C"))
    return state.digest()


def _check_rank(shape: Sequence[int], rank: int) -> None:
    if len(shape) != 2 or not 1 <= rank <= min(shape):
        raise ConfigError(
            f"rank {rank} does not fit a weight of shape {tuple(shape)}", hint="choose adapter.rank between 1 and the smaller side"
        )


def _gaussian(key: bytes, count: int, length: int) -> NDArray[np.float64]:
    """``count`` vectors ``(count, length)`` of nearly Gaussian numbers; see ``random_basis``. Exact: sums are below 2**36."""
    stream, words = prg.Keystream(key), np.empty(WORDS_PER_NUMBER * length, dtype="<u4")
    rows = np.empty((count, length))
    for row in rows:
        stream.read_into(words)
        sums = words.reshape(WORDS_PER_NUMBER, length).sum(axis=0, dtype=np.int64)
        row[:] = (sums - WORDS_PER_NUMBER * (2**32 - 1) // 2) / 2.0**32
    return rows


def _orthonormal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Modified Gram-Schmidt of ``rows`` in order, in place: one IEEE operation after the other, no BLAS, no fused step."""
    for index in range(len(rows)):
        row, rest = rows[index], rows[index + 1 :]
        row /= np.sqrt(_dot(row, row))
        rest -= _dot(rest, row)[:, None] * row
    return rows


def _dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products summed along the last axis by halves: numpy's own sum and BLAS choose an order by machine."""
    terms = left * right
    while (size := terms.shape[-1]) > 1:
        half = -(-size // 2)
        terms[..., : size - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0]


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
