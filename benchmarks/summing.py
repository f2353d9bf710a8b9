# SPDX-License-Identifier: Apache-2.0
"""Secure sums without a network: real keys, signatures, masks and documents of one round, for benchmarks.secure_sum.

What a silo or the aggregator calls in a round is called here, on the functions that they call; transport, disk promises, the ledger
and training are left out. Pair secrets are dealt and not agreed on (benchmarks.round has a real epoch).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from privacy import envelope
from privacy.federation import GUARDIANS_FROM, Accepted, Contract, Member
from privacy.identity import keys
from privacy.messages import Certificate, Consent, Freeze, Header, Upload, Wire, decode, encode
from privacy.secure_sum import freeze, guardian_sum, shares
from privacy.secure_sum.epoch import PairChain
from privacy.secure_sum.guardian_sum import Certified, Frozen
from privacy.secure_sum.shares import Received, Secrets

Words = NDArray[np.uint32]

MANIFEST = b"the manifest of a round that is only summed"
_TERMS: dict[str, Any] = {
    "format": "siloquy/1", "version": 1, "name": "benchmark", "expires": "2099-12-31",
    "task": {"labels": ["no", "yes"], "max_length": 32},
    "model": {"name": "none", "digest": "00" * 32, "pooling": "mean"},
    "adapter": {"rank": 1, "modules": []},
    "training": {"rounds": 1, "learning_rate": 0.01},
    "privacy": {
        "units": 1000, "sampling_rate": 0.1, "max_grad_norm": 1.0, "noise_multiplier": 1.0, "epsilon": 8.0, "delta": 1e-9,
        "lattice_bits": 16,
    },
}  # fmt: skip


def new_identity(name: str, *, receives: bool = False) -> keys.Identity:
    return keys.Identity(name=name, sign_seed=os.urandom(32), receive_seed=os.urandom(32) if receives else None)


def contract(silos: int, dimension: int, hub: keys.Identity, identities: Mapping[int, keys.Identity], **more: Any) -> Accepted:
    """Terms of ``silos`` members whose vectors have ``dimension`` (even) numbers; only the sum reads them."""
    assert dimension in range(4, 2**31, 2), "two labels with a bias each: an even dimension"
    members = [
        {"id": i, "name": f"silo-{i}", "organisation": f"Hospital {i}", "sign_key": identities[i].public.sign_key.hex()}
        for i in range(1, silos + 1)
    ]
    seal_key = hub.public.seal_key or b""
    aggregator = {"name": "hub", "sign_key": hub.public.sign_key.hex(), "seal_key": seal_key.hex()}
    model = {**_TERMS["model"], "hidden_size": dimension // 2 - 1}
    made = {"sum": {"protocol": "consent"}, **_TERMS, "model": model, "aggregator": aggregator, "member": members, **more}
    raw = msgspec.json.encode(made)
    terms = msgspec.convert(made, Contract)
    assert terms.dimension == dimension
    return Accepted(terms=terms, raw=raw, digest=hashlib.sha256(raw).digest())


@dataclass(frozen=True)
class Vectors(Mapping[int, Words]):
    """Opened vectors in files of one folder, read one at a time, as a sum that streams needs them."""

    folder: Path
    silos: tuple[int, ...]

    def __getitem__(self, silo: int) -> Words:
        return np.fromfile(self.folder / f"{silo}.words", dtype="<u4")

    def __iter__(self) -> Iterator[int]:
        return iter(self.silos)

    def __len__(self) -> int:
        return len(self.silos)

    def put(self, silo: int, y: Words) -> None:
        y.tofile(self.folder / f"{silo}.words")


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a silo made of its vector."""

    header: bytes
    document: bytes
    seed: bytes
    bundles: tuple[bytes, ...]


