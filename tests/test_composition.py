# SPDX-License-Identifier: Apache-2.0
"""Composition over rounds, runs, restarts and modes; what a forecast says; and that a silo's own limits only ever say no."""

from __future__ import annotations

import contextlib
import itertools
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli import silo as silo_cli
from cli.budget import words
from cli.output import Output
from privacy import federation
from privacy.dp import accounting, overlap
from privacy.dp.budget import Account, Gate, Limits
from privacy.dp.entries import Reserve
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian
from privacy.errors import BudgetExhausted, LedgerBroken, PrivacyRefusal
from silo import budgeting, config, membership, reading
from silo.home import Home
from tests.terms import contract_bytes
from tests.test_budget import PARTS, verify
from tests.test_overlap import SETS

CONTRACTS = ("aa" * 32, "bb" * 32, "cc" * 32)
DELTA = 1e-5
JOINT, LOCAL = (1, 2), (3, 1)
"""(steps an attempt is charged, shares of the noise that insiders cannot subtract)."""


def mechanism(steps, shares):
    return LatticeGaussian(
        sampling_rate=0.2, lattice_bits=16, share_variance=math.ceil(2.64**2 * 4**16 / shares), shares=shares, dimension=1000,
        steps=steps,
    )  # fmt: skip


class Silo:
    """A silo with one ledger, several contracts, crashes and restarts; ``left``: the mechanisms whose bytes left, by units."""

    def __init__(self, path, limit):
        self.path, self.limits, self.left = path, Limits(epsilon=limit, delta=DELTA), []
        Ledger.create(path, who="silo", **PARTS).close()
        self.ledger = Ledger.open(path, **PARTS)
        self.numbers = itertools.count(1)

    def gate(self, contract, mode, units):
        steps, shares = mode
        made = Gate(
            self.ledger, self.limits, plan=mechanism(30 * steps, shares), contract=contract, steps_per_attempt=steps, units=SETS.get
        )
        made.draws_from(units)
        return made

    def attempt(self, contract, mode, units, ending):
        """One attempt at the next round: refused, or reserved; then it crashes before sending, leaves, or leaves and is settled."""
        gate, number = self.gate(contract, mode, units), next(self.numbers)
        try:
            gate.declare()
            gate.admit(number, number.to_bytes(16, "big"))
        except (BudgetExhausted, PrivacyRefusal):
            return
        if ending == "crash":
            self.restart()
            return
        self.left.append((mechanism(*mode), units))
        if ending != "sent":
            gate.settle(number, ending)

    def restart(self, torn=b""):
        self.ledger.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.ledger = Ledger.open(self.path, **PARTS)


ACTIONS = st.tuples(
    st.sampled_from(CONTRACTS), st.sampled_from([None, *SETS]), st.sampled_from(["result", "void", "crash", "sent"]),
    st.sampled_from([None, b"", b'{"sequence":']),
)  # fmt: skip


@pytest.mark.parametrize("mode", [JOINT, LOCAL])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=10), limit=st.sampled_from([0.9, 50.0]))
def test_what_is_reported_is_never_below_what_left(tmp_path_factory, mode, actions, limit):
    """Whatever was tried, voided, crashed and restarted, under whichever contract: for every unit, and for nobody less."""
    silo = Silo(tmp_path_factory.mktemp("random") / "ledger.jsonl", limit)
    for contract, units, ending, torn in actions:
        silo.attempt(contract, mode, units, ending)
        if torn is not None:
            silo.restart(torn)
    read, the_plan = History.read(silo.path, verify=verify), mechanism(*mode)
    spent, blind = (
        Account(read, silo.limits, plan=the_plan, contract=CONTRACTS[0], steps_per_attempt=mode[0], units=units).spent().epsilon
        for units in (SETS.get, overlap.nothing_shown)
    )
    assert spent <= limit
    for mark in {mark for known in SETS.values() for mark in known.marks}:
        seen = sum(each.steps for each, units in silo.left if units is None or mark in SETS[units].marks)
        assert not seen or accounting.certify([mechanism(seen, mode[1])], DELTA).epsilon <= spent + 1e-12
    everything = sum(each.steps for each, _ in silo.left)
    assert not everything or accounting.certify([mechanism(everything, mode[1])], DELTA).epsilon <= blind + 1e-12
    assert spent <= blind + 1e-12, "credit only ever lowers a figure"
    silo.ledger.close()


