# SPDX-License-Identifier: Apache-2.0
"""Records of a causal language model: read strictly, encoded each by itself, a prompt and a response that never run together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from privacy import base_model
from privacy.errors import ConfigError, RecordsError
from privacy.federation import Privacy, Task
from silo.learning import completions, records, tokens
from silo.learning.completions import encoded
from silo.learning.records import Record, Unit
from tests import causal_models
from tests.causal_models import WORDS

BOS, EOS, USER, ASSISTANT, END = (WORDS.index(word) for word in ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"))
PRIVACY = Privacy(
    units=100, sampling_rate=0.1, max_grad_norm=1.0, noise_multiplier=1.0, epsilon=8.0, delta=1e-5, lattice_bits=10,
    max_records_per_unit=4, unit="who",
)  # fmt: skip
ANSWER = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def task(form: str, max_length: int = 12) -> Task:
    return Task(kind="causal-lm", format=form, max_length=max_length)


def w(*numbers: int) -> tuple[int, ...]:
    """The token numbers of the words w0, w1, ..."""
    return tuple(WORDS.index(f"w{number}") for number in numbers)


def rows(form: str, *texts: tuple[str, ...], max_length: int = 12, **options: Any) -> list[tuple[tuple[int, ...], None, int]]:
    made = [Record(texts=each, label=0) for each in texts]
    return encoded(made, causal_models.tokenizer(**options), task(form, max_length))


def read(tmp_path: Path, form: str, *lines: dict[str, Any]) -> tuple[Unit, ...]:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"who": "a", **line}) + "\n" for line in lines))
    return records.load(path, task(form), PRIVACY, selection_key=bytes(32))


def test_a_text_is_learned_whole_with_its_end():
    assert rows("text", ("w1 w2 w3",)) == [((BOS, *w(1, 2, 3), EOS), None, 1)]


def test_a_response_follows_its_prompt_and_the_prompt_is_counted():
    assert rows("prompt-response", ("w1 w2", "w3 w4")) == [((BOS, *w(1, 2, 3, 4), EOS), None, 3)]


def test_the_prompt_is_encoded_as_it_is_at_generation():
    """However it goes on: the response is encoded apart from it."""
    (one,), (other,) = rows("prompt-response", ("w1 w2", "w3")), rows("prompt-response", ("w1 w2", "w4 w5"))
    alone = tuple(causal_models.tokenizer()("w1 w2")["input_ids"])
    assert one[0][: one[2]] == other[0][: other[2]] == alone


def test_a_conversation_is_written_by_the_models_own_template_which_ends_it():
    assert rows("messages", ("user", "w1 w2", "assistant", "w3")) == [
        ((USER, *w(1, 2), END, ASSISTANT, *w(3), END), None, 5)
    ]  # fmt: skip


def test_of_a_longer_conversation_the_last_answer_is_learned():
    (row,) = rows("messages", ("user", "w1", "assistant", "w2", "user", "w3", "assistant", "w4"))
    assert row[0][row[2] :] == (*w(4), END)
    assert row[0][row[2] - 1] == ASSISTANT


def test_a_long_response_is_cut_on_the_right_and_loses_its_end():
    ((ids, _, prompt),) = rows("prompt-response", ("w1", "w2 " * 30), max_length=6)
    assert (ids, prompt) == ((BOS, *w(1, 2, 2, 2, 2)), 2)


def test_a_prompt_that_leaves_no_room_for_its_response_is_counted_and_never_quoted():
    with pytest.raises(RecordsError, match="2 of 3 records leave no token of a response within 6 tokens") as caught:
        rows("prompt-response", ("w1 " * 5, "w2"), ("w1", "w2"), ("w1 " * 9, "w2"), max_length=6)
    assert caught.value.hint
    assert "w1" not in str(caught.value)
    (kept,) = rows("prompt-response", ("w1 " * 4, "w2"), max_length=6)
    assert len(kept[0]) - kept[2] == 1, "one token of the response is enough"


def test_a_record_is_encoded_the_same_beside_any_others(tmp_path: Path):
    folder = causal_models.folder(tmp_path)
    mine = Unit(id="a", records=(Record(texts=("w1", "w2"), label=0),))
    long = Unit(id="b", records=(Record(texts=("w1 w5 w6", "w2 " * 40), label=0),))
    alone = tokens.encode([mine], folder, task("prompt-response"))
    assert tokens.encode([long, mine], folder, task("prompt-response"))[1:] == alone


def test_a_model_without_a_chat_template_is_refused_for_messages():
    with pytest.raises(ConfigError, match="no chat template") as caught:
        rows("messages", ("user", "w1", "assistant", "w2"), template=None)
    assert "prompt-response" in caught.value.hint


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(ConfigError, match="no end-of-text token"):
        rows("text", ("w1",), eos=None)


def test_a_template_that_refuses_or_rewrites_a_conversation_is_said_so():
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + causal_models.CHAT
    with pytest.raises(RecordsError, match="refuses 1 of 1 conversations"):
        rows("messages", ("system", "w1", "user", "w1", "assistant", "w2"), template=picky)
    with pytest.raises(ConfigError, match="does not begin a conversation"):
        rows("messages", ("user", "w1", "assistant", "w2"), template="{{ messages | length }}" + causal_models.CHAT)


def test_a_template_that_writes_the_day_writes_the_same_day_always():
    dated = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} " + causal_models.CHAT
    record = Record(texts=("user", "w1", "assistant", "w2"), label=0)
    (prompt,), (response,) = completions._rendered([record], causal_models.tokenizer(dated))
    assert prompt == "\n26 Jul 2024 <|user|> w1 <|end|> <|assistant|> "
    assert response == "w2 <|end|> "


def test_the_chat_template_is_part_of_the_base_models_digest(tmp_path: Path):
    folder = causal_models.folder(tmp_path)
    assert (folder / "chat_template.jinja").is_file(), "where transformers keeps it today"
    before = base_model.digest(folder)
    (folder / "chat_template.jinja").write_text(causal_models.CHAT + " ")
    assert base_model.digest(folder) != before


def test_rows_become_records_by_the_format(tmp_path: Path):
    assert read(tmp_path, "text", {"text": "w1"})[0].records == (Record(texts=("w1",), label=0),)
    assert read(tmp_path, "prompt-response", {"prompt": "w1", "response": "w2", "label": "passed over"})[0].records == (
        Record(texts=("w1", "w2"), label=0),
    )
    assert read(tmp_path, "messages", {"messages": ANSWER})[0].records == (
        Record(texts=("user", "w1 w2", "assistant", "w3"), label=0),
    )


def test_csv_has_prompts_and_responses_too(tmp_path: Path):
    path = tmp_path / "records.csv"
    path.write_text('who,prompt,response\na,"w1, w2",w3\n')
    (unit,) = records.load(path, task("prompt-response"), PRIVACY, selection_key=bytes(32))
    assert unit.records == (Record(texts=("w1, w2", "w3"), label=0),)


@pytest.mark.parametrize(
    ("form", "line", "said"),
    [
        ("text", {}, 'the field "text" is missing'),
        ("text", {"text": "w1", "response": "w2"}, 'the field "response" does not go with format = "text"'),
        ("prompt-response", {"prompt": "w1"}, 'the field "response" is missing'),
        ("prompt-response", {"prompt": " ", "response": "w2"}, '"prompt" is empty'),
        ("prompt-response", {"prompt": "w1", "response": 2}, '"response" is int'),
        ("messages", {"messages": "w1"}, "no list of two or more"),
        ("messages", {"messages": ANSWER[:1]}, "no list of two or more"),
        ("messages", {"messages": [*ANSWER, ANSWER[0]]}, "last message is not the assistant's"),
        ("messages", {"messages": [{"role": "user", "content": "w1", "name": "x"}, ANSWER[1]]}, "message 1 is not of a role"),
        ("messages", {"messages": [{"role": "user", "content": ["w1"]}, ANSWER[1]]}, '"content" is list'),
    ],
)
def test_a_row_that_does_not_fit_the_format_is_refused_with_its_line(tmp_path: Path, form: str, line: dict[str, Any], said: str):
    with pytest.raises(RecordsError, match=said) as caught:
        read(tmp_path, form, line)
    assert "records.jsonl:1:" in str(caught.value)
    assert caught.value.hint
