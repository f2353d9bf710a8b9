# SPDX-License-Identifier: Apache-2.0
"""One round of share mode in one process, with real keys; each step can be bent before the next.

Silos have ids 1…n. Guardians are processes of their own (ids 2¹⁵+1…), or with ``own=False`` the silos themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from privacy import federation
from privacy.envelope import sign
from privacy.identity import keys
from privacy.messages import Certificate, Freeze, Header, Roster, Upload, decode, encode
from privacy.secure_sum import epoch, freeze, guardian_sum, shares
from privacy.secure_sum.freeze import Certified, Frozen
from privacy.secure_sum.shares import Received, Released, Secrets
from tests.terms import contract_bytes, public, seed
from tests.test_epoch import Party, make_party

HUB = keys.Identity(name="hub", sign_seed=seed(100), receive_seed=b"h" * 32)
FIRST = federation.GUARDIANS_FROM + 1
MANIFEST = b"manifest of round 1"


@dataclass(frozen=True)
class Guard:
    """A guardian with what it holds in an epoch."""

    id: int
    identity: keys.Identity
    secrets: epoch.GuardianSecrets
    note: bytes


def share_terms(silos: int = 5, guardians: int = 5, *, corrupt: int = 2, dropouts: int = 2, own: bool = True, **changes) -> bytes:
    """TOML of a contract in share mode; ``own``: guardians have names and keys of their own, otherwise those of silos 1…."""
    changes["sum"] = {"protocol": "shares", "dropouts": dropouts, "corrupt_guardians": corrupt, **changes.get("sum", {})}
    tables = "".join(guardian_table(index, own=own) for index in range(1, guardians + 1))
    return contract_bytes(silos, **changes) + tables.encode()


def guardian_table(index: int, *, own: bool = True, **changes: str) -> str:
    name = f"guard-{index}" if own else f"silo-{index}"
    organisation = f"Notary {index}" if own else f"Hospital {index}"
    values = {"name": name, "organisation": organisation, "sign_key": public(225 + index if own else index), **changes}
    lines = [f"id = {federation.GUARDIANS_FROM + index}", *(f'{key} = "{value}"' for key, value in values.items())]
    return "\n[[guardian]]\n" + "\n".join(lines) + "\n"


def make_guard(index: int, accepted: federation.Accepted, *, own: bool = True, number: int = 1) -> Guard:
    guardian = federation.GUARDIANS_FROM + index
    identity = keys.Identity(name=f"guard-{index}", sign_seed=seed(225 + index if own else index))
    secrets, note = epoch.new_guardian_note(accepted.digest, number, guardian)
    raw = sign(identity, type="guardian-note", context=accepted.digest, sender=guardian, body=encode(note))
    return Guard(id=guardian, identity=identity, secrets=secrets, note=raw)


@dataclass(frozen=True)
class Shared:
    """An epoch of share mode that started, over the silos in ``parties``."""

    accepted: federation.Accepted
    parties: Mapping[int, Party]
    guards: Mapping[int, Guard]
    roster: Roster
    context: bytes

    @property
    def silos(self) -> tuple[int, ...]:
        return tuple(self.parties)

    @property
    def guardian_keys(self) -> dict[int, bytes]:
        return {note.guardian: note.guardian_key for note in epoch.guardian_notes(self.roster, self.accepted)}


def build_epoch(accepted: federation.Accepted, silos: Iterable[int], *, own: bool = True, away: Iterable[int] = ()) -> Shared:
    """Notes, roster, seeds and chains of these silos, and of all guardians but those ``away`` (counted from 1)."""
    parties = {i: make_party(i, accepted) for i in silos}
    guards = {
        each.id: each
        for each in (make_guard(k, accepted, own=own) for k in range(1, len(accepted.terms.guardian) + 1) if k not in set(away))
    }
    notes, guardian_notes = tuple(p.note for p in parties.values()), tuple(g.note for g in guards.values())
    roster = Roster(contract=accepted.digest, epoch=1, notes=notes, guardians=guardian_notes)
    opened, context = epoch.check_roster(roster, accepted), epoch.epoch_ctx(accepted.digest, 1, encode(roster))
    sent = {}
    for i, party in parties.items():
        body = encode(epoch.seal_seeds(party.secrets, opened, context=context))
        sent[i] = sign(party.identity, type="pair-seeds", context=context, sender=i, body=body)
    for party in parties.values():
        party.pairs = epoch.pair_secrets(party.secrets, opened, sent, accepted=accepted, context=context)
        party.chain = epoch.PairChain.start(party.secrets, party.pairs, context=context)
    return Shared(accepted=accepted, parties=parties, guards=guards, roster=roster, context=context)


@cache
def an_epoch(
    silos: int = 5, guardians: int = 5, corrupt: int = 2, dropouts: int = 2, own: bool = True, present: tuple[int, ...] = (),
    blocks: tuple[tuple[int, ...], ...] = (), hidden: int = 8, away: tuple[int, ...] = (),
) -> Shared:  # fmt: skip
    raw = share_terms(
        silos, guardians, corrupt=corrupt, dropouts=dropouts, own=own, model={"hidden_size": hidden}, sum={"blocks": blocks}
    )
    return build_epoch(federation.parse(raw), present or range(1, silos + 1), own=own, away=away)


@dataclass(frozen=True)
class Made:
    """What one silo made in one attempt."""

    x: np.ndarray
    self_seed: bytes
    pair_keys: Mapping[int, bytes]
    y: np.ndarray
    header: Header
    raw: bytes
    bundles: tuple[bytes, ...]

    @property
    def upload(self) -> Upload:
        return Upload(header=self.raw, sealed=b"", bundles=self.bundles)


class ShareRound:
    """A round: ``made`` are the uploads, of all silos of the epoch unless ``without`` names some; then step by step."""

    def __init__(self, setup: Shared, *, without: Iterable[int] = (), manifest: bytes = MANIFEST) -> None:
        self.setup, self.ctx = setup, guardian_sum.round_ctx(manifest)
        self.terms = setup.accepted.terms
        self.guardians = {guardian.id: guardian for guardian in self.terms.guardian if guardian.id in setup.guards}
        generator = np.random.default_rng(7)
        self.xs = {i: generator.integers(0, 2**32, self.terms.dimension, dtype=np.uint32) for i in setup.silos}
        self.made = {i: self.attempt(i) for i in setup.silos if i not in set(without)}

    def attempt(
        self, silo: int, *, number: int = 1, self_seed: bytes | None = None, lie: Mapping[int, bytes] | None = None
    ) -> Made:
        """One attempt; ``lie`` replaces pair keys in what is dealt and committed to."""
        x = self.xs[silo]
        attempt = hashlib.sha256(bytes([silo, number])).digest()[:16]
        digest = hashlib.sha256(x.tobytes()).digest()
        own = self_seed or guardian_sum.self_seed(bytes([silo]) * 32, attempt, digest, bytes([number]) * 32)
        pair_keys = {**self.setup.parties[silo].chain.round_keys(self.ctx), **(lie or {})}
        place = {"round_ctx": self.ctx, "silo": silo, "attempt": attempt, "self_seed": own, "pair_keys": pair_keys}
        y = guardian_sum.mask(x, **place)
        dealt = shares.deal(terms=self.terms, guardian_keys=self.setup.guardian_keys, **place)
        header = guardian_sum.build_header(y, ledger_counter=number, bundles=dealt.entries, **place)
        return Made(x, own, pair_keys, y, header, self.signed(silo, "header", header), dealt.bundles)

    def bend(self, silo: int, **changes: object) -> Made:
        """The silo's upload with these header fields, signed by the silo."""
        made = self.made[silo]
        header = Header(**{**{name: getattr(made.header, name) for name in Header.__struct_fields__}, **changes})
        return replace(made, header=header, raw=self.signed(silo, "header", header))

    def signed(self, silo: int, type: str, message: object) -> bytes:
        return sign(self.setup.parties[silo].identity, type=type, context=self.setup.context, sender=silo, body=encode(message))

    def by(self, guardian: int, type: str, message: object) -> bytes:
        identity = self.setup.guards[guardian].identity
        return sign(identity, type=type, context=self.setup.context, sender=guardian, body=encode(message))

    # --- guardians and aggregator ---

    def received(self, guardian: int) -> dict[int, Received]:
        seal_seed = self.setup.guards[guardian].secrets.seal_seed
        return {
            i: shares.receive(made.upload, made.header, guardian=guardian, seal_seed=seal_seed) for i, made in self.made.items()
        }

    def list_of(self, guardian: int, *, only: Iterable[int] | None = None) -> bytes:
        received = self.received(guardian).values()
        kept = [each for each in received if only is None or each.header.silo in set(only)]
        return self.by(guardian, "list", shares.listing(kept, round_ctx=self.ctx, guardian=guardian))

    def lists(self) -> dict[int, bytes]:
        return {guardian: self.list_of(guardian) for guardian in self.guardians}

    @property
    def places(self) -> dict:
        return {"epoch_ctx": self.setup.context, "round_ctx": self.ctx}

    def choose(self, lists: Mapping[int, bytes] | None = None) -> Freeze | None:
        headers = {i: made.raw for i, made in self.made.items()}
        given = self.lists() if lists is None else lists
        return freeze.choose(headers, given, accepted=self.setup.accepted, silos=self.setup.silos, **self.places)

    def check_freeze(self, frozen: Freeze | None = None, *, own: bytes | None = None, seen: Iterable[int] = ()) -> Frozen:
        return guardian_sum.check_freeze(
            frozen or self.choose(),
            accepted=self.setup.accepted,
            own_header=own,
            silos=self.setup.silos,
            seen=tuple(seen),
            **self.places,
        )

    def endorsements(self, frozen: Frozen) -> dict[int, bytes]:
        return {g: self.by(g, "endorsement", freeze.endorsement(frozen, guardian=g)) for g in self.guardians}

    def check_certificate(self, certificate: Certificate, frozen: Frozen) -> Certified:
        return guardian_sum.check_certificate(certificate, frozen, accepted=self.setup.accepted, epoch_ctx=self.setup.context)

    def certificate(self, frozen: Frozen) -> Certificate:
        made = freeze.choose_endorsements(
            self.endorsements(frozen), frozen, accepted=self.setup.accepted, epoch_ctx=self.setup.context
        )
        assert made is not None
        return made

    def certified(self) -> Certified:
        frozen = self.check_freeze()
        return self.check_certificate(self.certificate(frozen), frozen)

    def release(self, guardian: int, certified: Certified) -> bytes:
        made = shares.release(certified, self.received(guardian), guardian=guardian, seal_key=HUB.public.seal_key)
        return self.by(guardian, "shares", made)

    def open_shares(self, raw: bytes, guardian: int, certified: Certified) -> Released:
        return shares.open_shares(
            raw, certified, guardian=self.guardians[guardian], epoch_ctx=self.setup.context, seal_seed=HUB.receive_seed
        )

    def released(self, certified: Certified, guardians: Iterable[int] | None = None) -> dict[int, Released]:
        chosen = self.guardians if guardians is None else guardians
        return {g: self.open_shares(self.release(g, certified), g, certified) for g in chosen}

    def secrets(self, certified: Certified, guardians: Iterable[int] | None = None) -> Secrets:
        return shares.reconstruct(self.released(certified, guardians), certified, accepted=self.setup.accepted)

    def total(self, guardians: Iterable[int] | None = None) -> np.ndarray:
        certified = self.certified()
        secrets = self.secrets(certified, guardians)
        vectors = {i: self.made[i].y for i in certified.frozen.headers}
        total = guardian_sum.unmask(vectors, secrets.seeds, certified, secrets.pair_keys)
        guardian_sum.check_total(total, vectors, secrets.seeds, certified.frozen, secrets.pair_keys)
        return total

    def expected(self, silos: Iterable[int]) -> np.ndarray:
        return np.sum(np.array([self.xs[i] for i in silos], dtype=np.uint64), axis=0).astype(np.uint32)


def payload_of(made: ShareRound, raw: bytes, certified: Certified, guardian: int) -> bytes:
    """What a guardian sealed, opened without any check."""
    from privacy.envelope import open_sealed
    from privacy.messages import Shares, Signed

    stated = decode(decode(raw, Signed).body, Shares)
    frozen = certified.frozen
    info = b"gsum/1 shares\0" + frozen.round_ctx + frozen.digest + guardian.to_bytes(4, "big")
    return open_sealed(HUB.receive_seed, stated.sealed, info=info)
