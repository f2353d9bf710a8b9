# SPDX-License-Identifier: Apache-2.0
"""A silo in two federations: two homes on the same records, whose ledgers compose in both."""

from __future__ import annotations

import functools

import pytest

from privacy.dp import accounting
from privacy.dp.budget import Account, Gate, Limits
from privacy.dp.ledger import History, Ledger
from privacy.dp.together import Together
from privacy.errors import BudgetExhausted, ConfigError, LedgerBroken, MachineError
from privacy.identity import keys
from silo import commands, config, other_homes, reading
from silo.home import Home
from tests.test_composition import DELTA, mechanism
from tests.whole import Whole

A, B = "aa" * 32, "bb" * 32
LIMITS = Limits(epsilon=50.0, delta=DELTA)


@pytest.fixture
def homes(tmp_path):
    """Two homes of one silo, each naming the other, as `silo init` makes them."""
    for name in ("north", "north-trial"):
        (tmp_path / "records.jsonl").write_text("")
        commands.create(
            tmp_path / name, name=name, organisation="North Hospital", url="http://127.0.0.1:1", fingerprint="",
            records=tmp_path / "records.jsonl", epsilon=10.0, delta=DELTA, model="",
        )  # fmt: skip
    made = Home(tmp_path / "north"), Home(tmp_path / "north-trial")
    for home, other in (made, made[::-1]):
        names(home, f"../{other.root.name}")
    return made


def names(home, *others):
    text = home.config_path.read_text()
    line = next(line for line in text.splitlines() if line.lstrip("# ").startswith("other_homes"))
    listed = ", ".join(f'"{each}"' for each in others)
    home.config_path.write_text(text.replace(line, f"other_homes = [{listed}]" if others else "# other_homes = []"))


def opened(home):
    identity = keys.load(home.identity_path)
    verify = functools.partial(keys.verify_signature, identity.public.sign_key)
    return Ledger.open(home.ledger_path, sign=identity.sign, verify=verify, clock=lambda: 0.0)


def spend(home, contract, rounds):
    with opened(home) as ledger:
        for number in range(1, rounds + 1):
            ledger.reserve(contract=contract, round_number=number, attempt=f"{number:032x}", mechanism=mechanism(1, 2))


def histories(home):
    return other_homes.histories(home, config.load(home.config_path))


# --- Formal guarantees ------------------------------------------------------------------------------------------------------------


def test_nothing_left_out(homes):
    here, there = homes
    spend(here, A, 3)
    spend(there, A, 2)
    spend(there, B, 4)
    with opened(here) as own:
        both = Together(own, histories(here))
        assert sum(event.steps for event in both.charged()) == 9
        assert sum(event.steps for event in both.charged(A)) == 5
        assert len(both.entries) == own.counter + histories(here)[0].counter
        assert (both.counter, both.head) == (own.counter, own.head)
        assert both.attempts(A, 3) == own.attempts(A, 3) != []
        assert both.attempts(B, 1) == []
        both.check_receipt(own.counter, own.head)
        with pytest.raises(LedgerBroken):
            both.check_receipt(own.counter + 1, own.head)


def test_own_place(homes):
    """Reservations go onto the own ledger; a plan that the other declared is no plan here, and its attempts use none up here."""
    here, there = homes
    with opened(there) as other:
        other.declare(contract=A, run="there", mechanism=mechanism(30, 2), epsilon=50.0, delta=DELTA)
    spend(there, A, 20)
    before = there.ledger_path.read_bytes()
    with opened(here) as own:
        gate = Gate(own, LIMITS, plan=mechanism(30, 2), contract=A, steps_per_attempt=1, beside=histories(here))
        gate.declare(run="here")
        assert gate.attempts_left == 30
        gate.admit(1, b"a" * 16)
        order = LIMITS.filter_order
        assert gate.spent().epsilon == accounting.certify_adaptive([mechanism(21, 2)], DELTA, order=order).epsilon
        assert gate.forecast([29])[0][1] == accounting.certify_adaptive([mechanism(50, 2)], DELTA, order=order).epsilon
    assert there.ledger_path.read_bytes() == before


def test_counted_in_full(homes):
    """At the gate: what fits alone does not fit beside what the other home spent."""
    here, there = homes
    tight = Limits(epsilon=accounting.certify([mechanism(30, 2)], DELTA).epsilon, delta=DELTA)
    spend(there, B, 1)
    with opened(here) as own:
        before = own.counter
        with pytest.raises(BudgetExhausted):
            Gate(own, tight, plan=mechanism(30, 2), contract=A, steps_per_attempt=1, beside=histories(here)).declare()
        assert own.counter == before
        Gate(own, tight, plan=mechanism(30, 2), contract=A, steps_per_attempt=1).declare()


