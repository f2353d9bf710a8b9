# SPDX-License-Identifier: Apache-2.0
"""``aggregator``: init, member, sign, serve, round, epoch, status, budget, report, simulate. Words in, words out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator import defaults
from cli import guard, members, plan, simulate, verify
from cli.errors import run
from cli.options import (
    HERE,
    MODE_HELP,
    SETTINGS,
    STEPS_HELP,
    AggregatorHome,
    Basis,
    Dropouts,
    Form,
    Heads,
    Json,
    Kind,
    LastLayers,
    MaxSilos,
    Protocol,
    PublicData,
    Rank,
    SamplingRate,
    Scale,
    Targets,
    TwoSilos,
    Units,
    WithoutPrivacy,
    check_kind,
    refuse_figures,
    words,
)
from privacy import lifeline

app = typer.Typer(
    name="aggregator",
    rich_markup_mode=None,
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=True,
    help="""Coordinate a federation: a mailbox, a referee and a reporter that never sees a single update.

    \b
    Examples:
      aggregator simulate                              a whole federation on this machine
      aggregator init --name trial --organisation "Trial Office" --model minilm --labels no,yes --units 1000 --rounds 40
      aggregator serve
      aggregator round --rounds 40
    """,
)


@app.command()
def init(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="the federation's name")],
    organisation: Annotated[str, typer.Option(help="who coordinates")],
    units: Units,
    rounds: Annotated[int, typer.Option(min=1, help="the declared plan: how many private rounds")],
    labels: Annotated[str, typer.Option(help="the public label space, comma separated, in order; of a classification")] = "",
    kind: Kind = "text-classification",
    form: Form = "",
    mode: Annotated[str, typer.Option(help=MODE_HELP)] = "joint",
    steps_per_round: Annotated[int | None, typer.Option(min=1, help=STEPS_HELP)] = None,
    model: Annotated[str, typer.Option(help="a folder, `minilm`, or a hub name")] = "minilm",
    targets: Targets = defaults.TARGETS,
    last_layers: LastLayers = defaults.LAST_LAYERS,
    scale: Scale = None,
    pooling: Annotated[str, typer.Option(help="mean, cls or last")] = "mean",
    text_pair: Annotated[bool, typer.Option("--text-pair", help="records have text and text_pair")] = False,
    max_length: Annotated[int, typer.Option(min=4, help="tokens per record")] = defaults.MAX_LENGTH,
    rank: Rank = defaults.RANK,
    heads: Heads = 1,
    basis: Basis = defaults.BASIS,
    public_data: PublicData = "",
    unit: Annotated[str, typer.Option(help="the column that names the privacy unit, or `record`")] = "record",
    max_records_per_unit: Annotated[int, typer.Option(min=1, help="a public cap, not tuned on data")] = 1,
    max_silos_per_unit: MaxSilos = 1,
    epsilon: Annotated[float, typer.Option(help="what the whole plan may cost")] = defaults.EPSILON,
    delta: Annotated[float, typer.Option(help="at most 1e-5 and 1/(10 · all units)")] = 1e-6,
    sampling_rate: SamplingRate = defaults.SAMPLING_RATE,
    learning_rate: Annotated[float, typer.Option(help="the update rule's step")] = defaults.LEARNING_RATE,
    deadline: Annotated[int, typer.Option(min=1, help="seconds a round waits for each step")] = 600,
    protocol: Protocol = "consent",
    dropouts: Dropouts = 0,
    signatures: Annotated[str, typer.Option(help="ed25519, or ed25519+ml-dsa-65: both, against quantum computers too")] = "ed25519",
    two: TwoSilos = False,
    without_privacy: WithoutPrivacy = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="where the mailbox listens; 0 takes a free port")] = 8470,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Create the aggregator's directory: keys, aggregator.toml, and a commented draft contract that you then own.

    \b
    Examples:
      aggregator init --name trial --organisation "Trial Office" --labels no,yes --units 1000 --rounds 40
      aggregator init --name trial --organisation "Trial Office" --kind causal-lm --format text --model DIR --units 1000 --rounds 40
    """
    from aggregator import commands
    from aggregator.draft import Terms
    from cli.output import Output

    refuse_figures(context, without_privacy)
    check_kind(kind, labels=labels, form=form, of_texts=text_pair or pooling != "mean", model=model)
    table, modules, lora_width = commands.describe_model(model, words(targets), pooling=pooling, last_layers=last_layers or None)
    terms = Terms(
        name=name, expires=commands.in_a_year(), kind=kind, labels=words(labels), format=form, model=table, modules=modules,
        units=units, rounds=rounds,
        mode=mode, steps_per_round=steps_per_round or defaults.STEPS_PER_ROUND.get(mode, 1), text_pair=text_pair,
        max_length=max_length, rank=rank, heads=heads, basis=basis, shapes=commands.shapes_of(model, modules), scale=scale,
        public_data=public_data, learning_rate=learning_rate, unit=unit,
        max_records_per_unit=max_records_per_unit, max_silos_per_unit=max_silos_per_unit, sampling_rate=sampling_rate,
        epsilon=epsilon, delta=delta, deadline_s=deadline, signatures=signatures, protocol=protocol, dropouts=dropouts,
        two_silos_see_each_other=two, without_privacy=without_privacy,
        max_grad_norm=defaults.GENEROUS_GRAD_NORM if without_privacy else defaults.MAX_GRAD_NORM,
    )  # fmt: skip
    made = commands.init(home, organisation=organisation, terms=terms, lora_width=lora_width, port=port)
    after = f"next: read {made['draft']}, then `aggregator member` for each silo"
    Output(json=json).result(made, [f"aggregator in {home}", f"fingerprint {made['fingerprint']}", after])


