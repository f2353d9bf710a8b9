# SPDX-License-Identifier: Apache-2.0
"""Exact discrete Gaussian noise: integers whose law is N_Z(0, s²), given uniform bits, with no rounding anywhere.

The sampler is the rejection of Canonne, Kamath, Steinke (arXiv 2004.00010, Algorithms 1 to 3), vectorised, its two successive
acceptance tests merged into one. With V = s², t = ⌈s⌉, a proposal is y = K·t + J, P(K = k) ∝ e⁻ᵏ, J uniform on {0, …, t − 1},
and a fair sign (minus zero refused). It is accepted with probability exp(−a/b), a = y² − 2VK + V, b = 2V:

- *Law*: e^(−K)·exp(−a/b) = exp(−y²/2V)·e^(−1/2), and every |y| has exactly one (K, J), so accepted values are N_Z(0, V).
- *A probability*: y ≥ Kt and t² ≥ V give y² ≥ VK², hence a ≥ V(K − 1)² ≥ 0. (For t² = V this is CKS's own rule.)

About 0.48 of the proposals are accepted. Each random comparison U < p reads FIRST_BITS bits of a uniform real U as a vector and
compares them with certified bounds of p; the undecided few (about 2⁻³⁸) read on, in Python integers, until the comparison is
certain. Floats only ever *postpone* a decision: see :func:`_exp_minus`.

Not promised: constant time or a constant number of bits read (both depend on the values drawn), or quality of the bits.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError, MachineError, SiloquyError
from privacy.prg import Randomness

MAX_VARIANCE = 1 << 48
FIRST_BITS = 53
"""Bits of a uniform real that are read at once; at most 53, so that float64 holds them exactly."""

_CHUNK = 1 << 14
_CELLS = 64  # table cells per unit of the exponent
_WIDEST_BLOCK = 63
_MARGIN = 2.0**-40
_MOST_BITS = 4096


def discrete_gaussian(count: int, variance: int, randomness: Randomness) -> NDArray[np.int64]:
    """Noise of one release: ``count`` independent samples of N_Z(0, s²), P(y) ∝ exp(−y²/2s²), as int64 (count,).

    Args:
        count: how many.
        variance: s², the parameter of the law, an integer in [1, 2**48]. (The variance itself is at most s², and less than
            s² by under 3e-7 of it.)
        randomness: where the bits come from; a fresh ``Randomness.from_os()`` for anything that is released.

    Formal guarantees:
        - *Exact*: if the bits are uniform and independent, the law of the result is N_Z(0, s²)^count exactly. No decision
          rests on an uncertified float.
        - *Independent*: samples are independent of each other and of everything but ``randomness``; global generators have
          no influence, and bits are never used twice.
        - *Unbounded*: nothing is truncated. An event of probability below 2⁻⁴⁰⁰⁰ per sample, on which a comparison is still
          open after 4096 bits, raises instead: the bits are not random then.
        - *Replayable*: the result is a function of the bits alone, the same on every IEEE 754 machine.
        - *Widths*: every intermediate of the vector path is below 2**62 in magnitude.

    Edge cases:
        ``count`` = 0 gives an empty array and reads no bit.

    Raises:
        ConfigError: ``count`` is negative, or ``variance`` is no integer in [1, 2**48].
        MachineError: a comparison stayed open for 4096 bits (dead random source).
    """
    _check(count, variance)
    samples = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        size = min(_CHUNK, 2 * (count - done) + 64)
        accepted = _accepted_proposals(size, variance, randomness)[: count - done]
        samples[done : done + accepted.size] = accepted
        done += accepted.size
    return samples


def exp_bounds(a: int, b: int, bits: int) -> tuple[int, int]:
    """Integers ``lo ≤ exp(−a/b)·2**bits ≤ hi`` with ``hi − lo ≤ 2``, for ``a ≥ 0``, ``b > 0``, ``bits ≥ 0``.

    Rigorous: integers only, every division rounded outwards. With x = a/(b·2ᵏ) < 1/2, partial sums of Σ(−x)ⁱ/i! enclose e⁻ˣ
    (alternating, terms decreasing), and k squarings of the enclosure give e^(−a/b). A term costs a few units of the working
    precision and a squaring at most doubles the width: 2k + 64 guard bits leave less than one unit of 2^−bits.
    """
    halvings = (a // b).bit_length() + 1
    precision = bits + 2 * halvings + 64
    one = 1 << precision
    divisor = b << halvings
    low = high = one
    term_low = term_high = one
    index = 0
    while term_high > 1:
        index += 1
        term_low = term_low * a // (divisor * index)
        term_high = -(-term_high * a // (divisor * index))
        low, high = (low - term_high, high - term_low) if index % 2 else (low + term_low, high + term_high)
    # The first omitted term is at most the last one, which is at most one unit.
    low, high = max(low - 1, 0), min(high + 1, one)
    for _ in range(halvings):
        low, high = low * low >> precision, min((high * high >> precision) + 1, one)
    return low >> (precision - bits), -(-high >> (precision - bits))


class RevealedUniform:
    """A uniform real U in [0, 1) of which a prefix is known; comparisons read further bits only when they must.

    Formal guarantees:
        - *Exact*: ``below_exp(a, b)`` is U < exp(−a/b), for any integers a ≥ 0, b > 0, whatever prefix is known.
        - *One real*: several comparisons of one object are about the same U.

    Args:
        prefix: the first ``bits`` bits of U, as an integer.
        bits: how many bits ``prefix`` has.
        randomness: where further bits come from.
    """

    def __init__(self, prefix: int, bits: int, randomness: Randomness) -> None:
        self._prefix = prefix
        self._bits = bits
        self._randomness = randomness

    def below_exp(self, a: int, b: int) -> bool:
        """Whether U < exp(−a/b).

        Raises:
            MachineError: still open after 4096 bits.
        """
        while True:
            low, high = exp_bounds(a, b, self._bits)
            if self._prefix < low:
                return True
            if self._prefix >= high:
                return False
            self._read_on()

    def geometric(self) -> int:
        """K with P(K ≥ k) = e⁻ᵏ: the number of k ≥ 1 with U < e⁻ᵏ. Raises as :meth:`below_exp` does."""
        k = 0
        while self.below_exp(k + 1, 1):
            k += 1
        return k

    def _read_on(self) -> None:
        if self._bits > _MOST_BITS:
            raise MachineError(
                f"a random comparison is still open after {self._bits} bits, the limit is {_MOST_BITS}: the bits are not random",
                hint="stop using this machine for private training and check its random source", code="dead-randomness",
            )
        self._prefix = self._prefix << 64 | int(self._randomness.uint64(1)[0])
        self._bits += 64


def _accepted_proposals(size: int, variance: int, randomness: Randomness) -> NDArray[np.int64]:
    """The accepted ones of ``size`` independent proposals, in order. See the module docstring for the rule."""
    words = randomness.uint64(3 * size).reshape(3, size)
    scale = math.isqrt(variance - 1) + 1
    block = _geometric(words[0], randomness)
    offset, valid = _uniform_below(scale, words[1] >> np.uint64(1))
    negative = (words[1] & np.uint64(1)).astype(np.bool_)
    y: NDArray[np.int64] = block * scale + offset
    keep: NDArray[np.bool_] = _accept(y, block, variance, words[2], randomness) & valid & ~((y == 0) & negative)
    np.negative(y, out=y, where=negative)
    return y[keep]


def _geometric(words: NDArray[np.uint64], randomness: Randomness) -> NDArray[np.int64]:
    """K per word, P(K ≥ k) = e⁻ᵏ, by comparing one uniform real with e⁻¹, e⁻², …

    A prefix below (above) ⌊e⁻ᵏ·2^bits⌋ decides U < e⁻ᵏ (U > e⁻ᵏ); an equal one is open and read on exactly. The table ends
    with the first entry 0, so a zero prefix, open for all later k, is among the equal ones.
    """
    floors = _geometric_floors(FIRST_BITS)
    prefix = words >> np.uint64(64 - FIRST_BITS)
    above = np.searchsorted(floors, prefix, side="right")
    blocks = (floors.size - above).astype(np.int64)
    for index in np.flatnonzero(floors[above - 1] == prefix):
        blocks[index] = RevealedUniform(int(prefix[index]), FIRST_BITS, randomness).geometric()
    return blocks


def _uniform_below(bound: int, words: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """63-bit words modulo ``bound``, and whether each may be used: words of the last, incomplete run may not."""
    quotient = words // np.uint64(bound)
    remainder = words - quotient * np.uint64(bound)
    return remainder.astype(np.int64), quotient < np.uint64((1 << 63) // bound)


def _accept(
    y: NDArray[np.int64], block: NDArray[np.int64], variance: int, words: NDArray[np.uint64], randomness: Randomness
) -> NDArray[np.bool_]:
    """Per proposal, whether U < exp(−a/b), a = y² − 2VK + V, b = 2V; exact.

    Widths, for K ≤ 63 and V ≤ 2⁴⁸: t ≤ 2²⁴, y < 2³⁰, y² < 2⁶⁰, 2VK < 2⁵⁵. Proposals with a larger K (probability e⁻⁶⁴), whose
    int64 products may wrap (and are clipped in :func:`_exp_minus`), are always decided in Python integers.
    """
    prefix = (words >> np.uint64(64 - FIRST_BITS)).astype(np.float64)
    exponent = (y * y - (2 * variance) * block + variance) / float(2 * variance)
    estimate = _exp_minus(exponent) * 2.0**FIRST_BITS
    accepted = prefix + 1.0 <= estimate * (1.0 - _MARGIN)
    refused = prefix >= estimate * (1.0 + _MARGIN)
    for index in np.flatnonzero((accepted == refused) | (block > _WIDEST_BLOCK)):
        k, distance = int(block[index]), int(y[index])
        uniform = RevealedUniform(int(prefix[index]), FIRST_BITS, randomness)
        accepted[index] = uniform.below_exp(distance * distance - 2 * variance * k + variance, 2 * variance)
    return accepted


def _exp_minus(exponent: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(−x) for float64 x ≥ 0, within a relative 2⁻⁴⁴, from IEEE 754 +, −, × and a certified table alone.

    *Why certified*: let x̂ = a/b as :func:`_accept` forms it from exact int64 and exact b. Its conversion and division are off by
    a relative 2.01·2⁻⁵³, so for x < 64 by 2⁻⁴⁶ at most. x̂ = i/64 + r, 0 ≤ r < 1/64, is exact (scaling by 64 and dropping leading
    bits). The table holds e^(−i/64) from :func:`exp_bounds`, within 2⁻⁵². The Taylor polynomial of degree 5 errs by at most
    r⁶/720 < 2⁻⁴⁵·⁴, relative to e⁻ʳ > 0.98; its evaluation and the product by less than 8·2⁻⁵³. Sum: below 2⁻⁴⁴. _MARGIN = 2⁻⁴⁰ is
    16 times wider and also covers the rounding of ±_MARGIN itself, and any other IEEE rounding mode. No libm is trusted.

    x beyond 64 − 1/64 is replaced by that: still an upper bound of exp(−x) below 2⁻⁹², and as a lower bound it is below one unit
    of 2⁻⁵³, so it never accepts: such x are refused, or open and decided exactly.
    """
    table = _exp_table()
    x = np.clip(exponent, 0.0, (table.size - 1) / _CELLS)
    cell = (x * _CELLS).astype(np.int64)
    r = x - cell * (1.0 / _CELLS)
    series: NDArray[np.float64] = 1.0 - r * (1.0 - r * (1 / 2 - r * (1 / 6 - r * (1 / 24 - r * (1 / 120)))))
    series *= table[cell]
    return series


