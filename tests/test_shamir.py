# SPDX-License-Identifier: Apache-2.0
"""secure_sum.shamir against a second field implementation, exhaustively where it is small, and what fewer shares say: nothing."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import TrustError
from privacy.secure_sum import shamir


def peasant(a: int, b: int) -> int:
    """a·b mod 0x11b by Russian-peasant multiplication: shift, add, reduce."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a & 0x100:
            a ^= 0x11B
        b >>= 1
    return result


def evaluate(coefficients: list[int], x: int) -> int:
    """The polynomial's value, term by term."""
    value, power = 0, 1
    for coefficient in coefficients:
        value ^= peasant(coefficient, power)
        power = peasant(power, x)
    return value


def random_secrets(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


# --- the field --------------------------------------------------------------------------------------------------------


def test_every_product_is_that_of_a_second_implementation() -> None:
    assert all(shamir.multiply(a, b) == peasant(a, b) for a in range(256) for b in range(256))


def test_known_products_of_the_aes_field() -> None:
    """FIPS 197 §4.2: {57}·{83} = {c1}, {57}·{13} = {fe}; {53} and {ca} are inverses."""
    assert (shamir.multiply(0x57, 0x83), shamir.multiply(0x57, 0x13)) == (0xC1, 0xFE)
    assert shamir.inverse(0x53) == 0xCA


def test_every_inverse_is_one() -> None:
    assert all(peasant(a, shamir.inverse(a)) == 1 for a in range(1, 256))
    with pytest.raises(TrustError, match="zero has no inverse"):
        shamir.inverse(0)


# --- exact ------------------------------------------------------------------------------------------------------------


def test_shares_are_the_documented_polynomial() -> None:
    secrets = random_secrets(3)
    given_bytes = bytes(range(7, 7 + 2 * 3 * 32))  # two coefficients for each of 96 bytes
    shares = shamir.split(secrets, threshold=3, count=5, random=lambda size: given_bytes[:size])
    # Horner takes the first row of coefficients as the highest power.
    rows = np.frombuffer(given_bytes, dtype=np.uint8).reshape(2, 3, 32)
    for x, i, byte in product(range(1, 6), range(3), range(0, 32, 5)):
        polynomial = [int(secrets[i, byte]), int(rows[1, i, byte]), int(rows[0, i, byte])]
        assert shares[x - 1, i, byte] == evaluate(polynomial, x)


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (1, 3), (2, 3), (3, 3), (4, 5), (5, 7)])
def test_exact_any_threshold_of_shares_give_the_secrets_back(threshold: int, count: int) -> None:
    secrets = random_secrets(4)
    shares = shamir.split(secrets, threshold=threshold, count=count)
    for size in range(threshold, count + 1):
        for positions in combinations(range(count), size):
            assert np.array_equal(shamir.combine(positions, [shares[k] for k in positions]), secrets)


def test_exact_the_order_of_shares_does_not_matter() -> None:
    secrets = random_secrets(2)
    shares = shamir.split(secrets, threshold=3, count=4)
    assert all(np.array_equal(shamir.combine(order, [shares[k] for k in order]), secrets) for order in permutations(range(4), 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 255), st.data())
def test_exact_for_any_threshold_and_any_positions(count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, min(count, 40)))
    secrets = np.frombuffer(data.draw(st.binary(min_size=32, max_size=32)), dtype=np.uint8).reshape(1, 32)
    shares = shamir.split(secrets, threshold=threshold, count=count)
    positions = data.draw(st.permutations(range(count)))[:threshold]
    assert np.array_equal(shamir.combine(positions, [shares[k] for k in positions]), secrets)


def test_one_share_too_few_or_one_changed_gives_other_secrets() -> None:
    secrets = random_secrets(1)
    shares = shamir.split(secrets, threshold=4, count=5)
    assert not np.array_equal(shamir.combine((0, 1, 2), list(shares[:3])), secrets)
    changed = shares.copy()
    changed[2, 0, 31] ^= 1
    found = shamir.combine((0, 1, 2, 3), list(changed[:4]))
    assert np.array_equal(found[0, :31], secrets[0, :31])
    assert found[0, 31] != secrets[0, 31]


# --- hiding -----------------------------------------------------------------------------------------------------------


