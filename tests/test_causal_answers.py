# SPDX-License-Identifier: Apache-2.0
"""Evaluating a causal language model: loss per token, choices by likelihood, responses written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from privacy import base_model, federation, update_rule
from privacy.errors import ConfigError, RecordsError
from silo.config import Compute
from silo.learning import answers, evaluation
from silo.learning.answers import Question
from tests import causal_models, sessions
from tests.terms import contract_bytes

EXACT = Compute(device="cpu", precision="float32")


def opened(folder: Path, **task) -> evaluation.Bench:
    changed = causal_models.changes(model={"name": str(folder), "digest": base_model.digest(folder)}, task=task)
    return evaluation.open_bench(federation.parse(contract_bytes(**changed)).terms, compute=EXACT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return causal_models.folder(tmp_path_factory.mktemp("answers") / "model")


@pytest.fixture(scope="module")
def bench(folder):
    return opened(folder)


def log_likelihood(bench, prompt: list[int], response: list[int]) -> float:
    """By the textbook: the sum of the log-probabilities of the response's tokens, by the plain model."""
    with torch.no_grad():
        logits = bench.model.logits(bench.model.encoder(input_ids=torch.tensor([prompt + response])).last_hidden_state)[0]
    places = range(len(prompt), len(prompt) + len(response))
    return sum(float(logits[t - 1].log_softmax(0)[(prompt + response)[t]]) for t in places)


def numbers(text: str) -> list[int]:
    return [causal_models.WORDS.index(word) for word in text.split()]


def test_the_loss_is_per_response_token_over_all_records(bench, tmp_path):
    rows = [{"prompt": "w1 w2", "response": "w3"}, {"prompt": "w4", "response": "w5 w6 w7 w8"}]
    found = evaluation.likelihood(bench, None, sessions.write_rows(tmp_path / "r.jsonl", rows))
    each = [log_likelihood(bench, numbers(f"<s> {r['prompt']}"), numbers(f"{r['response']} </s>")) for r in rows]
    assert found.tokens == 2 + 5
    assert found.loss == pytest.approx(-sum(each) / 7, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_the_likeliest_choice_is_the_one_with_the_largest_log_likelihood(bench):
    choices = ("w3", "w9 w10 w11", "w5 w6")
    likelihoods = [log_likelihood(bench, numbers("<s> w1"), numbers(f"{choice} </s>")) for choice in choices]
    per_token = [found / (len(choice.split()) + 1) for found, choice in zip(likelihoods, choices, strict=True)]
    best, best_per_token = int(np.argmax(likelihoods)), int(np.argmax(per_token))
    for answer in range(3):
        question = Question(prompt="w1", choices=choices, answer=answer)
        assert answers.choose(bench, None, [question]) == (float(answer == best), float(answer == best_per_token))


def test_what_is_written_is_the_likeliest_token_each_time_and_matches_itself(bench, tmp_path):
    prompt = numbers("<s> w1 w2")
    end = causal_models.WORDS.index("</s>")
    written = answers.written_after(bench.causal, prompt, most=4, ends={end})
    so_far = list(prompt)
    for token in written:
        with torch.no_grad():
            logits = bench.model.logits(bench.model.encoder(input_ids=torch.tensor([so_far])).last_hidden_state)[0, -1]
        assert int(logits.argmax()) == token
        so_far.append(token)
    said = " ".join(causal_models.WORDS[token] for token in written)
    rows = [{"prompt": "w1 w2", "response": said}, {"prompt": "w1 w2", "response": said + " w9"}]
    assert answers.exact_matches(bench, None, sessions.write_rows(tmp_path / "r.jsonl", rows), 4) == 0.5


def test_writing_stops_at_the_end_of_text(bench):
    prompt = numbers("<s> w1 w2")
    first, *_ = answers.written_after(bench.causal, prompt, most=1, ends=())
    assert answers.written_after(bench.causal, prompt, most=3, ends={first}) == []


def test_answers_need_prompts_and_the_right_kind_of_task(folder, tiny_bert, tmp_path):
    with pytest.raises(ConfigError, match="without prompt and response"):
        answers.choose(opened(folder, format="text"), None, [Question(prompt="w1", choices=("w2", "w3"), answer=0)])
    described = base_model.describe(tiny_bert)
    model = {"name": str(tiny_bert), "digest": base_model.digest(tiny_bert), "hidden_size": described.hidden_size}
    modules = list(base_model.match_modules(described, ["query"]))
    classifier = evaluation.open_bench(federation.parse(contract_bytes(model=model, adapter={"modules": modules})).terms)
    with pytest.raises(ConfigError, match="this is for causal language models"):
        answers.choose(classifier, None, [Question(prompt="w1", choices=("w2", "w3"), answer=0)])
    with pytest.raises(ConfigError, match="this is for causal language models"):
        evaluation.likelihood(classifier, None, tmp_path)


def test_a_private_head_is_for_classifiers(bench, tmp_path):
    path = sessions.write_rows(tmp_path / "r.jsonl", causal_models.rows(3))
    with pytest.raises(ConfigError, match="this is for text classification"):
        evaluation.private_head(bench, [path], path)


def test_a_conversation_is_answered_through_the_chat_template(folder):
    talking = opened(folder, format="messages")
    question = Question(prompt="w1 w2", choices=("w3", "w4"), answer=1)
    prompt = numbers("<|user|> w1 w2 <|end|> <|assistant|>")
    each = [log_likelihood(talking, prompt, numbers(f"{choice} <|end|>")) for choice in question.choices]
    assert answers.choose(talking, None, [question])[0] == float(each[1] > each[0])


def test_the_state_decides_on_the_figures(bench, tmp_path):
    path = sessions.write_rows(tmp_path / "r.jsonl", causal_models.rows(3))
    state = update_rule.initial(bench.terms)
    state.theta[:] = 0.5
    before, after = (evaluation.measure(bench, each, path, "x") for each in (None, state))
    assert before["loss_x"] != after["loss_x"]
    assert set(before) == {"loss_x", "perplexity_x"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "two or more"),
        ({"prompt": "a", "choices": "bc", "answer": 0}, "two or more"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "no place in the list of 2"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "no place in the list of 2"),
        ({"prompt": "a", "choices": ["b", ""], "answer": 0}, '"choice" is empty'),
        ({"choices": ["b", "c"], "answer": 0}, '"prompt" is missing'),
    ],
)
def test_a_question_that_cannot_be_used_is_refused_with_its_line(tmp_path, row, said):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordsError, match=said) as caught:
        answers.read_questions(path)
    assert "questions.jsonl:1:" in str(caught.value)
