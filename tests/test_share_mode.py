# SPDX-License-Identifier: Apache-2.0
"""A whole federation in share mode, in one process: what it reaches, and which silos and guardians it survives, at any moment."""

from __future__ import annotations

import functools
import os

import pytest

from privacy.dp.entries import Void
from privacy.messages import AGGREGATOR, Outcome, Signed, decode
from tests import sessions
from tests.carried import Carried
from tests.whole import PowerCut, Whole

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
FOUR = (1, 2, 3, 4)

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four silos that are the guardians too, one of which may be away; no epoch yet. Copied by each test."""
    return Whole.create(tmp_path_factory.mktemp("share") / "federation", silos=FOUR, sum=SHARES)


CARRIERS = {"board": Whole, "folder": Carried}


@pytest.fixture(params=sorted(CARRIERS))
def whole(request, made, tmp_path):
    """Over both carriers, like ``ran``."""
    whole = made.copied(tmp_path / "federation", kind=CARRIERS[request.param])
    yield whole
    whole.close()


def test_all_parties_reach_the_same_digest_each_round(whole):
    settled, closed = whole.run(3)
    assert [c.kind for c in closed] == ["result"] * 3
    for number, close in enumerate(closed, start=1):
        assert {settled[s][number - 1].state.digest for s in FOUR} == {close.state}
        assert {settled[s][number - 1].stood for s in FOUR} == {4}
    assert len({c.state for c in closed}) == 3


# --- Silos and guardians that fall ------------------------------------------------------------------------------------------------

STAGES = ("upload", "list", "endorsement", "shares", "acknowledgement")


@pytest.fixture(scope="module")
def ready(made, tmp_path_factory):
    """With a confirmed epoch: one round was run and is part of it."""
    whole = made.copied(tmp_path_factory.mktemp("ready") / "federation")
    whole.run(1)
    return whole


@pytest.fixture(params=sorted(CARRIERS))
def ran(request, ready, tmp_path):
    whole = ready.copied(tmp_path / "federation", kind=CARRIERS[request.param])
    yield whole
    whole.close()


def fall(whole, silo, number, kind, *, after=False):
    """A round in which this silo's power goes at one of its documents; how it closed, and what the others settled."""
    settled = {}

    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(silo, number, line=whole.dying(kind, number, after=after))

    def lives(other):
        settled[other] = whole.take_part(other, number)

    others = [other for other in whole.silos if other != silo]
    closed = whole.run_hurried(number, falls, *(functools.partial(lives, other) for other in others))
    return closed, settled


FALLS = [(way, silo, kind, after) for way in CARRIERS for silo in FOUR for kind in STAGES for after in (False, True)]
if "SILOQUY_FULL" not in os.environ:  # over each carrier every stage, before and after; every silo; a quarter of all
    FALLS = [each for each in FALLS if (each[1] + STAGES.index(each[2]) + 2 * each[3] + (each[0] == "folder")) % 4 == 0]


@pytest.mark.parametrize(("ran", "silo", "kind", "after"), FALLS, indirect=["ran"])
def test_a_silo_that_falls_at_any_stage_is_survived_and_comes_back(ran, silo, kind, after):
    closed, settled = fall(ran, silo, 2, kind, after=after)
    assert [c.kind for c in closed] == ["result"]
    stood = 3 if (kind, after) == ("upload", False) else 4
    assert {each.stood for (each,) in settled.values()} == {stood}
    assert {each.state.digest for (each,) in settled.values()} == {closed[0].state}
    settled, closed = ran.run(3)
    assert closed[-1].kind == "result"
    assert {ran.progress(s).state.digest for s in FOUR} == {closed[-1].state}
    assert settled[silo][-1].stood == 4, "it takes part again"
    assert len(ran.attempts(silo, 2)) <= 2


@pytest.mark.parametrize("kind", ["upload", "list"])
def test_two_silos_that_fall_are_one_too_many_and_nothing_is_released(ran, kind):
    """Below u_min silos there is no set: the round ends void, its reservations stay, and all go on when they are back."""
    before = ran.progress(1).state.digest

    def falls(silo):
        with pytest.raises(PowerCut):
            ran.take_part(silo, 2, line=ran.dying(kind, 2))

    back = []

    def comes_back(silo):
        """q guardians must say that the round is over: one comes back, too late to upload."""
        falls(silo)
        if kind == "upload":
            ran.store.looks.leave()  # the others' deadline passes meanwhile
            sessions.until(lambda: ran.waiting is not None and ran.waiting.step == "close")
            ran.store.looks.enter()
        else:
            ran.clock.skip(61.0)
        back.extend(ran.take_part(silo, 2))

    settled = {}

    def lives(silo):
        settled[silo] = ran.take_part(silo, 2)

    closed = ran.run_hurried(
        2, functools.partial(falls, 1), functools.partial(comes_back, 2), *(functools.partial(lives, s) for s in (3, 4)), silent=2
    )
    if kind == "list":  # the one that is back lists too
        assert [c.kind for c in closed] == ["result"]
        return
    assert [(c.kind, c.reason) for c in closed] == [("void", "absent")]
    assert {each.kind for done in settled.values() for each in done} == {each.kind for each in back} == {"void"}
    assert not [k for k in ("freeze", "endorsement", "certificate", "shares") if ran.store.parties(k, 2)]
    assert len(ran.store.parties("close", 2)) >= ran.accepted.terms.quorum
    assert ran.progress(3).state.digest == before
    assert [len(ran.attempts(s, 2)) for s in FOUR] == [1, 1, 1, 1], "what was reserved stays reserved"
    settled, closed = ran.run(3)
    assert closed[-1].kind == "result"
    assert {ran.progress(s).state.digest for s in FOUR} == {closed[-1].state}
    spent = [ran.history(s).entries for s in FOUR]
    assert all(any(isinstance(e, Void) and e.round == 2 for e in entries) for entries in spent)


