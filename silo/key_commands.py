# SPDX-License-Identifier: Apache-2.0
"""What ``silo keys`` does, without the words: a home in, facts out. No secret is ever among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from privacy.errors import ConfigError, TrustError
from privacy.federation import Accepted
from privacy.identity import keys
from silo import keyring, succession
from silo.guardians import guard_commands
from silo.home import Home
from silo.reading import fingerprints, opened


def show(root: Path) -> dict[str, Any]:
    """Each key file of this silo: what it is called, its fingerprints and suites, and its place in the contract.

    Raises:
        ConfigError: there is no silo or no key, or a key file is damaged or open to others.
    """
    home, settings = opened(root)
    accepted = _contract(home)
    held = keyring.identities(home)
    files = (home.identity_path, home.old_identity_path)
    return {
        "name": settings.name,
        "contract": None if accepted is None else accepted.digest.hex(),
        "signatures": None if accepted is None else accepted.terms.signatures,
        "keys": [_described(path, identity, accepted) for path, identity in zip(files, held, strict=False)],
    }


def rotate(root: Path, *, lost: bool) -> dict[str, Any]:
    """A new key for this silo, or guardian, or the one of a rotation that was begun; what to send and what to read aloud.

    Raises:
        As ``silo.keyring.rotate``.
    """
    if guard_commands.is_alone(root):
        home, organisation = Home(root), guard_commands.organisation(root)
    else:
        home, settings = opened(root)
        organisation = settings.organisation
    with home.locked():
        made = keyring.rotate(home, organisation=organisation, lost=lost)
    plain, both = fingerprints(made.identity)
    return {
        "name": made.identity.name, "identity": str(home.public_path), "fingerprint": plain, "fingerprint_ml_dsa": both,
        "old_key_signs": made.crossed,
    }  # fmt: skip


def _contract(home: Home) -> Accepted | None:
    try:
        return succession.at_work(home)[0]
    except (ConfigError, TrustError):
        return None


def _described(path: Path, identity: keys.Identity, accepted: Accepted | None) -> dict[str, Any]:
    plain, both = fingerprints(identity)
    member = None if accepted is None else keyring.find_member(accepted, identity)
    if accepted is None:
        state = "in no contract yet"
    elif member is None:
        state = "not in the contract in force"
    else:
        state = f"member {member.id} of contract version {accepted.terms.version}"
    return {
        "file": path.name, "state": state, "fingerprint": plain, "fingerprint_ml_dsa": both,
        "suites": [keys.ED25519, keys.HYBRID] if both else [keys.ED25519], "member": None if member is None else member.id,
    }  # fmt: skip
