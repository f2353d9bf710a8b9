# SPDX-License-Identifier: Apache-2.0
"""secure_sum.choice and secure_sum.freeze in share mode: which set follows from which lists, and what makes it certain."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations, permutations
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import TrustError
from privacy.messages import Certificate, Close, Endorsement, Freeze, Header, Listing, encode
from privacy.secure_sum import choice, freeze, guardian_sum
from privacy.secure_sum.freeze import Frozen
from tests.sharing import FIRST, ShareRound, an_epoch
from tests.test_guardian_sum import Round
from tests.test_guardian_sum import an_epoch as a_consent_epoch

GUARDS = tuple(FIRST + k for k in range(5))


@pytest.fixture
def a_round() -> ShareRound:
    return ShareRound(an_epoch())


def fields(message: object) -> dict:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def changed(message, **changes):
    return type(message)(**{**fields(message), **changes})


# --- the mismatch rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("apart", "left"), [
    ([], {1, 2, 3, 4, 5, 6}),
    ([(1, 2)], {3, 4, 5, 6}),  # a tie: both
    ([(1, 2), (1, 3)], {2, 3, 4, 5, 6}),  # the star's middle
    ([(1, 2), (3, 4)], {5, 6}),
    ([(1, 2), (2, 3), (3, 4)], {1, 4, 5, 6}),  # a path: the two in the middle
    ([(1, 2), (1, 3), (4, 5), (4, 6)], {2, 3, 5, 6}),  # two stars whose middles agree with each other
    ([(1, 2), (2, 3), (1, 3)], {4, 5, 6}),
    ([(1, 2), (1, 3), (1, 4), (5, 6)], {2, 3, 4}),  # the star first, then the pair
    (list(combinations(range(1, 7), 2)), set()),
])  # fmt: skip
def test_the_mismatch_rule_on_known_graphs(apart: list, left: set) -> None:
    assert choice.without_mismatches(apart, range(1, 7)) == left


def by_the_book(apart: set[tuple[int, int]], silos: set[int]) -> set[int]:
    """The rule once more, from PROTOCOL's sentence, with a list of lists."""
    left = sorted(silos)
    while True:
        degree = [sum((min(a, b), max(a, b)) in apart for b in left if a != b) for a in left]
        if not any(degree):
            return set(left)
        left = [silo for silo, count in zip(left, degree, strict=True) if count < max(degree)]


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(list(combinations(range(1, 8), 2)))), st.randoms())
def test_no_pair_that_differs_is_left_and_the_order_does_not_matter(apart: set, random) -> None:
    left = choice.without_mismatches(apart, range(1, 8))
    assert not any(i in left and j in left for i, j in apart)
    assert left >= set(range(1, 8)) - {silo for pair in apart for silo in pair}
    assert left == by_the_book(apart, set(range(1, 8)))
    shuffled = list(apart)
    random.shuffle(shuffled)
    assert choice.without_mismatches(shuffled, [5, 3, 1, 7, 2, 4, 6]) == left


def test_one_corrupt_silo_alone_takes_at_most_one_honest_silo_out() -> None:
    for victims in (each for size in range(7) for each in combinations(range(2, 8), size)):
        left = choice.without_mismatches([(1, j) for j in victims], range(1, 8))
        assert len(set(range(2, 8)) - left) <= 1


def test_mismatches_are_read_off_the_headers(a_round: ShareRound) -> None:
    headers = {i: made.header for i, made in a_round.made.items()}
    assert choice.mismatches(headers) == []
    wrong = tuple((j, bytes(32) if j in (2, 5) else each) for j, each in headers[3].pair_commitments)
    headers[3] = a_round.bend(3, pair_commitments=wrong).header
    assert choice.mismatches(headers) == [(2, 3), (3, 5)]
    assert choice.mismatches({i: headers[i] for i in (1, 3, 4)}) == []


# --- the choice of lists ----------------------------------------------------------------------------------------------


def terms_with(quorum: int, fewest: int = 1, colluders: int = -1, blocks: tuple = ()) -> SimpleNamespace:
    """As much of a contract as the rules read."""
    return SimpleNamespace(
        quorum=quorum, fewest=fewest, privacy=SimpleNamespace(colluders=colluders), sum=SimpleNamespace(blocks=blocks)
    )


