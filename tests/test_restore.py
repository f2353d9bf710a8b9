# SPDX-License-Identifier: Apache-2.0
"""A silo that is restored from a backup: what it charges, what it never says again, and how it goes on; killed anywhere too."""

from __future__ import annotations

import functools
import itertools
import os
import shutil

import pytest

from privacy.dp.entries import Commit, Reserve, Void
from privacy.errors import BudgetExhausted, Equivocation, LedgerBroken, TrustError
from privacy.identity import keys
from privacy.messages import AGGREGATOR, Header, Signed, Upload, decode
from privacy.transparency import log, notes
from silo import config, restoring
from silo.home import Home
from tests import crash, sessions, test_guardian
from tests.sessions import Terminal
from tests.test_service import Running
from tests.whole import PATIENCE_S, PowerCut, Whole, contribution, together

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
MODES = {"consent": ((1, 2, 3), {}), "shares": ((1, 2, 3, 4), SHARES)}
LOST = 2
"""The silo whose disk is lost."""
RESTORE = ("silo", "restore", "--never-alone", "--yes")

pytestmark = pytest.mark.usefixtures("quick_polls")


def root_of(whole, silo=LOST):
    return whole.root / f"silo-{silo}"


def back_up(whole, silo=LOST):
    """Copy the home but for epoch/, as docs/guides/backup.md says."""
    to = whole.root / "backup"
    shutil.copytree(root_of(whole, silo), to, ignore=shutil.ignore_patterns("epoch", "*.lock", ".lock"))
    return to


def put_back(whole, silo=LOST):
    shutil.rmtree(root_of(whole, silo))
    shutil.copytree(whole.root / "backup", root_of(whole, silo))


def restore(whole, silo=LOST, **options):
    home = Home(root_of(whole, silo))
    with home.locked():
        return restoring.restored(home, whole.line(), **options)


def stumbling(silo):
    """A contribution that fails once: its attempt stays charged, and a second one is made."""
    calls = []

    def contribute(state):
        calls.append(state)
        if len(calls) == 1:
            raise PowerCut
        return contribution(silo)(state)

    return contribute


def run_stumbling(whole, number, silo=LOST):
    contribute = stumbling(silo)

    def stumbles():
        with pytest.raises(PowerCut):
            whole.take_part(silo, number, contribute=contribute)
        whole.take_part(silo, number, contribute=contribute)

    others = [functools.partial(whole.take_part, each, number) for each in whole.silos if each != silo]
    together(stumbles, *others, functools.partial(whole.coordinate, number))


def made(root, mode):
    """Three rounds; the backup is of after the first one; two attempts were made at the third."""
    silos, table = MODES[mode]
    whole = Whole.create(root / "federation", silos=silos, sum=table)
    whole.run(1)
    back_up(whole)
    whole.run(2)
    run_stumbling(whole, 3)
    return whole


@pytest.fixture(scope="module", params=sorted(MODES))
def lost(request, tmp_path_factory):
    """A federation of each mode, whose second silo lost its disk after round 3 and has its backup back."""
    whole = made(tmp_path_factory.mktemp("restore"), request.param)
    shutil.copytree(root_of(whole), whole.root / "as-it-was")
    put_back(whole)
    return whole


@pytest.fixture
def whole(lost, tmp_path):
    return lost.copied(tmp_path / "federation")


def go_on(whole, last, **options):
    """``whole.run`` after the coordinator called a new epoch."""

    def coordinate():
        with whole.coordinator() as coordinator:
            coordinator.new_epoch()
            return [coordinator.run_round(number) for number in range(coordinator.next_round, last + 1)]

    before = whole.store.latest("epoch")

    def takes_part(silo):
        sessions.until(lambda: whole.store.latest("epoch") != before)  # the old one is settled, and says so
        return whole.take_part(silo, last, **options)

    *settled, closed = together(*(functools.partial(takes_part, silo) for silo in whole.silos), coordinate)
    return dict(zip(whole.silos, settled, strict=True)), closed


