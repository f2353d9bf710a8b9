# SPDX-License-Identifier: Apache-2.0
"""Versions that never took effect: a successor passes one over, and nothing that stood in it counts; and attacks that use one."""

from __future__ import annotations

import functools
import json
import re
import time

import msgspec
import pytest

from aggregator import admission, commands, enrolment, revision, verify, versions
from aggregator.reporting import recheck, report
from privacy import chain, envelope, federation
from privacy.audit import placing
from privacy.audit import whole as whole_audit
from privacy.chain import Lineage, Version
from privacy.changes import changes
from privacy.dp import accounting, ledger
from privacy.dp.budget import Limits
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import ConfigError, Equivocation, Replay, RoundError, TrustError
from privacy.federation import Accepted
from privacy.identity import keys
from privacy.messages import AGGREGATOR, EpochCall, encode
from privacy.spending import Spending, event_of
from silo import key_commands, keyring, membership, succession
from silo.catching_up import catch_up
from silo.guardians import guard_commands
from silo.guardians.guardian import party_of
from silo.guardians.guarding import work
from silo.home import Home
from silo.session import Superseded
from tests import sessions
from tests.test_chain import FIRST, FOUR, HUB, SILOS, V1, contract, identity, pin, refused, second, version
from tests.test_enrolment import with_terms
from tests.test_review_log import Shelf
from tests.test_rotation import LIMITS, NAMES, NOW, Town
from tests.test_rotation import refused as refuses
from tests.whole import Whole, together


@pytest.fixture
def town(tmp_path):
    """Four silos that signed version 1; its noise is stated, since calibrating takes longer than all the rest."""
    made = Town(tmp_path, *NAMES, terms=with_terms(noise_multiplier=9.0))
    made.sign()
    made.join(*NAMES)
    return made


def unsigned(link: Version, *missing: int) -> Version:
    """The link without these members' countersignatures."""
    left = {member: raw for member, raw in link.countersignatures.items() if member not in missing}
    return Version(document=link.document, countersignatures=left)


def third(before, members, *, in_force=FIRST, number=3, **changes):
    return contract(number, before.digest.hex(), members, in_force=in_force.digest.hex() if in_force else "", **changes)


# --- The chain ------------------------------------------------------------------------------------------------------------


def test_what_never_took_effect_changes_nothing() -> None:
    """Version 2, which silo 4 does not sign, adds 5, re-keys 2, and weakens nothing; version 3 is held to version 1 alone."""
    five = {**FOUR, 2: identity("silo-2", 42), 5: SILOS[5]}
    refused_one = second(five, privacy={"epsilon": 9.0})
    over = unsigned(version(refused_one, five, former={2: SILOS[2]}, before=FIRST), 4)
    stay = {n: SILOS[n] for n in (1, 2, 3)}
    after = third(refused_one, stay)
    assert chain.walk([V1, over, version(after, stay)], pinned=pin()) == (FIRST, after)
    assert chain.walk([V1, over, version(after, stay)], pinned=refused_one.digest.hex())
    lineage = Lineage.begin(FIRST).extended(refused_one).extended(after)
    assert (lineage.before, lineage.passed_over, lineage.every) == (FIRST, (refused_one,), (FIRST, refused_one, after))
    assert 5 not in lineage.holders
    assert lineage == Lineage(
        every=lineage.every, versions=(FIRST, after), holders=lineage.holders, owners=lineage.owners, retired=frozenset()
    )
    alone = contract(2, FIRST.digest.hex(), stay)  # the same members straight after version 1: the same lineage
    straight = Lineage.begin(FIRST).extended(alone)
    assert (straight.holders, straight.owners, straight.retired) == (lineage.holders, lineage.owners, lineage.retired)
    # The silo that left is named, although version 2 and 3 differ in other things.
    assert [each for each in changes(FIRST.terms, after.terms) if "leaves" in each] == ["silo 4, silo-4 (Hospital 4) leaves"]


def test_a_chain_goes_on_over_several_that_never_took_effect() -> None:
    stay = {n: SILOS[n] for n in (1, 2, 3)}
    two, links = second(FOUR, expires="2100-01-01"), [V1]
    links.append(unsigned(version(two, FOUR), 4))
    three = third(two, FOUR, expires="2101-01-01")
    links.append(unsigned(version(three, FOUR), 4))
    four = third(three, stay, number=4)
    five = contract(5, four.digest.hex(), stay, expires="2102-01-01")
    links += [version(four, stay), version(five, stay)]
    assert chain.walk(links, pinned=pin()) == (FIRST, four, five)
    # A version that is named as in force is one before the newest; the empty name is the only way to say the newest itself.
    for named in (four, five, contract(3, two.digest.hex(), FOUR, expires="2103-01-01")):
        wrong = contract(6, five.digest.hex(), stay, in_force=named.digest.hex())
        if named is four:  # version 5 was signed by all: it cannot be passed over
            refused("chain-in-force", [*links, version(wrong, stay)])
        else:
            assert "is no version before" in refused("chain-in-force", [*links, version(wrong, stay)])


