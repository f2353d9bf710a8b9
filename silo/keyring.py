# SPDX-License-Identifier: Apache-2.0
"""A silo's own keys over time: the one in the contract, a new one that waits for its contract, and what older ones signed.

``rotate`` makes a new ``identity.key`` and keeps the one before as ``identity.key.old``, which goes on signing until a contract
that names the new key is in force; ``retire`` then deletes it. The public half of every former key stays in ``former/<n>.pub``:
the ledger goes on over a rotation, its lines signed by the former keys first, then by the new one.

Promised: a rotation that was killed at any write is completed by the same command, with the same new key; the old key is never lost
before the new one is in force; no key of anybody else changes. Not promised: that a deleted key is gone from the medium, or that a
stolen key does no harm until the others countersigned the contract without it: call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from privacy import files
from privacy.errors import ConfigError, TrustError
from privacy.federation import Accepted, Member
from privacy.identity import keys
from silo.home import Home


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """A rotation that waits for its contract: the new identity, and whether the old key is there to sign for it."""

    identity: keys.Identity
    crossed: bool


def identities(home: Home) -> tuple[keys.Identity, ...]:
    """The newest identity, and the one before while it may still sign.

    Raises:
        ConfigError: there is none, or a key file is damaged or open to others.
    """
    old = home.old_identity_path
    return (keys.load(home.identity_path), *((keys.load(old),) if old.exists() else ()))


def under(home: Home, accepted: Accepted) -> keys.Identity:
    """This silo's identity under a contract, with exactly its suite: the newest key that stands in it.

    Raises:
        TrustError: no key of this silo is a member's.
        ConfigError: as ``identities``.
    """
    held = identities(home)
    chosen = next((identity for identity in held if find_member(accepted, identity) is not None), held[0])
    member_of(accepted, chosen)
    return chosen.under(accepted.terms.signatures)


def signer(home: Home, accepted: Accepted) -> keys.Identity:
    """Whose key signs this silo's ledger under a contract: with Ed25519 alone, whatever the contract's suite.

    A silo whose key was replaced signs with the one in the contract; before the contract is joined, with the newest.
    """
    held = identities(home)
    return next((identity for identity in held if find_member(accepted, identity) is not None), held[0])


def member_of(accepted: Accepted, identity: keys.Identity) -> Member:
    """The member of the contract with exactly this identity's keys. Raises TrustError when there is none."""
    found = find_member(accepted, identity)
    if found is None:
        raise TrustError(
            f"no member of {accepted.terms.name} has this silo's key {identity.public.sign_key.hex()[:16]}…",
            hint="send identity.pub to the coordinator, who adds it with `aggregator member`", code="not-a-member",
        )  # fmt: skip
    return found


def find_member(accepted: Accepted, identity: keys.Identity) -> Member | None:
    """The member of the contract with exactly this identity's keys, or None."""
    public, suite = identity.public, accepted.terms.signatures
    if suite == keys.HYBRID and public.ml_dsa_key is None:
        return None
    own = public.under(suite).verify_key
    return next((member for member in accepted.terms.member if member.verify_key == own), None)


def rotate(home: Home, *, organisation: str, lost: bool = False) -> Rotated:
    """A new key beside the old one, or, when one waits already, that one. Hold the home's lock.

    Args:
        lost: the old key is gone: the new one starts without its signature, and the others' countersignatures must do.

    Raises:
        ConfigError: there is no key to keep and ``lost`` was not said, or it was said and the key is there.
        MachineError: the disk refuses; the same command goes on where it stopped.
    """
    there = home.identity_path.exists()
    waiting = home.new_identity_path.exists()
    if not waiting and there and home.old_identity_path.exists():
        return Rotated(identity=keys.load(home.identity_path), crossed=True)
    if not waiting and lost == there:
        raise ConfigError(
            f"{home.identity_path.name} is " + ("there, --lost is for one that is gone" if lost else "missing"),
            hint="rotate without --lost" if lost else "if the key is lost for good, say --lost", code="identity-file",
        )  # fmt: skip
    if not waiting:
        name = keys.load(home.identity_path).name if there else _known(home).name
        keys.save(home.new_identity_path, keys.fresh(name, receives=False))
    new = keys.load(home.new_identity_path)
    if there and keys.load(home.identity_path) != new:
        keys.save(home.old_identity_path, keys.load(home.identity_path))
    _keep_former(home, new)
    if not there or keys.load(home.identity_path) != new:
        files.write_atomic(home.identity_path, home.new_identity_path.read_bytes(), mode=files.PRIVATE)
    keys.write_public(home.public_path, new, organisation)
    home.new_identity_path.unlink()
    return Rotated(identity=new, crossed=home.old_identity_path.exists())


def retire(home: Home, accepted: Accepted) -> bool:
    """Delete the old key, now that ``accepted`` is in force and names the new one; whether there was one. Hold the home's lock."""
    old = home.old_identity_path
    if not old.exists() or find_member(accepted, keys.load(home.identity_path)) is None:
        return False
    old.unlink()
    return True


def former(home: Home, accepted: Accepted) -> keys.Identity | None:
    """The old identity, when a contract names the new one and the old key is there to sign for it."""
    held = identities(home)
    return held[1] if len(held) > 1 and find_member(accepted, held[0]) is not None else None


def verifier(home: Home) -> Callable[[bytes, bytes], None]:
    """Checks the lines of this silo's ledger in order, once: former keys first, the newest last, and never one back.

    **Formal guarantees**: a line verifies by one of this silo's keys, and no key verifies a line after a newer key did.
    """
    own = [keys.read_public(raw).sign_key for raw in _formers(home)]
    own += [identity.public.sign_key for identity in reversed(identities(home)) if identity.public.sign_key not in own]
    return ordered(own)


def former_keys(home: Home) -> list[bytes]:
    """The Ed25519 keys that this silo had before its newest, oldest first."""
    return [keys.read_public(raw).sign_key for raw in _formers(home)]


def ordered(own: Sequence[bytes]) -> Callable[[bytes, bytes], None]:
    """A verifier that takes signatures of these Ed25519 keys in this order; see ``verifier``."""
    place = 0

    def verify(data: bytes, signature: bytes) -> None:
        nonlocal place
        for number in range(place, len(own)):
            try:
                keys.verify_signature(own[number], data, signature)
            except TrustError:
                continue
            place = number
            return
        keys.verify_signature(own[-1], data, signature)  # raises, in its own words

    return verify


def _keep_former(home: Home, new: keys.Identity) -> None:
    """The public half of the key before ``new``, kept once; its file is written before ``identity.pub`` is replaced."""
    before = _known(home)
    kept = [keys.read_public(raw).verify_key for raw in _formers(home)]
    if before.verify_key == new.public.verify_key or before.verify_key in kept:
        return
    files.make_folder(home.former_folder)
    files.write_once(home.former_folder / f"{len(kept) + 1}.pub", home.public_path.read_bytes())


def _known(home: Home) -> keys.PublicMember:
    try:
        return keys.read_public(home.public_path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read {home.public_path}: {error.strerror}",
            hint="put back the identity.pub that was sent to the coordinator: the ledger is checked by it", code="identity-file",
        ) from error  # fmt: skip


def _formers(home: Home) -> list[bytes]:
    found, number = [], 1
    while (path := home.former_folder / f"{number}.pub").is_file():
        found.append(path.read_bytes())
        number += 1
    return found
