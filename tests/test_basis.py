# SPDX-License-Identifier: Apache-2.0
"""The basis from the weights: optimal, orthonormal, the same bytes by other routes, no global state touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import ConfigError, MachineError
from silo import basis
from silo.basis import GRID, digest, weights_basis


def matrix(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((m, n))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 1000), st.data())
def test_orthonormal_on_the_grid_and_optimal(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = matrix(m, n, seed)
    b, a = weights_basis(weight, rank)
    assert (b.dtype, a.dtype, b.shape, a.shape) == (np.float32, np.float32, (m, rank), (rank, n))
    wide_b, wide_a = b.astype(np.float64), a.astype(np.float64)
    assert np.abs(wide_b.T @ wide_b - np.eye(rank)).max() <= 1e-5
    assert np.abs(wide_a @ wide_a.T - np.eye(rank)).max() <= 1e-5
    assert (np.round(wide_b / GRID) * GRID == wide_b).all()
    tail = np.sqrt((np.linalg.svd(weight, compute_uv=False)[rank:] ** 2).sum())
    residual = np.linalg.norm(weight - wide_b @ (wide_b.T @ weight @ wide_a.T) @ wide_a)
    # Rounding moves B and A by at most half a grid step per entry, and each stands twice in the projection.
    rounding = GRID / 2 * (np.sqrt(b.size) + np.sqrt(a.size)) * 2 * np.linalg.norm(weight, 2)
    assert residual <= tail * (1 + 1e-5) + rounding * (1 + 1e-3)


def test_largest_entry_of_each_left_vector_is_positive() -> None:
    for seed in range(5):
        b, _ = weights_basis(matrix(30, 20, seed), 10)
        assert (b[np.abs(b).argmax(axis=0), np.arange(10)] > 0).all()


def test_sign_is_tied_to_the_lowest_index() -> None:
    b, a = weights_basis(np.outer([-3.0, 3.0], [1.0, 1.0, 1.0]), 1)
    assert b[0, 0] > 0 > b[1, 0]
    assert (a < 0).all()


def test_same_bytes_from_another_lapack_route() -> None:
    """The transposed problem runs through other code paths; on the grid the difference in the last bits disappears."""
    weight = matrix(96, 64)
    b, a = weights_basis(weight, 16)
    right, left = weights_basis(weight.T.copy(), 16)
    other_b, other_a = left.T, right.T
    signs = np.sign((b * other_b).sum(axis=0))
    assert (b == other_b * signs).all()
    assert (a == other_a * signs[:, None]).all()


def test_no_global_generator_is_touched() -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    weights_basis(matrix(20, 20), 4)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_that_does_not_fit_is_refused_with_shapes(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"rank -?\d+ .*\(4, 9\)"):
        weights_basis(matrix(4, 9), rank)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weight_is_refused(bad: float) -> None:
    weight = matrix(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ConfigError, match="not finite"):
        weights_basis(weight, 2)


def test_lapack_that_is_not_accurate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.linalg.svd
    monkeypatch.setattr(basis.np.linalg, "svd", lambda w, full_matrices: [x * 1.0001 for x in exact(w, full_matrices=False)])
    with pytest.raises(MachineError, match="orthonormal"):
        weights_basis(matrix(8, 8), 2)


def test_digest_depends_on_names_order_shapes_and_bytes() -> None:
    first, second = weights_basis(matrix(8, 6), 2), weights_basis(matrix(8, 6, 1), 2)
    nudged = (first[0].copy(), first[1])
    nudged[0][0, 0] += np.float32(GRID)
    base = digest({"x": first, "y": second})
    others = [{"y": second, "x": first}, {"x": second, "y": first}, {"xy": first, "y": second}, {"x": nudged, "y": second}]
    others.append({"x": first})
    others.append({"x": (first[0].reshape(4, 4), first[1]), "y": second})
    digests = {base, *(digest(other) for other in others)}
    assert len(base) == 32
    assert len(digests) == 7


def test_digest_ignores_memory_layout_and_byte_order() -> None:
    b, a = weights_basis(matrix(8, 6), 2)
    assert digest({"x": (np.asfortranarray(b), a.astype(">f4"))}) == digest({"x": (b, a)})
