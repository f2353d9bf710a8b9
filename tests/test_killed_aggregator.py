# SPDX-License-Identifier: Apache-2.0
"""An aggregator killed anywhere: its commands and its service at every site (tests/crash.py), then on a disk that is full there.

As in tests/test_killed_silo.py a death is followed by the same command, spared there. The silos of these tests are library
silos; they reach a service that is killed over real HTTP, with the retries of silo.transport.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from aggregator import commands as hub_commands
from aggregator.reporting import report
from privacy.identity import keys
from privacy.messages import AGGREGATOR_KINDS, KINDS
from silo import session
from silo.participation import participate
from silo.transport import HttpTransport
from tests import crash, sessions, whole
from tests.crash import Others, Places

pytestmark = pytest.mark.slow
STATES = ("torn evidence/{}~", "link evidence/{}", "unlink evidence/{}~", "commit of {} begins", "commit of {}")


def every_state_of(*kinds: str) -> set[str]:
    """The sites of one document each."""
    return {state.format(kind) for kind in kinds for state in STATES}


def test_init_member_and_sign_complete_what_a_killed_one_began(run, tiny_bert, tmp_path):
    """Each killed at every site; a key that was once made stays."""
    places = Places.create(tmp_path / "federation", tiny_bert)
    kept: dict[str, bytes] = {}

    def secrets_stay():
        for path in places.hub.glob("*.key"):
            assert kept.setdefault(path.name, path.read_bytes()) == path.read_bytes()

    last = "replace aggregator.toml"  # with it everything stands, and init says so
    init = run.walk(*places.init_hub(), home=places.hub, after=secrets_stay, spare=[last])
    again = run.run(*places.init_hub(), home=places.hub)
    assert (again.code, again.document["error"]["code"]) == (3, "home-exists")
    fingerprint = keys.fingerprint(keys.load(places.hub / "aggregator.key").public)
    for number, root in enumerate(places.silos, start=1):
        run.done(*places.init_silo(number, fingerprint), home=root)
        member = run.walk("aggregator", "member", root / "identity.pub", home=places.hub)
    sign = run.walk("aggregator", "sign", home=places.hub)
    assert crash.names({*init, last}) == crash.page("aggregator init")
    assert crash.names(member) == crash.page("aggregator member")
    assert crash.names(sign) == crash.page("aggregator sign")
    assert set(member) == {"torn federation.draft.toml~", "replace federation.draft.toml", "unlink federation.draft.toml~"}
    assert set(sign) >= every_state_of("contract") | {"link contract/vN.toml"}
    with hub_commands.opened(places.hub) as at:
        assert [member.name for member in at.accepted.terms.member] == ["silo-1", "silo-2", "silo-3"]
        assert at.accepted.raw == (places.hub / "contract" / "v1.toml").read_bytes()
    assert not crash.litter(places.hub)


def countersigned(others: Others) -> None:
    for silo in whole.SILOS:
        others.join(silo, others.line())


def test_epoch_and_round_killed_at_every_site_go_on_to_the_same_model(run, places, monkeypatch):
    monkeypatch.setattr(session, "POLL_S", 0.1)  # how soon a silo sees that an epoch was given up
    with Others(places) as others:
        countersigned(others)
        for silo in whole.SILOS:
            others.live(others.take_part_forever, silo, others.same_basis)
        sites = run.walk("aggregator", "epoch", home=places.hub)
        assert set(sites) >= every_state_of("epoch", "roster")
        in_rounds: list[str] = []
        before = -1
        while before < len(in_rounds):
            before = len(in_rounds)
            in_rounds += run.walk("aggregator", "round", "--rounds", 1, home=places.hub, spare=in_rounds)
        assert set(in_rounds) >= every_state_of("manifest", "freeze", "certificate", "outcome")
        assert {"replace state/N.safetensors", "unlink state/N.safetensors"} <= set(in_rounds)
        assert crash.names([*sites, *in_rounds]) == crash.page("aggregator round")
        others.settled(others.store.latest("outcome"))
        others.check()
        others.check_evidence()
    hub_commands.status(places.hub)
    assert not crash.litter(places.hub), "who comes while nobody is there sweeps"


# --- The service -----------------------------------------------------------------------------------------------------------------

MEMBER_KINDS = sorted(set(KINDS) - AGGREGATOR_KINDS - whole.GUARDIAN_KINDS - whole.SLICE_KINDS)
"""There are no guardians here: tests/test_share_walk.py cuts the power at each of their documents."""


class Eager(HttpTransport):
    """A silo's transport that hardly waits before it tries again, keeps what its PUTs were answered, and ends with the test."""

    def __init__(self, others: Others):
        self.others, self.answers = others, []
        super().__init__(f"http://127.0.0.1:{others.places.port}", sleep=self.pause)

    def pause(self, seconds: float) -> None:
        self.others.power.check()
        time.sleep(min(seconds, 0.05))

    def _once(self, method, path, *rest):
        answer = super()._once(method, path, *rest)
        if method == "PUT":
            self.answers.append(answer[0])
        return answer


