# SPDX-License-Identifier: Apache-2.0
"""``silo train --alone`` and ``silo eval --alone``: the silo by itself under a contract's terms, and how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.output import Output

HINT = "to compare before you agree: `silo train --alone`, the same terms and epsilon without the others; it spends budget too"
"""What ``silo join`` says."""


def train(output: Output, home: Path, rounds: int | None, *, contract: Path | None, folder: Path | None, instead: bool) -> None:
    """Train alone, with a moving bar of the rounds and a kept line for each; then the answer."""
    from cli.output import bar
    from cli.progress import RoundDisplay
    from privacy.dp.unprotected import figure
    from silo import alone

    begun = alone.training(home, contract=contract, folder=folder, instead=instead, say=output.say)
    with begun as (run, then), RoundDisplay(output) as display:
        asked = run.rounds_left if rounds is None else min(rounds, run.rounds_left)
        for place, done in enumerate(run.train(rounds), start=1):
            display.line(
                f"round {done.round:>3}/{done.rounds}  alone  epsilon {done.epsilon:5.2f} of {done.limit:g} "
                f"{bar(done.epsilon, done.limit)}  {done.seconds:4.1f} s"
            )
            display.moving(f"{bar(place, asked)} {place} of {asked} rounds  {(asked - place) * done.seconds:.0f} s left")
        facts = {**run.summary(), "epsilon_with_federation": figure(then)}
    output.result(facts, _words(facts))


def evaluate(output: Output, home: Path, records: Path, threads: int | None) -> None:
    """How good the models are on records of one's own; the figures stay here."""
    from silo import alone

    facts = alone.evaluate(home, records, threads=threads)
    name = figure_of(facts)
    lines = [
        f"{in_words(name)} before {facts[f'{name}_before']:.3f}, "
        f"alone {facts[f'{name}_alone']:.3f} ({facts['rounds_alone']} of {facts['rounds_planned']} rounds)"
    ]
    if f"{name}_after" in facts:
        lines.append(f"with the federation {facts[f'{name}_after']:.3f} ({facts['rounds']} rounds)")
    output.result(facts, lines)


def figure_of(facts: dict[str, Any]) -> str:
    """The figure that is shown of an evaluation: of a classifier its accuracy, of a causal language model its perplexity."""
    return "accuracy" if "accuracy_before" in facts else "perplexity"


def in_words(figure: str) -> str:
    """A figure's name as it is printed."""
    return "perplexity per response token" if figure == "perplexity" else figure


def _words(facts: dict[str, Any]) -> list[str]:
    spent = "none" if facts["epsilon"] is None else f"{facts['epsilon']:.3f} of {facts['limit']:g} at delta {facts['delta']:g}"
    then = facts["epsilon_with_federation"]
    together = f"{then:.3f}" if then is not None else "none, for one of them has no differential privacy"
    room = "" if then is not None and then <= facts["limit"] else ": too much to join"
    return [
        f"{facts['rounds_done']} of {facts['rounds_planned']} rounds trained alone; this silo's epsilon is {spent}",
        f"with the federation's own plan, and those of other homes on these records, it comes to {together}{room}",
        "next: `silo eval --alone --records own-test.jsonl`",
    ]
