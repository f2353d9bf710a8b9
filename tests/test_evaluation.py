# SPDX-License-Identifier: Apache-2.0
"""Accuracy, and the private linear head that adapters are compared with, on a tiny model with a real tokenizer."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from privacy import base_model, federation, update_rule
from privacy.dp import accounting
from privacy.errors import ConfigError
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import config, membership
from silo.home import Home
from silo.learning import evaluation, training
from tests import tiny_models
from tests.terms import contract_bytes

WORDS = ["[UNK]", "[PAD]", *[f"w{i}" for i in range(58)]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, terms that pin it, and two files of separable records: words 0 to 3 are "a", 29 to 32 are "b"."""
    root = tmp_path_factory.mktemp("evaluation")
    folder = root / "model"
    tiny_models.encoder("bert").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    terms = federation.parse(
        contract_bytes(
            task={"labels": ["a", "b"], "max_length": 16},
            model={"name": str(folder), "digest": base_model.digest(folder), "hidden_size": 16},
            adapter={"rank": 3, "modules": tiny_models.MODULES["bert"]},
            training={"rounds": 25, "learning_rate": 0.1},
            privacy={
                "units": 80,
                "sampling_rate": 0.5,
                "noise_multiplier": 0.5,
                "lattice_bits": 14,
                "unit": "who",
                "max_records_per_unit": 2,
            },
        )
    ).terms
    draw = np.random.default_rng(3)
    for name, count in (("one", 80), ("two", 80), ("held-out", 60)):
        with (root / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                label = int(draw.integers(2))
                text = " ".join(f"w{29 * label + draw.integers(4)}" for _ in range(draw.integers(3, 12)))
                file.write(json.dumps({"text": text, "label": "ab"[label], "who": f"p{i // 2}"}) + "\n")
    return root, terms, evaluation.open_bench(terms, compute=config.Compute(device="cpu", precision="float32"))


def labels(root, name):
    return [json.loads(line)["label"] for line in (root / f"{name}.jsonl").read_text().splitlines()]


def test_every_record_counts_once(world):
    root, _, bench = world
    units = bench.units(root / "held-out.jsonl")
    assert len(units) == 60
    assert {len(unit.rows) for unit in units} == {1}


def test_at_the_initial_state_the_first_label_answers_everything(world):
    root, _, bench = world
    found = labels(root, "held-out")
    assert evaluation.evaluate(bench, None, root / "held-out.jsonl") == found.count("a") / len(found)


def test_accuracy_is_the_share_of_right_records(world):
    root, terms, bench = world
    start = update_rule.initial(terms)
    theta = start.theta.copy()
    theta[-1] = 5.0  # the bias of "b"
    state = State(**{**{f: getattr(start, f) for f in start.__struct_fields__}, "theta": theta})
    found = labels(root, "held-out")
    assert evaluation.evaluate(bench, state, root / "held-out.jsonl") == found.count("b") / len(found)


def test_the_private_head_learns_what_is_separable(world):
    root, _, bench = world
    files = [root / "one.jsonl", root / "two.jsonl"]
    keys = iter(range(1000))

    def replayed():
        return Randomness.from_key(next(keys).to_bytes(32, "big"))

    learned = evaluation.private_head(bench, files, root / "held-out.jsonl", randomness=replayed)
    assert learned > 0.75
    assert 0 <= learned <= 1
    start = evaluation.evaluate(bench, None, root / "held-out.jsonl")
    assert learned > start


def test_head_gradients_are_autograds(world):
    root, _, bench = world
    pooled = evaluation.pool_features(bench, evaluation._training_units(bench, root / "one.jsonl", 0))
    assert pooled.count == 40
    assert len(pooled.labels) == 80
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, generator=generator, requires_grad=True)
    bias = torch.randn(2, generator=generator, requires_grad=True)
    found = evaluation.head_gradients(pooled, weight.detach(), bias.detach(), [3, 17, 5])
    for row, unit in zip(found, (3, 17, 5), strict=True):
        rows = pooled.owner == unit
        loss = torch.nn.functional.cross_entropy(pooled.features[rows] @ weight.T + bias, pooled.labels[rows], reduction="sum")
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, bias))])
        assert torch.allclose(row, wanted, atol=1e-4)


def test_features_are_what_the_classifiers_head_sees(world):
    root, terms, bench = world
    units = bench.units(root / "held-out.jsonl")
    pooled = evaluation.pool_features(bench, units)
    theta = np.zeros(terms.dimension)
    head = tiny_models.state(2 * 16 + 2)
    theta[-head.size :] = head
    bench.model.write(theta)
    weight, bias = torch.from_numpy(head[:32].reshape(2, 16)).float(), torch.from_numpy(head[32:]).float()
    mine = pooled.features @ weight.T + bias
    right = float((mine.argmax(dim=1) == pooled.labels).double().mean())
    assert right == evaluation.accuracy(bench.model, units, terms=terms, rows_tokens=1 << 12)


def test_an_empty_choice_has_no_gradients(world):
    root, _, bench = world
    pooled = evaluation.pool_features(bench, evaluation._training_units(bench, root / "one.jsonl", 0))
    assert evaluation.head_gradients(pooled, torch.zeros(2, 16), torch.zeros(2), []).shape == (0, 34)


def keyed(start):
    """Fresh, replayable randomness for each call."""
    keys = iter(range(start, start + 10_000))
    return lambda: Randomness.from_key(next(keys).to_bytes(32, "big"))


