# SPDX-License-Identifier: Apache-2.0
"""Refusals in the log: what somebody answers for becomes a leaf once, with its reason; junk, copies and floods do not.

The federation of tests.federation (its contract is enough for most of this), the recorded one, and a real one whose silos follow
the log that has a refusal in it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aggregator import refusals
from aggregator import verify as hub_verify
from aggregator.mailbox import Mailbox
from aggregator.refused import MOST
from aggregator.store import Store
from privacy import envelope, folder
from privacy.audit.check_notices import check_notices
from privacy.audit.findings import Findings, Slot
from privacy.errors import Equivocation, Replay, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR_KINDS, NOTE_KINDS, Countersignature, decode, encode
from privacy.transparency import log, notes
from privacy.transparency.log import Tiles
from privacy.transparency.notices import MOST_KEPT_BYTES, MOST_REASON, TOO_MANY, Refusal, ReportDigest, open_refusal
from tests.federation import HUB, START, Federation, signed_by_hub, silo_identity
from tests.test_recorded import RECORD, Recorded
from tests.test_review_log import Shelf
from tests.whole import Whole

CHANCE = random.Random(os.urandom(16))


@pytest.fixture
def federation(tmp_path):
    """A published contract, and nothing else yet."""
    made = Federation(tmp_path)
    yield made
    made.store.close()


def faulty(federation, silo=1, *, says=2, by=None, sender=None):
    """A countersignature that silo signed, with a body that speaks of another one: refused, and its signer's fault."""
    digest = federation.accepted.digest
    body = encode(Countersignature(contract=digest, member=says))
    return envelope.sign(silo_identity(by or silo), type="countersignature", context=digest, sender=sender or silo, body=body)


def refuse(federation, data, silo=1, number=1):
    with pytest.raises(TrustError) as caught:
        federation.board.put("countersignature", number, silo, data)
    return caught.value


def leaves(federation):
    """The log as its newest head has it, with every leaf held to the head."""

    def fetch(path):
        found = federation.home.log_folder / path
        return found.read_bytes() if found.is_file() else None

    head = log.open_checkpoint(notes.parse(fetch("checkpoint")), federation.accepted.terms)
    Tiles(head.size, fetch).check(head.root)
    return federation.store.leaves(0, head.size)


def published(federation):
    """Every refusal that is a leaf, opened, in order."""
    found = [leaf for leaf in leaves(federation) if leaf.kind == "refusal"]
    assert [(leaf.number, leaf.party) for leaf in found] == [(1 + place, 0) for place in range(len(found))]
    documents = [federation.store.get("refusal", leaf.number, 0) for leaf in found]
    assert [leaf.digest for leaf in found] == [hashlib.sha256(raw).digest() for raw in documents]
    versions = {federation.accepted.digest: federation.accepted}
    return [open_refusal(raw, serial, versions) for serial, raw in enumerate(documents, 1)]


def head(federation):
    federation.coordinator().renew_head()
    return published(federation)


# --- What becomes a leaf -----------------------------------------------------------------------------------------------------


def test_a_refusal_that_its_author_answers_for_is_a_leaf_once_and_holds_the_bytes(federation):
    data = faulty(federation)
    error = refuse(federation, data)
    for _ in range(3):
        refuse(federation, data)
    (made,) = head(federation)
    digest = hashlib.sha256(data).digest()
    assert (made.kind, made.number, made.party, made.digest, made.document) == ("countersignature", 1, 1, digest, data)
    assert (made.code, made.reason, made.time, made.more) == (error.code, error.message, int(START), 0)
    refuse(federation, data)
    federation.coordinator().renew_head()
    assert len(published(federation)) == 1, "once for its bytes, also after it is a leaf"
    assert federation.store.get("countersignature", 1, 1) is None


def test_the_second_of_two_statements_is_a_leaf(federation):
    federation.ready()
    opened = federation.stall(1, "upload", 1)
    silo = federation.silos[1]
    second = silo.sign("upload", opened.context, silo.upload(1, opened.ctx))
    with pytest.raises(Equivocation):
        federation.board.put("upload", 1, 2, second)
    (made,) = head(federation)
    assert (made.kind, made.number, made.party, made.code) == ("upload", 1, 2, "equivocation")
    assert made.digest == hashlib.sha256(second).digest()
    assert made.document == (second if len(second) <= MOST_KEPT_BYTES else b"")
    federation.coordinator().run_round(1)
    late = federation.silos[2].sign("upload", opened.context, federation.silos[2].upload(1, opened.ctx))
    with pytest.raises(Replay):
        federation.board.put("upload", 1, 3, late)
    assert [(each.party, each.code) for each in head(federation)] == [(2, "equivocation"), (3, "replay")]


