# SPDX-License-Identifier: Apache-2.0
"""What a hostile reading of log, chain, keys and verification found: one test for each defect, which failed before it was mended."""

from __future__ import annotations

import dataclasses
import functools

import msgspec
import pytest

from aggregator import admission, revision, service
from aggregator import verify as aggregator_verify
from aggregator.journal import Journal
from privacy import audit, audit_log, chain, federation, keys, log, notes, placing
from privacy.audit_log import check_log
from privacy.chain import Lineage
from privacy.errors import TrustError
from privacy.federation import parse
from privacy.findings import Slot
from privacy.keys import Identity
from privacy.messages import AGGREGATOR
from silo import keyring
from silo import verify as silo_verify
from silo.home import Home
from silo.watch import Watch
from tests.terms import contract_bytes, public, seed
from tests.test_chain import FOUR, SILOS, contract, identity
from tests.test_journal import HUB, Place
from tests.test_rotation import NAMES, Town
from tests.test_watch import Keeper, leaf
from tests.whole import Whole

FIVE = {**FOUR, 5: SILOS[5]}


# --- The chain ---------------------------------------------------------------------------------------------------------------


def test_a_replaced_key_does_not_come_back_with_a_silo_that_was_away():
    first = contract(members=FIVE)
    away = contract(2, first.digest.hex(), FOUR)
    back = contract(3, away.digest.hex(), {**FOUR, 5: identity("silo-5", 60)})
    again = contract(4, back.digest.hex(), FIVE)
    grown = Lineage.begin(first).extended(away).extended(back)
    with pytest.raises(TrustError) as caught:
        grown.extended(again)
    assert caught.value.code == "chain-key"


@pytest.mark.parametrize("theirs", [4, 1])
def test_a_coordinator_takes_no_key_that_a_silo_had(theirs):
    first = contract(members=FIVE)
    rest = {number: who for number, who in FIVE.items() if number != theirs}
    hub = keys.Identity(name="hub", sign_seed=SILOS[theirs].sign_seed, receive_seed=b"r" * 32, ml_dsa_seed=b"m" * 32)
    with pytest.raises(TrustError) as caught:
        Lineage.begin(first).extended(contract(2, first.digest.hex(), rest, hub=hub))
    assert caught.value.code == "chain-key"


def test_a_replaced_key_of_the_coordinator_does_not_come_back():
    hub = keys.Identity(name="hub", sign_seed=b"n" * 32, receive_seed=b"r" * 32, ml_dsa_seed=b"m" * 32)
    first = contract(members=FOUR)
    second = contract(2, first.digest.hex(), FOUR, hub=hub)
    grown = Lineage.begin(first).extended(second)
    with pytest.raises(TrustError) as caught:
        grown.extended(contract(3, second.digest.hex(), FOUR))
    assert caught.value.code == "chain-key"


# --- Heads over a new version -------------------------------------------------------------------------------------------------


class Documents(dict):
    """A board in memory."""

    def get(self, kind, number, party):
        return super().get((kind, number, party))

    def parties(self, kind, number):
        return tuple(sorted(party for a, b, party in self if (a, b) == (kind, number)))

    def latest(self, kind):
        return max((number for a, number, _ in self if a == kind), default=None)


def test_a_cosignature_from_before_a_version_is_admitted_under_it(tmp_path):
    """A silo sends what it wrote down, never another one: when it arrives late it must still be taken, or the silo stops for ever."""
    town = Town(tmp_path, *NAMES)
    first = town.sign()
    town.join(*NAMES)
    old = keys.load(town.silo("b").identity_path)
    head = notes.Checkpoint(origin=log.origin(first.terms), size=1, root=bytes(32))
    shown = notes.signed(head.text, name=head.origin, seed=town.hub.sign_seed).to_bytes()
    town.store.put_once("checkpoint", 3, AGGREGATOR, shown, received_at=1.0)
    late = notes.cosigned(head.text, name=log.cosigner_name(first.terms, first.terms.by_id(2)), seed=old.sign_seed, time=5).to_bytes()
    admission.admit("cosignature", 3, 2, late, town.store)
    town.rotate("b")
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    town.sign()
    town.join(*NAMES)
    admission.admit("cosignature", 3, 2, late, town.store)
    with pytest.raises(TrustError):
        admission.admit("cosignature", 3, 1, late, town.store)


NEXT = federation.parse(contract_bytes(3, aggregator_key=public(101), version=2, previous="ab" * 32))
"""The same federation after its coordinator's key was replaced."""


def test_a_silo_and_a_journal_go_on_after_the_coordinators_key_was_replaced(tmp_path, monkeypatch):
    first = federation.parse(contract_bytes(3))
    keeper = Keeper(leaf("roster", 1, 0, b"roster"))
    home = Home.create(tmp_path / "silo-1")
    home.keep_contract(1, b"the signed contract")
    monkeypatch.setattr("silo.watch.open_contract", lambda raw: first)
    who = Identity(name="silo-1", sign_seed=seed(1))
    keeper.show(1)
    assert Watch(home=home, transport=keeper, identity=who, accepted=first, clock=lambda: 9.0).follow(1, wait_s=0)
    keeper.leaves.append(leaf("outcome", 1, 0, b"outcome"))
    keeper.show(2, signer=101)
    assert Watch(home=home, transport=keeper, identity=who, accepted=NEXT, clock=lambda: 9.0).follow(2, wait_s=0)
    keeper.leaves.append(leaf("outcome", 2, 0, b"outcome"))
    keeper.show(3, signer=102)
    with pytest.raises(TrustError) as caught:
        Watch(home=home, transport=keeper, identity=who, accepted=NEXT, clock=lambda: 9.0).follow(3, wait_s=0)
    assert caught.value.code == "log-unsigned"
    # The coordinator finds the head that it signed with its former key, and shows it again.
    place = Place(tmp_path)
    place.put(3)
    head = place.journal.checkpoint(1)
    new = dataclasses.replace(HUB, sign_seed=seed(101))
    later = Journal(tmp_path / "log", store=place.store, identity=new, terms=NEXT.terms, clock=lambda: 8.0, former=(first.terms,))
    assert later.checkpoint(1) == head


# --- Keys ---------------------------------------------------------------------------------------------------------------------


def test_a_new_key_that_is_lost_before_its_contract_is_replaced(tmp_path):
    """While the old one waits beside it: the silo was left without a usable key."""
    town = Town(tmp_path, *NAMES)
    first = town.sign()
    town.join(*NAMES)
    home = town.silo("b")
    old = keys.load(home.identity_path)
    town.rotate("b")
    home.identity_path.unlink()
    shown = town.rotate("b", lost=True)
    assert shown["old_key_signs"]
    assert keyring.under(home, first) == old
    assert town.rotate("b") == shown
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    second = town.sign()
    town.join(*NAMES)
    assert town.walked()[-1] == second
