# SPDX-License-Identifier: Apache-2.0
"""Local mode: how a silo's change of the model becomes integers that add up in the ring 2**32.

What comes in was made by private steps alone, so rounding and cutting it is post-processing and costs nothing. Promised: the
grid follows from public constants and is the same in every silo; a sum of at most ``silos`` encoded vectors lifts
(``privacy.dp.ring.lift``) to the exact integer sum. Not promised: that a *malicious* silo stays in range.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.dp.ring import RING_LIMIT
from privacy.errors import ConfigError, SiloquyError


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Multiples of ``step``, at most ``clamp`` of them either way."""

    clamp: int
    step: float


def finest(*, silos: int, bound: float) -> Grid:
    """The finest grid on which ``silos`` vectors with entries in [−bound, bound] add up within the ring.

    clamp = the largest power of two ≤ ⌊(2³¹ − 1)/n⌋, so step = bound ÷ clamp is exact.

    Formal guarantees:
        - *No overflow*: n·clamp ≤ 2³¹ − 1.

    Raises:
        ConfigError: a parameter is out of range.
    """
    if isinstance(silos, bool) or not isinstance(silos, int) or not 1 <= silos <= RING_LIMIT:
        raise ConfigError(
            f"{silos!r} silos, the ring adds up 1 to {RING_LIMIT}", hint="mend the contract's draft", code="ring-plan"
        )
    if not sys.float_info.min * RING_LIMIT <= bound < math.inf:
        raise ConfigError(f"update_bound = {bound}, it is positive and finite", hint="mend the contract's draft", code="ring-plan")
    clamp = 1 << ((RING_LIMIT // silos).bit_length() - 1)
    return Grid(clamp=clamp, step=bound / clamp)


def encode(values: NDArray[np.float64], grid: Grid) -> NDArray[np.uint32]:
    """Finite ``values`` (d,) as ``<u4``: each rounded to the nearest multiple of the step, halves to even, then cut to ±clamp.

    Formal guarantees:
        - *Close*: an entry within ±step·clamp comes back from ``ring.lift`` times the step at most half a step away.
        - *In range*: no integer is larger than the clamp.

    Raises:
        SiloquyError: ``values`` is not float64, or an entry is not finite.
    """
    if values.dtype != np.dtype(np.float64) or not np.all(np.isfinite(values)):
        raise SiloquyError(f"a change of the model is finite float64, this one is {values.dtype} or not finite")
    with np.errstate(over="ignore"):  # what overflows is cut
        multiples = np.rint(values / grid.step)
    return np.clip(multiples, -grid.clamp, grid.clamp).astype(np.int64).astype("<u4")
