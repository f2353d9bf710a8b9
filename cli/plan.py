# SPDX-License-Identifier: Apache-2.0
"""``aggregator plan``: what an epsilon asks for and what rounds cost, before anybody commits to a contract. May read a draft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregator import defaults
from cli.options import MODE_HELP, STEPS_HELP, Basis, Dropouts, Json, MaxSilos, SamplingRate, Units

if TYPE_CHECKING:
    from rich.table import Table

    from aggregator.planning import Answer, Question

_NO_DELTA = 0.0
_WITH_DRAFT = ("draft", "rounds", "silos", "compare", "json")
"""What may be said beside ``--draft``; all else the draft says itself."""
_OF_THE_BASIS = ("basis_noise_multiplier", "basis_attempts", "basis_dimension")


def add_to_aggregator(app: typer.Typer) -> None:
    """Register the command."""
    app.command("plan")(plan)


def plan(
    context: typer.Context,
    rounds: Annotated[int | None, typer.Option(min=1, help="how many private rounds; with --draft its own unless given")] = None,
    epsilon: Annotated[float | None, typer.Option(help="what the whole plan may cost; or give --noise-multiplier")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="sigma of the guarantee, to see what it costs")] = None,
    delta: Annotated[float, typer.Option(help="at most 1e-5 and 1/(10 · all units), which is taken unless given")] = _NO_DELTA,
    sampling_rate: SamplingRate = defaults.SAMPLING_RATE,
    silos: Annotated[int, typer.Option(min=2, help="how many silos take part; with --draft its members unless given")] = 3,
    units: Units = 1000,
    mode: Annotated[str, typer.Option(help=MODE_HELP)] = "joint",
    steps_per_round: Annotated[int | None, typer.Option(min=1, help=STEPS_HELP)] = None,
    colluders: Annotated[int, typer.Option(min=1, help="silos that may work together with the aggregator")] = 1,
    dropouts: Dropouts = 0,
    max_silos_per_unit: MaxSilos = 1,
    dimension: Annotated[int, typer.Option(min=1, help="how many numbers train: rank² for each module, and the head")] = 6914,
    basis: Basis = defaults.BASIS,
    basis_noise_multiplier: Annotated[
        float, typer.Option(min=0, help="with --basis private: sigma of the basis round")
    ] = defaults.BASIS_NOISE_MULTIPLIER,
    basis_attempts: Annotated[
        int, typer.Option(min=1, help="with --basis private: how many basis rounds the plan pays for")
    ] = defaults.BASIS_ATTEMPTS,
    basis_dimension: Annotated[
        int, typer.Option(min=1, help="with --basis private: numbers of all sketches, width · (out + in) for each module")
    ] = 294912,
    draft: Annotated[Path | None, typer.Option(help="a draft or contract whose own figures are planned, with its basis")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="also plans with larger and smaller samples, as many passes")] = False,
    json: Json = False,
) -> None:
    """How much noise an epsilon needs, what each adversary sees of it, and epsilon after every eighth of the rounds.

    \b
    Examples:
      aggregator plan --epsilon 3 --delta 1e-5 --rounds 200 --sampling-rate 0.05
      aggregator plan --epsilon 3 --delta 1e-5 --rounds 200 --sampling-rate 0.05 --basis private
      aggregator plan --draft federation.draft.toml --rounds 60
      aggregator plan --epsilon 8 --rounds 50 --silos 5 --units 4000 --compare
      aggregator plan --noise-multiplier 1.1 --rounds 24 --json
    """
    from aggregator import planning, planning_draft
    from cli.output import Output

    said = _said(context)
    if draft is None:
        question = _asked(said, context.params)
    else:
        if given := [name for name in said if name not in _WITH_DRAFT]:
            raise typer.BadParameter(f"--{given[0].replace('_', '-')} beside --draft, which says it itself: leave one of them out")
        question = planning_draft.question(draft, rounds=rounds, silos=silos if "silos" in said else None)
    found = planning.answer(question)
    others = planning.alternatives(question) if compare else []
    Output(json=json).result(_facts(question, found, others), _words(question, found, others))


def _said(context: typer.Context) -> list[str]:
    """The options that the command line names."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return [name for name, source in sources if source is not None and source.name == "COMMANDLINE"]


