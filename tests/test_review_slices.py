# SPDX-License-Identifier: Apache-2.0
"""What a hostile review of slice audits and long polls found: each test failed once, before the code below it was mended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import threading
import time

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa

from aggregator.refused import Line
from aggregator.store import Store
from aggregator.waiting import Waiting
from privacy import envelope, federation
from privacy.errors import MachineError, TrustError
from privacy.messages import AGGREGATOR, Certificate, Signed, SumClaim, decode, encode
from privacy.secure_sum import audits, slices
from silo import auditing
from silo.session import Epoch
from silo.witness import Witness
from tests.sharing import HUB, ShareRound, build_epoch, share_terms
from tests.test_slice_rounds import FOUR, HIDDEN, SLICES, Claims, auditor, bent, decode_verdict, lying
from tests.whole import PATIENCE_S, together

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def claims():
    return Claims()


def after_the_outcome(alter):
    """Shows a silo the claim of round 2 only once it saw the outcome."""
    seen = []

    def altered(slot, data):
        if slot[:2] == ("outcome", 2) and data is not None:
            seen.append(slot)
        return None if slot[:2] == ("claim", 2) and not seen else alter(slot, data)

    return altered


# --- A silo's own choice ----------------------------------------------------------------------------------------------------------


def test_a_claim_that_comes_with_its_outcome_does_not_take_a_silos_own_look_away(in_slices, monkeypatch):
    """t_c + 1 liars and the aggregator show the claim only after the outcome: the honest silo looks before it applies."""
    before, find = in_slices.progress(4).state.digest, audits.find

    def lie(segments, claimed, fetch, *, silo, **options):
        honest = find(segments, claimed, fetch, silo=silo, **options)
        return honest if silo == 4 else msgspec.structs.replace(honest, right=claimed.duties(silo), wrong=())

    monkeypatch.setattr(audits, "find", lie)
    monkeypatch.setattr(slices, "OWN_ODDS", 1)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (1, 2))
    line = in_slices.line()
    line.alter = after_the_outcome(lambda slot, data: data)
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in (1, 2, 3)]
    with lying(monkeypatch), pytest.raises(TrustError) as caught:
        together(*jobs, functools.partial(in_slices.take_part, 4, 2, line=line), functools.partial(in_slices.coordinate, 2))
    assert caught.value.code == "false-sum"
    assert in_slices.progress(4).state.digest == before


def test_a_silo_that_was_shown_a_true_claim_looks_at_the_one_that_the_outcome_is_of(in_slices, monkeypatch):
    """t_c + 1 liars and the aggregator show the honest silo the true claim while it audits, and theirs when it applies."""
    before, find, claim_of, totals, shown = in_slices.progress(4).state.digest, audits.find, audits.claim_of, [], []

    def lie(segments, claimed, fetch, *, silo, **options):
        honest = find(segments, claimed, fetch, silo=silo, **options)
        return honest if silo == 4 else msgspec.structs.replace(honest, right=claimed.duties(silo), wrong=())

    def claims_of(total, *rest, **options):
        totals.append(total.copy())
        return claim_of(total, *rest, **options)

    def two_faced(slot, data):
        if slot[:2] == ("outcome", 2) and data is not None:
            shown.append(slot)
        if slot[:2] != ("claim", 2) or data is None or shown:
            return data
        true, signed = totals[-1].copy(), decode(data, Signed)
        true[3] -= 1
        body = encode(msgspec.structs.replace(decode(signed.body, SumClaim), segments=slices.hashes(true)))
        return envelope.sign(in_slices.identity, type="claim", context=signed.context, sender=AGGREGATOR, body=body)

    monkeypatch.setattr(audits, "find", lie)
    monkeypatch.setattr(audits, "claim_of", claims_of)
    monkeypatch.setattr(slices, "OWN_ODDS", 1)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (1, 2))
    line = in_slices.line()
    line.alter = two_faced
    looked, true_verdict = threading.Event(), auditing.Auditor.verdict

    def verdict(self, document, claimed):
        if self.silo != 4:
            assert looked.wait(PATIENCE_S)
            return true_verdict(self, document, claimed)
        made = true_verdict(self, document, claimed)
        looked.set()
        return made

    monkeypatch.setattr(auditing.Auditor, "verdict", verdict)
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in (1, 2, 3)]
    with lying(monkeypatch), pytest.raises(TrustError) as caught:
        together(*jobs, functools.partial(in_slices.take_part, 4, 2, line=line), functools.partial(in_slices.coordinate, 2))
    assert looked.is_set()
    assert caught.value.code == "false-sum"
    assert in_slices.progress(4).state.digest == before


def test_a_piece_that_is_copied_after_the_outcome_is_waited_for(in_slices, monkeypatch):
    """In a folder nothing says that the vectors are whole when the outcome is: the silo that looks again waits for them."""
    monkeypatch.setattr(slices, "OWN_ODDS", 1)
    line, late = in_slices.line(), [3]

    def altered(slot, data):
        if slot[:3] == ("part", "vector", 2) and late[0]:
            late[0] -= 1
            return bytes(len(data))
        return data

    line.alter = after_the_outcome(altered)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (1, 2))
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in (1, 2, 3)]
    together(*jobs, functools.partial(in_slices.take_part, 4, 2, line=line), functools.partial(in_slices.coordinate, 2))
    assert late == [0]
    assert len({in_slices.progress(silo).state.digest for silo in FOUR}) == 1


def test_a_silo_that_is_stopped_by_a_failing_answer_looks_at_the_same_segments_again(in_slices, monkeypatch):
    """Whoever sees what is fetched and lets it fail must not get another toss of the coin."""
    monkeypatch.setattr(slices, "OWN_ODDS", 2)
    secret, ctx = os.urandom(32), os.urandom(32)
    chosen = [auditing.chosen(auditing.coin(secret, ctx), 4096 * slices.SEGMENT_WORDS) for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert 1700 < len(chosen[0]) < 2400, "2048 are expected; a binomial leaves this with probability below 1e-6"
    for other in (auditing.coin(os.urandom(32), ctx), auditing.coin(secret, os.urandom(32))):
        assert auditing.chosen(other, 4096 * slices.SEGMENT_WORDS) != chosen[0]
    looked: dict[int, list[bytes]] = {silo: [] for silo in FOUR}
    true, twice = auditing.Auditor.verdict, threading.Event()

    def falls(self, document, claimed):
        looked[self.silo].append(b"".join(self.random(8) for _ in range(8)))
        if self.silo == 1:
            if len(looked[1]) == 2:
                twice.set()
            raise MachineError("the answer failed", hint="", code="unreachable")
        assert twice.wait(PATIENCE_S)
        return true(self, document, claimed)

    def again():
        for _ in range(2):
            with pytest.raises(MachineError):
                in_slices.take_part(1, 2)
        in_slices.wait_for("outcome", 2, AGGREGATOR)
        return in_slices.take_part(1, 2)

    monkeypatch.setattr(auditing.Auditor, "verdict", falls)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (2, 3))
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in (2, 3, 4)]
    together(again, *jobs, functools.partial(in_slices.coordinate, 2))
    assert len(looked[1]) == 2
    assert looked[1][0] == looked[1][1]
    assert len({tosses[0] for tosses in looked.values()}) == len(FOUR), "no two silos toss alike"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_spare_auditor_that_comes_after_the_outcome_has_no_line_in_the_log_unless_it_complains(in_slices, monkeypatch, wrong):
    """That others were faster is no fault of its own: only a complaint is worth a leaf."""
    true, find = auditing.Auditor.verdict, audits.find

    def late(self, document, claimed):
        if self.silo == 4:
            in_slices.wait_for("outcome", 2, AGGREGATOR)
        return true(self, document, claimed)

    def lie(segments, claimed, fetch, *, silo, **options):
        honest = find(segments, claimed, fetch, silo=silo, **options)
        return honest if silo == 4 else msgspec.structs.replace(honest, right=claimed.duties(silo), wrong=())

    monkeypatch.setattr(auditing.Auditor, "verdict", late)
    monkeypatch.setattr(slices, "auditors", lambda *_, **__: (1, 2, 4))
    jobs = [functools.partial(in_slices.take_part, silo, 2) for silo in FOUR]
    if not wrong:
        together(*jobs, functools.partial(in_slices.coordinate, 2))
    else:
        monkeypatch.setattr(audits, "find", lie)
        with lying(monkeypatch), pytest.raises(TrustError, match="is not the sum"):
            together(*jobs, functools.partial(in_slices.coordinate, 2))
    lines = [(line.kind, line.number, line.party) for line in in_slices.store.refused.due(0)]
    assert lines == ([("verdict", 2, 4)] if wrong else [])


# --- Evidence ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["withheld", "fails"])
def test_the_pieces_of_a_wrong_segment_are_kept_as_they_were_found(claims, tmp_path, second):
    """An aggregator that shows each piece once cannot take the proof away, nor keep the verdict from being written."""
    claimed = claims.claim(bent(claims.total, 0))
    silo = claimed.auditors[0][0]
    asked = set()

    def once(of, start, size):
        if (of, start) in asked:
            if second == "fails":
                raise MachineError("nobody answers", hint="", code="unreachable")
            return None
        asked.add((of, start))
        return claims.fetch(of, start, size)

    auditor(claims, silo, tmp_path, fetch=once).verdict(b"the signed claim", claimed)
    found = {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    assert set(found) == {"claim-1", "verdict-1", "segment-1-0"}
    pieces = dict(zip(claims.frozen.headers, np.frombuffer(found["segment-1-0"], dtype="<u4").reshape(5, -1), strict=True))
    ((segment, stated),) = decode_verdict(auditor(claims, silo, tmp_path)).wrong
    assert (segment, stated) == (0, audits.hash_of_sum(0, pieces, claimed))


# --- The certificate that picks ---------------------------------------------------------------------------------------------------


def test_a_certificate_that_nobody_signed_picks_no_auditors():
    """The aggregator shows a good certificate where the set is checked, and one that it ground for its friends for the audit."""
    raw = share_terms(5, 5, dropouts=0, model={"hidden_size": HIDDEN}, privacy={"colluders": 1}, sum=SLICES)
    setup = build_epoch(federation.parse(raw), range(1, 6))
    made = ShareRound(setup)
    frozen = made.check_freeze()
    witness = Witness(accepted=setup.accepted, epoch=Epoch(number=1, context=setup.context, folder=None, silos=setup.silos), silo=1)
    good = made.certificate(frozen)
    ground = Certificate(round_ctx=good.round_ctx, frozen=good.frozen, consents=())

    def shown(certificate):
        body = encode(certificate)
        openings = {silo: slices.hashes(each.y) for silo, each in made.made.items()}
        seeds = {silo: each.self_seed for silo, each in made.made.items()}
        total = made.expected(frozen.headers)
        claim = audits.claim_of(total, openings, seeds, frozen, certificate=hashlib.sha256(body).digest())
        documents = {"certificate": body, "claim": encode(claim)}
        return lambda kind: envelope.sign(HUB, type=kind, context=setup.context, sender=AGGREGATOR, body=documents[kind])

    assert witness.claimed(frozen, shown(good)).count == 3
    with pytest.raises(TrustError):
        witness.claimed(frozen, shown(ground))


# --- Long polls -------------------------------------------------------------------------------------------------------------------


class Looked:
    """A board whose watcher's question fails so many times; what stands, and how often somebody looked."""

    def __init__(self, *, failures: int):
        self.failures, self.looks, self.asked, self.stands = failures, 0, 0, False

    def has(self, *_slot):
        self.looks += 1
        return self.stands

    def changes(self):
        self.asked += 1
        if self.asked <= self.failures:
            raise MachineError("disk I/O error", hint="", code="database")
        return int(self.stands)