def bare_header(silo: int, silos: range, apart: set[tuple[int, int]]) -> bytes:
    """A signed header as far as the rules read it; commitments differ for the pairs in ``apart``."""
    from privacy.messages import Signed

    def tag(peer: int) -> bytes:
        pair = (min(silo, peer), max(silo, peer))
        return bytes([silo if pair in apart else 0, *pair]) + bytes(29)

    header = Header(
        round_ctx=bytes(32), silo=silo, attempt=bytes(16), ledger_counter=1, dimension=1, root=bytes(32), self_commitment=bytes(32),
        pair_commitments=tuple((peer, tag(peer)) for peer in silos if peer != silo),
    )  # fmt: skip
    signed = Signed(version="gsum/1", type="header", sender=silo, context=bytes(32), body=encode(header), signature=bytes(64))
    return encode(signed)


def listing_of(guardian: int, silos, headers: dict[int, bytes]) -> tuple[bytes, Listing]:
    listed = tuple((silo, hashlib.sha256(headers[silo]).digest()) for silo in sorted(silos))
    listing = Listing(round_ctx=bytes(32), guardian=guardian, headers=listed, disputes=())
    return encode(listing), listing


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sets(st.integers(1, 5)), min_size=3, max_size=6), st.sets(st.sampled_from(list(combinations(range(1, 6), 2)))))
def test_the_chosen_lists_are_the_best_of_all_choices(sets: list[set[int]], apart: set) -> None:
    """Against all choices of q lists: the largest set, and of those the lowest guardians."""
    silos, quorum = range(1, 6), 3
    headers = {silo: bare_header(silo, silos, apart) for silo in silos}
    lists = {FIRST + k: listing_of(FIRST + k, each, headers) for k, each in enumerate(sets)}
    every = []
    for guardians in combinations(sorted(lists), quorum):
        common = set.intersection(*(sets[g - FIRST] for g in guardians))
        every.append((-len(by_the_book(apart, common)), guardians))
    size, guardians = min(every)
    made = choice.choose(headers, lists, round_ctx=bytes(32), silos=silos, terms=terms_with(quorum))
    if -size < 1:
        assert made is None
        return
    assert made.lists == tuple(lists[g][0] for g in guardians)
    common = set.intersection(*(sets[g - FIRST] for g in guardians))
    assert made.headers == tuple(headers[silo] for silo in sorted(common))
    assert {silo for silo, _ in made.left_out} == set(silos) - by_the_book(apart, common)


def test_many_different_lists_still_give_a_large_set() -> None:
    """Lists of guardians that looked one after the other, while uploads came in: each holds one more."""
    silos = range(1, 31)
    headers = {silo: bare_header(silo, silos, set()) for silo in silos}
    lists = {FIRST + k: listing_of(FIRST + k, range(1, k + 2), headers) for k in range(30)}
    made = choice.choose(headers, lists, round_ctx=bytes(32), silos=silos, terms=terms_with(10))
    assert len(made.headers) == 21
    assert made.lists == tuple(lists[FIRST + k][0] for k in range(20, 30))
    assert made.left_out == tuple((silo, "unlisted") for silo in range(22, 31))


def test_too_few_lists_or_silos_give_no_freeze(a_round: ShareRound) -> None:
    lists = a_round.lists()
    assert a_round.choose({g: lists[g] for g in GUARDS[:3]}) is None
    assert a_round.choose({g: lists[g] for g in GUARDS[:4]}) is not None
    assert a_round.choose({g: a_round.list_of(g, only=(1, 2)) for g in GUARDS}) is None
    assert a_round.choose({}) is None


def test_a_list_that_does_not_verify_is_left_aside(a_round: ShareRound) -> None:
    lists = a_round.lists()
    other = ShareRound(an_epoch(), manifest=b"another").lists()
    for bad in (b"", lists[GUARDS[1]], other[GUARDS[0]], lists[GUARDS[0]][:-1] + b"\0"):
        made = a_round.choose({**lists, GUARDS[0]: bad})
        assert made.lists == tuple(lists[g] for g in GUARDS[1:])
        assert a_round.choose({**lists, GUARDS[0]: bad, GUARDS[1]: b""}) is None


