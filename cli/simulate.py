# SPDX-License-Identifier: Apache-2.0
"""``aggregator simulate``: a whole federation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator import defaults
from cli.options import (
    MODE_HELP,
    ROUNDS_HELP,
    STEPS_HELP,
    Basis,
    Dropouts,
    Heads,
    Json,
    LastLayers,
    Protocol,
    Rank,
    SamplingRate,
    Targets,
    WithoutPrivacy,
    refuse_figures,
    words,
)


def add_to_aggregator(app: typer.Typer) -> None:
    """Register the command."""
    app.command("simulate")(simulate)


def simulate(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="JSON lines, CSV or Parquet with text, (text_pair), label; built-in pairs unless given")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="records to measure accuracy on; a fifth of the units is held out unless given")
    ] = None,
    silos: Annotated[int, typer.Option(min=3, help="how many silos to deal the records to")] = 3,
    silo_column: Annotated[str | None, typer.Option(help="the column that says which silo owns a record")] = None,
    unit: Annotated[str | None, typer.Option(help="the column that names the privacy unit; else each record is one")] = None,
    max_records_per_unit: Annotated[
        int | None, typer.Option(min=1, max=1024, help="more of one unit are left out; 8 with --unit, else 1, unless given")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help=ROUNDS_HELP)] = None,
    steps_per_round: Annotated[int | None, typer.Option(min=1, help=STEPS_HELP)] = None,
    epsilon: Annotated[float, typer.Option(help="what the run may cost")] = defaults.EPSILON,
    delta: Annotated[float | None, typer.Option(help="1/(10 · all units), at most 1e-5, unless given")] = None,
    mode: Annotated[str, typer.Option(help=MODE_HELP)] = "joint",
    model: Annotated[str, typer.Option(help="a folder, `minilm`, or a hub name")] = "minilm",
    targets: Targets = defaults.TARGETS,
    last_layers: LastLayers = defaults.LAST_LAYERS,
    rank: Rank = defaults.RANK,
    heads: Heads = 1,
    basis: Basis = defaults.BASIS,
    public_data: Annotated[Path | None, typer.Option(help="with --basis public: the records of the public data set")] = None,
    sampling_rate: SamplingRate = defaults.SAMPLING_RATE,
    home: Annotated[Path | None, typer.Option(help="a new folder; simulation-<time> unless given")] = None,
    protocol: Protocol = "consent",
    dropouts: Dropouts = 0,
    drop: Annotated[
        list[str] | None, typer.Option(help="with shares: SILO@ROUND, end that silo's process in that round, start it again after")
    ] = None,
    without_privacy: WithoutPrivacy = False,
    json: Json = False,
) -> None:
    """A whole federation on this machine: a real service, real silo processes, real keys and ledgers.

    \b
    Examples:
      aggregator simulate
      aggregator simulate --data notes.jsonl --silo-column hospital --unit patient_id --epsilon 3
      aggregator simulate --mode local --rounds 4 --steps-per-round 4
      aggregator simulate --silos 5 --protocol shares --dropouts 1 --drop silo-3@2
      aggregator simulate --without-privacy
      aggregator simulate --json > result.json
    """
    import time

    from aggregator.simulation.settings import Settings
    from aggregator.simulation.simulate import simulate as run_simulation
    from cli.output import Output
    from cli.progress import SimulationDisplay, closing_words

    refuse_figures(context, without_privacy)
    output = Output(json=json)
    settings = Settings(
        home=home or Path(time.strftime("simulation-%Y%m%d-%H%M%S")), data=data, held_out=held_out, silo_column=silo_column,
        silos=silos, unit=unit, max_records_per_unit=max_records_per_unit, epsilon=epsilon, delta=delta, mode=mode, model=model,
        targets=words(targets), last_layers=last_layers or None, rank=rank, heads=heads, basis=basis, public_data=public_data,
        sampling_rate=sampling_rate, rounds=rounds or defaults.ROUNDS.get(mode, 1), protocol=protocol, dropouts=dropouts,
        steps_per_round=steps_per_round or defaults.STEPS_PER_ROUND.get(mode, 1), drops=tuple(map(dropped, drop or ())),
        without_privacy=without_privacy,
    )  # fmt: skip
    with SimulationDisplay(output) as display:
        result = run_simulation(settings, display.step)
    output.result(result.as_json(), closing_words(result))


def dropped(text: str) -> tuple[str, int]:
    """(silo, round) of SILO@ROUND."""
    silo, _, number = text.rpartition("@")
    if not silo or not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise typer.BadParameter(f"{text!r} is not SILO@ROUND, such as silo-3@2")
    return silo, int(number)
