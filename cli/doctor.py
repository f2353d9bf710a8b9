# SPDX-License-Identifier: Apache-2.0
"""``silo doctor``: everything a start would trip over, asked at once, the self-test among it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import HERE, Json, SiloHome


def add_to_silo(app: typer.Typer) -> None:
    """Register the command."""
    app.command("doctor")(doctor)


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="without the self-test, in seconds")] = False,
    home: SiloHome = HERE,
    json: Json = False,
) -> int:
    """Is this silo fit to train? Settings, keys, disk, device, ledger, contract, limits, model, records, and the self-test.

    Nothing is sent, written or charged. Exit code 0 when all is well, else the one that `silo train` would end with.

    \b
    Examples:
      silo doctor
      silo doctor --quick --json
    """
    from cli.output import Output, table
    from silo import doctor as examination

    facts = examination.examine(home, quick=quick)
    rows = [("✓" if each["passed"] else "✗", each["name"], each["found"]) for each in facts["checks"]]
    failed = [each for each in facts["checks"] if not each["passed"]]
    listed = table("", ("", "", ""), rows)
    for column in listed.columns[1:]:
        column.justify = "left"
    lines: list[Any] = [listed, "", *(f"{each['name']}: {each['hint']}" for each in failed)]
    lines.append(f"✗ {len(failed)} of {len(rows)} fail" if failed else f"✓ {len(rows)} of {len(rows)}: this silo is fit to train")
    Output(json=json).result(facts, lines)
    return int(failed[0]["exit_code"]) if failed else 0