class ConsentSum:
    """One round in consent mode, cut into what one silo and the aggregator do."""

    def __init__(self, silos: int, dimension: int, folder: Path) -> None:
        self.silos, self.dimension = tuple(range(1, silos + 1)), dimension
        self.hub, self.identities = new_identity("hub", receives=True), {i: new_identity(f"silo-{i}") for i in self.silos}
        self.accepted = contract(silos, dimension, self.hub, self.identities)
        self.members: dict[int, Member] = {member.id: member for member in self.accepted.terms.member}
        self.context, self.ctx = os.urandom(32), guardian_sum.round_ctx(MANIFEST)
        self.links = {pair: os.urandom(32) for pair in combinations(self.silos, 2)}
        self.vectors = Vectors(folder, self.silos)

    # --- a silo ---

    def x(self, silo: int) -> Words:
        """The silo's vector: any words will do."""
        return np.random.default_rng(silo).integers(0, 2**32, self.dimension, dtype=np.uint32)

    def chain(self, silo: int) -> PairChain:
        links = tuple((i + j - silo, link) for (i, j), link in sorted(self.links.items()) if silo in (i, j))
        return PairChain(context=self.context, epoch=1, silo=silo, index=0, links=tuple(sorted(links)))

    def upload(self, silo: int, x: Words, chain: PairChain) -> Made:
        """From a vector to the finished document: keys, masks, shares, header, seal, signatures."""
        attempt, pair_keys = os.urandom(16), chain.round_keys(self.ctx)
        seed = guardian_sum.self_seed(bytes(32), attempt, hashlib.sha256(x.tobytes()).digest(), os.urandom(32))
        place: dict[str, Any] = {"round_ctx": self.ctx, "silo": silo, "attempt": attempt, "self_seed": seed, "pair_keys": pair_keys}
        y = guardian_sum.mask(x, **place)
        bundles, entries = self.dealt(place)
        header = self.signed(silo, "header", guardian_sum.build_header(y, ledger_counter=1, bundles=entries, **place))
        info = guardian_sum.upload_info(round_ctx=self.ctx, silo=silo, header=header)
        sealed = envelope.seal(self.hub.public.seal_key or b"", y.tobytes(), info=info)
        document = self.signed(silo, "upload", Upload(header=header, sealed=sealed, bundles=bundles))
        return Made(header=header, document=document, seed=seed, bundles=bundles)

    def dealt(self, place: Mapping[str, Any]) -> tuple[tuple[bytes, ...], tuple[tuple[int, bytes, bytes], ...]]:
        """Bundles for the guardians, and what the header says of them; there are none in consent mode."""
        return (), ()

    def consent(self, silo: int, proposed: Freeze, own_header: bytes) -> bytes:
        """The set checked, and this silo's signature for it."""
        return self.consent_to(silo, self.frozen(proposed, own_header))

    def consent_to(self, silo: int, frozen: Frozen) -> bytes:
        return self.signed(silo, "consent", Consent(round_ctx=self.ctx, silo=silo, frozen=frozen.digest))

    def release(self, silo: int, certificate: Certificate, frozen: Frozen, seed: bytes) -> bytes:
        """The certificate checked, and the seed for it."""
        return self.release_to(silo, self.certified(certificate, frozen), seed)

    def release_to(self, silo: int, certified: Certified, seed: bytes) -> bytes:
        message = guardian_sum.seal_release(certified, silo=silo, self_seed=seed, seal_key=self.hub.public.seal_key or b"")
        return self.signed(silo, "release", message)

    def signed(self, silo: int, kind: Any, message: Wire) -> bytes:
        return envelope.sign(self.identities[silo], type=kind, context=self.context, sender=silo, body=encode(message))

    # --- both ---

    def frozen(self, proposed: Freeze, own_header: bytes | None = None) -> Frozen:
        return guardian_sum.check_freeze(
            proposed, accepted=self.accepted, epoch_ctx=self.context, round_ctx=self.ctx, own_header=own_header
        )

    def certified(self, certificate: Certificate, frozen: Frozen) -> Certified:
        return guardian_sum.check_certificate(certificate, frozen, accepted=self.accepted, epoch_ctx=self.context)

    # --- the aggregator ---

    def receive(self, silo: int, document: bytes) -> tuple[Header, Words]:
        """A document as it came: signatures, header, decryption, root of the vector."""
        body = envelope.open_signed(document, type="upload", context=self.context, sender=silo, key=self.members[silo].verify_key)
        upload = decode(body, Upload)
        header = guardian_sum.check_header(
            upload.header, self.members[silo], accepted=self.accepted, epoch_ctx=self.context, round_ctx=self.ctx
        )
        return header, guardian_sum.open_upload(upload, header, seal_seed=self.hub.receive_seed or b"")

    def seeds(self, certified: Certified, releases: Mapping[int, bytes]) -> dict[int, bytes]:
        """Every released seed, opened and checked."""
        return {
            i: guardian_sum.open_release(
                raw, certified, member=self.members[i], epoch_ctx=self.context, seal_seed=self.hub.receive_seed or b""
            )
            for i, raw in releases.items()
        }

    def total(self, certified: Certified, seeds: Mapping[int, bytes]) -> Words:
        """The sum over the set."""
        return guardian_sum.unmask(self.vectors, seeds, certified)


