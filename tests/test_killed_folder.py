# SPDX-License-Identifier: Apache-2.0
"""The folder's two ends killed at every write they make there (tests/crash.py): a silo at its inbox, a mailbox at all the rest.

What they write in their homes is walked by tests/test_killed_silo.py and tests/test_killed_aggregator.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import time

import pytest

from aggregator.mailbox import FILE
from privacy import folder
from privacy.messages import AGGREGATOR_KINDS, KINDS
from silo.folder import FolderTransport
from silo.participation import participate
from tests import crash, sessions, whole
from tests.crash import Others

pytestmark = pytest.mark.slow
CONSENT_MODE = set(KINDS) - whole.GUARDIAN_KINDS - whole.SLICE_KINDS - {"refusal", "report"}  # none is refused, none reported


def names(sites) -> set[str]:
    """The files written at these sites, as docs/concepts/crashes.md names them."""
    kinds = "|".join(sorted(KINDS, key=len, reverse=True))
    return {re.sub(rf"(?<=[/-])(?:{kinds})(?=-N)", "KIND", name) for name in crash.names(sites)}


def serve(run, places, **options):
    """`aggregator serve --folder`, whose sites are its writes in that folder."""
    exchange = places.root / "exchange"
    return run.start("aggregator", "serve", "--folder", exchange, home=places.hub, watch=exchange, **options)


@contextlib.contextmanager
def serving(run, places):
    service = serve(run, places)
    try:
        path = places.hub / FILE
        sessions.until(lambda: path.exists() and json.loads(path.read_bytes())["pid"] == service.process.pid)
        yield
    finally:
        service.kill()


def test_train_killed_at_every_write_in_its_inbox_sends_the_same_bytes_again(run, places):
    exchange, root, sites = places.root / "exchange", places.silos[0], []
    crash.joined(run, places)
    words = ("silo", "train", "--rounds", 1, "--folder", exchange)
    with serving(run, places), Others(places) as others:
        for silo in (2, 3):
            others.live(others.take_part_forever, silo, others.basis)
        coordinating = others.live(others.coordinate_on)
        while (ended := run.run(*words, home=root, watch=exchange, spare=frozenset(sites))).killed:
            sites += ended.due
            others.check(1)
        last = others.progress(1).round + 1
        others.wait_for("manifest", last, 0)
        others.is_last.set()
        run.done(*words, home=root)
        coordinating.join(60)
        others.settled(last)
        others.check()
        others.check_evidence()
        attempts = [len(others.attempts(1, number)) for number in range(1, last + 1)]
    for kind in sorted(CONSENT_MODE - AGGREGATOR_KINDS - {"countersignature"}):
        assert {f"torn inbox/N/{kind}-N-document~", f"replace inbox/N/{kind}-N-document"} <= set(sites), kind
        assert f"unlink inbox/N/{kind}-N-document" in sites or kind == "acknowledgement", kind
    assert names(sites) == crash.page("silo train --folder"), "a silo writes nowhere else"
    assert set(attempts) == {1}, "no death here costs an attempt: the upload lay in the home"
    assert not list(exchange.glob("refused/*/*"))
    assert not crash.litter(exchange)


class Line(FolderTransport):
    """A silo's transport that ends with the test."""

    def __init__(self, others: Others):
        self.others = others
        super().__init__(others.places.root / "exchange", answer_s=0.05, sleep=self.pause)

    def pause(self, seconds: float) -> None:
        self.others.power.check()
        time.sleep(min(seconds, 0.05))


def test_a_mailbox_killed_at_every_write_goes_on_to_the_same_rounds(run, places):
    exchange, sites = places.root / "exchange", []
    with Others(places) as others:

        def live(silo):
            line = Line(others)
            assert line.get("contract", 1, 0, wait_s=120) is not None
            others.join(silo, line)
            with others.silo(silo, line=line) as running:
                list(participate(running.parts, basis=whole.BASIS, rounds=2, wait_s=300.0))

        jobs = [others.live(live, silo) for silo in whole.SILOS] + [others.live(others.coordinate, 2)]
        stray = exchange / "inbox" / "1" / f"freeze-1-{'0' * 64}"
        folder.make(exchange, "inbox", "1")
        stray.write_bytes(b"somebody's")
        service = None
        while not others.faults and any(job.is_alive() for job in jobs):
            service = serve(run, places, spare=frozenset(sites))
            while service.is_running and not others.faults and any(job.is_alive() for job in jobs):
                time.sleep(0.01)
            if not service.is_running:
                sites += service.ended().due
        service.kill()
        assert not others.faults, others.faults
        others.settled(2)
        others.check()
        others.check_evidence()
        assert {len(others.attempts(silo, number)) for silo in whole.SILOS for number in (1, 2)} == {1}
    with serving(run, places):
        sessions.until(lambda: not crash.litter(exchange))
    for kind in sorted(CONSENT_MODE):
        assert {f"torn board/N/N-{kind}-N-N-document~", f"replace board/N/N-{kind}-N-N-document"} <= set(sites), kind
    assert {"replace refused/N/freeze-N-document.json", "replace status.json", "replace log/checkpoint"} <= set(sites)
    assert json.loads(next(exchange.glob("refused/1/*")).read_bytes())["code"] == "not-yours"
    assert names(sites) == crash.page("aggregator serve --folder"), "it changes nobody's inbox"


def test_a_mailbox_on_a_full_disk_says_so_and_goes_on_when_there_is_room(run, places):
    exchange, sites = places.root / "exchange", ["commit of table"]  # the store's own disk has room
    while True:
        service = serve(run, places, spare=frozenset(sites), fate="full")
        sessions.until(lambda service=service: not service.is_running or (exchange / "status.json").exists())
        if service.is_running:
            break
        ended = service.ended()
        assert (ended.code, len(ended.due)) == (7, 1), ended.out
        assert "error: cannot write" in ended.out
        assert "No space left on device" in ended.out
        assert "hint: free space" in ended.out
        assert not crash.litter(exchange)
        sites += ended.due
    service.process.terminate()
    assert service.ended().code == 0
    for name in ("board/N/N-contract-N-N-document", "status.json"):
        assert {f"create {name}~", f"torn {name}~", f"sync {name}~", f"replace {name}"} <= set(sites)
    assert FolderTransport(exchange).get("contract", 1, 0, wait_s=0) is not None
