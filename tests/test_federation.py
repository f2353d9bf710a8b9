# SPDX-License-Identifier: Apache-2.0
"""The contract: what parses, what is refused and why, and what follows from its numbers."""

import hashlib

import pytest

from privacy import federation
from privacy.errors import ConfigError
from tests.terms import contract_bytes, public


def test_the_digest_is_over_the_exact_bytes() -> None:
    raw = contract_bytes()
    accepted = federation.parse(raw)
    assert accepted.digest == hashlib.sha256(raw).digest()
    assert federation.parse(raw + b"# a comment\n").digest != accepted.digest


def test_the_dimension_counts_every_core_and_the_head() -> None:
    terms = federation.parse(contract_bytes()).terms
    assert terms.dimension == 2 * 2**2 + 2 * 8 + 2
    assert terms.divisor == 0.25 * 200 * 3
    assert (terms.silos, terms.shares) == (3, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"delta": 1e-4}}, "delta"),
        ({"privacy": {"delta": 9e-6, "units": 10_000}}, "at most 1e-5 and 1/"),
        ({"privacy": {"sampling_rate": 0.0}}, "sampling_rate"),
        ({"privacy": {"sampling_rate": 1.5}}, "sampling_rate"),
        ({"privacy": {"noise_multiplier": float("nan")}}, "noise_multiplier"),
        ({"privacy": {"noise_multiplier": float("inf")}}, "noise_multiplier"),
        ({"privacy": {"max_grad_norm": float("nan")}}, "max_grad_norm"),
        ({"privacy": {"colluders": 0}}, "colluders"),
        ({"privacy": {"colluders": 2}}, "colluders"),
        ({"privacy": {"surprise": 1}}, "surprise"),
        ({"privacy": {"units": None}}, "units"),
        ({"privacy": {"units": 10**9, "delta": 1e-12}}, "ring|clamp|lattice"),
        ({"task": {"labels": ["a", "a"]}}, "twice"),
        ({"task": {"labels": ["a"]}}, "labels"),
        ({"adapter": {"modules": ["x", "x"]}}, "twice"),
        ({"training": {"rounds": 0}}, "rounds"),
        ({"training": {"learning_rate": -1.0}}, "learning_rate"),
        ({"version": 0}, "version"),
        ({"sign_keys": [public(1), public(1) + "\\n", public(2)]}, "sign_key"),
        ({"silos": 2}, "below 3"),
        ({"sign_keys": [public(1), public(1), public(2)]}, "share one sign_key"),
    ],
)
def test_terms_that_cannot_hold_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        federation.parse(contract_bytes(**changes))
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_two_silos_need_the_words_that_say_what_that_means() -> None:
    terms = federation.parse(contract_bytes(2, sum={"two_silos_see_each_other": True})).terms
    assert (terms.silos, terms.shares) == (2, 1)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"format = 1", b"[", b"a = 1\na = 2\n", b"\x00" * 10])
def test_bytes_that_are_no_contract_are_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError, match=r"federation\.toml"):
        federation.parse(raw)


def test_a_duplicate_key_is_refused() -> None:
    with pytest.raises(ConfigError):
        federation.parse(contract_bytes().replace(b"[sum]", b"[sum]\nring_bits = 32"))


def test_the_mechanism_of_a_contract_faces_h_shares() -> None:
    terms = federation.parse(contract_bytes()).terms
    event = federation.mechanism(terms)
    assert (event.shares, event.steps, event.dimension) == (2, 10, terms.dimension)
    plan = federation.ring_plan(terms)
    assert event.share_variance == plan.share_variance >= 4.0 * 4**20 / 2