def test_a_version_that_all_signed_cannot_be_passed_over() -> None:
    """The coordinator wants a member back in, or out, that all others agreed about in version 2."""
    left = {n: SILOS[n] for n in (1, 2, 3)}
    agreed = second(left)
    back = third(agreed, FOUR)
    assert "all members signed version 2" in refused("chain-in-force", [V1, version(agreed, left), version(back, FOUR)])
    assert chain.walk([V1, unsigned(version(agreed, left), 3), version(back, FOUR)], pinned=pin()) == (FIRST, back)


def test_a_key_is_not_swapped_by_a_version_that_never_took_effect() -> None:
    """The coordinator puts its own keys into version 2 that nobody signs, and calls version 3 "the same members"."""
    thief = {n: identity(f"silo-{n}", 60 + n) for n in (2, 3)}
    swapped = {**FOUR, **thief}
    ghost = second(swapped)
    link = unsigned(version(ghost, swapped), 1, 4)
    # As if version 2 had been in force: it is incomplete.
    silent = third(ghost, swapped, in_force=None)
    refused("not-countersigned", [V1, link, version(silent, swapped)])
    # Passed over: held to version 1, the swapped keys are new keys, shown as such, and carry nothing.
    after = third(ghost, swapped)
    message = refused("chain-continuity", [V1, link, version(after, swapped)])
    assert "2 of the 4 members of version 1 signed version 3" in message
    said = "\n".join(changes(FIRST.terms, after.terms))
    assert "silo 2, silo-2 (Hospital 2) has a new key" in said
    assert "silo 3, silo-3 (Hospital 3) has a new key" in said
    # Nor does a cross-signature by the key of the ghost make one.
    crossed = version(third(ghost, FOUR), FOUR, former=thief, before=ghost)
    refused("bad-signature", [V1, link, crossed])


def test_an_honest_silo_is_not_dropped_step_by_step() -> None:
    """Each ghost drops one more; against version 1 a majority must stay, and whoever leaves is named."""
    first = second({n: SILOS[n] for n in (1, 2, 3)})
    ghosts = [V1, unsigned(version(first, {n: SILOS[n] for n in (1, 2, 3)}), 3)]
    last = {1: SILOS[1], 2: SILOS[2], 6: SILOS[6]}
    after = third(first, last)
    assert "2 of the 4 members of version 1 stay" in refused("chain-overlap", [*ghosts, version(after, last)])
    with pytest.raises(TrustError, match="2 of the 4 members of version 1 stay"):
        Lineage.begin(FIRST).extended(first).extended(after)


def test_a_key_that_a_ghost_retired_is_still_its_holders() -> None:
    rotated = {**FOUR, 2: identity("silo-2", 42)}
    ghost = second(rotated)
    link = unsigned(version(ghost, rotated, former={2: SILOS[2]}, before=FIRST), 1)
    assert chain.walk([V1, link, version(third(ghost, FOUR), FOUR)], pinned=pin())[-1].terms.member == FIRST.terms.member
    # and the new key goes in by version 3 as it would have by version 2: signed for by the one of version 1
    again = third(ghost, rotated)
    assert chain.walk([V1, link, version(again, rotated, former={2: SILOS[2]}, before=FIRST)], pinned=pin())[-1] == again


def test_the_suite_is_held_to_the_version_in_force() -> None:
    ghost = second(FOUR, signatures=keys.HYBRID)
    link = unsigned(version(ghost, FOUR, former=FOUR, before=FIRST), 1)
    back = third(ghost, FOUR)
    assert chain.walk([V1, link, version(back, FOUR)], pinned=pin())[-1] == back
    assert HUB.public.ml_dsa_key


# --- An aggregator and silos ------------------------------------------------------------------------------------------------------


def refusal(town: Town, *signers: str, **options):
    """Version 2, which not everybody signs; the draft of version 3 on top of it, without the silo d."""
    town.revise(rounds=6)
    two = town.sign()
    town.join(*signers)
    refuses("not-countersigned", town.revise, "d")
    assert town.revise(give_up=True, **options)[1] == 3
    revision.remove(town.home, "d")
    return two


def test_who_refuses_to_sign_is_removed_over_the_version_it_refused(town):
    first = versions.standing(town.store)
    two = refusal(town, "a", "b", "c")
    three = town.sign()
    assert three.terms.in_force == first.digest.hex()
    assert three.terms.previous == two.digest.hex()
    fetched = membership.fetch(town.line, succession.kept_pin(town.silo("a")), home=town.silo("a"))
    words = "\n".join(succession.in_words(fetched))
    for said in ("version 2", "never took effect", "follows version 1", "silo 4, d (d Hospital) leaves", "rounds: 5 becomes 6"):
        assert said in words, words
    town.join("a", "b")
    assert versions.standing(town.store) == versions.in_force(town.store) == first
    assert succession.at_work(town.silo("a"), town.line)[0] == first, "and not version 2, which it signed"
    town.join("c")
    assert versions.standing(town.store) == three
    assert town.walked() == (first, three)
    for name in ("a", "b", "c"):
        assert succession.at_work(town.silo(name), town.line)[0] == three
        assert list(succession.ancestors(town.silo(name), three)) == [first.digest]
    assert membership.verify_all_countersigned(town.line, three, home=town.silo("a")) == (1, 2, 3)
    town.revise()
    assert "in_force" not in town.home.draft_path.read_text(), "version 4 follows version 3"
    assert town.sign().terms.in_force == ""