def one_step(terms, pooled, randomness):
    """The lattice sum that one step of the head applied, taken back out of the state after it; and the plan."""
    sgd = msgspec.structs.replace(terms.training, optimizer="sgd", momentum=0.0, learning_rate=1.0, warmup_rounds=0, decay_rounds=0)
    terms = msgspec.structs.replace(evaluation._head_terms(terms, 1.0), training=sgd)
    plan = federation.ring_plan(terms)
    state = evaluation._head_step(terms, pooled, update_rule.initial(terms), randomness)
    return -state.theta * terms.divisor * 2**plan.lattice_bits / terms.privacy.max_grad_norm, plan


def test_every_coordinate_of_a_head_step_has_the_noise_of_the_guarantee(world):
    """σ·C against insiders: h = 2 of 3 shares, on a pool without units, so that nothing else is in the sum."""
    _, terms, _ = world
    nobody = evaluation.Pooled(
        features=torch.zeros(0, 16), labels=torch.zeros(0, dtype=torch.int64), owner=torch.zeros(0, dtype=torch.int64), count=0
    )
    randomness = keyed(1)
    found, plans = zip(*(one_step(terms, nobody, randomness) for _ in range(120)), strict=True)
    values, wanted = np.concatenate(found), 2 * plans[0].share_variance
    assert values.size == 120 * 34
    assert wanted >= (terms.privacy.noise_multiplier * 2 ** plans[0].lattice_bits) ** 2
    assert abs(values.mean()) < 5 * np.sqrt(wanted / values.size)
    assert abs(values.var() / wanted - 1) < 5 * np.sqrt(2 / values.size)


def test_a_head_step_takes_each_unit_with_the_contracts_rate(world):
    """Every unit moves the bias by the same known amount, so the sum says how many were drawn, up to the noise."""
    _, terms, _ = world
    terms = msgspec.structs.replace(terms, privacy=msgspec.structs.replace(terms.privacy, sampling_rate=0.25))
    count, rate = 4000, 0.25
    everybody = evaluation.Pooled(
        features=torch.zeros(count, 16), labels=torch.zeros(count, dtype=torch.int64), owner=torch.arange(count), count=count
    )
    weight, bias = torch.zeros(2, 16), torch.zeros(2)
    assert evaluation.head_gradients(everybody, weight, bias, [7])[0, -2:].tolist() == [-0.5, 0.5]
    randomness = keyed(50_000)
    drawn = []
    for _ in range(12):
        total, plan = one_step(terms, everybody, randomness)
        # Clipped to C = 0.5 the pair (−½, ½) has length C: each side is C/√2.
        drawn.append((total[-1] - total[-2]) / (2 * 2**plan.lattice_bits / np.sqrt(2)))
    spread = np.sqrt(count * rate * (1 - rate))
    assert abs(np.mean(drawn) - count * rate) < 5 * spread / np.sqrt(12)
    assert 0.4 * spread < np.std(drawn) < 2 * spread


def test_the_head_that_a_local_federation_is_compared_with_is_joint_at_the_same_epsilon(world):
    _, terms, _ = world
    training = msgspec.structs.replace(terms.training, mode="local", steps_per_round=5, rounds=6, warmup_rounds=2, decay_rounds=3)
    alone = msgspec.structs.replace(terms, training=training)
    head = evaluation._head_terms(alone, 4.0)
    assert (head.training.mode, head.training.rounds, head.training.steps_per_round) == ("joint", 30, 1)
    assert (head.training.warmup_rounds, head.training.decay_rounds) == (10, 15)
    assert head.training.learning_rate == 4 * training.learning_rate
    assert (head.adapter.modules, head.shares, head.divisor) == ((), 2, 3 * alone.divisor)
    costs = [accounting.certify([federation.mechanism(each)], 1e-5).epsilon for each in (alone, head)]
    assert costs[1] == pytest.approx(costs[0], rel=1e-4)
    assert evaluation._head_terms(terms, 1.0).privacy == terms.privacy


def test_a_lattice_that_fits_one_silo_and_not_a_sum_is_chosen_anew_for_the_head(world):
    _, terms, _ = world
    privacy = msgspec.structs.replace(terms.privacy, units=4000, lattice_bits=19)
    training = msgspec.structs.replace(terms.training, mode="local", steps_per_round=2)
    alone = msgspec.structs.replace(terms, training=training, privacy=privacy)
    assert federation.ring_plan(alone).lattice_bits == 19
    assert federation.ring_plan(evaluation._head_terms(alone, 1.0)).lattice_bits < 19


def test_build_makes_a_contribution_from_a_silos_own_files(world, tmp_path):
    root, terms, _ = world
    config.write_commented(
        tmp_path / "silo.toml",
        name="n",
        organisation="N",
        url="https://x",
        fingerprint="",
        records=str(root / "one.jsonl"),
        epsilon=1,
        delta=1e-6,
        compute=config.Compute(device="cpu", precision="float32"),
    )
    settings, home = config.load(tmp_path / "silo.toml"), Home.create(tmp_path)
    contribute = training.build(home, settings, terms)
    assert contribute(update_rule.initial(terms)).shape == (terms.dimension,)
    membership.check_fit(federation.Accepted(terms=terms, raw=b"", digest=b""), config=settings, home=home)
    other = federation.parse(contract_bytes(model={"name": str(root / "model")}))
    with pytest.raises(ConfigError, match="the contract says"):
        membership.check_fit(other, config=settings, home=home)
