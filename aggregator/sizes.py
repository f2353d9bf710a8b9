# SPDX-License-Identifier: Apache-2.0
"""How many bytes a member's document may have, by what the contract says. Checked before a byte of it is believed."""

from __future__ import annotations

from typing import Final

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted
from privacy.identity import signatures
from privacy.messages import AGGREGATOR_KINDS, Kind
from privacy.secure_sum import shares, slices

SIGNED_BYTES: Final = 256
"""More than a Signed adds to its body; for an upload, more than Signed and Upload add to the header and what is sealed."""
SEED_BYTES: Final = 32 + envelope.OVERHEAD_BYTES


def cap(kind: Kind, accepted: Accepted) -> int:
    """The most bytes a member's document of this kind may have.

    Raises:
        TrustError: only the coordinator writes this kind.
    """
    if kind in AGGREGATOR_KINDS:
        raise not_yours(kind)
    peers, d = accepted.terms.silos - 1, max(each.terms.dimension for each in (accepted, accepted.at(b"")))
    guardians, silos = len(accepted.terms.guardian), accepted.terms.silos
    header = SIGNED_BYTES + 256 + 48 * peers + 80 * guardians
    bundles = guardians * (16 + shares.bundle_bytes(silos)) if guardians else 0
    bodies = {
        "countersignature": 64, "epoch-note": 1536, "pair-seeds": 64 + (SEED_BYTES + 16) * peers, "confirmation": 64 + 48 * peers,
        "upload": header + 4 * d + envelope.OVERHEAD_BYTES + bundles,
        "consent": 128, "release": 128 + SEED_BYTES, "acknowledgement": 192, "verdict": 128 + 48 * slices.segments(d),
        "cosignature": 1024,
        "guardian-note": 1536, "list": 128 + 64 * silos, "endorsement": 128, "close": 128,
        "shares": 128 + shares.most_release_bytes(silos),
    }  # fmt: skip
    signature = signatures.signature_bytes(accepted.terms.signatures) - signatures.CURVE_SIGNATURE_BYTES
    return SIGNED_BYTES + bodies[kind] + (2 if kind in ("upload", "countersignature") else 1) * signature


def not_yours(kind: Kind) -> TrustError:
    return TrustError(f"a {kind} is not taken over this door", hint="only the coordinator writes it", code="not-yours")
