# SPDX-License-Identifier: Apache-2.0
"""``silo basis``: the frozen factors of a public data set, made, or made again to be compared. Nothing is charged or sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import HERE, Json, SiloHome


def add_to_silo(app: typer.Typer) -> None:
    """Register the command."""
    app.command("basis")(basis)


def basis(
    data: Annotated[Path, typer.Option(help="the public data set: JSON lines, CSV or Parquet with the columns of the task")],
    contract: Annotated[
        Path | None, typer.Option(help="make the file for this draft or contract; its [public_basis] says how")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="with --contract: where to write the factors")] = None,
    check: Annotated[bool, typer.Option("--check", help="make it again and compare with the file that this silo took")] = False,
    model: Annotated[str, typer.Option(help="with --contract: a local copy of the base model")] = "",
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Make the factors B and A from a public data set, for `basis = "public"`; or check that the contract's came from it.

    \b
    Examples:
      silo basis --data public.jsonl --contract federation.draft.toml --out basis.safetensors
      silo basis --check --data public.jsonl
    """
    from cli.output import Output
    from privacy import files
    from silo import agreed_basis

    output = Output(json=json)
    if check:
        if contract is not None or out is not None or model:
            raise typer.BadParameter("--check takes the contract that this silo joined: no --contract, --out or --model")
        facts = agreed_basis.check(home, data)
        same = "the same bytes" if facts["same_bytes"] else "not the same bytes, as machines differ"
        output.result(
            facts,
            [
                f"the contract's data set is {facts['data']}, and this is its file",
                f"made again: {same}; largest angle {facts['largest_angle']:.2g} radians, at {facts['module']}",
            ],
        )
        return
    if contract is None or out is None:
        raise typer.BadParameter("say what to do: --contract FILE --out FILE makes the factors, --check compares them")
    made = agreed_basis.make(data, agreed_basis.recipe_of(contract), model=model)
    files.write_atomic(out, made.raw)
    output.result(
        {"file": str(out), "bytes": len(made.raw), "data_digest": made.data_digest, "digest": made.digest},
        [
            f"{len(made.raw)} bytes in {out}; for [public_basis] of the draft:",
            f'data_digest = "{made.data_digest}"',
            f'digest = "{made.digest}"',
            "next: the file beside the draft as basis.safetensors, `aggregator sign`, and the file to every silo",
        ],
    )
