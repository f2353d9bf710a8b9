# SPDX-License-Identifier: Apache-2.0
"""What privacy costs in accuracy: three silos under one epsilon against the same training without privacy, on real data sets.

Run: ``python -m benchmarks.utility --data FOLDER`` (about an hour on two CPUs; ``--tasks ade --epsilons 8`` for a part).
The data sets are not part of this project: ``--data`` names a folder with ``<task>/train.jsonl.gz`` and ``<task>/test.jsonl.gz``
(and ``dev.jsonl.gz``, which is held out too).

Columns, all accuracies on the data set's own held-out records, one run each, operating-system randomness throughout:

head      a private linear head on the frozen encoder, pooled, at the same epsilon; the best of three step sizes
private   the federation: ``aggregator simulate``, real processes, ledgers and secure sum
same      the same adapter, sampling, schedule and update rule with neither clipping nor noise, on the pooled records
to end    the same adapter trained without privacy for three passes: Adam on shuffled batches of 64 records
kept      (private − head) / (same − head): the share of what the adapter adds that survives privacy; ``to end`` likewise
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import torch

from aggregator import defaults
from aggregator.simulation.simulate import Result, Settings, simulate
from benchmarks import machine
from privacy import federation, update_rule
from privacy.federation import Contract
from privacy.prg import Randomness
from privacy.update_rule import State
from silo.learning import evaluation
from silo.learning.evaluation import Bench
from silo.learning.gradients import Tape, pack, unit_gradients
from silo.learning.sampling import poisson
from silo.learning.tokens import EncodedUnit
from silo.learning.training import rows_for

TASKS = {
    "ade": {"max_length": 48, "sampling_rate": 0.12, "rounds": 50},
    "sst2": {"max_length": 40, "sampling_rate": 0.06, "rounds": 50},
}
"""Data sets, and how many of their units a round samples: some two to four thousand over all silos."""
BATCH, EPOCHS, STEP_SIZE = 64, 3, 0.008


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; accuracies are shares of the held-out records."""

    task: str
    epsilon: float
    delta: float
    noise_multiplier: float
    before: float
    head: float
    private: float
    same: float | None
    to_end: float | None
    upload_bytes: int
    minutes: float

    @property
    def kept(self) -> float | None:
        """The share of the gap between private head and the same training without privacy; None where that was not measured."""
        return _share(self, self.same)

    @property
    def kept_to_end(self) -> float | None:
        """The same share, against training without privacy to its end."""
        return _share(self, self.to_end)


def _share(row: Row, other: float | None) -> float | None:
    return None if other is None or other == row.head else (row.private - row.head) / (other - row.head)


def unpacked(data: Path, task: str, folder: Path) -> tuple[Path, Path]:
    """(training records, held-out records) as plain JSON lines in ``folder``."""
    paths = []
    for name, parts in (("train", ("train",)), ("held-out", ("dev", "test"))):
        path = folder / f"{task}-{name}.jsonl"
        found = [data / task / f"{part}.jsonl.gz" for part in parts]
        path.write_bytes(b"".join(gzip.decompress(each.read_bytes()) for each in found if each.exists()))
        paths.append(path)
    return paths[0], paths[1]


def opened(home: Path) -> tuple[Bench, list[EncodedUnit]]:
    """The model of a finished simulation in ``home``, and the records of all its silos."""
    terms = federation.parse((home / "aggregator" / "contract" / "v1.toml").read_bytes()).terms
    bench = evaluation.open_bench(terms)
    return bench, [unit for path in sorted(home.glob("silo-*/records.jsonl")) for unit in bench.units(path)]


def summed_gradient(bench: Bench, units: Sequence[EncodedUnit], tape: Tape) -> np.ndarray:
    """The plain sum ``(d,)`` float64 of the units' gradients: no clipping, no lattice."""
    total = torch.zeros(bench.model.dimension, dtype=torch.float64)
    for batch in pack(units, rows_for(bench.rows_tokens, 1), max_length=bench.terms.task.max_length):
        total += unit_gradients(bench.model, batch, tape).double().sum(dim=0)
    return total.numpy()


def stepped(state: State, mean: np.ndarray, terms: Contract) -> State:
    """The contract's own update rule on a gradient ``(d,)``: written as integers so fine that rounding is nothing."""
    plain = msgspec.structs.replace(terms.privacy, max_grad_norm=1.0)
    total = np.rint(mean * terms.divisor * (1 << terms.privacy.lattice_bits)).astype(np.int64)
    return update_rule.advance(state, total, msgspec.structs.replace(terms, privacy=plain))


def same_training(home: Path, held_out: Path) -> float:
    """Accuracy after the contract's own rounds without clipping and noise."""
    bench, units = opened(home)
    terms, tape = bench.terms, Tape(bench.model.dimension)
    state = update_rule.initial(terms)
    for _ in range(terms.training.rounds):
        bench.model.write(state.theta)
        chosen = [units[index] for index in poisson(len(units), terms.privacy.sampling_rate, Randomness.from_os())]
        state = stepped(state, summed_gradient(bench, chosen, tape) / terms.divisor, terms)
    return evaluation.evaluate(bench, state, held_out)


