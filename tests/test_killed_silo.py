# SPDX-License-Identifier: Apache-2.0
"""A silo killed anywhere: each command at every site it has (tests/crash.py), one death after the other, and started again.

A death is followed by the same command, which is spared there and dies at the next site. So every site is reached, also those
that only a restart has, and every restart has to find its way from what the death before it left.
"""

from __future__ import annotations

import pytest

from privacy.dp.budget import MOST_ATTEMPTS
from privacy.dp.entries import Commit, Plan, Reserve, Void
from privacy.identity import keys
from silo import reading
from tests import crash
from tests.crash import Others, Watched

pytestmark = pytest.mark.slow


def test_init_completes_what_a_killed_one_began(run, base, tmp_path):
    root = tmp_path / "silo-1"
    kept: dict[str, bytes] = {}

    def secrets_stay():
        for path in root.glob("*.key"):
            assert kept.setdefault(path.name, path.read_bytes()) == path.read_bytes()

    sites = run.walk(*base.init_silo(1, "00"), home=root, after=secrets_stay)
    assert crash.names(sites) == crash.page("silo init")
    assert len(sites) > 20
    assert not crash.litter(root), "half a file may hold a key"
    assert keys.read_public((root / "identity.pub").read_bytes()).name == "silo-1"
    assert [entry.kind for entry in crash.history(root).entries] == ["open"]
    assert reading.status(root)["joined"] is False


def test_join_signs_once_and_declares_the_plan_once(run, places):
    root = places.silos[0]
    with crash.serving(run, places):
        sites = run.walk("silo", "join", "--yes", home=root)
    assert crash.names(sites) == crash.page("silo join")
    assert {"sent PUT countersignature/N/N", "answered PUT countersignature/N/N"} <= set(sites)
    assert [type(entry) for entry in crash.history(root).entries][1:] == [Plan]
    assert reading.status(root)["joined"] is True
    assert not crash.litter(root)


def train_walk(run, watched: Watched, sites: list[str], *, epoch: int) -> None:
    """Kill ``silo train --rounds 1`` at every site, until a whole round of this epoch brings no new one.

    A round may be tried MOST_ATTEMPTS times: the last try is spared.
    """
    while True:
        spare = frozenset(sites) if watched.attempts() < MOST_ATTEMPTS - 1 else None
        ended = run.run("silo", "train", "--rounds", 1, home=watched.root, spare=spare)
        watched.check()
        if ended.killed:
            sites += ended.due
        elif spare is not None and watched.others.progress(1).epoch == epoch:
            return


SENT = {"epoch-note", "pair-seeds", "confirmation", "upload", "consent", "release", "acknowledgement"}


def test_train_killed_at_every_site_of_two_epochs_and_their_rounds(run, places):
    crash.joined(run, places)
    sites: list[str] = []
    with crash.serving(run, places), Others(places) as others:
        watched = Watched(others)
        for silo in (2, 3):
            others.live(others.take_part_forever, silo, others.basis)
        coordinating = others.live(others.coordinate_on)
        train_walk(run, watched, sites, epoch=1)
        first = len(sites)
        others.calls_epoch.set()
        train_walk(run, watched, sites, epoch=2)
        last = others.progress(1).round + 1
        others.wait_for("manifest", last, 0)
        others.is_last.set()
        run.done("silo", "train", "--rounds", 1, home=watched.root)
        coordinating.join(30)
        others.settled(last)
        others.check()
        others.check_evidence()
        entries = others.history(1).entries
    assert crash.names(sites) == crash.page("silo train")
    assert "rmdir epoch/N" in sites[first:], "the older epoch's folder"
    for kind in SENT:
        assert {f"cut PUT {kind}/N/N", f"sent PUT {kind}/N/N", f"answered PUT {kind}/N/N"} <= set(sites), kind
    assert not crash.litter(watched.root)
    assert [entry.round for entry in entries if isinstance(entry, Commit)] == list(range(1, last + 1))
    assert not [entry for entry in entries if isinstance(entry, Void)]
    assert {entry.round for entry in entries if isinstance(entry, Reserve)} == set(range(1, last + 1))
