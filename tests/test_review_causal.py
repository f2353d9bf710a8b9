# SPDX-License-Identifier: Apache-2.0
"""What a hostile reading of causal language models found: files outside the digest, templates that fail, answers that never end."""

from __future__ import annotations

import json
import resource
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import processors

from cli.options import check_kind
from privacy import base_model, federation, update_rule
from privacy.errors import ConfigError, MachineError, RecordsError
from privacy.federation import Task
from silo.config import Compute
from silo.learning import answers, card, causal, completions, evaluation, export, tokens, training
from silo.learning.answers import Question
from silo.learning.card import Origin
from silo.learning.evaluation import Bench
from silo.learning.gradients import PhysicalBatch
from silo.learning.records import Record, Unit
from tests import causal_models, sessions
from tests.terms import contract_bytes
from tests.test_causal_export import SPENT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return causal_models.folder(tmp_path / "model")


def bench_of(folder: Path, **task: object) -> tuple[Bench, Origin]:
    """The model of a contract around the base model in ``folder``, and where an export of its first state comes from."""
    described = base_model.describe(folder)
    model = {"name": str(folder), "digest": base_model.digest(folder), "hidden_size": described.hidden_size}
    accepted = federation.parse(contract_bytes(**causal_models.changes(model=model, task=task)))
    bench = evaluation.open_bench(accepted.terms, compute=Compute(device="cpu", precision="float32"))
    state = update_rule.initial(accepted.terms)
    return bench, Origin(accepted=accepted, silo="north", round=0, state=state, spent=SPENT, base=str(folder))


def changed(path: Path, **more: object) -> None:
    """The JSON object in ``path`` with some keys more."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_every_chat_template_that_is_loaded_enters_the_digest(folder: Path, name: str) -> None:
    """transformers also reads a folder of templates, and one called "default" goes before chat_template.jinja."""
    before = base_model.digest(folder)
    beside = folder / "additional_chat_templates" / f"{name}.jinja"
    beside.parent.mkdir()
    beside.write_text("one")
    assert tokens.load(folder).chat_template[name] == "one" if name != "default" else tokens.load(folder).chat_template == "one"
    first = base_model.digest(folder)
    beside.write_text("two")
    assert len({before, first, base_model.digest(folder)}) == 3


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "transformers_weights", "other.safetensors"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.json", "tokenizer.4.0.0.json"]),
    ],
)
def test_a_folder_that_has_transformers_load_undigested_files_is_refused(folder: Path, file: str, key: str, value: object) -> None:
    """Two folders of one digest could hold other weights, or another tokenizer."""
    changed(folder / file, **{key: value})
    for asked in (base_model.digest, base_model.describe):
        with pytest.raises(ConfigError, match=key):
            asked(folder)


def test_a_merged_model_brings_the_chat_template_that_was_trained_with(folder: Path) -> None:
    beside = folder / "additional_chat_templates" / "default.jinja"
    beside.parent.mkdir()
    beside.write_text(causal_models.CHAT.replace("|>", "|> w1"))
    files = export.merged(*bench_of(folder, format="messages"))
    assert files["chat_template.jinja"] == beside.read_bytes()


MESSAGES = Task(kind="causal-lm", format="messages", max_length=40)


def conversations(template: Any, *prompts: str) -> list[Any]:
    records = [Record(texts=("user", prompt, "assistant", "w2"), label=0) for prompt in prompts]
    return completions.encoded(records, causal_models.tokenizer(template), MESSAGES)


@pytest.mark.parametrize(
    "does",
    ["messages[0].content + 1", "1 / (messages[0].content == 'w1')|int", "range(10 ** 9)", "raise_exception(messages[0].content)"],
)
def test_whatever_a_chat_template_raises_is_a_refusal_with_a_count_that_quotes_nothing(does: str) -> None:
    """Only Jinja's own errors were caught, at the first record: a TypeError was a bug, its traceback with the text in it a file."""
    template = "{% if messages[0].content != 'w5' %}{% set x = " + does + " %}{% endif %}" + causal_models.CHAT
    secret = "secret"[::-1]
    with pytest.raises(RecordsError, match="refuses 2 of 3 conversations") as caught:
        conversations(template, secret, "w5", secret)
    assert caught.value.hint
    assert secret not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("draw", ["{{ ['w1', 'w1']|random }} ", "{{ [['w1']]|map('random')|first }} ", "{{ lipsum(html=false) }} "])
def test_a_chat_template_that_draws_at_random_is_refused(draw: str) -> None:
    """A record would be other tokens at each start, and with equal halves of a conversation nothing would have noticed."""
    with pytest.raises(ConfigError, match="draws at random"):
        conversations(draw + causal_models.CHAT, "w1")


def test_several_chat_templates_without_a_default_are_a_stated_refusal() -> None:
    with pytest.raises(ConfigError, match="several and none by default"):
        conversations({"tool": causal_models.CHAT, "rag": causal_models.CHAT}, "w1")


def test_a_template_may_ask_for_the_day_by_name() -> None:
    """As transformers' own function lets it."""
    (row,) = conversations("{{ strftime_now(format='%d') }} " + causal_models.CHAT, "w1")
    assert row[0][:3] == (0, 0, 0)


