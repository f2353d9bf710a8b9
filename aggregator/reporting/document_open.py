# SPDX-License-Identifier: Apache-2.0
"""The report of a federation without differential privacy as a document: it says so first, and shows what was seen instead.

Promised: no number stands where an epsilon would.
"""

from __future__ import annotations

from aggregator.reporting import sections
from aggregator.reporting.no_guarantee import OpenReport
from privacy.reporting.blocks import Document, Headline, Paragraph, Section, Table, column, paragraphs, row, small
from privacy.reporting.numbers import plain, size


def of(report: OpenReport, digest: str) -> Document:
    """The document of a record with this hex SHA-256."""
    f, seen = report.federation, report.participation
    return Document(
        name=f"No differential privacy: {f.name}",
        eyebrow=f"Report on {f.name}",
        title="No differential privacy",
        lead=report.warning,
        figures=(
            Headline(label="ε", value="none", small=report.accounting.reason),
            Headline(label="Rank", value=str(seen.rank), small=f"of the participation matrix, for {seen.silos} silos"),
            *sections.size_of(report),
        ),
        sections=(
            Section(key="summary", title="Summary", blocks=(*paragraphs(*report.summary[1:]), sections.made(report))),
            _seen(report),
            _mechanism(report),
            _left(report),
            sections.rounds(report, None),
            _assumptions(report),
            sections.parties(report),
            sections.crosswalk(report.crosswalk),
            sections.checks(report),
            *sections.beside(report, "Added by whoever made this report; it does not come from the protocol."),
        ),
        footer=sections.footer(report, digest),
        created=report.generated_at,
        author=f"the aggregator of {f.name}",
        stamp=sections.stamp(report, digest),
        banner="No differential privacy",
    )


def _seen(report: OpenReport) -> Section:
    seen = report.participation
    blocks = ", ".join(f"{{{', '.join(map(str, block))}}}" for block in seen.blocks)
    adversaries = Table(
        caption="Three adversaries. None of them faces any noise.",
        columns=(column("Who", 1.6), column("ε")),
        rows=tuple(row(each.who, each.spent.reason) for each in report.guarantee.adversaries),
        stack=True,
        style="framed",
    )
    sums = Table(
        caption=f"{seen.sums} sums were opened, over these sets of silos; blocks {blocks}. "
        f"Rank of the participation matrix: {seen.rank}.",
        columns=(column("Set"), column("Silos", numeric=True)),
        rows=tuple(row(", ".join(map(str, each)), str(len(each))) for each in seen.sets),
        stack=True,
    )
    silos = Table(
        caption="By the aggregator’s count of uploads; a silo’s own ledger may show more.",
        columns=(
            column("Silo"),
            column("ε spent"),
            column("Rounds\ncharged", numeric=True),
            column("Stood in\nsums", numeric=True),
        ),
        rows=tuple(
            row((each.name, small(each.organisation)), each.spent.reason, plain(each.spent.rounds), plain(each.stood))
            for each in report.silos
        ),
        stack=True,
    )
    return Section(key="seen", title="What was seen", blocks=(adversaries, sums, silos, *paragraphs(*report.composition)))


def _mechanism(report: OpenReport) -> Section:
    steps = f", in {report.federation.steps_per_round} steps of its own" if report.federation.mode == "local" else ""
    words = (
        "In each round every silo draws some of its units at random, clips what each would change, and adds the changes up on an "
        f"integer lattice{steps}. Nothing is added to that. Only the sum over whole blocks of silos is opened; the next model is "
        "computed from it by public arithmetic."
    )
    caption = "Every parameter on which the next model depends. All stand in the signed contract or follow from it."
    return sections.mechanism(report, words, caption)


def _left(report: OpenReport) -> Section:
    sent, lora = size(report.traffic.upload_bytes), size(report.traffic.lora_bytes)
    caption = f"Each message that a silo sends in a round, or once per epoch; {sent} per silo and round, {lora} as plain LoRA"
    return Section(key="left", title="What left each site", blocks=(*sections.stayed(report), sections.what_left(report, caption)))


def _assumptions(report: OpenReport) -> Section:
    words = Paragraph(text="What hides which silo added what, and what hides nothing.")
    return Section(key="assumptions", title="Assumptions", blocks=(words, sections.assumptions(report, "Assumptions")))