def test_a_certificate_without_shares_is_annulled(ran):
    """Two guardians endorse and then give out nothing: q closes name the set, no sum comes out, all counts as released."""
    lines = {}
    for silo in (1, 2):
        line = lines[silo] = ran.line()
        put = line.put

        def silent(kind, number, party, data, put=put):
            if kind != "shares":
                put(kind, number, party, data)

        line.put = silent
    settled = {}

    def lives(silo):
        settled[silo] = ran.take_part(silo, 2, line=lines.get(silo))

    closed = ran.run_hurried(2, *(functools.partial(lives, s) for s in FOUR), silent=2)
    assert [(c.kind, c.reason) for c in closed] == [("annulled", "shares-missing")]
    assert {each.kind for done in settled.values() for each in done} == {"annulled"}
    outcome = decode(decode(ran.store.get("outcome", 2, AGGREGATOR), Signed).body, Outcome)
    assert (outcome.total, outcome.seeds, outcome.vectors, outcome.pair_keys) == (b"", (), (), ())
    assert ran.store.get("certificate", 2, AGGREGATOR) is not None
    settled, closed = ran.run(3)
    assert closed[-1].kind == "result"


def test_a_silo_that_misses_whole_rounds_catches_up_without_spending(ran):
    def lives(silo):
        return ran.take_part(silo, 3)

    closed = ran.run_hurried(3, *(functools.partial(lives, s) for s in (1, 2, 3)))
    assert [c.kind for c in closed] == ["result", "result"]
    assert ran.store.parties("upload", 2) == ran.store.parties("upload", 3) == (1, 2, 3)
    settled, closed = ran.run(4)
    assert [(each.round, each.stood) for each in settled[4]] == [(2, 0), (3, 0), (4, 4)]
    assert [len(ran.attempts(4, number)) for number in (2, 3, 4)] == [0, 0, 1]
    assert {ran.progress(s).state.digest for s in FOUR} == {closed[-1].state}


# --- Epochs -----------------------------------------------------------------------------------------------------------------------


def test_a_silo_that_comes_too_late_for_an_epoch_follows_it_and_enters_the_next(whole):
    """Three begin; the fourth comes after the roster, follows by public documents, and a new epoch is called for it."""
    settled = {}

    def lives(silo):
        settled[silo] = whole.take_part(silo, 3)

    def late():
        whole.wait_for("outcome", 1, AGGREGATOR)
        settled[4] = whole.take_part(4, 3)

    first = whole.run_hurried(1, *(functools.partial(whole.take_part, s, 1) for s in (1, 2, 3)))
    assert [c.kind for c in first] == ["result"]
    assert whole.store.parties("epoch-note", 1) == (1, 2, 3)
    closed = whole.run_hurried(3, late, *(functools.partial(lives, s) for s in (1, 2, 3)))
    assert [c.kind for c in closed] == ["result", "result"]
    assert [each.round for each in settled[4]] == [1, 2, 3]
    assert settled[4][0].stood == 0
    assert settled[4][-1].stood == 4
    assert whole.store.latest("epoch") == 2
    assert {whole.progress(s).state.digest for s in FOUR} == {closed[-1].state}


@pytest.mark.parametrize("kind", ["pair-seeds", "confirmation"])
def test_a_silo_that_does_not_confirm_is_left_out_of_the_next_call(whole, kind):
    def falls():
        with pytest.raises(PowerCut):
            whole.take_part(4, 1, line=whole.dying(kind, 1))

    closed = whole.run_hurried(1, falls, *(functools.partial(whole.take_part, s, 1) for s in (1, 2, 3)))
    assert [c.kind for c in closed] == ["result"]
    assert whole.store.latest("epoch") == 2
    assert whole.store.parties("upload", 1) == (1, 2, 3)
    settled, closed = whole.run(3)
    assert settled[4][-1].stood == 4, "it knocked, and the next epoch has it"
