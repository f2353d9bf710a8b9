# SPDX-License-Identifier: Apache-2.0
"""silo.keyring, silo.succession, aggregator.revision: keys that change, versions that follow, and a kill at every write."""

from __future__ import annotations

import functools
import json
import re

import pytest

from aggregator import enrolment, revision, versions
from aggregator.draft import entries
from aggregator.store import Store
from privacy import chain, files
from privacy.dp.ledger import History, Ledger
from privacy.errors import ConfigError, Equivocation, LedgerBroken, SiloquyError, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR
from silo import commands, key_commands, keyring, membership, succession
from silo.config import Limits
from silo.home import Home
from silo.session import Superseded, called
from tests import sessions
from tests.test_enrolment import TERMS, edit, with_terms
from tests.whole import NOW

LIMITS = Limits(epsilon=50.0, delta=1e-5)


class Killed(BaseException):
    """The process is gone at this write."""


class Line:
    """A transport over a store, that checks countersignatures only when they are opened."""

    def __init__(self, store):
        self.store = store

    def get(self, kind, number, party, *, wait_s):
        return self.store.get(kind, number, party)

    def put(self, kind, number, party, data):
        self.store.put_once(kind, number, party, data, received_at=1.0)


class Town:
    """An aggregator and silos by name, with real homes; ``joined`` countersigns what is newest."""

    def __init__(self, root, *names, terms=TERMS):
        self.root = root
        self.home, self.hub = enrolment.init(root / "hub", name="hub", organisation="Hub", terms=terms, host="127.0.0.1", port=0)
        self.store = Store(self.home.evidence_folder, self.home.database_url(self.home.config()))
        self.line = Line(self.store)
        for name in names:
            self.begin(name)
            enrolment.add_member(self.home, self.public(name))

    def begin(self, name):
        commands.create(
            self.root / name, name=name, organisation=f"{name} Hospital", url="http://127.0.0.1:1", fingerprint="",
            records=self.root / "none.jsonl", epsilon=50.0, delta=1e-5, model="",
        )  # fmt: skip

    def silo(self, name) -> Home:
        return Home(self.root / name)

    def public(self, name) -> bytes:
        return self.silo(name).public_path.read_bytes()

    def sign(self):
        return enrolment.sign_version(self.home, self.hub, self.store, now=5.0)

    def join(self, *names, fingerprint=None):
        for name in names:
            home = self.silo(name)
            pin = fingerprint or succession.kept_pin(home) or keys.fingerprint(self.hub.public.under(keys.ED25519))
            fetched = membership.fetch(self.line, pin, home=home)
            identity = keyring.under(home, fetched.newest)
            membership.countersign(
                home, self.line, identity, fetched.newest, limits=LIMITS, now=NOW, check_local=lambda accepted: None,
                fetched=fetched,
            )  # fmt: skip

    def rotate(self, name, **options):
        return key_commands.rotate(self.root / name, **{"lost": False, **options})

    def revise(self, **options):
        return revision.revise(self.home, self.hub, self.store, **options)

    def walked(self):
        found = []
        for number in range(1, self.store.latest("contract") + 1):
            parties = self.store.parties("countersignature", number)
            signed = {party: self.store.get("countersignature", number, party) for party in parties}
            found.append(chain.Version(document=self.store.get("contract", number, AGGREGATOR), countersignatures=signed))
        return chain.walk(found, pinned=keys.fingerprint(self.hub.public.under(keys.ED25519)))


NAMES = ("a", "b", "c", "d")


@pytest.fixture
def town(tmp_path):
    made = Town(tmp_path, *NAMES)
    made.sign()
    made.join(*NAMES)
    return made


def refused(code, action, *words):
    with pytest.raises(SiloquyError) as caught:
        action()
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message
    return caught.value


# --- Rotation -------------------------------------------------------------------------------------------------------------


