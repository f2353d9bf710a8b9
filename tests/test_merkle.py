# SPDX-License-Identifier: Apache-2.0
"""privacy.secure_sum.merkle against the reference roots of Certificate Transparency and a second implementation."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secure_sum.merkle import LEAF_BYTES, root, root_of_leaves
from tests import by_the_page

# certificate-transparency, merkletree/merkle_tree_test.cc: the same eight leaves and the roots of their prefixes.
LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(1, 9))
def test_reference_roots(count: int) -> None:
    assert root_of_leaves(LEAVES[:count]).hex() == ROOTS[count - 1]


def test_no_leaf_is_the_hash_of_nothing() -> None:
    assert root(b"") == hashlib.sha256(b"").digest()


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1 as it is written: split at the largest power of two below n."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + by_definition(leaves[:split]) + by_definition(leaves[split:])).digest()


@pytest.mark.parametrize("count", range(1, 70))
def test_agrees_with_the_recursive_definition(count: int) -> None:
    leaves = [bytes([index]) * (index % 5) for index in range(count)]
    assert root_of_leaves(leaves) == by_definition(leaves)


@pytest.mark.parametrize("size", [1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES, 5 * LEAF_BYTES + 4])
def test_cut_in_leaves_of_64_kib_with_a_short_last_one(size: int) -> None:
    data = bytes(index * 31 % 251 for index in range(size))
    assert root(data) == by_definition([data[start : start + 65536] for start in range(0, size, 65536)])


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.integers(min_value=0))
def test_every_bit_counts(data: bytes, place: int) -> None:
    changed = bytearray(data)
    changed[place % len(data)] ^= 1 << (place % 8)
    assert root(bytes(changed)) != root(data)
    assert root(data + b"\0") != root(data)


def test_a_leaf_is_not_a_node() -> None:
    left, right = hashlib.sha256(b"\0a").digest(), hashlib.sha256(b"\0b").digest()
    assert root_of_leaves([b"a", b"b"]) != root_of_leaves([left + right])


@pytest.mark.parametrize("leaves", [15, 16, 17, 33, 100])
def test_leaves_hashed_in_threads_give_the_definition(leaves):
    data = os.urandom(LEAF_BYTES * (leaves - 1) + 1)
    assert root(data) == by_the_page.root([data[i : i + LEAF_BYTES] for i in range(0, len(data), LEAF_BYTES)])
