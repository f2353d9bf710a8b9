# SPDX-License-Identifier: Apache-2.0
"""The two signature suites of a contract: Ed25519 alone, or Ed25519 and ML-DSA-65 together.

A composite key is 32 + 1952 bytes, a composite signature 64 + 3309: both halves sign the same bytes, and both must verify.

Promised: with the composite suite a forger must break Ed25519 *and* ML-DSA-65 (FIPS 204, empty context). The length of the
**key**, which stands in the contract, decides what is verified; nothing in a message can ask for less. Not promised: that the
halves were made at one time or place; what they cover (privacy.identity.keys.signing_input) names type, context, sender and body.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from privacy.errors import TrustError
from privacy.identity import curve25519

ED25519: Final = "ed25519"
HYBRID: Final = "ed25519+ml-dsa-65"

CURVE_KEY_BYTES: Final = 32
ML_DSA_KEY_BYTES: Final = 1952
CURVE_SIGNATURE_BYTES: Final = 64
ML_DSA_SIGNATURE_BYTES: Final = 3309
SEED_BYTES: Final = 32


def signature_bytes(suite: str) -> int:
    """How long a signature of this suite is."""
    return CURVE_SIGNATURE_BYTES + (ML_DSA_SIGNATURE_BYTES if suite == HYBRID else 0)


def public_key(sign_seed: bytes, ml_dsa_seed: bytes | None) -> bytes:
    """The verification key of these seeds: 32 bytes, or 32 + 1952."""
    return Ed25519PrivateKey.from_private_bytes(sign_seed).public_key().public_bytes_raw() + (
        b"" if ml_dsa_seed is None else MLDSA65PrivateKey.from_seed_bytes(ml_dsa_seed).public_key().public_bytes_raw()
    )


def sign(data: bytes, *, sign_seed: bytes, ml_dsa_seed: bytes | None) -> bytes:
    """The signature over ``data``: 64 bytes, or 64 + 3309. ML-DSA draws fresh randomness, so a composite one differs each time."""
    return Ed25519PrivateKey.from_private_bytes(sign_seed).sign(data) + (
        b"" if ml_dsa_seed is None else MLDSA65PrivateKey.from_seed_bytes(ml_dsa_seed).sign(data)
    )


def check_verify_key(key: bytes) -> None:
    """Return if ``key`` is fit to verify: a fit Ed25519 key, alone or before the 1952 bytes of an ML-DSA-65 key.

    Every 1952 bytes encode some ML-DSA key, the all-zero one too, whose signatures anybody can make: its Ed25519 half still holds.

    Raises:
        TrustError: another length, or the Ed25519 half is refused by privacy.identity.curve25519.check_sign_key.
    """
    if len(key) not in (CURVE_KEY_BYTES, CURVE_KEY_BYTES + ML_DSA_KEY_BYTES):
        raise TrustError(
            f"a verification key has 32 or 1984 bytes, got {len(key)}", hint="its owner must make a new key", code="weak-key"
        )
    curve25519.check_sign_key(key[:CURVE_KEY_BYTES])


def verify_signature(key: bytes, data: bytes, signature: bytes) -> None:
    """Return if ``signature`` is the holder of ``key``'s over ``data``.

    **Formal guarantees**: a key of 32 bytes takes exactly an Ed25519 signature of 64 bytes, as identity.curve25519 verifies it; a
    key of 1984 bytes takes exactly 3373 bytes, of which the first 64 are the Ed25519 half's and the rest the ML-DSA-65 half's,
    both over the same ``data``. No half alone, no half of another document, no other length verifies.

    Raises:
        TrustError: the key is unfit, or one half does not verify; which half is not said.
    """
    check_verify_key(key)
    is_composite = len(key) > CURVE_KEY_BYTES
    if len(signature) != signature_bytes(HYBRID if is_composite else ED25519):
        raise curve25519.not_by(key)
    curve25519.verify_signature(key[:CURVE_KEY_BYTES], data, signature[:CURVE_SIGNATURE_BYTES])
    if is_composite:
        try:
            MLDSA65PublicKey.from_public_bytes(key[CURVE_KEY_BYTES:]).verify(signature[CURVE_SIGNATURE_BYTES:], data)
        except (InvalidSignature, ValueError):
            raise curve25519.not_by(key) from None
