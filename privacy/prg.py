# SPDX-License-Identifier: Apache-2.0
"""Pseudo-random bits, two kinds that are never mixed: mask keystreams and private randomness.

:func:`stream`, :func:`add_stream` and :func:`add_streams` expand 32-byte keys into the same words on every machine; masks cancel
because of it.
:class:`Randomness` is the source of every bit that a noise draw or a Poisson sample uses; nobody can ask it for its key.

Promised: indistinguishability from uniform bits as far as AES-256 is a pseudo-random function and the operating system's
generator is sound. Not promised: that keys or words are wiped from memory, or safety of a machine that is cloned while a
:class:`Randomness` lives (make a fresh one per attempt). No global generator is read or seeded here.
"""

from __future__ import annotations

import builtins
import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Literal, NoReturn, Self, SupportsIndex

import numpy as np
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from privacy.errors import PrivacyRefusal, SiloquyError

KEY_BYTES = 32
SEGMENT_WORDS = 1 << 18
"""Words of one segment: 1 MiB, so that the 32-bit block counter of a segment never wraps."""
LAST_SEGMENT = (1 << 96) - 1

# 512 KiB of keystream and of target stay in the second-level cache together.
_CHUNK_WORDS = 1 << 17
# Fewer words than this in all streams together (64 MiB) are not worth a second thread.
_THREAD_WORDS = 1 << 24
_OPEN_AT_ONCE = 64
_CACHE_LINE = 64


def _aligned(words: int) -> NDArray[np.uint32]:
    """Zeros at the start of a cache line: vector units read and write there a tenth faster."""
    room = np.zeros(4 * words + _CACHE_LINE, dtype=np.uint8)
    start = -room.ctypes.data % _CACHE_LINE
    return room[start : start + 4 * words].view("<u4")


# Never written: all its pages are the operating system's one page of zeros, which stays in the first-level cache.
_ZEROS = _aligned(SEGMENT_WORDS).view(np.uint8).data.toreadonly()
_PROBE_KEY = bytes(range(KEY_BYTES))


class Keystream:
    """The keystream of one key, read from its start as little-endian 32-bit words.

    Segment ``g`` (2**18 words, 1 MiB) is AES-256-CTR from the initial counter block ``u96be(g) || 00000002``; segments follow
    each other from 0. AES-GCM with the nonce ``u96be(g)`` produces exactly these bytes and is the faster
    code path, so it is used, without its tag, wherever a self-check against plain CTR agrees (NIST SP 800-38D §7.1).

    Formal guarantees:
        - *Fixed format*: word ``w`` of a key depends on the key and ``w`` alone, not on the machine, the code path or how
          the words were asked for.
        - *Whole segments*: no counter block is used twice under one key.

    Args:
        key: 32 bytes, used for nothing else.

    Raises:
        SiloquyError: the key is not 32 bytes, or ``segment`` is outside [0, 2**96).
    """

    def __init__(self, key: bytes, *, segment: int = 0) -> None:
        _check_key(key)
        self._key = key
        self._segment = segment
        self._left = SEGMENT_WORDS
        self._context = _open_segment(key, segment)

    def read_into(self, words: NDArray[np.uint32]) -> None:
        """Fill ``words`` (contiguous ``<u4``, any length) with the next words of the stream."""
        done = 0
        while done < words.size:
            if self._left == 0:
                self._segment, self._left = self._segment + 1, SEGMENT_WORDS
                self._context = _open_segment(self._key, self._segment)
            count = min(self._left, words.size - done)
            self._context.update_into(_ZEROS[: 4 * count], words[done : done + count].view(np.uint8).data)
            self._left -= count
            done += count

    def __repr__(self) -> str:
        return "Keystream(key hidden)"


def stream(key: bytes, count: int) -> NDArray[np.uint32]:
    """The first ``count`` words of the keystream of ``key``, as a new ``<u4`` array (count,). See :class:`Keystream`.

    Raises:
        SiloquyError: the key is not 32 bytes, or ``count`` is negative.
    """
    _check_count(count)
    words = np.empty(count, dtype="<u4")
    Keystream(key).read_into(words)
    return words


