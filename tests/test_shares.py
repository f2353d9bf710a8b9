# SPDX-License-Identifier: Apache-2.0
"""privacy.secure_sum.shares: whole rounds with silos that go, what guardians may give away, and every lie by its name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest

from privacy import envelope
from privacy.errors import TrustError
from privacy.identity import keys
from privacy.messages import Freeze, Shares, Upload
from privacy.secure_sum import guardian_sum, shamir, shares
from privacy.secure_sum.freeze import Certified, Frozen
from privacy.secure_sum.shares import Received
from privacy.transparency import proofs
from tests.sharing import FIRST, HUB, Made, ShareRound, an_epoch, payload_of

GUARDS = tuple(FIRST + k for k in range(5))


@cache
def with_two_gone() -> tuple[ShareRound, Certified]:
    """Silos 2 and 4 of five upload nothing; the set of the other three is certified."""
    a_round = ShareRound(an_epoch(), without=(2, 4))
    return a_round, a_round.certified()


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [each for size in range(3) for each in combinations(range(1, 6), size)])
def test_the_sum_is_exact_whoever_goes(gone: tuple[int, ...]) -> None:
    a_round = ShareRound(an_epoch(), without=gone)
    assert np.array_equal(a_round.total(), a_round.expected(set(range(1, 6)) - set(gone)))


def test_the_sum_is_exact_when_a_silo_goes_after_its_upload_and_before_any_list() -> None:
    """All five upload; guardians list three: the other two count as missing, and their pair masks are taken off."""
    a_round = ShareRound(an_epoch())
    certified_set = a_round.check_freeze(a_round.choose({g: a_round.list_of(g, only=(1, 3, 5)) for g in GUARDS}))
    certified = a_round.check_certificate(a_round.certificate(certified_set), certified_set)
    secrets = a_round.secrets(certified)
    total = guardian_sum.unmask({i: a_round.made[i].y for i in (1, 3, 5)}, secrets.seeds, certified, secrets.pair_keys)
    assert np.array_equal(total, a_round.expected((1, 3, 5)))


@pytest.mark.parametrize("guardians", list(combinations(GUARDS, 4)))
def test_any_q_guardians_suffice(guardians: tuple[int, ...]) -> None:
    a_round, certified = with_two_gone()
    secrets = a_round.secrets(certified, guardians)
    assert secrets.seeds == {i: a_round.made[i].self_seed for i in (1, 3, 5)}
    assert secrets.pair_keys == {(i, j): a_round.made[i].pair_keys[j] for i in (1, 3, 5) for j in (2, 4)}


def test_silos_that_are_guardians_sum_too() -> None:
    """n = H = 5, T = 1, q = 4: one silo may go, as a silo and as a guardian."""
    a_round = ShareRound(an_epoch(corrupt=1, dropouts=1, own=False), without=(3,))
    left = [guardian for guardian in GUARDS if guardian != FIRST + 2]
    assert np.array_equal(a_round.total(left), a_round.expected((1, 2, 4, 5)))


def test_an_epoch_without_some_members_sums_over_its_own_silos() -> None:
    a_round = ShareRound(an_epoch(present=(1, 2, 4, 5)), without=(4,))
    assert a_round.certified().frozen.missing == (4,)
    assert np.array_equal(a_round.total(), a_round.expected((1, 2, 5)))


def test_the_order_of_what_is_released_is_the_documented_one() -> None:
    _, certified = with_two_gone()
    assert shares.places(certified.frozen) == [(1, 0), (3, 0), (5, 0), (1, 2), (1, 4), (3, 2), (3, 4), (5, 2), (5, 4)]


# --- deal -------------------------------------------------------------------------------------------------------------


def test_a_bundle_is_the_documented_one() -> None:
    a_round = ShareRound(an_epoch())
    made, setup = a_round.made[3], a_round.setup
    opened = []
    for bundle, (guardian, digest, root) in zip(made.bundles, made.header.bundles, strict=True):
        place = a_round.ctx + made.header.attempt + b"\0\0\0\3" + guardian.to_bytes(4, "big")
        raw = envelope.open_sealed(setup.guards[guardian].secrets.seal_seed, bundle, info=b"gsum/1 bundle\0" + place)
        assert (digest, len(bundle)) == (hashlib.sha256(bundle).digest(), shares.bundle_bytes(5))
        leaves = [
            hashlib.sha256(b"\0gsum/1 share\0" + place + secret.to_bytes(4, "big") + raw[32 * at : 32 * at + 32]).digest()
            for at, secret in enumerate((0, 1, 2, 4, 5))
        ]
        assert root == proofs.root_of_hashes(leaves)
        opened.append(np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32))
    wanted = [made.self_seed, *(made.pair_keys[j] for j in (1, 2, 4, 5))]
    assert [row.tobytes() for row in shamir.combine((0, 2, 3, 4), [opened[k] for k in (0, 2, 3, 4)])] == wanted


def test_two_deals_of_the_same_secrets_share_nothing() -> None:
    a_round = ShareRound(an_epoch())
    again = a_round.attempt(1)
    one, two = (shares.receive(each.upload, each.header, guardian=FIRST, seal_seed=a_round.setup.guards[FIRST].secrets.seal_seed)
                for each in (a_round.made[1], again))  # fmt: skip
    assert again.self_seed == a_round.made[1].self_seed
    assert not set(map(bytes, one.shares)) & set(map(bytes, two.shares))
    assert not {root for _, _, root in again.header.bundles} & {root for _, _, root in a_round.made[1].header.bundles}


def test_a_deal_is_for_q_guardians_of_the_contract_at_least_and_whole_secrets() -> None:
    setup = an_epoch()
    terms = setup.accepted.terms
    place = {"round_ctx": bytes(32), "silo": 1, "attempt": bytes(16), "terms": terms}
    fit = {"self_seed": bytes(32), "pair_keys": {2: bytes(32)}, "guardian_keys": setup.guardian_keys}
    missing = dict(list(setup.guardian_keys.items())[:3])
    for change, match in (
        ({"guardian_keys": missing}, "keys of guardians"),
        ({"guardian_keys": {**setup.guardian_keys, 40000: b""}}, "keys of guardians"),
        ({"self_seed": bytes(31)}, "has not 32 bytes"), ({"pair_keys": {2: bytes(33)}}, "has not 32 bytes"),
        ({"guardian_keys": dict.fromkeys(setup.guardian_keys, bytes(1216))}, "X25519|X-Wing"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            shares.deal(**{**place, **fit, **change})


# --- what the aggregator takes in, and what a guardian receives -------------------------------------------------------


def test_bundles_beside_a_header_are_the_ones_it_names() -> None:
    made = ShareRound(an_epoch()).made[1]
    shares.check_bundles(made.upload, made.header)
    first, second = made.bundles[:2]
    for bundles, match in (
        (made.bundles[:4], "4 bundles, its header says 5"), ((), "0 bundles"), ((*made.bundles, first), "6 bundles"),
        ((second, first, *made.bundles[2:]), f"for guardian {FIRST} is not"), ((first[:-1], *made.bundles[1:]), "is not the one"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            shares.check_bundles(Upload(header=made.raw, sealed=b"", bundles=bundles), made.header)
    short = b"x" * 10
    entries = ((FIRST, hashlib.sha256(short).digest(), bytes(32)), *made.header.bundles[1:])
    header = ShareRound(an_epoch()).bend(1, bundles=entries).header
    with pytest.raises(TrustError, match="is not the one"):
        shares.check_bundles(Upload(header=made.raw, sealed=b"", bundles=(short, *made.bundles[1:])), header)


def test_a_guardian_that_is_not_in_the_epoch_holds_nothing_and_the_rest_suffice() -> None:
    """Four of five guardians posted a note: no fewer are needed for that, and their places stay those of the contract."""
    a_round = ShareRound(an_epoch(away=(2,)), without=(4,))
    here = [GUARDS[0], *GUARDS[2:]]
    assert [guardian for guardian, _, _ in a_round.made[1].header.bundles] == here
    assert np.array_equal(a_round.total(), a_round.expected((1, 2, 3, 5)))
    certified = a_round.certified()
    assert set(a_round.certificate(certified.frozen).consents) == {a_round.endorsements(certified.frozen)[g] for g in here}
    released = a_round.released(certified, here[:3])
    with pytest.raises(TrustError, match="shares of 3 guardians, 4 are needed"):
        shares.reconstruct(released, certified, accepted=a_round.setup.accepted)


def dealt_wrong(a_round: ShareRound, silo: int, guardian: int, payload: bytes, *, info: bytes | None = None) -> Made:
    """The silo's upload with another sealed bundle for one guardian; its header agrees with the bundle's digest."""
    made = a_round.made[silo]
    place = a_round.ctx + made.header.attempt + silo.to_bytes(4, "big") + guardian.to_bytes(4, "big")
    sealed = envelope.seal(a_round.setup.guardian_keys[guardian], payload, info=info or b"gsum/1 bundle\0" + place)
    at = [each for each, _, _ in made.header.bundles].index(guardian)
    entries = list(made.header.bundles)
    entries[at] = (guardian, hashlib.sha256(sealed).digest(), entries[at][2])
    bent = a_round.bend(silo, bundles=tuple(entries))
    return replace(bent, bundles=(*made.bundles[:at], sealed, *made.bundles[at + 1 :]))


def test_a_bad_bundle_is_a_dispute_with_its_reason_and_raises_nothing() -> None:
    a_round = ShareRound(an_epoch())
    right = a_round.received(FIRST)[2].shares.tobytes()
    changed = bytes([right[0] ^ 1]) + right[1:]
    cases = {
        "sealed": [dealt_wrong(a_round, 2, FIRST, right, info=b"gsum/1 bundle\0" + bytes(60))],
        "root": [dealt_wrong(a_round, 2, FIRST, payload) for payload in (changed, right[:-32], right + bytes(32), right[:-1], b"")],
    }
    made = a_round.made[2]
    cases["sealed"] += [replace(made, bundles=(b"", *made.bundles[1:])), replace(made, bundles=()),
                        replace(made, bundles=(made.bundles[1], *made.bundles[1:]))]  # fmt: skip
    for reason, uploads in cases.items():
        for each in uploads:
            a_round.made[2] = each
            found = a_round.received(FIRST)[2]
            assert (found.dispute, found.shares) == (reason, None)
            stated = shares.listing(a_round.received(FIRST).values(), round_ctx=a_round.ctx, guardian=FIRST)
            assert stated.disputes == ((2, reason),)
            assert [silo for silo, _ in stated.headers] == [1, 3, 4, 5]


def test_a_bundle_opens_for_its_guardian_attempt_and_round_only() -> None:
    a_round = ShareRound(an_epoch())
    made, other = a_round.made[1], a_round.setup.guards[FIRST + 1]
    assert shares.receive(made.upload, made.header, guardian=FIRST, seal_seed=other.secrets.seal_seed).dispute == "sealed"
    again = a_round.attempt(1, number=2)
    moved = replace(again, bundles=made.bundles)
    assert shares.receive(moved.upload, moved.header, guardian=FIRST, seal_seed=other.secrets.seal_seed).dispute == "sealed"
    # Even when the header is made to name the moved bundle's digest and root.
    header = a_round.bend(1, attempt=again.header.attempt).header
    mine = a_round.setup.guards[FIRST].secrets.seal_seed
    assert shares.receive(made.upload, made.header, guardian=FIRST, seal_seed=mine).dispute is None
    assert shares.receive(made.upload, header, guardian=FIRST, seal_seed=mine).dispute == "sealed"
    assert shares.receive(made.upload, made.header, guardian=40000, seal_seed=mine).dispute == "sealed"


def test_a_guardian_that_kept_its_own_bundle_alone_receives_the_same() -> None:
    a_round = ShareRound(an_epoch())
    made, seal_seed = a_round.made[4], a_round.setup.guards[FIRST + 2].secrets.seal_seed
    whole = shares.receive(made.upload, made.header, guardian=FIRST + 2, seal_seed=seal_seed)
    alone = shares.receive_bundle(made.bundles[2], made.raw, made.header, guardian=FIRST + 2, seal_seed=seal_seed)
    assert np.array_equal(whole.shares, alone.shares)
    assert whole.digest == alone.digest == hashlib.sha256(made.raw).digest()


def test_a_list_holds_one_upload_of_a_silo_in_one_round() -> None:
    a_round, other = ShareRound(an_epoch()), ShareRound(an_epoch(), manifest=b"another")
    received = list(a_round.received(FIRST).values())
    with pytest.raises(TrustError, match="two uploads of one silo"):
        shares.listing([*received, received[0]], round_ctx=a_round.ctx, guardian=FIRST)
    with pytest.raises(TrustError, match="header of silo 1 is for round"):
        shares.listing(other.received(FIRST).values(), round_ctx=a_round.ctx, guardian=FIRST)


# --- guarantee 1: too few shares say nothing --------------------------------------------------------------------------


def test_too_few_shares_say_nothing() -> None:
    """q - 1 guardians' shares of a dealt b_i fit every other b_i: a polynomial through them and any value at 0 exists."""
    a_round, certified = with_two_gone()
    released = a_round.released(certified, GUARDS[:3])
    with pytest.raises(TrustError, match="shares of 3 guardians, 4 are needed") as caught:
        shares.reconstruct(released, certified, accepted=a_round.setup.accepted)
    assert caught.value.code == "too-few-shares"
    known = [released[g].shares[:1] for g in GUARDS[:3]]
    for secret in (bytes(32), b"\xff" * 32, a_round.made[1].self_seed):
        # The fourth share that would make the secret this one: solved for, byte by byte, in the field.
        weights = [shamir._weight(x, (1, 2, 3, 4)) for x in (1, 2, 3, 4)]
        rest = [int(byte) for byte in secret]
        for weight, share in zip(weights, known, strict=False):
            rest = [value ^ shamir.multiply(weight, int(byte)) for value, byte in zip(rest, share[0], strict=True)]
        fourth = np.array([[shamir.multiply(value, shamir.inverse(weights[3])) for value in rest]], dtype=np.uint8)
        assert shamir.combine((0, 1, 2, 3), [*known, fourth]).tobytes() == secret


