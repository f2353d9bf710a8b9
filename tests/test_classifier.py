# SPDX-License-Identifier: Apache-2.0
"""The classifier: its flat state, its pooling, what it refuses to be built from, what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from privacy.errors import ConfigError
from silo.learning.classifier import assemble, build
from silo.learning.gradients import Tape, pack, unit_gradients
from tests.tiny_models import MAX_LENGTH, MODULES, classifier, encoder, state, terms, unit


def batch(rows: int = 3, length: int = 8):
    return next(pack([unit(i, [length - i]) for i in range(rows)], lambda _: rows, max_length=MAX_LENGTH))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_write_then_read_is_the_float32_of_the_state(kind: str) -> None:
    model = assemble(encoder(kind), terms(MODULES[kind]))
    assert (model.read() == 0).all()
    assert model.read().dtype == np.float64
    theta = state(model.dimension)
    model.write(theta)
    assert (model.read() == theta.astype(np.float32)).all()


def test_state_is_cores_in_contract_order_then_head_weight_then_bias() -> None:
    modules = list(reversed(MODULES["bert"]))
    model = assemble(encoder("bert"), terms(modules))
    model.write(np.arange(model.dimension, dtype=np.float64))
    assert model.get_submodule("encoder." + modules[0]).R.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert model.get_submodule("encoder." + modules[1]).R[0, 0] == 9
    cores = 9 * len(modules)
    assert model.head.weight[1, 0] == cores + 16
    assert model.head.bias.tolist() == [cores + 48, cores + 49, cores + 50]
    assert model.dimension == cores + 51 == terms(modules).dimension


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros(105, dtype=np.float32), np.full(105, np.nan), np.full(105, 1e39)])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(bad: np.ndarray) -> None:
    model = classifier("bert")
    before = model.read()
    with pytest.raises(ConfigError, match="105 finite"):
        model.write(bad)
    assert (model.read() == before).all()


def test_exactly_cores_and_head_train_and_no_other_byte_moves() -> None:
    model = classifier("bert")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"encoder.{name}.R" for name in MODULES["bert"]} | {"head.weight", "head.bias"}
    frozen = {name: t.clone() for name, t in model.state_dict().items() if name not in trainable}
    unit_gradients(model, batch(), Tape(model.dimension))
    model.write(state(model.dimension, 9))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in frozen.items())


def test_training_mode_stays_off_and_dropout_with_it() -> None:
    model = classifier("bert").train()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(batch()), model(batch()))


def test_assembling_leaves_the_global_generators_alone() -> None:
    made, wanted = encoder("bert"), terms(MODULES["bert"])
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assemble(made, wanted)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_and_head_by_hand(kind: str, pooling: str) -> None:
    model = classifier(kind, pooling)
    row = batch()
    hidden = model.encoder(input_ids=row.input_ids, attention_mask=row.attention_mask).last_hidden_state.detach()
    for index in range(3):
        real = hidden[index, : 8 - index]
        pooled = {"mean": real.mean(dim=0), "cls": real[0], "last": real[-1]}[pooling]
        expected = 0.5 * pooled @ model.head.weight.T + model.head.bias
        assert torch.allclose(model(row)[index], expected, atol=1e-5)


def test_head_starts_at_zero_so_every_class_is_equally_likely() -> None:
    model = assemble(encoder("bert"), terms(MODULES["bert"]))
    assert (model(batch()) == 0).all()
    assert torch.allclose(model.row_losses(batch()), torch.full((3,), float(np.log(3))))


def test_basis_digest_is_a_function_of_the_base_weights() -> None:
    digests = [assemble(encoder("bert", seed), terms(MODULES["bert"])).basis_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 32


def test_other_hidden_size_than_the_contract_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden size is 16, the contract says 24"):
        assemble(encoder("bert"), terms(MODULES["bert"], hidden=24))


def test_further_trainable_is_refused() -> None:
    """R04: the trainable set is exactly the contract's, also when a base model brings a parameter that unfreezes itself."""

    class Stubborn(nn.Parameter):
        def requires_grad_(self, mode: bool = True):
            return super().requires_grad_(True)

    made = encoder("bert")
    made.register_parameter("extra", Stubborn(torch.zeros(2)))
    with pytest.raises(ConfigError, match="number of trainables is 107, the contract says 105"):
        assemble(made, terms(MODULES["bert"]))


@pytest.mark.parametrize("mixer", [nn.BatchNorm1d(16), nn.SyncBatchNorm(16), nn.InstanceNorm1d(16, track_running_stats=True)])
def test_batch_statistics_are_refused_by_name(mixer: nn.Module) -> None:
    made = encoder("bert")
    made.add_module("norm", mixer)
    with pytest.raises(ConfigError, match="influence each other: norm"):
        assemble(made, terms(MODULES["bert"]))


def test_routed_experts_are_refused_by_config() -> None:
    made = encoder("llama")
    made.config.num_local_experts = 8
    with pytest.raises(ConfigError, match="num_local_experts"):
        assemble(made, terms(MODULES["llama"]))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0},
        {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_rotary_embeddings_that_follow_the_longest_batch_are_refused_by_name(rope: dict) -> None:
    made = encoder("llama")
    made.config.rope_parameters = rope
    with pytest.raises(ConfigError, match=r"rope_type is (dynamic|longrope)") as caught:
        assemble(made, terms(MODULES["llama"]))
    assert caught.value.code == "carries-state"


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_fixed_rotary_embeddings_are_accepted(kind: str) -> None:
    made = encoder("llama")
    made.config.rope_parameters = {"rope_type": kind, "factor": 2.0}
    assert assemble(made, terms(MODULES["llama"])).dimension > 0


def test_build_reads_a_local_folder_and_computes_what_the_encoder_computes(tmp_path: Path) -> None:
    made = encoder("bert")
    made.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded, assembled = build(tmp_path, terms(MODULES["bert"])), assemble(made, terms(MODULES["bert"]))
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.basis_digest == assembled.basis_digest
    for model in (loaded, assembled):
        model.write(state(model.dimension))
    assert torch.equal(loaded(batch()), assembled(batch()))


def test_build_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable base model"):
        build(tmp_path / "nowhere", terms(MODULES["bert"]))


def test_build_refuses_a_checkpoint_with_holes(tmp_path: Path) -> None:
    """transformers would fill them with random numbers, different in every silo."""
    made = encoder("bert")
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="lacks 16 weights"):
        build(tmp_path, terms(MODULES["bert"]))


def test_checkpoint_without_a_pooler_is_fine(tmp_path: Path) -> None:
    made = encoder("bert")
    made.pooler = None
    made.save_pretrained(tmp_path)
    assert build(tmp_path, terms(MODULES["bert"])).dimension == 105
