# SPDX-License-Identifier: Apache-2.0
"""What a hostile reading of share mode found: each of these failed before it was mended."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging

import httpx2
import msgspec
import pytest

from privacy import federation
from privacy.envelope import sign
from privacy.errors import ConfigError, TrustError
from privacy.federation import GUARDIANS_FROM
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Listing, Manifest, PairSeeds, Roster, encode
from privacy.secure_sum import choice, epoch, shares
from privacy.transparency import log, notes
from privacy.transparency.notes import Checkpoint
from silo.guardians.guardian import Guardian
from silo.guardians.guardian_round import Epoch as Working
from silo.home import Home
from silo.session import Epoch
from silo.transport import MOST_BYTES, HttpTransport
from tests.sharing import share_terms
from tests.terms import contract_bytes, public, seed
from tests.test_epoch import make_party
from tests.test_guardian import FIVE, OTHER, works
from tests.test_guardian import SHARES as OF_NOTARIES
from tests.test_share_mode import FOUR
from tests.test_share_mode import SHARES as OF_SILOS
from tests.whole import Whole, together


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    for name in ("silo.round.POLL_S", "silo.participation.POLL_S", "silo.guardians.guarding.POLL_S", "silo.session.POLL_S"):
        monkeypatch.setattr(name, 0.05)


def deals_rubbish_to(monkeypatch, silo, *guardians):
    """This silo seals what is meant for these guardians to nobody."""
    honest, nobody = shares.deal, keys.seal_public_key(b"n" * 32)

    def deal(**given):
        if given["silo"] == silo:
            given["guardian_keys"] = {g: nobody if g in guardians else key for g, key in given["guardian_keys"].items()}
        return honest(**given)

    monkeypatch.setattr(shares, "deal", deal)


def test_a_guardian_is_sent_uploads_of_every_size_that_a_contract_allows():
    """d = 5 million words are 20 MB; a folder carried them, HTTP refused them and the guardian ended."""
    body = bytes(4 * 5_000_000)
    assert len(body) > MOST_BYTES
    line = HttpTransport("http://127.0.0.1:1", carrier=httpx2.MockTransport(lambda _: httpx2.Response(200, content=body)))
    assert line.get("upload", 1, 1, wait_s=0.0) == body


def test_a_corrupt_silo_and_a_dead_guardian_do_not_void_the_round(tmp_path, monkeypatch):
    """One silo deals rubbish to two of five guardians and one guardian is dead: the others' set comes in time to be signed."""
    terms = {"protocol": "shares", "dropouts": 2, "corrupt_guardians": 2, "deadline_s": 4}
    whole = Whole.create(tmp_path / "federation", silos=FIVE, notaries=5, sum=terms)
    for each in FIVE:
        Home(whole.root / f"notary-{each}").keep_contract(1, whole.store.get("contract", 1, AGGREGATOR))
    deals_rubbish_to(monkeypatch, 5, GUARDIANS_FROM + 1, GUARDIANS_FROM + 2)
    jobs = [functools.partial(whole.take_part, silo, 1) for silo in FIVE]
    jobs += [functools.partial(works, whole, each, 1) for each in (1, 2, 3, 4)]
    *_, closed = together(*jobs, functools.partial(whole.coordinate, 1))
    assert [(c.kind, c.reason) for c in closed] == [("result", "")]
    assert {whole.progress(s).stood for s in (1, 2, 3, 4)} == {4}
    manifest, frozen = (whole.store.entry(kind, 1, AGGREGATOR).received_at for kind in ("manifest", "freeze"))
    assert frozen - manifest <= 7, "guardians close at 8"


def test_silos_whose_common_keys_differ_are_named_when_too_few_are_left(tmp_path, monkeypatch):
    """Both fall out, too few silos stand: the round is void, and the operator must learn whom to ask."""
    whole = Whole.create(tmp_path / "federation", silos=FOUR, sum=OF_SILOS)
    honest = Epoch.round_keys

    def other_keys(self, ctx, *, after):
        found = honest(self, ctx, after=after)
        return {**found, 1: b"x" * 32} if "silo-4" in str(self.folder) else found

    monkeypatch.setattr(Epoch, "round_keys", other_keys)
    with pytest.raises(TrustError, match="1 and 4") as caught:
        whole.run_hurried(1, *(functools.partial(whole.take_part, silo, 1) for silo in FOUR), silent=0)
    assert caught.value.code == "pairs-disagree"


def test_a_pair_seed_that_does_not_open_names_its_silo():
    accepted = federation.parse(contract_bytes(3))
    parties = {i: make_party(i, accepted) for i in (1, 2, 3)}
    roster = Roster(contract=accepted.digest, epoch=1, notes=tuple(p.note for p in parties.values()))
    notes, context = epoch.check_roster(roster, accepted), epoch.epoch_ctx(accepted.digest, 1, encode(roster))
    sent = {}
    for i, party in parties.items():
        made = epoch.seal_seeds(party.secrets, notes, context=context)
        if i == 2:
            made = PairSeeds(epoch=1, silo=2, sealed=tuple((j, sealed[::-1]) for j, sealed in made.sealed))
        sent[i] = sign(party.identity, type="pair-seeds", context=context, sender=i, body=encode(made))
    with pytest.raises(TrustError, match="the pair seed of silo 2 does not open"):
        epoch.pair_secrets(parties[1].secrets, notes, sent, accepted=accepted, context=context)


