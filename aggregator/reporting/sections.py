# SPDX-License-Identifier: Apache-2.0
"""Sections that a report has with and without differential privacy: what left, rounds, keys, commands, crosswalk, and the rest."""

from __future__ import annotations

from aggregator.reporting.crosswalk import Crossing
from aggregator.reporting.no_guarantee import AnyReport
from aggregator.reporting.record import RoundFacts
from privacy.reporting.blocks import (
    Bullets,
    Figure,
    Heading,
    Headline,
    Inline,
    Paragraph,
    Row,
    Section,
    Span,
    Table,
    code,
    column,
    note,
    paragraphs,
    row,
    small,
)
from privacy.reporting.numbers import groups, plain, size, utc

_LAYERS = {"top": "top of the pyramid", "middle": "middle", "base": "base", "hazard": "hazard"}


def size_of(report: AnyReport) -> tuple[Headline, Headline]:
    """How many silos and rounds there are, for the head of the report."""
    f, results = report.federation, sum(each.kind == "result" for each in report.rounds)
    ended = f"{results} with a result, {len(report.rounds) - results} void"
    return (
        Headline(label="Silos", value=str(len(report.silos)), small=f"{f.mode} mode, version {f.version}"),
        Headline(label="Rounds", value=str(len(report.rounds)), small=ended),
    )


def made(report: AnyReport) -> Paragraph:
    """When, by whom and from what."""
    words: Inline = (
        f"Made {utc(report.generated_at)} UTC, by the aggregator, from the contract with digest ",
        code(groups(report.federation.contract_digest)),
        f", valid until {report.federation.expires}.",
    )
    return Paragraph(text=words, note=True)


def mechanism(report: AnyReport, words: str, caption: str) -> Section:
    """Every parameter."""
    rows = tuple(
        row(each.name, (Span(text=each.symbol, style="symbol"),), plain(each.value), each.meaning) for each in report.mechanism
    )
    table = Table(
        caption=caption, rows=rows, stack=True, style="params",
        columns=(column("Parameter", 0.5), column("Symbol", 0.0, style="symbol"), column("Value", numeric=True), column("Meaning")),
    )  # fmt: skip
    return Section(key="mechanism", title="The mechanism", blocks=(Paragraph(text=words), table))


def stayed(report: AnyReport) -> tuple[Heading, Paragraph, Bullets]:
    """What has no message in the protocol."""
    return (
        Heading(text="What stayed"),
        note("The protocol has no message for any of these."),
        Bullets(items=report.traffic.stayed),
    )


def what_left(report: AnyReport, caption: str) -> Table:
    """Each message that a silo sends."""
    return Table(
        caption=caption, stack=True, headed=False, rows=tuple(row(each.what, each.form,
         each.reader) for each in report.traffic.left),
        columns=(column("What", 1.2), column("In which form"), column("Who can read it", 0.8)),
    )  # fmt: skip


def rounds(report: AnyReport, strip: Figure | None) -> Section:
    """Each round as it was stored."""
    state = Paragraph(text=("State of the model now: ", code(groups(report.federation.state_digest))), note=True)
    if not report.rounds:
        return Section(key="rounds", title="Rounds", blocks=(*paragraphs("No round has been closed yet."), state))
    table = Table(
        caption="Each round as the aggregator stored it. Times are UTC. Digests are cut to 16 digits here; the record has "
         "them whole.",
        tall=True, rows=tuple(map(_round, report.rounds)),
        columns=(
            column("Round", numeric=True), column("Ended", 0.0, style="nowrap"), column("Outcome", 1.0),
             column("Uploads\nof silos", 0.7),
            column("Received", numeric=True), column("Digest of outcome", 0.0), column("of state", 0.0),
        ),
    )  # fmt: skip
    return Section(key="rounds", title="Rounds", blocks=(*([] if strip is None else [strip]), table, state))


def _round(each: RoundFacts) -> Row:
    outcome: str | Span = each.kind if each.kind == "result" else Span(text=each.kind, style="warn")
    said = [*(["basis round"] if each.basis else []), *([each.reason] if each.reason else [])]
    return row(
        str(each.number), utc(each.closed_at), (outcome, *map(small, said)),
        ", ".join(map(str, each.participants)) or "none", size(each.bytes_in), (code(each.outcome_digest[:16]),),
        (code(each.state_digest[:16]),),
    )  # fmt: skip


