# SPDX-License-Identifier: Apache-2.0
"""Every message of the protocol protects itself: signed by its author, sealed to its reader, bound to its place.

**Signed.** ``open_signed`` returns a body only if the holder of ``key`` signed exactly these bytes, as this type, in this
context (the contract's digest, or epoch_ctx), as this sender. So a document moved to another type, contract, epoch or
sender is refused, whoever carries it. Who carries it does not matter: the same bytes work over HTTP or on a USB stick.
A signature does not age; *rounds* and *attempts* stand inside the bodies, and their readers check them.

**Sealed.** ``seal`` encrypts to one X-Wing key (HPKE base mode, RFC 9180: X-Wing, HKDF-SHA256, AES-256-GCM). Only the
holder of that key's seed opens it, only with the same ``info``, and not a byte changed. Recorded ciphertexts stay closed
while X25519 or ML-KEM-768 holds and the seed is secret: whoever gets the seed later reads them (no forward secrecy beyond
the seed's life, which is why epoch seeds are deleted).

**Not promised.** Sealing hides neither the length nor who seals (anyone can; authors are proved by the signature around
it), signatures are not post-quantum, and nothing here detects that a valid message was withheld or sent twice.

All failures are ``TrustError``. A sealed message that does not open says only that: wrong key, wrong info, cut or changed
bytes are one message, so that an answer teaches a forger nothing.
"""

from __future__ import annotations

from builtins import type as type_of
from typing import Final, Literal, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke

from privacy.errors import TrustError
from privacy.federation import Accepted, Guardian, Member, parse
from privacy.identity import keys
from privacy.messages import (
    AGGREGATOR,
    Close,
    Confirmation,
    Consent,
    Endorsement,
    EpochNote,
    GuardianNote,
    Header,
    Kind,
    Listing,
    PairSeeds,
    Release,
    SegmentVerdict,
    Shares,
    Signed,
    decode,
    encode,
)

SignedType = Literal[Kind, "identity", "header"]
M = TypeVar("M", EpochNote, PairSeeds, Confirmation, Header, Consent, Release, SegmentVerdict)
G = TypeVar("G", GuardianNote, Listing, Endorsement, Shares, Close)
OVERHEAD_BYTES: Final = 1136
"""What ``seal`` adds: an encapsulated key of 1120 bytes and a tag of 16."""

_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def sign(identity: keys.Identity, *, type: SignedType, context: bytes, sender: int, body: bytes) -> bytes:
    """The encoded ``Signed`` document: ``body`` and the identity's signature over keys.signing_input.

    Args:
        context: 32 bytes: the contract's digest before an epoch, epoch_ctx in one.
        sender: the author's id in the contract, 0 for the aggregator.
    """
    signature = identity.sign(keys.signing_input(type=type, context=context, sender=sender, body=body))
    return encode(Signed(version="gsum/1", type=type, sender=sender, context=context, body=body, signature=signature))


def open_signed(raw: bytes, *, type: SignedType, context: bytes, sender: int, key: bytes) -> bytes:
    """The body that ``sender``, who holds ``key``, signed as ``type`` in ``context``; the exact bytes that were signed.

    **Formal guarantees**: any change of type, context, sender, body or signature is refused; there is one valid ``raw`` per
    signature (canonical encoding, canonical R and S), so a digest of ``raw`` names one document.

    Raises:
        TrustError: malformed, another type, context or sender than expected, an unfit key, or a signature that is not the key's.
    """
    document = decode(raw, Signed)
    found: tuple[tuple[str, object, object], ...] = (
        ("type", document.type, type), ("sender", document.sender, sender), ("context", document.context.hex(), context.hex()),
    )  # fmt: skip
    for field, value, wanted in found:
        if value != wanted:
            raise TrustError(
                f"a {document.type} with {field} {value} where {field} {wanted} was expected",
                code=f"wrong-{field}",
                hint="the document belongs elsewhere: another federation, epoch, step or party",
                found=value,
                expected=wanted,
            )
    signed = keys.signing_input(type=type, context=context, sender=sender, body=document.body)
    keys.verify_signature(key, signed, document.signature)
    return document.body


def open_contract(raw: bytes) -> Accepted:
    """The contract in its signed document; the key that signed it is the aggregator's that stands in it.

    Raises:
        TrustError: malformed, or signed by another key.
        ConfigError: the terms contradict each other.
    """
    accepted = parse(decode(raw, Signed).body)
    key = accepted.terms.aggregator.verify_key
    open_signed(raw, type="contract", context=accepted.digest, sender=AGGREGATOR, key=key)
    return accepted


def open_member(raw: bytes, kind: type_of[M], *, type: SignedType, context: bytes, member: Member) -> M:
    """The member's signed document as a ``kind``, whose ``silo`` is that member.

    Raises:
        TrustError: as ``open_signed``; or the body is malformed, or names another silo.
    """
    raw_key = member.verify_key
    message = decode(open_signed(raw, type=type, context=context, sender=member.id, key=raw_key), kind)
    if message.silo != member.id:
        raise TrustError(
            f"the {type} of silo {member.id} says it is of silo {message.silo}",
            code="wrong-sender",
            hint="that silo's software is faulty",
        )
    return message


def open_guardian(raw: bytes, kind: type_of[G], *, type: SignedType, context: bytes, guardian: Guardian) -> G:
    """The guardian's signed document as a ``kind``, whose ``guardian`` is that guardian.

    Raises:
        TrustError: as ``open_signed``; or the body is malformed, or names another guardian.
    """
    message = decode(open_signed(raw, type=type, context=context, sender=guardian.id, key=guardian.verify_key), kind)
    if message.guardian != guardian.id:
        raise TrustError(
            f"the {type} of guardian {guardian.id} says it is of guardian {message.guardian}",
            code="wrong-sender",
            hint="that guardian's software is faulty",
        )
    return message


def seal(public_key: bytes, plaintext: bytes, *, info: bytes) -> bytes:
    """``plaintext`` for the holder of an X-Wing key: ``OVERHEAD_BYTES`` longer, fresh randomness from the library each time.

    Args:
        public_key: 1216 bytes, checked here.
        info: names the purpose and place (label NUL ‖ contexts ‖ ids); the reader must give the same.

    Raises:
        TrustError: the key is not fit to be sealed to.
    """
    return _SUITE.encrypt(plaintext, keys.load_seal_key(public_key), info)


def open_sealed(seed: bytes, sealed: bytes, *, info: bytes, what: str = "a sealed message") -> bytes:
    """What was sealed to the X-Wing key of ``seed`` under exactly ``info``; a refusal calls it ``what``.

    Raises:
        TrustError: it does not open; one message for every cause.
    """
    try:
        return _SUITE.decrypt(sealed, keys.load_seal_seed(seed), info)
    except (InvalidTag, ValueError):
        purpose = info.split(b"\0", 1)[0].decode("ascii", "replace")
        raise TrustError(
            f"{what} does not open as {purpose!r}",
            code="sealed",
            hint="it was sealed to another key or for another place, or changed on the way",
        ) from None