def test_a_list_of_headers_that_are_not_stored_is_not_used(a_round: ShareRound) -> None:
    lists = a_round.lists()
    invented = Listing(round_ctx=a_round.ctx, guardian=GUARDS[0], headers=((1, bytes(32)),), disputes=())
    made = a_round.choose({**lists, GUARDS[0]: a_round.by(GUARDS[0], "list", invented)})
    assert made.lists == tuple(lists[g] for g in GUARDS[1:])
    all_invent = {
        g: a_round.by(g, "list", changed(invented, guardian=g, headers=tuple((i, bytes(32)) for i in range(1, 6)))) for g in GUARDS
    }
    assert a_round.choose(all_invent) is None


@pytest.mark.parametrize(("headers", "disputes"), [
    (((2, bytes(32)), (1, bytes(32))), ()), (((1, bytes(32)), (1, bytes(32))), ()), (((6, bytes(32)),), ()),
    (((1, bytes(32)),), ((1, "sealed"),)), ((), ((3, "root"), (2, "root"))), ((), ((2, "root"), (2, "sealed"))),
    ((), ((9, "root"),)),
])  # fmt: skip
def test_a_list_names_each_silo_of_the_epoch_at_most_once(a_round: ShareRound, headers: tuple, disputes: tuple) -> None:
    raw = a_round.by(FIRST, "list", Listing(round_ctx=a_round.ctx, guardian=FIRST, headers=headers, disputes=disputes))
    with pytest.raises(TrustError, match=f"list of guardian {FIRST} names silos"):
        freeze.check_list(raw, a_round.guardians[FIRST], silos=a_round.setup.silos, **a_round.places)


# --- the freeze, verified ---------------------------------------------------------------------------------------------


def refused(a_round: ShareRound, made: Freeze, match: str, **how) -> None:
    with pytest.raises(TrustError, match=match):
        a_round.check_freeze(made, **how)


def test_everybody_computes_the_same_set_from_the_freeze_alone() -> None:
    a_round = ShareRound(an_epoch(), without=(4,))
    made = a_round.choose()
    frozen = a_round.check_freeze(made)
    assert (tuple(frozen.headers), frozen.silos, frozen.missing) == ((1, 2, 3, 5), (1, 2, 3, 4, 5), (4,))
    assert frozen.digest == guardian_sum.digest_of_set([a_round.made[i].raw for i in (1, 2, 3, 5)])
    assert made.left_out == ((4, "absent"),)
    assert a_round.check_freeze(made, own=a_round.made[2].raw, seen=(1, 2, 3, 5)) == frozen


def test_the_freeze_holds_exactly_q_lists_of_guardians(a_round: ShareRound) -> None:
    made, lists = a_round.choose(), a_round.lists()
    ordered = [lists[g] for g in GUARDS]
    refused(a_round, changed(made, lists=tuple(ordered[:3])), "3 lists, exactly 4 are needed")
    refused(a_round, changed(made, lists=tuple(ordered)), "5 lists, exactly 4")
    refused(a_round, changed(made, lists=()), "0 lists")
    refused(a_round, changed(made, lists=(ordered[0], *ordered[:3])), "each once, by ascending id")
    refused(a_round, changed(made, lists=(ordered[1], ordered[0], *ordered[2:4])), "each once, by ascending id")
    by_silo = a_round.signed(1, "list", Listing(round_ctx=a_round.ctx, guardian=FIRST, headers=(), disputes=()))
    refused(a_round, changed(made, lists=(by_silo, *ordered[1:4])), "wanted guardians")
    other = ShareRound(an_epoch(), manifest=b"another").lists()[FIRST]
    refused(a_round, changed(made, lists=(other, *ordered[1:4])), f"list of guardian {FIRST} is for round")
    forged = guardian_list_by_a_stranger(a_round)
    refused(a_round, changed(made, lists=(forged, *ordered[1:4])), "not by key")


def guardian_list_by_a_stranger(a_round: ShareRound) -> bytes:
    from privacy.envelope import sign

    body = encode(Listing(round_ctx=a_round.ctx, guardian=FIRST, headers=(), disputes=()))
    return sign(a_round.setup.guards[FIRST + 1].identity, type="list", context=a_round.setup.context, sender=FIRST, body=body)


def test_the_freezes_headers_are_those_that_all_its_lists_name(a_round: ShareRound) -> None:
    made = a_round.choose()
    refused(a_round, changed(made, headers=made.headers[:4]), "the lists agree on")
    again = a_round.attempt(2, number=2).raw
    refused(a_round, changed(made, headers=(made.headers[0], again, *made.headers[2:])), "or on other headers")
    refused(a_round, changed(made, headers=(*made.headers[:4], made.headers[3])), "each once, by ascending id")
    refused(a_round, changed(made, headers=made.headers[::-1]), "by ascending id")
    short = a_round.choose({g: a_round.list_of(g, only=(1, 2, 3, 4)) for g in GUARDS})
    refused(a_round, changed(short, headers=made.headers), "the lists agree on")
    refused(a_round, changed(made, round_ctx=bytes(32)), "the freeze is for round 0000")


