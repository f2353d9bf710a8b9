# SPDX-License-Identifier: Apache-2.0
"""The membership attack: plain without the mechanism, within epsilon's curve with it, caught where noise is off; the picture.

What is random here comes from the operating system; a false alarm has a probability below 1e-6, or the attack's own 1 - confidence
where it is said so.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from privacy import update_rule
from privacy.dp import empirical, noise
from privacy.dp.tradeoff import trade_off
from privacy.errors import ConfigError
from privacy.federation import mechanism, parse
from privacy.prg import Randomness
from silo.learning import shadow_plot, shadows
from silo.learning.evaluation import Pooled
from tests import sessions
from tests.sessions import Terminal
from tests.terms import contract_bytes
from tests.test_empirical_audit import BROKEN, often
from tests.test_export import copied, home_of

RUNS, STEPS = 16, 16


@pytest.fixture(scope="module")
def subject():
    return shadows.made_up(parse(contract_bytes()).terms, units=96, steps=STEPS)


@pytest.fixture(scope="module")
def curve(subject):
    return trade_off(mechanism(subject.terms), subject.terms.privacy.delta)


def attacked(subject, **options):
    return shadows.attack(subject, shadows=RUNS, attacked=RUNS, **options)


@pytest.fixture(scope="module")
def control(subject):
    return attacked(shadows.unprotected(subject), noised=False)


@pytest.fixture(scope="module")
def honest(subject):
    return [attacked(subject) for _ in range(2)]


def test_without_clipping_and_noise_membership_is_plain(control, curve):
    assert empirical.roc(control.scores, control.included).area > 0.85
    found, low, _ = control.found_at(0.01)
    assert low > 1 - curve.inverse(0.99), f"{found}: the attack can find more than epsilon allows"
    assert shadows.refuted(control, curve)


def test_honest_runs_stay_below_the_curve(honest, curve):
    assert sum(shadows.refuted(each, curve) for each in honest) <= often(2, 0.05)
    for each in honest:
        assert 0.5 < empirical.roc(each.scores, each.included).area < 0.75, "something is found, and far less than without noise"
        for rate in (0.01, 0.1):
            assert each.found_at(rate)[1] < 1 - curve.inverse(1 - rate)


def test_noise_off_is_caught_through_the_real_path(subject, curve, monkeypatch):
    """Smaller errors are for the canaries of tests/test_empirical_audit.py, which see every step and not the last model alone."""
    monkeypatch.setattr(*BROKEN["noise off"])
    assert shadows.refuted(attacked(subject), curve)


def test_fair_coins_and_apart_the_laws_see_no_coin_of_the_attacked(subject, monkeypatch):
    seen = []

    def watching(fitted, coins, attacked):
        seen.append((fitted.shape, coins.shape, attacked.shape))
        return np.zeros(attacked.shape)

    monkeypatch.setattr(shadows, "likelihoods", watching)
    monkeypatch.setattr(shadows, "trained", lambda subject, chosen, **_: update_rule.initial(subject.terms))
    found = [attacked(subject) for _ in range(8)]
    assert set(seen) == {((RUNS, 96), (RUNS, 96), (RUNS, 96))}
    inside, count = sum(int(each.included.sum()) for each in found), 8 * RUNS * 96
    assert empirical.tail(count, 0.5, inside) > 1e-6
    assert len({each.included.tobytes() for each in found}) == 8


def test_each_sum_holds_the_shares_that_insiders_face(subject, monkeypatch):
    drawn, draw = [], noise.discrete_gaussian

    def drawing(count, variance, randomness):
        drawn.append(variance)
        return draw(count, variance, randomness)

    monkeypatch.setattr(noise, "discrete_gaussian", drawing)
    shadows.trained(subject, [1, 2, 3], noised=True, randomness=Randomness.from_os)
    event = mechanism(subject.terms)
    assert drawn == [event.share_variance] * (STEPS * event.shares)
    assert event.shares == 2
    drawn.clear()
    shadows.trained(subject, [1, 2, 3], noised=False, randomness=Randomness.from_os)
    assert not drawn


def test_confidence_is_the_logit_of_the_own_label_and_a_unit_has_the_mean_of_its_records(subject):
    pooled = Pooled(
        features=torch.eye(3), labels=torch.tensor([0, 1, 1]), owner=torch.tensor([0, 0, 1]), count=2,
    )  # fmt: skip
    terms = parse(contract_bytes(model={"hidden_size": 3}, adapter={"modules": []}, privacy={"lattice_bits": 16})).terms
    theta = np.array([1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.5])
    state = update_rule.initial(terms)
    found = shadows.confidences(shadows.Subject(terms=terms, pooled=pooled), type(state)(**{**_fields(state), "theta": theta}))
    assert found == pytest.approx([(1.0 - 0.5 + 2.0 + 0.5) / 2, 0.5])


def _fields(state):
    return {name: getattr(state, name) for name in state.__struct_fields__}


def test_the_scores_are_the_log_ratio_of_two_normal_laws_with_pooled_spreads():
    bits = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(16))))
    coins = np.arange(12)[:, None] % 2 == np.arange(5)[None, :] % 2
    values, seen = bits.standard_normal((12, 5)) + 2 * coins, bits.standard_normal((3, 5))
    found = shadows.likelihoods(values, coins, seen)
    spread = {}
    for inside in (True, False):
        left = [values[coins[:, u] == inside, u] - values[coins[:, u] == inside, u].mean() for u in range(5)]
        spread[inside] = math.sqrt(sum(float((each**2).sum()) for each in left) / sum(len(each) - 1 for each in left))
    for run in range(3):
        for unit in range(5):
            logs = {}
            for inside in (True, False):
                mean, s = values[coins[:, unit] == inside, unit].mean(), spread[inside]
                logs[inside] = -math.log(s) - (seen[run, unit] - mean) ** 2 / (2 * s * s)
            assert found[run, unit] == pytest.approx(logs[True] - logs[False])


def test_a_unit_that_no_shadow_had_gets_a_score_all_the_same():
    coins = np.ones((8, 3), dtype=bool)
    coins[:, 1] = False
    coins[4:, 2] = False
    assert np.isfinite(shadows.likelihoods(np.random.default_rng(0).standard_normal((8, 3)), coins, np.zeros((2, 3)))).all()


@pytest.mark.parametrize(("found", "trials"), [(0, 40), (3, 40), (20, 40), (40, 40), (7, 2000)])
def test_an_interval_holds_exactly_what_two_one_sided_tests_do_not_refuse(found, trials):
    low, high = empirical.interval(found, trials, 0.05)
    assert low <= found / trials <= high
    if found:
        assert empirical.binomial(trials, low)[found:].sum() == pytest.approx(0.025, rel=0.05)
    if found < trials:
        assert empirical.binomial(trials, high)[: found + 1].sum() == pytest.approx(0.025, rel=0.05)
    assert (low == 0.0) == (found == 0)
    assert (high == 1.0) == (found == trials)


def test_found_at_counts_no_more_false_alarms_than_allowed():
    scores = np.arange(200.0)
    included = np.zeros(200, dtype=bool)
    included[190:] = included[:90] = True
    one = shadows.Attack(scores=scores, included=included)
    found, low, high = one.found_at(0.0)
    assert found == 0.1
    assert low < 0.1 < high
    assert one.found_at(0.5)[0] == 0.1
    assert one.found_at(1.0)[0] >= 0.1


# --- The command and the picture ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(tiny_bert, tmp_path_factory) -> Path:
    return home_of(tmp_path_factory.mktemp("membership") / "north", tiny_bert).root


@pytest.fixture
def north(joined, tmp_path) -> Path:
    return copied(joined, tmp_path / "north")


def everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".svg"}


def test_the_command_reads_no_record_charges_nothing_and_draws_a_picture(north, tmp_path, capsys):
    (north / "records.jsonl").unlink()
    before = everything(north)
    picture = tmp_path / "membership.svg"
    said = Terminal(capsys)(f"silo audit --membership --runs 8 --steps 6 --json --plot {picture} --home", north)
    assert said.code in (0, 5), said.out
    facts = said.document
    assert (facts["holds"], facts["steps"], facts["steps_planned"], facts["records"]) == (said.code == 0, 6, 10, "made up")
    assert [each["false_positive_rate"] for each in facts["at"]] == [0.001, 0.01]
    for each in facts["at"]:
        assert each["low"] <= each["true_positive_rate"] <= each["high"]
        assert 0 < each["allowed"] < 0.5
    assert facts["roc_area_without_protection"] > facts["roc_area"]
    assert everything(north) == before
    svg = ElementTree.fromstring(picture.read_text())
    words = [each.text for each in svg.iter() if each.tag.endswith("text")]
    assert {"false alarms", "members found", "the attack on the mechanism", "guessing"} <= set(words)
    assert any("allows" in (word or "") for word in words)
    assert "95 % interval" in svg.find("{*}desc").text
    assert "<script" not in picture.read_text()


def test_held_out_records_by_the_contracts_own_model_and_never_the_training_file(north, tmp_path, capsys):
    terminal = Terminal(capsys)
    refused = terminal("silo audit --membership --json --records", north / "records.jsonl", "--home", north)
    assert refused.error["code"] == "own-records"
    (tmp_path / "same.jsonl").symlink_to(north / "records.jsonl")
    assert (
        terminal("silo audit --membership --json --records", tmp_path / "same.jsonl", "--home", north).error["code"]
        == "own-records"
    )
    held_out = sessions.write_rows(tmp_path / "held.jsonl", sessions.rows(40, start_at=700))
    (north / "records.jsonl").unlink()
    before = everything(north)
    said = terminal("silo audit --membership --runs 8 --steps 3 --json --records", held_out, "--home", north)
    assert said.code in (0, 5), said.out
    assert (said.document["records"], said.document["units"]) == ("held out", 40)
    assert everything(north) == before


def test_what_it_cannot_do_is_said(north, subject, capsys):
    terminal = Terminal(capsys)
    assert terminal("silo audit --membership --runs 2 --json --home", north).code == 3
    assert terminal("silo audit --records x --json --home", north).code == 2
    with pytest.raises(ConfigError, match="2 runs"):
        shadows.audit(subject, runs=2)


def test_the_words_for_people(north, capsys):
    said = Terminal(capsys)("silo audit --membership --runs 8 --steps 3 --home", north)
    assert "epsilon allows" in said.out
    assert "without clipping and noise" in said.out


def test_the_picture_draws_the_bound_above_the_honest_attack(subject, honest, control, curve):
    one = shadows.Finding(
        attack=honest[0], control=control, curve=curve, claimed=2.5, delta=1e-5, units=96, runs=RUNS, steps=STEPS
    )  # fmt: skip
    lines = {
        each.get("class"): [tuple(map(float, point.split(","))) for point in each.get("points").split()]
        for each in ElementTree.fromstring(shadow_plot.picture(one, ("<a> & b", "c"))).iter()
        if each.tag.endswith("polyline")
    }
    assert set(lines) == {"bound", "chance", "control", "found"}
    assert len({len(points) for points in lines.values()}) == 1
    lower = [bound[1] <= chance[1] + 0.11 for bound, chance in zip(lines["bound"], lines["chance"], strict=True)]
    assert all(lower), "upwards is less: the bound is nowhere below guessing"
    above = [control[1] <= bound[1] for control, bound in zip(lines["control"], lines["bound"], strict=True)]
    assert sum(above) > len(above) / 2
