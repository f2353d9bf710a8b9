# SPDX-License-Identifier: Apache-2.0
"""Every view that a server may show to each guardian in a small federation, and what it learns: with certificates, one sum.

The guardians' answers come from the code that guardians run (freeze, shares, guardian); tests/views.py puts
them together for all strategies. Negative controls show that the checker sees: without certificates, and with one guardian
put back to an earlier state, it finds strategies that isolate one silo.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from tests.views import Vector, is_one_sum_of, isolates, learned, opened, release_of, sets


def everyone(silos: int) -> list[Vector]:
    return [Vector(silo) for silo in range(1, silos + 1)]


def seen(chosen, silos: int, *, quorum: int, corrupt: int):
    """What is learned when honest guardians release for these sets, one set each."""
    secrets = opened([release_of(each, silos) for each in chosen], quorum=quorum, corrupt=corrupt)
    return learned(everyone(silos), [(0, 0, secret) for secret in secrets], silos)


# --- The checker itself ---------------------------------------------------------------------------------------------------------


def test_a_whole_release_opens_the_sum_of_its_set_and_nothing_else():
    for chosen in sets(5, 3):
        images = seen([chosen] * 4, 5, quorum=4, corrupt=1)
        assert is_one_sum_of(images, {frozenset(Vector(silo) for silo in chosen)})
        assert not isolates(images)


def test_too_few_shares_open_nothing():
    assert seen([frozenset({1, 2, 3})] * 2, 5, quorum=4, corrupt=1) == []


def test_a_silo_that_is_released_as_alive_and_as_dead_is_isolated():
    both = release_of(frozenset({1, 2, 3, 4}), 5) | release_of(frozenset({2, 3, 4, 5}), 5)
    pairs = [(0, 0, (min(s), max(s)) if s[1] else s) for s in both]
    assert isolates(learned(everyone(5), pairs, 5))


@pytest.mark.parametrize(("silos", "guardians", "quorum", "isolating", "strategies"), [(5, 5, 4, 5, 23751), (6, 4, 3, 390, 32509)])
def test_negative_control_without_certificates_majorities_that_merely_intersect_isolate_a_silo(
    silos, guardians, quorum, isolating, strategies
):
    """The counts are those of the protocol's design, found there by another program: sets of two and more, one guardian corrupt."""
    views = combinations_with_replacement(sets(silos, 2), guardians - 1)
    found = [isolates(seen(chosen, silos, quorum=quorum, corrupt=1)) for chosen in views]
    assert (sum(found), len(found)) == (isolating, strategies)
