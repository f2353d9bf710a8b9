# SPDX-License-Identifier: Apache-2.0
"""Rounds whose sums are audited in slices: what a few auditors for each segment are enough for, and what others need not fetch.

First claim, verdicts and audit by themselves, over a sum of three segments; then whole federations, on a board, HTTP and a folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator import audits as hub_audits
from aggregator import consent, rounds, service
from aggregator import verify as hub_verify
from aggregator.mailbox import Mailbox
from privacy import federation
from privacy.audit import placing, whole
from privacy.audit.evidence import Evidence
from privacy.errors import Replay, RoundError, TrustError
from privacy.messages import AGGREGATOR, Audit, Outcome, SegmentVerdict, Signed, SumClaim, decode, encode
from privacy.secure_sum import audits, guardian_sum, slices
from privacy.secure_sum.audits import UNAUDITED
from privacy.transparency import proofs
from silo import auditing
from silo.auditing import Auditor
from silo.folder import FolderTransport
from silo.transport import HttpTransport, vectors_of
from tests.auditing import evidence_of, index_of, verdict
from tests.sharing import ShareRound, build_epoch, share_terms
from tests.terms import contract_bytes
from tests.whole import Clock, PowerCut, Whole, together

SEGMENTS, HIDDEN = 3, 262_144
FOUR = (1, 2, 3, 4)
SLICES = {"audit": "slices"}

pytestmark = pytest.mark.usefixtures("quick_polls", "no_choice")


@pytest.fixture
def no_choice(monkeypatch):
    """Silos look at nothing beyond their duty, unless a test says otherwise."""
    monkeypatch.setattr(slices, "OWN_ODDS", 1 << 62)


# --- Claim, verdicts, audit -------------------------------------------------------------------------------------------------------


class Claims:
    """A certified set of five silos, t_c of which may lie, its vectors of three segments, and the claim of their sum."""

    def __init__(self, *, colluders: int = 1, dropouts: int = 0):
        raw = share_terms(5, 5, dropouts=dropouts, model={"hidden_size": HIDDEN}, privacy={"colluders": colluders}, sum=SLICES)
        self.setup = build_epoch(federation.parse(raw), range(1, 6))
        self.round = ShareRound(self.setup)
        self.accepted, self.context = self.setup.accepted, self.setup.context
        self.frozen = self.round.check_freeze()
        self.certificate = next(filter(self.leaves_work, (hashlib.sha256(bytes([each])).digest() for each in range(99))))
        self.seeds = {silo: made.self_seed for silo, made in self.round.made.items()}
        self.documents = {silo: audits.document_of(made.y, made.header) for silo, made in self.round.made.items()}
        self.total = self.round.expected(self.frozen.headers)

    def leaves_work(self, certificate: bytes) -> bool:
        """Whether every silo leaves a segment to others: the tests below want one that is not its duty."""
        dealt = {"colluders": self.accepted.terms.privacy.colluders, "dimension": self.accepted.terms.dimension}
        silos = tuple(self.frozen.headers)
        return all(len(slices.duties(certificate, silo, silos, **dealt)) < SEGMENTS for silo in silos)

    def fetch(self, silo: int, start: int, size: int) -> bytes | None:
        found = self.documents[silo][start : start + size]
        return found if len(found) == size else None

    def claim(self, total=None, **changes) -> audits.Claimed:
        openings = {silo: slices.hashes(made.y) for silo, made in self.round.made.items()}
        made = audits.claim_of(
            self.total if total is None else total, openings, self.seeds, self.frozen, certificate=self.certificate
        )
        body = encode(msgspec.structs.replace(made, **changes))
        return audits.check_claim(body, self.frozen, certificate=self.certificate, terms=self.accepted.terms)

    def find(self, silo: int, claimed: audits.Claimed) -> SegmentVerdict:
        return audits.find(claimed.duties(silo), claimed, self.fetch, silo=silo)

    def lie(self, silo: int, claimed: audits.Claimed) -> SegmentVerdict:
        """A verdict that calls everything right."""
        return SegmentVerdict(round_ctx=self.frozen.round_ctx, silo=silo, claim=claimed.digest, right=claimed.duties(silo))

    def signed(self, verdict: SegmentVerdict) -> bytes:
        return self.round.signed(verdict.silo, "verdict", verdict)

    def audit(self, claimed: audits.Claimed, *verdicts: SegmentVerdict) -> Audit | None:
        said = {verdict.silo: self.signed(verdict) for verdict in verdicts if verdict.right or verdict.wrong or verdict.withheld}
        return audits.audit_of(said, claimed, accepted=self.accepted, epoch_ctx=self.context)

    def check(self, made: Audit, claimed: audits.Claimed) -> frozenset[int]:
        return audits.check_audit(made, claimed, accepted=self.accepted, epoch_ctx=self.context)

    def outcome(self, claimed: audits.Claimed, **changes) -> Outcome:
        made = Outcome(
            round_ctx=self.frozen.round_ctx, round=1, kind="result", reason="", frozen=self.frozen.digest,
            seeds=claimed.claim.seeds, total=self.total.astype("<u4").tobytes(), vectors=(), next_state=bytes(32),
            pair_keys=claimed.claim.pair_keys,
        )  # fmt: skip
        return msgspec.structs.replace(made, **changes)


@pytest.fixture(scope="module")
def claims():
    return Claims()


@pytest.fixture(scope="module")
def two_liars():
    return Claims(colluders=2)


def bent(total: np.ndarray, segment: int) -> np.ndarray:
    wrong = total.copy()
    wrong[min(total.size - 1, segment * slices.SEGMENT_WORDS + 5)] ^= 1 << 31
    return wrong


def test_every_silo_of_the_set_finds_a_right_sum_right(claims):
    claimed = claims.claim()
    assert claimed.count == SEGMENTS
    assert sorted(itertools.chain.from_iterable(claimed.duties(silo) for silo in claims.frozen.headers)) == [0, 0, 1, 1, 2, 2]
    made = claims.audit(claimed, *(claims.find(silo, claimed) for silo in claims.frozen.headers))
    assert claims.check(made, claimed) == frozenset()
    audits.check_total(claims.outcome(claimed), claimed)
    audits.check_again(range(SEGMENTS), claimed, claims.fetch)


@pytest.mark.parametrize("segment", range(SEGMENTS))
@pytest.mark.parametrize("colluders", [1, 2])
def test_a_wrong_sum_is_never_applied(claims, two_liars, colluders, segment):
    """One word of one segment is wrong, and any t_c silos, its auditors among them, call everything right."""
    at = claims if colluders == 1 else two_liars
    claimed = at.claim(bent(at.total, segment))
    honest = {silo: at.find(silo, claimed) for silo in at.frozen.headers}
    assert {silo for silo, found in honest.items() if audits.complaints(found) == {segment}} == set(claimed.auditors[segment])
    for liars in itertools.combinations(at.frozen.headers, colluders):
        said = [at.lie(silo, claimed) if silo in liars else found for silo, found in honest.items()]
        assert at.audit(claimed, *said) is None
        forced = Audit(
            round_ctx=at.frozen.round_ctx, claim=claimed.digest,
            verdicts=tuple(at.signed(each) for each in said if each.right or each.wrong),
        )  # fmt: skip
        with pytest.raises(TrustError) as caught:
            at.check(forced, claimed)
        assert caught.value.code == "not-audited"
    everybody = [at.lie(silo, claimed) for silo in at.frozen.headers]
    assert at.audit(claimed, *everybody) is not None, "t_c + 1 liars are beyond the guarantee"
    with pytest.raises(TrustError) as caught:
        audits.check_again([segment], claimed, at.fetch)
    assert caught.value.code == "false-sum", "what somebody complains of is summed again by all"


def test_nobody_elses_word_counts(claims):
    claimed = claims.claim()
    found = {silo: claims.find(silo, claimed) for silo in claims.frozen.headers}
    member = claims.accepted.terms.by_id
    for silo in claims.frozen.headers:
        foreign = [segment for segment in range(SEGMENTS) if silo not in claimed.auditors[segment]]
        lie = msgspec.structs.replace(claims.lie(silo, claimed), right=tuple(sorted({*claimed.duties(silo), foreign[0]})))
        with pytest.raises(TrustError) as caught:
            audits.check_verdict(claims.signed(lie), member(silo), claimed, epoch_ctx=claims.context)
        assert caught.value.code == "no-auditor"
    auditor, other = claimed.auditors[0][0], next(silo for silo in claims.frozen.headers if silo not in claimed.auditors[0])
    by_another = claims.round.signed(other, "verdict", found[auditor])
    for silo in (auditor, other):
        with pytest.raises(TrustError):
            audits.check_verdict(by_another, member(silo), claimed, epoch_ctx=claims.context)
    good = claims.audit(claimed, *found.values())
    for verdicts in ((*good.verdicts, good.verdicts[-1]), tuple(reversed(good.verdicts)), good.verdicts[1:]):
        with pytest.raises(TrustError):
            claims.check(msgspec.structs.replace(good, verdicts=verdicts), claimed)


def test_a_silo_outside_the_set_has_no_word():
    at = Claims(dropouts=2)
    inside = guardian_sum.Frozen(
        round_ctx=at.frozen.round_ctx, digest=at.frozen.digest, silos=at.frozen.silos,
        headers={silo: header for silo, header in at.frozen.headers.items() if silo != 5},
    )  # fmt: skip
    claimed = audits.Claimed(claim=at.claim().claim, digest=bytes(32), frozen=inside, spare=1, colluders=1)
    for said in ({"right": (0,)}, {"right": (), "wrong": ((0, bytes(32)),)}, {"right": (), "withheld": ((0, 1),)}):
        lie = SegmentVerdict(round_ctx=at.frozen.round_ctx, silo=5, claim=bytes(32), **said)
        with pytest.raises(TrustError) as caught:
            audits.check_verdict(at.signed(lie), at.accepted.terms.by_id(5), claimed, epoch_ctx=at.context)
        assert caught.value.code == "no-auditor"
    assert [len(picked) for picked in at.claim().auditors] == [4] * SEGMENTS, "t_c + 1, and two that may fall silent"


def test_bound_to_one_claim(claims):
    claimed, wrong = claims.claim(), claims.claim(bent(claims.total, 1))
    member = claims.accepted.terms.by_id
    verdicts = [claims.find(silo, claimed) for silo in claims.frozen.headers]
    good = claims.audit(claimed, *verdicts)
    for said in (each for each in verdicts if each.right):
        for changes in ({"round_ctx": b"r" * 32}, {"claim": wrong.digest}):
            moved = claims.signed(msgspec.structs.replace(said, **changes))
            with pytest.raises(TrustError, match="the verdict of silo"):
                audits.check_verdict(moved, member(said.silo), claimed, epoch_ctx=claims.context)
        with pytest.raises(TrustError):
            audits.check_verdict(claims.signed(said), member(said.silo), claimed, epoch_ctx=b"e" * 32)
    with pytest.raises(TrustError, match="claim"):
        claims.check(good, wrong)
    with pytest.raises(TrustError, match="round"):
        claims.check(msgspec.structs.replace(good, round_ctx=b"r" * 32), claimed)
    with pytest.raises(TrustError, match="the audit is for claim"):
        claims.check(msgspec.structs.replace(good, claim=wrong.digest), claimed)
    true = claims.outcome(claimed)
    (silo, _), *rest = true.seeds
    for changes in (
        {"total": bent(claims.total, 2).astype("<u4").tobytes()}, {"total": true.total[:-4]}, {"total": true.total + b"x"},
        {"total": b""}, {"frozen": b"f" * 32}, {"seeds": ((silo, bytes(32)), *rest)}, {"vectors": ((1, b"1234"),)},
        {"pair_keys": ((1, 2, bytes(32)),)},
    ):  # fmt: skip
        with pytest.raises(TrustError) as caught:
            audits.check_total(msgspec.structs.replace(true, **changes), claimed)
        assert caught.value.code == "claim-changed"


def test_a_claim_is_held_to_the_set(claims):
    good = claims.claim().claim
    opening = good.openings[0][1]
    for changes in (
        {"round_ctx": bytes(32)}, {"frozen": bytes(32)}, {"certificate": bytes(32)}, {"segments": good.segments[1:]},
        {"openings": good.openings[1:]}, {"openings": ((1, opening[::-1]), *good.openings[1:])}, {"seeds": good.seeds[1:]},
        {"openings": ((1, opening[:-1]), *good.openings[1:])}, {"seeds": ((1, bytes(32)), *good.seeds[1:])},
        {"pair_keys": ((1, 2, bytes(32)),)},
    ):  # fmt: skip
        with pytest.raises(TrustError):
            claims.claim(**changes)


def test_a_claim_is_held_to_each_segment_of_the_vectors(claims):
    """Hashes of a higher row of the tree lead to the same root, and would bind the silo to other pieces than its header does."""
    good = claims.claim().claim
    silo, (first, second, third) = good.openings[0]
    higher = (proofs.node_hash(first, second), third)
    assert proofs.root_of_hashes(higher) == claims.frozen.headers[silo].root
    with pytest.raises(TrustError, match=f"the openings of silo {silo}"):
        claims.claim(openings=((silo, higher), *good.openings[1:]))


def test_a_claim_shows_the_keys_of_the_pairs_with_a_missing_silo():
    at = Claims(dropouts=2)
    headers = {silo: header for silo, header in at.frozen.headers.items() if silo != 5}
    at.frozen = guardian_sum.Frozen(round_ctx=at.frozen.round_ctx, digest=at.frozen.digest, silos=at.frozen.silos, headers=headers)
    at.seeds = {silo: at.seeds[silo] for silo in headers}
    openings = tuple((silo, slices.hashes(at.round.made[silo].y)) for silo in headers)
    keys = tuple((silo, 5, at.round.made[silo].pair_keys[5]) for silo in headers)
    assert at.claim(openings=openings, pair_keys=keys).spare == 1
    wrong = (*keys[:-1], (4, 5, bytes(32)))
    for shown, match in (((), "keys of 0 pairs"), (keys[1:], "keys of 3 pairs"), (keys[::-1], "keys of 4"), (wrong, "4")):
        with pytest.raises(TrustError, match=match):
            at.claim(openings=openings, pair_keys=shown)


def test_a_verdict_of_a_stranger_is_refused_in_an_audit(claims):
    claimed = claims.claim()
    good = claims.audit(claimed, *(claims.find(silo, claimed) for silo in claims.frozen.headers))
    stranger = decode(good.verdicts[-1], Signed)
    raw = encode(msgspec.structs.replace(stranger, sender=77))
    with pytest.raises(TrustError, match=r"verdicts of .*77"):
        claims.check(msgspec.structs.replace(good, verdicts=(*good.verdicts, raw)), claimed)


def test_a_segment_that_is_withheld_is_not_right(claims):
    claimed = claims.claim()
    segment = 1
    auditor = claimed.auditors[segment][0]
    header = claims.frozen.headers[3]
    start, size = audits.place_of(segment, header)
    for lost in ("gone", "cut", "bent", "another's", "too long"):

        def fetch(silo, at, many, lost=lost):
            raw = claims.fetch(silo, at, many)
            if (silo, at) != (3, start):
                return raw
            other = claims.fetch(2, at, many)
            return {"gone": None, "cut": raw[:-4], "bent": b"\1" + raw[1:], "another's": other, "too long": raw + b"1234"}[lost]

        found = audits.find(claimed.duties(auditor), claimed, fetch, silo=auditor)
        assert found.withheld == ((segment, 3),), lost
        assert segment not in found.right
        others = [claims.find(silo, claimed) for silo in claims.frozen.headers if silo != auditor]
        assert claims.audit(claimed, found, *others) is None
        with pytest.raises(TrustError) as caught:
            audits.check_again([segment], claimed, fetch)
        assert caught.value.code == "withheld"
    assert size == slices.SEGMENT_BYTES


def test_verdicts_out_of_order_or_of_nothing_are_refused(claims):
    claimed = claims.claim()
    silo = claimed.auditors[0][0]
    lie = claims.lie(silo, claimed)
    h = bytes(32)
    for changes in (
        {"right": ()}, {"right": (), "wrong": ((SEGMENTS, h),)}, {"right": (), "wrong": ((1, h), (0, h))}, {"wrong": ((0, h),)},
        {"right": (0, 0)}, {"right": (), "withheld": ((0, 9),)}, {"right": (), "wrong": ((1, h),), "withheld": ((1, 1),)},
    ):  # fmt: skip
        raw = claims.signed(msgspec.structs.replace(lie, **changes))
        with pytest.raises(TrustError):
            audits.check_verdict(raw, claims.accepted.terms.by_id(silo), claimed, epoch_ctx=claims.context)


def test_silos_that_fall_silent_are_made_up_for_by_as_many_spares():
    at = Claims(dropouts=2)
    claimed = at.claim()
    found = {silo: at.find(silo, claimed) for silo in at.frozen.headers}
    for silent in itertools.combinations(found, 2):
        assert at.audit(claimed, *(each for silo, each in found.items() if silo not in silent)) is not None
    assert at.audit(claimed, found[1]) is None


def test_the_contract_says_who_sums_again():
    def sliced(silos, **changes):
        return federation.parse(contract_bytes(silos, privacy={"lattice_bits": 16}, **changes)).terms.sliced

    assert [sliced(n) for n in (3, 10, 11, 40)] == [False, False, True, True]
    assert [sliced(n, sum={"audit": "auto"}) for n in (10, 11)] == [False, True]
    assert sliced(3, sum=SLICES)
    assert not sliced(40, sum={"audit": "whole"})
    with pytest.raises(Exception, match="audit"):
        sliced(3, sum={"audit": "none"})


# --- What one auditor does --------------------------------------------------------------------------------------------------------


def auditor(claims, silo, folder, **options):
    for name in ("epoch", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    usual = {"fetch": claims.fetch, "over": lambda: True, "sign": claims.signed, "random": lambda size: b"\1" * size}
    return Auditor(silo=silo, number=1, folder=folder / "epoch", evidence=folder / "log", **{**usual, **options})


def test_a_silo_fetches_its_segments_only(claims, tmp_path):
    """Of n·4d bytes, what t_c + 1 of n auditors of a segment need: about (t_c + 1)/n of it a silo, and its own random choice."""
    fetched = dict.fromkeys(claims.frozen.headers, 0)
    claimed = claims.claim()
    for silo in fetched:

        def fetch(of, start, size, silo=silo):
            fetched[silo] += size
            return claims.fetch(of, start, size)

        auditor(claims, silo, tmp_path / str(silo), fetch=fetch).verdict(b"", claimed)
    n, d = len(fetched), claims.accepted.terms.dimension
    assert sum(fetched.values()) == 2 * n * 4 * d, "each segment of each vector twice, t_c + 1, where every silo would fetch all"
    assert max(fetched.values()) < n * 4 * d
    sizes = [slices.SEGMENT_BYTES * n] * 2 + [4 * (d - 2 * slices.SEGMENT_WORDS) * n]
    for silo, size in fetched.items():
        assert size == sum(sizes[segment] for segment in claimed.duties(silo))
    more = auditor(claims, 1, tmp_path / "curious", random=bytes)  # zeros: it chooses everything
    assert set(more.verdict(b"", claimed) and claimed.duties(1)) == set(decode_verdict(more).right), "its own choice gives no word"


def decode_verdict(made: Auditor) -> SegmentVerdict:
    return decode(decode((made.folder / "verdict").read_bytes(), Signed).body, SegmentVerdict)


def test_a_verdict_is_written_down_before_it_leaves_and_stays_the_same(claims, tmp_path):
    claimed, silo = claims.claim(), claims.claim().auditors[0][0]
    first = auditor(claims, silo, tmp_path).verdict(b"", claimed)

    def never(*_):
        raise AssertionError("nothing is fetched or signed again")

    assert auditor(claims, silo, tmp_path, fetch=never, sign=never).verdict(b"", claimed) == first
    assert auditing.complained(tmp_path / "epoch", claimed.claim.round_ctx) == frozenset()
    assert auditing.kept(tmp_path / "epoch", b"another round" + bytes(19)) is None
    assert list((tmp_path / "log").iterdir()) == []


def test_a_wrong_claim_leaves_its_proof(claims, tmp_path):
    claimed = claims.claim(bent(claims.total, 0))
    silo = claimed.auditors[0][0]
    signed = auditor(claims, silo, tmp_path).verdict(b"the signed claim", claimed)
    found = {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    assert set(found) == {"claim-1", "verdict-1", "segment-1-0"}
    assert (found["claim-1"], found["verdict-1"]) == (b"the signed claim", signed)
    pieces = np.frombuffer(found["segment-1-0"], dtype="<u4").reshape(5, -1)
    by_silo = dict(zip(claims.frozen.headers, pieces, strict=True))
    ((segment, stated),) = decode_verdict(auditor(claims, silo, tmp_path)).wrong
    assert (segment, stated) == (0, audits.hash_of_sum(0, by_silo, claimed))
    assert stated == slices.hashes(claims.total)[0]
    assert auditing.complained(tmp_path / "epoch", claimed.claim.round_ctx) == {0}


def test_a_piece_that_comes_late_is_waited_for(claims, tmp_path, monkeypatch):
    monkeypatch.setattr(auditing, "_PAUSE_S", 0.0)
    claimed, silo = claims.claim(), claims.claim().auditors[0][0]
    asked = [0]

    def fetch(of, start, size):
        asked[0] += 1
        return claims.fetch(of, start, size) if asked[0] > 4 else None

    made = auditor(claims, silo, tmp_path, fetch=fetch, over=lambda: False)
    made.verdict(b"", claimed)
    assert decode_verdict(made) == claims.find(silo, claimed)


# --- Whole federations ------------------------------------------------------------------------------------------------------------


def stored(at: Whole, kind: str, number: int, kind_of, party: int = AGGREGATOR):
    return decode(decode(at.store.get(kind, number, party), Signed).body, kind_of)


def verified(at: Whole, to: Path, **options) -> whole.Verdict:
    return verdict(evidence_of(at, to), index_of(at), log=True, **options)


def test_a_round_is_audited_applied_and_verified(in_slices, tmp_path):
    settled, closed = in_slices.run(2)
    assert [(c.kind, c.reason) for c in closed] == [("result", "")]
    assert {settled[s][-1].state.digest for s in FOUR} == {closed[0].state}
    outcome, made = stored(in_slices, "outcome", 2, Outcome), stored(in_slices, "audit", 2, Audit)
    assert outcome.vectors == ()
    assert len(made.verdicts) == 2
    slots = [(kind, 2, party) for kind in ("vector", "claim", "verdict", "audit") for party in in_slices.store.parties(kind, 2)]
    assert {slot[0] for slot in slots if in_slices.store.entry(*slot).leaf is None} == {"vector"}
    found = verified(in_slices, tmp_path / "copy", pinned=[in_slices.accepted.digest.hex()])
    assert (found.failed, found.open, found.recomputed) == ((), (), (1, 2))
    placed = placing.by_content(tmp_path / "copy" / "evidence")
    assert set(slots) <= set(placed.entries)
    assert placed.spare == placed.broken == {}


def test_verification_without_the_vectors_relies_on_the_verdicts_and_finds_what_is_amiss(in_slices, tmp_path):
    in_slices.run(2)
    folder, index = evidence_of(in_slices, tmp_path / "copy"), index_of(in_slices)
    bare = [entry for entry in index if (entry.slot.kind, entry.slot.number) != ("vector", 2)]
    pinned = [in_slices.accepted.digest.hex()]
    found = whole.audit(Evidence.indexed(folder, bare), pinned=pinned)
    assert (found.failed, found.recomputed, found.relied) == ((), (1,), (2,))
    gone = next(entry.name for entry in index if (entry.slot.kind, entry.slot.number) == ("vector", 2))
    (folder / gone).rename(folder / f"{gone}.remnant")
    found = verdict(folder, index, log=True, pinned=pinned)
    assert (found.failed, found.open, found.recomputed, found.relied) == ((), (), (1,), (2,)), "deleted on purpose"
    for kind in ("audit", "claim", "verdict"):
        less = [entry for entry in bare if (entry.slot.kind, entry.slot.number) != (kind, 2)]
        found = whole.audit(Evidence.indexed(folder, less), pinned=pinned)
        assert {check.kind for check in found.failed} == {kind}
        assert 2 not in found.relied or kind == "verdict", "the audit holds copies of the verdicts"


@contextlib.contextmanager
def lying(monkeypatch, number: int = 2):
    """An aggregator that adds one to a word of the sum of this round."""
    true = guardian_sum.unmask

    def unmask(vectors, seeds, certified, pair_keys=None):
        total = true(vectors, seeds, certified, pair_keys)
        total[3] += 1
        return total

    with monkeypatch.context() as patch:
        patch.setattr(consent.guardian_sum, "unmask", unmask)
        yield patch


def test_a_wrong_sum_is_caught_moves_nothing_and_leaves_evidence(in_slices, monkeypatch, tmp_path):
    before = in_slices.progress(1).state.digest
    with lying(monkeypatch):
        settled, closed = in_slices.run(2)
    assert [(c.kind, c.reason) for c in closed] == [("result", UNAUDITED)]
    assert {(settled[s][-1].kind, settled[s][-1].reason) for s in FOUR} == {("rejected", UNAUDITED)}
    assert {in_slices.progress(s).state.digest for s in FOUR} == {before} == {closed[0].state}
    assert {in_slices.progress(s).voids for s in FOUR} == {1}
    said = {silo: stored(in_slices, "verdict", 2, SegmentVerdict, silo) for silo in in_slices.store.parties("verdict", 2)}
    assert len(said) == 2
    assert all(verdict.wrong and not verdict.right for verdict in said.values())
    for silo in said:
        assert (in_slices.root / f"silo-{silo}" / "log" / "segment-2-0").is_file()
    assert in_slices.store.get("audit", 2, AGGREGATOR) is None
    found = verified(in_slices, tmp_path / "copy", pinned=[in_slices.accepted.digest.hex()])
    assert {(check.kind, check.what) for check in found.failed} == {("outcome", "sum")}, "the evidence says that the sum is false"
    settled, closed = in_slices.run(3)
    assert closed[-1].reason == ""
    assert {in_slices.progress(s).state.digest for s in FOUR} == {closed[-1].state}
    assert {in_slices.progress(s).voids for s in FOUR} == {0}


def without_audit(patch) -> None:
    audited = hub_audits.audited
    patch.setattr(hub_audits, "_audit_of", lambda *_: None)
    patch.setattr(hub_audits, "audited", lambda *rest: audited(*rest) and "")


def with_another_sum(patch) -> None:
    result = rounds.result

    def switched(accepted, opened, state, certified, total, *rest, **options):
        return result(accepted, opened, state, certified, total + np.uint32(1), *rest, **options)

    patch.setattr(rounds, "result", switched)


@pytest.mark.parametrize(("forge", "code"), [(without_audit, "no-audit"), (with_another_sum, "claim-changed")])
def test_no_silo_applies_what_was_not_audited(in_slices, monkeypatch, forge, code):
    before = in_slices.progress(1).state.digest
    forge(monkeypatch)
    with pytest.raises(TrustError) as caught:
        in_slices.run(2)
    assert caught.value.code == code
    assert {in_slices.progress(s).state.digest for s in FOUR} == {before}


def test_an_auditor_whose_verdict_is_swallowed_applies_nothing(in_slices, monkeypatch):
    """Its word is left out, and t_c + 1 others lie for the aggregator: it looks again itself."""
    before = in_slices.progress(1).state.digest
    find = audits.find

    def lie(segments, claimed, fetch, *, silo):
        honest = find(segments, claimed, fetch, silo=silo)
        if silo == 4:
            return honest
        return msgspec.structs.replace(honest, right=claimed.duties(silo), wrong=())

    monkeypatch.setattr(audits, "find", lie)
    monkeypatch.setattr(slices, "OWN_ODDS", 1)
    line = in_slices.line()
    put = line.put
    line.put = lambda kind, *rest: None if kind == "verdict" else put(kind, *rest)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (1, 2))
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in (1, 2, 3)]
    with lying(monkeypatch), pytest.raises(TrustError) as caught:
        together(*jobs, functools.partial(in_slices.take_part, 4, 2, line=line), functools.partial(in_slices.coordinate, 2))
    assert caught.value.code == "false-sum"
    assert in_slices.progress(4).state.digest == before
    assert (in_slices.root / "silo-4" / "log" / "segment-2-0").is_file()


def test_a_withheld_segment_rejects_the_round(in_slices):
    """One silo's piece does not reach its auditors: they say so, nothing moves, and the next round goes on."""
    before = in_slices.progress(1).state.digest
    lines = {silo: in_slices.line() for silo in FOUR}
    for line in lines.values():
        line.alter = lambda slot, data: None if slot[:4] == ("part", "vector", 2, 3) else data

    clock = Clock()

    def hurried():
        """Let the silos' time go by, not the aggregator's, until both auditors have waited long enough."""
        in_slices.wait_for("claim", 2, AGGREGATOR)
        for _ in range(6):
            clock.skip(31.0)
            with in_slices.bell:
                if in_slices.bell.wait_for(lambda: len(in_slices.store.parties("verdict", 2)) == 2, 3.0):
                    return

    def lives(silo):
        in_slices.take_part(silo, 2, line=lines[silo], clock=clock)

    *_, closed = together(*(functools.partial(lives, silo) for silo in FOUR), hurried, functools.partial(in_slices.coordinate, 2))
    assert [(c.kind, c.reason) for c in closed] == [("result", UNAUDITED)]
    assert {in_slices.progress(s).state.digest for s in FOUR} == {before}
    said = [stored(in_slices, "verdict", 2, SegmentVerdict, silo) for silo in in_slices.store.parties("verdict", 2)]
    assert [verdict.withheld for verdict in said] == [((0, 3),)] * 2
    _, closed = in_slices.run(3)
    assert closed[-1].reason == ""


