# SPDX-License-Identifier: Apache-2.0
"""What every benchmark prints beside its figures: the machine, the versions, and whether a target was met.

Figures of another machine, or of a busy one, are other figures; the clocks used here are named by each script.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def described(*packages: str) -> str:
    """Processor, CPUs, operating system, Python and the versions of ``packages``, on one line."""
    versions = ", ".join(f"{name} {installed(name) or 'not installed'}" for name in packages)
    return f"{_processor()} ({os.cpu_count()} CPUs), {platform.system()}, Python {platform.python_version()}, {versions}"


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def verdict(target: str, found: str, *, met: bool) -> str:
    """One line: the target, what was found, and whether that meets it."""
    return f"target: {target}; found: {found}: {'met' if met else 'MISSED'}"


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process in one call of ``work``; other processes can only make them longer."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
