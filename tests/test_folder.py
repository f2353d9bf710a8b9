# SPDX-License-Identifier: Apache-2.0
"""Documents in a folder: names, half copies, links, what a silo is shown, how a refusal comes back, and the mailbox's side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import service
from aggregator.mailbox import Mailbox
from privacy import folder
from privacy.envelope import sign
from privacy.errors import ConfigError, Equivocation, MachineError, Replay, TrustError
from privacy.folder import Posted, Sent
from privacy.messages import KINDS, Countersignature, EpochCall, encode
from privacy.secure_sum import epoch
from privacy.transparency import log
from silo import config
from silo.folder import FolderTransport
from silo.transport import HttpTransport
from tests.federation import START, Federation, signed_by_hub, silo_identity


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self):
        self.now, self.naps = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.naps.append(seconds)


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Hub:
    """A mailbox over a federation's store, which takes its turn whenever a silo sleeps; ``is_up`` may stop it."""

    def __init__(self, root):
        self.federation = Federation(root)
        self.root, self.is_up = root / "exchange", True
        self.clock = Clock()
        self.mailbox = self.opened()

    def opened(self) -> Mailbox:
        at = self.federation
        return Mailbox(self.root, home=at.home, store=at.store, board=at.board, clock=self.clock)

    def sleep(self, seconds):
        self.clock.sleep(seconds)
        if self.is_up:
            self.mailbox.once()

    def line(self, root=None, **options) -> FolderTransport:
        return FolderTransport(root or self.root, clock=self.clock, sleep=self.sleep, **options)

    def inbox(self, party=1):
        return sorted(path.name for path in (self.root / "inbox" / str(party)).glob("*"))

    def store(self, kind, number=1, party=0, data=None):
        """A document of the coordinator's, whatever it says."""
        self.federation.store.put_once(kind, number, party, data or f"{kind} {number} {party}".encode(), received_at=START)

    def file(self, kind, number=1, party=0):
        return next(self.root.glob(f"board/*/*-{kind}-{number}-{party}-*"))


@pytest.fixture
def hub(tmp_path):
    made = Hub(tmp_path)
    made.mailbox.once()
    yield made
    made.federation.store.close()


def countersignature(federation, silo=1, member=None):
    digest = federation.accepted.digest
    body = encode(Countersignature(contract=digest, member=member or silo))
    return sign(silo_identity(silo), type="countersignature", context=digest, sender=silo, body=body)


# --- Names ----------------------------------------------------------------------------------------------------------------------

SLOTS = {
    "kind": st.sampled_from(KINDS), "number": st.integers(0, 2**32 - 1), "digest": st.binary(min_size=32, max_size=32),
}  # fmt: skip


@given(sent=st.builds(Sent, **SLOTS))
def test_an_inbox_name_says_what_it_was_made_of(sent):
    assert Sent.named(sent.name) == sent


@given(posted=st.builds(Posted, **SLOTS, place=st.integers(0, 10**8 - 1), party=st.integers(0, 2**16 - 1)))
def test_a_board_name_says_what_it_was_made_of(posted):
    assert Posted.named(posted.name) == posted
    assert posted.folder == ("board", f"{posted.place // 1000:05d}")


D = "ab" * 32


@pytest.mark.parametrize(
    "name",
    [
        f"upload-1-{D}.part", f".upload-1-{D}", f"upload-1-{D.upper()}", f"upload-01-{D}", f"upload-+1-{D}", f"upload-１-{D}",
        f"upload-4294967296-{D}", f"upload-1-{D[:-2]}", f"upload-1-{D}ab", f"upload-1--{D}", f"UPLOAD-1-{D}", f"nothing-1-{D}",
        f"upload-1-{D}\n", f"header-1-{D}", f"../upload-1-{D}", f"upload-1-{D}.0123456789ab", "", "checkpoint", f"-1-{D}",
    ],
)  # fmt: skip
def test_any_other_name_is_none_at_all(name):
    assert Sent.named(name) is None
    assert Posted.named(f"00000001-{name}") is None


@pytest.mark.parametrize("name", ["00", "01", "65536", "-1", "1 ", "１", "", "..", "inbox", "9" * 30])
def test_an_inbox_of_no_party_is_not_entered(name):
    assert folder.party(name) is None


# --- Reading --------------------------------------------------------------------------------------------------------------------


