# SPDX-License-Identifier: Apache-2.0
"""The model of a contract, whatever kind of task it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from privacy.federation import Contract
from privacy.orthonormal import Factors
from silo.learning import causal, classifier
from silo.learning.adapted import Adapted, Precision


def build(
    path: str | Path,
    terms: Contract,
    *,
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    bases: Mapping[str, Factors] | None = None,
) -> Adapted:
    """The model of the contract ``terms`` around the base model in the folder ``path``, its state all zeros.

    Raises:
        ConfigError: as ``silo.learning.classifier.build`` and ``silo.learning.causal.build``.
    """
    made = causal.build if terms.task.is_causal else classifier.build
    return made(path, terms, precision=precision, device=device, bases=bases)
