# SPDX-License-Identifier: Apache-2.0
"""Checks whose absence no other test of their module noticed (tests.mutation found them), each with the input only it refuses."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from privacy import envelope, prg
from privacy.errors import SiloquyError, TrustError
from privacy.federation import Guardian
from privacy.identity import curve25519, keys, signatures
from privacy.messages import Close, Header, PairSeeds, encode
from privacy.secure_sum import blocks, choice, epoch, guardian_sum, slices
from tests.sharing import FIRST
from tests.terms import contract_bytes, public, seed
from tests.test_epoch import confirmed
from tests.test_freeze import bare_header, listing_of, terms_with
from tests.test_guardian_sum import Round, an_epoch
from tests.test_slices import segment_proof

OTHER = keys.Identity(name="other", sign_seed=seed(99))


def test_a_contract_that_its_own_aggregator_did_not_sign_is_refused() -> None:
    raw = contract_bytes(aggregator_key=public(100))
    digest = envelope.parse(raw).digest
    for identity, fits in ((keys.Identity(name="hub", sign_seed=seed(100)), True), (OTHER, False)):
        document = envelope.sign(identity, type="contract", context=digest, sender=0, body=raw)
        if fits:
            assert envelope.open_contract(document).digest == digest
            continue
        with pytest.raises(TrustError, match="not by key"):
            envelope.open_contract(document)


def test_another_total_than_the_sum_is_refused_by_name() -> None:
    a_round = Round(an_epoch())
    frozen = a_round.check_freeze()
    vectors, seeds = ({i: getattr(made, name) for i, made in a_round.made.items()} for name in ("y", "self_seed"))
    total = a_round.total()
    guardian_sum.check_total(total, vectors, seeds, frozen)
    total[0] += 1
    with pytest.raises(TrustError) as caught:
        guardian_sum.check_total(total, vectors, seeds, frozen)
    assert caught.value.code == "false-sum"


def test_a_vector_of_another_length_than_its_header_says_is_refused_although_the_root_fits() -> None:
    made = Round(an_epoch()).made[1]
    guardian_sum.check_vector(made.y, made.header)
    longer = msgspec.structs.replace(made.header, dimension=made.y.size + 1)
    with pytest.raises(TrustError, match="silo 1"):
        guardian_sum.check_vector(made.y, longer)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_pair_seed_of_another_length_is_refused(size: int) -> None:
    """A seed of 0 bytes would make the secret the X25519 one alone."""
    setup = confirmed(3)
    sender, reader = setup.parties[1], setup.parties[2]
    note = next(note for note in setup.notes() if note.silo == 2)
    sealed = envelope.seal(note.seed_key, bytes(size), info=epoch._seed_info(setup.context, 1, 2))
    honest = epoch.seal_seeds(sender.secrets, setup.notes(), context=setup.context)
    bent = tuple((peer, sealed if peer == 2 else each) for peer, each in honest.sealed)
    setup.post_seeds(sender, PairSeeds(epoch=honest.epoch, silo=1, sealed=bent))
    with pytest.raises(TrustError, match=f"pair seed of {size} bytes"):
        setup.derive(reader)


@pytest.mark.parametrize("size", [16, 24, 31, 33])
def test_a_key_stream_has_keys_of_one_length(size: int) -> None:
    """AES takes 16 and 24 bytes as well: other streams, of less strength."""
    for made in (prg.Keystream, prg.Randomness.from_key, lambda key: prg.stream(key, 4)):
        with pytest.raises(SiloquyError, match="a key is 32 bytes"):
            made(bytes(size))
    with pytest.raises(SiloquyError, match="a key is 32 bytes"):
        prg.add_streams(np.zeros(4, dtype="<u4"), [(bytes(size), 1)])


@pytest.mark.parametrize("more", [b"\0", b"\0" * 32])
def test_a_public_key_has_one_length(more: bytes) -> None:
    """Zeros behind a little-endian number leave the number as it is."""
    sign_key, dh_key = OTHER.public.sign_key, bytes([9]) + bytes(31)
    for check, key in ((curve25519.check_sign_key, sign_key), (curve25519.check_dh_key, dh_key)):
        check(key)
        with pytest.raises(TrustError):
            check(key + more)
        with pytest.raises(TrustError):
            check(key[:-1])


@pytest.mark.parametrize("size", [0, 32, keys.SEAL_KEY_BYTES - 1, keys.SEAL_KEY_BYTES + 1])
def test_a_seal_key_of_another_length_is_told_so(size: int) -> None:
    with pytest.raises(TrustError, match=f"has {keys.SEAL_KEY_BYTES} bytes, got {size}"):
        keys.load_seal_key(bytes(size))


IDENTITY_POINT = b"\1" + bytes(31)


@pytest.mark.parametrize("half", [b"", bytes(signatures.ML_DSA_KEY_BYTES)])
def test_a_key_under_which_everything_verifies_is_unfit_with_and_without_a_second_half(half: bytes) -> None:
    signatures.check_verify_key(OTHER.public.sign_key + half)
    with pytest.raises(TrustError, match="prime order"):
        signatures.check_verify_key(IDENTITY_POINT + half)


def test_a_guardian_cannot_speak_for_another() -> None:
    one = Guardian(id=2**15 + 1, name="a", organisation="A", sign_key=OTHER.public.sign_key.hex())
    for number, fits in ((one.id, True), (one.id + 1, False)):
        close = Close(round_ctx=bytes(32), guardian=number, frozen=b"", released=False)
        raw = envelope.sign(OTHER, type="close", context=bytes(32), sender=one.id, body=encode(close))
        if fits:
            assert envelope.open_guardian(raw, Close, type="close", context=bytes(32), guardian=one) == close
            continue
        with pytest.raises(TrustError, match=f"of guardian {number}"):
            envelope.open_guardian(raw, Close, type="close", context=bytes(32), guardian=one)


def test_a_segment_is_one_row_of_words_of_its_own_length() -> None:
    """The same bytes as floats, or in two dimensions, have the same hash and another sum."""
    y = np.arange(slices.SEGMENT_WORDS + 5, dtype="<u4")
    blank = {"round_ctx": bytes(32), "silo": 1, "attempt": bytes(16), "ledger_counter": 1, "self_commitment": bytes(32)}
    header = Header(**blank, dimension=y.size, root=guardian_sum.vector_root(y), pair_commitments=())
    proof, last = segment_proof(y, 1), y[slices.SEGMENT_WORDS :]
    slices.check_segment(last, proof, header, 1)
    other_types, other_sizes = (last.view("<f4"), last.view("<i4"), last.reshape(-1, 1)), ((last[:4], 1), (last, 0), (y[:-5], -1))
    for words, segment in (*((each, 1) for each in other_types), *other_sizes):
        with pytest.raises(TrustError, match="words, its header gives"):
            slices.check_segment(words, proof, header, segment)


# --- the rules of a set ---------------------------------------------------------------------------------------------------


def test_no_list_names_no_silo_and_fewer_than_q_give_no_set_however_many_differ() -> None:
    assert choice.agreed([]) == {}
    silos = range(1, 15)
    headers = {silo: bare_header(silo, silos, set()) for silo in silos}
    lists = {FIRST + k: listing_of(FIRST + k, range(1, k + 3), headers) for k in range(choice.MOST_DIFFERENT_LISTS + 1)}

    def chosen(quorum: int) -> object:
        return choice.choose(headers, lists, round_ctx=bytes(32), silos=silos, terms=terms_with(quorum))

    assert chosen(len(lists)) is not None
    assert chosen(len(lists) + 1) is None


def test_a_silo_that_a_list_names_is_not_called_absent_though_its_upload_is_not_stored() -> None:
    silos = range(1, 6)
    headers = {silo: bare_header(silo, silos, set()) for silo in silos}
    lists = {FIRST: listing_of(FIRST, (1, 2, 3), headers), FIRST + 1: listing_of(FIRST + 1, (1, 2, 3, 5), headers)}
    stored = {silo: headers[silo] for silo in (1, 2, 3)}
    made = choice.choose(stored, lists, round_ctx=bytes(32), silos=silos, terms=terms_with(2))
    assert made.left_out == ((4, "absent"), (5, "unlisted"))


def test_a_smaller_block_that_stands_in_no_set_does_not_count_as_the_least() -> None:
    assert blocks.least([(1, 2, 3)], ((1, 2, 3), (4, 5))) == 3
    assert blocks.least([], ((1, 2, 3),)) == 0
