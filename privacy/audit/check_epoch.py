# SPDX-License-Identifier: Apache-2.0
"""Verification of what rounds rest on: the contract versions and their signatures, and the epochs with their keys.

Every question is asked again with the functions of the epoch and the envelope, on the stored documents alone. No secret is
needed: that two silos hold one pair secret is shown by their confirmations, which must agree.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from privacy import chain, envelope
from privacy.audit.findings import RESTS, Findings, Slot, shown
from privacy.chain import Lineage
from privacy.errors import SiloquyError, TrustError
from privacy.federation import Accepted, Contract, Guardian, Member
from privacy.identity import keys
from privacy.messages import AGGREGATOR, EpochCall, EpochNote, GuardianNote, PairSeeds, Roster, Signed, decode
from privacy.secure_sum import epoch


@dataclass(frozen=True, kw_only=True)
class EpochFacts:
    """An epoch that a walk has verified: which contract it is under, its epoch_ctx, and the silos and guardians that take part."""

    number: int
    accepted: Accepted
    context: bytes
    silos: tuple[int, ...]
    guardians: tuple[int, ...] = ()


def aggregator_of(terms: Contract) -> keys.PublicIdentity:
    """The aggregator's public identity as the contract states it."""
    return keys.stated(terms.aggregator, bytes.fromhex(terms.aggregator.seal_key))


def contracts(found: Findings, pinned: Sequence[str]) -> dict[bytes, Accepted]:
    """Every contract version by digest, ascending, each signed and naming the one before; those in effect countersigned by all.

    A version that a later one passes over must not have been in effect: not all its members signed it, and no epoch is under it.

    Args:
        pinned: the aggregator's fingerprint or the digest of a version, as a person compared it; one of them must be right.
    """
    versions: dict[bytes, Accepted] = {}
    lineage: Lineage | None = None
    in_use = _in_use(found)
    for version in range(1, found.source.latest("contract") + 1):
        slot = Slot("contract", version, AGGREGATOR)
        raw = found.read(slot, required="the chain of contract versions has a gap here")
        accepted = found.test(slot, "signature", envelope.open_contract, raw)
        if accepted is None:
            lineage = None
            continue
        found.expect(slot, "contents", [("version", accepted.terms.version, version)])
        extended = Lineage.begin if version == 1 else None if lineage is None else lineage.extended
        lineage = found.test(slot, "chain", _extended, extended, accepted)
        versions[accepted.digest] = accepted
    newest = list(versions.values())[-1:]
    standing = {each.digest for last in newest for each in (last, *chain.ancestors(last, versions.values()))}
    for accepted in versions.values():
        before = chain.ancestors(accepted, versions.values())[-1:]
        is_last, passed_over = accepted in newest, accepted.digest not in standing
        _agreed(
            found, before[0] if before else None, accepted, passed_over=passed_over,
            must=accepted.digest in in_use or not (is_last or passed_over),
        )  # fmt: skip
    _pin(found, list(versions.values()), pinned)
    return versions


def in_force(found: Findings, versions: Mapping[bytes, Accepted], opened: Accepted | None) -> Accepted:
    """The version that a report of this moment is on: of the round that is open, else the newest in effect that all signed."""
    if opened is not None:
        return opened
    every = list(versions.values())
    for each in (every[-1], *reversed(chain.ancestors(every[-1], every))):
        if all(found.source.has("countersignature", each.terms.version, member.id) for member in each.terms.member):
            return each
    return every[0]


def epochs(found: Findings, versions: Mapping[bytes, Accepted], used: frozenset[int]) -> dict[int, EpochFacts]:
    """Every epoch whose roster holds, by number; those in ``used`` (rounds name them) must be complete."""
    facts, newest = {}, 0
    for number in range(1, max(found.source.latest("epoch"), *used, 0) + 1):
        known = _epoch(found, versions, number, must_stand=number in used)
        if known is None:
            continue
        version = known.accepted.terms.version
        if version < newest:
            why = f"it is under contract version {version}, an epoch before it was under {newest}"
            found.add(Slot("epoch", number, AGGREGATOR), "contract", "failed", why)
        facts[number], newest = known, max(newest, version)
    return facts


def own(found: Findings, slot: Slot, accepted: Accepted | None, context: bytes | None, raw: bytes | None) -> bytes | None:
    """The body of one of the aggregator's documents, its signature verified in ``context``."""

    def opened(raw: bytes, accepted: Accepted, context: bytes) -> bytes:
        key = accepted.terms.aggregator.verify_key
        return envelope.open_signed(raw, type=slot.kind, context=context, sender=AGGREGATOR, key=key)  # type: ignore[arg-type]

    return found.test(slot, "signature", opened, raw, accepted, context)