def test_a_changed_line_is_never_composed(tmp_path):
    silo = Silo(tmp_path / "ledger.jsonl", 50.0)
    for units in SETS:
        silo.attempt(CONTRACTS[0], JOINT, units, "result")
    silo.ledger.close()
    data = silo.path.read_bytes()
    first, second = list(SETS)[:2]
    silo.path.write_bytes(data.replace(first.encode(), second.encode(), 1))
    with pytest.raises(LedgerBroken):
        History.read(silo.path, verify=verify)


# --- Every run is counted -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(tmp_path):
    """Two runs on the same units and one on others."""
    silo = Silo(tmp_path / "ledger.jsonl", 50.0)
    one, two, three, _ = SETS
    for contract, units, attempts in ((CONTRACTS[0], one, 2), (CONTRACTS[1], three, 3), (CONTRACTS[2], two, 4)):
        for _ in range(attempts):
            silo.attempt(contract, JOINT, units, "sent")
    yield silo
    silo.ledger.close()


def account_of(silo, contract, read=SETS.get, limit=50.0):
    limits = Limits(epsilon=limit, delta=DELTA)
    return Account(silo.ledger, limits, plan=mechanism(30, 2), contract=contract, steps_per_attempt=1, units=read)


def test_all_runs_count(tried):
    facts = budgeting.runs(account_of(tried, CONTRACTS[0]), tried.ledger)
    assert [(each["contract"], each["attempts"], each["part"]) for each in facts["runs"]] == [
        (CONTRACTS[0], 2, 1), (CONTRACTS[1], 3, 1), (CONTRACTS[2], 4, 2),
    ]  # fmt: skip
    alone = [accounting.certify([mechanism(steps, 2)], DELTA).epsilon for steps in (2, 3, 4)]
    assert [each["epsilon"] for each in facts["runs"]] == alone
    assert facts["parts"][0]["epsilon"] > max(alone[:2])
    assert facts["parts"][1] == {"runs": 1, "epsilon": alone[2]}
    assert facts["earlier_runs"] == 1
    assert budgeting.runs(account_of(tried, CONTRACTS[2]), tried.ledger)["earlier_runs"] == 0
    assert budgeting.runs(account_of(tried, CONTRACTS[2], read=lambda digest: None), tried.ledger)["earlier_runs"] == 2
    assert budgeting.runs(account_of(tried, "dd" * 32), tried.ledger)["earlier_runs"] == 3, "unknown units are the same units"


def test_whoever_is_asked_to_join_is_told_of_earlier_runs(tried, tmp_path):
    (said,) = budgeting.in_words(account_of(tried, CONTRACTS[0]))
    assert "1 earlier run on the same units" in said
    assert "The others are not told" in said or "Others are not told" in said
    assert budgeting.in_words(account_of(tried, CONTRACTS[2])) == []


# --- Forecast -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(tmp_path):
    """(a silo after two of 30 rounds, the limit that seven more meet exactly)."""
    silo = Silo(tmp_path / "limited.jsonl", 50.0)
    for _ in range(2):
        silo.attempt(CONTRACTS[0], JOINT, next(iter(SETS)), "sent")
    yield silo, accounting.certify([mechanism(9, 2)], DELTA).epsilon
    silo.ledger.close()