def to_the_end(home: Path, held_out: Path) -> float:
    """Accuracy after three passes of ordinary training of the same adapter and head."""
    bench, units = opened(home)
    steps = EPOCHS * len(units) // BATCH
    rule = msgspec.structs.replace(
        bench.terms.training,
        rounds=steps,
        learning_rate=STEP_SIZE,
        beta2=0.999,
        warmup_rounds=steps // 20,
        decay_rounds=steps - steps // 20,
    )
    terms, tape = msgspec.structs.replace(bench.terms, training=rule), Tape(bench.model.dimension)
    state = update_rule.initial(terms)
    for batch in _shuffled(units, steps):
        bench.model.write(state.theta)
        state = stepped(state, summed_gradient(bench, batch, tape) / len(batch), terms)
    return evaluation.evaluate(bench, state, held_out)


def _shuffled(units: Sequence[EncodedUnit], steps: int) -> Iterator[list[EncodedUnit]]:
    """``steps`` batches of records of like length, which are the cheapest; the order of batches is random."""
    bits = np.random.default_rng()
    order: list[list[EncodedUnit]] = []
    for _ in range(steps):
        if not order:
            mixed = [units[index] for index in bits.permutation(len(units))]
            runs = sorted(mixed, key=lambda unit: len(unit.rows[0][0]))
            order = [runs[start : start + BATCH] for start in range(0, len(runs), BATCH)]
            order = [order[index] for index in bits.permutation(len(order))]
        yield order.pop()


def references(home: Path, held_out: Path) -> tuple[float, float]:
    """(same, to end), side by side in processes of one thread each."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        both = [pool.submit(work, home, held_out) for work in (same_training, to_the_end)]
        return both[0].result(), both[1].result()


def measured(
    task: str, paths: tuple[Path, Path], epsilons: Sequence[float], folder: Path, *, compare: bool, **settings: object
) -> Iterator[Row]:
    """One row for each epsilon, as it is finished; ``compare``: with what training without privacy reaches, measured once."""
    others: tuple[float | None, float | None] = (None, None)
    for epsilon in epsilons:
        home = folder / f"{task}-{epsilon:g}"
        plan = {**TASKS.get(task, {}), **settings}
        chosen = Settings(home=home, data=paths[0], held_out=paths[1], epsilon=epsilon, **plan)  # type: ignore[arg-type]
        found = simulate(chosen, lambda step: None)
        if compare and others[0] is None:
            others = references(home, home / "held-out.jsonl")
        yield _row(task, epsilon, found, others, home)


def _row(task: str, epsilon: float, found: Result, others: tuple[float | None, float | None], home: Path) -> Row:
    terms = federation.parse((home / "aggregator" / "contract" / "v1.toml").read_bytes()).terms
    return Row(
        task=task,
        epsilon=epsilon,
        delta=found.delta,
        noise_multiplier=terms.privacy.noise_multiplier,
        before=found.accuracy_before,
        head=found.accuracy_head,
        private=found.accuracy_after,
        same=others[0],
        to_end=others[1],
        upload_bytes=found.upload_bytes,
        minutes=found.seconds / 60,
    )


def line(row: Row) -> str:
    """The row as it stands in the table."""
    return (
        f"{row.task:<6} {row.epsilon:>7g} {row.delta:>7.0e} {row.noise_multiplier:>6.3f}  {row.before:>6.3f} {row.head:>6.3f} "
        f"{row.private:>8.3f} {_cell(row.same, '.3f'):>6} {_cell(row.to_end, '.3f'):>7}  "
        f"{_cell(row.kept, '.0%'):>5} {_cell(row.kept_to_end, '.0%'):>7}  "
        f"{row.upload_bytes:>7,} {row.minutes:>8.1f}"
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _terms_in_words(tasks: Sequence[str]) -> str:
    usual = Settings(home=Path())
    scale = usual.scale or defaults.SCALES[usual.basis]
    adapter = f"rank {usual.rank} on {', '.join(usual.targets)} of the last {usual.last_layers} layers, scale {scale:g}"
    plans = "; ".join(f"{task}: {json.dumps(TASKS.get(task))}" for task in tasks)
    return f"three silos; {adapter}; clip {usual.max_grad_norm:g}, Adam at {usual.learning_rate:g}; {plans}\n"


_HEADING = (
    f"{'task':<6} {'epsilon':>7} {'delta':>7} {'sigma':>6}  {'before':>6} {'head':>6} {'private':>8} {'same':>6} {'to end':>7}  "
    f"{'kept':>5} {'to end':>7}  {'bytes':>7} {'minutes':>8}"
)


def main(words: Sequence[str] | None = None, *, say: Callable[[str], None] = print) -> None:
    """Print the table, one line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[8.0, 3.0])
    parser.add_argument("--private-only", action="store_true", help="leave out what training without privacy reaches")
    parser.add_argument("--home", type=Path, help="keep the simulations in this folder")
    parser.add_argument("--model", default=Settings.model)
    parser.add_argument("--rounds", type=int, help="private rounds; the task's own unless given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    tasks = [task for task in options.tasks if (options.data / task / "train.jsonl.gz").exists()]
    if not tasks:
        say(f"no data sets {', '.join(options.tasks)} in the folder --data names: nothing to measure")
        return
    settings = {"model": options.model, **({"rounds": options.rounds} if options.rounds else {})}
    rows: list[Row] = []
    tell = (lambda _: None) if options.json else say
    tell(machine.described("torch", "transformers", "numpy", "dp-accounting"))
    tell(_terms_in_words(tasks))
    tell(_HEADING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.home or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            for row in measured(
                task, unpacked(options.data, task, folder), options.epsilons, folder, compare=not options.private_only, **settings
            ):
                rows.append(row)
                tell(line(row))
    if options.json:
        say(json.dumps({"rows": [{**dataclasses.asdict(row), "kept": row.kept, "kept_to_end": row.kept_to_end} for row in rows]}))


if __name__ == "__main__":
    main()
