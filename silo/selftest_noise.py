# SPDX-License-Identifier: Apache-2.0
"""The self-test's questions about chance: is each sample, and each noise, drawn afresh and by the exact law of the contract?

Promised: every threshold is a proved bound on the tail of the exact law, or of its chi-square limit where the counts are in the ten
thousands; ``false_alarm`` adds them up. Not promised: that another law with the same moments, cells and coincidences is told apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy import update_rule
from privacy.dp import noise, ring
from privacy.dp.empirical import binomial, tail
from privacy.errors import PrivacyRefusal
from privacy.federation import Contract, ring_plan
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.upload import noisy

RARE = 1e-8
"""The probability that one threshold is passed by chance."""

SAMPLES = 1_000_000
CELLS = 64
KNOWN_NOISE = "5fe1db7d8bb886b3aac7b21450b7a777e6e1b5897ff61138146fc329b239846a"
"""SHA-256 of 4,096 samples of variance 2^34 from the key 00 01 … 1f: what the exact sampler makes of these bits on any machine."""

_UNITS, _STEPS = 4096, 250
_SUMMED = 2**16  # up to this s the law's cells are summed term by term
_ROOM = math.log(2 / RARE)


@dataclass(frozen=True)
class Answer:
    """What a check found, when it is as it should be; the probability that a sound installation is refused there."""

    found: str
    false_alarm: float = 0.0


class Failed(PrivacyRefusal):
    """A check of the self-test found something that must not be."""

    default_code = "self-test"

    def __init__(self, message: str, *, false_alarm: float = 0.0) -> None:
        super().__init__(message, hint="stop private training on this machine")
        self.false_alarm = false_alarm


class Steps(Protocol):
    """Something whose calls take samples, and which notes them."""

    sampled: list[list[int]]

    def __call__(self, state: State) -> NDArray[np.int64]:
        """One step."""
        ...


def need(holds: bool, otherwise: str, false_alarm: float = 0.0) -> None:
    """Raises Failed unless ``holds``."""
    if not holds:
        raise Failed(otherwise, false_alarm=false_alarm)


def sampling(terms: Contract, make: Callable[[int], Steps]) -> Answer:
    """Exact binomial tests: how many units in all, of one unit, in two steps running, and steps of the likeliest size.

    The second finds a rate that differs between units, the third a sample that is repeated or dealt out like cards, the fourth a
    fixed batch size.
    """
    rate = terms.privacy.sampling_rate
    steps, state = make(_UNITS), update_rule.initial(terms)
    for _ in range(_STEPS):
        steps(state)
    taken = np.zeros((_STEPS, _UNITS), dtype=np.bool_)
    for row, units in zip(taken, steps.sampled, strict=True):
        need(len(units) == len(set(units)), "a unit was in one sample twice")
        row[units] = True
    likeliest = int(np.argmax(binomial(_UNITS, rate)))
    sizes = taken.sum(axis=1)
    counted = [
        ("units sampled", _UNITS * _STEPS, rate, int(taken.sum())),
        ("units in two samples running", _UNITS * (_STEPS // 2), rate**2, int((taken[:-1:2] & taken[1::2]).sum())),
        ("samples of the likeliest size", _STEPS, float(binomial(_UNITS, rate)[likeliest]), int((sizes == likeliest).sum())),
    ]
    for what, trials, chance, found in counted:
        need(tail(trials, chance, found) >= RARE, f"{what}: {found}, about {trials * chance:.0f} were expected", 4 * RARE)
    per_unit = taken.sum(axis=0)
    lone = [int(per_unit.min()), int(per_unit.max())]
    need(all(tail(_STEPS, rate, count) >= RARE / _UNITS for count in lone), f"single units sampled {lone} times", 4 * RARE)
    return Answer(f"{int(taken.sum())} of {_UNITS * _STEPS} units at rate {rate:g}", 4 * RARE)


def questions(terms: Contract, source: Callable[[], Randomness]) -> list[tuple[str, str, Callable[[], Answer]]]:
    """The checks of noise, none where the contract adds none; they share a million samples.

    Args:
        source: where a round's noise takes its bits from.
    """
    if not terms.is_private:
        return []
    drawn: list[NDArray[np.int64]] = []

    def samples() -> NDArray[np.int64]:
        if not drawn:
            drawn.append(_drawn(terms, source))
        return drawn[0]

    return [
        (
            "noise: variance",
            "each silo's share has the variance that the contract states, within 1 %",
            lambda: variance(terms, samples()),
        ),
        ("noise: law", "the noise is the exact discrete Gaussian, by a chi-square test", lambda: law(terms, samples())),
        ("noise: fresh", "no noise is used twice, in two steps or in two places", lambda: fresh(terms, samples())),
        ("noise: exact", "the sampler makes of known bits what it makes of them everywhere", exact),
    ]


def share(terms: Contract) -> int:
    """s², by the formula of the design and not by the code that is tested: ⌈σ²·4^p/h⌉."""
    privacy = terms.privacy
    variance: Fraction = Fraction(privacy.noise_multiplier) ** 2 * 4**privacy.lattice_bits / terms.shares
    return math.ceil(variance)


def _drawn(terms: Contract, source: Callable[[], Randomness]) -> NDArray[np.int64]:
    """The noise ``(steps, d)`` of as many empty uploads as make a million samples, at least two."""
    nothing = np.zeros(terms.dimension, dtype=np.int64)
    count = max(2, -(-SAMPLES // terms.dimension))
    return np.stack([ring.lift(noisy(nothing, terms, source())) for _ in range(count)])


def variance(terms: Contract, drawn: NDArray[np.int64]) -> Answer:
    """Σ y²/s² within 2√(Nx) + 2x of N, x = ln(2/RARE): Laurent, Massart 2000, Lemma 1, for a chi-square variable."""
    wanted, count = share(terms), drawn.size
    found = float(np.sum(drawn.astype(np.float64) ** 2)) / wanted
    room = 2 * math.sqrt(count * _ROOM) + 2 * _ROOM
    need(
        abs(found - count) <= room,
        f"variance {found / count:.4f} of the contract's share, {room / count:.4f} either way is chance",
        RARE,
    )
    return Answer(f"{found / count:.4f} of s² = {wanted} ({count} samples)", RARE)


def law(terms: Contract, drawn: NDArray[np.int64]) -> Answer:
    """Pearson's statistic over cells of nearly equal mass, against the same lemma with one degree of freedom less than cells."""
    edges, masses = cells(math.sqrt(share(terms)))
    counts = np.bincount(np.searchsorted(edges, drawn.reshape(-1), side="right"), minlength=CELLS)
    expected = masses * drawn.size
    found = float(np.sum((counts - expected) ** 2 / expected))
    free = CELLS - 1
    most = free + 2 * math.sqrt(free * _ROOM) + 2 * _ROOM
    need(found <= most, f"chi-square {found:.0f} over {CELLS} cells, up to {most:.0f} is chance", RARE)
    return Answer(f"chi-square {found:.0f} over {CELLS} cells, {free} expected", RARE)


