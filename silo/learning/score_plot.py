# SPDX-License-Identifier: Apache-2.0
"""The audit's picture: scores of canaries that were in and that were out, and how well they are told apart. One SVG, no file read.

A pure function from numbers to text. It stands alone, carries a title and a description for readers who do not see it, follows
light and dark, loads nothing and runs nothing; members and others differ by hatching as well as by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from privacy.dp.empirical import Booleans, Floats, Roc, roc

_BINS = 40
_WORDS = {"in": "in the data", "out": "not in the data"}
_LEFT, _TOP, _WIDTH, _HEIGHT, _GAP = 56.0, 64.0, 360.0, 260.0, 90.0
_STYLE = (
    "svg{color-scheme:light dark;font:13px system-ui,sans-serif;color:#1d232b;background:#fff}"
    "text{fill:currentColor}.frame,.curve,.chance{fill:none;stroke:currentColor}.curve{stroke-width:2}"
    ".chance{stroke-dasharray:4 4;opacity:.6}.in{fill:#b3541e;fill-opacity:.75}"
    ".out{fill:url(#hatch);stroke:#1f6fb2}.head{font-weight:600}"
    "@media(prefers-color-scheme:dark){svg{color:#e8eaed;background:#15181c}.in{fill:#e08a4f}.out{stroke:#6db3ea}}"
)


def picture(scores: Floats, included: Booleans, lines: Sequence[str]) -> str:
    """A histogram of ``scores`` (m,) by membership and the curve of true against false positives, under a title of ``lines``."""
    curve = roc(scores, included)
    right = _LEFT + _WIDTH + _GAP
    width, height = right + _WIDTH + 24, _TOP + _HEIGHT + 56
    words = (
        f"{int(included.sum())} canaries in, {int((~included).sum())} out. Area under the curve {curve.area:.3f}; 0.5 is chance."
    )
    titles = [f'<text class="head" x="{_LEFT:g}" y="{20 + 18 * place}">{escape(line)}</text>' for place, line in enumerate(lines)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(" ".join(lines))}</title>', f'<desc id="desc">{escape(words)}</desc>',
        f"<style>{_STYLE}</style>",
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0v5" stroke="#1f6fb2" stroke-width="2"/></pattern></defs>',
        *titles, *_histogram(scores, included), *_curve(curve, right), "</svg>",
    ]) + "\n"  # fmt: skip


def _histogram(scores: Floats, included: Booleans) -> list[str]:
    finite = np.clip(np.nan_to_num(scores), -1e300, 1e300)
    edges = np.linspace(finite.min(), max(finite.max(), finite.min() + 1e-9), _BINS + 1)
    groups = {"out": np.histogram(finite[~included], edges)[0], "in": np.histogram(finite[included], edges)[0]}
    most = max(1, *(int(counts.max()) for counts in groups.values()))
    step, made = _WIDTH / _BINS, [_frame(_LEFT)]
    for place, (name, counts) in enumerate(groups.items()):
        path = "".join(
            f"M{_LEFT + step * (k + 0.5 * place):.1f} {_TOP + _HEIGHT:.1f}v{-_HEIGHT * int(count) / most:.1f}h{step / 2:.1f}"
            f"v{_HEIGHT * int(count) / most:.1f}z"
            for k, count in enumerate(counts)
            if count
        )
        made.append(f'<path class="{name}" d="{path}"/>')
        at = _TOP + 18 + 20 * place
        made.append(f'<rect class="{name}" x="{_LEFT + 10:g}" y="{at - 10:g}" width="12" height="12"/>')
        made.append(f'<text x="{_LEFT + 28:g}" y="{at:g}">{_WORDS[name]}</text>')
    axis = _label(_LEFT, "score: log of how much likelier with the canary than without")
    return [*made, axis, _tick(_LEFT, f"{edges[0]:.3g}", 0.0), _tick(_LEFT, f"{edges[-1]:.3g}", 1.0)]


def _curve(curve: Roc, left: float) -> list[str]:
    corners = zip(curve.false_positive.tolist(), curve.true_positive.tolist(), strict=True)
    pixels = dict.fromkeys(f"{left + _WIDTH * false:.0f},{_TOP + _HEIGHT * (1 - true):.0f}" for false, true in corners)
    points = " ".join(pixels)  # no more than one point a pixel
    return [
        _frame(left),
        f'<path class="chance" d="M{left:g} {_TOP + _HEIGHT:g}L{left + _WIDTH:g} {_TOP:g}"/>',
        f'<polyline class="curve" points="{points}"/>',
        _inside(left, 34, f"area {curve.area:.3f} (0.5 is chance)"),
        _inside(left, 14, f"{100 * curve.at(0.01):.1f} % of members at 1 % false alarms"),
        _label(left, "false alarms"), _tick(left, "0", 0.0), _tick(left, "1", 1.0),
        f'<text transform="translate({left - 12:g} {_TOP + _HEIGHT / 2:g}) rotate(-90)" text-anchor="middle">members found</text>',
    ]  # fmt: skip


def _inside(left: float, up: float, text: str) -> str:
    return f'<text x="{left + _WIDTH - 10:g}" y="{_TOP + _HEIGHT - up:g}" text-anchor="end">{escape(text)}</text>'


def _frame(left: float) -> str:
    return f'<rect class="frame" x="{left:g}" y="{_TOP:g}" width="{_WIDTH:g}" height="{_HEIGHT:g}"/>'


def _label(left: float, text: str) -> str:
    return f'<text x="{left + _WIDTH / 2:g}" y="{_TOP + _HEIGHT + 40:g}" text-anchor="middle">{escape(text)}</text>'


def _tick(left: float, text: str, at: float) -> str:
    return f'<text x="{left + _WIDTH * at:g}" y="{_TOP + _HEIGHT + 20:g}" text-anchor="middle">{escape(text)}</text>'
