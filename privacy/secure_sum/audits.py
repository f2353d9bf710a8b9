# SPDX-License-Identifier: Apache-2.0
"""Slices of a sum, audited by a few silos each: what the aggregator claims, what an auditor says of it, and when that is enough.

Once it has the sum, the aggregator publishes every masked vector, and a claim: the hash of each segment of the sum, the hashes of
each vector's segments, and the released secrets (``claim_of``). Everybody checks what the claim says without a vector
(``check_claim``). A silo fetches the pieces of the segments that the certificate made its duty, and some of its own choice, sums
them again (``find``), and signs a verdict. When for every segment t_c + 1 of its auditors said "right", their verdicts are the
audit, the outcome may be a result, and nobody applies one without it (``check_audit``, ``check_total``).

**Formal guarantees**, while at most t_c silos of the set work together with the aggregator, everything else being theirs too:

- *A wrong sum is never applied*: a sum that differs in any word from that of the vectors to which the headers bind their silos
  lacks, for the segment with that word, the word of an auditor; no honest silo applies it.
- *Nobody else's word counts*: only silos of the certified set that the certificate picked for a segment, each once, by signature.
- *Bound to one claim*: a verdict names its round and the digest of the claim; the claim names the set, the certificate and every
  segment's hash: verdicts of another round, set or claim are refused, and so is an outcome whose sum is not the claimed one.
- *A segment that is withheld is not "right"*: an auditor that lacks a piece, or got one that is not its header's, says so.

With more than t_c colluders every honest silo that took part still looks at one segment in ``slices.OWN_ODDS`` by its own choice,
before it applies anything, and a segment that anybody complains of is summed again by all. Not promised: that a round ends with a
result; auditors that fall silent, or lie that a segment is wrong, cost the round (it counts towards ``max_void_rounds``), and so
does an aggregator that withholds. Spare auditors make up for as many silent silos as the set could still lose: |U| - u_min, none in
consent mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from privacy import envelope
from privacy.errors import TrustError
from privacy.federation import Accepted, Contract, Member
from privacy.messages import Audit, Header, Outcome, SegmentVerdict, Signed, SumClaim, Vector, decode, encode
from privacy.secure_sum import merkle, slices
from privacy.secure_sum.freeze import Frozen, check_seed
from privacy.secure_sum.masking import Words, check_same
from privacy.secure_sum.shares import check_pair_key
from privacy.transparency import proofs

UNAUDITED: Final = "unaudited"
"""Why an outcome that sums moves nothing: too few auditors said that it is right."""

Fetch = Callable[[int, int, int], bytes | None]
"""Bytes of a silo's published vector: (silo, first byte in its document, how many), or None when they are not there."""


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A claim that passed ``check_claim``, the digest of its body, and the set that it is over."""

    claim: SumClaim
    digest: bytes
    frozen: Frozen
    spare: int
    colluders: int

    @property
    def dimension(self) -> int:
        """How many words the sum has."""
        return next(iter(self.frozen.headers.values())).dimension

    @property
    def count(self) -> int:
        """How many segments the sum has."""
        return len(self.claim.segments)

    @cached_property
    def auditors(self) -> tuple[tuple[int, ...], ...]:
        """By segment, whose word on it counts."""
        silos, colluders = tuple(self.frozen.headers), self.colluders
        return tuple(
            slices.auditors(self.claim.certificate, segment, silos, colluders=colluders, spare=self.spare)
            for segment in range(self.count)
        )

    def duties(self, silo: int) -> tuple[int, ...]:
        """The segments on which this silo's word counts, ascending."""
        return tuple(segment for segment, picked in enumerate(self.auditors) if silo in picked)