def _pin(found: Findings, versions: list[Accepted], pinned: Sequence[str]) -> None:
    slot = Slot("contract", 1, AGGREGATOR)
    if not versions:
        found.add(slot, "pinned", "open", "no contract version holds")
        return
    given = {"".join(each.split()).replace(":", "").lower() for each in pinned if each}
    prints = {keys.fingerprint(aggregator_of(versions[0].terms)).replace(" ", "")}
    if not given:
        found.add(slot, "pinned", "open", f"no fingerprint was given to compare: the aggregator's is {min(prints)}")
    elif given & (prints | {each.digest.hex() for each in versions}):
        found.add(slot, "pinned", "ok")
    else:
        found.add(slot, "pinned", "failed", f"the fingerprint given is {min(given)[:16]}…, the aggregator's is {min(prints)[:16]}…")


def _extended(extend: Callable[[Accepted], Lineage], accepted: Accepted) -> Lineage:
    return extend(accepted)


def _in_use(found: Findings) -> frozenset[bytes]:
    """In the context of which contracts epochs were called, as far as their calls can be read."""
    contexts = set()
    for number in range(1, found.source.latest("epoch") + 1):
        with contextlib.suppress(TrustError):
            raw = found.source.get("epoch", number, AGGREGATOR)
            contexts.add(b"" if raw is None else decode(raw, Signed).context)
    return frozenset(contexts)


def _agreed(found: Findings, before: Accepted | None, accepted: Accepted, *, must: bool, passed_over: bool) -> None:
    """Every member signed this version, and enough of those of the one before are among them; of one passed over, not every one."""
    version, signed = accepted.terms.version, {}
    for member in accepted.terms.member:
        slot = Slot("countersignature", version, member.id)
        raw = found.read(slot, required="every member signs the contract before an epoch" if must else "")
        if raw is not None and found.hold(slot, "signature", _countersigned, raw, accepted, member, [before]):
            signed[member.id] = raw
    if passed_over:
        if must or len(signed) == accepted.terms.silos:
            why = "an epoch was called under it" if must else "all its members signed it"
            found.add(Slot("contract", version, AGGREGATOR), "agreed", "failed", f"a later version passes it over, and {why}")
    elif len(signed) == accepted.terms.silos:
        found.hold(Slot("contract", version, AGGREGATOR), "agreed", lambda: chain.check_agreed(before, accepted, signed))
    elif must:
        found.add(Slot("contract", version, AGGREGATOR), "agreed", "open", RESTS)


def _countersigned(raw: bytes, accepted: Accepted, member: Member, before: Sequence[Accepted | None]) -> None:
    chain.open_countersignature(raw, accepted, member, before=before[0])


def _epoch(found: Findings, versions: Mapping[bytes, Accepted], number: int, *, must_stand: bool) -> EpochFacts | None:
    call, slot = Slot("epoch", number, AGGREGATOR), Slot("roster", number, AGGREGATOR)
    raw_call = found.read(call, required="every epoch begins with the aggregator's call")
    raw = found.read(slot, required="rounds rest on this epoch" if must_stand else "")
    accepted = _under(found, versions, {call: raw_call, slot: raw})
    called = own(found, call, accepted, None if accepted is None else accepted.digest, raw_call)
    if called is not None and accepted is not None:
        stated = found.test(call, "contents", decode, called, EpochCall)
        if stated is not None:
            found.expect(call, "contents", [("epoch", stated.epoch, number), ("contract", stated.contract, accepted.digest)])
    if accepted is not None:
        _notes(found, accepted, number)
    if raw is None:
        return None
    body = own(found, slot, accepted, None if accepted is None else accepted.digest, raw)
    if body is None or accepted is None:
        return None
    roster = found.test(slot, "contents", decode, body, Roster)
    notes = None if roster is None else found.test(slot, "notes", epoch.check_roster, roster, accepted)
    if roster is None or notes is None or not found.expect(slot, "contents", [("epoch", roster.epoch, number)]):
        return None
    context = epoch.epoch_ctx(accepted.digest, number, body)
    silos = tuple(note.silo for note in notes)
    for silo, note in zip(silos, roster.notes, strict=True):
        same_as_stored(found, Slot("epoch-note", number, silo), note, "the roster")
    guardians = tuple(decode(note, Signed).sender for note in roster.guardians)
    for guardian, note in zip(guardians, roster.guardians, strict=True):
        same_as_stored(found, Slot("guardian-note", number, guardian), note, "the roster")
    facts = EpochFacts(number=number, accepted=accepted, context=context, silos=silos, guardians=guardians)
    _pairs(found, facts, must_stand=must_stand)
    return facts


