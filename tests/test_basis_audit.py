# SPDX-License-Identifier: Apache-2.0
"""A one-run audit of the basis: factors from raw gradients tell who was in, those of a noised release stay below their epsilon.

A canary is a unit whose gradient is one entry on a layer's diagonal, of the clipping norm; it is in with probability 1/2. The
factors that everybody sees are made by the library from the sum; a canary's score is how much of its direction B holds.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from privacy import sketch
from privacy.dp import accounting, empirical, noise
from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.dp.mechanism import LatticeGaussian
from privacy.prg import Randomness

LAYERS, SIDE, RANK, BITS = 64, 16, 8, 16
CANARIES = LAYERS * SIDE
DELTA, RARE = 1e-12, 1e-6  # of so many canaries each may fall to delta
LAYOUT = sketch.layout([f"layer-{k}" for k in range(LAYERS)], [(SIDE, SIDE)] * LAYERS, SIDE)


def release(sigma: float) -> LatticeGaussian:
    return LatticeGaussian(
        sampling_rate=1.0, lattice_bits=BITS, share_variance=round((sigma * 2**BITS) ** 2), shares=1,
        dimension=LAYOUT.dimension, steps=1,
    )  # fmt: skip


def lower_bound(sigma: float) -> float:
    """What the audit concludes about epsilon when the sum of the canaries that are in gets this much noise."""
    included = np.unpackbits(np.frombuffer(os.urandom(CANARIES // 8), dtype=np.uint8)).astype(bool)
    places = np.arange(CANARIES) // SIDE * SIDE**2 + np.arange(CANARIES) % SIDE * (SIDE + 1)
    rows = torch.zeros(int(included.sum()), LAYOUT.dimension)
    rows[torch.arange(len(rows)), torch.from_numpy(places[included])] = 8.0
    total = sum_lattice(to_lattice(rows, max_grad_norm=1.0, lattice_bits=BITS)).numpy()
    total[places] += 2**BITS // 1000  # units that are in anyway: no layer is without directions
    if sigma:
        total += noise.discrete_gaussian(LAYOUT.dimension, release(sigma).share_variance, Randomness.from_os())
    found = sketch.factors_of(total.astype(np.float64), LAYOUT, RANK)
    held = np.concatenate([(b.astype(np.float64) ** 2).sum(axis=1) for b, _ in found.values()])
    return empirical.one_run(empirical.outcomes(held, included), canaries=CANARIES, delta=DELTA, significance=RARE)


@pytest.mark.parametrize("sigma", [0.0, 0.1], ids=["raw", "a hundredth of the noise"])
def test_a_basis_of_raw_gradients_is_caught(sigma: float) -> None:
    assert lower_bound(sigma) > accounting.certify([release(10.0)], DELTA).epsilon


@pytest.mark.parametrize("sigma", [10.0, 2.0])
def test_a_noised_basis_stays_below_its_epsilon(sigma: float) -> None:
    assert lower_bound(sigma) <= accounting.certify([release(sigma)], DELTA).epsilon
