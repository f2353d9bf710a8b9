# SPDX-License-Identifier: Apache-2.0
"""Guardians by their commands, in real processes: `silo guard init`, `join`, `run`, over HTTP and over a folder.

Three notaries outside the silos, each of whom every sum needs; four silos, of which one may be away. A notary is killed in
mid-round and started again; over the folder a silo is killed after its upload, and some parties are only reached by a courier.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from aggregator.mailbox import FILE
from privacy.errors import RoundError
from privacy.federation import GUARDIANS_FROM
from privacy.messages import AGGREGATOR, Outcome, Signed, decode
from silo.guardians.vows import Vows
from silo.home import Home
from tests import crash, sessions
from tests.carried import Courier
from tests.crash import Others

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_polls")]


class Town(crash.Places):
    """Four silos and three notaries."""

    SILOS = 4

    def __init__(self, root: Path, model: Path, port: int):
        super().__init__(root, model, port)
        self.notaries = tuple(root / f"notary-{number}" for number in (1, 2, 3))

    def init_hub(self) -> tuple[object, ...]:
        return (*super().init_hub(), "--protocol", "shares", "--dropouts", 1)

    def init_guard(self, number: int, **given: object) -> tuple[object, ...]:
        words = {"name": f"notary-{number}", "organisation": f"Notary {number}", "aggregator": f"http://127.0.0.1:{self.port}"}
        return ("silo", "guard", "init", *crash.options({**words, **given}), "--json")

    @property
    def fingerprint(self) -> str:
        """What a person reads aloud; the notaries' homes know none."""
        text = (self.silos[0] / "silo.toml").read_text()
        return next(line for line in text.splitlines() if line.startswith("fingerprint")).split('"')[1]


@pytest.fixture(scope="module")
def founded(run, tiny_bert, tmp_path_factory) -> Town:
    """Up to the published contract; nobody has joined."""
    town = Town.create(tmp_path_factory.mktemp("town") / "federation", tiny_bert)
    made = run.done(*town.init_hub(), home=town.hub)
    for number, root in enumerate(town.silos, start=1):
        run.done(*town.init_silo(number, made.document["fingerprint"]), home=root)
        run.done("aggregator", "member", root / "identity.pub", home=town.hub)
    for number, root in enumerate(town.notaries, start=1):
        shown = run.done(*town.init_guard(number), home=root).document
        added = run.done("aggregator", "guardian", root / "identity.pub", "--json", home=town.hub).document
        assert (added["guardian"], added["fingerprint"]) == (GUARDIANS_FROM + number, shown["fingerprint"])
    run.done("aggregator", "sign", home=town.hub)
    return town


@pytest.fixture
def town(founded, tmp_path) -> Town:
    return founded.copied(tmp_path / "federation")


def refused(ended: crash.Ended, code: int, slug: str) -> dict:
    """The command's one JSON document, an error of this exit code."""
    assert ended.code == code, ended.out
    assert ended.out.count("\n") == 1, ended.out
    error = ended.document["error"]
    assert (error["exit_code"], error["code"]) == (code, slug), error
    assert error["hint"]
    return error


# --- init ------------------------------------------------------------------------------------------------------------------------


def test_init_makes_a_home_once_and_says_what_it_made(run, founded, tmp_path):
    root = tmp_path / "notary"
    made = run.done(*founded.init_guard(1), home=root).document
    assert set(made) == {"home", "name", "identity", "fingerprint", "fingerprint_ml_dsa"}
    assert {path.name for path in root.iterdir()} >= {"guard.toml", "identity.key", "identity.pub"}
    assert (root / "identity.key").stat().st_mode & 0o077 == 0
    assert run.done(*founded.init_guard(1), home=root).document == made, "the same words complete the same home"
    refused(run.run(*founded.init_guard(2), home=root), 4, "equivocation")
    refused(run.run(*founded.init_guard(1), home=founded.silos[0]), 3, "home-exists")
    for words in (founded.init_guard(1, folder="x"), founded.init_guard(1, aggregator="")):
        assert run.run(*words, home=tmp_path / "none").code == 2
    refused(run.run(*founded.init_guard(1, name="No Name"), home=tmp_path / "none"), 3, "config")
    assert not (tmp_path / "none" / "identity.key").exists()


# --- join ------------------------------------------------------------------------------------------------------------------------


