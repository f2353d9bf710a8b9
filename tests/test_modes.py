# SPDX-License-Identifier: Apache-2.0
"""The comparison of modes runs with tiny settings: every mode, with noise and without, resumed from its file."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import advice, modes
from privacy.federation import ring_plan
from tests import sessions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a task of single texts and one of pairs."""
    at = tmp_path_factory.mktemp("modes")
    sessions.tiny_model(at / "model")
    for part, rows in (("train", sessions.rows(120)), ("test", sessions.rows(30, start_at=300))):
        pairs = [{"premise": row["text"], "hypothesis": row["text"], "label": row["label"]} for row in rows]
        for task, found in (("one", rows), ("pairs", pairs)):
            (at / task).mkdir(exist_ok=True)
            (at / task / f"{part}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in found).encode()))
    return at


def words(folder, *more):
    fixed = ("--model", folder / "model", "--rounds", 4, "--batch", 60, "--local-steps", 2, "--rank", 4, "--seeds", 1)
    where = ("--data", folder, "--results", folder / "runs.jsonl", "--workers", 0, "--precision", "float32")
    return list(map(str, (*fixed, *where, *more)))


def test_every_mode_is_measured_once_with_and_without_noise_and_drawn(folder):
    said = []
    asked = words(folder, "--tasks", "one", "--epsilons", 4, math.inf, "--picture", folder / "modes.svg")
    modes.main(asked, say=said.append)
    rows = list(modes.finished(folder / "runs.jsonl").values())
    assert [(row.run.epsilon, row.run.mode) for row in rows] == [
        (e, m) for e in (4.0, math.inf) for m in modes.MODES if e == 4 or m == "joint" or m not in modes.ONE_STEP
    ]
    assert all(0 <= row.accuracy <= 1 for row in rows)
    assert all((row.noise_multiplier > 0) == (row.run.epsilon == 4) for row in rows)
    assert len({round(row.noise_multiplier, 9) for row in rows if row.run.epsilon == 4}) == 1, "the same steps need the same noise"
    assert said[-1].count("\n| one |") == 2
    assert ElementTree.fromstring((folder / "modes.svg").read_text()).tag.endswith("svg")
    before = (folder / "runs.jsonl").read_bytes()
    modes.main(asked, say=said.append)
    assert (folder / "runs.jsonl").read_bytes() == before, "nothing is done twice"


def test_pairs_of_texts_are_a_task_too(folder):
    modes.main(words(folder, "--tasks", "pairs", "--modes", "joint", "--epsilons", 4), say=lambda _: None)
    rows = [row for row in modes.finished(folder / "runs.jsonl").values() if row.run.task == "pairs"]
    assert [row.run.mode for row in rows] == ["joint"]


def test_joint_carries_a_share_more_than_pooled_and_none_more_against_outsiders(folder):
    run = modes.Run(
        data=str(folder), task="one", mode="joint", epsilon=4.0, seed=0, rounds=4, batch=60, model=str(folder / "model"),
        precision="float32",
    )  # fmt: skip
    terms = modes.here(modes.data_of(run)).terms
    share = ring_plan(terms).share_variance
    outside = modes.terms_of(replace(run, mode="joint-0"), terms)
    assert (terms.shares, outside.shares) == (2, 3)
    numbers = 20 * terms.dimension
    for of, count, expected in ((terms, terms.shares, 2.0), (terms, modes.SILOS, 3.0), (outside, modes.SILOS, 2.0)):
        found = np.var(np.concatenate([modes.drawn(of, count) for _ in range(20)]))
        assert abs(found / (expected * share) - 1) < 6 * math.sqrt(2 / numbers) + 1e-3


def test_advice_compares_batches_and_ranks_and_does_no_run_twice(folder, monkeypatch):
    said = []
    monkeypatch.setattr(advice, "RATES", (0.1, 1.0))
    monkeypatch.setattr(advice, "STEPS", (4,))
    words_of = words(
        folder, "--tasks", "one", "--epsilons", 4, "--batches", 30, 60, "--ranks", 2, "--picture", folder / "advice.svg"
    )
    advice.main(words_of, say=said.append)
    shapes = {(row.run.batch, row.run.rank) for row in modes.finished(folder / "runs.jsonl").values() if row.run.rows_tokens}
    assert {(60, 4), (30, 4), (60, 2)} <= shapes
    batches, ranks = (line for line in said if line.startswith("| ε | batch") or line.startswith("| ε | rank"))
    assert batches.startswith("| ε | batch 30 | batch 60 | seeds |")
    assert ranks.startswith("| ε | rank 2 | rank 4 | seeds |")
    assert "–" not in batches + ranks
    before = (folder / "runs.jsonl").read_bytes()
    advice.main(words_of, say=said.append)
    assert (folder / "runs.jsonl").read_bytes() == before
    assert ElementTree.fromstring((folder / "advice.svg").read_text()).tag.endswith("svg")


def test_sigma_falls_with_the_batch_less_than_the_batch_does():
    (small, noisy), (large, calm) = (advice.sigma(8.0, rate, 25) for rate in (0.05, 0.5))
    assert small < large < 10 * small
    assert noisy > calm
