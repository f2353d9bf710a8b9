# SPDX-License-Identifier: Apache-2.0
"""privacy.chain: a version follows another by its digest, its terms, its parties and their signatures, or not at all."""

from __future__ import annotations

import pytest

from privacy import chain, envelope
from privacy.chain import Lineage, Version
from privacy.changes import changes
from privacy.errors import SiloquyError, TrustError
from privacy.federation import parse
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Countersignature, Signed, decode, encode
from tests.terms import contract_bytes

HUB = keys.Identity(name="hub", sign_seed=b"h" * 32, receive_seed=b"r" * 32, ml_dsa_seed=b"m" * 32)


def identity(name: str, key: int) -> keys.Identity:
    return keys.Identity(name=name, sign_seed=bytes([key]) * 32, ml_dsa_seed=bytes([key + 100]) * 32)


SILOS = {number: identity(f"silo-{number}", number) for number in range(1, 8)}


def contract(version=1, previous="", members=None, hub=HUB, organisations=None, **changes):
    """A contract of these members, {id: identity}."""
    members = members or {n: SILOS[n] for n in (1, 2, 3, 4)}
    hybrid = changes.get("signatures") == keys.HYBRID
    head = contract_bytes(
        version=version, previous=previous, aggregator_key=hub.public.sign_key.hex(), seal_key=hub.public.seal_key.hex(),
        aggregator_ml_dsa_key=hub.public.ml_dsa_key.hex() if hybrid else "", **changes,
    ).split(b"[[member]]")[0].decode()  # fmt: skip
    for number, who in members.items():
        organisation = (organisations or {}).get(number, f"Hospital {number}")
        head += f'\n[[member]]\nid = {number}\nname = "{who.name}"\norganisation = "{organisation}"\n'
        head += f'sign_key = "{who.public.sign_key.hex()}"\n'
        head += f'ml_dsa_key = "{who.public.ml_dsa_key.hex()}"\n' if hybrid else ""
    return parse(head.encode())


def version(accepted, members, *, former=None, before=None, hub=HUB):
    """The link as a board holds it, countersigned by ``members``; ``former``: the old identities of those that rotated."""
    suite = accepted.terms.signatures
    document = envelope.sign(hub.under(suite), type="contract", context=accepted.digest, sender=AGGREGATOR, body=accepted.raw)
    signed = {
        number: chain.countersignature(
            who, accepted, number, former=(former or {}).get(number), suite_before=before.terms.signatures if before else ""
        )
        for number, who in members.items()
    }  # fmt: skip
    return Version(document=document, countersignatures=signed)


FOUR = {n: SILOS[n] for n in (1, 2, 3, 4)}
FIRST = contract()
V1 = version(FIRST, FOUR)


def second(members, **changes):
    return contract(2, FIRST.digest.hex(), members, **changes)


def pin():
    return keys.fingerprint(HUB.public.under(keys.ED25519))


def refused(code, versions, pinned=None):
    with pytest.raises(TrustError) as caught:
        chain.walk(versions, pinned=pinned or pin())
    assert caught.value.code == code, caught.value
    return caught.value.message


# --- Chains that hold -----------------------------------------------------------------------------------------------------


def test_one_past() -> None:
    """A silo comes, one goes, one rotates: three versions, from the fingerprint or from any digest."""
    five = {**FOUR, 5: SILOS[5]}
    added = second(five, expires="2100-01-01", privacy={"epsilon": 9.0})
    left = {n: five[n] for n in (1, 2, 4, 5)}
    removed = contract(3, added.digest.hex(), left)
    rotated = {**left, 2: identity("silo-2", 42)}
    last = contract(4, removed.digest.hex(), rotated)
    versions = [V1, version(added, five), version(removed, left), version(last, rotated, former={2: SILOS[2]}, before=removed)]
    wanted = (FIRST, added, removed, last)
    for pinned in (pin(), pin().replace(" ", ""), *(each.digest.hex() for each in wanted)):
        assert chain.walk(versions, pinned=pinned) == wanted
    for pinned in (SILOS[1].sign_seed.hex(), "", keys.fingerprint(HUB.public)):
        refused("fingerprint", versions, pinned or "00")
    for cut in (versions[1:], [versions[0], versions[2]], [versions[0], versions[1], versions[1]], []):
        with pytest.raises(TrustError) as caught:
            chain.walk(cut, pinned=pin())
        assert caught.value.code == "chain-version"


