# SPDX-License-Identifier: Apache-2.0
"""A causal language model's loss and gradients: each row's own, of its response alone, by nobody else's leave."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel

from aggregator.draft import Terms, draft
from cli.options import check_kind
from privacy import update_rule
from privacy.errors import ConfigError
from privacy.federation import Model, parse
from privacy.identity.keys import PublicIdentity
from silo import membership
from silo.learning import causal, classifier
from silo.learning.gradients import as_batch, pack
from silo.learning.models import build
from silo.learning.tokens import EncodedUnit
from silo.learning.training import Contribution
from tests import causal_models, tiny_models
from tests.terms import contract_bytes, public

LENGTH, ROWS = 16, 6


@pytest.fixture(scope="module")
def model():
    return causal_models.model()


def losses(model, units, rows=ROWS, length=LENGTH):
    with torch.no_grad():
        return model.row_losses(as_batch(units, length, rows))


def one(ids, prompt, name="x"):
    return EncodedUnit(id=name, rows=((tuple(ids), None, prompt),))


def test_a_rows_loss_is_the_mean_of_its_own_response_tokens_by_the_textbook(model):
    ids, prompt = [5, 9, 4, 30, 31, 7, 2], 3
    with torch.no_grad():
        logits = model(as_batch([one(ids, prompt)], len(ids), 1))[0]
    wanted = -torch.stack([logits[t - 1].log_softmax(0)[ids[t]] for t in range(prompt, len(ids))]).mean()
    assert torch.allclose(losses(model, [one(ids, prompt)])[0], wanted, rtol=1e-5)


def test_one_records_loss_is_the_same_bits_whatever_else_is_in_the_batch(model):
    """The known trap: a mean over the batch's tokens makes every loss depend on all lengths."""
    mine = causal_models.unit(1, [9])
    alone = losses(model, [mine])[0]
    for seed, lengths in ((2, [16]), (3, [2, 5]), (4, [16, 16, 16, 16, 16])):
        assert torch.equal(losses(model, [mine, causal_models.unit(seed, lengths)])[0], alone)


def test_transformers_own_loss_is_what_this_is_not(model):
    whole = causal_models.base()
    model.write(np.zeros(model.dimension))
    try:
        short, long = one([5, 9, 4], 0), one(range(1, 15), 0)
        ids = as_batch([short, long], LENGTH, 2)
        labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
        with torch.no_grad():
            theirs = whole(input_ids=ids.input_ids, attention_mask=ids.attention_mask, labels=labels).loss
        found = losses(model, [short, long], rows=2)
        assert torch.allclose((found[0] * 2 + found[1] * 13) / 15, theirs, rtol=1e-4)
        assert not torch.allclose(found.mean(), theirs, rtol=1e-3)
    finally:
        model.write(tiny_models.state(model.dimension))


def test_prompt_tokens_carry_no_loss(model):
    """Of the logits at a prompt's positions nothing is asked but what follows from the last of them."""
    batch = as_batch([one([5, 9, 4, 30, 31], 3)], 8, 1)
    assert causal.targets(batch).tolist() == [[-100, -100, 30, 31, -100, -100, -100, -100]]
    assert causal.targets(as_batch([one([5, 9], 0)], 4, 1)).tolist() == [[9, -100, -100, -100]]


def test_padding_and_filler_rows_carry_none(model):
    found = losses(model, [one([5, 9, 4, 30], 2)], rows=3)
    assert found[1:].tolist() == [0.0, 0.0]
    batch = as_batch([one([5, 9, 4, 30], 2)], LENGTH, 1)
    other = dataclasses.replace(batch, input_ids=torch.where(batch.attention_mask == 0, 17, batch.input_ids))
    with torch.no_grad():
        assert torch.equal(model.row_losses(other), found[:1])


def test_logits_in_pieces_give_the_losses_and_gradients_of_the_whole(model, monkeypatch):
    units = [causal_models.unit(seed, [11, 4]) for seed in range(3)]
    whole, grads = losses(model, units), tiny_models.gradients(model, units)
    monkeypatch.setattr(causal, "LOGITS", 5 * ROWS * 60)
    assert torch.allclose(losses(model, units), whole, rtol=1e-5)
    assert tiny_models.relative(tiny_models.gradients(model, units), grads) <= 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_units_gradient_is_the_sum_of_its_records_by_ordinary_autograd(precision):
    model = causal_models.model(precision=precision)
    units = [causal_models.unit(seed, lengths) for seed, lengths in enumerate(([5], [13, 4], [2, 9, 24]))]
    for unit in units:
        (found,) = tiny_models.gradients(model, [unit])
        assert tiny_models.relative(found, tiny_models.by_autograd(model, unit)) <= (1e-4 if precision == "float32" else 0.1)


def test_only_the_matrices_train_and_there_is_no_head(model):
    terms = causal_models.terms()
    assert terms.dimension == len(causal_models.MODULES) * 9 == model.dimension
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == terms.dimension
    assert update_rule.initial(terms).theta.shape == (terms.dimension,)
    changed = model.read()
    assert np.array_equal(changed, tiny_models.state(model.dimension).astype(np.float32))


def test_an_untrained_model_computes_what_the_base_model_computes():
    made = causal.assemble(causal_models.base(), causal_models.terms())
    batch = as_batch([one(range(1, 12), 0)], LENGTH, 1)
    with torch.no_grad():
        wanted = causal_models.base()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert torch.allclose(made(batch)[:, :11], wanted[:, :11], rtol=1e-4, atol=1e-5)


