# SPDX-License-Identifier: Apache-2.0
"""Who takes part in an epoch, by which keys: the roster, verified.

Promised: every note in a roster that passes was signed by its party's key in the contract, for this contract and epoch, and no
two parties hold one key. Not promised: that a party's key is secret or well made, or that everybody was shown this roster
(epoch_ctx and the confirmations of ``privacy.secure_sum.epoch`` see to that).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, Member
from privacy.identity import keys
from privacy.messages import EpochNote, GuardianNote, Roster, Signed, decode


def check_roster(roster: Roster, accepted: Accepted) -> tuple[EpochNote, ...]:
    """The notes of the epoch's silos E, by ascending id, each verified; the guardians' notes are verified with them.

    **Formal guarantees**: one note per silo of E, signed by its key in the contract, for this contract and epoch; E is all
    members in consent mode, and at least u_min of them in share mode; there one note each of at least q guardians, likewise.
    All keys are fit and distinct, across silos and guardians; all silos computed the same (A, B).

    Raises:
        TrustError: any of these fails; the message names the silos or guardians.
    """
    if roster.contract != accepted.digest:
        raise refused(f"the roster is for contract {_short(roster.contract)}, this silo signed {_short(accepted.digest)}")
    notes = tuple(
        envelope.open_member(raw, EpochNote, type="epoch-note", context=accepted.digest, member=member)
        for raw, member in zip(roster.notes, _authors(roster, accepted), strict=True)
    )
    for note in notes:
        _check_note(note, f"silo {note.silo}", roster)
        _check_keys(f"silo {note.silo}", seal_key=note.seed_key, dh_key=note.dh_key)
    guards = guardian_notes(roster, accepted)
    _check_distinct([*((f"silo {note.silo}", "X25519 key", note.dh_key) for note in notes), *_halves(notes, guards)])
    _check_basis(notes)
    return notes


def guardian_notes(roster: Roster, accepted: Accepted) -> tuple[GuardianNote, ...]:
    """The notes of the epoch's guardians, at least q, by ascending id, each verified; none in consent mode.

    A guardian without a note counts as one that is down in this epoch: q and x-coordinates stay those of the contract, so
    leaving guardians out makes nobody need fewer. ``check_roster`` does the rest.

    Raises:
        TrustError: there are too few, one is not its guardian's for this contract and epoch, or its key is unfit.
    """
    known = {guardian.id: guardian for guardian in accepted.terms.guardian}
    senders = [decode(raw, Signed).sender for raw in roster.guardians]
    if senders != sorted(set(senders)) or not set(senders) <= set(known):
        raise refused(f"the roster has notes of guardians {senders}, wanted guardians of the contract, each once, by ascending id")
    if accepted.terms.shared and len(senders) < accepted.terms.quorum:
        raise refused(f"the roster has {len(senders)} guardian notes, at least {accepted.terms.quorum} are needed")
    guardians = [known[sender] for sender in senders]
    notes = tuple(
        envelope.open_guardian(raw, GuardianNote, type="guardian-note", context=accepted.digest, guardian=guardian)
        for raw, guardian in zip(roster.guardians, guardians, strict=True)
    )
    for note in notes:
        _check_note(note, f"guardian {note.guardian}", roster)
        _check_keys(f"guardian {note.guardian}", seal_key=note.guardian_key)
    return notes


def _authors(roster: Roster, accepted: Accepted) -> list[Member]:
    """The members whose notes the roster must hold, in order: all, or in share mode those who say that they signed them."""
    members = accepted.terms.member
    if not accepted.terms.shared:
        if len(roster.notes) != len(members):
            raise refused(f"the roster has {len(roster.notes)} notes for {len(members)} members")
        return list(members)
    senders = [decode(raw, Signed).sender for raw in roster.notes]
    known = {member.id: member for member in members}
    if senders != sorted(set(senders)) or not set(senders) <= set(known):
        raise refused(f"the roster has notes of silos {senders}, wanted members, each once, by ascending id")
    if len(senders) < accepted.terms.fewest:
        raise refused(f"the roster has notes of {len(senders)} silos, at least {accepted.terms.fewest} are needed")
    return [known[sender] for sender in senders]


def _check_note(note: EpochNote | GuardianNote, whose: str, roster: Roster) -> None:
    if note.contract != roster.contract:
        raise refused(f"the note of {whose} is for contract {_short(note.contract)}, not {_short(roster.contract)}")
    if note.epoch != roster.epoch:
        raise refused(f"the note of {whose} is for epoch {note.epoch}, this is epoch {roster.epoch}")


def _check_keys(whose: str, *, seal_key: bytes, dh_key: bytes | None = None) -> None:
    try:
        keys.load_seal_key(seal_key)
        if dh_key is not None:
            keys.check_dh_key(dh_key)
    except TrustError as error:
        raise refused(f"the epoch keys of {whose} are unfit: {error.message}") from error


def _halves(notes: Sequence[EpochNote], guards: Sequence[GuardianNote]) -> Iterator[tuple[str, str, bytes]]:
    """Owner, name and half of every X-Wing key: half a copied key is a copied key."""
    found = [(f"silo {note.silo}", note.seed_key) for note in notes] + [(f"guardian {g.guardian}", g.guardian_key) for g in guards]
    for owner, key in found:
        yield owner, "seed key", key[:-32]
        yield owner, "seed key", key[-32:]


def _check_distinct(held: Iterable[tuple[str, str, bytes]]) -> None:
    owners: dict[bytes, str] = {}
    for owner, name, key in held:
        first = owners.setdefault(key, owner)
        if first != owner:
            raise refused(f"{first} and {owner} posted the same {name}")


def _check_basis(notes: Sequence[EpochNote]) -> None:
    holders: dict[bytes, list[int]] = defaultdict(list)
    for note in notes:
        holders[note.basis].append(note.silo)
    if len(holders) > 1:
        found = "; ".join(f"silos {silos} have {_short(basis)}" for basis, silos in holders.items())
        raise TrustError(
            f"the silos computed different bases (A, B): {found}",
            code="basis-differs",
            hint="compare the base model files and library versions of these silos",
        )


def refused(what: str, **facts: object) -> TrustError:
    """Why no epoch starts."""
    hint = "no epoch starts; the named party must look into it, then start a new epoch"
    return TrustError(what, hint=hint, code="epoch-refused", **facts)


def _short(digest: bytes) -> str:
    return f"{digest.hex()[:16]}…"
