# SPDX-License-Identifier: Apache-2.0
"""privacy.secure_sum.epoch: from identities to confirmed pair secrets, and every way in which an epoch must not start."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy import federation
from privacy.envelope import open_sealed, sign
from privacy.errors import Equivocation, TrustError
from privacy.identity import keys
from privacy.messages import EpochNote, PairSeeds, Roster, encode
from privacy.secure_sum import epoch
from privacy.secure_sum.epoch import EpochSecrets, PairChain
from tests.terms import contract_bytes, seed

BASIS = b"\7" * 32


@dataclass
class Party:
    """One silo with everything it holds during set-up."""

    silo: int
    identity: keys.Identity
    secrets: EpochSecrets
    note: bytes
    pairs: dict[int, bytes] = field(default_factory=dict)
    chain: PairChain | None = None


@dataclass
class Epoch:
    """A whole epoch set-up in one process; each step can be bent before the next."""

    accepted: federation.Accepted
    parties: dict[int, Party]
    number: int = 1
    roster: Roster | None = None
    context: bytes = b""
    seeds: dict[int, bytes] = field(default_factory=dict)

    def freeze_roster(self) -> tuple[EpochNote, ...]:
        notes = tuple(party.note for party in self.parties.values())
        self.roster = Roster(contract=self.accepted.digest, epoch=self.number, notes=notes)
        self.context = epoch.epoch_ctx(self.accepted.digest, self.number, encode(self.roster))
        return self.notes()

    def notes(self) -> tuple[EpochNote, ...]:
        return epoch.check_roster(self.roster, self.accepted)

    def exchange_seeds(self) -> None:
        for party in self.parties.values():
            self.post_seeds(party, epoch.seal_seeds(party.secrets, self.notes(), context=self.context))

    def post_seeds(self, party: Party, message: PairSeeds) -> None:
        body = encode(message)
        self.seeds[party.silo] = sign(party.identity, type="pair-seeds", context=self.context, sender=party.silo, body=body)

    def derive(self, party: Party) -> dict[int, bytes]:
        return epoch.pair_secrets(party.secrets, self.notes(), self.seeds, accepted=self.accepted, context=self.context)

    def confirmations(self) -> dict[int, bytes]:
        bodies = {i: encode(epoch.confirmation(party.secrets, party.pairs)) for i, party in self.parties.items()}
        return {
            i: sign(self.parties[i].identity, type="confirmation", context=self.context, sender=i, body=body)
            for i, body in bodies.items()
        }


def make_party(silo: int, accepted: federation.Accepted, *, number: int = 1, basis: bytes = BASIS) -> Party:
    identity = keys.Identity(name=f"silo-{silo}", sign_seed=seed(silo))
    secrets, note = epoch.new_note(accepted.digest, number, silo, basis)
    return Party(silo=silo, identity=identity, secrets=secrets, note=signed_note(identity, note, accepted))


def signed_note(identity: keys.Identity, note: EpochNote, accepted: federation.Accepted, *, sender: int | None = None) -> bytes:
    return sign(identity, type="epoch-note", context=accepted.digest, sender=sender or note.silo, body=encode(note))


def before_roster(silos: int = 3, *, number: int = 1, **changes) -> Epoch:
    if silos == 2:
        changes["sum"] = {"two_silos_see_each_other": True}
    accepted = federation.parse(contract_bytes(silos, **changes))
    return Epoch(accepted=accepted, parties={i: make_party(i, accepted, number=number) for i in range(1, silos + 1)}, number=number)


def confirmed(silos: int = 3, **changes) -> Epoch:
    """An epoch that started: every party has its chain."""
    setup = before_roster(silos, **changes)
    setup.freeze_roster()
    setup.exchange_seeds()
    for party in setup.parties.values():
        party.pairs = setup.derive(party)
        party.chain = PairChain.start(party.secrets, party.pairs, context=setup.context)
    return setup


def check(setup: Epoch, documents: dict[int, bytes], **changes) -> None:
    epoch.check_confirmations(documents, **{"accepted": setup.accepted, "context": setup.context, "epoch": setup.number, **changes})


# --- the whole set-up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silos", [2, 3, 5])
def test_all_pairs_agree_and_the_epoch_starts(silos: int) -> None:
    setup = confirmed(silos)
    for i, j in combinations(setup.parties, 2):
        assert setup.parties[i].pairs[j] == setup.parties[j].pairs[i]
    secrets = [secret for party in setup.parties.values() for secret in party.pairs.values()]
    assert len(set(secrets)) == silos * (silos - 1) // 2
    for party in setup.parties.values():
        check(setup, setup.confirmations(), own=epoch.confirmation(party.secrets, party.pairs))
    check(setup, setup.confirmations())


def test_pair_secret_is_the_documented_derivation() -> None:
    setup = confirmed()
    one, three = setup.parties[1], setup.parties[3]
    notes = {note.silo: note for note in setup.notes()}
    private = X25519PrivateKey.from_private_bytes(three.secrets.dh_private)
    shared = private.exchange(X25519PublicKey.from_public_bytes(notes[1].dh_key))
    label = b"gsum/1 pair-seed\0" + setup.context
    sent = {p.silo: dict(epoch.seal_seeds(p.secrets, setup.notes(), context=setup.context).sealed) for p in (one, three)}
    r_13 = open_sealed(three.secrets.seal_seed, sent[1][3], info=label + b"\0\0\0\1\0\0\0\3")
    r_31 = open_sealed(one.secrets.seal_seed, sent[3][1], info=label + b"\0\0\0\3\0\0\0\1")
    assert one.pairs[3] == three.pairs[1] == keys.extract(setup.context, shared + r_13 + r_31)
    tag = keys.expand(one.pairs[3], "gsum/1 confirm", b"\0\0\0\1", b"\0\0\0\3")
    assert dict(epoch.confirmation(three.secrets, three.pairs).tags)[1] == tag


def test_a_restart_after_sealing_derives_the_same_secrets() -> None:
    setup = confirmed()
    party = setup.parties[1]
    before = party.pairs
    party.secrets = EpochSecrets.from_bytes(party.secrets.to_bytes())
    setup.post_seeds(party, epoch.seal_seeds(party.secrets, setup.notes(), context=setup.context))
    assert setup.derive(party) == before
    assert setup.derive(setup.parties[2])[1] == before[2]


def test_epoch_context_is_the_documented_hash_and_depends_on_everything() -> None:
    import hashlib

    made = epoch.epoch_ctx(b"c" * 32, 258, b"roster")
    assert made == hashlib.sha256(b"gsum/1 epoch\0" + b"c" * 32 + bytes(6) + b"\1\2" + hashlib.sha256(b"roster").digest()).digest()
    places = ((b"d" * 32, 258, b"roster"), (b"c" * 32, 259, b"roster"), (b"c" * 32, 258, b"R"))
    others = {epoch.epoch_ctx(*place) for place in places}
    assert len(others | {made}) == 4


@pytest.mark.parametrize("what", ["contract", "epoch", "keys"])
def test_another_contract_epoch_or_roster_gives_other_secrets(what: str) -> None:
    setup = confirmed()
    changes = {"contract": {"name": "other"}, "epoch": {"number": 2}, "keys": {}}[what]
    other = confirmed(**changes)
    assert other.context != setup.context
    assert not set(setup.parties[1].pairs.values()) & set(other.parties[1].pairs.values())


# --- the roster -------------------------------------------------------------------------------------------------------


def replace_note(setup: Epoch, party_id: int, **changes) -> None:
    party = setup.parties[party_id]
    fields = {name: getattr(epoch.note_of(party.secrets), name) for name in EpochNote.__struct_fields__}
    note = EpochNote(**{**fields, **changes})
    party.note = signed_note(party.identity, note, setup.accepted, sender=party_id)


def test_a_missing_silo_starts_no_epoch() -> None:
    setup = before_roster()
    del setup.parties[2]
    with pytest.raises(TrustError, match="2 notes for 3 members"):
        setup.freeze_roster()


@pytest.mark.parametrize("order", [(2, 1, 3), (1, 1, 3), (1, 3, 3)])
def test_a_roster_is_one_note_per_member_in_order(order: tuple[int, ...]) -> None:
    setup = before_roster()
    notes = tuple(setup.parties[i].note for i in order)
    with pytest.raises(TrustError, match=r"sender . where sender . was expected"):
        epoch.check_roster(Roster(contract=setup.accepted.digest, epoch=1, notes=notes), setup.accepted)


def test_a_note_by_an_invented_silo_is_refused() -> None:
    setup = before_roster()
    intruder = keys.Identity(name="silo-2", sign_seed=b"x" * 32)
    setup.parties[2].note = signed_note(intruder, epoch.note_of(setup.parties[2].secrets), setup.accepted)
    with pytest.raises(TrustError, match="not by key"):
        setup.freeze_roster()


def test_a_relayed_key_without_its_owners_signature_is_refused() -> None:
    setup = before_roster()
    setup.parties[2].note = encode(epoch.note_of(setup.parties[2].secrets))
    with pytest.raises(TrustError, match="malformed signed"):
        setup.freeze_roster()


@pytest.mark.parametrize(("changes", "message"), [
    ({"epoch": 2}, "note of silo 2 is for epoch 2, this is epoch 1"),
    ({"contract": b"\1" * 32}, "note of silo 2 is for contract 0101"),
    ({"silo": 3}, "epoch-note of silo 2 says it is of silo 3"),
    ({"dh_key": bytes(32)}, "keys of silo 2 are unfit"),
    ({"dh_key": b"\1" + bytes(31)}, "keys of silo 2 are unfit"),
    ({"dh_key": (2**255 - 19).to_bytes(32, "little")}, "keys of silo 2 are unfit"),
    ({"seed_key": b"\xff" * 1216}, "keys of silo 2 are unfit"),
    ({"basis": b"\1" * 32}, r"silos \[1, 3\] have 0707.*; silos \[2\] have 0101"),
])  # fmt: skip
def test_a_note_that_does_not_fit_is_refused_by_name(changes: dict, message: str) -> None:
    setup = before_roster()
    replace_note(setup, 2, **changes)
    with pytest.raises(TrustError, match=message):
        setup.freeze_roster()


def test_low_order_seed_key_half_is_refused_by_name() -> None:
    setup = before_roster()
    key = epoch.note_of(setup.parties[2].secrets).seed_key
    replace_note(setup, 2, seed_key=key[:1184] + bytes(32))
    with pytest.raises(TrustError, match="keys of silo 2 are unfit"):
        setup.freeze_roster()


@pytest.mark.parametrize("part", ["dh_key", "seed_key", "lattice half", "curve half"])
def test_one_key_for_two_silos_is_refused_by_name(part: str) -> None:
    setup = before_roster()
    first, second = (epoch.note_of(setup.parties[i].secrets) for i in (1, 2))
    copied = {
        "dh_key": {"dh_key": first.dh_key}, "seed_key": {"seed_key": first.seed_key},
        "lattice half": {"seed_key": first.seed_key[:1184] + second.seed_key[1184:]},
        "curve half": {"seed_key": second.seed_key[:1184] + first.seed_key[1184:]},
    }[part]  # fmt: skip
    replace_note(setup, 2, **copied)
    with pytest.raises(TrustError, match="silo 1 and silo 2 posted the same"):
        setup.freeze_roster()


def test_a_roster_for_another_contract_or_epoch_is_refused() -> None:
    setup = before_roster()
    setup.freeze_roster()
    with pytest.raises(TrustError, match="this silo signed"):
        epoch.check_roster(Roster(contract=b"\1" * 32, epoch=1, notes=setup.roster.notes), setup.accepted)
    with pytest.raises(TrustError, match="for epoch 1, this is epoch 2"):
        epoch.check_roster(Roster(contract=setup.accepted.digest, epoch=2, notes=setup.roster.notes), setup.accepted)


def test_a_second_note_of_this_silo_is_equivocation() -> None:
    setup = before_roster()
    clone = make_party(1, setup.accepted)
    setup.freeze_roster()
    with pytest.raises(Equivocation, match="another epoch note of silo 1"):
        epoch.seal_seeds(clone.secrets, setup.notes(), context=setup.context)
    with pytest.raises(Equivocation, match="another epoch note of silo 1"):
        setup.derive(clone)


# --- seeds and confirmation -------------------------------------------------------------------------------------------


@pytest.fixture
def seeded() -> Epoch:
    setup = before_roster()
    setup.freeze_roster()
    setup.exchange_seeds()
    return setup


def test_seeds_of_another_sender_epoch_or_roster_are_refused(seeded: Epoch) -> None:
    mallory = seeded.parties[2]
    honest = dict(seeded.seeds)
    for raw, message in (
        (honest[3], "sender 3 where sender 2"),
        (sign(mallory.identity, type="pair-seeds", context=b"\1" * 32, sender=2, body=b""), "context 0101"),
        (sign(mallory.identity, type="confirmation", context=seeded.context, sender=2, body=b""), "type confirmation"),
        (sign(seeded.parties[3].identity, type="pair-seeds", context=seeded.context, sender=2, body=b""), "not by key"),
    ):
        seeded.seeds[2] = raw
        with pytest.raises(TrustError, match=message):
            seeded.derive(seeded.parties[1])
    del seeded.seeds[2]
    with pytest.raises(TrustError, match="pair-seeds of silo 2 is missing"):
        seeded.derive(seeded.parties[1])


def test_a_sealed_seed_opens_for_its_pair_and_direction_only(seeded: Epoch) -> None:
    """Transplants inside a signed document: what silo 2 sealed for 3, or silo 3 sealed for 1, in silo 2's slot for 1."""
    two, three = (dict(epoch.seal_seeds(seeded.parties[i].secrets, seeded.notes(), context=seeded.context).sealed) for i in (2, 3))
    for wrong in (two[3], three[1], two[1][:-1], two[1] + b"\0", b""):
        seeded.post_seeds(seeded.parties[2], PairSeeds(epoch=1, silo=2, sealed=((1, wrong), (3, two[3]))))
        with pytest.raises(TrustError, match="does not open as 'gsum/1 pair-seed'"):
            seeded.derive(seeded.parties[1])


