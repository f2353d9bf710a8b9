# SPDX-License-Identifier: Apache-2.0
"""What several sums show together: the sets of silos over which they were opened, as a matrix rounds × silos of zeros and ones.

Whoever has the sums may add and subtract them. If the vectors were the same in every round, what can be learned of single silos is
the row space of that matrix: {1,2,3}, {1,4,5} and {2,3,4,5} give U1 + U2 − U3 = 2·x1, though each set has three silos and no two
differ by less than two. Noise makes each sum a release of its own; without it only whole blocks of a fixed partition are summed.

**Formal guarantees** (``blocks``: a partition of the silos; ``whole``: every set is a union of blocks)

- *One factor a block*: every combination of whole sets has the same factor for all silos of a block, so what it does not cancel
  holds at least ``least`` silos.
- *Rank*: over the rationals, exactly; of whole sets it is at most the number of blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction

Blocks = Sequence[Collection[int]]


def is_whole(chosen: Collection[int], blocks: Blocks) -> bool:
    """Whether a set is a union of whole blocks. Every set is, where there are no blocks to cut."""
    inside = {silo for block in blocks if set(block) <= set(chosen) for silo in block}
    return not blocks or inside == set(chosen)


def least(sets: Sequence[Collection[int]], blocks: Blocks) -> int:
    """The fewest silos in any combination of these whole sets that is not zero; 0 when there is no set."""
    return min((len(block) for block in blocks if any(set(block) <= set(chosen) for chosen in sets)), default=0)


def rank(sets: Sequence[Collection[int]]) -> int:
    """The rank of the participation matrix over the rationals."""
    silos = sorted({silo for chosen in sets for silo in chosen})
    columns = sorted({tuple(int(silo in chosen) for chosen in sets) for silo in silos})  # silos that always stand together are one
    left, found = [list(map(Fraction, row)) for row in sorted(set(zip(*columns, strict=True)))], 0
    for column in range(len(columns)):
        pivot = next((row for row in left[found:] if row[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        left.insert(found, pivot)
        for row in left[found + 1 :]:
            factor = row[column] / pivot[column]
            row[:] = [value - factor * above for value, above in zip(row, pivot, strict=True)]
        found += 1
    return found
