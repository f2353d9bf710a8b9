# SPDX-License-Identifier: Apache-2.0
"""Sketches of gradients: what a unit adds, and what a sum of them becomes, each by another route as well."""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import basis_file, jacobi, orthonormal, sketch
from privacy.dp import ring
from privacy.errors import ConfigError, MachineError, PrivacyRefusal, RecordsError, TrustError
from privacy.jacobi import left_vectors
from privacy.orthonormal import GRID, digest
from privacy.sketch import Layout, factors_of, head_of, layout
from silo.learning import classifier, public_basis
from silo.learning import sketch as sketching
from silo.learning.gradients import Tape, pack, unit_gradients
from silo.learning.sketch import Sketch, SketchModel, assemble
from tests import tiny_models
from tests.sessions import rows, tiny_model, write_rows

MODEL = bytes(32)
BITS = 14
KINDS = ["bert", "llama", "gpt2"]


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


# --- The layout ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), st.integers(1, 50))
def test_a_part_has_the_fewer_numbers_and_all_parts_the_whole_vector(shapes: list[tuple[int, int]], width: int) -> None:
    made = layout([f"m{i}" for i in range(len(shapes))], shapes, width)
    assert made.dimension == sum(min(m * n, width * (m + n)) for m, n in shapes)
    seen = []
    for place, (name, parts) in enumerate(made.parts(np.arange(made.dimension, dtype=np.float64))):
        m, n = shapes[place]
        assert name == f"m{place}"
        assert [part.shape for part in parts] == ([(m, n)] if made.is_full(place) else [(m, width), (width, n)])
        assert made.is_full(place) or width < min(m, n)
        seen += [number for part in parts for number in part.ravel().tolist()]
    assert seen == list(range(made.dimension))


@pytest.mark.parametrize(
    ("modules", "shapes", "width"),
    [
        ([], [], 2),
        (["a"], [], 2),
        (["a", "a"], [(3, 4), (3, 4)], 2),
        (["a"], [(3, 0)], 2),
        (["a"], [(3, 4)], 0),
        (["a"], [(3,)], 2),
        (["a"], [(3, 4, 5)], 2),
    ],
)
def test_a_layout_that_is_none_is_refused(modules: list[str], shapes: list[tuple[int, ...]], width: int) -> None:
    with pytest.raises(ConfigError):
        layout(modules, shapes, width)


def test_a_rank_that_a_sketch_cannot_give_is_refused() -> None:
    made = layout(["wide", "small"], [(40, 30), (6, 5)], 8)
    assert [made.is_full(place) for place in (0, 1)] == [False, True]
    made.check_rank(5)
    for rank, name in ((6, "small"), (9, "wide"), (0, "wide")):
        with pytest.raises(ConfigError, match=name):
            made.check_rank(rank)


def test_the_test_matrices_are_orthonormal_public_and_their_own() -> None:
    made = layout(["a", "b", "full"], [(30, 20), (30, 20), (4, 4)], 5)
    found, again = sketch.directions_of(MODEL, made), sketch.directions_of(MODEL, made)
    assert list(found) == ["a", "b"]
    for omega, psi in found.values():
        assert (omega.shape, psi.shape) == ((20, 5), (30, 5))
        for side in (omega, psi):
            assert np.abs(side.astype(np.float64).T @ side - np.eye(5)).max() <= 1e-5
    assert all((x == y).all() for name in found for x, y in zip(found[name], again[name], strict=True))
    b, a = orthonormal.random_basis(MODEL, "a", (30, 20), 5)
    others = [side.tobytes() for pair in [*found.values(), *sketch.directions_of(bytes([1]) * 32, made).values()] for side in pair]
    assert len({*others, b.tobytes(), a.T.copy().tobytes()}) == 10


def test_the_test_matrices_and_the_head_are_those_that_every_silo_computes() -> None:
    """The same figure everywhere, as that of the random basis: a silo with others would add numbers of another meaning."""
    omega, psi = sketch.directions_of(MODEL, layout(["h.0"], [(48, 40)], 6))["h.0"]
    state = hashlib.sha256(omega.astype("<f4").tobytes() + psi.astype("<f4").tobytes())
    state.update(head_of(MODEL, 3, 16).astype("<f4").tobytes() + head_of(MODEL, 20, 16).astype("<f4").tobytes())
    assert state.hexdigest() == "137d9c833eecdf4fdc7e04adb323a331d2cfa151bd55bd13569384a908d3a03e"