def test_a_rotated_key_is_cross_signed_and_nobody_elses_changes(town):
    before = {name: town.silo(name).identity_path.read_bytes() for name in NAMES}
    old = keys.load(town.silo("b").identity_path)
    shown = town.rotate("b")
    assert shown["old_key_signs"]
    assert shown["fingerprint"] == keys.fingerprint(keys.load(town.silo("b").identity_path).public.under(keys.ED25519))
    assert town.rotate("b") == shown, "the same command again: the same key"
    assert keys.load(town.silo("b").old_identity_path) == old
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    text = town.home.draft_path.read_text()
    assert revision.replace(town.home, "b", town.public("b")).id == 2
    assert town.home.draft_path.read_text() == text
    second = town.sign()
    town.join(*NAMES)
    assert town.walked()[-1] == second
    assert {name: town.silo(name).identity_path.read_bytes() for name in NAMES if name != "b"} == {
        name: raw for name, raw in before.items() if name != "b"
    }
    first, _ = town.walked()
    assert keyring.under(town.silo("b"), first) == old
    assert keyring.under(town.silo("b"), second) != old
    assert keyring.retire(town.silo("b"), second)
    assert not keyring.retire(town.silo("b"), second)
    refused("not-a-member", lambda: keyring.under(town.silo("b"), first))


def test_a_lost_key_is_replaced_by_the_others(town):
    home = town.silo("b")
    refused("identity-file", lambda: town.rotate("b", lost=True), "--lost is for one that is gone")
    home.identity_path.unlink()
    refused("identity-file", lambda: town.rotate("b"), "missing")
    shown = town.rotate("b", lost=True)
    assert not shown["old_key_signs"]
    town.revise()
    revision.replace(town.home, "b", town.public("b"))
    second = town.sign()
    fetched = membership.fetch(town.line, succession.kept_pin(town.silo("a")), home=town.silo("a"))
    assert "was lost or taken" in "\n".join(succession.in_words(fetched))
    town.join(*NAMES)
    assert town.walked()[-1] == second
    # Its ledger, begun under the lost key, is still its own.
    with Ledger.open(
        home.ledger_path, sign=keyring.signer(home, second).sign, verify=keyring.verifier(home), clock=lambda: 1.0
    ) as ledger:
        ledger.void(contract="00" * 32, round_number=1, reason="a line under the new key")
    assert History.read(home.ledger_path, verify=keyring.verifier(home)).counter == 2


def test_a_ledger_never_goes_back_to_a_former_key(town):
    home = town.silo("b")
    old = keys.load(home.identity_path)
    town.rotate("b")
    new = keys.load(home.identity_path)
    for signer in (old, new):
        with Ledger.open(home.ledger_path, sign=signer.sign, verify=keyring.verifier(home), clock=lambda: 1.0) as ledger:
            ledger.void(contract="00" * 32, round_number=1, reason="x")
    with (
        Ledger.open(home.ledger_path, sign=old.sign, verify=keyring.verifier(home), clock=lambda: 1.0) as ledger,
        pytest.raises(LedgerBroken),
    ):
        ledger.void(contract="00" * 32, round_number=1, reason="by the former key, after the new one")


@pytest.mark.parametrize("lost", [False, True])
def test_rotate_goes_on_after_a_kill_at_any_write(town, monkeypatch, lost):
    """Before and after every write of the command; the second run ends with one new key, whose file was the first one written."""
    original = {name: getattr(files, name) for name in ("write_once", "write_atomic")}
    home, place, seen = town.silo("b"), 0, set()
    old_public = keys.read_public(home.public_path.read_bytes()).verify_key
    if lost:
        home.identity_path.unlink()
    before = {path.name: path.read_bytes() for path in home.root.iterdir() if path.is_file()}
    while True:
        for after in (False, True):
            count = [0]

            def write(name, path, data, count=count, after=after, place=place, **options):
                count[0] += 1
                if count[0] == place + 1 and not after:
                    raise Killed
                original[name](path, data, **options)
                if count[0] == place + 1:
                    seen.add(path.name)
                    raise Killed

            for name in original:
                monkeypatch.setattr(files, name, functools.partial(write, name))
            try:
                town.rotate("b", lost=lost)
                is_over = True
            except Killed:
                is_over = False
            for name, function in original.items():
                monkeypatch.setattr(files, name, function)
            waiting = keys.load(home.new_identity_path) if home.new_identity_path.exists() else None
            if not is_over:
                town.rotate("b", lost=lost)
            made = keys.load(home.identity_path)
            assert waiting in (None, made)
            assert home.old_identity_path.exists() is not lost
            assert keys.read_public(home.public_path.read_bytes()).verify_key == made.public.verify_key
            assert [keys.read_public(path.read_bytes()).verify_key for path in home.former_folder.iterdir()] == [old_public]
            assert not home.new_identity_path.exists()
            History.read(home.ledger_path, verify=keyring.verifier(home))
            for path in [*home.former_folder.iterdir(), *(p for p in home.root.iterdir() if p.is_file())]:
                path.unlink()
            for name, raw in before.items():
                (home.root / name).write_bytes(raw)
                (home.root / name).chmod(0o600)
        if is_over:
            break
        place += 1
    assert {"identity.key.new", "1.pub", "identity.key", "identity.pub"} | (set() if lost else {"identity.key.old"}) == seen


