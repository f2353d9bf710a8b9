# SPDX-License-Identifier: Apache-2.0
"""Pictures of measured figures for the documentation: curves on two axes, logarithmic by default, as one SVG file.

The file stands by itself: it loads nothing and runs nothing. It follows a reader's light or dark setting; curves differ by dash as
well as by colour and are labelled at their ends; title and description are for readers who do not see it. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from xml.sax.saxutils import escape

Point = tuple[float, float]

PANEL_WIDTH, PANEL_HEIGHT = 300, 250
LEFT, TOP, RIGHT, BOTTOM = 62, 36, 78, 46
STYLES = 8
_STYLE = """
text { font: 12px sans-serif; fill: #24292f } .grid { stroke: #8c959f; stroke-opacity: .35; fill: none }
.line { fill: none; stroke-width: 2 } .end { font-size: 11px }
.c0 { stroke: #0969da } .c1 { stroke: #bc4c00; stroke-dasharray: 7 3 } .c2 { stroke: #1a7f37; stroke-dasharray: 2 3 }
.c3 { stroke: #8250df; stroke-dasharray: 9 3 2 3 } .c4 { stroke: #cf222e; stroke-dasharray: 12 4 }
.c5 { stroke: #6e7781; stroke-dasharray: 4 2 }
.c6 { stroke: #1b7c83; stroke-dasharray: 1 2 } .c7 { stroke: #9a6700; stroke-dasharray: 7 2 1 2 1 2 }
@media (prefers-color-scheme: dark) { text { fill: #d1d7e0 } }
"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve: positive ``points`` by ascending x, and the label at its end; ``spread``: half of a bar at each point."""

    label: str
    points: tuple[Point, ...]
    spread: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of the picture: its curves (at most ``STYLES``) and what the axes are, both logarithmic unless ``linear_y``."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    linear_y: bool = False


def picture(panels: Sequence[Panel], *, title: str, desc: str) -> str:
    """The panels side by side, as the text of an SVG file."""
    width = len(panels) * (LEFT + PANEL_WIDTH + RIGHT)
    height = TOP + PANEL_HEIGHT + BOTTOM
    drawn = "".join(
        f'<g transform="translate({index * (LEFT + PANEL_WIDTH + RIGHT) + LEFT} {TOP})">{"".join(_panel(panel))}</g>\n'
        for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(desc)}</desc>\n<style>{_STYLE}</style>\n{drawn}</svg>\n"
    )


def _panel(panel: Panel) -> Iterator[str]:
    assert len(panel.curves) <= STYLES, "one style a curve"
    points = list(chain.from_iterable(curve.points for curve in panel.curves))
    assert all(value > 0 for point in points for value in point), "logarithmic axes"
    low_x, high_x = _range([x for x, _ in points])
    low_y, high_y = _linear(panel) if panel.linear_y else _range([y for _, y in points])

    def at(x: float, y: float) -> Point:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = ((y if panel.linear_y else math.log10(y)) - low_y) / (high_y - low_y)
        return PANEL_WIDTH * across, PANEL_HEIGHT * (1 - up)

    yield f'<text x="{PANEL_WIDTH / 2:.0f}" y="-14" text-anchor="middle">{escape(panel.title)}</text>'
    yield f'<rect class="grid" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}"/>'
    some = points[0]
    for value, word in _ticks_x(panel, low_x, high_x):
        x, _ = at(value, some[1])
        yield f'<path class="grid" d="M{x:.1f} 0v{PANEL_HEIGHT}"/>'
        yield f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 16}" text-anchor="middle">{word}</text>'
    for value, word in _ticks_linear(low_y, high_y) if panel.linear_y else _ticks(low_y, high_y):
        _, y = at(some[0], value)
        yield f'<path class="grid" d="M0 {y:.1f}h{PANEL_WIDTH}"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{word}</text>'
    yield f'<text x="{PANEL_WIDTH / 2:.0f}" y="{PANEL_HEIGHT + 36}" text-anchor="middle">{escape(panel.x)}</text>'
    turned = f"translate({8 - LEFT} {PANEL_HEIGHT / 2:.0f}) rotate(-90)"
    yield f'<text transform="{turned}" y="6" text-anchor="middle">{escape(panel.y)}</text>'
    ends = sorted((at(*curve.points[-1])[1], index) for index, curve in enumerate(panel.curves))
    heights = dict(zip((index for _, index in ends), _apart([y for y, _ in ends]), strict=True))
    for index, curve in enumerate(panel.curves):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in curve.points))
        yield f'<path class="line c{index}" d="M{path}"/>'
        for (x, y), half in zip(curve.points, curve.spread, strict=False):
            (across, top), (_, bottom) = at(x, y + half), at(x, y - half)
            yield f'<path class="line c{index}" d="M{across + 2 * index - 6:.1f} {top:.1f}V{bottom:.1f}"/>'
        x, _ = at(*curve.points[-1])
        yield f'<text class="end" x="{x + 5:.1f}" y="{heights[index] + 4:.1f}">{escape(curve.label)}</text>'


def _range(values: Sequence[float]) -> Point:
    """The logarithms between which the values lie, with a little room."""
    low, high = math.log10(min(values)), math.log10(max(values))
    return low - 0.08 - (low == high), high + 0.08 + (low == high)


def _linear(panel: Panel) -> Point:
    """Between which values a linear axis shows every point and bar, with a little room."""
    values = [
        y + sign * half
        for curve in panel.curves
        for (_, y), half in zip(curve.points, curve.spread or (0.0,) * len(curve.points), strict=True)
        for sign in (-1, 1)
    ]
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """The powers of ten between two logarithms, and how they are written."""
    for power in range(math.ceil(low), math.floor(high) + 1):
        yield 10.0**power, _number(power)


def _ticks_x(panel: Panel, low: float, high: float) -> Iterator[tuple[float, str]]:
    """Powers of ten; where fewer than two are in sight, the points' own places."""
    found = list(_ticks(low, high))
    if len(found) < 2:
        found = [(x, f"{x:g}") for x in sorted({x for curve in panel.curves for x, _ in curve.points})]
    yield from found


def _ticks_linear(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Four to ten round values between two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (5, 2, 1) if (high - low) / (times * step) >= 4 or times == 1)
    for place in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield place * step, f"{place * step:g}"


def _apart(heights: Sequence[float], least: float = 13.0) -> list[float]:
    """Ascending label heights, moved down until none lies on another."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    return placed


def _number(power: int) -> str:
    """10**power as people write it."""
    if power < 0:
        return f"{10.0**power:.{-power}f}"
    return f"{10**power:,}"
