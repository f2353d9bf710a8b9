# SPDX-License-Identifier: Apache-2.0
"""The report as files: ``report.json`` is the record, ``report.json.sig`` signs it, ``report.html`` is a view of it.

The JSON is deterministic: sorted keys, two spaces, one newline at the end; equal facts give equal bytes. The signature is
the contract's suite, in hex, over "siloquy report" NUL ‖ SHA-256(report.json). The page is one file: no script, nothing loaded from
anywhere, and a content security policy that would refuse both; it names the digest of the record that it shows.

Not promised: that the page was made from the record (compare its figures), or that the facts are true.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import jinja2
import msgspec

from aggregator.reporting import charts, wording
from aggregator.reporting.figures import Figure
from aggregator.reporting.no_guarantee import KEY, AnyReport, OpenReport
from aggregator.reporting.record import Report, Scalar, SiloBudget
from privacy import files
from privacy.errors import TrustError

JSON_NAME = "report.json"
SIGNATURE_NAME = "report.json.sig"
HTML_NAME = "report.html"

_TEMPLATES = Path(__file__).parents[1] / "templates"


def write(report: AnyReport, folder: Path, *, sign: Callable[[bytes], bytes]) -> tuple[Path, Path]:
    """Write record, signature and page into ``folder`` (made when missing); the paths of record and page.

    Each file is replaced whole, or stays as it was.

    Args:
        sign: bytes to their signature, in the contract's suite; it is given ``signing_input`` of the record.

    Raises:
        MachineError: the folder or a file cannot be written.
    """
    files_of_record = folder / JSON_NAME, folder / SIGNATURE_NAME, folder / HTML_NAME
    data = encode(report)
    page = render(report)
    signature = sign(signing_input(data)).hex().encode() + b"\n"
    files.make_folder(folder)
    for path, content in zip(files_of_record, (data, signature, page.encode()), strict=True):
        files.sweep(path)
        files.write_atomic(path, content)
    return files_of_record[0], files_of_record[2]


def encode(report: AnyReport) -> bytes:
    """The record: the report as JSON, keys sorted, indented by two, UTF-8."""
    return msgspec.json.format(msgspec.json.encode(report, order="sorted"), indent=2) + b"\n"


def decode(data: bytes) -> AnyReport:
    """The report in ``data``, which must be exactly what ``encode`` writes. One without differential privacy begins by saying so.

    Raises:
        TrustError: not this schema, or another spelling of it.
    """
    try:
        is_open = data.startswith(b'{\n  "' + KEY.encode() + b'"')
        report: AnyReport = msgspec.json.decode(data, type=OpenReport) if is_open else msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TrustError(f"not a report: {error}", hint="ask the aggregator for report.json again", code="malformed") from error
    if encode(report) != data:
        raise TrustError("the report is not in its canonical form", hint="ask for report.json as it was written", code="malformed")
    return report


def signing_input(data: bytes) -> bytes:
    """What the signature of the record ``data`` covers: "siloquy report" NUL ‖ SHA-256(data)."""
    return b"siloquy report\0" + hashlib.sha256(data).digest()


def render(report: AnyReport) -> str:
    """The page, as one HTML document.

    Formal guarantees: every text of the report is escaped; there is no script, no form and no address of anything outside;
    the policy allows one style sheet, by its hash, and nothing else.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        up=wording.up,
        down=wording.down,
        small=wording.scientific,
        size=wording.size,
        utc=_utc,
        percent=_percent,
        number=_number,
        groups=_groups,
    )
    style = environment.get_template("report.css.j2").render()
    common = {
        "report": report,
        "style": style,
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "record_digest": hashlib.sha256(encode(report)).hexdigest(),
    }
    if isinstance(report, OpenReport):
        return environment.get_template("report-open.html.j2").render(common)
    return environment.get_template("report.html.j2").render(common, pictures=_pictures(report), severities=_SEVERITIES)


_SEVERITIES = {
    "guarantee": "Without these there is no guarantee",
    "figure": "If these fail, the figure is higher",
    "scope": "Outside the guarantee",
}


def _pictures(report: Report) -> dict[str, str | list[str]]:
    """All charts of the page; their texts are escaped by ``charts``, so the template marks them safe."""
    return {
        "burn_wide": _burn_down(report, key="burn-wide", width=720),
        "burn_narrow": _burn_down(report, key="burn-narrow", width=350),
        "bars": [_bar(report, silo) for silo in report.silos],
        "crowds": [_crowd(report, position) for position in range(len(report.guarantee.odds))],
        "flow": _flow(report),
        "upload": _bytes_bar(report, "upload", report.traffic.upload_bytes),
        "lora": _bytes_bar(report, "lora", report.traffic.lora_bytes),
        "strip": _strip(report),
    }


