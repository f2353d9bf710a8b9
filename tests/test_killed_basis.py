# SPDX-License-Identifier: Apache-2.0
"""A silo and an aggregator killed anywhere in a private basis round, and in the first training round after it (tests/crash.py).

As in tests/test_killed_silo.py a death is followed by the same command, spared there. But there is one basis round, and the
contract pays for so many attempts at it; so a federation that has just confirmed its epoch is copied, and each copy may lose as
many attempts as it has to spare. The copies go on until one of them brings no new site.

Every write of the ledger, the promise, the upload, the factors and the state; of every other file and document one site by chance.
Those of reading and of the log, which are the same in every round, are left to the other two files; with SILOQUY_FULL=1 there are
all (crash.OfRounds).
"""

from __future__ import annotations

import os

import pytest

from aggregator import commands as hub_commands
from privacy import federation, orthonormal
from privacy.dp.entries import Commit, Reserve, Void
from privacy.messages import AGGREGATOR
from silo import fixed_basis, session
from silo.home import Home
from tests import crash, sessions, whole
from tests.crash import OfRounds, Others, Places, Watched

pytestmark = pytest.mark.slow
ATTEMPTS = 3
"""Basis rounds that the contract pays for: two may be lost in each copy."""


MATTER = {*crash.ATTEMPTED, "basis.safetensors", "state.safetensors"}


class Private(Places):
    """Places whose contract has a basis round."""

    def init_hub(self):
        return (*super().init_hub(), "--basis", "private")


@pytest.fixture(scope="module")
def begun(run, tiny_bert, tmp_path_factory) -> Places:
    """A federation of commands whose first epoch is confirmed; no round is open. Copied by each walk."""
    made = Private.create(tmp_path_factory.mktemp("private") / "federation", tiny_bert)
    hub = run.done(*made.init_hub(), home=made.hub)
    for number, root in enumerate(made.silos, start=1):
        run.done(*made.init_silo(number, hub.document["fingerprint"]), home=root)
        run.done("aggregator", "member", root / "identity.pub", home=made.hub)
    draft = made.hub / "federation.draft.toml"
    text = draft.read_text()
    assert text.count("\nattempts = 2\n") == 1
    draft.write_text(text.replace("\nattempts = 2\n", f"\nattempts = {ATTEMPTS}\n"))
    run.done("aggregator", "sign", home=made.hub)
    crash.joined(run, made)
    with crash.serving(run, made), Others(made) as others:
        for silo in (2, 3):
            others.live(others.take_part_forever, silo, others.basis)
        first = run.start("silo", "train", "--rounds", 1, home=made.silos[0])
        with others.coordinator() as coordinator:
            coordinator.ensure_countersigned()
            coordinator.ensure_epoch()
        sessions.until(lambda: all((root / "epoch" / "1" / "chain").exists() for root in made.silos))
        first.kill()
    return made


def charged_for(others: Others, silo: int, rounds: int) -> list[int]:
    """How many attempts at each of these rounds the silo's ledger has."""
    return [len(others.attempts(silo, number)) for number in range(1, rounds + 1)]


def check_paid(others: Others, silo: int, basis: int) -> None:
    """So many basis attempts are charged, each once and no more than the contract pays for, and every training attempt; the
    ledger's figure is what all of them cost together.
    """
    one, training = (event.with_steps(1) for event in federation.whole_plan(others.accepted.terms))
    history, digest = others.history(silo), others.accepted.digest.hex()
    reserved = [entry for entry in history.entries if isinstance(entry, Reserve)]
    assert [entry.mechanism for entry in reserved] == [one] * basis + [training] * (len(reserved) - basis)
    assert {entry.round for entry in reserved[:basis]} == {1}
    assert basis <= ATTEMPTS
    rest = len(reserved) - basis
    assert history.charged(digest) == [one.with_steps(basis), *([training.with_steps(rest)] if rest else [])]


def check_ended(others: Others, last: int) -> None:
    """Rounds 1 to ``last`` gave results, everybody holds the same factors byte for byte, and stands in the same state."""
    others.settled(last)
    others.check()
    others.check_evidence()
    homes = [Home(root) for root in others.places.silos]
    state = others.progress(1).state
    assert len({home.basis_path.read_bytes() for home in homes}) == 1
    assert orthonormal.digest(fixed_basis.load(homes[0], state.basis)) == state.basis
    for silo in whole.SILOS:
        entries = others.history(silo).entries
        assert [entry.round for entry in entries if isinstance(entry, Commit)] == list(range(1, last + 1))
        assert not [entry for entry in entries if isinstance(entry, Void)]


class AllBut:
    """Every site is spared but one."""

    def __init__(self, site: str):
        self.site = site

    def __contains__(self, site: object) -> bool:
        return site != self.site


