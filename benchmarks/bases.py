# SPDX-License-Identifier: Apache-2.0
"""Accuracy against epsilon for the bases of the adapter and for several heads, all at one total epsilon that includes the basis.

Run: ``python -m benchmarks.bases --data FOLDER --results runs.jsonl --picture bases.svg``; ``--tasks``, ``--epsilons``,
``--bases``, ``--seeds``, ``--rounds``, ``--batch`` and ``--records`` fit it to a machine. One process per core, one thread each. A
finished run is a line of the results and is not done again: stop at any time, start again with the same file. ``--data`` is as in
benchmarks/utility.py.

A run is a joint federation of three silos on the pooled records, in one process: the library's own sample, per-unit gradients, clip
on the lattice, exact noise of every silo's share and update rule, with the noise that the insiders' guarantee asks for; no keys,
masks or ledger. Such a run equals the federation's bit for bit (tests/test_pooled.py). Sampling and noise are drawn from the
operating system: a seed numbers a repetition, and draws another ``random`` basis.

weights   the top singular vectors of each layer; random: orthonormal vectors of a seed; both cost nothing
private   one noised release of the clipped gradient sketches of all records, at ``--basis-noise``; ``--attempts`` at it are part of
          epsilon, as a contract pays for them
public    the same without noise, from the records of another task (``--public``), labels matched by place; costs nothing
raw       the same without noise, from the records themselves: what the papers do. NO EPSILON HOLDS; it is here for comparison only
random:4  (any of them) four heads with as many trainable numbers in all: rank r/2 each, on 4·r/2 vectors
weights~N (or random) a new basis every N rounds: of the weights, into which the adapter was merged, or of the next seed; no cost
private@K (or raw) the first K of the rounds train the head alone, then the basis comes out of the gradients there, and is paid for

``--scales random=1`` and ``--rates random=0.01``: the step size of one basis, named as in ``--bases``.

epsilon ``inf`` is training without noise. The table has means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from aggregator import defaults
from benchmarks import plots, refresh, runs
from benchmarks.basis_runs import LENGTHS, Row, Run
from benchmarks.basis_training import measured
from privacy import base_model
from privacy.errors import ConfigError
from silo.config import Compute


def finished(path: Path) -> dict[Run, Row]:
    """The runs that stand in a file of results."""
    return runs.finished(path, Run, Row)


def summary(rows: Iterable[Row]) -> dict[tuple[str, str, float], tuple[float, float | None, int]]:
    """(mean, standard deviation or None, runs) of the accuracy by task, basis and epsilon, in that order."""
    groups: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        groups.setdefault((row.run.task, row.run.basis, row.run.epsilon), []).append(row.accuracy)
    return {
        key: (statistics.mean(each), statistics.stdev(each) if len(each) > 1 else None, len(each))
        for key, each in sorted(groups.items())
    }


def table(rows: Sequence[Row]) -> list[str]:
    """The summary as lines of a Markdown table."""
    noise_of = {(row.run.task, row.run.basis, row.run.epsilon): row for row in rows}
    found = [
        "| task | basis | scale | rate | ε, basis included | σ | numbers | runs | accuracy | largest class |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (mean, deviation, count) in summary(rows).items():
        row, (task, basis, epsilon) = noise_of[key], key
        holds = "none holds; trained at " if basis.startswith("raw") and not math.isinf(epsilon) else ""
        spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
        found.append(
            f"| {task} | {basis} | {row.run.scale:g} | {row.run.learning_rate:g} | {holds}{epsilon:g} | {row.noise_multiplier:.3f} "
            f"| {row.dimension:,} | {count} | {100 * mean:.1f}{spread} % | {100 * row.largest:.1f} % |"
        )
    return found


def picture(rows: Sequence[Row]) -> str:
    """Accuracy against finite epsilons, one panel a task, bars of one standard deviation; the text of an SVG file."""
    found, panels = summary(row for row in rows if not math.isinf(row.run.epsilon)), []
    for task in sorted({task for task, _, _ in found}):
        curves = []
        for basis in sorted({basis for at, basis, _ in found if at == task}):
            at = [(epsilon, *found[t, b, epsilon][:2]) for t, b, epsilon in found if (t, b) == (task, basis)]
            points, spread = tuple((epsilon, 100 * mean) for epsilon, mean, _ in at), tuple(100 * (sd or 0.0) for *_, sd in at)
            curves.append(plots.Curve(label=basis, points=points, spread=spread))
        y = "held-out accuracy, %"
        panels.append(plots.Panel(title=task, x="epsilon, basis included", y=y, curves=tuple(curves), linear_y=True))
    return plots.picture(
        panels, title="Accuracy against epsilon by basis", desc="Means over seeds, with bars of one standard deviation."
    )


def by_basis(words: Sequence[str], bases: Sequence[str]) -> dict[str, float]:
    """The numbers of ``BASIS=NUMBER``, each for one of ``bases``.

    Raises:
        ConfigError: another form, no positive number, or a basis that is not asked for.
    """
    found = {}
    for word in words:
        basis, _, number = word.partition("=")
        try:
            found[basis] = float(number)
        except ValueError:
            found[basis] = 0.0
        if basis not in bases or not 0 < found[basis] < math.inf:
            raise ConfigError(f"{word!r} gives no basis of --bases a positive number", hint="for example --scales random=1")
    return found


def grid(options: argparse.Namespace) -> list[Run]:
    """Every run that was asked for: seed by seed, so that an early stop leaves whole columns."""
    for name in map(refresh.named, options.bases):
        if name.after >= options.rounds:
            raise ConfigError(f"{name.after} rounds of the head alone, of {options.rounds}", hint="more --rounds, or a smaller @K")
    scales, rates = (by_basis(words, options.bases) for words in (options.scales, options.rates))

    def run(task: str, basis: str, epsilon: float, seed: int) -> Run:
        names = ["records", "rank", "model", "precision", "last_layers"]
        if not basis.startswith(("weights", "random")):  # the others' runs are not done again when these change
            names += ["basis_noise", "basis_clip", "attempts", "width"]
        public = next((other for other in options.public if other != task), "") if basis.startswith("public") else ""
        return Run(
            data=str(options.data), task=task, basis=basis, epsilon=epsilon, seed=seed, rounds=options.rounds, batch=options.batch,
            public=public, scale=scales.get(basis, defaults.SCALE), learning_rate=rates.get(basis, defaults.LEARNING_RATE),
            **{name: getattr(options, name) for name in names},
        )  # fmt: skip

    return [
        run(task, basis, epsilon, seed)
        for seed in range(options.seeds) for task in options.tasks for epsilon in options.epsilons for basis in options.bases
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--results", type=Path, default=Path("bases.jsonl"), help="finished runs, one a line; read first")
    made.add_argument("--picture", type=Path, help="write the figure here")
    made.add_argument("--tasks", nargs="+", default=list(LENGTHS))
    made.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    made.add_argument("--bases", nargs="+", default=["weights", "random", "private", "public", "random:4"])
    made.add_argument("--last-layers", type=int, default=defaults.LAST_LAYERS, help="how many layers carry adapters")
    made.add_argument("--scales", nargs="+", default=[], metavar="BASIS=SCALE", help="scale of the adapter of a basis")
    made.add_argument("--rates", nargs="+", default=[], metavar="BASIS=RATE", help="learning rate of a basis")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--rounds", type=int, default=40)
    made.add_argument("--batch", type=int, default=2048, help="expected units of a round, over all silos")
    made.add_argument("--records", type=int, default=0, help="training records of a task; 0 takes all")
    made.add_argument("--rank", type=int, default=defaults.RANK)
    made.add_argument("--basis-noise", type=float, default=defaults.BASIS_NOISE_MULTIPLIER, help="sigma of the private basis")
    made.add_argument("--attempts", type=int, default=defaults.BASIS_ATTEMPTS, help="basis rounds that are paid for")
    made.add_argument("--basis-clip", type=float, default=defaults.BASIS_GRAD_NORM, help="clipping bound of the sketches")
    made.add_argument("--width", type=int, default=0, help="columns of a sketch; 0: as a draft has it")
    made.add_argument("--public", nargs="+", default=["sst2", "ade"], help="tasks whose records may serve as public ones")
    made.add_argument("--model", default=base_model.MINILM)
    made.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    made.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    made.add_argument("--rows-tokens", type=int, default=Compute().rows_tokens, help="tokens in one physical batch; more for a GPU")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: none but this")
    return made


_SAY = partial(print, flush=True)
"""Seen at once also where output goes to a file: a grid takes hours."""


def main(words: Sequence[str] | None = None, *, say: Callable[[str], None] = _SAY) -> None:
    """Do what is left of the grid, then print the table and write the picture."""
    options = parser().parse_args(words)
    asked, done = grid(options), finished(options.results)
    measure = partial(
        measured, cache=options.results.parent / f"{options.results.stem}-cache",
        compute=Compute(device=options.device, rows_tokens=options.rows_tokens),
    )  # fmt: skip
    for row in runs.worked_off([run for run in asked if run not in done], measure, options.results, options.workers):
        say(f"{row.run.task} {row.run.basis} {row.run.epsilon:g} seed {row.run.seed}: {row.accuracy:.4f} in {row.seconds:.0f} s")
    done = finished(options.results)
    rows = [done[run] for run in asked if run in done]
    for line in table(rows):
        say(line)
    if options.picture and rows:
        options.picture.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
