# SPDX-License-Identifier: Apache-2.0
"""A silo whose disk is full: each command at every write it makes (tests/crash.py), then with room again.

Where tests/test_killed_silo.py kills the process, here the write itself fails: the command says so with exit code 7, leaves what
was there whole and nothing half written, and the same command goes on when there is room.
"""

from __future__ import annotations

import os

import pytest

from privacy.dp.budget import MOST_ATTEMPTS
from privacy.dp.entries import Plan
from silo import reading
from tests import crash
from tests.crash import Others, Watched

pytestmark = pytest.mark.slow
LUCK = os.urandom(16)


def filled(run, *words, home, spare=frozenset()) -> crash.Ended:
    """The command with a disk that is full at its first write that is not spared; it ends well, or as the disk says."""
    ended = run.run(*words, home=home, spare=None if spare is None else crash.Thinned(spare, LUCK), fate="full")
    if ended.code:
        assert ended.code == 7, ended.out
        assert ended.due, ended.out
        assert "No space left" in ended.out, ended.out
        assert "hint: " in ended.out, ended.out
    return ended


def walked(run, *words, home) -> list[str]:
    """Every write at which the disk was full, one after the other, until the command ends well."""
    sites: list[str] = []
    while (ended := filled(run, *words, home=home, spare=frozenset(sites))).code:
        sites += ended.due
        assert not crash.litter(home), ended.due
    return [*sites, *ended.due]


def test_init_says_that_the_disk_is_full_and_is_completed_when_there_is_room(run, base, tmp_path):
    root = tmp_path / "silo-1"
    sites = walked(run, *base.init_silo(1, "00"), home=root)
    for name in ("identity.key", "identity.pub", "selection.key", "install.key", "ledger.jsonl", "silo.toml"):
        assert any(name in site for site in sites), name
    assert [entry.kind for entry in crash.history(root).entries] == ["open"]
    assert reading.status(root)["joined"] is False


def test_join_says_that_the_disk_is_full_and_signs_once_when_there_is_room(run, places):
    root = places.silos[0]
    with crash.serving(run, places):
        sites = walked(run, "silo", "join", "--yes", home=root)
    assert {"contract/vN/contract", "contract/vN/countersignature-N", "ledger.jsonl"} <= crash.names(sites) | {
        site.split(" ", 1)[1].rstrip("~") for site in sites
    }
    assert [type(entry) for entry in crash.history(root).entries][1:] == [Plan]
    assert reading.status(root)["joined"] is True


def test_train_says_that_the_disk_is_full_at_every_write_and_the_ledger_never_understates(run, places):
    crash.joined(run, places)
    root, sites = places.silos[0], []
    with crash.serving(run, places), Others(places) as others:
        watched = Watched(others)
        for silo in (2, 3):
            others.live(others.take_part_forever, silo, others.basis)
        coordinating = others.live(others.coordinate_on)
        while True:
            spare = frozenset(sites) if watched.attempts() < MOST_ATTEMPTS - 1 else None
            ended = filled(run, "silo", "train", "--rounds", 1, home=root, spare=spare)
            watched.check()
            assert not crash.litter(root), ended.due
            if ended.code:
                sites += ended.due
            elif spare is not None:
                break
        last = others.progress(1).round + 1
        others.wait_for("manifest", last, 0)
        others.is_last.set()
        run.done("silo", "train", "--rounds", 1, home=root)
        coordinating.join(30)
        others.settled(last)
        others.check()
    written = {site.split(" ", 1)[1].rstrip("~") for site in sites}
    of_a_round = ("promises/manifest-N", "promises/consent-N", "epoch/N/attempt", "epoch/N/release", "state.safetensors")
    for name in ("ledger.jsonl", *of_a_round):
        assert name in written, (name, sorted(written))
