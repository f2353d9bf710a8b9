# SPDX-License-Identifier: Apache-2.0
"""Samples per second of the exact discrete Gaussian, and bytes per second of the mask keystream, on one core.

Run: ``python -m benchmarks.noise``. OpenDP, where it is installed (``pip install -e '.[bench]'``), draws a vector of the same
length with the same s; it is exact too. From its time that of the same call without noise (scale 0) is taken, since turning
a Python list into its own vector is not its sampler's work. Processor time of one thread, the best of several
repetitions: the slower ones measure the neighbours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.machine import cpu_seconds, described, installed, verdict
from privacy.dp.noise import discrete_gaussian
from privacy.prg import Randomness, add_stream

STANDARD_DEVIATIONS = (1, 1 << 17, 1 << 20, 1 << 23)
TARGET = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Samples per second on one core at one ``s``; ``opendp`` is None where it is not installed."""

    s: int
    ours: float
    opendp: float | None

    @property
    def times(self) -> float | None:
        """How many samples of ours for one of OpenDP's."""
        return None if self.opendp is None else self.ours / self.opendp


def best(work: Callable[[], object], repeats: int) -> float:
    """The fewest processor seconds of ``repeats`` runs, after one that is not counted."""
    work()
    return min(cpu_seconds(work) for _ in range(repeats))


def ours(s: int, samples: int, repeats: int) -> float:
    """Samples per second of ``discrete_gaussian``, the operating system's randomness included."""
    return samples / best(lambda: discrete_gaussian(samples, s * s, Randomness.from_os()), repeats)


def opendp(s: int, samples: int, repeats: int) -> float:
    """Samples per second of OpenDP's exact discrete Gaussian over a vector of int64."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l2_distance(T=dp.f64)
    zeros = [0] * samples
    noisy, plain = (dp.m.make_gaussian(*space, scale=scale) for scale in (float(s), 0.0))
    return samples / (best(lambda: noisy(zeros), repeats) - best(lambda: plain(zeros), repeats))


def keystream(words: int, repeats: int) -> float:
    """Bytes per second of adding one mask to a vector of ``words`` words."""
    target = np.zeros(words, dtype="<u4")
    return 4 * words / best(lambda: add_stream(target, bytes(32)), repeats)


def table(rates: Sequence[Rates]) -> str:
    lines = [f"{'s':>10}  {'ours, samples/s':>16}  {'OpenDP, samples/s':>18}  {'times':>6}"]
    for row in rates:
        other = "not installed" if row.opendp is None else f"{row.opendp:,.0f}"
        lines.append(f"{row.s:>10,}  {row.ours:>16,.0f}  {other:>18}  {'' if row.times is None else f'{row.times:.0f}':>6}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, the keystream's rate and the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000, help="in one vector, of both")
    parser.add_argument("--words", type=int, default=5_000_000, help="of the vector that is masked")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    machine = described("numpy", "cryptography", "opendp")
    rates = [
        Rates(
            s=s,
            ours=ours(s, options.samples, options.repeats),
            opendp=opendp(s, options.samples, options.repeats) if installed("opendp") else None,
        )
        for s in STANDARD_DEVIATIONS
    ]
    slowest, masked = min(row.ours for row in rates), keystream(options.words, options.repeats)
    if options.json:
        found = [{"s": row.s, "ours": round(row.ours), "opendp": row.opendp and round(row.opendp)} for row in rates]
        print(json.dumps({"machine": machine, "samples": options.samples, "rates": found, "keystream_bytes_per_s": round(masked)}))
        return
    print(machine)
    print(f"vectors of {options.samples:,} samples, processor time of one thread, best of {options.repeats}")
    print(table(rates))
    print(f"mask keystream added to {options.words:,} words: {masked / 1e9:.1f} GB/s")
    met = slowest >= TARGET
    print(verdict(f"at least {TARGET:,} exact samples/s on one core", f"{slowest:,.0f} at the slowest s", met=met))


if __name__ == "__main__":
    main()
