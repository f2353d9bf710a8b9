# SPDX-License-Identifier: Apache-2.0
"""``aggregator plan``: what an epsilon asks for and what rounds cost, before anybody commits to a contract. Reads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aggregator import defaults
from cli.options import MODE_HELP, STEPS_HELP, Dropouts, Json, MaxSilos, SamplingRate, Units

if TYPE_CHECKING:
    from rich.table import Table

_NO_DELTA = 0.0


def add_to_aggregator(app: typer.Typer) -> None:
    """Register the command."""
    app.command("plan")(plan)


def plan(
    rounds: Annotated[int, typer.Option(min=1, help="how many private rounds")],
    epsilon: Annotated[float | None, typer.Option(help="what the whole plan may cost; or give --noise-multiplier")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="sigma of the guarantee, to see what it costs")] = None,
    delta: Annotated[float, typer.Option(help="at most 1e-5 and 1/(10 · all units), which is taken unless given")] = _NO_DELTA,
    sampling_rate: SamplingRate = defaults.SAMPLING_RATE,
    silos: Annotated[int, typer.Option(min=2, help="how many silos take part")] = 3,
    units: Units = 1000,
    mode: Annotated[str, typer.Option(help=MODE_HELP)] = "joint",
    steps_per_round: Annotated[int | None, typer.Option(min=1, help=STEPS_HELP)] = None,
    colluders: Annotated[int, typer.Option(min=1, help="silos that may work together with the aggregator")] = 1,
    dropouts: Dropouts = 0,
    max_silos_per_unit: MaxSilos = 1,
    dimension: Annotated[int, typer.Option(min=1, help="how many numbers train: rank² for each module, and the head")] = 6914,
    compare: Annotated[bool, typer.Option("--compare", help="also plans with larger and smaller samples, as many passes")] = False,
    json: Json = False,
) -> None:
    """How much noise an epsilon needs, what each adversary sees of it, and epsilon after every eighth of the rounds.

    \b
    Examples:
      aggregator plan --epsilon 3 --delta 1e-5 --rounds 200 --sampling-rate 0.05
      aggregator plan --epsilon 8 --rounds 50 --silos 5 --units 4000 --compare
      aggregator plan --noise-multiplier 1.1 --rounds 24 --json
    """
    from aggregator import planning
    from aggregator.simulation.dealing import default_delta
    from cli.output import Output, several, table

    if mode not in ("joint", "local"):
        raise typer.BadParameter(f"--mode {mode}: joint or local")
    each = steps_per_round or defaults.STEPS_PER_ROUND[mode]
    question = planning.Question(
        epsilon=epsilon, noise_multiplier=noise_multiplier, delta=delta or default_delta(units, silos), steps=rounds * each,
        steps_per_round=each, sampling_rate=sampling_rate, silos=silos, units=units, dimension=dimension, colluders=colluders,
        dropouts=dropouts, local=mode == "local", max_silos_per_unit=max_silos_per_unit,
    )  # fmt: skip
    found = planning.answer(question)
    others = planning.alternatives(question) if compare else []
    facts = {
        "noise_multiplier": found.noise_multiplier, "delta": question.delta, "rounds": rounds, "steps": question.steps,
        "sampling_rate": sampling_rate, "mode": mode, "silos": silos, "shares": question.shares, "epsilon": found.epsilon,
        "lattice_bits": found.lattice_bits, "share_deviation": found.share_deviation, "relative_noise": found.relative_noise,
        "max_silos_per_unit": max_silos_per_unit,
        "several": [{"of": of, "count": count, "epsilon": value} for of, count, value in found.several],
        "forecast": [{"rounds": count, "epsilon": value} for count, value in found.rounds],
        "compare": [
            {"sampling_rate": rate, "steps": steps, "noise_multiplier": sigma, "relative_noise": noise}
            for rate, steps, sigma, noise in others
        ],
    }  # fmt: skip
    against = {"outside": "released models", "insiders": "the aggregator and colluders", "sum_broken": "the secure sum broken"}
    lines: list[str | Table] = [
        f"noise multiplier {found.noise_multiplier:.4f} (delta {question.delta:g}); each silo adds {found.share_deviation:.3g} C",
        table("", ("epsilon against", "epsilon"), [(words, f"{found.epsilon[name]:.3f}") for name, words in against.items()]),
        several(found.several),
        table("after", ("rounds", "epsilon"), [(str(count), f"{value:.3f}") for count, value in found.rounds]),
    ]
    if others:
        rows = [(f"{rate:g}", str(steps), f"{sigma:.4f}", f"{noise:.3f}") for rate, steps, sigma, noise in others]
        lines.append(table("as many passes, the same epsilon", ("sampling rate", "steps", "sigma", "noise of the run"), rows))
    Output(json=json).result(facts, lines)
