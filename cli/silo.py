# SPDX-License-Identifier: Apache-2.0
"""``silo``: init, join, train, status, budget, eval, export. Each command reads its folder, calls the silo wing and prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cli import alone, audit, basis, doctor, guard, members, report, restore, verify
from cli.errors import run
from cli.options import HERE, SETTINGS, Folder, Json, SiloHome
from privacy import lifeline

app = typer.Typer(
    name="silo",
    rich_markup_mode=None,
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=True,
    help="""Train a shared model on your own records; nothing leaves but a masked, noised sum.

    \b
    Examples:
      silo init --name north --organisation "North Hospital" --aggregator https://hub.example --records notes.jsonl
      silo join --fingerprint "9c1f 03aa …"
      silo train --rounds 40
    """,
)


@app.command()
def init(
    name: Annotated[str, typer.Option(help="lower-case letters, digits, dots and hyphens")],
    organisation: Annotated[str, typer.Option(help="as it stands in the register")],
    records: Annotated[Path, typer.Option(help="JSON lines, CSV or Parquet; stays on this machine")],
    aggregator: Annotated[str, typer.Option(help="the aggregator's address, e.g. https://hub.example")] = "",
    folder: Annotated[Path | None, typer.Option(help="instead of an address: the folder in which documents are exchanged")] = None,
    fingerprint: Annotated[str, typer.Option(help="the aggregator's fingerprint; can be given to `silo join`")] = "",
    epsilon: Annotated[float, typer.Option(help="the most epsilon this silo ever spends on a unit")] = 10.0,
    delta: Annotated[float, typer.Option(help="the largest delta this silo accepts")] = 1e-5,
    model: Annotated[str, typer.Option(help="a local copy of the base model")] = "",
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Create this silo's directory: keys, silo.toml, identity.pub.

    \b
    Examples:
      silo init --name north --organisation "North Hospital" --aggregator https://hub.example --records notes.jsonl
      silo init --name north --organisation "North Hospital" --folder /media/exchange --records notes.jsonl
    """
    from cli.output import Output
    from silo import commands

    if bool(aggregator) == (folder is not None):
        raise typer.BadParameter("say where the aggregator is: --aggregator URL, or --folder DIR")
    made = commands.create(
        home,
        name=name,
        organisation=organisation,
        url=aggregator,
        folder=folder,
        fingerprint=fingerprint,
        records=records,
        epsilon=epsilon,
        delta=delta,
        model=model,
    )
    Output(json=json).result(
        {"home": str(home), "name": name, "identity": str(made.public_path), "fingerprint": made.fingerprint,
         "fingerprint_ml_dsa": made.fingerprint_ml_dsa},
        [
            f"silo {name} in {home}",
            f"fingerprint {made.fingerprint}",
            f"with ML-DSA {made.fingerprint_ml_dsa}  (where the contract's signatures say so)",
            f"next: send {made.public_path} to the coordinator, then `silo join`",
        ],
    )