def test_a_lost_key_is_replaced_by_the_others_signatures() -> None:
    members = {**FOUR, 2: identity("silo-2", 42)}
    after = second(members)
    assert chain.walk([V1, version(after, members)], pinned=pin())[-1] == after
    two_lost = {**FOUR, 2: identity("silo-2", 42), 3: identity("silo-3", 43)}
    after = second(two_lost)
    assert "2 of the 4 members" in refused("chain-continuity", [V1, version(after, two_lost)])
    crossed = version(after, two_lost, former={3: SILOS[3]}, before=FIRST)
    assert chain.walk([V1, crossed], pinned=pin())[-1] == after


def test_the_suite_may_be_strengthened_and_never_weakened() -> None:
    hybrid = second(FOUR, signatures=keys.HYBRID)
    versions = [V1, version(hybrid, FOUR)]
    assert chain.walk(versions, pinned=pin())[-1] == hybrid
    back = contract(3, hybrid.digest.hex(), FOUR)
    refused("chain-suite", [*versions, version(back, FOUR)])
    new = {**FOUR, 4: identity("silo-4", 44)}
    rotated = contract(3, hybrid.digest.hex(), new, signatures=keys.HYBRID)
    link = version(rotated, new, former={4: SILOS[4]}, before=hybrid)
    assert len(decode(decode(link.countersignatures[4], Signed).body, Countersignature).former) == 3373
    assert chain.walk([*versions, link], pinned=hybrid.digest.hex())[-1] == rotated


# --- Each rule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    {"name": "other-name"}, {"task": {"labels": ["a", "b"]}}, {"task": {"max_length": 64}}, {"model": {"digest": "11" * 32}},
    {"adapter": {"scale": 2.0}}, {"training": {"optimizer": "sgd"}}, {"training": {"mode": "local"}},
    {"privacy": {"unit": "patient"}},
])  # fmt: skip
def test_what_the_model_and_the_ledgers_rest_on_may_not_change(changed) -> None:
    refused("chain-fixed", [V1, version(second(FOUR, **changed), FOUR)])


def test_the_coordinators_name_stays_and_its_keys_need_every_member() -> None:
    other = keys.Identity(name="hub", sign_seed=b"H" * 32, receive_seed=b"r" * 32, ml_dsa_seed=b"m" * 32)
    after = second(FOUR, hub=other)
    link = version(after, FOUR, hub=other)
    assert chain.walk([V1, link], pinned=pin())[-1] == after
    assert any("aggregator hub has other keys" in line for line in changes(FIRST.terms, after.terms))
    missing = Version(document=link.document, countersignatures={n: link.countersignatures[n] for n in (1, 2, 3)})
    refused("not-countersigned", [V1, missing])


@pytest.mark.parametrize("previous", ["", "00" * 32])
def test_another_past_is_refused(previous) -> None:
    with pytest.raises(TrustError) as caught:
        chain.walk([V1, version(contract(2, previous), FOUR)], pinned=pin())
    assert caught.value.code == "chain-previous"


@pytest.mark.parametrize(("version_number", "previous"), [(2, ""), (1, "00" * 32), (2, "00" * 32)])
def test_a_chain_begins_at_the_beginning(version_number, previous) -> None:
    refused("chain-version", [version(contract(version_number, previous), FOUR)])


@pytest.mark.parametrize("stay", [(1, 2), (1, 2, 3)])
def test_carried_by_more_than_half_and_by_what_hides_a_silo(stay) -> None:
    members = {**{n: SILOS[n] for n in stay}, 5: SILOS[5], 6: SILOS[6]}
    link = version(second(members), members)
    if len(stay) == 2:
        assert "2 of the 4 members of version 1 stay" in refused("chain-overlap", [V1, link])
    else:
        assert chain.walk([V1, link], pinned=pin())


def test_of_three_members_none_can_be_swapped_in_one_step() -> None:
    three = {n: SILOS[n] for n in (1, 2, 3)}
    first = contract(members=three)
    swapped = {1: SILOS[1], 2: SILOS[2], 4: SILOS[4]}
    links = [version(first, three), version(contract(2, first.digest.hex(), swapped), swapped)]
    assert "at least 3" in refused("chain-overlap", links)


@pytest.mark.parametrize(
    ("members", "code", "words"),
    [
        ({1: SILOS[1], 2: SILOS[2], 3: SILOS[3], 4: SILOS[5]}, "chain-id", "id 4 is silo-4"),
        ({**FOUR, 5: identity("silo-1", 55)}, None, "name"),  # two members of one name: no contract at all
        ({1: SILOS[1], 2: SILOS[2], 3: SILOS[3], 5: SILOS[4]}, "chain-id", "silo-4 has id 4 and cannot have 5"),
        ({1: SILOS[1], 2: SILOS[2], 3: SILOS[3], 5: identity("silo-5", 4)}, "chain-key", "silo-4's"),
        ({**FOUR, 5: identity("silo-5", ord("h"))}, "chain-key", "hub's"),
    ],
)
def test_ids_are_not_reused(members, code, words) -> None:
    with pytest.raises(SiloquyError, match=words) as caught:
        chain.walk([V1, version(second(members), members)], pinned=pin())
    assert code in (None, caught.value.code)