def test_verdicts_of_others_or_of_another_round_are_not_admitted(in_slices):
    in_slices.run(2)
    old = {silo: in_slices.store.get("verdict", 2, silo) for silo in in_slices.store.parties("verdict", 2)}
    assert old
    tried = []
    line = in_slices.line()
    put = line.put

    def spoil(kind, number, party, data):
        if (kind, number) == ("verdict", 3):
            for raw in old.values():
                with pytest.raises(TrustError) as caught:
                    put(kind, number, party, raw)
                tried.append(caught.value)
        put(kind, number, party, data)

    line.put = spoil
    lines = dict.fromkeys(FOUR, line)
    jobs = [functools.partial(in_slices.take_part, s, 3, line=lines[s]) for s in FOUR]
    together(*jobs, functools.partial(in_slices.coordinate, 3))
    assert len(tried) == 4
    claim = stored(in_slices, "claim", 3, SumClaim)
    with pytest.raises((Replay, RoundError)):
        in_slices.board.put("verdict", 3, min(set(FOUR) - set(in_slices.store.parties("verdict", 3))), old[min(old)])
    assert claim.segments


@pytest.mark.parametrize("after", [False, True])
def test_an_auditor_that_is_killed_says_the_same_again(in_slices, after):
    certain = {}

    def falls(silo):
        line = in_slices.dying("verdict", 2, after=after)
        try:
            certain[silo] = in_slices.take_part(silo, 2, line=line)
        except PowerCut:
            path = next((in_slices.root / f"silo-{silo}").glob("epoch/*/verdict"))
            certain[silo] = path.read_bytes()
            in_slices.take_part(silo, 2)

    *_, closed = together(*(functools.partial(falls, silo) for silo in FOUR), functools.partial(in_slices.coordinate, 2))
    assert [(c.kind, c.reason) for c in closed] == [("result", "")]
    for silo in in_slices.store.parties("verdict", 2):
        assert in_slices.store.get("verdict", 2, silo) == certain[silo]
    assert len(in_slices.store.parties("verdict", 2)) == 2
    assert not list(in_slices.root.glob("silo-*/epoch/*/verdict")), "a settled round leaves none"


