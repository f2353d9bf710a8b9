# SPDX-License-Identifier: Apache-2.0
"""The contract: what parses, what is refused and why, and what follows from its numbers."""

import hashlib

import pytest

from privacy import federation
from privacy.errors import ConfigError
from tests.sharing import guardian_table, share_terms
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


# --- share mode -------------------------------------------------------------------------------------------------------


def test_a_share_mode_contract_says_who_is_needed() -> None:
    terms = federation.parse(share_terms(5, 5, corrupt=2, dropouts=2)).terms
    assert (terms.shared, terms.fewest, terms.quorum, terms.shares, terms.silos) == (True, 3, 4, 2, 5)
    assert [terms.position(guardian.id) for guardian in terms.guardian] == [0, 1, 2, 3, 4]
    assert terms.by_guardian(2**15 + 3).name == "guard-3"
    assert terms.silo_guardians == {}
    for ask in (terms.by_guardian, terms.position):
        with pytest.raises(ConfigError, match="no guardian has id 7"):
            ask(7)


@pytest.mark.parametrize(("guardians", "corrupt", "quorum"), [(5, 2, 4), (7, 2, 5), (3, 0, 2), (4, 1, 3), (6, 1, 4)])
def test_q_is_the_table_of_the_protocol(guardians: int, corrupt: int, quorum: int) -> None:
    terms = federation.parse(share_terms(9, guardians, corrupt=corrupt, dropouts=3)).terms
    assert terms.quorum == quorum


def test_a_guardian_with_a_silos_keys_is_that_silo() -> None:
    terms = federation.parse(share_terms(5, 5, corrupt=1, dropouts=1, own=False)).terms
    assert {silo: guardian.id for silo, guardian in terms.silo_guardians.items()} == {i: 2**15 + i for i in range(1, 6)}


def test_the_divisor_and_the_noise_follow_who_stands() -> None:
    terms = federation.parse(share_terms(5, 5, corrupt=2, dropouts=2)).terms
    assert (terms.divisor, terms.divisor_for(3)) == (0.25 * 200 * 5, 0.25 * 200 * 3)
    assert {name: each.shares for name, each in federation.adversaries(terms).items()} == {
        "outside": 3, "insiders": 2, "sum_broken": 1,
    }  # fmt: skip
    stood = federation.adversaries(terms, standing=5, rounds=2)
    assert {name: (each.shares, each.steps) for name, each in stood.items()} == {
        "outside": (5, 2), "insiders": (4, 2), "sum_broken": (1, 2),
    }  # fmt: skip
    assert federation.ring_plan(terms).share_variance >= 4 * 4**20 / terms.shares
    alone = federation.parse(share_terms(5, 5, training={"mode": "local"})).terms
    assert alone.divisor_for(3) == alone.divisor == 0.25 * 200


def test_no_sum_of_the_worst_case_leaves_the_ring() -> None:
    """n vectors at most, h shares at least: the clamp has room for n, the noise of each is sized for h."""
    terms = federation.parse(share_terms(9, 5, corrupt=2, dropouts=4)).terms
    plan = federation.ring_plan(terms)
    assert (plan.silos, terms.shares) == (9, 4)
    assert 9 * plan.clamp + plan.headroom <= 2**31 - 1


def shared(**how) -> bytes:
    return share_terms(how.pop("silos", 5), how.pop("guardians", 5), **how)


def with_table(index: int, **changes: str) -> bytes:
    """Five guardians of whom one is changed."""
    own = changes.pop("own", True)
    tables = [guardian_table(k, own=own, **(changes if k == index else {})) for k in range(1, 6)]
    return shared(guardians=0, own=own, corrupt=2) + "".join(tables).encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (shared(guardians=0), "0 guardians; share mode has 3 to 255"),
        (shared(guardians=2, corrupt=1), "2 guardians"),
        (shared(corrupt=5), "corrupt_guardians = 5 of 5"),
        (shared(dropouts=5), "dropouts = 5 with 5 members"),
        (shared(dropouts=2, privacy={"colluders": 2}), "a sum of 3 silos with colluders = 2"),
        (shared(silos=2), "below 3"),
        (shared(silos=2, sum={"two_silos_see_each_other": True}), "two_silos_see_each_other with protocol = shares"),
        (shared(corrupt=1, dropouts=2, own=False), "dropouts = 2, and 5 guardians of which 4 are needed"),
        (shared(silos=9, corrupt=1, dropouts=1, own=False, privacy={"colluders": 2}), "corrupt_guardians = 1, colluders = 2"),
        (shared(sum={"blocks": ((1, 2, 3), (4,))}), "no partition of the members"),
        (shared(sum={"blocks": ((1, 2, 3), (3, 4, 5))}), "no partition of the members"),
        (shared(sum={"blocks": ((1, 2, 3), (4, 5))}), "a block of 2 silos; no sum is over fewer than 3"),
        (shared(sum={"blocks": ((1, 2, 3, 4, 5), ())}), "a block of 0 silos"),
        (shared() + guardian_table(5).encode(), "guardian ids must be distinct and ascending"),
        (with_table(2, name="guard-1"), "two guardians share one name"),
        (with_table(2, sign_key=public(226)), "two guardians share one sign_key"),
        (with_table(2, organisation="Notary 1"), "two guardians share one organisation"),
        (with_table(2, sign_key=public(100)), "guardian guard-2 has the aggregator's key"),
        (with_table(2, name="silo-4"), "guardian silo-4 and silo silo-4 share a name or a key"),
        (with_table(2, sign_key=public(4)), "guardian guard-2 and silo silo-4 share a name or a key"),
        (with_table(2, name="silo-4", sign_key=public(4)), "share a name or a key, and not all of them"),
        (with_table(2, organisation="Notary\\u0007"), "not printable"),
        (with_table(2, ml_dsa_key="00" * 1952), "guard-2 has an ml_dsa_key"),
        (shared(signatures="ed25519+ml-dsa-65"), 'hub has no ml_dsa_key; signatures = "ed25519'),
    ],
)
def test_share_mode_terms_that_cannot_hold_are_refused(raw: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        federation.parse(raw)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (contract_bytes(sum={"dropouts": 1}), "consent with dropouts"),
        (contract_bytes(sum={"corrupt_guardians": 1}), "consent with corrupt_guardians"),
        (contract_bytes(sum={"blocks": ((1, 2, 3),)}), "consent with blocks"),
        (contract_bytes() + guardian_table(1).encode(), "consent with guardian"),
    ],
)
def test_consent_mode_has_nothing_of_share_mode(raw: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federation.parse(raw)


def test_a_guardian_of_another_organisation_than_its_silo_is_refused() -> None:
    tables = [guardian_table(k, own=False, **({"organisation": "Elsewhere"} if k == 2 else {})) for k in range(1, 6)]
    raw = share_terms(5, 0, corrupt=1, dropouts=1) + "".join(tables).encode()
    with pytest.raises(ConfigError, match="guardian silo-2 and silo silo-2 share a name or a key"):
        federation.parse(raw)


def test_blocks_that_are_a_partition_are_taken() -> None:
    terms = federation.parse(share_terms(6, 5, corrupt=2, dropouts=3, sum={"blocks": ((1, 3, 5), (2, 4, 6))})).terms
    assert terms.sum.blocks == ((1, 3, 5), (2, 4, 6))