@pytest.mark.parametrize("failures", [1, 1 << 30])
def test_a_fault_of_the_database_does_not_make_requests_spin(failures):
    board = Looked(failures=failures)
    waiting = Waiting(board, time.monotonic, lambda: False)

    async def many():
        return await asyncio.gather(*(waiting.until(("upload", 1, party % 3), 1.2) for party in range(6)))

    assert asyncio.run(many()) == [False] * 6
    assert board.looks < 6 * 12, "each looks at the start, at the fault, and twice a second; the watcher beside them"
    assert board.asked < 400
    assert waiting._bells == waiting._waiting == {}


def test_after_a_fault_a_document_is_found_soon_and_a_cancelled_request_leaves_nothing():
    board = Looked(failures=1)
    waiting = Waiting(board, time.monotonic, lambda: False)

    async def scene():
        loop = asyncio.get_running_loop()
        gone = asyncio.create_task(waiting.until(("list", 1, 1), 20.0))
        task = asyncio.create_task(waiting.until(("upload", 1, 1), 20.0))
        await asyncio.sleep(0.9)
        gone.cancel()
        board.stands, start = True, loop.time()
        assert await task
        with pytest.raises(asyncio.CancelledError):
            await gone
        return loop.time() - start

    assert asyncio.run(scene()) < 5.0, "the wait was for 20 seconds"
    assert waiting._bells == waiting._waiting == {}


