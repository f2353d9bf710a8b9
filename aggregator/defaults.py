# SPDX-License-Identifier: Apache-2.0
"""What a new contract says unless it is told otherwise; one place for ``aggregator init``, ``simulate`` and the draft.

Where the figures come from, and on which data sets: docs/adr/0010-defaults.md and docs/benchmarks.md (``benchmarks/utility.py``).
They are no promise for other data: a contract states its own.
"""

from __future__ import annotations

from typing import Final

from privacy.base_model import VALUE_OUTPUT

TARGETS: Final = VALUE_OUTPUT
LAST_LAYERS: Final = 3
RANK: Final = 32
BASIS: Final = "weights"
BASIS_WIDTH: Final = 2
"""Columns of a sketch for each vector of the adapter."""
BASIS_NOISE_MULTIPLIER: Final = 10.0
BASIS_GRAD_NORM: Final = 1.0
BASIS_ATTEMPTS: Final = 2
SCALE: Final = 4.0
"""Of the basis of the weights."""
SCALES: Final = {"weights": SCALE, "random": 1.0, "public": 0.5, "private": 0.5, "raw": 0.5}
"""By basis: the more of the gradient a basis holds, the less scale leaves the head its share of the clip (docs/benchmarks.md)."""
LEARNING_RATE: Final = 0.04
MAX_GRAD_NORM: Final = 1.0
GENEROUS_GRAD_NORM: Final = 10.0
"""Where there is no noise, and clipping only keeps sums inside the ring."""
SAMPLING_RATE: Final = 0.25
EPSILON: Final = 8.0
MAX_LENGTH: Final = 64
"""Tokens per record; the simulator's own is shorter."""
ROUNDS: Final = {"joint": 24, "local": 6}
STEPS_PER_ROUND: Final = {"joint": 1, "local": 4}
"""By mode: equally many private steps in all."""


def warmup(rounds: int, steps_per_round: int) -> int:
    """Over how many of the first ``rounds`` the learning rate rises: the whole rounds in two private steps."""
    return min(2 // steps_per_round, rounds - 1)


def decay(rounds: int) -> int:
    """Over how many of the last of ``rounds`` the learning rate falls to nothing."""
    return rounds // 2