def test_refused_is_refused(limited):
    """The first number that the forecast refuses is the first that the gate refuses; by the limit, and by the plan."""
    silo, limit = limited
    facts = budgeting.forecast(account_of(silo, CONTRACTS[0], limit=limit), 40, limit)
    assert [row["rounds"] for row in facts["forecast"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["refused"] for row in facts["forecast"]] == [None, *4 * ["limit"], *3 * ["plan"]]
    assert facts["refused_from"] == 8
    figures = [row["epsilon"] for row in facts["forecast"]]
    assert figures == sorted(figures)
    silo.limits = Limits(epsilon=limit, delta=DELTA)
    gate, admitted = silo.gate(CONTRACTS[0], JOINT, next(iter(SETS))), 0
    with contextlib.suppress(BudgetExhausted):
        while True:
            gate.admit(1000 + admitted, admitted.to_bytes(16, "big"))
            admitted += 1
    assert admitted == 7


def test_a_forecast_ends_with_the_plan(tried):
    account = account_of(tried, CONTRACTS[1])
    assert budgeting.forecast(account, 30, 50.0)["refused_from"] == 28, "27 of 30 rounds were left"
    assert budgeting.forecast(account, 27, 50.0)["refused_from"] is None
    assert budgeting.forecast(account, 0, 50.0) == {"forecast": [], "refused_from": None}


def shown(facts, capsys):
    Output(json=False).result(facts, words(facts))
    return capsys.readouterr().out


def stated(silo, contract, limit, rounds):
    account = account_of(silo, contract, limit=limit)
    spent = account.spent()
    facts = {
        "epsilon": spent.epsilon, "epsilon_pld": spent.epsilon_pld, "epsilon_rdp": spent.epsilon_rdp, "delta": DELTA,
        "limit": limit, "steps": 2, "rounds_left": account.attempts_left, "several": [],
        **budgeting.runs(account, silo.ledger),
        **budgeting.forecast(account, rounds, limit),
    }  # fmt: skip
    return json.loads(json.dumps(facts, allow_nan=False))


def test_the_forecast_is_a_table_with_bars_and_says_what_is_refused(limited, capsys):
    silo, limit = limited
    said = shown(stated(silo, CONTRACTS[0], limit, 40), capsys)
    assert said.count("refused: above the limit") == 4
    assert said.count("refused: the plan is used up") == 3
    assert "28 rounds of the plan are left; 8 more would be refused" in said
    rows = said[said.index("forecast") :].splitlines()[2:10]
    assert [row.count("█") == 24 for row in rows] == [False, *7 * [True]], "a full bar from the limit on"
    assert "epsilon alone" not in said, "one run"


def test_every_run_is_listed_with_what_it_composes_with(tried, capsys):
    said = shown(stated(tried, CONTRACTS[0], 50.0, 0), capsys)
    assert "epsilon alone" in said
    assert "part 1 is 2 runs together, by the filter: epsilon" in said
    assert "part 2 is 1 run: epsilon" in said
    assert "1 other run on this contract's units" in said
    assert "forecast" not in said


# --- Limits -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(epsilon=st.floats(0.05, 40.0), delta=st.sampled_from([1e-9, 1e-7, 1e-5, 1e-3, 0.5]))
def test_limits_only_ever_say_no(epsilon, delta):
    """Whatever stands in silo.toml: a contract may spend no more than it says itself, at its delta or a smaller one."""
    accepted = federation.parse(contract_bytes())
    stated = accepted.terms.privacy
    own = config.Limits(epsilon=epsilon, delta=delta)
    try:
        cost = membership.check_limits(accepted, own)
    except BudgetExhausted:
        planned = accounting.certify([federation.mechanism(accepted.terms)], stated.delta).epsilon
        assert planned > epsilon or stated.delta > delta, "refused for the silo's own limit"
        return
    assert cost <= min(epsilon, stated.epsilon)
    assert stated.delta <= delta
    held = reading.limits(_settings(own), accepted)
    assert held.delta <= min(delta, stated.delta)
    assert held.epsilon == epsilon
    assert not held.without_privacy


def _settings(limits):
    return config.Config(
        name="silo-1", organisation="Hospital 1", aggregator=config.Aggregator(url="http://127.0.0.1:1", fingerprint=""),
        records=config.Records(path="records.jsonl"), limits=limits,
    )  # fmt: skip


def test_a_lasting_id_is_this_silos_word_and_off_by_default(tmp_path):
    home = Home.create(tmp_path / "silo")
    config.write_commented(
        home.config_path, name="silo-1", organisation="Hospital 1", url="http://127.0.0.1:1", fingerprint="", records="r.jsonl",
        epsilon=10.0, delta=1e-5,
    )  # fmt: skip
    assert not config.load(home.config_path).records.lasting_ids
    text = home.config_path.read_text()
    assert text.count("# lasting_ids = true") == 1
    home.config_path.write_text(text.replace("# lasting_ids = true", "lasting_ids = true"))
    assert config.load(home.config_path).records.lasting_ids
    found = CliRunner().invoke(silo_cli.app, ["budget", "--home", str(home.root), "--json"])
    assert found.exit_code != 0, "no ledger yet"


def test_no_reservation_is_forgotten_between_modes(tmp_path):
    """One ledger holds a joint run and a local one: their epsilon together is at least that of either, and of both by PLD."""
    silo = Silo(tmp_path / "ledger.jsonl", 50.0)
    for _ in range(5):
        silo.attempt(CONTRACTS[0], JOINT, None, "result")
        silo.attempt(CONTRACTS[1], LOCAL, None, "void")
    both = [mechanism(5, 2), mechanism(15, 1)]
    assert account_of(silo, CONTRACTS[0]).spent().epsilon >= accounting.certify(both, DELTA).epsilon
    assert sum(isinstance(body, Reserve) for body in silo.ledger.entries) == 10
    silo.ledger.close()