def test_the_board_takes_no_signature_of_a_version_that_was_passed_over(town):
    two = refusal(town, "a", "b", "c")
    late = town.silo("d")
    raw = chain.countersignature(keyring.under(late, two), two, 4)
    admission.admit("countersignature", 2, 4, raw, town.store)
    town.sign()
    with pytest.raises(Replay):
        admission.admit("countersignature", 2, 4, raw, town.store)
    assert versions.is_passed_over(town.store, two)
    # Were it taken all the same: nobody works under it, and nobody signs a version that passes it over.
    town.store.put_once("countersignature", 2, 4, raw, received_at=1.0)
    assert versions.standing(town.store).terms.version == 1
    refuses("chain-in-force", lambda: town.join("a"), "all members signed version 2")


def test_a_silo_remembers_that_a_version_was_in_effect(town):
    """The board withholds a countersignature of version 2 that this silo has seen."""
    town.revise(rounds=6)
    town.sign()
    town.join(*NAMES)
    two = succession.at_work(town.silo("a"), town.line)[0]
    membership.verify_all_countersigned(town.line, two, home=town.silo("a"))
    refuses("in-force", lambda: town.revise(give_up=True), "all its members signed it")
    hidden = town.line.get
    town.line.get = lambda kind, number, party, *, wait_s: (
        None if (kind, number, party) == ("countersignature", 2, 4) else hidden(kind, number, party, wait_s=wait_s)
    )
    first = versions.published(town.store, 1)
    text = two.raw.decode().replace("version = 2", "version = 3").replace(first.digest.hex(), two.digest.hex())
    head, rest = text.replace("rounds = 6", "rounds = 7").split("\n", 1)
    forged = federation.parse(f'{head}\nin_force = "{first.digest.hex()}"\n{rest}'.encode())
    raw = envelope.sign(town.hub.under(keys.ED25519), type="contract", context=forged.digest, sender=AGGREGATOR, body=forged.raw)
    town.store.put_once("contract", 3, AGGREGATOR, raw, received_at=1.0)
    refuses("chain-in-force", lambda: town.join("a"), "all members signed version 2")
    assert town.store.get("countersignature", 3, 1) is None


def test_two_successors_of_one_version_are_equivocation_as_before(town):
    two = refusal(town, "a", "b", "c")
    town.sign()
    town.join("a")
    promises = {path.name: path.read_text().strip() for path in (town.silo("a").root / "promises").glob("successor-*")}
    assert promises == {"successor-1": two.digest.hex(), "successor-2": versions.newest(town.store).digest.hex()}
    error = refuses("equivocation", lambda: town.silo("b").promise_successor(1, b"\1" * 32), "second successor for version 1")
    assert isinstance(error, Equivocation)
    # b kept version 2: a chain with another version 2 in its place is refused, whatever passes it over.
    document = town.silo("b").root / "contract" / "v2" / "contract"
    assert document.exists()
    hidden = town.line.get
    other = contract(2, FIRST.digest.hex(), FOUR)
    swapped = version(other, FOUR).document

    def lies(kind, number, party, *, wait_s):
        return swapped if (kind, number) == ("contract", 2) else hidden(kind, number, party, wait_s=wait_s)

    town.line.get = lies
    with pytest.raises(TrustError):
        town.join("b")


def test_only_a_version_that_was_not_signed_is_given_up(town):
    refuses("in-force", lambda: town.revise(give_up=True), "it is the first")
    two = refusal(town, "a", "b")
    refuses("draft-exists", lambda: town.revise(give_up=True, rounds=9))
    town.join("c", "d")  # all have signed meanwhile
    assert isinstance(refuses("in-force", town.sign, "version 2 never took effect, and all its members signed it"), ConfigError)
    assert versions.newest(town.store) == two
    assert versions.published(town.store, 3) is None


def test_ids_of_a_version_that_never_took_effect_are_not_given_again(town):
    town.revise()
    town.begin("e")
    enrolment.add_member(town.home, town.public("e"))
    town.sign()
    town.join("a", "b", "c", "d")
    town.revise(give_up=True)
    revision.remove(town.home, "e")
    town.begin("f")
    assert enrolment.add_member(town.home, town.public("f")).id == 6
    three = town.sign()
    town.join("a", "b", "c", "d", "f")
    assert town.walked()[-1] == three


# --- Share mode, across a version: real coordinator, silos, guardians and board in one process -------------------------------

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}


def party_table(kind: str, number: int, name: str, organisation: str, who: keys.Identity) -> str:
    key = who.public.sign_key.hex()
    return f'\n[[{kind}]]\nid = {number}\nname = "{name}"\norganisation = "{organisation}"\nsign_key = "{key}"\n'


