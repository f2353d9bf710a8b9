# SPDX-License-Identifier: Apache-2.0
"""Who is in a federation, and with which keys: ``aggregator member``, ``aggregator revise`` and ``silo keys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import HERE, SETTINGS, AggregatorHome, Json, SiloHome

keys_app = typer.Typer(
    rich_markup_mode=None,
    context_settings=SETTINGS,
    no_args_is_help=True,
    help="""This silo's signing keys: show them, or replace them.

    \b
    Examples:
      silo keys show
      silo keys rotate
      silo keys rotate --lost
    """,
)


def add_to_silo(parent: typer.Typer) -> None:
    """Register what a silo has of these commands."""
    parent.add_typer(keys_app, name="keys")


def add_to_aggregator(parent: typer.Typer) -> None:
    """Register what an aggregator has of these commands."""
    parent.command()(member)
    parent.command()(revise)


def member(
    public: Annotated[Path | None, typer.Argument(help="the silo's identity.pub")] = None,
    replace: Annotated[str, typer.Option(help="the member of this name gets the keys of identity.pub; its id and name stay")] = "",
    remove: Annotated[str, typer.Option(help="the member of this name leaves")] = "",
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Add a silo to the draft contract, give one new keys, or remove one; an identity.pub proves that its silo holds the keys.

    \b
    Examples:
      aggregator member north/identity.pub
      aggregator member --replace north north/identity.pub
      aggregator member --remove north
    """
    from aggregator import commands
    from cli.output import Output

    if bool(remove) == (public is not None) or (remove and replace):
        raise typer.BadParameter("give an identity.pub to add (or --replace NAME), or --remove NAME alone")
    changed = commands.change_member(home, public, replace=replace, remove=remove)
    line = f"member {changed['member']}: {changed['name']} ({changed['organisation']})" + (" leaves" if remove else "")
    Output(json=json).result(changed, [line, *([] if remove else [f"fingerprint {changed['fingerprint']}  (compare aloud)"])])


def revise(
    rounds: Annotated[int | None, typer.Option(min=1, help="the number of the last round; rounds are numbered on")] = None,
    expires: Annotated[str, typer.Option(help="the last day, as YYYY-MM-DD")] = "",
    signatures: Annotated[str, typer.Option(help="ed25519+ml-dsa-65: from now on both signatures; never back")] = "",
    give_up: Annotated[
        bool, typer.Option("--give-up", help="the newest version, which somebody did not sign, shall never take effect")
    ] = False,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Begin the next version of the signed contract: a draft to add, remove or re-key members in, and to edit.

    \b
    Examples:
      aggregator revise
      aggregator revise --rounds 80 --expires 2027-12-31
      aggregator revise --give-up
    """
    from aggregator import commands
    from cli.output import Output

    begun = commands.revise(home, rounds=rounds, expires=expires, signatures=signatures, give_up=give_up)
    lines = [
        f"draft of version {begun['version']} in {begun['draft']}",
        f"follows version {begun['version'] - 1}, {begun['previous'][:16]}…",
        "next: `aggregator member`, edit the draft, `aggregator sign`; each silo runs `silo join`",
    ]
    Output(json=json).result(begun, lines)


@keys_app.command()
def show(home: SiloHome = HERE, json: Json = False) -> None:
    """Fingerprints and suites of this silo's keys, and which of them stands in its contract.

    \b
    Example:
      silo keys show --json
    """
    from cli.output import Output
    from silo import key_commands

    facts = key_commands.show(home)
    lines = [
        f"{each['file']}  {each['state']}\n  ed25519            {each['fingerprint']}"
        + (f"\n  ed25519+ml-dsa-65  {each['fingerprint_ml_dsa']}" if each["fingerprint_ml_dsa"] else "")
        for each in facts["keys"]
    ]
    Output(json=json).result(facts, lines)


@keys_app.command()
def rotate(
    lost: Annotated[bool, typer.Option("--lost", help="the old key is gone: the new one starts without its signature")] = False,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Make a new key; the old one goes on signing until a contract that names the new one is in force.

    Started again after any interruption it goes on where it stopped, with the same new key.

    \b
    Examples:
      silo keys rotate
      silo keys rotate --lost
    """
    from cli.output import Output
    from silo import key_commands

    made = key_commands.rotate(home, lost=lost)
    lines = [
        f"new key of {made['name']}",
        f"fingerprint {made['fingerprint']}",
        f"with ML-DSA {made['fingerprint_ml_dsa']}  (where the contract's signatures say so)",
        f"next: send {made['identity']} to the coordinator, for `aggregator member --replace {made['name']}`; then `silo join`",
    ]
    Output(json=json).result(made, lines)
