# SPDX-License-Identifier: Apache-2.0
"""``aggregator plan``: what is planned is what a contract is signed with, and the published figures come out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from aggregator import enrolment, planning
from aggregator.planning import Question
from cli import aggregator as cli
from cli import errors
from privacy import federation
from privacy.dp import accounting
from privacy.errors import ConfigError, PrivacyRefusal
from tests.test_enrolment import TERMS, made

ASKED = Question(epsilon=3.0, delta=1e-5, steps=75, sampling_rate=0.2, silos=3, units=1000, dimension=6914)


@pytest.mark.parametrize("mode", ["joint", "local"])
def test_what_is_planned_is_what_sign_calibrates(tmp_path, mode):
    terms = replace(TERMS, mode=mode, steps_per_round=2 if mode == "local" else 1, epsilon=4.0)
    home, identity, store = made(tmp_path, terms)
    signed = enrolment.sign_version(home, identity, store, now=0.0).terms
    question = Question(
        epsilon=4.0, delta=terms.delta, steps=signed.steps, steps_per_round=signed.training.steps_per_round, silos=3,
        units=terms.units, sampling_rate=terms.sampling_rate, dimension=signed.dimension, local=mode == "local",
    )  # fmt: skip
    found = planning.answer(question)
    assert found.noise_multiplier == signed.privacy.noise_multiplier
    assert found.lattice_bits == signed.privacy.lattice_bits
    for name, event in federation.adversaries(signed).items():
        assert found.epsilon[name] == accounting.certify([event], terms.delta).epsilon
    assert found.epsilon["insiders"] <= 4.0
    assert found.rounds[-1] == (signed.training.rounds, found.epsilon["insiders"])


def test_the_larger_sample_carries_less_noise_at_equally_many_passes():
    """DP-SGD's planning table for fifteen passes at epsilon 3: 2.26 of noise at q = 0.01 against 1.52 at q = 0.2."""
    rows = planning.alternatives(ASKED, factors=(0.05, 1.0, 10.0))
    assert [(rate, steps) for rate, steps, _, _ in rows] == [(pytest.approx(0.01), 1500), (0.2, 75)], "no rate above 1"
    assert [noise for *_, noise in rows] == pytest.approx([2.26, 1.52], abs=0.01)


def test_rounds_grow_to_the_whole_plan():
    found = planning.answer(replace(ASKED, epsilon=None, noise_multiplier=2.0, steps=5))
    assert [count for count, _ in found.rounds] == [1, 2, 3, 4, 5]
    assert [epsilon for _, epsilon in found.rounds] == sorted(epsilon for _, epsilon in found.rounds)
    assert found.epsilon["outside"] < found.epsilon["insiders"] < found.epsilon["sum_broken"]


@pytest.mark.parametrize(
    "changes", [{"epsilon": None}, {"noise_multiplier": 1.0}, {"silos": 2, "dropouts": 1}, {"colluders": 3}]
)
def test_a_question_without_an_answer_is_refused(changes):
    with pytest.raises(ConfigError):
        replace(ASKED, **changes)


def test_a_delta_that_no_contract_may_state_is_refused():
    with pytest.raises(PrivacyRefusal, match="at most 1e-05"):
        planning.answer(replace(ASKED, delta=2e-5))
    with pytest.raises(PrivacyRefusal, match="3000000 units"):
        planning.answer(replace(ASKED, units=1_000_000))


def test_plans_are_compared_at_an_epsilon_only():
    with pytest.raises(ConfigError, match="one epsilon"):
        planning.alternatives(replace(ASKED, epsilon=None, noise_multiplier=1.0))


def test_the_command_prints_one_document(capsys):
    words = ["plan", "--noise-multiplier", "2", "--rounds", "4", "--sampling-rate", "0.2", "--units", "1000", "--json"]
    assert errors.run(cli.app, words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["noise_multiplier"] == 2.0
    assert said["delta"] == 1e-5
    assert [row["rounds"] for row in said["forecast"]] == [1, 2, 3, 4]
    assert said["forecast"][-1]["epsilon"] == said["epsilon"]["insiders"]
    assert errors.run(cli.app, ["plan", "--rounds", "4", "--json"]) == 3