def test_a_set_below_u_min_is_refused() -> None:
    a_round = ShareRound(an_epoch(dropouts=1))
    lists = {g: a_round.list_of(g, only=(1, 2, 3)) for g in GUARDS}
    assert a_round.choose(lists) is None
    made = Freeze(
        round_ctx=a_round.ctx, headers=tuple(a_round.made[i].raw for i in (1, 2, 3)), lists=tuple(lists[g] for g in GUARDS[:4]),
        left_out=((4, "unlisted"), (5, "unlisted")),
    )  # fmt: skip
    refused(a_round, made, "the set has 3 silos, at least 4 are needed")


def test_every_silo_outside_has_a_reason_that_the_lists_bear_out() -> None:
    a_round = ShareRound(an_epoch())
    made = a_round.choose({g: a_round.list_of(g, only=(1, 2, 3, 4)) for g in GUARDS})
    assert made.left_out == ((5, "unlisted"),)
    a_round.check_freeze(changed(made, left_out=((5, "absent"),)))  # nobody here saw it
    refused(a_round, changed(made, left_out=((5, "absent"),)), "silo 5 is left out as absent, the lists say unlisted", seen=(5,))
    refused(a_round, changed(made, left_out=((5, "absent"),)), "left out as absent", own=a_round.made[5].raw)
    refused(a_round, changed(made, left_out=((5, "mismatch"),)), "left out as mismatch")
    refused(a_round, changed(made, left_out=((5, "block"),)), "left out as block")
    refused(a_round, changed(made, left_out=()), "left out as None")
    refused(
        a_round, changed(made, left_out=((4, "unlisted"), (5, "unlisted"))), r"are said to be left out, outside the set are \[5\]"
    )
    refused(a_round, changed(made, left_out=((5, "unlisted"), (5, "unlisted"))), "are said to be left out")
    # One list of the four names silo 5: then somebody saw it.
    some = {g: a_round.list_of(g, only=(1, 2, 3, 4) if g > FIRST else None) for g in GUARDS[:4]}
    made = a_round.choose(some)
    assert made.left_out == ((5, "unlisted"),)
    refused(a_round, changed(made, left_out=((5, "absent"),)), "left out as absent")


def test_a_disputed_upload_is_not_absent() -> None:
    a_round = ShareRound(an_epoch())
    lists = {}
    for guardian in GUARDS:
        listing = Listing(
            round_ctx=a_round.ctx, guardian=guardian, disputes=((3, "root"),),
            headers=tuple((i, hashlib.sha256(made.raw).digest()) for i, made in a_round.made.items() if i != 3),
        )  # fmt: skip
        lists[guardian] = a_round.by(guardian, "list", listing)
    made = a_round.choose(lists)
    assert made.left_out == ((3, "unlisted"),)
    refused(a_round, changed(made, left_out=((3, "absent"),)), "left out as absent")


def test_silos_that_disagree_are_out_of_the_set_and_named_so() -> None:
    a_round = ShareRound(an_epoch())
    a_round.made[3] = a_round.attempt(3, lie={1: bytes(32), 2: bytes(32)})
    made = a_round.choose()
    assert (len(made.headers), made.left_out) == (5, ((3, "mismatch"),))
    assert tuple(a_round.check_freeze(made).headers) == (1, 2, 4, 5)
    refused(a_round, changed(made, left_out=()), "left out as None")
    refused(a_round, changed(made, left_out=((3, "unlisted"),)), "left out as unlisted")
    # It is not up to the aggregator to keep the liar and drop those it lied about.
    refused(a_round, changed(made, left_out=((1, "mismatch"), (2, "mismatch"))), "silo 3 is left out as None")


def test_a_silo_that_disagrees_is_left_out_knows_it_and_may_not_sum_alone() -> None:
    a_round = ShareRound(an_epoch())
    a_round.made[3] = a_round.attempt(3, lie={1: bytes(32), 2: bytes(32)})
    assert 3 not in a_round.check_freeze(a_round.choose(), own=a_round.made[3].raw).headers
    assert np_sum_ok(a_round)


