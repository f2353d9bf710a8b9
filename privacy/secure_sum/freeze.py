# SPDX-License-Identifier: Apache-2.0
"""Which silos are in a sum: the set U, and the proof that it may be summed.

In consent mode U is all members, and every one of them signs for it. In share mode U follows from q guardians' lists of the
uploads that they can answer for, by a rule that everybody computes again, and q guardians sign for it; see ``secure_sum.choice``.

Promised: a ``Frozen`` holds verified headers whose pair commitments agree, of at least u_min silos; a ``Certified`` one has
the signatures that the contract asks for, whatever the message claims. Two certificates of one round for different sets need
more than T guardians that sign twice. Not promised: that the aggregator proposes the largest set that it could.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, Guardian, Member
from privacy.identity.keys import u32
from privacy.messages import Certificate, Close, Consent, Endorsement, Freeze, Header, Listing, Signed, decode
from privacy.secure_sum import blocks, choice
from privacy.secure_sum.masking import check_header, check_round, check_set, refused, self_commitment


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A set U that passed ``check_freeze``: its verified headers, by ascending silo, U's digest, and the epoch's silos E."""

    round_ctx: bytes
    digest: bytes
    headers: Mapping[int, Header]
    silos: tuple[int, ...] = ()

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """The silos of the epoch that are not in U, ascending; none in consent mode."""
        return tuple(silo for silo in self.silos if silo not in self.headers)

    @cached_property
    def ranks(self) -> Mapping[int, int]:
        """Where each missing silo stands among the silos of the epoch, from 0."""
        return {gone: self.silos.index(gone) for gone in self.missing}

    @cached_property
    def commitments(self) -> Mapping[int, Mapping[int, bytes]]:
        """C_ij by silo i of U and peer j."""
        return {silo: dict(header.pair_commitments) for silo, header in self.headers.items()}


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A set that has its signatures. Only ``check_certificate`` makes one; release and unmasking demand it."""

    frozen: Frozen


def digest_of_set(headers: Sequence[bytes]) -> bytes:
    """The digest of U = [(silo, attempt, header digest)] over signed headers: SHA-256("gsum/1 set" NUL ‖ entries of 52 bytes).

    Raises:
        TrustError: one is not a signed header; signatures are not checked here.
    """
    digest = hashlib.sha256(b"gsum/1 set\0")
    for raw in headers:
        header = decode(decode(raw, Signed).body, Header)
        digest.update(u32(header.silo) + header.attempt + hashlib.sha256(raw).digest())
    return digest.digest()


def check_freeze(
    freeze: Freeze,
    *,
    accepted: Accepted,
    epoch_ctx: bytes,
    round_ctx: bytes,
    own_header: bytes | None,
    silos: Sequence[int] | None = None,
    seen: Collection[int] = (),
) -> Frozen:
    """The proposed set, verified. Whoever gets this back may write its digest down, and then sign for it.

    **Formal guarantees**: every silo stands in U once, with a header that it signed for this round; every pair's commitments
    agree, so all pair masks cancel or can be taken off; this silo's header is the very one it sent. In consent mode U is all
    members. In share mode U is exactly what q verified lists give, has at least u_min silos and at least two more than collude,
    is made of whole blocks where the contract has blocks, and every silo outside has a reason that the lists bear out.

    Args:
        own_header: this silo's signed header as it was sent; None for the aggregator and a guardian apart from the silos. In
            share mode the silo may be left out.
        silos: the silos of the epoch, E, ascending; None for all members.
        seen: silos whose upload the reader has itself seen before the freeze: "absent" is no reason for them.

    Raises:
        TrustError: any of these fails; the message names the silos.
    """
    check_round("freeze", "", freeze.round_ctx, round_ctx)
    everybody = tuple(member.id for member in accepted.terms.member) if silos is None else tuple(silos)
    authors = _authors(freeze, accepted, everybody)
    headers = {
        member.id: check_header(raw, member, accepted=accepted, epoch_ctx=epoch_ctx, round_ctx=round_ctx, silos=everybody)
        for raw, member in zip(freeze.headers, authors, strict=True)
    }
    own = None if own_header is None else decode(decode(own_header, Signed).body, Header).silo
    if own_header is not None and own_header not in freeze.headers and (own in headers or not accepted.terms.shared):
        raise refused("the set holds another header of this silo than the one it sent")
    chosen = tuple(headers)
    if accepted.terms.shared:
        places = {"epoch_ctx": epoch_ctx, "round_ctx": round_ctx}
        chosen = _check_choice(freeze, headers, accepted, everybody, {*seen, *([] if own is None else [own])}, places)
    else:
        check_pairs(headers)
    if not blocks.is_whole(chosen, accepted.terms.sum.blocks):  # the choice gives no other; what may never happen is asked twice
        raise refused(f"the set of silos {sorted(chosen)} is no union of whole blocks", code="not-whole-blocks")
    raws = [raw for raw, silo in zip(freeze.headers, headers, strict=True) if silo in chosen]
    kept = {silo: headers[silo] for silo in chosen}
    return Frozen(round_ctx=round_ctx, digest=digest_of_set(raws), headers=kept, silos=everybody)


def check_certificate(certificate: Certificate, frozen: Frozen, *, accepted: Accepted, epoch_ctx: bytes) -> Certified:
    """Proof that exactly ``frozen`` may be summed: every member signed for it, in share mode q guardians. How many that is
    stands in the contract, not in the message.

    Raises:
        TrustError: a signature is missing, one too many, twice, forged, of another round, or for another set.
    """
    check_round("certificate", "", certificate.round_ctx, frozen.round_ctx)
    check_set("certificate", "", certificate.frozen, frozen.digest)
    if accepted.terms.shared:
        for raw, guardian in zip(certificate.consents, _endorsers(certificate, accepted), strict=True):
            check_endorsement(raw, guardian, frozen, epoch_ctx=epoch_ctx)
        return Certified(frozen=frozen)
    members = accepted.terms.member
    if len(certificate.consents) != len(members):
        raise refused(f"the certificate has {len(certificate.consents)} consents, all {len(members)} members must sign")
    for raw, member in zip(certificate.consents, members, strict=True):
        check_consent(raw, member, frozen, epoch_ctx=epoch_ctx)
    return Certified(frozen=frozen)


def check_consent(raw: bytes, member: Member, frozen: Frozen, *, epoch_ctx: bytes) -> None:
    """Return if ``raw`` is the member's consent to exactly this set. Raises TrustError."""
    consent = envelope.open_member(raw, Consent, type="consent", context=epoch_ctx, member=member)
    check_round("consent", f"silo {member.id}", consent.round_ctx, frozen.round_ctx)
    check_set("consent", f"silo {member.id}", consent.frozen, frozen.digest)


