# SPDX-License-Identifier: Apache-2.0
"""The report's pictures: pure functions from numbers to inline SVG text.

Every picture carries a title and a description for readers who do not see it, draws with CSS classes and ``currentColor``
only (so it follows light, dark and print), loads nothing and runs nothing. All text is escaped here. Lines differ by dash
as well as by colour, and are labelled at their ends. Not promised: an XML namespace; the text is meant for HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]

_FONT = 13
_LABEL_GAP = 17.0
_BOXES = 3


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: ``points`` by ascending x, ``label`` for its end, ``style`` the CSS class that colours and dashes it."""

    label: str
    points: tuple[Point, ...]
    style: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plot's rectangle in pixels and the data it shows: x from 0 to ``x_max``, y from 0 to ``y_max``."""

    left: float
    top: float
    width: float
    height: float
    x_max: float
    y_max: float

    def at(self, point: Point) -> Point:
        """The pixel of a data point."""
        return self.left + self.width * point[0] / self.x_max, self.top + self.height * (1 - point[1] / self.y_max)


def bar(*, value: float, full: float, mark: float | None = None, key: str, title: str, desc: str) -> str:
    """A horizontal bar: ``value`` as a part of ``full``, with an optional tick at ``mark``.

    The drawing is 100 wide; the filled part is ``100 * value / max(value, full)``, and where value exceeds full, a tick
    shows where full lies and the class ``over`` says so.
    """
    scale = max(value, full, math.ulp(0.0))
    over = " over" if value > full else ""
    ticks = [mark] if mark is not None and mark <= scale else []
    ticks += [full] if over else []
    marks = "".join(f'<path class="tick" d="M{_n(100 * x / scale)} 0v10" vector-effect="non-scaling-stroke"/>' for x in ticks)
    return (
        f'<svg class="bar{over}" viewBox="0 0 100 10" preserveAspectRatio="none" {_named(key)}>{_words(key, title, desc)}'
        f'<rect class="track" x="0" y="2" width="100" height="6"/>'
        f'<rect class="fill" x="0" y="2" width="{_n(100 * value / scale)}" height="6"/>{marks}</svg>'
    )


def line_chart(
    lines: Sequence[Line],
    *,
    limit: float,
    limit_label: str,
    now: float | None,
    x_label: str,
    y_label: str,
    key: str,
    title: str,
    desc: str,
    width: int = 720,
    height: int = 340,
) -> str:
    """Curves against a horizontal limit, both axes from zero, each curve named at its end.

    Args:
        now: the x up to which things happened; the part behind it is drawn faint as a plan. ``None``: all happened.
        width, height: size in CSS pixels; text keeps its size, so draw a narrow chart for a narrow screen.
    """
    ends = [(line.label, line.points[-1][1], line.style) for line in lines] + [(limit_label, limit, "limit")]
    margin = 14 + 0.58 * _FONT * max(len(label) for label, _, _ in ends)
    ticks_x = _ticks(max((x for line in lines for x, _ in line.points), default=1.0) or 1.0, 8 if width > 500 else 4, whole=True)
    ticks_y = _ticks(max([limit, *(y for line in lines for _, y in line.points)]), 6)
    frame = Frame(
        left=44,
        top=30,
        width=width - 44 - margin,
        height=height - 30 - 50,
        x_max=ticks_x.top,
        y_max=ticks_y.top,
    )
    body = _axes(frame, ticks_x.values, ticks_y.values, x_label, y_label)
    body += f'<path class="line limit" d="{_path([frame.at((0, limit)), frame.at((frame.x_max, limit))])}"/>'
    body += "".join(_curve(frame, line, now) for line in lines)
    if now is not None and now > 0:
        body += _now(frame, lines, now)
    body += _end_labels(frame, ends)
    return _picture(width, height, "chart", key, title, desc, body)


