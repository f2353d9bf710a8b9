# SPDX-License-Identifier: Apache-2.0
"""Verification in pieces: segments prove themselves against a header, sum up to the whole, and are dealt out by the certificate."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import prg
from privacy.errors import TrustError
from privacy.identity.keys import expand
from privacy.messages import Header
from privacy.secure_sum import guardian_sum, slices
from privacy.transparency import proofs

CTX = b"r" * 32
SEGMENT = slices.SEGMENT_WORDS


def segment_of(y, segment: int):
    return y[segment * SEGMENT : (segment + 1) * SEGMENT]


def segment_proof(y, segment: int) -> tuple[bytes, ...]:
    """The hashes beside a segment's subtree, from below upwards."""
    return proofs.inclusion_proof(slices.hashes(y), segment)


def header_of(y, silo: int, seed: bytes, pair_keys, attempt: bytes) -> Header:
    return guardian_sum.build_header(
        y, round_ctx=CTX, silo=silo, attempt=attempt, ledger_counter=1, self_seed=seed, pair_keys=pair_keys
    )


def sum_of(silos, missing, d: int):
    """A round over ``silos`` in an epoch that also has ``missing``: vectors, masked vectors, headers, seeds, pair keys."""
    everybody = sorted([*silos, *missing])
    keys = {(i, j): os.urandom(32) for i in everybody for j in everybody if i < j}
    x, y, headers, seeds = {}, {}, {}, {}
    for i in silos:
        mine = {j: keys[min(i, j), max(i, j)] for j in everybody if j != i}
        x[i] = np.frombuffer(os.urandom(4 * d), dtype="<u4")
        seeds[i], attempt = os.urandom(32), os.urandom(16)
        y[i] = guardian_sum.mask(x[i], round_ctx=CTX, silo=i, attempt=attempt, self_seed=seeds[i], pair_keys=mine)
        headers[i] = header_of(y[i], i, seeds[i], mine, attempt)
    pair_keys = {(i, j): keys[min(i, j), max(i, j)] for i in silos for j in missing}
    return x, y, headers, seeds, pair_keys


@pytest.mark.parametrize("missing", [(), (2, 9)])
@pytest.mark.parametrize("d", [1, 16384, SEGMENT, SEGMENT + 1, 3 * SEGMENT - 5])
def test_same_as_the_whole(missing, d):
    x, y, headers, seeds, pair_keys = sum_of((1, 3, 7), missing, d)
    whole = np.zeros(d, dtype="<u4")
    for each in x.values():
        whole = whole + each
    found = [
        slices.sum_of_segment({i: segment_of(y[i], g) for i in y}, seeds, headers, g, pair_keys=pair_keys)
        for g in range(slices.segments(d))
    ]
    assert np.array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("d", [1, 16384, 16385, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 3 * SEGMENT + 77, 5 * SEGMENT])