def tables(whole: Whole) -> dict[int, tuple[str, str]]:
    """(kind, table) of every party as it stands in the contract, by id."""
    terms = whole.accepted.terms
    found = {}
    for kind, parties in (("member", terms.member), ("guardian", terms.guardian)):
        for each in parties:
            table = f'\n[[{kind}]]\nid = {each.id}\nname = "{each.name}"\norganisation = "{each.organisation}"\n'
            found[each.id] = (kind, table + f'sign_key = "{each.sign_key}"\n')
    return found


def new_home(whole: Whole, folder: str, name: str, *, records: bool) -> keys.Identity:
    home = Home.create(whole.root / folder)
    made = keys.create(home.identity_path, name=name, receives=False)
    keys.write_public(home.public_path, made, "Hospital")
    if records:
        verify = functools.partial(keys.verify_signature, made.public.sign_key)
        ledger.Ledger.create(home.ledger_path, who=name, sign=made.sign, clock=time.time, verify=verify).close()
    return made


def publish(whole: Whole, parties: dict[int, tuple[str, str]], *, in_force=None, before=None, **changes: str) -> Accepted:
    """The next version, of these parties, after ``before`` (the one at work); ``in_force``: what is, where ``before`` never was."""
    before = before or whole.accepted
    head = before.raw.decode().split("[[member]]")[0]
    head = re.sub(r"(?m)^in_force = .*\n", "", head)
    stated = {"version": str(before.terms.version + 1), "previous": f'"{before.digest.hex()}"', **changes}
    for key, value in stated.items():
        head, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", head, count=1)
        assert count == 1
    if in_force is not None:
        head = head.replace("\nname =", f'\nin_force = "{in_force.digest.hex()}"\nname =', 1)
    listed = [table for kind in ("member", "guardian") for _, (of, table) in sorted(parties.items()) if of == kind]
    accepted = federation.parse((head.rstrip("\n") + "\n" + "".join(listed)).encode())
    signer = whole.identity.under("ed25519")
    raw = envelope.sign(signer, type="contract", context=accepted.digest, sender=AGGREGATOR, body=accepted.raw)
    whole.store.put_once("contract", accepted.terms.version, AGGREGATOR, raw, received_at=time.time())
    return accepted


def succeed(whole: Whole, parties: dict[int, tuple[str, str]], *, sign: tuple[int, ...] | None = None, **changes: str) -> Accepted:
    """The next version, countersigned by all its members or those in ``sign``; the federation goes on under it."""
    accepted = publish(whole, parties, **changes)
    for silo in sign or [member.id for member in accepted.terms.member]:
        countersign(whole, silo)
    whole.accepted, whole.silos = accepted, tuple(member.id for member in accepted.terms.member)
    return accepted


def countersign(whole: Whole, silo: int) -> None:
    home = Home(whole.root / f"silo-{silo}")
    pinned = succession.kept_pin(home) or keys.fingerprint(whole.identity.public.under("ed25519"))
    fetched = membership.fetch(whole.line(), pinned, home=home)
    membership.countersign(
        home, whole.line(), keyring.under(home, fetched.newest), fetched.newest, limits=LIMITS, now=NOW,
        check_local=lambda accepted: None, fetched=fetched,
    )  # fmt: skip


def guard(whole: Whole, each: int, rounds: int, said: list[str]):
    """What ``silo guard run`` does, over the board itself."""
    return guard_commands.serve(
        Home(whole.root / f"notary-{each}"), whole.line(), rounds=rounds, told=said.append, clock=whole.clock
    )


def guard_joins(whole: Whole, each: int) -> None:
    """What ``silo guard join`` does after the question."""
    home = Home(whole.root / f"notary-{each}")
    fetched = membership.fetch(whole.line(), keys.fingerprint(whole.identity.public.under("ed25519")), home=home)
    identity, party = guard_commands._own(home, fetched.newest)
    guard_commands.Visit(home=home, transport=whole.line(), fetched=fetched, party=party, words=[]).keep()
    assert identity.public.sign_key.hex() == party.sign_key


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    for name in ("silo.round.POLL_S", "silo.participation.POLL_S", "silo.guardians.guarding.POLL_S", "silo.session.POLL_S"):
        monkeypatch.setattr(name, 0.05)


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """Four silos that are the guardians too; one round under version 1."""
    whole = Whole.create(tmp_path_factory.mktemp("versions") / "federation", silos=(1, 2, 3, 4), sum=SHARES)
    _, closed = whole.run(1)
    assert [each.kind for each in closed] == ["result"]
    return whole