# --- guarantee 2: never both ------------------------------------------------------------------------------------------


def everything_released(a_round: ShareRound, certified: Certified) -> bytes:
    return b"".join(payload_of(a_round, a_round.release(g, certified), certified, g) for g in GUARDS)


def test_never_both() -> None:
    """Of every silo, in every choice of who is missing: its self seed's shares or its pair keys' leave, never both."""
    for gone in [(), (1,), (2, 4), (4, 5)]:
        a_round = ShareRound(an_epoch())
        lists = {g: a_round.list_of(g, only=set(range(1, 6)) - set(gone)) for g in GUARDS}
        frozen = a_round.check_freeze(a_round.choose(lists))
        certified = a_round.check_certificate(a_round.certificate(frozen), frozen)
        left = everything_released(a_round, certified)
        for silo, guardian in product(range(1, 6), GUARDS):
            held = a_round.received(guardian)[silo].shares
            seed_left = held[0].tobytes() in left
            peers = [j for j in range(1, 6) if j != silo]
            pairs_left = {j for at, j in enumerate(peers, start=1) if held[at].tobytes() in left}
            assert seed_left == (silo not in gone)
            assert pairs_left == (set(gone) if silo not in gone else set())


def test_never_both_a_release_message_has_no_field_for_a_silo_or_a_kind() -> None:
    assert Shares.__struct_fields__ == ("round_ctx", "guardian", "frozen", "sealed")


