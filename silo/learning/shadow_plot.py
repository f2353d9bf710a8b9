# SPDX-License-Identifier: Apache-2.0
"""The picture of a membership attack: members found against false alarms, both on logarithmic axes, under what epsilon allows.

A pure function from numbers to text. It stands alone, carries a title and a description for readers who do not see it, follows
light and dark, loads nothing and runs nothing; its lines differ by dashes as well as by colour, and each is named where it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

import numpy as np

from privacy.dp import empirical
from privacy.dp.empirical import Floats
from silo.learning.shadows import RATES, Attack, Finding

_LEFT, _TOP, _SIZE, _KEY = 70.0, 64.0, 400.0, 250.0
_FLOOR, _DECADES, _POINTS = 1e-3, 3, 240
_STYLE = (
    "svg{color-scheme:light dark;font:13px system-ui,sans-serif;color:#1d232b;background:#fff}"
    "text{fill:currentColor}.frame,.grid,.chance,.bound,.found,.control,.span{fill:none;stroke:currentColor}"
    ".grid{opacity:.18}.chance{stroke-dasharray:2 4;opacity:.7}.bound{stroke-width:2.5;stroke:#1f6fb2;stroke-dasharray:9 4}"
    ".found{stroke-width:2.5;stroke:#b3541e}.control{stroke-width:1.5;stroke:#6b4fa0;stroke-dasharray:4 3}"
    ".span{stroke:#b3541e;stroke-width:1.5}.dot{fill:#b3541e}.beyond{fill:#1f6fb2;fill-opacity:.09}.head{font-weight:600}"
    "@media(prefers-color-scheme:dark){svg{color:#e8eaed;background:#15181c}.bound{stroke:#6db3ea}.beyond{fill:#6db3ea}"
    ".found,.span{stroke:#e08a4f}.dot{fill:#e08a4f}.control{stroke:#b79be0}}"
)


def picture(finding: Finding, lines: Sequence[str]) -> str:
    """The attack, its control and the bound on log-log axes, under a title of ``lines``."""
    width, height = _LEFT + _SIZE + _KEY, _TOP + _SIZE + 64
    titles = [f'<text class="head" x="{_LEFT:g}" y="{20 + 18 * place}">{escape(line)}</text>' for place, line in enumerate(lines)]
    bound = _line(finding.allowed)
    corner = f"{_LEFT + _SIZE:.1f},{_TOP:.1f} {_LEFT:.1f},{_TOP:.1f}"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(" ".join(lines))}</title>', f'<desc id="desc">{escape(described(finding))}</desc>',
        f"<style>{_STYLE}</style>", *titles, *_axes(),
        f'<polygon class="beyond" points="{bound} {corner}"/>', f'<polyline class="bound" points="{bound}"/>',
        f'<polyline class="chance" points="{_line(lambda rate: rate)}"/>',
        f'<polyline class="control" points="{_line(_empirical(finding.control))}"/>',
        f'<polyline class="found" points="{_line(_empirical(finding.attack))}"/>',
        *_spans(finding), *_key(finding), "</svg>",
    ]) + "\n"  # fmt: skip


def described(finding: Finding) -> str:
    """The picture in words."""
    said = [
        f"{finding.runs} runs of {finding.steps} steps on {finding.units} units were attacked with the laws of as many shadow runs."
    ]
    for rate in RATES:
        found, low, high = finding.attack.found_at(rate)
        control, allowed = finding.control.found_at(rate)[0], finding.allowed(rate)
        said.append(
            f"At {_percent(rate)} false alarms the attack finds {_percent(found)} of the members (95 % interval {_percent(low)} to "
            f"{_percent(high)}), epsilon {finding.claimed:.2f} allows {_percent(allowed)}; without clipping and noise it finds "
            f"{_percent(control)}."
        )
    return " ".join(said)


def _empirical(attack: Attack) -> Callable[[float], float]:
    curve = empirical.roc(attack.scores, attack.included)
    return curve.at


def _line(of: Callable[[float], float]) -> str:
    """The points of a curve from the least false alarms that are drawn to all of them; what is below the frame is at its edge."""
    rates: Floats = np.logspace(math.log10(_FLOOR), 0, _POINTS)
    return " ".join(f"{_across(rate):.1f},{_up(of(rate)):.1f}" for rate in rates.tolist())


def _across(rate: float) -> float:
    return _LEFT + _SIZE * (1 + math.log10(max(rate, _FLOOR)) / _DECADES)


def _up(rate: float) -> float:
    return _TOP - _SIZE * math.log10(min(max(rate, _FLOOR), 1.0)) / _DECADES


def _axes() -> list[str]:
    made = [f'<rect class="frame" x="{_LEFT:g}" y="{_TOP:g}" width="{_SIZE:g}" height="{_SIZE:g}"/>']
    for power in range(-_DECADES, 1):
        rate = 10.0**power
        x, y = _across(rate), _up(rate)
        made.append(f'<path class="grid" d="M{x:.1f} {_TOP:g}v{_SIZE:g}M{_LEFT:g} {y:.1f}h{_SIZE:g}"/>')
        made.append(f'<text x="{x:.1f}" y="{_TOP + _SIZE + 20:g}" text-anchor="middle">{_percent(rate)}</text>')
        made.append(f'<text x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{_percent(rate)}</text>')
    middle = _TOP + _SIZE / 2
    made.append(f'<text x="{_LEFT + _SIZE / 2:g}" y="{_TOP + _SIZE + 44:g}" text-anchor="middle">false alarms</text>')
    made.append(f'<text transform="translate(16 {middle:g}) rotate(-90)" text-anchor="middle">members found</text>')
    return made


def _spans(finding: Finding) -> list[str]:
    """The reported rates with their intervals."""
    made = []
    for rate in RATES:
        found, low, high = finding.attack.found_at(rate)
        x = _across(rate)
        made.append(f'<path class="span" d="M{x:.1f} {_up(low):.1f}V{_up(high):.1f}M{x - 5:.1f} {_up(high):.1f}h10"/>')
        made.append(f'<circle class="dot" cx="{x:.1f}" cy="{_up(found):.1f}" r="4"/>')
    return made


def _key(finding: Finding) -> list[str]:
    rows = (
        ("control", "the attack, no clipping, no noise"), ("bound", f"most that epsilon {finding.claimed:.2f} allows"),
        ("found", "the attack on the mechanism"), ("chance", "guessing"),
    )  # fmt: skip
    left, made = _LEFT + _SIZE + 14, []
    for place, (name, words) in enumerate(rows):
        y = _TOP + 14 + 24 * place
        made.append(f'<path class="{name}" d="M{left:g} {y - 4:g}h26"/><text x="{left + 32:g}" y="{y:g}">{escape(words)}</text>')
    return made


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"
