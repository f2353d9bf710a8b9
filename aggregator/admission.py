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

from aggregator import rounds, sizes, versions
from aggregator.rounds import Round
from aggregator.sizes import cap, not_yours
from aggregator.versions import Documents
from privacy import chain, envelope
from privacy.errors import Replay, RoundError, TrustError
from privacy.federation import Accepted, Guardian, Member
from privacy.identity import keys
from privacy.messages import (
    AGGREGATOR,
    AGGREGATOR_KINDS,
    Certificate,
    Confirmation,
    Consent,
    EpochNote,
    Freeze,
    GuardianNote,
    Header,
    Kind,
    PairSeeds,
    Release,
    Shares,
    Signed,
    SumClaim,
    Upload,
    decode,
)
from privacy.secure_sum import audits, freeze, guardian_sum, shares
from privacy.secure_sum.guardian_sum import Frozen
from privacy.transparency import log

M = TypeVar("M", Consent, Release)


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
        raise not_yours(kind)
    accepted = versions.governing(view, kind, number) or published(view)
    if len(data) > cap(kind, accepted):
        raise TrustError(
            f"a {kind} of {len(data)} bytes, at most {cap(kind, accepted)} are allowed",
            hint="that is no honest one",
            code="too-large",
        )
    if kind == "cosignature":
        _cosignature(number, party, data, view, accepted)
        return
    if kind in _GUARDIANS_STEPS:
        _GUARDIANS_STEPS[kind](number, _guardian(accepted, party), data, view, accepted)
        return
    member = _member(accepted, party)
    absent = {*(("consent", "release") if accepted.terms.shared else ()), *(() if accepted.terms.sliced else ("verdict",))}
    if kind not in _STEPS or kind in absent:
        raise _no_such_step(kind, accepted)
    _STEPS[kind](number, member, data, view, accepted)


def _cosignature(number: int, party: int, data: bytes, view: Documents, accepted: Accepted) -> None:
    checkpoint = view.get("checkpoint", number, AGGREGATOR)
    if checkpoint is None:
        raise _too_early(f"a cosignature of party {party} before the checkpoint of round {number}")
    # One that was made before this version was in force, and only arrives now: a silo sends what it wrote down, never another one.
    chained = versions.lineage(view, accepted.terms.version)
    former = [] if chained is None else [each.terms for each in chained.versions[:-1]]
    log.open_cosignature(data, checkpoint, accepted.terms, party, former)