def test_a_second_attempt_of_a_silo_releases_nothing() -> None:
    """The guardian holds another attempt's bundle than the one in the set: b of an attempt outside U stays where it is."""
    a_round, certified = with_two_gone()
    received = a_round.received(FIRST)
    again = a_round.attempt(1, number=2)
    seal_seed = a_round.setup.guards[FIRST].secrets.seal_seed
    received[1] = shares.receive(again.upload, again.header, guardian=FIRST, seal_seed=seal_seed)
    assert received[1].shares is not None
    with pytest.raises(TrustError, match="no shares of silo 1 for the header in the set") as caught:
        shares.release(certified, received, guardian=FIRST, seal_key=HUB.public.seal_key)
    assert caught.value.code == "no-bundle"


# --- guarantee 3: only certified --------------------------------------------------------------------------------------


def test_only_certified_a_release_takes_nothing_but_a_certified_set() -> None:
    a_round, certified = with_two_gone()
    assert shares.release.__annotations__["certified"] == "Certified"
    with pytest.raises(AttributeError):
        shares.release(certified.frozen, a_round.received(FIRST), guardian=FIRST, seal_key=HUB.public.seal_key)


def test_only_certified_what_leaves_is_sealed_to_the_aggregator() -> None:
    a_round, certified = with_two_gone()
    raw = a_round.release(FIRST, certified)
    for each in a_round.received(FIRST).values():
        assert not any(share.tobytes() in raw for share in each.shares)
    assert len(decode_shares(raw).sealed) == shares.release_bytes(certified.frozen)


