# SPDX-License-Identifier: Apache-2.0
"""The keeper of the log: leaves without gaps from two processes, files that never change, and no two heads that contradict."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest

from aggregator.journal import ROLLED_BACK, Journal
from aggregator.store import Store
from privacy import federation, files
from privacy.errors import Equivocation, TrustError
from privacy.identity.keys import Identity
from privacy.messages import Signed, Upload, decode, encode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf, Tiles
from tests.terms import contract_bytes, seed

TERMS = federation.parse(contract_bytes(3)).terms
HUB = Identity(name="hub", sign_seed=seed(100), receive_seed=bytes(32))


class Place:
    """An aggregator's folder with a store and a journal; ``opened`` is a restart."""

    def __init__(self, root):
        self.root = root
        self.opened()

    def opened(self):
        self.store = Store(self.root / "evidence", f"sqlite:///{self.root / 'documents.sqlite'}")
        self.journal = Journal(self.root / "log", store=self.store, identity=HUB, terms=TERMS, clock=lambda: 7.9)
        return self

    def put(self, count, kind="roster", start=None):
        first = self.store.log_size() if start is None else start
        for number in range(first, first + count):
            self.store.put_once(kind, number, 0, f"{kind} {number}".encode(), received_at=100.5 + number)

    def fetch(self, path):
        assert log.is_resource(path)
        found = self.root / "log" / path
        return found.read_bytes() if found.is_file() else None

    def cosign(self, number, *silos):
        text = notes.parse(self.store.get("checkpoint", number, 0)).text
        for silo in silos:
            made = notes.cosigned(text, name=f"test-federation/silo-{silo}", seed=seed(silo), time=9)
            self.store.put_once("cosignature", number, silo, made.to_bytes(), received_at=0)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- The store's leaves ------------------------------------------------------------------------------------------------


def test_documents_are_leaves_in_the_order_of_storing(place) -> None:
    body = encode(Upload(header=b"h", sealed=b"s"))
    upload = encode(Signed(version="gsum/1", type="upload", sender=2, context=bytes(32), body=body, signature=bytes(64)))
    for kind, number, party, data in (
        ("outcome", 9, 0, b"first"), ("upload", 1, 2, upload), ("checkpoint", 1, 0, b"c"), ("cosignature", 1, 2, b"d"),
        ("head", 1, 0, b"e"), ("contract", 1, 0, b"last"),
    ):  # fmt: skip
        place.store.put_once(kind, number, party, data, received_at=5.9)
        place.store.put_once(kind, number, party, data, received_at=6.9)  # the same again is no second leaf
    digest = lambda data: hashlib.sha256(data).digest()  # noqa: E731
    assert place.store.log_size() == 3
    assert place.store.leaves(0, 3) == [
        Leaf(kind="outcome", number=9, party=0, digest=digest(b"first"), time=5),
        Leaf(kind="upload", number=1, party=2, digest=digest(upload), header=digest(b"h"), time=5),
        Leaf(kind="contract", number=1, party=0, digest=digest(b"last"), time=5),
    ]
    assert place.store.leaves(1, 2)[0].kind == "upload"
    with pytest.raises(TrustError, match="leaves"):
        place.store.leaves(0, 4)


def test_a_refused_document_takes_no_index(place) -> None:
    place.put(3)
    with pytest.raises(Equivocation):
        place.store.put_once("roster", 1, 0, b"other", received_at=0)
    place.put(1)
    assert [leaf.number for leaf in place.store.leaves(0, 4)] == [0, 1, 2, 3]


WRITER = """
import sys
from pathlib import Path
from aggregator.store import Store
root, party = Path(sys.argv[1]), int(sys.argv[2])
store = Store(root / "evidence", f"sqlite:///{root / 'documents.sqlite'}")
sys.stdin.read(1)
for number in range(100):
    store.put_once("consent", number, party, f"{number} of {party}".encode(), received_at=number)
    size = store.log_size()
    assert [leaf.kind for leaf in store.leaves(0, size)] == ["consent"] * size  # never a gap, at any moment
"""


def test_two_processes_and_threads_leave_no_gap_and_each_sees_its_own_order(place) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(place.root), str(party)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for party in (1, 2, 3)
    ]
    here = [
        threading.Thread(
            target=lambda p=p: [place.store.put_once("consent", n, p, b"%d %d" % (n, p), received_at=n) for n in range(50)]
        )
        for p in (4, 5)
    ]
    for thread in here:
        thread.start()
    for writer in writers:
        _, said = writer.communicate(b"x", timeout=120)
        assert writer.returncode == 0, said.decode()
    for thread in here:
        thread.join()
    leaves = place.store.leaves(0, place.store.log_size())
    assert len(leaves) == 400
    for party in range(1, 6):
        assert [leaf.number for leaf in leaves if leaf.party == party] == list(range(100 if party < 4 else 50))