@pytest.mark.parametrize("peers", [(1,), (3, 1), (1, 2, 3), (1, 1, 3), ()])
def test_seeds_for_other_peers_than_the_members_are_refused(seeded: Epoch, peers: tuple[int, ...]) -> None:
    two = dict(epoch.seal_seeds(seeded.parties[2].secrets, seeded.notes(), context=seeded.context).sealed)
    seeded.post_seeds(seeded.parties[2], PairSeeds(epoch=1, silo=2, sealed=tuple((peer, two.get(peer, b"")) for peer in peers)))
    with pytest.raises(TrustError, match="pair-seeds of silo 2 names peers"):
        seeded.derive(seeded.parties[1])


def test_seeds_for_another_epoch_number_are_refused(seeded: Epoch) -> None:
    made = epoch.seal_seeds(seeded.parties[2].secrets, seeded.notes(), context=seeded.context)
    seeded.post_seeds(seeded.parties[2], PairSeeds(epoch=2, silo=2, sealed=made.sealed))
    with pytest.raises(TrustError, match="pair-seeds of silo 2 is for epoch 2"):
        seeded.derive(seeded.parties[1])


def test_confirmation_names_every_pair_that_disagrees() -> None:
    setup = confirmed()
    setup.parties[2].pairs[1] = bytes(32)
    setup.parties[3].pairs[2] = bytes(32)
    with pytest.raises(TrustError, match=r"different pair secrets: 1 and 2, 2 and 3$"):
        check(setup, setup.confirmations())


