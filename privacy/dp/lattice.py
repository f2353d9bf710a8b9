# SPDX-License-Identifier: Apache-2.0
"""Per-unit gradients in, clipped integer vectors out: the sensitivity of one unit, proved on integers.

One row of the input is the summed gradient of one privacy unit over *all* trainables. Its integer image has an L2 norm of
at most 2^p lattice units, which is the clipping bound C in units of gamma = C/2^p (Abadi et al. 2016 for the clip). The
proof does not rest on any float: it is an integer comparison on the result, made for every unit.

Promised: each output row is a function of its input row alone, on any kernel and any number of threads, because only
elementwise operations touch it. Not promised: that the *input* row is a function of the unit alone; that is the business of
``silo/learning/gradients.py`` and its start-up test. The one torch file of ``privacy``.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from privacy.errors import ConfigError

SHRINK = 1 - 2**-10
"""The factor of one retry when rounding left a row above the bound."""

MAX_SHRINKS = 8

_CHUNK_ENTRIES = 1 << 20  # 8 MiB per float64 temporary


def to_lattice(gradients: Tensor, *, max_grad_norm: float, lattice_bits: int) -> Tensor:
    """Integer vectors ``(U, d)`` int64 of the per-unit ``gradients`` ``(U, d)`` float32, each of L2 norm at most 2^p.

    A row g becomes trunc(g · min(1, C/‖g‖) / gamma) with gamma = C/2^p, all in float64, truncated toward zero.

    Args:
        gradients: one row per privacy unit, its per-record gradients already summed.
        max_grad_norm: C.
        lattice_bits: p. Truncation loses at most 0.7 % of a random direction when p ≥ ½·log2(d) + 6.

    Formal guarantees, for every row and whatever its bits are:

    1. −2^p ≤ z_j ≤ 2^p for every entry and Σ z_j² ≤ 4^p, both checked on int64 without overflow.
    2. The row of z depends on the same row of ``gradients`` only.
    3. Adding or removing a row changes ``sum_lattice`` by a vector of L2 norm at most 2^p (from 1 and 2).

    ==================================  ===========================================================================
    row                                 result
    ==================================  ===========================================================================
    a NaN or an infinite entry          the zero vector
    all zeros, also −0.0                the zero vector
    norm above C                        scaled down to C; the direction stays
    norm at most C                      not scaled, only truncated
    entries near the float32 limit      as any other: squares are summed in float64, which cannot overflow
    denormal entries                    as any other; they truncate to 0 unless C is as small
    rounding leaves Σ z² above 4^p      multiplied by 1 − 2⁻¹⁰ and truncated again, at most 8 times, then zero
    no rows                             an empty ``(0, d)`` tensor
    ==================================  ===========================================================================

    Raises:
        ConfigError: not float32 of two dimensions; C not a positive float with a normal C/2^p; p < 1; or
            2p + ⌈log2 d⌉ > 62, beyond which Σ z² could wrap and the proof would mean nothing.
    """
    _check_terms(gradients, max_grad_norm, lattice_bits)
    gamma = max_grad_norm / 2**lattice_bits
    integers = torch.empty(gradients.shape, dtype=torch.int64, device=gradients.device)
    rows_per_chunk = max(1, _CHUNK_ENTRIES // max(1, gradients.shape[1]))
    for start in range(0, len(gradients), rows_per_chunk):
        rows = gradients[start : start + rows_per_chunk].detach().double()
        factors = (max_grad_norm / _squared_norms(rows).sqrt()).clamp(max=1.0)
        integers[start : start + rows_per_chunk] = _proved(rows * factors[:, None] / gamma, lattice_bits)
    return integers


def sum_lattice(integers: Tensor) -> Tensor:
    """The exact sum ``(d,)`` int64 of the rows of ``integers`` ``(U, d)``: integer addition, so order and grouping are free.

    Raises:
        ConfigError: not int64 of two dimensions.
    """
    if integers.dtype != torch.int64 or integers.ndim != 2:
        raise ConfigError(
            f"lattice vectors must be int64 (units, d), got {integers.dtype} {tuple(integers.shape)}",
            hint="pass what to_lattice returned",
        )
    return integers.sum(dim=0)


def _squared_norms(rows: Tensor) -> Tensor:
    """Σ_j rows_j² per row ``(u,)`` by folding halves; a library reduction may depend on the other rows or on threads."""
    squares = rows.square()
    while squares.shape[1] > 1:
        half = (squares.shape[1] + 1) // 2
        folded = squares[:, :half].clone()
        folded[:, : squares.shape[1] - half] += squares[:, half:]
        squares = folded
    return squares.sum(dim=1)  # one column, or none: nothing is left to add


def _proved(scaled: Tensor, lattice_bits: int) -> Tensor:
    """int64 truncations of float64 ``scaled`` ``(u, d)`` whose rows all satisfy ``_within``, by shrinking or by zeroing."""
    finite = torch.isfinite(scaled).all(dim=1, keepdim=True)
    scaled = torch.where(finite, scaled, 0.0)
    for _ in range(MAX_SHRINKS + 1):
        # Clamping comes before the cast: the cast of a float beyond int64 is undefined.
        integers = scaled.clamp(-(2.0**lattice_bits), 2.0**lattice_bits).trunc().to(torch.int64)
        within = _within(integers, lattice_bits)
        if bool(within.all()):
            return integers
        scaled = torch.where(within[:, None], scaled, scaled * SHRINK)
    return torch.where(within[:, None], integers, 0)


def _within(integers: Tensor, lattice_bits: int) -> Tensor:
    """Whether each row ``(u,)`` has entries within ±2^p (i) and Σ z² ≤ 4^p (ii). Without (i), (ii) could wrap."""
    bound = 2**lattice_bits
    bounded: Tensor = ((integers >= -bound) & (integers <= bound)).all(dim=1)
    short: Tensor = integers.square().sum(dim=1) <= bound**2
    return bounded.logical_and(short)


def _check_terms(gradients: Tensor, max_grad_norm: float, lattice_bits: int) -> None:
    if gradients.dtype != torch.float32 or gradients.ndim != 2:
        raise ConfigError(
            f"per-unit gradients must be float32 (units, d), got {gradients.dtype} {tuple(gradients.shape)}",
            hint="pass what unit_gradients returned",
        )
    if lattice_bits < 1 or not (math.isfinite(max_grad_norm) and max_grad_norm / 2**lattice_bits >= sys.float_info.min):
        raise ConfigError(
            f"max_grad_norm = {max_grad_norm!r} with lattice_bits = {lattice_bits} gives no usable lattice",
            hint="max_grad_norm must be positive and finite, lattice_bits at least 1",
        )
    width = 2 * lattice_bits + max(0, gradients.shape[1] - 1).bit_length()
    if width > 62:
        raise ConfigError(
            f"2·{lattice_bits} + ⌈log2 {gradients.shape[1]}⌉ = {width} bits exceed 62, so the norm cannot be proved on integers",
            hint="lower privacy.lattice_bits", code="lattice-too-wide",
        )  # fmt: skip