def _countersignature(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    _expect("countersignature", member, "contract version", number, accepted.terms.version)
    if versions.is_passed_over(view, accepted):
        raise _settled("contract version", number)
    chain.open_countersignature(data, accepted, member, before=next(reversed(versions.before(view, accepted)), None))


def _epoch_note(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    _check_called(number, view, accepted)
    if view.get("roster", number, AGGREGATOR) is not None and not _may_knock(number, member, view, accepted):
        raise _settled("epoch", number)
    note = envelope.open_member(data, EpochNote, type="epoch-note", context=accepted.digest, member=member)
    _expect("epoch note", member, "contract", note.contract, accepted.digest)
    _expect("epoch note", member, "epoch", note.epoch, number)
    keys.load_seal_key(note.seed_key)
    keys.check_dh_key(note.dh_key)


def _may_knock(number: int, member: Member, view: Documents, accepted: Accepted) -> bool:
    """In share mode a note after the roster says: this silo waits for the next epoch."""
    at = rounds.epoch_in(view, accepted, number)
    return accepted.terms.shared and at is not None and member.id not in at.silos


def _pair_seeds(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    context, silos = _roster_ctx(number, member, view, accepted)
    stated = envelope.open_member(data, PairSeeds, type="pair-seeds", context=context, member=member)
    _expect("pair seeds", member, "epoch", stated.epoch, number)
    _expect("pair seeds", member, "peers", [peer for peer, _ in stated.sealed], _peers(silos, member))
    _expect("pair seeds", member, "sizes", {len(sealed) for _, sealed in stated.sealed}, {sizes.SEED_BYTES})


def _confirmation(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    context, silos = _roster_ctx(number, member, view, accepted)
    if missing := set(silos) - set(view.parties("pair-seeds", number)):
        raise _too_early(f"a confirmation of epoch {number} before the pair seeds of silos {sorted(missing)}")
    stated = envelope.open_member(data, Confirmation, type="confirmation", context=context, member=member)
    _expect("confirmation", member, "epoch", stated.epoch, number)
    _expect("confirmation", member, "peers", [peer for peer, _ in stated.tags], _peers(silos, member))


def _upload(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    if view.get("freeze", number, AGGREGATOR) is not None:
        raise Replay(
            f"an upload of silo {member.id} after the freeze of round {number}",
            hint="the round goes on with the upload that stands",
        )
    _check_takes_part(f"an upload in round {number}", member, opened.silos)
    upload = rounds.open_upload(data, opened, member)
    header = guardian_sum.check_header(
        upload.header, member, accepted=accepted, epoch_ctx=opened.context, round_ctx=opened.ctx, silos=opened.silos
    )
    if accepted.terms.shared:
        shares.check_bundles(upload, header)
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
    _expect("release", member, "sealed size", len(stated.sealed), sizes.SEED_BYTES)


def _verdict(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    body = rounds.own(view, accepted, "claim", number, opened.context)
    frozen = _frozen(opened, view, accepted)
    if body is None or frozen is None:
        raise _too_early(f"a verdict of silo {member.id} before the claim of round {number}")
    claimed = audits.check_claim(body, frozen, certificate=decode(body, SumClaim).certificate, terms=accepted.terms)
    audits.check_verdict(data, member, claimed, epoch_ctx=opened.context)


def _acknowledgement(number: int, member: Member, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = rounds.round_in(view, accepted, number)
    body = None if opened is None else rounds.own(view, accepted, "outcome", number, opened.context)
    if opened is None or body is None:
        raise _too_early(f"an acknowledgement of silo {member.id} before the outcome of round {number}")
    _check_takes_part(f"an acknowledgement of round {number}", member, opened.silos)
    stated = rounds.open_acknowledgement(data, opened, member)
    _expect("acknowledgement", member, "outcome", stated.outcome, hashlib.sha256(body).digest())


# --- Guardians -------------------------------------------------------------------------------------------------------------


def _guardian_note(number: int, guardian: Guardian, data: bytes, view: Documents, accepted: Accepted) -> None:
    _check_called(number, view, accepted)
    if view.get("roster", number, AGGREGATOR) is not None:
        raise _settled("epoch", number)
    note = envelope.open_guardian(data, GuardianNote, type="guardian-note", context=accepted.digest, guardian=guardian)
    _expect("guardian note", guardian, "contract", note.contract, accepted.digest)
    _expect("guardian note", guardian, "epoch", note.epoch, number)
    keys.load_seal_key(note.guardian_key)


def _list(number: int, guardian: Guardian, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    if view.get("freeze", number, AGGREGATOR) is not None:
        raise Replay(f"a list of guardian {guardian.id} after the freeze of round {number}", hint="go on with the set that stands")
    freeze.check_list(data, guardian, epoch_ctx=opened.context, round_ctx=opened.ctx, silos=opened.silos)


def _endorsement(number: int, guardian: Guardian, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    frozen = _frozen(opened, view, accepted)
    if frozen is None:
        raise _too_early(f"an endorsement of guardian {guardian.id} before the freeze of round {number}")
    freeze.check_endorsement(data, guardian, frozen, epoch_ctx=opened.context)


def _shares(number: int, guardian: Guardian, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    frozen = _frozen(opened, view, accepted)
    if frozen is None or rounds.own(view, accepted, "certificate", number, opened.context) is None:
        raise _too_early(f"shares of guardian {guardian.id} before the certificate of round {number}")
    stated = envelope.open_guardian(data, Shares, type="shares", context=opened.context, guardian=guardian)
    _expect("shares", guardian, "round", stated.round_ctx, opened.ctx)
    _expect("shares", guardian, "set", stated.frozen, frozen.digest)
    _expect("shares", guardian, "sealed size", len(stated.sealed), shares.release_bytes(frozen))


def _close(number: int, guardian: Guardian, data: bytes, view: Documents, accepted: Accepted) -> None:
    opened = _open_round(number, view, accepted)
    freeze.check_close(data, guardian, epoch_ctx=opened.context, round_ctx=opened.ctx)


def _frozen(opened: Round, view: Documents, accepted: Accepted) -> Frozen | None:
    body = rounds.own(view, accepted, "freeze", opened.number, opened.context)
    return None if body is None else _frozen_in(body, accepted, opened.context, opened.ctx, opened.silos)


@functools.lru_cache(maxsize=2)
def _frozen_in(body: bytes, accepted: Accepted, context: bytes, ctx: bytes, silos: tuple[int, ...]) -> Frozen:
    """The set in a freeze, once for the same bytes: every guardian's documents ask for it."""
    made = decode(body, Freeze)
    return guardian_sum.check_freeze(made, accepted=accepted, epoch_ctx=context, round_ctx=ctx, own_header=None, silos=silos)


_GUARDIANS_STEPS: Final[dict[Kind, Callable[[int, Guardian, bytes, Documents, Accepted], None]]] = {
    "guardian-note": _guardian_note, "list": _list, "endorsement": _endorsement, "shares": _shares, "close": _close,
}  # fmt: skip
_STEPS: Final[dict[Kind, Callable[[int, Member, bytes, Documents, Accepted], None]]] = {
    "countersignature": _countersignature, "epoch-note": _epoch_note, "pair-seeds": _pair_seeds, "confirmation": _confirmation,
    "upload": _upload, "consent": _consent, "release": _release, "verdict": _verdict,
    "acknowledgement": _acknowledgement,
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


def _roster_ctx(number: int, member: Member, view: Documents, accepted: Accepted) -> tuple[bytes, tuple[int, ...]]:
    """epoch_ctx and the silos of a called epoch whose roster holds this member."""
    _check_called(number, view, accepted)
    at = rounds.epoch_in(view, accepted, number)
    if at is None:
        raise _too_early(f"epoch {number} has no roster yet")
    _check_takes_part(f"a document of epoch {number}", member, at.silos)
    return at.context, at.silos


def _check_takes_part(what: str, member: Member, silos: tuple[int, ...]) -> None:
    if member.id not in silos:
        raise TrustError(
            f"{what} from silo {member.id}, which is not in this epoch: its silos are {list(silos)}",
            hint="wait for the next epoch", code="not-in-epoch",
        )  # fmt: skip


def _member(accepted: Accepted, party: int) -> Member:
    for member in accepted.terms.member:
        if member.id == party:
            return member
    raise TrustError(
        f"silo {party} is no member of {accepted.terms.name}", hint="ask the coordinator which id is yours", code="unknown-member"
    )


def _guardian(accepted: Accepted, party: int) -> Guardian:
    for guardian in accepted.terms.guardian:
        if guardian.id == party:
            return guardian
    raise TrustError(
        f"party {party} is no guardian of {accepted.terms.name}", hint="ask the coordinator for your id", code="unknown-member"
    )


def _no_such_step(kind: Kind, accepted: Accepted) -> TrustError:
    mode = accepted.terms.sum.protocol
    return TrustError(f"there is no {kind} with protocol = {mode!r}", hint="read the contract again", code="wrong-type")


def _peers(silos: tuple[int, ...], member: Member) -> list[int]:
    return [other for other in silos if other != member.id]


def _expect(what: str, member: Member | Guardian, field: str, found: object, wanted: object) -> None:
    if found != wanted:
        role = "silo" if isinstance(member, Member) else "guardian"
        raise TrustError(
            f"the {what} of {role} {member.id} has {field} {_short(found)}, expected {_short(wanted)}",
            hint="it belongs to another round or federation, or that silo's software is faulty",
            code=f"wrong-{field.replace(' ', '-')}",
        )


def _short(value: object) -> str:
    return f"{value.hex()[:16]}…" if isinstance(value, bytes) else str(value)


def _settled(what: str, number: int) -> Replay:
    return Replay(f"{what} {number} is settled", hint="read the board and go on from there", number=number)


def _too_early(what: str) -> RoundError:
    return RoundError(what, hint="wait for the step before it", code="too-early")