DEATHS = [("vector", True), ("claim", False), ("claim", True), ("audit", True), ("outcome", False)]


@pytest.mark.parametrize(("kind", "after"), DEATHS)
def test_an_aggregator_that_is_killed_goes_on_to_the_same_end(in_slices, kind, after):
    put_once = in_slices.store.put_once

    def mortal(asked, number, party, data, *, received_at):
        falls = (asked, number) == (kind, 2)
        if falls and not after:
            in_slices.power.cut()
        done = put_once(asked, number, party, data, received_at=received_at)
        if falls:
            in_slices.power.cut()
        return done

    in_slices.store.put_once = mortal
    with pytest.raises(PowerCut):
        in_slices.run(2)
    before = {slot: data for slot, data in in_slices.store.log if slot[1] == 2}
    again = in_slices.restarted()
    again.run(2)
    outcome = stored(again, "outcome", 2, Outcome)
    assert (outcome.kind, outcome.reason) == ("result", "")
    assert {again.progress(s).state.digest for s in FOUR} == {outcome.next_state}
    for slot, data in before.items():
        assert again.store.get(*slot) == data


def test_a_silo_that_falls_after_its_upload_is_made_up_for(tmp_path):
    """Share mode: the silo that is gone may be an auditor; a spare one's word counts in its place."""
    terms = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1, **SLICES}
    at = Whole.create(tmp_path / "federation", silos=FOUR, sum=terms)

    def falls(silo):
        with contextlib.suppress(PowerCut):  # unless the certificate did not pick it
            at.take_part(silo, 1, line=at.dying("verdict", 1))

    jobs = [functools.partial(at.take_part, silo, 1) for silo in (1, 2, 4)]
    closed = at.run_hurried(1, functools.partial(falls, 3), *jobs)
    assert [(c.kind, c.reason) for c in closed] == [("result", "")]
    at.take_part(3, 1)
    assert {at.progress(s).state.digest for s in FOUR} == {closed[-1].state}
    assert verified(at, tmp_path / "copy", pinned=[at.accepted.digest.hex()]).failed == ()


