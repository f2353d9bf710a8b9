# SPDX-License-Identifier: Apache-2.0
"""A silo's eye on the log, against an honest log and against every lie that a log can tell: each is refused by its name."""

from __future__ import annotations

import hashlib
import json

import pytest

from privacy import federation, files
from privacy.errors import Equivocation, TrustError
from privacy.identity.keys import Identity
from privacy.messages import encode
from privacy.transparency import log, notes
from privacy.transparency.log import Leaf
from privacy.transparency.notes import VerifierKey
from privacy.transparency.tree import Tree
from silo import watch
from silo.home import Home
from silo.watch import Watch
from tests.terms import contract_bytes, public, seed

ACCEPTED = federation.parse(contract_bytes(3))
TERMS = ACCEPTED.terms
CONTRACT = b"the signed contract"


def leaf(kind, number, party, document, time=5):
    return Leaf(kind=kind, number=number, party=party, digest=hashlib.sha256(document).digest(), time=time)


class Keeper:
    """A log that says whatever the test wants, and the silo's transport to it."""

    def __init__(self, *leaves):
        self.leaves = [leaf("contract", 1, 0, CONTRACT), *leaves]
        self.documents, self.fetched, self.damage = {}, [], {}

    def tree(self, size):
        made = Tree()
        for each in self.leaves[:size]:
            made.append(encode(each))
        return made

    def show(self, number, size=None, *, root=None, origin="test-federation/log", signer=100):
        size = len(self.leaves) if size is None else size
        head = notes.Checkpoint(origin=origin, size=size, root=root or self.tree(size).root())
        self.documents["checkpoint", number, 0] = notes.signed(head.text, name=origin, seed=seed(signer)).to_bytes()
        return head

    def cosigned(self, number, *silos):
        note = notes.parse(self.documents["checkpoint", number, 0])
        lines = [notes.cosigned(note.text, name=f"test-federation/silo-{i}", seed=seed(i), time=3) for i in silos]
        self.documents["head", number, 0] = notes.joined(note, lines).to_bytes()

    def get(self, kind, number, party, *, wait_s):
        return self.documents.get((kind, number, party))

    def put(self, kind, number, party, data):
        assert self.documents.setdefault((kind, number, party), data) == data

    def fetch(self, path):
        """Any resource of the log as it is now, whatever its size was when it was asked for."""
        self.fetched.append(path)
        assert log.is_resource(path)
        for level, index, width in self._places():
            if path == log.tile_path(level, index, width):
                start = index * 256
                if level == "entries":
                    found = log.bundle([encode(each) for each in self.leaves[start : start + width]])
                else:
                    found = b"".join(self.tree(len(self.leaves)).nodes(8 * level, start, width))
                return self.damage.get(path, lambda same: same)(found)
        return None

    def _places(self):
        for size in range(1, len(self.leaves) + 1):
            if size > len(self.leaves) - 60 or size % 256 == 0:
                for level, index, width in log.tiles_of(size):
                    yield level, index, width
                    if level == 0:
                        yield "entries", index, width


class Party:
    """A silo's home and what watches in it; ``watch`` is new after a restart."""

    def __init__(self, root, keeper, silo=1):
        self.home, self.keeper, self.id = Home.create(root / f"silo-{silo}"), keeper, silo
        self.home.keep_contract(1, CONTRACT)
        self.restarted()

    def restarted(self):
        identity = Identity(name=f"silo-{self.id}", sign_seed=seed(self.id))
        self.watch = Watch(home=self.home, transport=self.keeper, identity=identity, accepted=ACCEPTED, clock=lambda: 1234.5)
        return self

    def expect(self, kind, number, document, party=0, due=None):
        watch.expect(self.home, kind, number, party, document, due=number + 1 if due is None else due)

    def follow(self, number):
        return self.watch.follow(number, wait_s=0)

    def kept(self, name):
        path = self.home.log_folder / name
        return path.read_bytes() if path.is_file() else None

    def refuses(self, number, code, kind=TrustError):
        """It refuses this head by this name, keeps the one it had, and cosigns nothing."""
        before = self.kept("head")
        with pytest.raises(kind) as caught:
            self.follow(number)
        assert caught.value.code == code, caught.value
        assert self.kept("head") == before
        assert ("cosignature", number, self.id) not in self.keeper.documents
        assert self.kept(f"cosignature-{number}") is None
        return caught.value


@pytest.fixture
def keeper():
    return Keeper(leaf("roster", 1, 0, b"roster"))


@pytest.fixture
def party(tmp_path, keeper):
    return Party(tmp_path, keeper)