def _asked(said: Sequence[str], options: dict[str, Any]) -> Question:
    """The question of the options."""
    from aggregator import basis_draft, planning
    from aggregator.simulation.dealing import default_delta

    mode, basis, silos, units = options["mode"], options["basis"], options["silos"], options["units"]
    if options["rounds"] is None:
        raise typer.BadParameter("--rounds is missing: how many private rounds?")
    if mode not in ("joint", "local"):
        raise typer.BadParameter(f"--mode {mode}: joint or local")
    if basis not in ("weights", "random", "public", *basis_draft.OF_RECORDS):
        raise typer.BadParameter(f"--basis {basis}: weights, random, public or private")
    if basis == "raw":
        raise typer.BadParameter("--basis raw has no noise, so there is no epsilon to plan")
    if basis != "private" and (given := [name for name in _OF_THE_BASIS if name in said]):
        raise typer.BadParameter(f"--{given[0].replace('_', '-')} is of a basis round: it needs --basis private")
    each = options["steps_per_round"] or defaults.STEPS_PER_ROUND[mode]
    before = planning.BasisRound(
        noise_multiplier=options["basis_noise_multiplier"], attempts=options["basis_attempts"], dimension=options["basis_dimension"]
    )
    same = ("epsilon", "noise_multiplier", "sampling_rate", "dimension", "colluders", "dropouts", "max_silos_per_unit")
    return planning.Question(
        delta=options["delta"] or default_delta(units, silos), steps=options["rounds"] * each, steps_per_round=each, silos=silos,
        units=units, local=mode == "local", basis=before if basis == "private" else None, **{name: options[name] for name in same},
    )  # fmt: skip


def _facts(question: Question, found: Answer, others: Sequence[tuple[float, int, float, float]]) -> dict[str, Any]:
    """The JSON document."""
    before, cost = question.basis, found.basis
    return {
        "noise_multiplier": found.noise_multiplier, "delta": question.delta,
        "rounds": question.steps // question.steps_per_round, "steps": question.steps,
        "sampling_rate": question.sampling_rate, "mode": "local" if question.local else "joint", "silos": question.silos,
        "shares": question.shares, "epsilon": found.epsilon,
        "lattice_bits": found.lattice_bits, "share_deviation": found.share_deviation, "relative_noise": found.relative_noise,
        "max_silos_per_unit": question.max_silos_per_unit,
        "basis": None if before is None or cost is None else {
            "noise_multiplier": before.noise_multiplier, "attempts": before.attempts, "dimension": before.dimension,
            "epsilon": cost.epsilon, "epsilon_without": cost.without, "share": cost.share,
        },
        "several": [{"of": of, "count": count, "epsilon": value} for of, count, value in found.several],
        "forecast": [{"rounds": count, "epsilon": value} for count, value in found.rounds],
        "compare": [
            {"sampling_rate": rate, "steps": steps, "noise_multiplier": sigma, "relative_noise": noise}
            for rate, steps, sigma, noise in others
        ],
    }  # fmt: skip


def _words(question: Question, found: Answer, others: Sequence[tuple[float, int, float, float]]) -> list[str | Table]:
    """What a person reads."""
    from cli.output import several, table

    against = {"outside": "released models", "insiders": "the aggregator and colluders", "sum_broken": "the secure sum broken"}
    lines: list[str | Table] = [
        f"noise multiplier {found.noise_multiplier:.4f} (delta {question.delta:g}); each silo adds {found.share_deviation:.3g} C",
        table("", ("epsilon against", "epsilon"), [(words, f"{found.epsilon[name]:.3f}") for name, words in against.items()]),
        several(found.several),
        table("after", ("rounds", "epsilon"), [(str(count), f"{value:.3f}") for count, value in found.rounds]),
    ]
    if question.basis is not None and found.basis is not None:
        before, cost = question.basis, found.basis
        lines.insert(
            1,
            f"the basis round takes {100 * cost.share:.1f} % of epsilon: {before.attempts} attempts at sigma "
            f"{before.noise_multiplier:g} alone {cost.epsilon:.3f}, the rounds alone {cost.without:.3f}; below, both together",
        )
    if others:
        rows = [(f"{rate:g}", str(steps), f"{sigma:.4f}", f"{noise:.3f}") for rate, steps, sigma, noise in others]
        lines.append(table("as many passes, the same epsilon", ("sampling rate", "steps", "sigma", "noise of the run"), rows))
    return lines
