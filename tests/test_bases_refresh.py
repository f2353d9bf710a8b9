# SPDX-License-Identifier: Apache-2.0
"""Bases that change during a run: merging keeps the function, each variant does what it says; and what a basis holds is told."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math

import msgspec
import numpy as np
import pytest
import torch

from benchmarks import bases, basis_runs, basis_signal, basis_training, refresh
from privacy import update_rule
from privacy.errors import ConfigError
from silo.config import Compute
from silo.learning import basis
from silo.learning.gradients import as_batch
from silo.learning.lora_sb import matrix
from silo.learning.training import Contribution
from tests import sessions, tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("refresh")
    sessions.tiny_model(at / "model")
    (at / "one").mkdir()
    for part, rows in (("train", sessions.rows(60)), ("test", sessions.rows(20, start_at=300))):
        (at / "one" / f"{part}.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return at


def words(folder, *more):
    fixed = ("--tasks", "one", "--model", folder / "model", "--rank", 4, "--rounds", 4, "--batch", 60, "--epsilons", 8)
    where = ("--data", folder, "--results", folder / "runs.jsonl", "--workers", 0, "--precision", "float32", "--seeds", 1)
    return list(map(str, (*fixed, *where, *more)))


def run_of(folder, basis, *more):
    (run,) = bases.grid(bases.parser().parse_args(words(folder, "--bases", basis, *more)))
    return run


def logits(model):
    batch = as_batch([tiny_models.unit(seed, [8]) for seed in range(6)], 8, 6)
    with torch.no_grad():
        return model(batch)


def test_merging_and_another_basis_change_no_logits():
    model = tiny_models.classifier("bert")
    before, plain = logits(model), logits(tiny_models.assemble(tiny_models.encoder("bert"), model_terms()))
    moved = tiny_models.relative(before, plain + 1e-9)
    assert moved > 0.01, "the adapter did something that merging could lose"
    refresh.merge(model)
    assert all(not layer.R.any() for layer in model.adapter)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    weights = {name: matrix(layer.base).double().numpy() for name, layer in zip(model.adapter.names, model.adapter, strict=True)}
    made = {name: basis.weights_basis(weight, 3) for name, weight in weights.items()}
    old = [layer.A.clone() for layer in model.adapter]
    refresh.rebase(model, made)
    assert not any(torch.equal(layer.A, each) for layer, each in zip(model.adapter, old, strict=True))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def model_terms():
    return tiny_models.terms(tiny_models.MODULES["bert"])


def test_a_refresh_restarts_every_r_and_keeps_the_head_and_the_function():
    model, terms = tiny_models.classifier("bert"), model_terms()
    theta = model.read()
    state = msgspec.structs.replace(
        update_rule.initial(terms), applied=3, beta1_power=0.7, theta=theta, first_moment=theta + 1, second_moment=theta**2 + 1
    )
    before = logits(model)
    same = {
        name: (layer.B.numpy().copy(), layer.A.numpy().copy())
        for name, layer in zip(model.adapter.names, model.adapter, strict=True)
    }
    after = refresh.refreshed(model, state, lambda _: {name: (b[:, ::-1].copy(), a[::-1].copy()) for name, (b, a) in same.items()})
    cores = model.adapter.dimension
    for name in ("theta", "first_moment", "second_moment"):
        assert not getattr(after, name)[:cores].any()
        assert np.array_equal(getattr(after, name)[cores:], getattr(state, name)[cores:])
        assert getattr(state, name)[:cores].any(), "the old state is as it was"
    assert (after.applied, after.beta1_power) == (3, 0.7)
    model.write(after.theta)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_refresh_is_due_between_rounds_and_never_where_n_is_the_whole_run(folder, monkeypatch):
    assert [done for done in range(7) if refresh.is_due(2, done)] == [2, 4, 6]
    assert not any(refresh.is_due(0, done) for done in range(9))
    seen = []
    real = refresh.refreshed
    monkeypatch.setattr(refresh, "refreshed", lambda *args: seen.append(1) or real(*args))
    for name, times in (("weights~4", 0), ("weights~99", 0), ("weights~2", 1), ("random~1", 3)):
        basis_training.measured(run_of(folder, name), folder / "cache", Compute())
        assert len(seen) == times, name
        seen.clear()


def test_a_random_basis_is_another_at_each_refresh_and_by_seed(folder):
    run = run_of(folder, "random~2")
    here = basis_runs.dealt(basis_runs.data_of(run))
    plain = basis_runs.bases_of(run_of(folder, "random"), here, folder, Compute())
    made = [basis_runs.random_of(each, here, again) for each in (run, dataclasses.replace(run, seed=1)) for again in (0, 1)]
    digests = [basis.digest(each) for each in made]
    assert digests[0] == basis.digest(plain)
    assert len(set(digests)) == 4


def test_the_first_rounds_move_the_head_alone_and_the_basis_is_of_its_gradients(folder):
    run = run_of(folder, "raw@2")
    here, (terms, _) = basis_runs.dealt(basis_runs.data_of(run)), basis_runs.planned(run)
    model = basis_training.classifier.build(here.folder, refresh.without_adapters(terms))
    contribution = Contribution(refresh.without_adapters(terms), model, here.train, rows_tokens=256)
    step = functools.partial(basis_training.stepped, terms=terms, noised=True)
    state = refresh.head_first(contribution, update_rule.initial(terms), 2, step)
    cores = terms.dimension - model.dimension
    assert cores > 0
    assert state.applied == 2
    assert not state.theta[:cores].any()
    assert state.theta[cores:].all()
    found = [basis_runs.bases_of(run, here, folder / "late", Compute(), each) for each in (None, state)]
    assert basis.digest(found[0]) != basis.digest(found[1])
    sketched = basis_runs.sketches.build(here.folder, terms, basis_runs.layout_of(run, here))
    refresh.put_head(sketched, state.theta)
    assert np.array_equal(np.append(sketched.head.weight.flatten(), sketched.head.bias), state.theta[cores:].astype(np.float32))


def test_a_late_basis_costs_what_an_early_one_costs(folder):
    early, late = (basis_runs.planned(run_of(folder, name)) for name in ("private", "private@2"))
    assert early == late
    row = basis_training.measured(run_of(folder, "private@2"), folder / "cache", Compute())
    assert row.spent == early[1] <= 8
    assert basis_training.measured(run_of(folder, "raw@2"), folder / "cache", Compute()).spent == math.inf


def test_scale_and_rate_are_of_one_basis_and_part_of_the_run(folder, tmp_path):
    asked = words(folder, "--bases", "weights", "random", "--scales", "random=16", "--rates", "random=0.01")
    plain, other = bases.grid(bases.parser().parse_args(asked))
    assert (plain.scale, plain.learning_rate) == (basis_runs.Run.scale, basis_runs.Run.learning_rate)
    assert (other.scale, other.learning_rate) == (16.0, 0.01)
    terms, _ = basis_runs.planned(other)
    assert (terms.adapter.scale, terms.training.learning_rate) == (16.0, 0.01)
    assert terms.privacy == basis_runs.planned(plain)[0].privacy
    row = basis_training.measured(plain, folder / "cache", Compute())
    stated = dataclasses.asdict(row)
    del stated["run"]["scale"]  # as a file of results has it that is older than the field
    (tmp_path / "old.jsonl").write_text(json.dumps(stated) + "\n", encoding="utf-8")
    assert bases.finished(tmp_path / "old.jsonl") == {plain: row}
    assert "| weights | 4 | 0.04 |" in bases.table([row])[-1]


@pytest.mark.parametrize("name", ["private~2", "weights@2", "random~0", "private@2~2", "random:0", "public@1", "private@4"])
def test_a_variant_that_makes_no_sense_is_refused(folder, name):
    with pytest.raises(ConfigError, match=r"no basis|rounds of the head alone"):
        run_of(folder, name)


@pytest.mark.parametrize("words_", [["random=4"], ["weights=x"], ["weights=0"], ["weights"], ["weights=inf"]])
def test_a_scale_of_nothing_is_refused(folder, words_):
    with pytest.raises(ConfigError, match="positive number"):
        run_of(folder, "weights", "--scales", *words_)


def test_what_a_basis_holds_is_told_for_each_scale(folder):
    said = []
    where = ("--data", folder, "--task", "one", "--model", folder / "model", "--precision", "float32", "--rank", 4)
    basis_signal.main([*map(str, where), "--count", "40", "--scales", "1", "4"], say=said.append)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said[2:]]
    assert [(row[0], row[2]) for row in rows] == [(name, scale) for name in ("weights", "random", "raw", "late") for scale in "14"]
    energy = {row[0]: float(row[1].removesuffix(" %")) for row in rows}
    assert 0 <= energy["random"] < energy["late"] <= 100, "the gradient's own directions hold more than those of a seed"


def test_chance_in_one_half_has_no_square_in_a_product():
    drawn = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal((400, 900)))
    assert float(drawn.mean(dim=0).square().sum()) > 2
    assert abs(basis_signal.product(drawn, drawn)) < 0.75  # five standard deviations: 5 · √900 / 200
    assert basis_signal.product(drawn + 1, drawn + 1) == pytest.approx(900, rel=0.02)
