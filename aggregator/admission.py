# SPDX-License-Identifier: Apache-2.0
"""May this document stand on the board, and if not, why: the named reason.

Pure, and without a private key: everything is checked with the public keys of the contract against the documents that
already stand. Promised: what is admitted was signed by the member in whose slot it stands, in the context of this contract
or epoch, for this round, in the order of the protocol, within the size that the contract allows. So nobody but its owner
can fill a slot. Not checked here: what is sealed to others (the reader does), and clocks (the coordinator closes a round by
its outcome).

An acknowledgement that names another state is admitted: it is what the coordinator must see, and stops at.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Final, TypeVar

from aggregator import rounds
from aggregator.rounds import Documents, Round
from privacy import envelope, guardian_sum, keys
from privacy.errors import Replay, RoundError, TrustError
from privacy.federation import Accepted, Member
from privacy.messages import (
    AGGREGATOR,
    AGGREGATOR_KINDS,
    Certificate,
    Confirmation,
    Consent,
    Countersignature,
    EpochNote,
    Freeze,
    Header,
    Kind,
    PairSeeds,
    Release,
    Signed,
    Upload,
    decode,
)

SIGNED_BYTES: Final = 256
"""More than a Signed adds to its body; for an upload, more than Signed and Upload add to the header and what is sealed."""
_SEED_BYTES: Final = 32 + envelope.OVERHEAD_BYTES
M = TypeVar("M", Consent, Release)


def cap(kind: Kind, accepted: Accepted) -> int:
    """The most bytes a member's document of this kind may have.

    Raises:
        TrustError: only the coordinator writes this kind.
    """
    if kind in AGGREGATOR_KINDS:
        raise _not_yours(kind)
    peers, d = accepted.terms.silos - 1, accepted.terms.dimension
    header = SIGNED_BYTES + 256 + 48 * peers
    bodies = {
        "countersignature": 64, "epoch-note": 1536, "pair-seeds": 64 + (_SEED_BYTES + 16) * peers, "confirmation": 64 + 48 * peers,
        "upload": header + 4 * d + envelope.OVERHEAD_BYTES, "consent": 128, "release": 128 + _SEED_BYTES, "acknowledgement": 192,
    }  # fmt: skip
    return SIGNED_BYTES + bodies[kind]


def published(view: Documents) -> Accepted:
    """The latest contract on the board. Raises RoundError before the first."""
    accepted = rounds.accepted_in(view)
    if accepted is None:
        raise RoundError("no contract is published", hint="run `aggregator sign`", code="no-contract")
    return accepted


def admit(kind: Kind, number: int, party: int, data: bytes, view: Documents) -> None:
    """Return if ``data`` may stand in this slot. Whether the slot is free is the store's question.

    Raises:
        TrustError: unknown member, too large, malformed, or another signer, context, type, round, set or silo than the slot's.
        Replay: the round, epoch or contract version is settled.
        RoundError: the step before it does not stand yet.
    """
    if kind in AGGREGATOR_KINDS or party == AGGREGATOR:
        raise _not_yours(kind)
    accepted = published(view)
    member = _member(accepted, party)
    if len(data) > cap(kind, accepted):
        raise TrustError(
            f"a {kind} of {len(data)} bytes, at most {cap(kind, accepted)} are allowed",
            hint="that is no honest one",
            code="too-large",
        )
    _STEPS[kind](number, member, data, view, accepted)


def _countersignature(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    _expect("countersignature", member, "contract version", number, accepted.terms.version)
    key = member.verify_key
    body = envelope.open_signed(data, type="countersignature", context=accepted.digest, sender=member.id, key=key)
    stated = decode(body, Countersignature)
    _expect("countersignature", member, "contract", stated.contract, accepted.digest)
    _expect("countersignature", member, "silo", stated.member, member.id)


def _epoch_note(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    _check_called(number, view, accepted)
    if view.get("roster", number, AGGREGATOR) is not None:
        raise _settled("epoch", number)
    note = envelope.open_member(data, EpochNote, type="epoch-note", context=accepted.digest, member=member)
    _expect("epoch note", member, "contract", note.contract, accepted.digest)
    _expect("epoch note", member, "epoch", note.epoch, number)
    keys.load_seal_key(note.seed_key)
    keys.check_dh_key(note.dh_key)


def _pair_seeds(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    context = _roster_ctx(number, view, accepted)
    stated = envelope.open_member(data, PairSeeds, type="pair-seeds", context=context, member=member)
    _expect("pair seeds", member, "epoch", stated.epoch, number)
    _expect("pair seeds", member, "peers", [peer for peer, _ in stated.sealed], _peers(accepted, member))
    _expect("pair seeds", member, "sizes", {len(sealed) for _, sealed in stated.sealed}, {_SEED_BYTES})


def _confirmation(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    context = _roster_ctx(number, view, accepted)
    if missing := {each.id for each in accepted.terms.member} - set(view.parties("pair-seeds", number)):
        raise _too_early(f"a confirmation of epoch {number} before the pair seeds of silos {sorted(missing)}")
    stated = envelope.open_member(data, Confirmation, type="confirmation", context=context, member=member)
    _expect("confirmation", member, "epoch", stated.epoch, number)
    _expect("confirmation", member, "peers", [peer for peer, _ in stated.tags], _peers(accepted, member))


def _upload(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    if view.get("freeze", number, AGGREGATOR) is not None:
        raise Replay(
            f"an upload of silo {member.id} after the freeze of round {number}",
            hint="the round goes on with the upload that stands",
        )
    upload = rounds.open_upload(data, opened, member)
    header = guardian_sum.check_header(upload.header, member, accepted=accepted, epoch_ctx=opened.context, round_ctx=opened.ctx)
    _check_counter(number, member, header, view)
    size = 4 * accepted.terms.dimension + envelope.OVERHEAD_BYTES
    _expect("upload", member, "sealed size", len(upload.sealed), size)


def _check_counter(number: int, member: Member, header: Header, view: Documents) -> None:
    """A silo's ledger only grows: a counter not above its last one means the ledger was put back, and what it spent is missing."""
    for before in range(number - 1, 0, -1):
        raw = view.get("upload", before, member.id)
        if raw is None:
            continue
        earlier = decode(decode(decode(decode(raw, Signed).body, Upload).header, Signed).body, Header)
        if header.ledger_counter <= earlier.ledger_counter:
            raise TrustError(
                f"silo {member.id} states {header.ledger_counter} ledger entries in round {number}, "
                f"it stated {earlier.ledger_counter} in round {before}",
                hint="its ledger was rolled back: it must restore the newest copy before it takes part again",
                code="ledger-rolled-back",
            )
        return


