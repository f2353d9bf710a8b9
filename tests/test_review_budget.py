# SPDX-License-Identifier: Apache-2.0
"""The budget under attack: lost ledgers, homes that know of each other in part, chains that stretch a plan.

And worst cases, enumerated anew."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from privacy import chain, federation
from privacy.dp import accounting, groups
from privacy.dp.budget import Gate, Limits
from privacy.dp.entries import Plan
from privacy.dp.ledger import History, Ledger
from privacy.dp.mechanism import LatticeGaussian, LatticeMixture
from privacy.errors import ConfigError, LedgerBroken, PrivacyRefusal, TrustError
from silo import commands, config, other_homes, recharging
from silo.home import Home
from silo.recharging import Opened, Sent
from tests.terms import contract_bytes
from tests.test_basis_round import PARTS, SKETCHED, accepted_of
from tests.test_other_homes import A, histories, homes, mechanism, names, opened, spend  # noqa: F401  (homes is a fixture)
from tests.whole import Whole

LIMITS = Limits(epsilon=3.0, delta=1e-5)


# --- A lost ledger ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", who="silo-1", **PARTS) as made:
        yield made


def opened_round(number, contract, *, counter=None, ended=None):
    sent = None if counter is None else Sent(attempt=f"{number:032x}", counter=counter)
    return Opened(number=number, contract=contract, sent=sent, ended=ended)


def charge(ledger, rounds):
    recharging.charge(ledger, rounds, contracts={each.key for each in rounds})


def test_a_lost_basis_attempt_is_not_charged_as_a_training_step(ledger):
    """It fell before it sent in the basis round, which ended without it; the backup is older. Its next upload says so."""
    accepted = accepted_of()
    at = accepted.at(b"")
    first, training = (event.with_steps(1) for event in (federation.event(at.terms), federation.event(accepted.terms)))
    # In truth: open, reserve (basis), void, reserve (training).
    charge(ledger, [opened_round(1, at, ended="without"), opened_round(2, accepted, counter=4, ended="result")])
    assert ledger.counter == 4
    lost = msgspec.structs.replace(training, sampling_rate=1.0, dimension=first.dimension)
    assert ledger.charged() == [lost.with_steps(2), training]
    for kind in (first, training):
        for steps, delta in ((1, 1e-5), (20, 1e-9)):
            paid, truth = (accounting.certify([event.with_steps(steps)], delta).epsilon for event in (lost, kind))
            assert paid > truth


def test_a_lost_attempt_under_a_noisier_version_is_charged_by_the_one_that_had_less(ledger):
    little = federation.parse(contract_bytes(privacy={"noise_multiplier": 1.0, "epsilon": 40.0}))
    much = federation.parse(contract_bytes(version=2, privacy={"noise_multiplier": 4.0}))
    lost, known = (federation.event(each.terms, rounds=1) for each in (little, much))
    charge(ledger, [opened_round(1, little, ended="void"), opened_round(2, much, counter=3)])
    assert ledger.charged() == [lost, known]


def test_a_run_alone_says_nothing_of_the_federations_rounds(ledger):
    """Ten rounds alone stand on the ledger; the federation opened three, of which nobody shows what this silo sent."""
    accepted = federation.parse(contract_bytes())
    one = federation.event(accepted.terms, rounds=1)
    for number in range(1, 11):
        ledger.reserve(contract="cc" * 32, round_number=number, attempt=f"{number:032x}", mechanism=one)
    charge(ledger, [opened_round(number, accepted) for number in (1, 2, 3)])
    assert ledger.charged(accepted.digest.hex()) == [one.with_steps(3)]


def test_a_restore_that_is_killed_between_the_two_kinds_of_a_hidden_round_charges_both_in_the_end(tmp_path):
    """Round 2 is shown by nobody and may be of either kind. The process is killed after each entry, and the command repeated."""
    accepted = accepted_of()
    hidden = [opened_round(1, accepted.at(b"")), opened_round(2, accepted.at(b"")), opened_round(2, accepted)]
    before, training = (event.with_steps(1) for event in federation.whole_plan(accepted.terms))
    for kept in (1, 2, 3, 4):
        path = tmp_path / f"ledger-{kept}.jsonl"
        with Ledger.create(path, who="silo-1", **PARTS) as whole:
            charge(whole, hidden)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
        with Ledger.open(path, **PARTS) as cut:
            charge(cut, hidden)
            assert cut.charged() == [before.with_steps(2), training]
            charge(cut, hidden)
            assert cut.counter == 4


def test_a_round_whose_upload_is_known_names_no_lost_line(ledger):
    """Basis round done, and two attempts at the next round: the lost one was at that round, and costs what it did."""
    accepted = accepted_of()
    rounds = [opened_round(1, accepted.at(b""), counter=2, ended="result"), opened_round(2, accepted, counter=5)]
    charge(ledger, rounds)
    assert [event.steps for event in ledger.charged()] == [1, 2]
    again = list(ledger.entries)
    charge(ledger, rounds)
    assert list(ledger.entries) == again


# --- Homes that know of each other in part ----------------------------------------------------------------------------------------


def a_third(homes, tmp_path):  # noqa: F811
    here, there = homes
    commands.create(
        tmp_path / "south", name="south", organisation="North Hospital", url="http://127.0.0.1:1", fingerprint="",
        records=tmp_path / "records.jsonl", epsilon=10.0, delta=1e-5, model="",
    )  # fmt: skip
    names(there, "../north", "../south")
    south = type(here)(tmp_path / "south")
    names(south, "../north-trial")
    return south


def test_a_home_that_only_the_named_home_names_is_not_left_out(homes, tmp_path):  # noqa: F811
    """north names north-trial, which names south too: all three are on one set of records, and south's would not count here."""
    here, there = homes
    south = a_third(homes, tmp_path)
    spend(south, A, 20)
    with pytest.raises(ConfigError, match="south") as refused:
        histories(here)
    assert refused.value.code == "other-home"
    with pytest.raises(ConfigError):
        histories(south)
    names(here, "../north-trial", "../south")
    names(south, "../north", "../north-trial")
    assert [len(histories(each)) for each in (here, there, south)] == [2, 2, 2]
    assert sum(event.steps for each in histories(here) for event in each.charged()) == 20


