# SPDX-License-Identifier: Apache-2.0
"""A silo alone: the contract's terms for one, each round charged before it is computed, apart from the rest, killed anywhere."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from privacy import federation, update_rule
from privacy.dp import accounting, noise
from privacy.dp.budget import MOST_ATTEMPTS, Gate, Limits
from privacy.dp.entries import Commit, Plan, Reserve
from privacy.dp.ledger import Ledger
from privacy.errors import LedgerBroken, PrivacyRefusal, TrustError
from privacy.federation import mechanism, ring_plan
from privacy.identity import keys
from privacy.prg import Randomness
from silo import alone, reading
from silo.home import Home
from tests import crash, sessions
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_export import copied, home_of
from tests.test_local import changed_by_hand, keyed
from tests.test_without_privacy import off_bytes
from tests.whole import contribution

LIMITS = Limits(epsilon=50.0, delta=1e-5)


def terms_of(**changes) -> federation.Contract:
    return alone.terms_alone(federation.parse(contract_bytes(**changes)).terms)


# --- The terms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"privacy": {"colluders": 2}, "silos": 5}, {"training": {"mode": "local", "rounds": 3}}])
def test_same_mechanism_the_run_alone_has_the_contracts_epsilon(changes):
    terms = federation.parse(contract_bytes(**changes)).terms
    own = alone.terms_alone(terms)
    one, plan = mechanism(own), mechanism(terms)
    assert (one.steps, one.sampling_rate) == (plan.steps, plan.sampling_rate)
    assert one.lattice_bits <= plan.lattice_bits
    assert one.effective_noise_multiplier == pytest.approx(plan.effective_noise_multiplier, rel=1e-9)
    found, planned = (accounting.certify([each], terms.privacy.delta).epsilon for each in (one, plan))
    assert found == pytest.approx(planned, rel=1e-3)


def test_no_other_silo_is_counted_on():
    terms = federation.parse(contract_bytes(silos=7, privacy={"colluders": 3})).terms
    own = alone.terms_alone(terms)
    assert (own.summed, own.shares) == (1, 1)
    assert ring_plan(own).share_variance == int(terms.privacy.noise_multiplier**2 * 4**terms.privacy.lattice_bits)
    assert own.divisor_for(7) == terms.privacy.sampling_rate * terms.privacy.units
    assert ring_plan(own).clamp > 6 * ring_plan(terms).clamp
    kept = ("task", "model", "privacy", "adapter", "dimension", "steps")
    assert all(getattr(own, name) == getattr(terms, name) for name in kept)


def test_where_one_silos_noise_is_too_wide_for_the_contracts_lattice_a_coarser_one_is_taken():
    wide = {"noise_multiplier": 110.0, "units": 100, "sampling_rate": 0.01}
    terms = federation.parse(contract_bytes(silos=50, privacy=wide)).terms
    own = alone.terms_alone(terms)
    assert own.privacy.lattice_bits < terms.privacy.lattice_bits == 20
    assert mechanism(own).effective_noise_multiplier == pytest.approx(110.0, rel=1e-6)


def test_without_noise_there_is_nothing_to_compare_at():
    with pytest.raises(PrivacyRefusal, match="no epsilon to be compared"):
        alone.terms_alone(federation.parse(off_bytes(3)).terms)


def test_a_run_alone_is_no_contract_and_no_other_run():
    first, second = (alone.run_of(bytes([number]) * 32) for number in (1, 2))
    assert len({first, second, bytes([1]) * 32, bytes([2]) * 32}) == 4


# --- One round ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam"])
def test_one_noise_per_step_a_round_is_the_contracts_rule_on_own_noisy_sums(optimizer):
    """By plain numpy from the specification: the silo's noise in full, the divisor of one silo, the schedule by rounds."""
    terms = terms_of(
        training={"mode": "local", "steps_per_round": 4, "warmup_rounds": 2, "optimizer": optimizer, "learning_rate": 0.05}
    )
    start = update_rule.initial(terms)
    after = alone.stepped(start, terms, 1, contribute=contribution(1), randomness=keyed())
    theta, first, second = changed_by_hand(terms, start, contribution(1), keyed(), 4)
    assert np.array_equal(after.theta, theta)
    assert np.array_equal(after.first_moment, first)
    assert np.array_equal(after.second_moment, second)
    later = alone.stepped(after, terms, 2, contribute=contribution(1), randomness=keyed(100))
    assert later.applied == 8
    assert update_rule.learning_rate(terms.training, 1) == 2 * update_rule.learning_rate(terms.training, 0)