def _consent(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    body = rounds.own(view, accepted, "freeze", number, opened.context)
    if body is None:
        raise _too_early(f"a consent of silo {member.id} before the freeze of round {number}")
    _check_set(data, Consent, "consent", member, opened, _set_digest(body))


def _release(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    body = rounds.own(view, accepted, "certificate", number, opened.context)
    if body is None:
        raise _too_early(f"a release of silo {member.id} before the certificate of round {number}")
    stated = _check_set(data, Release, "release", member, opened, decode(body, Certificate).frozen)
    _expect("release", member, "sealed size", len(stated.sealed), _SEED_BYTES)


def _acknowledgement(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = rounds.round_in(view, accepted, number)
    body = None if opened is None else rounds.own(view, accepted, "outcome", number, opened.context)
    if opened is None or body is None:
        raise _too_early(f"an acknowledgement of silo {member.id} before the outcome of round {number}")
    stated = rounds.open_acknowledgement(data, opened, member)
    _expect("acknowledgement", member, "outcome", stated.outcome, hashlib.sha256(body).digest())


_STEPS: Final[dict[Kind, Callable[[int, Member, bytes, Documents, Accepted], None]]] = {
    "countersignature": _countersignature, "epoch-note": _epoch_note, "pair-seeds": _pair_seeds, "confirmation": _confirmation,
    "upload": _upload, "consent": _consent, "release": _release, "acknowledgement": _acknowledgement,
}  # fmt: skip


def _check_set(data: bytes, kind: type[M], name: Kind, member: Member, opened: Round, frozen: bytes) -> M:
    stated = envelope.open_member(data, kind, type=name, context=opened.context, member=member)
    _expect(name, member, "round", stated.round_ctx, opened.ctx)
    _expect(name, member, "set", stated.frozen, frozen)
    return stated


@functools.lru_cache(maxsize=4)
def _set_digest(freeze: bytes) -> bytes:
    return guardian_sum.digest_of_set(decode(freeze, Freeze).headers)


def _open_round(number: int, view: Documents, accepted: Accepted) -> Round:
    opened = rounds.round_in(view, accepted, number)
    if opened is None:
        raise RoundError(
            f"round {number} is not open, the latest is {view.latest('manifest') or 'none'}",
            hint="wait for its manifest",
            code="not-open",
        )
    if view.get("outcome", number, AGGREGATOR) is not None:
        raise _settled("round", number)
    return opened


def _check_called(number: int, view: Documents, accepted: Accepted) -> None:
    if rounds.own(view, accepted, "epoch", number, accepted.digest) is None:
        raise RoundError(
            f"epoch {number} is not called, the latest is {view.latest('epoch') or 'none'}",
            hint="wait for its call",
            code="not-open",
        )
    if (latest := view.latest("epoch")) != number:
        raise Replay(f"epoch {number} is over, the latest is {latest}", hint="take part in the latest epoch", number=number)


def _roster_ctx(number: int, view: Documents, accepted: Accepted) -> bytes:
    _check_called(number, view, accepted)
    at = rounds.epoch_in(view, accepted, number)
    if at is None:
        raise _too_early(f"epoch {number} has no roster yet")
    return at.context


def _member(accepted: Accepted, party: int) -> Member:
    for member in accepted.terms.member:
        if member.id == party:
            return member
    raise TrustError(
        f"silo {party} is no member of {accepted.terms.name}", hint="ask the coordinator which id is yours", code="unknown-member"
    )


def _not_yours(kind: Kind) -> TrustError:
    return TrustError(f"a {kind} is not taken over this door", hint="only the coordinator writes it", code="not-yours")


def _peers(accepted: Accepted, member: Member) -> list[int]:
    return [other.id for other in accepted.terms.member if other.id != member.id]


def _expect(what: str, member: Member, field: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise TrustError(
            f"the {what} of silo {member.id} has {field} {_short(found)}, expected {_short(wanted)}",
            hint="it belongs to another round or federation, or that silo's software is faulty",
            code=f"wrong-{field.replace(' ', '-')}",
        )


def _short(value: object) -> str:
    return f"{value.hex()[:16]}…" if isinstance(value, bytes) else str(value)


def _settled(what: str, number: int) -> Replay:
    return Replay(f"{what} {number} is settled", hint="read the board and go on from there", number=number)


def _too_early(what: str) -> RoundError:
    return RoundError(what, hint="wait for the step before it", code="too-early")