def test_share_mode_a_silo_comes_and_one_goes_between_rounds(sharing, tmp_path):
    """Silo 5 is new and a guardian too; silo 4 leaves with its guardian. The late one follows round 1, and all reach one state."""
    whole = sharing.copied(tmp_path / "federation")
    fifth = new_home(whole, "silo-5", "silo-5", records=True)
    parties = {number: table for number, table in tables(whole).items() if number % 2**15 != 4}
    for kind, number in (("member", 5), ("guardian", federation.GUARDIANS_FROM + 5)):
        parties[number] = (kind, party_table(kind, number, "silo-5", "Hospital 5", fifth))
    first, second = whole.accepted, succeed(whole, parties)
    assert catch_up(Home(whole.root / "silo-5"), whole.line(), second) == 1
    settled, closed = whole.run(3)
    assert [each.kind for each in closed] == ["result", "result"]
    assert [[each.round for each in settled[silo]] for silo in (1, 2, 3, 5)] == [[2, 3]] * 4
    assert {whole.progress(silo).state.digest for silo in (1, 2, 3, 5)} == {closed[-1].state}
    assert whole.store.parties("upload", 3) == (1, 2, 3, 5)
    assert {number - federation.GUARDIANS_FROM for number in whole.store.parties("guardian-note", 2)} == {1, 2, 3, 5}
    assert [len(whole.attempts(silo, 3)) for silo in (1, 5)] == [1, 1]
    # The one that left is told so, and spends nothing.
    with pytest.raises(Superseded):
        whole.take_part(4, 2, accepted=first)
    assert whole.progress(4).round == 1


@pytest.fixture(scope="module")
def notarised(tmp_path_factory):
    """Three silos, and three guardians in homes of their own; nothing has run."""
    whole = Whole.create(
        tmp_path_factory.mktemp("notaries") / "federation", silos=(1, 2, 3), notaries=3,
        sum={"protocol": "shares", "dropouts": 0, "corrupt_guardians": 1},
    )  # fmt: skip
    for each in (1, 2, 3):
        home = Home(whole.root / f"notary-{each}")
        keys.write_public(home.public_path, keys.load(home.identity_path), f"Notary {each}")
        guard_joins(whole, each)
    return whole


def test_a_guardian_that_stands_alone_goes_over_and_one_rotates_its_key(notarised, tmp_path):
    """Guardian 1 joins version 2 between two runs, 2 goes over within one, 3 has a new key and its old one until then."""
    whole = notarised.copied(tmp_path / "federation")
    third, said = Home(whole.root / "notary-3"), list[str]()
    old = keys.load(third.identity_path)
    rotated = keyring.rotate(third, organisation="Notary 3")
    assert rotated.crossed
    assert guard_commands.at_work(third, whole.line()) == whole.accepted, "before any epoch"
    jobs = [functools.partial(guard, whole, each, 1, said) for each in (1, 2, 3)]
    jobs += [functools.partial(whole.take_part, silo, 1) for silo in whole.silos]
    assert [each.kind for each in whole.run_hurried(1, *jobs, silent=0)] == ["result"]
    first = whole.accepted
    parties, number = tables(whole), federation.GUARDIANS_FROM + 3
    parties[number] = ("guardian", party_table("guardian", number, "notary-3", "Notary 3", rotated.identity))
    second = succeed(whole, parties, sign=(1, 2))
    for each in (1, 2, 3):
        with pytest.raises(RoundError, match="have not countersigned"):
            guard_joins(whole, each)
        assert guard_commands.at_work(Home(whole.root / f"notary-{each}"), whole.line()) == first, "version 1 goes on"
    countersign(whole, 3)
    jobs = [functools.partial(guard, whole, each, 2, said) for each in (1, 2, 3)]
    jobs += [functools.partial(whole.take_part, silo, 3) for silo in whole.silos]
    closed = whole.run_hurried(3, *jobs, silent=0)
    assert [each.kind for each in closed] == ["result", "result"]
    assert {whole.progress(silo).state.digest for silo in whole.silos} == {closed[-1].state}
    for each in (1, 2, 3):
        assert guard_commands.at_work(Home(whole.root / f"notary-{each}"), whole.line()) == second
    note = whole.store.get("guardian-note", 2, number)
    with pytest.raises(TrustError):
        envelope.open_signed(note, type="guardian-note", context=second.digest, sender=number, key=old.public.sign_key)


def test_a_superseded_guardian_does_not_poll_without_pause(notarised, tmp_path):
    """An epoch is called under a version that this guardian does not keep: it looks again after a while, not at once."""
    whole = notarised.copied(tmp_path / "federation")
    first = whole.accepted
    parties = tables(whole)
    succeed(whole, parties, rounds="11")
    body = encode(EpochCall(contract=whole.accepted.digest, epoch=1))
    call = envelope.sign(whole.identity.under("ed25519"), type="epoch", context=whole.accepted.digest, sender=AGGREGATOR, body=body)
    whole.store.put_once("epoch", 1, AGGREGATOR, call, received_at=time.time())
    home, line = Home(whole.root / "notary-1"), whole.line()
    identity = keys.load(home.identity_path)
    working = guard_commands.Working(
        home=home, transport=line, identity=identity, accepted=first, party=party_of(first, identity), clock=whole.clock
    )
    steps, slept, take = [0], list[float](), working.step

    def step():
        steps[0] += 1
        return take()

    working.step = step
    work(working, line, whole.clock, lambda: steps[0] >= 6, slept.append)
    assert working.superseded is not None
    assert len(slept) >= 4, "a pause before every look but the first two"
    with pytest.raises(Superseded):
        guard(whole, 1, 1, [])


