# SPDX-License-Identifier: Apache-2.0
"""A silo's vector before it is masked: clamped, then noised, and never touched again."""

from __future__ import annotations

import numpy as np
import pytest

from privacy import federation
from privacy.dp import noise, ring
from privacy.errors import MachineError
from privacy.prg import Randomness
from silo import upload
from tests.terms import contract_bytes

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def wide():
    """Terms of 50 silos whose noise share is wider than the clamp Q."""
    privacy = {"units": 100, "sampling_rate": 0.01, "noise_multiplier": 110.0, "lattice_bits": 20}
    return federation.parse(contract_bytes(silos=50, privacy=privacy)).terms


def share_of(terms):
    return noise.discrete_gaussian(terms.dimension, federation.ring_plan(terms).share_variance, Randomness.from_key(KEY))


def test_clamped_before_never_after(wide):
    """The noise passes through whole, modulo 2³², where it is far above Q; only the sum is held to ±Q."""
    plan, share = federation.ring_plan(wide), share_of(wide)
    assert (np.abs(share) > plan.clamp).sum() > 5
    for value in (0, plan.clamp, -plan.clamp, 10 * plan.clamp, -(2**60)):
        total = np.full(wide.dimension, value, dtype=np.int64)
        x = upload.noisy(total, wide, Randomness.from_key(KEY))
        held = max(-plan.clamp, min(plan.clamp, value))
        assert x.dtype == np.dtype("<u4")
        assert np.array_equal(x, ((share + held) % 2**32).astype("<u4"))
    assert (np.abs(ring.lift(x)) > plan.clamp).any()


@pytest.mark.parametrize("drawn", [2**31, 2**33 + 5, -(2**31) - 1, -(2**40) + 3])
def test_a_draw_beyond_the_ring_wraps_around(wide, monkeypatch, drawn):
    """No generator gives such a draw within a lifetime; what becomes of it is post-processing and must stay so."""
    monkeypatch.setattr(noise, "discrete_gaussian", lambda count, variance, randomness: np.full(count, drawn, dtype=np.int64))
    x = upload.noisy(np.full(wide.dimension, 7, dtype=np.int64), wide, Randomness.from_key(KEY))
    assert set(x.tolist()) == {(drawn + 7) % 2**32}


def test_every_coordinate_gets_a_full_share(wide):
    plan, randomness = federation.ring_plan(wide), Randomness.from_key(KEY)
    zero = np.zeros(wide.dimension, dtype=np.int64)
    values = np.concatenate([ring.lift(upload.noisy(zero, wide, randomness)) for _ in range(200)]).astype(np.float64)
    assert abs(values.var() / plan.share_variance - 1) < 5 * np.sqrt(2 / values.size)
    assert len(set(values.tolist())) > values.size - 10


@pytest.mark.parametrize("wrong", [np.zeros(3, dtype=np.int64), np.zeros((1, 26), dtype=np.int64), np.zeros(26)])
def test_another_shape_or_type_is_refused_before_noise_is_drawn(wide, wrong):
    assert wide.dimension == 26
    randomness = Randomness.from_key(KEY)
    with pytest.raises(MachineError):
        upload.noisy(wrong, wide, randomness)
    assert np.array_equal(randomness.uint64(4), Randomness.from_key(KEY).uint64(4))