@app.command()
def join(
    fingerprint: Annotated[str, typer.Option(help="the aggregator's fingerprint or the contract's digest")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="agree without being asked (for scripts)")] = False,
    without_differential_privacy: Annotated[
        bool,
        typer.Option(
            "--without-differential-privacy",
            help="this silo's word that the contract may add NO noise: exact sums of its gradients are then seen by everybody",
        ),
    ] = False,
    basis_file: Annotated[
        Path | None, typer.Option("--basis", help="the coordinator's basis.safetensors, where the contract's basis is public")
    ] = None,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Read the contract in plain words, check it against this silo, and countersign it.

    \b
    Examples:
      silo join --fingerprint "9c1f 03aa …"
      silo join --fingerprint 5be1… --yes --json
      silo join --fingerprint "9c1f 03aa …" --basis basis.safetensors
    """
    from cli.output import Output, ask
    from privacy.dp.unprotected import in_words
    from silo import commands

    output = Output(json=json)
    with commands.joining(
        home, fingerprint, folder=folder, without_privacy=without_differential_privacy, basis=basis_file
    ) as visit:  # fmt: skip
        for line in visit.words:
            output.say("  " + line)
        if visit.accepted.terms.is_private:
            output.say("  " + alone.HINT)
        loud = "" if visit.accepted.terms.is_private else ", WITHOUT DIFFERENTIAL PRIVACY"
        ask(f"Does this silo agree to these terms{loud}?", yes=yes, json=json)
        member = visit.countersign()
    output.result(
        {"member": member.id, "name": member.name, "contract": visit.accepted.digest.hex(), **visit.cost},
        [
            f"countersigned as silo {member.id}; the whole plan costs epsilon {in_words(visit.plan_epsilon, '.3g')}",
            "next: `silo train`",
        ],
    )


@app.command()
def train(
    rounds: Annotated[int | None, typer.Option(min=1, help="take part in this many rounds, then stop")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="take part until the plan is used up or the run ends")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="step and round time, memory; nothing leaves or is spent")] = False,
    by_itself: Annotated[
        bool, typer.Option("--alone", help="what this silo reaches by itself at the same epsilon; it spends budget too")
    ] = False,
    contract: Annotated[
        Path | None, typer.Option(help="with --alone: this federation.toml instead of the contract joined, or shown by join")
    ] = None,
    instead: Annotated[
        bool, typer.Option("--instead-of-joining", help="with --alone: train though the federation's plan no longer fits after it")
    ] = False,
    folder: Folder = None,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Take part in rounds: private steps on own records, masked before anything leaves.

    Started again after any interruption it goes on where it stopped.

    \b
    Examples:
      silo train --dry-run
      silo train --rounds 40
      silo train --watch
      silo train --alone
    """
    from cli.output import Output
    from privacy.dp.unprotected import in_words
    from silo import commands

    output = Output(json=json)
    if by_itself:
        if watch or dry_run:
            raise typer.BadParameter("--alone goes with --rounds or nothing: it waits for nobody")
        alone.train(output, home, rounds, contract=contract, folder=folder, instead=instead)
        return
    if contract is not None or instead:
        raise typer.BadParameter("--contract and --instead-of-joining are for --alone")
    if dry_run:
        found = commands.dry_run(home)
        output.result(found, [f"{key}: {value}" for key, value in found.items()])
        return
    if rounds is None and not watch:
        raise typer.BadParameter("say how long: --rounds N, or --watch")
    with commands.training(home, folder=folder) as session:
        for done in session.take_part(session.rounds_left if rounds is None else rounds):
            cost = f"epsilon {in_words(done.epsilon, '.3f')}" + (f" of {done.limit:g}" if math.isfinite(done.epsilon) else "")
            output.say(f"round {done.round:>4}  {done.kind:<6}  {cost}  {done.seconds:5.1f} s  model {done.state_digest[:12]}")
        summary = session.summary()
    output.result(
        summary,
        [
            f"{summary['rounds']} rounds, epsilon {in_words(summary['epsilon'], '.3f')}"
            + ("" if summary["epsilon"] is None else f" of {summary['limit']:g} at delta {summary['delta']:g}"),
            f"model {summary['model_digest']}",
        ],
    )


@app.command()
def status(home: SiloHome = HERE, json: Json = False) -> None:
    """Who this silo is, what it joined, and where it stands.

    \b
    Example:
      silo status --json
    """
    from cli.output import Output
    from silo import reading

    facts = reading.status(home)
    Output(json=json).result(facts, [f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()])


