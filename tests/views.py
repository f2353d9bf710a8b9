# SPDX-License-Identifier: Apache-2.0
"""What a server can learn from one round of the guardian sum: every view it may show each guardian, and the algebra of what opens.

The masked vector of silo i in attempt a is y = x + s + Σ ± m_ij: s a stream of the attempt's own, m_ij a stream of the pair and the
round. A server holds all y, all shares that corrupt guardians were dealt, and those that honest guardians released to it. A
stream whose key it can put together is known. What it learns of the x is the left kernel of the matrix of unknown streams.

``tests/test_views.py`` finds out from the *real* guardian code which sets a guardian signs and what it releases after what it
was shown; this module combines those answers over all guardians and all strategies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TypeVar

PRIME = 2**61 - 1
"""Ranks are taken modulo this prime: entries are 0 and ±1, so a rank that differs from that over the rationals is not met."""

K = TypeVar("K")
Secret = tuple[int, int]
Image = dict["Vector", int]
"""(i, 0): the self-mask seed of silo i; (i, j): the key of the pair, as silo i dealt it. j dealt it too, in other shares."""


@dataclass(frozen=True)
class Vector:
    """One masked vector the server holds: a silo's attempt at a round whose pair streams carry the name ``manifest``."""

    silo: int
    attempt: int = 0
    manifest: int = 0


def sets(silos: int, fewest: int) -> list[frozenset[int]]:
    """Every set of at least ``fewest`` of the silos 1 to ``silos``."""
    everyone = range(1, silos + 1)
    return [frozenset(chosen) for size in range(fewest, silos + 1) for chosen in combinations(everyone, size)]


def learned(vectors: Collection[Vector], opened: Collection[tuple[int, int, Secret]], silos: int) -> list[Image]:
    """A basis of what the server learns: coefficients (mod PRIME) of the x of each attempt.

    Args:
        opened: (manifest, attempt, secret) of every secret it can put together; a pair's attempt is 0.
    """
    known, columns = set(opened), dict[tuple[int, int, Secret], int]()
    rows = []
    for vector in sorted(vectors, key=lambda each: (each.manifest, each.silo, each.attempt)):
        row = dict[int, int]()
        place = (vector.manifest, vector.attempt, (vector.silo, 0))
        streams = [(place, 1)]
        for peer in range(1, silos + 1):
            if peer != vector.silo:
                pair = (min(vector.silo, peer), max(vector.silo, peer))
                streams.append(((vector.manifest, 0, pair), 1 if peer > vector.silo else -1))
        for stream, sign in streams:
            if stream not in known:
                row[columns.setdefault(stream, len(columns))] = sign
        rows.append((row, {vector: 1}))
    return _kernel(rows)


def _kernel(rows: list[tuple[dict[int, int], Image]]) -> list[Image]:
    """What combinations of rows whose streams cancel say of x: Gaussian elimination with the x part carried along."""
    images, pivots = list[Image](), dict[int, tuple[dict[int, int], Image]]()
    for row in rows:
        streams, image = _reduced(row, pivots)
        if streams:
            column = min(streams)
            factor = pow(streams[column], -1, PRIME)
            pivots[column] = (_scaled(streams, factor), _scaled(image, factor))
        else:
            images.append(image)
    return images


def _reduced(row: tuple[dict[int, int], Image], pivots: Mapping[int, tuple[dict[int, int], Image]]) -> tuple[dict[int, int], Image]:
    streams, image = row
    while (column := next((each for each in sorted(streams) if each in pivots), None)) is not None:
        factor = -streams[column] % PRIME
        streams = _added(streams, pivots[column][0], factor)
        image = _added(image, pivots[column][1], factor)
    return streams, image


def _scaled(row: Mapping[K, int], factor: int) -> dict[K, int]:
    return {place: value * factor % PRIME for place, value in row.items()}


def _added(row: Mapping[K, int], other: Mapping[K, int], factor: int) -> dict[K, int]:
    total = dict(row)
    for place, value in other.items():
        total[place] = (total.get(place, 0) + value * factor) % PRIME
    return {place: value for place, value in total.items() if value}


def is_one_sum_of(images: Iterable[Image], allowed: Collection[frozenset[Vector]]) -> bool:
    """Whether nothing was learned, or a multiple of one sum, over one of the ``allowed`` sets of vectors."""
    images = list(images)
    return not images or (len(images) == 1 and len(set(images[0].values())) == 1 and frozenset(images[0]) in allowed)


def isolates(images: Iterable[Image]) -> bool:
    """Whether a multiple of the x of one single attempt was learned."""
    images = list(images)
    vectors = sorted({vector for image in images for vector in image}, key=lambda each: (each.manifest, each.silo, each.attempt))
    full = _rank(images, vectors)
    return any(_rank(images, [other for other in vectors if other != vector]) < full for vector in vectors)


def _rank(images: Iterable[Image], vectors: Collection[Vector]) -> int:
    """The rank of the images restricted to some coordinates. One less without a coordinate: it alone is in the span."""
    place = {vector: number for number, vector in enumerate(vectors)}
    rows = [{place[vector]: value for vector, value in image.items() if vector in place} for image in images]
    pivots: dict[int, tuple[dict[int, int], Image]] = {}
    for row in rows:
        left, _ = _reduced((row, {}), pivots)
        if left:
            column = min(left)
            pivots[column] = (_scaled(left, pow(left[column], -1, PRIME)), {})
    return len(pivots)


@cache
def release_of(chosen: frozenset[int], silos: int) -> frozenset[Secret]:
    """The secrets whose shares a guardian gives away for a certified set, by PROTOCOL.md; the test holds the real code to it."""
    missing = set(range(1, silos + 1)) - chosen
    return frozenset({(i, 0) for i in chosen} | {(i, j) for i in chosen for j in missing})


def opened(released: Iterable[frozenset[Secret]], *, quorum: int, corrupt: int) -> frozenset[Secret]:
    """The secrets of which honest guardians gave away enough: ``corrupt`` further shares of everything are the server's."""
    counts = dict[Secret, int]()
    for secrets in released:
        for secret in secrets:
            counts[secret] = counts.get(secret, 0) + 1
    enough = (secret for secret, count in counts.items() if count + corrupt >= quorum)
    return frozenset(secret if not secret[1] else (min(secret), max(secret)) for secret in enough)