def test_public_count_every_step_draws_a_sample_and_noise_of_its_own():
    terms, seen, sources = terms_of(training={"mode": "local", "steps_per_round": 5}), [], []

    def contribute(state):
        seen.append(state.theta.tobytes())
        return np.zeros(terms.dimension, dtype=np.int64)

    def randomness():
        sources.append(Randomness.from_os())
        return sources[-1]

    alone.stepped(update_rule.initial(terms), terms, 1, contribute=contribute, randomness=randomness)
    assert (len(set(seen)), len(sources)) == (5, 5)


# --- A run over a ledger --------------------------------------------------------------------------------------------------


class Place:
    """A ledger and a folder, and runs over them; making a new run is a restart."""

    def __init__(self, root: Path, **changes):
        self.terms, self.run = terms_of(**changes), alone.run_of(bytes(32))
        self.root, self.identity = root, keys.create(root / "identity.key", name="north", receives=False)
        Ledger.create(root / "ledger.jsonl", who="north", **self._signing()).close()
        self.home = Home(root / "alone")
        self.home.root.mkdir()

    def _signing(self):
        verify = functools.partial(keys.verify_signature, self.identity.public.sign_key)
        return {"sign": self.identity.sign, "verify": verify, "clock": time.time}

    def started(self, contribute, **options) -> tuple[alone.Run, Ledger]:
        ledger = Ledger.open(self.root / "ledger.jsonl", **self._signing())
        gate = Gate(
            ledger, LIMITS, plan=federation.event(self.terms), contract=self.run.hex(),
            steps_per_attempt=self.terms.training.steps_per_round,
        )  # fmt: skip
        gate.declare(run="alone")
        return (
            alone.Run(
                terms=self.terms, run=self.run, place=self.home, gate=gate, contribute=contribute, limit=LIMITS.epsilon, **options
            ),
            ledger,
        )

    def entries(self, kind):
        return [body for body in crash.history(self.root).entries if isinstance(body, kind)]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, training={"rounds": 3})


def test_charged_before_computed_and_committed_after(place):
    seen = []

    def contribute(state):
        seen.append((len(place.entries(Reserve)), len(place.entries(Commit)), (place.home.root / "state.safetensors").exists()))
        return contribution(1)(state)

    run, ledger = place.started(contribute)
    with ledger:
        done = list(run.train())
    assert seen == [(1, 0, False), (2, 1, True), (3, 2, True)]
    assert [each.round for each in done] == [1, 2, 3]
    assert [each.epsilon for each in done] == sorted(each.epsilon for each in done)
    assert place.entries(Plan)[0].mechanism == mechanism(place.terms)
    assert crash.history(place.root).charged() == [mechanism(place.terms)]
    assert run.summary()["rounds_done"] == 3
    assert run.rounds_left == 0


class Killed(BaseException):
    """The process is gone: nothing may catch it."""


@contextlib.contextmanager
def killed_at(kind: type, name: str):
    """The process ends where this method would be called."""

    def die(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, die)
        yield


def test_never_twice_a_lost_attempt_is_made_anew_and_both_are_charged(place, monkeypatch):
    drawn = []
    draw = noise.discrete_gaussian

    def drawing(count, variance, randomness):
        drawn.append(draw(count, variance, randomness))
        return drawn[-1]

    monkeypatch.setattr(noise, "discrete_gaussian", drawing)
    run, ledger = place.started(contribution(1))
    with ledger, killed_at(Home, "save_progress"), pytest.raises(Killed):
        list(run.train())
    assert place.home.progress() is None, "nothing of the lost attempt was kept"
    run, ledger = place.started(contribution(1))
    assert (run.rounds_left, len(place.entries(Reserve))) == (2, 1)
    with ledger:
        assert [each.round for each in run.train()] == [1, 2], "the plan pays for three attempts, and one was lost"
    attempts = [entry.attempt for entry in place.entries(Reserve)]
    assert [entry.round for entry in place.entries(Reserve)] == [1, 1, 2]
    assert len(set(attempts)) == 3
    assert len({each.tobytes() for each in drawn}) == len(drawn) == 3
    assert [(entry.round, entry.attempt) for entry in place.entries(Commit)] == list(zip((1, 2), attempts[1:], strict=True))


def test_no_more_than_planned_whatever_is_asked_for(place):
    run, ledger = place.started(contribution(1))
    with ledger:
        assert [each.round for each in run.train(100)] == [1, 2, 3]
        assert list(run.train(1)) == []
    assert len(place.entries(Reserve)) == 3