def claim_of(
    total: Words, openings: Mapping[int, Sequence[bytes]], seeds: Mapping[int, bytes], frozen: Frozen, *, certificate: bytes,
    pair_keys: Mapping[tuple[int, int], bytes] | None = None,
) -> SumClaim:  # fmt: skip
    """What the aggregator says of a sum.

    Args:
        openings: by silo of the set, ``slices.hashes`` of its masked vector.
        certificate: digest of the body of the round's certificate.
    """
    return SumClaim(
        round_ctx=frozen.round_ctx, frozen=frozen.digest, certificate=certificate, segments=slices.hashes(total),
        openings=tuple((silo, tuple(openings[silo])) for silo in sorted(openings)), seeds=tuple(sorted(seeds.items())),
        pair_keys=tuple((i, j, key) for (i, j), key in sorted((pair_keys or {}).items())),
    )  # fmt: skip


def check_claim(body: bytes, frozen: Frozen, *, certificate: bytes, terms: Contract) -> Claimed:
    """The claim in ``body``, held to everything but the vectors' words.

    **Formal guarantees**: openings lead to the headers' roots, seeds and pair keys match the headers' commitments; so a piece that
    has an opening's hash is the silo's own, and the right hash of every segment of the sum is determined.

    Args:
        frozen: the certified set.
        certificate: digest of the certificate's body, as the reader has it.

    Raises:
        TrustError: it is not of this set and certificate, or one of these fails; the message names the silo.
    """
    claim = decode(body, SumClaim)
    check_same("claim", "", "round", claim.round_ctx, frozen.round_ctx)
    check_same("claim", "", "set", claim.frozen, frozen.digest)
    check_same("claim", "", "certificate", claim.certificate, certificate)
    headers, count = frozen.headers, slices.segments(terms.dimension)
    for what, silos in (("seeds", [silo for silo, _ in claim.seeds]), ("openings", [silo for silo, _ in claim.openings])):
        if silos != list(headers):
            raise _refused(f"the claim shows {what} of {silos} for a set of {list(headers)}")
    if len(claim.segments) != count:
        raise _refused(f"the claim has {len(claim.segments)} segments, the contract gives {count}")
    for silo, opening in claim.openings:
        if len(opening) != count or proofs.root_of_hashes(opening) != headers[silo].root:
            raise _refused(f"the openings of silo {silo} do not lead to the root in its header")
    for silo, seed in claim.seeds:
        check_seed(frozen, silo, seed)
    if [(i, j) for i, j, _ in claim.pair_keys] != [(i, j) for i in headers for j in frozen.missing]:
        raise _refused(f"the claim has keys of {len(claim.pair_keys)} pairs, the set has {len(headers) * len(frozen.missing)}")
    for i, j, key in claim.pair_keys:
        check_pair_key(frozen, i, j, key)
    spare, digest = len(headers) - terms.fewest, hashlib.sha256(body).digest()
    return Claimed(claim=claim, digest=digest, frozen=frozen, spare=max(0, spare), colluders=terms.privacy.colluders)


# --- What an auditor does -----------------------------------------------------------------------------------------------------


def document_of(words: Words, header: Header) -> bytes:
    """A silo's masked vector as it is published."""
    return encode(Vector(round_ctx=header.round_ctx, silo=header.silo, words=words.astype("<u4").tobytes()))


def place_of(segment: int, header: Header) -> tuple[int, int]:
    """Where a segment stands in the published vector: its first byte, and how many it has."""
    size = 4 * header.dimension
    prefix = next(width for most, width in ((2**8, 2), (2**16, 3), (2**32, 5)) if size < most)  # MessagePack's bin 8, 16, 32
    before = len(encode(Vector(round_ctx=header.round_ctx, silo=header.silo, words=b""))) - 2 + prefix
    start = segment * slices.SEGMENT_BYTES
    return before + start, min(slices.SEGMENT_BYTES, size - start)