def headers(whole, silo=LOST):
    """Every header that this silo sent, by round."""
    found = {}
    for number in range(1, (whole.store.latest("upload") or 0) + 1):
        if (raw := whole.store.get("upload", number, silo)) is not None:
            found[number] = decode(decode(decode(decode(raw, Signed).body, Upload).header, Signed).body, Header)
    return found


def said(history):
    """A ledger without times and signatures."""
    return [(type(body).__name__, getattr(body, "round", 0), getattr(body, "attempt", "")) for body in history.entries]


# --- Formal guarantees ------------------------------------------------------------------------------------------------------------


def test_never_understated(whole):
    """The backup knows of round 1; afterwards the ledger has every attempt of rounds 2 and 3, where the signed headers say."""
    as_it_was = crash.history(whole.root / "as-it-was")
    assert [len(whole.attempts(LOST, number)) for number in (1, 2, 3)] == [1, 0, 0]
    facts = restore(whole)
    assert facts["charged"] == [{"round": 2, "attempts": 1}, {"round": 3, "attempts": 2}]
    history = whole.history(LOST)
    assert history.charged() == as_it_was.charged(), "not one attempt less, and not one more"
    for number, header in headers(whole).items():
        body = history.entries[header.ledger_counter - 1]
        assert isinstance(body, Reserve)
        assert (body.round, body.attempt) == (number, header.attempt.hex())
    assert history.counter >= headers(whole)[3].ledger_counter


def test_nothing_said_twice(whole):
    before = whole.root / "as-it-was"
    restore(whole)
    home = Home(root_of(whole))
    assert list(home.epoch_folder.iterdir()) == []
    assert home.epoch_folder.stat().st_mode & 0o777 == 0o700
    assert home.restored_epoch() == 1
    for number in (2, 3):
        assert home.promised_manifest(number) == Home(before).promised_manifest(number)
        assert (home.log_folder / f"cosignature-{number}").read_bytes() == (before / "log" / f"cosignature-{number}").read_bytes()
    with pytest.raises(Equivocation):
        home.promise_manifest(3, b"x" * 32)


def test_repeatable(whole):
    restore(whole)
    first = said(whole.history(LOST))
    facts = restore(whole)
    assert facts["charged"] == []
    assert said(whole.history(LOST)) == first


# --- Going on ---------------------------------------------------------------------------------------------------------------------


def test_a_restored_silo_enters_a_new_epoch_and_all_agree(whole):
    restore(whole)
    settled, closed = go_on(whole, 5)
    assert [c.kind for c in closed] == ["result", "result"]
    assert [each.round for each in settled[LOST]] == [2, 3, 4, 5], "it follows what it missed"
    assert {whole.progress(s).state.digest for s in whole.silos} == {closed[-1].state}
    assert {whole.progress(s).epoch for s in whole.silos} == {2}
    assert [len(whole.attempts(LOST, number)) for number in range(1, 6)] == [1, 1, 2, 1, 1]
    counters = [header.ledger_counter for header in headers(whole).values()]
    assert counters == sorted(set(counters))
    entries = whole.history(LOST).entries
    assert [body.round for body in entries if isinstance(body, Commit | Void)] == [1, 2, 3, 4, 5]
    assert not Home(root_of(whole)).restored_path.exists(), "the restore is over"


@pytest.mark.parametrize("old", ["the whole home", "its ledger"])
def test_without_restore_the_same_home_is_refused(whole, old):
    """Its documents contradict what it said before; where only the ledger is old, the aggregator sees that by the counter."""
    if old == "its ledger":
        shutil.rmtree(root_of(whole))
        shutil.copytree(whole.root / "as-it-was", root_of(whole), ignore=shutil.ignore_patterns("epoch"))
        shutil.copy(whole.root / "backup" / "ledger.jsonl", root_of(whole) / "ledger.jsonl")
    with pytest.raises(TrustError) as refused:
        go_on(whole, 4)
    assert refused.value.code in {"its ledger": ["ledger-rolled-back"], "the whole home": ["equivocation", "wrong-context"]}[old]
    assert 4 not in headers(whole)