def test_a_step_is_clipped_and_the_same_for_a_unit_in_any_sample(model):
    """What a contribution starts with passes: batch-mates change nothing, every matrix answers."""
    terms = causal_models.terms()
    units = [causal_models.unit(seed, [3 + seed, 9]) for seed in range(5)]
    contribute = Contribution(terms, model, units, rows_tokens=160)
    alone = [contribute.sum([each]) for each in units]
    assert np.array_equal(contribute.sum(units), sum(alone))
    assert all(0 < int((each**2).sum()) <= 4**terms.privacy.lattice_bits for each in alone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {"labels": ["a", "b"]}}, "task.labels"),
        ({"task": {"text_pair": True}}, "task.text_pair"),
        ({"task": {"format": None}}, "without task.format"),
        ({"task": {"format": "chatml"}}, "format"),
        ({"model": {"pooling": "last"}}, "model.pooling"),
        ({"adapter": {"head_scale": 0.5}}, "adapter.head_scale"),
        ({"adapter": {"modules": []}}, "without adapter.modules"),
        ({"adapter": {"basis": "public"}}, "adapter.basis = public"),
    ],
)
def test_a_key_that_does_not_fit_the_kind_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        causal_models.terms(**change)


def test_a_classification_has_no_format_and_needs_labels():
    with pytest.raises(ConfigError, match=r"task\.format = text"):
        parse(contract_bytes(task={"format": "text"}))
    with pytest.raises(ConfigError, match="labels"):
        parse(contract_bytes(task={"labels": None}))


@pytest.mark.parametrize(
    ("kind", "labels", "form", "of_texts"),
    [
        ("causal-lm", "", "", False), ("causal-lm", "no,yes", "text", False), ("causal-lm", "", "text", True),
        ("text-classification", "", "", False), ("text-classification", "no,yes", "text", False), ("regression", "a,b", "", False),
    ],
)  # fmt: skip
def test_the_command_line_asks_for_what_a_kind_needs_and_for_nothing_else(kind, labels, form, of_texts):
    with pytest.raises(typer.BadParameter):
        check_kind(kind, labels=labels, form=form, of_texts=of_texts)
    check_kind("causal-lm", labels="", form="text", of_texts=False)
    check_kind("text-classification", labels="no,yes", form="", of_texts=True)


def test_a_draft_of_this_kind_says_what_it_learns_and_is_a_contract(tmp_path: Path):
    """Every key of the draft; the tables of people are the template's."""
    model = Model(name="tiny", digest="00" * 32, hidden_size=16)
    drafted = draft(
        Terms(
            name="trial", expires="2099-12-31", kind="causal-lm", format="messages", model=model, modules=causal_models.MODULES,
            units=60, rounds=3, noise_multiplier=2.0, lattice_bits=12, rank=4,
        ),
        PublicIdentity(name="hub", sign_key=bytes.fromhex(public(100)), seal_key=bytes(1216)),
    )  # fmt: skip
    members = "[[member]]" + contract_bytes().decode().split("[[member]]", 1)[1]
    found = parse(f"{drafted}\n{members}".encode()).terms
    assert (found.task.kind, found.task.format, found.task.labels) == ("causal-lm", "messages", ())
    assert "pooling" not in drafted
    assert "head_scale" not in drafted


def test_a_silo_agrees_to_what_is_learned_in_words():
    said = "\n".join(membership.terms_in_words(parse(contract_bytes(**causal_models.changes()))))
    assert "task: causal-lm of records as prompt-response: the response alone is learned, within 40 tokens" in said


def test_an_encoder_is_no_causal_language_model():
    """BERT has a class of this kind, and every one of its tokens sees the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertLMHeadModel(BertConfig(**tiny_models.SIZES, max_position_embeddings=64, initializer_range=0.3))
    with pytest.raises(ConfigError, match="cannot be trained as a causal language model"):
        causal.assemble(bert, causal_models.terms(adapter={"modules": tiny_models.MODULES["bert"]}))


def test_logits_that_are_another_function_of_the_hidden_states_are_refused():
    scaled = causal_models.base("granite", {**causal_models.SIZES, "logits_scaling": 4.0})
    with pytest.raises(ConfigError, match="another function"):
        causal.assemble(scaled, causal_models.terms())


def test_a_folder_without_an_output_layer_is_refused(tmp_path: Path):
    tiny_models.encoder("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks 1 weights, the first is lm_head"):
        causal.build(tmp_path, causal_models.terms())


def test_the_kind_of_task_decides_on_the_model(tmp_path: Path):
    folder = causal_models.folder(tmp_path)
    assert isinstance(build(folder, causal_models.terms()), causal.CausalModel)
    assert isinstance(build(folder, tiny_models.terms(causal_models.MODULES)), classifier.Classifier)


def test_a_response_of_equal_tokens_costs_the_same_per_token_however_long(model):
    """The mean makes a record's loss comparable: at a uniform model it is log of the vocabulary for every length."""
    uniform = causal.assemble(causal_models.base(), causal_models.terms())
    with torch.no_grad():
        uniform.output.weight.zero_()
    found = losses(uniform, [one(range(1, n), 0) for n in (4, 9, 17)])
    assert torch.allclose(found[:3], torch.full((3,), math.log(60)))


def test_packing_never_joins_two_records_in_a_row():
    units = [causal_models.unit(seed, [4, 3]) for seed in range(4)]
    for batch in pack(units, lambda _: 4, max_length=40):
        assert batch.attention_mask.sum(dim=1).tolist() == [4, 3, 4, 3]
        assert functional.relu(batch.labels).tolist() == [1, 1, 1, 1]
