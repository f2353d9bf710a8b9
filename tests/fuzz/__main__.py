# SPDX-License-Identifier: Apache-2.0
"""Fuzz parsers with atheris, one after the other: ``python -m tests.fuzz wire note --seconds 600``, ``python -m tests.fuzz all``.

Needs the extra ``fuzz`` (``pip install -e '.[fuzz]'``); the test suite does not. Inputs that reached new code are kept in the
folder ``--corpus``, and go on from there next time; an input that broke a promise is written to ``--findings`` as a file. Put
that file into tests/fuzz/findings/<target>/ together with the mending, and the test suite runs it for ever.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = "/dev/shm"


def fuzz(name: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Run libFuzzer on one target in this process; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["privacy", "silo", "aggregator", "tomllib"]):
        from tests.fuzz import targets

    target = targets.TARGETS[name]
    own = corpus / name
    own.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(target.seeds()):
        (own / f"seed-{index}").write_bytes(data)

    def one(data: bytes) -> None:
        targets.attempt(target, data)

    options = [
        f"-max_total_time={seconds}", f"-max_len={targets.MOST_BYTES}", f"-timeout={targets.TIMEOUT_S}", "-rss_limit_mb=3000",
        f"-artifact_prefix={findings / name}-", "-verbosity=0", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(own)], one)
    atheris.Fuzz()


def alone(name: str, seconds: int, corpus: Path, findings: Path) -> int:
    """``fuzz`` in a child, since libFuzzer ends its process without cleaning up; the exit code."""
    with tempfile.TemporaryDirectory(prefix="siloquy-fuzz-", dir=SHARED if os.access(SHARED, os.W_OK) else None) as folder:
        child = os.fork()
        if child == 0:
            os.environ["SILOQUY_FUZZ_FOLDER"] = folder
            fuzz(name, seconds, corpus, findings)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    """Fuzz, and say of each target whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="targets of tests/fuzz/targets.py, or all")
    parser.add_argument("--seconds", type=int, default=120, help="for each target, by the clock on the wall")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    options = parser.parse_args()
    if len(options.targets) == 1 and options.targets != ["all"]:
        return alone(options.targets[0], options.seconds, options.corpus, options.findings)
    from tests.fuzz.targets import TARGETS

    held = [each(name, options) for name in (TARGETS if options.targets == ["all"] else options.targets)]
    return 0 if all(held) else 1


def each(name: str, options: argparse.Namespace) -> bool:
    """Fuzz one target in a process of its own, and print what came of it: inputs, and the processor time that they took."""
    words = [name, "--seconds", str(options.seconds), "--corpus", str(options.corpus), "--findings", str(options.findings)]
    before = _children_s()
    ran = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], capture_output=True, check=False)
    runs = [line.split()[-1] for line in ran.stderr.decode(errors="replace").splitlines() if "number_of_executed_units" in line]
    inputs = f"{int(runs[0]):>12,}" if runs else f"{'?':>12}"
    word = "held" if ran.returncode == 0 else "BROKEN"
    print(f"{name:<20}{word:<8}{inputs} inputs  {_children_s() - before:>5.0f} s of processor time", flush=True)
    if ran.returncode:
        print((ran.stdout + ran.stderr).decode(errors="replace")[-3000:], flush=True)
    return ran.returncode == 0


def _children_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