def test_join_wants_the_right_fingerprint_this_key_and_every_signature(run, town, tmp_path):
    notary, words = town.notaries[0], ("silo", "guard", "join", "--yes", "--json")
    refused(run.run("silo", "guard", "run", "--json", home=notary), 3, "not-joined")
    refused(run.run(*words, home=notary), 3, "fingerprint")
    with crash.serving(run, town):
        refused(run.run(*words, "--fingerprint", "00" * 32, home=notary), 4, "fingerprint")
        known = (*words, "--fingerprint", town.fingerprint)
        for root in town.silos[:3]:
            run.done("silo", "join", "--yes", home=root)
        missing = refused(run.run(*known, home=notary), 6, "not-countersigned")
        assert "4" in missing["message"]
        run.done("silo", "join", "--yes", home=town.silos[3])
        stranger = tmp_path / "stranger"
        run.done(*town.init_guard(9), home=stranger)
        refused(run.run(*known, home=stranger), 4, "not-a-member")
        joined = run.done(*known, home=notary)
        assert joined.document["guardian"] == GUARDIANS_FROM + 1
        assert run.done(*known, home=notary).document == joined.document
        asked = run.run("silo", "guard", "join", "--fingerprint", town.fingerprint, home=town.notaries[1])
        assert asked.code != 0, "nobody said yes"
        assert "Is this the federation" in asked.out
        assert Home(town.notaries[1]).contract() is None


# --- run, over HTTP --------------------------------------------------------------------------------------------------------------

MOMENTS = (
    "torn epoch/guardian-N/secrets~", "answered PUT guardian-note/N/N", "torn promises/guardian-manifest-N~",
    "cut PUT list/N/N", "answered PUT list/N/N", "torn promises/guardian-set-N~", "answered PUT endorsement/N/N",
    "torn promises/guardian-release-N~", "sent PUT shares/N/N", "answered PUT shares/N/N",
)  # fmt: skip
"""Where a notary dies; nobody else can do its part."""


class AllBut:
    """Every site but these, to ``spare``."""

    def __init__(self, *sites: str):
        self.sites = sites

    def __contains__(self, site: object) -> bool:
        return site not in self.sites


@contextlib.contextmanager
def working(run, *roots: Path):
    """`silo guard run` in these homes, until the block is left: the next test's service listens at the same port."""
    started = {root: run.start("silo", "guard", "run", home=root) for root in roots}
    try:
        yield started
    finally:
        for each in started.values():
            each.kill()


@pytest.fixture
def joined(run, town) -> Town:
    with crash.serving(run, town):
        for root in town.silos:
            run.done("silo", "join", "--yes", home=root)
        for root in town.notaries:
            run.done("silo", "guard", "join", "--yes", "--fingerprint", town.fingerprint, home=root)
    return town


def test_a_notary_killed_at_any_moment_goes_on_to_the_same_sum_and_two_do_not_share_a_home(run, joined):
    root, left, rounds, sites = joined.notaries[0], list(MOMENTS), 0, set()
    with crash.serving(run, joined), Others(joined) as others, working(run, *joined.notaries[1:]):
        for silo in others.silos:
            others.live(others.take_part_forever, silo, others.same_basis)
        coordinating = others.live(others.coordinate_on)
        while left:
            ended = run.run("silo", "guard", "run", "--rounds", 1, "--json", home=root, spare=AllBut(*left))
            sites |= {site.removeprefix(crash.DUE) for site in ended.sites}
            if ended.killed:
                left.remove(*ended.due)
            else:
                assert ended.document == {"rounds": 1}
                rounds += 1
                assert rounds < 5, f"never there: {left}"
        others.is_last.set()
        with working(run, root):
            sessions.until(lambda: f":{(root / '.lock').stat().st_ino} " in Path("/proc/locks").read_text("ascii"))
            busy = run.run("silo", "guard", "run", "--json", home=root)
            coordinating.join(60)
        last = others.store.latest("outcome")
        assert not coordinating.is_alive(), "the last round ended"
        kinds = [decode(decode(others.store.get("outcome", n, AGGREGATOR), Signed).body, Outcome).kind for n in range(1, last + 1)]
        assert kinds == ["result"] * last
        for number in range(1, last + 1):
            for kind in ("list", "endorsement", "shares"):
                assert len(others.store.parties(kind, number)) == 3, "every sum needed all three notaries"
        others.check_evidence()
    refused(busy, 7, "busy")
    closes = {"promises/guardian-close-N", "epoch/guardian-N/close-N"}  # nobody was too late here
    assert crash.names(sites) == crash.page("silo guard run") - closes
    assert Vows(Home(root)).latest == last
    assert not crash.litter(root)


