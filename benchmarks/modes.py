# SPDX-License-Identifier: Apache-2.0
"""What a federation is worth at one epsilon: joint and local mode against pooled records and against a silo alone.

Run: ``python -m benchmarks.modes --data FOLDER --results modes.jsonl --picture modes.svg``; ``--tasks``, ``--epsilons``,
``--modes``, ``--seeds``, ``--rounds``, ``--batch`` and ``--records`` fit it to a machine. A finished run is a line of the results
and is not done again. ``--data`` is as in benchmarks/utility.py; a task's records are dealt to three silos at random, a third each.

All modes have the same private steps, sampling rate, clipping norm, adapter and step size, and one (epsilon, delta):

pooled    all records in one place, the noise of the plan once: what a curator whom everybody trusts would reach
joint-0   one step of all silos a round; each adds its share of that noise, so that epsilon holds against everyone outside the silos
joint     the same, with shares so large that epsilon holds against a silo too, who can take its own off again: 3/2 the variance
local     each silo takes ``--local-steps`` steps of its own with the noise in full, then the changes are averaged
alone     one silo on its own records (``silo train --alone``): what it has without a federation

Without noise the first three are one computation, which is run once, as joint.

Sampling, gradients, clip on the lattice, noise and update rule are the library's own, in one process; keys, masks and ledgers are
left out, since sums are the same bit for bit (tests/test_pooled.py). Randomness is the operating system's: a seed numbers a
repetition. Nothing is charged and the accuracy is exact, so this is for public data sets alone. epsilon ``inf``: no noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator import defaults
from aggregator.simulation import dealing
from benchmarks import basis_runs, machine, plots, runs
from privacy import base_model, update_rule
from privacy.contract import Contract
from privacy.dp import noise, ring
from privacy.federation import ring_plan
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import alone
from silo.config import Compute
from silo.learning import classifier, evaluation, local, prefix
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution, resolve

MODES = ("pooled", "joint-0", "joint", "local", "alone")
ONE_STEP = MODES[:3]
"""One computation where there is no noise; it is run once, as ``joint``."""
SILOS = basis_runs.SILOS
TASKS = {"ade": 48, "banking77": 32, "nli": 48}
"""Data sets, and the longest text in tokens."""
HELD_OUT = ("test", "test_snli")
OFF = {"off": "no differential privacy", "noise_multiplier": 0.0, "epsilon": 0.0, "delta": 0.0}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; its fields are what makes it another one. ``records`` 0: all of the task."""

    data: str
    task: str
    mode: str
    epsilon: float
    seed: int
    rounds: int
    batch: int
    records: int = 0
    held_out: int = 0
    local_steps: int = 5
    rank: int = defaults.RANK
    model: str = base_model.MINILM
    precision: str = "auto"
    rows_tokens: int = Compute().rows_tokens
    last_layers: int = defaults.LAST_LAYERS
    learning_rate: float = defaults.LEARNING_RATE


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run: accuracy on the held-out records, and the noise multiplier (0 without noise)."""

    run: Run
    accuracy: float
    noise_multiplier: float
    delta: float
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Here:
    """A task: the terms of joint mode but for the noise, each silo's units, the held-out units, the model's folder."""

    terms: Contract
    silos: tuple[tuple[EncodedUnit, ...], ...]
    held_out: tuple[EncodedUnit, ...]
    folder: Path


@functools.lru_cache(maxsize=2)
def here(run: Run) -> Here:
    """The records of a task, the first ``run.records`` of a shuffle that is the same for all runs, dealt to the silos."""
    names = basis_runs.Run(
        data=run.data, task=run.task, basis="weights", epsilon=8.0, seed=0, rounds=run.rounds, batch=run.batch, rank=run.rank,
        model=run.model, last_layers=run.last_layers, learning_rate=run.learning_rate,
    )  # fmt: skip
    rows = _shuffled([json.loads(line) for line in basis_runs.lines(names, "train")], run.records)
    apart = _shuffled([json.loads(line) for part in HELD_OUT for line in basis_runs.lines(names, part)], run.held_out)
    units = dealing.rounded_up(-(-len(rows) // SILOS))
    made, folder = basis_runs.terms_of(names, sorted({str(row["label"]) for row in rows}), units)
    made = msgspec.structs.replace(
        made, task=msgspec.structs.replace(made.task, text_pair="premise" in rows[0], max_length=TASKS.get(run.task, 48))
    )
    silos = tuple(basis_runs.encoded(rows[first::SILOS], made, folder) for first in range(SILOS))
    return Here(terms=made, silos=silos, held_out=basis_runs.encoded(apart, made, folder), folder=folder)


def data_of(run: Run) -> Run:
    """The part of a run that its records and its terms but for the noise depend on: one key for all modes, epsilons and seeds."""
    return replace(run, mode="joint", epsilon=8.0, seed=0, local_steps=1)


def _shuffled(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))
    return [rows[index] for index in order[: count or len(rows)]]


def terms_of(run: Run, joint: Contract) -> Contract:
    """The terms of the run's mode: in local mode the same number of private steps, in fewer rounds; alone, a round is a step."""
    if run.mode == "joint-0":
        return msgspec.structs.replace(joint, privacy=msgspec.structs.replace(joint.privacy, colluders=0))
    if run.mode not in ("local", "alone"):
        return joint
    each = run.local_steps if run.mode == "local" else 1
    rounds = max(1, run.rounds // each)
    training = msgspec.structs.replace(
        joint.training, mode="local", rounds=rounds, steps_per_round=each, warmup_rounds=defaults.warmup(rounds, each),
        decay_rounds=defaults.decay(rounds),
    )  # fmt: skip
    return basis_runs.with_noise(msgspec.structs.replace(joint, training=training), 1.0)


@functools.lru_cache(maxsize=1)
def started(at: Here, precision: str, rows_tokens: int) -> Contribution:
    """The model and its start-up tests, once for all runs of a task; frozen layers below the adapters are computed once too."""
    device, found = resolve(Compute(device="cpu", precision=precision, threads=1))  # type: ignore[arg-type]
    model = classifier.build(at.folder, at.terms, precision=found, device=device)
    return Contribution(at.terms, model, (), rows_tokens=rows_tokens, prefix_bytes=16 * prefix.GIB)


def trained(run: Run, terms: Contract, begun: Contribution, silos: Sequence[Sequence[EncodedUnit]]) -> State:
    """The state after all rounds."""
    state = update_rule.initial(terms)
    if run.mode in ONE_STEP:
        everybody = begun.on(terms, [unit for silo in silos for unit in silo])
        for _ in range(terms.training.rounds):
            total = everybody(state)
            if terms.is_private:
                total = total + drawn(terms, terms.shares if run.mode == "pooled" else SILOS)
            state = update_rule.advance(state, total, terms)
        return state
    here = [begun.on(terms, units) for units in silos]
    if run.mode == "alone":
        for number in range(1, terms.training.rounds + 1):
            state = alone.stepped(state, terms, number, contribute=here[run.seed % SILOS], randomness=Randomness.from_os)
        return state
    own: list[State | None] = [None] * SILOS
    for _ in range(terms.training.rounds):
        total = np.zeros(terms.dimension, dtype=np.int64)
        for place, contribute in enumerate(here):
            words, own[place] = local.trained(state, own[place], terms, contribute=contribute, randomness=Randomness.from_os)
            total += ring.lift(words)
        state = update_rule.advance(state, total, terms)
    return state


def drawn(terms: Contract, shares: int) -> NDArray[np.int64]:
    """The sum ``(d,)`` of so many shares of the plan's noise, each drawn by itself."""
    plan, total = ring_plan(terms), np.zeros(terms.dimension, dtype=np.int64)
    for _ in range(shares):
        total += noise.discrete_gaussian(terms.dimension, plan.share_variance, Randomness.from_os())
    return total


def measured(run: Run) -> Row:
    """The run."""
    begun = time.perf_counter()
    at = here(data_of(run))
    terms = terms_of(run, at.terms)
    if math.isinf(run.epsilon):
        terms = msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, **OFF))
    else:
        terms, _ = basis_runs.calibrated(terms, (), run.epsilon)
    contribution = started(at, run.precision, run.rows_tokens)
    contribution.model.write(trained(run, terms, contribution, at.silos).theta)
    accuracy = evaluation.accuracy(contribution.model, at.held_out, terms=terms, rows_tokens=run.rows_tokens)
    return Row(
        run=run, accuracy=accuracy, noise_multiplier=terms.privacy.noise_multiplier, delta=at.terms.privacy.delta,
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


# --- The grid ------------------------------------------------------------------------------------------------------------------


def finished(path: Path) -> dict[Run, Row]:
    """The runs that stand in a file of results."""
    return runs.finished(path, Run, Row)


def summary(rows: Sequence[Row]) -> dict[tuple[str, float, str], tuple[float, float, int]]:
    """(mean, standard deviation, runs) of the accuracy by task, epsilon and mode."""
    groups: dict[tuple[str, float, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.run.task, row.run.epsilon, row.run.mode), []).append(row.accuracy)
    return {
        key: (statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0.0, len(each)) for key, each in groups.items()
    }


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each task and epsilon: mean accuracy of every mode in percent, and its standard deviation over the seeds."""
    found = summary(rows)
    head = ["| task | ε | " + " | ".join(MODES) + " | seeds |", "|---" * (len(MODES) + 3) + "|"]
    for task, epsilon in sorted({(task, epsilon) for task, epsilon, _ in found}):
        cells, counts = [], []
        for mode in MODES:
            same = "joint" if mode in ONE_STEP and math.isinf(epsilon) else mode
            mean, spread, count = found.get((task, epsilon, same), (math.nan, 0.0, 0))
            cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f}" if count else "–")
            counts.append(count)
        head.append(f"| {task} | {epsilon:g} | {' | '.join(cells)} | {max(counts)} |")
    return head


def picture(rows: Sequence[Row]) -> str:
    """Accuracy against finite epsilons, a panel for each task, bars of one standard deviation; the text of an SVG file."""
    found = summary([row for row in rows if not math.isinf(row.run.epsilon)])
    panels = []
    for task in sorted({task for task, _, _ in found}):
        curves = []
        for mode in MODES:
            at = sorted((epsilon, *found[t, epsilon, m][:2]) for t, epsilon, m in found if (t, m) == (task, mode))
            points, spread = tuple((epsilon, 100 * mean) for epsilon, mean, _ in at), tuple(100 * sd for *_, sd in at)
            curves += [plots.Curve(label=mode, points=points, spread=spread)] if at else []
        panels.append(plots.Panel(title=task, x="epsilon", y="held-out accuracy, %", curves=tuple(curves), linear_y=True))
    about = "Means over repetitions, with bars of one standard deviation, by mode."
    return plots.picture(panels, title="What a federation is worth at one epsilon", desc=about)


_SAY = functools.partial(print, flush=True)


def parser(about: str | None = __doc__) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--results", type=Path, default=Path("modes.jsonl"), help="finished runs, one a line; read first")
    made.add_argument("--picture", type=Path, help="write the figure here")
    made.add_argument("--tasks", nargs="+", default=list(TASKS))
    made.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    made.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0, math.inf])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--rounds", type=int, default=40, help="private steps, in every mode")
    made.add_argument("--batch", type=int, default=1000, help="expected units of a step, over all silos")
    made.add_argument("--records", type=int, default=0, help="training records of a task; 0 takes all")
    made.add_argument("--held-out", type=int, default=0, help="held-out records; 0 takes all")
    made.add_argument("--local-steps", type=int, default=5)
    made.add_argument("--rank", type=int, default=defaults.RANK)
    made.add_argument("--last-layers", type=int, default=defaults.LAST_LAYERS, help="how many layers carry adapters")
    made.add_argument("--learning-rate", type=float, default=defaults.LEARNING_RATE)
    made.add_argument("--model", default=base_model.MINILM)
    made.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    made.add_argument("--rows-tokens", type=int, default=Compute().rows_tokens, help="tokens of a physical batch")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: none but this")
    return made


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run that are the same for a whole grid."""
    given = {field.name for field in fields(Run)} & vars(options).keys()
    return {"data": str(options.data), **{name: getattr(options, name) for name in given - {"data"}}}


def main(words: Sequence[str] | None = None, *, say: Callable[[str], None] = _SAY) -> None:
    """Do what is left of the grid, then print the table and write the picture."""
    options = parser().parse_args(words)
    grid = [
        Run(task=task, mode=mode, epsilon=epsilon, seed=seed, **shared(options))
        for seed in range(options.seeds) for task in options.tasks for epsilon in options.epsilons for mode in options.modes
        if not (mode in ONE_STEP and mode != "joint" and math.isinf(epsilon))
    ]  # fmt: skip
    rows = worked_off(grid, options, say)
    if options.picture is not None:
        options.picture.write_text(picture(rows), encoding="utf-8")
    say(f"{SILOS} silos; {options.rounds} steps of {options.batch} expected units; {options.local_steps} a round in local mode")
    say("\n".join(table(rows)))


def worked_off(grid: Sequence[Run], options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """The rows of a grid: those that stand in the file of results, and the rest done now."""
    done = finished(options.results)
    for row in runs.worked_off([run for run in grid if run not in done], measured, options.results, options.workers):
        say(f"{row.run.task} {row.run.mode} {row.run.epsilon:g} seed {row.run.seed}: {row.accuracy:.4f} in {row.seconds:.0f} s")
    done = finished(options.results)
    say(machine.described("torch", "transformers", "numpy", "dp-accounting"))
    return [done[run] for run in grid if run in done]


if __name__ == "__main__":
    main()
