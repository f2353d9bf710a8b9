# SPDX-License-Identifier: Apache-2.0
"""Identities: who signs, who receives, and which public keys are fit to be trusted.

Promised: a key that passes ``check_sign_key`` has prime order, so a signature that verifies was made for exactly these
bytes by a holder of the seed (unforgeability of Ed25519); what is sealed to a checked X-Wing key stays closed to everyone
without its seed while X25519 *or* ML-KEM-768 holds; an ``identity.pub`` that reads was made by the holder of its key.

Not promised: that a name belongs to an organisation (people compare ``fingerprint`` aloud), or that a stolen or copied key
file is noticed. Secrets are plain ``bytes`` that Python cannot wipe; no ``repr`` shows them.

The X-Wing seed is 32 bytes, expanded by SHAKE-256 to 96: ML-KEM-768 seed (64) and X25519 scalar (32), public key
1184 + 32 bytes (draft-connolly-cfrg-xwing-kem §5.2). Ed25519 is RFC 8032; HKDF is RFC 5869 with SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from privacy import files
from privacy.curve25519 import check_dh_key, check_sign_key, verify_signature
from privacy.errors import ConfigError, Equivocation, TrustError

__all__ = [
    "Identity", "PublicIdentity", "PublicMember", "check_dh_key", "check_sign_key", "create", "expand", "extract",
    "fingerprint", "load", "load_seal_key", "load_seal_seed", "read_public", "seal_public_key", "signing_input", "u32",
    "verify_signature", "write_public",
]  # fmt: skip

SEED_BYTES: Final = 32
SEAL_KEY_BYTES: Final = 1216
NO_CONTEXT: Final = bytes(32)
"""The context of a signature that is made before any contract exists: an identity's own."""

_MAX_FILE_BYTES: Final = 16384
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")

@dataclass(frozen=True, kw_only=True)
class PublicIdentity:
    """The public half of an identity; ``seal_key`` is None for a party that receives nothing."""

    name: str
    sign_key: bytes
    seal_key: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class PublicMember(PublicIdentity):
    """A verified ``identity.pub``: the public identity and the organisation it claims to speak for."""

    organisation: str


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A private identity: 32-byte Ed25519 seed and, for a party that receives, a 32-byte X-Wing seed."""

    name: str
    sign_seed: bytes = field(repr=False)
    receive_seed: bytes | None = field(default=None, repr=False)

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature (64 bytes) over ``data``. Sign only what ``signing_input`` made."""
        return Ed25519PrivateKey.from_private_bytes(self.sign_seed).sign(data)

    @property
    def public(self) -> PublicIdentity:
        """The public half."""
        sign_key = Ed25519PrivateKey.from_private_bytes(self.sign_seed).public_key().public_bytes_raw()
        seal_key = None if self.receive_seed is None else seal_public_key(self.receive_seed)
        return PublicIdentity(name=self.name, sign_key=sign_key, seal_key=seal_key)


def create(path: Path, *, name: str, receives: bool) -> Identity:
    """A fresh identity, written to ``path`` (0600, durable, never over an existing file) before it is returned.

    Raises:
        ConfigError: the path is taken, or the name is not lower-case letters, digits, dots and hyphens.
        MachineError: the disk is full or the folder cannot be written.
    """
    _check_name(name)
    if os.path.lexists(path):
        raise _path_taken(path)
    identity = Identity(name=name, sign_seed=os.urandom(SEED_BYTES), receive_seed=os.urandom(SEED_BYTES) if receives else None)
    try:
        files.write_once(path, _private_text(identity).encode(), mode=files.PRIVATE)
    except Equivocation:
        raise _path_taken(path) from None
    return identity


def load(path: Path) -> Identity:
    """The identity in a file that ``create`` wrote.

    Raises:
        ConfigError: missing, not a regular file, readable or writable by group or others, or malformed.
    """
    raw = _read_private(path)
    try:
        stored = msgspec.toml.decode(raw, type=_PrivateFile)
        receive_seed = None if stored.receive_seed is None else _from_hex(stored.receive_seed, SEED_BYTES)
        _check_name(stored.name)
        return Identity(name=stored.name, sign_seed=_from_hex(stored.sign_seed, SEED_BYTES), receive_seed=receive_seed)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, ConfigError):
        # The parser's own words could quote the secret.
        raise ConfigError(f"{path} is not an identity file", hint="restore it from your backup", code="identity-file") from None


def fingerprint(public: PublicIdentity) -> str:
    """Sixteen groups of four hex digits over name and keys, for two people to compare over another channel."""
    seal_key = public.seal_key or b""
    digest = hashlib.sha256(
        b"gsum/1 fingerprint\0" + public.sign_key + len(seal_key).to_bytes(4, "big") + seal_key + public.name.encode()
    ).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, 64, 4))