def test_the_public_head_is_orthonormal_whichever_side_is_longer() -> None:
    wide, tall = head_of(MODEL, 3, 16).astype(np.float64), head_of(MODEL, 20, 16).astype(np.float64)
    assert (wide.shape, tall.shape) == ((3, 16), (20, 16))
    assert np.abs(wide @ wide.T - np.eye(3)).max() <= 1e-5
    assert np.abs(tall.T @ tall - np.eye(16)).max() <= 1e-5


# --- What a unit adds ------------------------------------------------------------------------------------------------------------


def made_for(kind: str, width: int = 8) -> tuple[SketchModel, Layout]:
    """At width 8 some tiny layers (16 × 16) are sent whole and others (16 × 24, 48 × 16) are sketched."""
    encoder, modules = tiny_models.encoder(kind), tiny_models.MODULES[kind]
    shapes = [tuple(sketching.matrix(sketching.find_linear(encoder, name)).shape) for name in modules]
    made = layout(modules, shapes, width)
    return assemble(encoder, tiny_models.terms(modules), made), made


def plan(silos: int = 1) -> ring.Plan:
    return ring.Plan(lattice_bits=BITS, share_variance=0, clamp=2**30, headroom=0, silos=silos)


def summed(model: SketchModel, units: list, norm: float = 0.5, rows_tokens: int = 160) -> Sketch:
    terms = tiny_models.terms(list(model.layout.modules))
    return Sketch(terms, model, units, plan=plan(), max_grad_norm=norm, rows_tokens=rows_tokens)


def by_autograd(model: SketchModel, made: Layout, unit) -> np.ndarray:
    """The sketch of a unit from the gradients of the base's own weights, one unpadded record at a time, and a product after."""
    directions, total = sketch.directions_of(MODEL, made), np.zeros(made.dimension)
    for row in unit.rows:
        single = next(pack([type(unit)(id="x", rows=(row,))], lambda _: 1, max_length=len(row[0])))
        weights = [layer.base.weight.requires_grad_(True) for layer in model.layers]
        gradients = torch.autograd.grad(model.row_losses(single).sum(), weights)
        parts = []
        for name, layer, gradient in zip(made.modules, model.layers, gradients, strict=True):
            layer.base.weight.requires_grad_(False)
            g = (gradient.T if type(layer.base).__name__ == "Conv1D" else gradient).double().numpy()
            if name in directions:
                omega, psi = (side.astype(np.float64) for side in directions[name])
                parts += [(g @ omega).ravel(), (psi.T @ g).ravel()]
            else:
                parts.append(g.ravel())
        total += np.concatenate(parts)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_units_sketch_is_g_omega_and_psi_g_of_its_own_gradient(kind: str) -> None:
    model, made = made_for(kind)
    assert len({made.is_full(place) for place in range(len(made.modules))}) == 2
    units = [tiny_models.unit(1, [5]), tiny_models.unit(2, [9, 3]), tiny_models.unit(3, [30])]
    found = torch.cat([unit_gradients(model, batch, Tape(model.dimension)) for batch in pack(units, lambda _: 4, max_length=40)])
    wanted = np.array([by_autograd(model, made, unit) for unit in units])
    order = [np.abs(found.numpy() - row).max(axis=1).argmin() for row in wanted]
    assert sorted(order) == [0, 1, 2]
    for row, place in zip(wanted, order, strict=True):
        assert np.abs(found[place].numpy() - row).max() <= 2e-5 * np.abs(row).max()


