# SPDX-License-Identifier: Apache-2.0
"""Runs that share no unit: what shows it, what it is worth, and that no figure is ever below what a unit has spent."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import base_model
from privacy.dp import accounting, overlap
from privacy.dp.budget import Account, Gate, Limits
from privacy.dp.entries import Plan, Reserve
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian, Unprotected
from privacy.dp.overlap import UnitSet
from privacy.errors import BudgetExhausted, RecordsError
from silo import commands, config, keyring, reading, succession, unit_sets
from silo.home import Home
from tests import sessions, tiny_models
from tests.test_budget import PARTS, verify
from tests.whole import Whole

A, B, C = "aa" * 32, "bb" * 32, "cc" * 32
LIMITS = Limits(epsilon=3.0, delta=1e-5)


def plan(steps=30):
    return LatticeGaussian(
        sampling_rate=0.2, lattice_bits=16, share_variance=math.ceil(2.64**2 * 4**16), shares=1, dimension=1000, steps=steps
    )


def marked(units, scope="key column"):
    return UnitSet(scope=scope, marks=frozenset(hashlib.sha256(bytes([unit])).digest() for unit in units))


@st.composite
def families(draw):
    """Runs by name: the units that each could draw, and what is shown of them (nothing, them, or them and more)."""
    drawn, shown = {}, {}
    for number in range(draw(st.integers(0, 7))):
        units = draw(st.frozensets(st.integers(0, 11), min_size=1, max_size=4))
        scope = draw(st.sampled_from(["one", "one", "one", "other"]))
        more = draw(st.frozensets(st.integers(0, 11), max_size=1))
        drawn[f"run {number}"] = units
        shown[f"run {number}"] = draw(st.sampled_from([None, *3 * [marked(units | more, scope)]]))
    return drawn, shown


# --- Formal guarantees of privacy.dp.overlap --------------------------------------------------------------------------------------


@given(families())
def test_parts_partition(family):
    _, shown = family
    parts = overlap.parts(shown)
    assert sorted(itertools.chain(*parts)) == sorted(shown)
    assert all(parts)


@given(families())
def test_apart_only_when_shown(family):
    _, shown = family
    for one, other in itertools.combinations(overlap.parts(shown), 2):
        for left, right in itertools.product(one, other):
            assert shown[left] is not None
            assert shown[right] is not None
            assert shown[left].scope == shown[right].scope
            assert not shown[left].marks & shown[right].marks


@given(families(), st.lists(st.integers(1, 50), min_size=7, max_size=7))
def test_never_understated(family, costs):
    """Whatever the sets are: the most spent part costs at least what the runs that could draw a unit cost, for every unit."""
    drawn, shown = family
    cost = dict(zip(drawn, costs, strict=False))
    most = max((sum(cost[run] for run in part) for part in overlap.parts(shown)), default=0)
    for unit in range(12):
        assert most >= sum(cost[run] for run, units in drawn.items() if unit in units)


@given(families(), st.data())
def test_more_is_never_less(family, data):
    _, shown = family
    if not shown:
        return
    run = data.draw(st.sampled_from(sorted(shown)))
    known = shown[run]
    more = None if known is None or data.draw(st.booleans()) else overlap.union([known, marked({3}, known.scope)])
    before, after = overlap.parts(shown), overlap.parts({**shown, run: more})
    assert all(any(set(part) <= set(joined) for joined in after) for part in before)


def test_edge_cases_of_parts():
    assert overlap.parts({}) == ()
    assert overlap.parts({A: None, B: None}) == ((A, B),)
    assert overlap.parts({A: marked({1}), B: None, C: marked({2})}) == ((A, B, C),)
    assert overlap.parts({A: marked({1}), B: marked(set()), C: marked({2})}) == ((A, B, C),)
    assert overlap.parts({A: marked({1}), B: marked({2}), C: marked({1, 3})}) == ((A, C), (B,))
    assert overlap.parts({A: marked({1}), B: marked({2}), C: marked({1, 2})}) == ((A, B, C),), "through a third one"
    assert overlap.parts({A: marked({1}), B: marked({2}, "another key")}) == ((A, B),)


def test_edge_cases_of_union():
    assert overlap.union([]) is None
    assert overlap.union([marked({1}), None]) is None
    assert overlap.union([marked({1}), marked(set())]) is None
    assert overlap.union([marked({1}), marked({2}, "another key")]) is None
    assert overlap.union([marked({1}), marked({2})]) == marked({1, 2})


# --- On a ledger ------------------------------------------------------------------------------------------------------------------


SETS = {"11" * 32: marked({1, 2}), "22" * 32: marked({3}), "33" * 32: marked({2, 4}), "44" * 32: marked({5, 1})}
ONE, TWO, THREE, FOUR = SETS


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", who="silo-1", **PARTS) as made:
        yield made


def gate(ledger, contract, units=None, *, limits=LIMITS, the_plan=None, read=SETS.get):
    made = Gate(ledger, limits, plan=the_plan or plan(), contract=contract, steps_per_attempt=1, units=read)
    if units is not None:
        made.draws_from(units)
    return made


def run(ledger, contract, units, rounds=30, **options):
    made = gate(ledger, contract, units, **options)
    made.declare()
    for number in range(1, rounds + 1):
        made.admit(number, number.to_bytes(16, "big"))
    return made


def test_runs_over_other_units_do_not_compose_and_a_third_over_both_does(ledger):
    alone = accounting.certify([plan()], 1e-5).epsilon
    run(ledger, A, ONE)
    second = run(ledger, B, TWO)
    assert second.spent().epsilon == alone
    assert [part.contracts for part in second.parts()] == [(A,), (B,)]
    third = gate(ledger, C, THREE)  # shares a unit with the first run, none with the second
    both = accounting.certify_adaptive([plan(60)], 1e-5, order=LIMITS.filter_order).epsilon
    assert third.forecast([30]) == [(30, both)]
    assert gate(ledger, C, TWO, read=overlap.nothing_shown).forecast([1])[0][1] > third.forecast([1])[0][1] > alone


def test_the_gate_admits_by_it_and_refuses_what_it_cannot_see(ledger, tmp_path):
    tight = Limits(epsilon=accounting.certify([plan()], 1e-5).epsilon, delta=1e-5)
    run(ledger, A, ONE, limits=tight)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    for refused in (
        gate(ledger, B, None, limits=tight), gate(ledger, B, THREE, limits=tight), gate(ledger, B, "ee" * 32, limits=tight),
        gate(ledger, B, TWO, limits=tight, read=overlap.nothing_shown),
    ):  # fmt: skip
        with pytest.raises(BudgetExhausted):
            refused.declare()
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    run(ledger, B, TWO, limits=tight)


def test_a_unit_that_comes_between_two_rounds_makes_the_run_compose_at_the_next_one(ledger):
    """The second run began beside the first; a unit of the first is added to its file. Nothing more is admitted above the limit."""
    tight = Limits(epsilon=accounting.certify([plan()], 1e-5).epsilon * 1.01, delta=1e-5)
    run(ledger, A, ONE, limits=tight)
    second = run(ledger, B, TWO, rounds=10, limits=tight)
    assert len(second.parts()) == 2
    second.draws_from(FOUR)
    with pytest.raises(BudgetExhausted):
        second.admit(11, b"k" * 16)
    assert len(second.parts()) == 2, "nothing was drawn"
    second.draws_from(TWO)
    second.admit(11, b"k" * 16)
    loose = gate(ledger, B, FOUR, limits=Limits(epsilon=50.0, delta=1e-5))
    loose.admit(12, b"l" * 16)
    assert [part.contracts for part in loose.parts()] == [(A, B)], "the run's units are all that it ever could draw"
    assert loose.spent().epsilon > accounting.certify([plan()], 1e-5).epsilon


def test_one_reservation_that_says_nothing_makes_all_compose(ledger):
    run(ledger, A, ONE)
    second = run(ledger, B, TWO, rounds=3)
    ledger.reserve(contract=B, round_number=4, attempt="ab" * 16, mechanism=plan(1))  # as a restore charges it
    assert [part.contracts for part in second.parts()] == [(A, B)]


def test_without_differential_privacy_no_credit_is_taken(ledger):
    """The figure is the largest one: infinite, whoever the others are. Parts say which runs had noise."""
    free = Limits(epsilon=3.0, delta=1e-5, without_privacy=True)
    run(ledger, A, ONE, rounds=2, limits=free, the_plan=Unprotected(sampling_rate=0.2, lattice_bits=16, dimension=1000, steps=30))
    with pytest.raises(BudgetExhausted) as refused:
        gate(ledger, B, TWO).declare()
    assert refused.value.code == "no-differential-privacy"
    assert math.isinf(gate(ledger, B, TWO).spent().epsilon)


def test_a_plan_says_for_which_units_it_was_admitted(ledger):
    gate(ledger, A, ONE).declare()
    assert ledger.plan(A).units == ONE
    account = Account(ledger, LIMITS, plan=plan(), contract=A, steps_per_attempt=1, units=SETS.get)
    run(ledger, B, TWO)
    assert account.forecast([30]) == [(30, accounting.certify([plan()], 1e-5).epsilon)], "before its first round too"


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.sampled_from([None, *SETS]), st.integers(1, 9)), max_size=6))
def test_no_unit_has_spent_more_by_either_accountant(tmp_path_factory, history):
    """Random ledgers: for every unit, the reservations that could draw it, certified together, are at most what is shown."""
    path = tmp_path_factory.mktemp("random") / "ledger.jsonl"
    with Ledger.create(path, who="silo-1", **PARTS) as ledger:
        for number, (contract, units, steps) in enumerate(history):
            attempt = number.to_bytes(16, "big").hex()
            ledger.reserve(contract=contract, round_number=number, attempt=attempt, mechanism=plan(steps), units=units)
    read = History.read(path, verify=verify)
    spent = Account(read, LIMITS, plan=plan(), contract=A, steps_per_attempt=1, units=SETS.get).spent().epsilon
    for mark in {mark for known in SETS.values() for mark in known.marks}:
        steps = sum(steps for _, units, steps in history if units is None or mark in SETS[units].marks)
        assert not steps or accounting.certify([plan(steps)], 1e-5).epsilon <= spent + 1e-12


# --- The files --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "silo")


def kept(home, *ids, unit="patient_id", lasting=True):
    return unit_sets.keep(home, ids, unit=unit, lasting=lasting)


def test_before_the_charge(home):
    digest = kept(home, "anna", "ben")
    data = (home.units_folder / digest).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert kept(home, "ben", "anna", "ben") == digest, "a set, in one order"
    (home.units_folder / digest).write_bytes(data[:-9])
    assert kept(home, "anna", "ben") == digest
    assert (home.units_folder / digest).read_bytes() == data, "a damaged one is made again"


def test_the_file_is_as_the_page_says(home):
    """docs/spec/ledger.md, "Which runs share a unit", made here by hand."""

    def keyed(key, text):
        return hmac.digest(key, text, "sha256")

    secret = (home.root / "selection.key").read_bytes()
    key = keyed(secret, b"siloquy unit ids")
    check = keyed(key, b"siloquy unit ids key").hex()[:32]
    marks = sorted(keyed(key, b"id\0" + each).hex() for each in (b"anna", "bärbel".encode()))
    page = f'{{"format":"siloquy-units/1","unit":"patient_id","key":"{check}","lasting":true}}\n{marks[0]}\n{marks[1]}\n'.encode()
    digest = kept(home, "bärbel", "anna")
    assert digest == hashlib.sha256(page).hexdigest()
    assert (home.units_folder / digest).read_bytes() == page


def edited(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-65]),
        lambda path: path.write_bytes(path.read_bytes() + b"0" * 64 + b"\n"),
        lambda path: edited(path, b"patient_id", b"patient_no"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_only_what_it_says(home, damage):
    digest = kept(home, "anna", "ben")
    assert len(unit_sets.read(home, digest).marks) == 2
    damage(home.units_folder / digest)
    assert unit_sets.read(home, digest) is None
    assert unit_sets.reader(home)(digest) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"siloquy-units/1", b"siloquy-units/2"), (b'"lasting":true', b'"lasting":false'),
        (b'"lasting":true', b'"lasting":true,"x":1'),
        (b"{", b"["), (b"\n", b"\n\n"), (b"\n", b"\nXY"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_shows_nothing_under_its_own_digest(home, old, new):
    data = (home.units_folder / kept(home, "anna")).read_bytes().replace(old, new, 1)
    digest = hashlib.sha256(data).hexdigest()
    (home.units_folder / digest).write_bytes(data)
    assert unit_sets.read(home, digest) is None


def test_a_name_that_is_no_digest_opens_no_file(home):
    kept(home, "anna")
    for name in ("../selection.key", "", "a", "AB" * 32, "٠" * 64):
        assert unit_sets.read(home, name) is None


def test_without_the_word_nothing_is_shown_and_a_later_word_changes_no_earlier_file(home):
    before = kept(home, "anna", lasting=False)
    assert unit_sets.read(home, before) is None
    after = kept(home, "anna", lasting=True)
    assert after != before
    assert unit_sets.read(home, before) is None


def test_where_the_unit_is_a_record_there_is_no_file(home):
    assert kept(home, "1", "2", unit="record") is None
    assert not home.units_folder.exists()


@given(st.frozensets(st.text(max_size=5), min_size=1), st.frozensets(st.text(max_size=5), min_size=1))
@settings(max_examples=40, deadline=None)
def test_all_that_may_be_drawn(tmp_path_factory, one, other):
    home = Home.create(tmp_path_factory.mktemp("silo"))
    sets = [unit_sets.read(home, kept(home, *ids)) for ids in (one, other)]
    assert [len(each.marks) for each in sets] == [len(one), len(other)]
    assert len(sets[0].marks & sets[1].marks) == len(one & other)
    assert overlap.share_a_unit(*sets) == bool(one & other)


def test_a_unit_that_the_file_does_not_name_is_not_drawn():
    unit_sets.require_named(["anna"], ["anna", "ben"])
    unit_sets.require_named([], [])
    with pytest.raises(RecordsError) as refused:
        unit_sets.require_named(["anna", "SECRET"], ["anna", "ben"])
    assert refused.value.code == "records-changed"
    assert "SECRET" not in refused.value.message + refused.value.hint + repr(refused.value.facts)


def test_another_key_or_column_compares_with_nothing(home, tmp_path):
    other = Home.create(tmp_path / "other")
    there = unit_sets.read(other, kept(other, "ben"))
    column = unit_sets.read(home, kept(home, "ben", unit="case"))
    here = unit_sets.read(home, kept(home, "anna"))
    assert overlap.share_a_unit(here, there)
    assert overlap.share_a_unit(here, column)
    assert not overlap.share_a_unit(here, unit_sets.read(home, kept(home, "ben")))


def test_nothing_leaves(home, tmp_path, ledger):
    """Private files; as many lines in the ledger as without; no hash, count or id where something could be logged."""
    digest = kept(home, "anna-SECRET", "ben-SECRET")
    path = home.units_folder / digest
    assert path.stat().st_mode & 0o777 == 0o600
    assert home.units_folder.stat().st_mode & 0o777 == 0o700
    data = path.read_bytes()
    assert b"SECRET" not in data
    assert home.selection_key.hex().encode() not in data
    plain = {hashlib.sha256(each).hexdigest().encode() for each in (b"anna-SECRET", b"ben-SECRET")}
    assert not plain & set(data.split(b"\n")), "keyed hashes: nobody tries ids without the key"
    assert repr(unit_sets.read(home, digest)) == "UnitSet(…)"
    run(ledger, A, digest, rounds=3, read=unit_sets.reader(home))
    with Ledger.create(tmp_path / "without.jsonl", who="silo-1", **PARTS) as without:
        run(without, A, None, rounds=3)
        assert without.counter == ledger.counter, "the counter that uploads state is the same"
    line = json.loads((tmp_path / "ledger.jsonl").read_bytes().splitlines()[-1])
    assert line["body"]["units"] == digest


def test_entries_without_units_are_the_bytes_they_always_were(ledger, tmp_path):
    run(ledger, A, None, rounds=1)
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    assert list(json.loads(lines[1])["body"]) == ["contract", "run", "mechanism", "epsilon", "delta"]
    assert list(json.loads(lines[2])["body"]) == ["contract", "round", "attempt", "mechanism"]
    assert isinstance(ledger.entries[1], Plan)
    assert isinstance(ledger.entries[2], Reserve)
    assert ledger.entries[2].units is None


# --- In a silo --------------------------------------------------------------------------------------------------------------------


def write_records(path, people):
    rows = ({"text": sessions.WORDS[each % 7], "label": "yes", "patient_id": f"p{each}"} for each in people)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def real(tmp_path):
    """(a federation over patients, the home of its first silo, its settings); with a model that is there."""
    model = sessions.tiny_model(tmp_path / "model")
    whole = Whole.create(
        tmp_path / "federation", task={"max_length": 16},
        model={"name": str(model), "digest": base_model.digest(model), "hidden_size": 16},
        adapter={"rank": 3, "modules": tiny_models.MODULES["bert"]}, privacy={"units": 40, "unit": "patient_id", "epsilon": 40.0},
    )  # fmt: skip
    home = Home(whole.root / "silo-1")
    config.write_commented(
        home.config_path, name="silo-1", organisation="Hospital 1", url="http://127.0.0.1:1", fingerprint="", model=str(model),
        records=str(home.root / "records.jsonl"), epsilon=50.0, delta=1e-5,
        compute=config.Compute(device="cpu", precision="float32"),
    )  # fmt: skip
    home.config_path.write_text(home.config_path.read_text().replace("# lasting_ids", "lasting_ids"))
    return whole, home, config.load(home.config_path)


def test_plan_and_reservations_name_the_units_of_the_records(real):
    """`silo join`, `silo train`, a unit more in the file, `silo train` again; then `silo budget` reads what was named."""
    whole, home, own = real
    write_records(home.root / "records.jsonl", range(12))
    visit = commands.Visit(
        home=home, transport=whole.line(), identity=keyring.under(home, whole.accepted), settings=own, words=[], plan_epsilon=1.0,
        fetched=succession.fetch(whole.line(), whole.accepted.digest.hex(), home=home),
    )  # fmt: skip
    visit._check_local(whole.accepted)
    for number, people in enumerate((range(12), range(13)), start=1):
        write_records(home.root / "records.jsonl", people)
        with commands._at_work(home, own, whole.line()) as work:
            work.gate.admit(number, bytes([number]) * 16)
    ledger = whole.history(1)
    planned = ledger.plan(whole.accepted.digest.hex()).units
    first, second = (body.units for body in ledger.entries if isinstance(body, Reserve))
    assert planned == first != second
    named = [unit_sets.read(home, each).marks for each in (first, second)]
    assert [len(each) for each in named] == [12, 13]
    assert named[0] < named[1]
    facts = reading.budget(home.root, 2)
    assert facts["earlier_runs"] == 0
    assert len(facts["parts"]) == 1
    assert [row["rounds"] for row in facts["forecast"]] == [1, 2]


def test_what_leaves_with_a_model_takes_no_credit(real):
    """The epsilon on an exported card is that of the whole ledger composed: who shares units with whom is this silo's own."""
    whole, home, own = real
    digests = [unit_sets.keep(home, [name], unit="patient_id", lasting=True) for name in ("anna", "ben")]
    identity = keyring.identities(home)[0]
    with Ledger.open(home.ledger_path, sign=identity.sign, verify=keyring.verifier(home), clock=lambda: 0.0) as ledger:
        for contract, digest in zip((A, B), digests, strict=True):
            ledger.reserve(contract=contract, round_number=1, attempt="ab" * 16, mechanism=plan(9), units=digest)
    shown = [reading._account(home, whole.accepted, own, apart=apart)[0].spent().epsilon for apart in (True, False)]
    assert shown[0] == reading.status(home.root)["epsilon"] == accounting.certify([plan(9)], 1e-5).epsilon
    assert shown[1] > accounting.certify([plan(18)], 1e-5).epsilon > shown[0]
    assert inspect.getsource(reading.export).count("apart=False") == 1