def test_an_index_that_another_took_is_tried_again(place, monkeypatch) -> None:
    """As in a database whose writers do not wait for each other: the unique index refuses, the next try takes the next one."""
    import sqlalchemy as sa

    from aggregator import store as module

    place.put(2)
    stale = [sa.literal(1), sa.literal(1)]
    real = module._NEXT_LEAF
    monkeypatch.setattr(module, "_NEXT_LEAF", stale.pop())
    tried = []
    entry = place.store.entry

    def between(*slot):
        tried.append(slot)
        if len(tried) == 3:
            monkeypatch.setattr(module, "_NEXT_LEAF", real)
        return entry(*slot)

    monkeypatch.setattr(place.store, "entry", between)
    with pytest.raises(Exception, match="refused a document"):
        place.store.put_once("roster", 2, 0, b"x", received_at=0)  # the value stays stale within one call
    assert len(tried) > 3
    assert place.store.put_once("roster", 2, 0, b"x", received_at=0) == "created"
    assert [leaf.number for leaf in place.store.leaves(0, 3)] == [0, 1, 2]


# --- Heads -------------------------------------------------------------------------------------------------------------


def test_a_head_is_signed_and_its_files_give_its_root(place) -> None:
    for number, count in enumerate((1, 4, 250, 1, 1, 300), start=1):
        place.put(count)
        head = place.journal.checkpoint(number)
        assert head.size == place.store.log_size()
        raw = place.store.get("checkpoint", number, 0)
        assert log.open_checkpoint(notes.parse(raw), TERMS) == head
        assert place.fetch("checkpoint") == raw
        for since in (0, head.size - count, head.size):
            tiles = Tiles(head.size, place.fetch)
            tiles.check(head.root, since=since)
        tiles = Tiles(head.size, place.fetch)
        tiles.check(head.root)
        assert [decode(tiles.leaf(i), Leaf) for i in range(head.size)] == place.store.leaves(0, head.size)


def test_the_same_round_has_one_head_also_after_a_restart(place) -> None:
    place.put(5)
    head, raw = place.journal.checkpoint(1), place.store.get("checkpoint", 1, 0)
    place.put(5)
    assert place.journal.checkpoint(1) == head
    assert place.opened().journal.checkpoint(1) == head
    assert place.store.get("checkpoint", 1, 0) == raw
    assert place.journal.checkpoint(2).size == 10


def test_old_files_stay_as_they_were(place) -> None:
    seen = {}
    for number in range(1, 40):
        place.put(9)
        place.journal.checkpoint(number)
        now = {p: p.read_bytes() for p in (place.root / "log" / "tile").rglob("*") if p.is_file()}
        assert all(now[path] == data for path, data in seen.items())
        assert all(log.is_resource(str(path.relative_to(place.root / "log"))) for path in now)
        seen = now


def test_a_quorum_makes_a_head_that_everybody_is_shown(place) -> None:
    place.put(3)
    assert place.journal.head(1) is None
    head = place.journal.checkpoint(1)
    for silo in (1, 2):
        place.cosign(1, silo)
        assert place.journal.head(1) is None
    place.cosign(1, 3)
    assert place.journal.head(1) == head
    raw = place.store.get("head", 1, 0)
    assert log.cosigned_by(notes.parse(raw), TERMS) == (1, 2, 3)
    assert place.fetch("checkpoint") == raw
    assert place.opened().journal.head(1) == head


def test_a_renewed_head_stands_in_no_slot_and_the_next_rounds_goes_on_from_it(place) -> None:
    place.put(3)
    first = place.journal.checkpoint(1)
    place.put(2)
    renewed = place.journal.renew()
    assert (renewed.size, place.store.latest("checkpoint")) == (5, 1)
    shown = place.fetch("checkpoint")
    assert log.open_checkpoint(notes.parse(shown), TERMS) == renewed == place.opened().journal.renew()
    place.cosign(1, 1, 2, 3)
    for again in (place, place.opened()):
        assert again.journal.checkpoint(1) == first
        assert again.journal.head(1) == first
        assert place.fetch("checkpoint") == shown, "no smaller head is shown after it"
    place.put(1)
    second = place.journal.checkpoint(2)
    tiles = Tiles(second.size, place.fetch)
    tiles.check(second.root)
    assert (second.size, tiles.root(5), tiles.root(3)) == (6, renewed.root, first.root)


def test_what_must_be_in_a_head_is_put_before_each_new_one(place) -> None:
    place.journal = Journal(
        place.root / "log", store=place.store, identity=HUB, terms=TERMS, clock=lambda: 7.9, before_head=lambda: place.put(1)
    )
    place.put(3)
    assert [place.journal.checkpoint(number).size for number in (1, 1, 2)] == [4, 4, 5]
    assert place.journal.renew().size == 6


# --- Never two heads that contradict -----------------------------------------------------------------------------------


