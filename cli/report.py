# SPDX-License-Identifier: Apache-2.0
"""``silo report``, and what of ``silo verify --report`` concerns such a report. Neither sends or charges anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import HERE, Json, SiloHome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from privacy.audit.findings import Check

FAILED, OPEN = 4, 6


def add_to_silo(app: typer.Typer) -> None:
    """Register this command."""
    app.command("report")(report)


def report(
    output_folder: Annotated[Path | None, typer.Option("--output", help="where to write; <home>/own-report unless given")] = None,
    held_out: Annotated[Path | None, typer.Option(help="records that were not trained on: accuracy on them is stated")] = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Write this silo's own report: silo-report.json (signed), silo-report.html and silo-report.pdf. It does not leave this site.

    It holds true counts of units and records, every run on the ledger, and with --held-out the accuracy. All files are for this
    user alone (mode 0600). Nothing is sent and nothing is charged. `silo verify --report` checks it again.

    \b
    Examples:
      silo report
      silo report --held-out held-out.jsonl --output /secure/reports
    """
    import time

    from cli.output import Output
    from privacy.dp.unprotected import in_words
    from silo.reporting import facts, own

    made = facts.gather(home, held_out=held_out, generated_at=int(time.time()))
    record = own.write(home, output_folder or home / "own-report", made)
    budget = made.budget
    delta = "" if budget.delta is None else f" at delta {budget.delta:g}"
    document = {"report": str(record), "page": str(record.with_suffix(".html")), "pdf": str(record.with_suffix(".pdf")),
                "epsilon": budget.epsilon, "delta": budget.delta, "limit": budget.limit,
                **({"epsilon_none": budget.reason} if budget.reason else {})}  # fmt: skip
    Output(json=json).result(
        document,
        [
            "this report DOES NOT LEAVE THIS SITE: it holds true counts",
            f"epsilon {in_words(budget.epsilon)}{delta}, limit {budget.limit:g}",
            *(f"{name:<6} {document[key]}" for name, key in (("record", "report"), ("page", "page"), ("PDF", "pdf"))),
        ],
    )


def verify_own(home: Path, record: Path, *, allow_open: bool, json: bool) -> int:
    """Check a silo's own report; the exit code, as of ``verify``."""
    from cli.output import Output, table
    from silo.reporting import own

    found = own.verify(home, record)
    failed, open_ = (_of(found, status) for status in ("failed", "open"))
    marks = {"ok": "✓", "failed": "✗", "open": "?", "note": "·"}
    sentence = f"{len(found)} checks, {len(failed)} failed" + (f", {len(open_)} could not be made" if open_ else "")
    facts = {
        "holds": not failed, "sentence": sentence,
        "checks": [{"what": each.what, "status": each.status, "why": each.why} for each in found],
    }  # fmt: skip
    lines = [table("", ("silo report", "", ""), [(each.what, marks[each.status], each.why) for each in found])]
    Output(json=json).result(facts, [*lines, sentence])
    return FAILED if failed else OPEN if open_ and not allow_open else 0


def _of(found: Sequence[Check], status: str) -> list[Check]:
    return [each for each in found if each.status == status]