def test_a_guardian_that_lies_is_named_to_the_operator(tmp_path, monkeypatch, caplog):
    """Its shares are left aside, the others' do; who it was must be said to a person."""
    whole, honest, liar = Whole.create(tmp_path / "federation", silos=FOUR, sum=OF_SILOS), shares.release, GUARDIANS_FROM + 1

    def release(certified, received, *, guardian, seal_key):
        if guardian == liar:
            received = {i: dataclasses.replace(each, shares=each.shares ^ 1) for i, each in received.items()}
        return honest(certified, received, guardian=guardian, seal_key=seal_key)

    monkeypatch.setattr(shares, "release", release)
    lines = {silo: whole.line() for silo in (2, 3, 4)}
    for line in lines.values():

        def after_the_liar(kind, number, party, data, put=line.put):
            if kind == "shares":
                whole.wait_for("shares", 1, liar)
            put(kind, number, party, data)

        line.put = after_the_liar
    with caplog.at_level(logging.WARNING, logger="aggregator.shares"):
        closed = whole.run_hurried(1, *(functools.partial(whole.take_part, s, 1, line=lines.get(s)) for s in FOUR), silent=0)
    assert [c.kind for c in closed] == ["result"]
    assert f"round 1: the shares of guardian {liar} contradict the root of silo" in caplog.text


def test_a_silo_left_out_of_an_epoch_comes_back_though_its_note_was_early(tmp_path):
    """Its pair seeds are lost once; it posts its note for the next call before that roster is made without it."""
    whole = Whole.create(tmp_path / "federation", silos=FOUR, sum=OF_SILOS)
    lines = {4: whole.line(), 3: whole.line()}
    put4, put3 = lines[4].put, lines[3].put

    def loses(kind, number, party, data):
        if (kind, number) != ("pair-seeds", 1):
            put4(kind, number, party, data)

    def waits(kind, number, party, data):
        if (kind, number) == ("epoch-note", 2):
            whole.wait_for("epoch-note", 2, 4)
        put3(kind, number, party, data)

    lines[4].put, lines[3].put = loses, waits
    settled = {}

    def lives(silo):
        settled[silo] = whole.take_part(silo, 3, line=lines.get(silo))

    whole.run_hurried(3, *(functools.partial(lives, silo) for silo in FOUR))
    assert settled[4][-1].stood == 4, [each.stood for each in settled[4]]


@pytest.mark.parametrize(("dropouts", "colluders", "why"), [(2, 1, "silos that are guardians drop out"), (1, 2, "collude as both")])
def test_a_guardian_of_a_silos_organisation_is_one_party_with_it_whatever_its_keys(dropouts, colluders, why):
    """T below t_c, or t_d above what guardians can spare: with a second pair of keys in the same house it was accepted."""
    apart = share_terms(6, 5, corrupt=1, dropouts=dropouts, privacy={"colluders": colluders})
    federation.parse(apart)
    with pytest.raises(ConfigError, match=why):
        federation.parse(apart.replace(b'"Notary 2"', b'"Hospital 2"'))


@pytest.mark.parametrize("spoilt", ["seeds", "tags"])
def test_a_silo_that_spoils_an_epochs_set_up_ends_nobodys_process(tmp_path, monkeypatch, spoilt):
    """Silo 5 spoils what it shares with silo 1. Nobody can tell who of the two lies; the other silos go on, and silo 1 waits."""
    whole = Whole.create(tmp_path / "federation", silos=FIVE, notaries=5, sum=OF_NOTARIES)
    for each in FIVE:
        Home(whole.root / f"notary-{each}").keep_contract(1, whole.store.get("contract", 1, AGGREGATOR))
    seal, confirm = epoch.seal_seeds, epoch.confirmation

    def seal_seeds(secrets, notes, **given):
        made = seal(secrets, notes, **given)
        turned = tuple((j, sealed[::-1] if (spoilt, secrets.silo, j) == ("seeds", 5, 1) else sealed) for j, sealed in made.sealed)
        return msgspec.structs.replace(made, sealed=turned)

    def confirmation(secrets, pairs):
        bent = {j: b"x" * 32 if (spoilt, secrets.silo, j) == ("tags", 5, 1) else secret for j, secret in pairs.items()}
        return confirm(secrets, bent)

    monkeypatch.setattr(epoch, "seal_seeds", seal_seeds)
    monkeypatch.setattr(epoch, "confirmation", confirmation)
    settled = {}

    def lives(silo):
        settled[silo] = whole.take_part(silo, 1)

    jobs = [functools.partial(lives, silo) for silo in FIVE] + [functools.partial(works, whole, each, 1) for each in FIVE]
    closed = whole.run_hurried(1, *jobs, silent=2)
    assert [c.kind for c in closed] == ["result"]
    assert {settled[silo][-1].stood > 0 for silo in (2, 3, 4)} == {True}
    assert settled[1][-1].stood == 0
    assert settled[1][-1].state.digest == closed[-1].state


