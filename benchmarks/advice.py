# SPDX-License-Identifier: Apache-2.0
"""What noise multiplier, batch and rank do: the figures of docs/guides/noise-batch-rank.md.

Run: ``python -m benchmarks.advice --data FOLDER --results modes.jsonl --picture advice.svg``. Three tables:

sigma   the noise multiplier that an epsilon needs by sampling rate q and number of steps T, and behind it sigma/(q·√T): the noise
        of the whole run beside its signal, smaller is better. Arithmetic of the plan alone, no training
batch   held-out accuracy by expected units of a step, all else equal
rank    held-out accuracy by rank, all else equal; the trainable numbers grow with its square

The runs are those of benchmarks/modes.py in joint mode, with its options and its file of results: a run that both need is done
once. ``--batch`` and ``--rank`` are what the other table has; ``--batches`` and ``--ranks`` what is compared with them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from aggregator import defaults, planning
from aggregator.planning import Question
from aggregator.simulation import dealing
from benchmarks import modes, plots
from benchmarks.modes import SILOS, Row, Run

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
STEPS = (25, 100, 400)
UNITS = 1500
"""Of each of the silos, in the table of sigma."""

Spread = dict[int, tuple[float, float, int]]
"""(mean, standard deviation, runs) of the accuracy by batch or rank."""


def sigma(epsilon: float, rate: float, steps: int) -> tuple[float, float]:
    """(Noise multiplier, sigma/(q·√T)) of a plan of joint mode with the default contract's shape."""
    question = Question(
        delta=dealing.default_delta(UNITS, SILOS), steps=steps, sampling_rate=rate, silos=SILOS, units=UNITS,
        dimension=2 * defaults.RANK**2, epsilon=epsilon,
    )  # fmt: skip
    ((_, _, found, relative),) = planning.alternatives(question, factors=(1.0,))
    return found, relative


def sigmas(epsilons: Sequence[float]) -> list[str]:
    """The first table, as lines of Markdown."""
    lines = ["| ε | steps T | " + " | ".join(f"q = {rate:g}" for rate in RATES) + " |", "|---" * (len(RATES) + 2) + "|"]
    for epsilon in epsilons:
        for steps in STEPS:
            cells = ("{:.2f} ({:.2f})".format(*sigma(epsilon, rate, steps)) for rate in RATES)
            lines.append(f"| {epsilon:g} | {steps} | {' | '.join(cells)} |")
    return lines


def by(name: str, rows: Sequence[Row], base: Run) -> dict[float, Spread]:
    """The accuracies of the runs that differ from ``base`` in the field ``name`` alone (and epsilon and seed), by epsilon."""
    groups: dict[float, dict[int, list[float]]] = {}
    fixed = [field for field in ("batch", "rank") if field != name]
    for row in rows:
        if all(getattr(row.run, field) == getattr(base, field) for field in fixed):
            groups.setdefault(row.run.epsilon, {}).setdefault(getattr(row.run, name), []).append(row.accuracy)
    return {
        epsilon: {
            value: (statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each))
            for value, each in sorted(values.items())
        }
        for epsilon, values in sorted(groups.items())
    }


def table(name: str, found: dict[float, Spread]) -> list[str]:
    """One of the other two tables, as lines of Markdown."""
    values = sorted({value for spread in found.values() for value in spread})
    lines = ["| ε | " + " | ".join(f"{name} {value}" for value in values) + " | seeds |", "|---" * (len(values) + 2) + "|"]
    for epsilon, spread in found.items():
        cells = (f"{100 * spread[v][0]:.1f} ± {100 * spread[v][1]:.1f}" if v in spread else "–" for v in values)
        lines.append(f"| {epsilon:g} | {' | '.join(cells)} | {max(count for *_, count in spread.values())} |")
    return lines


def picture(tables: dict[str, dict[float, Spread]]) -> str:
    """A panel for each table, a curve for each epsilon; the text of an SVG file."""
    panels = [
        plots.Panel(
            title=f"by {name}", x=name, y="held-out accuracy, %", linear_y=True,
            curves=tuple(
                plots.Curve(
                    label=f"ε = {epsilon:g}", points=tuple((float(value), 100 * mean) for value, (mean, *_) in spread.items()),
                    spread=tuple(100 * deviation for _, deviation, _ in spread.values()),
                )
                for epsilon, spread in found.items()
            ),
        )
        for name, found in tables.items()
    ]  # fmt: skip
    about = "Means over repetitions, with bars of one standard deviation, in joint mode."
    return plots.picture(panels, title="What batch and rank do at one epsilon", desc=about)


def grid(options: argparse.Namespace, shared: dict[str, object]) -> Iterator[Run]:
    """Every run that was asked for, those of one batch and rank together."""
    shapes = [(batch, options.rank) for batch in options.batches] + [(options.batch, rank) for rank in options.ranks]
    for batch, rank in dict.fromkeys([(options.batch, options.rank), *shapes]):
        for seed in range(options.seeds):
            for epsilon in options.epsilons:
                at = {**shared, "batch": batch, "rank": rank}
                yield Run(task=options.tasks[0], mode="joint", epsilon=epsilon, seed=seed, **at)  # type: ignore[arg-type]


_SAY = functools.partial(print, flush=True)


def main(words: Sequence[str] | None = None, *, say: Callable[[str], None] = _SAY) -> None:
    """Do what is left of the runs, then print the tables and write the picture."""
    made = modes.parser(__doc__)
    made.set_defaults(tasks=["banking77"], epsilons=[1.0, 8.0])
    made.add_argument("--batches", type=int, nargs="+", default=[150, 1350])
    made.add_argument("--ranks", type=int, nargs="+", default=[4, 128])
    options = made.parse_args(words)
    runs = list(grid(options, modes.shared(options)))
    rows = modes.worked_off(runs, options, say)
    tables = {name: by(name, rows, runs[0]) for name in ("batch", "rank")}
    if options.picture is not None:
        Path(options.picture).write_text(picture(tables), encoding="utf-8")
    say(f"{SILOS} silos of {UNITS} units; noise multiplier, and behind it sigma/(q·√T)")
    say("\n".join(sigmas([1.0, 8.0])))
    for name, found in tables.items():
        say(
            f"{options.tasks[0]}: {options.rounds} steps of {options.batch} expected units, rank {options.rank}, but for the {name}"
        )
        say("\n".join(table(name, found)))


if __name__ == "__main__":
    main()