def decode_shares(raw: bytes) -> Shares:
    from privacy.messages import Signed, decode

    return decode(decode(raw, Signed).body, Shares)


# --- guarantee 4: right secret, or a name -----------------------------------------------------------------------------


def test_a_bundle_that_is_missing_or_disputed_silences_its_guardian_only() -> None:
    a_round, certified = with_two_gone()
    received = a_round.received(FIRST)
    for bad in (None, Received(header=received[3].header, digest=received[3].digest, dispute="root")):
        some = {**received, 3: bad} if bad else {i: each for i, each in received.items() if i != 3}
        with pytest.raises(TrustError, match="no shares of silo 3") as caught:
            shares.release(certified, some, guardian=FIRST, seal_key=HUB.public.seal_key)
        assert caught.value.code == "no-bundle"
    assert a_round.secrets(certified, GUARDS[1:]).seeds[3] == a_round.made[3].self_seed


def resealed(a_round: ShareRound, certified: Certified, guardian: int, payload: bytes, **changes) -> bytes:
    frozen = certified.frozen
    info = b"gsum/1 shares\0" + frozen.round_ctx + frozen.digest + guardian.to_bytes(4, "big")
    sealed = envelope.seal(HUB.public.seal_key, payload, info=info)
    fields = {"round_ctx": frozen.round_ctx, "guardian": guardian, "frozen": frozen.digest, "sealed": sealed, **changes}
    return a_round.by(guardian, "shares", Shares(**fields))


