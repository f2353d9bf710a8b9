# SPDX-License-Identifier: Apache-2.0
"""The report's pictures from its record: each with a title and a description. No figure is computed."""

from __future__ import annotations

import math

from aggregator.reporting.figures import Figure
from aggregator.reporting.record import Report, SiloBudget
from privacy.reporting import charts
from privacy.reporting.blocks import Picture
from privacy.reporting.numbers import counted, size, up


def burn_down(report: Report, *, key: str, width: int) -> Picture:
    """ε after each charged round, against the limit."""
    limit = report.silos[0].limit
    by_rdp = tuple((float(each.rounds), each.epsilon_rdp) for each in report.burn_down)
    by_pld = tuple((float(each.rounds), each.epsilon_pld) for each in report.burn_down if each.epsilon_pld is not None)
    lines = [charts.Line(label=f"RDP {up(by_rdp[-1][1])}", points=by_rdp, style="second")]
    if len(by_pld) > 1:
        lines.append(charts.Line(label=f"PLD {up(by_pld[-1][1])}", points=by_pld, style="first"))
    now, title = report.accounting.spent.rounds, "What each round adds to ε"
    desc = (
        f"ε after each charged round, by PLD and by RDP, from 0 to the end of the plan. After {counted(now, 'round')} "
        f"ε is {_words(report.accounting.spent)}; at the end of the plan {_words(report.accounting.plan)}; the limit is {limit:g}."
    )
    svg = charts.line_chart(
        lines, limit=limit, limit_label=f"limit {limit:g}", now=float(now), x_label="rounds charged", y_label="ε", key=key,
        width=width, title=title, desc=desc,
    )  # fmt: skip
    return Picture(svg=svg, alt=f"{title}. {desc}")


def _words(figure: Figure) -> str:
    pld = "not computed" if figure.epsilon_pld is None else up(figure.epsilon_pld)
    return f"{pld} by PLD and {up(figure.epsilon_rdp)} by RDP"


def budget(report: Report, silo: SiloBudget) -> Picture:
    """What one silo spent of its limit."""
    title = f"{silo.name}: ε spent of its limit"
    desc = f"{up(silo.spent.epsilon)} of {silo.limit:g} spent; the tick marks the end of the plan."
    svg = charts.bar(
        value=silo.spent.epsilon, full=silo.limit, mark=report.accounting.plan.epsilon, key=f"bar-{silo.silo}", title=title,
        desc=desc,
    )  # fmt: skip
    return Picture(svg=svg, alt=f"{title}. {desc}", bar=True)


def crowd(report: Report, position: int) -> Picture:
    """How many of 1,000 any test can find."""
    odds = report.guarantee.odds[position]
    found, guessed = math.ceil(1000 * odds.spent - 1e-9), round(1000 * odds.false_positive_rate)
    title = "Of 1,000 that took part, how many any test can find"
    desc = f"At most {found:,} of 1,000; guessing finds {guessed:,}."
    return Picture(
        svg=charts.crowd(found=found, guessed=guessed, key=f"crowd-{position}", title=title, desc=desc), alt=f"{title}. {desc}"
    )


def flow(report: Report) -> Picture:
    """What leaves each site in a round."""
    title = "What leaves each site in a round"
    desc = (
        f"{counted(len(report.silos), 'silo')} keep their records. Each sends one masked upload to the aggregator, "
        "which can read their sum only. From the sum every silo computes the next model itself."
    )
    svg = charts.flow(
        silos=[silo.name for silo in report.silos], kept="keeps its records",
        upload=f"masked upload, {size(report.traffic.upload_bytes)} each", total="reads the sum over all silos, no single one",
        everyone="next model: every silo computes it itself", key="flow", title=title, desc=desc,
    )  # fmt: skip
    return Picture(svg=svg, alt=f"{title}. {desc}")


def sent(report: Report, key: str, count: int) -> Picture:
    """Bytes per silo and round, ``key`` is upload or lora."""
    title = {"upload": "Sent per silo and round", "lora": "Plain LoRA would send"}[key]
    full, desc = max(report.traffic.upload_bytes, report.traffic.lora_bytes), f"{title}: {size(count)}."
    return Picture(
        svg=charts.bar(value=count, full=full, key=f"bytes-{key}", title=title, desc=desc), alt=desc, bar=True
    )  # fmt: skip


def strip(report: Report) -> Picture:
    """One mark per round, in order."""
    kinds, title = [each.kind for each in report.rounds], "Rounds in order"
    desc = f"{counted(kinds.count('result'), 'round')} with a result and {kinds.count('void')} void, in order."
    return Picture(svg=charts.rounds_strip(kinds, key="strip", title=title, desc=desc), alt=f"{title}: {desc}")
