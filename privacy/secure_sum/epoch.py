# SPDX-License-Identifier: Apache-2.0
"""Epoch set-up: from identities to one shared secret per pair of silos, confirmed, and its chain over the rounds.

Steps, all pure: ``new_note`` → (all notes) → ``check_roster`` → ``epoch_ctx`` → ``seal_seeds`` → (all seeds) →
``pair_secrets`` → ``confirmation`` → (all tags) → ``check_confirmations`` → ``PairChain``. *All* are the silos of the epoch, E:
every member in consent mode; in share mode those whose notes are in the roster, at least u_min, and every guardian's note too.

Promised: s_ij is known to silos i and j only, while X25519 is unbroken, or X-Wing is unbroken and one of the two seeds is
random; both presume that the epoch keys of *both* are secret and well generated. Every s_ij is bound to the contract, the
epoch and the exact roster: parties that saw different ones share nothing, and the confirmation names the pair.
Secrets of settled rounds cannot be computed from the chain as it stands now.

Not promised: that the members named by the contract are who they say (see privacy.identity.keys.fingerprint); anything against a
silo's own machine; that deleted files are gone from the disk. The caller persists ``EpochSecrets`` before the note leaves,
deletes them once all pairs are confirmed, and never puts either type in a backup.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy import envelope
from privacy.errors import Equivocation
from privacy.federation import Accepted
from privacy.identity import keys
from privacy.identity.keys import expand, extract, u32
from privacy.messages import (
    Attempt,
    Confirmation,
    Digest,
    EpochNote,
    GuardianId,
    GuardianNote,
    Key,
    Number,
    PairSeeds,
    SiloId,
    Wire,
    decode,
    encode,
)
from privacy.secure_sum.roster import check_roster, guardian_notes, refused

__all__ = [
    "EpochSecrets", "GuardianSecrets", "PairChain", "Secret", "check_confirmations", "check_own_guardian", "check_roster",
    "confirmation", "epoch_ctx", "guardian_note_of", "guardian_notes", "new_guardian_note", "new_note", "note_of", "pair_secrets",
    "seal_seeds",
]  # fmt: skip


class Secret(Wire, frozen=True, kw_only=True):
    """Base of what a silo keeps on its own disk: strict to_bytes/from_bytes, and a repr that shows no field."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []

    def to_bytes(self) -> bytes:
        """The canonical bytes, for a file of mode 0600."""
        return encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The secrets in ``raw``. Raises TrustError when they are not exactly what ``to_bytes`` gives."""
        return decode(raw, cls)


class EpochSecrets(Secret, frozen=True, kw_only=True):
    """A silo's private half of its epoch note. ``pair_root`` is the randomness of all pair seeds that it sends."""

    format: Literal["epoch-secrets/1"] = "epoch-secrets/1"
    contract: Digest
    epoch: Number
    silo: SiloId
    instance: Attempt
    basis: Digest
    seal_seed: Key
    dh_private: Key
    pair_root: Key


class GuardianSecrets(Secret, frozen=True, kw_only=True):
    """A guardian's private half of its note for one epoch. Delete it when every round of the epoch has an outcome."""

    format: Literal["guardian-secrets/1"] = "guardian-secrets/1"
    contract: Digest
    epoch: Number
    guardian: GuardianId
    instance: Attempt
    seal_seed: Key


class PairChain(Secret, frozen=True, kw_only=True):
    """S_ij[index] for every peer; ``index`` = how many rounds of this epoch are settled (result or void).

    **Formal guarantees**: the pair keys of round r come from S_ij[r] alone, S_ij[r+1] is a one-way function of it, and a
    chain holds one link per peer: whoever steals it after ``advance`` learns no key of a settled round. Keys of two rounds,
    or of two manifests for one round, are independent as far as HMAC-SHA256 is a pseudo-random function.
    """

    format: Literal["pair-chain/1"] = "pair-chain/1"
    context: Digest
    epoch: Number
    silo: SiloId
    index: Number
    links: tuple[tuple[SiloId, Key], ...]

    @classmethod
    def start(cls, secrets: EpochSecrets, pairs: Mapping[int, bytes], *, context: bytes) -> Self:
        """The chain before the epoch's first round: S_ij[0] = s_ij."""
        return cls(context=context, epoch=secrets.epoch, silo=secrets.silo, index=0, links=tuple(sorted(pairs.items())))

    def advance(self) -> Self:
        """The chain after one more outcome. Persist it, and let go of this one."""
        links = tuple((peer, expand(link, "gsum/1 next")) for peer, link in self.links)
        return type(self)(context=self.context, epoch=self.epoch, silo=self.silo, index=self.index + 1, links=links)

    def round_keys(self, round_ctx: bytes) -> dict[int, bytes]:
        """k_ij for every peer j in the round with this manifest."""
        return {peer: expand(link, "gsum/1 pair", round_ctx, *_pair(self.silo, peer)) for peer, link in self.links}


