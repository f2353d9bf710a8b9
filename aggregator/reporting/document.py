# SPDX-License-Identifier: Apache-2.0
"""The report as a document: its record in sections, tables and pictures, from which page and PDF are made.

Promised: every figure and every fact is the record's; each bound is rounded up, each remainder down. Nothing is computed.
"""

from __future__ import annotations

from aggregator.reporting import pictures, sections
from aggregator.reporting.figures import Figure as Cost
from aggregator.reporting.record import Adversary, ProfilePoint, Report, SiloBudget
from aggregator.reporting.record import Version as VersionFacts
from privacy.reporting.blocks import (
    Beside,
    Document,
    Figure,
    Heading,
    Headline,
    Inline,
    Pair,
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
    strong,
)
from privacy.reporting.numbers import down, percent, plain, scientific, size, up

_SEVERITIES = {
    "guarantee": ("Without these there is no guarantee", "Must hold"),
    "figure": ("If these fail, the figure is higher", "Should hold"),
    "scope": ("Outside the guarantee", "Not covered"),
}
_NOT_COMPUTED = Span(text="not computed", style="note")


def of(report: Report, digest: str) -> Document:
    """The document of a record with this hex SHA-256."""
    f, limit = report.federation, report.silos[0].limit
    return Document(
        name=f"Privacy report: {f.name}",
        eyebrow="Privacy report",
        title=f.name,
        lead=report.summary[0],
        figures=(
            Headline(label="ε spent", value=up(report.accounting.spent.epsilon), small=f"of {limit:g}, the limit"),
            Headline(label="δ", value=scientific(report.guarantee.delta), small="failure probability"),
            *sections.size_of(report),
        ),
        sections=(
            Section(key="summary", title="Summary", blocks=(*paragraphs(*report.summary[1:]), sections.made(report))),
            _guarantee(report),
            _mechanism(report),
            _accountants(report),
            _silos(report),
            _composition(report),
            _left(report),
            sections.rounds(report, _strip(report)),
            _assumptions(report),
            sections.parties(report),
            sections.crosswalk(report.crosswalk),
            sections.checks(report),
            *sections.beside(
                report,
                "Added by whoever made this report; it does not come from the protocol, and no figure above rests on it.",
            ),
        ),
        footer=sections.footer(report, digest),
        created=report.generated_at,
        author=f"the aggregator of {f.name}",
        stamp=sections.stamp(report, digest),
    )


def _figure(value: float | None) -> Inline:
    return (_NOT_COMPUTED,) if value is None else up(value)


# --- the guarantee -------------------------------------------------------------------------------------------------------


def _guarantee(report: Report) -> Section:
    unit, delta = report.guarantee.unit, scientific(report.guarantee.delta)
    own = ": in local mode the silo’s own, for all three" if report.federation.mode == "local" else ""
    adversaries = Table(
        caption=f"Three adversaries, by how much of the noise each one cannot subtract{own}. All figures are upper bounds.",
        columns=(
            column("Who"),
            *(column(title, numeric=True) for title in ("Noise\nshares", "Noise\nσ′")),
            *(column(title, numeric=True) for title in ("ε now\nPLD", "ε now\nRDP", "Plan\nPLD", "Plan\nRDP")),
        ),
        rows=tuple(map(_adversary, report.guarantee.adversaries)),
        stack=True,
        style="framed",
    )
    return Section(
        key="guarantee",
        title="The guarantee",
        blocks=(
            Paragraph(
                text=f"Protected is the presence of {unit}. {report.guarantee.relation} Everything that is released is "
                f"(ε, δ)-differentially private for that relation, with δ\u00a0=\u00a0{delta}."
            ),
            adversaries,
            *_several(report),
            Heading(text="What it means for one"),
            Paragraph(
                text="Suppose that somebody knows all other records and everything that was released, and tests whether "
                f"{unit} took part. The fewer of those who did not take part the test may accuse, the fewer of those who did "
                "it can find. Each square is one of 1,000 that took part:"
            ),
            Pair(figures=tuple(_crowd(report, position) for position in range(len(report.guarantee.odds)))),
            Paragraph(text=_KEY, note=True),
        ),
    )


_KEY: Inline = (
    Span(text="found by guessing ", style="key guessed"),
    Span(text="found at most, beyond guessing ", style="key found"),
    Span(text="not found. ", style="key unseen"),
    "The bounds hold against the same insiders as the marked row above.",
)