def test_every_flipped_byte_of_released_shares_names_the_guardian() -> None:
    a_round, certified = with_two_gone()
    payload = payload_of(a_round, a_round.release(FIRST, certified), certified, FIRST)
    assert a_round.open_shares(resealed(a_round, certified, FIRST, payload), FIRST, certified)
    for at in range(0, len(payload), 7):
        changed = bytearray(payload)
        changed[at] ^= 1 << at % 8
        with pytest.raises(TrustError, match=rf"shares of guardian {FIRST} contradict the root of silo [135]") as caught:
            a_round.open_shares(resealed(a_round, certified, FIRST, bytes(changed)), FIRST, certified)
        assert (caught.value.code, caught.value.facts["guardian"]) == ("guardian-guilty", FIRST)


def test_released_shares_of_another_length_place_or_guardian_are_refused() -> None:
    a_round, certified = with_two_gone()
    payload = payload_of(a_round, a_round.release(FIRST, certified), certified, FIRST)
    other = payload_of(a_round, a_round.release(FIRST + 1, certified), certified, FIRST + 1)
    piece = len(payload) // 9
    swapped = payload[piece : 2 * piece] + payload[:piece] + payload[2 * piece :]
    for wrong, match in (
        (payload[:-1], "bytes, this set gives"), (payload + b"\0", "bytes, this set gives"), (b"", "bytes, this set gives"),
        (other, "contradict the root"), (swapped, "contradict the root"), (bytes(len(payload)), "contradict the root"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match) as caught:
            a_round.open_shares(resealed(a_round, certified, FIRST, wrong), FIRST, certified)
        assert caught.value.code == "guardian-guilty"
    with pytest.raises(TrustError, match="do not open") as caught:
        a_round.open_shares(resealed(a_round, certified, FIRST, payload, sealed=b"x" * 2000), FIRST, certified)
    assert caught.value.code == "guardian-guilty"


def test_released_shares_open_in_their_own_round_and_set_only() -> None:
    a_round, certified = with_two_gone()
    payload = payload_of(a_round, a_round.release(FIRST, certified), certified, FIRST)
    for changes, match in (({"round_ctx": bytes(32)}, "is for round 0000"), ({"frozen": bytes(32)}, "is for set 0000")):
        with pytest.raises(TrustError, match=match):
            a_round.open_shares(resealed(a_round, certified, FIRST, payload, **changes), FIRST, certified)
    with pytest.raises(TrustError, match="sender"):
        a_round.open_shares(a_round.release(FIRST, certified), FIRST + 1, certified)
    whole = ShareRound(an_epoch())
    with pytest.raises(TrustError, match="is for set"):
        whole.open_shares(a_round.release(FIRST, certified), FIRST, whole.certified())


def test_a_dealer_of_another_self_seed_is_named() -> None:
    a_round = ShareRound(an_epoch(), without=(2, 4))
    a_round.made[5] = a_round.bend(5, self_commitment=bytes(32))
    certified = a_round.certified()
    with pytest.raises(TrustError, match="silo 5 dealt shares of another secret") as caught:
        a_round.secrets(certified)
    assert (caught.value.code, caught.value.facts["silo"]) == ("dealer-guilty", 5)


def test_a_dealer_of_another_pair_key_is_named() -> None:
    a_round = ShareRound(an_epoch(), without=(2, 4))
    commitments = tuple((j, bytes(32) if j == 4 else each) for j, each in a_round.made[3].header.pair_commitments)
    a_round.made[3] = a_round.bend(3, pair_commitments=commitments)
    certified = a_round.certified()
    with pytest.raises(TrustError, match="silo 3 dealt shares of another secret: the key of silos 3 and 4") as caught:
        a_round.secrets(certified)
    assert (caught.value.code, caught.value.facts["silo"]) == ("dealer-guilty", 3)


def test_the_lowest_q_guardians_are_used() -> None:
    a_round, certified = with_two_gone()
    released = a_round.released(certified)
    spoilt = replace(released[GUARDS[4]], shares=np.zeros_like(released[GUARDS[4]].shares))
    assert shares.reconstruct({**released, GUARDS[4]: spoilt}, certified, accepted=a_round.setup.accepted).seeds
    spoilt = replace(released[GUARDS[3]], shares=np.zeros_like(released[GUARDS[3]].shares))
    with pytest.raises(TrustError, match="dealt shares of another secret"):
        shares.reconstruct({**released, GUARDS[3]: spoilt}, certified, accepted=a_round.setup.accepted)


# --- unmasking with missing silos -------------------------------------------------------------------------------------


def test_pair_keys_are_exactly_those_with_missing_silos_and_the_committed_ones() -> None:
    a_round, certified = with_two_gone()
    secrets = a_round.secrets(certified)
    vectors = {i: a_round.made[i].y for i in (1, 3, 5)}
    right = secrets.pair_keys
    for wrong, match in (
        ({}, "keys of 0 pairs"), (None, "keys of 0 pairs"), ({k: v for k, v in right.items() if k != (5, 4)}, "keys of 5 pairs"),
        ({**right, (1, 3): bytes(32)}, "keys of 7 pairs"), ({**right, (3, 2): bytes(32)}, "key of silos 3 and 2 contradicts"),
        ({**right, (1, 2): right[1, 4], (1, 4): right[1, 2]}, "key of silos 1 and 2 contradicts"),
        ({**right, (1, 2): right[1, 2][:31]}, "key of silos 1 and 2 contradicts"),
    ):  # fmt: skip
        with pytest.raises(TrustError, match=match):
            guardian_sum.unmask(vectors, secrets.seeds, certified, wrong)
    total = guardian_sum.unmask(vectors, secrets.seeds, certified, right)
    with pytest.raises(TrustError, match="not the sum of the vectors"):
        guardian_sum.check_total(total + np.uint32(1), vectors, secrets.seeds, certified.frozen, right)


def test_without_missing_silos_no_pair_key_is_taken() -> None:
    a_round = ShareRound(an_epoch())
    certified = a_round.certified()
    secrets = a_round.secrets(certified)
    assert secrets.pair_keys == {}
    with pytest.raises(TrustError, match="keys of 1 pairs"):
        guardian_sum.unmask({i: m.y for i, m in a_round.made.items()}, secrets.seeds, certified, {(1, 2): bytes(32)})


def test_what_is_left_of_a_missing_silos_upload_stays_uniform() -> None:
    """Silo 4 uploaded and is left out: everything that was released, taken off its y, leaves it under its own self mask."""
    a_round = ShareRound(an_epoch(hidden=8192))
    a_round.xs[4] = np.zeros(a_round.terms.dimension, dtype=np.uint32)
    a_round.made[4] = a_round.attempt(4)
    frozen = a_round.check_freeze(a_round.choose({g: a_round.list_of(g, only=(1, 2, 3, 5)) for g in GUARDS}))
    certified = a_round.check_certificate(a_round.certificate(frozen), frozen)
    secrets = a_round.secrets(certified)
    assert set(secrets.pair_keys) == {(i, 4) for i in (1, 2, 3, 5)}
    from privacy import prg
    from privacy.secure_sum.masking import pair_mask

    rest = a_round.made[4].y.copy()
    for (i, _), key in secrets.pair_keys.items():
        stream, sign = pair_mask(key, silo=4, peer=i)
        prg.add_stream(rest, stream, -1 if sign == 1 else 1)
    counts = np.bincount(rest.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert (((counts - expected) ** 2) / expected).sum() < 400  # 255 degrees of freedom: false alarm below 1e-7
    prg.add_stream(rest, guardian_sum_self_key(a_round.made[4], a_round.ctx), -1)
    assert not rest.any()  # the control: under b_4, and only there, lay x_4 = 0


def guardian_sum_self_key(made: Made, ctx: bytes) -> bytes:
    return keys.expand(made.self_seed, "gsum/1 self-mask", ctx, made.header.attempt, (4).to_bytes(4, "big"))


def test_no_repr_shows_a_share() -> None:
    a_round, certified = with_two_gone()
    received = a_round.received(FIRST)[1]
    released = a_round.released(certified, GUARDS[:1])[FIRST]
    assert "shares" not in repr(received)
    assert "shares" not in repr(released)


def test_the_sizes_said_are_the_sizes_made() -> None:
    most = shares.most_release_bytes(5)
    for gone in ((), (2,), (2, 4)):
        a_round = ShareRound(an_epoch(), without=gone)
        certified = a_round.certified()
        assert {len(bundle) for made in a_round.made.values() for bundle in made.bundles} == {shares.bundle_bytes(5)}
        assert len(decode_shares(a_round.release(FIRST, certified)).sealed) == shares.release_bytes(certified.frozen) <= most


@pytest.mark.parametrize("silos", [1, 2, 3, 7, 8, 9, 33, 200])
def test_no_release_of_any_set_is_longer_than_the_cap(silos: int) -> None:
    for standing in range(1, silos + 1):
        length = 0
        for silo in range(1, standing + 1):
            # The missing are the highest ids: 1 + rank among the peers of a silo that stands.
            places = [0, *(gone - 1 for gone in range(standing + 1, silos + 1))]
            length += sum(32 + 32 * proofs.inclusion_length(at, silos) for at in places) if silo else 0
        assert length + envelope.OVERHEAD_BYTES <= shares.most_release_bytes(silos)


def test_a_consent_mode_certificate_opens_no_shares() -> None:
    """Headers without bundles: nothing was dealt, so there is nothing to release."""
    a_round, _ = with_two_gone()
    bare = {i: a_round.bend(i, bundles=()).header for i in (1, 3, 5)}
    frozen = Frozen(round_ctx=a_round.ctx, digest=bytes(32), headers=bare, silos=(1, 3, 5))
    with pytest.raises(TrustError, match="no shares of silo 1"):
        shares.release(Certified(frozen=frozen), a_round.received(FIRST), guardian=FIRST, seal_key=HUB.public.seal_key)
    assert isinstance(a_round.choose(), Freeze)


def test_a_header_is_of_the_epochs_silos_and_has_bundles_for_q_guardians_in_order() -> None:
    a_round = ShareRound(an_epoch())
    entries = a_round.made[2].header.bundles
    stranger = (GUARDS[4] + 1, bytes(32), bytes(32))

    def checked(bundles: tuple, silos: tuple[int, ...] = (1, 2, 3, 4, 5)) -> object:
        raw, accepted = a_round.bend(2, bundles=bundles).raw, a_round.setup.accepted
        return guardian_sum.check_header(raw, a_round.terms.by_id(2), accepted=accepted, silos=silos, **a_round.places)

    for fine in (entries, entries[1:], entries[:2] + entries[3:]):
        assert checked(fine).bundles == fine
    twice, swapped = (*entries[:3], entries[2]), (entries[1], entries[0], *entries[2:])
    for bundles in ((), entries[:3], entries[::-1], twice, swapped, (*entries, stranger)):
        with pytest.raises(TrustError, match="header of silo 2 has bundles for guardians"):
            checked(bundles)
    with pytest.raises(TrustError, match=r"silo 2 is not among the silos of this epoch, \[1, 3, 4, 5\]"):
        checked(entries, (1, 3, 4, 5))