@functools.cache
def _exp_table() -> NDArray[np.float64]:
    """e^(−i/64) for i = 0 … 4095, each within a relative 2⁻⁵²."""
    table = np.array([math.ldexp(exp_bounds(i, _CELLS, 160)[0], -160) for i in range(64 * _CELLS)], dtype=np.float64)
    table.flags.writeable = False
    return table


@functools.cache
def _geometric_floors(bits: int) -> NDArray[np.uint64]:
    """⌊e⁻ᵏ·2^bits⌋ for k = 1, 2, … up to the first 0, ascending."""
    floors: list[int] = []
    while not floors or floors[-1] > 0:
        low, high = (bound >> 128 for bound in exp_bounds(len(floors) + 1, 1, bits + 128))
        if low != high:
            raise SiloquyError(f"exp(-{len(floors) + 1}) is not known to {bits} bits: {low} and {high}")
        floors.append(low)
    return np.array(floors[::-1], dtype=np.uint64)


def _check(count: int, variance: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"cannot draw {count!r} noise samples: the count is an integer from 0", hint="check the dimension")
    if isinstance(variance, bool) or not isinstance(variance, int) or not 1 <= variance <= MAX_VARIANCE:
        raise ConfigError(
            f"noise variance {variance!r} in lattice units: the exact sampler takes an integer from 1 to 2**48",
            hint="lower lattice_bits or noise_multiplier", variance=str(variance),
        )
