# SPDX-License-Identifier: Apache-2.0
"""A silo's contribution: one clipped gradient per sampled unit, whatever else is in the sample; tiny real models."""

from __future__ import annotations

import ast
import csv
import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import BertConfig, BertModel

from privacy import base_model, update_rule
from privacy.dp import ring
from privacy.errors import ConfigError, MachineError
from privacy.federation import parse, ring_plan
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import config
from silo.home import Home
from silo.learning import training
from silo.learning.classifier import assemble
from silo.learning.training import Contribution
from tests import tiny_models
from tests.sessions import rows, tiny_model, write_rows
from tests.terms import contract_bytes


class Fixed:
    """Words that put exactly the given units into the sample."""

    def __init__(self, chosen):
        self.chosen = set(chosen)

    def uint64(self, count):
        return np.array([0 if i in self.chosen else 2**64 - 1 for i in range(count)], dtype=np.uint64)


@pytest.fixture(scope="module")
def units():
    return [tiny_models.unit(seed, [3 + seed]) for seed in range(8)] + [tiny_models.unit(20, [tiny_models.MAX_LENGTH])]


@pytest.fixture(scope="module")
def terms():
    return tiny_models.terms(tiny_models.MODULES["bert"])


def at(dimension, seed=5):
    zeros = np.zeros(dimension)
    theta = tiny_models.state(dimension, seed)
    return State(applied=1, beta1_power=0.9, beta2_power=0.99, theta=theta, first_moment=zeros, second_moment=zeros)


def contribution(terms, units, chosen=(), rows_tokens=160):
    return Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=rows_tokens, randomness=lambda: Fixed(chosen))


def test_its_own_a_units_vector_does_not_depend_on_the_sample(terms, units):
    state = at(terms.dimension)
    alone = [contribution(terms, units, {i})(state) for i in range(len(units))]
    for chosen in ({0, 1, 2, 3, 4, 5, 6, 7, 8}, {2, 8}, {7, 1, 4}):
        assert np.array_equal(contribution(terms, units, chosen)(state), sum(alone[i] for i in chosen))
    assert not np.array_equal(alone[0], alone[1])


def test_bounded_each_unit_adds_at_most_the_clipping_norm(terms, units):
    state = at(terms.dimension)
    bound = 4**terms.privacy.lattice_bits
    for i in range(len(units)):
        squares = int((contribution(terms, units, {i})(state) ** 2).sum())
        assert 0 < squares <= bound


def test_fresh_poisson_sample_every_call_asks_for_its_own_source(terms, units):
    sources = []

    def source():
        sources.append(Randomness.from_key(bytes([len(sources)]) * 32))
        return sources[-1]

    contribute = Contribution(terms, tiny_models.classifier("bert"), units, rows_tokens=160, randomness=source)
    state = at(terms.dimension)
    drawn = {contribute(state).tobytes() for _ in range(6)}
    assert len(sources) == 6
    assert len(drawn) > 1


def test_clamped_to_the_plan(terms, units, monkeypatch):
    seen = []
    original = ring.clamp
    monkeypatch.setattr(training.ring, "clamp", lambda total, plan: seen.append(plan) or original(total, plan))
    contribution(terms, units, {0})(at(terms.dimension))
    assert seen == [ring_plan(terms)]


def test_empty_sample_gives_zeros(terms, units):
    assert not contribution(terms, units, set())(at(terms.dimension)).any()


@pytest.mark.parametrize("rows_tokens", [1, 40, 4096])
def test_the_size_of_physical_batches_changes_last_bits_at_most(terms, units, rows_tokens):
    state, chosen = at(terms.dimension), {0, 3, 5, 8}
    found = contribution(terms, units, chosen, rows_tokens)(state)
    reference = contribution(terms, units, chosen)(state)
    assert int(np.abs(found - reference).max()) <= 64  # other shapes, other kernels: the last bits of float32


def test_fresh_poisson_sample_is_never_cut(terms):
    many = [tiny_models.unit(seed, [2]) for seed in range(1000)]
    contribute = contribution(terms, many, set(range(1000)), rows_tokens=1024)
    whole = contribute(at(terms.dimension))
    alone = contribution(terms, many, rows_tokens=1024)
    alone.model.write(at(terms.dimension).theta)
    assert np.array_equal(whole, sum(alone.sum(many[start : start + 50]) for start in range(0, 1000, 50)))


