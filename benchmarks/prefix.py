# SPDX-License-Identifier: Apache-2.0
"""What it saves to keep the activations of the frozen layers below the adapters (silo/learning/prefix.py), on MiniLM.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.prefix``. Processor time of one thread for the gradients of a batch of units, plain
and with everything kept, the two interleaved, the median of the paired ratios; and that both have the same bits. Reading from the
file is in it, the one pass that fills the file is not: a record pays it once, at its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

import torch
import transformers

from benchmarks.machine import cpu_seconds, described
from benchmarks.step_overhead import RANK, full_batch, minilm
from privacy import base_model
from silo.learning.classifier import Classifier
from silo.learning.gradients import PhysicalBatch, Tape, unit_gradients
from silo.learning.prefix import GIB

LAYERS = 6


def measure(model: Classifier, batch: PhysicalBatch, repeats: int) -> dict[str, float]:
    """Seconds plain and kept, and how many times as fast; bytes of a token; whether all bits are equal."""
    tape, prefix = Tape(model.dimension), model.frozen
    assert prefix is not None
    prefix.keep(None, GIB)

    def kept() -> torch.Tensor:
        return unit_gradients(model, batch, tape)

    def plain() -> torch.Tensor:
        with prefix.aside():
            return unit_gradients(model, batch, tape)

    kept()
    equal = torch.equal(kept().view(torch.int32), plain().view(torch.int32))
    pairs = [(cpu_seconds(plain), cpu_seconds(kept)) for _ in range(repeats)]
    bytes_a_token = prefix.size / int(batch.attention_mask.sum())
    prefix.drop()
    return {
        "plain_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
        "kept_ms": round(1e3 * statistics.median(b for _, b in pairs), 1),
        "times": round(statistics.median(a / b for a, b in pairs), 2),
        "bytes_a_token": bytes_a_token,
        "same_bits": equal,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratio by precision, adapted layers and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, as [compute] rows_tokens")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--last-layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    machine, found = described("torch", "transformers", "numpy"), []
    for precision in options.precisions:
        for layers in options.last_layers:
            model = minilm(base_model.locate("minilm"), precision, layers)
            for length in options.lengths:
                figures = measure(model, full_batch(options.tokens // length, length), options.repeats)
                found.append({"precision": precision, "last_layers": layers, "length": length, **figures})
    if options.json:
        print(json.dumps({"machine": machine, "tokens": options.tokens, "steps": found}))
        return
    print(machine)
    print(f"MiniLM of {LAYERS} layers, rank {RANK} on query and value of the last ones; batches of {options.tokens} tokens")
    print(
        f"{'precision':<10}{'adapted':>9}{'tokens':>8}{'plain, ms':>11}{'kept, ms':>10}{'times':>7}{'bytes a token':>14}{'bits':>7}"
    )
    for row in found:
        print(
            f"{row['precision']:<10}{row['last_layers']:>9}{row['length']:>8}{row['plain_ms']:>11.1f}{row['kept_ms']:>10.1f}"
            f"{row['times']:>7.2f}{row['bytes_a_token']:>14,.0f}{'same' if row['same_bits'] else 'other':>7}"
        )


if __name__ == "__main__":
    main()