def test_another_home_that_is_being_restored_is_not_read(homes):  # noqa: F811
    here, there = homes
    there.begin_restore()
    with pytest.raises(TrustError) as refused:
        histories(here)
    assert refused.value.code == "restore-unfinished"


def test_another_home_whose_ledger_is_behind_its_own_promises_is_refused(homes):  # noqa: F811
    """Only its ledger was put back to an earlier time: what it spent since would not count here."""
    here, there = homes
    before = there.ledger_path.read_bytes()
    spend(there, A, 3)
    there.promise_manifest(3, b"m" * 32)
    assert len(histories(here)) == 1
    there.ledger_path.write_bytes(before)
    with pytest.raises(LedgerBroken) as refused:
        histories(here)
    assert refused.value.code == "ledger-behind"


def test_two_members_of_one_federation_on_the_same_records_are_two_silos_that_know_a_unit(homes):  # noqa: F811
    """One sum then holds a unit twice under one noise: more than two ledgers, each with a noise of its own, compose to."""
    here, there = homes
    with opened(there) as ledger:
        ledger.declare(contract=A, run="", mechanism=mechanism(30, 2), epsilon=50.0, delta=1e-5)
    one = mechanism(30, 2)
    fields = {name: getattr(one, name) for name in LatticeGaussian.__struct_fields__}
    twice = LatticeMixture(**fields, contributions=2, releases=1)
    assert accounting.certify([twice], 1e-5).epsilon > accounting.certify([one.with_steps(60)], 1e-5).epsilon
    other_homes.require_elsewhere(histories(here), ["bb" * 32], known=1)
    other_homes.require_elsewhere(histories(here), [A], known=2)
    with pytest.raises(ConfigError) as refused:
        other_homes.require_elsewhere(histories(here), ["bb" * 32, A], known=1)
    assert refused.value.code == "same-federation"


