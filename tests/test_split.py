# SPDX-License-Identifier: Apache-2.0
"""Units are dealt whole, the same way every time, and the held-out share no unit with a silo."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.simulation.split import deal
from privacy.errors import ConfigError, RecordsError


def rows(units: int, per_unit: int = 2, **more: Any) -> list[dict[str, object]]:
    return [{"text": f"{u}.{n}", "p": f"u{u}", **more} for n in range(per_unit) for u in range(units)]


def units_of(part: Any) -> set[object]:
    return {row["p"] for row in part}


@settings(max_examples=60, deadline=None)
@given(units=st.integers(20, 80), silos=st.integers(3, 6), share=st.floats(0.05, 0.5), data=st.data())
def test_every_row_lands_once_and_every_unit_whole(units: int, silos: int, share: float, data: st.DataObject) -> None:
    table = rows(units)
    kept, away = deal(table, silos=silos, silo_column=None, unit="p", held_out=share)
    parts = [*kept, away]
    assert sorted(str(row["text"]) for part in parts for row in part) == sorted(str(row["text"]) for row in table)
    assert sum(len(units_of(part)) for part in parts) == units
    sizes = [len(units_of(part)) for part in kept]
    assert max(sizes) - min(sizes) <= 2
    assert abs(len(units_of(away)) - share * units) <= silos
    shuffled, _ = deal(data.draw(st.permutations(table)), silos=silos, silo_column=None, unit="p", held_out=share)
    assert [units_of(part) for part in shuffled] == [units_of(part) for part in kept]


def test_rows_keep_their_order() -> None:
    table = rows(30)
    kept, away = deal(table, silos=3, silo_column=None, unit="p")
    for part in (*kept, away):
        assert part == [row for row in table if row in part]


def test_no_share_holds_nothing_out() -> None:
    table = rows(31)
    kept, away = deal(table, silos=3, silo_column=None, unit="p", held_out=0)
    assert away == []
    assert [len(units_of(part)) for part in kept] == [11, 10, 10]


def test_each_row_is_a_unit_when_the_unit_is_the_record() -> None:
    table = [{"text": "same"}] * 50
    kept, away = deal(table, silos=5, silo_column=None, unit="record", held_out=0.2)
    assert [len(part) for part in kept] == [8] * 5
    assert len(away) == 10


def test_silos_come_from_a_column_in_natural_order_and_each_holds_out_its_share() -> None:
    table = [{"p": f"{site}-{n}", "site": site} for site in ("site 10", "site 2", "site 1") for n in range(10)]
    kept, away = deal(table, silos=0, silo_column="site", unit="p", held_out=0.2)
    assert [{row["site"] for row in part} for part in kept] == [{"site 1"}, {"site 2"}, {"site 10"}]
    assert [len(part) for part in kept] == [8, 8, 8]
    assert sorted(str(row["site"]) for row in away) == ["site 1"] * 2 + ["site 10"] * 2 + ["site 2"] * 2


def test_a_unit_in_two_silos_is_refused() -> None:
    table = [{"p": f"{site}{n}", "site": site} for site in "abc" for n in range(5)] + [{"p": "a1", "site": "b"}]
    with pytest.raises(RecordsError, match="one unit stands in 2 silos"):
        deal(table, silos=3, silo_column="site", unit="p")


@pytest.mark.parametrize("silos", [0, 1, 2, -1])
def test_fewer_than_three_silos_are_refused(silos: int) -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        deal(rows(20), silos=silos, silo_column=None, unit="p")
    with pytest.raises(ConfigError, match="at least 3"):
        deal(rows(20, site="a"), silos=5, silo_column="site", unit="p")


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        deal(rows(20), silos=3, silo_column=None, unit="p", held_out=share)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_silo_without_a_unit_to_train_on_is_refused(count: int) -> None:
    with pytest.raises(RecordsError, match="at least one to train on"):
        deal(rows(count), silos=3, silo_column=None, unit="p")


@pytest.mark.parametrize("value", [None, "", 1.5, True])
@pytest.mark.parametrize("column", ["p", "site"])
def test_a_row_without_unit_or_silo_is_refused(column: str, value: object) -> None:
    table = [{"p": f"{site}{n}", "site": site} for site in "abc" for n in range(5)]
    table[7] = {**table[7], column: value}
    with pytest.raises(RecordsError, match=f'record 8: no usable "{column}"'):
        deal(table, silos=3, silo_column="site", unit="p")
