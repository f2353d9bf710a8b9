# SPDX-License-Identifier: Apache-2.0
"""How often a causal language model answers rightly: by the likelihood of given choices, or by what it writes.

The figures depend on records and are exact: printing them to the owner of the records is fine, sending them is a release that no
ledger here charges.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from privacy import update_rule
from privacy.errors import ConfigError, RecordsError
from privacy.federation import Task
from privacy.rows import Row, read_rows, refuse
from privacy.update_rule import State
from silo.learning import completions, records, tokens
from silo.learning.causal import CausalModel
from silo.learning.evaluation import Bench
from silo.learning.gradients import as_batch, bucket
from silo.learning.records import Record
from silo.learning.tokens import EncodedUnit

_HINT = 'write a question as {"prompt": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, what may be answered, and the place of the right one among these."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """The questions in ``path``: rows of ``prompt``, ``choices`` (a list of texts) and ``answer`` (a place in it, from 0).

    Raises:
        RecordsError: a row cannot be used.
    """
    return [_question(path, line, row) for line, row in read_rows(path)]


def choose(bench: Bench, state: State | None, questions: Sequence[Question]) -> tuple[float, float]:
    """(the share of ``questions`` whose right choice is the likeliest, the same with the likelihood per token).

    Of equally likely choices the first counts. None is the state before round 1. One choice at a time passes through the model.

    Raises:
        ConfigError: the contract's records have no prompt, or its task is another.
        RecordsError: as ``completions.encoded``; or a choice does not fit whole: cut, it has less to be unlikely in.
    """
    model, longest = _at(bench, state), bench.terms.task.max_length
    asked = [_record(bench, question.prompt, choice) for question in questions for choice in question.choices]
    rows = completions.encoded(asked, tokens.load(bench.folder), _uncut(bench.terms.task))
    if beyond := sum(len(ids) > longest for ids, _, _ in rows):
        raise RecordsError(
            f"{beyond} of {len(rows)} choices do not fit within {longest} tokens, with their prompts",
            hint="shorten or drop such questions", code="prompt-too-long", found=beyond,
        )  # fmt: skip
    losses = []
    for row in rows:
        batch = as_batch([EncodedUnit(id="", rows=(row,))], bucket(len(row[0]), longest), 1)
        with torch.no_grad():
            total, count = model.row_sums(batch.to(model.device))
        losses.append((float(total), float(total) / int(count)))
    right = right_by_token = place = 0
    for question in questions:
        whole, each = zip(*losses[place : place + len(question.choices)], strict=True)
        place += len(whole)
        right += whole.index(min(whole)) == question.answer
        right_by_token += each.index(min(each)) == question.answer
    return right / len(questions), right_by_token / len(questions)


def exact_matches(bench: Bench, state: State | None, path: Path, most: int) -> float:
    """The share of the records in ``path`` whose response is what the model writes after the prompt, up to white space at the ends.

    It writes greedily, one record at a time: the likeliest token each time, until the end of text, what ends a message in the
    chat template, or ``most`` tokens, or the contract's length is reached. A response is the whole of what is learned, with what a
    template writes before it, as it comes out of the tokenizer: its spaces and unknown words are no mistakes of the model.

    Raises:
        ConfigError, RecordsError: as ``choose``, and as ``silo.learning.records.load``.
    """
    model, tokenizer, task = _at(bench, state), tokens.load(bench.folder), bench.terms.task
    asked = [record for unit in bench.records(path) for record in unit.records]
    ends, right = completions.ends(tokenizer, task), 0
    fitting = completions.encoded(asked, tokenizer, task)  # refuses a prompt that leaves no room
    for (ids, _, prompt), (whole, *_) in zip(fitting, completions.encoded(asked, tokenizer, _uncut(task)), strict=True):
        written = written_after(model, ids[:prompt], most=min(most, task.max_length - prompt), ends=ends)
        wanted = list(itertools.takewhile(lambda token: token not in ends, whole[prompt:]))
        found, right_one = (tokenizer.decode(each, skip_special_tokens=True).strip() for each in (written, wanted))
        right += found == right_one
    return right / len(asked)


def _uncut(task: Task) -> Task:
    """The same task, with room for records of any length."""
    return msgspec.structs.replace(task, max_length=sys.maxsize)


def written_after(model: CausalModel, prompt: Sequence[int], *, most: int, ends: Collection[int]) -> list[int]:
    """At most ``most`` tokens after ``prompt``, each the likeliest, up to and without one of ``ends``; of equals the first."""
    found: list[int] = []
    while len(found) < most:
        so_far = EncodedUnit(id="", rows=(((*prompt, *found), None, 0),))
        batch = as_batch([so_far], len(prompt) + len(found), 1).to(model.device)
        with torch.no_grad():
            likeliest = int(model.logits(model.hidden(batch)[:, -1]).argmax())
        if likeliest in ends:
            break
        found.append(likeliest)
    return found


def _at(bench: Bench, state: State | None) -> CausalModel:
    """The model at ``state``. Raises ConfigError where records have no prompt to answer."""
    model = bench.causal
    if bench.terms.task.format == "text":
        raise ConfigError(
            "the contract's records are texts, without prompt and response",
            hint="answers can be judged where format is prompt-response or messages", code="task-kind",
        )  # fmt: skip
    model.write((state or update_rule.initial(bench.terms)).theta)
    return model


def _record(bench: Bench, prompt: str, choice: str) -> Record:
    """A question and one of its choices, in the form of the contract's records."""
    if bench.terms.task.format == "messages":
        return Record(texts=("user", prompt, "assistant", choice), label=0)
    return Record(texts=(prompt, choice), label=0)


def _question(path: Path, line: int, row: Row) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        refuse(path, line, '"choices" is no list of two or more texts', _HINT)
    if type(answer) is not int or not 0 <= answer < len(choices):
        refuse(path, line, f'"answer" is no place in the list of {len(choices)} choices, counted from 0', _HINT)
    texts = [records.text_of(path, line, {"choice": choice}, "choice") for choice in choices]
    return Question(prompt=records.text_of(path, line, row, "prompt"), choices=tuple(texts), answer=answer)