def test_the_gate_of_a_second_member_on_the_same_records_does_not_open(tmp_path):
    whole = Whole.create(tmp_path / "federation")
    paths = [whole.root / f"silo-{number}" for number in (1, 2)]
    for root, other in (paths, paths[::-1]):
        (whole.root / "records.jsonl").write_text("")
        commands.create(
            root, name=root.name, organisation="Hospital", url="http://127.0.0.1:1", fingerprint="",
            records=whole.root / "records.jsonl", epsilon=50.0, delta=1e-5, model="",
        )  # fmt: skip
        names(Home(root), other)
    spend(Home(paths[1]), whole.accepted.digest.hex(), 1)
    home = Home(paths[0])
    with pytest.raises(ConfigError, match="same federation"), commands._gate(
        home, whole.accepted, config.load(home.config_path), 0, whole.line()
    ):
        pass


# --- Two kinds of units -----------------------------------------------------------------------------------------------------------


def gate_for(ledger, contract, unit):
    return Gate(ledger, Limits(epsilon=50.0, delta=1e-5), plan=mechanism(5, 2), contract=contract, steps_per_attempt=1, unit=unit)


def test_what_protects_records_does_not_compose_with_what_protects_patients(ledger):
    """A patient with eight records: the record-level run costs more than what the ledger would add for it."""
    patients = gate_for(ledger, A, "patient_id")
    patients.declare()
    gate_for(ledger, "bb" * 32, "record").declare()  # nothing is charged yet: whichever begins first
    patients.admit(1, b"a" * 16)
    before = ledger.counter
    with pytest.raises(PrivacyRefusal) as refused:
        gate_for(ledger, "bb" * 32, "record").declare()
    assert refused.value.code == "other-unit"
    assert ledger.counter == before
    gate_for(ledger, "cc" * 32, "patient_id").declare()
    gate_for(ledger, "dd" * 32, None).declare()
    gate_for(ledger, A, "patient_id").declare()
    assert [each.unit for each in ledger.entries if isinstance(each, Plan)] == ["patient_id", "record", "patient_id", None]
    assert b'"unit"' not in msgspec.json.encode(ledger.plan("dd" * 32)), "a plan that says nothing is written as it always was"
    one = mechanism(1, 2)
    assert groups.certify_for([one], 1e-5, records=8).epsilon > 2 * accounting.certify([one], 1e-5).epsilon


def test_a_silos_gate_says_what_its_contract_protects(tmp_path):
    whole = Whole.create(tmp_path / "federation")
    (whole.root / "records.jsonl").write_text("")
    commands.create(
        whole.root / "silo-1", name="silo-1", organisation="Hospital", url="http://127.0.0.1:1", fingerprint="",
        records=whole.root / "records.jsonl", epsilon=50.0, delta=1e-5, model="",
    )  # fmt: skip
    home = Home(whole.root / "silo-1")
    with commands._gate(home, whole.accepted, config.load(home.config_path), 0, whole.line()) as gate:
        gate.declare()
    assert whole.history(1).plan(whole.accepted.digest.hex()).unit == whole.accepted.terms.privacy.unit == "record"


# --- A chain that stretches a plan ------------------------------------------------------------------------------------------------


def test_more_basis_attempts_in_a_later_version_would_be_more_training_rounds(tmp_path):
    """So many opened rounds are taken for basis rounds, not training rounds: with more of them a plan could be run twice."""
    first = accepted_of()
    same = accepted_of(version=2, previous=first.digest.hex(), expires="2100-01-01")
    more = accepted_of(version=2, previous=first.digest.hex(), basis={**SKETCHED, "attempts": 100})
    chain.Lineage.begin(first).extended(same)
    with pytest.raises(TrustError, match=r"basis\.attempts may not change"):
        chain.Lineage.begin(first).extended(more)


# --- Worst cases, enumerated ------------------------------------------------------------------------------------------------------


