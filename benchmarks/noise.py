# SPDX-License-Identifier: Apache-2.0
"""Samples per second of the exact discrete Gaussian, and bytes per second of the mask keystream, on one core.

Run ``python benchmarks/noise.py`` from the repository. Prints the machine and the versions with the figures; the best of
several repetitions is shown, since the slower ones measure the neighbours. OpenDP is compared when it is importable.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from privacy.noise import discrete_gaussian
from privacy.prg import Randomness, add_stream

SAMPLES = 1_000_000
OPENDP_SAMPLES = 20_000
WORDS = 5_000_000
STANDARD_DEVIATIONS = (1, 1 << 17, 1 << 20, 1 << 23)


def best_seconds(work: Callable[[], object], repetitions: int = 5) -> float:
    """The shortest of ``repetitions`` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def machine() -> str:
    """Processor, Python, NumPy and cryptography of this run, one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "cryptography"))
    return f"{processor} ({os.cpu_count()} CPUs), {platform.system()}, Python {platform.python_version()}, {packages}"


def ours(s: int) -> float:
    """Samples per second of ``discrete_gaussian`` at this s, operating-system randomness included."""
    return SAMPLES / best_seconds(lambda: discrete_gaussian(SAMPLES, s * s, Randomness.from_os()))


def opendp(s: int) -> float | None:
    """Samples per second of OpenDP's exact discrete Gaussian on a vector, or None where it cannot be imported."""
    if importlib.util.find_spec("opendp") is None:
        return None
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    measurement = dp.m.make_gaussian(*space, scale=float(s))
    zeros = [0] * OPENDP_SAMPLES
    return OPENDP_SAMPLES / best_seconds(lambda: measurement(zeros), repetitions=2)


def keystream() -> float:
    """Bytes per second of adding one mask to a vector of five million words."""
    target = np.zeros(WORDS, dtype="<u4")
    return 4 * WORDS / best_seconds(lambda: add_stream(target, bytes(32)))


def main() -> None:
    """Print the table."""
    print(machine())
    print(f"{'s':>10}  {'samples/s':>12}  {'OpenDP samples/s':>18}")
    for s in STANDARD_DEVIATIONS:
        other = opendp(s)
        print(f"{s:>10}  {ours(s):>12,.0f}  {'not installed' if other is None else f'{other:,.0f}':>18}")
    print(f"mask keystream added to {WORDS:,} words: {keystream() / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