def signing_input(*, type: str, context: bytes, sender: int, body: bytes) -> bytes:
    """The bytes under every signature: "gsum/1 sig " ‖ type NUL ‖ context ‖ u32 sender ‖ SHA-256(body).

    ``context`` is 32 bytes: the contract's digest before an epoch, epoch_ctx in one. Everything after NUL has a fixed
    length, so no two different (type, context, sender, body) give the same bytes. The sender is bound beyond PROTOCOL.md,
    so that a member listed under two ids could not have one signature serve both.
    """
    if len(context) != 32:
        raise TrustError(f"a signature's context has 32 bytes, got {len(context)}", hint="use the contract digest or epoch_ctx")
    return b"gsum/1 sig " + type.encode("ascii") + b"\0" + context + u32(sender) + hashlib.sha256(body).digest()


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


def write_public(path: Path, identity: Identity, organisation: str) -> None:
    """Write ``identity.pub``: name, organisation, keys, and the identity's own signature over the lines above it.

    Raises:
        ConfigError: the organisation is empty, longer than 200 characters or not printable.
        MachineError: the file cannot be written.
    """
    if not _is_organisation(organisation):
        raise ConfigError("an organisation is 1 to 200 printable characters", hint="give the name as it stands in the register")
    body = _public_text(identity.public, organisation).encode()
    signature = identity.sign(signing_input(type="identity", context=NO_CONTEXT, sender=0, body=body))
    files.write_atomic(path, body + f'signature = "{signature.hex()}"\n'.encode())


def read_public(raw: bytes) -> PublicMember:
    """The member that an ``identity.pub`` introduces; its holder proved possession of the key.

    The signature is checked over the bytes as they are, up to the last line.

    Raises:
        TrustError: malformed, a weak key, or not signed by the key it names.
    """
    try:
        body, signature = _split_signature(raw)
        stored = msgspec.toml.decode(body, type=_PublicFile)
        sign_key = _from_hex(stored.sign_key, 32)
        seal_key = None if stored.seal_key is None else _from_hex(stored.seal_key, SEAL_KEY_BYTES)
        _check_name(stored.name)
        if not _is_organisation(stored.organisation):
            raise ValueError("organisation")
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError, ConfigError) as error:
        raise TrustError(f"not a public identity: {error}", hint="ask its owner for it again", code="malformed") from error
    verify_signature(sign_key, signing_input(type="identity", context=NO_CONTEXT, sender=0, body=body), signature)
    if seal_key is not None:
        load_seal_key(seal_key)
    return PublicMember(name=stored.name, organisation=stored.organisation, sign_key=sign_key, seal_key=seal_key)


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
    receive_seed: str | None = None


class _PublicFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal["siloquy-identity/1"]
    name: str
    organisation: str
    sign_key: str
    seal_key: str | None = None


def _private_text(identity: Identity) -> str:
    public = identity.public
    lines = ["# Secret: whoever holds this file is this party. Keep one copy offline.", f"# sign key: {public.sign_key.hex()}"]
    if public.seal_key is not None:
        lines.append(f"# seal key: {public.seal_key.hex()}")
    lines += [f"# fingerprint: {fingerprint(public)}", 'format = "siloquy-key/1"', f'name = "{identity.name}"']
    lines.append(f'sign_seed = "{identity.sign_seed.hex()}"')
    if identity.receive_seed is not None:
        lines.append(f'receive_seed = "{identity.receive_seed.hex()}"')
    return "\n".join(lines) + "\n"


def _public_text(public: PublicIdentity, organisation: str) -> str:
    lines = ["# A public identity. Compare the fingerprint with its owner first.", f"# fingerprint: {fingerprint(public)}"]
    lines += ['format = "siloquy-identity/1"', f'name = "{public.name}"']
    lines += [f"organisation = {json.dumps(organisation, ensure_ascii=False)}", f'sign_key = "{public.sign_key.hex()}"']
    if public.seal_key is not None:
        lines.append(f'seal_key = "{public.seal_key.hex()}"')
    return "\n".join(lines) + "\n"


def _split_signature(raw: bytes) -> tuple[bytes, bytes]:
    found = re.fullmatch(rb'(.*\n)signature = "([0-9a-f]{128})"\n', raw, re.DOTALL)
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


def _path_taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists", hint="an identity is never overwritten; move it away first", code="identity-exists")


def _expand_seal_seed(seed: bytes) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    expanded = hashlib.shake_256(seed).digest(96)
    return mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