def rolled_back(place, number):
    place.store.close()
    with pytest.raises(TrustError) as caught:
        place.opened().journal.checkpoint(number)
    assert caught.value.code == ROLLED_BACK
    assert place.store.entry("checkpoint", number, 0) is None


def test_a_table_that_was_put_back_signs_nothing(place) -> None:
    place.put(4)
    place.journal.checkpoint(1)
    place.store.close()
    shutil.copy(place.root / "documents.sqlite", place.root / "backup")
    place.opened().put(4)
    place.journal.checkpoint(2)
    place.store.close()
    for extra in ("-wal", "-shm"):
        (place.root / f"documents.sqlite{extra}").unlink(missing_ok=True)
    shutil.copy(place.root / "backup", place.root / "documents.sqlite")
    rolled_back(place, 2)  # fewer leaves
    place.put(9, kind="freeze")
    rolled_back(place, 2)  # other leaves


@pytest.mark.parametrize(
    "change", ["digest = '%s'" % ("00" * 32), "number = 77", "party = 9", "kind = 'freeze'", "received_at = 1"]
)
@pytest.mark.parametrize("leaf", [0, 2, 4])
def test_a_table_with_a_changed_row_signs_nothing(place, change, leaf) -> None:
    place.put(5)
    place.journal.checkpoint(1)
    place.put(5)
    place.store.close()
    with sqlite3.connect(place.root / "documents.sqlite") as table:
        table.execute(f"UPDATE documents SET {change} WHERE leaf = {leaf}")
    rolled_back(place, 2)


def test_a_table_without_a_row_signs_nothing(place) -> None:
    place.put(5)
    place.journal.checkpoint(1)
    place.store.close()
    with sqlite3.connect(place.root / "documents.sqlite") as table:
        table.execute("DELETE FROM documents WHERE leaf = 2")
    with pytest.raises(TrustError, match="leaves 0 to 4"):
        place.opened().journal.checkpoint(2)


class Killed(BaseException):
    pass


def dies_in_a_write(patch, survive, after):
    """Raise Killed before or after the write that follows ``survive`` others: of a file, or of a document."""
    left = [survive]

    def dying(real, *args, **named):
        if left[0] == 0 and not after:
            raise Killed
        found = real(*args, **named)
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return found

    for name in ("write_once", "write_atomic"):
        patch.setattr(files, name, functools.partial(dying, getattr(files, name)))
    put = Store.put_once
    patch.setattr(Store, "put_once", lambda self, *args, **named: dying(functools.partial(put, self), *args, **named))


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_of_a_renewed_head_the_next_one_goes_on(tmp_path, monkeypatch, after) -> None:
    survived, ended = 0, False
    while not ended:
        place = Place(tmp_path / f"{survived}")
        place.put(9)
        first = place.journal.checkpoint(1)
        place.put(5)
        with monkeypatch.context() as patch:
            dies_in_a_write(patch, survived, after)
            try:
                place.journal.renew()
                ended = True
            except Killed:
                survived += 1
        place.put(3)
        seen = log.open_checkpoint(notes.parse(place.fetch("checkpoint")), TERMS)
        assert place.opened().journal.checkpoint(1) == first
        second = place.journal.checkpoint(2)
        tiles = Tiles(second.size, place.fetch)
        tiles.check(second.root)
        assert (tiles.root(first.size), tiles.root(seen.size)) == (first.root, seen.root)
        place.store.close()
    assert survived >= 4, "tile, bundle, the note of what is signed, the shown head"


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_the_next_start_goes_on_and_nothing_contradicts(tmp_path, monkeypatch, after) -> None:
    survived, ended = 0, False
    while not ended:
        place = Place(tmp_path / f"{survived}")
        place.put(254)
        first = place.journal.checkpoint(1)
        place.put(5)
        with monkeypatch.context() as patch:
            dies_in_a_write(patch, survived, after)
            try:
                place.journal.checkpoint(2)
                ended = True
            except Killed:
                shown = place.store.get("checkpoint", 2, 0)
        if not ended:
            place.put(3)
            second = place.opened().journal.checkpoint(2)
            if shown is not None:
                assert log.open_checkpoint(notes.parse(shown), TERMS) == second
            tiles = Tiles(second.size, place.fetch)
            tiles.check(second.root, since=first.size)
            assert tiles.root(first.size) == first.root
            survived += 1
        place.store.close()
    assert survived >= 7, "tiles, bundles, the note of what is signed, the document, the shown head"


def test_what_a_killed_journal_left_half_written_is_swept(place) -> None:
    place.put(3)
    place.journal.checkpoint(1)
    folder = place.root / "log" / "tile" / "0"
    (folder / f".000.{os.urandom(6).hex()}").write_bytes(b"half")
    (place.root / "log" / f".signed.{os.urandom(6).hex()}").write_bytes(b"half")
    place.opened()
    assert not list((place.root / "log").rglob(".*"))