def test_the_pairs_are_zero_and_change_nothing() -> None:
    model, _ = made_for("bert")
    plain = tiny_models.encoder("bert").eval()
    batch = next(pack([tiny_models.unit(1, [7])], lambda _: 2, max_length=40))
    with torch.no_grad():
        hidden = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        found = model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert not model.read().any()
    assert float((hidden - found).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_one_unit_moves_the_sum_by_at_most_the_bound(kind: str) -> None:
    """One clip over all layers together: the squares of all parts of a unit sum to at most 4^p, and it is reached."""
    model, _ = made_for(kind)
    units = [tiny_models.unit(seed, [4 + seed]) for seed in range(4)]
    played = summed(model, units, norm=1e-3)
    alone = [played.sum([unit]) for unit in units]
    for place, vector in enumerate(alone):
        squares = sum(int(z) ** 2 for z in vector)
        assert 0.97 * 4**BITS < squares <= 4**BITS
        rest = units[:place] + units[place + 1 :]
        assert np.array_equal(played() - played.sum(rest), vector)


def test_unsampled_every_unit_enters_once_in_any_order_and_company() -> None:
    units = [tiny_models.unit(seed, [3 + 5 * (seed % 4)] * (1 + seed % 2)) for seed in range(9)]
    model, made = made_for("bert")
    played = summed(model, units)
    whole = played()
    assert whole.shape == (made.dimension,)
    assert np.array_equal(whole, played())
    assert np.array_equal(whole, sum(played.sum([unit]) for unit in units))
    assert np.array_equal(whole, summed(model, units[::-1], rows_tokens=160)())
    assert not played.sum([]).any()
    assert played.unit_ids == tuple(unit.id for unit in units)


def test_the_sum_is_clamped_to_the_plan() -> None:
    model, made = made_for("bert")
    units = [tiny_models.unit(seed, [6]) for seed in range(3)]
    tight = ring.Plan(lattice_bits=BITS, share_variance=0, clamp=5, headroom=0, silos=1)
    terms = tiny_models.terms(list(made.modules))
    played = Sketch(terms, model, units, plan=tight, max_grad_norm=0.5, rows_tokens=160)
    assert np.array_equal(played(), np.clip(played.sum(units), -5, 5))
    assert np.abs(played()).max() == 5


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    summed(made_for("bert")[0], [tiny_models.unit(1, [4])])()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_a_zero_head_would_pass_nothing_on_and_is_refused() -> None:
    model, _ = made_for("bert")
    sketching.check_reached(model, tiny_models.MAX_LENGTH)
    with torch.no_grad():
        model.head.weight.zero_()
    batch = next(pack([tiny_models.unit(1, [7])], lambda _: 2, max_length=40))
    assert not unit_gradients(model, batch, Tape(model.dimension)).any()
    with pytest.raises(MachineError, match="no gradient reaches 6 of 6"):
        sketching.check_reached(model, tiny_models.MAX_LENGTH)


def test_a_model_that_mixes_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made_for("bert")
    logits = SketchModel.forward
    monkeypatch.setattr(SketchModel, "forward", lambda self, batch: logits(self, batch) + logits(self, batch).mean(dim=0))
    with pytest.raises(PrivacyRefusal, match="batch-mates"):
        summed(model, [])


def test_few_rows_where_sketches_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer keeps to its size, and the integers stay what they are where rows are few."""
    units = [tiny_models.unit(seed, [6]) for seed in range(5)]
    model, made = made_for("bert")
    many = summed(model, units)
    assert many._rows_for(8) == 20
    monkeypatch.setattr(sketching, "TAPE_BYTES", 3 * 4 * made.dimension)
    few = summed(model, units)
    assert few._rows_for(8) == 3
    assert np.abs(few() - many()).max() <= 5 * 4  # other shapes may round a unit's last bits otherwise


def bert_shapes(modules: Sequence[str]) -> list[tuple[int, int]]:
    return [(16, 24) if name.endswith("output.dense") else (16, 16) for name in modules]


@pytest.mark.parametrize("wrong", ["shape", "modules", "missing"])
def test_a_layout_of_another_model_is_refused(wrong: str) -> None:
    modules = tiny_models.MODULES["bert"]
    shapes = bert_shapes(modules)
    shapes[0] = (16, 17) if wrong == "shape" else shapes[0]
    named = [*modules[:-1], "nowhere"] if wrong == "missing" else modules
    made = layout(modules[::-1] if wrong == "modules" else named, shapes, 8)
    with pytest.raises(ConfigError):
        assemble(tiny_models.encoder("bert"), tiny_models.terms(named), made)


def test_an_adapter_takes_the_factors_that_it_is_given() -> None:
    """And without any, a contract whose basis comes out of a gradient has no adapter."""
    _, made = made_for("bert")
    found = factors_of(draws(8, made.dimension), made, 3)
    terms = tiny_models.terms(tiny_models.MODULES["bert"])
    private = msgspec.structs.replace(terms, adapter=msgspec.structs.replace(terms.adapter, basis="private"))
    model = classifier.assemble(tiny_models.encoder("bert"), private, bases=dict(reversed(found.items())))
    assert model.basis_digest == digest(found)
    for name, layer in zip(model.adapter.names, model.adapter, strict=True):
        assert (layer.B.numpy() == found[name][0]).all()
        assert (layer.A.numpy() == found[name][1]).all()
    with pytest.raises(ConfigError, match="has not been made yet"):
        classifier.assemble(tiny_models.encoder("bert"), private)


# --- From a sum to factors: Jacobi -----------------------------------------------------------------------------------------------


def captured(vectors: np.ndarray, matrix: np.ndarray) -> float:
    return float(np.linalg.norm(vectors @ matrix) ** 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6), st.integers(0, 6), st.data())
def test_jacobi_finds_what_lapack_finds(m: int, n: int, seed: int, decades: int, data: st.DataObject) -> None:
    """At any shape and conditioning: orthonormal, in order, and with the energy of the best subspace of that rank."""
    matrix = draws(seed, m, n) * 10.0 ** (-decades * np.arange(n) / n)
    rank = data.draw(st.integers(1, min(m, n)))
    values = np.linalg.svd(matrix, compute_uv=False)
    vectors = left_vectors(matrix, rank)
    assert np.abs(vectors @ vectors.T - np.eye(rank)).max() <= 1e-10
    found = np.linalg.norm(vectors @ matrix, axis=1)
    assert np.abs(found - values[:rank]).max() <= 1e-10 * values[0]
    assert captured(vectors, matrix) >= (values[:rank] ** 2).sum() * (1 - 1e-10)


@pytest.mark.parametrize(("m", "n"), [(40, 40), (90, 25), (25, 90)])
def test_jacobi_finds_the_directions_of_a_separated_spectrum(m: int, n: int) -> None:
    left, right = np.linalg.qr(draws(1, m, 25))[0], np.linalg.qr(draws(2, n, 25))[0]
    matrix = left * 0.7 ** np.arange(25) @ right.T
    vectors = left_vectors(matrix, 10)
    assert np.abs(np.abs((vectors * left[:, :10].T).sum(axis=1)) - 1).max() <= 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6), st.integers(0, 6), st.data())
def test_singular_vectors_come_in_pairs(m: int, n: int, seed: int, decades: int, data: st.DataObject) -> None:
    matrix = draws(seed, m, n) * 10.0 ** (-decades * np.arange(n) / n)
    rank = data.draw(st.integers(1, min(m, n)))
    left, right = jacobi.singular_vectors(matrix, rank)
    values = np.linalg.svd(matrix, compute_uv=False)[:rank]
    assert left.tobytes() == left_vectors(matrix, rank).tobytes()
    assert np.abs(right @ right.T - np.eye(rank)).max() <= 1e-7
    assert np.abs(left @ matrix @ right.T - np.diag(values)).max() <= 1e-7 * values[0]


def test_jacobi_of_a_matrix_without_full_rank() -> None:
    low = draws(3, 30, 4) @ draws(4, 4, 20)
    assert captured(left_vectors(low, 4), low) == pytest.approx(np.linalg.norm(low) ** 2, rel=1e-12)
    with pytest.raises(ConfigError, match="4 directions, a basis of rank 5") as refused:
        left_vectors(low, 5)
    assert refused.value.code == "basis-too-flat"
    with pytest.raises(ConfigError, match="0 directions"):
        left_vectors(np.zeros((5, 4)), 1)
    same = np.repeat(draws(5, 9, 1), 6, axis=1)
    assert captured(left_vectors(same, 1), same) == pytest.approx(np.linalg.norm(same) ** 2, rel=1e-12)


def test_jacobi_of_equal_singular_values_and_of_a_diagonal() -> None:
    for matrix in (np.eye(7), -np.eye(7), np.diag([3.0, 3.0, 2.0, 2.0, 1.0, 1.0]), np.ones((4, 4)) - 2 * np.eye(4)):
        vectors = left_vectors(matrix, 2)
        assert np.abs(vectors @ vectors.T - np.eye(2)).max() <= 1e-12
        assert captured(vectors, matrix) == pytest.approx((np.linalg.svd(matrix, compute_uv=False)[:2] ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("exponent", [-1060, -1022, -540, -1, 0, 7, 540, 1020])
def test_a_power_of_two_changes_no_bit_and_overflows_nowhere(exponent: int) -> None:
    """As far down as the entries stay exact; below they lose bits of their own."""
    matrix = np.round(draws(6, 12, 9) * 2**9) / 2**9
    whole = np.ldexp(matrix, exponent)
    assert np.isfinite(whole).all()
    if exponent > -1000:
        assert left_vectors(whole, 4).tobytes() == left_vectors(matrix, 4).tobytes()
    else:
        assert captured(left_vectors(whole, 4), matrix) >= 0.999 * captured(left_vectors(matrix, 4), matrix)


def test_the_bytes_do_not_depend_on_the_layout_in_memory() -> None:
    matrix = draws(7, 33, 21)
    wanted = left_vectors(matrix, 6).tobytes()
    wide = np.zeros((66, 63))
    wide[::2, ::3] = matrix
    for other in (np.asfortranarray(matrix), wide[::2, ::3], matrix[::-1].copy()[::-1], matrix.T.copy().T):
        assert left_vectors(other, 6).tobytes() == wanted
    assert (matrix == draws(7, 33, 21)).all(), "the input was changed"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = draws(8, 5, 5)
    matrix[2, 3] = bad
    with pytest.raises(ConfigError, match="not finite"):
        left_vectors(matrix, 2)


@pytest.mark.parametrize(("matrix", "rank"), [(np.eye(3, dtype=np.float32), 1), (np.ones(3), 1), (np.eye(3), 0), (np.eye(3), 4)])
def test_what_is_no_matrix_or_rank_is_refused(matrix: np.ndarray, rank: int) -> None:
    with pytest.raises(ConfigError):
        left_vectors(matrix, rank)


def test_a_method_that_does_not_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobi, "MOST_SWEEPS", 1)
    with pytest.raises(MachineError, match="1 sweeps"):
        left_vectors(draws(9, 12, 12), 3)


def test_jacobi_uses_no_product_or_sum_whose_order_a_library_chooses() -> None:
    """Elementwise steps and ``dot`` only: no @, no linalg, no reduction but max, any and a count."""
    tree = ast.parse(Path(jacobi.__file__).read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.MatMult)]
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"dot", "matmul", "einsum", "tensordot", "inner", "vdot", "linalg", "mean", "cumsum", "hypot", "power"}
    sums = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sum")]
    assert sums == ["(norms >= LEAST * norms[order[0]]).sum()"]


# --- The same again in plain Python ----------------------------------------------------------------------------------------------


def fold(left: list[float], right: list[float]) -> float:
    """Products by halves: the first half takes the second onto itself until one is left."""
    terms = [x * y for x, y in zip(left, right, strict=True)]
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms = [x + y for x, y in zip(terms[:half], [*terms[half:], 0.0], strict=False)]
    return terms[0]


def triangle(columns: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """(R by columns, reflections) as the docstring of left_vectors says."""
    columns, reflections = [list(column) for column in columns], []
    for k, column in enumerate(columns):
        x = column[k:]
        norm = math.sqrt(fold(x, x))
        v = [x[0] + (norm if x[0] >= 0 else -norm), *x[1:]]
        square = fold(v, v)
        if square > 0:
            for other in columns[k + 1 :]:
                f = 2.0 * fold(other[k:], v) / square
                other[k:] = [y - f * z for y, z in zip(other[k:], v, strict=True)]
            column[k:] = [-norm if x[0] >= 0 else norm, *[0.0] * (len(x) - 1)]
        reflections.append(v)
    return [column[: len(columns)] for column in columns], reflections


def turned(columns: list[list[float]]) -> list[list[float]]:
    columns = sorted(columns, key=lambda c: -fold(c, c))
    floor = 2.0**-90 * max(fold(c, c) for c in columns)
    columns += [[0.0] * len(columns[0]) for _ in range(max(4, len(columns) + len(columns) % 2) - len(columns))]
    count = len(columns)
    while True:
        worst, squares = 0.0, [fold(c, c) for c in columns]
        for _ in range(count - 1):
            for i, j in ((i, count - 1 - i) for i in range(count // 2)):
                p, q, pp, qq = columns[i], columns[j], squares[i], squares[j]
                w = fold(p, q)
                if w == 0.0 or pp <= floor or qq <= floor:
                    continue
                worst = max(worst, abs(w) / (math.sqrt(pp) * math.sqrt(qq)))
                zeta = (qq - pp) / (2.0 * w)
                t = (1.0 if zeta >= 0 else -1.0) / (abs(zeta) + math.sqrt(1.0 + zeta * zeta))
                h = math.sqrt(1.0 + t * t)
                squares[i], squares[j] = pp - t * w, qq + t * w
                columns[i] = [(x - t * y) / h for x, y in zip(p, q, strict=True)]
                columns[j] = [y * h + t * x for x, y in zip(columns[i], q, strict=True)]
            columns[1:] = [columns[-1], *columns[1:-1]]
            squares[1:] = [squares[-1], *squares[1:-1]]
        if worst <= 2.0**-26:
            return columns


def by_hand(matrix: list[list[float]], rank: int) -> list[list[float]]:
    m, n = len(matrix), len(matrix[0])
    exponent = math.frexp(max(abs(x) for row in matrix for x in row))[1]
    matrix = [[math.ldexp(x, -exponent) for x in row] for row in matrix]
    reflections: list[list[float]] = []
    if m > n:
        r, reflections = triangle([list(column) for column in zip(*matrix, strict=True)])
        matrix = [list(row) for row in zip(*r, strict=True)]
    r, _ = triangle(matrix)  # its transpose has the rows as columns
    found = turned([list(row) for row in zip(*r, strict=True)])
    found.sort(key=lambda c: -math.sqrt(fold(c, c)))
    vectors = [[x / math.sqrt(fold(c, c)) for x in c] + [0.0] * (m - len(c)) for c in found[:rank]]
    for k, v in reversed(list(enumerate(reflections))):
        for vector in vectors:
            f = 2.0 * fold(vector[k:], v) / fold(v, v)
            vector[k:] = [x - f * y for x, y in zip(vector[k:], v, strict=True)]
    return vectors


SHAPES = [(5, 5, 3), (9, 4, 2), (4, 9, 4), (7, 6, 6), (3, 2, 2), (1, 1, 1), (2, 3, 1), (6, 1, 1)]


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_jacobi_is_the_documented_arithmetic_to_the_last_bit(m: int, n: int, rank: int) -> None:
    for seed in range(4):
        matrix = draws(seed, m, n) * 0.1**seed
        left, right = jacobi.singular_vectors(matrix, rank)
        assert left.tolist() == left_vectors(matrix, rank).tolist() == by_hand(matrix.tolist(), rank)
        exponent = math.frexp(np.abs(matrix).max())[1]
        columns = [[math.ldexp(x, -exponent) for x in column] for column in matrix.T.tolist()]
        rows_of = [[fold(column, vector) for column in columns] for vector in left.tolist()]
        assert right.tolist() == [[x / math.sqrt(fold(row, row)) for x in row] for row in rows_of]


# --- From a sum to factors: all of it --------------------------------------------------------------------------------------------


def spiked(shape: tuple[int, int], rank: int, noise: float, seed: int = 0) -> np.ndarray:
    left, right = np.linalg.qr(draws(seed, shape[0], rank))[0], np.linalg.qr(draws(seed + 1, shape[1], rank))[0]
    return left * np.linspace(3, 2, rank) @ right.T + noise * draws(seed + 2, *shape)


def sketch_of(gradients: dict[str, np.ndarray], made: Layout) -> np.ndarray:
    directions, parts = sketch.directions_of(MODEL, made), []
    for name, g in gradients.items():
        if name in directions:
            omega, psi = (side.astype(np.float64) for side in directions[name])
            parts += [(g @ omega).ravel(), (psi.T @ g).ravel()]
        else:
            parts.append(g.ravel())
    return np.concatenate(parts)


def test_the_factors_hold_the_energy_of_a_gradient_of_low_rank_with_noise() -> None:
    shapes = {"wide": (60, 200), "tall": (150, 80), "full": (20, 18)}
    gradients = {name: spiked(shape, 4, 0.01) for name, shape in shapes.items()}
    made = layout(list(shapes), list(shapes.values()), 16)
    assert [made.is_full(place) for place in range(3)] == [False, False, True]
    for name, (b, a) in factors_of(sketch_of(gradients, made), made, 4).items():
        g, best = gradients[name], np.linalg.svd(gradients[name], compute_uv=False)[:4]
        wide_b, wide_a = b.astype(np.float64), a.astype(np.float64)
        assert np.linalg.norm(wide_b.T @ g @ wide_a.T) ** 2 >= 0.95 * (best**2).sum()
        assert np.linalg.norm(g - wide_b @ wide_b.T @ g) ** 2 <= np.linalg.norm(g) ** 2 - 0.97 * (best**2).sum()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 2.0**20])
def test_the_factors_are_orthonormal_signed_and_on_the_grid(scale: float) -> None:
    made = layout(["x", "y"], [(60, 50), (12, 9)], 10)
    for name, (b, a) in factors_of(scale * draws(1, made.dimension), made, 6).items():
        assert b.dtype == a.dtype == np.float32
        left, right = b.T.astype(np.float64), a.astype(np.float64)
        for vectors in (left, right):
            assert np.abs(vectors @ vectors.T - np.eye(6)).max() <= 1e-5
            assert (np.round(vectors / GRID) * GRID == vectors).all()
            assert (name == "y" and vectors is right) or (vectors[np.arange(6), np.abs(vectors).argmax(axis=1)] > 0).all()
            assert not np.signbit(vectors[vectors == 0]).any()


def test_whole_gradients_give_pairs_of_one_sign() -> None:
    made = layout(["x"], [(12, 9)], 8)
    sums = draws(4, made.dimension)
    b, a = factors_of(sums, made, 4)["x"]
    core = b.T.astype(np.float64) @ sums.reshape(12, 9) @ a.T.astype(np.float64)
    assert np.abs(core - np.diag(np.linalg.svd(sums.reshape(12, 9), compute_uv=False)[:4])).max() <= 1e-4


def test_b_comes_from_g_omega_and_a_from_psi_g() -> None:
    """Separately: what stands in the other part moves no bit."""
    made = layout(["x"], [(40, 30)], 8)
    first, second = draws(2, made.dimension), draws(2, made.dimension)
    second[40 * 8 :] = draws(3, 8 * 30).ravel()
    (b, a), (same, other) = factors_of(first, made, 4)["x"], factors_of(second, made, 4)["x"]
    assert (b == same).all()
    assert not (a == other).all()
    left = np.linalg.svd(first[: 40 * 8].reshape(40, 8))[0][:, :4]
    right = np.linalg.svd(first[40 * 8 :].reshape(8, 30))[2][:4]
    assert np.abs(np.abs((left * b).sum(axis=0)) - 1).max() <= 1e-5
    assert np.abs(np.abs((right * a).sum(axis=1)) - 1).max() <= 1e-5


def known_sum():
    """A sum of integers that every machine makes alike."""
    made = layout(["first", "second"], [(96, 64), (16, 20)], 12)
    stream = hashlib.shake_256(b"a known sum").digest(4 * made.dimension)
    return np.frombuffer(stream, dtype="<i4").astype(np.float64), made


def test_the_factors_are_those_that_every_party_computes() -> None:
    """The figure is part of the format: who gets another one cannot take part."""
    sums, made = known_sum()
    assert digest(factors_of(sums, made, 6)).hex() == KNOWN


KNOWN = "d2913b13d77181001bb1769116f8603f4493c9bdf42b39cefca2a0b9542a6b28"


def test_another_instruction_set_gives_the_same_bytes() -> None:
    """A process whose numpy goes without the wide vector units stands for another machine."""
    code = (
        "import hashlib, numpy as np\n"
        "from privacy.sketch import factors_of, layout\n"
        "from privacy.orthonormal import digest\n"
        f"{inspect.getsource(known_sum)}\n"
        "sums, made = known_sum(); print(digest(factors_of(sums, made, 6)).hex())"
    )
    disabled = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V3 X86_V4"
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == KNOWN, done.stderr[-500:]


def test_a_part_without_directions_is_refused_by_name() -> None:
    made = layout(["first", "second"], [(20, 20), (4, 4)], 5)
    sums = draws(5, made.dimension)
    sums[made.dimension - 16 :] = 0
    with pytest.raises(ConfigError, match=r"module second: .* 0 directions") as refused:
        factors_of(sums, made, 3)
    assert refused.value.code == "basis-too-flat"


@pytest.mark.parametrize("wrong", ["short", "dtype", "nan", "rank"])
def test_a_sum_of_another_contract_is_refused(wrong: str) -> None:
    made = layout(["x"], [(20, 20)], 5)
    sums = draws(6, made.dimension)
    sums = {"short": sums[:-1], "dtype": sums.astype(np.float32), "nan": np.where(sums == sums[3], np.nan, sums)}.get(wrong, sums)
    with pytest.raises(ConfigError):
        factors_of(sums, made, 6 if wrong == "rank" else 3)


def test_factors_come_in_the_order_of_the_layout_or_not_at_all() -> None:
    made = layout(["x", "y"], [(9, 8), (7, 6)], 4)
    found = factors_of(draws(7, made.dimension), made, 2)
    assert list(sketch.by_name(dict(reversed(found.items())), made)) == ["x", "y"]
    for other in ({"x": found["x"]}, {"x": found["y"], "y": found["x"]}, {**found, "z": found["x"]}):
        with pytest.raises(ConfigError):
            sketch.by_name(other, made)


# --- A file of factors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def factors() -> dict:
    made = layout(["a.b", "a.ü"], [(9, 8), (7, 6)], 4)
    return factors_of(draws(7, made.dimension), made, 2)


def test_a_basis_file_gives_back_its_bytes_and_is_safetensors(factors: dict) -> None:
    from safetensors.numpy import load

    raw = basis_file.save(factors)
    found = basis_file.load(raw, digest(factors))
    assert list(found) == list(factors)
    for name, (b, a) in factors.items():
        assert found[name][0].tobytes() == b.tobytes()
        assert found[name][1].tobytes() == a.tobytes()
    assert (load(raw)["a.ü.A"] == factors["a.ü"][1]).all()


def test_a_basis_file_is_taken_by_its_digest_alone(factors: dict) -> None:
    raw = basis_file.save(factors)
    with pytest.raises(TrustError, match="digest"):
        basis_file.load(raw, bytes(32))
    swapped = basis_file.save(dict(reversed(factors.items())))
    with pytest.raises(TrustError, match="digest"):
        basis_file.load(swapped, digest(factors))
    skew = {"x": (np.ones((4, 2), dtype=np.float32), np.ones((2, 3), dtype=np.float32))}
    with pytest.raises(TrustError, match="orthonormal"):
        basis_file.load(basis_file.save(skew), digest(skew))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_a_basis_file_is_taken(factors: dict, data: st.DataObject) -> None:
    raw = bytearray(basis_file.save(factors))
    place = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "drop"]))
    if kind == "flip":
        raw[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del raw[place:]
    elif kind == "drop":
        del raw[place]
    else:
        raw.insert(place, 0x20)
    with pytest.raises(TrustError):
        basis_file.load(bytes(raw), digest(factors))


@pytest.mark.parametrize(
    "header",
    [b"{}", b"[]", b"null", b"[" * 100_000, b'{"x.B":1,"x.A":2}', b'{"x.B":{"shape":[0,4]},"x.A":{"shape":[4,0]}}', b"\xff\xff",
     b'{"x.B":{"shape":[1e400]},"x.A":{}}', b'{"x.B":{"shape":"ab"},"x.A":{"shape":"cd"}}'],
)  # fmt: skip
def test_a_malformed_basis_file_is_refused(header: bytes) -> None:
    for raw in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", len(header)) + header + bytes(64), header):
        with pytest.raises(TrustError):
            basis_file.load(raw, bytes(32))


# --- A public data set -----------------------------------------------------------------------------------------------------------


def test_a_public_basis_holds_the_gradient_of_its_records(tmp_path: Path) -> None:
    """More of it than a random one of the same rank, and of records it has not seen too; the same again from a file."""
    folder = tiny_model(tmp_path / "model")
    terms = tiny_models.terms(tiny_models.MODULES["bert"], max_length=16)
    made = layout(terms.adapter.modules, bert_shapes(terms.adapter.modules), 12)
    model, units = sketching.build(folder, terms, made), [tiny_models.unit(seed, [6]) for seed in range(48)]
    public = public_basis.public_factors(folder, terms, made, units[:32], rank=3, max_grad_norm=0.5, rows_tokens=160)
    fresh = Sketch(terms, model, units[32:], plan=plan(), max_grad_norm=0.5, rows_tokens=160)().astype(np.float64)
    held = np.zeros(2)
    for name, (g, *other) in made.parts(fresh):
        if not other:  # G itself
            for place, (b, a) in enumerate((public[name], orthonormal.random_basis(MODEL, name, g.shape, 3))):
                held[place] += np.linalg.norm(b.T.astype(np.float64) @ g @ a.T.astype(np.float64)) ** 2
    assert held[0] > 5 * held[1]
    raw = basis_file.save(public)
    assert basis_file.load(raw, digest(public)).keys() == public.keys()
    with pytest.raises(RecordsError):
        public_basis.public_factors(folder, terms, made, [], rank=3, max_grad_norm=0.5, rows_tokens=160)


def test_a_public_basis_from_a_file(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    terms = tiny_models.terms(tiny_models.MODULES["bert"], max_length=16)
    made = layout(terms.adapter.modules, bert_shapes(terms.adapter.modules), 8)
    write_rows(tmp_path / "public.jsonl", [{**row, "label": "abc"[i % 3]} for i, row in enumerate(rows(12))])
    found = [
        public_basis.from_file(tmp_path / "public.jsonl", folder, terms, made, rank=2, max_grad_norm=0.5, rows_tokens=160)
        for _ in range(2)
    ]
    assert digest(found[0]) == digest(found[1])
    assert list(found[0]) == list(terms.adapter.modules)
