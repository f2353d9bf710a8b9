# SPDX-License-Identifier: Apache-2.0
"""How the set of a round follows from guardians' lists and silos' headers. Pure rules over values that others verified.

A silo is in U if its header stands in all q lists, and the mismatch rule and the blocks leave it there:

*Mismatch rule*: while two silos i, j are left with C_ij ≠ C_ji, the silo with the most such pairs is removed; on a tie every
silo that has as many. *Blocks*: where the contract has a partition of the members, only whole blocks stay.

Promised: the same lists and headers give every party the same U, and no two silos of U disagree. Not promised: who of two that
disagree lies: one corrupt silo alone can take one honest silo out with it, and no more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from privacy.federation import Contract
from privacy.messages import Freeze, Header, Listing, Signed, decode

Pair = tuple[int, int]
MOST_DIFFERENT_LISTS = 12
"""Up to so many different lists every choice of q is looked at."""


def agreed(lists: Sequence[Listing]) -> dict[int, bytes]:
    """Header digests by ascending silo that stand in all lists."""
    common = set(lists[0].headers).intersection(*(listing.headers for listing in lists[1:])) if lists else set()
    return dict(sorted(common))


def named(lists: Iterable[Listing]) -> set[int]:
    """The silos of which any list says that there was an upload."""
    return {silo for listing in lists for silo, _ in (*listing.headers, *listing.disputes)}


def mismatches(headers: Mapping[int, Header]) -> list[Pair]:
    """The pairs of silos whose commitments to their common key differ, each as (lower, higher)."""
    commitments = {silo: dict(header.pair_commitments) for silo, header in headers.items()}
    return [(i, j) for i, j in combinations(sorted(commitments), 2) if commitments[i][j] != commitments[j][i]]


def without_mismatches(apart: Iterable[Pair], silos: Iterable[int]) -> set[int]:
    """The silos that the mismatch rule leaves.

    **Formal guarantees**: no pair of ``apart`` is left, and the order of the arguments does not matter. A silo that is in no
    such pair always stays.
    """
    left = set(silos)
    while counts := Counter(silo for pair in apart if set(pair) <= left for silo in pair):
        most = max(counts.values())
        left -= {silo for silo, count in counts.items() if count == most}
    return left


def select(apart: Iterable[Pair], silos: Iterable[int], terms: Contract) -> tuple[int, ...]:
    """U, ascending, from the silos whose headers stand in all lists; it may be too small to be summed."""
    left = without_mismatches(apart, silos)
    if terms.sum.blocks:
        left = {silo for block in terms.sum.blocks if set(block) <= left for silo in block}
    return tuple(sorted(left))


def reasons(
    headers: Collection[int], chosen: Collection[int], apart: Iterable[Pair], silos: Iterable[int], named: Collection[int]
) -> Iterator[tuple[int, set[str]]]:
    """For every silo of the epoch outside U, which reasons hold. Of a silo whose upload anybody named, "absent" is a lie."""
    stay = without_mismatches(apart, headers)
    for silo in silos:
        if silo in chosen:
            continue
        if silo in headers:
            yield silo, {"block"} if silo in stay else {"mismatch"}
        else:
            yield silo, {"unlisted"} if silo in named else {"unlisted", "absent"}


def choose(
    headers: Mapping[int, bytes],
    lists: Mapping[int, tuple[bytes, Listing]],
    *,
    round_ctx: bytes,
    silos: Sequence[int],
    terms: Contract,
) -> Freeze | None:
    """The freeze with the largest U that q of these lists give (ties: lowest guardian ids), or None when none reaches u_min.

    With more than ``MOST_DIFFERENT_LISTS`` different lists, a large set: lists are dropped one by one, the one that costs most,
    with all who hold it.

    Args:
        headers: the verified signed headers that are stored, by silo.
        lists: verified lists by guardian, with their documents.
    """
    stored = {silo: hashlib.sha256(raw).digest() for silo, raw in headers.items()}
    apart = mismatches({silo: decode(decode(raw, Signed).body, Header) for silo, raw in headers.items()})

    def outcome(guardians: Sequence[int]) -> tuple[int, ...]:
        common = agreed([lists[guardian][1] for guardian in guardians])
        return select(apart, common, terms) if common.items() <= stored.items() else ()

    candidates = [(outcome(guardians), guardians) for guardians in _candidates(lists, terms.quorum, outcome)]
    if not candidates:
        return None
    chosen, guardians = min(candidates, key=lambda each: (-len(each[0]), each[1]))
    if len(chosen) < terms.fewest or len(chosen) - terms.privacy.colluders < 2:
        return None
    used = [lists[guardian][1] for guardian in guardians]
    common = agreed(used)
    left_out = tuple(
        (silo, "absent" if "absent" in why and silo not in headers else min(why - {"absent"}))
        for silo, why in reasons(common, chosen, apart, silos, named(used))
    )
    return Freeze(
        round_ctx=round_ctx, headers=tuple(headers[silo] for silo in common),
        lists=tuple(lists[guardian][0] for guardian in guardians), left_out=left_out,  # type: ignore[arg-type]
    )  # fmt: skip


def _candidates(
    lists: Mapping[int, tuple[bytes, Listing]], quorum: int, outcome: Callable[[Sequence[int]], tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """Choices of q guardians, ascending, among which the best one is; see ``choose``."""
    if len(lists) < quorum:
        return
    holders: dict[object, list[int]] = {}
    for guardian in sorted(lists):
        listing = lists[guardian][1]
        holders.setdefault((listing.headers, listing.disputes), []).append(guardian)
    if len(holders) > MOST_DIFFERENT_LISTS:
        yield _lowest(_by_dropping(list(holders.values()), quorum, outcome), quorum)
        return
    # U depends on which different lists are used; of those who hold them the lowest ids, at least one of each.
    for size in range(1, min(quorum, len(holders)) + 1):
        for groups in combinations(holders.values(), size):
            if sum(map(len, groups)) >= quorum:
                yield _lowest(groups, quorum)


def _lowest(groups: Sequence[list[int]], quorum: int) -> tuple[int, ...]:
    """q guardians, ascending: of each group the lowest, then the lowest of the others."""
    first = [group[0] for group in groups]
    others = sorted(guardian for group in groups for guardian in group[1:])
    return tuple(sorted(first + others[: quorum - len(first)]))


def _by_dropping(groups: list[list[int]], quorum: int, outcome: Callable[[Sequence[int]], tuple[int, ...]]) -> list[list[int]]:
    """Groups of one list each, without those that cost most: a list that one guardian fewer holds costs as much as before."""
    left = list(groups)
    while can_go := [group for group in left if len(group) <= sum(map(len, left)) - quorum]:
        # A small group, then the highest ids, on a tie. As long as more than q groups are left, one can go.
        sizes = {group[0]: len(outcome([other[0] for other in left if other is not group])) for group in can_go}
        left.remove(max(can_go, key=lambda group: (sizes[group[0]], -len(group), group)))
    return left
