# SPDX-License-Identifier: Apache-2.0
"""The pure ratchet: which body follows from which documents, and what it refuses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from aggregator import rounds, versions
from privacy import envelope, update_rule
from privacy.errors import ConfigError, RoundError, TrustError
from privacy.federation import ring_plan
from privacy.messages import AGGREGATOR, Manifest, Outcome, Signed, decode, encode
from privacy.secure_sum import guardian_sum
from privacy.transparency.notes import Checkpoint
from tests.federation import START, Federation, signed_by_hub, silo_identity, upload_of

HEAD = Checkpoint(origin="test-federation/log", size=7, root=b"r" * 32)


@pytest.fixture
def federation(tmp_path):
    made = Federation(tmp_path)
    yield made
    made.store.close()


def changed(message, **fields):
    return type(message)(**{**{name: getattr(message, name) for name in message.__struct_fields__}, **fields})


def outcome_of(federation, number):
    opened = rounds.round_in(federation.store, federation.accepted, number)
    return rounds.outcome_in(federation.store, federation.accepted, opened)


def test_a_contract_is_opened_only_with_the_key_that_it_names(federation):
    raw = federation.store.get("contract", 1, AGGREGATOR)
    assert versions.open_contract(raw).digest == federation.accepted.digest
    body = decode(raw, Signed).body
    forged = envelope.sign(silo_identity(1), type="contract", context=federation.accepted.digest, sender=AGGREGATOR, body=body)
    with pytest.raises(TrustError):
        versions.open_contract(forged)
    with pytest.raises(TrustError):
        versions.open_contract(signed_by_hub("contract", bytes(32), body))
    other = body.replace(b"rounds = 10", b"rounds = -1")
    with pytest.raises(ConfigError):
        versions.open_contract(signed_by_hub("contract", hashlib.sha256(other).digest(), other))


def test_the_manifest_states_the_plan_the_state_and_the_chain(federation):
    at = rounds.Epoch(number=4, context=bytes([7]) * 32)
    state = update_rule.initial(federation.accepted.terms)
    made = rounds.manifest(
        accepted=federation.accepted, at=at, number=9, previous=bytes([1]) * 32, state=state, now=START + 0.9, head=HEAD
    )
    plan = ring_plan(federation.accepted.terms)
    assert made == Manifest(
        epoch_ctx=at.context, epoch=4, round=9, previous=bytes([1]) * 32, base_state=state.digest,
        dimension=federation.accepted.terms.dimension, ring_bits=32, lattice_bits=plan.lattice_bits, clamp=plan.clamp,
        opened_at=int(START), deadline_at=int(START) + 10, log_size=7, log_root=b"r" * 32,
    )  # fmt: skip


def test_the_first_manifest_follows_the_contract_and_the_next_ones_the_outcome(federation):
    coordinator = federation.ready()
    coordinator.run_round(1)
    coordinator.run_round(2)
    first, second = (rounds.round_in(federation.store, federation.accepted, number) for number in (1, 2))
    body, outcome = outcome_of(federation, 1)
    assert first.manifest.previous == federation.accepted.digest
    assert second.manifest.previous == hashlib.sha256(body).digest()
    assert second.manifest.base_state == outcome.next_state == federation.reached([1]).digest


def test_a_manifest_of_another_epoch_or_signer_does_not_open(federation):
    federation.ready()
    at = rounds.epoch_in(federation.store, federation.accepted, 1)
    state = update_rule.initial(federation.accepted.terms)
    made = rounds.manifest(accepted=federation.accepted, at=at, number=1, previous=bytes(32), state=state, now=START, head=HEAD)
    for number, body, context in ((5, changed(made, epoch=2), at.context), (6, changed(made, epoch_ctx=bytes(32)), bytes(32))):
        federation.store.put_once("manifest", number, AGGREGATOR, signed_by_hub("manifest", context, body), received_at=0)
        with pytest.raises(TrustError, match="another epoch"):
            rounds.round_in(federation.store, federation.accepted, number)
    forged = envelope.sign(silo_identity(1), type="manifest", context=at.context, sender=AGGREGATOR, body=encode(made))
    federation.store.put_once("manifest", 7, AGGREGATOR, forged, received_at=0)
    with pytest.raises(TrustError, match="signature"):
        rounds.round_in(federation.store, federation.accepted, 7)
    assert rounds.round_in(federation.store, federation.accepted, 8) is None


def test_roster_freeze_and_certificate_want_every_member(federation):
    federation.ready()
    opened = federation.stall(1, "release")
    notes = {silo.id: silo.sent["epoch-note", 1] for silo in federation.silos}
    made = rounds.roster(federation.accepted, 1, notes)
    assert made.notes == tuple(notes[i] for i in (1, 2, 3))
    del notes[2]
    with pytest.raises(RoundError, match=r"silos \[2\]") as caught:
        rounds.roster(federation.accepted, 1, notes)
    assert caught.value.facts["missing"] == [2]
    with pytest.raises(RoundError, match=r"no upload from silos \[1, 2, 3\]"):
        rounds.freeze(federation.accepted, opened, {})
    headers = {silo.id: upload_of(silo.sent["upload", 1]).header for silo in federation.silos}
    frozen = rounds.freeze(federation.accepted, opened, headers)[1]
    consents = {silo.id: silo.sent["consent", 1] for silo in federation.silos if silo.id != 3}
    with pytest.raises(RoundError, match=r"no consent from silos \[3\]"):
        rounds.certificate(federation.accepted, opened, frozen, consents)


def test_a_roster_with_a_copied_key_is_refused(federation):
    federation.ready()
    notes = {silo.id: silo.sent["epoch-note", 1] for silo in federation.silos}
    with pytest.raises(TrustError):
        rounds.roster(federation.accepted, 1, {**notes, 2: notes[1]})
    with pytest.raises(TrustError, match="epoch 1"):
        rounds.roster(federation.accepted, 2, notes)


def test_the_result_is_the_exact_sum_and_settles_to_its_state(federation):
    federation.ready().run_round(1)
    _, outcome = outcome_of(federation, 1)
    total = federation.expected_total(1)
    assert np.array_equal(np.frombuffer(outcome.total, "<u4"), (total % 2**32).astype("<u4"))
    assert [silo for silo, _ in outcome.seeds] == [1, 2, 3]
    state = update_rule.initial(federation.accepted.terms)
    assert rounds.settle(state, outcome, federation.accepted.terms).digest == federation.reached([1]).digest


@pytest.mark.parametrize(
    "change", [{"next_state": bytes(32)}, {"reason": "rejected"}, {"total": b""}, {"total": bytes(104)}, {"kind": "void"}]
)
def test_an_outcome_that_does_not_follow_from_the_arithmetic_is_refused(federation, change):
    federation.ready().run_round(1)
    _, outcome = outcome_of(federation, 1)
    state = update_rule.initial(federation.accepted.terms)
    with pytest.raises(TrustError, match="outcome of round 1"):
        rounds.settle(state, changed(outcome, **change), federation.accepted.terms)


def test_a_sum_beyond_every_honest_one_moves_nothing(federation):
    terms = federation.accepted.terms
    state = update_rule.initial(terms)
    total = np.full(terms.dimension, 2**31 - 1, dtype="<u4")
    assert rounds.apply(state, total, terms) == (state, "rejected")
    plan = ring_plan(terms)
    bound = np.full(terms.dimension, plan.clamp * 3 + plan.headroom, dtype=np.int64)
    assert rounds.apply(state, (bound % 2**32).astype("<u4"), terms)[1] == ""


def test_an_update_that_is_not_finite_moves_nothing(tmp_path):
    federation = Federation(
        tmp_path, training={"optimizer": "sgd", "momentum": 0.99, "learning_rate": 1e9}, privacy={"max_grad_norm": 1e9}
    )
    terms = federation.accepted.terms
    state = update_rule.initial(terms)
    huge = update_rule.State(
        applied=1, beta1_power=1.0, beta2_power=1.0, theta=np.full(terms.dimension, 1.7e308),
        first_moment=np.full(terms.dimension, -1.7e308),
        second_moment=state.second_moment,
    )  # fmt: skip
    assert rounds.apply(huge, np.ones(terms.dimension, dtype="<u4"), terms) == (huge, "rejected")


def test_a_void_outcome_holds_no_sum_and_leaves_the_state(federation):
    federation.ready()
    opened = federation.stall(1, "upload")
    state = update_rule.initial(federation.accepted.terms)
    made = rounds.void(opened, state, rounds.ABSENT)
    assert made == Outcome(
        round_ctx=opened.ctx,
        round=1,
        kind="void",
        reason="absent",
        frozen=b"",
        total=b"",
        seeds=(),
        vectors=(),
        next_state=state.digest,
    )
    assert rounds.settle(state, made, federation.accepted.terms) is state
    with pytest.raises(TrustError):
        rounds.settle(state, changed(made, next_state=bytes(32)), federation.accepted.terms)


def test_the_same_documents_give_the_same_bodies(federation):
    federation.ready()
    opened = federation.stall(1, "release")
    headers = {silo.id: upload_of(silo.sent["upload", 1]).header for silo in federation.silos}
    bodies = {
        encode(rounds.freeze(federation.accepted, opened, dict(items))[0]) for items in (headers.items(), reversed(headers.items()))
    }
    standing = rounds.own(federation.store, federation.accepted, "freeze", 1, opened.context)
    assert bodies == {standing}
    assert opened.ctx == guardian_sum.round_ctx(encode(opened.manifest))