def endorsement(frozen: Frozen, *, guardian: int) -> Endorsement:
    """A guardian's word for this set, to be signed as "endorsement" in epoch_ctx once its promise lies on the disk."""
    return Endorsement(round_ctx=frozen.round_ctx, guardian=guardian, frozen=frozen.digest)


def check_endorsement(raw: bytes, guardian: Guardian, frozen: Frozen, *, epoch_ctx: bytes) -> None:
    """Return if ``raw`` is the guardian's endorsement of exactly this set. Raises TrustError."""
    stated = envelope.open_guardian(raw, Endorsement, type="endorsement", context=epoch_ctx, guardian=guardian)
    check_round("endorsement", f"guardian {guardian.id}", stated.round_ctx, frozen.round_ctx)
    check_set("endorsement", f"guardian {guardian.id}", stated.frozen, frozen.digest)


def choose_endorsements(
    documents: Mapping[int, bytes], frozen: Frozen, *, accepted: Accepted, epoch_ctx: bytes
) -> Certificate | None:
    """The certificate of the q lowest guardians whose endorsements hold, or None while there are fewer."""
    good = []
    for guardian in accepted.terms.guardian:
        try:
            check_endorsement(documents.get(guardian.id, b""), guardian, frozen, epoch_ctx=epoch_ctx)
        except TrustError:
            continue
        good.append(documents[guardian.id])
    if len(good) < accepted.terms.quorum:
        return None
    consents = tuple(good[: accepted.terms.quorum])
    return Certificate(round_ctx=frozen.round_ctx, frozen=frozen.digest, consents=consents)


def check_seed(frozen: Frozen, silo: int, seed: bytes) -> None:
    """Return if ``seed`` is the b_i to which the silo's header in the set is committed. Raises TrustError naming the silo."""
    header = frozen.headers.get(silo)
    if header is None:
        raise refused(f"silo {silo} is not in the set")
    place = {"round_ctx": header.round_ctx, "attempt": header.attempt}
    if len(seed) != 32 or self_commitment(seed, silo=silo, **place) != header.self_commitment:
        raise refused(f"the seed of silo {silo} contradicts the commitment of the attempt in the set")