def _adversary(each: Adversary) -> Row:
    stood: tuple[str | Span, ...] = ()
    if each.stood is not None:
        stood = (small(f"with the noise that stood {up(each.stood)}"),)
    now = each.spent
    return row(
        each.who,
        str(each.shares),
        down(each.effective_noise_multiplier),
        _figure(now.epsilon_pld),
        (up(now.epsilon_rdp), *stood),
        _figure(each.plan.epsilon_pld),
        _figure(each.plan.epsilon_rdp),
        main=each.name == "insiders",
    )


def _several(report: Report) -> tuple[Table, ...]:
    """What a unit in more silos has than assumed, and a person with several records where the unit is one."""
    who = {"silos": "A unit that {} silos know", "records": "A person with {} records in each silo that knows them"}
    rows = tuple(
        row(who[each.of].format(each.count), _figure(each.spent), _figure(each.plan)) for each in report.guarantee.several
    )
    if not rows:
        return ()
    return (
        Table(
            caption="Whoever has more to hide than one unit is protected less. Certified ε against the insiders:",
            columns=(column("Who"), column("ε now", numeric=True), column("Plan", numeric=True)),
            rows=rows,
            style="slim",
        ),
    )


def _crowd(report: Report, position: int) -> Figure:
    odds = report.guarantee.odds[position]
    caption: Inline = (
        strong(f"Wrong about {percent(odds.false_positive_rate)}"),
        f", such a test finds at most {percent(odds.spent, bound=True)}, and at most {percent(odds.plan, bound=True)} "
        "at the end of the plan.",
    )
    return Figure(picture=pictures.crowd(report, position), caption=caption)


# --- mechanism and accountants -------------------------------------------------------------------------------------------


def _mechanism(report: Report) -> Section:
    words = _ROUND
    if report.federation.mode == "local":
        words = _LOCAL_ROUND.format(steps=report.federation.steps_per_round)
    caption = "Every parameter on which ε or the next model depends. All stand in the signed contract or follow from it."
    return sections.mechanism(report, words, caption)


_ROUND = (
    "In each round every silo draws some of its units at random, clips what each would change, adds the changes up on an integer "
    "lattice, and adds noise. Only the sum over all silos is ever opened; the next model is computed from it by public arithmetic."
)
_LOCAL_ROUND = (
    "In each round every silo takes {steps} steps of its own. In each step it draws some of its units at random, clips what each "
    "would change, adds the changes up on an integer lattice, adds noise in full, and moves its own copy of the model. Then it "
    "sends what its steps changed. Only the sum over all silos is ever opened; the model that everybody goes on from is the mean."
)


def _accountants(report: Report) -> Section:
    delta = report.guarantee.delta
    side = Table(
        caption=f"ε at δ = {scientific(delta)}, against the insiders",
        columns=(column("After"), *(column(title, numeric=True) for title in ("Rounds", "PLD", "RDP", "Certified"))),
        rows=(_cost("what arrived so far", report.accounting.spent), _cost("the declared plan", report.accounting.plan)),
    )
    curve = Table(
        caption="Certified ε along the curve, against the insiders",
        columns=(column("δ"), column("ε now", numeric=True), column("at the end of the plan", numeric=True)),
        rows=tuple(_point(each, delta) for each in report.accounting.profile),
        style="slim",
    )
    return Section(
        key="accountants",
        title="The accountants",
        blocks=(
            Paragraph(
                text="Two methods bound the same loss. PLD follows its whole distribution; RDP follows its moments, by two "
                "implementations that must agree. Each bound holds alone, so the smaller one is certified. Both treat the "
                "integer noise as slightly smaller continuous noise, which the proof of the mechanism allows."
            ),
            side,
            Heading(text="The same guarantee at other δ"),
            Paragraph(
                text="ε and δ name points on one curve. Every row is a bound of its own; together they give the test rates "
                "of section 2."
            ),
            curve,
        ),
    )


def _cost(label: str, each: Cost) -> Row:
    certified = (strong(up(each.epsilon)),)
    return row(label, plain(each.rounds), _figure(each.epsilon_pld), _figure(each.epsilon_rdp), certified)