def np_sum_ok(a_round: ShareRound) -> bool:
    return bool((a_round.total() == a_round.expected((1, 2, 4, 5))).all())


def test_the_set_holds_this_silos_header_or_none_of_it(a_round: ShareRound) -> None:
    again = a_round.attempt(2, number=2).raw
    refused(a_round, a_round.choose(), "another header of this silo", own=again)
    left = a_round.choose({g: a_round.list_of(g, only=(1, 3, 4, 5)) for g in GUARDS})
    assert a_round.check_freeze(left, own=again).missing == (2,)


def test_a_header_in_the_set_is_for_the_silos_and_guardians_of_this_epoch() -> None:
    a_round = ShareRound(an_epoch(present=(1, 2, 4, 5)))
    for changes, match in (
        ({"bundles": ()}, r"header of silo 2 has bundles for guardians \[\]"),
        ({"bundles": a_round.made[2].header.bundles[::-1]}, "has bundles for guardians"),
        ({"pair_commitments": tuple((j, bytes(32)) for j in (1, 3, 4, 5))}, r"peers are \[1, 4, 5\]"),
    ):
        bent = ShareRound(an_epoch(present=(1, 2, 4, 5)))
        bent.made[2] = bent.bend(2, **changes)
        lists = tuple(bent.list_of(g) for g in GUARDS[:4]) if "bundles" not in changes else a_round.choose().lists
        refused(bent, Freeze(round_ctx=bent.ctx, headers=tuple(m.raw for m in bent.made.values()), lists=lists), match)
    with pytest.raises(TrustError, match="silo 2 is not among the silos of this epoch"):
        guardian_sum.check_header(
            a_round.made[2].raw, a_round.terms.by_id(2), accepted=a_round.setup.accepted, silos=(1, 4, 5), **a_round.places
        )


# --- blocks -----------------------------------------------------------------------------------------------------------

BLOCKS = ((1, 2, 3), (4, 5, 6))


def test_with_blocks_a_set_is_made_of_whole_ones() -> None:
    setup = an_epoch(6, dropouts=3, blocks=BLOCKS)
    a_round = ShareRound(setup, without=(5,))
    made = a_round.choose()
    assert made.left_out == ((4, "block"), (5, "absent"), (6, "block"))
    assert tuple(a_round.check_freeze(made).headers) == (1, 2, 3)
    assert (a_round.total() == a_round.expected((1, 2, 3))).all()
    refused(a_round, changed(made, left_out=((5, "absent"),)), "silo 4 is left out as None")
    assert ShareRound(setup, without=(1, 5)).choose() is None
    assert tuple(ShareRound(setup).certified().frozen.headers) == (1, 2, 3, 4, 5, 6)


def test_a_block_with_a_silo_outside_the_epoch_is_not_whole() -> None:
    a_round = ShareRound(an_epoch(6, dropouts=3, blocks=BLOCKS, present=(1, 2, 3, 4, 5)))
    assert tuple(a_round.certified().frozen.headers) == (1, 2, 3)


def test_no_two_sets_of_blocks_differ_by_less_than_a_block() -> None:
    terms = terms_with(1, blocks=BLOCKS)
    found = {choice.select((), silos, terms) for size in range(7) for silos in combinations(range(1, 7), size)}
    assert found == {(), (1, 2, 3), (4, 5, 6), (1, 2, 3, 4, 5, 6)}


# --- the certificate --------------------------------------------------------------------------------------------------