def test_junk_forgeries_and_copies_are_no_leaves(federation):
    data = faulty(federation)
    assert refuse(federation, b"junk").code == "malformed"
    refuse(federation, data[:-1] + bytes([data[-1] ^ 1]))
    refuse(federation, data + b"\0")
    refuse(federation, faulty(federation, by=2))
    refuse(federation, faulty(federation, by=9, sender=9), silo=9)
    refuse(federation, faulty(federation, 3), silo=1)
    refuse(federation, faulty(federation, 1), number=7)
    with pytest.raises(TrustError, match="over this door"):
        federation.board.put(
            "manifest", 1, 1, envelope.sign(silo_identity(1), type="manifest", context=bytes(32), sender=1, body=b"")
        )
    assert head(federation) == []
    assert federation.store.refused.due(0) == []


def test_is_answered_for():
    """Every document of the recorded federation, by silos and guardians, is for its own slot and for no other."""
    recorded = Recorded(json.loads(gzip.decompress(RECORD.read_bytes())))
    tried = {"own": set(), "other": 0}
    for (kind, number, party), data in recorded.documents.items():
        if kind in AGGREGATOR_KINDS | NOTE_KINDS:
            assert not refusals.is_answered_for(recorded, kind, number, party or 1, data)
            continue
        assert refusals.is_answered_for(recorded, kind, number, party, data), (kind, number, party)
        tried["own"].add(kind)
        place = CHANCE.randrange(len(data))
        bent = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        others = [(kind, each, who) for each in (1, 2, 3) for who in (party, party % 4 + 1) if (each, who) != (number, party)]
        assert not refusals.is_answered_for(recorded, kind, number, party, bent), (kind, place)
        for slot in others:
            tried["other"] += 1
            assert not refusals.is_answered_for(recorded, *slot, data), (slot, kind, number, party)
    assert {"countersignature", "epoch-note", "guardian-note", "pair-seeds", "upload", "list", "endorsement", "shares"} <= tried[
        "own"
    ]
    assert tried["other"] > 100


def test_a_body_that_cannot_be_read_is_its_signers_fault_in_the_context_of_the_slot(federation):
    federation.ready()
    opened = federation.stall(1, "upload", 1)
    nonsense = envelope.sign(silo_identity(1), type="upload", context=opened.context, sender=1, body=b"nonsense")
    elsewhere = envelope.sign(silo_identity(1), type="upload", context=bytes(32), sender=1, body=b"nonsense")
    for data in (nonsense, elsewhere):
        with pytest.raises(TrustError):
            federation.board.put("upload", 1, 1, data)
    assert [each.document for each in head(federation)] == [nonsense]


def test_a_reason_is_short_and_printable_and_a_large_document_is_only_named(federation):
    digest = federation.accepted.digest
    data = envelope.sign(silo_identity(1), type="countersignature", context=digest, sender=1, body=b"\n" * MOST_KEPT_BYTES)
    error = TrustError("a\x1b[31m\n" + "long " * 200, code="x" * 100)
    refusals.note(federation.store, "countersignature", 1, 1, data, error, now=1.0)
    (made,) = head(federation)
    assert (made.document, made.digest) == (b"", hashlib.sha256(data).digest())
    assert len(made.reason) == MOST_REASON
    assert made.reason.isprintable()
    assert made.reason.startswith("a?[31m?long")
    assert len(made.code) <= 64


# --- Floods ------------------------------------------------------------------------------------------------------------------


def flood(federation, silo, count, start=100):
    for says in range(start, start + count):
        refuse(federation, faulty(federation, silo, says=says), silo)


def test_a_flood_adds_so_many_leaves_and_one_line_that_counts_the_rest(federation):
    flood(federation, 1, MOST + 22)
    flood(federation, 2, 3)
    found = head(federation)
    assert [each.party for each in found if not each.more] == [1] * MOST + [2] * 3, "the others' room is their own"
    (counted,) = [each for each in found if each.more]
    assert (counted.party, counted.more, counted.code, counted.digest, counted.document) == (1, 22, TOO_MANY, b"", b"")
    size = len(leaves(federation))
    flood(federation, 1, 5, start=1000)
    assert [each.more for each in head(federation)[len(found) :]] == [5], "until the next round's head there is no more room"
    assert len(leaves(federation)) == size + 1