def test_only_a_regular_file_with_the_digest_is_read(tmp_path):
    data = b"what it says"
    (tmp_path / "in").mkdir()
    for name, content in (("whole", data), ("half", data[:6]), ("other", data[::-1]), ("empty", b"")):
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "link").symlink_to("whole")
    (tmp_path / "in" / "folder").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    assert folder.read(tmp_path, "in", "whole", most=100, digest=sha(data)) == data
    assert folder.is_whole(tmp_path, "in", "whole", digest=sha(data), most=len(data))
    for name in ("half", "other", "empty", "link", "folder", "pipe", "none"):
        assert folder.read(tmp_path, "in", name, most=100, digest=sha(data)) is None, name
        assert not folder.is_whole(tmp_path, "in", name, digest=sha(data), most=len(data)), name


def test_no_link_below_the_root_is_followed_and_the_root_may_be_one(tmp_path):
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "real" / "in" / "file").write_bytes(b"x")
    (tmp_path / "real" / "aside").symlink_to("in")
    (tmp_path / "root").symlink_to("real")
    assert folder.read(tmp_path / "root", "in", "file", most=1, digest=sha(b"x")) == b"x"
    assert folder.read(tmp_path / "root", "aside", "file", most=1, digest=sha(b"x")) is None
    assert folder.names(tmp_path / "root", "aside") == []
    with pytest.raises(MachineError, match="is a link"):
        folder.write(tmp_path / "root", "aside", "new", data=b"y")
    assert not (tmp_path / "real" / "in" / "new").exists()


def test_no_more_than_the_cap_is_read(tmp_path, monkeypatch):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    real, read = os.read, []
    monkeypatch.setattr(os, "read", lambda fd, size: read.append(size) or real(fd, size))
    with pytest.raises(folder.TooLong):
        folder.read(tmp_path, "huge", most=5 << 20, digest=bytes(32))
    assert sum(read) <= 7 << 20


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")

    def broken(fd, size):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(MachineError, match=r"cannot read .*file: Input/output error"):
        folder.read(tmp_path, "file", most=1)


# --- What a silo is shown -------------------------------------------------------------------------------------------------------


def test_a_half_copied_document_is_not_there_until_it_is_whole(hub):
    line, path = hub.line(), hub.file("contract")
    data = path.read_bytes()
    for length in (0, 1, len(data) - 1):
        path.write_bytes(data[:length])
        assert line.get("contract", 1, 0, wait_s=0) is None
        hub.clock.now += 1
    path.write_bytes(data[:-1] + b"\0")  # as a copy program that sets the length first
    assert line.get("contract", 1, 0, wait_s=0) is None
    path.write_bytes(data)
    assert line.get("contract", 1, 0, wait_s=2) == data


def test_a_half_copied_document_is_not_read_over_and_over(hub, monkeypatch):
    line, path = hub.line(), hub.file("contract")
    path.write_bytes(path.read_bytes()[:-1])
    real, read = folder.is_whole, []
    monkeypatch.setattr(folder, "is_whole", lambda *words, **given: read.append(1) or real(*words, **given))
    hub.is_up = False
    assert line.get("contract", 1, 0, wait_s=10) is None
    assert 10 <= len(read) <= 21
    assert sum(hub.clock.naps) == pytest.approx(10)
    assert len(hub.clock.naps) < 60, "the folder is not asked in a tight loop"


def published(hub, *slots):
    for slot in slots:
        hub.store(*slot)
        if slot[0] == "manifest":
            hub.store("head", slot[1], 0, head(slot[1]))
    hub.mailbox.once()


def head(size: int) -> bytes:
    """A note that speaks of a log of this size; nobody signed it."""
    return f"trial/log\n{size}\n{'A' * 43}=\n\n— x AAAAAAA=\n".encode()


ROUND = (
    ("manifest", 1), ("upload", 1, 1), ("upload", 1, 2), ("freeze", 1), ("certificate", 1), ("outcome", 1), ("manifest", 2),
    ("upload", 2, 1), ("freeze", 2), ("outcome", 2),
)  # fmt: skip


def shown(line) -> list[bool]:
    return [line.get(*slot, *([0] if len(slot) == 2 else []), wait_s=0) is not None for slot in ROUND]