@contextlib.contextmanager
def two_rounds(places: Places):
    """Silos that join and take part over HTTP and a coordinator on the disk, for two rounds: (is it over, transports)."""
    with Others(places) as others:
        lines = {silo: Eager(others) for silo in whole.SILOS}

        def live(silo):
            others.join(silo, lines[silo])
            with others.silo(silo, line=lines[silo]) as running:
                list(participate(running.parts, basis=whole.BASIS, rounds=2, wait_s=120.0))

        jobs = [others.live(live, silo) for silo in whole.SILOS] + [others.live(others.coordinate, 2)]
        yield lambda: others.faults or not any(job.is_alive() for job in jobs), lines
        assert not others.faults, others.faults
        others.settled(2)
        others.check()
        others.check_evidence()
        assert {len(others.attempts(silo, number)) for silo in whole.SILOS for number in (1, 2)} == {1}


def test_serve_killed_at_every_write_of_every_put_comes_back_to_the_same_round(run, places):
    sites: list[str] = []
    with two_rounds(places) as (is_over, _):
        while not is_over():
            service = run.start("aggregator", "serve", home=places.hub, spare=frozenset(sites))
            while service.is_running and not is_over():
                time.sleep(0.002)
            if not is_over():
                sites += service.ended().due
        service.process.terminate()
        assert service.ended().due == ["unlink service.json"]
    with crash.serving(run, places):
        assert not crash.litter(places.hub), "who starts first sweeps"
    assert set(sites) >= every_state_of(*MEMBER_KINDS)
    assert crash.names(sites) == crash.page("aggregator serve")


def test_a_put_that_meets_a_full_disk_is_answered_503_and_is_whole_when_it_comes_again(run, places):
    refusals = ("create evidence/{}~", "torn evidence/{}~", "sync evidence/{}~", "link evidence/{}", "commit of {}")
    wanted = {refusal.format(kind) for refusal in refusals for kind in MEMBER_KINDS}
    first = ["create service.json~", "torn service.json~", "sync service.json~", "replace service.json", "commit of table"]
    with two_rounds(places) as (is_over, lines):
        service = run.start("aggregator", "serve", home=places.hub, spare=[*first, "create evidence.lock"], fate="full")
        while service.is_running and not is_over():
            time.sleep(0.002)
        service.process.terminate()
        ended = service.ended()
        assert ended.code == 0, ended.out
    answers = [answer for line in lines.values() for answer in line.answers]
    assert set(ended.due) == wanted
    assert answers.count(503) == len(wanted)
    assert set(answers) == {201, 503}
    assert not crash.litter(places.hub)


def test_a_coordinator_that_meets_a_full_disk_says_so_and_goes_on_when_there_is_room(run, places):
    sites: list[str] = []
    with Others(places) as others:
        countersigned(others)
        for silo in whole.SILOS:
            others.live(others.take_part_forever, silo, others.same_basis)
        while (ended := run.run("aggregator", "round", "--rounds", 1, home=places.hub, spare=[*sites], fate="full")).code:
            assert ended.code == 7, ended.out
            assert ended.due, ended.out
            assert "full" in ended.out or "No space left" in ended.out
            sites += ended.due
        last = others.store.latest("outcome")
        others.settled(last)
        others.check()
        others.check_evidence()
    for kind in ("epoch", "roster", "manifest", "freeze", "certificate", "outcome"):
        assert {f"torn evidence/{kind}~", f"link evidence/{kind}", f"commit of {kind}"} <= set(sites), kind
    assert not crash.litter(places.hub)


# --- The report, and a simulation ------------------------------------------------------------------------------------------------


def test_report_killed_anywhere_is_written_whole_when_it_is_asked_for_again(run, places):
    with Others(places) as others:
        countersigned(others)
        for silo in whole.SILOS:
            others.live(others.take_part_forever, silo, others.same_basis)
        others.coordinate(1)
    sites = run.walk("aggregator", "report", home=places.hub)
    assert crash.names(sites) == crash.page("aggregator report")
    written = (places.hub / "report" / "report.json").read_bytes()
    assert report.decode(written).rounds[0].kind == "result"
    signature = bytes.fromhex((places.hub / "report" / "report.json.sig").read_text().strip())
    keys.verify_signature(keys.load(places.hub / "aggregator.key").public.sign_key, report.signing_input(written), signature)
    assert not crash.litter(places.hub)


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_a_killed_simulation_takes_its_processes_with_it_and_says_what_to_do_next(run, tiny_bert, tmp_path):
    data, home = sessions.write_rows(tmp_path / "small.jsonl", sessions.rows(150)), tmp_path / "simulation"
    words = ("aggregator", "simulate", "--data", data, "--model", tiny_bert, "--rounds", 3, "--epsilon", 6, "--json")
    simulation = run.start(*words, home=home)
    sessions.until(lambda: (home / "logs" / "train-silo-3.log").exists() or not simulation.is_running, within_s=240)
    children = children_of(simulation.process.pid)
    assert len(children) == 4, "the service and three silos"
    simulation.kill()
    sessions.until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), within_s=30)
    again = run.run(*words, home=home)
    assert (again.code, again.document["error"]["code"]) == (3, "home-exists")
    assert "name a new folder" in again.document["error"]["hint"]
