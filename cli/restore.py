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
    alone: Annotated[
        list[Path] | None,
        typer.Option(help="contract of a run alone since the newest copy: all its plan has left is charged; may be repeated"),
    ] = None,
    never_alone: Annotated[
        bool, typer.Option("--never-alone", help="this silo began or went on with no run alone since the newest copy")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do it without being asked (for scripts)")] = False,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """After a backup was copied back: charge what it does not know of, and wait for a new epoch.

    The secrets of all epochs in this directory are deleted. Every round that was opened since the backup is charged in full.
    Of runs alone (`silo train --alone`) nobody else knows: say which there were, or that there was none.
    A guardian with a home of its own has nothing to charge.

    \b
    Examples:
      silo restore --never-alone
      silo restore --never-alone --ledger /mnt/other-copy/ledger.jsonl --yes
      silo restore --alone trial-draft.toml
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
    _require_said(alone, never_alone)
    facts = restoring.restore(home, ledgers=tuple(ledger or ()), alone=tuple(alone or ()), folder=folder)
    lines = [f"round {each['round']}: {each['attempts']} attempts charged" for each in facts["charged"]]
    lines += [f"alone under {each['run']}: {each['attempts']} attempts charged" for each in facts["charged_alone"]]
    if facts["adopted"]:
        lines.insert(0, "ledger: the longest copy was taken")
    lines.append(f"epsilon {facts['epsilon']:.4g} of {facts['limit']:g} at delta {facts['delta']:g}")
    if facts["epsilon"] > facts["limit"] or facts["rounds_left"] < 1:
        lines.append("nothing is left to spend: this silo takes part in no further round under this contract")
    lines.append(f"next: the coordinator runs `aggregator epoch`, then `silo train`; epochs up to {facts['epoch']} are not entered")
    output.result(facts, lines)


def _require_said(alone: list[Path] | None, never_alone: bool) -> None:
    """Return if the person said one of the two. Raises ConfigError otherwise: what nobody says may be missing from the ledger."""
    from privacy.errors import ConfigError

    if bool(alone) != never_alone:
        return
    raise ConfigError(
        "--alone and --never-alone contradict each other" if alone
        else "nothing on the board shows whether this silo trained alone since the newest copy of its ledger",
        hint="say --never-alone; or --alone CONTRACT for every run alone that was begun or went on since",
        code="alone-not-said",
    )  # fmt: skip
