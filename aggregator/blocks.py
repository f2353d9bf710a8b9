# SPDX-License-Identifier: Apache-2.0
"""The blocks of a draft contract without differential privacy: groups of members of which only whole ones are ever summed.

Promised: what is filled in is a partition of the members into groups of at least u_min, the largest number of them, by ascending
id, so that the same members always give the same bytes. A signed version's blocks are never moved: the next one keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from aggregator.draft import AUTO
from privacy.federation import Contract

Blocks = tuple[tuple[int, ...], ...]
_OPEN = rf'(?m)^(blocks[ \t]*=[ \t]*)"{AUTO}"'


def of_members(ids: Sequence[int], fewest: int) -> Blocks:
    """As many groups of at least ``fewest`` as there can be, their sizes as equal as they can be; one of all where that is all."""
    count = max(1, len(ids) // max(1, fewest))
    small, larger = divmod(len(ids), count)
    ends = [group * small + min(group, larger) for group in range(count + 1)]
    return tuple(tuple(ids[start:end]) for start, end in pairwise(ends))


def filled(text: str, blocks: Blocks) -> str:
    """The draft with the open place for the blocks filled in."""
    shown = ", ".join("[" + ", ".join(map(str, block)) + "]" for block in blocks)
    return re.sub(_OPEN, lambda found: f"{found[1]}[{shown}]", text)


def completed(text: str, terms: Contract) -> str:
    """The draft with its blocks where they are open."""
    return filled(text, of_members([member.id for member in terms.member], terms.fewest))