def test_a_restored_silo_does_not_enter_the_epoch_it_was_in(whole):
    """Until the coordinator calls a new one it follows what there is, and says nothing."""
    restore(whole)
    stored = len(whole.store.log)
    with whole.silo(LOST) as running:
        assert [each.round for each in running.rounds(2)] == [2, 3]
    kinds = {slot[0] for slot, _ in whole.store.log[stored:]}
    assert not kinds & {"epoch-note", "upload", "consent", "guardian-note", "list", "endorsement", "shares"}


def test_a_round_that_was_open_is_charged_and_settled_before_the_new_epoch(whole):
    """The disk is lost in round 4, after the upload. Others end the round; the restored silo follows it and enters epoch 2."""
    shutil.rmtree(root_of(whole))
    shutil.copytree(whole.root / "as-it-was", root_of(whole))
    ended = []

    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(LOST, 4, line=whole.dying("upload", 4, after=True))
        put_back(whole)
        facts = restore(whole)
        assert [each["round"] for each in facts["charged"]] == [2, 3, 4]
        with whole.silo(LOST) as running:
            ended.extend(running.rounds(3))

    others = [functools.partial(whole.take_part, silo, 4) for silo in whole.silos if silo != LOST]
    whole.run_hurried(4, falls, *others)
    assert [each.round for each in ended] == [2, 3, 4]
    _, closed = go_on(whole, 5)
    assert closed[-1].kind == "result"
    assert {whole.progress(s).state.digest for s in whole.silos} == {closed[-1].state}
    assert headers(whole)[4].attempt.hex() in whole.attempts(LOST, 4)


# --- Ledger copies ----------------------------------------------------------------------------------------------------------------


def test_the_longest_of_several_copies_is_adopted(whole):
    facts = restore(whole, ledgers=[whole.root / "as-it-was" / "ledger.jsonl"])
    assert facts["adopted"]
    assert facts["charged"] == [], "the copy knew all"
    assert said(whole.history(LOST)) == said(crash.history(whole.root / "as-it-was"))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_ledger_that_is_gone_comes_from_a_copy(whole, damage):
    path = root_of(whole) / "ledger.jsonl"
    copy = whole.root / "copy.jsonl"
    shutil.copy(path, copy)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[40:] if damage == "cut" else b"")
    with pytest.raises(LedgerBroken):
        restore(whole)
    assert not Home(root_of(whole)).restored_path.exists(), "nothing was changed"
    restore(whole, ledgers=[copy])
    assert [len(whole.attempts(LOST, number)) for number in (1, 2, 3)] == [1, 1, 2]


def test_copies_with_different_histories_are_refused_by_name_and_nothing_changes(whole, tmp_path):
    forked = tmp_path / "forked.jsonl"
    shutil.copy(root_of(whole) / "ledger.jsonl", forked)
    identity = keys.load(root_of(whole) / "identity.key")
    verify = functools.partial(keys.verify_signature, identity.public.sign_key)
    with restoring.Ledger.open(forked, sign=identity.sign, verify=verify, clock=lambda: 7.0) as other:
        other.void(contract=whole.accepted.digest.hex(), round_number=2, reason="elsewhere")
    before = {path: path.read_bytes() for path in root_of(whole).rglob("*") if path.is_file()}
    with pytest.raises(LedgerBroken, match=r"forked\.jsonl") as refused:
        restore(whole, ledgers=[forked, whole.root / "as-it-was" / "ledger.jsonl"])
    assert refused.value.code == "ledger-forked"
    assert before.items() <= {path: path.read_bytes() for path in root_of(whole).rglob("*") if path.is_file()}.items()


def test_a_strangers_copy_is_refused(whole):
    with pytest.raises(LedgerBroken, match="silo-1"):
        restore(whole, ledgers=[root_of(whole, 1) / "ledger.jsonl"])


# --- What the board, the log and the home say -------------------------------------------------------------------------------------


