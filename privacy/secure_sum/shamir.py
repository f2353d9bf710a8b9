# SPDX-License-Identifier: Apache-2.0
"""Shamir's secret sharing over GF(2⁸), byte by byte, for many 32-byte secrets at once.

Each byte of a secret is the constant term of a polynomial of degree threshold - 1 whose other coefficients are fresh random
bytes; share x holds its value at x. The field is GF(2)[z] mod z⁸ + z⁴ + z³ + z + 1 (0x11b), addition is XOR (Shamir 1979).

Promised: fewer than ``threshold`` shares of a secret are uniform bytes, independent of it; any ``threshold`` give it back.

**Not promised**: that shares are honest (a wrong one gives a wrong secret, silently: callers hold shares to Merkle roots and
secrets to commitments), or *constant time*. Tables are indexed by secret bytes, so a process that watches this machine's
caches may learn something of them. Silos and guardians compute on their own machines; the aggregator, which combines, is
given the secrets by the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import TrustError

Bytes = NDArray[np.uint8]

SECRET_BYTES: Final = 32
MOST_SHARES: Final = 255
"""x runs from 1 to 255; x = 0 would be the secret."""

_MODULUS: Final = 0x11B
_GENERATOR: Final = 3


def _products() -> Bytes:
    """The whole multiplication table (256, 256) of the field, built from powers of the generator z + 1."""
    powers, value = np.zeros(255, dtype=np.uint8), 1
    logs = np.zeros(256, dtype=np.int64)
    for exponent in range(255):
        powers[exponent], logs[value] = value, exponent
        value ^= value << 1
        value ^= _MODULUS if value & 0x100 else 0
    table: Bytes = powers[(logs[:, None] + logs[None, :]) % 255]
    table[0, :] = table[:, 0] = 0
    return table


_PRODUCT: Final = _products()


def multiply(a: int, b: int) -> int:
    """The product of two field elements, each 0 to 255."""
    return int(_PRODUCT[a, b])


def inverse(a: int) -> int:
    """1/a for a field element from 1 to 255.

    Raises:
        TrustError: ``a`` is 0.
    """
    if a == 0:
        raise _refused("zero has no inverse")
    return int(np.flatnonzero(_PRODUCT[a] == 1)[0])


def split(secrets: Bytes, *, threshold: int, count: int, random: Callable[[int], bytes] = os.urandom) -> Bytes:
    """Shares (count, m, 32) of ``secrets`` (m, 32), any ``threshold`` of which give them back; share k is taken at x = k + 1.

    **Formal guarantees**: *hiding*: any threshold - 1 shares of one secret are uniform and independent of all secrets, since
    every byte has coefficients of its own from ``random`` (the operating system; another source is for tests alone);
    *fresh*: nothing is remembered between calls, so two calls share the same secret in unrelated ways.

    Raises:
        TrustError: not 1 <= threshold <= count <= 255, or ``secrets`` is not (m, 32) uint8 with m >= 1.
    """
    if not 1 <= threshold <= count <= MOST_SHARES:
        raise _refused(f"{threshold} of {count} shares, wanted 1 <= threshold <= count <= {MOST_SHARES}")
    if secrets.dtype != np.uint8 or secrets.ndim != 2 or secrets.shape[1] != SECRET_BYTES or not len(secrets):
        raise _refused(f"secrets are {secrets.dtype} of shape {secrets.shape}, wanted uint8 of (m, {SECRET_BYTES})")
    shape = (threshold - 1, *secrets.shape)
    raw = random(shape[0] * shape[1] * shape[2])
    coefficients = np.frombuffer(raw, dtype=np.uint8).reshape(shape)
    shares = np.empty((count, *secrets.shape), dtype=np.uint8)
    for x, share in enumerate(shares, start=1):
        share[:] = _at(x, secrets, coefficients)
    return shares


def combine(positions: Sequence[int], shares: Sequence[Bytes]) -> Bytes:
    """The secrets (m, 32) from shares (m, 32) at these positions (x = position + 1); all given shares are used.

    **Formal guarantees**: *exact*: with at least ``threshold`` honest shares at distinct positions, the very secrets that were
    split. With fewer, or a changed one, the result says nothing and no error is raised.

    Raises:
        TrustError: no share, a position twice or outside 0 to 254, or shares of different shapes.
    """
    if not positions or len(positions) != len(shares) or len(set(positions)) != len(positions):
        raise _refused(f"{len(shares)} shares at positions {list(positions)}: each position once, and at least one")
    if any(not 0 <= position < MOST_SHARES for position in positions):
        raise _refused(f"positions {list(positions)} are not within 0 to {MOST_SHARES - 1}")
    if any(share.dtype != np.uint8 or share.shape != shares[0].shape for share in shares):
        raise _refused(f"shares of shapes {sorted({share.shape for share in shares})}")
    points = [position + 1 for position in positions]
    secrets = np.zeros_like(shares[0])
    for x, share in zip(points, shares, strict=True):
        secrets ^= _PRODUCT[_weight(x, points)][share]
    return secrets


def _at(x: int, secrets: Bytes, coefficients: Bytes) -> Bytes:
    """The polynomials' values at ``x``, by Horner's rule from the highest coefficient down."""
    row, value = _PRODUCT[x], np.zeros_like(secrets)
    for coefficient in coefficients:
        value = row[value ^ coefficient]
    return value ^ secrets


def _weight(x: int, points: Sequence[int]) -> int:
    """Lagrange's weight of the share at ``x`` for the value at 0: the product of other/(other - x); minus is XOR."""
    weight = 1
    for other in points:
        if other != x:
            weight = multiply(weight, multiply(other, inverse(other ^ x)))
    return weight


def _refused(what: str) -> TrustError:
    return TrustError(f"secret sharing refused: {what}", hint="the contract or the caller is faulty", code="shamir")
