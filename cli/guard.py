# SPDX-License-Identifier: Apache-2.0
"""``silo guard``: a guardian with a home of its own; and ``aggregator guardian``, which adds one to the draft contract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import HERE, SETTINGS, AggregatorHome, Folder, Json, SiloHome

app = typer.Typer(
    rich_markup_mode=None,
    context_settings=SETTINGS,
    no_args_is_help=True,
    help="""Keep shares of what unmasks a sum: a guardian with a home of its own, without records or model.

    A silo whose key is a guardian of the contract needs none of this: `silo train` does both.

    \b
    Examples:
      silo guard init --name notary --organisation "City Notary" --aggregator https://hub.example --home notary
      silo guard join --fingerprint "9c1f 03aa …" --home notary
      silo guard run --home notary
    """,
)


def add_to_silo(parent: typer.Typer) -> None:
    """Register what a silo has of these commands."""
    parent.add_typer(app, name="guard")


def add_to_aggregator(parent: typer.Typer) -> None:
    """Register what an aggregator has of these commands."""
    parent.command("guardian")(guardian)


@app.command()
def init(
    name: Annotated[str, typer.Option(help="lower-case letters, digits, dots and hyphens")],
    organisation: Annotated[str, typer.Option(help="as it stands in the register")],
    aggregator: Annotated[str, typer.Option(help="the aggregator's address, e.g. https://hub.example")] = "",
    folder: Annotated[Path | None, typer.Option(help="instead of an address: the folder in which documents are exchanged")] = None,
    fingerprint: Annotated[str, typer.Option(help="the aggregator's fingerprint; can be given to `silo guard join`")] = "",
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Create a guardian's directory: keys, guard.toml, identity.pub.

    \b
    Example:
      silo guard init --name notary --organisation "City Notary" --aggregator https://hub.example
    """
    from cli.output import Output
    from silo.guardians import guard_commands

    if bool(aggregator) == (folder is not None):
        raise typer.BadParameter("say where the aggregator is: --aggregator URL, or --folder DIR")
    plain, both = guard_commands.create(
        home, name=name, organisation=organisation, url=aggregator, folder=folder, fingerprint=fingerprint
    )
    Output(json=json).result(
        {
            "home": str(home), "name": name, "identity": str(home / "identity.pub"), "fingerprint": plain,
            "fingerprint_ml_dsa": both,
        },
        [
            f"guardian {name} in {home}",
            f"fingerprint {plain}",
            f"with ML-DSA {both}  (where the contract's signatures say so)",
            f"next: send {home / 'identity.pub'} to the coordinator, then `silo guard join`",
        ],
    )


@app.command()
def join(
    fingerprint: Annotated[str, typer.Option(help="the aggregator's fingerprint or the contract's digest")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="agree without being asked (for scripts)")] = False,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Read the contract in plain words, verify every member's signature on it, and keep it.

    \b
    Example:
      silo guard join --fingerprint "9c1f 03aa …"
    """
    from cli.output import Output, ask
    from silo.guardians import guard_commands

    output = Output(json=json)
    with guard_commands.joining(home, fingerprint, folder=folder) as visit:
        for line in visit.words:
            output.say("  " + line)
        ask("Is this the federation that this guardian serves?", yes=yes, json=json)
        accepted = visit.keep()
    output.result(
        {"guardian": visit.party.id, "name": visit.party.name, "contract": accepted.digest.hex()},
        [f"guardian {visit.party.id} of {accepted.terms.name}", "next: `silo guard run`"],
    )


@app.command()
def run(
    rounds: Annotated[int | None, typer.Option(min=1, help="stop after so many rounds; else work until stopped")] = None,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Work as a guardian. Started again after any interruption it goes on where it stopped.

    \b
    Examples:
      silo guard run
      silo guard run --rounds 40
    """
    from cli.output import Output
    from silo.guardians import guard_commands

    output = Output(json=json)
    done = guard_commands.run(home, rounds=rounds, folder=folder, told=output.say)
    output.result({"rounds": done}, [f"{done} rounds"])


def guardian(
    public: Annotated[Path, typer.Argument(help="the guardian's identity.pub")],
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Add a guardian to a draft contract with protocol = "shares". Where none is named, the silos are the guardians.

    \b
    Example:
      aggregator guardian notary/identity.pub
    """
    from aggregator import commands
    from cli.output import Output

    added = commands.add_guardian(home, public)
    Output(json=json).result(
        added,
        [
            f"guardian {added['guardian']}: {added['name']} ({added['organisation']})",
            f"fingerprint {added['fingerprint']}  (compare aloud)",
        ],
    )