def test_an_upload_that_the_log_has_and_the_board_hides_stops_the_restore(whole):
    with whole.coordinator() as coordinator:  # shows the head of round 4, which has the upload of round 3
        del coordinator
    newest = max(n for n in range(1, 6) if whole.store.get("checkpoint", n, AGGREGATOR))
    head = log.open_checkpoint(notes.parse(whole.store.get("checkpoint", newest, AGGREGATOR)), whole.accepted.terms)
    assert head.size > 0
    home, line = Home(root_of(whole)), whole.line()
    line.alter = lambda slot, data: None if slot == ("upload", 2, LOST) else data
    with home.locked(), pytest.raises(TrustError) as refused:
        restoring.restored(home, line)
    assert refused.value.code == "upload-hidden"
    with pytest.raises(TrustError, match="has not ended"):
        home.restored_epoch()


def test_an_unfinished_restore_takes_part_in_nothing(whole):
    Home(root_of(whole)).begin_restore()
    with pytest.raises(TrustError) as refused, whole.silo(LOST) as running:
        list(running.rounds(1, wait_s=PATIENCE_S))
    assert refused.value.code == "restore-unfinished"
    restore(whole)


def test_rounds_that_only_the_home_knows_of_are_charged(whole):
    """A board that was put back shows two rounds; a receipt in the home says that there was a fourth."""
    (root_of(whole) / "log" / "receipt-upload-4").write_bytes(b"kept")
    restore(whole)
    assert [len(whole.attempts(LOST, number)) for number in (1, 2, 3, 4)] == [1, 1, 2, 1]


def test_a_round_whose_upload_nobody_shows_is_charged_once(whole):
    """Round 3 was opened, of its uploads board and log show none: one attempt is charged, whatever there was."""
    line, home = whole.line(), Home(root_of(whole))
    line.alter = lambda slot, data: None if slot in (("upload", 3, LOST), ("checkpoint", 4, 0)) else data
    with home.locked():
        restoring.restored(home, line)
    assert [len(whole.attempts(LOST, number)) for number in (1, 2, 3)] == [1, 1, 1]


def test_a_round_that_the_counter_proves_missed_is_not_charged(tmp_path):
    """Share mode: away in round 2, back in round 3, whose signed counter leaves no line for an attempt at round 2."""
    whole = Whole.create(tmp_path / "federation", silos=(1, 2, 3, 4), sum=SHARES)
    whole.run(1)
    back_up(whole)
    whole.run_hurried(2, *(functools.partial(whole.take_part, silo, 2) for silo in (1, 3, 4)))
    whole.run(3)
    as_it_was = whole.history(LOST).charged()
    put_back(whole)
    assert restore(whole)["charged"] == [{"round": 3, "attempts": 1}]
    assert whole.history(LOST).charged() == as_it_was


def test_limits_hinder_no_charge_and_then_refuse(whole):
    """More than the plan has is charged all the same; the gate then refuses."""
    home = Home(root_of(whole))
    (home.log_folder / "receipt-upload-40").write_bytes(b"kept")
    restore(whole)
    assert len([body for body in whole.history(LOST).entries if isinstance(body, Reserve)]) == 41
    with whole.silo(LOST) as running:
        assert running.gate.attempts_left == 0
        with pytest.raises(BudgetExhausted):
            running.gate.admit(41, b"a" * 16)


# --- The command, and its deaths --------------------------------------------------------------------------------------------------


def configured(root, *, url="http://127.0.0.1:1", epsilon=50.0):
    """Silo 2's silo.toml, written anew: where the board is, and no base model."""
    Home(root).config_path.unlink(missing_ok=True)
    config.write_commented(
        Home(root).config_path, name="silo-2", organisation="Hospital 2", url=url, fingerprint="00", records="records.jsonl",
        epsilon=epsilon, delta=1e-5, model=str(root / "no-model"),
    )  # fmt: skip


@pytest.fixture
def served(whole):
    """The board over HTTP, and a silo.toml that says where."""
    running = Running(whole)
    configured(root_of(whole), url=f"http://127.0.0.1:{running.port}")
    yield whole
    running.stop()