def test_a_restored_notary_sits_out_its_epoch_and_acts_in_the_next(run, joined):
    root = joined.notaries[0]
    with crash.serving(run, joined), Others(joined) as others, working(run, *joined.notaries) as notaries:
        for silo in others.silos:
            others.live(others.take_part_forever, silo, others.same_basis)
        others.coordinate(1)
        notaries[root].kill()
        shutil.rmtree(root / "epoch")  # a backup has none
        given = run.done("silo", "restore", "--yes", "--json", home=root)
        assert given.document == {"epoch": 1}
        with working(run, root), others.coordinator() as coordinator:
            coordinator.new_epoch()
            closed = coordinator.run_round(2)
        assert closed.kind == "result"
        assert others.store.parties("shares", 2) == tuple(GUARDIANS_FROM + each for each in (1, 2, 3))
        assert others.store.latest("epoch") == 2


# --- run, over a folder ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mailing(run, town: Town, exchange: Path):
    """`aggregator serve --folder`."""
    service = run.start("aggregator", "serve", "--folder", exchange, home=town.hub)
    try:
        path = town.hub / FILE
        sessions.until(lambda: path.exists() and json.loads(path.read_bytes())["pid"] == service.process.pid)
        yield
    finally:
        service.kill()


@contextlib.contextmanager
def carrying(near: Path, far: Path):
    """A courier who goes between two folders until the block is left, and does everything wrong."""
    over, faults, courier = threading.Event(), [], Courier(near, far, random.Random(3))

    def trips() -> None:
        try:
            while not over.wait(0.1):
                courier.trip()
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=trips)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(20)
        assert not faults, faults


def test_share_mode_over_a_folder_and_a_courier_survives_a_silo_that_is_killed_after_its_upload(run, town):
    near, far = town.root / "near", town.root / "far"
    at = {**dict.fromkeys((*town.silos[:2], *town.notaries[:2]), near), **dict.fromkeys((*town.silos[2:], town.notaries[2]), far)}

    def start(root: Path, *words: object) -> crash.Command:
        return run.start(*words, "--folder", at[root], home=root)

    def comes(root: Path, *words: object) -> None:
        """Run again until the courier has brought what is still missing."""
        while (ended := start(root, *words).ended()).code == RoundError.exit_code:
            time.sleep(0.1)
        assert ended.code == 0, ended.out

    def train(root: Path) -> crash.Command:
        return start(root, "silo", "train", "--rounds", 2)

    def standing(kind: str, number: int, party: int) -> bool:
        return bool(list(near.glob(f"board/*/*-{kind}-{number}-{party}-*")))

    with mailing(run, town, near), carrying(near, far):
        for root in town.silos:
            comes(root, "silo", "join", "--yes")
        for root in town.notaries:
            comes(root, "silo", "guard", "join", "--yes", "--fingerprint", town.fingerprint)
        notaries = [start(root, "silo", "guard", "run", "--rounds", 2, "--json") for root in town.notaries]
        silos = {root: train(root) for root in town.silos}
        coordinating = run.start("aggregator", "round", "--rounds", 2, "--json", home=town.hub)
        victim = town.silos[3]
        sessions.until(lambda: standing("upload", 2, 4) or not silos[victim].is_running, within_s=240, every_s=0.02)
        silos[victim].kill()
        sessions.until(lambda: standing("outcome", 2, 0) or not coordinating.is_running, within_s=240, every_s=0.02)
        assert standing("outcome", 2, 0), coordinating.ended().out
        assert not standing("acknowledgement", 2, 4)
        silos[victim] = train(victim)  # two rounds more than it has: it is stopped once it has said its last word
        closed = coordinating.ended()
        assert [silos[root].ended().code for root in town.silos[:3]] == [0, 0, 0]
        assert [each.ended().document for each in notaries] == [{"rounds": 2}] * 3
        silos[victim].kill()
    assert closed.code == 0, closed.out
    assert [each["kind"] for each in closed.document["rounds"]] == ["result", "result"]
    assert standing("acknowledgement", 2, 4)
    assert not list(near.glob("refused/*/*")), "nothing honest was refused"
    stated = [run.done("silo", "status", "--json", home=root).document for root in town.silos]
    assert {each["model_digest"] for each in stated} == {closed.document["rounds"][-1]["state"]}
    seeds = sessions.private_seeds(*town.silos, *town.notaries, town.hub)
    for place in (near, far):
        assert not any(sessions.mentions(path.read_bytes(), seeds) for path in place.rglob("*") if path.is_file())