class Walk:
    """The sites of both rounds, by copies of a federation; see the module docstring."""

    def __init__(self, run, begun: Places):
        self.run, self.begun, self.luck = run, begun, os.urandom(8)
        self.basis: list[str] = []
        self.training: list[str] = []

    def copy(self, folder) -> int:
        """One copy to its end; how many sites of the basis round it brought."""
        places, before = self.begun.copied(folder), len(self.basis)
        with crash.serving(self.run, places), Others(places) as others:
            watched = Watched(others)
            for silo in (2, 3):
                others.live(others.take_part_forever, silo, others.basis)
            coordinating = others.live(others.coordinate_on)
            while self.dies(watched):
                pass
            last = others.progress(1).round + 1
            others.wait_for("manifest", last, AGGREGATOR)
            others.is_last.set()
            self.run.done("silo", "train", "--rounds", 1, home=watched.root)
            coordinating.join(120)
            check_ended(others, last)
            assert charged_for(others, 2, last) == charged_for(others, 3, last) == [1] * last
            check_paid(others, 1, charged_for(others, 1, 1)[0])
            check_paid(others, 2, 1)
        assert not crash.litter(watched.root)
        return len(self.basis) - before

    def dies(self, watched: Watched) -> bool:
        """Whether there is more to kill after this process, which ran until it died or one more round was settled.

        A site belongs to the round before whose end the process began.
        """
        is_basis = not watched.others.progress(1).state.basis
        sites = self.basis if is_basis else self.training
        is_last = watched.attempts() >= ATTEMPTS - 1
        spare = OfRounds(sites, self.luck, matter=MATTER, attempt=is_last)
        ended = self.run.run("silo", "train", "--rounds", 1, home=watched.root, spare=spare)
        watched.check()
        if ended.killed:
            sites += ended.due
        return ended.killed or is_basis


def written(sites: list[str], *names: str) -> bool:
    """Whether there was a death in the middle of each of these files and one after it."""
    return all(f"torn {name}~" in sites and {f"link {name}", f"replace {name}"} & set(sites) for name in names)


def sent(sites: list[str], *kinds: str) -> bool:
    """Whether there was a death while each of these documents was sent, or before it was answered, or after."""
    return all({f"{call} PUT {kind}/N/N" for call in ("cut", "sent", "answered")} & set(sites) for kind in kinds)


@pytest.mark.timeout(900)
def test_a_silo_killed_at_every_site_of_the_basis_round_and_of_the_first_training_round(run, begun, tmp_path):
    walk, count = Walk(run, begun), 1
    while walk.copy(tmp_path / f"federation-{count}"):
        count += 1
    assert count > 1, "a copy has two attempts to lose, and there are more writes than that from a reservation to its upload"
    for sites in (walk.basis, walk.training):
        assert written(sites, "promises/manifest-N", "epoch/N/attempt", "state.safetensors")
        assert sent(sites, "upload", "consent", "release")
        assert {"torn ledger.jsonl", "write ledger.jsonl"} <= set(sites)
    assert written(walk.basis, "basis.safetensors")
    assert not any("basis.safetensors" in site for site in walk.training), "written once"


def test_a_silo_whose_basis_attempts_are_all_lost_says_so_and_sends_nothing(run, begun, tmp_path):
    """Each death after the reservation costs one; when the contract pays for no more, none is made."""
    places = begun.copied(tmp_path / "federation")
    with crash.serving(run, places), Others(places) as others:
        for silo in (2, 3):
            others.live(others.take_part_forever, silo, others.basis)
        others.live(others.coordinate_on)
        for lost in range(1, ATTEMPTS + 1):
            before = "torn epoch/N/attempt~"
            dead = run.run("silo", "train", "--rounds", 1, home=places.silos[0], spare=AllBut(before))
            assert dead.killed
            assert charged_for(others, 1, 1) == [lost]
        refused = run.run("silo", "train", "--rounds", 1, home=places.silos[0])
        assert refused.code == 5, refused.out
        assert charged_for(others, 1, 1) == [ATTEMPTS]
        assert others.store.get("upload", 1, 1) is None
        check_paid(others, 1, ATTEMPTS)


def test_an_aggregator_killed_at_every_site_of_both_rounds_charges_nobody_twice(run, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "POLL_S", 0.1)
    places = begun.copied(tmp_path / "federation")
    sites, luck = list[str](), os.urandom(8)
    with Others(places) as others:
        for silo in whole.SILOS:
            others.live(others.take_part_forever, silo, others.same_basis)
        while (
            ended := run.run("aggregator", "round", "--rounds", 1, home=places.hub, spare=OfRounds(sites, luck, matter=()))
        ).killed:
            sites += ended.due
        if others.store.latest("outcome") == 1:
            run.done("aggregator", "round", "--rounds", 1, home=places.hub)
        last = others.store.latest("outcome")
        check_ended(others, last)
        assert {tuple(charged_for(others, silo, last)) for silo in whole.SILOS} == {(1,) * last}
        for silo in whole.SILOS:
            check_paid(others, silo, 1)
    for kind in ("manifest", "freeze", "certificate", "outcome"):
        assert {f"torn evidence/{kind}~", f"link evidence/{kind}"} & set(sites), kind
        assert f"commit of {kind}" in sites, kind
    assert "replace state/N.safetensors" in sites
    hub_commands.status(places.hub)
    assert not crash.litter(places.hub), "who comes while nobody is there sweeps"
