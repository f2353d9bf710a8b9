# SPDX-License-Identifier: Apache-2.0
"""Pictures of measured figures for the documentation: curves on two logarithmic axes, as one SVG file that stands by itself.

Loads nothing and runs nothing; follows a reader's light or dark setting; curves differ by dash as well as by colour and are
labelled at their ends; title and description are for readers who do not see it. All text is escaped.
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
STYLES = 4
_STYLE = """
text { font: 12px sans-serif; fill: #24292f } .grid { stroke: #8c959f; stroke-opacity: .35; fill: none }
.line { fill: none; stroke-width: 2 } .end { font-size: 11px }
.c0 { stroke: #0969da } .c1 { stroke: #bc4c00; stroke-dasharray: 7 3 } .c2 { stroke: #1a7f37; stroke-dasharray: 2 3 }
.c3 { stroke: #8250df; stroke-dasharray: 9 3 2 3 }
@media (prefers-color-scheme: dark) { text { fill: #d1d7e0 } }
"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve: positive ``points`` by ascending x, and the label at its end."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of the picture: its curves (at most ``STYLES``) and what the axes are."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]


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
    (low_x, high_x), (low_y, high_y) = _range([x for x, _ in points]), _range([y for _, y in points])

    def at(x: float, y: float) -> Point:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return PANEL_WIDTH * across, PANEL_HEIGHT * (1 - up)

    yield f'<text x="{PANEL_WIDTH / 2:.0f}" y="-14" text-anchor="middle">{escape(panel.title)}</text>'
    yield f'<rect class="grid" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}"/>'
    for power in range(math.ceil(low_x), math.floor(high_x) + 1):
        x, _ = at(10.0**power, 10**low_y)
        yield f'<path class="grid" d="M{x:.1f} 0v{PANEL_HEIGHT}"/>'
        yield f'<text x="{x:.1f}" y="{PANEL_HEIGHT + 16}" text-anchor="middle">{_number(power)}</text>'
    for power in range(math.ceil(low_y), math.floor(high_y) + 1):
        _, y = at(10**low_x, 10.0**power)
        yield f'<path class="grid" d="M0 {y:.1f}h{PANEL_WIDTH}"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{_number(power)}</text>'
    yield f'<text x="{PANEL_WIDTH / 2:.0f}" y="{PANEL_HEIGHT + 36}" text-anchor="middle">{escape(panel.x)}</text>'
    turned = f"translate({8 - LEFT} {PANEL_HEIGHT / 2:.0f}) rotate(-90)"
    yield f'<text transform="{turned}" y="6" text-anchor="middle">{escape(panel.y)}</text>'
    ends = sorted((at(*curve.points[-1])[1], index) for index, curve in enumerate(panel.curves))
    heights = dict(zip((index for _, index in ends), _apart([y for y, _ in ends]), strict=True))
    for index, curve in enumerate(panel.curves):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in curve.points))
        yield f'<path class="line c{index}" d="M{path}"/>'
        x, _ = at(*curve.points[-1])
        yield f'<text class="end" x="{x + 5:.1f}" y="{heights[index] + 4:.1f}">{escape(curve.label)}</text>'


def _range(values: Sequence[float]) -> Point:
    """The logarithms between which the values lie, with a little room."""
    low, high = math.log10(min(values)), math.log10(max(values))
    return low - 0.08 - (low == high), high + 0.08 + (low == high)


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