def settle(party, number, *, upload=True):
    """A round passes: upload and outcome are on the board and in the log."""
    party.expect("upload", number, b"upload %d" % number, party=party.id)
    party.expect("outcome", number, b"outcome %d" % number)
    if upload:
        party.keeper.leaves.append(leaf("upload", number, party.id, b"upload %d" % number))
    party.keeper.leaves.append(leaf("outcome", number, 0, b"outcome %d" % number))


# --- An honest log -----------------------------------------------------------------------------------------------------


def test_no_head_yet_is_no_error(party) -> None:
    assert party.follow(1) is False
    assert party.kept("head") is None


def test_a_head_is_checked_written_down_and_cosigned(party, keeper) -> None:
    party.expect("roster", 1, b"roster", due=1)
    head = keeper.show(1)
    assert party.follow(1) is True
    assert party.kept("head") == keeper.documents["checkpoint", 1, 0]
    raw = keeper.documents["cosignature", 1, 1]
    log.open_cosignature(raw, keeper.documents["checkpoint", 1, 0], TERMS, 1)
    assert raw == party.kept("cosignature-1")
    assert not list(party.home.log_folder.glob("expect-*"))
    keeper.cosigned(1, 1, 2, 3)
    assert party.watch.head(1) == head


def test_many_rounds_leave_receipts_that_anybody_can_check(party, keeper) -> None:
    keeper.show(1)
    for number in range(1, 8):
        assert party.follow(number)
        settle(party, number)
        keeper.leaves += [leaf("consent", number, i, b"%d" % number) for i in range(60)]
        keeper.show(number + 1)
        assert party.follow(number + 1)
        for kind, who in (("upload", 1), ("outcome", 0)):
            found, index, note = log.open_receipt(party.kept(f"receipt-{kind}-{number}"), TERMS)
            assert found == leaf(kind, number, who, f"{kind} {number}".encode())
            assert keeper.leaves[index] == found
            assert log.cosigned_by(note, TERMS) == ()
        keeper.cosigned(number + 1, 1, 2, 3)
        party.watch.head(number + 1)
        for kind in ("upload", "outcome"):
            assert log.cosigned_by(log.open_receipt(party.kept(f"receipt-{kind}-{number}"), TERMS)[2], TERMS) == (1, 2, 3)
    assert len(keeper.leaves) > 256