def test_a_late_silo_that_waits_follows_what_ends_meanwhile(tmp_path):
    """Silo 4 starts under version 2 while round 2 is open under version 1: it follows that too before it enters the epoch."""
    whole = Whole.create(tmp_path / "federation", silos=(1, 2, 3))
    whole.run(2)
    fourth = new_home(whole, "silo-4", "silo-4", records=True)
    second = succeed(whole, {**tables(whole), 4: ("member", party_table("member", 4, "silo-4", "Hospital 4", fourth))})
    line = whole.line()
    line.alter = lambda slot, data: None if slot[:2] == ("outcome", 2) else data
    assert catch_up(Home(whole.root / "silo-4"), line, second) == 1
    late = whole.silo(4, accepted=second)
    jobs = [functools.partial(whole.take_part, silo, 3) for silo in (1, 2, 3)]
    *_, settled, closed = together(*jobs, functools.partial(late.take_part, 1), functools.partial(whole.coordinate, 3))
    assert [each.kind for each in closed] == ["result"]
    assert [each.round for each in settled] == [3]
    assert {whole.progress(silo).state.digest for silo in whole.silos} == {closed[-1].state}


def test_in_local_mode_following_others_does_not_touch_the_own_optimiser(tmp_path):
    """Silo 4 is in version 1, out of version 2, and back in version 3: it follows round 2, and goes on with its own moments."""
    whole = Whole.create(tmp_path / "federation", silos=(1, 2, 3, 4), training={"mode": "local", "steps_per_round": 2})
    whole.run(1)
    own = whole.progress(4).own
    assert own is not None
    assert own.first_moment.any()
    every = tables(whole)
    succeed(whole, {number: table for number, table in every.items() if number != 4})
    whole.run(2)
    third = succeed(whole, every, rounds="12")
    home = Home(whole.root / "silo-4")
    assert catch_up(home, whole.line(), third) == 1
    after = whole.progress(4)
    assert after.round == 2
    assert after.state.digest == whole.progress(1).state.digest
    assert after.own is not None
    assert after.own.to_bytes() == own.to_bytes()


# --- A report over versions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Silos 1 to 4 run a round; version 2, which nobody signs, is passed over by version 3, in which 4 leaves; one more round."""
    whole = Whole.create(tmp_path_factory.mktemp("reported") / "federation", silos=(1, 2, 3, 4), training={"rounds": 4})
    whole.run(1)
    every, first = tables(whole), whole.accepted
    ghost = publish(whole, every, expires='"2098-12-31"')
    stay = {number: table for number, table in every.items() if number != 4}
    whole.accepted = publish(whole, stay, in_force=first, before=ghost, noise_multiplier="2.5", rounds="6")
    whole.silos = (1, 2, 3)
    for silo in whole.silos:
        countersign(whole, silo)
    whole.run(2)
    whole.home.facts_path.write_text('{"lora_width": 1, "simulated": false}')
    facts = commands.build_report(whole.home.root)
    yield whole, (first, ghost, whole.accepted), facts
    whole.close()


def charged(*events: LatticeGaussian, first: Accepted) -> float:
    plan = first.terms.privacy
    order = Limits(epsilon=plan.epsilon, delta=plan.delta).filter_order
    return accounting.certify_adaptive(list(events), plan.delta, order=order).epsilon


def test_a_report_charges_each_round_with_the_terms_of_its_own_version(reported):
    _, (first, ghost, now), facts = reported
    delta = first.terms.privacy.delta
    for each in facts.guarantee.adversaries:
        events = [event_of(version.terms, each.name, 1) for version in (first, now)]
        assert each.spent.epsilon == charged(*events, first=first)
        assert each.spent.epsilon_pld is None
        plan = [event_of(first.terms, each.name, 1), event_of(now.terms, each.name, 5)]
        assert each.plan.epsilon == charged(*plan, first=first)
    insiders = facts.guarantee.adversaries[1]
    assert facts.accounting.spent == insiders.spent == facts.silos[0].spent == facts.burn_down[2]
    alone = accounting.certify([event_of(first.terms, "insiders", 1)], delta)
    assert [silo.spent.epsilon for silo in facts.silos] == [insiders.spent.epsilon] * 3 + [alone.epsilon]
    assert [silo.versions for silo in facts.silos] == [(1, 3)] * 3 + [(1,)]
    assert [silo.rounds_left for silo in facts.silos] == [4, 4, 4, 0]
    assert [(each.version, each.rounds) for each in facts.accounting.planned] == [(1, 1), (3, 5)]
    assert [each.version for each in facts.rounds] == [1, 3]
    # anybody can compute it again from the record
    by_version = {each.version: each.event for each in facts.versions}
    events = [by_version[each.version].with_steps(each.rounds) for each in facts.accounting.charged]
    assert accounting.certify_adaptive(events, delta, order=facts.accounting.order).epsilon == facts.accounting.spent.epsilon
    assert ghost.digest.hex() == facts.versions[1].digest


