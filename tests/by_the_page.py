# SPDX-License-Identifier: Apache-2.0
"""The guardian sum and the log written a second time, from docs/spec alone: hashlib, hmac and AES, nothing of ours.

What a second implementer would write after reading the pages. ``tests/test_golden.py`` holds our code and the vectors to it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

MODULUS = 2**32


def h(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt, ikm, "sha256")


def expand(key: bytes, label: str, *context: bytes) -> bytes:
    return hmac.digest(key, label.encode() + b"\0" + b"".join(context) + b"\x01", "sha256")


def stream(key: bytes, words: int) -> list[int]:
    out, segment = b"", 0
    while len(out) < 4 * words:
        block = segment.to_bytes(12, "big") + b"\0\0\0\2"
        encryptor = Cipher(algorithms.AES(key), modes.CTR(block)).encryptor()
        out += encryptor.update(bytes(min(4 * words - len(out), 2**20)))
        segment += 1
    return list(struct.unpack(f"<{words}I", out))


def epoch_ctx(contract: bytes, epoch: int, roster: bytes) -> bytes:
    return h(b"gsum/1 epoch\0" + contract + struct.pack(">Q", epoch) + h(roster))


def pair_key(link: bytes, round_ctx: bytes, i: int, j: int) -> bytes:
    return expand(link, "gsum/1 pair", round_ctx, u32(min(i, j)), u32(max(i, j)))


def next_link(link: bytes) -> bytes:
    return expand(link, "gsum/1 next")


def masked(
    x: Sequence[int], *, silo: int, self_seed: bytes, attempt: bytes, round_ctx: bytes, keys: Mapping[int, bytes]
) -> list[int]:
    y = list(x)
    terms = [(expand(self_seed, "gsum/1 self-mask", round_ctx, attempt, u32(silo)), 1)]
    terms += [(expand(key, "gsum/1 mask"), 1 if peer > silo else -1) for peer, key in keys.items()]
    for key, sign in terms:
        y = [(word + sign * mask) % MODULUS for word, mask in zip(y, stream(key, len(y)), strict=True)]
    return y


def self_commitment(seed: bytes, round_ctx: bytes, attempt: bytes, silo: int) -> bytes:
    return expand(seed, "gsum/1 self-commit", round_ctx, attempt, u32(silo))


def unmasked(
    vectors: Mapping[int, Sequence[int]], seeds: Mapping[int, bytes], attempts: Mapping[int, bytes], round_ctx: bytes,
    pair_keys: Mapping[tuple[int, int], bytes],
) -> list[int]:  # fmt: skip
    """The sum over the silos of ``vectors``; ``pair_keys``: k_ij for i in it and j missing."""
    total = [sum(words) % MODULUS for words in zip(*vectors.values(), strict=True)]
    terms = [(expand(seed, "gsum/1 self-mask", round_ctx, attempts[i], u32(i)), 1) for i, seed in seeds.items()]
    terms += [(expand(key, "gsum/1 mask"), 1 if j > i else -1) for (i, j), key in pair_keys.items()]
    for key, sign in terms:
        total = [(word - sign * mask) % MODULUS for word, mask in zip(total, stream(key, len(total)), strict=True)]
    return total


# --- Merkle trees -------------------------------------------------------------------------------------------------------


def root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 §2.1, by its recursive definition."""
    if not leaves:
        return h(b"")
    if len(leaves) == 1:
        return h(b"\0" + leaves[0])
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return h(b"\1" + root(leaves[:split]) + root(leaves[split:]))


def vector_root(y: Sequence[int]) -> bytes:
    raw = struct.pack(f"<{len(y)}I", *y)
    return root([raw[start : start + 65536] for start in range(0, len(raw), 65536)])


def share_root(shares: Iterable[tuple[int, bytes]], *, round_ctx: bytes, attempt: bytes, silo: int, guardian: int) -> bytes:
    start = b"gsum/1 share\0" + round_ctx + attempt + u32(silo) + u32(guardian)
    return root([start + u32(secret) + share for secret, share in shares])


# --- Shamir -------------------------------------------------------------------------------------------------------------


def times(a: int, b: int) -> int:
    """Multiplication in GF(2⁸) modulo 0x11b, bit by bit."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def share_at(x: int, secret: bytes, coefficients: Sequence[bytes]) -> bytes:
    """The value at x of secret + c_1·x + c_2·x² + … for every byte."""
    out = bytearray(secret)
    power = 1
    for coefficient in coefficients:
        power = times(power, x)
        out = bytearray(have ^ times(power, byte) for have, byte in zip(out, coefficient, strict=True))
    return bytes(out)


# --- Log ----------------------------------------------------------------------------------------------------------------


def leaf(kind: str, number: int, party: int, digest: bytes, header: bytes, time: int) -> bytes:
    """A leaf's MessagePack, for numbers below 128 and times below 2³²."""
    text = b"siloquy-leaf/1"
    out = b"\x97" + bytes([0xA0 | len(text)]) + text + bytes([0xA0 | len(kind)]) + kind.encode() + bytes([number, party])
    out += b"\xc4\x20" + digest + b"\xc4" + bytes([len(header)]) + header
    return out + b"\xce" + struct.pack(">I", time)


def checkpoint(origin: str, leaves: Sequence[bytes]) -> str:
    return f"{origin}\n{len(leaves)}\n{base64.b64encode(root(leaves)).decode()}\n"


def key_id(name: str, kind: int, key: bytes) -> bytes:
    return h(name.encode() + b"\n" + bytes([kind]) + key)[:4]


def tile_number(index: int) -> str:
    groups = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        groups.append(f"x{index % 1000:03d}")
    return "/".join(reversed(groups))
