# SPDX-License-Identifier: Apache-2.0
"""A silo's own report as a document: its record in sections, marked on every page as what does not leave the site.

Promised: every figure is the record's; each bound is rounded up, each remainder down.
"""

from __future__ import annotations

from msgspec import UNSET

from privacy.reporting import charts
from privacy.reporting.blocks import (
    Block,
    Bullets,
    Document,
    Figure,
    Headline,
    Paragraph,
    Picture,
    Section,
    Table,
    code,
    column,
    note,
    paragraphs,
    row,
    small,
)
from privacy.reporting.numbers import counted, down, groups, plain, scientific, up, utc
from silo.reporting.record import SiloReport

BANNER = "Does not leave this site"
_NOT = "not computed"


def of(report: SiloReport, digest: str) -> Document:
    """The document of a record with this hex SHA-256."""
    f, budget = report.federation, report.budget
    return Document(
        name=f"Silo report: {report.silo.name} in {f.name}",
        eyebrow=f"Report of a silo in {f.name}",
        title=report.silo.organisation,
        lead=_lead(report),
        figures=(
            Headline(label="ε spent", value=_up(budget.epsilon, "none"), small=f"of {budget.limit:g}, this silo’s limit"),
            Headline(
                label="δ", value="none" if budget.delta is None else scientific(budget.delta), small="failure probability"
            ),
            Headline(label="Units", value=plain(report.records.units), small=f"in {counted(report.records.records, 'record')}"),
            Headline(label="Rounds", value=str(f.round), small=f"settled of {f.rounds_planned} planned"),
        ),
        sections=(_summary(report), _budget(report), _runs(report), _records(report), _keys(report), _checks()),
        footer=(
            "This is a view. The record is ", code("silo-report.json"), f" ({report.format}), SHA-256 ", code(groups(digest)),
            "; its signature lies beside it. It is evidence for people who judge; it is no verdict on any law.",
        ),
        created=report.generated_at,
        author=f"silo {report.silo.name}",
        stamp=f"{report.silo.name} · record {groups(digest[:16])}… · {utc(report.generated_at)} UTC",
        banner=f"{BANNER} · {report.silo.organisation}",
    )  # fmt: skip


def _up(value: float | None, missing: str = _NOT) -> str:
    return missing if value is None else up(value)


def _lead(report: SiloReport) -> str:
    budget = report.budget
    if budget.epsilon is None or budget.delta is None:
        return "There is no differential privacy on this silo’s ledger: nothing bounds what was revealed about its records."
    share = up(100 * budget.epsilon / budget.limit, 0)
    return (
        f"Everything on this silo’s ledger reveals whether {report.records.unit} took part by no more than ε = "
        f"{up(budget.epsilon)} "
        f"at δ = {scientific(budget.delta)}, against the insiders of each contract: {share}\u00a0% of this silo’s own limit "
        f"ε = {budget.limit:g}."
    )


def _summary(report: SiloReport) -> Section:
    f, others = report.federation, len(report.runs)
    sentences = (
        report.warning,
        f"The ledger holds {counted(report.ledger.entries, 'entry').replace('entrys', 'entries')} over "
        f"{counted(others, 'run')}. Every attempt is charged, also one whose round ended void.",
        "The plan declared with the members of this federation has "
        f"{counted(report.budget.rounds_left, 'attempt')} left on this ledger.",
    )
    made = note(
        f"Made {utc(report.generated_at)} UTC at this silo, member {f.member} under version {f.version}, valid until {f.expires}."
    )
    return Section(key="summary", title="Summary", blocks=(*paragraphs(*sentences), made))


def _budget(report: SiloReport) -> Section:
    budget = report.budget
    words = Paragraph(
        text="The figure covers everything that this silo’s ledger charged, whatever the federation or the run. Two accountants "
        "bound it; the smaller bound counts. Where runs under several contracts compose, the filter decides, which is of RDP alone."
    )
    figures = Table(
        caption="Spent, and what is left",
        columns=(column("What"), *(column(title, numeric=True) for title in ("PLD", "RDP", "Certified", "Limit", "Left"))),
        rows=(
            row(
                "everything on the ledger", _up(budget.epsilon_pld), _up(budget.epsilon_rdp), _up(budget.epsilon, "none"),
                f"{budget.limit:g}", down(budget.left),
            ),
        ),
    )  # fmt: skip
    return Section(key="budget", title="Budget", blocks=(words, figures, *_several(report), *_forecast(report)))


def _several(report: SiloReport) -> tuple[Table, ...]:
    """What a unit in more silos has than assumed, and a person with several records where the unit is one."""
    who = {"silos": "A unit that {} silos know", "records": "A person with {} records in each silo that knows them"}
    found = () if report.several is UNSET else report.several
    table = Table(
        caption="Whoever has more to hide than one unit is protected less. Certified ε of everything on the ledger; what other "
        "silos did in rounds without this one is not on it:",
        columns=(column("Who"), column("ε now", numeric=True)),
        rows=tuple(row(who[each.of].format(each.count), _up(each.epsilon, "no figure")) for each in found),
        style="slim",
    )
    return (table,) if found else ()