def test_a_report_lists_every_version_and_what_changed(reported):
    _, chained, facts = reported
    assert [(each.version, each.in_effect, each.rounds, each.first_round, each.last_round) for each in facts.versions] == [
        (1, True, 1, 1, 1), (2, False, 0, None, None), (3, True, 1, 2, 2),
    ]  # fmt: skip
    assert [each.digest for each in facts.versions] == [each.digest.hex() for each in chained]
    assert [each.members for each in facts.versions] == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3)]
    assert facts.versions[0].changed == ()
    assert facts.versions[1].changed == ("expires: 2099-12-31 becomes 2098-12-31",)
    assert "silo 4, silo-4 (Hospital 4) leaves" in facts.versions[2].changed, "against version 1, and not 2"
    page = report.render(facts)
    for words in ("never took effect", "silo 4, silo-4 (Hospital 4) leaves", "Hospital 4, left", "2 versions of the contract"):
        assert words in page, words


def verified(whole, facts):
    record = facts if isinstance(facts, bytes) else report.encode(facts)
    signature = whole.identity.under("ed25519").sign(report.signing_input(record)).hex().encode()
    found = verify.verify(whole.home.root, report=(record, signature))
    return found, {check.what: check for check in found.checks if check.kind == "report"}


def test_verify_compares_a_report_over_versions(reported):
    whole, _, facts = reported
    found, asked = verified(whole, facts)
    assert asked["every figure"].status == "ok"
    assert not [check for check in found.failed if check.what != "digest" and "log" not in check.why], found.failed
    assert found.spent[-1].insiders == facts.accounting.spent.epsilon