class SharesSum(ConsentSum):
    """One round in share mode: the last ``dropped`` silos of the epoch never upload, and guardians stand in for them."""

    def __init__(self, silos: int, dimension: int, folder: Path, *, dropped: int, guardians: int, corrupt: int) -> None:
        super().__init__(silos, dimension, folder)
        self.guardians = {GUARDIANS_FROM + i: new_identity(f"guardian-{i}", receives=True) for i in range(1, guardians + 1)}
        listed = [
            {"id": i, "name": each.name, "organisation": f"Notary {i}", "sign_key": each.public.sign_key.hex()}
            for i, each in self.guardians.items()
        ]
        terms = {"protocol": "shares", "dropouts": dropped, "corrupt_guardians": corrupt}
        self.accepted = contract(silos, dimension, self.hub, self.identities, guardian=listed, sum=terms)
        self.vectors = Vectors(folder, self.silos[: silos - dropped])
        self.guardian_keys = {i: each.public.seal_key or b"" for i, each in self.guardians.items()}

    @property
    def here(self) -> tuple[int, ...]:
        """The silos that upload."""
        return self.vectors.silos

    def dealt(self, place: Mapping[str, Any]) -> tuple[tuple[bytes, ...], tuple[tuple[int, bytes, bytes], ...]]:
        made = shares.deal(terms=self.accepted.terms, guardian_keys=self.guardian_keys, **place)
        return made.bundles, made.entries

    def receive(self, silo: int, document: bytes) -> tuple[Header, Words]:
        """As in consent mode, and the bundles held to the header."""
        body = envelope.open_signed(document, type="upload", context=self.context, sender=silo, key=self.members[silo].verify_key)
        upload = decode(body, Upload)
        header = self.header(silo, upload.header)
        shares.check_bundles(upload, header)
        return header, guardian_sum.open_upload(upload, header, seal_seed=self.hub.receive_seed or b"")

    def header(self, silo: int, raw: bytes) -> Header:
        return guardian_sum.check_header(
            raw, self.members[silo], accepted=self.accepted, epoch_ctx=self.context, round_ctx=self.ctx, silos=self.silos
        )

    # --- a guardian ---

    def listed(self, guardian: int, made: Mapping[int, Made]) -> tuple[dict[int, Received], bytes]:
        """Every bundle for this guardian opened and held to its root; its signed list."""
        at = list(self.guardians).index(guardian)
        seed = self.guardians[guardian].receive_seed or b""
        received = {
            silo: shares.receive_bundle(
                each.bundles[at], each.header, self.header(silo, each.header), guardian=guardian, seal_seed=seed
            )
            for silo, each in made.items()
        }
        return received, self.said(guardian, "list", shares.listing(received.values(), round_ctx=self.ctx, guardian=guardian))

    def endorsed(self, guardian: int, proposed: Freeze) -> tuple[Frozen, bytes]:
        """The set computed again, and this guardian's signature for it."""
        frozen = self.frozen(proposed)
        return frozen, self.said(guardian, "endorsement", freeze.endorsement(frozen, guardian=guardian))

    def shared(self, guardian: int, certificate: Certificate, frozen: Frozen, received: Mapping[int, Received]) -> bytes:
        """The certificate checked, and this guardian's shares for it."""
        message = shares.release(
            self.certified(certificate, frozen), received, guardian=guardian, seal_key=self.hub.public.seal_key or b""
        )
        return self.said(guardian, "shares", message)

    def said(self, guardian: int, kind: Any, message: Wire) -> bytes:
        return envelope.sign(self.guardians[guardian], type=kind, context=self.context, sender=guardian, body=encode(message))

    # --- the aggregator ---

    def frozen(self, proposed: Freeze, own_header: bytes | None = None) -> Frozen:
        return guardian_sum.check_freeze(
            proposed, accepted=self.accepted, epoch_ctx=self.context, round_ctx=self.ctx, own_header=own_header, silos=self.silos
        )

    def proposed(self, made: Mapping[int, Made], lists: Mapping[int, bytes]) -> Freeze:
        """The largest set that q lists give."""
        headers = {silo: each.header for silo, each in made.items()}
        found = freeze.choose(headers, lists, accepted=self.accepted, epoch_ctx=self.context, round_ctx=self.ctx, silos=self.silos)
        assert found is not None
        return found

    def certificate(self, frozen: Frozen, endorsements: Mapping[int, bytes]) -> Certificate:
        found = freeze.choose_endorsements(endorsements, frozen, accepted=self.accepted, epoch_ctx=self.context)
        assert found is not None
        return found

    def secrets(self, certified: Certified, documents: Mapping[int, bytes]) -> Secrets:
        """The shares of q guardians opened and proven, and the secrets that they give, held to their commitments."""
        opened = {
            i: shares.open_shares(
                raw, certified, guardian=self.accepted.terms.by_guardian(i), epoch_ctx=self.context,
                seal_seed=self.hub.receive_seed or b"",
            )
            for i, raw in sorted(documents.items())[: self.accepted.terms.quorum]
        }  # fmt: skip
        return shares.reconstruct(opened, certified, accepted=self.accepted)

    def total_of(self, certified: Certified, secrets: Secrets) -> Words:
        """The sum over the set."""
        return guardian_sum.unmask(self.vectors, secrets.seeds, certified, secrets.pair_keys)
