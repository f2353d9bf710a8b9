# SPDX-License-Identifier: Apache-2.0
"""X-Wing keys, to which messages are sealed: ML-KEM-768 and X25519 together.

The seed is 32 bytes, expanded by SHAKE-256 to 96: ML-KEM-768 seed (64) and X25519 scalar (32), public key 1184 + 32 bytes
(draft-connolly-cfrg-xwing-kem §5.2).

Promised: a public key that loads has a reduced ML-KEM half and an X25519 half that is canonical and not of small order; what is
sealed to it stays closed while one of the two holds. Not promised: that its owner keeps the seed secret.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from privacy.errors import TrustError
from privacy.identity.curve25519 import check_dh_key

SEAL_KEY_BYTES: Final = 1216


def load_seal_key(key: bytes) -> hpke.MLKEM768X25519PublicKey:
    """The HPKE public key in its 1216 bytes, checked.

    Raises:
        TrustError: another length, an unreduced ML-KEM half, or an unfit X25519 half.
    """
    if len(key) != SEAL_KEY_BYTES:
        raise _unfit(f"an X-Wing key has {SEAL_KEY_BYTES} bytes, got {len(key)}")
    check_dh_key(key[-32:])
    try:
        lattice_half = mlkem.MLKEM768PublicKey.from_public_bytes(key[:-32])
    except ValueError:
        raise _unfit("the ML-KEM half of an X-Wing key is not reduced") from None
    return hpke.MLKEM768X25519PublicKey(lattice_half, x25519.X25519PublicKey.from_public_bytes(key[-32:]))


def load_seal_seed(seed: bytes) -> hpke.MLKEM768X25519PrivateKey:
    """The HPKE private key of a 32-byte X-Wing seed."""
    return hpke.MLKEM768X25519PrivateKey(*_expand_seal_seed(seed))


def seal_public_key(seed: bytes) -> bytes:
    """The 1216-byte X-Wing public key of a 32-byte seed: ML-KEM-768 ‖ X25519."""
    lattice_half, curve_half = _expand_seal_seed(seed)
    return lattice_half.public_key().public_bytes_raw() + curve_half.public_key().public_bytes_raw()


def _expand_seal_seed(seed: bytes) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    expanded = hashlib.shake_256(seed).digest(96)
    return mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), x25519.X25519PrivateKey.from_private_bytes(expanded[64:])


def _unfit(what: str) -> TrustError:
    return TrustError(what, hint="its owner must make a new key", code="weak-key")
