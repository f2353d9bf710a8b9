# SPDX-License-Identifier: Apache-2.0
"""The comparison of bases runs with tiny settings: every basis, resumed from its file, at one total epsilon."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from benchmarks import bases, basis_runs, basis_training, plots
from privacy.dp import accounting
from privacy.errors import ConfigError
from privacy.federation import mechanism
from silo.config import Compute
from tests import sessions

BASES = ("weights", "random", "private", "public", "raw", "random:4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two tasks that may serve each other as the public one."""
    at = tmp_path_factory.mktemp("bases")
    sessions.tiny_model(at / "model")
    for task, start in (("one", 0), ("other", 400)):
        (at / task).mkdir()
        for part, rows in (("train", sessions.rows(120, start_at=start)), ("test", sessions.rows(30, start_at=start + 300))):
            (at / task / f"{part}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return at


def words(folder, *more):
    fixed = ("--tasks", "one", "--public", "other", "--model", folder / "model", "--rank", 4, "--rounds", 2, "--batch", 120)
    where = ("--data", folder, "--results", folder / "runs.jsonl", "--workers", 0, "--precision", "float32")
    return list(map(str, (*fixed, *where, *more)))


def test_every_basis_is_measured_once_at_one_total_epsilon_and_drawn(folder):
    said = []
    asked = words(folder, "--bases", *BASES, "--epsilons", 2, "--seeds", 1, "--picture", folder / "bases.svg")
    bases.main(asked, say=said.append)
    rows = list(bases.finished(folder / "runs.jsonl").values())
    assert [row.run.basis for row in rows] == list(BASES)
    assert all(0 <= row.accuracy <= 1 and row.noise_multiplier > 0 for row in rows)
    by_basis = {row.run.basis: row for row in rows}
    assert all(1.99 < row.spent <= 2 for row in rows if row.run.basis != "raw")
    assert by_basis["raw"].spent == math.inf
    assert by_basis["private"].noise_multiplier > by_basis["weights"].noise_multiplier == by_basis["random"].noise_multiplier
    assert by_basis["random:4"].dimension == by_basis["random"].dimension
    assert sum(line.startswith("| one |") for line in said) == len(BASES)
    assert any("none holds" in line for line in said if "| raw |" in line)
    before = (folder / "runs.jsonl").read_bytes()
    bases.main(asked, say=said.append)
    assert (folder / "runs.jsonl").read_bytes() == before, "nothing is done twice"
    labels = [node.text for node in ElementTree.parse(folder / "bases.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert set(BASES) <= set(labels)


def test_a_private_basis_is_part_of_what_is_certified(folder):
    run = bases.grid(bases.parser().parse_args(words(folder, "--bases", "private", "--epsilons", "2", "--seeds", "1")))[0]
    here = basis_runs.dealt(basis_runs.data_of(run))
    (event,) = basis_runs.basis_event(run, here)
    assert (event.sampling_rate, event.steps, event.shares) == (1.0, run.attempts, 2)
    assert event.dimension == basis_runs.layout_of(run, here).dimension
    assert event.effective_noise_multiplier == pytest.approx(run.basis_noise, rel=1e-3)
    terms, spent = basis_runs.planned(run)
    less = basis_runs.with_noise(terms, terms.privacy.noise_multiplier * 0.99)
    costs = [accounting.certify([event, mechanism(each)], terms.privacy.delta).epsilon for each in (terms, less)]
    assert costs[0] == spent <= 2 < costs[1]
    loud = dataclasses.replace(run, basis_noise=0.2)
    with pytest.raises(ConfigError, match="basis alone"):
        basis_runs.planned(loud)


def test_noise_of_a_round_is_the_sum_of_every_silos_share():
    drawn = basis_runs.shares_of_noise(40_000, 10**6)
    assert drawn.std() == pytest.approx(math.sqrt(3e6), rel=0.05)  # five standard deviations are 1.8 %


def test_results_that_a_crash_cut_off_are_done_again(folder):
    run = bases.grid(bases.parser().parse_args(words(folder, "--bases", "weights", "--epsilons", "inf", "--seeds", "1")))[0]
    row = basis_training.measured(run, folder / "cache", Compute())
    assert row.noise_multiplier == 0
    assert row.spent == math.inf
    whole = json.dumps(dataclasses.asdict(row))
    path = folder / "cut.jsonl"
    path.write_text(whole + "\n" + whole[:-9], encoding="utf-8")
    assert bases.finished(path) == {run: row}


def test_means_and_deviations_are_over_seeds(folder):
    run = bases.grid(bases.parser().parse_args(words(folder, "--bases", "weights", "--epsilons", "8", "--seeds", "1")))[0]
    rows = [
        basis_runs.Row(
            run=dataclasses.replace(run, seed=seed), accuracy=share, largest=0.6, spent=8.0,
            delta=1e-5, noise_multiplier=1.0, dimension=9,
            precision="float32", seconds=1.0,
        )
        for seed, share in enumerate((0.7, 0.8, 0.9))
    ]  # fmt: skip
    assert bases.summary(rows)["one", "weights", 8.0] == (pytest.approx(0.8), pytest.approx(0.1), 3)
    assert "80.0 ± 10.0 % | 60.0 % |" in bases.table(rows)[-1]


def test_an_unknown_basis_is_refused(folder):
    with pytest.raises(ConfigError, match="no basis"):
        bases.main(words(folder, "--bases", "magic"))


def test_a_linear_axis_has_round_ticks_and_bars():
    curve = plots.Curve(label="a", points=((1.0, 70.0), (8.0, 90.0)), spread=(2.0, 1.0))
    text = plots.picture([plots.Panel(title="t", x="x", y="y", curves=(curve,), linear_y=True)], title="t", desc="d")
    assert {"70", "75", "80", "85", "90", "1", "8"} <= set(ElementTree.fromstring(text).itertext())
    assert text.count('class="line c0"') == 3


def test_the_sketch_that_seeds_share_is_computed_once(folder, tmp_path):
    run = bases.grid(bases.parser().parse_args(words(folder, "--bases", "private", "--epsilons", "2", "--seeds", "1")))[0]
    layout = basis_runs.layout_of(run, basis_runs.dealt(basis_runs.data_of(run)))
    made = []

    def compute():
        made.append(1)
        return np.arange(5, dtype=np.int64)

    found = [basis_runs.kept(each, layout, tmp_path, compute) for each in (run, dataclasses.replace(run, seed=7, epsilon=1.0))]
    assert len(made) == 1
    assert all(np.array_equal(each, np.arange(5)) for each in found)
    assert msgspec.structs.asdict(basis_runs.planned(run)[0].privacy)["sampling_rate"] == 1.0
