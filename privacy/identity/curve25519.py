# SPDX-License-Identifier: Apache-2.0
"""Which Ed25519 and X25519 public keys may be trusted, and when a signature counts.

Promised: a key that passes has one spelling and no small-order part, so one signature cannot verify for two messages, two
verifiers cannot disagree, and an exchange with it cannot be forced to a known value. This is public data, checked once per
key in plain integer arithmetic (RFC 8032 §5.1, RFC 7748 §6.1); nothing here runs in constant time and nothing here touches
a secret. Signatures themselves are verified by the library.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privacy.errors import TrustError

_FIELD: Final = 2**255 - 19
_ORDER: Final = 2**252 + 27742317777372353535851937790883648493
_CURVE_D: Final = -121665 * pow(121666, -1, _FIELD) % _FIELD
_ROOT_OF_MINUS_ONE: Final = pow(2, (_FIELD - 1) // 4, _FIELD)

Point = tuple[int, int, int, int]
"""Extended coordinates (X, Y, Z, T): x = X/Z, y = Y/Z, x·y = T/Z."""


@lru_cache(maxsize=1024)
def check_sign_key(key: bytes) -> None:
    """Return if ``key`` is the canonical encoding of an Ed25519 point of prime order.

    **Formal guarantees** and edge cases, all refused: another length; y ≥ p; no point with this y; x = 0 with the sign bit;
    the identity and the other seven points of small order (one signature would verify for every message); a point with a
    small-order component (two verifiers could disagree on one signature).

    Raises:
        TrustError: the key is any of these.
    """
    try:
        if len(key) != 32:
            raise ValueError("length")
        x, y = _coordinates(key)
        point: Point = (x, y, 1, x * y % _FIELD)
        if _is_identity(point) or not _is_identity(_multiply(_ORDER, point)):
            raise ValueError("order")
    except ValueError:
        raise _weak(f"{key.hex()[:16]}… is not a canonical Ed25519 key of prime order") from None


def check_dh_key(key: bytes) -> None:
    """Return if ``key`` is a canonical X25519 public key that is not of small order (RFC 7748 §6.1).

    Raises:
        TrustError: another length, u ≥ 2²⁵⁵ - 19, or every exchange with it gives zero.
    """
    try:
        if len(key) != 32 or int.from_bytes(key, "little") >= _FIELD:
            raise ValueError("encoding")
        # A clamped scalar is a multiple of 8: it sends exactly the small-order points to zero, which the library refuses.
        x25519.X25519PrivateKey.from_private_bytes(bytes(32)).exchange(x25519.X25519PublicKey.from_public_bytes(key))
    except ValueError:
        raise _weak(f"{key.hex()[:16]}… is not a canonical X25519 key, or of small order") from None


def verify_signature(key: bytes, data: bytes, signature: bytes) -> None:
    """Return if ``signature`` is the holder of ``key``'s over ``data``.

    **Formal guarantees**: a key that ``check_sign_key`` refuses verifies nothing; R is canonical and S < L, so nobody can
    turn one valid signature into another (RFC 8032 §5.1.7, without the cofactor).

    Raises:
        TrustError: the key is unfit, or the signature is not this key's over these bytes.
    """
    check_sign_key(key)
    try:
        if len(signature) != 64 or int.from_bytes(signature[32:], "little") >= _ORDER:
            raise InvalidSignature
        _coordinates(signature[:32])
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise not_by(key) from None


def not_by(key: bytes) -> TrustError:
    """The refusal of a signature that is not this key's."""
    return TrustError(
        f"the signature is not by key {key.hex()[:16]}…", code="bad-signature",
        hint="the bytes were changed on the way, or the sender is another one",
    )  # fmt: skip


def _weak(what: str) -> TrustError:
    return TrustError(what, hint="its owner must make a new key; if this one came from its owner, ask how", code="weak-key")


def _coordinates(encoded: bytes) -> tuple[int, int]:
    """The point in its 32 bytes (RFC 8032 §5.1.3), refusing every encoding but the canonical one by ValueError."""
    number = int.from_bytes(encoded, "little")
    sign, y = number >> 255, number & (2**255 - 1)
    if y >= _FIELD:
        raise ValueError("y is not reduced")
    u, v = (y * y - 1) % _FIELD, (_CURVE_D * y * y + 1) % _FIELD
    x = u * pow(v, 3, _FIELD) * pow(u * pow(v, 7, _FIELD), (_FIELD - 5) // 8, _FIELD) % _FIELD
    if (v * x * x - u) % _FIELD:
        x = x * _ROOT_OF_MINUS_ONE % _FIELD
    if (v * x * x - u) % _FIELD or (x == 0 and sign):
        raise ValueError("no such point")
    return (_FIELD - x if x & 1 != sign else x), y


def _add(first: Point, second: Point) -> Point:
    """RFC 8032 §5.1.4, extended coordinates; complete, so it also doubles."""
    a = (first[1] - first[0]) * (second[1] - second[0]) % _FIELD
    b = (first[1] + first[0]) * (second[1] + second[0]) % _FIELD
    c = 2 * first[3] * second[3] * _CURVE_D % _FIELD
    d = 2 * first[2] * second[2] % _FIELD
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _FIELD, g * h % _FIELD, f * g % _FIELD, e * h % _FIELD


def _multiply(scalar: int, point: Point) -> Point:
    result: Point = (0, 1, 1, 0)
    for bit in bin(scalar)[2:]:
        result = _add(result, result)
        if bit == "1":
            result = _add(result, point)
    return result


def _is_identity(point: Point) -> bool:
    return point[0] % _FIELD == 0 and (point[1] - point[2]) % _FIELD == 0