def test_the_next_rounds_head_gives_room_again(federation):
    flood(federation, 1, MOST + 1)
    federation.silos[0].withhold.add("countersignature")
    federation.silos[0].sent["countersignature", 1] = b""
    raw = encode(Countersignature(contract=federation.accepted.digest, member=1))
    federation.board.put("countersignature", 1, 1, envelope.sign(
        silo_identity(1), type="countersignature", context=federation.accepted.digest, sender=1, body=raw
    ))  # fmt: skip
    federation.ready().run_round(1)
    before = len(published(federation))
    assert before == MOST + 1
    flood(federation, 1, MOST + 1, start=500)
    assert [bool(each.more) for each in head(federation)[before:]] == [False] * MOST + [True]


def test_many_at_once_get_no_more_room(federation):
    documents = [faulty(federation, 1, says=says) for says in range(2, 42)]
    others = [Store(federation.home.evidence_folder, federation.home.database_url(federation.home.config())) for _ in range(4)]

    def work(store, mine):
        for data in mine:
            refusals.note(store, "countersignature", 1, 1, data, TrustError("no", code="no"), now=1.0)

    threads = [
        threading.Thread(target=work, args=(store, documents[place % 4 :: 4] + documents[:3]))
        for place, store in enumerate([*others, *others])
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for store in others:
        store.close()
    found = head(federation)
    named = [each.digest for each in found if not each.more]
    assert len(named) == len(set(named)) == MOST
    assert sum(each.more for each in found) >= len(documents) - MOST
    assert len(found) == MOST + 1


# --- Killed in between -------------------------------------------------------------------------------------------------------

SERVICE = """
import os, signal, sys, time
from pathlib import Path
from aggregator import admission
from aggregator.board import Board
from aggregator.config import Home
from aggregator.store import Store
home = Home(Path(sys.argv[1]))
board = Board(Store(home.evidence_folder, home.database_url(home.config())), admission.admit, time.time)
try:
    board.put("countersignature", 1, 1, bytes.fromhex(sys.stdin.read()))
except Exception as error:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_service_killed_after_it_refused_leaves_the_line(federation):
    data = faulty(federation)
    command = [sys.executable, "-c", SERVICE, str(federation.home.root)]
    died = subprocess.run(command, input=data.hex(), text=True, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [each.document for each in head(federation)] == [data]


@pytest.mark.parametrize("where", ["put_once", "write_atomic"])
def test_a_coordinator_killed_between_refusal_and_leaf_goes_on(federation, monkeypatch, where):
    """Killed before and after the document of the first of two lines stands, and before the head over both is signed."""

    class Killed(BaseException):
        pass

    flood(federation, 1, 2)
    real = Store.put_once
    with monkeypatch.context() as patch:
        if where == "put_once":

            def put_once(store, kind, *rest, **options):
                done = real(store, kind, *rest, **options)
                if kind == "refusal":
                    raise Killed
                return done

            patch.setattr(Store, "put_once", put_once)
        else:
            patch.setattr("privacy.files.write_atomic", lambda *words, **given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            federation.coordinator().renew_head()
    assert federation.store.latest("refusal") == (1 if where == "put_once" else 2)
    assert not (federation.home.log_folder / "signed").exists()
    found = head(federation)
    assert [(each.serial, each.party) for each in found] == [(1, 1), (2, 1)]
    assert len({each.digest for each in found}) == 2


def test_a_table_made_again_knows_what_was_refused(tmp_path):
    federation = Federation(tmp_path)
    flood(federation, 1, 2)
    head(federation)
    flood(federation, 2, 1)
    federation.store.close()
    for path in federation.home.root.glob("documents.sqlite*"):
        path.unlink()
    hub_verify.reindex(federation.home.root)
    federation.store = Store(federation.home.evidence_folder, federation.home.database_url(federation.home.config()))
    federation.board._store = federation.store
    flood(federation, 1, 2)
    flood(federation, 3, 1)
    assert [each.party for each in head(federation)] == [1, 1, 3], "what had no leaf yet is lost with the table"
    federation.store.close()


# --- In a folder, and before real silos --------------------------------------------------------------------------------------


def test_in_a_folder_a_refusal_is_answered_and_becomes_a_leaf_and_a_document(federation, tmp_path):
    root, data = tmp_path / "exchange", faulty(federation)
    mailbox = Mailbox(root, home=federation.home, store=federation.store, board=federation.board)
    for raw in (data, b"junk"):
        folder.write(root, "inbox", "1", f"countersignature-1-{hashlib.sha256(raw).hexdigest()}", data=raw)
    mailbox.once()
    assert len(list(root.glob("refused/1/*.json"))) == 2
    assert [each.document for each in head(federation)] == [data]
    mailbox.once()
    (path,) = root.glob("board/*/*-refusal-1-0-*")
    assert path.read_bytes() == federation.store.get("refusal", 1, 0)
    assert (root / "log" / "checkpoint").read_bytes() == (federation.home.log_folder / "checkpoint").read_bytes()


@pytest.mark.usefixtures("quick_polls")
def test_silos_go_on_over_a_refusal_and_verify_lists_it(tmp_path):
    from silo import verify as silo_verify

    whole = Whole.create(tmp_path / "whole")
    keys.write_public(whole.root / "silo-1" / "identity.pub", keys.load(whole.root / "silo-1" / "identity.key"), "Hospital 1")
    digest = whole.accepted.digest
    raw = encode(Countersignature(contract=digest, member=3))
    data = envelope.sign(whole.silo(2).identity, type="countersignature", context=digest, sender=2, body=raw)
    with pytest.raises(TrustError):
        whole.board.put("countersignature", 1, 2, data)
    settled, _ = whole.run(1)
    assert {each[0].kind for each in settled.values()} == {"result"}
    whole.close()
    for found in (hub_verify.verify(whole.home.root), silo_verify.verify(whole.root / "silo-1", folder=whole.home.root)):
        assert found.holds, found.failed
        assert {check.what for check in found.checks if check.kind == "refusal"} == {
            "file",
            "leaf",
            "signature",
            "document",
            "refused",
        }
        listed = [check.why for check in found.checks if check.what == "refused"]
        assert len(listed) == 1
        assert listed[0].startswith("countersignature 1 of party 2 was refused (")


# --- Lies of the aggregator --------------------------------------------------------------------------------------------------


def asked(federation, **changes):
    """What verification says of one refusal with these fields."""
    data = faulty(federation)
    digest = hashlib.sha256(data).digest()
    plain: dict[str, object] = {
        "kind": "countersignature",
        "number": 1,
        "party": 1,
        "digest": digest,
        "code": "no",
        "reason": "no",
        "time": 1,
        "document": data,
    }
    message = Refusal(**{"serial": 1, **plain, **changes})
    raw = signed_by_hub("refusal", federation.accepted.digest, message)
    found = Findings(Shelf({("refusal", 1, 0): raw}))
    check_notices(found, {federation.accepted.digest: federation.accepted}, None)
    return {check.what: check for check in found.checks}


def test_a_false_accusation_is_named(federation):
    assert {check.status for check in asked(federation).values()} == {"ok", "note"}
    for changes in ({"party": 2}, {"kind": "upload"}):
        found = asked(federation, **changes)
        assert found["document"].status == "failed", changes
        assert found["document"].slot == Slot("refusal", 1, 0)
    assert "did not sign" in asked(federation, party=2)["document"].why
    for changes in ({"digest": bytes(32)}, {"digest": b"short"}, {"serial": 2}, {"more": 3}, {"document": b"other"}):
        assert asked(federation, **changes)["signature"].status == "failed", changes
    only_named = asked(federation, document=b"")
    assert "document" not in only_named
    assert "only the digest" in only_named["refused"].why


def test_a_refusal_of_somebody_else_is_named(federation):
    message = Refusal(serial=1, kind="upload", number=1, party=1, digest=bytes(32), code="no", reason="no", time=1)
    versions = {federation.accepted.digest: federation.accepted}
    open_refusal(signed_by_hub("refusal", federation.accepted.digest, message), 1, versions)
    by_a_silo = envelope.sign(silo_identity(1), type="refusal", context=federation.accepted.digest, sender=0, body=encode(message))
    as_a_report = envelope.sign(HUB, type="report", context=federation.accepted.digest, sender=0, body=encode(message))
    of_nobody = signed_by_hub("refusal", bytes(32), message)
    for raw in (by_a_silo, as_a_report, of_nobody):
        with pytest.raises(TrustError):
            open_refusal(raw, 1, versions)


# --- The page ------------------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_are_what_is_said_there():
    page = (Path(__file__).parents[1] / "docs/spec/log.md").read_text(encoding="utf-8")
    blocks = ["".join(block.split()) for block in page.split("```")[1::2]]
    bodies = [bytes.fromhex(block) for block in blocks if re.fullmatch(r"(?:[0-9a-f]{2})+", block)]
    assert decode(bodies[0], Refusal) == Refusal(
        serial=1, kind="upload", number=3, party=2, digest=b"\x11" * 32, code="ledger-rolled-back", time=1767225600,
        reason="silo 2 states 4 ledger entries in round 3, it stated 6 in round 2",
    )  # fmt: skip
    assert decode(bodies[1], ReportDigest) == ReportDigest(
        serial=1, digest=b"\x22" * 32, schema="siloquy-report/1", last_round=3, time=1767225600
    )
    figures = (f"at most {MOST_KEPT_BYTES};", f"64 and {MOST_REASON} printable", f"Of one party {MOST} while", f"`{TOO_MANY}`")
    assert [figure for figure in figures if figure not in page] == []