def test_many_different_lists_of_a_large_federation_give_a_large_set_at_once():
    """Guardians are dropped with all who hold the same list: one by one no silo came back, and 200 took 25 s a look."""
    terms = federation.parse(share_terms(30, 30, corrupt=9, dropouts=9, privacy={"units": 50})).terms
    every = [(silo, bytes([silo]) * 32) for silo in range(1, 31)]
    lists = {}
    for at, guardian in enumerate(terms.guardian):
        seen = tuple(each for each in every if each[0] != at % 13 + 1)
        lists[guardian.id] = (b"", Listing(round_ctx=OTHER, guardian=guardian.id, headers=seen, disputes=()))
    asked = []

    def outcome(guardians):
        asked.append(guardians)
        return choice.select([], choice.agreed([lists[each][1] for each in guardians]), terms)

    (chosen,) = choice._candidates(lists, terms.quorum, outcome)
    assert len(chosen) == len(set(chosen)) == terms.quorum == 20
    assert len(outcome(chosen)) == 22
    assert len(asked) < 100


class Documents(dict):
    """A board that shows these documents."""

    def get(self, kind, number, party, *, wait_s):
        return super().get((kind, number, party))


def test_a_guardian_goes_on_where_the_aggregator_and_guardians_have_new_keys(tmp_path):
    """The head of the first round under a version was signed, and cosigned, by the keys of the one before; so was the outcome."""
    first = federation.parse(share_terms(aggregator_key=public(100)))
    renewed = share_terms(aggregator_key=public(101), version=2, previous=first.digest.hex())
    for index in (1, 2):
        renewed = renewed.replace(public(225 + index).encode(), public(240 + index).encode())
    second, home = federation.parse(renewed), Home.create(tmp_path / "home")
    for accepted, hub in ((first, seed(100)), (second, seed(101))):
        signer = keys.Identity(name="hub", sign_seed=hub, receive_seed=None)
        raw = sign(signer, type="contract", context=accepted.digest, sender=AGGREGATOR, body=accepted.raw)
        home.keep_contract(accepted.terms.version, raw)
    old = keys.Identity(name="hub", sign_seed=seed(100), receive_seed=None)
    board, earlier = Documents(), b"e" * 32
    board["outcome", 1, AGGREGATOR] = sign(old, type="outcome", context=earlier, sender=AGGREGATOR, body=b"how it ended")
    board["manifest", 1, AGGREGATOR] = sign(old, type="manifest", context=earlier, sender=AGGREGATOR, body=encode(a_manifest(1)))
    board["epoch", 1, AGGREGATOR] = sign(old, type="epoch", context=first.digest, sender=AGGREGATOR, body=b"")
    board["epoch", 2, AGGREGATOR] = sign(old, type="epoch", context=second.digest, sender=AGGREGATOR, body=b"")
    text = Checkpoint(origin=log.origin(first.terms), size=7, root=b"r" * 32).text
    note = notes.signed(text, name=log.origin(first.terms), seed=seed(100))
    lines = [
        notes.cosigned(text, name=log.cosigner_name(first.terms, each), seed=seed(225 + index), time=1)
        for index, each in enumerate(first.terms.guardian, start=1)
    ]
    board["head", 2, AGGREGATOR] = notes.joined(note, lines[:4]).to_bytes()
    guardian = Guardian(
        home=home, transport=board, identity=keys.Identity(name="guard-4", sign_seed=seed(229), receive_seed=None), accepted=second,
        party=second.terms.guardian[3], clock=lambda: 0.0, former={first.digest: first},
    )  # fmt: skip
    guardian._number = 2
    at = Working(number=2, context=b"c" * 32, silos=(1, 2, 3), secrets=epoch.new_guardian_note(second.digest, 2, 32772)[0])
    stated = a_manifest(2, epoch=2, previous=hashlib.sha256(b"how it ended").digest(), log_size=7, log_root=b"r" * 32)
    guardian._check_manifest(stated, at)

    later = Documents(board)
    later["manifest", 1, AGGREGATOR] = sign(old, type="manifest", context=earlier, sender=0, body=encode(a_manifest(1, epoch=2)))
    guardian._post.transport.update(later)
    with pytest.raises(TrustError, match="did not sign"):  # no longer the first: only the keys in force count
        guardian._check_manifest(stated, at)


def a_manifest(number, **changes):
    given = {
        "epoch_ctx": b"c" * 32, "epoch": 1, "round": number, "previous": bytes(32), "base_state": bytes(32), "dimension": 1,
        "ring_bits": 32, "lattice_bits": 1, "clamp": 1, "opened_at": 100, "deadline_at": 160, **changes,
    }  # fmt: skip
    return Manifest(**given)