def test_show_names_files_suites_and_fingerprints_and_no_secret(town, capsys):
    town.rotate("b")
    shown = sessions.Terminal(capsys)("silo keys show --json --home", town.root / "b")
    facts = shown.document
    assert [each["file"] for each in facts["keys"]] == ["identity.key", "identity.key.old"]
    assert [each["state"] for each in facts["keys"]] == ["not in the contract in force", "member 2 of contract version 1"]
    assert all(each["suites"] == ["ed25519", "ed25519+ml-dsa-65"] for each in facts["keys"])
    assert len({each["fingerprint_ml_dsa"] for each in facts["keys"]}) == 2
    text = sessions.Terminal(capsys)("silo keys show --home", town.root / "b")
    assert text.code == 0
    seeds = [seed for path in town.silo("b").root.glob("identity.key*") for seed in sessions.private_seeds_of(path)]
    assert len(seeds) == 4
    assert not sessions.mentions((shown.out + text.out + text.err).encode(), seeds)


# --- Versions -------------------------------------------------------------------------------------------------------------


def test_a_silo_signs_one_successor_of_a_version(town):
    town.revise(rounds=6)
    town.sign()
    fetched = membership.fetch(town.line, succession.kept_pin(town.silo("a")), home=town.silo("a"))
    succession.keep(town.silo("a"), fetched)
    promise = town.silo("a").root / "promises" / "successor-1"
    assert promise.read_text().strip() == fetched.newest.digest.hex(), "on the disk before the signature"
    error = refused("equivocation", lambda: town.silo("a").promise_successor(1, b"\1" * 32), "second successor for version 1")
    assert isinstance(error, Equivocation)
    promise.write_text("11" * 32 + "\n")
    refused("equivocation", lambda: town.join("a"), "second successor")
    assert town.store.get("countersignature", 2, 1) is None


def test_another_chain_than_the_joined_one_is_refused(town, tmp_path):
    elsewhere = Town(tmp_path / "elsewhere", *NAMES)
    elsewhere.sign()
    pin = keys.fingerprint(elsewhere.hub.public.under(keys.ED25519))
    refused("contract-changed", lambda: membership.fetch(elsewhere.line, pin, home=town.silo("a")))
    refused("fingerprint", lambda: membership.fetch(elsewhere.line, succession.kept_pin(town.silo("a"))))


def test_a_version_follows_only_one_that_all_signed(tmp_path):
    town = Town(tmp_path, *NAMES)
    refused("no-contract", town.revise)
    town.sign()
    town.join("a", "b", "c")
    refused("not-countersigned", town.revise, "d")
    town.join("d")
    newest, version = town.revise(expires="2098-01-01")
    assert (newest.terms.version, version) == (1, 2)
    assert town.revise(expires="2098-01-01")[1] == 2, "the same command again"
    refused("draft-exists", lambda: town.revise(expires="2097-01-01"))
    edit(town.home, 'name = "oncology"', 'name = "cardiology"')
    refused("chain-fixed", town.sign)
    assert versions.published(town.store, 2) is None


def test_the_standing_version_is_the_newest_that_all_signed(town):
    first = versions.standing(town.store)
    town.revise(rounds=6)
    second = town.sign()
    assert versions.newest(town.store) == second
    assert versions.standing(town.store) == versions.in_force(town.store) == first
    town.join("a", "b", "c")
    assert versions.standing(town.store) == first
    assert succession.at_work(town.silo("a"), town.line)[0] == first, "a silo keeps version 1 until everybody signed"
    town.join("d")
    assert versions.standing(town.store) == versions.in_force(town.store) == second
    assert succession.at_work(town.silo("a"), town.line)[0] == second


