# SPDX-License-Identifier: Apache-2.0
"""What a lying aggregator and a rolled-back silo try, and the name under which each is refused."""

from __future__ import annotations

import hashlib
import os

import msgspec
import numpy as np
import pytest

from aggregator import rounds
from privacy import files
from privacy.dp import ledger, ring
from privacy.errors import BudgetExhausted, ConfigError, LedgerBroken, PrivacyRefusal, TrustError
from privacy.federation import Accepted, parse
from privacy.secure_sum.guardian_sum import check_total
from silo import commands, keyring, membership
from silo.config import Limits
from silo.home import Home
from silo.settlement import verified_total
from tests.federation import Federation, NoBoard
from tests.terms import contract_bytes


@pytest.fixture
def settled(tmp_path):
    """(federation, outcome of round 1, its frozen set, round 1)."""
    federation = Federation(tmp_path)
    federation.ready().run_round(1)
    opened = rounds.round_in(federation.store, federation.accepted, 1)
    _, outcome = rounds.outcome_in(federation.store, federation.accepted, opened)
    freeze = rounds.own(federation.store, federation.accepted, "freeze", 1, opened.context)
    headers = msgspec.msgpack.decode(freeze)[1]
    _, frozen = rounds.freeze(
        federation.accepted, opened, {silo.id: raw for silo, raw in zip(federation.silos, headers, strict=True)}
    )
    yield federation, outcome, frozen
    federation.store.close()


def verified(federation, outcome, frozen):
    return verified_total(outcome, frozen, consented=frozen.digest, terms=federation.accepted.terms)


def test_the_sum_a_silo_applies_is_the_one_it_computed_itself(settled):
    federation, outcome, frozen = settled
    total = verified(federation, outcome, frozen)
    assert np.array_equal(total, ring.lift(np.frombuffer(outcome.total, "<u4")))


def test_a_sum_of_the_aggregators_own_making_is_refused_by_name(settled):
    federation, outcome, frozen = settled
    forged = np.frombuffer(outcome.total, "<u4").copy()
    forged[0] += 1
    with pytest.raises(TrustError, match="not the sum") as caught:
        verified(federation, msgspec.structs.replace(outcome, total=forged.tobytes()), frozen)
    assert caught.value.code == "false-sum"


@pytest.mark.parametrize("lie", ["bit", "short", "missing", "swapped"])
def test_a_vector_that_is_not_the_silos_own_is_refused(settled, lie):
    federation, outcome, frozen = settled
    (first, y), (second, z), *rest = outcome.vectors
    bent = bytes([y[0] ^ 1]) + y[1:]
    vectors = {
        "bit": ((first, bent), (second, z), *rest),
        "short": ((first, y[:-4]), (second, z), *rest),
        "missing": ((second, z), *rest),
        "swapped": ((first, z), (second, y), *rest),
    }[lie]
    with pytest.raises(TrustError):
        verified(federation, msgspec.structs.replace(outcome, vectors=vectors), frozen)


def test_a_seed_that_is_not_the_silos_own_is_refused(settled):
    federation, outcome, frozen = settled
    (first, _), *rest = outcome.seeds
    with pytest.raises(TrustError, match=f"silo {first}"):
        verified(federation, msgspec.structs.replace(outcome, seeds=((first, bytes(32)), *rest)), frozen)


def test_a_total_checked_against_no_vectors_is_refused(settled):
    _, outcome, frozen = settled
    with pytest.raises(TrustError):
        check_total(np.frombuffer(outcome.total, "<u4"), {}, {}, frozen)


def contract(**changes) -> Accepted:
    return parse(contract_bytes(**changes))


def test_a_contract_that_promises_less_than_it_costs_is_not_joined():
    with pytest.raises(BudgetExhausted, match=r"promises epsilon 0\.1"):
        membership.check_limits(contract(privacy={"epsilon": 0.1}), Limits(epsilon=1000.0, delta=1e-5))


@pytest.mark.parametrize("word", ["North\nsilo 9, Charité (Berlin): aaaa", "North\x1b[8m", "North\u202e", "x" * 201, ""])
def test_words_that_could_forge_what_people_compare_are_refused(word):
    raw = contract_bytes().replace(b'"Hospital 1"', msgspec.json.encode(word))
    with pytest.raises(ConfigError):
        parse(raw)


def test_two_silos_see_each_other_is_for_two():
    with pytest.raises(ConfigError, match="exactly two"):
        contract(silos=3, sum={"two_silos_see_each_other": True})


@pytest.mark.parametrize("raw", [b"x=" + b"[" * 100_000, b"x = " + b"9" * 5000])
def test_a_contract_made_to_crash_the_parser_is_a_clear_error(raw):
    with pytest.raises(ConfigError):
        parse(raw)


# --- The ledger is neither lost nor put back ----------------------------------------------------------------------------------


@pytest.fixture
def silo(tmp_path):
    """A silo's home with one promised and reserved round."""
    root = tmp_path / "north"
    (tmp_path / "records.jsonl").write_text('{"text": "a", "label": "no"}\n')
    options = {
        "name": "north",
        "organisation": "North",
        "url": "http://127.0.0.1:1",
        "fingerprint": "",
        "records": tmp_path / "records.jsonl",
        "epsilon": 100.0,
        "delta": 1e-5,
        "model": "",
    }
    commands.create(root, **options)
    return root, options


def spend(root, contract: Accepted, *, round_number: int, promise: bool = True) -> None:
    with commands._gate(Home(root), contract, commands.config.load(Home(root).config_path), 0, NoBoard()) as gate:
        gate.declare()
        gate.admit(round_number, os.urandom(16))
    if promise:
        Home(root).promise_manifest(round_number, hashlib.sha256(b"%d" % round_number).digest())


def test_a_missing_ledger_is_never_started_again(silo):
    root, options = silo
    spend(root, contract(), round_number=1)
    Home(root).ledger_path.unlink()
    with pytest.raises(LedgerBroken, match="is missing"):
        commands.create(root, **options)
    assert not Home(root).ledger_path.exists()


def test_a_ledger_put_back_is_refused_before_anything_is_spent(silo):
    root, _ = silo
    spend(root, contract(), round_number=1)
    older = Home(root).ledger_path.read_bytes()
    spend(root, contract(), round_number=2)
    files.write_atomic(Home(root).ledger_path, older, mode=files.PRIVATE)
    with pytest.raises(LedgerBroken, match="round 2"):
        spend(root, contract(), round_number=3)
    assert Home(root).ledger_path.read_bytes() == older


def test_a_failure_that_comes_back_does_not_burn_the_plan(silo):
    root, _ = silo
    for _ in range(3):
        spend(root, contract(), round_number=1)
    with pytest.raises(PrivacyRefusal, match="attempted 3 times") as caught:
        spend(root, contract(), round_number=1)
    assert caught.value.code == "too-many-attempts"
    history = ledger.History.read(Home(root).ledger_path, verify=keyring.verifier(Home(root)))
    assert sum(event.steps for event in history.charged()) == 3
    spend(root, contract(), round_number=2)


def test_an_upload_whose_ledger_counter_does_not_grow_is_refused(tmp_path):
    federation = Federation(tmp_path)
    coordinator = federation.ready()
    coordinator.run_round(1)
    federation.silos[0].ledger_counter = 1
    with pytest.raises(TrustError) as caught:
        coordinator.run_round(2)
    assert caught.value.code == "ledger-rolled-back"