def check_list(raw: bytes, guardian: Guardian, *, epoch_ctx: bytes, round_ctx: bytes, silos: Sequence[int]) -> Listing:
    """The guardian's list for this round: silos of the epoch, ascending, each once, listed or disputed.

    Raises:
        TrustError: not signed by the guardian in this epoch, of another round, or with other silos.
    """
    listing = envelope.open_guardian(raw, Listing, type="list", context=epoch_ctx, guardian=guardian)
    check_round("list", f"guardian {guardian.id}", listing.round_ctx, round_ctx)
    listed, disputed = [silo for silo, _ in listing.headers], [silo for silo, _ in listing.disputes]
    in_order = listed == sorted(set(listed)) and disputed == sorted(set(disputed))
    if not in_order or set(listed) & set(disputed) or not {*listed, *disputed} <= set(silos):
        raise refused(f"the list of guardian {guardian.id} names silos {listed} and disputes {disputed}")
    return listing


def choose(
    headers: Mapping[int, bytes],
    lists: Mapping[int, bytes],
    *,
    accepted: Accepted,
    epoch_ctx: bytes,
    round_ctx: bytes,
    silos: Sequence[int],
) -> Freeze | None:
    """The freeze to propose, from the verified headers and the lists that stand, or None while there is no set of u_min silos.

    A list that does not verify, or names a header that is not stored, is left aside. See ``privacy.secure_sum.choice.choose``.
    """
    good = {}
    for guardian in accepted.terms.guardian:
        try:
            listing = check_list(lists.get(guardian.id, b""), guardian, epoch_ctx=epoch_ctx, round_ctx=round_ctx, silos=silos)
        except TrustError:
            continue
        good[guardian.id] = (lists[guardian.id], listing)
    return choice.choose(headers, good, round_ctx=round_ctx, silos=silos, terms=accepted.terms)


def close(*, round_ctx: bytes, guardian: int, frozen: bytes = b"", released: bool = False) -> Close:
    """A guardian's word that it is done with a round, to be signed as "close" in epoch_ctx once it lies on the disk.

    Args:
        frozen: the digest of the set that it promised, b"" for none.
    """
    return Close(round_ctx=round_ctx, guardian=guardian, frozen=frozen, released=released)


def check_close(raw: bytes, guardian: Guardian, *, epoch_ctx: bytes, round_ctx: bytes) -> Close:
    """The guardian's word that it is done with this round.

    Raises:
        TrustError: not signed by the guardian in this epoch, of another round, or with a set that cannot be.
    """
    stated = envelope.open_guardian(raw, Close, type="close", context=epoch_ctx, guardian=guardian)
    check_round("close", f"guardian {guardian.id}", stated.round_ctx, round_ctx)
    if len(stated.frozen) not in (0, 32) or (stated.released and not stated.frozen):
        raise refused(f"the close of guardian {guardian.id} names a set of {len(stated.frozen)} bytes, released: {stated.released}")
    return stated


def choose_closes(
    documents: Mapping[int, bytes], *, accepted: Accepted, epoch_ctx: bytes, round_ctx: bytes
) -> tuple[bytes, ...] | None:
    """The q words that end the round, or None while fewer hold: those that say "none" when there are q of them, else the lowest."""
    none, good = [], []
    for guardian in accepted.terms.guardian:
        try:
            stated = check_close(documents.get(guardian.id, b""), guardian, epoch_ctx=epoch_ctx, round_ctx=round_ctx)
        except TrustError:
            continue
        good.append(documents[guardian.id])
        if not stated.frozen:
            none.append(documents[guardian.id])
    best, quorum = (none if len(none) >= accepted.terms.quorum else good), accepted.terms.quorum
    return tuple(best[:quorum]) if len(best) >= quorum else None


def ended(closes: Sequence[bytes], *, accepted: Accepted, epoch_ctx: bytes, round_ctx: bytes) -> Literal["void", "annulled"]:
    """How a round ends that q guardians closed.

    **Formal guarantees**: "void" only if all q say that they signed for no set: then at most H - q + T < q guardians can ever
    have signed for one, so no certificate exists or will. Otherwise "annulled": a certificate may exist, so everything counts
    as released.

    Raises:
        TrustError: not exactly q guardians' words for this round, each once, by ascending id.
    """
    guardians = _quorum("closes", closes, accepted)
    stated = [
        check_close(raw, guardian, epoch_ctx=epoch_ctx, round_ctx=round_ctx)
        for raw, guardian in zip(closes, guardians, strict=True)
    ]
    return "annulled" if any(each.frozen for each in stated) else "void"