def _point(each: ProfilePoint, delta: float) -> Row:
    shown = scientific(each.delta) if each.delta < 0.001 else f"{each.delta:g}"
    label: Inline = (shown, small("the contract’s")) if each.delta == delta else shown
    return row(label, up(each.spent), up(each.plan))


# --- silos, composition, traffic, rounds ---------------------------------------------------------------------------------


def _silos(report: Report) -> Section:
    limit = report.silos[0].limit
    titles = ("ε spent\nPLD", "RDP", "Left", "Rounds\ncharged", "Rounds\nleft")
    table = Table(
        caption="By the aggregator’s count of uploads, against the contract’s limit. The tick marks the end of the plan. "
        "A silo’s own ledger may show more, and its own limit may be lower.",
        columns=(column("Silo", 0.9), column(f"Spent of ε = {limit:g}"), *(column(title, numeric=True) for title in titles)),
        rows=tuple(_silo(report, each) for each in report.silos),
        stack=True,
    )
    chart = Figure(
        picture=pictures.burn_down(report, key="burn-wide", width=720),
        narrow=pictures.burn_down(report, key="burn-narrow", width=350),
        caption="ε against the insiders, by both accountants, for the silo with the most charged rounds. Behind the dotted line: "
        "the rest of the declared plan.",
        share=0.85,
    )
    return Section(key="silos", title="Budget of each silo", blocks=(table, chart))


def _silo(report: Report, each: SiloBudget) -> Row:
    gone = "" if report.federation.version in each.versions else ", left"
    return row(
        (each.name, small(f"{each.organisation}{gone}")),
        pictures.budget(report, each),
        _figure(each.spent.epsilon_pld),
        _figure(each.spent.epsilon_rdp),
        down(each.left),
        plain(each.spent.rounds),
        plain(each.rounds_left),
    )


def _composition(report: Report) -> Section:
    table = Table(
        caption="Versions of the contract, and the rounds that were opened under each. Digests are cut to 16 digits here; "
        "the record has them whole.",
        columns=(
            column("Version", numeric=True),
            column("Digest", 0.0),
            column("Rounds", numeric=True),
            column("Silos", 0.4),
            column("What changed"),
        ),
        rows=tuple(map(_version, report.versions)),
        stack=True,
    )
    return Section(key="composition", title="What adds up", blocks=(*paragraphs(*report.composition), table))


def _version(each: VersionFacts) -> Row:
    never = () if each.in_effect else (small("never took effect"),)
    span = (small(f"{each.first_round} to {each.last_round}"),) if each.rounds else ()
    changed = "; ".join(each.changed) or ("the first version" if each.version == 1 else "nothing that is named")
    members = ", ".join(map(str, each.members))
    return row(str(each.version), (code(each.digest[:16]), *never), (str(each.rounds), *span), members, changed)


def _left(report: Report) -> Section:
    traffic = report.traffic
    received = f"; the aggregator received {size(traffic.received_bytes)} in all" if traffic.received_bytes else ""
    sizes = Table(
        caption=f"Bytes per silo and round{received}",
        columns=(column("Adapter", 0.4), column("Size"), column("Bytes", numeric=True)),
        rows=(
            row("as sent", pictures.sent(report, "upload", traffic.upload_bytes), size(traffic.upload_bytes)),
            row("as plain LoRA", pictures.sent(report, "lora", traffic.lora_bytes), size(traffic.lora_bytes)),
        ),
    )
    return Section(
        key="left",
        title="What left each site",
        blocks=(
            Beside(figure=Figure(picture=pictures.flow(report)), blocks=sections.stayed(report)),
            Heading(text="What left"),
            sections.what_left(report, "Each message that a silo sends in a round, or once per epoch"),
            sizes,
        ),
    )


def _strip(report: Report) -> Figure:
    caption = "Full marks: a sum was opened. Low, hollow marks: void, no sum; charged all the same where an upload arrived."
    return Figure(picture=pictures.strip(report), caption=caption, share=min(1.0, len(report.rounds) / 60 + 0.05))


def _assumptions(report: Report) -> Section:
    tables = [
        block
        for severity, (title, caption) in _SEVERITIES.items()
        for block in (Heading(text=title), sections.assumptions(report, caption, severity))
    ]
    words = note("What the figures rest on, the gravest first.")
    return Section(key="assumptions", title="Assumptions", blocks=(words, *tables))