@app.command()
def budget(
    forecast: Annotated[int, typer.Option(min=0, help="what this many more rounds would cost")] = 0,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """What this silo has spent, what its limit leaves, and what more rounds would cost.

    \b
    Examples:
      silo budget
      silo budget --forecast 20
    """
    from cli.budget import words
    from cli.output import Output
    from silo import reading

    facts = reading.budget(home, forecast)
    Output(json=json).result(facts, words(facts))


@app.command("eval")
def evaluate(
    records: Annotated[Path, typer.Option(help="records to evaluate on; the figures stay here")],
    private_head: Annotated[
        list[Path] | None, typer.Option(help="also train a private linear head alone on these records, to compare")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="also answer these questions by likelihood: prompt, choices, answer; of a causal-lm")
    ] = None,
    exact_match: Annotated[
        int, typer.Option(min=0, help="also write so many tokens after each prompt, and compare with its response; of a causal-lm")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="compute threads; [compute] threads of silo.toml unless given")] = None,
    by_itself: Annotated[bool, typer.Option("--alone", help="the model of `silo train --alone`, and the federation's")] = False,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """How good the base model and the federation's model are on records of your own.

    The accuracy of a classifier; the loss and perplexity per response token of a causal language model. The figures depend on
    records: they are printed here and sent nowhere.

    \b
    Examples:
      silo eval --records held-out.jsonl
      silo eval --records held-out.jsonl --private-head north.jsonl --private-head south.jsonl
      silo eval --records held-out.jsonl --alone
      silo eval --records held-out.jsonl --choices questions.jsonl --exact-match 32
    """
    from cli.output import Output
    from silo import reading

    if by_itself:
        if private_head or choices or exact_match:
            raise typer.BadParameter("--private-head, --choices and --exact-match are for the federation's model, without --alone")
        alone.evaluate(Output(json=json), home, records, threads)
        return
    facts = reading.evaluate(
        home, records, tuple(private_head or ()), threads=threads, choices=choices, exact_match=exact_match
    )  # fmt: skip
    name = alone.figure_of(facts)
    lines = [
        f"{alone.in_words(name)} before {facts[f'{name}_before']:.3f}, after {facts[f'{name}_after']:.3f} "
        f"({facts['rounds']} rounds)"
    ]
    for each, said in (("choices", "right choices by likelihood"), ("exact_match", "responses written exactly")):
        if f"{each}_after" in facts:
            lines.append(f"{said}: before {facts[f'{each}_before']:.3f}, after {facts[f'{each}_after']:.3f}")
    if facts.get("accuracy_head") is not None:
        tried = f"best of {facts['head_models']} step sizes, each at the same epsilon, charged to no ledger"
        lines.append(f"a private linear head alone ({tried}): {facts['accuracy_head']:.3f}")
    Output(json=json).result(facts, lines)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that is not there yet, or is empty")],
    base: Annotated[
        str,
        typer.Option(help="the base model's hub name or folder, for whoever loads the adapter; the contract's name unless given"),
    ] = "",
    merged: Annotated[
        bool, typer.Option("--merged", help="a whole model with the adapter merged into its weights; of a causal language model")
    ] = False,
    home: SiloHome = HERE,
    json: Json = False,
) -> None:
    """Write the federation's model as a PEFT adapter, which transformers and peft load without Siloquy.

    It costs no privacy: the model is released already. DIR appears whole or not at all; its README.md has the code that loads it.

    \b
    Examples:
      silo export adapter
      silo export adapter --base sentence-transformers/all-MiniLM-L6-v2
      silo export model --merged
    """
    from cli.output import Output
    from privacy.dp.unprotected import in_words
    from silo import reading

    facts = reading.export(home, folder, base, merged=merged)
    delta = "" if facts["delta"] is None else f" at delta {facts['delta']:g}"
    lines = [
        f"{'model' if merged else 'adapter'} in {folder}: round {facts['round']}, model {facts['model_digest']}",
        f"epsilon {in_words(facts['epsilon'])}{delta}; the export costs nothing",
        f"next: {folder / 'README.md'} has the code that loads it",
    ]
    Output(json=json).result(facts, lines)


audit.add_to_silo(app)
basis.add_to_silo(app)
doctor.add_to_silo(app)
guard.add_to_silo(app)
report.add_to_silo(app)
members.add_to_silo(app)
restore.add_to_silo(app)
verify.add_to_silo(app)


def main() -> None:
    """Entry point of the ``silo`` command."""
    lifeline.watch()
    raise SystemExit(run(app))


if __name__ == "__main__":
    main()
