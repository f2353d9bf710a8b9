# SPDX-License-Identifier: Apache-2.0
"""A run alone: the board is asked where it can be reached, a round that never ends ends the run, other homes have plans too."""

from __future__ import annotations

import shutil

import msgspec
import pytest

from privacy import federation
from privacy.dp import unprotected
from privacy.dp.budget import MOST_ATTEMPTS, Gate, Limits
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History
from privacy.errors import BudgetExhausted, LedgerBroken, PrivacyRefusal, SiloquyError
from silo import alone, commands, config, reading, rollback
from silo.config import Aggregator
from silo.home import Home
from tests.federation import NoBoard
from tests.sessions import Terminal
from tests.test_alone import LIMITS, Killed, Place
from tests.test_other_homes import names
from tests.test_restore import back_up, configured, put_back, root_of
from tests.test_service import Running
from tests.whole import Whole, contribution

pytestmark = pytest.mark.usefixtures("quick_polls")

NOBODY = Aggregator(url="http://127.0.0.1:1", fingerprint="00")
"""Where nobody listens."""


# --- Is the ledger held to the board? ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """Two rounds; the backup is of after the first."""
    whole = Whole.create(tmp_path_factory.mktemp("board") / "federation")
    whole.run(1)
    back_up(whole)
    whole.run(2)
    return whole


@pytest.fixture
def served(federated, tmp_path):
    """A copy of it, its board on loopback, and silo 2's silo.toml that says where."""
    whole = federated.copied(tmp_path / "federation")
    running = Running(whole)
    configured(root_of(whole), url=f"http://127.0.0.1:{running.port}")
    yield whole
    running.stop()


def test_also_alone_an_older_ledger_is_found_out_by_the_board(served, capsys):
    """Before this, `silo train --alone` spent a budget once more that the board could have said was spent."""
    home = Home(root_of(served))
    at = config.load(home.config_path).aggregator
    assert rollback.asked_if_reached(home, at) == ""
    put_back(served)
    configured(home.root, url=at.url)
    before = home.ledger_path.read_bytes()
    with pytest.raises(LedgerBroken, match="round 2 this silo signed an upload"):
        rollback.asked_if_reached(home, at)
    refused = Terminal(capsys)("silo train --alone --json --home", home.root)
    assert (refused.code, refused.error["code"]) == (5, "ledger-behind"), refused.out
    assert "silo restore" in refused.error["hint"]
    assert home.ledger_path.read_bytes() == before, "nothing is written"
    assert not (home.root / "alone").exists()


def test_offline_it_says_so_in_one_line_and_goes_on(federated, tmp_path, capsys):
    whole = federated.copied(tmp_path / "federation")
    put_back(whole)
    home = Home(root_of(whole))
    assert "cannot reach the aggregator at http://127.0.0.1:1" in rollback.asked_if_reached(home, NOBODY)
    assert "nowhere" in rollback.asked_if_reached(home, NOBODY, tmp_path / "nowhere")
    configured(home.root)
    said = []
    with pytest.raises(SiloquyError), alone.training(home.root, say=said.append):
        pytest.fail("there is no model to train")
    assert len(said) == 1
    assert said[0].startswith("the ledger was not compared with the board: cannot reach the aggregator")


def test_where_nothing_is_joined_there_is_no_board_to_ask(tmp_path):
    commands.create(
        tmp_path / "new", name="new", organisation="New", url="http://127.0.0.1:1", fingerprint="", records=tmp_path / "records",
        epsilon=5.0, delta=1e-5, model="",
    )  # fmt: skip
    assert rollback.asked_if_reached(Home(tmp_path / "new"), NOBODY) == "no federation is joined"


# --- A round that never comes to its end ------------------------------------------------------------------------------------------


def test_after_three_lost_attempts_the_refusal_says_what_can_be_done_and_it_can(tmp_path):
    place = Place(tmp_path, training={"rounds": 8})

    def broken(state):
        raise Killed

    run, ledger = place.started(contribution(1))
    with ledger:
        assert len(list(run.train(2))) == 2
    for _ in range(MOST_ATTEMPTS):
        run, ledger = place.started(broken)
        with ledger, pytest.raises(Killed):
            list(run.train())
    run, ledger = place.started(contribution(1))
    with ledger, pytest.raises(PrivacyRefusal) as refused:
        list(run.train())
    assert refused.value.code == "too-many-attempts"
    assert "round 3 was attempted 3 times" in refused.value.message
    assert "this run alone is over after 2 rounds" in refused.value.message
    assert f"epsilon {run._gate.spent().epsilon:.4g} of 50 is spent" in refused.value.message
    assert "a new run alone" in refused.value.hint
    assert "deadline" not in refused.value.hint, "no deadline ends a round of a run alone"
    assert len(place.entries(Reserve)) == 2 + MOST_ATTEMPTS, "nothing more was charged"
    # What the hint says: the same terms under another digest, from the start, beside what is spent.
    spent = run._gate.spent().epsilon
    place.run, place.home = alone.run_of(b"n" * 32), Home(tmp_path / "again")
    place.home.root.mkdir()
    run, ledger = place.started(contribution(1))
    with ledger:
        assert [each.round for each in run.train(3)] == [1, 2, 3]
        assert run._gate.spent().epsilon > spent
        tight = msgspec.structs.replace(place.terms, training=msgspec.structs.replace(place.terms.training, rounds=8))
        limit = Gate(ledger, LIMITS, plan=federation.event(tight), contract="ee" * 32, steps_per_attempt=1)
        assert limit.attempts_left == 8