@pytest.mark.parametrize("missing", range(1, 11))
def test_a_document_is_shown_once_all_since_the_outcome_before_it_is_there(hub, missing):
    """An outcome without its freeze would look like the aggregator's fault; so no copy, however cut short, shows one."""
    published(hub, *ROUND)
    path = sorted(path for path in hub.root.glob("board/*/*") if "-head-" not in path.name)[missing]
    kept = path.read_bytes()
    for cut in (path.unlink, lambda: path.write_bytes(kept[:-1])):
        cut()
        last = 6 if missing < 6 else 10  # whoever has outcome 1 goes on from there
        assert shown(hub.line()) == [not missing <= place <= last for place in range(1, 11)], path.name
    path.write_bytes(kept)
    assert all(shown(hub.line()))


def test_a_manifest_is_shown_with_the_head_it_names(hub):
    line = hub.line()
    published(hub, ("manifest", 1))
    assert line.get("manifest", 1, 0, wait_s=0) is not None
    hub.store("manifest", 2)
    published(hub)
    assert hub.file("head").name.startswith("00000001-head-1-0-"), "its place is the size of the log it speaks of"
    assert line.get("manifest", 2, 0, wait_s=0) is None, "its own head is missing"
    hub.store("head", 2, 0, head(2))
    published(hub)
    assert line.get("manifest", 2, 0, wait_s=0) is not None
    assert line.get("head", 2, 0, wait_s=0) == head(2)


def test_what_was_shown_and_is_copied_over_is_waited_for(hub):
    def copying(seconds):
        hub.clock.sleep(seconds)
        if 3 < hub.clock.now < 4:
            path.write_bytes(data)

    path = hub.file("contract")
    line = FolderTransport(hub.root, clock=hub.clock, sleep=copying, patience_s=20)
    data = line.get("contract", 1, 0, wait_s=0)
    path.write_bytes(data[:10])
    assert line.get("contract", 1, 0, wait_s=0) == data
    path.unlink()
    hub.clock.now = 5
    with pytest.raises(MachineError, match=r"was in .* before and is not now") as caught:
        line.get("contract", 1, 0, wait_s=0)
    assert caught.value.code == "incomplete"
    assert hub.clock.now >= 20


def test_an_older_board_that_is_copied_back_takes_nothing_away(hub, tmp_path):
    published(hub, ("epoch", 1))
    shutil.copytree(hub.root, tmp_path / "old")
    published(hub, ("roster", 1), ("epoch", 2))
    line = hub.line()
    found = {slot: line.get(*slot, 0, wait_s=0) for slot in (("contract", 1), ("epoch", 1), ("roster", 1), ("epoch", 2))}
    assert None not in found.values()
    shutil.copytree(tmp_path / "old", hub.root, dirs_exist_ok=True)
    for view in (line, hub.line()):
        assert {slot: view.get(*slot, 0, wait_s=0) for slot in found} == found


def test_two_documents_in_one_slot_are_equivocation(hub):
    published(hub, ("epoch", 1))
    path = hub.file("epoch")
    path.with_name(f"{path.name[:-64]}{sha(b'other').hex()}").write_bytes(b"other")
    with pytest.raises(Equivocation, match="two documents on the board are the epoch 1"):
        hub.line().get("epoch", 1, 0, wait_s=0)


def test_many_shards_are_read_and_full_ones_are_left_alone(hub, monkeypatch):
    monkeypatch.setattr(folder, "PER_SHARD", 4)
    for number in range(1, 21):
        hub.store("epoch", number)
    mailbox = hub.opened()
    mailbox.once()
    (hub.root / "board" / "not-one").mkdir()
    line = hub.line()
    assert line.get("epoch", 20, 0, wait_s=0) == b"epoch 20 0"
    real, listed = folder.names, []
    monkeypatch.setattr(folder, "names", lambda root, *parts: listed.append(parts) or real(root, *parts))
    assert line.get("epoch", 20, 0, wait_s=0) == b"epoch 20 0"
    assert sorted(listed) == [("board",), ("board", "00004"), ("board", "00005")]
    next(hub.root.glob("board/00001/*")).unlink()
    hub.clock.now += 11
    assert line.get("epoch", 19, 0, wait_s=0) is None, "a hole is seen, some seconds later"