@app.command()
def sign(home: AggregatorHome = HERE, json: Json = False) -> None:
    """Calibrate the noise, check the draft, sign it and publish it for the silos to countersign.

    \b
    Example:
      aggregator sign
    """
    from aggregator import commands
    from cli.output import Output

    signed = commands.sign(home)
    delta = f" at delta {signed['delta']}" if signed["delta"] else ""
    steps = f" of {signed['steps_per_round']} steps" if signed["mode"] == "local" else ""
    Output(json=json).result(
        signed,
        [
            f"contract version {signed['version']} {signed['contract']}",
            f"noise multiplier {signed['noise_multiplier']} over {signed['rounds']} rounds{steps}",
            f"epsilon {signed.get('epsilon_none') or signed['epsilon']}{delta}",
            "next: `aggregator serve`; each silo runs `silo join`",
        ],
    )


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="the interface; loopback unless you say otherwise")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free port, service.json names it")] = None,
    folder: Annotated[Path | None, typer.Option(help="exchange documents as files in this folder instead of over HTTP")] = None,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Run the mailbox. It holds no private key; stop it with Ctrl-C or SIGTERM.

    \b
    Examples:
      aggregator serve --port 8470
      aggregator serve --folder /srv/exchange
    """
    from aggregator import commands
    from cli.output import Output

    Output(json=json).say("serving; Ctrl-C stops")
    commands.serve(home, host=host, port=port, folder=folder)
    Output(json=json).result({"stopped": True}, ["stopped"])


@app.command("round")
def run_rounds(
    rounds: Annotated[int, typer.Option(min=1, help="how many rounds to run")] = 1,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Open, collect, sum and close rounds. Started again after any interruption it goes on where it stopped.

    \b
    Example:
      aggregator round --rounds 40
    """
    from aggregator import commands
    from cli.output import Output
    from cli.progress import RoundDisplay

    output = Output(json=json)
    done: list[dict[str, object]] = []
    with RoundDisplay(output) as display:
        while len(done) < rounds:  # again where a newer version of the contract came into force
            with commands.running(home, progress=display.event) as coordinator:
                coordinator.ensure_countersigned()
                coordinator.ensure_epoch()
                while len(done) < rounds and not coordinator.superseded:
                    closed = coordinator.run_round(coordinator.next_round)
                    done.append({"round": closed.round, "kind": closed.kind, "reason": closed.reason, "state": closed.state.hex()})
                    display.line(
                        f"round {closed.round:>4}  {closed.kind:<6}  {closed.seconds:>4} s  model {closed.state.hex()[:12]} "
                        f"{closed.reason}"
                    )
    output.result({"rounds": done}, [f"{len(done)} rounds closed"])


