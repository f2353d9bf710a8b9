# SPDX-License-Identifier: Apache-2.0
"""A silo that was put back to an earlier time does not begin: over HTTP and over a folder, until `silo restore` reconciled it."""

from __future__ import annotations

import contextlib
import shutil
import threading

import pytest

from aggregator.mailbox import Mailbox
from privacy import envelope
from privacy.errors import LedgerBroken, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Signed, Upload, decode, encode
from privacy.transparency import notes
from silo import commands, config, rollback, succession
from silo.folder import FolderTransport
from silo.home import Home
from silo.transport import HttpTransport
from tests import crash
from tests.test_restore import LOST, back_up, go_on, headers, made, put_back, restore, root_of
from tests.test_service import Running
from tests.whole import Whole

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three rounds; the backup is of after the first one; the home as it was lies beside it."""
    whole = Whole.create(tmp_path_factory.mktemp("rollback") / "federation")
    whole.run(1)
    back_up(whole)
    whole.run(3)
    with whole.coordinator():
        pass  # shows the head of round 4, which has the uploads of round 3
    shutil.copytree(root_of(whole), whole.root / "as-it-was")
    return whole


@pytest.fixture
def whole(federation, tmp_path):
    return federation.copied(tmp_path / "federation")


@contextlib.contextmanager
def over(way, whole):
    """A transport of this kind to the federation's board."""
    if way == "memory":
        yield whole.line()
    elif way == "http":
        running = Running(whole)
        line = HttpTransport(f"http://127.0.0.1:{running.port}")
        try:
            yield line
        finally:
            line.close()
            running.stop()
    else:
        mailbox, done = Mailbox(whole.root / "exchange", home=whole.home, store=whole.store, board=whole.board), threading.Event()

        def carry():
            while not done.is_set():
                mailbox.once()
                done.wait(0.01)

        thread = threading.Thread(target=carry)
        mailbox.once()
        thread.start()
        try:
            yield FolderTransport(whole.root / "exchange", answer_s=0.05)
        finally:
            done.set()
            thread.join()


def ask(whole, line, silo=LOST):
    home = Home(root_of(whole, silo))
    rollback.require_newest(home, line, whole.history(silo), [whole.accepted])


def refused(whole, line, silo=LOST):
    before = {path: path.read_bytes() for path in root_of(whole, silo).rglob("*") if path.is_file()}
    with pytest.raises(LedgerBroken) as caught:
        ask(whole, line, silo)
    assert caught.value.code == "ledger-behind"
    assert "silo restore" in caught.value.hint
    assert before == {path: path.read_bytes() for path in root_of(whole, silo).rglob("*") if path.is_file()}, "nothing is written"
    return caught.value


# --- Formal guarantees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["memory", "http", "folder"])
def test_behind_stops(whole, way):
    with over(way, whole) as line:
        ask(whole, line)
        put_back(whole)
        found = refused(whole, line)
    assert found.facts["round"] == 2, "the first round of which the backup knows nothing"


def test_behind_stops_in_share_mode_too(tmp_path):
    """Two attempts were made at round 3: the board has the upload of the second, and the restored ledger both reservations."""
    whole = made(tmp_path, "shares")
    ask(whole, whole.line())
    put_back(whole)
    assert refused(whole, whole.line()).facts["round"] == 2
    restore(whole)
    ask(whole, whole.line())


@pytest.mark.parametrize("way", ["http", "folder"])
def test_reconciled_goes_on(whole, way):
    put_back(whole)
    with over(way, whole) as line:
        refused(whole, line)
        restore(whole)
        ask(whole, line)
    settled, closed = go_on(whole, 4)
    assert closed[-1].kind == "result"
    assert settled[LOST][-1].round == 4
    ask(whole, whole.line())


def test_nothing_is_written(whole):
    """Neither when it passes."""
    before = {path: path.read_bytes() for path in root_of(whole).rglob("*") if path.is_file()}
    ask(whole, whole.line())
    assert before == {path: path.read_bytes() for path in root_of(whole).rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["the whole home", "all but its state", "its ledger", "its ledger and promises"])
def test_whatever_part_of_the_home_is_old(whole, what):
    """The state of after round 3 with a ledger of after round 1 is held to the upload of round 3."""
    if what == "the whole home":
        put_back(whole)
    else:
        names = {"its ledger": ["ledger.jsonl"], "its ledger and promises": ["ledger.jsonl", "promises"]}
        for name in names.get(what, ["ledger.jsonl", "promises", "log"]):
            kept, old = root_of(whole) / name, whole.root / "backup" / name
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
            shutil.copytree(old, kept) if old.is_dir() else shutil.copy(old, kept)
    refused(whole, whole.line())


def test_a_ledger_of_the_same_length_with_other_entries_is_behind(whole):
    """Somebody who has the key went on from the old copy: the places are taken, by other reservations."""
    put_back(whole)
    identity, path = keys.load(root_of(whole) / "identity.key"), root_of(whole) / "ledger.jsonl"
    longest = crash.history(whole.root / "as-it-was").counter
    parts = {"sign": identity.sign, "verify": lambda data, signature: None, "clock": lambda: 7.0}
    with commands.Ledger.open(path, **parts) as forked:
        one = next(body.mechanism for body in forked.entries if hasattr(body, "attempt"))
        while forked.counter <= longest:
            forked.reserve(
                contract=whole.accepted.digest.hex(), round_number=forked.counter, attempt="ab" * 16, mechanism=one.with_steps(1)
            )
    refused(whole, whole.line())


# --- Board and log ----------------------------------------------------------------------------------------------------------------