def _burn_down(report: Report, *, key: str, width: int) -> str:
    limit = report.silos[0].limit
    by_rdp = tuple((float(each.rounds), each.epsilon_rdp) for each in report.burn_down)
    by_pld = tuple((float(each.rounds), each.epsilon_pld) for each in report.burn_down if each.epsilon_pld is not None)
    lines = [charts.Line(label=f"RDP {wording.up(by_rdp[-1][1])}", points=by_rdp, style="second")]
    if len(by_pld) > 1:
        lines.append(charts.Line(label=f"PLD {wording.up(by_pld[-1][1])}", points=by_pld, style="first"))
    now = report.accounting.spent.rounds
    return charts.line_chart(
        lines,
        limit=limit,
        limit_label=f"limit {limit:g}",
        now=float(now),
        x_label="rounds charged",
        y_label="ε",
        key=key,
        width=width,
        title="What each round adds to ε",
        desc=f"ε after each charged round, by PLD and by RDP, from 0 to the end of the plan. After {wording.counted(now, 'round')} "
        f"ε is {_words(report.accounting.spent)}; at the end of the plan {_words(report.accounting.plan)}; the limit is {limit:g}.",
    )


def _words(figure: Figure) -> str:
    pld = "not computed" if figure.epsilon_pld is None else wording.up(figure.epsilon_pld)
    return f"{pld} by PLD and {wording.up(figure.epsilon_rdp)} by RDP"


def _bar(report: Report, silo: SiloBudget) -> str:
    return charts.bar(
        value=silo.spent.epsilon,
        full=silo.limit,
        mark=report.accounting.plan.epsilon,
        key=f"bar-{silo.silo}",
        title=f"{silo.name}: ε spent of its limit",
        desc=f"{wording.up(silo.spent.epsilon)} of {silo.limit:g} spent; the tick marks the end of the plan.",
    )


def _crowd(report: Report, position: int) -> str:
    odds = report.guarantee.odds[position]
    found, guessed = math.ceil(1000 * odds.spent - 1e-9), round(1000 * odds.false_positive_rate)
    return charts.crowd(
        found=found,
        guessed=guessed,
        key=f"crowd-{position}",
        title="Of 1,000 that took part, how many any test can find",
        desc=f"At most {found:,} of 1,000; guessing finds {guessed:,}.",
    )


def _flow(report: Report) -> str:
    return charts.flow(
        silos=[silo.name for silo in report.silos],
        kept="keeps its records",
        upload=f"masked upload, {wording.size(report.traffic.upload_bytes)} each",
        total="reads the sum over all silos, no single one",
        everyone="next model: every silo computes it itself",
        key="flow",
        title="What leaves each site in a round",
        desc=f"{wording.counted(len(report.silos), 'silo')} keep their records. Each sends one masked upload to the aggregator, "
        "which can read their sum only. From the sum every silo computes the next model itself.",
    )


def _bytes_bar(report: Report, key: str, count: int) -> str:
    what = {"upload": "Sent per silo and round", "lora": "Plain LoRA would send"}[key]
    full = max(report.traffic.upload_bytes, report.traffic.lora_bytes)
    return charts.bar(value=count, full=full, key=f"bytes-{key}", title=what, desc=f"{what}: {wording.size(count)}.")


def _strip(report: Report) -> str:
    kinds = [each.kind for each in report.rounds]
    return charts.rounds_strip(
        kinds,
        key="strip",
        title="Rounds in order",
        desc=f"{wording.counted(kinds.count('result'), 'round')} with a result and {kinds.count('void')} void, in order.",
    )


def _utc(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _percent(rate: float, *, bound: bool = False) -> str:
    """A rate in percent, kept on one line; a bound is rounded up."""
    return f"{wording.up(100 * rate, 1) if bound else format(100 * rate, 'g')}\u00a0%"


def _number(value: Scalar) -> str:
    """A parameter for people: whole numbers in groups of three, others to six digits, small ones by powers of ten."""
    if value is None or isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return wording.scientific(value) if 0 < abs(value) < 0.001 else f"{value:.6g}"


def _groups(digest: str) -> str:
    """A digest in groups of eight digits, so that two people can compare it and a line can break."""
    return " ".join(digest[start : start + 8] for start in range(0, len(digest), 8))
