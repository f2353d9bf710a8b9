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
        ({"training": {"mode": "both"}}, "mode"),
        ({"training": {"steps_per_round": 2}}, "a joint round is one step"),
        ({"training": {"mode": "local", "steps_per_round": 0}}, "steps_per_round"),
        ({"training": {"mode": "local", "steps_per_round": 10**6, "rounds": 10**4}}, "10000000000; at most 1000000000 private"),
        ({"training": {"mode": "local", "update_bound": 0.0}}, "update_bound"),
        ({"training": {"mode": "local", "update_bound": float("nan")}}, "update_bound"),
        ({"training": {"mode": "local", "update_bound": float("inf")}}, "update_bound"),
        ({"training": {"mode": "local"}, "privacy": {"colluders": 2}}, "colluders"),
        ({"training": {"mode": "local"}, "silos": 2}, "below 3"),
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
    assert federation.mechanism(terms, rounds=3) == event.with_steps(3)
    shares = {name: each.shares for name, each in federation.adversaries(terms).items()}
    assert shares == {"outside": 3, "insiders": 2, "sum_broken": 1}


def test_a_local_contract_counts_on_one_silo_alone() -> None:
    terms = federation.parse(contract_bytes(training={"mode": "local", "steps_per_round": 4})).terms
    assert (terms.silos, terms.shares, terms.summed, terms.steps) == (3, 1, 1, 40)
    assert terms.divisor == 0.25 * 200
    event, plan = federation.mechanism(terms), federation.ring_plan(terms)
    assert (event.shares, event.steps) == (1, 40)
    assert event.share_variance == plan.share_variance == 4 * 4**20
    assert plan.silos == 1
    assert federation.mechanism(terms, rounds=2) == event.with_steps(8)
    assert set(federation.adversaries(terms).values()) == {event}
    assert set(federation.adversaries(terms)) == {"outside", "insiders", "sum_broken"}
    grid = federation.update_grid(terms)
    assert 3 * grid.clamp <= 2**31 - 1 < 6 * grid.clamp


def test_a_plan_of_one_local_silo_has_room_that_a_sum_of_many_has_not() -> None:
    many = {"silos": 50, "privacy": {"units": 4000, "delta": 1e-7}}
    with pytest.raises(ConfigError, match="ring"):
        federation.parse(contract_bytes(**many))
    assert federation.parse(contract_bytes(training={"mode": "local"}, **many)).terms.silos == 50
