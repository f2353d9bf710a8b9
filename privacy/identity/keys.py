# SPDX-License-Identifier: Apache-2.0
"""Identities: who signs, who receives, and which public keys are fit to be trusted.

Promised: a key that passes ``check_sign_key`` has prime order, so a signature that verifies was made for exactly these
bytes by a holder of the seed (unforgeability of Ed25519, with an ML-DSA-65 key beside it of both together); what is sealed to a
checked X-Wing key stays closed to everyone without its seed while X25519 *or* ML-KEM-768 holds; an ``identity.pub`` that reads
was made by the holder of all its signing keys.

An identity signs with Ed25519 alone until it is asked for the contract's suite by ``Identity.under``; every new one has both seeds.

Not promised: that a name belongs to an organisation (people compare ``fingerprint`` aloud), or that a stolen or copied key
file is noticed. Secrets are plain ``bytes`` that Python cannot wipe; no ``repr`` shows them.

X-Wing keys are privacy.identity.xwing's, signatures privacy.identity.signatures'; HKDF is RFC 5869 with SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Protocol

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from privacy import files
from privacy.errors import ConfigError, Equivocation, TrustError
from privacy.identity import signatures
from privacy.identity.curve25519 import check_dh_key, check_sign_key
from privacy.identity.signatures import ED25519, HYBRID, ML_DSA_KEY_BYTES, SEED_BYTES, verify_signature
from privacy.identity.xwing import SEAL_KEY_BYTES, load_seal_key, load_seal_seed, seal_public_key

__all__ = [
    "ED25519", "HYBRID", "SEAL_KEY_BYTES", "Identity", "PublicIdentity", "PublicMember", "check_dh_key", "check_sign_key",
    "create", "expand", "extract", "fingerprint", "fresh", "load", "load_seal_key", "load_seal_seed", "read_public", "save",
    "seal_public_key", "signing_input", "stated", "u32", "verify_signature", "write_public",
]  # fmt: skip

NO_CONTEXT: Final = bytes(32)
"""The context of a signature that is made before any contract exists: an identity's own."""

_MAX_FILE_BYTES: Final = 16384
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")


class Party(Protocol):
    """Whoever a contract names: privacy.federation.Signer is one."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def verify_key(self) -> bytes:
        """Its verification key, 32 or 1984 bytes."""
        ...


@dataclass(frozen=True, kw_only=True)
class PublicIdentity:
    """The public half of an identity; ``seal_key`` is None for a party that receives nothing, ``ml_dsa_key`` when it has none."""

    name: str
    sign_key: bytes
    seal_key: bytes | None = None
    ml_dsa_key: bytes | None = None

    @property
    def verify_key(self) -> bytes:
        """The keys as ``verify_signature`` takes them: 32 bytes, or 32 + 1952."""
        return self.sign_key + (self.ml_dsa_key or b"")

    def under(self, suite: str) -> PublicIdentity:
        """The identity as a contract of this suite states it. Raises ConfigError when it lacks a key of the suite."""
        if suite == HYBRID and self.ml_dsa_key is None:
            raise _no_ml_dsa(self.name)
        return replace(self, ml_dsa_key=self.ml_dsa_key if suite == HYBRID else None)


@dataclass(frozen=True, kw_only=True)
class PublicMember(PublicIdentity):
    """A verified ``identity.pub``: the public identity and the organisation it claims to speak for."""

    organisation: str


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A private identity: 32-byte seeds for Ed25519 and ML-DSA-65 and, for a party that receives, one for X-Wing.

    Identities made before there was a second suite have no ML-DSA seed. ``suite`` is what ``sign`` signs with.
    """

    name: str
    sign_seed: bytes = field(repr=False)
    receive_seed: bytes | None = field(default=None, repr=False)
    ml_dsa_seed: bytes | None = field(default=None, repr=False)
    suite: str = ED25519

    def sign(self, data: bytes) -> bytes:
        """The signature over ``data``, 64 or 3373 bytes. Sign only what ``signing_input`` made."""
        second = self.ml_dsa_seed if self.suite == HYBRID else None
        return signatures.sign(data, sign_seed=self.sign_seed, ml_dsa_seed=second)

    def under(self, suite: str) -> Identity:
        """This identity as it signs under a contract of this suite: with all of its keys, and no more.

        Raises:
            ConfigError: the suite asks for an ML-DSA-65 key and this identity has none.
        """
        if suite == HYBRID and self.ml_dsa_seed is None:
            raise _no_ml_dsa(self.name)
        return replace(self, suite=suite)

    @property
    def public(self) -> PublicIdentity:
        """The public half, of every key there is."""
        keys = signatures.public_key(self.sign_seed, self.ml_dsa_seed)
        seal_key = None if self.receive_seed is None else seal_public_key(self.receive_seed)
        return PublicIdentity(name=self.name, sign_key=keys[:32], seal_key=seal_key, ml_dsa_key=keys[32:] or None)


