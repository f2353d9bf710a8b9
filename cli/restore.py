# SPDX-License-Identifier: Apache-2.0
"""``silo restore``: after a backup was copied back, before this silo takes part again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import HERE, Folder, Json, SiloHome


def add_to_silo(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(restore)


def restore(
    ledger: Annotated[list[Path] | None, typer.Option(help="another copy of this silo's ledger.jsonl; may be repeated")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do it without being asked (for scripts)")] = False,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """After a backup was copied back: charge what it does not know of, and wait for a new epoch.

    The secrets of all epochs in this directory are deleted. Every round that was opened since the backup is charged in full.
    A guardian with a home of its own has nothing to charge.

    \b
    Examples:
      silo restore
      silo restore --ledger /mnt/other-copy/ledger.jsonl --yes
    """
    from cli.output import Output, ask
    from silo import restoring
    from silo.guardians import guard_commands

    output = Output(json=json)
    ask("Delete this silo's epoch secrets, and charge every round since the backup?", yes=yes, json=json)
    if guard_commands.is_alone(home):
        epoch = guard_commands.restore(home, folder=folder)
        output.result({"epoch": epoch}, [f"next: `silo guard run`; this guardian sits out the epochs up to {epoch}"])
        return
    facts = restoring.restore(home, ledgers=tuple(ledger or ()), folder=folder)
    lines = [f"round {each['round']}: {each['attempts']} attempts charged" for each in facts["charged"]]
    if facts["adopted"]:
        lines.insert(0, "ledger: the longest copy was taken")
    lines.append(f"epsilon {facts['epsilon']:.4g} of {facts['limit']:g} at delta {facts['delta']:g}")
    if facts["epsilon"] > facts["limit"] or facts["rounds_left"] < 1:
        lines.append("nothing is left to spend: this silo takes part in no further round under this contract")
    lines.append(f"next: the coordinator runs `aggregator epoch`, then `silo train`; epochs up to {facts['epoch']} are not entered")
    output.result(facts, lines)
