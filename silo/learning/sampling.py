# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling of privacy units: who takes part in one step, decided by private bits alone.

Promised: each unit is in the sample independently, with one fixed probability never above q. Not promised: any sample size.
A sample is never truncated, padded or redrawn, for memory or otherwise; the accountant's amplification rests on that.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ConfigError

_WORD = 1 << 64


class Words(Protocol):
    """Where the bits come from: privacy.prg.Randomness in every release."""

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """``count`` independent words, uniform on [0, 2⁶⁴)."""
        ...


def threshold(rate: float) -> int:
    """⌊q·2⁶⁴⌋ of the exact binary value of ``rate``, in integer arithmetic.

    Raises:
        ConfigError: ``rate`` is not in (0, 1].
    """
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"a sampling rate lies in (0, 1], found {rate}", hint="mend privacy.sampling_rate in the contract")
    numerator, denominator = rate.as_integer_ratio()
    return numerator * _WORD // denominator


def poisson(units_count: int, rate: float, randomness: Words) -> NDArray[np.int64]:
    """The indices, ascending, of the units that take part in this attempt.

    Args:
        units_count: how many units the silo holds; private, so the result's length never leaves the silo.
        rate: q of the contract.
        randomness: fresh for every attempt.

    Formal guarantees:
        - *Independent and exact*: unit i is in the sample iff its own 64-bit word is below ⌊q·2⁶⁴⌋, so its probability is
          ⌊q·2⁶⁴⌋/2⁶⁴: at most q and less than 2⁻⁶⁴ below it. No float is compared.
        - *Every unit draws one word*: the number of words used depends on ``units_count`` only.
        - *Never truncated*: any subset can occur.

    ====================  =====================================
    case                  result
    ====================  =====================================
    q = 1                 every unit
    no unit drawn         an empty sample; the step goes on
    ``units_count`` = 0   an empty sample
    q < 2⁻⁶⁴              an empty sample, always
    ====================  =====================================

    [Mironov, Talwar, Zhang, arXiv 1908.10530 §2]

    Raises:
        ConfigError: ``rate`` is not in (0, 1].
    """
    limit = threshold(rate)
    words = randomness.uint64(units_count)
    if limit == _WORD:  # 2⁶⁴ does not fit a word: every word is below it
        return np.arange(units_count, dtype=np.int64)
    return np.flatnonzero(words < np.uint64(limit)).astype(np.int64)