def cells(s: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(the CELLS - 1 inner edges, the exact mass of each cell) of N_Z(0, s²); cell k holds the y with edges[k-1] <= y < edges[k].

    Up to s = 2^16 all terms of the law within 12 s are summed. Beyond, a cell's mass is the normal law's between its edges less
    one half: the midpoint rule, which is off by less than 1/(24 s²) < 1e-11.
    """
    normal = NormalDist(0.0, s)
    edges = np.array([round(normal.inv_cdf(k / CELLS)) for k in range(1, CELLS)], dtype=np.int64)
    if s > _SUMMED:
        below = np.array([0.0, *(normal.cdf(edge - 0.5) for edge in edges.tolist()), 1.0])
        return edges, np.diff(below)
    reach = math.ceil(12 * s)
    y = np.arange(-reach, reach + 1)
    weights = np.exp(-(y.astype(np.float64) ** 2) / (2 * s * s))
    masses = np.bincount(np.searchsorted(edges, y, side="right"), weights=weights, minlength=CELLS)
    return edges, masses / masses.sum()


def fresh(terms: Contract, drawn: NDArray[np.int64]) -> Answer:
    """Noise of one step against the next, and of one coordinate against the next: equal values, and correlation.

    Two independent values are equal with probability below 1/(2s√π)·(1 + 1e-6). |Σ x·y| of N pairs is above s²·√(2.4·N·x),
    x = ln(2/RARE), with probability at most RARE: -ln(1 - λ²)/2 <= 0.6·λ² for λ <= 1/2.
    """
    s = math.sqrt(share(terms))
    half = len(drawn) // 2
    pairs = {
        "two steps": (drawn[:half].reshape(-1), drawn[half : 2 * half].reshape(-1)),
        "steps running": (drawn[:-1:2].reshape(-1), drawn[1::2][: len(drawn[:-1:2])].reshape(-1)),
        "neighbouring numbers": (drawn.reshape(-1)[:-1:2], drawn.reshape(-1)[1::2][: len(drawn.reshape(-1)[:-1:2])]),
    }
    most = 0.0
    for what, (one, other) in pairs.items():
        equal = int(np.count_nonzero(one == other))
        need(tail(len(one), 1 / (2 * s * math.sqrt(math.pi)), equal) >= RARE, f"{what} have {equal} equal noises", 6 * RARE)
        together = abs(float(one.astype(np.float64) @ other)) / s**2
        most = max(most, together / len(one))
        need(together <= math.sqrt(2.4 * len(one) * _ROOM), f"noise of {what} goes together: {together / len(one):.4f}", 6 * RARE)
    return Answer(f"correlations below {most:.4f}", 6 * RARE)


def exact() -> Answer:
    """The known answer. A sampler of rounded floats, or one that reads other bits than it was given, has another."""
    drawn = noise.discrete_gaussian(4096, 2**34, Randomness.from_key(bytes(range(32))))
    digest = hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
    need(digest == KNOWN_NOISE, f"known bits gave noise {digest[:16]}, {KNOWN_NOISE[:16]} is right")
    return Answer(f"digest {digest[:16]}")


def clamped(terms: Contract) -> Answer:
    """The same noise over four sums: within ±Q the difference is the sum, beyond it is Q; and never a number more."""
    limit = ring_plan(terms).clamp

    def upload(value: int) -> NDArray[np.int64]:
        total = np.full(terms.dimension, value, dtype=np.int64)
        return ring.lift(noisy(total, terms, Randomness.from_key(bytes(range(32)))))

    base = upload(0)
    for value in (1, -limit, 3 * limit, -(2**40)):
        moved = (upload(value) - base + 2**31) % 2**32 - 2**31
        wanted = min(max(value, -limit), limit)
        need(bool(np.all(moved == wanted)), f"a sum of {value} went into the ring as something else than {wanted}")
    return Answer(f"Q = {limit}")
