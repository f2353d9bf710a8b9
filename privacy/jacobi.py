# SPDX-License-Identifier: Apache-2.0
"""The leading singular vectors of a matrix, to the same bits on every machine whose arithmetic is IEEE 754.

Householder's QR, then the one-sided Jacobi method (Hestenes 1958), made of separate + − × ÷ √ in a stated order and of sums by
halves (``privacy.orthonormal.dot``): no BLAS, no LAPACK, no fused step, no random number. So a verifier computes what a silo
computed, without its machine. Promised: the bits depend on the values of the entries and the rank alone, not on strides or on the
machine; no overflow for any finite input; orthonormal to 1e-7. Not promised: speed near LAPACK's (a sketch of 14336 × 128 takes
seconds), or a choice among directions whose singular values coincide other than a fixed one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError, MachineError
from privacy.orthonormal import dot

Reflections = list[tuple[NDArray[np.float64], NDArray[np.float64]]]

MOST_SWEEPS = 40
CLOSE = 2.0**-26
"""A sweep that met no larger cosine than this is the last: its own rotations square what is left."""
NEGLIGIBLE = 2.0**-45
"""A column shorter than this part of the longest is rounding: it is left alone, and its direction is never given out."""
LEAST = 2.0**-26
"""A direction below this part of the strongest is no direction."""


def left_vectors(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """The ``rank`` leading left singular vectors of ``matrix`` ``(m, n)`` as rows ``(rank, m)``, the strongest first; signs open.

    1. *Scale*: all entries are divided by the power of two just above the largest, which is exact.
    2. *QR*: where m > n the matrix is replaced by its R (n, n). What is there then is replaced by the transpose of the R of its
       transpose, which is square and has the same left vectors. For column k's part x from row k on, v = x + sign(x₁)·‖x‖·e₁ with
       sign(0) = 1, R's entry is −sign(x₁)·‖x‖, and the same part y of each later column becomes y − (2·(y·v)/(v·v))·v. A column
       of zeros is passed over.
    3. *Sweeps* over the columns, the longest first (equals by place), with columns of zeros to an even number of at least 4. In a
       round of the tournament column i meets column N − 1 − i; then the first stays and the others go on by one place, the last
       to the second. A pair p, q with w = p·q ≠ 0 is turned: ζ = (q·q − p·p)/(2·w), t = sign(ζ)/(|ζ| + √(1 + ζ·ζ)) with
       sign(0) = 1, h = √(1 + t·t), p ← (p − t·q)/h, q ← h·q + t·p. The squared lengths are taken at the start of a sweep; a turn
       takes t·w from p's and gives it to q's. A pair one of which has a squared length of at most 2⁻⁹⁰ of the largest is left.
    4. *Stop*: after the first sweep of N − 1 rounds that met no |cosine| above 2⁻²⁶.
    5. *Order*: by length, the longest first, equals by place. A left vector is its column by its length, and where m > n the
       reflections of the first R follow in the reverse order.

    Raises:
        ConfigError: no matrix of finite float64, rank not in 1..min(m, n); or ``basis-too-flat``: the matrix is zero, or its
            rank-th singular value is below 2⁻²⁶ of the first.
        MachineError: 40 sweeps were not enough.
    """
    scaled = _scaled(matrix, rank)
    m, n = scaled.shape
    if m <= n:
        return _strongest(scaled, rank)
    triangle, reflections = _triangle(scaled.T.copy())
    return _reflected(_strongest(triangle.T.copy(), rank), m, reflections)


def singular_vectors(matrix: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(left ``(rank, m)``, right ``(rank, n)``), the leading singular vectors of ``matrix`` ``(m, n)`` as rows, in pairs.

    The left ones as in ``left_vectors``; a right one is its left one times the matrix after step 1 (each entry a ``dot``
    over m), by its length. Orthonormal to 1e-7.

    Raises:
        ConfigError, MachineError: as ``left_vectors``.
    """
    left, columns = left_vectors(matrix, rank), _scaled(matrix, rank).T.copy()
    right = np.stack([dot(columns, vector) for vector in left])
    return left, right / np.sqrt(dot(right, right))[:, None]