def flow(*, silos: Sequence[str], upload: str, kept: str, total: str, everyone: str, key: str, title: str, desc: str) -> str:
    """What leaves each site, top to bottom: silos that keep their records, one arrow each, the sum, the next model.

    At most three silos are drawn by name; beyond that two and "and N more". 360 pixels wide: it fits a phone.
    """
    names = list(silos) if len(silos) <= _BOXES else [*silos[: _BOXES - 1], f"and {len(silos) - _BOXES + 1} more"]
    gap, width = 8.0, 352.0
    box = (width - gap * (len(names) - 1)) / len(names)
    body = ""
    for position, name in enumerate(names):
        left = 4 + position * (box + gap)
        body += _box(left, 8, box, 74, "site", [_fit(name, 0.88 * box), *_wrap(kept, box - 8, 2)])
        body += _arrow([(left + box / 2, 84), (left + box / 2, 134)])
    body += _caption(180, 113, upload)
    body += _box(4, 140, width, 56, "hub", ["aggregator", total])
    body += _arrow([(180, 198), (180, 246)])
    body += _box(4, 252, width, 36, "open", [everyone])
    return _picture(360, 296, "flow", key, title, desc, body)


def rounds_strip(kinds: Sequence[str], *, key: str, title: str, desc: str) -> str:
    """One mark per round in order, at most 40 a row: full height for a result, a low hollow mark for a void round."""
    columns = min(40, max(len(kinds), 1))
    rows = math.ceil(len(kinds) / columns)
    body = ""
    for position, kind in enumerate(kinds):
        x, y = 2 + 9 * (position % columns), 2 + 24 * (position // columns)
        body += (
            f'<rect class="result" x="{x}" y="{y}" width="6" height="20"/>'
            if kind == "result"
            else f'<rect class="void" x="{x + 0.5}" y="{y + 11.5}" width="5" height="8"/>'
        )
    return _picture(4 + 9 * columns, 24 * rows, "strip", key, title, desc, body)


def crowd(*, found: int, guessed: int, of: int = 1000, key: str, title: str, desc: str) -> str:
    """One square for each of ``of`` people: the first ``guessed`` are found by guessing, the rest of ``found`` by a test."""
    at = [(2 + 7 * (position % 50), 2 + 7 * (position // 50)) for position in range(of)]
    groups = (("guessed", at[: min(guessed, found)]), ("found", at[min(guessed, found) : found]), ("unseen", at[found:]))
    body = "".join(
        f'<path class="{name}" d="{"".join(f"M{x} {y}h5v5h-5z" for x, y in places)}"/>' for name, places in groups if places
    )
    return _picture(352, 2 + 7 * math.ceil(of / 50), "crowd", key, title, desc, body)


# --- parts of the line chart ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Ticks:
    values: tuple[float, ...]
    top: float


def _ticks(highest: float, about: int, *, whole: bool = False) -> _Ticks:
    """Round tick values from 0 to the first that is not below ``highest``, roughly ``about`` of them."""
    rough = max(highest, math.ulp(0.0)) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-12))
    step = max(1.0, step) if whole else step
    count = math.ceil(highest / step * (1 - 1e-12)) or 1
    top = highest if whole else count * step
    return _Ticks(values=tuple(step * k for k in range(count + 1) if step * k <= top * (1 + 1e-12)), top=top)


def _axes(frame: Frame, xs: Iterable[float], ys: Iterable[float], x_label: str, y_label: str) -> str:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    out = ""
    for y in ys:
        height = frame.at((0, y))[1]
        out += f'<path class="grid" d="{_path([(frame.left, height), (right, height)])}"/>'
        out += _text(frame.left - 8, height + 4, f"{y:g}", "end")
    for x in xs:
        out += _text(frame.at((x, 0))[0], bottom + 20, f"{x:g}", "middle")
    out += f'<path class="axis" d="{_path([(frame.left, bottom), (right, bottom)])}"/>'
    out += _text((frame.left + right) / 2, bottom + 42, x_label, "middle")
    return out + _text(4, 14, y_label, "start")


def _curve(frame: Frame, line: Line, now: float | None) -> str:
    done = [point for point in line.points if now is None or point[0] <= now]
    ahead = [] if now is None else [point for point in line.points if point[0] >= now]
    out = ""
    if len(ahead) > 1:
        out += f'<path class="line {line.style} ahead" d="{_path(map(frame.at, ahead))}"/>'
    if len(done) > 1:
        out += f'<path class="line {line.style}" d="{_path(map(frame.at, done))}"/>'
    return out


def _now(frame: Frame, lines: Sequence[Line], now: float) -> str:
    foot, head = frame.at((now, 0)), frame.at((now, frame.y_max))
    out = f'<path class="now" d="{_path([foot, head])}"/>'
    for line in lines:
        for point in line.points:
            if point[0] == now:
                x, y = frame.at(point)
                out += f'<circle class="dot {line.style}" cx="{_n(x)}" cy="{_n(y)}" r="4"/>'
    side = "end" if now > frame.x_max / 2 else "start"
    return out + _text(head[0] + (-6 if side == "end" else 6), head[1] - 6, f"now: {now:g}", side)


def _end_labels(frame: Frame, ends: Sequence[tuple[str, float, str]]) -> str:
    """Labels beside the curves' ends, pushed apart where they would touch, never out of the picture."""
    placed = sorted((frame.at((0, value))[1], label, style) for label, value, style in ends)
    heights = [height for height, _, _ in placed]
    for upper, lower in pairwise(range(len(heights))):
        heights[lower] = max(heights[lower], heights[upper] + _LABEL_GAP)
    overflow = max(0.0, heights[-1] - (frame.top + frame.height)) if heights else 0.0
    for position in reversed(range(len(heights))):
        ceiling = heights[position + 1] - _LABEL_GAP if position + 1 < len(heights) else heights[position] - overflow
        heights[position] = min(heights[position], ceiling)
    x = frame.left + frame.width + 8
    return "".join(
        _text(x, height + 4, label, "start", f"label {style}") for height, (_, label, style) in zip(heights, placed, strict=True)
    )


# --- primitives ----------------------------------------------------------------------------------------------------------


def _picture(width: int, height: int, kind: str, key: str, title: str, desc: str, body: str) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="{kind}" {size} {_named(key)}>{_words(key, title, desc)}{body}</svg>'


def _named(key: str) -> str:
    return f'role="img" aria-labelledby={_quoted(key + "-t")} aria-describedby={_quoted(key + "-d")}'


def _words(key: str, title: str, desc: str) -> str:
    return f"<title id={_quoted(key + '-t')}>{_clean(title)}</title><desc id={_quoted(key + '-d')}>{_clean(desc)}</desc>"


def _box(left: float, top: float, width: float, height: float, style: str, rows: Sequence[str]) -> str:
    start = top + height / 2 - (len(rows) - 1) * 8.5 + 4.5
    middle = left + width / 2
    texts = "".join(_text(middle, start + 17 * at, row, "middle", "strong" if at == 0 else "") for at, row in enumerate(rows))
    return f'<rect class="{style}" x="{_n(left)}" y="{_n(top)}" width="{_n(width)}" height="{_n(height)}" rx="4"/>{texts}'


def _arrow(points: Sequence[Point]) -> str:
    (x, y) = points[-1]
    return f'<path class="arrow" d="{_path(points)}"/><path class="head" d="M{_n(x - 4.5)} {_n(y - 4)}h9l-4.5 9z"/>'


def _caption(x: float, y: float, text: str) -> str:
    half = 0.27 * _FONT * len(text) + 8
    paper = f'<rect class="paper" x="{_n(x - half)}" y="{_n(y - 15)}" width="{_n(2 * half)}" height="22"/>'
    return paper + _text(x, y, text, "middle")


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f" class={_quoted(style)}" if style else ""
    return f'<text{kind} x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_clean(text)}</text>'


def _path(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _fit(text: str, width: float) -> str:
    room = max(1, int(width / (0.56 * _FONT)))
    return text if len(text) <= room else text[: max(1, room - 1)] + "…"


def _wrap(text: str, width: float, rows: int) -> list[str]:
    """``text`` in at most ``rows`` lines that fit ``width``; the last one is cut where it must be."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if len(lines) < rows and _fit(candidate, width) != candidate and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = candidate
    return [_fit(line, width) for line in lines]


def _clean(text: str) -> str:
    return escape(_printable(text))


def _quoted(text: str) -> str:
    return quoteattr(_printable(text))


def _printable(text: str) -> str:
    """``text`` without the control characters that XML forbids and readers cannot see."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _n(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
