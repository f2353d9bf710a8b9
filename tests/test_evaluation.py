# SPDX-License-Identifier: Apache-2.0
"""Accuracy, and the private linear head that adapters are compared with, on a tiny model with a real tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from privacy import base_model, federation, update_rule
from privacy.errors import ConfigError
from privacy.prg import Randomness
from privacy.update_rule import State
from silo import config, evaluation, membership, training
from silo.home import Home
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
