# SPDX-License-Identifier: Apache-2.0
"""Both bases: orthonormal, the same bytes by other routes, no global state; from the weights optimal, at random isotropic."""

from __future__ import annotations

import hashlib
import math
import struct

import msgspec
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import federation
from privacy.errors import ConfigError, MachineError
from silo.learning import basis
from silo.learning.basis import GRID, digest, factors, random_basis, weights_basis
from tests import tiny_models
from tests.terms import contract_bytes


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


# --- Large weights --------------------------------------------------------------------------------------------------------------


def decaying(m: int, n: int, seed: int = 0) -> np.ndarray:
    """A weight like those of transformers: a power law of directions over a bulk."""
    rank = min(m, n) // 2
    left, right = (np.linalg.qr(matrix(side, rank, seed + place))[0] for place, side in enumerate((m, n)))
    return (left * (10 / np.arange(1, rank + 1) ** 0.7)) @ right.T + matrix(m, n, seed + 2) / np.sqrt(n)


@pytest.mark.parametrize(("m", "n", "rank"), [(120, 200, 20), (200, 120, 8), (300, 300, 64)])
def test_a_large_weight_has_nearly_the_energy_of_the_best_basis(
    m: int, n: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = decaying(m, n)
    exact = [x.astype(np.float64) for x in weights_basis(weight, rank)]
    monkeypatch.setattr(basis, "EXACT_UP_TO", 100)
    b, a = weights_basis(weight, rank)
    again = weights_basis(weight, rank)
    assert (b == again[0]).all()
    assert (a == again[1]).all()
    assert not (b == exact[0]).all()
    wide_b, wide_a = b.astype(np.float64), a.astype(np.float64)
    for vectors in (wide_b.T, wide_a):
        assert np.abs(vectors @ vectors.T - np.eye(rank)).max() <= 1e-5
        assert (np.round(vectors / GRID) * GRID == vectors).all()
    assert (wide_b[np.abs(wide_b).argmax(axis=0), np.arange(rank)] > 0).all()
    best = np.linalg.norm(exact[0].T @ weight @ exact[1].T)
    assert np.linalg.norm(wide_b.T @ weight @ wide_a.T) ** 2 >= 0.99 * best**2
    strongest = np.abs((exact[0][:, :3] * wide_b[:, :3]).sum(axis=0))
    assert (strongest >= 1 - 1e-6).all()


def test_only_weights_above_1500_on_both_sides_are_randomised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact way, and so its bytes, are kept for all others; and no large weight meets the exact one."""
    asked: list[tuple[int, ...]] = []
    exact = np.linalg.svd

    def spied(w: np.ndarray, full_matrices: bool = True) -> list[np.ndarray]:
        asked.append(w.shape)
        m, n = w.shape
        if m < 1500:
            return exact(w, full_matrices=False)
        return [np.eye(m)[:, : min(m, n)], np.ones(min(m, n)), np.eye(n)[: min(m, n)]]

    monkeypatch.setattr(basis.np.linalg, "svd", spied)
    weights_basis(np.zeros((1600, 1500)), 2)
    weights_basis(matrix(1501, 1502), 2)
    assert asked == [(1600, 1500), (18, 1502)]


def test_the_randomised_basis_touches_no_global_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "EXACT_UP_TO", 30)
    before = np.random.get_state()[1].copy()
    weights_basis(matrix(60, 50), 4)
    assert (np.random.get_state()[1] == before).all()


# --- A public seed ---------------------------------------------------------------------------------------------------------------

MODEL, NAME = bytes(range(32)), "h.0.attn.c_attn"


def by_hand(model: bytes, name: str, shape: tuple[int, int], rank: int) -> tuple[list[list[float]], list[list[float]]]:
    """(B transposed, A) as the docstring says it, in Python's own integers and floats, with AES in plain counter mode."""
    return tuple(vectors(model, name, shape, letter, rank, length) for letter, length in zip("BA", shape, strict=True))


def vectors(model: bytes, name: str, shape: tuple[int, int], letter: str, rank: int, length: int) -> list[list[float]]:
    seed = b"siloquy/basis/random/1\0" + letter.encode() + model + struct.pack("<QQ", *shape) + name.encode()
    cipher = Cipher(algorithms.AES(hashlib.sha256(seed).digest()), modes.CTR(bytes(15) + b"\x02")).encryptor()
    words = struct.unpack(f"<{12 * rank * length}I", cipher.update(bytes(48 * rank * length)))
    rows = []
    for block in (words[12 * length * k : 12 * length * (k + 1)] for k in range(rank)):
        rows.append([(sum(block[i::length]) - 6 * (2**32 - 1)) / 2**32 for i in range(length)])
    for k, row in enumerate(rows):
        norm = math.sqrt(dot(row, row))
        row[:] = [x / norm for x in row]
        for other in rows[k + 1 :]:
            along = dot(other, row)
            other[:] = [x - along * y for x, y in zip(other, row, strict=True)]
    return [[round(x / GRID) * GRID for x in row] for row in rows]


def dot(left: list[float], right: list[float]) -> float:
    """By halves: the first half takes the second onto itself until one is left."""
    terms = [x * y for x, y in zip(left, right, strict=True)]
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms = [x + y for x, y in zip(terms[:half], [*terms[half:], 0.0], strict=False)]
    return terms[0]


@pytest.mark.parametrize(("shape", "rank"), [((7, 13), 5), ((16, 9), 9), ((1, 4), 1), ((33, 2), 2)])
def test_the_random_basis_is_the_documented_arithmetic_to_the_last_bit(shape: tuple[int, int], rank: int) -> None:
    b, a = random_basis(MODEL, NAME, shape, rank)
    wanted_b, wanted_a = by_hand(MODEL, NAME, shape, rank)
    assert b.T.tolist() == wanted_b
    assert a.tolist() == wanted_a


def test_the_random_basis_is_the_one_that_every_silo_computes() -> None:
    """The same figure with numpy's AVX kernels switched off; another machine that gets another one cannot take part."""
    found = digest({NAME: random_basis(MODEL, NAME, (2304, 768), 8)})
    assert found.hex() == "b519ce5b5d47cd747d1192b2061022dd0c5a294e1c4e89cea1731246f4b5ed18"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_the_random_basis_is_orthonormal_on_the_grid_at_every_rank(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    b, a = random_basis(MODEL, NAME, (m, n), rank)
    assert (b.dtype, a.dtype, b.shape, a.shape) == (np.float32, np.float32, (m, rank), (rank, n))
    wide_b, wide_a = b.astype(np.float64), a.astype(np.float64)
    assert np.abs(wide_b.T @ wide_b - np.eye(rank)).max() <= 1e-5
    assert np.abs(wide_a @ wide_a.T - np.eye(rank)).max() <= 1e-5
    assert (np.round(wide_b / GRID) * GRID == wide_b).all()
    smaller_b, smaller_a = random_basis(MODEL, NAME, (m, n), 1)
    assert (b[:, :1] == smaller_b).all()
    assert (a[:1] == smaller_a).all()


def test_every_layer_model_shape_and_side_has_a_random_basis_of_its_own() -> None:
    drawn = [random_basis(MODEL, NAME, (24, 24), 3), random_basis(MODEL, "h.1.attn.c_attn", (24, 24), 3)]
    drawn += [random_basis(bytes(32), NAME, (24, 24), 3), random_basis(MODEL, NAME, (24, 25), 3)]
    sides = [b.T.tobytes() for b, _ in drawn] + [a.tobytes() for _, a in drawn]
    assert len(set(sides)) == len(sides)


def test_the_random_basis_prefers_no_direction() -> None:
    """The energy of a fixed vector in an r-dimensional random subspace of length n is r/n on average."""
    many = [random_basis(MODEL, f"layer.{i}", (40, 30), 4) for i in range(200)]
    flat = np.full(40, 40**-0.5)
    for direction in (np.eye(40)[0], flat):
        assert 0.09 < np.mean([np.sum((direction @ b) ** 2) for b, _ in many]) < 0.11
    assert abs(np.mean([b.sum() for b, _ in many])) < 1.0


def test_the_random_basis_looks_at_no_weight_and_needs_no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(basis.np.linalg, "svd")
    monkeypatch.delattr(basis.np.linalg, "qr")
    terms = tiny_models.terms([NAME], rank=3, basis="random")
    ones, other = (factors(terms, NAME, np.full((48, 16), value, dtype=np.float32)) for value in (1.0, np.nan))
    assert (ones[0] == other[0]).all()
    assert (ones[1] == other[1]).all()
    assert (ones[0] == random_basis(bytes.fromhex(terms.model.digest), NAME, (48, 16), 3)[0]).all()


@pytest.mark.parametrize("kind", ["private", "raw"])
def test_a_basis_out_of_a_gradient_is_not_computed_from_a_weight(kind: str) -> None:
    terms = tiny_models.terms(["x"])
    terms = msgspec.structs.replace(terms, adapter=msgspec.structs.replace(terms.adapter, basis=kind))
    with pytest.raises(ConfigError, match="out of a gradient"):
        factors(terms, "x", matrix(12, 10))


def test_the_contract_chooses_the_basis() -> None:
    weight = matrix(12, 10).astype(np.float32)
    chosen = {kind: digest({"x": factors(tiny_models.terms(["x"], basis=kind), "x", weight)}) for kind in ("weights", "random")}
    assert chosen["weights"] == digest({"x": weights_basis(weight.astype(np.float64), 3)}) != chosen["random"]


@pytest.mark.parametrize("kind", ["gradients", "data", "dp-gradients", ""])
def test_a_basis_from_anybodys_records_is_no_choice(kind: str) -> None:
    """Such a start would be a release of its own. Both choices there are come from public bytes alone."""
    with pytest.raises(ConfigError, match="basis"):
        federation.parse(contract_bytes(adapter={"basis": kind}))


@pytest.mark.parametrize(("shape", "rank"), [((4, 9), 0), ((4, 9), 5), ((4,), 1), ((4, 4, 4), 1)])
def test_a_rank_that_no_random_basis_has_is_refused(shape: tuple[int, ...], rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {rank} .*\(4,"):
        random_basis(MODEL, NAME, shape, rank)


def test_no_global_generator_is_touched_by_the_random_basis() -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    random_basis(MODEL, NAME, (20, 20), 4)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


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