def _forecast(report: SiloReport) -> tuple[Block, ...]:
    points = [(each.rounds, each.epsilon) for each in report.forecast if each.epsilon is not None]
    table = Table(
        caption="What more rounds of this plan would bring it to",
        columns=(column("More rounds", numeric=True), column("ε", numeric=True), column("Refused")),
        rows=tuple(
            row(str(each.rounds), _up(each.epsilon, "none"), "no" if each.refused is None else f"yes, by the {each.refused}")
            for each in report.forecast
        ),
        style="slim",
    )
    if report.budget.epsilon is None or not points:
        return (table,) if report.forecast else ()
    line = charts.Line(
        label=f"ε {up(points[-1][1])}", style="first",
        points=((0.0, report.budget.epsilon), *((float(rounds), epsilon) for rounds, epsilon in points)),
    )  # fmt: skip
    title = "What more rounds add to ε"
    desc = (
        f"ε is {up(report.budget.epsilon)} now and {up(points[-1][1])} after {counted(points[-1][0], 'more round')}; the limit is "
    )
    desc += f"{report.budget.limit:g}."
    svg = charts.line_chart(
        [line], limit=report.budget.limit, limit_label=f"limit {report.budget.limit:g}", now=None, x_label="more "
         "rounds", y_label="ε",
        key="forecast", title=title, desc=desc,
    )  # fmt: skip
    return (Figure(picture=Picture(svg=svg, alt=f"{title}. {desc}"), caption=title, share=0.85), table)


def _runs(report: SiloReport) -> Section:
    titles = ("Attempts", "Released", "Void", "ε alone", "Part")
    table = Table(
        caption="Each contract on the ledger. Runs of one part may share units and compose; different parts were shown to "
        "share none. Digests are cut to 16 digits here.",
        columns=(column("Run"), column("Contract", 0.0), *(column(title, numeric=True) for title in titles)),
        rows=tuple(
            row(
                each.run or "not declared", (code(each.contract[:16]),), str(each.attempts), str(each.released), str(each.void),
                _up(each.epsilon, "none"), str(each.part),
            )
            for each in report.runs
        ),
        stack=True,
    )  # fmt: skip
    empty = paragraphs("Nothing is charged yet.")
    return Section(key="runs", title="Every run", blocks=(table,) if report.runs else empty)


def _records(report: SiloReport) -> Section:
    found, held = report.records, report.held_out
    counts = Table(
        caption="True counts. They stay here: the contract names a rounded public bound only.",
        columns=(column("What"), column("Count", numeric=True)),
        rows=(
            row((f"privacy units: {found.unit}",), plain(found.units)),
            row("records in the file", plain(found.records)),
            row(("records that may be drawn", small("after the contract’s cap per unit")), plain(found.kept)),
            row("the contract’s bound on units", plain(found.most_units)),
        ),
    )
    blocks: list[Block] = [counts]
    if held is None:
        blocks.append(note("No held-out file was given, so no accuracy is stated."))
    else:
        blocks.append(
            Table(
                caption=(
                    f"Accuracy on {counted(held.records, 'record')} of ", code(held.file), ", exact. That they were not "
                    "trained on is this "
                    "silo’s word.",
                ),
                columns=(column("Model"), column("Accuracy", numeric=True)),
                rows=(row("before the first round", f"{held.accuracy_before:.3f}"), row("now", f"{held.accuracy_after:.3f}")),
                style="slim",
            )
        )  # fmt: skip
    return Section(key="records", title="Records of this site", blocks=tuple(blocks))


def _keys(report: SiloReport) -> Section:
    f = report.federation
    rows = [
        row("this silo’s fingerprint", (code(report.silo.fingerprint),)),
        row("contract", (code(groups(f.contract_digest)),)),
        row("model state", (code(groups(f.state_digest)),)),
        row("last entry of the ledger", (code(groups(report.ledger.head)),)),
        *(row(name, (code(version),)) for name, version in sorted(report.software.items())),
    ]
    table = Table(caption="Digests and software at this silo", columns=(column("What", 0.4), column("Value")), rows=tuple(rows))
    return Section(key="keys", title="Ledger, keys, software", blocks=(table,))


def _checks() -> Section:
    lines = (
        (code("silo verify --report silo-report.json"), ": signature, ledger, every figure, and page and PDF byte for byte"),
        (code("silo budget --forecast 20"), ": the figures, from the ledger as it stands now"),
        (code("sha256sum silo-report.json"), ": the digest of the record, which stands below"),
    )
    return Section(key="check", title="How to check this yourself", blocks=(Bullets(items=lines),))