def seen_while_starting(terms, units):
    model, seen = tiny_models.classifier("bert"), []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({name: each.tolist() for name, each in kwargs.items()}), with_kwargs=True
    )
    Contribution(terms, model, units, rows_tokens=160, randomness=lambda: Fixed(()))
    return seen


def test_public_layout_no_unit_is_looked_at_while_starting(terms, units):
    seen = seen_while_starting(terms, units)
    assert seen
    assert seen == seen_while_starting(terms, units[:1]) == seen_while_starting(terms, [])


def test_the_number_of_own_units_reaches_the_sampler_and_no_other_figure():
    """In all that a step is made of: nothing is divided by it, scaled with it or written down. Those figures are the contract's."""
    root, found = Path(training.__file__).parents[1], set()
    for name in ("learning/training.py", "learning/local.py", "learning/gradients.py", "upload.py", "round.py", "participation.py"):
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        counts = [node for node in calls if ast.unparse(node.func) == "len" and ast.unparse(node.args[0]).endswith("units")]
        for count in counts:
            around = [node for node in calls if count in node.args]
            found |= {(name, ast.unparse(node.func)) for node in around} or {(name, "by itself")}
    assert found == {("learning/training.py", "poisson")}


def test_its_own_in_a_length_between_the_shortest_and_the_longest():
    """In bfloat16 this shape has slots that matter in the bucket of 32 alone, on machines that multiply bfloat16 natively."""
    modules = [name for name in tiny_models.MODULES["bert"] if "layer.0" in name]
    wide = tiny_models.terms(modules, hidden=96, rank=5, max_length=48)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
        encoder = BertModel(BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.05))
    model = assemble(encoder, wide, precision="bfloat16")
    contribute = Contribution(wide, model, [], rows_tokens=1024, randomness=lambda: Fixed(()))
    model.write(tiny_models.state(wide.dimension, scale=0.05))
    rest, one = [tiny_models.unit(seed, [31]) for seed in range(40)], tiny_models.unit(400, [31])
    assert np.array_equal(contribute.sum([one, *rest]) - contribute.sum(rest), contribute.sum([one]))


def test_where_the_slot_matters_units_go_one_by_one(terms, units, monkeypatch):
    monkeypatch.setattr(training, "check_invariance", lambda *args, **kwargs: False)
    contribute = contribution(terms, units, {0, 1, 8})
    batches = list(contribute._batches(contribute._units[:3]))
    assert [int(batch.unit.max()) for batch in batches] == [0, 0, 0]
    assert [len(batch.labels) for batch in batches] == [terms.privacy.max_records_per_unit] * 3
    assert contribute(at(terms.dimension)).any()


def test_the_state_is_what_the_model_computes_with(terms, units):
    contribute = contribution(terms, units, {0, 1})
    assert not np.array_equal(contribute(at(terms.dimension, 5)), contribute(at(terms.dimension, 6)))
    assert np.array_equal(contribute(at(terms.dimension, 5)), contribute(at(terms.dimension, 5)))


def test_a_model_that_does_not_hold_its_state_is_stopped(terms, units, monkeypatch):
    contribute = contribution(terms, units, {0})
    monkeypatch.setattr(contribute.model, "write", lambda theta: None)
    with pytest.raises(MachineError, match="does not hold"):
        contribute(at(terms.dimension, 9))


def test_an_adapter_that_does_nothing_is_found():
    model = tiny_models.classifier("bert")
    training.check_responds(model, tiny_models.MAX_LENGTH)
    before = model.read()
    layer = next(iter(model.adapter))
    layer.A.zero_()
    with pytest.raises(MachineError, match="1 of"):
        training.check_responds(model, tiny_models.MAX_LENGTH)
    assert np.array_equal(model.read(), before)


def test_nothing_about_the_records_is_logged(terms, units, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("silo.learning.training").debug("heard")
        contribution(terms, units, {0, 1, 2})(at(terms.dimension))
    assert [r.getMessage() for r in caplog.records] == ["heard"]  # of any logger, the root among them
    assert capfd.readouterr() == ("", "")


def test_dry_run_gives_time_and_memory(terms, units):
    timing = contribution(terms, units, {0, 1}).dry_run(update_rule.initial(terms))
    assert timing.seconds_per_round == timing.seconds > 0
    local = msgspec.structs.replace(terms, training=msgspec.structs.replace(terms.training, mode="local", steps_per_round=5))
    alone = contribution(local, units, {0, 1}).dry_run(update_rule.initial(local))
    assert alone.seconds_per_round == 5 * alone.seconds
    assert timing.peak_memory_bytes > 10**7
    assert (timing.device, timing.precision) == ("cpu", "float32")


def test_no_global_generator_is_touched(terms, units):
    before = torch.random.get_rng_state()
    contribution(terms, units, {0})(at(terms.dimension))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("flags", "native"), [("fpu avx512_bf16 amx_bf16", True), ("fp asimd bf16", True), ("fpu avx2 avx512f", False), ("", False)]
)
def test_native_bfloat16(flags, native):
    assert training.native_bfloat16(flags) is native