def test_killed_between_the_state_and_the_note_the_round_stands_and_is_noted_once(place):
    run, ledger = place.started(contribution(1))
    with ledger, killed_at(Gate, "settle"), pytest.raises(Killed):
        list(run.train(1))
    kept = place.home.progress()
    assert (kept.round, len(place.entries(Commit))) == (1, 0)
    run, ledger = place.started(contribution(1))
    with ledger:
        assert [each.round for each in run.train(1)] == [2]
    assert [entry.round for entry in place.entries(Commit)] == [1, 2]


def test_a_round_that_fails_at_every_start_does_not_burn_the_plan(tmp_path):
    place = Place(tmp_path, training={"rounds": 8})

    def broken(state):
        raise Killed

    for _ in range(MOST_ATTEMPTS):
        run, ledger = place.started(broken)
        with ledger, pytest.raises(Killed):
            list(run.train())
    run, ledger = place.started(broken)
    with ledger, pytest.raises(PrivacyRefusal, match="attempted 3 times"):
        list(run.train())
    assert len(place.entries(Reserve)) == MOST_ATTEMPTS


def test_a_state_of_another_run_is_not_trained_on(place):
    run, ledger = place.started(contribution(1))
    with ledger:
        list(run.train(1))
    with pytest.raises(TrustError, match="is of the run"):
        alone.progress_of(place.home, alone.run_of(bytes([1]) * 32), place.terms)


# --- The command, in this process: no network is there ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(tiny_bert, tmp_path_factory) -> Path:
    root = home_of(tmp_path_factory.mktemp("alone") / "north", tiny_bert).root
    sessions.write_rows(root / "records.jsonl", sessions.rows(120))
    return root


@pytest.fixture
def north(joined, tmp_path) -> Path:
    """A silo that joined, settled three rounds and paid for them; of it nobody else has a copy."""
    return copied(joined, tmp_path / "north")


@pytest.fixture
def terminal(capsys):
    return Terminal(capsys)