def new_note(
    contract_digest: bytes, epoch: int, silo: int, basis_digest: bytes, *, random: Callable[[int], bytes] = os.urandom
) -> tuple[EpochSecrets, EpochNote]:
    """Fresh keys of one silo for one epoch: what it keeps, and what it signs and posts."""
    secrets = EpochSecrets(
        contract=contract_digest, epoch=epoch, silo=silo, instance=random(16), basis=basis_digest,
        seal_seed=random(32), dh_private=random(32), pair_root=random(32),
    )  # fmt: skip
    return secrets, note_of(secrets)


def note_of(secrets: EpochSecrets) -> EpochNote:
    """The public note of these secrets, the same every time."""
    return EpochNote(
        contract=secrets.contract, epoch=secrets.epoch, silo=secrets.silo, instance=secrets.instance, basis=secrets.basis,
        seed_key=keys.seal_public_key(secrets.seal_seed),
        dh_key=X25519PrivateKey.from_private_bytes(secrets.dh_private).public_key().public_bytes_raw(),
    )  # fmt: skip


def new_guardian_note(
    contract_digest: bytes, epoch: int, guardian: int, *, random: Callable[[int], bytes] = os.urandom
) -> tuple[GuardianSecrets, GuardianNote]:
    """A fresh key of one guardian for one epoch: what it keeps, and what it signs and posts."""
    secrets = GuardianSecrets(
        contract=contract_digest, epoch=epoch, guardian=guardian, instance=random(16), seal_seed=random(32)
    )  # fmt: skip
    return secrets, guardian_note_of(secrets)


def guardian_note_of(secrets: GuardianSecrets) -> GuardianNote:
    """The public note of these secrets, the same every time."""
    return GuardianNote(
        contract=secrets.contract, epoch=secrets.epoch, guardian=secrets.guardian, instance=secrets.instance,
        guardian_key=keys.seal_public_key(secrets.seal_seed),
    )  # fmt: skip


def check_own_guardian(secrets: GuardianSecrets, notes: Sequence[GuardianNote]) -> None:
    """Return if the roster's notes hold this guardian's own.

    Raises:
        Equivocation: another one, or none, stands there.
    """
    if guardian_note_of(secrets) not in notes:
        raise Equivocation(
            f"the roster holds another note of guardian {secrets.guardian} than the one made here",
            hint="a copy of this guardian is running, or it was restored: stop both, then start a new epoch",
        )


def epoch_ctx(contract_digest: bytes, epoch: int, roster_bytes: bytes) -> bytes:
    """SHA-256("gsum/1 epoch" NUL ‖ contract_digest ‖ u64 epoch ‖ SHA-256(roster)): 32 bytes that every later key depends on."""
    roster_digest = hashlib.sha256(roster_bytes).digest()
    return hashlib.sha256(b"gsum/1 epoch\0" + contract_digest + epoch.to_bytes(8, "big") + roster_digest).digest()


def seal_seeds(secrets: EpochSecrets, notes: Sequence[EpochNote], *, context: bytes) -> PairSeeds:
    """r_ij for every peer j, sealed to j's seed key. Sign it in ``context`` (epoch_ctx): that also signs the roster.

    r_ij = Expand(pair_root, "gsum/1 seed" NUL ‖ epoch_ctx ‖ i ‖ j): as random as 32 fresh bytes, and the same after a crash.

    Raises:
        Equivocation: the roster holds another note of this silo than the one its secrets belong to.
    """
    i = secrets.silo
    sealed = tuple(
        (j, envelope.seal(note.seed_key, _own_seed(secrets, j, context), info=_seed_info(context, i, j)))
        for j, note in _peers(secrets, notes).items()
    )
    return PairSeeds(epoch=secrets.epoch, silo=i, sealed=sealed)


def pair_secrets(
    secrets: EpochSecrets, notes: Sequence[EpochNote], documents: Mapping[int, bytes], *, accepted: Accepted, context: bytes
) -> dict[int, bytes]:
    """s_ij for every peer j = Extract(salt = epoch_ctx, ikm = X25519 ‖ r_min,max ‖ r_max,min).

    Args:
        documents: the signed PairSeeds of every silo of E by id; this silo's own may be missing.

    Raises:
        TrustError: one is missing, not signed in this epoch by its member, incomplete, or does not open.
        Equivocation: as ``seal_seeds``.
    """
    private = X25519PrivateKey.from_private_bytes(secrets.dh_private)
    i, result, silos = secrets.silo, {}, [note.silo for note in notes]
    for j, note in _peers(secrets, notes).items():
        theirs = _seed_for(secrets, j, silos, documents, accepted=accepted, context=context)
        ours = _own_seed(secrets, j, context)
        shared = private.exchange(X25519PublicKey.from_public_bytes(note.dh_key))
        result[j] = extract(context, shared + (ours + theirs if i < j else theirs + ours))
    return result