def pieces_of(segment: int, claimed: Claimed, fetch: Fetch) -> dict[int, Words] | int:
    """Every silo's piece of a segment, each held to its header; or the first silo whose piece is not there or not its own."""
    found: dict[int, Words] = {}
    for silo, opening in claimed.claim.openings:
        header = claimed.frozen.headers[silo]
        raw = fetch(silo, *place_of(segment, header))
        try:
            words = np.frombuffer(raw or b"", dtype="<u4")
            slices.check_segment(words, proofs.inclusion_proof(opening, segment), header, segment)
        except (TrustError, ValueError):
            return silo
        found[silo] = words
    return found


def hash_of_sum(segment: int, pieces: Mapping[int, Words], claimed: Claimed) -> bytes:
    """The hash that a segment of the sum has, by these pieces and the claim's secrets."""
    keys_of_pairs = {(i, j): key for i, j, key in claimed.claim.pair_keys}
    total = slices.sum_of_segment(pieces, dict(claimed.claim.seeds), claimed.frozen.headers, segment, pair_keys=keys_of_pairs)
    return merkle.root(np.ascontiguousarray(total).view(np.uint8).data)


def find(segments: Sequence[int], claimed: Claimed, fetch: Fetch, *, silo: int) -> SegmentVerdict:
    """What this silo finds of these segments, to be signed as "verdict" in epoch_ctx.

    Of a segment on which its word does not count it says nothing, unless something is wrong with it.
    """
    right, wrong, withheld, mine = [], [], [], set(claimed.duties(silo))
    for segment in sorted(segments):
        pieces = pieces_of(segment, claimed, fetch)
        if isinstance(pieces, int):
            withheld.append((segment, pieces))
        elif (found := hash_of_sum(segment, pieces, claimed)) != claimed.claim.segments[segment]:
            wrong.append((segment, found))
        elif segment in mine:
            right.append(segment)
    return SegmentVerdict(
        round_ctx=claimed.claim.round_ctx, silo=silo, claim=claimed.digest, right=tuple(right), wrong=tuple(wrong),
        withheld=tuple(withheld),
    )  # fmt: skip


def complaints(verdict: SegmentVerdict) -> frozenset[int]:
    """The segments that a verdict does not call right."""
    return frozenset(segment for segment, _ in (*verdict.wrong, *verdict.withheld))


def check_again(segments: Sequence[int], claimed: Claimed, fetch: Fetch) -> None:
    """Return if these segments of the claimed sum, of which somebody complained, are right after all.

    Raises:
        TrustError: code "withheld": a piece did not come, or is not its header's; "false-sum": the claim is wrong.
    """
    for segment in sorted(segments):
        pieces = pieces_of(segment, claimed, fetch)
        if isinstance(pieces, int):
            raise _refused(f"segment {segment} of silo {pieces} is withheld, or is not the one in its header", code="withheld")
        if hash_of_sum(segment, pieces, claimed) != claimed.claim.segments[segment]:
            raise _refused(f"segment {segment} of the claimed sum is not the sum of the silos' segments", code="false-sum")


# --- What counts ----------------------------------------------------------------------------------------------------------------


def check_verdict(raw: bytes, member: Member, claimed: Claimed, *, epoch_ctx: bytes) -> SegmentVerdict:
    """The member's verdict on this claim, fit to be counted.

    Raises:
        TrustError: not signed by the member in this epoch; of another round or claim; code "no-auditor": of a silo outside the
            set, or it calls right what is not its duty; or its lists are not ascending, or name what is not there.
    """
    stated = envelope.open_member(raw, SegmentVerdict, type="verdict", context=epoch_ctx, member=member)
    whose = f"silo {member.id}"
    check_same("verdict", whose, "round", stated.round_ctx, claimed.claim.round_ctx)
    check_same("verdict", whose, "claim", stated.claim, claimed.digest)
    if member.id not in claimed.frozen.headers:
        raise _refused(f"a verdict of silo {member.id}, which is not in the set", code="no-auditor")
    blamed = {silo for _, silo in stated.withheld}
    lists = [list(stated.right), [each for each, _ in stated.wrong], [each for each, _ in stated.withheld]]
    every = sorted(each for found in lists for each in found)
    ordered = all(found == sorted(found) for found in lists) and len(set(every)) == len(every)
    if not every or not ordered or every[-1] >= claimed.count or not blamed <= set(claimed.frozen.headers):
        raise _refused(f"the verdict of silo {member.id} names segments {every} of {claimed.count}, or silos that have none")
    if foreign := set(stated.right) - set(claimed.duties(member.id)):
        raise _refused(f"silo {member.id} calls segments {sorted(foreign)} right, whose auditor it is not", code="no-auditor")
    return stated