def _notes(found: Findings, accepted: Accepted, number: int) -> None:
    """All notes that are recorded for an epoch, those that came too late for its roster too."""

    def check_silo(raw: bytes, member: Member) -> None:
        note = envelope.open_member(raw, EpochNote, type="epoch-note", context=accepted.digest, member=member)
        _check_epoch(note.epoch, number)

    def check_guardian(raw: bytes, guardian: Guardian) -> None:
        note = envelope.open_guardian(raw, GuardianNote, type="guardian-note", context=accepted.digest, guardian=guardian)
        _check_epoch(note.epoch, number)

    for member in accepted.terms.member:
        raw = found.read(Slot("epoch-note", number, member.id))
        if raw is not None:
            found.hold(Slot("epoch-note", number, member.id), "signature", check_silo, raw, member)
    for guardian in accepted.terms.guardian:
        raw = found.read(Slot("guardian-note", number, guardian.id))
        if raw is not None:
            found.hold(Slot("guardian-note", number, guardian.id), "signature", check_guardian, raw, guardian)


def _check_epoch(stated: int, number: int) -> None:
    if stated != number:
        raise refused(f"it is for epoch {stated}")


def _under(found: Findings, versions: Mapping[bytes, Accepted], documents: Mapping[Slot, bytes | None]) -> Accepted | None:
    """The contract version in whose context these documents are signed: the first one that names a known version says."""
    named = None
    for slot, raw in documents.items():
        signed = None if raw is None else found.test(slot, "contents", decode, raw, Signed)
        if signed is None:
            continue
        named = named or versions.get(signed.context)
        if signed.context not in versions and 0 < len(versions) == found.source.latest("contract"):
            found.add(slot, "contract", "failed", f"it is signed under a contract that is not here: {shown(signed.context)}")
    return named


def _pairs(found: Findings, at: EpochFacts, *, must_stand: bool) -> None:
    """All seeds signed for all peers, all confirmations signed, and both ends of each pair in agreement."""
    why = "rounds rest on this epoch" if must_stand else ""
    tags: dict[int, bytes | None] = {}
    for silo in at.silos:
        slot = Slot("pair-seeds", at.number, silo)
        raw = found.read(slot, required=why)
        if raw is not None:
            found.hold(slot, "signature", lambda raw, silo=silo: _check_seeds(raw, at, silo), raw)
        tags[silo] = found.read(Slot("confirmation", at.number, silo), required=why)
    roster = Slot("roster", at.number, AGGREGATOR)
    if any(raw is None for raw in tags.values()):
        if must_stand:
            found.add(roster, "confirmed", "open", "rests on a confirmation that failed or is not here")
        return
    documents = {silo: raw for silo, raw in tags.items() if raw is not None}
    if not _confirmed(found, at, documents):
        return
    found.hold(roster, "confirmed", lambda: _check_confirmations(documents, at))


def _confirmed(found: Findings, at: EpochFacts, documents: Mapping[int, bytes]) -> bool:
    """Whether every confirmation by itself is its silo's, in this epoch."""

    def check(raw: bytes, silo: int) -> None:
        key = at.accepted.terms.by_id(silo).verify_key
        envelope.open_signed(raw, type="confirmation", context=at.context, sender=silo, key=key)

    held = [found.hold(Slot("confirmation", at.number, silo), "signature", check, raw, silo) for silo, raw in documents.items()]
    return all(held)


def _check_confirmations(documents: Mapping[int, bytes], at: EpochFacts) -> None:
    epoch.check_confirmations(documents, accepted=at.accepted, context=at.context, epoch=at.number, silos=at.silos)


def _check_seeds(raw: bytes, at: EpochFacts, silo: int) -> None:
    member = at.accepted.terms.by_id(silo)
    stated = envelope.open_member(raw, PairSeeds, type="pair-seeds", context=at.context, member=member)
    peers, wanted = [peer for peer, _ in stated.sealed], [other for other in at.silos if other != silo]
    if stated.epoch != at.number or peers != wanted:
        raise refused(f"it is for epoch {stated.epoch} and peers {peers}, expected {at.number} and {wanted}")


def same_as_stored(found: Findings, slot: Slot, copied: bytes, where: str) -> None:
    """The document in ``slot`` is the one that another document holds a copy of."""
    raw = found.read(slot, required=f"{where} holds a copy of it")
    if raw is not None:
        here, there = hashlib.sha256(raw).digest(), hashlib.sha256(copied).digest()
        if raw == copied:
            found.add(slot, "copy", "ok")
        else:
            found.add(slot, "copy", "failed", f"here is {shown(here)}, {where} holds {shown(there)}")


def refused(why: str) -> SiloquyError:
    """What a check raises when a document does not say what it must."""
    return TrustError(why, hint="keep the document, it is evidence", code="audit")