def _authors(freeze: Freeze, accepted: Accepted, silos: Sequence[int]) -> list[Member]:
    """The members whose headers the freeze must hold, in order: all, or in share mode those who say that they signed them."""
    members = accepted.terms.member
    if not accepted.terms.shared:
        if len(freeze.headers) != len(members):
            raise refused(f"the set has {len(freeze.headers)} headers for {len(members)} members")
        if freeze.lists or freeze.left_out:
            raise refused("the set of consent mode has guardians' lists or leaves silos out")
        return list(members)
    senders = [decode(raw, Signed).sender for raw in freeze.headers]
    if senders != sorted(set(senders)) or not set(senders) <= set(silos):
        raise refused(f"the set has headers of silos {senders}, wanted silos of the epoch, each once, by ascending id")
    return [accepted.terms.by_id(sender) for sender in senders]


def _check_choice(
    freeze: Freeze,
    headers: Mapping[int, Header],
    accepted: Accepted,
    silos: Sequence[int],
    seen: Collection[int],
    places: Mapping[str, bytes],
) -> tuple[int, ...]:
    """The set that the freeze's lists and headers give, if the freeze says the same of it and it is large enough."""
    terms = accepted.terms
    guardians = _quorum("lists", freeze.lists, accepted)
    lists = [
        check_list(raw, guardian, epoch_ctx=places["epoch_ctx"], round_ctx=places["round_ctx"], silos=silos)
        for raw, guardian in zip(freeze.lists, guardians, strict=True)
    ]
    agreed = choice.agreed(lists)
    found = {silo: hashlib.sha256(raw).digest() for silo, raw in zip(headers, freeze.headers, strict=True)}
    if found != agreed:
        raise refused(f"the set has headers of silos {sorted(found)}, the lists agree on {sorted(agreed)} or on other headers")
    chosen = choice.select(choice.mismatches(headers), headers, terms)
    if len(chosen) < terms.fewest or len(chosen) - terms.privacy.colluders < 2:
        raise refused(
            f"the set has {len(chosen)} silos, at least {terms.fewest} are needed", code="set-too-small", found=len(chosen)
        )
    named = choice.named(lists) | set(seen)
    for silo, reason in choice.reasons(headers, chosen, choice.mismatches(headers), silos, named):
        stated = dict(freeze.left_out).get(silo)
        if stated not in reason:
            raise refused(f"silo {silo} is left out as {stated}, the lists say {' or '.join(sorted(reason))}", code="left-out")
    outside = [silo for silo in silos if silo not in chosen]
    if [silo for silo, _ in freeze.left_out] != outside:
        raise refused(f"silos {[silo for silo, _ in freeze.left_out]} are said to be left out, outside the set are {outside}")
    return chosen


def _endorsers(certificate: Certificate, accepted: Accepted) -> list[Guardian]:
    return _quorum("endorsements", certificate.consents, accepted)


def _quorum(what: str, documents: Sequence[bytes], accepted: Accepted) -> list[Guardian]:
    """The q guardians who say that they signed these documents; exactly q, each once, by ascending id."""
    senders, known = (
        [decode(raw, Signed).sender for raw in documents],
        {guardian.id: guardian for guardian in accepted.terms.guardian},
    )
    if len(senders) != accepted.terms.quorum:
        raise refused(f"{len(senders)} {what}, exactly {accepted.terms.quorum} are needed")
    if senders != sorted(set(senders)) or not set(senders) <= set(known):
        raise refused(f"{what} of {senders}, wanted guardians, each once, by ascending id")
    return [known[sender] for sender in senders]


def check_pairs(headers: Mapping[int, Header]) -> None:
    """Return if the commitments of every pair of these silos agree. Raises TrustError ("pairs-disagree") naming all others."""
    apart = choice.mismatches(headers)
    if apart:
        names = ", ".join(f"{i} and {j}" for i, j in apart)
        raise TrustError(
            f"the pair commitments of these silos differ: {names}",
            code="pairs-disagree",
            pairs=apart,
            hint="they saw another manifest, epoch or contract, or one of them lies; nothing was released",
        )