def audit_of(documents: Mapping[int, bytes], claimed: Claimed, *, accepted: Accepted, epoch_ctx: bytes) -> Audit | None:
    """The audit of these silos' verdicts, those that do not hold left aside; None while a segment lacks t_c + 1 of its auditors."""
    stated, good = [], []
    for silo in sorted(documents):
        try:
            stated.append(check_verdict(documents[silo], accepted.terms.by_id(silo), claimed, epoch_ctx=epoch_ctx))
        except TrustError:
            continue
        good.append(documents[silo])
    if lacking(stated, claimed):
        return None
    return Audit(round_ctx=claimed.claim.round_ctx, claim=claimed.digest, verdicts=tuple(good))


def check_audit(audit: Audit, claimed: Claimed, *, accepted: Accepted, epoch_ctx: bytes) -> frozenset[int]:
    """Return if for every segment t_c + 1 of its auditors said that it is right; the segments of which somebody complains.

    Raises:
        TrustError: of another round or claim, a verdict does not hold, one silo's stands twice; code "not-audited": too few.
    """
    check_same("audit", "", "round", audit.round_ctx, claimed.claim.round_ctx)
    check_same("audit", "", "claim", audit.claim, claimed.digest)
    senders, members = [decode(raw, Signed).sender for raw in audit.verdicts], {each.id: each for each in accepted.terms.member}
    if senders != sorted(set(senders)) or not set(senders) <= set(members):
        raise _refused(f"verdicts of {senders}, wanted silos, each once, by ascending id")
    stated = [
        check_verdict(raw, members[silo], claimed, epoch_ctx=epoch_ctx) for silo, raw in zip(senders, audit.verdicts, strict=True)
    ]
    if missing := lacking(stated, claimed):
        raise _refused(f"segments {list(missing)} lack the word of {claimed.colluders + 1} auditors", code="not-audited")
    return frozenset().union(*map(complaints, stated))


def lacking(verdicts: Sequence[SegmentVerdict], claimed: Claimed) -> tuple[int, ...]:
    """The segments that fewer than t_c + 1 of these verdicts, which passed ``check_verdict``, call right."""
    said = dict.fromkeys(range(claimed.count), 0)
    for verdict in verdicts:
        for segment in verdict.right:
            said[segment] += 1
    return tuple(segment for segment, count in said.items() if count <= claimed.colluders)


def check_total(outcome: Outcome, claimed: Claimed) -> None:
    """Return if an outcome's sum, seeds and keys are those of the claim.

    Raises:
        TrustError: code "claim-changed": they are not: the outcome says something else than was audited.
    """
    claim, total = claimed.claim, np.frombuffer(outcome.total if len(outcome.total) % 4 == 0 else b"", dtype="<u4")
    pairs: tuple[tuple[str, object, object], ...] = (
        ("set", outcome.frozen, claim.frozen), ("seeds", outcome.seeds, claim.seeds),
        ("pair keys", outcome.pair_keys, claim.pair_keys), ("vectors", outcome.vectors, ()),
        ("sum", slices.hashes(total), claim.segments),
    )  # fmt: skip
    for what, found, wanted in pairs:
        if found != wanted:
            raise _refused(f"round {outcome.round} has another {what} than the claim that was audited", code="claim-changed")


def _refused(what: str, *, code: str = "sum-refused") -> TrustError:
    return TrustError(what, hint="nothing is applied; keep the claim and the outcome, they are evidence", code=code)