def test_one_contract_in_two_homes_is_two_runs(homes):
    """The second may have been begun for what the first showed, so the filter composes them, before it is begun too."""
    here, there = homes
    spend(there, A, 3)
    limits = Limits(epsilon=9.0, delta=DELTA)
    with opened(here) as own:
        gate = Gate(own, limits, plan=mechanism(30, 2), contract=A, steps_per_attempt=1, beside=histories(here))
        both = accounting.certify_adaptive([mechanism(33, 2)], DELTA, order=limits.filter_order).epsilon
        assert gate.declare().epsilon == both > accounting.certify([mechanism(33, 2)], DELTA).epsilon
        gate.admit(1, b"a" * 16)
        assert gate.spent().epsilon == accounting.certify_adaptive([mechanism(4, 2)], DELTA, order=limits.filter_order).epsilon


def test_unit_files_of_another_home_show_nothing(homes):
    """Its keys are its own: whatever its ledger names is unknown here, and composes."""
    here, there = homes
    with opened(there) as other:
        other.reserve(contract=B, round_number=1, attempt="ab" * 16, mechanism=mechanism(1, 2), units="cd" * 32)
    spend(here, A, 2)
    with opened(here) as own:
        account = Account(own, LIMITS, plan=mechanism(30, 2), contract=A, steps_per_attempt=1, beside=histories(here))
        assert [part.contracts for part in account.parts()] == [(A, B)]
        assert account.same_units() == (B,)


def test_both_ways(homes):
    here, there = homes
    assert len(histories(here)) == len(histories(there)) == 1
    names(there)
    with pytest.raises(ConfigError, match="would not count there") as refused:
        histories(here)
    assert refused.value.code == "other-home"
    assert histories(there) == ()
    names(here, ".")
    with pytest.raises(ConfigError, match="which is this home"):
        histories(here)
    names(here, "../nowhere")
    with pytest.raises(ConfigError), other_homes.held(here, config.load(here.config_path)):
        pass
    assert not (here.root.parent / "nowhere").exists()


def test_one_at_a_time(homes):
    here, there = homes
    with other_homes.held(here, config.load(here.config_path)) as found:
        assert len(found) == 1
        with pytest.raises(MachineError) as busy:
            opened(there)
        assert busy.value.code == "busy"
    with opened(there), pytest.raises(MachineError), other_homes.held(here, config.load(here.config_path)):
        pass


def test_another_homes_ledger_is_verified(homes):
    here, there = homes
    spend(there, B, 2)
    data = there.ledger_path.read_bytes()
    there.ledger_path.write_bytes(data.replace(b'"steps":1', b'"steps":0', 1))
    with pytest.raises(LedgerBroken):
        histories(here)
    there.ledger_path.unlink()
    with pytest.raises(LedgerBroken, match="missing"):
        histories(here)


# --- In a silo --------------------------------------------------------------------------------------------------------------------


def test_status_budget_and_gate_of_a_joined_silo_count_the_other_home(tmp_path):
    whole = Whole.create(tmp_path / "federation")
    here, there = Home(whole.root / "silo-1"), Home(tmp_path / "elsewhere")
    for home, other in ((here, there), (there, here)):
        (home.root.parent / "records.jsonl").write_text("")
        commands.create(
            home.root, name="silo-1", organisation="Hospital 1", url="http://127.0.0.1:1", fingerprint="",
            records=home.root.parent / "records.jsonl", epsilon=50.0, delta=DELTA, model="",
        )  # fmt: skip
        names(home, other.root)
    assert reading.budget(here.root, 0)["epsilon"] == 0
    spend(there, B, 3)
    facts = reading.budget(here.root, 2)
    assert facts["epsilon"] == reading.status(here.root)["epsilon"] == accounting.certify([mechanism(3, 2)], DELTA).epsilon
    assert [(each["contract"], each["attempts"]) for each in facts["runs"]] == [(B, 3)]
    assert facts["earlier_runs"] == 1
    assert History.read(here.ledger_path, verify=lambda data, signature: None).counter == 1
    with commands._gate(here, whole.accepted, config.load(here.config_path), 0, whole.line()) as gate:
        assert gate.spent().epsilon == facts["epsilon"]
        with pytest.raises(MachineError):
            opened(there)