def test_confirmations_must_be_all_there_signed_here_and_ones_own() -> None:
    setup = confirmed()
    documents, own = setup.confirmations(), epoch.confirmation(setup.parties[1].secrets, setup.parties[1].pairs)
    with pytest.raises(TrustError, match="confirmation of silo 3 is missing"):
        check(setup, {i: documents[i] for i in (1, 2)})
    with pytest.raises(TrustError, match="sender 1 where sender 2"):
        check(setup, {**documents, 2: documents[1]})
    with pytest.raises(TrustError, match="where context"):
        check(setup, documents, context=b"\1" * 32)
    with pytest.raises(TrustError, match="is for epoch 1, this is epoch 2"):
        check(setup, documents, epoch=2)
    other = epoch.confirmation(setup.parties[1].secrets, {2: bytes(32), 3: bytes(32)})
    with pytest.raises(TrustError, match="not the one that this silo made"):
        check(setup, documents, own=other)
    check(setup, documents, own=own)


# --- the chain, and what is kept --------------------------------------------------------------------------------------


def test_the_chain_is_the_documented_one() -> None:
    setup = confirmed()
    chain, secret = setup.parties[3].chain, setup.parties[3].pairs[1]
    for index in range(3):
        assert chain.index == index
        assert dict(chain.links)[1] == secret
        assert chain.round_keys(b"R" * 32)[1] == keys.expand(secret, "gsum/1 pair", b"R" * 32, b"\0\0\0\1", b"\0\0\0\3")
        chain, secret = chain.advance(), keys.expand(secret, "gsum/1 next")


