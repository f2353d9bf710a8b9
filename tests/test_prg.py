# SPDX-License-Identifier: Apache-2.0
"""The keystream against the definition and published vectors, and each promise of the random source."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import prg
from privacy.errors import PrivacyRefusal, SiloquyError
from privacy.prg import SEGMENT_WORDS, Keystream, Randomness, add_stream, add_streams, stream

KEY = bytes(range(32))
lengths = st.one_of(st.integers(0, 40), st.integers(SEGMENT_WORDS - 3, SEGMENT_WORDS + 3), st.just(2 * SEGMENT_WORDS + 1))


def defined(key, segment, words):
    """The definition of PROTOCOL.md, one block at a time in electronic-codebook mode: no counter mode is trusted."""
    encrypt = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counters = b"".join(segment.to_bytes(12, "big") + (2 + block).to_bytes(4, "big") for block in range(-(-words // 4)))
    return np.frombuffer(encrypt.update(counters), dtype="<u4")[:words]


@pytest.mark.parametrize("segment", [0, 1, 2**32 - 1, 2**96 - 1])
def test_fixed_format_whole_segments_equal_the_definition(segment):
    words = np.empty(SEGMENT_WORDS, dtype="<u4")
    Keystream(KEY, segment=segment).read_into(words)
    assert np.array_equal(words, defined(KEY, segment, SEGMENT_WORDS))


@pytest.mark.parametrize("segment", [0, 1, 2**32 - 1, 2**96 - 1])
def test_gcm_and_ctr_paths_are_the_same_stream(segment):
    assert prg._whole_segment(prg._open_gcm(KEY, segment)) == prg._whole_segment(prg._open_ctr(KEY, segment))


def test_published_gcm_vector():
    """Test case 14 of the GCM submission (McGrew, Viega): zero key, zero nonce, one zero block."""
    assert stream(bytes(32), 4).tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"


def test_golden_words_never_change():
    words = stream(KEY, SEGMENT_WORDS + 4)
    assert words[:2].tolist() == [0xDEB5BC0E, 0xBD832CB5]
    assert hashlib.sha256(words.tobytes()).hexdigest() == "7b0c88d5163e4ad3cbacb09ccd1e39800b34f123e63316561f0b2f56be750f32"


def test_the_self_check_passes_here_and_a_differing_gcm_is_not_used(monkeypatch):
    assert prg._gcm_agrees()
    expected = stream(KEY, SEGMENT_WORDS + 5)
    opened = []
    monkeypatch.setattr(prg, "_open_gcm", lambda key, segment: opened.append(segment) or prg._open_ctr(key, segment + 1))
    prg._gcm_agrees.cache_clear()
    try:
        assert not prg._gcm_agrees()
        opened.clear()
        assert np.array_equal(stream(KEY, SEGMENT_WORDS + 5), expected)
        assert opened == []
    finally:
        monkeypatch.undo()
        prg._gcm_agrees.cache_clear()


def test_whole_segments_do_not_repeat_a_block():
    blocks = stream(KEY, 3 * SEGMENT_WORDS).view("<u8").reshape(-1, 2)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


@settings(max_examples=20, deadline=None)
@given(st.lists(lengths, max_size=4))
def test_fixed_format_does_not_depend_on_how_words_are_asked_for(pieces):
    whole, keystream = stream(KEY, sum(pieces)), Keystream(KEY)
    for piece in np.split(whole, np.cumsum(pieces)[:-1]) if pieces else []:
        words = np.empty(piece.size, dtype="<u4")
        keystream.read_into(words)
        assert np.array_equal(words, piece)


@settings(max_examples=20, deadline=None)
@given(lengths, st.binary(min_size=32, max_size=32), st.sampled_from([1, -1]))
def test_add_stream_adds_the_same_stream_and_cancels(count, key, sign):
    start = stream(KEY, count)
    target = start.copy()
    add_stream(target, key, sign)
    assert np.array_equal(target, start + stream(key, count) if sign == 1 else start - stream(key, count))
    add_stream(target, key, -sign)
    assert np.array_equal(target, start)


signed_keys = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([1, -1])), max_size=5)


@settings(max_examples=20, deadline=None)
@given(lengths, signed_keys, st.sampled_from([None, 1, 2, 3]))
def test_add_streams_adds_the_same_streams_and_cancels_with_any_number_of_threads(count, signed, threads):
    start = stream(KEY, count)
    target = start.copy()
    add_streams(target, iter(signed), threads=threads)
    expected = start.copy()
    for key, sign in signed:
        expected = expected + stream(key, count) if sign == 1 else expected - stream(key, count)
    assert np.array_equal(target, expected)
    add_streams(target, [(key, -sign) for key, sign in reversed(signed)], threads=threads)
    assert np.array_equal(target, start)


def test_add_streams_is_all_or_nothing():
    target = np.zeros(SEGMENT_WORDS + 1, "<u4")
    for wrong in ((KEY[:31], 1), (KEY, 0), (KEY, 2), (bytearray(KEY), 1)):
        with pytest.raises(SiloquyError):
            add_streams(target, [(KEY, 1), wrong])
        assert not target.any()


def test_add_streams_shares_long_work_among_the_processors_it_may_use(monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    allowed = len(os.sched_getaffinity(0))
    assert (prg._workers(prg._THREAD_WORDS - 1), prg._workers(prg._THREAD_WORDS)) == (1, allowed)
    monkeypatch.setattr(prg, "_THREAD_WORDS", 1)
    target = np.zeros(3 * SEGMENT_WORDS + 7, "<u4")
    add_streams(target, [(KEY, 1)])
    assert np.array_equal(target, stream(KEY, target.size))


def test_add_streams_needs_no_memory_that_grows_with_the_vector_or_the_keys():
    target, peaks = np.zeros(8 * SEGMENT_WORDS, "<u4"), []
    for part, keys in ((target[: 2 * SEGMENT_WORDS], 2), (target, 40)):
        signed = [(bytes([i]) * 32, 1) for i in range(keys)]
        tracemalloc.start()
        add_streams(part, signed, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1 << 20


def test_different_keys_are_uncorrelated():
    first, second = (stream(bytes([i]) * 32, 100_000).astype(float) for i in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(100_000)


@pytest.mark.parametrize("target", [np.zeros(4, np.uint64), np.zeros((2, 2), "<u4"), np.zeros(8, "<u4")[::2], np.zeros(4, ">u4")])
def test_add_stream_refuses_what_it_cannot_add_to(target):
    with pytest.raises(SiloquyError, match="<u4"):
        add_stream(target, KEY)


def test_add_stream_refuses_read_only_bad_sign_and_bad_key():
    target = np.zeros(4, "<u4")
    for key, sign in ((KEY, 0), (KEY, 2), (KEY[:16], 1), (KEY + KEY, 1), ("0" * 32, 1)):
        with pytest.raises(SiloquyError):
            add_stream(target, key, sign)
    assert not target.any()
    target.flags.writeable = False
    with pytest.raises(SiloquyError, match="writable"):
        add_stream(target, KEY)


def test_ranges_are_refused():
    for call in (lambda: stream(KEY, -1), lambda: Randomness.from_key(KEY).uint64(-1), lambda: Randomness.from_key(KEY).bytes(-1)):
        with pytest.raises(SiloquyError, match="-1"):
            call()
    for segment in (-1, 2**96):
        with pytest.raises(SiloquyError, match="segments"):
            Keystream(KEY, segment=segment)


def test_randomness_is_ctr_from_zero_and_never_gives_a_byte_twice():
    source = Randomness.from_key(KEY)
    got = source.bytes(3) + source.uint64(2).tobytes() + source.bytes(0) + source.uint64(200_000).tobytes() + source.bytes(17)
    assert got == Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(len(got)))


def test_randomness_is_fresh_whatever_global_generators_and_hash_seeds_do(monkeypatch):
    torch = pytest.importorskip("torch")
    draws = []
    for _ in range(2):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        draws.append(Randomness.from_os().bytes(32))
    assert draws[0] != draws[1]
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    Randomness.from_os().uint64(1000)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_randomness_reads_the_operating_system_and_nothing_else(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: KEY[:size])
    assert Randomness.from_os().bytes(64) == Randomness.from_key(KEY).bytes(64)


def test_two_sources_are_uncorrelated():
    first, second = (Randomness.from_os().uint64(200_000).astype(float) for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5.5 / np.sqrt(200_000)


def in_child(work):
    """What ``work`` returns in a forked child, as bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


def test_forked_children_draw_under_new_keys():
    source = Randomness.from_os()
    children = [in_child(lambda: source.bytes(32)) for _ in range(2)]
    draws = [*children, source.bytes(32)]
    assert [len(draw) for draw in draws] == [32, 32, 32]
    assert len(set(draws)) == 3


def test_a_replayed_source_refuses_to_draw_in_a_child():
    source = Randomness.from_key(KEY)

    def draw():
        try:
            return source.bytes(8)
        except PrivacyRefusal:
            return b"refused"

    assert in_child(draw) == b"refused"
    assert len(source.bytes(8)) == 8


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_kept_it_cannot_be_pickled_or_copied(duplicate):
    with pytest.raises(PrivacyRefusal, match="same bits"):
        duplicate(Randomness.from_os())


def test_kept_no_repr_shows_a_key():
    for thing in (Randomness.from_key(KEY), Keystream(KEY)):
        assert KEY.hex() not in repr(thing)
        assert repr(KEY)[2:-1] not in repr(thing)
    assert KEY not in [value for value in vars(Randomness.from_key(KEY)).values() if isinstance(value, bytes)]