def test_an_upload_that_only_the_log_has_stops_a_home_that_knows_nothing_of_it(whole):
    put_back(whole)
    line = whole.line()
    line.alter = lambda slot, data: None if slot[0] in ("upload", "manifest") else data
    found = refused(whole, line)
    assert "the log has an upload" in found.message


def test_an_upload_that_both_hide_is_not_seen_here_and_costs_nothing(whole):
    """Then the next upload's counter is refused (tests/test_restore.py), and a head that is smaller than the last one seen."""
    put_back(whole)
    line = whole.line()
    line.alter = lambda slot, data: None if slot[0] in ("upload", "checkpoint") else data
    ask(whole, line)


def test_an_upload_that_is_hidden_is_no_matter_where_the_ledger_has_its_reservation(whole):
    shutil.rmtree(root_of(whole) / "log")
    line = whole.line()
    line.alter = lambda slot, data: None if slot[0] == "upload" else data
    ask(whole, line)


def test_a_strangers_upload_in_this_silos_place_is_named(whole):
    raw = whole.store.get("upload", 3, 1)
    other = keys.load(root_of(whole, 1) / "identity.key")
    context, body = decode(raw, Signed).context, decode(raw, Signed).body
    for forged in (
        raw,
        envelope.sign(other, type="upload", context=context, sender=LOST, body=body),
        envelope.sign(keys.load(root_of(whole) / "identity.key"), type="upload", context=context, sender=LOST, body=body),
    ):
        line = whole.line()
        line.alter = lambda slot, data, forged=forged: forged if slot == ("upload", 3, LOST) else data
        with pytest.raises(TrustError) as caught:
            ask(whole, line)
        assert caught.value.code == "upload-forged"


def test_another_upload_of_this_silo_with_a_larger_counter_stops_it(whole):
    """Both signatures hold; the ledger has no such entry: something else signs with this key."""
    own = keys.load(root_of(whole) / "identity.key")
    raw = whole.store.get("upload", 3, LOST)
    context, upload = decode(raw, Signed).context, decode(decode(raw, Signed).body, Upload)
    header = headers(whole)[3]
    changed = encode(type(header)(**{**{name: getattr(header, name) for name in header.__struct_fields__}, "ledger_counter": 99}))
    signed = envelope.sign(own, type="header", context=context, sender=LOST, body=changed)
    body = encode(Upload(**{**{name: getattr(upload, name) for name in upload.__struct_fields__}, "header": signed}))
    line = whole.line()
    shown = envelope.sign(own, type="upload", context=context, sender=LOST, body=body)
    line.alter = lambda slot, data: shown if slot == ("upload", 3, LOST) else data
    assert "entry 99" in refused(whole, line).message


def test_a_log_that_does_not_fit_its_head_is_refused(whole):
    put_back(whole)
    line = whole.line()
    line.alter = lambda slot, data: data[:-1] + bytes([data[-1] ^ 1]) if slot[0] == "log" else data
    with pytest.raises(TrustError):
        ask(whole, line)


def test_a_head_that_this_silo_cannot_read_is_not_used(whole):
    line = whole.line()
    stranger = keys.load(root_of(whole, 1) / "identity.key")
    text = notes.parse(whole.store.get("checkpoint", 4, AGGREGATOR)).text
    forged = notes.signed(text, name="hub", seed=stranger.sign_seed).to_bytes()
    line.alter = lambda slot, data: forged if slot == ("checkpoint", 4, AGGREGATOR) else data
    ask(whole, line)


# --- What is no roll-back ---------------------------------------------------------------------------------------------------------


def test_a_first_start_and_a_crash_after_the_reservation_pass(whole, tmp_path):
    fresh = Whole.create(tmp_path / "fresh")
    ask(fresh, fresh.line(), 1)
    with whole.silo(LOST) as running:
        running.gate.admit(4, b"n" * 16)
    ask(whole, whole.line())


def test_a_home_whose_keys_are_in_no_version_has_nothing_to_compare(whole, tmp_path):
    home = Home.create(tmp_path / "stranger")
    keys.create(home.identity_path, name="stranger", receives=False)
    rollback.require_newest(home, whole.line(), whole.history(LOST), [whole.accepted])


# --- Where it is asked ------------------------------------------------------------------------------------------------------------


def test_no_gate_opens_for_an_old_home(whole):
    """`silo join` and `silo train` both go through it, before anything is declared, caught up with or computed."""
    put_back(whole)
    home, settings = Home(root_of(whole)), settings_of(whole)
    before = home.ledger_path.read_bytes()
    with pytest.raises(LedgerBroken) as caught, commands._gate(home, whole.accepted, settings, 0, whole.line()):
        pytest.fail("it opened")
    assert caught.value.code == "ledger-behind"
    assert home.ledger_path.read_bytes() == before
    restore(whole)
    with commands._gate(home, whole.accepted, settings, 0, whole.line()) as gate:
        assert gate.spent().epsilon > 0


def test_an_old_home_does_not_train(whole):
    """The whole way of `silo train`: the first thing that is asked once the silo knows its contract."""
    put_back(whole)
    home, settings = Home(root_of(whole)), settings_of(whole)
    assert succession.at_work(home)[0].digest == whole.accepted.digest
    with pytest.raises(LedgerBroken) as caught, commands._at_work(home, settings, whole.line()):
        pytest.fail("it works")
    assert caught.value.code == "ledger-behind"


def settings_of(whole):
    config.write_commented(
        root_of(whole) / "silo.toml", name="silo-2", organisation="Hospital 2", url="http://127.0.0.1:1", fingerprint="",
        records="records.jsonl", epsilon=50.0, delta=1e-5,
    )  # fmt: skip
    return config.load(root_of(whole) / "silo.toml")