def test_both_ends_of_a_pair_walk_together() -> None:
    setup = confirmed()
    for _ in range(3):
        for i, j in combinations(setup.parties, 2):
            assert setup.parties[i].chain.round_keys(b"R" * 32)[j] == setup.parties[j].chain.round_keys(b"R" * 32)[i]
        for party in setup.parties.values():
            party.chain = party.chain.advance()


def test_round_keys_of_rounds_and_manifests_share_no_relation() -> None:
    """Not a constant XOR the round number: no two differences of successive keys repeat, and no link of the past is kept."""
    chain, seen = confirmed().parties[1].chain, []
    past: list[bytes] = []
    for _ in range(20):
        seen += [chain.round_keys(manifest)[2] for manifest in (b"R" * 32, b"S" * 32)]
        assert not any(link in chain.to_bytes() for link in past)
        past += [link for _, link in chain.links]
        chain = chain.advance()
    assert len(set(seen)) == len(seen)
    differences = [bytes(a ^ b for a, b in zip(x, y, strict=True)) for x, y in combinations(seen, 2)]
    assert len(set(differences)) == len(differences)


def test_what_is_kept_reads_back_strictly() -> None:
    party = confirmed().parties[1]
    for kept in (party.secrets, party.chain):
        raw = kept.to_bytes()
        assert type(kept).from_bytes(raw) == kept
        for bad in (b"", raw[:-1], raw + b"\0", raw.replace(b"/1", b"/2", 1)):
            with pytest.raises(TrustError, match="malformed"):
                type(kept).from_bytes(bad)
    with pytest.raises(TrustError, match="malformed"):
        PairChain.from_bytes(party.secrets.to_bytes())