def assumptions(report: AnyReport, caption: str, severity: str | None = None) -> Table:
    """What the figures rest on; those of one severity, or all."""
    found = [each for each in report.assumptions if severity in (None, each.severity)]
    return Table(
        caption=caption, stack=True, hide_caption=True, rows=tuple(row(each.id, each.text, each.if_wrong) for each in found),
        columns=(column("No.", 0.0), column("Assumption", 1.7), column("If it fails")),
    )  # fmt: skip


def parties(report: AnyReport) -> Section:
    """Software, keys, consents."""
    owners = [row("aggregator", (code(report.aggregator_fingerprint),))]
    owners += [
        row((each.name, small(f"{each.organisation}, silo {each.silo}")), (code(each.fingerprint),)) for each in report.silos
    ]
    software = [row(report.federation.model, (code(groups(report.federation.model_digest)),))]
    software += [row(name, (code(version),)) for name, version in sorted(report.software.items())]
    keys = Table(
        caption="Fingerprints of the parties’ keys. Compare them with their owners, by telephone or on paper.", stack=True,
        rows=tuple(owners), columns=(column("Party", 0.4), column("Fingerprint")),
    )  # fmt: skip
    made_by = Table(
        caption="Software and base model at the aggregator", rows=tuple(software),
        columns=(column("What", 0.4), column("Version or digest")),
    )  # fmt: skip
    return Section(key="parties", title="Software, keys, consents", blocks=(*paragraphs(*report.consents), keys, made_by))


def crosswalk(rows: tuple[Crossing, ...]) -> Section:
    """The blocks and hazards of NIST SP 800-226."""
    table = Table(
        caption="Rows P are blocks of the pyramid, from its top down; rows H are hazards. Evidence: a place in the record, "
         "or a command.",
        stack=True, rows=tuple(row(each.id, _title(each), each.value, _evidence(each), each.residual) for each in rows),
        columns=(column("No.", 0.0), column("Block or hazard", 0.8), column("Value", 1.2), column("Evidence", 0.75),
         column("What remains")),
    )  # fmt: skip
    words = (
        "NIST SP 800-226 asks that every block below a claim is examined, and names hazards. Each is answered here with a "
        "value, with the "
        "place of its evidence, and with the risk that remains. The publication numbers neither blocks nor hazards; the "
        "numbers are this "
        "report’s. It is no assessment by NIST."
    )
    return Section(key="crosswalk", title="By NIST SP 800-226", blocks=(Paragraph(text=words), table))


def _title(each: Crossing) -> Inline:
    return each.title if each.layer == "hazard" else (each.title, small(_LAYERS[each.layer]))


def _evidence(each: Crossing) -> Inline:
    found: list[str | Span] = []
    for place in each.evidence:
        found += [", ", code(place)] if found else [code(place)]
    return tuple(found)


def checks(report: AnyReport) -> Section:
    """Commands, where to run them, and what they show."""
    table = Table(
        caption="Commands, where to run them, and what they show", stack=True,
        rows=tuple(row((code(each.command),), each.where, each.shows) for each in report.checks),
        columns=(column("Command", 0.8), column("Where", 0.5), column("What it shows", 1.3)),
    )  # fmt: skip
    return Section(key="check", title="How to check this yourself", blocks=(table,))


def beside(report: AnyReport, words: str) -> tuple[Section, ...]:
    """What the caller added; nothing where nothing was."""
    if not report.extra:
        return ()
    table = Table(
        caption="Facts beside the protocol", columns=(column("What"), column("Value")),
        rows=tuple(row(name, plain(value)) for name, value in sorted(report.extra.items())),
    )  # fmt: skip
    return (Section(key="extra", title="Also recorded", blocks=(Paragraph(text=words), table), numbered=False),)


def footer(report: AnyReport, digest: str) -> Inline:
    """What this view is, and what it is not."""
    return (
        "This is a view. The record is ", code("report.json"), f" ({report.format}), SHA-256 ", code(groups(digest)),
        "; its signature lies beside it in ", code("report.json.sig"),
        ". It is evidence for people who judge; it is no verdict on any law.",
    )  # fmt: skip


def stamp(report: AnyReport, digest: str) -> str:
    """The line at the foot of every page on paper."""
    return f"{report.federation.name} · record {groups(digest[:16])}… · {utc(report.generated_at)} UTC"