def fresh(name: str, *, receives: bool) -> Identity:
    """New seeds from the operating system, in memory only. Raises ConfigError for a name that cannot stand."""
    _check_name(name)
    receive_seed = os.urandom(SEED_BYTES) if receives else None
    return Identity(name=name, sign_seed=os.urandom(SEED_BYTES), receive_seed=receive_seed, ml_dsa_seed=os.urandom(SEED_BYTES))


def create(path: Path, *, name: str, receives: bool) -> Identity:
    """A fresh identity, written to ``path`` (0600, durable, never over an existing file) before it is returned.

    Raises:
        ConfigError: the path is taken, or the name is not lower-case letters, digits, dots and hyphens.
        MachineError: the disk is full or the folder cannot be written.
    """
    _check_name(name)
    if os.path.lexists(path):
        raise _path_taken(path)
    identity = fresh(name, receives=receives)
    save(path, identity)
    return identity


def save(path: Path, identity: Identity) -> None:
    """Write an identity's private file (0600, durable), or find it there. Raises ConfigError when another one is."""
    try:
        files.write_once(path, _private_text(identity).encode(), mode=files.PRIVATE)
    except Equivocation:
        raise _path_taken(path) from None


def load(path: Path) -> Identity:
    """The identity in a file that ``create`` wrote.

    Raises:
        ConfigError: missing, not a regular file, readable or writable by group or others, or malformed.
    """
    raw = _read_private(path)
    try:
        stored = msgspec.toml.decode(raw, type=_PrivateFile)
        receive_seed, ml_dsa_seed = (
            None if seed is None else _from_hex(seed, SEED_BYTES) for seed in (stored.receive_seed, stored.ml_dsa_seed)
        )
        _check_name(stored.name)
        sign_seed = _from_hex(stored.sign_seed, SEED_BYTES)
        return Identity(name=stored.name, sign_seed=sign_seed, receive_seed=receive_seed, ml_dsa_seed=ml_dsa_seed)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError, ConfigError):
        # The parser's own words could quote the secret.
        raise ConfigError(f"{path} is not an identity file", hint="restore it from your backup", code="identity-file") from None


def fingerprint(public: PublicIdentity) -> str:
    """Sixteen groups of four hex digits over name and all keys, for two people to compare over another channel.

    An identity with both signing keys has another fingerprint than its Ed25519 half: ``PublicIdentity.under`` gives the one that
    a contract of that suite shows.
    """
    seal_key = public.seal_key or b""
    label = b"gsum/1 fingerprint\0" if public.ml_dsa_key is None else b"gsum/1 fingerprint ed25519+ml-dsa-65\0"
    digest = hashlib.sha256(
        label + public.verify_key + len(seal_key).to_bytes(4, "big") + seal_key + public.name.encode()
    ).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, 64, 4))


def stated(party: Party, seal_key: bytes | None = None) -> PublicIdentity:
    """The public identity of a party as a contract states it."""
    key = party.verify_key
    return PublicIdentity(name=party.name, sign_key=key[:32], seal_key=seal_key, ml_dsa_key=key[32:] or None)


