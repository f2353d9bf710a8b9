# SPDX-License-Identifier: Apache-2.0
"""``silo verify``, ``aggregator verify`` and ``aggregator reindex``.

``verify`` ends with 0 only when everything that was asked was answered yes; with 4 when something failed; with 6 when nothing
failed and questions are open, which ``--allow-open`` accepts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import HERE, AggregatorHome, Json, SiloHome
from cli.report import verify_own

if TYPE_CHECKING:
    from rich.table import Table

    from privacy.audit.findings import Check
    from privacy.audit.whole import Again, Verdict

FAILED, OPEN = 4, 6
Rounds = Annotated[list[int] | None, typer.Option("--round", min=1, help="only this round in full; may be given more than once")]
Everything = Annotated[bool, typer.Option("--all", help="all rounds, as without --round")]
Report = Annotated[
    Path | None,
    typer.Option(help="a report.json: figures and views are made again, its digest must be in the log; or a silo's own report"),
]
AtLeast = Annotated[int, typer.Option(min=0, help="fail when fewer rounds have ended here: you know that so many did")]
AllowOpen = Annotated[bool, typer.Option("--allow-open", help="end with 0 also when questions are open and none failed")]


def add_to_silo(app: typer.Typer) -> None:
    """Register what a silo has of these commands."""
    app.command("verify")(silo_verify)


def add_to_aggregator(app: typer.Typer) -> None:
    """Register what an aggregator has of these commands."""
    app.command("verify")(aggregator_verify)
    app.command("reindex")(aggregator_reindex)


def silo_verify(
    rounds: Rounds = None,
    everything: Everything = False,
    url: Annotated[str, typer.Option(help="another address than silo.toml's")] = "",
    folder: Annotated[Path | None, typer.Option(help="a copy of the evidence, or a shared folder, instead of an address")] = None,
    fingerprint: Annotated[str, typer.Option(help="the aggregator's fingerprint or the contract's digest, for an auditor")] = "",
    report: Report = None,
    rounds_at_least: AtLeast = 0,
    allow_open: AllowOpen = False,
    home: SiloHome = HERE,
    json: Json = False,
) -> int:
    """Check the federation again from its documents: signatures, sums bit for bit, model, epsilon, log, and this silo's ledger.

    No secret is used. It says at the end which rounds it recomputed, and which rest on signatures alone. It ends with 0 when all
    was answered yes, with 4 when something failed, with 6 when nothing failed and questions are open.

    \b
    Examples:
      silo verify
      silo verify --round 3 --json
      silo verify --folder copy-of-the-evidence --fingerprint "9c1f 03aa …"
    """
    from silo import verify
    from silo.reporting import own

    if report is not None and own.is_own(report):
        if rounds or everything or url or folder is not None or fingerprint or rounds_at_least:
            raise typer.BadParameter("a silo's own report is checked against this home alone: no other question goes with it")
        return verify_own(home, report, allow_open=allow_open, json=json)
    chosen = _chosen(rounds, everything)
    verdict = verify.verify(
        home, url=url, folder=folder, fingerprint=fingerprint, rounds=chosen, report=report, at_least=rounds_at_least,
        again=None if report is None else _again(report),
    )  # fmt: skip
    return _show(verdict, allow_open=allow_open, json=json)


def aggregator_verify(
    rounds: Rounds = None,
    everything: Everything = False,
    report: Report = None,
    rounds_at_least: AtLeast = 0,
    allow_open: AllowOpen = False,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> int:
    """Check this home from its own files: every row against its file and leaf, then everything that a silo can check.

    It ends with 0 when all was answered yes, with 4 when something failed, with 6 when nothing failed and questions are open.

    \b
    Examples:
      aggregator verify
      aggregator verify --report report/report.json
      aggregator verify --rounds-at-least 40
    """
    from aggregator import verify
    from aggregator.reporting.report import read_views
    from privacy.audit.evidence import read_report

    papers, views = (None, None) if report is None else (read_report(report), read_views(report))
    verdict = verify.verify(
        home, rounds=_chosen(rounds, everything), report=papers, views=views, at_least=rounds_at_least
    )
    return _show(verdict, allow_open=allow_open, json=json)


def aggregator_reindex(home: AggregatorHome = HERE, json: Json = False) -> None:
    """Make the table of documents again, from evidence/ and log/ alone. The old one must be moved away first.

    \b
    Example:
      aggregator reindex
    """
    from aggregator import verify
    from cli.output import Output

    made = verify.reindex(home)
    lines = [f"{made['documents']} documents, {made['in_log']} of them in the log"]
    lines += [f"missing: {slot}" for slot in made["missing"]]
    lines += [f"left aside: {name[:16]}… {why}" for name, why in made["aside"].items()]
    Output(json=json).result(made, [*lines, "next: `aggregator verify`"])


def _chosen(rounds: Sequence[int] | None, everything: bool) -> frozenset[int] | None:
    if rounds and everything:
        raise typer.BadParameter("say --round N or --all, not both")
    return frozenset(rounds) if rounds else None


def _again(record: Path) -> Again:
    from aggregator.reporting import recheck
    from aggregator.reporting.report import read_views

    return functools.partial(recheck.recheck, views=read_views(record))


def _exit_code(verdict: Verdict, *, allow_open: bool) -> int:
    if not verdict.holds:
        return FAILED
    return OPEN if verdict.open and not allow_open else 0


def _show(verdict: Verdict, *, allow_open: bool, json: bool) -> int:
    import msgspec

    from cli.output import Output

    facts = {"holds": verdict.holds, "counts": verdict.counts, "sentence": verdict.sentence()}
    lines: list[str | Table] = [_overview(verdict), *_problems(verdict)]
    sign = "✗" if verdict.failed else "?" if verdict.open else "✓"
    Output(json=json).result({**facts, **msgspec.to_builtins(verdict)}, [*lines, f"{sign} {verdict.sentence()}"])
    return _exit_code(verdict, allow_open=allow_open)


def _overview(verdict: Verdict) -> Table:
    """One line per contract version, epoch, round, and what else was asked."""
    from cli.output import table
    from privacy.dp.unprotected import in_words

    stages: dict[str, list[Check]] = {}
    for check in verdict.checks:
        stages.setdefault(_stage(check), []).append(check)
    costs = {f"round {each.round}": in_words(each.insiders) for each in verdict.spent}
    rows = [(name, _mark(checks), len(checks), costs.get(name, "")) for name, checks in stages.items()]
    return table("", ("object", "", "checks", "epsilon after it"), rows)


def _problems(verdict: Verdict) -> list[str | Table]:
    """Everything that is not simply well, failures first."""
    lines: list[str | Table] = []
    for status, sign in (("failed", "✗"), ("open", "?"), ("note", "·")):
        for check in verdict.checks:
            if check.status == status:
                file = f" [{check.file[:16]}…]" if check.file else ""
                whose = "aggregator" if check.party == 0 else f"party {check.party}"
                lines.append(f"{sign} {check.kind} {check.number} ({whose}){file}: {check.what}: {check.why}")
    return lines


def _mark(checks: Sequence[Check]) -> str:
    found = {check.status for check in checks}
    return "✗" if "failed" in found else "?" if "open" in found else "✓"


def _stage(check: Check) -> str:
    if check.kind in ("contract", "countersignature"):
        return f"contract {check.number}"
    if check.kind in ("epoch", "epoch-note", "guardian-note", "roster", "pair-seeds", "confirmation"):
        return f"epoch {check.number}"
    return _STAGES.get(check.kind, f"round {check.number}")


_STAGES = {
    **dict.fromkeys(("log", "checkpoint", "cosignature", "head"), "log"),
    **dict.fromkeys(("ledger", "state"), "this silo's own"),
    "refusal": "refusals",
    "report": "report",
    "unknown": "other files",
}
