# SPDX-License-Identifier: Apache-2.0
"""Share mode: power cuts between any two documents; a sum without a silo is exactly the others', with their noise alone."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest

import silo.round
from aggregator import admission, sizes
from privacy import federation
from privacy.dp import ring
from privacy.dp.entries import Commit, Reserve, Void
from privacy.errors import RoundError, TrustError
from privacy.messages import AGGREGATOR, Outcome, Signed, decode
from tests.whole import GUARDIAN_KINDS, MOST_STRIDE, Power, PowerCut, View, Whole, flips, stride

SHARES = {"protocol": "shares", "dropouts": 1, "corrupt_guardians": 1}
FOUR = (1, 2, 3, 4)

pytestmark = pytest.mark.usefixtures("quick_polls")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Whole.create(tmp_path_factory.mktemp("walk") / "federation", silos=FOUR, sum={**SHARES, "deadline_s": 900})


@pytest.fixture
def whole(made, tmp_path):
    return made.copied(tmp_path / "federation")


def outcome_of(whole, number):
    return decode(decode(whole.store.get("outcome", number, AGGREGATOR), Signed).body, Outcome)


# --- Power ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_a_restart_of_everybody_between_any_two_documents_changes_nothing(whole, tmp_path, before):
    """After (or just before) a document all parties lose power, silos and guardians, and start again; then after another one."""
    reference = whole.copied(tmp_path / "undisturbed")
    reference.run(2, seeded=True)
    documents, cuts = len(reference.store.log), 0
    while True:
        whole = whole.restarted(power=Power(stride(), before=before))
        try:
            whole.run(2, seeded=True)
        except PowerCut:
            cuts += 1
            assert cuts <= documents + 10
        else:
            break
    most = 1 if "SILOQUY_FULL" in os.environ else MOST_STRIDE
    assert cuts >= (documents - 10) // most  # endorsements and shares beyond the q that are needed may come too late
    assert {whole.progress(s).state.digest for s in FOUR} == {reference.progress(1).state.digest}
    for number in (1, 2):
        assert whole.store.parties("upload", number) == FOUR
        assert {len(whole.attempts(s, number)) for s in FOUR} <= {1, 2}


# --- The sum ----------------------------------------------------------------------------------------------------------------------


class Spy:
    """The vectors that the silos masked, by (round, silo)."""

    def __init__(self, patch):
        self.x, original = {}, silo.round.masked

        def masked(x, **given):
            self.x[given["round_number"], given["silo"]] = x.copy()
            return original(x, **given)

        patch.setattr(silo.round, "masked", masked)


@pytest.fixture(scope="module")
def without_one(tmp_path_factory):
    """Two rounds with long vectors; in the second silo 2 is away. Nothing is contributed: the sums are noise."""
    whole = Whole.create(
        tmp_path_factory.mktemp("without") / "f", silos=FOUR, sum=SHARES, model={"hidden_size": 4000},
        privacy={"lattice_bits": 14, "units": 200},
    )  # fmt: skip

    def nothing(state):
        return np.zeros(state.theta.size, dtype=np.int64)

    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        whole.run(1, contribute=nothing)
        jobs = [functools.partial(whole.take_part, s, 2, contribute=nothing) for s in (1, 3, 4)]
        whole.run_hurried(2, *jobs)
    return whole, spy


def test_the_sum_is_exactly_that_of_the_silos_in_the_set(without_one):
    whole, spy = without_one
    for number, silos in ((1, FOUR), (2, (1, 3, 4))):
        outcome = outcome_of(whole, number)
        assert [silo for silo, _ in outcome.seeds] == list(silos)
        total = sum(spy.x[number, s] for s in silos).astype("<u4")
        assert outcome.total == total.tobytes()
    assert [(i, j) for i, j, _ in outcome.pair_keys] == [(1, 2), (3, 2), (4, 2)]


def test_without_a_silo_the_noise_of_the_others_stands(without_one):
    """Variance of the sum: |U| shares of noise. Within 8 standard deviations, apart from another number."""
    whole, _ = without_one
    share = federation.ring_plan(whole.accepted.terms).share_variance
    for number, silos in ((1, 4), (2, 3)):
        total = ring.lift(np.frombuffer(outcome_of(whole, number).total, dtype="<u4")).astype(np.float64)
        found, spread = float(np.mean(total**2)) / share, silos * (2 / total.size) ** 0.5
        assert abs(found - silos) < 8 * spread, (found, silos)
        assert 8 * spread < 0.9


def test_the_ledgers_say_how_many_stood_and_the_odometer_is_below_the_charge(without_one):
    whole, _ = without_one
    commits = [body for body in whole.history(1).entries if isinstance(body, Commit)]
    assert [(c.round, c.silos) for c in commits] == [(1, 4), (2, 3)]
    away = [body for body in whole.history(2).entries if isinstance(body, Commit | Void | Reserve)]
    assert [(type(b).__name__, b.round) for b in away] == [("Reserve", 1), ("Commit", 1)], "it has not settled round 2 yet"
    with whole.silo(1) as running:
        charged, stood = running.gate.spent(), running.gate.stood()
        assert 0 < stood.epsilon < charged.epsilon
        plan = running.gate._plan
    assert plan.shares == whole.accepted.terms.fewest - 1 == 2


def test_every_share_of_the_plan_is_charged_as_if_all_that_may_were_away(without_one):
    whole, _ = without_one
    terms = whole.accepted.terms
    reserves = [body.mechanism for body in whole.history(3).entries if isinstance(body, Reserve)]
    assert {event.shares for event in reserves} == {terms.silos - terms.sum.dropouts - terms.privacy.colluders}


# --- The door ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(made, tmp_path_factory):
    """The federation, and its documents of a set-up and a round in the order in which they came."""
    whole = made.copied(tmp_path_factory.mktemp("logged") / "federation")
    slots = [("contract", 1, AGGREGATOR), *(("countersignature", 1, s) for s in FOUR)]
    first = [(slot, whole.store.get(*slot)) for slot in slots]
    whole.run(1)
    return first + whole.store.log


def test_every_guardians_document_is_admitted_where_it_stood_and_no_other_one_is(logged):
    tried = set()
    for place, (slot, own) in enumerate(logged):
        if slot[0] not in GUARDIAN_KINDS:
            continue
        view = View(logged[:place])
        admission.admit(*slot, own, view)
        for other_slot, other in logged:
            if other_slot != slot:
                tried.add(slot[0])
                with pytest.raises((TrustError, RoundError)):
                    admission.admit(*slot, other, view)
        for changed in flips(own, step=101):
            with pytest.raises((TrustError, RoundError)):
                admission.admit(*slot, changed, view)
    assert tried == {"guardian-note", "list", "endorsement", "shares"}


def test_caps_hold_every_document_and_not_much_more(logged, made):
    for (kind, _, party), data in logged:
        if party != AGGREGATOR:
            assert len(data) <= sizes.cap(kind, made.accepted), kind
    assert sizes.cap("close", made.accepted) < 1000


def test_consents_and_releases_have_no_place_in_share_mode(logged):
    view = View(logged)
    for kind in ("consent", "release"):
        with pytest.raises(TrustError, match="protocol = 'shares'"):
            admission.admit(kind, 1, 1, b"x", view)