def test_the_eye_on_the_database_is_opened_again_after_a_fault(tmp_path):
    store = Store(tmp_path / "evidence", f"sqlite:///{tmp_path / 'a.sqlite'}")
    first = store.changes()
    store._eye.connection.driver_connection.close()
    with pytest.raises(MachineError):
        store.changes()
    again = store.changes()
    store.put_once("vector", 1, 1, b"x", received_at=0.0)
    assert isinstance(first, int)
    assert store.changes() != again
    done = [threading.Thread(target=store.changes) for _ in range(8)]
    for each in done:
        each.start()
    for each in done:
        each.join()
    store.close()


# --- Refusals ---------------------------------------------------------------------------------------------------------------------


def line_of(place: int, **changes) -> Line:
    usual = Line(place, "upload", 1, 1, "ab" * 32, "no", "no", b"", 0, 1)
    return usual._replace(**changes)


@pytest.fixture
def shelf(tmp_path):
    store = Store(tmp_path / "evidence", f"sqlite:///{tmp_path / 'a.sqlite'}")
    yield store
    store.close()


def test_a_table_is_made_again_also_where_a_document_was_published_as_refused_twice(shelf):
    """As after a `reindex` that was killed before it wrote the refusals down, and the same document sent again."""
    shelf.refused.restore([line_of(1), line_of(2), line_of(3, digest="", more=4), line_of(4, digest="", more=1)])
    assert [line.place for line in shelf.refused.due(2)] == [3, 4]
    shelf.refused.note(kind="upload", number=1, party=1, digest=bytes.fromhex("ab" * 32), code="", reason="", document=b"", time=1)
    assert [line.place for line in shelf.refused.due(0)] == [1, 2, 3, 4], "no third one"


def test_two_processes_that_want_one_place_do_not_stop_the_coordinator(shelf, monkeypatch):
    """In a database that lets both read the last place, one of them is refused: it asks again."""
    shelf.refused._count(1, 1)
    begin, refuse = shelf.refused._begin, [True]

    @contextlib.contextmanager
    def contested():
        if refuse.pop() if refuse else False:
            raise sa.exc.IntegrityError("UPDATE", {}, Exception("duplicate key"))
        with begin() as connection:
            yield connection

    monkeypatch.setattr(shelf.refused, "_begin", contested)
    assert [(line.place, line.more) for line in shelf.refused.due(0)] == [(1, 1)]