def _scaled(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    if matrix.ndim != 2 or matrix.dtype != np.float64 or not 1 <= rank <= min(matrix.shape):
        raise ConfigError(
            f"rank {rank} of a {matrix.dtype} array of shape {matrix.shape}", hint="choose a rank between 1 and the smaller side"
        )
    largest = float(np.abs(matrix).max())
    if not np.isfinite(largest):
        raise ConfigError("a gradient holds a value that is not finite", hint="compute it again from finite numbers")
    if largest == 0.0:
        raise _flat(0, rank)
    exponent = int(np.frexp(largest)[1])
    # In two steps: a power of two beyond 2**1023 is not a float.
    return np.ascontiguousarray(np.ldexp(np.ldexp(matrix, -(exponent // 2)), exponent // 2 - exponent))


def _triangle(columns: NDArray[np.float64]) -> tuple[NDArray[np.float64], Reflections]:
    """R's columns as rows ``(n, n)``, and the reflections, of the matrix whose columns are the rows ``(n, m)``; in place."""
    count, reflections = len(columns), []
    for k in range(count):
        column, rest = columns[k, k:], columns[k + 1 :, k:]
        norm = np.sqrt(dot(column, column))
        v = column.copy()
        v[0] += norm if v[0] >= 0 else -norm
        square = dot(v, v)
        if square > 0:
            rest -= (2.0 * dot(rest, v) / square)[:, None] * v
            column[0], column[1:] = -norm if column[0] >= 0 else norm, 0.0
        reflections.append((v, square))
    return columns[:, :count].copy(), reflections


def _reflected(rows: NDArray[np.float64], length: int, reflections: Reflections) -> NDArray[np.float64]:
    """The rows ``(r, n)``, filled with zeros to ``length``, after all reflections, the last first."""
    whole = np.zeros((len(rows), length))
    whole[:, : rows.shape[1]] = rows
    for k in range(len(reflections) - 1, -1, -1):
        v, square = reflections[k]
        if square > 0:
            part = whole[:, k:]
            part -= (2.0 * dot(part, v) / square)[:, None] * v
    return whole


def _strongest(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """The ``rank`` leading left singular vectors, as rows, of a matrix that is not taller than wide; it is overwritten."""
    triangle, _ = _triangle(matrix)
    turned = _turned(np.ascontiguousarray(triangle.T))
    norms = np.sqrt(dot(turned, turned))
    order = np.argsort(-norms, kind="stable")
    strong = int((norms >= LEAST * norms[order[0]]).sum())
    if strong < rank:
        raise _flat(strong, rank)
    chosen = order[:rank]
    return turned[chosen] / norms[chosen, None]


def _turned(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pairwise orthogonal columns (as rows, padded to an even number, at least four) that span what ``columns`` span."""
    count, length = columns.shape
    half = max(2, -(-count // 2))
    lengths = dot(columns, columns)
    work = np.zeros((2 * half, length))
    work[:count] = columns[np.argsort(-lengths, kind="stable")]
    floor = NEGLIGIBLE**2 * float(lengths.max())
    pairs = _Pairs(work[:half].copy(), work[half:][::-1].copy())
    for _ in range(MOST_SWEEPS):
        if pairs.sweep(floor) <= CLOSE:
            return np.concatenate([pairs.top, pairs.bottom[::-1]])
    raise MachineError(f"Jacobi's method did not end in {MOST_SWEEPS} sweeps", hint="report the basis that was asked for")


class _Pairs:
    """The columns in a round of the tournament: row i of ``top`` meets row i of ``bottom``, both ``(pairs, length)``."""

    def __init__(self, top: NDArray[np.float64], bottom: NDArray[np.float64]) -> None:
        self.top, self.bottom = top, bottom
        self._spare = (np.empty_like(top), np.empty_like(bottom))
        self._product = np.empty_like(top)

    def sweep(self, floor: float) -> float:
        """Every pair once; the largest |cosine| met. Squared lengths are taken once, and then follow the turns."""
        p, q, worst = dot(self.top, self.top), dot(self.bottom, self.bottom), 0.0
        for _ in range(2 * len(self.top) - 1):
            worst = max(worst, self._turn(p, q, floor))
            self._move_on()
            p, q = np.concatenate([p[:1], q[:1], p[1:-1]]), np.concatenate([q[1:], p[-1:]])
        return worst

    def _turn(self, p: NDArray[np.float64], q: NDArray[np.float64], floor: float) -> float:
        """Turns each pair until it is orthogonal; ``p`` and ``q``, its squared lengths, follow."""
        along = dot(self.top, self.bottom)
        along[(p <= floor) | (q <= floor)] = 0.0
        turning = along != 0.0
        if not turning.any():
            return 0.0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            cosines = np.abs(along) / (np.sqrt(p) * np.sqrt(q))
            zeta = (q - p) / (2.0 * along)
            t = np.where(zeta >= 0, 1.0, -1.0) / (np.abs(zeta) + np.sqrt(1.0 + zeta * zeta))
        t = np.where(turning, t, 0.0)
        h = np.sqrt(1.0 + t * t)
        p -= t * along
        q += t * along
        top, bottom, product, t, h = self.top, self.bottom, self._product, t[:, None], h[:, None]
        np.multiply(bottom, t, out=product)
        top -= product
        top /= h
        bottom *= h
        np.multiply(top, t, out=product)
        bottom += product
        return float(cosines[turning].max())

    def _move_on(self) -> None:
        """The next round: the first of ``top`` stays, the others go round clockwise."""
        top, bottom = self._spare
        top[0], top[1], top[2:] = self.top[0], self.bottom[0], self.top[1:-1]
        bottom[:-1], bottom[-1] = self.bottom[1:], self.top[-1]
        self._spare, self.top, self.bottom = (self.top, self.bottom), top, bottom


def _flat(strong: int, rank: int) -> ConfigError:
    return ConfigError(
        f"a gradient has {strong} directions, a basis of rank {rank} needs {rank}",
        hint="choose a smaller adapter.rank, more records, or leave the module out of adapter.modules",
        code="basis-too-flat", found=strong, expected=rank,
    )  # fmt: skip
