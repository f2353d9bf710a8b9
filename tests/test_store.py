# SPDX-License-Identifier: Apache-2.0
"""The document store: put once, get exactly, share between threads and processes, say what is damaged."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.store import Store
from privacy.errors import Equivocation, MachineError, TrustError


def opened(root: Path) -> Store:
    return Store(root / "evidence", f"sqlite:///{root / 'documents.sqlite'}")


@pytest.fixture
def store(tmp_path):
    made = opened(tmp_path)
    yield made
    made.close()


def test_a_document_comes_back_exactly_and_its_entry_says_when_and_how_large(store):
    assert store.put_once("upload", 3, 2, b"bytes", received_at=12.9) == "created"
    assert store.get("upload", 3, 2) == b"bytes"
    entry = store.entry("upload", 3, 2)
    assert (entry.digest, entry.size, entry.received_at) == (hashlib.sha256(b"bytes").digest(), 5, 12)


def test_empty_slots_are_none_and_lists_are_ascending(store):
    assert store.get("upload", 1, 1) is None
    assert store.entry("upload", 1, 1) is None
    assert store.parties("upload", 1) == ()
    assert store.latest("upload") is None
    for number, party in ((2, 3), (2, 1), (7, 1), (2, 2)):
        store.put_once("upload", number, party, b"%d" % party, received_at=0)
    store.put_once("consent", 9, 1, b"", received_at=0)
    assert store.parties("upload", 2) == (1, 2, 3)
    assert store.latest("upload") == 7
    assert store.get("consent", 9, 1) == b""


SLOTS = st.tuples(st.sampled_from(["upload", "consent"]), st.integers(1, 2), st.integers(1, 2))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SLOTS, st.sampled_from([b"", b"a", b"b" * 70_000])), max_size=12))
def test_put_once_is_a_dictionary_whose_keys_are_set_once(puts):
    with tempfile.TemporaryDirectory() as folder:
        store, model = opened(Path(folder)), {}
        for slot, data in puts:
            if model.get(slot, data) == data:
                assert store.put_once(*slot, data, received_at=1) == ("same" if slot in model else "created")
                model[slot] = data
            else:
                with pytest.raises(Equivocation):
                    store.put_once(*slot, data, received_at=1)
        again = opened(Path(folder))
        assert {slot: again.get(*slot) for slot in model} == model
        for closing in (store, again):
            closing.close()


def test_equivocation_names_both_digests_and_leaves_the_first(store, tmp_path):
    store.put_once("consent", 1, 2, b"first", received_at=0)
    with pytest.raises(Equivocation) as caught:
        store.put_once("consent", 1, 2, b"second", received_at=0)
    for data in (b"first", b"second"):
        assert hashlib.sha256(data).hexdigest() in caught.value.facts.values()
        assert hashlib.sha256(data).hexdigest()[:16] in caught.value.message
    assert store.get("consent", 1, 2) == b"first"
    assert len(list((tmp_path / "evidence").iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_never_returned(store, tmp_path, damage):
    store.put_once("outcome", 4, 0, b"result", received_at=0)
    path = tmp_path / "evidence" / hashlib.sha256(b"result").hexdigest()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"Result" if damage == "flip" else b"resul")
    with pytest.raises(TrustError, match="outcome 4 of party 0") as caught:
        store.get("outcome", 4, 0)
    assert caught.value.code == "evidence-damaged"


def test_a_damaged_file_is_not_adopted_for_another_slot(store, tmp_path):
    store.put_once("outcome", 4, 0, b"result", received_at=0)
    (tmp_path / "evidence" / hashlib.sha256(b"result").hexdigest()).write_bytes(b"other")
    with pytest.raises(TrustError, match="evidence is damaged"):
        store.put_once("outcome", 5, 0, b"result", received_at=0)
    assert store.entry("outcome", 5, 0) is None


def test_two_stores_in_many_threads_agree_on_who_was_first(tmp_path):
    stores = [opened(tmp_path), opened(tmp_path)]

    def put(index):
        try:
            return stores[index % 2].put_once("upload", 1, 1, b"%d" % (index % 4), received_at=0)
        except Equivocation:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(put, range(64)))
    assert answers.count("created") == 1
    assert answers.count("same") == 15
    assert answers.count("refused") == 48
    assert stores[0].get("upload", 1, 1) == stores[1].get("upload", 1, 1)


def test_sqlite_runs_in_wal_mode_and_waits_for_the_disk(store, tmp_path):
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() >= 5000


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all/documents.sqlite", "no-such-database://x", "not a url"])
def test_a_database_that_does_not_open_is_a_machine_error(tmp_path, url):
    with pytest.raises(MachineError):
        Store(tmp_path / "evidence", url)


def test_a_full_disk_leaves_the_slot_empty_and_is_a_machine_error(tmp_path):
    opened(tmp_path).close()
    code = f"""
import resource, signal, sys
from pathlib import Path
from aggregator.store import Store
from privacy.errors import MachineError
store = Store(Path({str(tmp_path)!r}) / "evidence", "sqlite:///" + {str(tmp_path / "documents.sqlite")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store.put_once("upload", 1, 1, bytes(1_000_000), received_at=0)
except MachineError as error:
    sys.exit(0 if store.get("upload", 1, 1) is None else 3)
sys.exit(4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    store = opened(tmp_path)
    assert store.get("upload", 1, 1) is None
    assert store.put_once("upload", 1, 1, bytes(1_000_000), received_at=0) == "created"
    assert len(list((tmp_path / "evidence").iterdir())) == 1