def test_no_repr_or_terminal_shows_a_secret() -> None:
    from rich.console import Console

    party = confirmed().parties[1]
    out = io.StringIO()
    Console(file=out, width=4000).print(party.secrets, party.chain)
    shown = out.getvalue() + repr(party.secrets) + str(party.chain) + f"{[party.chain]}"
    for secret in (party.secrets.seal_seed, party.secrets.dh_private, party.secrets.pair_root, *party.pairs.values()):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


def test_randomness_comes_from_the_argument_and_is_used_once() -> None:
    asked: list[int] = []

    def counted(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    secrets, note = epoch.new_note(b"c" * 32, 1, 1, BASIS, random=counted)
    assert asked == [16, 32, 32, 32]
    assert len({secrets.seal_seed, secrets.dh_private, secrets.pair_root}) == 3
    assert note == epoch.note_of(secrets)


# --- share mode: the silos that came, and all guardians ---------------------------------------------------------------


def test_an_epoch_of_share_mode_has_the_silos_that_came() -> None:
    from tests.sharing import an_epoch

    setup = an_epoch(present=(1, 3, 4))
    notes = epoch.check_roster(setup.roster, setup.accepted)
    assert [note.silo for note in notes] == [1, 3, 4]
    for i, j in combinations(setup.parties, 2):
        assert setup.parties[i].pairs[j] == setup.parties[j].pairs[i]
    assert all(set(party.pairs) == {1, 3, 4} - {i} for i, party in setup.parties.items())
    stated = {i: epoch.confirmation(p.secrets, p.pairs) for i, p in setup.parties.items()}
    tags = {
        i: sign(p.identity, type="confirmation", context=setup.context, sender=i, body=encode(stated[i]))
        for i, p in setup.parties.items()
    }
    place = {"accepted": setup.accepted, "context": setup.context, "epoch": 1}
    epoch.check_confirmations(tags, silos=(1, 3, 4), **place)
    with pytest.raises(TrustError, match="confirmation of silo 3 is missing"):
        epoch.check_confirmations({i: tags[i] for i in (1, 4)}, silos=(1, 3, 4), **place)
    with pytest.raises(TrustError, match=r"names peers \[3, 4\], its peers are \[2, 3, 4, 5\]"):
        epoch.check_confirmations({**tags, 2: tags[1], 5: tags[1]}, **place)


def shared_roster(silos: tuple[int, ...] = (1, 2, 3, 4, 5), **changes):
    """(accepted, roster) of share mode with five silos and five guardians; ``changes`` replace the roster's fields."""
    from tests.sharing import build_epoch, share_terms

    setup = build_epoch(federation.parse(share_terms()), silos)
    roster = setup.roster
    fields = {name: getattr(roster, name) for name in Roster.__struct_fields__}
    return setup, Roster(**{**fields, **{name: change(fields[name]) for name, change in changes.items()}})


@pytest.mark.parametrize(("changes", "match"), [
    ({"notes": lambda notes: notes[:2]}, "notes of 2 silos, at least 3 are needed"),
    ({"notes": lambda notes: ()}, "notes of 0 silos"),
    ({"notes": lambda notes: (notes[1], notes[0], notes[2])}, r"notes of silos \[2, 1, 3\], wanted members"),
    ({"notes": lambda notes: (notes[0], notes[0], notes[2])}, r"notes of silos \[1, 1, 3\]"),
    ({"guardians": lambda notes: notes[:3]}, "3 guardian notes, at least 4 are needed"),
    ({"guardians": lambda notes: ()}, "0 guardian notes, at least 4"),
    ({"guardians": lambda notes: (notes[1], notes[0], *notes[2:])}, r"notes of guardians \[32770, 32769"),
    ({"guardians": lambda notes: (notes[0], notes[0], *notes[2:])}, r"notes of guardians \[32769, 32769"),
    ({"contract": lambda digest: bytes(32)}, "the roster is for contract"),
    ({"epoch": lambda number: 2}, "note of silo 1 is for epoch 1, this is epoch 2"),
])  # fmt: skip
def test_a_roster_of_share_mode_is_refused_by_name(changes: dict, match: str) -> None:
    setup, roster = shared_roster(**changes)
    with pytest.raises(TrustError, match=match):
        epoch.check_roster(roster, setup.accepted)


def test_a_stranger_is_in_no_roster() -> None:
    setup, roster = shared_roster()
    stranger = make_party(9, setup.accepted).note
    with pytest.raises(TrustError, match=r"wanted members"):
        epoch.check_roster(Roster(contract=roster.contract, epoch=1, notes=(*roster.notes, stranger), guardians=roster.guardians),
                           setup.accepted)  # fmt: skip


def guardian_note(setup, of: int, **changes) -> bytes:
    from privacy.messages import GuardianNote

    guard = setup.guards[of]
    made = epoch.guardian_note_of(guard.secrets)
    note = GuardianNote(**{**{name: getattr(made, name) for name in GuardianNote.__struct_fields__}, **changes})
    return sign(guard.identity, type="guardian-note", context=setup.accepted.digest, sender=of, body=encode(note))


def test_a_guardians_note_is_held_to_contract_epoch_and_key() -> None:
    setup, roster = shared_roster()
    first, second = (epoch.guardian_note_of(setup.guards[g].secrets) for g in (32769, 32770))
    silo = epoch.note_of(setup.parties[1].secrets)
    for changes, match in (
        ({"contract": bytes(32)}, "note of guardian 32769 is for contract"),
        ({"epoch": 2}, "note of guardian 32769 is for epoch 2"),
        ({"guardian": 32770}, "says it is of guardian 32770"), ({"guardian_key": bytes(1216)}, "keys of guardian 32769 are unfit"),
        ({"guardian_key": second.guardian_key}, "guardian 32769 and guardian 32770 posted the same seed key"),
        ({"guardian_key": first.guardian_key[:-32] + second.guardian_key[-32:]}, "32769 and guardian 32770 posted the same"),
        ({"guardian_key": silo.seed_key}, "silo 1 and guardian 32769 posted the same seed key"),
        ({"guardian_key": silo.seed_key[:-32] + first.guardian_key[-32:]}, "silo 1 and guardian 32769 posted the same seed key"),
    ):  # fmt: skip
        notes = (guardian_note(setup, 32769, **changes), *roster.guardians[1:])
        bent = Roster(contract=roster.contract, epoch=1, notes=roster.notes, guardians=notes)
        with pytest.raises(TrustError, match=match):
            epoch.check_roster(bent, setup.accepted)


def test_a_roster_of_consent_mode_has_no_guardians() -> None:
    setup = before_roster()
    notes = tuple(party.note for party in setup.parties.values())
    shared, _ = shared_roster()
    for extra in (b"x", shared.roster.guardians[0]):
        with pytest.raises(TrustError, match=r"malformed|wanted guardians of the contract"):
            epoch.check_roster(Roster(contract=setup.accepted.digest, epoch=1, notes=notes, guardians=(extra,)), setup.accepted)


def test_an_epoch_of_share_mode_has_q_guardians_at_least() -> None:
    setup, roster = shared_roster(guardians=lambda notes: (notes[0], *notes[2:]))
    assert [note.guardian for note in epoch.guardian_notes(roster, setup.accepted)] == [32769, 32771, 32772, 32773]
    assert [note.silo for note in epoch.check_roster(roster, setup.accepted)] == [1, 2, 3, 4, 5]
    stranger = guardian_note(setup, 32770, guardian=40000)
    fields = {"contract": roster.contract, "epoch": 1, "notes": roster.notes}
    for bad in (make_party(1, setup.accepted).note, stranger):
        with pytest.raises(TrustError, match=r"wanted guardians of the contract|says it is of guardian"):
            epoch.check_roster(Roster(guardians=tuple(sorted((*roster.guardians[1:], bad))), **fields), setup.accepted)


def test_a_guardian_finds_its_own_note_in_the_roster_or_stops() -> None:
    setup, roster = shared_roster()
    notes = epoch.guardian_notes(roster, setup.accepted)
    assert [note.guardian for note in notes] == [32769, 32770, 32771, 32772, 32773]
    epoch.check_own_guardian(setup.guards[32771].secrets, notes)
    other, _ = epoch.new_guardian_note(setup.accepted.digest, 1, 32771)
    with pytest.raises(Equivocation, match="another note of guardian 32771"):
        epoch.check_own_guardian(other, notes)


def test_a_guardians_secrets_read_back_strictly_and_show_nothing() -> None:
    asked: list[int] = []

    def counted(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    secrets, note = epoch.new_guardian_note(b"c" * 32, 3, 32769, random=counted)
    assert asked == [16, 32]
    assert note == epoch.guardian_note_of(secrets)
    assert (note.epoch, note.guardian, note.guardian_key) == (3, 32769, keys.seal_public_key(secrets.seal_seed))
    raw = secrets.to_bytes()
    assert epoch.GuardianSecrets.from_bytes(raw) == secrets
    assert secrets.seal_seed.hex() not in repr(secrets)
    for bad in (b"", raw[:-1], raw + b"\0"):
        with pytest.raises(TrustError, match="malformed"):
            epoch.GuardianSecrets.from_bytes(bad)
