# SPDX-License-Identifier: Apache-2.0
"""What a hostile reading of log, chain, keys and verification found: a test for each defect; it failed before."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from aggregator import admission, commands, revision
from aggregator.journal import Journal
from privacy import federation, folder
from privacy.audit import check_budget, check_epoch
from privacy.audit.check_log import check_log
from privacy.audit.check_round import RoundFacts
from privacy.audit.findings import Findings, Slot
from privacy.chain import Lineage
from privacy.dp import accounting
from privacy.dp.budget import Limits
from privacy.errors import ConfigError, TrustError
from privacy.federation import parse
from privacy.identity import keys
from privacy.identity.keys import Identity
from privacy.messages import AGGREGATOR
from privacy.transparency import log, notes
from silo import keyring
from silo import verify as silo_verify
from silo.folder import FolderTransport
from silo.home import Home
from silo.watch import Watch
from tests import sample_report
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


def test_a_cosignature_from_before_a_version_is_admitted_under_it(tmp_path):
    """A silo sends what it wrote down, never another one: when it arrives late it must be taken, or the silo stops for ever."""
    town = Town(tmp_path, *NAMES)
    first = town.sign()
    town.join(*NAMES)
    old = keys.load(town.silo("b").identity_path)
    head = notes.Checkpoint(origin=log.origin(first.terms), size=1, root=bytes(32))
    shown = notes.signed(head.text, name=head.origin, seed=town.hub.sign_seed).to_bytes()
    town.store.put_once("checkpoint", 3, AGGREGATOR, shown, received_at=1.0)
    name = log.cosigner_name(first.terms, first.terms.by_id(2))
    late = notes.cosigned(head.text, name=name, seed=old.sign_seed, time=5).to_bytes()
    admission.admit("cosignature", 3, 2, late, town.store)
    town.rotate("b")
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    town.sign()
    town.join(*NAMES)
    admission.admit("cosignature", 3, 2, late, town.store)
    with pytest.raises(TrustError):
        admission.admit("cosignature", 3, 1, late, town.store)


FIRST = federation.parse(contract_bytes(3))
NEXT = federation.parse(contract_bytes(3, aggregator_key=public(101), version=2, previous=FIRST.digest.hex()))
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


# --- Verification --------------------------------------------------------------------------------------------------------------


class Shelf:
    """Documents in memory as a source of an audit."""

    def __init__(self, documents):
        self.documents = documents

    def get(self, kind, number, party):
        return self.documents.get((kind, number, party))

    def has(self, kind, number, party):
        return (kind, number, party) in self.documents

    def latest(self, kind):
        return max((number for each, number, _ in self.documents if each == kind), default=0)

    def digest(self, kind, number, party):
        return None

    def file(self, kind, number, party):
        return ""


def heads_of(first, then, *signers, opened=True):
    """What check_log says of the head of round 1, opened under ``first``, now that ``then`` is in force."""
    keeper = Keeper(leaf("roster", 1, 0, b"roster"))
    keeper.show(1)
    shown = keeper.documents["checkpoint", 1, 0]
    for silo in signers:
        made = notes.cosigned(notes.parse(shown).text, name=f"test-federation/silo-{silo}", seed=seed(silo), time=3)
        keeper.documents["cosignature", 1, silo] = made.to_bytes()
    keeper.cosigned(1, *signers)
    found = Findings(Shelf(keeper.documents))
    rounds = [RoundFacts(number=1, how="void", charged=(), stood=(), accepted=first)] if opened else []

    def fetch(path):
        return shown if path == "checkpoint" else keeper.fetch(path)

    check_log(found, {first.digest: first, then.digest: then}, rounds, fetch=fetch)
    return {(check.kind, check.party) for check in found.checks if check.status == "failed" and check.kind != "contract"} - {
        ("roster", 0)
    }  # fmt: skip


def test_heads_are_held_to_the_version_of_their_round():
    """After a rotation every earlier head of an honest federation failed: silo 2 had cosigned it with the key it had then."""
    first = parse(contract_bytes(4))
    signers = [public(1), public(22), public(3), public(4)]
    rotated = parse(contract_bytes(4, sign_keys=signers, version=2, previous=first.digest.hex()))
    assert heads_of(first, rotated, 1, 2, 3, 4) == set()
    assert heads_of(first, rotated, 1, 2, 3, 4, opened=False) == set(), "the last head before the new version's first round"
    smaller = parse(contract_bytes(3, version=2, previous=first.digest.hex()))
    assert heads_of(first, smaller, 1, 2, 3, 4) == set()
    assert heads_of(first, smaller, 1, 2, 3) == {("head", 0)}, "three of four are no quorum, whatever a later version says"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A federation after two rounds, whose aggregator kept the freezes out of the log."""
    whole = Whole.create(tmp_path_factory.mktemp("review") / "whole")
    keys.write_public(whole.home.public_path, whole.identity, "Hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "UNLOGGED", log.UNLOGGED | {"freeze"})
        whole.run(2)
    whole.close()
    return whole


def test_a_document_that_was_kept_out_of_the_log_is_named(finished):
    found = silo_verify.verify(finished.root / "none", folder=finished.home.root, fingerprint=finished.accepted.digest.hex())
    assert {check.slot for check in found.failed if check.what == "leaf"} == {Slot("freeze", 1, 0), Slot("freeze", 2, 0)}


def test_a_silo_with_a_new_key_still_checks_its_own_ledger(finished, tmp_path):
    """Between rotation and new contract the new key stands in no contract: the silo's own checks were left out."""
    home = Home(finished.copied(tmp_path / "whole").root / "silo-1")
    keys.write_public(home.public_path, keys.load(home.identity_path), "Hospital 1")
    keyring.rotate(home, organisation="Hospital 1")
    found = silo_verify.verify(home.root, folder=tmp_path / "whole" / "aggregator")
    asked = {(check.kind, check.number, check.party, check.status) for check in found.checks}
    assert {("ledger", 0, 1, "ok"), ("ledger", 1, 1, "ok"), ("ledger", 2, 1, "ok"), ("state", 2, 1, "ok")} <= asked


def test_a_fingerprint_does_not_unbind_a_silo_from_its_contract(finished, tmp_path):
    town = Town(tmp_path, *NAMES)
    town.sign()
    town.join(*NAMES)
    whose = keys.fingerprint(check_epoch.aggregator_of(finished.accepted.terms))
    found = silo_verify.verify(town.silo("a").root, folder=finished.home.root, fingerprint=whose)
    assert "joined" in {check.what for check in found.failed}


# --- Epsilon --------------------------------------------------------------------------------------------------------------------


def test_epsilon_over_two_versions_is_the_filters():
    """The later terms may have been chosen after the first results: a composition of fixed mechanisms understates."""
    first = parse(contract_bytes(3))
    second = parse(contract_bytes(3, version=2, previous=first.digest.hex(), privacy={"noise_multiplier": 3.0}))
    facts = [RoundFacts(number=n, how="void", charged=(1,), stood=(), accepted=each) for n, each in ((1, first), (2, second))]
    one, both = check_budget.spent(facts)
    events = [federation.mechanism(each.terms, rounds=1) for each in (first, second)]
    delta = first.terms.privacy.delta
    assert one.insiders == accounting.certify(events[:1], delta).epsilon
    order = Limits(epsilon=first.terms.privacy.epsilon, delta=delta).filter_order
    assert both.insiders == accounting.certify_adaptive(events, delta, order=order).epsilon
    assert both.insiders > accounting.certify(events, delta).epsilon


def test_no_report_states_one_versions_noise_for_anothers_rounds():
    first = parse(contract_bytes(3))
    second = parse(contract_bytes(3, version=2, previous=first.digest.hex(), privacy={"noise_multiplier": 3.0}))
    one, two = sample_report.run(2)
    made = sample_report.make(second, (one, msgspec.structs.replace(two, version=2)), earlier=(first,))
    delta = first.terms.privacy.delta
    events = [federation.mechanism(each.terms, rounds=1) for each in (first, second)]
    order = Limits(epsilon=first.terms.privacy.epsilon, delta=delta).filter_order
    assert made.accounting.spent.epsilon == accounting.certify_adaptive(events, delta, order=order).epsilon
    with pytest.raises(ConfigError, match="round 1 stands under version 1"):
        sample_report.make(second, (one, two))


def test_a_report_is_signed_in_the_contracts_suite(tmp_path):
    """Its length chose the suite: half a signature passed where the contract asks for both."""
    whole = Whole.create(tmp_path / "whole", signatures=keys.HYBRID)
    record, _ = commands.write_report(whole.home.root, tmp_path / "report", sample_report.sample())
    data, signature = record.read_bytes(), record.with_name("report.json.sig").read_bytes()
    check_budget._check_signature(data, signature, whole.accepted)
    with pytest.raises(TrustError):
        check_budget._check_signature(data, signature[:128], whole.accepted)
    whole.close()


FIGURES = {
    "guarantee": {"adversaries": [{"name": name, "spent": {"epsilon": 2.0}} for name in check_budget.ADVERSARIES]},
    "accounting": {"spent": {"epsilon": 2.0}},
    "silos": [{"spent": {"epsilon": 2.0}}, {"spent": {"epsilon": 1.0}}],
}


def failing(**changes):
    """The questions about epsilon that fail on a report with these tables, of a federation that spent 2."""
    accepted = parse(contract_bytes(3))
    found = Findings(Shelf({}))
    figures = [check_budget.Spent(round=1, rounds_charged=1, delta=1e-5, outside=2.0, insiders=2.0, sum_broken=2.0)]
    record = msgspec.json.encode({**FIGURES, **changes})
    check_budget.compare_report(found, record, None, accepted=accepted, figures=figures, rounds=[])
    return {check.what for check in found.checks if check.status == "failed" and check.what.startswith("epsilon")}


def test_every_epsilon_of_a_silo_is_held_to_what_was_spent():
    assert failing() == set()
    assert failing(accounting={"spent": {"epsilon": 0.5}}) == {"epsilon insiders"}
    assert failing(silos=[{"spent": {"epsilon": 0.5}}]) == {"epsilon insiders"}
    assert failing(silos=[*FIGURES["silos"], {"spent": {}}]) == {"epsilon insiders"}
    rows = FIGURES["guarantee"]["adversaries"]
    twice = {"adversaries": [{"name": "insiders", "spent": {"epsilon": 0.1}}, *rows]}
    assert failing(guarantee=twice) == {f"epsilon {name}" for name in check_budget.ADVERSARIES}
    for odd in (10**19, True, "2", None, [2.0]):
        changed = [{"name": row["name"], "spent": {"epsilon": odd}} for row in rows]
        assert len(failing(guarantee={"adversaries": changed})) == 3
    with pytest.raises(TrustError):
        check_budget._check_figure(10**400, "insiders", 1.0)


# --- Files ---------------------------------------------------------------------------------------------------------------------


def test_a_head_is_shown_after_a_kill_before_it_was(tmp_path, monkeypatch):
    """Until the quorum stood, the tiles showed the head before it, and every verification of an honest home failed."""
    place = Place(tmp_path)
    place.put(3)
    place.journal.checkpoint(1)
    place.put(4)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_show", lambda self, note: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            place.journal.checkpoint(2)
    head = place.opened().journal.checkpoint(2)
    shown = tmp_path / "log/checkpoint"
    assert notes.checkpoint(notes.parse(shown.read_bytes()).text) == head
    place.cosign(2, 1, 2, 3)
    place.journal.head(2)
    cosigned = shown.read_bytes()
    place.opened().journal.checkpoint(2)
    assert shown.read_bytes() == cosigned, "no signature is lost by showing it again"


def test_a_sparse_file_on_a_shared_board_is_not_read(tmp_path, monkeypatch):
    name = f"00000000-contract-1-0-{'00' * 32}"
    (tmp_path / "board/00000").mkdir(parents=True)
    with (tmp_path / "board/00000" / name).open("wb") as stream:
        stream.truncate(1 << 40)
    monkeypatch.setattr(folder, "_chunks", lambda *_: pytest.fail("a file of a tebibyte was opened"))
    assert FolderTransport(tmp_path, patience_s=0.1).get("contract", 1, AGGREGATOR, wait_s=0) is None
    assert not folder.is_whole(tmp_path, "board", "00000", name, digest=bytes(32), most=1 << 20)