def test_an_epoch_under_a_contract_that_was_not_countersigned_is_named(town):
    accepted, *_ = succession.at_work(town.silo("a"))
    from privacy import envelope
    from privacy.messages import EpochCall, encode

    body = encode(EpochCall(contract=b"\2" * 32, epoch=1))
    call = envelope.sign(town.hub, type="epoch", context=b"\2" * 32, sender=AGGREGATOR, body=body)
    town.store.put_once("epoch", 1, AGGREGATOR, call, received_at=1.0)
    for action in (lambda: called(town.line, accepted, after=0), lambda: succession.at_work(town.silo("a"), town.line)):
        error = refused("contract-superseded", action, "0202")
        assert isinstance(error, Superseded)
        assert "silo join" in error.hint
    assert called(town.line, accepted, after=0, former={b"\2" * 32}) is None


def test_a_member_leaves_comes_back_with_its_id_and_a_stranger_gets_a_new_one(town):
    town.revise()
    assert revision.remove(town.home, "d").id == 4
    refused("no-such-member", lambda: revision.remove(town.home, "d"), "called d")
    town.begin("e")
    assert enrolment.add_member(town.home, town.public("e")).id == 5
    second = town.sign()
    assert [member.id for member in second.terms.member] == [1, 2, 3, 5]
    town.join("a", "b", "c", "e")
    town.revise()
    assert enrolment.add_member(town.home, town.public("d")).id == 4
    names = [name for *_, name in entries(town.home.draft_path.read_text())]
    assert names == ["a", "b", "c", "e", "d"]


@pytest.mark.parametrize("name", ["c", "stranger"])
def test_a_key_is_replaced_under_its_own_name_alone(town, name):
    town.revise()
    if name == "stranger":
        town.begin(name)
    refused("other-member", lambda: revision.replace(town.home, "b", town.public(name)), "cannot replace b (b Hospital)")
    refused("no-such-member", lambda: revision.replace(town.home, "nobody", town.public("b")))
    with pytest.raises(TrustError):
        revision.replace(town.home, "b", town.public("b").replace(b"Hospital", b"Hospice"))
    stolen = keys.Identity(name="b", sign_seed=keys.load(town.silo("c").identity_path).sign_seed)
    keys.write_public(town.root / "stolen.pub", stolen, "b Hospital")
    refused("duplicate-member", lambda: revision.replace(town.home, "b", (town.root / "stolen.pub").read_bytes()), "as c")


def test_a_federation_goes_over_to_both_signatures(town):
    town.revise(signatures=keys.HYBRID)
    with pytest.raises(ConfigError):
        town.sign()  # the members' second keys are not in the draft yet
    for name in NAMES:
        revision.replace(town.home, name, town.public(name))
    second = town.sign()
    assert second.terms.signatures == keys.HYBRID
    assert len(second.terms.aggregator.verify_key) == 1984
    town.join(*NAMES)
    assert town.walked()[-1] == second


def test_with_the_second_suite_the_fingerprint_is_of_both_keys(tmp_path):
    town = Town(tmp_path, *NAMES, terms=with_terms(signatures=keys.HYBRID))
    town.sign()
    plain, both = (keys.fingerprint(town.hub.public.under(suite)) for suite in (keys.ED25519, keys.HYBRID))
    refused("fingerprint", lambda: town.join("a", fingerprint=plain))
    town.join("a", fingerprint=both)


def test_the_draft_of_a_version_recalibrates_only_what_was_calibrated(town, tmp_path):
    town.revise()
    text = town.home.draft_path.read_text()
    assert 'noise_multiplier = "calibrate"' in text
    assert 'lattice_bits = "auto"' in text
    stated = Town(tmp_path / "stated", *NAMES, terms=with_terms(noise_multiplier=9.0))
    stated.sign()
    stated.join(*NAMES)
    stated.revise()
    assert re.search(r"(?m)^noise_multiplier = 9\.0$", stated.home.draft_path.read_text())


def test_the_commands_say_what_they_did(town, capsys):
    terminal = sessions.Terminal(capsys)
    begun = terminal("aggregator revise --rounds 9 --json --home", town.home.root)
    assert begun.document["version"] == 2
    town.rotate("b")
    changed = terminal("aggregator member --replace b --json", town.silo("b").public_path, "--home", town.home.root)
    assert changed.document["member"] == 2
    gone = terminal("aggregator member --remove d --home", town.home.root)
    assert "member 4: d (d Hospital) leaves" in gone.out
    for words in ("aggregator member", "aggregator member --remove d x.pub", "aggregator member --remove d --replace c x.pub"):
        assert terminal(words).code == 2
    assert json.loads(terminal("silo keys rotate --json --home", town.root / "b").out)["name"] == "b"
