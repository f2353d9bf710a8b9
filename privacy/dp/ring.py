# SPDX-License-Identifier: Apache-2.0
"""The integers of one round: how fine the lattice is, how much noise a silo adds, and that no sum leaves the ring 2**32.

:func:`plan` decides everything before any record is read; after it, encoding never refuses. Promised: a sum of at most
``silos`` encoded vectors lifts to the exact integer sum unless the noise passes its head-room (probability at most 2·e⁻⁷² per
coordinate, a loss of utility and never of privacy). Not promised: that a *malicious* silo stays in range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from privacy.dp.noise import MAX_VARIANCE
from privacy.errors import ConfigError, SiloquyError

RING_LIMIT = (1 << 31) - 1
MOST_LATTICE_BITS = 20
MOST_SQUARE_BITS = 62
"""2p + ⌈log₂ d⌉ at most: the sum of d squares of a lattice vector then fits int64."""
LEAST_SHARE_VARIANCE = 64**2

_FEWER = "fewer units per round (sampling_rate, units), a smaller noise_multiplier, or fewer silos"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The integer constants of a round, the same in every silo.

    Attributes:
        lattice_bits: p; the max grad norm C is 2**p lattice units.
        share_variance: s², the parameter of the discrete Gaussian that each silo adds, in lattice units squared; 0 without noise.
        clamp: Q; each coordinate of a silo's noiseless sum is clamped to [−Q, Q].
        headroom: H = ⌈12·s·√n⌉, kept free for the noise of all silos.
        silos: n, the largest number of vectors in one sum.
    """

    lattice_bits: int
    share_variance: int
    clamp: int
    headroom: int
    silos: int


def plan(
    *, silos: int, shares: int, dimension: int, sampling_rate: float, units: int, noise_multiplier: float,
    lattice_bits: int | None = None,
) -> Plan:
    """The plan of a round, or the reason why there is none.

    s² = ⌈σ²·4^p / shares⌉, H = ⌈12·s·√n⌉, Q = ⌊(2³¹ − 1 − H)/n⌋, B₊ = q·units + 6·√(q·units). Without ``lattice_bits``, p is the
    largest from 20 down with 2^p·B₊ ≤ Q, 2p + ⌈log₂ d⌉ ≤ 62 and s² ≤ 2⁴⁸; a given p is held to the same.

    Args:
        silos: n ≥ 1.
        shares: honest noise shares that every guaranteed sum holds, in [1, n]; 1 for ``local``.
        dimension: d ≥ 1, all trainables together.
        sampling_rate: q in (0, 1].
        units: the rounded public number of units of the largest silo, ≥ 1.
        noise_multiplier: σ ≥ 0 of the guarantee; 0 turns noise off (s² = H = 0, and s ≥ 64 is not asked for).
        lattice_bits: p of the contract, to be checked; None to choose it.

    Formal guarantees:
        - *No overflow*: n·Q + H ≤ 2³¹ − 1, and 2^p·B₊ ≤ Q: an ordinary silo sum is not clamped.
        - *Enough noise*: shares·s² ≥ σ²·4^p: rounding only ever adds noise. s ≥ 64, as the convolution lemma needs.
        - *Fine enough*: p ≥ ½·log₂ d + 6, so truncation costs at most 0.7 % of a clipped norm.
        - *Same everywhere*: decided in exact integers and fractions; no platform rounds differently.

    Raises:
        ConfigError: a parameter is out of range, NaN or infinite, or no p (or not the given one) satisfies the conditions.
    """
    _check_counts(silos=silos, shares=shares, dimension=dimension, units=units)
    _check_rates(silos=silos, shares=shares, sampling_rate=sampling_rate, noise_multiplier=noise_multiplier)
    if lattice_bits is not None:
        _check_counts(lattice_bits=lattice_bits)
        if lattice_bits > MOST_LATTICE_BITS:
            raise _refusal(f"lattice_bits = {lattice_bits}, at most {MOST_LATTICE_BITS} are used", "leave it out to have it chosen")
    expected = Fraction(sampling_rate) * units
    square = Fraction(noise_multiplier) ** 2 / shares
    candidates = range(MOST_LATTICE_BITS, 0, -1) if lattice_bits is None else (lattice_bits,)
    plans = [_at(bits, square, silos) for bits in candidates]
    chosen = next((each for each in plans if _too_fine(each, dimension, expected) is None), plans[-1])
    refusal = _too_fine(chosen, dimension, expected) or _too_coarse(chosen, dimension)
    if refusal is not None:
        raise refusal
    return chosen


def clamp(total: NDArray[np.int64], plan: Plan) -> NDArray[np.int64]:
    """A silo's noiseless sum (d,), each coordinate clamped to [−Q, Q]; a new array.

    Formal guarantees:
        - *1-Lipschitz*: no coordinate of the difference of two sums grows, so the sensitivity stays what it was.
        - *Before noise only*: clamping after noise would break the guarantee; there is no function for it.

    Raises:
        SiloquyError: ``total`` is not int64.
    """
    _check_integers(total)
    return np.clip(total, -plan.clamp, plan.clamp)


