# SPDX-License-Identifier: Apache-2.0
"""Share mode in real processes: one silo is killed in a round, the round ends with a sum, and the silo comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aggregator import commands as hub_commands
from privacy.errors import ConfigError
from tests import sessions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """One run of `aggregator simulate` with four silos, of which the third is killed in the second round."""
    folder = tmp_path_factory.mktemp("shares")
    model, data = sessions.tiny_model(folder / "model"), sessions.write_rows(folder / "small.jsonl", sessions.rows(260))
    done = sessions.finish(
        "aggregator", "simulate", "--data", data, "--model", model, "--rank", 4, "--rounds", 3, "--epsilon", 6, "--silos", 4,
        "--protocol", "shares", "--dropouts", 1, "--drop", "silo-3@2", "--home", folder / "DIR", "--json",
        timeout_s=900.0, warm_children=True,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    return done, folder / "DIR"


def test_all_reach_one_model_although_a_silo_was_killed(simulated):
    done, _ = simulated
    assert set(done.document["digests"].values()) == {done.document["model_digest"]}
    assert set(done.document["digests"]) == {"aggregator", "silo-1", "silo-2", "silo-3", "silo-4"}


def test_the_contract_names_the_silos_as_guardians(simulated):
    _, home = simulated
    with hub_commands.opened(home / "aggregator") as at:
        terms = at.accepted.terms
        assert (terms.sum.protocol, terms.sum.dropouts, terms.sum.corrupt_guardians) == ("shares", 1, 1)
        assert (terms.quorum, terms.fewest) == (3, 3)
        assert set(terms.silo_guardians) == {1, 2, 3, 4}


def test_the_report_says_how_many_stood(simulated):
    done, _ = simulated
    report = json.loads(Path(done.document["report"]).read_bytes())
    assert [each["kind"] for each in report["rounds"]] == ["result"] * 3
    assert {each["stood"] for each in report["rounds"]} <= {3, 4}
    insiders = report["guarantee"]["adversaries"][1]
    assert 0 < insiders["stood"] <= insiders["spent"]["epsilon"]


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path):
    done = sessions.finish(
        "aggregator", "simulate", "--silos", 4, "--protocol", "shares", "--dropouts", 1, "--drop", "silo-9@2",
        "--home", tmp_path / "DIR", "--json",
    )  # fmt: skip
    assert done.code == ConfigError("", hint="").exit_code
    assert not (tmp_path / "DIR").exists()
