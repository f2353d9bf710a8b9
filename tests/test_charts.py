# SPDX-License-Identifier: Apache-2.0
"""Charts are well-formed, named, proportional, and let no text through unescaped."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.reporting import charts
from privacy.reporting.charts import Line

LINES = (
    Line(label="PLD 1.70", points=((0, 0), (10, 1.0), (24, 1.55), (30, 1.7)), style="first"),
    Line(label="RDP 1.90", points=((0, 0), (10, 1.2), (24, 1.73), (30, 1.9)), style="second"),
)
WORDS = {"key": "k", "title": "t", "desc": "d"}


def bar(value: float, full: float, mark: float | None = None) -> ET.Element:
    return ET.fromstring(charts.bar(value=value, full=full, mark=mark, **WORDS))


def chart(lines=LINES, limit=3.0, now: float | None = 24.0, width=720) -> ET.Element:
    return ET.fromstring(
        charts.line_chart(
            lines, limit=limit, limit_label=f"limit {limit:g}", now=now, x_label="x", y_label="y", width=width, **WORDS,
        )
    )


def texts(svg: ET.Element) -> list[ET.Element]:
    return list(svg.iter("text"))


@given(value=st.floats(0, 1e6), full=st.floats(1e-6, 1e6))
def test_bar_is_proportional_and_never_leaves_its_track(value, full):
    svg = bar(value, full)
    fill = float(next(node for node in svg.iter("rect") if node.get("class") == "fill").get("width"))
    assert fill == pytest.approx(100 * value / max(value, full), abs=0.01)
    assert ("over" in svg.get("class").split()) == (value > full)


def test_bar_shows_the_limit_where_it_is_passed_and_the_mark_where_it_fits():
    ticks = [node.get("d") for node in bar(4, 3, 3.5).iter("path")]
    assert ticks == ["M87.5 0v10", "M75 0v10"]
    assert not list(bar(1, 3, 9).iter("path"))
    assert float(next(node for node in bar(0, 3).iter("rect") if node.get("class") == "fill").get("width")) == 0


def test_every_picture_is_named_and_described():
    pictures = [
        bar(1, 3), chart(),
        ET.fromstring(charts.flow(silos=["a"], upload="u", kept="k", total="t", everyone="e", **WORDS)),
        ET.fromstring(charts.rounds_strip(["result", "void"], **WORDS)),
        ET.fromstring(charts.crowd(found=5, guessed=1, **WORDS)),
    ]
    for svg in pictures:
        assert svg.get("role") == "img"
        assert svg.find("title").get("id") == svg.get("aria-labelledby")
        assert svg.find("desc").get("id") == svg.get("aria-describedby")


def test_line_chart_puts_points_where_they_belong():
    svg = chart(now=None)
    path = next(node.get("d") for node in svg.iter("path") if node.get("class") == "line first")
    places = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    left, right = places[0][0], places[-1][0]
    assert (places[1][0] - left) / (right - left) == pytest.approx(10 / 30, abs=1e-3)
    level = next(node.get("d") for node in svg.iter("path") if node.get("class") == "line limit")
    limit = float(level[1:].split("L")[0].split()[1])
    assert (places[0][1] - places[3][1]) / (places[0][1] - limit) == pytest.approx(1.7 / 3, abs=1e-3)


def test_what_lies_ahead_is_drawn_apart():
    classes = [node.get("class") for node in chart().iter("path")]
    assert "line first" in classes
    assert "line first ahead" in classes
    assert not any("ahead" in (node.get("class") or "") for node in chart(now=None).iter("path"))


@settings(max_examples=60)
@given(ends=st.lists(st.floats(0, 3), min_size=1, max_size=4), limit=st.floats(0.01, 3), width=st.sampled_from([350, 720]))
def test_end_labels_never_touch_and_stay_inside(ends, limit, width):
    lines = [Line(label=f"L{position}", points=((0, 0), (5, end)), style="first") for position, end in enumerate(ends)]
    svg = chart(lines, limit, None, width)
    heights = sorted(float(node.get("y")) for node in texts(svg) if (node.get("class") or "").startswith("label"))
    assert len(heights) == len(ends) + 1
    assert all(lower - upper >= 16.9 for upper, lower in pairwise(heights))
    assert heights[0] > 0
    assert heights[-1] <= 340


@given(highest=st.floats(1e-6, 1e9), about=st.integers(2, 9))
def test_ticks_start_at_zero_and_cover_the_data(highest, about):
    ticks = charts._ticks(highest, about)
    assert ticks.values[0] == 0
    assert ticks.top >= highest * (1 - 1e-9)
    assert 2 <= len(ticks.values) <= 2 * about + 2


def test_single_points_and_zeros_make_a_chart():
    chart([Line(label="PLD", points=((0, 0.0),), style="first")], 3.0, 0.0)
    chart([Line(label="PLD", points=((0, 0.0), (1, 0.0)), style="first")], 1e-9, 1.0)


def test_crowd_counts_every_square_once():
    svg = ET.fromstring(charts.crowd(found=23, guessed=10, **WORDS))
    assert {node.get("class"): node.get("d").count("M") for node in svg.iter("path")} == {"guessed": 10, "found": 13, "unseen": 977}


def test_strip_has_one_mark_per_round_in_order():
    svg = ET.fromstring(charts.rounds_strip(["result"] * 39 + ["void"] + ["result"] * 2, **WORDS))
    marks = [node.get("class") for node in svg.iter("rect")]
    assert marks == ["result"] * 39 + ["void"] + ["result"] * 2
    assert ET.fromstring(charts.rounds_strip([], **WORDS)) is not None


def test_flow_names_three_silos_and_counts_the_rest():
    def names(count: int) -> list[str]:
        silos = [f"silo{number}" for number in range(count)]
        svg = ET.fromstring(charts.flow(silos=silos, upload="u", kept="keeps records", total="t", everyone="e", **WORDS))
        return [node.text for node in texts(svg) if node.get("class") == "strong"]

    assert names(3)[:3] == ["silo0", "silo1", "silo2"]
    assert names(9)[:3] == ["silo0", "silo1", "and 7 more"]


@given(st.text(max_size=30))
def test_no_text_breaks_out(text):
    hostile = text + "</text><script>\"'&\x00"
    for svg in (
        charts.flow(
            silos=[hostile] * 2, upload=hostile, kept=hostile, total=hostile, everyone=hostile, key=hostile, title=hostile,
            desc=hostile,
        ),
        charts.line_chart(
            [Line(label=hostile, points=((0, 0), (1, 1)), style="first")], limit=1, limit_label=hostile, now=None, x_label=hostile,
            y_label=hostile, key="k", title=hostile, desc=hostile,
        ),
    ):
        assert "<script" not in svg
        assert not list(ET.fromstring(svg).iter("script"))