# --- Two homes on the same records ------------------------------------------------------------------------------------------------


@pytest.fixture
def homes(tmp_path):
    """Silo 1 of two federations on the same records, each home naming the other; nothing is charged yet."""
    here, there = (Whole.create(tmp_path / name, name=name, training={"rounds": 6}) for name in ("first", "second"))
    for whole, other in ((here, there), (there, here)):
        configured(whole.root / "silo-1")
        names(Home(whole.root / "silo-1"), other.root / "silo-1")
    return here, there


def test_room_to_join_counts_what_the_plans_of_other_homes_may_still_charge(homes):
    here, there = homes
    root, accepted, settings = here.root / "silo-1", here.accepted, config.load(here.root / "silo-1" / "silo.toml")
    limits = reading.limits(settings, accepted)
    plans = [federation.event(each.accepted.terms) for each in homes]
    both = unprotected.certify([plans[0].with_steps(12)], limits.delta, order=limits.filter_order).epsilon
    alone_costs = unprotected.certify(plans[:1], limits.delta).epsilon
    assert plans[0] == plans[1]
    facts = reading.budget(root, 6)
    assert facts["epsilon"] == 0, "nothing is charged, in either home"
    assert facts["forecast"][-1]["epsilon"] == alone_costs, "what this home's own plan costs"
    assert facts["epsilon_with_plans"] == both > alone_costs
    configured(root, epsilon=1.1 * alone_costs)
    names(Home(root), there.root / "silo-1")
    (said,) = reading.earlier_runs(Home(root), accepted, config.load(root / "silo.toml"))
    assert f"epsilon {reading.budget(root, 0)['epsilon_with_plans']:.4g} of" in said
    assert said.endswith(": there is no room for all of them")
    names(Home(root))
    names(Home(there.root / "silo-1"))
    assert "epsilon_with_plans" not in reading.budget(root, 0)
    assert reading.earlier_runs(Home(root), accepted, config.load(root / "silo.toml")) == []


def fitting_two_and_not_three(own, one) -> float:
    """A limit for the run alone and one plan beside it; the filter's order follows from it, so it is looked for."""
    for tenths in range(10, 100):
        order = Limits(epsilon=tenths / 10, delta=1e-5).filter_order
        two, three = (unprotected.certify([own, one.with_steps(each)], 1e-5, order=order).epsilon for each in (6, 12))
        if 1.05 * two < tenths / 10 < three:
            return tenths / 10
    raise AssertionError


def test_a_run_alone_leaves_room_for_the_plans_of_other_homes_or_is_refused(homes):
    here, there = homes
    home, settings = Home(here.root / "silo-1"), config.load(here.root / "silo-1" / "silo.toml")
    terms = alone.terms_alone(here.accepted.terms)
    with alone._gate(home, settings, here.accepted, terms, instead=False) as (_, three):
        pass
    order = reading.limits(settings, here.accepted).filter_order
    own, one = federation.event(terms), federation.event(here.accepted.terms)
    assert three == pytest.approx(unprotected.certify([own, one.with_steps(12)], 1e-5, order=order).epsilon)
    configured(home.root, epsilon=fitting_two_and_not_three(own, one))
    names(home, there.root / "silo-1")
    settings = config.load(home.config_path)
    with pytest.raises(BudgetExhausted, match="and those of the other homes would bring epsilon to") as refused, alone._gate(
        home, settings, here.accepted, terms, instead=False
    ):  # fmt: skip
        pass
    assert refused.value.code == "no-room-to-join"
    with alone._gate(home, settings, here.accepted, terms, instead=True):
        pass
    with commands._gate(home, here.accepted, settings, 0, NoBoard()) as gate:
        assert gate.attempts_left == 6, "the gate of a round asks as it did: who charges first has the room"
    assert History.read(home.ledger_path, verify=lambda data, signature: None).counter == 1
    shutil.rmtree(there.root / "silo-1" / "contract")
    with alone._gate(home, config.load(home.config_path), here.accepted, terms, instead=False) as (_, two):
        assert two < three, "a home that joined nothing has no plan"