def signing_input(*, type: str, context: bytes, sender: int, body: bytes) -> bytes:
    """The bytes under every signature: "gsum/1 sig " ‖ type NUL ‖ context ‖ u32 sender ‖ SHA-256(body).

    ``context`` is 32 bytes: the contract's digest before an epoch, epoch_ctx in one. Everything after NUL has a fixed
    length, so no two different (type, context, sender, body) give the same bytes. The sender is bound beyond PROTOCOL.md,
    so that a member listed under two ids could not have one signature serve both.
    """
    if len(context) != 32:
        raise TrustError(f"a signature's context has 32 bytes, got {len(context)}", hint="use the contract digest or epoch_ctx")
    return b"gsum/1 sig " + type.encode("ascii") + b"\0" + context + u32(sender) + hashlib.sha256(body).digest()


def write_public(path: Path, identity: Identity, organisation: str) -> None:
    """Write ``identity.pub``: name, organisation, keys, and the identity's own signature, by all keys, over the lines above it.

    Raises:
        ConfigError: the organisation is empty, longer than 200 characters or not printable.
        MachineError: the file cannot be written.
    """
    if not _is_organisation(organisation):
        raise ConfigError("an organisation is 1 to 200 printable characters", hint="give the name as it stands in the register")
    if _introduces(path, identity.public, organisation):
        return
    body = _public_text(identity.public, organisation).encode()
    signing = identity.under(ED25519 if identity.ml_dsa_seed is None else HYBRID)
    signature = signing.sign(signing_input(type="identity", context=NO_CONTEXT, sender=0, body=body))
    files.write_atomic(path, body + f'signature = "{signature.hex()}"\n'.encode())


def _introduces(path: Path, public: PublicIdentity, organisation: str) -> bool:
    """Whether ``path`` says this already: a composite signature differs each time, and a file that was sent stays as it is."""
    try:
        found = read_public(path.read_bytes())
    except (OSError, TrustError):
        return False
    wanted = (public.name, organisation, public.verify_key, public.seal_key)
    return (found.name, found.organisation, found.verify_key, found.seal_key) == wanted


def read_public(raw: bytes) -> PublicMember:
    """The member that an ``identity.pub`` introduces; its holder proved possession of every signing key in it.

    The signature is checked over the bytes as they are, up to the last line.

    Raises:
        TrustError: malformed, a weak key, or not signed by the key it names.
    """
    try:
        body, signature = _split_signature(raw)
        stored = msgspec.toml.decode(body, type=_PublicFile)
        sign_key = _from_hex(stored.sign_key, 32)
        seal_key = None if stored.seal_key is None else _from_hex(stored.seal_key, SEAL_KEY_BYTES)
        ml_dsa_key = None if stored.ml_dsa_key is None else _from_hex(stored.ml_dsa_key, ML_DSA_KEY_BYTES)
        _check_name(stored.name)
        if not _is_organisation(stored.organisation):
            raise ValueError("organisation")
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError, ConfigError) as error:
        raise TrustError(f"not a public identity: {error}", hint="ask its owner for it again", code="malformed") from error
    found = PublicMember(
        name=stored.name, organisation=stored.organisation, sign_key=sign_key, seal_key=seal_key, ml_dsa_key=ml_dsa_key
    )
    verify_signature(found.verify_key, signing_input(type="identity", context=NO_CONTEXT, sender=0, body=body), signature)
    if seal_key is not None:
        load_seal_key(seal_key)
    return found


def extract(salt: bytes, ikm: bytes) -> bytes:
    """HKDF-Extract with SHA-256: 32 bytes."""
    return HKDF.extract(SHA256(), salt, ikm)


def expand(key: bytes, label: str, *context: bytes) -> bytes:
    """HKDF-Expand with SHA-256, 32 bytes, info = label NUL ‖ context. Each label has one fixed context length.

    Raises:
        TrustError: the key is not 32 bytes. (HMAC pads with zeros: a key and the key ‖ 0 would give the same output.)
    """
    if len(key) != SEED_BYTES:
        raise _unfit(f"a derivation key has {SEED_BYTES} bytes, got {len(key)}")
    return HKDFExpand(SHA256(), 32, label.encode("ascii") + b"\0" + b"".join(context)).derive(key)