def bent(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return None if not isinstance(value, str) else value[:-1] + ("1" if value[-1:] != "1" else "2")


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from leaves(value, f"{path}[{place}]")
    else:
        yield path


def with_bent(tree, path):
    """A copy of a JSON document with the leaf at this place bent."""
    made = json.loads(json.dumps(tree))
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
    at = made
    for step in steps[:-1]:
        at = at[step]
    at[steps[-1]] = bent(at[steps[-1]])
    return made


FREE = re.compile(r"generated_at|software\..*|extra.*|schema|traffic\.lora_bytes|rounds\[\d+\]\.closed_at")
"""What the evidence does not say."""


def test_everything_that_can_be(reported):
    """Every leaf of the record but the free ones: bent, it is named by its place; no number is beyond verification."""
    whole, _, facts = reported
    tree = json.loads(report.encode(facts))
    again = []

    def keep(found, slot, record, accepted, versions, rounds):
        stated = report.decode(record)
        again.append(json.loads(report.encode(recheck._again(found.source, stated, accepted, versions, rounds))))

    evidence, _, _ = placing.offline(whole.home.root)
    whole_audit.audit(evidence, report=(report.encode(facts), None), again=keep)
    (made,) = again
    assert list(recheck.differences(tree, made)) == []
    held = [path for path in leaves(tree) if not FREE.fullmatch(path)]
    assert len(held) > 400
    for path in held:
        if not path.endswith(".epsilon_pld") or "null" not in path:
            lie = with_bent(tree, path)
            if lie != tree:
                assert [place for place, *_ in recheck.differences(lie, made)] == [path]
    shorter = {**tree, "rounds": tree["rounds"][:-1]}
    assert [place for place, *_ in recheck.differences(shorter, made)] == ["rounds.length"]


@pytest.mark.parametrize(
    "path",
    [
        "guarantee.odds[0].spent", "accounting.profile[3].plan", "silos[3].spent.epsilon", "silos[1].rounds_left",
        "versions[1].in_effect", "rounds[1].version", "traffic.received_bytes", "burn_down[1].epsilon_rdp", "summary[0]",
        "mechanism[1].value",
    ],
)  # fmt: skip
def test_verify_names_the_place_that_differs(reported, path):
    whole, _, facts = reported
    lie = with_bent(json.loads(report.encode(facts)), path)
    record = msgspec.json.format(msgspec.json.encode(lie, order="sorted"), indent=2) + b"\n"
    _, asked = verified(whole, record)
    assert asked[path].status == "failed"
    assert "computed again it is" in asked[path].why


def test_of_another_release_all_but_sentences_is_compared(reported):
    whole, _, facts = reported
    other = msgspec.structs.replace(
        facts, software={**facts.software, "siloquy": "9.9"}, summary=("Other words.", *facts.summary[1:])
    )
    _, asked = verified(whole, other)
    assert asked["sentences"].status == "open"
    assert asked["every figure"].status == "ok"
    lie = msgspec.structs.replace(other, burn_down=(*facts.burn_down[:-1], facts.burn_down[0]))
    _, asked = verified(whole, lie)
    assert asked[f"burn_down[{len(facts.burn_down) - 1}].epsilon"].status == "failed"


# --- What rounds of several versions cost -----------------------------------------------------------------------------------------


@functools.cache
def spending() -> Spending:
    quiet, loud = contract(), contract(2, contract().digest.hex(), FOUR, privacy={"noise_multiplier": 4.0})
    return Spending(versions={1: quiet, 2: loud}, first=1)


def test_own_terms():
    made = spending()
    delta = made.versions[1].terms.privacy.delta
    one, other = (made.certified(((version, 3),), "insiders", delta) for version in (1, 2))
    assert one.epsilon == accounting.certify([federation.mechanism(made.versions[1].terms, rounds=3)], delta).epsilon
    assert other.epsilon < one.epsilon, "more noise"
    assert made.certified((), "insiders", delta).epsilon == 0
    assert made.steps(((1, 3), (2, 2))) == 5


def test_adaptive():
    made = spending()
    plan = made.versions[1].terms.privacy
    events = list(made.events(((1, 3), (2, 2)), "outside"))
    assert [each.steps for each in events] == [3, 2]
    composed = made.certified(((1, 3), (2, 2)), "outside", plan.delta)
    assert composed.epsilon == accounting.certify_adaptive(events, plan.delta, order=made.order).epsilon
    assert made.order == Limits(epsilon=plan.epsilon, delta=plan.delta).filter_order
    assert composed.epsilon > accounting.certify(events, plan.delta).epsilon


def test_whoever_has_most():
    made = spending()
    delta = made.versions[1].terms.privacy.delta
    loads = [((1, 1),), ((1, 1), (2, 1)), ((2, 4),)]
    for adversary in ("outside", "insiders", "sum_broken"):
        assert made.epsilon(loads, adversary, delta) == max(made.certified(load, adversary, delta).epsilon for load in loads)
    assert made.epsilon([], "insiders", delta) == 0


# --- Verification of a chain with a version that was passed over ------------------------------------------------------------------


def test_a_version_that_was_passed_over_must_not_have_been_in_effect(reported):
    whole, (first, ghost, _), _ = reported
    assert not failures(whole)
    signed = {("countersignature", 2, silo): countersignature_of(whole, ghost, silo) for silo in (1, 2, 3, 4)}
    assert "all its members signed it" in failures(whole, signed)["contract", 2]
    body = encode(EpochCall(contract=ghost.digest, epoch=3))
    call = envelope.sign(whole.identity.under("ed25519"), type="epoch", context=ghost.digest, sender=AGGREGATOR, body=body)
    assert "an epoch was called under it" in failures(whole, {("epoch", 3, AGGREGATOR): call})["contract", 2]
    assert chain.ancestors(whole.accepted, [first, ghost, whole.accepted]) == (first,)


def countersignature_of(whole: Whole, accepted: Accepted, silo: int) -> bytes:
    return chain.countersignature(keys.load(Home(whole.root / f"silo-{silo}").identity_path), accepted, silo)


def failures(whole: Whole, more=()) -> dict[tuple[str, int], str]:
    """What an audit of the evidence finds failed, with more documents in it: why, by kind and number."""
    source = Shelf({**dict(whole.store.log), **dict(more)})
    source.remnant = lambda kind, number, party: None
    found = whole_audit.audit(source, pinned=[whole.accepted.digest.hex()])
    return {(check.kind, check.number): check.why for check in found.failed}


def test_guardians_that_are_no_silo_come_go_and_change_keys(tmp_path):
    """By the same commands as silos; the id of one that left is given to nobody else, and is its own when it comes back."""
    town = Town(tmp_path, *NAMES[:3], terms=with_terms(protocol="shares", dropouts=0, noise_multiplier=9.0))
    for name in ("g1", "g2", "g3", "g4"):
        town_guardian(town, name)
        enrolment.add_guardian(town.home, (town.root / name / "identity.pub").read_bytes())
    town.sign()
    town.join(*NAMES[:3])
    shown = key_commands.rotate(town.root / "g1", lost=False)
    assert shown["old_key_signs"]
    town.revise()
    first = federation.GUARDIANS_FROM + 1
    assert revision.replace(town.home, "g1", (town.root / "g1" / "identity.pub").read_bytes()).id == first
    assert revision.remove(town.home, "g4").id == first + 3
    two = town.sign()
    assert [guardian.id for guardian in two.terms.guardian] == [first, first + 1, first + 2]
    assert keys.fingerprint(keys.stated(two.terms.guardian[0])) == shown["fingerprint"]
    town.join(*NAMES[:3])
    town.revise()
    town_guardian(town, "g5")
    assert enrolment.add_guardian(town.home, (town.root / "g5" / "identity.pub").read_bytes()).id == first + 4
    assert enrolment.add_guardian(town.home, (town.root / "g4" / "identity.pub").read_bytes()).id == first + 3
    refuses("no-such-member", lambda: revision.remove(town.home, "g9"), "called g9")


def town_guardian(town: Town, name: str) -> None:
    guard_commands.create(town.root / name, name=name, organisation=f"{name} Notary", url="http://127.0.0.1:1", fingerprint="aa")


def test_the_command_gives_a_version_up(town, capsys):
    town.revise()
    two = town.sign()
    terminal = sessions.Terminal(capsys)
    assert terminal("aggregator revise --home", town.home.root).code != 0
    begun = terminal("aggregator revise --give-up --json --home", town.home.root)
    assert (begun.document["version"], begun.document["previous"]) == (3, two.digest.hex())