@app.command()
def epoch(home: AggregatorHome = HERE, json: Json = False) -> None:
    """Call a new epoch: fresh keys of every silo, when one lost its own or the set-up was spoilt. Open rounds end first.

    \b
    Example:
      aggregator epoch
    """
    from aggregator import commands
    from cli.output import Output
    from cli.progress import RoundDisplay

    output = Output(json=json)
    with RoundDisplay(output) as display, commands.running(home, progress=display.event) as coordinator:
        coordinator.ensure_countersigned()
        called = coordinator.new_epoch()
    output.result({"epoch": called.number}, [f"epoch {called.number}: every silo confirmed its keys with every other"])


@app.command()
def status(home: AggregatorHome = HERE, json: Json = False) -> None:
    """The contract, who signed it, and the latest round.

    \b
    Example:
      aggregator status --json
    """
    from aggregator import commands
    from cli.output import Output

    facts = commands.status(home)
    Output(json=json).result(facts, [f"{key}: {value}" for key, value in facts.items()])


@app.command()
def budget(home: AggregatorHome = HERE, json: Json = False) -> None:
    """What each silo has spent under this contract, as far as uploads arrived here; a silo's own ledger is the authority.

    \b
    Example:
      aggregator budget
    """
    from aggregator import commands
    from aggregator.reporting.no_guarantee import OpenReport
    from cli.output import Output, bar, table

    facts = commands.build_report(home)
    if isinstance(facts, OpenReport):
        charged = [(each.name, each.spent.reason, each.spent.rounds) for each in facts.silos]
        none = [{"name": name, "epsilon": None, "epsilon_none": why, "rounds_charged": rounds} for name, why, rounds in charged]
        shown = table(facts.warning, ("silo", "epsilon", "rounds charged"), charged)
        Output(json=json).result({"delta": None, "silos": none}, [shown])
        return
    rows = [
        (each.name, f"{each.spent.epsilon:.3f}", f"{each.limit:g}", bar(each.spent.epsilon, each.limit), each.rounds_left)
        for each in facts.silos
    ]
    document = {
        "delta": facts.guarantee.delta,
        "silos": [
            {
                "name": each.name,
                "epsilon": each.spent.epsilon,
                "limit": each.limit,
                "left": each.left,
                "rounds_left": each.rounds_left,
            }
            for each in facts.silos
        ],
    }
    Output(json=json).result(
        document, [table(f"delta {facts.guarantee.delta:g}", ("silo", "epsilon", "of", "", "rounds left"), rows)]
    )


@app.command()
def report(
    output_folder: Annotated[Path | None, typer.Option("--output", help="where to write; <home>/report unless given")] = None,
    home: AggregatorHome = HERE,
    json: Json = False,
) -> None:
    """Write the privacy report: report.json (signed), report.html and report.pdf (for reading), registry.yaml (for publishing).

    The PDF is PDF/A. The YAML is a draft entry for the OpenDP Deployments Registry; nothing is sent.

    \b
    Example:
      aggregator report --output report
    """
    from aggregator import commands
    from aggregator.reporting.figures import Figure
    from cli.output import Output
    from privacy.dp.unprotected import in_words

    facts = commands.build_report(home)
    record, page = commands.write_report(home, output_folder or home / "report", facts)
    spent = facts.accounting.spent
    delta = "" if facts.guarantee.delta is None else f" at delta {facts.guarantee.delta:g}"
    Output(json=json).result(
        {
            "report": str(record),
            "page": str(page),
            "pdf": str(page.with_suffix(".pdf")),
            "epsilon": spent.epsilon,
            "delta": facts.guarantee.delta,
            **({} if isinstance(spent, Figure) else {"epsilon_none": spent.reason}),
            "rounds": len(facts.rounds),
        },
        [
            f"epsilon {in_words(spent.epsilon)}{delta} after {spent.rounds} rounds",
            f"record {record}",
            f"page   {page}",
            f"PDF    {page.with_suffix('.pdf')}",
        ],
    )


guard.add_to_aggregator(app)
members.add_to_aggregator(app)
plan.add_to_aggregator(app)
simulate.add_to_aggregator(app)
verify.add_to_aggregator(app)


def main() -> None:
    """Entry point of the ``aggregator`` command."""
    lifeline.watch()
    raise SystemExit(run(app))


if __name__ == "__main__":
    main()