def confirmation(secrets: EpochSecrets, pairs: Mapping[int, bytes]) -> Confirmation:
    """Expand(s_ij, "gsum/1 confirm" NUL ‖ min ‖ max) for every peer, to be signed in epoch_ctx.

    Both ends of a pair show one tag, so a *corrupt* silo can copy its peer's: it fools only itself, its sums are noise.
    """
    tags = tuple((j, expand(secret, "gsum/1 confirm", *_pair(secrets.silo, j))) for j, secret in sorted(pairs.items()))
    return Confirmation(epoch=secrets.epoch, silo=secrets.silo, tags=tags)


def check_confirmations(
    documents: Mapping[int, bytes],
    *,
    accepted: Accepted,
    context: bytes,
    epoch: int,
    own: Confirmation | None = None,
    silos: Sequence[int] | None = None,
) -> None:
    """Return if all pairs of silos hold the same secret and all signed this epoch_ctx: the epoch may start.

    Args:
        documents: the signed Confirmation of every silo of E by id.
        own: this silo's own, which must be among them; None for the aggregator.
        silos: E, ascending; None for all members.

    Raises:
        TrustError: one is missing or not its member's in this epoch; or pairs disagree, all of them named.
    """
    tags: dict[int, dict[int, bytes]] = {}
    everybody = [member.id for member in accepted.terms.member] if silos is None else list(silos)
    for member in map(accepted.terms.by_id, everybody):
        raw = _required(documents, member.id, "confirmation")
        stated = envelope.open_member(raw, Confirmation, type="confirmation", context=context, member=member)
        _check_epoch("confirmation", member.id, stated.epoch, epoch)
        if own is not None and own.silo == member.id and stated != own:
            raise refused(f"the confirmation of silo {own.silo} is not the one that this silo made")
        tags[member.id] = _for_all_peers(stated.tags, member.id, everybody, "confirmation")
    apart = [(i, j) for i, j in combinations(sorted(tags), 2) if tags[i][j] != tags[j][i]]
    if apart:
        names = ", ".join(f"{i} and {j}" for i, j in apart)
        raise refused(f"these silos hold different pair secrets: {names}", pairs=apart)


def _pair(i: int, j: int) -> tuple[bytes, bytes]:
    return u32(min(i, j)), u32(max(i, j))


def _seed_info(context: bytes, sender: int, reader: int) -> bytes:
    return b"gsum/1 pair-seed\0" + context + u32(sender) + u32(reader)


def _own_seed(secrets: EpochSecrets, peer: int, context: bytes) -> bytes:
    return expand(secrets.pair_root, "gsum/1 seed", context, u32(secrets.silo), u32(peer))


def _seed_for(
    secrets: EpochSecrets, sender: int, silos: Sequence[int], documents: Mapping[int, bytes], *, accepted: Accepted, context: bytes
) -> bytes:
    raw, member = _required(documents, sender, "pair-seeds"), accepted.terms.by_id(sender)
    stated = envelope.open_member(raw, PairSeeds, type="pair-seeds", context=context, member=member)
    _check_epoch("pair-seeds", sender, stated.epoch, secrets.epoch)
    sealed = _for_all_peers(stated.sealed, sender, silos, "pair-seeds")[secrets.silo]
    info, what = _seed_info(context, sender, secrets.silo), f"the pair seed of silo {sender}"
    seed = envelope.open_sealed(secrets.seal_seed, sealed, info=info, what=what)
    if len(seed) != 32:
        raise refused(f"silo {sender} sealed a pair seed of {len(seed)} bytes, not 32")
    return seed


def _peers(secrets: EpochSecrets, notes: Sequence[EpochNote]) -> dict[int, EpochNote]:
    by_silo = {note.silo: note for note in notes}
    if by_silo.pop(secrets.silo, None) != note_of(secrets):
        raise Equivocation(
            f"the roster holds another epoch note of silo {secrets.silo} than the one made here",
            hint="a copy of this silo is running, or it was restored: stop both, then start a new epoch",
        )
    return by_silo


def _for_all_peers(entries: Sequence[tuple[int, bytes]], silo: int, silos: Sequence[int], what: str) -> dict[int, bytes]:
    found, wanted = [peer for peer, _ in entries], [other for other in silos if other != silo]
    if found != wanted:
        raise refused(f"the {what} of silo {silo} names peers {found}, its peers are {wanted}")
    return dict(entries)


def _check_epoch(what: str, silo: int, found: int, wanted: int) -> None:
    if found != wanted:
        raise refused(f"the {what} of silo {silo} is for epoch {found}, this is epoch {wanted}")


def _required(documents: Mapping[int, bytes], silo: int, what: str) -> bytes:
    if silo not in documents:
        raise refused(f"the {what} of silo {silo} is missing")
    return documents[silo]