# --- Bytes, HTTP, folder ----------------------------------------------------------------------------------------------------------


def counted(line, seen: list[int]):
    """The line, with every byte that a silo receives counted."""
    alter = line.alter
    line.alter = lambda slot, data: (seen.append(len(data or b"")), alter(slot, data))[1]
    return line


def test_received_bytes_shrink_to_the_share_of_the_auditors(tmp_path):
    """Four silos, t_c = 1: of the n·4d bytes of all vectors, which each received before, it receives (t_c + 1)/n, and the sum."""
    at = Whole.create(tmp_path / "federation", silos=FOUR, model={"hidden_size": HIDDEN // 2}, sum=SLICES)
    seen = {silo: [] for silo in FOUR}
    jobs = [functools.partial(at.take_part, silo, 1, line=counted(at.line(), seen[silo])) for silo in FOUR]
    *_, closed = together(*jobs, functools.partial(at.coordinate, 1))
    assert closed[0].reason == ""
    d, small = at.accepted.terms.dimension, 150_000  # protocol messages
    everything, received = 4 * 4 * d, [sum(sizes) for sizes in seen.values()]
    assert everything / 2 + 4 * d < sum(received) / 4 < everything / 2 + 4 * d + small
    assert min(received) < 4 * d + 4096 * 4 + small, "whom the certificate picked for the small segment, or none, has the sum alone"


@contextlib.contextmanager
def served(at: Whole):
    """The federation's board over HTTP."""
    listener = service.listen("127.0.0.1", 0)
    server = service.server(service.create_app(at.board, at.home.log_folder))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def test_over_http_only_the_bytes_asked_for_are_sent(in_slices):
    with served(in_slices) as url:
        lines = {silo: HttpTransport(url) for silo in FOUR}
        jobs = [functools.partial(in_slices.take_part, silo, 2, line=lines[silo]) for silo in FOUR]
        *_, closed = together(*jobs, functools.partial(in_slices.coordinate, 2))
        assert [(c.kind, c.reason) for c in closed] == [("result", "")]
        line, document = lines[1], in_slices.store.get("vector", 2, 3)
        for start, size in ((0, 1), (5, 40), (len(document) - 4, 4), (0, len(document))):
            assert line.part("vector", 2, 3, start, size, wait_s=0) == document[start : start + size]
        assert vectors_of(line, 2)(3, 5, 40) == document[5:45]
        assert line.part("vector", 2, 3, len(document) - 3, 4, wait_s=0) is None
        assert line.part("vector", 2, 9, 0, 4, wait_s=0) is None
        assert line.part("outcome", 2, 0, 0, 4, wait_s=0) is None, "documents come whole, and are held to their signatures"
        for text in ("bytes=0-", "bytes=-5", "bytes=3-1", "bytes=0-1,3-4", "bytes=００-1", "items=0-1", f"bytes=0-{1 << 25}"):
            answer = line._client.get(f"{url}/v1/vector/2/3", headers={"range": text.encode()})
            assert answer.status_code == 416
            assert answer.json()["code"] == "range"
        for each in lines.values():
            each.close()


def test_over_a_folder_too(in_slices, tmp_path):
    root, stop = tmp_path / "exchange", threading.Event()
    mailbox = Mailbox(root, home=in_slices.home, store=in_slices.store, board=in_slices.board)
    mailbox.once()

    def carry():
        while not stop.wait(0.02):
            mailbox.once()

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        lines = {silo: FolderTransport(root) for silo in FOUR}
        got = []
        for line in lines.values():
            get = line.get
            line.get = lambda kind, *rest, get=get, **more: (got.append(kind), get(kind, *rest, **more))[1]
        jobs = [functools.partial(in_slices.take_part, silo, 2, line=lines[silo]) for silo in FOUR]
        *_, closed = together(*jobs, functools.partial(in_slices.coordinate, 2))
    finally:
        stop.set()
        thread.join(10)
    assert [(c.kind, c.reason) for c in closed] == [("result", "")]
    assert "vector" not in got
    line, document = lines[2], in_slices.store.get("vector", 2, 3)
    path = next(root.glob("board/*/*-vector-2-3-*"))
    assert line.part("vector", 2, 3, 7, 20, wait_s=0) == document[7:27]
    assert line.part("vector", 2, 3, len(document) - 3, 4, wait_s=0) is None
    assert line.part("vector", 2, 9, 0, 4, wait_s=0) is None
    path.write_bytes(document[:-5])
    assert line.part("vector", 2, 3, len(document) - 4, 4, wait_s=0) is None, "half copied: not there yet"
    assert line.part("vector", 2, 3, 7, 20, wait_s=0) == document[7:27]
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(document)
    assert line.part("vector", 2, 3, 7, 20, wait_s=0) is None, "no link is followed"
    path.unlink()
    os.mkfifo(path)
    assert line.part("vector", 2, 3, 7, 20, wait_s=0) is None


def test_the_table_is_made_again_from_the_evidence(in_slices):
    in_slices.run(2)
    in_slices.close()
    before = hub_verify.rows_of(in_slices.home)
    for path in in_slices.home.root.glob("*.sqlite*"):
        path.unlink()
    assert hub_verify.reindex(in_slices.home.root)["missing"] == []
    rows = {row[:4] for row in hub_verify.rows_of(in_slices.home)}
    assert rows == {row[:4] for row in before}
