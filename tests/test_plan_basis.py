# SPDX-License-Identifier: Apache-2.0
"""``aggregator plan`` with a basis round: what is planned is what a draft with one is signed with, and no figure leaves it out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from aggregator import enrolment, planning, planning_draft
from aggregator.planning import BasisRound, Question
from cli import aggregator as cli
from cli import errors
from privacy import federation
from privacy.dp import accounting
from privacy.errors import ConfigError, PrivacyRefusal
from privacy.spending import Spending
from tests.test_enrolment import TERMS, made

PRIVATE = replace(TERMS, basis="private", shapes=((24, 16), (16, 24)), epsilon=4.0)
ASKED = Question(
    epsilon=3.0, delta=1e-5, steps=40, sampling_rate=0.1, silos=3, units=1000, dimension=6914, basis=BasisRound(dimension=294912)
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """The answer to ``ASKED``: ten seconds of a processor, so it is asked once."""
    return planning.answer(ASKED)


@pytest.mark.parametrize("changes", [{}, {"mode": "local", "steps_per_round": 2, "max_silos_per_unit": 2}])
def test_a_draft_is_planned_with_the_noise_that_it_is_signed_with(tmp_path, changes):
    home, identity, store = made(tmp_path, replace(PRIVATE, **changes))
    found = planning.answer(planning_draft.question(home.draft_path))
    accepted = enrolment.sign_version(home, identity, store, now=0.0)
    signed = accepted.terms
    assert found.noise_multiplier == signed.privacy.noise_multiplier
    assert found.lattice_bits == signed.privacy.lattice_bits
    spending, load = Spending(versions={1: accepted}, first=1), ((-1, 2), (1, signed.training.rounds))
    for name, epsilon in found.epsilon.items():
        assert epsilon == spending.certified(load, name, signed.privacy.delta).epsilon
    assert found.epsilon["insiders"] == enrolment.check_plan(signed) <= 4.0
    assert found.rounds[-1] == (signed.training.rounds, found.epsilon["insiders"])
    again = planning_draft.question(home.contract_path(1))
    assert planning.answer(again).epsilon == found.epsilon, "a signed contract's own noise and lattices"


def test_the_basis_round_is_in_every_figure(found):
    plain = replace(ASKED, epsilon=None, noise_multiplier=found.noise_multiplier, basis=None)
    assert planning.answer(replace(plain, steps=1)).basis is None
    (before,) = ASKED.before
    assert (before.steps, before.sampling_rate) == (2, 1.0)
    assert 2.99 < found.epsilon["insiders"] <= 3.0
    assert found.epsilon["outside"] < found.epsilon["insiders"] < found.epsilon["sum_broken"]
    assert found.basis.epsilon == accounting.certify([before], 1e-5).epsilon < found.rounds[0][1]
    assert found.basis.without < found.epsilon["insiders"] < found.basis.epsilon + found.basis.without
    assert found.basis.share == pytest.approx(1 - found.basis.without / found.epsilon["insiders"])
    for (of, count, with_it), (_, _, without) in zip(found.several, planning.answer(plain).several, strict=True):
        assert with_it > without, (of, count)
    assert planning.alternatives(ASKED, (1.0,)) == [(0.1, 40, found.noise_multiplier, found.relative_noise)]


def test_more_attempts_and_less_noise_in_the_basis_round_cost_more():
    costs = [
        accounting.certify(
            replace(ASKED, basis=BasisRound(dimension=294912, noise_multiplier=sigma, attempts=attempts)).before, 1e-5
        ).epsilon
        for sigma, attempts in ((20.0, 1), (10.0, 1), (10.0, 2), (5.0, 2))
    ]
    assert costs == sorted(set(costs))


def test_a_basis_round_that_leaves_nothing_for_the_rounds_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"the basis round alone costs epsilon 0\.497, the whole plan may cost 0\.4"):
        planning.answer(replace(ASKED, epsilon=0.4))


def test_a_draft_without_a_figure_to_plan_is_refused(tmp_path):
    home, _, _ = made(tmp_path, PRIVATE, silos=0)
    with pytest.raises(ConfigError, match="the draft has 0 members") as refused:
        planning_draft.question(home.draft_path)
    assert "--silos" in refused.value.hint
    assert planning_draft.question(home.draft_path, silos=4, rounds=9).steps == 9
    with pytest.raises(ConfigError, match="cannot read"):
        planning_draft.question(home.root / "missing.toml")
    off, _, _ = made(tmp_path / "off", replace(TERMS, without_privacy=True))
    with pytest.raises(PrivacyRefusal, match="no differential privacy"):
        planning_draft.question(off.draft_path)


def test_the_command_says_what_the_basis_takes(found, capsys, tmp_path):
    words = ["plan", "--epsilon", "3", "--delta", "1e-5", "--rounds", "40", "--sampling-rate", "0.1", "--basis", "private"]
    assert errors.run(cli.app, [*words, "--json"]) == 0
    said, expected = json.loads(capsys.readouterr().out), found
    assert said["noise_multiplier"] == expected.noise_multiplier
    assert said["basis"] == {
        "noise_multiplier": 10.0, "attempts": 2, "dimension": 294912, "epsilon": expected.basis.epsilon,
        "epsilon_without": expected.basis.without, "share": expected.basis.share,
    }  # fmt: skip
    assert said["forecast"][-1] == {"rounds": 40, "epsilon": said["epsilon"]["insiders"]}
    assert errors.run(cli.app, words) == 0
    assert f"the basis round takes {100 * expected.basis.share:.1f} % of epsilon" in capsys.readouterr().out
    home, _, _ = made(tmp_path, PRIVATE)
    assert errors.run(cli.app, ["plan", "--draft", str(home.draft_path), "--json"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert (drafted["rounds"], drafted["silos"], drafted["basis"]["attempts"]) == (TERMS.rounds, 3, 2)
    completed = federation.parse(enrolment.complete(home.draft_path.read_text()).encode()).terms
    assert completed.privacy.noise_multiplier == drafted["noise_multiplier"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--epsilon", "3"], "--rounds is missing"),
        (["--epsilon", "3", "--rounds", "4", "--basis", "raw"], "no epsilon to plan"),
        (["--epsilon", "3", "--rounds", "4", "--basis", "mine"], "--basis mine"),
        (["--epsilon", "3", "--rounds", "4", "--basis-attempts", "1"], "needs --basis private"),
        (["--draft", "x.toml", "--epsilon", "3"], "--epsilon beside --draft"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, wanted, capsys):
    assert errors.run(cli.app, ["plan", *words]) == 2
    assert wanted in " ".join(capsys.readouterr().err.split())