def test_an_organisation_cannot_be_renamed_under_its_id() -> None:
    after = second(FOUR, organisations={2: "Other Hospital"})
    assert "silo-2 (Hospital 2) and cannot become silo-2 (Other Hospital)" in refused("chain-id", [V1, version(after, FOUR)])


def test_an_id_that_left_may_come_back_to_its_holder_alone() -> None:
    left = {n: SILOS[n] for n in (1, 2, 3)}
    gone = second(left)
    links = [V1, version(gone, left)]
    back = contract(3, gone.digest.hex(), FOUR)
    assert chain.walk([*links, version(back, FOUR)], pinned=pin())[-1] == back
    stranger = {**left, 4: identity("stranger", 77)}
    refused("chain-id", [*links, version(contract(3, gone.digest.hex(), stranger), stranger)])
    renumbered = {**left, 5: SILOS[4]}
    refused("chain-id", [*links, version(contract(3, gone.digest.hex(), renumbered), renumbered)])


def test_a_key_that_was_replaced_never_comes_back() -> None:
    rotated = {**FOUR, 2: identity("silo-2", 42)}
    after = second(rotated)
    links = [V1, version(after, rotated, former={2: SILOS[2]}, before=FIRST)]
    again = contract(3, after.digest.hex(), FOUR)
    assert "was replaced" in refused("chain-key", [*links, version(again, FOUR, former={2: rotated[2]}, before=after)])


def test_agreed() -> None:
    """Every member, with the key in that version, over that version."""
    members = {**FOUR, 2: identity("silo-2", 42)}
    after = second(members)
    good = version(after, members, former={2: SILOS[2]}, before=FIRST)
    assert chain.walk([V1, good], pinned=pin())
    elsewhere = second(members, expires="2098-01-01")

    def with_two(raw):
        return Version(document=good.document, countersignatures={**good.countersignatures, 2: raw})

    old_key = chain.countersignature(SILOS[2], after, 2)
    other_version = chain.countersignature(members[2], elsewhere, 2)
    as_three = chain.countersignature(members[2], after, 3)
    for raw, code in ((old_key, "bad-signature"), (other_version, "wrong-context"), (as_three, "wrong-sender")):
        refused(code, [V1, with_two(raw)])
    # A cross-signature by another key, over another version, or none at all where it is said to be one.
    for former in (SILOS[3].sign(b"x"), members[2].sign(b"x"), b"\0", V1.countersignatures[2][-64:]):
        body = encode(Countersignature(contract=after.digest, member=2, former=former))
        raw = envelope.sign(members[2], type="countersignature", context=after.digest, sender=2, body=body)
        refused("bad-signature", [V1, with_two(raw)])
    moved = encode(Countersignature(contract=FIRST.digest, member=2))
    raw = envelope.sign(members[2], type="countersignature", context=after.digest, sender=2, body=moved)
    refused("wrong-contract", [V1, with_two(raw)])


def test_a_contract_signed_by_another_coordinator_is_refused() -> None:
    thief = keys.Identity(name="hub", sign_seed=b"t" * 32, receive_seed=b"r" * 32)
    forged = envelope.sign(thief, type="contract", context=FIRST.digest, sender=AGGREGATOR, body=FIRST.raw)
    refused("bad-signature", [Version(document=forged, countersignatures=V1.countersignatures)])


def test_changes_are_said_in_words() -> None:
    members = {1: SILOS[1], 2: identity("silo-2", 42), 3: SILOS[3], 5: SILOS[5]}
    after = second(members, expires="2098-01-01", training={"rounds": 20}, sum={"deadline_s": 90})
    said = "\n".join(changes(FIRST.terms, after.terms))
    for words in (
        "silo 2, silo-2 (Hospital 2) has a new key: ", "silo 4, silo-4 (Hospital 4) leaves", "silo 5, silo-5 (Hospital 5) joins: ",
        "training.rounds: 10 becomes 20", "sum.deadline_s: 60 becomes 90", "expires: 2099-12-31 becomes 2098-01-01",
        keys.fingerprint(members[2].public.under(keys.ED25519)),
    ):  # fmt: skip
        assert words in said, said
    assert changes(FIRST.terms, FIRST.terms) == ()


def test_a_lineage_knows_who_had_which_id() -> None:
    left = {n: SILOS[n] for n in (1, 2, 3)}
    lineage = Lineage.begin(FIRST).extended(second(left))
    assert [lineage.id_of(f"silo-{n}") for n in (1, 4, 5)] == [1, 4, None]
    assert max(lineage.holders) == 4