def test_held_to_the_header(d):
    y = np.frombuffer(os.urandom(4 * d), dtype="<u4").copy()
    header = header_of(y, 1, b"s" * 32, {2: b"k" * 32}, b"a" * 16)
    for g in range(slices.segments(d)):
        piece, proof = segment_of(y, g), segment_proof(y, g)
        slices.check_segment(piece, proof, header, g)
        bent = piece.copy()
        bent[bent.size // 2] ^= 1 << 31
        wrong = [
            (bent, proof, g), (piece[:-1], proof, g), (piece, [*proof, b"x" * 32], g), (piece, proof, g + 1), (piece, proof, -1),
            *((piece, [*proof[:k], b"x" * 32, *proof[k + 1 :]], g) for k in range(len(proof))),
            *([(piece, proof[:-1], g)] if proof else []),
        ]  # fmt: skip
        for words, hashes, place in wrong:
            with pytest.raises(TrustError, match="silo 1"):
                slices.check_segment(words, hashes, header, place)
    other = msgspec.structs.replace(header, root=hashlib.sha256(header.root).digest())
    with pytest.raises(TrustError):
        slices.check_segment(segment_of(y, 0), segment_proof(y, 0), other, 0)


def test_a_sum_over_other_silos_than_the_set_is_refused():
    _, y, headers, seeds, _ = sum_of((1, 2, 3), (), 10)
    for pieces, given_seeds in (({1: y[1]}, seeds), (y, {1: seeds[1]}), ({**y, 4: y[1]}, seeds)):
        with pytest.raises(TrustError, match="set of"):
            slices.sum_of_segment(pieces, given_seeds, headers, 0)


@given(st.binary(min_size=32, max_size=32), st.integers(11, 60), st.integers(1, 5), st.integers(0, 2**20))
@settings(max_examples=50)
def test_nobody_chooses(certificate, count, colluders, segment):
    silos = tuple(range(3, 3 + count))
    chosen = slices.auditors(certificate, segment, silos, colluders=colluders)
    assert chosen == slices.auditors(certificate, segment, tuple(reversed(silos)), colluders=colluders)
    assert len(set(chosen)) == colluders + 1
    assert set(chosen) <= set(silos)
    assert set(slices.auditors(certificate, segment, silos, colluders=colluders - 1)) < set(chosen)
    place = segment.to_bytes(4, "big")
    ranks = {silo: hmac.new(certificate, place + silo.to_bytes(4, "big"), hashlib.sha256).digest() for silo in silos}
    assert max(ranks[silo] for silo in chosen) < min(rank for silo, rank in ranks.items() if silo not in chosen)


def test_too_few_silos_pick_no_auditors_and_spares_are_the_next_ones():
    silos = tuple(range(1, 11))
    for certificate, few in ((bytes(31), silos), (bytes(32), (1, 2)), (bytes(32), (1, 1, 2, 3))):
        with pytest.raises(TrustError):
            slices.auditors(certificate, 0, few, colluders=2)
    for segment in range(20):
        more = [set(slices.auditors(bytes(32), segment, silos, colluders=2, spare=spare)) for spare in range(9)]
        assert [len(each) for each in more] == [3, 4, 5, 6, 7, 8, 9, 10, 10]
        assert all(a <= b for a, b in itertools.pairwise(more))


def test_duties_cover_every_segment_and_are_spread_evenly():
    silos, d = tuple(range(1, 41)), 200 * SEGMENT
    load = Counter()
    for silo in silos:
        load.update(slices.duties(b"c" * 32, silo, silos, colluders=3, dimension=d))
    assert load == Counter(dict.fromkeys(range(200), 4))
    sizes = [len(slices.duties(b"c" * 32, silo, silos, colluders=3, dimension=d)) for silo in silos]
    assert sum(sizes) == 800
    assert max(sizes) < 45, "20 are expected; a binomial passes 44 with probability below 1e-6 per silo"


def test_own_random_segments_come_on_top():
    silos, d = tuple(range(1, 41)), 2000 * SEGMENT
    must = slices.duties(b"c" * 32, 5, silos, colluders=3, dimension=d)
    mine, again = slices.own_choice(must, d), slices.own_choice(must, d)
    assert not set(mine) & set(must)
    assert mine != again, "one in sixteen of 1,800 by os randomness: equal with probability far below 1e-6"
    assert 50 < len(mine) < 190, "112 are expected; a binomial leaves this with probability below 1e-6"


def test_hashes_of_segments_lead_to_the_root_of_the_vector():
    for d in (1, 16385, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 77):
        y = np.frombuffer(os.urandom(4 * d), dtype="<u4")
        assert proofs.root_of_hashes(slices.hashes(y)) == guardian_sum.vector_root(y)


def test_a_segment_of_a_stream_is_that_of_the_whole_stream():
    key = expand(b"k" * 32, "gsum/1 mask")
    whole = prg.stream(key, 2 * SEGMENT + 10)
    assert np.array_equal(slices._stream(key, 2, 10), whole[2 * SEGMENT :])