def test_a_step_costs_one_file_or_two(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    for number, files_read in ((1, 1), (2, 1)):
        settle(party, number)
        keeper.show(number + 1)
        keeper.fetched.clear()
        party.follow(number + 1)
        assert len(keeper.fetched) == files_read
        party.follow(number + 1)
        assert len(keeper.fetched) == files_read, "once is enough"


def test_a_silo_that_was_away_takes_one_large_step(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    keeper.leaves += [leaf("consent", i, 1, b"%d" % i) for i in range(700)]
    keeper.show(9)
    assert party.follow(9)


def test_a_restart_sends_the_same_bytes(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    first = keeper.documents["cosignature", 1, 1]
    party.restarted().watch._clock = lambda: 9999.0
    assert party.follow(1)
    assert keeper.documents["cosignature", 1, 1] == first


def test_the_head_is_on_the_disk_before_the_cosignature_is_and_that_before_it_leaves(party, keeper, monkeypatch) -> None:
    order = []
    for name in ("write_atomic", "write_once"):
        real = getattr(files, name)
        monkeypatch.setattr(
            files, name, lambda path, data, real=real, **more: (order.append(path.name), real(path, data, **more))[1]
        )
    put = keeper.put
    keeper.put = lambda *args: (order.append("sent"), put(*args))[1]
    keeper.show(1)
    party.follow(1)
    assert order == ["head", "cosignature-1", "sent"]


def test_one_that_is_no_cosigner_only_watches(tmp_path, keeper) -> None:
    stranger = Party(tmp_path, keeper, silo=77)
    keeper.show(1)
    assert stranger.follow(1)
    assert not [slot for slot in keeper.documents if slot[0] == "cosignature"]
    assert stranger.kept("head")


def test_a_roster_may_come_one_head_later(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    settle(party, 1)
    party.expect("roster", 2, b"roster 2", due=3)
    keeper.show(2)
    party.follow(2)
    settle(party, 2)
    keeper.show(3)
    party.refuses(3, "log-leaf-missing")
    keeper.leaves.append(leaf("roster", 2, 0, b"roster 2"))
    keeper.show(3)
    assert party.follow(3)


def test_a_document_that_is_due_is_also_found_before_the_last_head(party, keeper) -> None:
    """As after a crash: it was written down again although the head that has it was read."""
    keeper.show(1)
    party.follow(1)
    party.expect("roster", 1, b"roster", due=1)
    settle(party, 1)
    keeper.show(2)
    assert party.restarted().follow(2)
    assert not list(party.home.log_folder.glob("expect-*"))


def test_expecting_twice_is_the_same_and_another_document_is_refused(party) -> None:
    party.expect("roster", 1, b"roster", due=1)
    party.expect("roster", 1, b"roster", due=3)
    with pytest.raises(Equivocation):
        party.expect("roster", 1, b"another", due=1)


# --- A log that lies ---------------------------------------------------------------------------------------------------


def contradicted(party, number):
    """It stops for good, with both heads in a file that proves the lie to anybody."""
    error = party.refuses(number, "log-equivocation", Equivocation)
    (path,) = party.home.log_folder.glob("equivocation-*.json")
    evidence = json.loads(path.read_text())
    heads = [log.open_checkpoint(notes.parse(evidence[name].encode()), TERMS) for name in ("first", "second")]
    assert heads[0] != heads[1]
    assert str(path) == error.facts["file"]
    for _ in range(2):
        with pytest.raises(Equivocation) as caught:
            party.restarted()
        assert caught.value.code == "log-equivocation"
        with pytest.raises(Equivocation):
            watch.refuse_after_equivocation(party.home)
    return path


def test_split_view_a_log_that_goes_on_from_another_past_is_stopped(party, keeper) -> None:
    keeper.leaves += [leaf("consent", 1, i, b"x") for i in range(5)]
    keeper.show(1)
    party.follow(1)
    settle(party, 1)
    keeper.leaves[3] = leaf("consent", 1, 9, b"what the others were shown")
    keeper.show(2)
    path = contradicted(party, 2)
    path.unlink()  # a person looked at it
    keeper.leaves[3] = leaf("consent", 1, 1, b"x")
    keeper.show(2)
    assert party.restarted().follow(2)


def test_split_view_of_a_large_log(party, keeper) -> None:
    keeper.leaves += [leaf("consent", i, 1, b"x") for i in range(600)]
    keeper.show(1)
    party.follow(1)
    settle(party, 1)
    keeper.leaves[10] = leaf("consent", 8, 1, b"y")
    keeper.show(2)
    contradicted(party, 2)


def test_two_heads_of_one_size_are_stopped(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    keeper.leaves[1] = leaf("roster", 1, 0, b"another roster")
    keeper.show(2)
    contradicted(party, 2)


def test_two_heads_for_one_round_are_refused_after_a_restart(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    keeper.leaves.append(leaf("consent", 1, 1, b"x"))
    keeper.show(1)  # it grew consistently, and still: one round has one head
    with pytest.raises(TrustError) as caught:
        party.restarted().follow(1)
    assert caught.value.code == "log-head-changed"


def test_rewind_a_head_below_the_last_is_stale(party, keeper) -> None:
    keeper.leaves += [leaf("consent", 1, i, b"x") for i in range(5)]
    keeper.show(1)
    party.follow(1)
    for size in (1, 3, 6):
        keeper.show(2, size)
        party.refuses(2, "log-stale")
    assert not list(party.home.log_folder.glob("equivocation-*"))
    party.restarted()


@pytest.mark.parametrize("kind", ["outcome", "roster", "contract"])
def test_a_dropped_leaf_is_refused_by_name(party, keeper, kind) -> None:
    keeper.show(1)
    if kind != "contract":
        party.follow(1)
        settle(party, 1)
        party.expect("roster", 2, b"roster 2", due=2)
        keeper.leaves.append(leaf("roster", 2, 0, b"roster 2"))
    keeper.leaves = [
        each
        for each in keeper.leaves
        if (each.kind, each.number) not in ((kind, 2), (kind, 1)) or (kind, each.number) == ("roster", 1)
    ]
    keeper.show(2)
    assert kind in party.refuses(2, "log-leaf-missing").message


@pytest.mark.parametrize("kind", ["outcome", "upload", "contract"])
def test_a_changed_leaf_is_refused_by_name(party, keeper, kind) -> None:
    keeper.show(1)
    if kind != "contract":
        party.follow(1)
        settle(party, 1)
    keeper.leaves = [leaf(each.kind, each.number, each.party, b"another") if each.kind == kind else each for each in keeper.leaves]
    keeper.show(2)
    assert kind in party.refuses(2, "log-leaf-changed").message


def test_an_upload_without_a_leaf_leaves_a_signed_complaint_and_the_silo_goes_on(party, keeper) -> None:
    keeper.show(1)
    party.follow(1)
    settle(party, 1, upload=False)
    head = keeper.show(2)
    assert party.follow(2)
    note = notes.parse(party.kept("complaint-1"))
    key = VerifierKey(name="test-federation/silo-1", key=bytes.fromhex(public(1)))
    assert notes.verified(note, [key]) == (key,)
    for word in ("round 1\n", "silo 1\n", hashlib.sha256(b"upload 1").hexdigest(), head.text):
        assert word in note.text
    assert party.kept("receipt-upload-1") is None
    assert party.kept("receipt-outcome-1") is not None
    with pytest.raises(TrustError):
        notes.checkpoint(note.text)  # it can never pass for a head


def test_a_head_that_the_aggregator_did_not_sign_or_of_another_log_is_refused(party, keeper) -> None:
    keeper.show(1, signer=1)
    party.refuses(1, "log-unsigned")
    keeper.show(1, origin="other-federation/log")
    party.refuses(1, "log-origin")
    keeper.documents["checkpoint", 1, 0] = b"nonsense"
    party.refuses(1, "malformed")


def test_files_that_do_not_fit_the_head_are_refused_and_are_no_evidence(party, keeper) -> None:
    head = keeper.show(1)
    path = log.tile_path("entries", 0, head.size)
    for damage in (lambda data: data[:-1] + b"x", lambda data: None, lambda data: data + b"x", lambda data: b""):
        keeper.damage[path] = damage
        party.refuses(1, "log-damaged")
    del keeper.damage[path]
    keeper.show(2, root=bytes(32))
    party.refuses(2, "log-damaged")
    assert not list(party.home.log_folder.glob("equivocation-*"))
    assert party.restarted().follow(1)


def test_the_round_needs_a_head_that_a_quorum_cosigned(party, keeper) -> None:
    def refused(code):
        with pytest.raises(TrustError) as caught:
            party.watch.head(1)
        assert caught.value.code == code

    keeper.show(1)
    keeper.cosigned(1, 1, 2, 3)
    refused("log-no-head")  # nothing was followed
    del keeper.documents["head", 1, 0]
    party.follow(1)
    refused("log-no-head")
    keeper.cosigned(1, 1, 2)
    refused("log-quorum")
    checkpoint = keeper.documents["checkpoint", 1, 0]
    keeper.leaves.append(leaf("consent", 1, 1, b"x"))
    keeper.show(1)
    keeper.cosigned(1, 1, 2, 3)
    refused("log-head-changed")  # a quorum saw another one
    keeper.documents["checkpoint", 1, 0] = checkpoint
    keeper.cosigned(1, 1, 2, 3)
    raw = keeper.documents["head", 1, 0]
    for bit in range(0, 8 * len(raw), 5):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        keeper.documents["head", 1, 0] = bytes(changed)
        with pytest.raises(TrustError):
            party.watch.head(1)
    keeper.documents["head", 1, 0] = raw
    party.watch.head(1)


def test_two_silos_that_are_shown_different_logs_never_meet_in_a_head(tmp_path, keeper) -> None:
    """In consent mode q is all: whatever the aggregator joins, it lacks a cosignature of one of them."""
    fork = Keeper(leaf("roster", 1, 0, b"another roster"))
    shown = {1: keeper, 2: keeper, 3: fork}
    parties = {silo: Party(tmp_path, at, silo) for silo, at in shown.items()}
    keeper.show(1)
    fork.show(1)
    lines = {}
    for silo, each in parties.items():
        each.follow(1)
        lines[silo] = notes.parse(shown[silo].documents["cosignature", 1, silo])
    for at in (keeper, fork):
        checkpoint = notes.parse(at.documents["checkpoint", 1, 0])
        for moved in lines.values():  # every line put under this text
            try:
                note = notes.joined(checkpoint, [notes.Note(text=checkpoint.text, lines=moved.lines)])
                assert len(log.cosigned_by(note, TERMS)) <= 1
            except TrustError:
                continue
        at.documents["head", 1, 0] = notes.joined(checkpoint, [n for n in lines.values() if n.text == checkpoint.text]).to_bytes()
    for each in parties.values():
        with pytest.raises(TrustError) as caught:
            each.watch.head(1)
        assert caught.value.code == "log-quorum"


@pytest.mark.parametrize("name", ["head", "expect-outcome-1-0"])
def test_a_damaged_file_of_its_own_is_no_reason_to_go_on(party, keeper, name) -> None:
    keeper.show(1)
    party.follow(1)
    settle(party, 1)
    keeper.show(2)
    path = party.home.log_folder / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TrustError):
        party.restarted().follow(2)
    assert ("cosignature", 2, 1) not in keeper.documents