def test_the_command(served, capsys):
    done = Terminal(capsys)("silo restore", "--never-alone", "--yes", "--home", root_of(served))
    assert done.code == 0, done.err
    for line in ("round 2: 1 attempt", "round 3: 2 attempts", "`aggregator epoch`"):
        assert line in done.out, done.out
    again = Terminal(capsys)("silo restore", "--never-alone", "--yes", "--json", "--home", root_of(served))
    assert again.document["charged"] == []
    assert again.document["epoch"] == 1


@pytest.fixture
def guarded(tmp_path):
    """Guardians with homes of their own."""
    whole = Whole.create(tmp_path / "federation", silos=test_guardian.FIVE, notaries=5, sum=test_guardian.SHARES)
    for each in test_guardian.FIVE:
        Home(whole.root / f"notary-{each}").keep_contract(1, whole.store.get("contract", 1, AGGREGATOR))
    return whole


def test_a_guardian_with_a_home_of_its_own_is_restored(guarded):
    """It sits out the epoch it was in, says nothing in it, and has its cosignatures again."""
    whole, root = guarded, guarded.root / "notary-1"
    test_guardian.run(whole, 1)
    before = {path.name: path.read_bytes() for path in (root / "log").glob("cosignature-*")}
    assert before
    shutil.rmtree(root / "epoch")
    for name in before:
        (root / "log" / name).unlink()
    home, line = Home(root), whole.line()
    with home.locked():
        assert restoring.restored_guardian(home, line, whole.accepted, keys.load(home.identity_path)) == 1
    assert {path.name: path.read_bytes() for path in (root / "log").glob("cosignature-*")} == before
    stored = len(whole.store.log)
    again = test_guardian.notary(whole, 1, line=line)
    for _ in range(5):
        again.step()
    assert whole.store.log[stored:] == []
    assert list(home.epoch_folder.iterdir()) == [], "no secrets are made for an epoch that it sits out"


def unharmed(whole):
    """What the ledger comes to when nothing is killed."""
    home = Home(root_of(whole))
    kept = home.root.with_name("unharmed")
    shutil.copytree(home.root, kept)
    with Home(kept).locked():
        restoring.restored(Home(kept), whole.line(), ledgers=[])
    return said(crash.history(kept))


def spared(sites, fate):
    return crash.Thinned(sites, LUCK) if fate == "full" else frozenset(sites)


LUCK = os.urandom(16)
FATES = [("consent", "killed"), ("shares", "full")]
if "SILOQUY_FULL" in os.environ:
    FATES = list(itertools.product(sorted(MODES), ("killed", "full")))


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "fate"), FATES, indirect=["lost"])
def test_a_restore_that_is_killed_or_has_no_room_anywhere_ends_the_same(served, run, fate):
    expected, root, sites = unharmed(served), root_of(served), []
    shutil.copytree(served.root / "as-it-was" / "epoch", root / "epoch", dirs_exist_ok=True)
    copy = served.root / "copy.jsonl"  # the copy knows of nothing, the one at home of less
    shutil.copy(root / "ledger.jsonl", copy)
    lines = copy.read_bytes().splitlines(keepends=True)
    (root / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    while (ended := run.run(*RESTORE, "--ledger", copy, home=root, spare=spared(sites, fate), fate=fate)).code:
        if fate == "full":
            assert ended.code == 7, ended.out
            assert "No space left" in ended.out, ended.out
        else:
            assert ended.killed
        sites += ended.due
        assert ended.due, ended.out
        counts = [len([body for body in crash.history(root).entries if isinstance(body, Reserve)])]
        assert counts[0] <= len([each for each in expected if each[0] == "Reserve"])
    assert said(crash.history(root)) == expected
    assert {"ledger.jsonl", "promises/manifest-N", "restored"} <= {site.split(" ", 1)[1].rstrip("~") for site in sites}
    assert not crash.litter(root)
    assert not list((root / "epoch").iterdir())
    if fate == "killed":
        assert {"rmdir epoch/N", "mkdir epoch", "write ledger.jsonl"} <= set(sites), sites
    assert Home(root).restored_epoch() == 1