def test_a_certificate_is_exactly_q_endorsements_of_this_set(a_round: ShareRound) -> None:
    frozen = a_round.check_freeze()
    stated = a_round.endorsements(frozen)
    made = a_round.certificate(frozen)
    assert made.consents == tuple(stated[g] for g in GUARDS[:4])
    assert a_round.check_certificate(made, frozen).frozen == frozen
    one, two, three, four, five = (stated[g] for g in GUARDS)
    for consents, match in (
        ((one, two, three), "3 endorsements, exactly 4"), ((one, two, three, four, five), "5 endorsements, exactly 4"),
        ((one, two, three, three), "each once"), ((two, one, three, four), "ascending"), ((), "0 endorsements"),
        ((one, two, three, a_round.signed(4, "endorsement", freeze.endorsement(frozen, guardian=GUARDS[3]))), "wanted guardians"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            a_round.check_certificate(changed(made, consents=consents), frozen)
    for changes, match in (
        ({"frozen": bytes(32)}, "the certificate is for set"),
        ({"round_ctx": bytes(32)}, "certificate is for round"),
    ):
        with pytest.raises(TrustError, match=match):
            a_round.check_certificate(changed(made, **changes), frozen)
    for fifth in permutations((one, two, three, five), 4):
        if list(fifth) == [one, two, three, five]:
            assert a_round.check_certificate(changed(made, consents=fifth), frozen)


def test_an_endorsement_of_another_set_round_epoch_or_guardian_counts_for_nothing(a_round: ShareRound) -> None:
    frozen = a_round.check_freeze()
    made, stated = a_round.certificate(frozen), a_round.endorsements(frozen)
    smaller = a_round.check_freeze(a_round.choose({g: a_round.list_of(g, only=(1, 2, 3, 4)) for g in GUARDS}))
    later = ShareRound(an_epoch(), manifest=b"round 2")
    elsewhere = ShareRound(an_epoch(dropouts=1))
    for bad, match in (
        (a_round.endorsements(smaller)[FIRST], f"endorsement of guardian {FIRST} is for set"),
        (later.endorsements(later.check_freeze())[FIRST], f"endorsement of guardian {FIRST} is for round"),
        (elsewhere.endorsements(elsewhere.check_freeze())[FIRST], "context"),
        (a_round.by(FIRST, "endorsement", freeze.endorsement(frozen, guardian=FIRST + 1)), "says it is of guardian"),
        (a_round.by(FIRST, "close", freeze.endorsement(frozen, guardian=FIRST)), "type close where type endorsement"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            a_round.check_certificate(changed(made, consents=(bad, *made.consents[1:])), frozen)
        found = freeze.choose_endorsements(
            {**stated, FIRST: bad}, frozen, accepted=a_round.setup.accepted, epoch_ctx=a_round.setup.context
        )
        assert found.consents == tuple(stated[g] for g in GUARDS[1:])


def test_fewer_than_q_endorsements_make_no_certificate(a_round: ShareRound) -> None:
    frozen = a_round.check_freeze()
    stated = a_round.endorsements(frozen)
    place = {"accepted": a_round.setup.accepted, "epoch_ctx": a_round.setup.context}
    assert freeze.choose_endorsements({g: stated[g] for g in GUARDS[:3]}, frozen, **place) is None
    assert freeze.choose_endorsements({}, frozen, **place) is None


@pytest.mark.parametrize(("guardians", "corrupt"), [(h, t) for h in range(3, 12) for t in range(h)])
def test_two_certificates_for_different_sets_need_more_than_t_guardians_that_sign_twice(guardians: int, corrupt: int) -> None:
    """The arithmetic of q, for every H and T: two quorums share at least T + 1, and T alone never make one, nor reconstruct."""
    quorum = (guardians + corrupt) // 2 + 1
    assert 2 * quorum - guardians >= corrupt + 1
    assert corrupt < quorum <= guardians
    # q closes that say "none" leave too few for a certificate, even if all corrupt ones lie.
    assert guardians - quorum + corrupt < quorum


def test_how_many_signatures_a_certificate_has_stands_in_the_contract(a_round: ShareRound) -> None:
    for message in (Certificate, Freeze, Endorsement, Close):
        assert not {"quorum", "threshold", "count", "fewest"} & set(message.__struct_fields__)


# --- closes -----------------------------------------------------------------------------------------------------------


def closes(a_round: ShareRound, frozen: dict[int, bytes]) -> dict[int, bytes]:
    return {
        g: a_round.by(g, "close", freeze.close(round_ctx=a_round.ctx, guardian=g, frozen=each, released=bool(each)))
        for g, each in frozen.items()
    }


def test_void_only_if_all_q_say_none(a_round: ShareRound) -> None:
    for signed in range(5):
        for which in combinations(GUARDS[:4], signed):
            stated = closes(a_round, {g: b"\1" * 32 if g in which else b"" for g in GUARDS[:4]})
            found = freeze.ended(tuple(stated.values()), accepted=a_round.setup.accepted, **a_round.places)
            assert found == ("annulled" if signed else "void")


def test_q_guardians_that_say_none_are_preferred(a_round: ShareRound) -> None:
    place = {"accepted": a_round.setup.accepted, **a_round.places}
    stated = closes(a_round, {g: b"\1" * 32 if g == FIRST else b"" for g in GUARDS})
    chosen = freeze.choose_closes(stated, **place)
    assert chosen == tuple(stated[g] for g in GUARDS[1:])
    assert freeze.ended(chosen, **place) == "void"
    stated = closes(a_round, {g: b"\1" * 32 if g in GUARDS[1:3] else b"" for g in GUARDS})
    chosen = freeze.choose_closes(stated, **place)
    assert chosen == tuple(stated[g] for g in GUARDS[:4])
    assert freeze.ended(chosen, **place) == "annulled"
    assert freeze.choose_closes({g: stated[g] for g in GUARDS[:3]}, **place) is None
    assert freeze.choose_closes({**{g: stated[g] for g in GUARDS[:3]}, GUARDS[3]: b"rubbish"}, **place) is None


def test_a_round_ends_by_exactly_q_words_of_guardians_for_this_round(a_round: ShareRound) -> None:
    place = {"accepted": a_round.setup.accepted, **a_round.places}
    stated = closes(a_round, dict.fromkeys(GUARDS, b""))
    one, two, three, four, five = (stated[g] for g in GUARDS)
    elsewhere = ShareRound(an_epoch(), manifest=b"round 2")
    other = closes(elsewhere, {FIRST: b""})[FIRST]
    for given_closes, match in (
        ((one, two, three), "3 closes, exactly 4"), ((one, two, three, four, five), "5 closes"),
        ((one, one, two, three), "each once"),
        ((four, three, two, one), "ascending"), ((other, two, three, four), f"close of guardian {FIRST} is for round"),
        ((), "0 closes"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            freeze.ended(given_closes, **place)


@pytest.mark.parametrize(("frozen", "released"), [(b"\1" * 31, False), (b"\1", False), (b"", True)])
def test_a_close_that_cannot_be_is_refused(a_round: ShareRound, frozen: bytes, released: bool) -> None:
    raw = a_round.by(FIRST, "close", Close(round_ctx=a_round.ctx, guardian=FIRST, frozen=frozen, released=released))
    with pytest.raises(TrustError, match=f"close of guardian {FIRST} names a set of {len(frozen)} bytes"):
        freeze.check_close(raw, a_round.guardians[FIRST], **a_round.places)


# --- consent mode takes nothing of this -------------------------------------------------------------------------------


def test_consent_mode_refuses_lists_and_silos_left_out() -> None:
    consent = Round(a_consent_epoch())
    for extra in ({"lists": (b"x",)}, {"left_out": ((2, "absent"),)}):
        with pytest.raises(TrustError, match="consent mode has guardians' lists"):
            consent.check_freeze(changed(consent.freeze(), **extra))


def test_consent_mode_never_leaves_this_silo_out() -> None:
    consent = Round(a_consent_epoch())
    frozen = consent.check_freeze(own=consent.made[1].raw)
    assert isinstance(frozen, Frozen)
    assert frozen.missing == ()


def test_every_flipped_byte_of_a_freeze_is_refused_or_gives_the_same_set() -> None:
    """Whatever changes in the document on its way, nobody takes another set for it."""
    a_round = ShareRound(an_epoch(), without=(4,))
    made = a_round.choose()
    raw, wanted = encode(made), a_round.check_freeze(made).digest
    for at in range(0, len(raw), 11):
        bent = bytearray(raw)
        bent[at] ^= 1 << at % 8
        try:
            found = msgspec.msgpack.decode(bytes(bent), type=Freeze)
        except msgspec.DecodeError:
            continue
        try:
            assert a_round.check_freeze(found).digest == wanted
        except TrustError:
            continue


def test_two_more_than_collude_stand_in_every_set() -> None:
    """Defence in depth: ``parse`` refuses such contracts, and nobody signs under one that came in another way."""
    setup = an_epoch()
    terms = setup.accepted.terms
    for colluders, fine in ((3, True), (4, False), (5, False)):
        bold = msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, colluders=colluders))
        a_round = ShareRound(replace(setup, accepted=msgspec.structs.replace(setup.accepted, terms=bold)))
        made = ShareRound(setup).choose()
        if fine:
            assert len(a_round.check_freeze(a_round.choose()).headers) == 5
            continue
        assert a_round.choose() is None
        own = changed(made, headers=tuple(m.raw for m in a_round.made.values()), lists=tuple(a_round.lists().values())[:4])
        refused(a_round, own, "the set has 5 silos")