def test_a_folder_that_is_gone_is_waited_for_and_then_named(hub):
    away = hub.root.with_name("away")
    hub.root.rename(away)
    line = FolderTransport(hub.root, clock=hub.clock, sleep=hub.clock.sleep, patience_s=30)
    for call in (
        lambda: line.get("contract", 1, 0, wait_s=0), lambda: line.put("consent", 1, 1, b"x"), line.status,
        lambda: line.fetch("checkpoint"),
    ):  # fmt: skip
        before = hub.clock.now
        with pytest.raises(MachineError, match=r"there is no board in .*exchange after 30 s") as caught:
            call()
        assert 20 < hub.clock.now - before <= 30
        assert "mount it" in caught.value.hint
    assert not hub.root.exists(), "nothing is written where a disk should be mounted"
    hub.root.mkdir()
    with pytest.raises(MachineError, match="there is no board"):
        line.put("consent", 1, 1, b"x")
    assert list(hub.root.iterdir()) == []
    hub.root.rmdir()
    line = FolderTransport(
        hub.root, clock=hub.clock, sleep=lambda seconds: hub.clock.sleep(seconds) or (hub.root.exists() or away.rename(hub.root))
    )
    assert line.get("contract", 1, 0, wait_s=0) is not None


# --- Putting --------------------------------------------------------------------------------------------------------------------


def test_what_is_put_lies_in_the_inbox_until_it_is_accepted(hub):
    hub.is_up = False
    line, data = hub.line(), countersignature(hub.federation)
    for _ in range(2):
        line.put("countersignature", 1, 1, data)
        assert hub.inbox() == [f"countersignature-1-{sha(data).hex()}"]
    assert hub.clock.now == pytest.approx(2.0), "answer_s, each time"
    hub.is_up = True
    line.put("countersignature", 1, 1, data)
    assert hub.inbox() == []
    assert hub.line().get("countersignature", 1, 1, wait_s=0) == data


def test_an_accepted_document_leaves_the_inbox_also_when_the_silo_was_killed_before(hub):
    hub.is_up = False
    data = countersignature(hub.federation)
    hub.line().put("countersignature", 1, 1, data)
    hub.mailbox.once()
    assert hub.inbox() != []
    hub.line().put("countersignature", 1, 1, data)
    assert hub.inbox() == []


def test_what_a_killed_silo_left_half_written_is_swept_in_its_own_inbox_alone(hub):
    hub.is_up = False
    for party in ("1", "2"):
        (hub.root / "inbox" / party).mkdir()
        (hub.root / "inbox" / party / f".upload-1-{D}.0123456789ab").write_bytes(b"half")
    (hub.root / "inbox" / "1" / f".upload-1-{D}.XyZ123").write_bytes(b"rsync's")
    hub.line().put("countersignature", 1, 1, countersignature(hub.federation))
    assert [name for name in hub.inbox(1) if name.startswith(".")] == [f".upload-1-{D}.XyZ123"]
    assert hub.inbox(2) == [f".upload-1-{D}.0123456789ab"]


def test_what_waits_and_was_lost_or_overwritten_is_written_again(hub):
    hub.is_up = False
    line, data = hub.line(), countersignature(hub.federation)
    line.put("countersignature", 1, 1, data)
    path = hub.root / "inbox" / "1" / hub.inbox()[0]
    for spoil in (path.unlink, lambda: path.write_bytes(data[:9]), lambda: shutil.rmtree(hub.root / "inbox")):
        spoil()
        assert line.get("epoch", 1, 0, wait_s=6) is None
        assert path.read_bytes() == data


def test_a_refusal_that_comes_late_is_raised_by_the_next_call(hub):
    hub.is_up = False
    line = hub.line()
    line.put("countersignature", 1, 2, countersignature(hub.federation, silo=1))
    assert line.get("epoch", 1, 0, wait_s=0) is None
    hub.mailbox.once()
    assert line.get("contract", 1, 0, wait_s=0) is not None, "what is there is given first"
    with pytest.raises(TrustError) as caught:
        line.get("epoch", 1, 0, wait_s=0)
    assert caught.value.code == "wrong-sender"
    assert line.get("epoch", 1, 0, wait_s=0) is None, "once"
    with pytest.raises(TrustError):
        hub.line().put("countersignature", 1, 2, countersignature(hub.federation, silo=1))


def test_a_late_too_late_is_raised_by_its_own_put_alone(hub):
    hub.is_up = False
    line, sent = hub.line(), Sent(kind="consent", number=1, digest=sha(b"x"))
    line.put("consent", 1, 1, b"x")
    answer = {"code": "replay", "exit_code": 4, "message": "round 1 is settled", "hint": "go on"}
    folder.write(hub.root, "refused", "1", f"{sent.name}.json", data=json.dumps(answer).encode())
    assert line.get("outcome", 1, 0, wait_s=0) is None
    line.put("acknowledgement", 1, 1, b"y")
    with pytest.raises(Replay, match="round 1 is settled"):
        line.put("consent", 1, 1, b"x")