def test_a_token_that_the_model_does_not_know_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    """It ended a round with an IndexError, after the charge, whenever its unit was sampled: others saw when that was."""
    causal_models.base().save_pretrained(tmp_path)
    larger = causal_models.tokenizer()
    larger.add_tokens(["more"])
    larger.save_pretrained(tmp_path)
    units = [Unit(id=text, records=(Record(texts=("w1", text), label=0),)) for text in ("w2", "more", "w3 more")]
    task = Task(kind="causal-lm", format="prompt-response", max_length=8)
    assert len(tokens.encode(units[:1], tmp_path, task)) == 1
    with pytest.raises(RecordsError, match="2 of 3 records hold tokens beyond the base model's vocabulary of 60"):
        tokens.encode(units, tmp_path, task)
    text = Unit(id="x", records=(Record(texts=("more",), label=0),))
    with pytest.raises(RecordsError, match="1 of 1 records"):
        tokens.encode([text], tmp_path, Task(labels=("no", "yes"), max_length=8))


def test_a_length_beyond_the_models_positions_is_a_stated_refusal(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 24}
    terms = causal_models.terms(task={"max_length": 32}, adapter={"modules": ["h.0.attn.c_proj"]})
    model = causal.assemble(causal_models.base("gpt2", sizes), terms)
    with pytest.raises(ConfigError, match="cannot take 32 tokens"):
        training.Contribution(terms, model, [], rows_tokens=64)


class Scripted:
    """A model that writes the same tokens after any prompt, whatever they are, and then w9 for ever."""

    def __init__(self, prompt: int, written: list[int]) -> None:
        self.device, self._prompt, self._written = torch.device("cpu"), prompt, written

    def hidden(self, batch: PhysicalBatch) -> torch.Tensor:
        """The number of the next token, as a vector of one number."""
        done = batch.input_ids.shape[1] - self._prompt
        token = self._written[done] if done < len(self._written) else causal_models.WORDS.index("w9")
        return torch.full((1, batch.input_ids.shape[1], 1), float(token))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All on that token."""
        return torch.nn.functional.one_hot(hidden[..., 0].long(), 60).float()


def test_writing_ends_where_the_chat_template_ends_a_message(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates end a message with a token of their own more often than with EOS (Gemma, Phi, Llama 3): no answer ever matched."""
    bench, _ = bench_of(folder, format="messages")
    words = [causal_models.WORDS.index(word) for word in ("w3", "w4", "<|end|>", "<|user|>")]
    monkeypatch.setattr(answers, "_at", lambda bench, state: Scripted(5, words))
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    short = [*talk[:1], {"role": "assistant", "content": "w3"}]
    path = sessions.write_rows(tmp_path / "talks.jsonl", [{"messages": talk}, {"messages": short}])
    assert answers.exact_matches(bench, None, path, 16) == 0.5


def test_a_choice_that_does_not_fit_is_refused_and_not_judged_by_its_beginning(folder: Path) -> None:
    """Cut, it has fewer tokens to be unlikely in, and the longest choice wins."""
    bench, _ = bench_of(folder, max_length=8)
    fits = Question(prompt="w1 w2", choices=("w3", "w3 w4 w5 w6"), answer=0)
    assert answers.choose(bench, None, [fits])[0] in (0.0, 1.0)
    with pytest.raises(RecordsError, match="1 of 4 choices do not fit within 8 tokens"):
        answers.choose(bench, None, [fits, Question(prompt="w1 w2", choices=("w3", "w3 w4 w5 w6 w7"), answer=0)])


def test_a_full_disk_while_merging_is_said_as_what_it_is(folder: Path) -> None:
    """The weights' writer raises an error of its own, which was taken for a bug."""
    bench, origin = bench_of(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(MachineError, match="cannot write the merged model") as caught:
            export.merged(bench, origin)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "TMPDIR" in caught.value.hint


def test_init_refuses_the_built_in_encoder() -> None:
    """The default model: the draft could be signed, and was refused only where each silo joins."""
    options = {"labels": "", "form": "text", "of_texts": False}
    with pytest.raises(typer.BadParameter, match="--model"):
        check_kind("causal-lm", model=base_model.MINILM, **options)
    check_kind("causal-lm", model="m", **options)
    check_kind("text-classification", labels="a,b", form="", of_texts=True, model=base_model.MINILM)


def test_what_the_template_writes_before_an_answer_belongs_to_what_is_learned_and_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen 3 begins an answer with an empty thought, after the generation prompt: a model that learned it never matched."""
    content, thinks = "message['content']", "('w7 ' if loop.last and message['role'] == 'assistant' else '')"
    thought = causal_models.CHAT.replace(content, f"{thinks} + {content}")
    (folder / "chat_template.jinja").write_text(thought)
    bench, _ = bench_of(folder, format="messages")
    words = [causal_models.WORDS.index(word) for word in ("w7", "w3", "<|end|>")]
    monkeypatch.setattr(answers, "_at", lambda bench, state: Scripted(5, words))
    talks = [[{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": answer}] for answer in ("w3", "w4")]
    path = sessions.write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    assert answers.exact_matches(bench, None, path, 16) == 0.5


def test_the_cards_code_ends_no_prompt_with_end_of_text(tmp_path: Path) -> None:
    """Some tokenizers put EOS after every text; a prompt that ends was never trained on, and nothing follows it."""
    causal_models.base().save_pretrained(tmp_path)
    ending = causal_models.tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ending.save_pretrained(tmp_path)
    trained = tokens.encode([Unit(id="x", records=(Record(texts=("w1 w2", "w3"), label=0),))], tmp_path, causal_models.terms().task)
    ((ids, _, prompt),) = trained[0].rows
    _, origin = bench_of(tmp_path)
    code = card.causal_snippet(origin, merged=True).replace('base = "."', f"base = {str(tmp_path)!r}")
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    given: list[Any] = []
    names["model"].generate = lambda **inputs: (given.append(inputs), inputs["input_ids"])[1]
    names["complete"]("w1 w2")
    assert given[0]["input_ids"].tolist() == [list(ids[:prompt])]
    assert given[0]["attention_mask"].shape == given[0]["input_ids"].shape