def test_no_vectors_in_the_plane_beat_the_line():
    """Three contributions anywhere in the unit disc, each by its own coin: both ways, at most what one line of them gives."""
    q, sigma, random = 0.3, 1.1, np.random.default_rng()
    axis = np.linspace(-8.0, 11.0, 400)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2

    def density(vectors):
        found = np.zeros_like(x)
        for drawn in itertools.product((0, 1), repeat=len(vectors)):
            chance = math.prod(q if each else 1 - q for each in drawn)
            a, b = np.array(drawn) @ np.array(vectors)
            found += chance * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        return found

    def deltas(vectors):
        with_it, without = density(vectors), density([(0.0, 0.0)])
        pairs = ((with_it, without), (without, with_it))
        return np.array([(np.maximum(p - math.exp(e) * r, 0).sum() * cell) for p, r in pairs for e in (0.0, 0.2, 1.0, 2.0)])

    line = deltas([(1.0, 0.0)] * 3)
    for _ in range(6):
        angles, lengths = random.uniform(0, 2 * math.pi, 3), np.sqrt(random.uniform(0, 1, 3))
        anywhere = deltas(np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1))
        assert np.all(anywhere <= line + 1e-5)


@pytest.mark.parametrize(("q", "sigma", "k"), [(0.2, 2.64, 2), (0.5, 1.0, 4), (1.0, 2.0, 3)])
def test_the_filter_sums_a_mixtures_curve_at_its_own_order(q, sigma, k):
    """The larger way of neighbouring, by integration written anew; and the order does not depend on what is composed."""
    order = LIMITS.filter_order
    bits = 16
    variance = round((sigma * 2**bits) ** 2) + 16
    event = LatticeMixture(
        sampling_rate=q, lattice_bits=bits, share_variance=variance, shares=1, dimension=10, steps=5, contributions=k, releases=1
    )  # fmt: skip
    plain = LatticeGaussian(sampling_rate=1.0, lattice_bits=bits, share_variance=variance * 9, shares=1, dimension=10, steps=1)
    x = np.linspace(-20 * sigma, k * order + 20 * sigma, 60_001)
    log_without = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    chances = [math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]
    ratio = np.logaddexp.reduce([math.log(c) + (2 * j * x - j * j) / (2 * sigma**2) for j, c in enumerate(chances) if c > 0])
    step = x[1] - x[0]
    ways = [np.logaddexp.reduce(power * ratio + log_without) + math.log(step) for power in (order, 1 - order)]
    renyi = max(float(each) for each in ways) / (order - 1)
    gaussian = order / (2 * plain.effective_noise_multiplier**2)
    found = accounting.certify_adaptive([event, plain], 1e-5, order=order).epsilon
    wanted = 5 * renyi + gaussian + accounting.conversion(order, 1e-5)
    assert wanted - 1e-7 <= found <= wanted * (1 + 1e-5)


def test_odd_figures_give_no_small_epsilon_and_end_soon():
    """At the edges of what a contract can say: a large figure, or none."""
    for q, sigma, k in ((1e-9, 1.0, 2), (1e-12, 0.01, 2), (0.3, 0.05, 4), (0.01, 3.0, 2**16), (1.0, 0.01, 64)):
        event = LatticeMixture(
            sampling_rate=q, lattice_bits=20, share_variance=int((sigma * 2**20) ** 2) + 16, shares=1, dimension=10, steps=100,
            contributions=k, releases=1,
        )  # fmt: skip
        try:
            assert accounting.certify([event], 1e-5).epsilon > 0
        except accounting.NotCertified:
            continue


def test_history_reads_what_is_charged_for_a_lost_line(ledger, tmp_path):
    accepted = accepted_of()
    charge(ledger, [opened_round(1, accepted.at(b"")), opened_round(2, accepted, counter=3)])
    read = History.read(tmp_path / "ledger.jsonl", verify=PARTS["verify"])
    assert read.charged() == ledger.charged()
    assert msgspec.json.encode(read.charged()) == msgspec.json.encode(ledger.charged())