def test_a_half_copied_refusal_is_none_yet(hub):
    hub.is_up = False
    line, sent = hub.line(), Sent(kind="consent", number=1, digest=sha(b"x"))
    line.put("consent", 1, 1, b"x")
    path = hub.root / "refused" / "1" / f"{sent.name}.json"
    path.parent.mkdir()
    for text in ("", '{"code": "tru', "[]", "{}", "x" * 100_000):
        path.write_text(text)
        assert line.get("outcome", 1, 0, wait_s=0) is None
    path.write_text(json.dumps({"exit_code": 4, "message": "a\x1b[2Jb"}))
    with pytest.raises(TrustError) as caught:
        line.get("outcome", 1, 0, wait_s=0)
    assert "\x1b" not in caught.value.message


FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the kernel refuses every byte past 100: EFBIG, as ENOSPC would
from privacy.errors import MachineError
from silo.folder import FolderTransport
try:
    FolderTransport(Path(sys.argv[1]), answer_s=0).put("upload", 1, 1, b"x" * 300)
except MachineError as error:
    print(error.code, error.exit_code, error.hint)
"""


def test_a_full_folder_is_an_error_and_leaves_nothing_half_written(hub):
    done = subprocess.run([sys.executable, "-c", FULL, str(hub.root)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("cannot-write 7 free space"), done.stderr
    assert hub.inbox() == []


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(hub, monkeypatch):
    def refuse(path, flags, *rest, **given):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **given)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    line = hub.line()
    with pytest.raises(MachineError, match=r"cannot write .*inbox/1/.*Read-only file system"):
        line.put("countersignature", 1, 1, countersignature(hub.federation))
    assert line.get("contract", 1, 0, wait_s=0) is not None, "reading goes on"


def test_a_folder_on_which_no_links_can_be_made_will_do(tmp_path, monkeypatch):
    """FAT has no hard links."""

    def refuse(*_words, **_given):
        raise OSError(1, "Operation not permitted")

    hub = Hub(tmp_path)
    for call in ("link", "symlink"):
        real = getattr(os, call)
        monkeypatch.setattr(
            os, call, lambda a, b, real=real, **given: refuse() if str(b).startswith(str(hub.root)) else real(a, b, **given)
        )
    hub.mailbox.once()
    hub.line().put("countersignature", 1, 1, countersignature(hub.federation))
    assert hub.line().get("countersignature", 1, 1, wait_s=0) is not None
    hub.federation.store.close()


# --- The mailbox ----------------------------------------------------------------------------------------------------------------


def drop(hub, party, kind, number, data, name=None):
    """A file in an inbox, as anybody who may write there could leave it."""
    path = hub.root / "inbox" / str(party) / (name or f"{kind}-{number}-{sha(data).hex()}")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_only_whole_files_of_the_exact_name_are_taken(hub):
    data = countersignature(hub.federation)
    good = f"countersignature-1-{sha(data).hex()}"
    for name in (good + ".part", "." + good, good.upper(), f"countersignature-01-{sha(data).hex()}", f"upload-1-{D}"):
        drop(hub, 1, "", 0, data, name)
    box = hub.root / "inbox" / "1"
    (hub.root / "data").write_bytes(data)
    (box / good).symlink_to(hub.root / "data")
    (hub.root / "inbox" / "2").symlink_to(box)
    (hub.root / "inbox" / "01").mkdir()
    drop(hub, "01", "", 0, data, good)
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == ()
    assert list((hub.root / "refused").iterdir()) == []
    (box / good).unlink()
    drop(hub, 1, "", 0, data[:-1], good)
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == ()
    drop(hub, 1, "", 0, data, good)
    hub.clock.now += 2
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == (1,)
    assert list((hub.root / "refused").iterdir()) == []


def test_a_file_above_the_cap_is_refused_and_not_read(hub, monkeypatch):
    path = drop(hub, 1, "countersignature", 1, b"x", f"countersignature-1-{D}")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    real, read = os.read, []
    monkeypatch.setattr(os, "read", lambda fd, size: read.append(size) or real(fd, size))
    hub.mailbox.once()
    assert sum(read) <= 4 << 20
    answer = json.loads((hub.root / "refused" / "1" / f"countersignature-1-{D}.json").read_bytes())
    assert (answer["code"], answer["exit_code"]) == ("too-large", 4)


def test_one_bad_document_does_not_stop_the_others(hub):
    drop(hub, 1, "countersignature", 1, b"junk")
    drop(hub, 2, "freeze", 1, b"not yours")
    drop(hub, 3, "countersignature", 1, countersignature(hub.federation, 3))
    drop(hub, 9, "countersignature", 1, countersignature(hub.federation, 3))
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == (3,)
    codes = {path.parent.name: json.loads(path.read_bytes())["code"] for path in hub.root.glob("refused/*/*")}
    assert codes == {"1": "malformed", "2": "not-yours", "9": "unknown-member"}


def test_a_bug_met_by_one_document_does_not_stop_the_others(hub, monkeypatch):
    real = hub.federation.board.put

    def put(kind, number, party, data):
        if party == 1:
            raise ZeroDivisionError
        return real(kind, number, party, data)

    monkeypatch.setattr(hub.federation.board, "put", put)
    for silo in (1, 2):
        drop(hub, silo, "countersignature", 1, countersignature(hub.federation, silo))
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == (2,)
    assert list((hub.root / "refused").iterdir()) == [], "it is no fault of the silo's"
    monkeypatch.undo()
    hub.clock.now += 61
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == (1, 2)


def test_a_flooded_inbox_does_not_hold_up_the_others(hub):
    for number in range(200):
        drop(hub, 1, "countersignature", number, b"junk")
    drop(hub, 2, "countersignature", 1, countersignature(hub.federation, 2))
    hub.mailbox.once()
    assert hub.federation.store.parties("countersignature", 1) == (2,)
    assert len(list(hub.root.glob("refused/1/*"))) < 200
    for _ in range(3):
        hub.mailbox.once()
    assert len(list(hub.root.glob("refused/1/*"))) == 200


def test_what_comes_before_its_step_waits_for_it(hub):
    """Over HTTP the silo is told that it is too early; files keep no order, so here the mailbox does."""
    digest = hub.federation.accepted.digest
    note = epoch.note_of(epoch.new_note(digest, 1, 1, bytes(32))[0])
    early = sign(silo_identity(1), type="epoch-note", context=digest, sender=1, body=encode(note))
    drop(hub, 1, "epoch-note", 1, early)
    drop(hub, 2, "epoch-note", 1, b"junk")
    hub.mailbox.once()
    assert hub.federation.store.entry("epoch-note", 1, 1) is None
    assert list((hub.root / "refused").iterdir()) == []
    hub.store("epoch", 1, 0, signed_by_hub("epoch", digest, EpochCall(contract=digest, epoch=1)))
    hub.clock.now += 2
    hub.mailbox.once()
    assert hub.federation.store.get("epoch-note", 1, 1) == early
    assert len(list(hub.root.glob("refused/2/*"))) == 1, "and what is no note is refused in its time"


def test_what_was_refused_or_taken_is_not_looked_at_again(hub, monkeypatch):
    drop(hub, 1, "countersignature", 1, b"junk")
    drop(hub, 2, "countersignature", 1, countersignature(hub.federation, 2))
    hub.mailbox.once()
    again = hub.opened()
    monkeypatch.setattr(folder, "read", None)
    for mailbox in (hub.mailbox, again, again):
        mailbox.once()
        hub.clock.now += 5


def test_a_file_that_is_gone_or_cut_is_published_again(hub):
    published(hub, ("epoch", 1))
    first, second = hub.file("contract"), hub.file("epoch")
    kept = first.read_bytes()
    first.unlink()
    second.write_bytes(b"e")
    hub.mailbox.once()
    assert not first.exists()
    hub.clock.now += 61
    hub.mailbox.once()
    assert first.read_bytes() == kept
    assert second.read_bytes() == b"epoch 1 0"
    shutil.rmtree(hub.root / "board")
    hub.opened().once()
    assert first.read_bytes() == kept


def test_a_damaged_file_of_evidence_stops_no_other(hub):
    hub.store("epoch", 1)
    hub.store("epoch", 2)
    (hub.federation.home.evidence_folder / sha(b"epoch 1 0").hex()).write_bytes(b"damaged!!")
    hub.mailbox.once()
    assert not list(hub.root.glob("board/*/*-epoch-1-*"))
    assert hub.file("epoch", 2).read_bytes() == b"epoch 2 0"


def logged(hub, leaves: int) -> dict[str, bytes]:
    """The files of a log of so many leaves, as the journal leaves them in the home; nobody signed its checkpoint."""
    leaf = log.Leaf(kind="upload", number=1, party=1, digest=bytes(32), header=bytes(32), time=0)
    files = {
        "checkpoint": head(leaves),
        f"tile/0/000.p/{leaves}": b"".join(sha(bytes([place])) for place in range(leaves)),
        f"tile/entries/000.p/{leaves}": log.bundle([encode(leaf)] * leaves),
    }
    for name, data in {**files, "signed": b"private", ".tile.0123456789ab": b"half"}.items():
        (hub.federation.home.log_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.federation.home.log_folder / name).write_bytes(data)
    return files


def test_the_public_log_is_copied_and_the_private_head_is_not(hub):
    files = logged(hub, 3)
    published(hub, ("epoch", 1))
    line = hub.line(patience_s=5)
    assert {name: line.fetch(name) for name in files} == files
    assert {str(p.relative_to(hub.root / "log")) for p in (hub.root / "log").rglob("*") if p.is_file()} == set(files)
    files |= logged(hub, 4)
    hub.mailbox.once()
    assert line.fetch("checkpoint") == head(4), "it is replaced"
    hub.store("epoch", 2)
    hub.mailbox.once()
    assert {name: line.fetch(name) for name in files} == files
    with pytest.raises(MachineError, match="has no log/tile/0/001") as caught:
        line.fetch("tile/0/001")
    assert caught.value.code == "incomplete"
    for path in ("signed", "../status.json", "tile/../checkpoint", "/etc/passwd", ""):
        with pytest.raises(TrustError, match="is no file of a log"):
            line.fetch(path)


def test_a_half_copied_file_of_the_log_is_waited_for(hub):
    files = logged(hub, 3)
    published(hub, ("epoch", 1))
    for name, data in files.items():
        path = hub.root / "log" / name
        for half in (b"", data[:40], data[:-1], data[:-20] + bytes(20), data[:-40] + bytes(40)):
            path.write_bytes(half)

            def copying(seconds, path=path, data=data):
                hub.clock.sleep(seconds)
                path.write_bytes(data)

            assert FolderTransport(hub.root, clock=hub.clock, sleep=copying).fetch(name) == data, half


def test_folder_and_http_serve_one_federation_side_by_side(tmp_path):
    """A mailbox and a service over one store: each silo takes the way it has."""
    hub = Hub(tmp_path)
    listener = service.listen("127.0.0.1", 0)
    server = service.server(service.create_app(hub.federation.board))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        near = HttpTransport(f"http://127.0.0.1:{listener.getsockname()[1]}")
        far = hub.line()
        first, second = countersignature(hub.federation, 1), countersignature(hub.federation, 2)
        near.put("countersignature", 1, 1, first)
        far.put("countersignature", 1, 2, second)
        assert far.get("countersignature", 1, 1, wait_s=5) == first
        assert near.get("countersignature", 1, 2, wait_s=5) == second
        near.close()
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        hub.federation.store.close()


# --- Configuration --------------------------------------------------------------------------------------------------------------

GIVEN = {"name": "north", "organisation": "N", "fingerprint": "ab", "records": "r.jsonl", "epsilon": 8.0, "delta": 1e-6}


def test_silo_toml_names_an_address_or_a_folder(tmp_path):
    config.write_commented(tmp_path / "silo.toml", **GIVEN, folder="exchange")
    assert config.load(tmp_path / "silo.toml").aggregator.folder == str(tmp_path / "exchange")
    assert config.load(tmp_path / "silo.toml").aggregator.url == ""
    config.write_commented(tmp_path / "other.toml", **GIVEN, url="https://hub.example")
    assert config.load(tmp_path / "other.toml").aggregator.folder == ""


@pytest.mark.parametrize("where", [{}, {"url": "https://hub.example", "folder": "exchange"}])
def test_silo_toml_names_exactly_one_of_the_two(tmp_path, where):
    with pytest.raises(ConfigError, match="give either url or folder"):
        config.write_commented(tmp_path / "silo.toml", **GIVEN, **where)
    assert not (tmp_path / "silo.toml").exists()