def kept(root: Path) -> dict[str, bytes]:
    """Every file of the federation but the ledger and locks."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(("alone/", "ledger.", ".lock"))}


def test_apart_it_trains_without_a_network_and_writes_nothing_of_the_federation(north, terminal, monkeypatch):
    def unplugged(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unplugged)
    before, state = kept(north), Home(north).progress().state.digest
    first = terminal("silo train --alone --rounds 2 --json --home", north)
    assert first.code == 0, first.out
    again = terminal("silo train --alone --rounds 1 --home", north)
    assert again.code == 0
    assert "3/10" in again.err
    assert "█" in again.err
    assert again.err.count("the ledger was not compared with the board: cannot reach the aggregator") == 1
    assert kept(north) == before
    assert Home(north).progress().state.digest == state
    said = first.document
    assert (said["rounds"], said["rounds_done"], said["rounds_planned"]) == (2, 2, 10)
    assert said["basis"] == "weights"
    charged = [entry for entry in crash.history(north).entries if isinstance(entry, Reserve)]
    assert [entry.round for entry in charged] == [1, 2, 3, 1, 2, 3]
    assert len({entry.contract for entry in charged}) == 2
    budget = reading.budget(north, 0)
    assert budget["epsilon"] > said["epsilon"], "one round more"
    assert budget["steps"] == 3, "of the federation's plan nothing was used"
    assert said["epsilon_with_federation"] > said["epsilon"]
    assert (north / "alone").stat().st_mode & 0o777 == 0o700


def test_figures_stay_here_and_name_all_three_models(north, terminal, tmp_path):
    held_out = sessions.write_rows(tmp_path / "held.jsonl", sessions.rows(60, start_at=500))
    none_yet = terminal("silo eval --alone --json --records", held_out, "--home", north)
    assert (none_yet.code, none_yet.error["code"]) == (3, "not-alone")
    assert terminal("silo train --alone --rounds 3 --json --home", north).code == 0
    entries = len(crash.history(north).entries)
    found = terminal("silo eval --alone --json --records", held_out, "--home", north)
    assert found.code == 0, found.out
    assert set(found.document) == {
        "accuracy_before", "accuracy_alone", "accuracy_after", "rounds_alone", "rounds_planned", "rounds", "contract",
    }  # fmt: skip
    assert (found.document["rounds_alone"], found.document["rounds"]) == (3, 3)
    assert all(0 <= found.document[name] <= 1 for name in ("accuracy_before", "accuracy_alone", "accuracy_after"))
    words = terminal("silo eval --alone --records", held_out, "--home", north).out
    assert "alone" in words
    assert "with the federation" in words
    assert len(crash.history(north).entries) == entries


def limited(root: Path, epsilon: float) -> None:
    text = (root / "silo.toml").read_text()
    (root / "silo.toml").write_text(text.replace("epsilon = 40.0", f"epsilon = {epsilon}"))


def test_refused_where_the_federations_own_plan_no_longer_fits_unless_said(north, terminal):
    limited(north, 2.9)  # the plan takes 2.02, and so does this run; both together take 3.37
    before = (north / "ledger.jsonl").read_bytes()
    refused = terminal("silo train --alone --rounds 1 --json --home", north)
    assert refused.code == 5
    assert 3 < refused.error["epsilon_after"] < 4
    assert refused.error["code"] == "no-room-to-join"
    assert "--instead-of-joining" in refused.error["hint"]
    assert (north / "ledger.jsonl").read_bytes() == before
    assert not (north / "alone").exists()
    said = terminal("silo train --alone --rounds 1 --instead-of-joining --home", north)
    assert said.code == 0, said.out
    assert "too much to join" in said.out


def test_refused_beyond_the_limit_whatever_is_said(north, terminal):
    limited(north, 1.5 * reading.budget(north, 0)["epsilon"])
    before = (north / "ledger.jsonl").read_bytes()
    refused = terminal("silo train --alone --instead-of-joining --json --home", north)
    assert refused.code == 5, refused.out
    assert (north / "ledger.jsonl").read_bytes() == before


def test_a_ledger_that_was_rolled_back_is_found_out(north, terminal):
    old = (north / "ledger.jsonl").read_bytes()
    assert terminal("silo train --alone --rounds 1 --json --home", north).code == 0
    (north / "ledger.jsonl").write_bytes(old)
    found = terminal("silo train --alone --rounds 1 --json --home", north)
    assert found.error["code"] == "ledger-behind"
    assert (north / "ledger.jsonl").read_bytes() == old, "nothing is written on top"
    with pytest.raises(LedgerBroken), alone.training(north):
        pass


def test_while_a_restore_has_not_ended_the_ledger_takes_no_entry(north, terminal):
    Home(north).begin_restore()
    before = (north / "ledger.jsonl").read_bytes()
    assert terminal("silo train --alone --rounds 1 --json --home", north).error["code"] == "restore-unfinished"
    assert (north / "ledger.jsonl").read_bytes() == before


def test_what_does_not_go_together_is_said(north, terminal):
    for words in ("--alone --watch", "--alone --dry-run", "--rounds 1 --contract x.toml", "--rounds 1 --instead-of-joining"):
        assert terminal(f"silo train {words} --json --home", north).code == 2, words
    assert terminal("silo train --alone --json --contract", north / "none.toml", "--home", north).code == 3
    assert terminal("silo eval --alone --records x --private-head y --json --home", north).code == 2


# --- Real processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_every_site_it_goes_on_and_is_never_undercounted(run, places):
    """Before it joins, from the contract's file: no aggregator is up."""
    root, contract = places.silos[0], places.hub / "contract" / "v1.toml"
    states: list[int] = []

    def never_undercounted():
        history, runs = crash.history(root), list(root.glob("alone/*/state.safetensors"))
        progress = Home(runs[0].parent).progress() if runs else None
        states.append(0 if progress is None else progress.round)
        reserved = {entry.round for entry in history.entries if isinstance(entry, Reserve)}
        assert set(range(1, states[-1] + 1)) <= reserved

    sites = run.walk("silo", "train", "--alone", "--rounds", 1, "--contract", contract, home=root, after=never_undercounted)
    assert crash.names(sites) == crash.page("silo train --alone")
    assert not [site for site in sites if "PUT" in site or "GET" in site], "nothing was sent or asked for"
    assert not crash.litter(root)
    entries = crash.history(root).entries
    assert [entry.round for entry in entries if isinstance(entry, Commit)] == list(range(1, states[-1] + 2))
    assert len([entry for entry in entries if isinstance(entry, Plan)]) == 1
    assert states == sorted(states)


@pytest.mark.slow
def test_before_it_joins_a_silo_sees_what_it_reaches_alone_and_join_says_so(run, places):
    root = places.silos[0]
    with crash.serving(run, places):
        trained = run.done("silo", "train", "--alone", "--rounds", 1, "--json", home=root)
        assert reading.status(root)["joined"] is False
        assert "silo train --alone" in run.done("silo", "join", "--yes", home=root).out
    assert trained.document["rounds_done"] == 1
    assert reading.status(root)["joined"] is True
    assert trained.document["epsilon_with_federation"] < 50
