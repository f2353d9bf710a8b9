# SPDX-License-Identifier: Apache-2.0
"""What per-unit clipping costs: the private step against ordinary training of the same R and head, on MiniLM.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.step_overhead``. Processor time of one thread, the two steps interleaved, the median
of the paired ratios; other work on the machine moves both. The private step is gradients per unit, lattice and integer sum (noise
is drawn once per round, not per batch, and is not in it).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel

from benchmarks.machine import cpu_seconds, described
from privacy import base_model
from privacy.dp.lattice import sum_lattice, to_lattice
from silo.learning import basis
from silo.learning.classifier import Classifier, Precision
from silo.learning.gradients import PhysicalBatch, Tape, pack, unit_gradients
from silo.learning.lora_sb import attach, find_linear
from silo.learning.tokens import EncodedUnit

RANK, LABELS, HIDDEN = 32, 3, 384


def minilm(path: Path, precision: Precision, last_layers: int = 6) -> Classifier:
    """MiniLM with query and value adapters in its last layers, and a head, at a non-zero state."""
    encoder = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="eager")
    names = [f"encoder.layer.{i}.attention.self.{leaf}" for i in range(6 - last_layers, 6) for leaf in ("query", "value")]
    bases = {name: basis.weights_basis(find_linear(encoder, name).weight.detach().double().numpy(), RANK) for name in names}
    model = Classifier(
        encoder, attach(encoder, names, bases, 1.0), torch.nn.Linear(HIDDEN, LABELS),
        pooling="mean", head_scale=1.0, precision=precision, basis_digest=basis.digest(bases),
    )  # fmt: skip
    model.write(0.05 * np.random.Generator(np.random.PCG64(0)).standard_normal(model.dimension))
    return model


def full_batch(rows: int, length: int) -> PhysicalBatch:
    bits = np.random.Generator(np.random.PCG64(1))
    records = [tuple(int(t) for t in bits.integers(1000, 20000, length - i % 5)) for i in range(rows)]
    units = [EncodedUnit(id=str(i), rows=((ids, (0,) * len(ids), i % LABELS),)) for i, ids in enumerate(records)]
    return next(pack(units, lambda _: rows, max_length=length))


def private_step(model: Classifier, batch: PhysicalBatch, tape: Tape) -> None:
    sum_lattice(to_lattice(unit_gradients(model, batch, tape), max_grad_norm=0.5, lattice_bits=14))


def ordinary_step(model: Classifier, batch: PhysicalBatch) -> None:
    model.row_losses(batch).mean().backward()  # type: ignore[no-untyped-call]
    for parameter in model.trainables():
        parameter.grad = None


def measure(model: Classifier, rows: int, length: int, repeats: int) -> dict[str, float]:
    batch, tape = full_batch(rows, length), Tape(model.dimension)
    private, ordinary = partial(private_step, model, batch, tape), partial(ordinary_step, model, batch)
    for _ in range(3):
        private()
        ordinary()
    pairs = [(cpu_seconds(private), cpu_seconds(ordinary)) for _ in range(repeats)]
    best = min(a for a, _ in pairs)
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "private_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
        "records_per_s": round(rows / statistics.median(a for a, _ in pairs), 1),
        "best_records_per_s": round(rows / best, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratios by precision and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="of a batch; one unit each")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    machine, found = described("torch", "transformers", "numpy"), []
    for precision in options.precisions:
        model = minilm(base_model.locate("minilm"), precision)
        for length in options.lengths:
            figures = measure(model, options.rows, length, options.repeats)
            found.append({"precision": precision, "length": length, **figures})
    if options.json:
        print(json.dumps({"machine": machine, "rows": options.rows, "d": model.dimension, "steps": found}))
        return
    print(machine)
    print(f"MiniLM, rank {RANK} on query and value, d = {model.dimension}; {options.rows} rows; medians of {options.repeats} pairs")
    print(f"{'precision':<10}{'tokens':>8}{'private, ms':>13}{'records/s':>11}{'times ordinary':>16}")
    for row in found:
        print(
            f"{row['precision']:<10}{row['length']:>8}{row['private_ms']:>13.1f}{row['records_per_s']:>11.1f}{row['ratio']:>16.3f}"
        )


if __name__ == "__main__":
    main()