def u32(number: int) -> bytes:
    """``number`` as four big-endian bytes."""
    return number.to_bytes(4, "big")


class _PrivateFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["siloquy-key/1"]
    name: str
    sign_seed: str
    ml_dsa_seed: str | None = None
    receive_seed: str | None = None


class _PublicFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["siloquy-identity/1"]
    name: str
    organisation: str
    sign_key: str
    ml_dsa_key: str | None = None
    seal_key: str | None = None


def _private_text(identity: Identity) -> str:
    public = identity.public
    lines = ["# Secret: whoever holds this file is this party. Keep one copy offline.", f"# sign key: {public.sign_key.hex()}"]
    if public.seal_key is not None:
        lines.append(f"# seal key: {public.seal_key.hex()}")
    lines += [f"# fingerprint: {fingerprint(public)}", 'format = "siloquy-key/1"', f'name = "{identity.name}"']
    lines.append(f'sign_seed = "{identity.sign_seed.hex()}"')
    if identity.ml_dsa_seed is not None:
        lines.append(f'ml_dsa_seed = "{identity.ml_dsa_seed.hex()}"')
    if identity.receive_seed is not None:
        lines.append(f'receive_seed = "{identity.receive_seed.hex()}"')
    return "\n".join(lines) + "\n"


def _public_text(public: PublicIdentity, organisation: str) -> str:
    lines = ["# A public identity. Compare the fingerprint with its owner first.", f"# fingerprint: {fingerprint(public)}"]
    if public.ml_dsa_key is not None:
        lines.append(f"# fingerprint of its ed25519 keys alone: {fingerprint(public.under(ED25519))}")
    lines += ['format = "siloquy-identity/1"', f'name = "{public.name}"']
    lines += [f"organisation = {json.dumps(organisation, ensure_ascii=False)}", f'sign_key = "{public.sign_key.hex()}"']
    if public.ml_dsa_key is not None:
        lines.append(f'ml_dsa_key = "{public.ml_dsa_key.hex()}"')
    if public.seal_key is not None:
        lines.append(f'seal_key = "{public.seal_key.hex()}"')
    return "\n".join(lines) + "\n"


def _split_signature(raw: bytes) -> tuple[bytes, bytes]:
    found = re.fullmatch(rb'(.*\n)signature = "((?:[0-9a-f]{2})+)"\n', raw, re.DOTALL)
    if found is None or len(raw) > _MAX_FILE_BYTES:
        raise ValueError("the last line must be the signature")
    return found.group(1), bytes.fromhex(found.group(2).decode())


def _read_private(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            raw = stream.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read the identity {path}: {error.strerror}", hint="`silo init` makes one", code="identity-file"
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, wanted 0600", code="open-key",
            hint=f"chmod 600 {path}, and ask who could read it until now",
        )
    return raw


def _from_hex(text: str, size: int) -> bytes:
    # bytes.fromhex alone would take spaces, newlines and capitals: two spellings of one key.
    if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        raise ValueError(f"a key is not {2 * size} lower-case hex digits")
    return bytes.fromhex(text)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name", hint="use 1 to 63 lower-case letters, digits, dots and hyphens", code="name")


def _is_organisation(text: str) -> bool:
    return 0 < len(text) <= 200 and text.isprintable()


def _unfit(what: str) -> TrustError:
    return TrustError(what, hint="its owner must make a new key", code="weak-key")


def _no_ml_dsa(name: str) -> ConfigError:
    return ConfigError(
        f"{name} has no ML-DSA-65 key, and the contract's signatures are {HYBRID}",
        hint="its identity is older than that suite: `silo keys rotate` makes a new one", code="no-ml-dsa",
    )  # fmt: skip


def _path_taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists", hint="an identity is never overwritten; move it away first", code="identity-exists")