def add_stream(target: NDArray[np.uint32], key: bytes, sign: Literal[1, -1] = 1) -> None:
    """Add (``sign`` = 1) or subtract (-1) the keystream of ``key`` to ``target`` (d,) in place: :func:`add_streams` of one."""
    add_streams(target, ((key, sign),))


def add_streams(target: NDArray[np.uint32], signed: Iterable[tuple[bytes, Literal[1, -1]]], *, threads: int | None = None) -> None:
    """Add (1) or subtract (-1) the keystreams of many keys to ``target`` (d,) in place, modulo 2**32: ``signed`` = (key, sign)….

    Segment by segment, all streams at once, so that memory is read once; never more than 512 KiB of temporary words per thread,
    whatever d and the number of keys. Long work is shared by ``threads`` (default: one per processor that this process may use,
    at most one per segment); the words do not depend on it.

    Formal guarantees:
        - *Cancels*: adding and then subtracting the same keys, in any order, leaves ``target`` bit for bit as it was.
        - *Same stream*: the words added are those of :func:`stream` for the same keys.
        - *All or nothing*: keys and signs are checked before the first word is added.

    Raises:
        SiloquyError: ``target`` is not a writable, contiguous, one-dimensional ``<u4`` array, a sign is neither 1 nor -1,
            or a key is not 32 bytes. ``target`` is then unchanged.
    """
    if target.dtype != np.dtype("<u4") or target.ndim != 1 or not target.flags.c_contiguous or not target.flags.writeable:
        raise SiloquyError(f"a mask is added to a writable vector of <u4 words, not to {target.dtype} of shape {target.shape}")
    given = tuple(signed)
    for key, sign in given:
        _check_key(key)
        if sign not in (1, -1):
            raise SiloquyError(f"the sign of a mask is 1 or -1, not {sign}")
    segments = range(-(-target.size // SEGMENT_WORDS))
    workers = min(len(segments), threads or _workers(target.size * len(given)))
    if workers < 2:
        _add_segments(target, given, segments)
        return
    with ThreadPoolExecutor(workers) as pool:
        parts = [segments[first::workers] for first in range(workers)]
        list(pool.map(_add_segments, repeat(target), repeat(given), parts))


def _add_segments(target: NDArray[np.uint32], signed: Sequence[tuple[bytes, Literal[1, -1]]], segments: Iterable[int]) -> None:
    """All streams over these segments of ``target``, a chunk at a time. Cipher and addition let other threads run, so what holds
    them up, opening ciphers and cutting views, is done for many streams at once: two threads are then nearly twice as fast.
    """
    scratch = _aligned(min(_CHUNK_WORDS, target.size))
    for segment in segments:
        piece = target[segment * SEGMENT_WORDS : (segment + 1) * SEGMENT_WORDS]
        parts = []
        for start in range(0, piece.size, _CHUNK_WORDS):
            part = piece[start : start + _CHUNK_WORDS]
            mask = scratch[: part.size]
            parts.append((part, mask, mask.view(np.uint8).data, _ZEROS[: 4 * part.size]))
        for first in range(0, len(signed), _OPEN_AT_ONCE):
            batch = signed[first : first + _OPEN_AT_ONCE]
            opened = [(_open_segment(key, segment), np.add if sign == 1 else np.subtract) for key, sign in batch]
            for cipher, combine in opened:
                for part, mask, raw, zeros in parts:
                    cipher.update_into(zeros, raw)
                    combine(part, mask, out=part)


def _workers(words: int) -> int:
    """How many threads ``words`` words of keystream are worth here."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return allowed if words >= _THREAD_WORDS else 1


def _open_segment(key: bytes, segment: int) -> CipherContext:
    """A cipher at the start of ``segment`` of the keystream of ``key``, by the fastest path that passed the self-check.

    Raises:
        SiloquyError: ``segment`` is outside [0, 2**96).
    """
    if not 0 <= segment <= LAST_SEGMENT:
        raise SiloquyError(f"a keystream has segments 0 to 2**96 - 1, not {segment}")
    return _open_gcm(key, segment) if _gcm_agrees() else _open_ctr(key, segment)


def _open_ctr(key: bytes, segment: int) -> CipherContext:
    """The definition: plain counter mode."""
    return Cipher(algorithms.AES(key), modes.CTR(segment.to_bytes(12, "big") + b"\x00\x00\x00\x02")).encryptor()


def _open_gcm(key: bytes, segment: int) -> AEADEncryptionContext:
    """The fast path. Never finalised, so no tag is computed."""
    return Cipher(algorithms.AES(key), modes.GCM(segment.to_bytes(12, "big"))).encryptor()


@functools.cache
def _gcm_agrees() -> bool:
    """Whether this machine's GCM gives the CTR keystream: four whole segments, once per process, a few ms."""
    return all(
        _whole_segment(_open_gcm(_PROBE_KEY, segment)) == _whole_segment(_open_ctr(_PROBE_KEY, segment))
        for segment in (0, 1, 2**32 - 1, LAST_SEGMENT)
    )


def _whole_segment(context: CipherContext) -> bytes:
    """One segment in two uneven pieces, so that a difference in how pieces join would show too."""
    return context.update(_ZEROS[:12345]) + context.update(_ZEROS[12345:])


class Randomness:
    """Uniform private bits for noise draws and Poisson samples: AES-256-CTR under a key nobody else has.

    ``from_os`` takes a fresh 32-byte key from the operating system. ``from_key`` takes a given key, for tests and for
    replaying a draw whose key was disclosed: it must never feed a release. One object serves one thread.

    Formal guarantees:
        - *Fresh*: ``from_os`` reads ``os.urandom`` and nothing else; no global generator, seed, clock or environment
          variable changes its bits, and none of theirs is changed.
        - *Never twice*: successive answers are successive, disjoint pieces of one keystream, however they are asked for.
        - *Forks*: a forked child draws under a new key; an object made by ``from_key`` refuses to draw in a child.
        - *Kept*: it cannot be pickled or copied, and its ``repr`` shows no key.
    """

    def __init__(self, key: builtins.bytes, *, from_os: bool) -> None:
        _check_key(key)
        self._from_os = from_os
        self._process = os.getpid()
        self._context = _open_plain(key)

    @classmethod
    def from_os(cls) -> Self:
        """A source under a fresh key of the operating system's generator."""
        return cls(os.urandom(KEY_BYTES), from_os=True)

    @classmethod
    def from_key(cls, key: builtins.bytes) -> Self:
        """The source of a given 32-byte key, for tests and replay: AES-256-CTR from an all-zero counter block.

        Raises:
            SiloquyError: the key is not 32 bytes.
        """
        return cls(key, from_os=False)

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words, each uniform on [0, 2**64), as a new ``<u8`` array (count,).

        Raises:
            SiloquyError: ``count`` is negative.
            PrivacyRefusal: a ``from_key`` source is used in a forked child.
        """
        _check_count(count)
        words = np.empty(count, dtype="<u8")
        self._fill(words.view(np.uint8).data)
        return words

    def bytes(self, count: int) -> builtins.bytes:
        """The next ``count`` bytes. Raises as :meth:`uint64` does."""
        _check_count(count)
        answer = bytearray(count)
        self._fill(memoryview(answer))
        return builtins.bytes(answer)

    def _fill(self, answer: memoryview) -> None:
        if os.getpid() != self._process:
            self._renew()
        for start in range(0, len(answer), len(_ZEROS)):
            part = answer[start : start + len(_ZEROS)]
            self._context.update_into(_ZEROS[: len(part)], part)

    def _renew(self) -> None:
        """A new key in a forked child: the parent goes on with the old one."""
        if not self._from_os:
            raise PrivacyRefusal(
                f"a replayed source of process {self._process} is used in process {os.getpid()}",
                hint="make the source in the process that draws from it", code="forked-randomness",
            )
        self._context, self._process = _open_plain(os.urandom(KEY_BYTES)), os.getpid()

    def __repr__(self) -> str:
        return f"Randomness(from_os={self._from_os})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise PrivacyRefusal(
            "a source of private randomness cannot be pickled or copied: two holders would draw the same bits",
            hint="make a new one with Randomness.from_os()", code="copied-randomness",
        )


def _open_plain(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def _check_key(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise SiloquyError(f"a key is {KEY_BYTES} bytes, not {type(key).__name__} of length {len(key)}")


def _check_count(count: int) -> None:
    if count < 0:
        raise SiloquyError(f"cannot draw {count} values: a count is 0 or more")