def encode(clamped: NDArray[np.int64], noise: NDArray[np.int64]) -> NDArray[np.uint32]:
    """(sum + noise) mod 2³² as ``<u4`` (d,): what a silo masks.

    Formal guarantees:
        - *Never refused for its values*: any noise is reduced modulo 2³², which is post-processing; nothing is redrawn or cut.
        - *One noise per coordinate*: shapes must be equal; one draw is never spread over several coordinates.

    Raises:
        SiloquyError: an array is not int64, or the shapes differ. Depends on types and shapes alone.
    """
    _check_integers(clamped)
    _check_integers(noise)
    if clamped.shape != noise.shape:
        raise SiloquyError(f"noise of shape {noise.shape} for a sum of shape {clamped.shape}: every coordinate has its own")
    return (clamped + noise).astype("<u4")


def lift(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The integers in [−2³¹, 2³¹) that ``words`` (``<u4``) stand for; the exact sum when the true one lies there.

    Raises:
        SiloquyError: ``words`` is not ``<u4``.
    """
    if words.dtype != np.dtype("<u4"):
        raise SiloquyError(f"ring words are <u4, not {words.dtype}")
    return words.view("<i4").astype(np.int64)


def _at(bits: int, square: Fraction, silos: int) -> Plan:
    """The plan at p = ``bits``, not yet checked; ``square`` is σ²/shares."""
    variance = math.ceil(square * 4**bits)
    headroom = _ceil_sqrt(144 * variance * silos)
    return Plan(lattice_bits=bits, share_variance=variance, clamp=(RING_LIMIT - headroom) // silos, headroom=headroom, silos=silos)


def _too_fine(chosen: Plan, dimension: int, expected: Fraction) -> ConfigError | None:
    """Why p is too large for ``dimension`` and ``expected`` = q·units, or None."""
    p, ring_part = chosen.lattice_bits, chosen.clamp
    square_bits = 2 * p + _log2_up(dimension)
    if square_bits > MOST_SQUARE_BITS:
        return _refusal(f"2·lattice_bits + log2(d) = {square_bits}, at most {MOST_SQUARE_BITS} fits int64", "a lower rank")
    if chosen.share_variance > MAX_VARIANCE:
        return _refusal(
            f"noise of s² near 2^{chosen.share_variance.bit_length()} per silo at lattice_bits = {p}, the sampler takes 2^48",
            "a smaller noise_multiplier, or fewer lattice_bits",
        )
    # 2^p·(e + 6√e) ≤ Q, squared so that no root is rounded.
    room = Fraction(ring_part, 2**p) - expected
    if room < 0 or room**2 < 36 * expected:
        largest = 2**p * (float(expected) + 6 * math.sqrt(expected))
        return _refusal(f"a silo's sum may reach {largest:.4g} at lattice_bits = {p}, the ring leaves {ring_part} per silo", _FEWER)
    return None


def _too_coarse(chosen: Plan, dimension: int) -> ConfigError | None:
    """Why p or s is too small, or None."""
    p, variance = chosen.lattice_bits, chosen.share_variance
    # p ≥ ½·log₂ d + 6 is 4^(p − 6) ≥ d.
    if 4**p < dimension * 4**6:
        least = -(-_log2_up(dimension) // 2) + 6
        return _refusal(f"lattice_bits = {p}, dimension {dimension} needs at least {least}", f"a lower rank, or {_FEWER}")
    if 0 < variance < LEAST_SHARE_VARIANCE:
        s, hint = math.sqrt(variance), "a larger noise_multiplier, or more lattice_bits"
        return _refusal(f"noise of s = {s:.4g} lattice units per silo, the proof needs at least 64", hint)
    return None


def _check_rates(*, silos: int, shares: int, sampling_rate: float, noise_multiplier: float) -> None:
    if shares > silos:
        raise _refusal(f"{shares} honest noise shares of {silos} silos", "shares is at most the number of silos")
    if not 0 < sampling_rate <= 1:
        raise _refusal(f"sampling rate {sampling_rate}, it lies in (0, 1]", "write the share of units that a round samples")
    if not 0 <= noise_multiplier < math.inf:
        raise _refusal(f"noise multiplier {noise_multiplier}, it is finite and not negative", "0 turns the noise off")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _refusal(f"{name} = {value!r}, it is an integer from 1", "mend it in the contract's draft")


def _check_integers(values: NDArray[np.int64]) -> None:
    if values.dtype != np.dtype(np.int64):
        raise SiloquyError(f"lattice values are int64, not {values.dtype}")


def _ceil_sqrt(value: int) -> int:
    return math.isqrt(value - 1) + 1 if value > 0 else 0


def _log2_up(value: int) -> int:
    return (value - 1).bit_length()


def _refusal(what: str, hint: str) -> ConfigError:
    return ConfigError(f"the round does not fit the ring: {what}", hint=hint, code="ring-plan")
