# SPDX-License-Identifier: Apache-2.0
"""The lattice: one test per line of its guarantees and of its edge table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privacy.dp import lattice
from privacy.dp.lattice import sum_lattice, to_lattice
from privacy.errors import ConfigError

C, P = 0.5, 16
BOUND = 2**P


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def images(gradients: torch.Tensor, norm: float = C, bits: int = P) -> torch.Tensor:
    return to_lattice(gradients, max_grad_norm=norm, lattice_bits=bits)


def exact_norm_squared(row: torch.Tensor) -> int:
    return sum(int(z) ** 2 for z in row)


def random_rows(units: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(units, d, generator=torch.Generator().manual_seed(seed))


any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(
    st.integers(1, 12).flatmap(lambda d: st.lists(st.lists(any_float32, min_size=d, max_size=d), min_size=1, max_size=4)),
    st.integers(1, 20),
    st.sampled_from([1e-6, 0.1, 0.5, 1.0, 3.0, 1e9]),
)
def test_integer_norm_never_exceeds_the_bound(values: list[list[float]], bits: int, norm: float) -> None:
    for row in images(torch.tensor(values, dtype=torch.float32), norm, bits):
        assert exact_norm_squared(row) <= 4**bits
        assert max(abs(int(z)) for z in row) <= 2**bits


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 20))
def test_integer_norm_of_random_directions_never_exceeds_the_bound(seed: int, d: int, bits: int) -> None:
    assert exact_norm_squared(images(random_rows(1, d, seed, 10.0), C, bits)[0]) <= 4**bits


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6), st.integers(-60, 60))
def test_norm_bound_on_exact_integer_directions(direction: list[int], exponent: int) -> None:
    row = torch.tensor([direction], dtype=torch.float32) * 2.0**exponent
    assert exact_norm_squared(images(row, 1.0, 20)[0]) <= 4**20


@pytest.mark.parametrize("threads", [1, 2])
def test_row_depends_on_itself_only(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradients = random_rows(37, 70_001, 1)
        together = images(gradients)
        for index in (0, 17, 36):
            assert torch.equal(images(gradients[index : index + 1])[0], together[index])
        poisoned = gradients.clone()
        poisoned[1:] = float("nan")
        assert torch.equal(images(poisoned)[0], together[0])
    finally:
        torch.set_num_threads(before)


def test_removing_a_unit_moves_the_sum_by_at_most_the_bound() -> None:
    gradients = random_rows(9, 500, 2, 3.0)
    for index in range(9):
        others = torch.cat([gradients[:index], gradients[index + 1 :]])
        assert exact_norm_squared(sum_lattice(images(gradients)) - sum_lattice(images(others))) <= 4**P


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entry_gives_the_zero_vector(bad: float) -> None:
    z = images(rows([0.1, bad, 0.2], [0.1, 0.1, 0.1]))
    assert z[0].tolist() == [0, 0, 0]
    assert z[1].tolist() != [0, 0, 0]


def test_zeros_and_negative_zeros_give_the_zero_vector() -> None:
    assert images(rows([0.0, 0.0], [-0.0, -0.0])).tolist() == [[0, 0], [0, 0]]


def test_norm_above_is_scaled_to_the_bound_and_keeps_direction() -> None:
    gradient = random_rows(1, 64, 3, 100.0)
    z = images(gradient)[0].double()
    cosine = torch.dot(z, gradient[0].double()) / (z.norm() * gradient[0].double().norm())
    assert cosine > 1 - 1e-6
    assert 0.999 * BOUND < z.norm() <= BOUND


def test_norm_below_is_only_truncated() -> None:
    gamma = C / BOUND
    gradient = rows([10.75 * gamma, -10.75 * gamma, 0.99 * gamma])
    assert images(gradient)[0].tolist() == [10, -10, 0]


def test_huge_entries_do_not_overflow() -> None:
    z = images(rows([1e38, -1e38, 3e38, 0.0]))[0]
    assert exact_norm_squared(z) > 0.99 * 4**P
    assert z[2] > 0 > z[1]


def test_denormals_truncate_to_zero_and_survive_a_tiny_bound() -> None:
    denormal = rows([1e-44, -1e-42])
    assert images(denormal)[0].tolist() == [0, 0]
    assert exact_norm_squared(images(denormal, 1e-43)[0]) > 0.99 * 4**P


def test_single_entry_meets_the_bound_exactly() -> None:
    assert images(rows([7.0, 0.0], [-0.5, 0.0])).tolist() == [[BOUND, 0], [-BOUND, 0]]


def test_slightly_too_long_row_is_shrunk() -> None:
    scaled = torch.full((1, 4), 2.0 ** (P - 1), dtype=torch.float64) * 1.005
    assert exact_norm_squared(scaled[0].trunc()) > 4**P
    z = lattice._proved(scaled, P)
    assert 0.99 * 4**P < exact_norm_squared(z[0]) <= 4**P


def test_hopelessly_long_row_becomes_zero_and_its_neighbour_stays() -> None:
    scaled = torch.full((2, 4), 2.0**P, dtype=torch.float64)
    scaled[1] = 3.0
    assert lattice._proved(scaled, P).tolist() == [[0, 0, 0, 0], [3, 3, 3, 3]]


@pytest.mark.parametrize("entry", [2**31, -(2**31), 2**32, 2**62])
def test_proof_cannot_be_wrapped(entry: int) -> None:
    wrapping = torch.full((1, 4), entry, dtype=torch.int64)
    assert not lattice._within(wrapping, 20).item()
    assert wrapping.square().sum().item() in (0, 4 * entry**2)  # the sum alone would have said yes


def test_float_beyond_int64_is_clamped_before_the_cast() -> None:
    scaled = torch.tensor([[1e300, 0.0], [-1e300, 0.0]], dtype=torch.float64)
    assert lattice._proved(scaled, 20).tolist() == [[2**20, 0], [-(2**20), 0]]


def test_no_rows_give_an_empty_tensor_and_a_zero_sum() -> None:
    z = images(torch.empty(0, 5))
    assert z.shape == (0, 5)
    assert sum_lattice(z).tolist() == [0] * 5


@pytest.mark.parametrize("d", [1000, 20_000])
def test_truncation_bias_stays_below_seven_per_mille(d: int) -> None:
    bits = math.ceil(0.5 * math.log2(d) + 6)
    gradient = random_rows(1, d, 5)[0]
    z = images(gradient[None], 1.0, bits)[0].double()
    unclipped = gradient.double() / gradient.double().norm() * 2**bits
    assert 0.993 <= torch.dot(z, unclipped) / torch.dot(unclipped, unclipped) <= 1.0


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = random_rows(7, 33, 6)
    whole = images(gradients)
    monkeypatch.setattr(lattice, "_CHUNK_ENTRIES", 40)
    assert torch.equal(images(gradients), whole)


def test_sum_is_the_same_for_any_order_and_grouping() -> None:
    z = images(random_rows(20, 100, 7, 5.0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    parts = sum_lattice(z[order[:3]]) + sum_lattice(z[order[3:11]]) + sum_lattice(z[order[11:]])
    assert torch.equal(parts, sum_lattice(z))


def test_too_wide_a_lattice_is_refused() -> None:
    with pytest.raises(ConfigError, match="62"):
        images(torch.zeros(1, 5), bits=30)
    images(torch.zeros(1, 4), bits=30)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf"), 5e-324])
def test_unusable_bound_is_refused(norm: float) -> None:
    with pytest.raises(ConfigError, match="max_grad_norm"):
        images(torch.zeros(1, 4), norm)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3), torch.zeros(1, 2, dtype=torch.bfloat16)])
def test_other_types_and_shapes_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="float32"):
        images(bad)


def test_sum_of_floats_is_refused() -> None:
    with pytest.raises(ConfigError, match="int64"):
        sum_lattice(torch.zeros(1, 2))