def test_resolve_takes_what_is_asked_for():
    threads = torch.get_num_threads()
    try:
        device, precision = training.resolve(config.Compute(device="cpu", precision="float32"))
        assert (device.type, precision) == ("cpu", "float32")
        assert torch.get_num_threads() == 1
        if not torch.cuda.is_available():
            with pytest.raises(MachineError, match="no CUDA"):
                training.resolve(config.Compute(device="cuda"))
    finally:
        torch.set_num_threads(threads)


def test_build_refuses_another_base_model(tmp_path, terms):
    tiny_models.encoder("bert").save_pretrained(tmp_path / "model")
    (tmp_path / "r.jsonl").write_text('{"text": "x", "label": "a"}\n')
    config.write_commented(
        tmp_path / "silo.toml",
        name="n",
        organisation="N",
        url="https://x",
        fingerprint="",
        records="r.jsonl",
        epsilon=1,
        delta=1e-6,
        model="model",
    )
    with pytest.raises(ConfigError, match="the contract says"):
        training.build(Home.create(tmp_path), config.load(tmp_path / "silo.toml"), terms)


def test_build_draws_every_sample_from_the_operating_system(tmp_path):
    folder = tiny_model(tmp_path / "model")
    raw = contract_bytes(
        model={"name": str(folder), "digest": base_model.digest(folder), "hidden_size": 16},
        adapter={"rank": 3, "modules": tiny_models.MODULES["bert"]},
        privacy={"lattice_bits": 14, "units": 80},
    )
    terms = parse(raw).terms
    write_rows(tmp_path / "r.jsonl", rows(80))
    config.write_commented(
        tmp_path / "silo.toml", name="n", organisation="N", url="https://x", fingerprint="", records="r.jsonl", epsilon=1,
        delta=1e-6, compute=config.Compute(device="cpu", precision="float32"),
    )  # fmt: skip
    home, settings = Home.create(tmp_path / "home"), config.load(tmp_path / "silo.toml")
    first, second = (training.build(home, settings, terms) for _ in range(2))
    state = at(terms.dimension)
    assert len({first(state).tobytes(), first(state).tobytes(), second(state).tobytes(), second(state).tobytes()}) == 4
    assert first._randomness == second._randomness == Randomness.from_os


@pytest.mark.parametrize("basis", ["weights", "random"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_build_trains_alike_from_json_lines_csv_and_parquet(tmp_path, kind, basis):
    folder = tiny_model(tmp_path / "model", kind)
    raw = contract_bytes(
        model={"name": str(folder), "digest": base_model.digest(folder), "hidden_size": 16},
        adapter={"rank": 3, "modules": tiny_models.MODULES[kind], "basis": basis},
        privacy={"lattice_bits": 14, "units": 80},
    )
    terms = parse(raw).terms
    write_in_every_format(tmp_path / "r", rows(80))
    home, steps = Home.create(tmp_path / "home"), set()
    for name in ("r.jsonl", "r.csv", "r.parquet"):
        config.write_commented(
            tmp_path / "silo.toml", name="n", organisation="N", url="https://x", fingerprint="", records=name, epsilon=1,
            delta=1e-6, compute=config.Compute(device="cpu", precision="float32"),
        )  # fmt: skip
        contribute = training.build(home, config.load(tmp_path / "silo.toml"), terms, randomness=lambda: Fixed({0, 3, 5}))
        (tmp_path / "silo.toml").unlink()
        steps.add(contribute(at(terms.dimension)).tobytes())
    assert len(steps) == 1
    assert any(steps.pop())


def write_in_every_format(stem, records):
    write_rows(stem.with_suffix(".jsonl"), records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stem.with_suffix(".parquet"))
    with stem.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def test_cuda_gets_deterministic_kernels_or_an_error(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    threads = torch.get_num_threads()
    try:
        device, _ = training.resolve(config.Compute(device="cuda", precision="float32"))
        assert device.type == "cuda"
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        training.resolve(config.Compute(device="cuda", precision="float32"))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