class Fixed:
    """Randomness that gives one byte value per coefficient row, for exhausting all polynomials."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def __call__(self, size: int) -> bytes:
        per_row = size // len(self.rows) if self.rows else 0
        return b"".join(bytes([value]) * per_row for value in self.rows)


def test_hiding_one_share_below_the_threshold_says_nothing_exhaustively() -> None:
    """2 of 3: for every secret byte, every single share takes every value once over all 256 coefficients."""
    everything = Counter(range(256))
    for secret in range(256):
        secrets = np.full((1, 32), secret, dtype=np.uint8)
        made = [shamir.split(secrets, threshold=2, count=3, random=Fixed(a)) for a in range(256)]
        for position in range(3):
            assert Counter(int(shares[position, 0, 0]) for shares in made) == everything


def test_hiding_two_shares_below_a_threshold_of_three_say_nothing_exhaustively() -> None:
    """3 of 4: over all 65,536 pairs of coefficients, every pair of shares takes every pair of values once, for each secret."""
    wide = np.arange(256, dtype=np.uint8)
    high, low = (each.reshape(-1) for each in np.meshgrid(wide, wide, indexing="ij"))
    coefficients = np.stack([np.resize(row, (2048, 32)) for row in (high, low)])  # 65,536 bytes: one polynomial per byte
    for secret in (0, 1, 2, 0x53, 0x80, 0xFF):
        secrets = np.full((2048, 32), secret, dtype=np.uint8)
        shares = shamir.split(secrets, threshold=3, count=4, random=lambda size: coefficients.tobytes()[:size])
        for one, other in combinations(range(4), 2):
            pairs = shares[one].astype(np.int64) * 256 + shares[other]
            assert np.array_equal(np.bincount(pairs.reshape(-1), minlength=65536), np.ones(65536, dtype=np.int64))


def test_the_exhaustion_would_see_a_reused_coefficient() -> None:
    """Negative control: with both coefficients equal, two shares of three do not look uniform."""
    seen = set()
    for a in range(256):
        shares = shamir.split(np.zeros((1, 32), dtype=np.uint8), threshold=3, count=3, random=Fixed(a, a))
        seen.add((int(shares[0, 0, 0]), int(shares[1, 0, 0])))
    assert len(seen) == 256  # of 65,536


def test_fresh_every_byte_secret_and_call_has_coefficients_of_its_own() -> None:
    asked: list[int] = []

    def counted(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    shamir.split(random_secrets(9), threshold=5, count=7, random=counted)
    assert asked == [4 * 9 * 32]
    secrets = np.zeros((64, 32), dtype=np.uint8)
    one, two = (shamir.split(secrets, threshold=2, count=2)[0] for _ in range(2))
    rows = {row.tobytes() for row in (*one, *two)}
    assert len(rows) == 128
    counts = np.bincount(np.concatenate([one, two]).reshape(-1), minlength=256)
    assert (((counts - 16.0) ** 2) / 16.0).sum() < 400  # 255 degrees of freedom: false alarm below 1e-7


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "count"), [(0, 3), (4, 3), (1, 0), (2, 256), (-1, 3)])
def test_a_threshold_that_cannot_be_is_refused(threshold: int, count: int) -> None:
    with pytest.raises(TrustError, match="wanted 1 <= threshold <= count <= 255"):
        shamir.split(random_secrets(1), threshold=threshold, count=count)


@pytest.mark.parametrize("secrets", [
    np.zeros((0, 32), dtype=np.uint8), np.zeros((1, 31), dtype=np.uint8), np.zeros(32, dtype=np.uint8),
    np.zeros((1, 32), dtype=np.int64),
])  # fmt: skip
def test_secrets_of_another_shape_are_refused(secrets: np.ndarray) -> None:
    with pytest.raises(TrustError, match="wanted uint8"):
        shamir.split(secrets, threshold=2, count=3)


def test_shares_that_cannot_be_combined_are_refused() -> None:
    shares = list(shamir.split(random_secrets(2), threshold=2, count=3))
    for positions, given_shares, match in (
        ((), [], "at least one"), ((0, 0), shares[:2], "each position once"), ((0,), shares[:2], "2 shares at positions"),
        ((0, 255), shares[:2], "not within"), ((-1, 0), shares[:2], "not within"), ((0, 1), [shares[0], shares[1][:1]], "shapes"),
        ((0, 1), [shares[0], shares[1].astype(np.int64)], "shapes"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            shamir.combine(positions, given_shares)
