# SPDX-License-Identifier: Apache-2.0
"""A grid of runs that is worked off one by one, and goes on where it was stopped: a finished run is a line of JSON.

A run and its row are frozen dataclasses; the row has the run in its field ``run``. Promised: no run that stands in the file is done
again, and a line that a crash cut off is done again. Not promised: two processes on one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from privacy.errors import SiloquyError

Run = TypeVar("Run")
Row = TypeVar("Row")


def finished(path: Path, run: type[Run], row: type[Row]) -> dict[Run, Row]:
    """The runs that stand in a file of results."""
    found: dict[Run, Row] = {}
    names = {field.name for field in fields(run)}  # type: ignore[arg-type]
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            stated = json.loads(line)
        except json.JSONDecodeError:
            continue
        done = run(**{name: value for name, value in stated["run"].items() if name in names})
        found[done] = row(**{**stated, "run": done})
    return found


def worked_off(runs: Sequence[Run], measure: Callable[[Run], Row], results: Path, workers: int) -> Iterator[Row]:
    """``measure`` of every one of ``runs``, as it is finished; each becomes a line of ``results``, but one that is refused is told.

    ``workers``: processes of one thread each; 0: one run after the other in this process.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the children when they start
    with results.open("a", encoding="utf-8") as file:
        for run, found in _each(runs, measure, workers) if runs else ():
            if isinstance(found, SiloquyError):
                print(f"{run}: {found}")
                continue
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            yield found


def _each(runs: Sequence[Run], measure: Callable[[Run], Any], workers: int) -> Iterator[tuple[Run, Any]]:
    if not workers:
        for run in runs:
            try:
                yield run, measure(run)
            except SiloquyError as error:
                yield run, error
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(measure, run): run for run in runs}
        for job in as_completed(jobs):
            failed = job.exception()
            yield jobs[job], failed if isinstance(failed, SiloquyError) else job.result()
