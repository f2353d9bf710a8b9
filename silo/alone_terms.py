# SPDX-License-Identifier: Apache-2.0
"""What a run alone is under a contract: its terms, and the name under which it stands in the ledger (``silo.alone``)."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from privacy.errors import PrivacyRefusal
from privacy.federation import Contract, ring_plan_at

_DOMAIN = b"siloquy alone 1\x00"


def terms_alone(terms: Contract) -> Contract:
    """The contract's terms for one silo without the others.

    Formal guarantees:
        - *Same mechanism*: sampling rate, clipping norm, noise multiplier and number of steps are the contract's, and the one noise
          share that is counted on is the silo's own, in full; so the plan has the contract's epsilon at its delta. The lattice is
          the contract's, or the finest on which that much noise can be drawn.
        - *No other silo*: neither the divisor nor the ring nor the noise counts on anybody else.

    Raises:
        PrivacyRefusal: the contract has no differential privacy, so there is no epsilon to compare at.
    """
    if not terms.is_private:
        raise PrivacyRefusal(
            "this contract has no differential privacy: a run alone has no epsilon to be compared at",
            hint="train without it on this machine by other means: nothing here would be protected", code="no-differential-privacy",
        )  # fmt: skip
    changes: dict[str, Any] = {
        "training": msgspec.structs.replace(terms.training, mode="local"),
        "privacy": msgspec.structs.replace(terms.privacy, max_silos_per_unit=1),
    }
    if terms.basis is not None:
        changes |= {"basis": None, "adapter": msgspec.structs.replace(terms.adapter, basis="weights")}
    own = msgspec.structs.replace(terms, **changes)
    finest = ring_plan_at(own, noise_multiplier=own.privacy.noise_multiplier, lattice_bits=None).lattice_bits
    bits = min(finest, own.privacy.lattice_bits)
    return msgspec.structs.replace(own, privacy=msgspec.structs.replace(own.privacy, lattice_bits=bits))


def run_of(contract: bytes) -> bytes:
    """The digest under which a run alone stands in the ledger: never that of a contract, nor of another contract's run alone."""
    return hashlib.sha256(_DOMAIN + contract).digest()
